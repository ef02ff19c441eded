"""Comparison of models as text, CSV, JSON and one HTML page, with the images that differ most."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import csv_text, printable, write_json
from ..visualization import Color, colorize, figure
from . import plots
from .bootstrap import Interval
from .comparison import NUM_IMAGES, OVERALL, ClassTest, Comparison
from .numbers import known, percent
from .pages import render_comparison
from .report import png_bytes, write_file

LoadPredictions = Callable[[int], tuple[Image.Image, np.ndarray, Mapping[str, np.ndarray]]]
"""Index in the data set -> image, labels (H, W), and each model's prediction (H, W) by its name."""


def format_comparison(comparison: Comparison) -> str:
    """Tables for a terminal: overall scores, IoU by class, and the images that differ most; in percent."""
    others = comparison.names[1:]
    lines = [f"baseline: {comparison.names[0]}; {len(comparison.image_names)} images"]
    header = ["", *OVERALL.values()]
    rows = [[name, *(_span(comparison, name, key) for key in OVERALL)] for name in comparison.names]
    lines += ["", *_aligned([header, *rows])]
    header = ["", *comparison.names, *(cell for name in others for cell in (f"{name} - {comparison.names[0]}", "p"))]
    lines += ["", *_aligned([header, *_class_rows(comparison), _mean_row(comparison)])]
    lines += [
        "",
        f"* significant at {1 - comparison.level:.2g}: paired bootstrap over {comparison.unit}, "
        f"{comparison.num_resamples:,} resamples, p-values of classes corrected by Holm for {comparison.num_tests} "
        "tests",
    ]
    rows = [
        [comparison.image_names[p], *map(percent, comparison.image_scores[:, p].tolist())]
        for p in comparison.most_different()
    ]
    if rows:
        lines += ["", "images that differ most, mean IoU", *_aligned([["", *comparison.names], *rows])]
    return "\n".join(lines)


def comparison_csv(comparison: Comparison) -> str:
    """IoU by class of every model and its test against the baseline as CSV; the last line is the mean."""
    header = ["class", *(f"iou {name}" for name in comparison.names)]
    header += [f"{field} {name}" for name in comparison.names[1:] for field in ClassTest._fields[:5]]
    rows: list[Sequence[Any]] = [header]
    for place, class_name in enumerate(comparison.class_names):
        tests = [comparison.classes[name][place] for name in comparison.names[1:]]
        values = [known(comparison.intervals[name]["iou"].value[place]) for name in comparison.names]
        rows.append([class_name, *values, *(value for test in tests for value in test[:5])])
    tests = [comparison.overall[name]["mean_iou"] for name in comparison.names[1:]]
    means = [known(comparison.intervals[name]["mean_iou"].value) for name in comparison.names]
    rows.append(["mean", *means, *(value for test in tests for value in test[:5])])
    return csv_text(rows)


def comparison_per_image_csv(comparison: Comparison) -> str:
    """Mean IoU of every image and model as CSV."""
    rows: list[Sequence[Any]] = [["index", "image", *(f"mean_iou {name}" for name in comparison.names)]]
    for place, (index, name) in enumerate(zip(comparison.indices, comparison.image_names, strict=True)):
        rows.append([index, name, *(known(value) for value in comparison.image_scores[:, place])])
    return csv_text(rows)


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """All results, without those of single images."""
    models = {}
    for name in comparison.names:
        scores = {key: _interval(comparison.intervals[name][key]) for key in OVERALL}
        models[name] = {**scores, "iou": [known(value) for value in comparison.intervals[name]["iou"].value]}
    tests = {
        name: {
            **{key: test._asdict() for key, test in comparison.overall[name].items()},
            "iou": [test._asdict() for test in comparison.classes[name]],
        }
        for name in comparison.names[1:]
    }
    return {
        "baseline": comparison.names[0],
        "classes": list(comparison.class_names),
        "models": models,
        "tests": tests,
        "method": {
            "images": len(comparison.image_names),
            "unit": comparison.unit,
            "resamples": comparison.num_resamples,
            "level": comparison.level,
            "num_tests": comparison.num_tests,
        },
    }


def comparison_html(comparison: Comparison, title: str = "Comparison", sheet: bytes | None = None) -> str:
    """Render a comparison as a self-contained HTML page.

    Args:
        comparison: of `compare`.
        title: its heading.
        sheet: PNG of the images that differ most, see `difference_sheet`.
    """
    others, baseline = comparison.names[1:], comparison.names[0]
    differences = []
    if plots.has_matplotlib():
        for name in others:
            rows = [
                {"name": class_name, **test._asdict()}
                for class_name, test in zip(comparison.class_names, comparison.classes[name], strict=True)
            ]
            differences.append((name, plots.plot_differences(rows, baseline, name)))
    return render_comparison(
        title=title,
        names=comparison.names,
        baseline=baseline,
        num_images=len(comparison.image_names),
        level=comparison.level,
        unit=comparison.unit,
        num_resamples=f"{comparison.num_resamples:,}",
        num_tests=comparison.num_tests,
        overall_headings=list(OVERALL.values()),
        overall=[_overall_cells(comparison, name) for name in comparison.names],
        classes=[_class_cells(comparison, place) for place in range(len(comparison.class_names))],
        differences=differences,
        images=[
            {
                "name": comparison.image_names[place],
                "scores": comparison.image_scores[:, place].tolist(),
                "range": float(comparison.ranges[place]),
            }
            for place in comparison.most_different()
        ],
        sheet=sheet,
    )


def write_comparison(
    comparison: Comparison, folder: str | Path, title: str = "Comparison", sheet: bytes | None = None
) -> list[Path]:
    """Write comparison.json, comparison.csv, per_image.csv and comparison.html, each atomically.

    Args:
        comparison: of `compare`.
        folder: it is made if there is none.
        title: heading of the page.
        sheet: PNG of the images that differ most, which is written to differences.png too.

    Returns:
        the files' paths.

    Raises:
        OSError: if a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(comparison_json(comparison), folder / "comparison.json")
    files: dict[str, bytes | str] = {
        "comparison.csv": comparison_csv(comparison),
        "per_image.csv": comparison_per_image_csv(comparison),
    }
    files["comparison.html"] = comparison_html(comparison, title, sheet)
    if sheet:
        files["differences.png"] = sheet
    for name, content in files.items():
        write_file(folder / name, content)
    return [folder / name for name in ("comparison.json", *files)]


def difference_sheet(
    comparison: Comparison, load: LoadPredictions, palette: Sequence[Color], number: int = NUM_IMAGES
) -> bytes | None:
    """PNG of the images that differ most: image, labels and each model's prediction; None if none differ.

    Args:
        comparison: of `compare`.
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


def _span(comparison: Comparison, name: str, key: str) -> str:
    value, low, high = (percent(float(each)) for each in comparison.intervals[name][key])
    return f"{value} [{low}, {high}]"


def _class_rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for place, class_name in enumerate(comparison.class_names):
        values = [percent(float(comparison.intervals[name]["iou"].value[place])) for name in comparison.names]
        tests = [comparison.classes[name][place] for name in comparison.names[1:]]
        rows.append([class_name, *values, *(cell for test in tests for cell in _cells(test, _floor(comparison)))])
    return rows


def _mean_row(comparison: Comparison) -> list[str]:
    values = [percent(float(comparison.intervals[name]["mean_iou"].value)) for name in comparison.names]
    tests = [comparison.overall[name]["mean_iou"] for name in comparison.names[1:]]
    return ["mean", *values, *(cell for test in tests for cell in _cells(test, _floor(comparison)))]


def _floor(comparison: Comparison) -> float:
    """The smallest p-value that the resamples allow."""
    return 2 / (comparison.num_resamples + 1)


def _overall_cells(comparison: Comparison, name: str) -> dict[str, Any]:
    intervals = comparison.intervals[name]
    cells = [{"value": float(intervals[key].value), "span": _interval(intervals[key])["interval"]} for key in OVERALL]
    test = comparison.overall[name]["mean_iou"] if name in comparison.overall else None
    return {"name": name, "cells": cells, "test": None if test is None else _verdict(comparison, test)}


def _class_cells(comparison: Comparison, place: int) -> dict[str, Any]:
    scores = [known(comparison.intervals[name]["iou"].value[place]) for name in comparison.names]
    tests = [_verdict(comparison, comparison.classes[name][place]) for name in comparison.names[1:]]
    return {"name": comparison.class_names[place], "scores": scores, "tests": tests}


def _verdict(comparison: Comparison, test: ClassTest) -> dict[str, str]:
    verdict = "" if not test.is_significant else "better" if (test.difference or 0) > 0 else "worse"
    difference, p_value = _cells(test, _floor(comparison))
    return {"verdict": verdict, "text": difference, "p": p_value}


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
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (f"{cell:{'>' if place else '<'}{widths[place]}}" for place, cell in enumerate(row))
        lines.append("  " + "  ".join([first, *others]).rstrip())
    return lines


def _interval(interval: Interval) -> dict[str, Any]:
    value, low, high = (known(each) for each in interval)
    return {"value": value, "interval": None if low is None or high is None else [low, high]}


__all__ = [
    "LoadPredictions",
    "comparison_csv",
    "comparison_html",
    "comparison_json",
    "comparison_per_image_csv",
    "difference_sheet",
    "format_comparison",
    "write_comparison",
]
