"""Scores of an evaluation as JSON, CSV and LaTeX: the content of metrics.json and the tables beside it.

Axes: K classes, I images.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..files import csv_text, printable
from .accumulator import MetricAccumulator
from .binary import auc_error, average_precision, best_threshold, roc_auc, threshold_scores, threshold_sweep
from .bootstrap import LEVEL, NUM_RESAMPLES, Interval, bootstrap_intervals, class_scores
from .boundary import boundary_scores
from .calibration import calibration_error, calibration_errors, reliability_diagram
from .numbers import known, percent

CLASS_COLUMNS = {
    "iou": "IoU",
    "dice": "Dice",
    "precision": "Precision",
    "recall": "Recall",
    "boundary_iou": "Boundary IoU",
    "boundary_f1": "Boundary F1",
    "calibration_error": "ECE",
}
"""Scores by class in metrics.json, with their headings in tables."""

_OVERALL = {
    "mean_iou": "mean_iou",
    "mean_dice": "mean_dice",
    "precision": "mean_precision",
    "recall": "mean_recall",
    "mean_accuracy": "mean_recall",
    "overall_accuracy": "overall_accuracy",
}
MOST_SHOWN = 60
"""Classes up to which pages and terminals show all of them."""

_BY_CLASS = ("iou", "dice", "precision", "recall")


def summarize(
    accumulator: MetricAccumulator,
    class_names: Sequence[str],
    *,
    groups: Sequence[Any] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute all scores, overall and by class, with confidence intervals over images or groups.

    Args:
        accumulator: of all images.
        class_names: of the K classes.
        groups: of each image, the group that is drawn as a whole, such as a patient; by default the image itself.
        num_resamples: number of resamples of the bootstrap.
        level: coverage of the intervals.
        seed: of the resamples.

    Returns:
        values for metrics.json, scores from 0 to 1, None where a score is not defined. Overall: `mean_iou`,
        `mean_dice`, `precision`, `recall`, `mean_accuracy` (the same as recall), `overall_accuracy`, `boundary_iou` and
        `boundary_f1` (means over classes), `calibration_error`; `intervals` holds [low, high] of the first six. A list
        `classes` of the same scores by class, and the settings under `boundary`, `calibration` and, of two classes,
        `binary`.

    Raises:
        ValueError: if there are no images, or names or groups do not fit.
    """
    if len(class_names) != accumulator.num_classes:
        raise ValueError(f"class_names has {len(class_names)} names; expected {accumulator.num_classes}")
    counts = accumulator.counts
    if not len(counts):
        raise ValueError("no image was evaluated; expected at least one")
    scores, boundary = class_scores(counts.sum(axis=0)), boundary_scores(accumulator.boundary)
    intervals: Mapping[str, Interval] = {}
    if len(counts if groups is None else set(groups)) > 1:
        options = {"num_resamples": num_resamples, "level": level, "seed": seed}
        intervals = bootstrap_intervals(counts, groups=groups, **options)  # type: ignore[arg-type]
    errors = None if accumulator.calibration is None else calibration_errors(accumulator.calibration)
    by_class = {**scores, **boundary, "calibration_error": errors}
    return {
        **{name: known(scores[source]) for name, source in _OVERALL.items()},
        **{name: known(np.nanmean(boundary[name])) if _any(boundary[name]) else None for name in _BOUNDARY},
        "calibration_error": None if errors is None else known(calibration_error(accumulator.calibration)),
        "intervals": _overall_intervals(intervals, groups, len(counts), num_resamples, level, seed),
        "classes": [_class_summary(place, name, by_class, counts, intervals) for place, name in enumerate(class_names)],
        "boundary": {"dilation_ratio": accumulator.dilation_ratio, "tolerance": accumulator.tolerance},
        "calibration": _calibration_summary(accumulator),
        "binary": _binary_summary(accumulator),
    }


def classes_csv(summary: Mapping[str, Any]) -> str:
    """Scores by class as CSV, with the ends of their intervals where there are any; the last line is the mean.

    Args:
        summary: of `summarize`.
    """
    ends = [(name, end) for name in _BY_CLASS for end in (0, 1)]
    header = ["class", *CLASS_COLUMNS, "pixels", *(f"{name}_{('low', 'high')[end]}" for name, end in ends)]
    rows = [
        [row["name"], *(row[name] for name in CLASS_COLUMNS), row["pixels"]]
        + [(row["intervals"].get(name) or (None, None))[end] for name, end in ends]
        for row in summary["classes"]
    ]
    means = [_mean_of(summary, name) for name in CLASS_COLUMNS]
    spans = [(summary["intervals"].get(_mean_name(name)) or (None, None))[end] for name, end in ends]
    rows.append(["mean", *means, sum(row["pixels"] for row in summary["classes"]), *spans])
    return csv_text([header, *rows])


def classes_latex(summary: Mapping[str, Any]) -> str:
    """Scores by class as a LaTeX table in percent, IoU with its interval; needs the package booktabs.

    Args:
        summary: of `summarize`.
    """
    used = [name for name in CLASS_COLUMNS if _mean_of(summary, name) is not None]
    lines = [r"\begin{tabular}{l" + "r" * len(used) + "}", r"\toprule"]
    lines += [" & ".join(["Class", *(CLASS_COLUMNS[name] for name in used)]) + r" \\", r"\midrule"]
    for row in summary["classes"]:
        cells = [_latex_cell(row[name], row["intervals"].get(name)) for name in used]
        lines.append(" & ".join([escape_latex(row["name"]), *cells]) + r" \\")
    means = [_latex_cell(_mean_of(summary, name), summary["intervals"].get(_mean_name(name))) for name in used]
    lines += [r"\midrule", " & ".join(["Mean", *means]) + r" \\", r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def per_image_csv(
    accumulator: MetricAccumulator, class_names: Sequence[str], groups: Sequence[str] | None = None
) -> str:
    """Scores of every image as CSV: overall and IoU by class; a score that is not defined is an empty cell.

    Args:
        accumulator: of all images.
        class_names: of the K classes.
        groups: of each image, for a column `group`.
    """
    header = ["index", "image", "pixels", "mean_iou", "mean_dice", "accuracy", *(f"iou {name}" for name in class_names)]
    counts = accumulator.counts
    scores = class_scores(counts)
    columns = [scores[name] for name in ("mean_iou", "mean_dice", "overall_accuracy")]
    rows: list[list[Any]] = [header]
    for place, (index, name) in enumerate(zip(accumulator.indices, accumulator.names, strict=True)):
        values = [*(column[place] for column in columns), *scores["iou"][place]]
        rows.append([index, name, int(counts[place, 1].sum()), *(known(value) for value in values)])
    if groups is not None:
        for row, group in zip(rows, ["group", *groups], strict=True):
            row.insert(2, group)
    return csv_text(rows)


def shown_classes(values: Sequence[float | None], most: int = MOST_SHOWN) -> list[int]:
    """Places of the classes that a page or a terminal shows: all, or of too many the worst, then the best, by IoU.

    Args:
        values: IoU of each class; None or NaN where it is not defined, which leaves the class out of a choice.
        most: number of classes that are shown at most, an even one.

    Examples:
        >>> from hf_segformer.evaluation.summary import shown_classes
        >>> shown_classes([0.1, 0.9, 0.5, 0.7, 0.6], most=4), shown_classes([0.1, 0.9, None], most=4)
        ([0, 2, 3, 1], [0, 1, 2])
    """
    if len(values) <= most:
        return list(range(len(values)))
    defined = {place: value for place, value in enumerate(values) if value is not None and not math.isnan(value)}
    ordered = sorted(defined, key=defined.__getitem__)
    return ordered if len(ordered) <= most else [*ordered[: most // 2], *ordered[-(most // 2) :]]


def frequent_confusions(matrix: Any, class_names: Sequence[str], number: int = 15) -> list[dict[str, Any]]:
    """Pairs of classes that are confused most, by the number of pixels, most first.

    Args:
        matrix: (K, K + 1) counts from `metrics.confusion_matrix`.
        class_names: of the K classes.
        number: of pairs, at most.

    Returns:
        for each pair the names `true` and `predicted` (`none` where the prediction is no class), `pixels`, and their
        `share` of the true class's pixels.
    """
    counts = np.asarray(matrix).astype(np.int64)
    totals = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    columns = [*class_names, "none"]
    places = np.argsort(-counts, axis=None, kind="stable")[:number]
    pairs = [(int(row), int(column)) for row, column in zip(*np.unravel_index(places, counts.shape), strict=True)]
    return [
        {
            "true": class_names[row],
            "predicted": columns[column],
            "pixels": int(counts[row, column]),
            "share": counts[row, column] / totals[row],
        }
        for row, column in pairs
        if counts[row, column]
    ]


def escape_latex(text: str) -> str:
    r"""Text with LaTeX's special characters and control characters escaped.

    Examples:
        >>> from hf_segformer.evaluation.summary import escape_latex
        >>> print(escape_latex("side_walk & 50%"))
        side\_walk \& 50\%
    """
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {sign: "\\" + sign for sign in "&%$#_{}"}
    return "".join(special.get(sign, sign) for sign in printable(text))


def _class_summary(
    place: int,
    name: str,
    by_class: Mapping[str, Any],
    counts: np.ndarray,
    intervals: Mapping[str, Interval],
) -> dict[str, Any]:
    scores = {key: None if by_class[key] is None else known(by_class[key][place]) for key in CLASS_COLUMNS}
    ends = {key: _ends(interval.low[place], interval.high[place]) for key, interval in _of_classes(intervals)}
    pixels = int(counts[:, 1, place].sum())
    return {"name": name, **scores, "accuracy": scores["recall"], "pixels": pixels, "intervals": ends}


def _of_classes(intervals: Mapping[str, Interval]) -> list[tuple[str, Interval]]:
    return [(key, interval) for key, interval in intervals.items() if key in _BY_CLASS]


def _overall_intervals(
    intervals: Mapping[str, Interval],
    groups: Sequence[Any] | None,
    num_images: int,
    num_resamples: int,
    level: float,
    seed: int,
) -> dict[str, Any]:
    if not intervals:
        return {}
    unit, drawn = ("images", num_images) if groups is None else ("groups", len(set(groups)))
    settings = {"level": level, "resamples": num_resamples, "seed": seed, "unit": unit, "num_drawn": drawn}
    spans = {name: _ends(intervals[source].low, intervals[source].high) for name, source in _OVERALL.items()}
    return {**settings, **spans}


def _calibration_summary(accumulator: MetricAccumulator) -> dict[str, Any] | None:
    if accumulator.calibration is None:
        return None
    diagram = reliability_diagram(accumulator.calibration)
    columns = (each.tolist() for each in diagram)
    bins = [
        {"count": count, "confidence": known(confidence), "accuracy": known(accuracy)}
        for count, confidence, accuracy in zip(*columns, strict=True)
    ]
    return {"num_bins": accumulator.num_bins, "bins": bins}


def _binary_summary(accumulator: MetricAccumulator) -> dict[str, Any] | None:
    histogram = accumulator.histogram
    if histogram is None:
        return None
    best, half = best_threshold(histogram), threshold_scores(histogram, 0.5)
    return {
        "auc": known(roc_auc(histogram)),
        "auc_error": known(auc_error(histogram)),
        "average_precision": known(average_precision(histogram)),
        "at_half": _threshold_row(half),
        "best": None if best is None else _threshold_row(best),
        "sweep": [_threshold_row(row) for row in threshold_sweep(histogram)],
    }


def _threshold_row(row: Any) -> dict[str, float | None]:
    return {name: known(value) for name, value in row._asdict().items()}


def _mean_name(name: str) -> str:
    return f"mean_{name}" if name in ("iou", "dice") else name


def _mean_of(summary: Mapping[str, Any], name: str) -> float | None:
    return summary[_mean_name(name)]


def _latex_cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "--"
    span = "" if interval is None else rf" {{\scriptsize [{percent(interval[0])}, {percent(interval[1])}]}}"
    return percent(value) + span


def _ends(low: Any, high: Any) -> list[float] | None:
    return None if math.isnan(low) or math.isnan(high) else [float(low), float(high)]


def _any(values: Sequence[float]) -> bool:
    return not all(math.isnan(value) for value in values)


_BOUNDARY = ("boundary_iou", "boundary_f1")

__all__ = [
    "CLASS_COLUMNS",
    "MOST_SHOWN",
    "classes_csv",
    "classes_latex",
    "escape_latex",
    "frequent_confusions",
    "per_image_csv",
    "shown_classes",
    "summarize",
]
