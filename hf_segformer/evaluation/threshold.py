"""The best threshold of a binary model: found on images with masks, and saved with the model's image processor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import InferenceOptions
from ..conversion.ensembles import member_folders
from ..files import read_json, resolve_inside, write_json
from .accumulator import MetricAccumulator
from .binary import NUM_BINS, best_threshold
from .detailed import evaluate_in_detail
from .evaluate import Evaluation

_FILE = "preprocessor_config.json"


def evaluate_at_best_threshold(
    model: Any,
    processor: Any,
    dataset: Any,
    options: InferenceOptions | None = None,
    *,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> tuple[Evaluation, MetricAccumulator]:
    """Find the threshold of the highest Dice in one pass, set it in the processor, and evaluate in a second pass.

    The scores of these images are a little better than those of others, since the threshold was chosen on them.

    Args:
        model: with one label.
        processor: its `binary_threshold` is changed.
        dataset: see `evaluate.evaluate`.
        options: of inference.
        names: names of the classes; by default the model's.
        progress: show the progress of the first process.

    Returns:
        the evaluation at that threshold, and its counts.

    Raises:
        ValueError: if the model has several labels, or no mask has a pixel of its class; see `evaluate.evaluate`.
        OSError: see `evaluate.evaluate`.
    """
    if model.config.num_labels != 1:
        raise ValueError(
            f"the model has {model.config.num_labels} labels; expected one, whose probability a threshold is for"
        )
    arguments = (model, processor, dataset, options)
    _, accumulator = evaluate_in_detail(*arguments, names=names, progress=progress)
    best = None if accumulator.histogram is None else best_threshold(accumulator.histogram)
    if best is None:
        raise ValueError("no mask has a pixel of the model's class; expected some, to choose a threshold by")
    processor.binary_threshold = max(best.threshold, 1 / NUM_BINS)
    return evaluate_in_detail(*arguments, names=names, progress=progress)


def save_threshold(folder: str | Path, threshold: float) -> str:
    """Write a threshold into a model's preprocessor_config.json, whose other values stay as they are.

    Args:
        folder: of the model, or of an ensemble, whose members all get it.
        threshold: above 0, below 1.

    Returns:
        a line that says so.

    Raises:
        ValueError: if the file is damaged, or a link out of the folder.
        OSError: if there is none, or it cannot be written.
    """
    paths = [resolve_inside(member, _FILE) for member in member_folders(folder)]
    for path in paths:
        write_json({**read_json(path), "binary_threshold": threshold}, path)
    # Five digits tell the bins of the histogram apart; the first one is no 0, and the last one no 1.
    return f"threshold {threshold:.5g}, chosen on these images, is saved in {', '.join(map(str, paths))}"


__all__ = ["evaluate_at_best_threshold", "save_threshold"]
