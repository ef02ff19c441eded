"""Model card, rendered from the files beside the weights.

`model_card.md` is its template. Sections without data are left out, so a bare folder of weights gets a short card; a
card that somebody wrote or edited is kept.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..configuration_segformer import VARIANTS, SegFormerConfig
from ..conversion.checkpoints import read_config
from ..files import resolve_inside, toml_value
from .model_folder import model_kind, read_model_config, read_optional, read_weights
from .usage_code import HALF, remote_usage, usage

IMAGES = ("prediction.png", "confusion.png", "reliability.png", "curve.png")

_SCORES = {"mean_iou": "Mean IoU", "mean_accuracy": "Mean accuracy", "overall_accuracy": "Pixel accuracy"}
# Further scores that `segformer evaluate` measures: overall, and their headings by class.
_MEASURED_TOO = {
    "mean_dice": "Mean Dice",
    "precision": "Precision",
    "boundary_iou": "Boundary IoU",
    "calibration_error": "Calibration error",
}
_BY_CLASS_TOO = {"dice": "Dice"} | {name: title for name, title in _MEASURED_TOO.items() if name != "mean_dice"}
_PIPELINES = {
    "segmentation": "image-segmentation",
    "classification": "image-classification",
    "encoder": "image-feature-extraction",
}
_TEMPLATE = "model_card.md"
_SEAL = re.compile(r"\n<!-- Rendered by hf_segformer ([0-9a-f]{16}); once edited it is kept as it is. -->\n\Z")
_FRONT_MATTER = re.compile(r"\A\s*---\n.*?^---\s*$", re.DOTALL | re.MULTILINE)
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_DRAFT = "generated automatically according to the information the Trainer had access to"
_GENERATED = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)


def write_card(folder: str | Path, *, repo_id: str | None = None) -> Path:
    """Write FOLDER/README.md, unless there is one that somebody wrote or edited.

    Args:
        folder: of `save_pretrained`. Read are config.json, the weights' headers, and if present metrics.json,
            training.json, prediction.png, confusion.png and curve.png.
        repo_id: repository from which the card's usage code loads the model; the folder without it.

    Returns:
        the card's path.

    Raises:
        ValueError: if config.json is another network's, or a file is damaged or a link out of the folder; the message
            names it.
        OSError: if there is no config.json or no weights, or a file cannot be written.

    Examples:
        >>> from hf_segformer.hub.model_card import write_card
        >>> write_card("outputs/shapes_b0", repo_id="me/shapes").name
        'README.md'
    """
    path = Path(folder) / "README.md"
    path.write_text(card_text(folder, repo_id=repo_id), encoding="utf-8")
    return path


def card_text(folder: str | Path, *, repo_id: str | None = None) -> str:
    """Return the card that somebody wrote or edited, if the folder has one, or else a new one; see `write_card`."""
    return edited_card(folder) or render_card(Path(folder), lambda: card_values(Path(folder), repo_id))


def edited_card(folder: str | Path) -> str:
    """Return the card that somebody wrote or edited; empty if there is none.

    Raises:
        ValueError: if it is a link out of the folder.
    """
    path = resolve_inside(folder, "README.md")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return "" if _is_rendered(text) else text


def is_edited_text(text: str) -> bool:
    """Return True if somebody wrote or edited the text of a card, beyond the metadata that a repository begins with.

    Examples:
        >>> from hf_segformer.hub.model_card import is_edited_text
        >>> is_edited_text("# Mine"), is_edited_text("")
        (True, False)
    """
    return bool(_FRONT_MATTER.sub("", text).strip()) and not _is_rendered(text)


def is_hub_id(name: Any) -> bool:
    """Return True if a value can be the name of a repository on the Hub, `owner/name`."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None


def _is_rendered(text: str) -> bool:
    """Return True if a card is unchanged since it was rendered here, or is a draft that Transformers generated."""
    seal = _SEAL.search(text)
    if seal is None:
        return _DRAFT in " ".join(text.split()) or _is_template(text)
    return seal[1] == _digest(text[: seal.start()])


def _is_template(text: str) -> bool:
    """Return True for the Hub's blank template, which `push_to_hub` of Transformers' models fills in."""
    if _GENERATED not in text:
        return False
    from huggingface_hub import ModelCard, ModelCardData

    template = ModelCard.from_template(ModelCardData(), model_description=_GENERATED).content
    ours, theirs = (_FRONT_MATTER.sub("", each).split() for each in (text, template))
    return ours == theirs


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def render_card(folder: Path, values: Callable[[], dict[str, Any]]) -> str:
    """Render the template.

    Args:
        folder: for messages.
        values: gives those of `card_values`.

    Raises:
        ValueError: if the folder's files hold values of wrong types.
    """
    import jinja2

    beside = Path(__file__).parents[1] / _TEMPLATE  # in a wheel; in a checkout it is at the root
    template = beside if beside.is_file() else Path(__file__).parents[2] / _TEMPLATE
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    content = environment.from_string(template.read_text(encoding="utf-8"))
    try:
        text = content.render(values())
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        raise ValueError(f"{folder}: metrics.json or training.json holds values of wrong types ({error})") from error
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return f"{text}\n<!-- Rendered by hf_segformer {_digest(text)}; once edited it is kept as it is. -->\n"


def card_values(
    folder: Path,
    repo_id: str | None,
    *,
    metrics: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    title_end: str = "",
) -> dict[str, Any]:
    """Collect the template's values; names and titles that users gave are safe in Markdown.

    Args:
        folder: of a model.
        repo_id: see `write_card`.
        metrics: in place of the folder's metrics.json.
        training: in place of the folder's training.json.
        title_end: end of the title of a model without a repository.
    """
    has_code = bool(read_model_config(folder).get("auto_map"))
    config, (parameters, dtype) = read_config(folder), read_weights(folder)
    metrics = read_optional(folder, "metrics.json") if metrics is None else metrics
    training = read_optional(folder, "training.json") if training is None else training
    kind, variant = model_kind(folder), _variant(config)
    names = [] if kind == "encoder" else [config.id2label[index] for index in range(config.num_labels)]
    data, results = training.get("dataset") or {}, _results(metrics, training)
    own_title = " ".join(["SegFormer", variant, *_on(data.get("title"))]).strip() + title_end
    plain_title = repo_id.split("/")[-1] if repo_id else own_title
    channels = config.num_channels
    source = repo_id or (folder.as_posix() if _is_below(folder) else folder.resolve().name)
    return {
        "metadata": _metadata(plain_title, _PIPELINES[kind], data, training, results),
        "title": in_markdown(plain_title),
        "ensemble": "",
        "kind": kind,
        "variant": variant,
        "size": f"{parameters:,} parameters"
        + (f" in {dtype}" if dtype else "")
        + (f", for images of {channels} channel{'s' if channels != 1 else ''}" if channels != 3 else ""),
        "names": [in_markdown(name) for name in names],
        "usage": usage(kind, source, dtype),
        "remote_usage": remote_usage(kind, source, dtype, repo_id is not None) if has_code else "",
        "is_half": dtype in HALF,
        "on_hub": repo_id is not None,
        "terms": in_markdown((data.get("terms") or "").rstrip(". ")),
        "scores": _overall_scores(results),
        "evaluated": _evaluated(results),
        "threshold_note": _threshold_note(folder, config, names, results.get("binary") or {}),
        "interval_note": _interval_note(results.get("intervals") or {}),
        "class_columns": _class_columns(results.get("classes", ())),
        "classes": [row for row in results.get("classes", ()) if row["iou"] is not None],
        "absent": [row["name"] for row in results.get("classes", ()) if row["iou"] is None],
        "images": [name for name in IMAGES if (folder / name).is_file()],
        "training_data": _training_data(data),
        "held_out": _held_out(training.get("split") or {}),
        "start": " ".join(filter(None, (_start(training), _teacher(training.get("teacher") or {})))),
        "steps": _steps(training),
        "settings": _settings(training),
        "has_recipe": bool(training.get("recipe")),
        "environment": _environment(training),
    }


def _is_below(folder: Path) -> bool:
    """Return True if a path, as given, leads from the working folder downwards."""
    return not folder.is_absolute() and ".." not in folder.parts and bool(folder.parts)


def in_markdown(text: Any) -> str:
    r"""Escape a user's text, on one line, so that nothing in it is read as Markdown or HTML.

    Examples:
        >>> from hf_segformer.hub.model_card import in_markdown
        >>> print(in_markdown("a|b_c"))
        a\|b\_c
    """
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", " ".join(str(text).split()))


def _variant(config: SegFormerConfig) -> str:
    """Return `"B0"` to `"B5"`, or `""` where the shape is no published one."""
    for name, shape in VARIANTS.items():
        if all(list(getattr(config, key)) == shape[key] for key in ("hidden_sizes", "depths")):
            return name.upper() if config.decoder_hidden_size == shape["decoder_hidden_size"] else ""
    return ""


def _on(title: str | None) -> list[str]:
    return ["on", title] if title else []


def _metadata(title: str, pipeline: str, data: dict, training: dict, results: dict) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    hub_id, base = data.get("hub_id"), training.get("base_model")
    hub_id = hub_id if is_hub_id(hub_id) else None
    measured = results.get("dataset") or {}
    name = measured.get("title") or data.get("title") or hub_id or "evaluation data"
    same = hub_id is not None and measured.get("title") in (None, data.get("title"))
    evaluations = [
        EvalResult(
            task_type=pipeline,
            dataset_type=hub_id if same and hub_id else re.sub(r"\W+", "-", name.lower()).strip("-") or "other",
            dataset_name=name,
            dataset_split=measured.get("split") or None,
            metric_type=key,
            metric_name=title,
            metric_value=round(results[key], 4),
        )
        for key, title in (_SCORES | _MEASURED_TOO).items()
        if results.get(key) is not None
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        license=training.get("license"),
        base_model=base if is_hub_id(base) else None,
        datasets=[hub_id] if hub_id else None,
        metrics=[evaluation.metric_type for evaluation in evaluations] or None,
        tags=["hf_segformer", "segformer"] + ["semantic-segmentation"] * (pipeline == "image-segmentation"),
        model_name=title if evaluations else None,
        eval_results=evaluations or None,
    ).to_yaml()


def _results(metrics: dict, training: dict) -> dict[str, Any]:
    """Return the contents of metrics.json, or else the Trainer's own evaluation."""
    results = dict(metrics or training.get("evaluation") or {})
    if "classes" in results:
        results["classes"] = [row | {"name": in_markdown(row["name"])} for row in results["classes"]]
    return results


def _overall_scores(results: dict) -> list[tuple[str, str]]:
    """Format the overall scores that were measured, with their confidence intervals where there are any."""
    intervals = results.get("intervals") or {}
    return [
        (title, f"{_percent(results[key])} %{_span(intervals.get(key))}")
        for key, title in (_SCORES | _MEASURED_TOO).items()
        if results.get(key) is not None
    ]


def _class_columns(classes: Iterable[dict]) -> list[tuple[str, list[str]]]:
    """Format the columns of the table by class; scores that no class has are left out."""
    rows = [row for row in classes if row["iou"] is not None]
    columns = [
        ("IoU, %", [_percent(row["iou"]) + _span((row.get("intervals") or {}).get("iou")) for row in rows]),
        ("Accuracy, %", [_percent(row["accuracy"]) for row in rows]),
    ]
    columns += [
        (f"{title}, %", [_percent(row.get(key)) for row in rows])
        for key, title in _BY_CLASS_TOO.items()
        if any(row.get(key) is not None for row in rows)
    ]
    if all(row.get("pixels") is not None for row in rows):
        columns.append(("Pixels", [_number(row["pixels"]) for row in rows]))
    return columns


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _span(interval: Sequence[float] | None) -> str:
    """Format the ends of a confidence interval in percent; empty without one."""
    if interval is None:
        return ""
    low, high = interval
    return f" ({_percent(low)} to {_percent(high)})"


def _threshold_note(folder: Path, config: SegFormerConfig, names: Sequence[str], binary: dict) -> str:
    """Describe the threshold of a binary model, and the scores that do not depend on it, as far as they are known."""
    if len(names) != 1 or config.num_labels != 1:
        return ""
    threshold = read_optional(folder, "preprocessor_config.json").get("binary_threshold", 0.5)
    sentences = [f"Pixels are {names[0]} above a probability of {threshold:.5g}, the model's threshold."]
    measured_at = binary.get("threshold")
    if measured_at is not None and f"{measured_at:.5g}" != f"{threshold:.5g}":
        sentences.append(f"The scores of this card were measured with {measured_at:.5g}, before that was changed.")
    measured = {"the area under the ROC curve": binary.get("auc"), "average precision": binary.get("average_precision")}
    known = [f"{name} is {_percent(value)} %" for name, value in measured.items() if value is not None]
    if known:
        sentences.append(f"Over all thresholds, {' and '.join(known)}.")
    return " ".join(sentences)


def _interval_note(intervals: dict) -> str:
    """Describe the confidence intervals, if there are any."""
    if not intervals:
        return ""
    unit = in_markdown(intervals["unit"])
    return (
        f"In brackets: {100 * intervals['level']:g} % confidence intervals by a bootstrap over "
        f"{_number(intervals['num_drawn'])} {unit}. They show how the scores vary with the choice of {unit}, not how "
        "they fall on images of another kind, and not how training varies with its seed."
    )


def _training_data(data: dict) -> str:
    title = in_markdown(data.get("title") or "")
    images = f"{_number(data['images'])} images" if data.get("images") else ""
    of = " of ".join(part for part in (images, title) if part)
    hub_id = data.get("hub_id")
    link = f" ([{in_markdown(hub_id)}](https://huggingface.co/datasets/{hub_id}))" if is_hub_id(hub_id) else ""
    return f"{of}{link}." if of or link else ""


def _held_out(split: dict) -> str:
    """Describe the images that were held out of the training split, if any were."""
    held_out = split.get("evaluation") or {}
    if not held_out:
        return ""
    text = f"Held out of the training split, and not trained on, were {_number(held_out['images'])} images"
    drawn = f"drawn with seed {split.get('seed', 0):d}"
    if split.get("hold_out"):
        text += f": every image of {', '.join(map(in_markdown, split['hold_out']))}"
    elif split.get("folds"):
        text += f": fold {split['fold']:d} of {split['folds']:d} (counted from 0), {drawn}"
    else:
        text += f": a share of {_percent(split.get('share'))} %, {drawn}"
    return f"{text}.{groups_note(split, held_out.get('groups'))}"


def groups_note(split: dict, number: int | None = None) -> str:
    """Say that no group of images is on both sides, and how groups were found; empty without groups."""
    how = (
        f"the column {in_code(split['column'])}"
        if split.get("column")
        else f"the pattern {in_code(split.get('group', ''))} in the images' names"
    )
    if not (split.get("column") or split.get("group")):
        return ""
    held_out = f" They make up {_number(number)} group{'s' if number != 1 else ''} of images." if number else ""
    return f"{held_out} No group is on both sides; groups follow from {how}."


def in_code(text: str) -> str:
    """A user's text as code in Markdown, on one line."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{' ' * line.startswith('`')}{line}{' ' * line.endswith('`')}{fence}"


def _start(training: dict) -> str:
    """Describe the weights that training began with, if they are known."""
    base, model = training.get("base_model"), (training.get("recipe") or {}).get("model") or {}
    if is_hub_id(base):
        return f"Training started from [{in_markdown(base)}](https://huggingface.co/{base})."
    if model.get("variant") and not model.get("checkpoint"):
        return "The model was trained from scratch."
    return ""


def _teacher(teacher: dict) -> str:
    """Describe the model that this one was distilled from, if there was one."""
    if not teacher:
        return ""
    name = teacher.get("name")
    which = f"[{in_markdown(name)}](https://huggingface.co/{name})" if is_hub_id(name) else "a model"
    size = f" of {_number(teacher['parameters'])} parameters" if teacher.get("parameters") else ""
    digest = f" (digest of its weights {in_markdown(teacher['digest'])})" if teacher.get("digest") else ""
    return f"Its teacher was {which}{size}{digest}."


def _evaluated(results: dict) -> str:
    data, method = results.get("dataset") or {}, results.get("method") or {}
    if isinstance(method, str):  # of a pre-training, which evaluates whole images: its name
        method = {}
    title, split = in_markdown(data.get("title") or ""), in_markdown(data.get("split") or "")
    images = f"{_number(data['images'])} images" if data.get("images") else ""
    where = " of ".join(part for part in (images, title) if part) + (f" (split {split})" if split else "")
    sentences = [f"Measured on {where.strip()}."] if where.strip() else []
    if seen := data.get("trained_on"):
        sentences.append(
            f"**The model was trained on {_number(seen)} of them: the scores are not those of new images.**"
        )
    if results.get("step"):
        sentences.append(f"This is the Trainer's evaluation at step {_number(results['step'])}.")
    if method:
        window = method.get("sliding_window") or method.get("window")
        how = "whole images"
        if window:
            how = f"a sliding window of {_number(window)} pixels with a stride of {_number(method['stride'])}"
        augmentations = ["horizontal flips"] if method.get("flip") else []
        scales = method.get("scales") or [1.0]
        if list(scales) != [1.0]:
            augmentations.append(f"the scales {', '.join(f'{scale:g}' for scale in scales)}")
        averaged = f", averaged over {' and '.join(augmentations)} (test-time augmentation)" if augmentations else ""
        sentences.append(f"Predictions are made on {how}{averaged}.")
    return " ".join(sentences)


def _steps(training: dict) -> str:
    steps, epochs, batch = (training.get(key) for key in ("steps", "epochs", "batch_size"))
    if not steps:
        return ""
    text = f"Training took {_number(steps)} steps"
    text += f" of {_number(batch)} image{'s' if batch != 1 else ''}" if batch else ""
    text += f", {epochs:,.4g} epoch{'s' if epochs != 1 else ''}" if epochs else ""
    return f"{text}."


def _settings(training: dict) -> str:
    """Format the recipe as TOML, or else the Trainer's arguments."""
    recipe = training.get("recipe")
    if recipe:
        tables = {name: _toml(values) for name, values in recipe.items()}
        return "\n\n".join(f"[{_toml_key(name)}]\n{text}" for name, text in tables.items() if text)
    return _toml(training.get("arguments") or {})


def _toml(values: dict[str, Any]) -> str:
    return "\n".join(f"{_toml_key(key)} = {toml_value(value)}" for key, value in values.items() if value is not None)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def _environment(training: dict) -> list[tuple[str, str]]:
    hours, processes, versions = (training.get(key) for key in ("hours", "processes", "versions"))
    rows = [
        ("Hardware", in_markdown(training.get("hardware") or "")),
        ("Processes", _number(processes) if processes and processes > 1 else ""),
        ("Training time", _duration(hours) if hours else ""),
        ("Versions", ", ".join(in_markdown(f"{name} {version}") for name, version in (versions or {}).items())),
        ("Commit", in_markdown(training.get("commit") or "")),
    ]
    return [(name, value) for name, value in rows if value]


def _duration(hours: float) -> str:
    return f"{60 * hours:.1f} minutes" if hours < 1 else f"{hours:.1f} hours"


def _number(value: float) -> str:
    return f"{value:,}"


__all__ = [
    "IMAGES",
    "card_text",
    "card_values",
    "edited_card",
    "groups_note",
    "in_code",
    "in_markdown",
    "is_edited_text",
    "is_hub_id",
    "render_card",
    "write_card",
]
