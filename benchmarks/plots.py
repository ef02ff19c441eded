"""Plots of the measurements."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # no window

import matplotlib.pyplot as plt

from .record import Record

_BLUE, _ORANGE, _INK, _FAINT, _GRID = "#2154c4", "#d66014", "#202124", "#5f6368", "#e4e6ea"
_COLORS = (_BLUE, _ORANGE, "#1e8e5a", "#8a4fc7", _FAINT)  # of the processors
_STYLE = {
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _FAINT,
    "ytick.color": _INK,
    "figure.dpi": 150,
}


def draw_ratios(ratios: Mapping[str, Sequence[float | None]], names: Sequence[str], path: Path, title: str) -> None:
    """Draw for each work one bar a processor, with a line at 1; None leaves a bar out."""
    height = 0.8 / len(names)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(5.5, 0.8 + (0.14 + 0.2 * len(names)) * len(ratios)))
        for index, name in enumerate(names):
            places = [place + height * (index - (len(names) - 1) / 2) for place in range(len(ratios))]
            bars = [(place, row[index]) for place, row in zip(places, ratios.values(), strict=True) if row[index]]
            widths = [ratio for _, ratio in bars]
            axes.barh(
                [place for place, _ in bars], widths, 0.9 * height, color=_COLORS[index % len(_COLORS)], label=name
            )
            for place, ratio in bars:
                label = f"{ratio:.2f}"
                axes.annotate(label, (ratio, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
        axes.axvline(1, color=_INK, linewidth=1)
        axes.set_yticks(range(len(ratios)), list(ratios))
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        most = max(ratio for row in ratios.values() for ratio in row if ratio)
        axes.set_xlim(0, 1.17 * max(1.0, most))  # room for the numbers
        axes.set_title(title, loc="left", fontsize=10, color=_FAINT)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        _save(figure, path)


def draw_sizes(rows: dict[int, dict[str, Record]], path: Path) -> None:
    """Draw time and memory of a pixel against the side of the image, for both packages."""
    sides = list(rows)
    with plt.rc_context(_STYLE | {"ytick.color": _FAINT}):
        figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        for axes, title, field, factor in (
            (panels[0], "Time, ns a pixel", "milliseconds", 1e6),
            (panels[1], "Memory at the peak, bytes a pixel", "mebibytes", 2**20),
        ):
            for candidate, color in (("transformers", _ORANGE), ("hf_segformer", _BLUE)):
                values = [getattr(records[candidate], field) for records in rows.values()]
                points = [
                    (side, factor * value / side**2)
                    for side, value in zip(sides, values, strict=True)
                    if value is not None
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), color=color, linewidth=2.2, marker="o", label=candidate)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sides, [str(side) for side in sides])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set_xlabel("side of the image, pixels")
            axes.set_title(title, loc="left", fontsize=12)
        panels[0].legend(frameon=False)
        _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})  # the same file from the same numbers
    plt.close(figure)
