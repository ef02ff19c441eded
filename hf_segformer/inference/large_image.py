"""Segmentation of rasters that do not fit into memory: file in, file out, tile by tile.

Nothing is resized: a raster is segmented at its own resolution, so that the processor's `do_resize` and `size` do not
apply, and the model should have been trained on crops of that resolution. Everything else that the processor does to an
image it does to a tile.

Axes: C bands, K classes, h w sides of a tile's logits.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import InferenceOptions
from ..data.reader_protocol import Reader, Tile
from ..data.readers import open_raster
from ..files import atomic_write, partial_path
from ..image_processing_segformer import SegFormerImageProcessor, range_limits
from ..progress import Progress
from ..visualization import Color
from .predictor import palette_of
from .segmenter import Segmenter, inference_mode_of, is_out_of_memory, unique_names
from .spool import Spool, rows_of
from .tiling import CELL, MaskLayout, count_tiles, segment_rows, tile_spans

SPOOLS = f"**/.{'[0-9a-f]' * 16}.tiles"  # folders of finished rows, as `_spool` names them


@runtime_checkable
class RasterReader(Reader, Protocol):
    """A reader that also writes a segmentation map with what its file has beside the pixels, such as a reference."""

    def write(self, path: Path, rows: Iterator[tuple[int, np.ndarray]], layout: MaskLayout) -> None:
        """Write blocks of whole rows, from top to bottom, to a file of the raster's size.

        Raises:
            OSError: if it cannot be written.
        """

    def write_beside(self, path: Path, labels: np.ndarray, layout: MaskLayout) -> None:
        """Write the files that belong beside a segmentation map, such as its areas.

        Args:
            path: of the map, which may not exist yet.
            labels: (H, W), not in memory.
            layout: of the labels.

        Raises:
            OSError: if one cannot be written.
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
    file is written atomically. EXIF turns a JPEG or PNG file upright, as elsewhere.

    Args:
        model: a segmentation model.
        processor: its processor, whose sizes do not apply.
        source: the raster.
        destination: the file to write; an existing file is replaced once the new one is complete.
        options: `tile_size` and `tile_overlap`; `flip` and `scales`, whose probabilities are averaged on the grid of
            the logits; `dtype`; and `batch_size`, the number of tiles that an accelerator sees at once.
        bands: numbers, from 1 on, of the bands that the model takes, in its order; by default all.
        palette: one (red, green, blue) for each class; by default the palette of the model's
            configuration, or chosen by the names.
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
    reading: dict[str, Any] = {"bands": bands, "num_rows": segmenter.options.tile_size}
    with open_raster(source, len(processor.image_mean), **reading) as raster:
        return segment_raster(segmenter, raster, destination, palette=palette, progress=progress)


class SegmentedRaster(NamedTuple):
    """A raster's segmentation before its files are complete.

    Attributes:
        raster: the open raster.
        labels: (H, W), on disk.
        confidence: probability of each pixel's class in percent, uint8 (H, W) on disk, 255 for no data; or None.
        layout: of the labels.
    """

    raster: RasterReader
    labels: np.ndarray
    confidence: np.ndarray | None
    layout: MaskLayout


class RasterOutput(Protocol):
    """Further files of a raster.

    Attributes:
        needs_confidence: they need the confidence.
    """

    needs_confidence: bool

    def check(self, raster: RasterReader) -> None:
        """Raise ValueError if they cannot be written for a raster; called before the work."""

    def write(self, found: SegmentedRaster) -> None:
        """Write them; called before the segmentation map takes its name."""


def segment_raster(
    segmenter: Segmenter,
    raster: Reader,
    destination: str | Path,
    *,
    palette: Sequence[Color] | None = None,
    progress: bool = True,
    resumable: bool = False,
    output: RasterOutput | None = None,
) -> dict[str, Any]:
    """Segment an open raster by a `Segmenter`; see `predict_large_image`.

    Args:
        segmenter: with its options.
        raster: from `open_raster`, with `num_rows` of a tile.
        destination: see `predict_large_image`.
        palette: see `predict_large_image`.
        progress: see `predict_large_image`.
        resumable: keep finished rows of tiles in a hidden folder beside the destination until the map is complete, and
            continue from those of an earlier run.
        output: further files to write.
    """
    began, destination = time.perf_counter(), Path(destination)
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
    size = raster.height, raster.width  # of a damaged image there is none
    if not isinstance(raster, RasterReader):
        raise ValueError(f"{raster.name} is no raster; expected a TIFF, JPEG 2000, PNG or JPEG file for rasterio")
    dtype = next(each for each in (np.uint8, np.uint16, np.uint32) if len(names) <= np.iinfo(each).max)
    colors = palette_of(segmenter.model.config, segmenter.names) if palette is None else palette
    if len(colors) != len(names):
        raise ValueError(f"palette has {len(colors)} colours; expected {len(names)}, one for each class")
    layout = MaskLayout(dtype, int(np.iinfo(dtype).max), colors, names)
    counts = np.zeros(len(names), np.int64)
    with_confidence = output is not None and output.needs_confidence
    if output is not None:
        output.check(raster)
    with (
        _destination(raster.name, destination) as partial,
        _spool(segmenter, raster, destination, layout, resumable, with_confidence) as spool,
    ):
        _segment(segmenter, raster, spool, layout, with_confidence, progress)
        labels = spool.plane(0)
        raster.write(partial, _counted(labels, counts), layout)
        raster.write_beside(destination, labels, layout)
        if output is not None:
            output.write(SegmentedRaster(raster, labels, spool.plane(1) if with_confidence else None, layout))
    return {
        "source": raster.name,
        "destination": str(destination),
        "height": size[0],
        "width": size[1],
        "tiles": count_tiles(*size, options),
        "tile_size": options.tile_size,
        "tile_overlap": options.tile_overlap,
        "pixels": dict(zip(names, counts.tolist(), strict=True)),
        "no_data": size[0] * size[1] - int(counts.sum()),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _segment(
    segmenter: Segmenter, raster: RasterReader, spool: Spool, layout: MaskLayout, with_confidence: bool, progress: bool
) -> None:
    """Predict the rows that the spool lacks."""
    options, height, width = segmenter.options, raster.height, raster.width
    num_tiles, num_columns = count_tiles(height, width, options), len(tile_spans(width, options))
    task, done = f"predict {Path(raster.name).name}", spool.seam.row * num_columns
    if done == num_tiles:
        return
    with inference_mode_of(segmenter.model), Progress(task, num_tiles, "tiles", done, progress) as bar:
        tiles = _RasterTiles(segmenter, raster, bar.update, spool)
        extras: dict[str, Any] = {"with_probability": True} if with_confidence else {}
        rows = segment_rows(
            height, width, options, tiles.logits, segmenter.tile_batch_size, layout.dtype, seam=spool.seam, **extras
        )
        shift = segmenter.processor.binary_logit if segmenter.model.config.num_labels == 1 else 0.0
        for _, classes, *probabilities in rows:
            planes = [classes, *(in_percent(_unshifted(classes, each, shift)) for each in probabilities)]
            valid = tiles.valid.take(len(classes)) if tiles.valid is not None else None
            if valid is not None:
                for plane in planes:
                    plane[~valid] = np.iinfo(plane.dtype).max
            left = tiles.valid.valid if tiles.valid is not None else spool.valid
            spool.append(planes, spool.seam, left)


@contextmanager
def _destination(source: str, destination: Path) -> Iterator[Path]:
    """A path to write to, which takes the name of the destination once all went well."""
    if destination.is_dir():
        raise ValueError(f"{destination} is a folder; expected the name of a file to write")
    if destination.exists() and Path(source).exists() and destination.samefile(source):
        raise ValueError(f"{destination} is the raster itself; expected another file to write")
    with atomic_write(destination) as partial:
        partial.touch()  # fails before the work where nothing can be written
        yield partial


@contextmanager
def _spool(
    segmenter: Segmenter, raster: Reader, destination: Path, layout: MaskLayout, resumable: bool, with_confidence: bool
) -> Iterator[Spool]:
    """A folder of finished rows, which is removed once all went well, and if it is not resumable in any case."""
    key = {
        **asdict(segmenter.options),
        "source": raster.name,
        "size": [raster.height, raster.width],
        "changed": Path(raster.name).stat().st_mtime_ns if Path(raster.name).is_file() else 0,
        "classes": list(layout.names),
        "confidence": with_confidence,
    }
    name = hashlib.sha256(os.fsencode(destination.name)).hexdigest()[:16]
    folder = destination.with_name(f".{name}.tiles") if resumable else partial_path(destination)
    dtypes = (layout.dtype, np.uint8) if with_confidence else (layout.dtype,)
    is_kept = resumable
    try:
        yield Spool(folder, destination, key, raster.width, dtypes)
        is_kept = False
    finally:
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)


def in_percent(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities as whole percent, uint8."""
    return np.rint(100 * probabilities).astype(np.uint8)


def _unshifted(classes: np.ndarray, probabilities: np.ndarray, shift: float) -> np.ndarray:
    """Probabilities of a binary model's classes by its own logits, from those relative to its threshold."""
    if not shift:
        return probabilities
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities) - np.log1p(-probabilities)
        return 1 / (1 + np.exp(-logits - np.where(classes == 1, shift, -shift)))


class _RasterTiles:
    """Logits of a raster's tiles; remembers which pixels hold data until their rows are written."""

    def __init__(self, segmenter: Segmenter, raster: RasterReader, when_done: Callable[[int], Any], spool: Spool):
        self.segmenter, self.raster, self.when_done = segmenter, raster, when_done
        self.valid = _ValidRows(spool.num_rows, spool.valid) if raster.may_lack_data else None

    def logits(self, tiles: Sequence[Tile]) -> Tensor:
        """Logits (B, K, h, w) of tiles of one size, on the grid of a quarter of their sides."""
        images, is_empty = [], True
        for tile in tiles:
            pixels, valid = self.raster.read(tile)
            if self.valid is not None:
                self.valid.put(tile, valid)
            # By the pixels, since those beside an area that is of interest are data, and seen, but not valid.
            is_empty = is_empty and valid is not None and not valid.any() and bool(np.ma.getmaskarray(pixels).all())
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

    def __init__(self, first: int, valid: np.ndarray):
        self.first, self.valid = first, valid

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


def _counted(labels: np.ndarray, counts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield strips of labels, and add the number of pixels of each class to `counts`."""
    for top, classes in rows_of(labels):
        counts += np.bincount(classes[classes < len(counts)], minlength=len(counts))
        yield top, classes


__all__ = [
    "SPOOLS",
    "RasterOutput",
    "RasterReader",
    "SegmentedRaster",
    "in_percent",
    "predict_large_image",
    "segment_raster",
]
