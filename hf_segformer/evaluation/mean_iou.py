"""Mean IoU as a metric of the `evaluate` library. Only code that wants such a metric imports this module."""

from typing import Any

import datasets
import evaluate
from torch import Tensor

from .metrics import confusion_matrix, scores

_DESCRIPTION = (
    "Mean intersection over union of semantic segmentation, accumulated as a confusion matrix, so that the result "
    "over many batches is that over all pixels at once."
)
_INPUTS = """
    predictions: class ids, integers of any shape.
    references: true class ids of the same shape; pixels at the ignore index are ignored.
"""


class MeanIoU(evaluate.Metric):
    """Mean IoU that needs no network and stores no pixels.

    An `evaluate` metric writes every prediction to disk until `compute`; a validation split in full size is many
    gigabytes. Here `add_batch` adds to a matrix of K x (K + 1) counts, on the device of the labels.

    Args:
        num_labels: number of classes K.
        ignore_index: label of ignored pixels, by default that of a model with as many classes.
        **kwargs: keywords of `evaluate.Metric`.

    Examples:
        >>> from hf_segformer.evaluation.mean_iou import MeanIoU
        >>> metric = MeanIoU(num_labels=2)
        >>> metric.add_batch(predictions=[[0, 0, 1]], references=[[0, 0, 1]])
        >>> metric.add_batch(predictions=[[0, 1, 1]], references=[[0, 0, 255]])
        >>> metric.compute()["per_category_iou"]
        [0.75, 0.5]
    """

    def __init__(self, num_labels: int, ignore_index: int | None = None, **kwargs):
        super().__init__(**kwargs)
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}; expected at least 1")
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
        """Count a batch; `confusion_matrix` says what it may hold."""
        counts = confusion_matrix(predictions, references, self.num_labels, self.ignore_index)
        self.matrix = counts if self.matrix is None else self.matrix + counts

    def add(self, *, prediction=None, reference=None) -> None:
        """Count one image."""
        self.add_batch(predictions=prediction, references=reference)

    def compute(self, *, predictions=None, references=None) -> dict[str, Any]:
        """Return the `scores` of all batches since the last call, with the one given here.

        Raises:
            ValueError: if no batch was added.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.matrix is None:
            raise ValueError("no predictions were added: call add_batch first, or pass predictions and references")
        matrix, self.matrix = self.matrix, None
        return scores(matrix)


__all__ = ["MeanIoU"]
