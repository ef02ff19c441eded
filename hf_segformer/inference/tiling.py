"""Label maps of any size in bounded memory: windows side by side, their logits blended, their labels taken at once.

A window's logits lie on a grid of a quarter of its sides. Windows begin at multiples of 32 pixels, so that the grids of
all of them, in every stage, are parts of one grid over the whole image. There the logits of overlapping windows are
blended by weights that fall to a window's edge. Whatever no further window touches becomes labels and is forgotten;
kept are only the rows where the next row of windows overlaps this one, and a row of the grid on either side of a seam,
from which bilinear upsampling needs the neighbours. No file formats and no network are known here.

Axes: B windows, K classes, H W the image's sides, h w those of the grid (a quarter, rounded up).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.readers import Tile
from ..upsampling_segformer import upsample_argmax

STEP = 32  # pixels of the input that a cell of the last stage's grid stands for
CELL = 4  # pixels that a cell of the logits' grid stands for
_UPSAMPLED_SIZE = 1 << 25  # floats: what the plain form of `upsample_argmax` may hold at once


@dataclass(frozen=True)
class Tiling:
    """How an image is cut into windows.

    Args:
        tile: side of a window in pixels, best the side of the crops that the model was trained on, or more. An image
            that is smaller is one window.
        overlap: pixels that neighbours share at least. Windows are spread evenly, and may share up to 32 more, or as
            much more as a side needs that is little longer than a tile.

    Raises:
        ValueError: if a value is not a multiple of 32, or out of range.

    Example:
        >>> from hf_segformer.inference.tiling import Tiling
        >>> Tiling(tile=512, overlap=64).spans(1300)
        [(0, 512), (384, 896), (800, 1300)]
    """

    tile: int = 1024
    overlap: int = 128

    def __post_init__(self):
        if not isinstance(self.tile, int) or self.tile < 2 * STEP or self.tile % STEP:
            raise ValueError(
                f"tile is {self.tile}, but it must be a multiple of {STEP} pixels and {2 * STEP} at least, so that all "
                "windows lie on one grid"
            )
        if not isinstance(self.overlap, int) or self.overlap % STEP or not 0 <= self.overlap <= self.tile - STEP:
            raise ValueError(
                f"overlap is {self.overlap}, but it must be a multiple of {STEP} pixels, from 0 to "
                f"{self.tile - STEP} for a tile of {self.tile}"
            )

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Where windows begin and end along a side of so many pixels; the last one may be up to 31 shorter."""
        last = max(-(-(length - self.tile) // STEP), 0)  # in steps
        num_gaps = -(-last * STEP // (self.tile - self.overlap))
        starts = [last * place // num_gaps * STEP for place in range(num_gaps + 1)] if num_gaps else [0]
        return [(start, min(start + self.tile, length)) for start in starts]

    def num_windows(self, height: int, width: int) -> int:
        """Of an image of this size."""
        return len(self.spans(height)) * len(self.spans(width))


class Block(NamedTuple):
    """Finished logits of a part of the grid, with the rows and columns around it as far as there are any.

    Attributes:
        rows: of the grid, without those around.
        columns: likewise.
        logits: (K, rows, columns) with those around.
        before: how many rows and columns of `logits` come before `rows` and `columns`, 0 or 1 each.
    """

    rows: range
    columns: range
    logits: Tensor
    before: tuple[int, int]


class _Span(NamedTuple):
    """A window along one axis of the grid: its cells, where the next one begins, and its weights."""

    first: int
    end: int
    following: int | None
    weights: Tensor

    @property
    def finished(self) -> int:
        """End of the cells that can be upsampled when the window is done: the next cell must be finished, too."""
        return self.end if self.following is None else self.following - 1


def blending_weights(spans: Sequence[tuple[int, int]]) -> list[Tensor]:
    """What each window's cells weigh along one axis of the grid.

    They fall linearly over the cells that two windows share, are never 0, stay 1 at the image's border, and those of
    all windows add up to 1 at every cell.

    Args:
        spans: (first, end) of each window, in cells, in order.

    Returns:
        float32, one value a cell, for each window.

    Example:
        >>> from hf_segformer.inference.tiling import blending_weights
        >>> [weights.tolist() for weights in blending_weights([(0, 4), (2, 6)])]
        [[1.0, 1.0, 0.75, 0.25], [0.25, 0.75, 1.0, 1.0]]
    """
    weights = []
    for index, (first, end) in enumerate(spans):
        place = torch.arange(end - first, dtype=torch.float64) + 0.5
        ramp = torch.ones_like(place)
        if index and (shared := spans[index - 1][1] - first) > 0:
            ramp = ramp.minimum(place / shared)
        if index < len(spans) - 1 and (shared := end - spans[index + 1][0]) > 0:
            ramp = ramp.minimum(place.flip(0) / shared)
        weights.append(ramp)
    total = torch.zeros(spans[-1][1], dtype=torch.float64)
    for (first, end), ramp in zip(spans, weights, strict=True):
        total[first:end] += ramp
    return [(ramp / total[first:end]).float() for (first, end), ramp in zip(spans, weights, strict=True)]


def _grid_spans(spans: Sequence[tuple[int, int]]) -> list[_Span]:
    """Windows in pixels -> windows in cells."""
    cells = [(start // CELL, -(-stop // CELL)) for start, stop in spans]
    followings = [first for first, _ in cells[1:]] + [None]
    weights = blending_weights(cells)
    return [_Span(*span, following, ramp) for span, following, ramp in zip(cells, followings, weights, strict=True)]


def blend(
    height: int,
    width: int,
    tiling: Tiling,
    logits_of: Callable[[Sequence[Tile]], Tensor],
    batch_size: int = 1,
) -> Iterator[Block]:
    """The logits of a whole image on their grid, block by block, from those of windows.

    Blocks come row by row, from left to right, and together make up the grid.

    Args:
        height: of the image, in pixels.
        width: likewise.
        tiling: how it is cut.
        logits_of: gives the logits (B, K, h, w) of windows of one size, h and w a quarter of it, rounded up.
        batch_size: windows to ask for at once, neighbours in a row.
    """
    spans = tiling.spans(height), tiling.spans(width)
    rows, columns = (_grid_spans(each) for each in spans)
    kept = _Kept(rows, columns[-1].end)
    done = 0
    for row, (top, bottom) in zip(rows, spans[0], strict=True):
        windows = [Tile(top, left, bottom - top, right - left) for left, right in spans[1]]
        yield from _blend_row(row, done, columns, _in_batches(windows, logits_of, batch_size), kept)
        done = row.finished


def _in_batches(
    windows: Sequence[Tile], logits_of: Callable[[Sequence[Tile]], Tensor], batch_size: int
) -> Iterator[Tensor]:
    """Logits (K, h, w) of each window, asked for in batches of one size."""
    for _, alike in groupby(windows, lambda window: window.width):
        same = list(alike)
        for start in range(0, len(same), batch_size):
            yield from logits_of(same[start : start + batch_size])


class _Kept:
    """Rows of weighted logits that the next row of windows goes on with, over the whole width."""

    def __init__(self, rows: Sequence[_Span], width: int):
        self.height = max((row.end - max(row.finished - 1, 0) for row in rows[:-1]), default=0)
        self.width = width
        self.num_rows = 0  # that the row of windows before left
        self.logits = torch.empty(0)

    def take(self, columns: slice, out: Tensor) -> None:
        """Put what is kept of these columns into the first rows of (K, rows, columns)."""
        if self.num_rows:
            out[:, : self.num_rows] = self.logits[:, : self.num_rows, columns]

    def put(self, columns: slice, logits: Tensor) -> None:
        """Keep these columns; they must have been taken before."""
        if not self.logits.numel():
            self.logits = logits.new_empty(len(logits), self.height, self.width)
        self.logits[:, : logits.shape[1], columns] = logits


def _blend_row(
    row: _Span, done: int, columns: Sequence[_Span], windows: Iterator[Tensor], kept: _Kept
) -> Iterator[Block]:
    """One row of windows; rows before `done` are finished, one of which is at hand for upsampling."""
    top = max(done - 1, 0)  # the first row at hand
    is_last = row.following is None
    rows = range(done, row.finished)
    left, reached, finished = 0, 0, 0  # columns: the first one at hand, the end of those at hand, of those finished
    sums: Tensor | None = None
    for column, logits in zip(columns, windows, strict=True):
        old, left = left, max(finished - 1, 0)
        grown = logits.new_zeros(len(logits), row.end - top, column.end - left, dtype=torch.float32)
        if sums is not None:
            grown[:, :, : reached - left] = sums[:, :, left - old :]
        kept.take(slice(reached, column.end), grown[:, :, reached - left :])
        weights = (row.weights[:, None] * column.weights).to(logits.device)
        grown[:, row.first - top :, column.first - left :] += logits * weights
        sums, reached = grown, column.end
        if not is_last:
            new = slice(column.first, column.end if column.following is None else column.following)
            kept.put(new, sums[:, row.finished - 1 - top :, new.start - left : new.stop - left])
        columns_here = range(finished, column.finished)
        around = sums[:, : rows.stop + (not is_last) - top, : columns_here.stop + (column.following is not None) - left]
        yield Block(rows, columns_here, around, (rows.start - top, columns_here.start - left))
        finished = column.finished
    kept.num_rows = 0 if is_last else row.end - (row.finished - 1)


def block_labels(block: Block) -> Tensor:
    """The labels (4 rows, 4 columns) of a block, as upsampling the whole grid by four gives them."""
    (above, beside), num_rows = block.before, len(block.rows)
    num_classes, _, width = block.logits.shape
    step = max(_UPSAMPLED_SIZE // (num_classes * CELL**2 * width), 1)
    labels = []
    for start in range(0, num_rows, step):
        end = min(start + step, num_rows)
        first = max(start + above - 1, 0)
        logits = block.logits[None, :, first : end + above + 1]
        wide = upsample_argmax(logits, (CELL * logits.shape[2], CELL * width))[0]
        skipped = CELL * (start + above - first)
        labels.append(wide[skipped : skipped + CELL * (end - start)])
    skipped = CELL * beside
    return torch.cat(labels)[:, skipped : skipped + CELL * len(block.columns)]


def label_bands(
    height: int,
    width: int,
    tiling: Tiling,
    logits_of: Callable[[Sequence[Tile]], Tensor],
    batch_size: int = 1,
    dtype: type[np.integer] = np.uint8,
) -> Iterator[tuple[int, np.ndarray]]:
    """The label map of a whole image in bands of rows, from the logits of windows.

    Every window is upsampled by exactly four, as crops are in training; what lies beyond the image is cut off.

    Args:
        height: of the image, in pixels.
        width: likewise.
        tiling: how it is cut.
        logits_of: see `blend`.
        batch_size: see `blend`.
        dtype: of the labels.

    Yields:
        The first row's number and the labels (rows, W), from top to bottom; the array is overwritten by the next band.

    Example:
        >>> import torch
        >>> from hf_segformer.inference.tiling import Tiling, label_bands
        >>> def brighter_to_the_right(windows):
        ...     columns = [torch.arange(w.width // 4) + w.left / 4 - 25 for w in windows]
        ...     return torch.stack([torch.stack([0 * c, c]).unsqueeze(1).expand(2, w.height // 4, -1)
        ...                         for c, w in zip(columns, windows)])
        >>> bands = label_bands(96, 200, Tiling(tile=64, overlap=0), brighter_to_the_right)
        >>> [(top, band.shape, int(band[0].sum())) for top, band in bands]
        [(0, (28, 200), 98), (28, (68, 200), 98)]
    """
    strip = np.empty((0, 0), dtype)
    for block in blend(height, width, tiling, logits_of, batch_size):
        top, left = CELL * block.rows.start, CELL * block.columns.start
        num_rows = min(CELL * block.rows.stop, height) - top
        if len(strip) < num_rows:
            strip = np.empty((num_rows, width), dtype)
        labels = block_labels(block).cpu().numpy()[:num_rows, : width - left]
        strip[:num_rows, left : left + labels.shape[1]] = labels
        if CELL * block.columns.stop >= width:
            yield top, strip[:num_rows]


__all__ = ["Block", "Tiling", "blend", "blending_weights", "block_labels", "label_bands"]
