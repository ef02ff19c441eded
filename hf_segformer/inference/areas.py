"""Areas, volumes and longest diameters of classes, in pixels and where the spacing is known in millimetres.

Spacing is (slice, row, column): the distance of the centres of neighbouring slices, rows and columns in mm, None where
it is not known. Axes: H W sides of a slice.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import BACKGROUND, atomic_write, csv_text

Spacing = tuple[float | None, float | None, float | None]


class Area(NamedTuple):
    """Size of a class in a slice, or in a whole volume; None where the spacing that it needs is not known.

    Attributes:
        slice: number of the slice, from 1; empty for the whole volume.
        class_name: of the class.
        pixels: number of pixels.
        square_mm: area in a slice; of the whole volume in the slice where it is largest.
        cubic_mm: volume, for several slices.
        diameter_mm: longest diameter in a slice of one connected region; of the whole volume the longest one of all
            slices.
    """

    slice: int | str
    class_name: str
    pixels: int
    square_mm: float | None = None
    cubic_mm: float | None = None
    diameter_mm: float | None = None


AREA_COLUMNS = ("slice", "class", "pixels", "square_mm", "cubic_mm", "diameter_mm")
_DIGITS = 9  # significant ones


class Areas:
    """Areas of the classes of a volume, slice after slice; the class `background` is left out.

    Args:
        names: of the classes.
        spacing: see above.

    Examples:
        >>> import numpy as np
        >>> from hf_segformer.inference.areas import Areas
        >>> areas = Areas(["background", "lesion"], (5.0, 3.0, 4.0))
        >>> areas.add(np.array([[0, 1], [0, 0]]))
        >>> areas.add(np.array([[1, 1], [0, 0]]))
        >>> total, *_ = areas.rows()
        >>> total.pixels, total.square_mm, total.cubic_mm, round(total.diameter_mm, 2)
        (3, 24.0, 180.0, 8.54)
    """

    def __init__(self, names: Sequence[str], spacing: Spacing):
        self.spacing, self.num_slices = spacing, 0
        self._classes = foreground(names)
        self._slices: list[Area] = []

    def add(self, segmentation: np.ndarray) -> None:
        """Measure the next slice (H, W)."""
        self.num_slices += 1
        _, row, column = self.spacing
        for index, name in self._classes.items():
            mask = segmentation == index
            pixels = int(mask.sum())
            if not pixels:
                continue
            if row is None or column is None:
                self._slices.append(Area(self.num_slices, name, pixels))
            else:
                square, diameter = pixels * row * column, longest_diameter(mask, (row, column))
                self._slices.append(Area(self.num_slices, name, pixels, square, None, diameter))

    def rows(self) -> list[Area]:
        """Return a row for each class, and of several slices one for each class in each slice where it occurs."""
        totals = [self._total(name) for name in self._classes.values()]
        return [*totals, *self._slices] if self.num_slices > 1 else totals

    def _total(self, name: str) -> Area:
        mine = [area for area in self._slices if area.class_name == name]
        pixels = sum(area.pixels for area in mine)
        step, row, column = self.spacing
        if row is None or column is None:
            return Area("", name, pixels)
        cubic = pixels * step * row * column if self.num_slices > 1 and step is not None else None
        largest = max((area.square_mm or 0.0 for area in mine), default=0.0)
        longest = max((area.diameter_mm or 0.0 for area in mine), default=0.0)
        return Area("", name, pixels, largest, cubic, longest)


def write_areas(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write the areas of a volume as CSV, atomically; numbers have nine significant digits.

    Args:
        path: the file.
        rows: as `Areas.rows` returns them.

    Raises:
        OSError: if it cannot be written.
    """
    lines = [tuple(_text(each) if isinstance(each, float) else each for each in row) for row in rows]
    with atomic_write(path) as partial:
        partial.write_text(csv_text([AREA_COLUMNS, *lines]), encoding="utf-8", errors="backslashreplace")


def _text(number: float) -> str:
    return np.format_float_positional(number, _DIGITS, fractional=False, unique=False, trim="-")


def foreground(names: Sequence[str]) -> dict[int, str]:
    """Return index and name of the classes that are not called background."""
    return {index: name for index, name in enumerate(names) if name.casefold() != BACKGROUND}


def longest_diameter(mask: np.ndarray, spacing: tuple[float, float]) -> float:
    """Return the longest distance between two corners of pixels of one region, whose pixels touch by side or corner.

    Args:
        mask: bool (H, W).
        spacing: distance of the centres of neighbouring rows and columns.
    """
    rows, starts, ends = _runs(mask)
    regions = _regions(rows, starts, ends)
    longest = 0.0
    for region in np.unique(regions):
        row, start, end = (each[regions == region] for each in (rows, starts, ends))
        corners = np.stack([np.concatenate([row, row, row + 1, row + 1]), np.concatenate([start, end, start, end])], 1)
        height, width = np.ptp(corners, axis=0) * spacing
        if math.hypot(height, width) > longest:
            hull = _hull(corners) * spacing
            between = hull[:, None] - hull[None]
            longest = max(longest, float(np.sqrt((between**2).sum(-1).max())))
    return longest


def _runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row, first column and column behind the last one of all runs of pixels, row after row."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    return rows, starts, np.nonzero(edges == -1)[1]


def _regions(rows: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the region of each run: a number that touching runs of neighbouring rows share."""
    parents = list(range(len(rows)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    above, row, start, end = 0, rows.tolist(), starts.tolist(), ends.tolist()
    for here in range(len(row)):
        # Runs of the row above that end before this one begins touch no later one of this row either.
        while row[above] < row[here] - 1 or (row[above] == row[here] - 1 and end[above] < start[here]):
            above += 1
        other = above
        while row[other] == row[here] - 1 and start[other] <= end[here]:
            parents[root(other)] = root(here)
            other += 1
    return np.array([root(index) for index in range(len(row))], int)


def _hull(points: np.ndarray) -> np.ndarray:
    """Return the corners of the convex hull of points (N, 2) by Andrew's monotone chain (1979)."""

    def chain(ordered: list[list[int]]) -> list[list[int]]:
        kept: list[list[int]] = []
        for y, x in ordered:
            while len(kept) > 1:
                (y0, x0), (y1, x1) = kept[-2:]
                if (y1 - y0) * (x - x0) - (x1 - x0) * (y - y0) > 0:
                    break
                kept.pop()
            kept.append([y, x])
        return kept[:-1]

    ordered = np.unique(points, axis=0).tolist()
    return np.array([*chain(ordered), *chain(ordered[::-1])])


__all__ = ["AREA_COLUMNS", "Area", "Areas", "Spacing", "foreground", "longest_diameter", "write_areas"]
