"""Plain TIFF files by tifffile, big ones and pyramids among them: tiles, strips or flat, bands together or apart.

tifffile is an extra and imported where it is needed. Axes: C bands, S samples of a page, h w a tile's sides.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..data.reader_protocol import ImageSource, Kind, ReadOptions, Tile
from ..image_io_segformer import DECODE_ERRORS
from ..inference.tiling import MaskLayout
from .rasters import (
    BLOCK,
    GEOREFERENCE,
    NODATA,
    ORIENTATION,
    TIFF_MAGIC,
    Raster,
    in_rows_of_blocks,
    is_installed,
    mask_no_data,
    raster_kind,
)

# Axes of tifffile's series whose planes are bands of one image: channels, samples, and the unnamed axis of an array,
# unless its planes are asked for as pages.
_BAND_AXES, _UNNAMED_AXIS = "CS", "Q"
_NO_HANDLER = logging.NullHandler()  # added once, however often


class PlainRaster(Raster):
    """A TIFF file without georeference, by tifffile: its first series at full size.

    The pages of a series are the bands of one image where the file's metadata (ImageJ, OME, tifffile's own) call them
    channels, or say that all pages are one array; elsewhere each page is an image of its own.
    """

    @classmethod
    def claims(cls, source: ImageSource, by_tiles: bool = False) -> Kind | None:
        """See `data.reader_protocol.Reader.claims`."""
        if not source.head.startswith(TIFF_MAGIC) or not is_installed("tifffile"):
            return None
        kind = raster_kind(source) or ("raster" if by_tiles or _has_band_pages(source) else None)
        return kind if kind and why_not_plain(source) is None else None

    @classmethod
    def count(cls, source: ImageSource) -> int:
        """See `data.reader_protocol.Reader.count`."""
        import tifffile

        try:
            with _open_tiff(source) as file:
                return len(_pages(file, _BAND_AXES))
        except (tifffile.TiffFileError, *DECODE_ERRORS) as error:
            raise OSError(f"{source.name} is no TIFF file that can be read: {error}") from error

    def _open(self) -> Any:
        import tifffile

        try:
            return _open_tiff(self.source)
        except tifffile.TiffFileError as error:
            raise OSError(f"{self.name} is no TIFF file that can be read: {error}") from error

    def _look(self, options: ReadOptions) -> None:
        import tifffile

        images = _pages(self.file, _BAND_AXES + ("" if options.page is not None else _UNNAMED_AXIS))
        self.pages = images[self.choose_page(len(images))]
        self.page = page = self.pages[0].aspage()
        num_channels = options.num_channels
        self.height, self.width, self.dtype = page.imagelength, page.imagewidth, page.dtype
        if page.imagedepth != 1 or any(each.aspage().shape != page.shape for each in self.pages):
            raise ValueError(f"{self.name} has pages of several shapes, {page.shape} first; expected bands of one size")
        is_alpha = bool(page.extrasamples) and int(page.extrasamples[-1]) in (1, 2) and len(self.pages) == 1
        self.choose_bands(page.samplesperpixel * len(self.pages), is_alpha, num_channels, options.bands)
        self.colors: np.ndarray | None = None
        has_palette = page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None
        if has_palette and self.num_bands == 1 and num_channels in (0, 3):
            self.colors = (page.colormap >> 8).astype(np.uint8).T
            self.num_bands, self.dtype = 3, self.colors.dtype
        self.is_inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and num_channels == 3
        declared = _declared_no_data(page)
        self.nodata = (declared,) * len(self.bands)
        self.may_lack_data = self.alpha is not None or declared is not None
        self.is_flat = self.path is not None and page.is_memmappable and page.is_contiguous
        self.piece = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        pixel = page.dtype.itemsize * page.samplesperpixel * len(self.pages)
        self.keep_at_hand(self.piece, pixel, options.num_rows, is_compressed=not self.is_flat)
        self.segments: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self.num_cached = 0

    def _orientation(self) -> int:
        tag = self.page.tags.get(ORIENTATION)
        return 1 if tag is None else int(tag.value)

    def _read(self, tile: Tile) -> tuple[np.ndarray, np.ndarray | None]:
        try:
            parts = [self._read_page(index, tile) for index in range(len(self.pages))]
        except Exception as error:  # decoders of damaged data raise errors of every kind
            raise self.damaged(tile, error) from error
        samples = np.concatenate(parts)
        valid = None if self.alpha is None else samples[self.alpha] != 0
        pixels, valid = mask_no_data(samples[self.bands], self.nodata, valid)
        masked = np.ma.getmaskarray(pixels) if isinstance(pixels, np.ma.MaskedArray) else None
        values = np.ma.getdata(pixels)
        if self.colors is not None:
            values = np.moveaxis(self.colors[values[0]], -1, 0)
        if self.is_inverted and values.dtype.kind in "bu":
            values = ~values
        return (values if masked is None else np.ma.MaskedArray(values, np.broadcast_to(masked, values.shape))), valid

    def _read_page(self, index: int, tile: Tile) -> np.ndarray:
        """(S, h, w) of one page."""
        rows = slice(tile.top, tile.top + tile.height)
        columns = slice(tile.left, tile.left + tile.width)
        if self.is_flat:
            return self._read_flat(index, rows, columns)
        page, frame = self.page, self.pages[index]
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        height, width = self.piece
        down, across = -(-self.stored_height // height), -(-self.stored_width // width)
        out = np.full((page.samplesperpixel, tile.height, tile.width), self._absent(), page.dtype)
        for plane in range(planes):
            samples = slice(plane, plane + 1) if planes > 1 else slice(None)
            for row in range(rows.start // height, -(-rows.stop // height)):
                for column in range(columns.start // width, -(-columns.stop // width)):
                    piece = self._segment(index, frame, (plane * down + row) * across + column)
                    _paste(piece, (row * height - rows.start, column * width - columns.start), out[samples])
        return out

    def _absent(self) -> Any:
        """Return the value of pixels that a sparse file does not store: that for no data, or 0."""
        declared, dtype = self.nodata[0], self.page.dtype
        if declared is None or (dtype.kind != "f" and not math.isfinite(declared)):
            return 0
        if dtype.kind == "f":
            limits = np.finfo(dtype)
            return declared if math.isnan(declared) else min(max(declared, limits.min), limits.max)
        return int(declared) if np.iinfo(dtype).min <= declared <= np.iinfo(dtype).max else 0

    def _read_flat(self, index: int, rows: slice, columns: slice) -> np.ndarray:
        page, frame = self.page, self.pages[index]
        planar = page.planarconfig == 2 and page.samplesperpixel > 1
        samples = page.samplesperpixel
        height, width = self.stored_height, self.stored_width
        shape = (samples, height, width) if planar else (height, width, samples)
        dtype = page.dtype.newbyteorder(self.file.byteorder)
        # Mapped again each time: pages of the file count as this process's memory until they are unmapped.
        assert self.path is not None  # a flat file is on disk
        pixels = np.memmap(self.path, dtype, "r", frame.dataoffsets[0], shape)
        part = pixels[:, rows, columns] if planar else np.moveaxis(pixels[rows, columns], -1, 0)
        return np.array(part, page.dtype.newbyteorder("="))

    def _segment(self, index: int, frame: Any, number: int) -> np.ndarray:
        """Return a tile or strip (h, w, S), cached if it was used lately; an empty one where the file has none."""
        key = index, number
        if key in self.segments:
            self.segments.move_to_end(key)
            return self.segments[key]
        size = frame.databytecounts[number]
        self.file.filehandle.seek(frame.dataoffsets[number])
        data = self.file.filehandle.read(size)
        if len(data) < size:  # libjpeg would fill up with grey
            raise OSError(f"{size} bytes are missing at {frame.dataoffsets[number]}")
        tables = {"jpegtables": frame.jpegtables, "jpegheader": self.page.jpegheader}
        piece = self.page.decode(data if size else None, number, **tables)[0]
        piece = np.zeros((0, 0, 1), self.page.dtype) if piece is None else piece[0]
        self.segments[key] = piece
        self.num_cached += piece.nbytes
        while self.num_cached > self.cache and len(self.segments) > 1:
            self.num_cached -= self.segments.popitem(last=False)[1].nbytes
        return piece

    def write(self, path: Path, bands: Iterable[tuple[int, np.ndarray]], labels: MaskLayout) -> None:
        """See `Raster.write`."""
        import tifffile

        size = self.height * self.width * np.dtype(labels.dtype).itemsize
        has_colors = bool(labels.names) and np.dtype(labels.dtype).itemsize <= 2
        colors = labels.colors()[:, :3].T.astype(np.uint16) * 257 if has_colors else None
        with tifffile.TiffWriter(path, bigtiff=size > 3 << 30) as out:
            out.write(
                _tiles(bands, self.width, labels),
                shape=(self.height, self.width),
                dtype=labels.dtype,
                tile=(BLOCK, BLOCK),
                compression="zlib",
                photometric="palette" if has_colors else "minisblack",
                colormap=colors,
                metadata=None,
                extratags=[(42113, 2, 0, str(labels.ignored), True)],  # GDAL's tag for no data
            )


def _paste(piece: np.ndarray, place: tuple[int, int], out: np.ndarray) -> None:
    """Copy the part of a block (h, w, S) that fits at a place, which may be outside, into (S, H, W)."""
    spans = [
        (max(start, 0), min(start + length, limit))
        for start, length, limit in zip(place, piece.shape, out.shape[1:], strict=False)
    ]
    (top, bottom), (left, right) = spans
    part = piece[top - place[0] : bottom - place[0], left - place[1] : right - place[1]]
    if part.size:
        out[:, top:bottom, left:right] = np.moveaxis(part, -1, 0)


def _tiles(bands: Iterable[tuple[int, np.ndarray]], width: int, labels: MaskLayout) -> Iterator[np.ndarray]:
    """Yield full tiles, as tifffile takes them, of rows."""
    for _, rows in in_rows_of_blocks(bands):
        wide = np.full((BLOCK, -(-width // BLOCK) * BLOCK), labels.ignored, labels.dtype)
        wide[: len(rows), :width] = rows
        for left in range(0, wide.shape[1], BLOCK):
            yield np.ascontiguousarray(wide[:, left : left + BLOCK])


def _open_tiff(source: ImageSource) -> Any:
    """Open a TIFF file, and no other one: OME metadata may name further files, anywhere, as parts of the image."""
    import tifffile

    # Without a handler, logging prints each bad tag of a damaged file to stderr.
    logging.getLogger("tifffile").addHandler(_NO_HANDLER)
    return tifffile.TiffFile(source.file, _multifile=False)


def _has_band_pages(source: ImageSource) -> bool:
    """Return True if pages are bands of one image, which Pillow would take for images of their own."""
    import tifffile

    try:
        with _open_tiff(source) as file:
            return len(file.pages) > 1 and len(_pages(file, _BAND_AXES + _UNNAMED_AXIS)[0]) > 1
    except (tifffile.TiffFileError, *DECODE_ERRORS):
        return False


def _pages(file: Any, band_axes: str) -> list[list[Any]]:
    """Return the images of a TIFF, each a list of the pages that are its bands."""
    series = file.series[0].levels[0]
    pages = [page for page in series.pages if page is not None]
    if not pages or len(pages) < len(series.pages):
        raise ValueError(f"{file.filename} is a part of an image in several files; expected all of it in one file")
    first = pages[0].aspage()
    if len(file.series) > 1 and len(pages) == 1:  # pages of unequal size or type: each is an image
        return [[page] for page in _full_pages(file)]
    # The axes before those of a page, with their lengths.
    num_outer = max(0, len(series.axes) - len(first.axes))
    outer = list(zip(series.axes[:num_outer], series.shape[:num_outer], strict=True))
    if math.prod(length for _, length in outer) != len(pages):
        raise ValueError(
            f"{file.filename} holds an array of {series.shape} ({series.axes}); expected bands of one height and width"
        )
    if first.samplesperpixel > 1:  # a page has colours of its own: an array of pages is one of images
        band_axes = band_axes.replace(_UNNAMED_AXIS, "")
    num_bands = math.prod(length for axis, length in outer if axis in band_axes)
    # Planes run fastest along the last axis: bring the bands there.
    order = np.arange(len(pages)).reshape([length for _, length in outer])
    bands = [index for index, (axis, _) in enumerate(outer) if axis in band_axes]
    others = [index for index in range(len(outer)) if index not in bands]
    grouped = order.transpose(*others, *bands).reshape(-1, num_bands)
    return [[pages[index] for index in row] for row in grouped.tolist()]


def _full_pages(file: Any) -> list[Any]:
    """Return the pages that are no thumbnails, pyramid levels or masks."""
    return [page for page in file.pages if not page.aspage().subfiletype & 5] or [file.pages[0]]


def _declared_no_data(page: Any) -> float | None:
    """Return the value for no data of GDAL's tag, None without one."""
    tag = page.tags.get(NODATA)
    if tag is None:
        return None
    try:
        return float(str(tag.value).strip(" \0"))
    except ValueError:
        return None


def why_not_plain(source: ImageSource) -> str | None:
    """Return why tifffile cannot read a file: a georeference or a compression that needs a codec; None if it can."""
    import tifffile

    try:
        with _open_tiff(source) as file:
            page = file.pages[0].aspage()
            if any(tag in page.tags for tag in GEOREFERENCE):
                return "has a georeference, which only rasterio keeps"
            try:
                if page.compression != 1:
                    tifffile.TIFF.DECOMPRESSORS[page.compression]
                if page.predictor != 1:
                    tifffile.TIFF.UNPREDICTORS[page.predictor]
            except KeyError as error:
                return f"is compressed in a way that tifffile does not read by itself ({error.args[0]})"
    except (tifffile.TiffFileError, *DECODE_ERRORS) as error:
        return f"is no TIFF file that tifffile reads ({error})"
    return None


__all__ = ["PlainRaster", "why_not_plain"]
