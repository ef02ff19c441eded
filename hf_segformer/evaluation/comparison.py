"""Comparison of several models on the same images: side by side by class, with paired tests.

The first model is the baseline of the others. All are scored on the same resamples of the images, so that images that
are hard for every model do not blur the differences. P-values of classes are corrected by Holm over all classes and
models together.

Axes: A models, K classes, I images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..files import write_json
from ..visualization import Color, colorize, figure
from . import plots
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
from .pages import render_comparison
from .report import png_bytes, write_file
from .summary import csv_text, percent

LoadPredictions = Callable[[int], tuple[Image.Image, np.ndarray, Mapping[str, np.ndarray]]]
"""Index in the data set -> image, labels (H, W), and each model's prediction (H, W) by its name."""

NUM_IMAGES = 6

_OVERALL = {"mean_iou": "Mean IoU", "mean_dice": "Mean Dice", "overall_accuracy": "Accuracy"}


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
        ranges = self._ranges()
        order = np.argsort(-np.nan_to_num(ranges), kind="stable")
        return [place for place in order.tolist() if ranges[place] > 0][:number]

    def to_text(self) -> str:
        """Tables for a terminal: overall scores, IoU by class, and the images that differ most; in percent."""
        others = self.names[1:]
        lines = [f"baseline: {self.names[0]}; {len(self.image_names)} images"]
        header = ["", *_OVERALL.values()]
        rows = [[name, *(self._span(name, key) for key in _OVERALL)] for name in self.names]
        lines += ["", *_aligned([header, *rows])]
        header = ["", *self.names, *(cell for name in others for cell in (f"{name} - {self.names[0]}", "p"))]
        lines += ["", *_aligned([header, *self._class_rows(), self._mean_row()])]
        lines += [
            "",
            f"* significant at {1 - self.level:.2g}: paired bootstrap over {self.unit}, {self.num_resamples:,} "
            f"resamples, p-values of classes corrected by Holm for {self.num_tests} tests",
        ]
        rows = [[self.image_names[p], *map(percent, self.image_scores[:, p].tolist())] for p in self.most_different()]
        if rows:
            lines += ["", "images that differ most, mean IoU", *_aligned([["", *self.names], *rows])]
        return "\n".join(lines)

    def to_csv(self) -> str:
        """IoU by class of every model and its test against the baseline as CSV; the last line is the mean."""
        header = ["class", *(f"iou {name}" for name in self.names)]
        header += [f"{field} {name}" for name in self.names[1:] for field in ClassTest._fields[:5]]
        rows: list[Sequence[Any]] = [header]
        for place, class_name in enumerate(self.class_names):
            tests = [self.classes[name][place] for name in self.names[1:]]
            values = [_known(self.intervals[name]["iou"].value[place]) for name in self.names]
            rows.append([class_name, *values, *(value for test in tests for value in test[:5])])
        tests = [self.overall[name]["mean_iou"] for name in self.names[1:]]
        means = [_known(self.intervals[name]["mean_iou"].value) for name in self.names]
        rows.append(["mean", *means, *(value for test in tests for value in test[:5])])
        return csv_text(rows)

    def per_image_csv(self) -> str:
        """Mean IoU of every image and model as CSV."""
        rows: list[Sequence[Any]] = [["index", "image", *(f"mean_iou {name}" for name in self.names)]]
        for place, (index, name) in enumerate(zip(self.indices, self.image_names, strict=True)):
            rows.append([index, name, *(_known(value) for value in self.image_scores[:, place])])
        return csv_text(rows)

    def to_json(self) -> dict[str, Any]:
        """All results, without those of single images."""
        models = {}
        for name in self.names:
            scores = {key: _interval(self.intervals[name][key]) for key in _OVERALL}
            models[name] = {**scores, "iou": [_known(value) for value in self.intervals[name]["iou"].value]}
        tests = {
            name: {
                **{key: test._asdict() for key, test in self.overall[name].items()},
                "iou": [test._asdict() for test in self.classes[name]],
            }
            for name in self.names[1:]
        }
        return {
            "baseline": self.names[0],
            "classes": list(self.class_names),
            "models": models,
            "tests": tests,
            "method": {
                "images": len(self.image_names),
                "unit": self.unit,
                "resamples": self.num_resamples,
                "level": self.level,
                "num_tests": self.num_tests,
            },
        }

    def to_html(self, title: str = "Comparison", sheet: bytes | None = None) -> str:
        """One page without anything from elsewhere.

        Args:
            title: its heading.
            sheet: PNG of the images that differ most, see `difference_sheet`.
        """
        others, baseline = self.names[1:], self.names[0]
        differences = []
        if plots.has_matplotlib():
            for name in others:
                rows = [
                    {"name": class_name, **test._asdict()}
                    for class_name, test in zip(self.class_names, self.classes[name], strict=True)
                ]
                differences.append((name, plots.plot_differences(rows, baseline, name)))
        return render_comparison(
            title=title,
            names=self.names,
            baseline=baseline,
            num_images=len(self.image_names),
            level=self.level,
            unit=self.unit,
            num_resamples=f"{self.num_resamples:,}",
            num_tests=self.num_tests,
            overall_headings=list(_OVERALL.values()),
            overall=[self._overall_cells(name) for name in self.names],
            classes=[self._class_cells(place) for place in range(len(self.class_names))],
            differences=differences,
            images=[
                {
                    "name": self.image_names[place],
                    "scores": self.image_scores[:, place].tolist(),
                    "range": float(self._ranges()[place]),
                }
                for place in self.most_different()
            ],
            sheet=sheet,
        )

    def write(self, folder: str | Path, title: str = "Comparison", sheet: bytes | None = None) -> list[Path]:
        """Write comparison.json, comparison.csv, per_image.csv and comparison.html, each atomically.

        Args:
            folder: it is made if there is none.
            title: heading of the page.
            sheet: PNG of the images that differ most, which is written to differences.png too.

        Raises:
            OSError: if a file cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(self.to_json(), folder / "comparison.json")
        files: dict[str, bytes | str] = {"comparison.csv": self.to_csv(), "per_image.csv": self.per_image_csv()}
        files["comparison.html"] = self.to_html(title, sheet)
        if sheet:
            files["differences.png"] = sheet
        for name, content in files.items():
            write_file(folder / name, content)
        return [folder / name for name in ("comparison.json", *files)]

    def _ranges(self) -> np.ndarray:
        """Range of the mean IoU (I,) over the models; NaN where one is not defined."""
        return self.image_scores.max(axis=0) - self.image_scores.min(axis=0)

    def _span(self, name: str, key: str) -> str:
        value, low, high = (percent(float(each)) for each in self.intervals[name][key])
        return f"{value} [{low}, {high}]"

    def _class_rows(self) -> list[list[str]]:
        rows = []
        for place, class_name in enumerate(self.class_names):
            values = [percent(float(self.intervals[name]["iou"].value[place])) for name in self.names]
            tests = [self.classes[name][place] for name in self.names[1:]]
            rows.append([class_name, *values, *(cell for test in tests for cell in _cells(test, self._floor))])
        return rows

    def _mean_row(self) -> list[str]:
        values = [percent(float(self.intervals[name]["mean_iou"].value)) for name in self.names]
        tests = [self.overall[name]["mean_iou"] for name in self.names[1:]]
        return ["mean", *values, *(cell for test in tests for cell in _cells(test, self._floor))]

    @property
    def _floor(self) -> float:
        """The smallest p-value that the resamples allow."""
        return 2 / (self.num_resamples + 1)

    def _overall_cells(self, name: str) -> dict[str, Any]:
        intervals = self.intervals[name]
        cells = [
            {"value": float(intervals[key].value), "span": _interval(intervals[key])["interval"]} for key in _OVERALL
        ]
        test = self.overall[name]["mean_iou"] if name in self.overall else None
        return {"name": name, "cells": cells, "test": None if test is None else self._verdict(test)}

    def _class_cells(self, place: int) -> dict[str, Any]:
        scores = [_known(self.intervals[name]["iou"].value[place]) for name in self.names]
        tests = [self._verdict(self.classes[name][place]) for name in self.names[1:]]
        return {"name": self.class_names[place], "scores": scores, "tests": tests}

    def _verdict(self, test: ClassTest) -> dict[str, str]:
        verdict = "" if not test.is_significant else "better" if (test.difference or 0) > 0 else "worse"
        difference, p_value = _cells(test, self._floor)
        return {"verdict": verdict, "text": difference, "p": p_value}


def compare(
    accumulators: Mapping[str, MetricAccumulator],
    class_names: Sequence[str],
    *,
    groups: Sequence[Any] | None = None,
    num_resamples: int = NUM_PAIRED_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Comparison:
    """Compare models that were evaluated on the same images.

    Args:
        accumulators: of each model by its name, the baseline first.
        class_names: of the K classes.
        groups: of each image, the group that is drawn as a whole; by default the image itself.
        num_resamples: number of resamples. With K classes and A models no corrected p-value can be below
            2 * K * (A - 1) / (num_resamples + 1).
        level: coverage of the intervals.
        seed: of the resamples.

    Returns:
        the `Comparison`.

    Raises:
        ValueError: if there are fewer than two models or images, or they were not evaluated on the same images with
            the same labels.
    """
    names = tuple(accumulators)
    _check_same_images(accumulators)
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
    for key in _OVERALL:
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


def difference_sheet(
    comparison: Comparison, load: LoadPredictions, palette: Sequence[Color], number: int = NUM_IMAGES
) -> bytes | None:
    """PNG of the images that differ most: image, labels and each model's prediction; None if none differ.

    Args:
        comparison: of the models.
        load: gives the image, labels and predictions of an index in the data set.
        palette: one (red, green, blue) a class.
        number: of images, at most.
    """
    rows, captions, present = [], [], set()
    for place in comparison.most_different(number):
        image, labels, predictions = load(comparison.indices[place])
        masks = [labels, *(predictions[name] for name in comparison.names)]
        present |= {value for mask in masks for value in np.unique(mask).tolist()}
        size = labels.shape[::-1]
        rows.append([image.convert("RGB").resize(size), *(colorize(mask, palette) for mask in masks)])
        scores = zip(comparison.names, comparison.image_scores[:, place].tolist(), strict=True)
        captions.append(f"{comparison.image_names[place]}   " + ", ".join(f"{n} {percent(s)} %" for n, s in scores))
    if not rows:
        return None
    shown = [place for place in range(len(comparison.class_names)) if place in present]
    legend = [comparison.class_names[place] for place in shown], [palette[place] for place in shown]
    return png_bytes(figure(rows, ["image", "labels", *comparison.names], *legend, captions, panel_height=200))


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


def _class_test(test: PairedTest, place: Any, corrected: float, level: float) -> ClassTest:
    values = [_known(each[place]) for each in test[:4]]
    return ClassTest(*values, _known(corrected), bool(corrected < 1 - level))  # type: ignore[arg-type]


def _cells(test: ClassTest, floor: float) -> tuple[str, str]:
    """Difference in points with a star if it is significant, and the corrected p-value."""
    if test.difference is None or test.corrected is None:
        return "-", "-"
    star = "*" if test.is_significant else ""
    p_value = f"{test.corrected:.3f}" if test.corrected >= 0.001 else f"{test.corrected:.0e}"
    is_least = test.p_value is not None and test.p_value <= floor and test.corrected < 1
    return f"{100 * test.difference:+.1f}{star}", ("<=" if is_least else "") + p_value


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (f"{cell:{'>' if place else '<'}{widths[place]}}" for place, cell in enumerate(row))
        lines.append("  " + "  ".join([first, *others]).rstrip())
    return lines


def _interval(interval: Interval) -> dict[str, Any]:
    value, low, high = (_known(each) for each in interval)
    return {"value": value, "interval": None if low is None or high is None else [low, high]}


def _known(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


__all__ = ["NUM_IMAGES", "ClassTest", "Comparison", "LoadPredictions", "compare", "difference_sheet"]
