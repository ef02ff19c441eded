"""Evaluation with a report: one pass over the data for all figures, and a second look at a few images for the sheets.

Axes: K classes, H W the mask's sides.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config import InferenceOptions
from ..configuration_segformer import default_ignore_index
from ..conversion.ensembles import member_folders
from ..data.readers import read_whole_image
from ..data.splits import GROUP_COLUMN, group_names, seen_images
from ..files import printable
from ..image_io_segformer import read_mask
from ..inference.segmenter import Segmenter
from ..visualization import Color, displayed_as_fed
from .accumulator import MetricAccumulator
from .evaluate import Evaluation, evaluate
from .naming import image_names
from .report import NUM_SAMPLES, Report, choose_samples
from .summary import summarize


def evaluate_in_detail(
    model: Any,
    processor: Any,
    dataset: Any,
    options: InferenceOptions | None = None,
    *,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> tuple[Evaluation, MetricAccumulator]:
    """Evaluate a model and count all that a report or a comparison needs.

    Args:
        model: see `evaluate.evaluate`.
        processor: prepares images.
        dataset: see `evaluate.evaluate`.
        options: of inference.
        names: names of the classes; by default the model's.
        progress: show the progress of the first process.

    Returns:
        the evaluation, and the sums and counts of its images, which are named after their files where there are any.

    Raises:
        ValueError: see `evaluate.evaluate`.
        OSError: see `evaluate.evaluate`.
    """
    num_classes = max(2, model.config.num_labels)
    ignore_index = getattr(model.config, "semantic_loss_ignore_index", default_ignore_index(num_classes))
    accumulator = MetricAccumulator(num_classes, ignore_index)
    evaluation = evaluate(model, processor, dataset, options, names=names, accumulator=accumulator, progress=progress)
    accumulator.name_images(image_names(dataset))
    return evaluation, accumulator


def build_report(
    evaluation: Evaluation,
    accumulator: MetricAccumulator,
    segmenter: Segmenter,
    dataset: Any,
    palette: Sequence[Color],
    *,
    title: str,
    split: str = "",
    details: Mapping[str, str] | None = None,
    group_pattern: str | None = None,
    num_samples: int = NUM_SAMPLES,
    source: str | Path = "",
) -> Report:
    """Summarize an evaluation, and predict the worst and typical images once more for the sheets.

    Args:
        evaluation: of `evaluate_in_detail`.
        accumulator: of the same.
        segmenter: predicts as the evaluation did.
        dataset: of the evaluation.
        palette: one (red, green, blue) a class.
        title: name of the data, the heading of the page.
        split: name of the split that was evaluated.
        details: settings by name, shown with the method at the end of the page.
        group_pattern: regular expression for the groups that the intervals draw, see
            `data.splits.group_names`; by default those in the data set's column `group`, or else images are drawn.
        num_samples: of worst images, and of typical ones.
        source: of the model; the report says how many of the images it was trained on, as far as its folder tells.

    Returns:
        the `Report`.

    Raises:
        ValueError: if the pattern is not found in a name, or an image cannot be read any more.
        OSError: if a file cannot be read any more.
    """
    groups = groups_of(accumulator, dataset, group_pattern)
    values = evaluation.to_json(title, split, segmenter.options)
    summary = {**values, **summarize(accumulator, evaluation.names, groups=groups)}
    if segmenter.model.config.num_labels == 1:
        summary["binary"] |= {"threshold": segmenter.processor.binary_threshold}
    method = {name.replace("_", " ").capitalize(): str(value) for name, value in values["method"].items()}
    worst, typical = choose_samples(accumulator, sample_loader(segmenter, dataset), num_samples)
    details = {**(details or {}), **method}
    if seen := _seen(source, dataset):
        summary["dataset"] = {**summary["dataset"], "trained_on": len(seen)}
        details["Trained on"] = f"{len(seen)} of the {len(dataset)} images"
    return Report(title, accumulator, evaluation.names, palette, summary, worst, typical, details, groups)


def groups_of(accumulator: MetricAccumulator, dataset: Any, pattern: str | None) -> list[str] | None:
    """Return the group of each image by its name, or in the data set's column; None without groups.

    Args:
        accumulator: of the images.
        dataset: that was evaluated.
        pattern: see `build_report`.

    Raises:
        ValueError: if the pattern is not found in a name.
    """
    if pattern is not None:
        return group_names(accumulator.names, pattern)
    if GROUP_COLUMN not in (getattr(dataset, "column_names", None) or ()):
        return None
    column = dataset.with_format(None).select_columns([GROUP_COLUMN])[GROUP_COLUMN]
    return [column[index] for index in accumulator.indices]


def sample_loader(segmenter: Segmenter, dataset: Any) -> Callable[[int], tuple[Image.Image, np.ndarray, np.ndarray]]:
    """Return a function that gives the image, the prediction and the labels of an index.

    Args:
        segmenter: predicts.
        dataset: rows with `image` and `label`.
    """
    processor = segmenter.processor
    num_channels, any_range = len(processor.image_mean), processor.value_range is not None

    def load(index: int) -> tuple[Image.Image, np.ndarray, np.ndarray]:
        row = dataset[index]
        labels = read_mask(row["label"], "its mask").astype(np.int64)
        [prediction] = segmenter.predict(segmenter.preprocess(row["image"]), [labels.shape])
        return (
            displayed_as_fed(as_displayed(row["image"], num_channels, any_range), processor),
            prediction.cpu().numpy(),
            labels,
        )

    return load


def as_displayed(image: Any, num_channels: int = 3, any_range: bool = False) -> Image.Image | np.ndarray:
    """Return an image of a data set as `visualization.displayable` takes it: Pillow, or an array (C, H, W).

    Args:
        image: a path, a PIL image or an array.
        num_channels: of the model, for files.
        any_range: accept integers of any range in files, since a value range is applied.

    Raises:
        ValueError: if a file does not fit.
        OSError: if a file cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        return read_whole_image(image, num_channels, any_range=any_range)
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.ndim == 2:
        return array[None]
    return array.transpose(2, 0, 1) if array.shape[-1] < array.shape[0] else array


def _seen(source: str | Path, dataset: Any) -> list[str]:
    return seen_images(member_folders(source), dataset) if source and Path(source).is_dir() else []


def describe_leakage(source: str | Path, dataset: Any) -> str:
    """Say how many images of a data set a model was trained on; empty if there are none, or no `split.csv` is found.

    Args:
        source: of the model. Its folder, or those of the members of an ensemble, tell by their `split.csv`, which a run
            leaves that holds images out of its training split.
        dataset: with the column `image`.
    """
    if not (seen := _seen(source, dataset)):
        return ""
    return (
        f"{source} was trained on {len(seen)} of the {len(dataset)} images, such as {printable(seen[0])}: the scores "
        "are not those of unseen images"
    )


__all__ = ["as_displayed", "build_report", "describe_leakage", "evaluate_in_detail", "groups_of", "sample_loader"]
