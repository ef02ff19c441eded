"""Mean IoU, exact over any number of batches: all that is kept is one confusion matrix.

Import this module where it is used: it needs `evaluate`, which loading a model and predicting do not.
Axes: K classes; the matrix is (K, K + 1), rows are true classes, columns are predicted ones, and the last column counts
predictions that are no class at all.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..configuration_segformer import default_ignore_index
from ..upsampling_segformer import upsample_argmax

_DESCRIPTION = (
    "Mean intersection over union of semantic segmentation, accumulated as a confusion matrix, so that the result "
    "over many batches is that over all pixels at once."
)
_INPUTS = """
    predictions: class ids, integers of any shape.
    references: true class ids of the same shape; pixels at the ignore index do not count.
"""


def confusion_matrix(predictions: Any, labels: Any, num_labels: int, ignore_index: int | None = None) -> Tensor:
    """Count how often each true class was predicted as each class.

    A matrix of counts is all that IoU and accuracy need, and matrices of batches add up to that of the whole.

    Args:
        predictions: class ids, a tensor, array or nested list of integers. Ids outside 0..K-1 are wrong answers and
            go to the last column: dropping them would flatter the model.
        labels: true class ids of the same shape.
        num_labels: number of classes K.
        ignore_index: label of pixels that do not count, by default that of a model with as many classes.

    Returns:
        int64 tensor (K, K + 1) on the device of `labels`, rows true, columns predicted.

    Raises:
        ValueError: if the shapes differ, a value is not an integer, or a label is neither a class nor ignored.

    Example:
        >>> from hf_segformer.evaluation.metrics import confusion_matrix
        >>> confusion_matrix([[0, 1], [1, 7]], [[0, 1], [0, 1]], num_labels=2).tolist()
        [[1, 1, 0], [0, 1, 1]]
    """
    labels, predictions = _integers("labels", labels), _integers("predictions", predictions)
    if predictions.shape != labels.shape:
        raise ValueError(
            f"predictions have shape {tuple(predictions.shape)}, labels {tuple(labels.shape)}; they must be the same"
        )
    ignore_index = default_ignore_index(num_labels) if ignore_index is None else ignore_index
    counted = labels != ignore_index
    labels, predictions = labels[counted], predictions.to(labels.device)[counted]
    strange = labels[(labels < 0) | (labels >= num_labels)].unique().tolist()
    if strange:
        raise ValueError(
            f"labels hold {strange}, but {num_labels} classes are 0..{num_labels - 1} and {ignore_index} is ignored"
        )
    in_range = (predictions >= 0) & (predictions < num_labels)
    columns = torch.where(in_range, predictions, num_labels)
    counts = torch.bincount(labels * (num_labels + 1) + columns, minlength=num_labels * (num_labels + 1))
    return counts.reshape(num_labels, num_labels + 1)


def scores(matrix: Tensor) -> dict[str, Any]:
    """IoU and accuracy, by class and in the mean, from a confusion matrix.

    A class that is neither there nor predicted has no IoU: it is NaN and no part of the mean. One that is predicted
    where it is not has IoU 0.

    Args:
        matrix: (K, K + 1) counts as `confusion_matrix` gives them.

    Returns:
        `mean_iou`, `mean_accuracy` and `overall_accuracy` as floats, `per_category_iou` and `per_category_accuracy`
        as lists of K floats; what can not be known is NaN.
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


class MeanIoU(evaluate.Metric):
    """Mean IoU as an `evaluate` metric that needs no network and keeps no pixels.

    `evaluate`'s own way writes every prediction to disk until `compute`; a validation split in full size is many
    gigabytes. Here `add_batch` adds to a matrix of K x (K + 1) counts, on the device of the labels.

    Args:
        num_labels: number of classes K.
        ignore_index: label of pixels that do not count.
        **kwargs: passed on to `evaluate.Metric`.

    Example:
        >>> from hf_segformer.evaluation.metrics import MeanIoU
        >>> metric = MeanIoU(num_labels=2)
        >>> metric.add_batch(predictions=[[0, 0, 1]], references=[[0, 0, 1]])
        >>> metric.add_batch(predictions=[[0, 1, 1]], references=[[0, 0, 255]])
        >>> metric.compute()["per_category_iou"]
        [0.75, 0.5]
    """

    def __init__(self, num_labels: int, ignore_index: int | None = None, **kwargs):
        super().__init__(**kwargs)
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}, but it must be at least 1")
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.matrix: Tensor | None = None

    def _info(self) -> evaluate.MetricInfo:
        pixels = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": pixels, "references": pixels}),
        )

    def add_batch(self, *, predictions=None, references=None) -> None:
        """Count a batch; see `confusion_matrix` for what is taken and what is refused."""
        counts = confusion_matrix(predictions, references, self.num_labels, self.ignore_index)
        self.matrix = counts if self.matrix is None else self.matrix + counts

    def add(self, *, prediction=None, reference=None) -> None:
        """Count one picture."""
        self.add_batch(predictions=prediction, references=reference)

    def compute(self, *, predictions=None, references=None) -> dict[str, Any]:
        """Give the `scores` of all that was added, and of the pictures given here, then start anew.

        Raises:
            ValueError: if nothing was ever added.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.matrix is None:
            raise ValueError("no predictions were added: call add_batch before compute, or give compute the pictures")
        matrix, self.matrix = self.matrix, None
        return scores(matrix)


class SegmentationMetrics:
    """`compute_metrics` for a Trainer with `batch_eval_metrics`: counts batch by batch, then gives numbers by class.

    Args:
        names: of the K classes; to a single one `background` is added.
        ignore_index: label of pixels that do not count.

    Example:
        >>> from transformers import EvalPrediction
        >>> from hf_segformer.evaluation.metrics import SegmentationMetrics
        >>> compute_metrics = SegmentationMetrics(["sky", "road"])
        >>> compute_metrics(EvalPrediction([[0, 1]], [[0, 0]]), compute_result=True)["iou_sky"]
        0.5
    """

    def __init__(self, names: Sequence[str], ignore_index: int | None = None):
        self.names = ["background", *names] if len(names) == 1 else list(names)
        self.metric = MeanIoU(len(self.names), ignore_index)

    def __call__(self, evaluation: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Add a batch; after the last, return `mean_iou`, ..., `iou_NAME` and `accuracy_NAME` of each class."""
        self.metric.add_batch(predictions=evaluation.predictions, references=evaluation.label_ids)
        if not compute_result:
            return {}
        results = self.metric.compute()
        for kind in ("iou", "accuracy"):
            values = results.pop(f"per_category_{kind}")
            results |= {f"{kind}_{name}": value for name, value in zip(self.names, values, strict=True)}
        return results


def predict_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits -> class ids in the labels' size: what a Trainer shall keep in place of logits.

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W).

    Returns:
        (B, H, W), 0..K-1; with one logit 1 where it is above zero.
    """
    return upsample_argmax(logits, labels.shape[-2:])


def _integers(name: str, values: Any) -> Tensor:
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        # Torch has no operations for the wider unsigned types.
        values = torch.tensor(array.astype(np.int64) if array.dtype.kind == "u" else array)
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"{name} hold {values.dtype}, but class ids are integers")
    return values.long()


__all__ = ["MeanIoU", "SegmentationMetrics", "confusion_matrix", "predict_labels", "scores"]
