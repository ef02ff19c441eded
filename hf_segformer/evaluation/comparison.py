"""Comparison of several models on the same images: side by side by class, with paired tests.

The first model is the baseline of the others. All are scored on the same resamples of the images, so that images that
are hard for every model do not blur the differences. P-values of classes are corrected by Holm over all classes and
models together.

Axes: A models, K classes, I images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .accumulator import MetricAccumulator
from .bootstrap import (
    LEVEL,
    NUM_PAIRED_RESAMPLES,
    Interval,
    PairedTest,
    bootstrap_intervals,
    class_scores,
    holm,
    paired_bootstrap,
)
from .numbers import known

OVERALL = {"mean_iou": "Mean IoU", "mean_dice": "Mean Dice", "overall_accuracy": "Accuracy"}
"""Overall scores that are compared, with their headings in tables."""
NUM_IMAGES = 6


class ClassTest(NamedTuple):
    """Test of one score of one model against the baseline.

    Attributes:
        difference: model minus baseline; None where the score is not defined.
        low: lower end of the difference's interval.
        high: upper end.
        p_value: two-sided.
        corrected: p-value after Holm's correction.
        is_significant: True if the corrected p-value is below 1 - level.
    """

    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    corrected: float | None
    is_significant: bool


@dataclass(frozen=True, eq=False)
class Comparison:
    """Result of `compare`.

    Attributes:
        names: of the A models, the baseline first.
        class_names: of the K classes.
        intervals: of each model, its scores with intervals, see `bootstrap.bootstrap_intervals`.
        overall: of each other model, its tests of `mean_iou`, `mean_dice` and `overall_accuracy`.
        classes: of each other model, its K tests of IoU.
        image_names: of the I images.
        indices: of the images in the data set.
        image_scores: (A, I) mean IoU of every image.
        level: coverage of the intervals.
        num_resamples: number of resamples.
        unit: `"images"` or `"groups"`.
    """

    names: tuple[str, ...]
    class_names: tuple[str, ...]
    intervals: Mapping[str, Mapping[str, Interval]]
    overall: Mapping[str, Mapping[str, ClassTest]]
    classes: Mapping[str, Sequence[ClassTest]]
    image_names: Sequence[str]
    indices: Sequence[int]
    image_scores: np.ndarray
    level: float
    num_resamples: int
    unit: str

    @property
    def num_tests(self) -> int:
        """Number of tests of classes that the correction is for."""
        return sum(test.p_value is not None for tests in self.classes.values() for test in tests)

    def most_different(self, number: int = NUM_IMAGES) -> list[int]:
        """Places of the images whose mean IoU differs most between models, most different first."""
        ranges = self.ranges
        order = np.argsort(-np.nan_to_num(ranges), kind="stable")
        return [place for place in order.tolist() if ranges[place] > 0][:number]

    @property
    def ranges(self) -> np.ndarray:
        """Range of the mean IoU (I,) over the models; NaN where one is not defined."""
        return self.image_scores.max(axis=0) - self.image_scores.min(axis=0)


def compare(
    accumulators: Mapping[str, MetricAccumulator],
    class_names: Sequence[str],
    *,
    groups: Sequence[Any] | None = None,
    num_resamples: int | None = None,
    level: float = LEVEL,
    seed: int = 0,
) -> Comparison:
    """Compare models that were evaluated on the same images.

    Args:
        accumulators: of each model by its name, the baseline first.
        class_names: of the K classes.
        groups: of each image, the group that is drawn as a whole; by default the image itself.
        num_resamples: number of resamples. No corrected p-value can be below 2 * K * (A - 1) / (num_resamples + 1); by
            default there are enough for 0.01, and at least 10,000.
        level: coverage of the intervals.
        seed: of the resamples.

    Returns:
        the `Comparison`.

    Raises:
        ValueError: if there are fewer than two models or images, they were not evaluated on the same images with the
            same labels, or the resamples are too few for any class to be significant.
    """
    names = tuple(accumulators)
    _check_same_images(accumulators)
    num_resamples = _enough_resamples(num_resamples, len(class_names) * (len(names) - 1), level)
    counts = {name: accumulators[name].counts for name in names}
    first = accumulators[names[0]]
    options: dict[str, Any] = {"groups": groups, "num_resamples": num_resamples, "level": level, "seed": seed}
    tests = {name: paired_bootstrap(counts[names[0]], counts[name], **options) for name in names[1:]}
    corrected = holm(np.stack([tests[name]["iou"].p_value for name in names[1:]]))
    classes = {
        name: [
            _class_test(tests[name]["iou"], place, corrected[row, place], level) for place in range(len(class_names))
        ]
        for row, name in enumerate(names[1:])
    }
    overall: dict[str, dict[str, ClassTest]] = {name: {} for name in names[1:]}
    for key in OVERALL:
        p_values = holm(np.array([tests[name][key].p_value for name in names[1:]]))
        for name, p_value in zip(names[1:], p_values, strict=True):
            overall[name][key] = _class_test(tests[name][key], (), p_value, level)
    return Comparison(
        names=names,
        class_names=tuple(class_names),
        intervals={name: bootstrap_intervals(counts[name], **options) for name in names},
        overall=overall,
        classes=classes,
        image_names=first.names,
        indices=first.indices,
        image_scores=np.stack([class_scores(counts[name])["mean_iou"] for name in names]),
        level=level,
        num_resamples=num_resamples,
        unit="images" if groups is None else "groups",
    )


def _check_same_images(accumulators: Mapping[str, MetricAccumulator]) -> None:
    if len(accumulators) < 2:
        raise ValueError(f"there are {len(accumulators)} models to compare; expected at least 2")
    (first_name, first), *others = accumulators.items()
    true = first.counts[:, 1]
    for name, other in others:
        if other.num_classes != first.num_classes:
            raise ValueError(
                f"{first_name} has {first.num_classes} classes and {name} has {other.num_classes}; expected the same"
            )
        if (other.names, other.indices) != (first.names, first.indices):
            raise ValueError(f"{first_name} and {name} were evaluated on different images; expected the same")
        differs = np.flatnonzero((other.counts[:, 1] != true).any(axis=1))
        if len(differs):
            raise ValueError(
                f"{first_name} and {name} were evaluated on different labels of {first.names[differs[0]]}; "
                "expected the same"
            )


def _enough_resamples(num_resamples: int | None, num_tests: int, level: float) -> int:
    """Number of resamples that the correction for so many tests leaves room for."""
    if num_resamples is None:
        return max(NUM_PAIRED_RESAMPLES, 200 * num_tests)
    least = int(2 * num_tests / (1 - level))
    if num_resamples < least:
        raise ValueError(
            f"num_resamples is {num_resamples}; expected at least {least}, with fewer no class could be significant "
            f"after the correction for {num_tests} tests"
        )
    return num_resamples


def _class_test(test: PairedTest, place: Any, corrected: float, level: float) -> ClassTest:
    difference, low, high, p_value = (known(each[place]) for each in test[:4])
    return ClassTest(difference, low, high, p_value, known(corrected), bool(corrected < 1 - level))


__all__ = ["NUM_IMAGES", "OVERALL", "ClassTest", "Comparison", "compare"]
