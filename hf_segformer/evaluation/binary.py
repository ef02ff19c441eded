"""Area under the ROC curve, average precision and the best threshold of binary models, from a histogram.

These need the order of all pixels by probability. A histogram of 65,536 equal bins for the pixels of each label keeps
memory constant and adds up over images and processes. Figures are exactly those of the probabilities rounded up to a
multiple of 2^-16: pixels of one bin count as ties. `auc_error` bounds what that can change.

Axes: H W the mask's sides, T bins; bin t holds t/T < probability <= (t+1)/T, and the first one 0 as well.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NUM_BINS = 2**16


class Threshold(NamedTuple):
    """Scores of the positive class where it is predicted above a threshold.

    Attributes:
        threshold: probability above which a pixel is positive.
        dice: Dice coefficient, the same as F1.
        iou: intersection over union.
        precision: share of the positive pixels that are right; NaN if there are none.
        recall: share of the true pixels that are found.
    """

    threshold: float
    dice: float
    iou: float
    precision: float
    recall: float


def probability_histogram(
    probability: Tensor, labels: Tensor, ignore_index: int, *, num_bins: int = NUM_BINS
) -> Tensor:
    """Count pixels by label and probability; histograms of images add up.

    Args:
        probability: float32 (H, W), of the positive class.
        labels: (H, W) of 0 and 1 on the same device.
        ignore_index: label of ignored pixels.
        num_bins: number of bins T; a power of two makes the bins' edges exact.

    Returns:
        int64 tensor (2, T): pixels of label 0 and of label 1 by bin.

    Raises:
        ValueError: if the shapes differ, a probability is no number from 0 to 1, or a label is neither 0 nor 1.
    """
    if probability.shape != labels.shape:
        raise ValueError(
            f"probability is {tuple(probability.shape)}; expected the labels' shape, {tuple(labels.shape)}"
        )
    counted = labels != ignore_index
    probability, labels = probability[counted].float(), labels[counted].long()
    if not ((probability >= 0) & (probability <= 1 + 1e-5)).all():
        raise ValueError("probability holds a value outside 0..1; expected the sigmoid of logits")
    if not ((labels == 0) | (labels == 1)).all():
        strange = labels[(labels != 0) & (labels != 1)].unique().tolist()
        raise ValueError(f"labels hold {strange}; expected 0, 1 and {ignore_index} for ignored pixels")
    place = ((probability * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    return torch.bincount(labels * num_bins + place, minlength=2 * num_bins).reshape(2, num_bins)


def roc_auc(histogram: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive pixel's probability is above a negative one's.

    Args:
        histogram: (2, T) of `probability_histogram`.

    Returns:
        0 to 1; ties count one half. NaN unless both labels occur.
    """
    negatives, positives = histogram.double().cpu()
    below = negatives.cumsum(0) - negatives
    return ((positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum())).item()


def auc_error(histogram: Tensor) -> float:
    """Bound of the difference between `roc_auc` and the area for unrounded probabilities; NaN unless both occur.

    Args:
        histogram: (2, T) of `probability_histogram`.
    """
    negatives, positives = histogram.double().cpu()
    return ((positives * negatives).sum() / 2 / (positives.sum() * negatives.sum())).item()


def average_precision(histogram: Tensor) -> float:
    """Mean of the precisions at all thresholds, weighted by the gain in recall, without interpolation.

    Args:
        histogram: (2, T) of `probability_histogram`.

    Returns:
        0 to 1; NaN without positive pixels.
    """
    negatives, positives = histogram.double().cpu().flip(1)
    found = positives.cumsum(0)
    precision = found / (found + negatives.cumsum(0))
    return ((precision * positives).nan_to_num().sum() / positives.sum()).item()


def threshold_scores(histogram: Tensor, threshold: float) -> Threshold:
    """Scores at a threshold, rounded to a multiple of 1/T.

    Args:
        histogram: (2, T) of `probability_histogram`.
        threshold: 0 up to, not including, 1.

    Raises:
        ValueError: if the threshold is out of range.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is {threshold}; expected a probability from 0 up to, not including, 1")
    num_bins = histogram.shape[1]
    return _scores_at(histogram, min(round(threshold * num_bins), num_bins - 1))


def threshold_sweep(histogram: Tensor, num_thresholds: int = 20) -> list[Threshold]:
    """Scores at `num_thresholds` thresholds from 0 in equal steps: 0, 0.05, 0.1 and so on for 20.

    Args:
        histogram: (2, T) of `probability_histogram`.
        num_thresholds: number of rows.
    """
    return [threshold_scores(histogram, step / num_thresholds) for step in range(num_thresholds)]


def best_threshold(histogram: Tensor) -> Threshold | None:
    """Find the threshold of the highest Dice among all T; of equal ones the nearest to one half.

    Dice is 2 * IoU / (1 + IoU), so the same threshold has the highest IoU.

    Args:
        histogram: (2, T) of `probability_histogram`.

    Returns:
        its scores, or None without positive pixels.

    Examples:
        >>> import torch
        >>> from hf_segformer.evaluation.binary import best_threshold, probability_histogram
        >>> probability, labels = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([[0, 0, 1, 1]])
        >>> best = best_threshold(probability_histogram(probability, labels, ignore_index=255))
        >>> round(best.threshold, 3), best.dice
        (0.3, 1.0)
    """
    true_positives, false_positives, num_positives = _above(histogram)
    if num_positives == 0:
        return None
    dice = 2 * true_positives / (true_positives + false_positives + num_positives)
    best, half = (dice == dice.max()).nonzero()[:, 0], histogram.shape[1] // 2
    return _scores_at(histogram, int(best[(best - half).abs().argmin()]))


def _above(histogram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """True and false positives (T,) above the lower edge of each bin, and the number of positives."""
    negatives, positives = histogram.double().cpu()
    above = [side.flip(0).cumsum(0).flip(0) for side in (positives, negatives)]
    return above[0], above[1], positives.sum()


def _scores_at(histogram: Tensor, place: int) -> Threshold:
    negatives, positives = histogram.double().cpu()
    true_positive, false_positive, num_true = positives[place:].sum(), negatives[place:].sum(), positives.sum()
    union = false_positive + num_true
    values = (
        2 * true_positive / (true_positive + union),
        true_positive / union,
        true_positive / (true_positive + false_positive),
        true_positive / num_true,
    )
    return Threshold(place / histogram.shape[1], *(value.item() for value in values))


__all__ = [
    "NUM_BINS",
    "Threshold",
    "auc_error",
    "average_precision",
    "best_threshold",
    "probability_histogram",
    "roc_auc",
    "threshold_scores",
    "threshold_sweep",
]
