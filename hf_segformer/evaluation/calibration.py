"""Calibration: a model that is 80 % sure should be right 80 % of the time.

Expected calibration error (Naeini et al. 2015; Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv
1706.04599, equation 3): pixels are binned by the probability of their winning class, and the bins' gaps between
confidence and accuracy are averaged by their share of the pixels. By class it is the same over the pixels whose winning
class it is (top-label calibration, Gupta and Ramdas 2022, arXiv 2107.08353).

Everything is counted in integers, confidence in units of 2^-24, the spacing of float32 below 1. So sums over images and
processes are exact in any order, and the mean confidence of a bin is off by at most 3e-8.

Axes: K classes, H W the mask's sides, M bins (m-1)/M < confidence <= m/M.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NUM_BINS = 15

_UNIT = 2**24


class ReliabilityDiagram(NamedTuple):
    """Confidence against accuracy in M bins of equal width.

    Attributes:
        count: (M,) int64 numbers of pixels.
        confidence: (M,) float64 mean confidence; NaN in an empty bin.
        accuracy: (M,) float64 share of the pixels that are right; NaN in an empty bin.
    """

    count: Tensor
    confidence: Tensor
    accuracy: Tensor


def calibration_counts(probabilities: Tensor, labels: Tensor, ignore_index: int, *, num_bins: int = NUM_BINS) -> Tensor:
    """Count pixels by winning class and confidence; counts of images add up.

    Args:
        probabilities: float32 (K, H, W), over the classes adding up to 1.
        labels: (H, W) true class ids on the same device.
        ignore_index: label of ignored pixels.
        num_bins: number of bins M.

    Returns:
        int64 tensor (K, M, 3) by winning class and bin: pixels, pixels that are right, sum of confidences in units
        of 2^-24.

    Raises:
        ValueError: if the shapes do not fit, or a probability is no number from 0 to 1.

    Examples:
        >>> import torch
        >>> from hf_segformer.evaluation.calibration import calibration_counts, calibration_error
        >>> probabilities = torch.tensor([0.75, 0.25]).reshape(2, 1, 1).expand(2, 2, 2)
        >>> labels = torch.tensor([[0, 0], [1, 0]])
        >>> calibration_error(calibration_counts(probabilities, labels, ignore_index=255))
        0.0
    """
    if probabilities.ndim != 3 or probabilities.shape[1:] != labels.shape:
        raise ValueError(
            f"probabilities are {tuple(probabilities.shape)}; expected (K, H, W) with the labels' {tuple(labels.shape)}"
        )
    confidence, winner = probabilities.max(dim=0)
    return confidence_counts(confidence, winner, labels, len(probabilities), ignore_index, num_bins=num_bins)


def confidence_counts(
    confidence: Tensor, winner: Tensor, labels: Tensor, num_classes: int, ignore_index: int, *, num_bins: int = NUM_BINS
) -> Tensor:
    """Count as `calibration_counts` does, from the most probable class alone, K times less memory.

    Args:
        confidence: float32 (H, W), probability of the most probable class.
        winner: (H, W), that class.
        labels: (H, W) true class ids on the same device.
        num_classes: number of classes K.
        ignore_index: label of ignored pixels.
        num_bins: number of bins M.

    Returns:
        int64 tensor (K, M, 3).

    Raises:
        ValueError: if a confidence is no number from 0 to 1.
    """
    counted = labels != ignore_index
    confidence, winner, labels = confidence[counted].float(), winner[counted], labels[counted]
    if not ((confidence >= 0) & (confidence <= 1 + 1e-5)).all():
        raise ValueError("probabilities hold a value outside 0..1; expected the softmax of logits")
    edges = torch.linspace(0, 1, num_bins + 1, device=confidence.device)[1:-1]
    place = winner * num_bins + torch.bucketize(confidence, edges)
    # Times a power of two, which is exact.
    values = (torch.ones_like(place), (winner == labels).long(), (confidence * _UNIT).round().long())
    sums = torch.zeros(num_classes * num_bins, 3, dtype=torch.int64, device=place.device)
    return sums.index_add_(0, place, torch.stack(values, dim=1)).reshape(num_classes, num_bins, 3)


def reliability_diagram(counts: Tensor) -> ReliabilityDiagram:
    """Bins of the reliability diagram, over all classes or of one.

    Args:
        counts: (K, M, 3) of `calibration_counts`, or one class's (M, 3).
    """
    bins = counts.cpu().reshape(-1, *counts.shape[-2:]).sum(dim=0)
    count, correct, confidence = bins.unbind(dim=1)
    return ReliabilityDiagram(count, confidence.double() / _UNIT / count, correct.double() / count)


def calibration_error(counts: Tensor) -> float:
    """Expected calibration error, 0 to 1; NaN without pixels.

    Args:
        counts: (K, M, 3) of `calibration_counts`, or one class's (M, 3).
    """
    count, confidence, accuracy = reliability_diagram(counts)
    gaps = (confidence - accuracy).abs().nan_to_num()
    return ((gaps * count).sum() / count.sum()).item()


def calibration_errors(counts: Tensor) -> list[float]:
    """Expected calibration error of each class over the pixels whose winning class it is; NaN where there are none.

    Args:
        counts: (K, M, 3) of `calibration_counts`.
    """
    return [calibration_error(each) for each in counts]


__all__ = [
    "NUM_BINS",
    "ReliabilityDiagram",
    "calibration_counts",
    "calibration_error",
    "calibration_errors",
    "confidence_counts",
    "reliability_diagram",
]
