"""The model card: rendered from the files that lie beside the weights, never typed in.

`model_card.md` is its template. What was not measured is left out, so a bare folder of weights gets a short card; and a
card that somebody wrote or edited is kept.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ..configuration_segformer import VARIANTS, SegFormerConfig
from ..conversion.checkpoints import read_json
from ..training.run_record import is_hub_id

PICTURES = ("prediction.png", "confusion.png", "curve.png")
MODEL_TYPES = ("hf_segformer", "segformer")

_SCORES = {"mean_iou": "Mean IoU", "mean_accuracy": "Mean accuracy", "overall_accuracy": "Pixel accuracy"}
_KINDS = {"ForSemanticSegmentation": "segmentation", "ForImageClassification": "classification"}
_PIPELINES = {
    "segmentation": "image-segmentation",
    "classification": "image-classification",
    "encoder": "image-feature-extraction",
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_TEMPLATE = "model_card.md"
_SEAL = re.compile(r"\n<!-- Rendered by hf_segformer ([0-9a-f]{16}); once edited it is kept as it is. -->\n\Z")
_DRAFT = "generated automatically according to the information the Trainer had access to"


def write_card(folder: str | Path, *, repo_id: str | None = None) -> Path:
    """Write FOLDER/README.md, unless there is one that somebody wrote or edited.

    Args:
        folder: of `save_pretrained`. Read are config.json, the weights' headers, and where they exist metrics.json,
            training.json, prediction.png, confusion.png and curve.png.
        repo_id: by what the card says to load the model; by the folder's name without it.

    Returns:
        the card's path.

    Raises:
        ValueError: if config.json is another network's, or a file is damaged; the message names it.
        OSError: if there is no config.json or no weights, or a file can not be written.

    Example:
        >>> from hf_segformer.hub.model_card import write_card
        >>> write_card("outputs/shapes_b0", repo_id="me/shapes").name
        'README.md'
    """
    path = Path(folder) / "README.md"
    path.write_text(card_text(folder, repo_id=repo_id), encoding="utf-8")
    return path


def card_text(folder: str | Path, *, repo_id: str | None = None) -> str:
    """The card that somebody wrote or edited, if the folder has one, or else a new one; see `write_card`."""
    path = Path(folder) / "README.md"
    if path.is_file() and not _is_rendered(text := path.read_text(encoding="utf-8")):
        return text
    return _render(Path(folder), repo_id)


def read_model_config(folder: Path) -> dict[str, Any]:
    """What config.json says.

    Raises:
        ValueError: if it is damaged or another network's.
        OSError: if there is none.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise OSError(f"{folder} holds no config.json: give a folder that save_pretrained wrote")
    config = read_json(path)
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(f"{path} has model_type {config.get('model_type')!r}, but SegFormer's is 'hf_segformer'")
    return config


def read_weights(folder: Path) -> tuple[int, str]:
    """Number of parameters and their type, by the headers of the folder's *.safetensors.

    Returns:
        parameters without the statistics that BatchNorm keeps; the type's name, empty if there are several.

    Raises:
        ValueError: if a file is damaged or cut short, or one of several is missing.
        OSError: if there are none.
    """
    from safetensors import SafetensorError, safe_open

    count, dtypes = 0, set()
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 (a file is no dictionary)
                    if key.endswith(_BUFFERS):
                        continue
                    tensor, product = file.get_slice(key), 1
                    for side in tensor.get_shape():
                        product *= side
                    count += product
                    dtypes.add(tensor.get_dtype())
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or was not written to its end ({error}): save the model again"
            ) from None
    return count, _DTYPES.get(dtypes.pop(), "") if len(dtypes) == 1 else ""


def weight_files(folder: Path) -> list[Path]:
    """The file of the weights, or all that its index names.

    Raises:
        ValueError: if one is missing.
        OSError: if there are none.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise OSError(f"{folder} holds no model.safetensors: give a folder that save_pretrained wrote")
    paths = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{index} names {path.name}, which is not there: save the model again")
    return paths


def _is_rendered(text: str) -> bool:
    """Whether a card is as it was rendered here, or the Trainer's draft, which says itself that it is one."""
    seal = _SEAL.search(text)
    if seal is None:
        return _DRAFT in " ".join(text.split())
    return seal[1] == _digest(text[: seal.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _render(folder: Path, repo_id: str | None) -> str:
    import jinja2

    beside = Path(__file__).parents[1] / _TEMPLATE  # in a wheel; in a checkout it lies at the root
    template = beside if beside.is_file() else Path(__file__).parents[2] / _TEMPLATE
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {
        "percent": lambda share: "" if share is None else f"{100 * share:.1f}",
        "thousands": lambda number: f"{number:,}",
    }
    text = environment.from_string(template.read_text(encoding="utf-8")).render(_words(folder, repo_id))
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return f"{text}\n<!-- Rendered by hf_segformer {_digest(text)}; once edited it is kept as it is. -->\n"


def _words(folder: Path, repo_id: str | None) -> dict[str, Any]:
    """What the template is filled with; names and titles that users gave are safe in Markdown."""
    has_code = bool(read_model_config(folder).get("auto_map"))
    config, (parameters, dtype) = SegFormerConfig.from_pretrained(folder), read_weights(folder)
    metrics, training = (
        read_json(path) if path.is_file() else {} for path in (folder / "metrics.json", folder / "training.json")
    )
    architecture = (config.architectures or [""])[0]
    kind = next((kind for end, kind in _KINDS.items() if architecture.endswith(end)), "encoder")
    variant = _variant(config)
    names = [] if kind == "encoder" else [config.id2label[index] for index in range(config.num_labels)]
    data, results = training.get("dataset") or {}, _results(metrics, training)
    plain_title = (
        repo_id.split("/")[-1] if repo_id else " ".join(["SegFormer", variant, *_on(data.get("title"))]).strip()
    )
    channels, source = config.num_channels, repo_id or folder.resolve().name
    return {
        "metadata": _metadata(plain_title, _PIPELINES[kind], data, training, results),
        "title": in_markdown(plain_title),
        "kind": kind,
        "variant": variant,
        "size": f"{parameters:,} parameters"
        + (f" in {dtype}" if dtype else "")
        + (f", for images of {channels} channel{'s' if channels != 1 else ''}" if channels != 3 else ""),
        "origin": _origin(training),
        "names": [in_markdown(name) for name in names],
        "usage": _usage(kind, source),
        "remote_usage": _remote_usage(kind, source, repo_id is not None) if has_code else "",
        "on_hub": repo_id is not None,
        "terms": in_markdown((data.get("terms") or "").rstrip(". ")),
        "scores": [(title, results[key]) for key, title in _SCORES.items() if results.get(key) is not None],
        "evaluated": _evaluated(results),
        "classes": [row for row in results.get("classes", ()) if row["iou"] is not None],
        "absent": [row["name"] for row in results.get("classes", ()) if row["iou"] is None],
        "has_pixels": all(row.get("pixels") is not None for row in results.get("classes", ())),
        "pictures": [name for name in PICTURES if (folder / name).is_file()],
        "course": _course(training),
        "settings": _settings(training),
        "has_recipe": bool(training.get("recipe")),
        "environment": _environment(training),
    }


def in_markdown(text: Any) -> str:
    r"""Text of a user on one line, in which nothing is read as Markdown or HTML.

    Example:
        >>> from hf_segformer.hub.model_card import in_markdown
        >>> print(in_markdown("a|b_c"))
        a\|b\_c
    """
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", " ".join(str(text).split()))


def _variant(config: SegFormerConfig) -> str:
    """`"B0"` to `"B5"`, or nothing where the shape is no published one."""
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
            metric_name=_SCORES[key],
            metric_value=round(results[key], 4),
        )
        for key in _SCORES
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
    """What metrics.json says, or else what the Trainer's own evaluation did."""
    results = dict(metrics or training.get("evaluation") or {})
    if "classes" in results:
        results["classes"] = [row | {"name": in_markdown(row["name"])} for row in results["classes"]]
    return results


def _origin(training: dict) -> str:
    base, data = training.get("base_model"), training.get("dataset") or {}
    model = (training.get("recipe") or {}).get("model") or {}
    start = ""
    if is_hub_id(base):
        start = f" from [{in_markdown(base)}](https://huggingface.co/{base})"
    elif model.get("variant") and not model.get("checkpoint"):
        start = " from scratch"
    title = in_markdown(data.get("title") or "")
    images = f"{_number(data['images'])} images" if data.get("images") else ""
    of = " of ".join(part for part in (images, title) if part)
    return f"It was trained{start}{f' on {of}' if of else ''}." if start or of else ""


def _evaluated(results: dict) -> str:
    data, method = results.get("dataset") or {}, results.get("method") or {}
    title, split = in_markdown(data.get("title") or ""), in_markdown(data.get("split") or "")
    images = f"{_number(data['images'])} images" if data.get("images") else ""
    where = " of ".join(part for part in (images, title) if part) + (f" (split {split})" if split else "")
    sentences = [f"Measured on {where.strip()}."] if where.strip() else []
    if results.get("step"):
        sentences.append(f"This is the Trainer's evaluation at step {_number(results['step'])}.")
    if method:
        window = method.get("sliding_window")
        how = f"by a window of {window} pixels that moves by {method.get('stride')}" if window else "of whole images"
        ways = ["mirrored too"] if method.get("flip") else []
        scales = method.get("scales") or [1.0]
        if list(scales) != [1.0]:
            ways.append(f"at the scales {', '.join(f'{scale:g}' for scale in scales)}")
        sentences.append(f"Predictions are made {how}{''.join(f', {way}' for way in ways)}.")
    return " ".join(sentences)


def _course(training: dict) -> str:
    steps, epochs, batch = (training.get(key) for key in ("steps", "epochs", "batch_size"))
    if not steps:
        return ""
    text = f"It was trained for {_number(steps)} steps"
    text += f" of {_number(batch)} image{'s' if batch != 1 else ''}" if batch else ""
    text += f", {epochs:,.4g} epoch{'s' if epochs != 1 else ''}" if epochs else ""
    return f"{text}."


def _settings(training: dict) -> str:
    """The recipe as TOML, or else the Trainer's arguments."""
    recipe = training.get("recipe")
    tables = {name: _toml(values) for name, values in recipe.items()} if recipe else {}
    if recipe:
        return "\n\n".join(f"[{name}]\n{text}" for name, text in tables.items() if text)
    return _toml(training.get("arguments") or {})


def _toml(values: dict[str, Any]) -> str:
    return "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())


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


_CLASSES = {"segmentation": "ForSemanticSegmentation", "classification": "ForImageClassification", "encoder": "Model"}
_ANSWERS = {
    "segmentation": "[labels] = processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])",
    "classification": "label = model.config.id2label[outputs.logits.argmax().item()]",
    "encoder": "features = outputs.last_hidden_state",
}


def _usage(kind: str, source: str) -> str:
    """Five lines of Python that load the model and use it on an image."""
    name, where = f"SegFormer{_CLASSES[kind]}", json.dumps(source, ensure_ascii=False)
    lines = [
        f"from hf_segformer import {name}, SegFormerImageProcessor",
        f"model = {name}.from_pretrained({where}).eval()",
        f"processor = SegFormerImageProcessor.from_pretrained({where})",
        'outputs = model(**processor(image, return_tensors="pt"))  # image: a picture opened by Pillow',
        _ANSWERS[kind],
    ]
    return "\n".join(lines)


def _remote_usage(kind: str, source: str, on_hub: bool) -> str:
    """The same without the package: by the code that lies beside the weights."""
    name, where = f"AutoModel{_CLASSES[kind].removeprefix('Model')}", json.dumps(source, ensure_ascii=False)
    pins = ', "revision": "COMMIT", "code_revision": "COMMIT"' if on_hub else ""
    lines = [
        f"from transformers import AutoImageProcessor, {name}",
        f'options = {{"trust_remote_code": True{pins}}}',
        f"model = {name}.from_pretrained({where}, **options).eval()",
        f"processor = AutoImageProcessor.from_pretrained({where}, **options)",
    ]
    return "\n".join(lines)


__all__ = ["card_text", "in_markdown", "write_card"]
