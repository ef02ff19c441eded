"""Confidence intervals and paired tests by the bootstrap over images or groups (Efron and Tibshirani 1993).

Pixels of one image are not independent, so images are what is drawn, or groups of images where several show the same
patient, scene or film. A resample of images is a vector of counts; its confusion counts are one matrix product, and the
products are sums of whole numbers below 2^53, so that they are exact and the same on every machine.

IoU, Dice, precision, recall and accuracy need three numbers a class instead of a row of the confusion matrix. Only
those are kept of an image: 3.6 kB for 150 classes where the matrix has 181 kB.

Axes: I images, G groups, K classes, R resamples. `counts` is (I, 3, K): correct, true and predicted pixels of a class.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

NUM_RESAMPLES = 2000
"""Resamples of an interval."""
NUM_PAIRED_RESAMPLES = 10_000
"""Resamples of a paired test; no p-value can be below 2 / (R + 1)."""
LEVEL = 0.95

_CHUNK = 2**22  # draws of one block of resamples

Counts = np.ndarray
Scores = dict[str, np.ndarray]


class Interval(NamedTuple):
    """A score with its confidence interval; arrays of K for scores by class.

    Attributes:
        value: of all images.
        low: lower end.
        high: upper end.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


class PairedTest(NamedTuple):
    """A difference of two models' scores on the same images; arrays of K for scores by class.

    Attributes:
        difference: second model minus first.
        low: lower end of its confidence interval.
        high: upper end.
        p_value: two-sided, for the hypothesis that there is no difference.
        corrected: p-value after Holm's correction for the number of classes; of a single score the p-value itself.
    """

    difference: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_value: np.ndarray
    corrected: np.ndarray


def class_counts(matrices: Any) -> Counts:
    """Correct, true and predicted pixels of each class, all that the scores need of a confusion matrix.

    Args:
        matrices: (..., K, K + 1) counts as `metrics.confusion_matrix` gives them.

    Returns:
        int64 array (..., 3, K).

    Raises:
        ValueError: if the last two sides are not K and K + 1.
    """
    matrices = np.asarray(matrices)
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2] + 1:
        raise ValueError(f"matrices are {matrices.shape}; expected (..., K, K + 1)")
    correct = np.diagonal(matrices, axis1=-2, axis2=-1)
    return np.stack([correct, matrices.sum(-1), matrices.sum(-2)[..., :-1]], axis=-2).astype(np.int64)


def class_scores(counts: Counts) -> Scores:
    """IoU, Dice, precision, recall by class, their means, and the overall accuracy.

    Args:
        counts: (..., 3, K).

    Returns:
        arrays (..., K) `iou`, `dice`, `precision` and `recall`; arrays (...) `mean_iou`, `mean_dice`, `mean_precision`,
        `mean_recall` over the classes that have one, and `overall_accuracy`. A class that is neither true nor predicted
        has no score: NaN. One that is never predicted though it is there has precision 0; one that is predicted though
        it is nowhere has IoU, Dice and precision 0 and no recall.
    """
    correct, true, predicted = np.moveaxis(np.asarray(counts, dtype=np.float64), -2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where((predicted == 0) & (true > 0), 0.0, correct / predicted)
        scores = {
            "iou": correct / (true + predicted - correct),
            "dice": 2 * correct / (true + predicted),
            "precision": precision,
            "recall": correct / true,
        }
        means = {f"mean_{name}": _nanmean(values) for name, values in scores.items()}
        return {**scores, **means, "overall_accuracy": correct.sum(-1) / true.sum(-1)}


def bootstrap_intervals(
    counts: Counts,
    *,
    groups: Sequence[Any] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    statistic: Callable[[np.ndarray], Scores] = class_scores,
) -> dict[str, Interval]:
    """Percentile intervals of scores by resampling images, or groups of them, with replacement.

    A class that does not occur in a resample has no score there, and is left out of the resample's mean.

    Args:
        counts: (I, ...) whole numbers an image, which add up.
        groups: of each image, its group's name; by default every image is its own.
        num_resamples: number of resamples R.
        level: coverage of the intervals, 0 to 1.
        seed: of the resamples; the same one draws the same images.
        statistic: (..., *rest of counts' shape) -> scores by name.

    Returns:
        an `Interval` for each score of the statistic.

    Raises:
        ValueError: if there are fewer than two images or groups, or an option is out of range.

    Examples:
        >>> import numpy as np
        >>> from hf_segformer.evaluation.bootstrap import bootstrap_intervals, class_counts
        >>> matrices = np.array([[[9, 1, 0], [0, 5, 0]], [[6, 4, 0], [1, 4, 0]], [[8, 2, 0], [2, 3, 0]]])
        >>> interval = bootstrap_intervals(class_counts(matrices))["mean_iou"]
        >>> bool(interval.low < interval.value < interval.high)
        True
    """
    grouped = _grouped(counts, groups)
    _check(num_resamples, level)
    resampled = _resampled_scores([grouped], num_resamples, seed, lambda sums: statistic(sums[0]))
    overall = statistic(grouped.sum(axis=0))
    return {name: Interval(overall[name], *_percentiles(resampled[name], level)) for name in overall}


def paired_bootstrap(
    first: Counts,
    second: Counts,
    *,
    groups: Sequence[Any] | None = None,
    num_resamples: int = NUM_PAIRED_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, PairedTest]:
    """Compare two models on the same images: both are scored on the same resamples.

    The p-value inverts the percentile interval: it is twice the share of resamples on the other side of zero, with one
    added to numerator and denominator, so never zero.

    Args:
        first: (I, 3, K) counts of the first model.
        second: those of the second on the same images in the same order.
        groups: see `bootstrap_intervals`.
        num_resamples: number of resamples R.
        level: coverage of the differences' intervals.
        seed: of the resamples.

    Returns:
        a `PairedTest` for each score of `class_scores`.

    Raises:
        ValueError: if the shapes differ, or as for `bootstrap_intervals`.
    """
    if np.shape(first) != np.shape(second):
        raise ValueError(f"counts are {np.shape(first)} and {np.shape(second)}; expected the same images and classes")
    _check(num_resamples, level)
    pair = [_grouped(counts, groups) for counts in (first, second)]
    differences = _resampled_scores(pair, num_resamples, seed, _difference)
    overall = _difference([counts.sum(axis=0) for counts in pair])
    tests = {}
    for name, difference in overall.items():
        p_value = _p_values(differences[name])
        p_value = np.where(np.isnan(difference), np.nan, p_value)
        tests[name] = PairedTest(difference, *_percentiles(differences[name], level), p_value, holm(p_value))
    return tests


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction (1979), which bounds the chance of any false finding among all tests.

    Args:
        p_values: array of any shape; NaN is no test.

    Returns:
        corrected p-values of the same shape, at most 1.

    Examples:
        >>> from hf_segformer.evaluation.bootstrap import holm
        >>> holm([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(values.ravel()))
    order = known[np.argsort(values.ravel()[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    corrected = np.full(values.size, np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(values.ravel()[order] * factors), 1.0)
    return corrected.reshape(values.shape)


def _grouped(counts: Counts, groups: Sequence[Any] | None) -> np.ndarray:
    """Counts (I, ...) -> float64 (G, ...), added up by group; groups in order of their first image."""
    counts = np.asarray(counts)
    if groups is None:
        grouped, unit = counts.astype(np.float64), "images"
    else:
        if len(groups) != len(counts):
            raise ValueError(f"groups name {len(groups)} images; expected one name for each of {len(counts)}")
        places = {name: place for place, name in enumerate(dict.fromkeys(groups))}
        grouped, unit = np.zeros((len(places), *counts.shape[1:])), "groups"
        np.add.at(grouped, [places[name] for name in groups], counts)
    if len(grouped) < 2:
        raise ValueError(f"there are {len(grouped)} {unit} to draw from; expected at least 2 for a bootstrap")
    return grouped


def _check(num_resamples: int, level: float) -> None:
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; expected at least 1")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a coverage between 0 and 1, such as 0.95")


def _resampled_scores(
    counts: Sequence[np.ndarray], num_resamples: int, seed: int, statistic: Callable[[list[np.ndarray]], Scores]
) -> Scores:
    """Scores (R, ...) of R resamples of the groups, the same resamples for all counts (G, ...)."""
    blocks = []
    for weights in _weights(len(counts[0]), num_resamples, seed):
        sums = [(weights @ each.reshape(len(each), -1)).reshape(-1, *each.shape[1:]) for each in counts]
        blocks.append(statistic(sums))
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _weights(num_groups: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of the (R, G) numbers of times that each group was drawn."""
    generator = np.random.default_rng(seed)
    num_rows = max(1, _CHUNK // num_groups)
    for start in range(0, num_resamples, num_rows):
        rows = min(num_rows, num_resamples - start)
        drawn = generator.integers(num_groups, size=(rows, num_groups)) + num_groups * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * num_groups).reshape(rows, num_groups).astype(np.float64)


def _difference(sums: list[np.ndarray]) -> Scores:
    first, second = (class_scores(each) for each in sums)
    return {name: second[name] - first[name] for name in first}


def _p_values(differences: np.ndarray) -> np.ndarray:
    """Two-sided p-values of the differences (R, ...), NaN being no resample."""
    known = (~np.isnan(differences)).sum(axis=0)
    tail = np.minimum((differences <= 0).sum(axis=0), (differences >= 0).sum(axis=0))
    return np.minimum(2 * (tail + 1) / (known + 1), 1.0)


def _percentiles(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the central `level` of the values (R, ...), without NaN; NaN where there is nothing else."""
    ends = np.full((2, *values.shape[1:]), np.nan)
    flat, columns = values.reshape(len(values), -1), ends.reshape(2, -1)
    for column in np.flatnonzero(~np.isnan(flat).all(axis=0)):
        known = flat[:, column]
        columns[:, column] = np.quantile(known[~np.isnan(known)], [(1 - level) / 2, (1 + level) / 2])
    return ends[0], ends[1]


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN where there is nothing else."""
    return np.nansum(values, axis=-1) / (~np.isnan(values)).sum(axis=-1)


__all__ = [
    "LEVEL",
    "NUM_PAIRED_RESAMPLES",
    "NUM_RESAMPLES",
    "Interval",
    "PairedTest",
    "bootstrap_intervals",
    "class_counts",
    "class_scores",
    "holm",
    "paired_bootstrap",
]
