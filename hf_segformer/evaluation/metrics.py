"""Scores of segmentation, exact over any number of batches: the only state is counts that add up.

Axes: B images, K classes. A matrix is (K, K + 1): rows are true classes, columns predicted ones, and the last column
counts predictions that are no class.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..configuration_segformer import default_ignore_index
from ..upsampling_segformer import upsample_argmax
from .bootstrap import class_counts, class_scores
from .boundary import boundary_counts, boundary_scores
from .calibration import NUM_BINS, calibration_error, confidence_counts

OVERALL_SCORES = ("mean_iou", "mean_accuracy", "overall_accuracy", "mean_dice", "precision")
"""Overall scores of `named_scores`."""
COUNTED_SCORES = (*OVERALL_SCORES, "boundary_iou", "boundary_f1", "calibration_error")
"""Overall scores of `counted_scores`."""

LOWER_IS_BETTER = ("calibration_error",)
"""Those of them that are errors."""

_BOUNDARY_ROWS = 7
_PADDING = -100  # with which a Trainer pads the masks of unequal heights


def confusion_matrix(predictions: Any, labels: Any, num_labels: int, ignore_index: int | None = None) -> Tensor:
    """Count how often each true class was predicted as each class.

    IoU and accuracy need no more than a matrix of counts, and the matrices of batches sum to that of the whole.

    Args:
        predictions: class ids, a tensor, array or nested list of integers. Ids outside 0..K-1 are wrong and go to the
            last column: dropping them would flatter the model.
        labels: true class ids of the same shape.
        num_labels: number of classes K.
        ignore_index: label of ignored pixels, by default that of a model with as many classes.

    Returns:
        int64 tensor (K, K + 1) on the device of `labels`, rows true, columns predicted.

    Raises:
        ValueError: if the shapes differ, a value is not an integer, or a label is neither a class nor ignored.

    Examples:
        >>> from hf_segformer.evaluation.metrics import confusion_matrix
        >>> confusion_matrix([[0, 1], [1, 7]], [[0, 1], [0, 1]], num_labels=2).tolist()
        [[1, 1, 0], [0, 1, 1]]
    """
    labels, predictions = _integers("labels", labels), _integers("predictions", predictions)
    if predictions.shape != labels.shape:
        raise ValueError(
            f"predictions have shape {tuple(predictions.shape)}; expected that of the labels, {tuple(labels.shape)}"
        )
    ignore_index = default_ignore_index(num_labels) if ignore_index is None else ignore_index
    predictions, is_counted = predictions.to(labels.device), labels != ignore_index
    is_unknown = is_counted & ((labels < 0) | (labels >= num_labels))
    if is_unknown.any():
        raise ValueError(
            f"labels hold {labels[is_unknown].unique().tolist()}; expected 0 to {num_labels - 1}, or {ignore_index} "
            "for ignored pixels"
        )
    is_class = (predictions >= 0) & (predictions < num_labels)
    cells, size = (
        labels * (num_labels + 1) + torch.where(is_class, predictions, num_labels),
        num_labels * (num_labels + 1),
    )
    counts = torch.bincount(torch.where(is_counted, cells, size).flatten(), minlength=size + 1)
    return counts[:size].reshape(num_labels, num_labels + 1)


def scores(matrix: Tensor) -> dict[str, Any]:
    """IoU and accuracy, of each class and in the mean, from a confusion matrix.

    A class that neither occurs nor is predicted has no IoU: it is NaN and left out of the mean. A class that is
    predicted but does not occur has IoU 0.

    Args:
        matrix: (K, K + 1) counts from `confusion_matrix`.

    Returns:
        `mean_iou`, `mean_accuracy` and `overall_accuracy` as floats, `per_category_iou` and `per_category_accuracy`
        as lists of K floats; unknown values are NaN.
    """
    counts = matrix.double().cpu()
    correct, true = counts.diagonal(), counts.sum(dim=1)
    iou = correct / (true + counts.sum(dim=0)[:-1] - correct)  # 0 / 0 is NaN
    accuracy = correct / true
    return {
        "mean_iou": iou.nanmean().item(),
        "mean_accuracy": accuracy.nanmean().item(),
        "overall_accuracy": (correct.sum() / true.sum()).item(),
        "per_category_iou": iou.tolist(),
        "per_category_accuracy": accuracy.tolist(),
    }


def named_scores(matrix: Tensor, names: Sequence[str]) -> dict[str, float]:
    """`scores` as a flat dictionary, as a Trainer logs it.

    Args:
        matrix: see `scores`.
        names: names of the K classes.

    Returns:
        `mean_iou`, `mean_accuracy`, `overall_accuracy`, `mean_dice`, `precision` (mean over the classes), and
        `iou_NAME` and `accuracy_NAME` of each class.

    Examples:
        >>> from hf_segformer.evaluation.metrics import confusion_matrix, named_scores
        >>> named_scores(confusion_matrix([0, 1], [0, 0], num_labels=2), ["sky", "road"])["iou_sky"]
        0.5
    """
    results, means = scores(matrix), class_scores(class_counts(matrix.cpu().numpy()))
    results |= {"mean_dice": float(means["mean_dice"]), "precision": float(means["mean_precision"])}
    for kind in ("iou", "accuracy"):
        values = results.pop(f"per_category_{kind}")
        results |= {f"{kind}_{name}": value for name, value in zip(names, values, strict=True)}
    return results


def count_batch(logits: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Counts of each image (B, K, L), from which `counted_scores` computes every score; counts of images add up.

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W).
        num_classes: number of classes K; one logit means two.
        ignore_index: label of ignored pixels.

    Returns:
        int64; a class's row of the confusion matrix, its boundary pixels, and its bins of the reliability diagram.

    Raises:
        ValueError: if a label is neither a class nor ignored.
    """
    counts = zero_counts(len(logits), num_classes).to(labels.device)
    for place, (each, mask) in enumerate(zip(logits, labels, strict=True)):
        [prediction] = upsample_argmax(each[None], mask.shape)
        [winner], [confidence] = upsample_argmax(each[None], mask.shape, with_probability=True)
        counts[place] = pack_counts(
            confusion_matrix(prediction, mask, num_classes, ignore_index),
            boundary_counts(prediction, mask, num_classes, ignore_index),
            confidence_counts(confidence, winner, mask, num_classes, ignore_index),
        )
    return counts


def zero_counts(number: int, num_classes: int) -> Tensor:
    """Counts of images without pixels, see `count_batch`.

    Args:
        number: number of images B.
        num_classes: number of classes K.
    """
    return torch.zeros(number, num_classes, num_classes + 1 + _BOUNDARY_ROWS + 3 * NUM_BINS, dtype=torch.int64)


def pack_counts(matrix: Tensor, boundary: Tensor, calibration: Tensor | None) -> Tensor:
    """Counts of one image, or of many, as one tensor (K, L).

    Args:
        matrix: (K, K + 1) of `confusion_matrix`.
        boundary: (7, K) of `boundary.boundary_counts`.
        calibration: (K, M, 3) of `calibration.calibration_counts`, or None.
    """
    parts = [matrix, boundary.T] + ([] if calibration is None else [calibration.flatten(1)])
    return torch.cat(parts, dim=1)


def counted_scores(counts: Tensor, names: Sequence[str]) -> dict[str, float]:
    """`named_scores` with boundary IoU, boundary F1 and calibration error, means as `segformer evaluate` reports them.

    Args:
        counts: (K, L) of `pack_counts`, or a confusion matrix alone, which gives `named_scores`.
        names: names of the K classes.
    """
    end, counts = len(names) + 1, counts.cpu()
    matrix, boundary, calibration = (
        counts[:, :end],
        counts[:, end : end + _BOUNDARY_ROWS],
        counts[:, end + _BOUNDARY_ROWS :],
    )
    results = named_scores(matrix, names)
    if boundary.numel():
        outlines = boundary_scores(boundary.T)
        results |= {name: torch.tensor(outlines[name]).nanmean().item() for name in ("boundary_iou", "boundary_f1")}
    if calibration.numel():
        results["calibration_error"] = calibration_error(calibration.reshape(len(names), -1, 3))
    return results


class SegmentationMetrics:
    """Scores for a `Trainer`, in one process or several, on images of one size or of many.

    They are those of `segformer evaluate`: mean IoU, Dice, precision and accuracy, boundary IoU and F1, and calibration
    error. A Trainer gathers predictions and labels from all processes, which fails where the masks differ in size. So
    `preprocess_logits` turns the logits of each image into counts, and the counts are gathered.

    Args:
        names: names of the K classes; a single one gets `background` before it.
        ignore_index: label of ignored pixels, the `semantic_loss_ignore_index` of the model's configuration.

    Examples:
        `Trainer(..., compute_metrics=metrics, preprocess_logits_for_metrics=metrics.preprocess_logits)`, with
        `batch_eval_metrics=True` in the arguments to keep only one batch of counts.

        >>> import torch
        >>> from transformers import EvalPrediction
        >>> from hf_segformer.evaluation.metrics import SegmentationMetrics
        >>> metrics = SegmentationMetrics(["sky", "road"])
        >>> labels = torch.zeros(1, 8, 8, dtype=torch.long)
        >>> counts = metrics.preprocess_logits(torch.randn(1, 2, 2, 2), labels)
        >>> 0 <= metrics(EvalPrediction(counts, labels))["iou_sky"] <= 1
        True
    """

    def __init__(self, names: Sequence[str], ignore_index: int | None = None):
        self.names = ["background", *names] if len(names) == 1 else list(names)
        self.ignore_index = default_ignore_index(len(self.names)) if ignore_index is None else ignore_index
        self.counts: Tensor | None = None

    def preprocess_logits(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """Counts of a batch (see `count_batch`), to be gathered in place of logits and labels.

        The labels are reduced to one number for each image, in place: a Trainer gathers them after this call, and masks
        of different widths cannot be gathered.

        Args:
            logits: (B, K, h, w).
            labels: (B, H, W), at the bottom padded with -100 to the height of other processes; or None, where a Trainer
                predicts without labels.

        Returns:
            int64 (B, K, L); without labels the classes (B, h, w).

        Raises:
            ValueError: if ignored rows at the bottom cannot be distinguished from padding, where -100 is the ignored
                label, too.
        """
        if labels is None:
            return upsample_argmax(logits, logits.shape[-2:])
        truth = self._without_padding(labels)
        counts = count_batch(logits, truth, len(self.names), self.ignore_index)
        labels.data = labels.new_zeros(len(labels), 1)
        return counts

    def _without_padding(self, labels: Tensor) -> Tensor:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return labels  # a single process pads nothing
        is_padding = (labels == _PADDING).all(dim=2).all(dim=0)  # (H,)
        height = len(is_padding) - int(is_padding.flip(0).long().cumprod(0).sum())
        if height == len(is_padding):
            return labels
        if self.ignore_index == _PADDING:
            raise ValueError(
                f"the last {len(is_padding) - height} rows of the masks are {_PADDING}, which is the ignored label and "
                "the padding of a Trainer; expected a SegFormerTrainer, or one process"
            )
        return labels[:, :height]

    def __call__(self, evaluation: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch; after the last one return the scores of all.

        Args:
            evaluation: counts of `preprocess_logits`, which give `counted_scores`; or class ids and labels of one
                shape, which give `named_scores`.
            compute_result: True after the last batch.
        """
        predictions, labels = evaluation.predictions, evaluation.label_ids
        if np.ndim(predictions) == 3 and np.ndim(labels) == 2 and np.shape(labels)[1] == 1:
            counts = _integers("counts", predictions).sum(dim=0)
        else:
            counts = confusion_matrix(predictions, labels, len(self.names), self.ignore_index)
        self.counts = counts if self.counts is None else self.counts + counts
        if not compute_result:
            return {}
        counts, self.counts = self.counts, None
        return counted_scores(counts, self.names)


def _integers(name: str, values: Any) -> Tensor:
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        # Torch has no operations for the wider unsigned types.
        values = torch.tensor(array.astype(np.int64) if array.dtype.kind == "u" else array)
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"{name} hold {values.dtype}; expected integers")
    return values.long()


__all__ = [
    "COUNTED_SCORES",
    "LOWER_IS_BETTER",
    "OVERALL_SCORES",
    "SegmentationMetrics",
    "confusion_matrix",
    "count_batch",
    "counted_scores",
    "named_scores",
    "pack_counts",
    "scores",
    "zero_counts",
]
