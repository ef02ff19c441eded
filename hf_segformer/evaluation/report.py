"""Report of an evaluation: metrics.json, tables, sheets of sample images, and one self-contained report.html.

Everything comes from the sums of a `MetricAccumulator`. Only the sample images are predicted once more, so that the
evaluation itself need not keep any.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import atomic_write, write_json
from ..visualization import Color
from . import plots
from .accumulator import MetricAccumulator, typical_images, worst_images
from .bootstrap import class_scores
from .numbers import percent
from .pages import render_report
from .samples import Sample, sample_sheet
from .summary import (
    CLASS_COLUMNS,
    classes_csv,
    classes_latex,
    frequent_confusions,
    per_image_csv,
    shown_classes,
)

NUM_SAMPLES = 5

LoadSample = Callable[[int], tuple[Image.Image, np.ndarray, np.ndarray]]
"""Index in the data set -> image, prediction (H, W) and labels (H, W)."""

_CARDS = (
    ("Mean IoU", "mean_iou"),
    ("Mean Dice", "mean_dice"),
    ("Pixel accuracy", "overall_accuracy"),
    ("Precision", "precision"),
    ("Recall", "recall"),
    ("Boundary IoU", "boundary_iou"),
    ("Calibration error", "calibration_error"),
)


@dataclass(frozen=True, eq=False)
class Report:
    """An evaluation, ready to be written to a folder.

    Args:
        title: heading of the page.
        accumulator: of all images.
        class_names: of the K classes.
        palette: one (red, green, blue) a class.
        summary: of `summary.summarize`; more values of metrics.json may be added to it.
        worst: samples of the worst images, worst first.
        typical: samples of typical images.
        details: method and settings by name, the page's last section.
        groups: of each image, if the intervals draw groups.
    """

    title: str
    accumulator: MetricAccumulator
    class_names: Sequence[str]
    palette: Sequence[Color]
    summary: Mapping[str, Any]
    worst: Sequence[Sample] = ()
    typical: Sequence[Sample] = ()
    details: Mapping[str, str] = field(default_factory=dict)
    groups: Sequence[str] | None = None

    def write(self, folder: str | Path) -> list[Path]:
        """Write all files of the report, each atomically.

        They are metrics.json, confusion.png, reliability.png, per_image.csv, table.csv, table.tex, worst.png and
        typical.png (if there are such samples) and report.html. Without matplotlib there are no figures, and the page
        says so.

        Args:
            folder: it is made if there is none.

        Returns:
            the files' paths.

        Raises:
            OSError: if a file cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(dict(self.summary), folder / "metrics.json")
        sheets, figures = self._sheets(), self._figures()
        files: dict[str, bytes | str] = {
            "per_image.csv": per_image_csv(self.accumulator, self.class_names, self.groups),
            "table.csv": classes_csv(self.summary),
            "table.tex": classes_latex(self.summary),
            **{f"{name}.png": sheet for name, sheet in sheets.items() if sheet},
            **{f"{name}.png": png for name in ("confusion", "reliability") if (png := figures[name])},
            "report.html": self._html(sheets, figures),
        }
        for name in ("worst.png", "typical.png", "confusion.png", "reliability.png"):
            if name not in files:  # of an earlier evaluation
                (folder / name).unlink(missing_ok=True)
        for name, content in files.items():
            write_file(folder / name, content)
        return [folder / name for name in ("metrics.json", *files)]

    def to_html(self) -> str:
        """Render the report as a self-contained HTML page."""
        return self._html(self._sheets(), self._figures())

    def _html(self, sheets: Mapping[str, bytes | None], figures: Mapping[str, bytes | None]) -> str:
        summary = self.summary
        means = {name: summary.get(f"mean_{name}", summary.get(name)) for name in CLASS_COLUMNS}
        return render_report(
            title=self.title,
            summary=summary,
            num_images=len(self.accumulator.names),
            cards=_CARDS,
            columns=[name for name in CLASS_COLUMNS if means[name] is not None],
            headings=CLASS_COLUMNS,
            means=means,
            rows=[(summary["classes"][place], self.palette[place]) for place in self._shown()],
            num_classes=len(self.class_names),
            confusions=frequent_confusions(self.accumulator.matrix, self.class_names),
            total=max(1, sum(row["pixels"] for row in summary["classes"])),
            details=self.details,
            no_plots=not plots.has_matplotlib(),
            **figures,
            **sheets,
        )

    def _shown(self) -> list[int]:
        return shown_classes([row["iou"] for row in self.summary["classes"]])

    def _figures(self) -> dict[str, bytes | None]:
        if not plots.has_matplotlib():
            return dict.fromkeys(("iou", "confusion", "reliability", "thresholds"))
        summary = self.summary
        calibration, binary = summary["calibration"], summary["binary"]
        return {
            "iou": plots.plot_iou([summary["classes"][place] for place in self._shown()]),
            "confusion": plots.plot_confusion(self.accumulator.matrix, self.class_names),
            "reliability": calibration and plots.plot_reliability(calibration["bins"], summary["calibration_error"]),
            "thresholds": binary and plots.plot_thresholds(binary),
        }

    def _sheets(self) -> dict[str, bytes | None]:
        ignore_index = self.accumulator.ignore_index
        return {
            name: png_bytes(sample_sheet(samples, self.class_names, self.palette, ignore_index)) if samples else None
            for name, samples in (("worst", self.worst), ("typical", self.typical))
        }


def choose_samples(
    accumulator: MetricAccumulator, load: LoadSample, number: int = NUM_SAMPLES
) -> tuple[list[Sample], list[Sample]]:
    """Load the worst and the most typical images of an evaluation.

    Args:
        accumulator: of all images.
        load: gives the image, prediction and labels of an index in the data set.
        number: of worst images, and of typical ones, at most.

    Returns:
        the worst samples, worst first, and the typical ones; no image is in both.
    """
    counts = accumulator.counts
    worst = worst_images(counts, number)
    typical = typical_images(counts, number, without=worst)
    scores = class_scores(counts)["mean_iou"]
    names, indices = accumulator.names, accumulator.indices

    def sample(place: int) -> Sample:
        image, prediction, labels = load(indices[place])
        return Sample(image, prediction, labels, f"{names[place]}   mean IoU {percent(scores[place])} %")

    return [sample(place) for place in worst], [sample(place) for place in typical]


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file's bytes."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file atomically, text as UTF-8."""
    with atomic_write(path) as partial:
        if isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            # A file name's bytes that are no UTF-8 become escapes.
            partial.write_text(content, encoding="utf-8", errors="backslashreplace")


__all__ = [
    "NUM_SAMPLES",
    "LoadSample",
    "Report",
    "choose_samples",
    "png_bytes",
    "write_file",
]
