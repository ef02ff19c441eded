"""Model card of an ensemble: the card of a model, with the scores of all runs and how they were measured.

The folder of repeated runs has `folds.json` or `seeds.json` beside the members; an ensemble that somebody put together
has neither, and its card no scores until it is evaluated itself.
"""

import json
from pathlib import Path
from typing import Any

from ..conversion.ensembles import member_folders
from .model_card import card_values, edited_card, groups_note, in_markdown, render_card
from .model_folder import read_optional, read_weights

RECORDS = ("folds.json", "seeds.json")

_NAMES = {"mean_iou": "Mean IoU", "mean_accuracy": "Mean accuracy", "overall_accuracy": "Pixel accuracy"}


def write_ensemble_card(folder: str | Path, *, repo_id: str | None = None) -> Path:
    """Write FOLDER/README.md, unless there is one that somebody wrote or edited.

    Args:
        folder: of an ensemble.
        repo_id: repository from which the card's usage code loads it; the folder without it.

    Returns:
        the card's path.

    Raises:
        ValueError: if a file is damaged, or a link out of the folder.
        OSError: if a file is missing, or the card cannot be written.
    """
    path = Path(folder) / "README.md"
    path.write_text(ensemble_card_text(folder, repo_id=repo_id), encoding="utf-8")
    return path


def ensemble_card_text(folder: str | Path, *, repo_id: str | None = None) -> str:
    """Return the card that somebody wrote or edited, or else a new one; see `write_ensemble_card`."""
    return edited_card(folder) or render_card(Path(folder), lambda: _values(Path(folder), repo_id))


def read_record(folder: Path) -> dict[str, Any]:
    """Scores of the repeated runs of a folder; empty where it has none.

    Raises:
        ValueError: if the file is damaged, or a link out of the folder.
    """
    return next((record for name in RECORDS if (record := read_optional(folder, name))), {})


def _values(folder: Path, repo_id: str | None) -> dict[str, Any]:
    members, record = member_folders(folder), read_record(folder)
    metrics = read_optional(folder, "metrics.json")
    values = card_values(
        members[0],
        repo_id,
        metrics=metrics or _mean_metrics(record),
        training=_training(members, record),
        title_end=f", {_what(record, len(members))}",
    )
    count = sum(read_weights(member)[0] for member in members)
    values |= {
        "ensemble": f"An ensemble of {len(members)} [SegFormers](https://arxiv.org/abs/2105.15203) for semantic "
        f"segmentation{_how_trained(record)}: their probabilities are averaged, and one of {len(values['names'])} "
        f"classes is predicted for every pixel of an image. Together they have {count:,} parameters, and they take "
        f"{len(members)} times the time of one.",
        "usage": _usage(folder, repo_id),
        "remote_usage": "",
        "is_half": False,
        "held_out": _protocol(record),
        "start": values["start"].replace("The model was", "The models were"),
        "images": [name for name in ("confusion.png",) if metrics and (folder / name).is_file()],
    }
    if record and not metrics:
        values |= _scores(record)
    elif record:
        values["evaluated"] += " " + _runs_in_a_sentence(record)
    return values


def _what(record: dict, number: int) -> str:
    return f"{number} {record['kind']}" if record else f"{number} models"


def _how_trained(record: dict) -> str:
    if not record:
        return ""
    return {
        "folds": ", each trained without one fold of the images",
        "seeds": ", trained by one recipe with different seeds",
    }[record["kind"]]


def _usage(folder: Path, repo_id: str | None) -> str:
    source = repo_id or folder.resolve().name
    return "\n".join(
        [
            "from hf_segformer import SegFormerPredictor",
            "",
            f"predictor = SegFormerPredictor.from_pretrained({json.dumps(source, ensure_ascii=False)})",
            "segmentation = predictor(image).segmentation  # image: a path or a PIL image",
        ]
    )


def _training(members: list[Path], record: dict) -> dict[str, Any]:
    """The run record of the first member, without what is its own; durations are summed."""
    records = [read_optional(member, "training.json") for member in members]
    first = dict(records[0])
    for key in ("curve", "evaluation", "split"):
        first.pop(key, None)
    if hours := sum(each.get("hours", 0) for each in records):
        first["hours"] = hours
    data, split = dict(first.get("dataset") or {}), (records[0].get("split") or {})
    if record.get("kind") == "folds" and split:
        data["images"] = split["train"]["images"] + split["evaluation"]["images"]
    recipe = {table: dict(values) for table, values in (first.get("recipe") or {}).items()}
    if record.get("kind") == "folds":
        recipe.get("split", {}).pop("fold", None)
    for key in ("seed", "data_seed") if record.get("kind") == "seeds" else ():
        recipe.get("trainer", {}).pop(key, None)
    return {**first, **({"dataset": data} if data else {}), **({"recipe": recipe} if recipe else {})}


def _mean_metrics(record: dict) -> dict[str, Any]:
    """Mean scores in the form of metrics.json; empty without a record."""
    if not record:
        return {}
    data, kind = record["dataset"], record["kind"]
    images = sum(row["images"] for row in record["runs"]) if kind == "folds" else record["runs"][0]["images"]
    split = f"mean of {len(record['runs'])} held-out folds" if kind == "folds" else data.get("split", "")
    return {
        **{name: values["mean"] for name, values in record["scores"].items()},
        "classes": [
            {"name": row["name"], "iou": row["iou"]["mean"], "accuracy": row["accuracy"]["mean"]}
            for row in record["classes"]
        ],
        "dataset": {"title": data.get("title", ""), "split": split, "images": images},
    }


def _scores(record: dict) -> dict[str, Any]:
    """Values of the template for scores over runs: mean, sample standard deviation and, of folds, pooled."""
    is_pooled = record["kind"] == "folds"
    rows = [row for row in record["classes"] if row["iou"]["mean"] is not None]
    columns = [
        ("IoU, %", [_mean_and_spread(row["iou"]) for row in rows]),
        ("Accuracy, %", [_mean_and_spread(row["accuracy"]) for row in rows]),
    ]
    if is_pooled:
        columns.append(("IoU of all folds together, %", [_percent(row["iou"]["pooled"]) for row in rows]))
    return {
        "scores": [(_NAMES[name], f"{_mean_and_spread(values)} %") for name, values in record["scores"].items()],
        "evaluated": _runs_in_a_sentence(record),
        "class_columns": columns,
        "classes": [{"name": in_markdown(row["name"]), "iou": row["iou"]["mean"]} for row in rows],
        "absent": [in_markdown(row["name"]) for row in record["classes"] if row["iou"]["mean"] is None],
    }


def _runs_in_a_sentence(record: dict) -> str:
    runs, scores = record["runs"], record["scores"]["mean_iou"]
    listed = ", ".join(_percent(row["mean_iou"]) for row in runs)
    spread = f"mean ± sample standard deviation over {len(runs)} {record['kind']}"
    text = f"Mean IoU is {_mean_and_spread(scores)} % ({spread}; {listed})"
    if record["kind"] == "folds":
        text += f", and {_percent(scores['pooled'])} % on the images of all folds together"
        return f"{text}. Each model was measured on the fold that it was not trained on; the ensemble itself was not."
    return f"{text}. Each model was measured alone, on the same images."


def _protocol(record: dict) -> str:
    """Describe the folds and the groups."""
    split = record.get("split") or {}
    if record.get("kind") != "folds":
        return ""
    images = [row["images"] for row in record["runs"]]
    sizes = f"{min(images):,}" if min(images) == max(images) else f"{min(images):,} to {max(images):,}"
    text = f"They were divided into {len(images)} folds of {sizes} images, drawn with seed {split.get('seed', 0):d}."
    return text + groups_note(split)


def _mean_and_spread(values: dict) -> str:
    if values["mean"] is None:
        return "-"
    return _percent(values["mean"]) + (f" ± {_percent(values['std'])}" if values["std"] is not None else "")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


__all__ = ["RECORDS", "ensemble_card_text", "read_record", "write_ensemble_card"]
