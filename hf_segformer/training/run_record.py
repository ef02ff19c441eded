"""Run record: the facts of a training run that its model card shows, kept as training.json and curve.png.

It holds nothing about places on the machine or the people who ran it.
"""

import math
import platform
import re
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..data.folder_names import parse_folder
from ..files import write_json
from ..hub.model_card import is_hub_id
from ..version import __version__
from .plots import draw_curve, save_plot

# Paths and credentials of the machine are left out of the record.
_PRIVATE = ("root", "output_dir", "logging_dir", "hub_token", "push_to_hub", "hub_model_id", "report_to", "run_name")
_SOURCES = ("checkpoint", "teacher")  # models: of the Hub, or in a folder of the machine, whose name is private
# Of [data], below its root: kept where their words are usual ones, since other names of folders may be of people.
_PLACES = ("image_folder", "mask_folder", "split_file", "annotation_file")
_ARGUMENTS = ("learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type", "max_grad_norm", "seed")
_SWITCHES = ("bf16", "fp16", "gradient_checkpointing", "torch_compile")
_PACKAGES = ("torch", "transformers", "accelerate", "datasets")
_LOGGED = ("step", "loss", "learning_rate", "eval_loss", "eval_mean_iou")
_SCORES = ("mean_iou", "mean_accuracy", "overall_accuracy")


def build_run_record(
    trainer: Any,
    *,
    recipe: dict[str, dict[str, Any]] | None = None,
    title: str | None = None,
    terms: str | None = None,
    hub_id: str | None = None,
    num_images: int | None = None,
    base_model: str | None = None,
    license: str | None = None,
    split: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Collect arguments, loss curve, length, machine and versions of a training run.

    Names of machines, folders and tokens are left out.

    Args:
        trainer: any `Trainer` that has trained.
        recipe: the run's tables, if it followed a recipe.
        title: name of the training data.
        terms: terms of use of the training data.
        hub_id: the data's repository on the Hub.
        num_images: number of training images; by default the length of the training data, if they have one.
        base_model: repository of the weights that training began with; by default where the model came from, if that
            was the Hub.
        license: of the model, in the Hub's words.
        split: what `report.split_record` gives.

    Returns:
        the content of training.json; unknown facts are left out.
    """
    arguments, state = trainer.args, trainer.state
    has_length = hasattr(trainer.train_dataset, "__len__")
    if num_images is None and has_length:
        num_images = len(trainer.train_dataset)
    origin = base_model or getattr(trainer.model.config, "_name_or_path", "") or ""
    per_process = (
        getattr(state, "train_batch_size", None) or arguments.train_batch_size
    )  # auto_find_batch_size lowers it
    batch_size = per_process * arguments.gradient_accumulation_steps * arguments.world_size
    hours = max((row["hours"] for row in state.log_history if "hours" in row), default=None)
    record = {
        "recipe": without_private(recipe or {}),
        "arguments": _arguments(trainer),
        "steps": state.global_step,
        "epochs": round(state.epoch or 0, 3) if has_length else None,  # a stream has no length
        "hours": hours and round(hours, 4),
        "batch_size": batch_size,
        "hardware": _hardware(arguments),
        "processes": arguments.world_size,
        "versions": _versions(),
        "base_model": origin if is_hub_id(origin) and not Path(origin).exists() else None,
        "teacher": _known(teacher.describe()) if (teacher := getattr(trainer, "teacher", None)) else None,
        "license": license,
        "dataset": _known({"title": title, "terms": terms, "hub_id": hub_id, "images": num_images}),
        "split": split,
        "evaluation": _last_evaluation(trainer),
        "curve": [row for row in map(_curve_row, state.log_history) if len(row) > 1],
    }
    return _known(record)


def write_run_record(folder: str | Path, record: dict[str, Any]) -> None:
    """Write training.json, and curve.png if there is a curve to draw.

    Args:
        folder: the model's folder.
        record: what `build_run_record` gives.

    Raises:
        OSError: if a file cannot be written.
    """
    folder = Path(folder)
    write_json(record, folder / "training.json")
    (folder / "curve.png").unlink(missing_ok=True)
    if any("loss" in row or "eval_mean_iou" in row for row in record.get("curve", ())):
        save_plot(folder / "curve.png", draw_curve, record["curve"])


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """Drop what is empty or None."""
    return {key: value for key, value in values.items() if value not in (None, "", [], {}, 0)}


def without_private(recipe: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tables of a recipe without what names places on the machine and people; `[split]` only looks as if it did."""
    tables = {
        table: {
            key: value
            for key, value in values.items()
            if key not in _PRIVATE and not (_is_local(key, value) and table != "split")
        }
        for table, values in recipe.items()
    }
    return _known(tables)


def _is_local(key: str, value: Any) -> bool:
    """Return True if a value is a path on this machine; for a model also the bare name of a folder."""
    if isinstance(value, str) and key in _PLACES and not all(map(_is_usual, value.split("/"))):
        return True
    if not isinstance(value, str) or not (key in _SOURCES or "/" in value or "\\" in value):
        return False
    return not is_hub_id(value) or Path(value).exists()


def _is_usual(part: str) -> bool:
    """Return True for a part of a path that holds a placeholder, or a usual word for images, masks or a split."""
    template, split, _ = parse_folder(part)
    return part == "." or "{" in part or template.is_image or template.is_mask or split is not None


def _arguments(trainer: Any) -> dict[str, Any]:
    values = {name: getattr(trainer.args, name) for name in _ARGUMENTS}
    values |= {name: True for name in _SWITCHES if getattr(trainer.args, name, False)}
    values = {name: getattr(value, "value", value) for name, value in values.items()}  # the value of an enumeration
    config = getattr(trainer, "optimizer_config", None)
    values |= asdict(config) if config else {}
    ema = getattr(trainer, "ema", None)
    return values | ({"ema_decay": ema.decay} if ema and ema.decay else {})


def _last_evaluation(trainer: Any) -> dict[str, Any]:
    """The Trainer's own evaluation of its current weights, if it made one."""
    state = trainer.state
    step = state.global_step
    if trainer.args.load_best_model_at_end and state.best_global_step:
        step = state.best_global_step
    rows = [row for row in state.log_history if row.get("step") == step and _is_number(row.get("eval_mean_iou"))]
    if not rows:
        return {}
    row = rows[-1]
    results = {key: row[f"eval_{key}"] for key in _SCORES if _is_number(row.get(f"eval_{key}"))}
    classes = []
    for index, name in sorted(trainer.model.config.id2label.items()):
        shares = {key: _of_class(row, key, index, name) for key in ("iou", "accuracy")}
        classes.append({"name": name, **shares})
    # A metric without numbers by class leaves them all None.
    return {
        "step": step,
        **results,
        **({"classes": classes} if any(each["iou"] is not None for each in classes) else {}),
    }


def _of_class(row: dict[str, Any], key: str, index: int, name: str) -> float | None:
    """Metric of one class in a row of the log, from `SegmentationMetrics` or `MeanIoU`."""
    column = row.get(f"eval_per_category_{key}") or []
    value = row.get(f"eval_{key}_{name}", column[index] if index < len(column) else None)
    return value if _is_number(value) else None


def _curve_row(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in _LOGGED if _is_number(row.get(key))}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _hardware(arguments: Any) -> str:
    import torch

    if arguments.device.type == "cuda":
        count = max(arguments.n_gpu, arguments.world_size)
        return f"{count} x {torch.cuda.get_device_name(arguments.device)}"
    if arguments.device.type != "cpu":
        return f"{platform.machine()}, {arguments.device.type}"
    information = Path("/proc/cpuinfo")
    found = (
        re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE) if information.is_file() else None
    )
    threads = torch.get_num_threads()
    return f"{found[1] if found else platform.machine()}, {threads} thread{'s' if threads != 1 else ''}"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "hf_segformer": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


__all__ = ["build_run_record", "without_private", "write_run_record"]
