"""Figures of an evaluation as PNG, drawn by matplotlib, which the extra `plots` brings.

Every function takes values of `summary.summarize` and returns the bytes of a PNG. Nothing touches pyplot, so no display
and no state of the process is involved.
"""

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

BLUE, ORANGE, GREEN, INK, FAINT, GRID = "#2154c4", "#d66014", "#1d8348", "#202124", "#5f6368", "#e4e6ea"

_MOST_NUMBERED = 25  # classes of a confusion matrix with numbers in its cells
_MOST_NAMED = 160  # with names beside its rows
_SIDE = 11  # inches, of a matrix of more classes than have numbers
_DPI = 140


def has_matplotlib() -> bool:
    """Return True if matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot_iou(classes: Sequence[Mapping[str, Any]]) -> bytes:
    """IoU by class, highest first, with its interval.

    Args:
        classes: of the summary.
    """
    rows = sorted((row for row in classes if row["iou"] is not None), key=lambda row: row["iou"])
    figure, axes = _figure(7.2, 0.9 + 0.26 * len(rows))
    places = np.arange(len(rows))
    values = np.array([100 * row["iou"] for row in rows])
    axes.barh(places, values, height=0.66, color=BLUE, alpha=0.85)
    for place, row in enumerate(rows):
        span = row["intervals"].get("iou")
        low, high = (100 * np.array(span)) if span else (values[place], values[place])
        if span:
            axes.plot([low, high], [place, place], color=INK, linewidth=1.4, solid_capstyle="butt")
            axes.plot([low, high], [place, place], "|", color=INK, markersize=6)
        axes.annotate(
            f"{values[place]:.1f}",
            (max(high, values[place]), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("IoU, %")
    axes.grid(axis="x", color=GRID)
    return _png(figure)


def plot_confusion(matrix: Any, names: Sequence[str]) -> bytes:
    """Confusion matrix in percent of the true class's pixels; a class without pixels has a blank row.

    Colours follow the root of the percentage, so that small ones are visible. Up to 25 classes have numbers in their
    cells, up to 160 have names.

    Args:
        matrix: (K, K + 1) counts from `metrics.confusion_matrix`, an array or a tensor on the CPU. The last column,
            predictions that are no class, is drawn if there are any.
        names: of the K classes.

    Raises:
        ValueError: if the matrix does not fit the names.
        ImportError: if matplotlib is not installed.

    Examples:
        >>> from hf_segformer.evaluation.plots import plot_confusion
        >>> plot_confusion([[90, 10, 0], [5, 5, 0]], ["ground", "path"])[1:4]
        b'PNG'
    """
    counts, columns = np.asarray(matrix, dtype=np.float64), [*names, "none"]
    if counts.shape != (len(names), len(names) + 1):
        raise ValueError(
            f"matrix is {counts.shape}; expected {(len(names), len(names) + 1)}: a row and a column for each name, and "
            "a column for predictions that are no class"
        )
    totals = counts.sum(axis=1, keepdims=True)
    if not counts[:, -1].any():
        counts, columns = counts[:, :-1], list(names)
    shares = 100 * counts / np.where(totals, totals, np.nan)
    cell = 0.3 if len(names) <= _MOST_NUMBERED else _SIDE / len(names)
    figure, axes = _figure(2.6 + cell * max(len(columns), 6), 1.8 + cell * max(len(names), 6))
    drawn = axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=10, aspect="equal")
    size = 9 if len(names) <= _MOST_NUMBERED else max(3, 72 * cell * 0.75)
    if len(names) <= _MOST_NAMED:
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size)
        axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_xlabel("predicted" if len(names) <= _MOST_NAMED else "predicted, number of the class")
    axes.set_ylabel("true" if len(names) <= _MOST_NAMED else "true, number of the class")
    axes.tick_params(length=0)
    if len(names) <= _MOST_NUMBERED:
        for row, column in np.argwhere(shares >= 0.5).tolist():
            ink = "white" if shares[row, column] > 35 else INK
            axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", fontsize=7.5, color=ink)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.04, pad=0.02, ticks=np.sqrt([0, 1, 5, 20, 50, 100]))
    bar.ax.set_yticklabels(["0", "1", "5", "20", "50", "100"], fontsize=8)
    bar.set_label("% of the true class's pixels", fontsize=8)
    bar.outline.set_visible(False)
    return _png(figure)


def plot_reliability(bins: Sequence[Mapping[str, Any]], error: float | None) -> bytes:
    """Reliability diagram over the histogram of confidences.

    Args:
        bins: of the summary's `calibration`.
        error: expected calibration error.
    """
    figure, (axes, below) = _figure(5.2, 5.6, rows=(3.2, 1))
    edges = np.linspace(0, 1, len(bins) + 1)
    width, total = edges[1], sum(row["count"] for row in bins)
    for left, row in zip(edges, bins, strict=False):
        if row["count"]:
            accuracy, confidence = row["accuracy"], row["confidence"]
            axes.bar(left, accuracy, width, align="edge", color=BLUE, alpha=0.85, edgecolor="white")
            low, high = sorted((accuracy, confidence))
            axes.bar(left, high - low, width, low, align="edge", color=ORANGE, alpha=0.35, edgecolor=ORANGE, hatch="//")
    axes.plot([0, 1], [0, 1], color=FAINT, linestyle="--", linewidth=1)
    axes.bar(0, 0, color=BLUE, label="accuracy")
    axes.bar(0, 0, color=ORANGE, alpha=0.35, hatch="//", edgecolor=ORANGE, label="gap to confidence")
    title = "" if error is None else f"ECE {100 * error:.1f} %"
    axes.legend(loc="upper left", frameon=False, fontsize=9, title=title, alignment="left")
    axes.set_ylabel("accuracy")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    below.bar(edges[:-1], [100 * row["count"] / max(1, total) for row in bins], width, align="edge", color=FAINT)
    below.set_xlim(0, 1)
    below.set_xlabel("confidence of the winning class")
    below.set_ylabel("pixels, %")
    return _png(figure)


def plot_thresholds(binary: Mapping[str, Any]) -> bytes:
    """Dice, precision and recall over the threshold, with the best one.

    Args:
        binary: of the summary.
    """
    figure, axes = _figure(5.6, 4.0)
    sweep = binary["sweep"]
    thresholds = [row["threshold"] for row in sweep]
    for name, color, width in (("precision", GREEN, 1.4), ("recall", ORANGE, 1.4), ("dice", BLUE, 2.4)):
        values = [np.nan if row[name] is None else row[name] for row in sweep]
        axes.plot(thresholds, values, color=color, linewidth=width, label=name.capitalize())
    if binary["best"] is not None:
        place = binary["best"]["threshold"], binary["best"]["dice"]
        axes.axvline(place[0], color=FAINT, linestyle="--", linewidth=1)
        axes.plot(*place, "o", color=BLUE)
        axes.annotate(f"best: {place[0]:.5g}", place, xytext=(6, 8), textcoords="offset points", fontsize=9)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("threshold")
    axes.grid(color=GRID)
    axes.legend(loc="lower center", frameon=False, fontsize=9, ncols=3)
    return _png(figure)


def plot_differences(rows: Sequence[Mapping[str, Any]], first: str, second: str) -> bytes:
    """Differences in IoU by class with their intervals; significant ones are filled.

    Args:
        rows: `name`, `difference`, `low`, `high` and `is_significant` of each class.
        first: name of the model that is subtracted.
        second: name of the other.
    """
    kept = [row for row in rows if row["difference"] is not None]
    kept.sort(key=lambda row: row["difference"])
    figure, axes = _figure(7.2, 1.0 + 0.26 * len(kept))
    for place, row in enumerate(kept):
        color = (BLUE if row["difference"] > 0 else ORANGE) if row["is_significant"] else FAINT
        if row["low"] is not None:
            axes.plot([100 * row["low"], 100 * row["high"]], [place, place], color=color, linewidth=1.6)
        face = color if row["is_significant"] else "white"
        axes.plot(100 * row["difference"], place, "o", color=color, markerfacecolor=face, markersize=6)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_yticks(range(len(kept)), [row["name"] for row in kept])
    axes.set_ylim(-0.6, len(kept) - 0.4)
    axes.set_xlabel(f"difference in IoU, points: {second} minus {first}")
    axes.grid(axis="x", color=GRID)
    return _png(figure)


def _figure(width: float, height: float, rows: Sequence[float] = ()) -> tuple[Any, Any]:
    """A figure with one pair of axes, or one pair for each row of the given heights."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'hf-segformer[plots]'") from error
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    axes = figure.subplots(len(rows) or 1, 1, sharex=bool(rows), height_ratios=list(rows) or None)
    for each in np.ravel(axes):
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(FAINT)
        each.tick_params(colors=INK, labelsize=9)
        each.set_axisbelow(True)
    return figure, axes


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


__all__ = [
    "has_matplotlib",
    "plot_confusion",
    "plot_differences",
    "plot_iou",
    "plot_reliability",
    "plot_thresholds",
]
