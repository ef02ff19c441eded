"""Evaluation of a segmentation model: predict, compare with the masks, count in one confusion matrix.

Images are read ahead and batched as the predictor does, seen whole or by a sliding window, mirrored and at several
scales as in the paper's code. Predictions are compared with the masks at the size of the masks, and only the counts of
an image are kept, so that memory does not grow with the data.

Axes: C channels, K classes, H W sides of the mask.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import nsmallest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import InferenceOptions
from ..data.torch_datasets import ignore_no_data
from ..files import printable
from ..image_io_segformer import read_mask
from ..image_processing_segformer import SegFormerImageProcessor
from ..inference.distributed import DistributedContext
from ..inference.pipeline import Prepared, ReadAhead, segment_batch
from ..inference.segmenter import Segmenter, class_names
from ..progress import Progress
from .accumulator import MetricAccumulator
from .metrics import confusion_matrix, named_scores, scores
from .naming import image_names
from .numbers import known, percent
from .summary import shown_classes


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        matrix: (K, K + 1) counts of pixels from `metrics.confusion_matrix`.
        names: names of the K classes.
        worst: index and mean IoU of the worst images, worst first.
        seconds: duration of the evaluation.
        num_images: number of images.
        counted: scores from all counts, see `metrics.counted_scores`; None without an accumulator.
    """

    matrix: Tensor
    names: tuple[str, ...]
    worst: tuple[tuple[int, float], ...]
    seconds: float
    num_images: int
    counted: dict[str, float] | None = None

    @property
    def named_metrics(self) -> dict[str, float]:
        """Scores as a Trainer logs them: `counted`, or else the `metrics.named_scores` of the matrix."""
        return named_scores(self.matrix, self.names) if self.counted is None else self.counted

    @property
    def metrics(self) -> dict[str, Any]:
        """The `metrics.scores` of the matrix."""
        return scores(self.matrix)

    def to_json(self, title: str, split: str, options: InferenceOptions) -> dict[str, Any]:
        """Contents of metrics.json; unknown values, those of an absent class, are None.

        Args:
            title: name of the data.
            split: name of the split that was evaluated.
            options: options of the evaluation.
        """
        metrics = self.metrics
        columns = (self.names, metrics["per_category_iou"], metrics["per_category_accuracy"], self._pixels())
        return {
            **{name: known(metrics[name]) for name in ("mean_iou", "mean_accuracy", "overall_accuracy")},
            "classes": [
                {"name": name, "iou": known(iou), "accuracy": known(accuracy), "pixels": pixels}
                for name, iou, accuracy, pixels in zip(*columns, strict=True)
            ],
            "dataset": {"title": title, "split": split, "images": self.num_images},
            "method": {
                "sliding_window": options.sliding_window,
                "stride": options.effective_stride,
                "flip": options.flip,
                "scales": list(options.scales),
            },
            "seconds": round(self.seconds, 2),
        }

    def format_table(self) -> str:
        """Scores and shares of pixels by class, in percent, for a terminal; of many the worst and best classes."""
        metrics, pixels = self.metrics, self._pixels()
        shares = [count / max(1, sum(pixels)) for count in pixels]
        names = [printable(name) for name in self.names]
        columns = (names, metrics["per_category_iou"], metrics["per_category_accuracy"], shares)
        shown, rows = shown_classes(metrics["per_category_iou"]), list(zip(*columns, strict=True))
        width = max(len(name) for name in ("mean", *(names[place] for place in shown)))
        lines = [f"  {'':{width}}    IoU  accuracy  pixels"]
        for name, *values in (rows[place] for place in shown):
            iou, accuracy, share = (percent(value) for value in values)
            lines.append(f"  {name:{width}}  {iou:>5}  {accuracy:>8}  {share:>6}")
        if len(shown) < len(rows):
            lines.append(f"  the {len(shown)} worst and best of {len(rows)} classes; table.csv of --output-dir has all")
        lines.append("  " + "-" * (width + 25))
        lines.append(f"  {'mean':{width}}  {percent(metrics['mean_iou']):>5}  {percent(metrics['mean_accuracy']):>8}")
        lines.append(f"  {percent(metrics['overall_accuracy'])} % of all pixels are correct")
        return "\n".join(lines)

    def misses_its_class(self) -> bool:
        """Return True if there are two classes and no pixel of the second, as in masks of 0 and 255 by default."""
        return len(self.names) == 2 and not self.matrix[1].any()

    def _pixels(self) -> list[int]:
        return self.matrix.sum(dim=1).tolist()


def evaluate(
    model: PreTrainedModel,
    processor: SegFormerImageProcessor,
    dataset: Any,
    options: InferenceOptions | None = None,
    *,
    names: Sequence[str] | None = None,
    num_worst: int = 0,
    accumulator: MetricAccumulator | None = None,
    progress: bool = True,
) -> Evaluation:
    """Predict every image and compare with its mask, at the size of the mask.

    Several processes (torchrun, `accelerate launch`) share the images, whatever their number and sizes, and every
    process gets the whole result. Which images share a batch does not depend on the number of processes, so that the
    result is that of one process to the last pixel. It may be called in the middle of a training, in every process,
    with the model that is trained, unwrapped: the model and its mode are left as they were.

    Args:
        model: see `Segmenter`; a binary model is evaluated on two classes.
        processor: prepares images. Masks are taken as they are, whatever its `do_reduce_labels`.
        dataset: rows with `image` and `label`, with a length and indices: a `datasets.Dataset`, a list of dicts. Rows
            are read in threads. Labels are 0..K-1, or the `semantic_loss_ignore_index` of the model's configuration.
        options: see `InferenceOptions`; by default images are seen whole and once.
        names: names of the classes; by default the model's. The one of a binary model gets `background` before it.
        num_worst: number of the worst images to list.
        accumulator: counts what a report needs besides; every process has the counts of all images afterwards.
        progress: show the progress of the first process.

    Returns:
        The `Evaluation`.

    Raises:
        ValueError: if there are no images, a row does not fit (the message gives its index), or names do not.
        OSError: if a file cannot be read.

    Examples:
        >>> from PIL import Image
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
        >>> from hf_segformer.evaluation.evaluate import evaluate
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig(depths=[1, 1, 1, 1], num_labels=2))
        >>> rows = [{"image": Image.new("RGB", (90, 60)), "label": Image.new("L", (90, 60))}]
        >>> evaluate(model, SegFormerImageProcessor(size=64), rows, progress=False).matrix.sum().item()
        5400
    """
    segmenter, names = Segmenter(model, processor, options), class_names(model.config, names)
    num_images, start, context = len(dataset), time.perf_counter(), DistributedContext()
    if num_images == 0:
        raise ValueError("the data set to evaluate on is empty; expected at least one row")
    batch_size = segmenter.batch_size
    mine = [index for index in range(num_images) if index // batch_size % context.num_processes == context.rank]
    matrix = torch.zeros(len(names), len(names) + 1, dtype=torch.int64, device=model.device)
    worst: list[tuple[float, int]] = []
    error: Exception | None = None
    rows = _Rows(dataset, image_names(dataset))
    results = _count(segmenter, rows, mine, len(names), accumulator)
    try:
        with Progress("evaluate", len(mine), "images", is_shown=progress and context.is_main) as bar:
            for index, counts in zip(mine, results, strict=True):
                matrix += counts
                if num_worst and not math.isnan(score := scores(counts)["mean_iou"]):  # of a mask without labels it is
                    worst = nsmallest(num_worst, [*worst, (score, index)])
                bar.update()
    except (ValueError, OSError, MemoryError) as raised:
        error = raised
    found = context.gather((matrix.cpu(), worst, error, accumulator and accumulator.state()))
    for _, _, failure, _ in found:  # in every process the same one, so that none waits for another that has ended
        if failure is not None:
            raise failure
    worst = nsmallest(num_worst, [pair for _, pairs, _, _ in found for pair in pairs])
    matrix = torch.stack([each for each, _, _, _ in found]).sum(dim=0)
    if accumulator is not None:
        accumulator.combine(state for _, _, _, state in found)
    counted = None if accumulator is None else accumulator.named_scores(names)
    seconds = time.perf_counter() - start
    worst_places = tuple((index, score) for score, index in worst)
    return Evaluation(matrix, names, worst_places, seconds, num_images, counted)


def _count(
    segmenter: Segmenter,
    rows: "_Rows",
    indices: Sequence[int],
    num_classes: int,
    accumulator: MetricAccumulator | None = None,
) -> Iterator[Tensor]:
    """Confusion matrix (K, K + 1) of each row, read ahead and in batches."""
    ignore_index, is_binary = segmenter.ignore_index, accumulator is not None and num_classes == 2

    def segment(batch: list[Prepared]) -> list[Tensor]:
        counts = []
        found = segment_batch(segmenter, batch, with_probabilities=is_binary, with_confidence=accumulator is not None)
        for prepared, (prediction, probabilities) in zip(batch, found, strict=True):
            labels = torch.from_numpy(prepared.labels).to(prediction.device)
            try:
                counts.append(confusion_matrix(prediction, labels, num_classes, ignore_index))
                if accumulator is not None:
                    accumulator.update(probabilities, prediction, labels, index=prepared.index)
            except ValueError as error:
                raise ValueError(f"{prepared.name}: {error}") from error
        return counts

    tasks = (partial(_load, segmenter, rows, index) for index in indices)
    results = ReadAhead(tasks, segment, segmenter.batch_size)
    try:
        yield from results
    finally:
        results.close()


class _Rows(NamedTuple):
    """The data set, and the names of its images."""

    dataset: Any
    names: Sequence[str]

    def describe(self, index: int) -> str:
        """Name a row in messages, with its file if there is one."""
        name = self.names[index]
        return f"row {index} of the data" + (f" ({printable(name)})" if name != str(index) else "")


def _load(segmenter: Segmenter, rows: _Rows, index: int) -> Prepared:
    """Read and prepare one row."""
    name = rows.describe(index)
    try:
        row = rows.dataset[index]
        mask = read_mask(row["label"], "its mask").astype("int64")
        labels = ignore_no_data(mask, row["image"], segmenter.ignore_index)
        views = segmenter.preprocess(row["image"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except OSError as error:
        raise OSError(f"{name}: {error}") from error
    # Batches of the order of the rows alone, which all processes share.
    return Prepared(views, labels.shape, name, labels=labels, group=index // segmenter.batch_size, index=index)


__all__ = ["Evaluation", "evaluate"]
