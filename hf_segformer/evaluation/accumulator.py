"""All figures of an evaluation, accumulated image by image in one pass.

What is kept are sums of whole numbers: the confusion matrix, boundary pixels, the bins of the reliability diagram and,
for two classes, the histogram of probabilities. Of each image only its name and three numbers a class remain, from
which the bootstrap draws. Sums of whole numbers are the same in any order, so several processes together get exactly
what one process gets.

Axes: K classes, I images, H W the mask's sides, M bins of the reliability diagram, T bins of the histogram.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..inference.segmenter import Confidence
from .binary import probability_histogram
from .bootstrap import class_counts, class_scores
from .boundary import DILATION_RATIO, TOLERANCE, boundary_counts
from .calibration import NUM_BINS, calibration_counts, confidence_counts
from .metrics import confusion_matrix, counted_scores, pack_counts


class MetricAccumulator:
    """Sums of everything that an evaluation reports, and each image's counts.

    Args:
        num_classes: number of classes K; a binary model has two.
        ignore_index: label of ignored pixels.
        dilation_ratio: see `boundary.boundary_counts`.
        tolerance: see `boundary.boundary_counts`, in pixels.
        num_bins: bins of the reliability diagram.

    Attributes:
        matrix: int64 (K, K + 1) confusion matrix, see `metrics.confusion_matrix`.
        boundary: int64 (7, K), see `boundary.boundary_counts`.
        calibration: int64 (K, M, 3), see `calibration.calibration_counts`; None without probabilities.
        histogram: int64 (2, T), see `binary.probability_histogram`; None without probabilities, or with K other than 2.

    Examples:
        >>> import torch
        >>> from hf_segformer.evaluation.accumulator import MetricAccumulator
        >>> accumulator = MetricAccumulator(num_classes=2, ignore_index=255)
        >>> labels = torch.zeros(20, 30, dtype=torch.int64)
        >>> probabilities = torch.tensor([0.9, 0.1]).reshape(2, 1, 1).expand(2, 20, 30)
        >>> accumulator.update(probabilities, labels, labels, name="first.png")
        >>> accumulator.matrix.tolist(), accumulator.names
        ([[600, 0, 0], [0, 0, 0]], ['first.png'])
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int,
        *,
        dilation_ratio: float = DILATION_RATIO,
        tolerance: int = TOLERANCE,
        num_bins: int = NUM_BINS,
    ):
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.dilation_ratio, self.tolerance, self.num_bins = dilation_ratio, tolerance, num_bins
        self.matrix = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
        self.boundary = torch.zeros(7, num_classes, dtype=torch.int64)
        self.calibration: Tensor | None = None
        self.histogram: Tensor | None = None
        self._images: list[tuple[int, str, np.ndarray]] = []

    def update(
        self,
        probabilities: Tensor | Confidence | None,
        prediction: Tensor,
        labels: Tensor,
        *,
        name: str = "",
        index: int | None = None,
    ) -> None:
        """Count one image, on the device of its tensors.

        Args:
            probabilities: float32 (K, H, W), or with other than two classes the `Confidence`, all that calibration
                needs; None if it is not asked for. Either for all images or for none.
            prediction: (H, W) class ids.
            labels: (H, W) true class ids.
            name: of the image, for tables and lists.
            index: position of the image in the data set; by default the number of images before it.

        Raises:
            ValueError: if shapes, labels or probabilities do not fit; nothing is counted then.
        """
        if self._images and (probabilities is None) != (self.calibration is None):
            raise ValueError("probabilities are given for some images only; expected them for all images or for none")
        labels = labels.to(prediction.device)
        matrix = confusion_matrix(prediction, labels, self.num_classes, self.ignore_index).cpu()
        boundary = boundary_counts(
            prediction,
            labels,
            self.num_classes,
            self.ignore_index,
            dilation_ratio=self.dilation_ratio,
            tolerance=self.tolerance,
        ).cpu()
        calibration, histogram = self._count_probabilities(probabilities, labels)
        self._add({"matrix": matrix, "boundary": boundary, "calibration": calibration, "histogram": histogram})
        place = len(self._images) if index is None else index
        self._images.append((place, name or str(place), class_counts(matrix)))

    def state(self) -> dict[str, Any]:
        """Return all that was counted, for `merge`: tensors that add up, and a list of `images`."""
        return {**{name: getattr(self, name) for name in _SUMS}, "images": list(self._images)}

    def merge(self, state: dict[str, Any]) -> None:
        """Add what another accumulator of the same options counted, its `state`."""
        self._add(state)
        self._images = sorted([*self._images, *state["images"]], key=lambda image: image[0])

    def combine(self, states: Iterable[dict[str, Any]]) -> None:
        """Hold what all processes counted, whatever it held before.

        Args:
            states: of every process, this one among them, in any order.
        """
        for name in _SUMS:
            setattr(self, name, None)
        self._images = []
        for state in states:
            self.merge(state)

    def name_images(self, names: Sequence[str]) -> None:
        """Name the images.

        Args:
            names: of the whole data set, in its order.
        """
        self._images = [(index, names[index], counts) for index, _, counts in self._images]

    @property
    def names(self) -> list[str]:
        """Names of the images."""
        return [name for _, name, _ in self._images]

    @property
    def indices(self) -> list[int]:
        """Positions of the images in the data set, ascending once merged."""
        return [index for index, _, _ in self._images]

    @property
    def counts(self) -> np.ndarray:
        """Each image's correct, true and predicted pixels by class, int64 (I, 3, K), see `bootstrap.class_counts`."""
        if not self._images:
            return np.zeros((0, 3, self.num_classes), dtype=np.int64)
        return np.stack([counts for _, _, counts in self._images])

    def named_scores(self, names: Sequence[str]) -> dict[str, float]:
        """Scores of all images as a Trainer logs them, see `metrics.counted_scores`.

        Args:
            names: of the K classes.
        """
        return counted_scores(pack_counts(self.matrix, self.boundary, self.calibration), names)

    def _count_probabilities(
        self, probabilities: Tensor | Confidence | None, labels: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        if probabilities is None:
            return None, None
        if isinstance(probabilities, Confidence):
            if self.num_classes == 2:
                raise ValueError("two classes need their probabilities for the curve over thresholds; got a Confidence")
            winner, confidence = (each.to(labels.device) for each in probabilities)
            options = {"num_bins": self.num_bins}
            return confidence_counts(
                confidence, winner, labels, self.num_classes, self.ignore_index, **options
            ).cpu(), None
        if len(probabilities) != self.num_classes:
            raise ValueError(f"probabilities are of {len(probabilities)} classes; expected {self.num_classes}")
        probabilities = probabilities.to(labels.device)
        calibration = calibration_counts(probabilities, labels, self.ignore_index, num_bins=self.num_bins).cpu()
        if self.num_classes != 2:
            return calibration, None
        return calibration, probability_histogram(probabilities[1], labels, self.ignore_index).cpu()

    def _add(self, sums: dict[str, Any]) -> None:
        for name in _SUMS:
            before, new = getattr(self, name), sums[name]
            if new is not None:
                setattr(self, name, new.clone() if before is None else before + new)


def worst_images(counts: np.ndarray, number: int) -> list[int]:
    """Places of the images of lowest mean IoU, worst first; images without valid pixels are left out.

    Args:
        counts: (I, 3, K) of `MetricAccumulator.counts`.
        number: at most so many.
    """
    scores = _image_scores(counts)
    order = np.argsort(scores, kind="stable")
    return order[: min(number, int((~np.isnan(scores)).sum()))].tolist()


def typical_images(counts: np.ndarray, number: int, *, without: Sequence[int] = ()) -> list[int]:
    """Places of the images whose mean IoU is nearest to the median image's, nearest first.

    Args:
        counts: (I, 3, K) of `MetricAccumulator.counts`.
        number: at most so many.
        without: places of images that are shown already.
    """
    scores = _image_scores(counts)
    if np.isnan(scores).all():
        return []
    distance = np.abs(scores - np.nanmedian(scores))
    known = [place for place in np.argsort(distance, kind="stable").tolist() if not np.isnan(distance[place])]
    return [place for place in known if place not in set(without)][:number]


def _image_scores(counts: np.ndarray) -> np.ndarray:
    """Mean IoU (I,) of each image over the classes in its labels or prediction; NaN if no pixel is valid."""
    return class_scores(counts)["mean_iou"]


_SUMS = ("matrix", "boundary", "calibration", "histogram")

__all__ = ["MetricAccumulator", "typical_images", "worst_images"]
