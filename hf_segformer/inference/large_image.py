"""Segmentation of rasters that do not fit into memory: file in, file out, tile by tile.

Nothing is resized: a raster is segmented at its own resolution, so that the processor's `do_resize` and `size` do not
apply, and the model should have been trained on crops of that resolution. Everything else that the processor does to an
image it does to a tile.

Axes: C bands, K classes, h w sides of a tile's logits.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import InferenceOptions
from ..data.readers import Reader, Tile, open_raster
from ..files import atomic_write
from ..image_processing_segformer import SegFormerImageProcessor, range_limits
from ..progress import Progress
from ..visualization import Color, palette_for
from .segmenter import Segmenter, inference_mode_of, is_out_of_memory, unique_names
from .tiling import CELL, MaskLayout, count_tiles, segment_rows


@runtime_checkable
class RasterReader(Reader, Protocol):
    """A reader that also writes a segmentation map with what its file has beside the pixels, such as a reference."""

    def write(self, path: Path, rows: Iterator[tuple[int, np.ndarray]], layout: MaskLayout) -> None:
        """Write blocks of whole rows, from top to bottom, to a file of the raster's size.

        Raises:
            OSError: if it cannot be written.
        """


def predict_large_image(
    model: PreTrainedModel,
    processor: SegFormerImageProcessor,
    source: str | Path,
    destination: str | Path,
    options: InferenceOptions | None = None,
    *,
    bands: Sequence[int] | None = None,
    palette: Sequence[Color] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Segment a raster of any size in bounded memory.

    A GeoTIFF, or any other file that rasterio opens, becomes a GeoTIFF with the same reference, ground control points,
    tags and overviews; a plain TIFF becomes a plain TIFF. Both hold one band, uint8 (uint16 with more than 255
    classes), in tiles, with a colour for every class. Where the raster holds no data, the value is 255 (65535). The
    file is written atomically.

    Args:
        model: a segmentation model.
        processor: its processor, whose sizes do not apply.
        source: the raster.
        destination: the file to write; an existing file is replaced once the new one is complete.
        options: `tile_size` and `tile_overlap`; `flip` and `scales`, whose probabilities are averaged on the grid of
            the logits; `dtype`; and `batch_size`, the number of tiles that an accelerator sees at once.
        bands: numbers, from 1 on, of the bands that the model takes, in its order; by default all.
        palette: one (red, green, blue) for each class.
        progress: show progress in tiles.

    Returns:
        `source`, `destination`, `height`, `width`, `tiles`, `tile_size`, `tile_overlap`, `pixels` (number of pixels by
        class name), `no_data` (number of pixels) and `seconds`.

    Raises:
        ValueError: if raster and model do not fit, or an option does not apply.
        OSError: if a file cannot be read or written.

    Examples:
        ```python
        model, processor = load_segmentation("outputs/shapes_b0")
        options = InferenceOptions(tile_size=512, tile_overlap=128)
        predict_large_image(model, processor, "scene.tif", "mask.tif", options)
        ```
    """
    segmenter = Segmenter(model, processor, options)
    return segment_raster(segmenter, source, destination, bands=bands, palette=palette, progress=progress)


def segment_raster(
    segmenter: Segmenter,
    source: str | Path,
    destination: str | Path,
    *,
    bands: Sequence[int] | None = None,
    palette: Sequence[Color] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Segment a raster by a `Segmenter`; see `predict_large_image`."""
    began, source, destination = time.perf_counter(), Path(source), Path(destination)
    options, names, processor = segmenter.options, unique_names(segmenter.names), segmenter.processor
    if options.sliding_window:
        raise ValueError(
            f"evaluation.sliding_window is {options.sliding_window}; expected 0 for a raster, which is cut by "
            "evaluation.tile_size and evaluation.tile_overlap"
        )
    if processor.value_range is not None and range_limits(processor.value_range) is None:
        raise ValueError(
            f"value_range is {processor.value_range}, a range of each image, which the tiles of a raster would each "
            "have for themselves; expected a fixed one: value_range=[low, high]"
        )
    dtype = next(each for each in (np.uint8, np.uint16, np.uint32) if len(names) <= np.iinfo(each).max)
    no_data = int(np.iinfo(dtype).max)
    layout = MaskLayout(dtype, no_data, palette or palette_for(names), names)
    counts, num_channels = np.zeros(len(names), np.int64), len(processor.image_mean)
    with (
        _destination(source, destination) as partial,
        open_raster(source, num_channels, bands=bands, num_rows=options.tile_size) as raster,
        inference_mode_of(segmenter.model),
        Progress(
            f"predict {source.name}", count_tiles(raster.height, raster.width, options), "tiles", is_shown=progress
        ) as bar,
    ):
        if not isinstance(raster, RasterReader):
            raise ValueError(f"{source} is no raster; expected a TIFF, JPEG 2000, PNG or JPEG file that rasterio reads")
        tiles, size = _RasterTiles(segmenter, raster, bar.update), (raster.height, raster.width)
        rows = segment_rows(*size, options, tiles.logits, segmenter.tile_batch_size, dtype)
        raster.write(partial, _without_no_data(rows, tiles, no_data, counts), layout)
    return {
        "source": str(source),
        "destination": str(destination),
        "height": size[0],
        "width": size[1],
        "tiles": bar.total,
        "tile_size": options.tile_size,
        "tile_overlap": options.tile_overlap,
        "pixels": dict(zip(names, counts.tolist(), strict=True)),
        "no_data": size[0] * size[1] - int(counts.sum()),
        "seconds": round(time.perf_counter() - began, 2),
    }


@contextmanager
def _destination(source: Path, destination: Path) -> Iterator[Path]:
    """A path to write to, which takes the name of the destination once all went well."""
    if destination.is_dir():
        raise ValueError(f"{destination} is a folder; expected the name of a file to write")
    if destination.exists() and source.exists() and destination.samefile(source):
        raise ValueError(f"{destination} is the raster itself; expected another file to write")
    with atomic_write(destination) as partial:
        partial.touch()  # fails before the work where nothing can be written
        yield partial


class _RasterTiles:
    """Logits of a raster's tiles; remembers which pixels hold data until their rows are written."""

    def __init__(self, segmenter: Segmenter, raster: RasterReader, when_done: Callable[[int], Any]):
        self.segmenter, self.raster, self.when_done = segmenter, raster, when_done
        self.valid = _ValidRows(raster.width) if raster.may_lack_data else None

    def logits(self, tiles: Sequence[Tile]) -> Tensor:
        """Logits (B, K, h, w) of tiles of one size, on the grid of a quarter of their sides."""
        images, is_empty = [], True
        for tile in tiles:
            pixels, valid = self.raster.read(tile)
            if self.valid is not None:
                self.valid.put(tile, valid)
            is_empty = is_empty and valid is not None and not valid.any()
            images.append(pixels)
        result = self._zeros(tiles) if is_empty else self._predict(images, tiles)
        self.when_done(len(tiles))
        return result

    def _zeros(self, tiles: Sequence[Tile]) -> Tensor:
        model, grid = self.segmenter.model, [-(-side // CELL) for side in (tiles[0].height, tiles[0].width)]
        return torch.zeros(len(tiles), model.config.num_labels, *grid, device=model.device)

    def _predict(self, images: Sequence[np.ndarray], tiles: Sequence[Tile]) -> Tensor:
        try:
            return self.segmenter.tile_logits(images)
        except (ValueError, MemoryError, RuntimeError) as error:
            if not isinstance(error, ValueError) and not is_out_of_memory(error):
                raise
            first, last = tiles[0], tiles[-1]
            raise ValueError(
                f"{self.raster.name}, rows {first.top} to {first.top + first.height} and columns {first.left} to "
                f"{last.left + last.width}: {error}"
            ) from error


class _ValidRows:
    """Mask of the pixels that hold data, in the rows that are not yet written."""

    def __init__(self, width: int):
        self.first = 0
        self.valid = np.ones((0, width), bool)

    def put(self, tile: Tile, valid: np.ndarray | None) -> None:
        """Remember the pixels of a tile; new rows begin as all valid."""
        end = tile.top + tile.height - self.first
        if end > len(self.valid):
            more = np.ones((end - len(self.valid), self.valid.shape[1]), bool)
            self.valid = np.concatenate([self.valid, more])
        if valid is not None:
            self.valid[tile.top - self.first : end, tile.left : tile.left + tile.width] = valid

    def take(self, num_rows: int) -> np.ndarray:
        """Remove the first rows and return them."""
        taken, self.valid = self.valid[:num_rows], self.valid[num_rows:].copy()
        self.first += num_rows
        return taken


def _without_no_data(
    strips: Iterator[tuple[int, np.ndarray]], tiles: _RasterTiles, no_data: int, counts: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Set the pixels without data to that value, and count the others by class."""
    for top, classes in strips:
        if tiles.valid is not None:
            classes[~tiles.valid.take(len(classes))] = no_data
        counts += np.bincount(classes[classes < len(counts)], minlength=len(counts))
        yield top, classes
