"""Segmentation of images of any size in bounded memory: overlapping tiles, blended logits, upsampling by four.

The logits of a tile form a grid of a quarter of its sides. Tiles begin at multiples of 32 pixels, so that their grids,
in every stage, are parts of one grid over the whole image. Overlapping logits are blended on it, with weights that fall
towards the edges of a tile. Cells that no further tile touches are upsampled to classes and dropped. Memory holds
only the rows that overlap the next row of tiles and one row of the grid on either side of a seam, which bilinear
upsampling needs. This module knows neither file formats nor networks.

Axes: B tiles, K classes, H W sides of the image, h w those of the grid (a quarter, rounded up).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import TILE_STEP, InferenceOptions
from ..data.reader_protocol import Tile
from ..upsampling_segformer import upsample_argmax

CELL = 4  # pixels for each cell of the grid of logits
_UPSAMPLED_SIZE = 1 << 25  # floats that the reference of `upsample_argmax` may hold at once


class MaskLayout(NamedTuple):
    """Layout of a written segmentation map.

    Attributes:
        dtype: of the labels: uint8, uint16 or uint32.
        ignored: the value of pixels that hold no data.
        palette: one (red, green, blue) a class.
        names: of the classes.
    """

    dtype: type[np.integer]
    ignored: int
    palette: Sequence[tuple[int, int, int]]
    names: Sequence[str]

    def colors(self) -> np.ndarray:
        """Return red, green, blue and opacity of every value, (256 or 65536, 4)."""
        table = np.zeros((np.iinfo(self.dtype).max + 1, 4), np.uint8)
        table[: len(self.palette), :3] = self.palette
        table[: len(self.palette), 3] = 255
        return table


def tile_spans(length: int, options: InferenceOptions) -> list[tuple[int, int]]:
    """(start, stop) of the tiles along a side of `length` pixels; the last tile may be up to 31 pixels shorter.

    Tiles are spread evenly: neighbours may share up to 32 pixels more than the overlap, or as much more as a side needs
    that is a little longer than a tile.

    Examples:
        >>> from hf_segformer.config import InferenceOptions
        >>> from hf_segformer.inference.tiling import tile_spans
        >>> tile_spans(1300, InferenceOptions(tile_size=512, tile_overlap=64))
        [(0, 512), (384, 896), (800, 1300)]
    """
    size = options.tile_size
    last = max(-(-(length - size) // TILE_STEP), 0)  # in steps
    num_gaps = -(-last * TILE_STEP // (size - options.tile_overlap))
    starts = [last * index // num_gaps * TILE_STEP for index in range(num_gaps + 1)] if num_gaps else [0]
    return [(start, min(start + size, length)) for start in starts]


def count_tiles(height: int, width: int, options: InferenceOptions) -> int:
    """Count the tiles of an image of this size."""
    return len(tile_spans(height, options)) * len(tile_spans(width, options))


class Block(NamedTuple):
    """Finished logits of a part of the grid, with the adjacent rows and columns that exist.

    Attributes:
        rows: rows of the grid, without adjacent ones.
        columns: columns of the grid, without adjacent ones.
        logits: (K, rows, columns), with adjacent ones.
        before: number of rows and columns of `logits` before `rows` and `columns`, 0 or 1 each.
    """

    rows: range
    columns: range
    logits: Tensor
    before: tuple[int, int]


class _Span(NamedTuple):
    """A tile along one axis of the grid: its cells, the start of the next tile, and its weights."""

    first: int
    end: int
    following: int | None
    weights: Tensor

    @property
    def finished(self) -> int:
        """End of the cells that can be upsampled once the tile is done; upsampling needs the next cell, too."""
        return self.end if self.following is None else self.following - 1


def blending_weights(spans: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Blending weights of the cells of each tile along one axis of the grid.

    They fall linearly over the cells that two tiles share, are never 0, stay 1 at the border of the image, and sum to 1
    over all tiles at every cell.

    Args:
        spans: (first, end) of each tile in cells, in order.

    Returns:
        For each tile a float32 tensor with one value for each cell.

    Examples:
        >>> from hf_segformer.inference.tiling import blending_weights
        >>> [weights.tolist() for weights in blending_weights([(0, 4), (2, 6)])]
        [[1.0, 1.0, 0.75, 0.25], [0.25, 0.75, 1.0, 1.0]]
    """
    weights = []
    for index, (first, end) in enumerate(spans):
        position = torch.arange(end - first, dtype=torch.float64) + 0.5
        ramp = torch.ones_like(position)
        if index and (shared := spans[index - 1][1] - first) > 0:
            ramp = ramp.minimum(position / shared)
        if index < len(spans) - 1 and (shared := end - spans[index + 1][0]) > 0:
            ramp = ramp.minimum(position.flip(0) / shared)
        weights.append(ramp)
    total = torch.zeros(spans[-1][1], dtype=torch.float64)
    for (first, end), ramp in zip(spans, weights, strict=True):
        total[first:end] += ramp
    return [(ramp / total[first:end]).float() for (first, end), ramp in zip(spans, weights, strict=True)]


def _grid_spans(spans: Sequence[tuple[int, int]]) -> list[_Span]:
    """Tiles in pixels -> tiles in cells."""
    cells = [(start // CELL, -(-stop // CELL)) for start, stop in spans]
    followings = [first for first, _ in cells[1:]] + [None]
    weights = blending_weights(cells)
    return [_Span(*span, following, ramp) for span, following, ramp in zip(cells, followings, weights, strict=True)]


def blend(
    height: int,
    width: int,
    options: InferenceOptions,
    logits_of: Callable[[Sequence[Tile]], Tensor],
    batch_size: int = 1,
    seam: "Seam | None" = None,
) -> Iterator[Block]:
    """Blend the logits of tiles to those of the whole image, block by block.

    Blocks come row by row, from left to right, and together cover the grid. With the last block of a row of tiles,
    `seam` is what the rest of the image needs of what was done.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        options: `tile_size` and `tile_overlap`.
        logits_of: returns the logits (B, K, h, w) of tiles of one size, h and w a quarter of it, rounded up.
        batch_size: most tiles for each call of `logits_of`; they are neighbours in a row.
        seam: where to begin, and kept up to date; by default at the top.
    """
    spans = tile_spans(height, options), tile_spans(width, options)
    rows, columns = (_grid_spans(each) for each in spans)
    seam = Seam() if seam is None else seam
    kept = _Kept(rows, columns[-1].end, seam)
    done = rows[seam.row - 1].finished if seam.row else 0
    for row, (top, bottom) in list(zip(rows, spans[0], strict=True))[seam.row :]:
        tiles = [Tile(top, left, bottom - top, right - left) for left, right in spans[1]]
        yield from _blend_row(row, done, columns, _in_batches(tiles, logits_of, batch_size), kept)
        done = row.finished


def _in_batches(
    tiles: Sequence[Tile], logits_of: Callable[[Sequence[Tile]], Tensor], batch_size: int
) -> Iterator[Tensor]:
    """Logits (K, h, w) of each tile, computed in batches of one size."""
    for _, alike in groupby(tiles, lambda tile: tile.width):
        same = list(alike)
        for start in range(0, len(same), batch_size):
            yield from logits_of(same[start : start + batch_size])


@dataclass(eq=False)
class Seam:
    """State that the finished rows of tiles leave for the next one.

    Attributes:
        row: index of the next row of tiles.
        logits: weighted logits (K, rows, w) where it overlaps those done.
    """

    row: int = 0
    logits: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0))


class _Kept:
    """Rows of weighted logits that overlap the next row of tiles, over the whole width."""

    def __init__(self, rows: Sequence[_Span], width: int, seam: Seam):
        self.height = max((row.end - max(row.finished - 1, 0) for row in rows[:-1]), default=0)
        self.width = width
        self.num_rows = seam.logits.shape[1]  # left by the row of tiles before
        self.logits = torch.empty(0, 0, 0)
        self.seam = seam
        if self.num_rows:
            self.logits = seam.logits.new_empty(len(seam.logits), self.height, width)
            self.logits[:, : self.num_rows] = seam.logits

    def finish_row(self, num_rows: int) -> None:
        """Keep these many rows for the next row of tiles."""
        self.num_rows = num_rows
        self.seam.row, self.seam.logits = self.seam.row + 1, self.logits[:, :num_rows]

    def take(self, columns: slice, out: Tensor) -> None:
        """Copy the kept rows of these columns into the first rows of (K, rows, columns)."""
        if self.num_rows:
            out[:, : self.num_rows] = self.logits[:, : self.num_rows, columns]

    def put(self, columns: slice, logits: Tensor) -> None:
        """Keep these columns, which must have been taken before."""
        if not self.logits.numel():
            self.logits = logits.new_empty(len(logits), self.height, self.width)
        self.logits = self.logits.to(logits.device)  # those of an earlier run are read from a file
        self.logits[:, : logits.shape[1], columns] = logits


def _blend_row(
    row: _Span, done: int, columns: Sequence[_Span], logits_of_tiles: Iterator[Tensor], kept: _Kept
) -> Iterator[Block]:
    """Blend one row of tiles; rows before `done` are finished, the last of which is held for upsampling."""
    top = max(done - 1, 0)  # the first row held
    is_last = row.following is None
    rows = range(done, row.finished)
    left, reached, finished = 0, 0, 0  # columns: the first one held, the end of those held, the end of those finished
    sums: Tensor | None = None
    for column, logits in zip(columns, logits_of_tiles, strict=True):
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
        if column.following is None:
            kept.finish_row(0 if is_last else row.end - (row.finished - 1))
        yield Block(rows, columns_here, around, (rows.start - top, columns_here.start - left))
        finished = column.finished


def segment_block(block: Block, with_probability: bool = False) -> Any:
    """Segmentation map (4 rows, 4 columns) of a block, equal to that of the whole grid upsampled by four.

    Returns:
        the map, or with `with_probability` a pair of it and the probabilities of its classes, float32.
    """
    (above, beside), num_rows = block.before, len(block.rows)
    num_classes, _, width = block.logits.shape
    step = max(_UPSAMPLED_SIZE // (num_classes * CELL**2 * width), 1)
    parts = []
    for start in range(0, num_rows, step):
        end = min(start + step, num_rows)
        first = max(start + above - 1, 0)
        logits = block.logits[None, :, first : end + above + 1]
        wide = upsample_argmax(logits, (CELL * logits.shape[2], CELL * width), with_probability=with_probability)
        skipped = CELL * (start + above - first)
        planes = wide if with_probability else (wide,)
        parts.append([plane[0, skipped : skipped + CELL * (end - start)] for plane in planes])
    skipped = CELL * beside
    found = tuple(
        torch.cat(each)[:, skipped : skipped + CELL * len(block.columns)] for each in zip(*parts, strict=True)
    )
    return found if with_probability else found[0]


def segment_rows(
    height: int,
    width: int,
    options: InferenceOptions,
    logits_of: Callable[[Sequence[Tile]], Tensor],
    batch_size: int = 1,
    dtype: type[np.integer] = np.uint8,
    *,
    with_probability: bool = False,
    seam: Seam | None = None,
) -> Iterator[Any]:
    """Segmentation map of a whole image in strips of rows, from the logits of tiles.

    Every tile is upsampled by exactly four, as crops are in training; pixels beyond the image are cut off.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        options: see `blend`.
        logits_of: see `blend`.
        batch_size: see `blend`.
        dtype: integer type of the map.
        with_probability: also yield the probabilities of the classes, float32 (rows, W).
        seam: see `blend`; a strip comes for each row of tiles.

    Yields:
        Index of the first row and the classes (rows, W), from top to bottom. The next strip reuses the arrays.

    Examples:
        >>> import torch
        >>> from hf_segformer.config import InferenceOptions
        >>> from hf_segformer.inference.tiling import segment_rows
        >>> def brighter_to_the_right(tiles):
        ...     columns = [torch.arange(tile.width // 4) + tile.left / 4 - 25 for tile in tiles]
        ...     return torch.stack([torch.stack([0 * c, c]).unsqueeze(1).expand(2, tile.height // 4, -1)
        ...                         for c, tile in zip(columns, tiles)])
        >>> options = InferenceOptions(tile_size=64, tile_overlap=0)
        >>> strips = segment_rows(96, 200, options, brighter_to_the_right)
        >>> [(top, strip.shape, int(strip[0].sum())) for top, strip in strips]
        [(0, (28, 200), 98), (28, (68, 200), 98)]
    """
    dtypes = (dtype, np.float32) if with_probability else (dtype,)
    strips = [np.empty((0, 0), each) for each in dtypes]
    for block in blend(height, width, options, logits_of, batch_size, seam):
        top, left = CELL * block.rows.start, CELL * block.columns.start
        num_rows = min(CELL * block.rows.stop, height) - top
        if len(strips[0]) < num_rows:
            strips = [np.empty((num_rows, width), each) for each in dtypes]
        found = segment_block(block, with_probability)
        for strip, plane in zip(strips, found if with_probability else (found,), strict=True):
            part = plane.cpu().numpy()[:num_rows, : width - left]
            strip[:num_rows, left : left + part.shape[1]] = part
        if CELL * block.columns.stop >= width:
            yield top, *(strip[:num_rows] for strip in strips)


__all__ = [
    "CELL",
    "Block",
    "MaskLayout",
    "Seam",
    "blend",
    "blending_weights",
    "count_tiles",
    "segment_block",
    "segment_rows",
    "tile_spans",
]
