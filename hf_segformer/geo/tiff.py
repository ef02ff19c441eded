"""Plain TIFF files by tifffile, big ones and pyramids among them: tiles, strips or flat, bands together or apart.

tifffile is an extra and imported where it is needed. Axes: C bands, S samples of a page, h w a window's sides.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..image_io_segformer import DECODE_ERRORS
from ..inference.tiling import Tile as Window
from .rasters import BLOCK, GEOREFERENCE, LabelFile, Raster, holds_data, in_rows_of_blocks


class PlainRaster(Raster):
    """A TIFF file without georeference, by tifffile: its first series at full size, whose pages may be the bands."""

    def _open(self) -> Any:
        import tifffile

        try:
            return tifffile.TiffFile(self.path)
        except tifffile.TiffFileError as error:
            raise OSError(f"{self.path} is no TIFF file that can be read: {error}") from error

    def _look(self, num_channels: int, bands: Sequence[int] | None, num_rows: int) -> None:
        import tifffile

        series = self.file.series[0].levels[0]
        self.pages = [page for page in series.pages if page is not None]
        self.page = page = self.pages[0].aspage()
        self.height, self.width = page.imagelength, page.imagewidth
        if series.size != len(self.pages) * page.size or page.imagedepth != 1:
            raise ValueError(
                f"{self.path} holds an array of {series.shape} ({series.axes}), but bands of one height and width are "
                "wanted"
            )
        is_alpha = bool(page.extrasamples) and int(page.extrasamples[-1]) in (1, 2) and len(self.pages) == 1
        self.choose_bands(page.samplesperpixel * len(self.pages), is_alpha, num_channels, bands)
        has_colors = page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None
        self.colors = (page.colormap >> 8).astype(np.uint8).T if has_colors and num_channels == 3 else None
        self.is_inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and num_channels == 3
        self.nodata = page.nodata if 42113 in page.tags else None
        self.may_lack_data = self.alpha is not None or self.nodata is not None
        self.is_flat = page.is_memmappable and page.is_contiguous
        self.piece = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        pixel = page.dtype.itemsize * page.samplesperpixel * len(self.pages)
        self.keep_at_hand(self.piece, pixel, num_rows, is_compressed=not self.is_flat)
        self.segments: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self.num_cached = 0

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Raster.read`."""
        try:
            parts = [self._read_page(index, window) for index in range(len(self.pages))]
        except Exception as error:  # what decoders of damaged data raise is of every kind
            raise self.damaged(window, error) from error
        samples = np.concatenate(parts)
        valid = None if self.alpha is None else samples[self.alpha] != 0
        pixels = samples[self.bands]
        if self.nodata is not None and valid is None:
            valid = holds_data(pixels, [self.nodata] * len(pixels))
        if self.colors is not None:
            pixels = np.moveaxis(self.colors[pixels[0]], -1, 0)
        if self.is_inverted and pixels.dtype.kind in "bu":
            pixels = ~pixels
        return pixels, valid

    def _read_page(self, index: int, window: Window) -> np.ndarray:
        """(S, h, w) of one page."""
        rows = slice(window.top, window.top + window.height)
        columns = slice(window.left, window.left + window.width)
        if self.is_flat:
            return self._read_flat(index, rows, columns)
        page, frame = self.page, self.pages[index]
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        height, width = self.piece
        down, across = -(-self.height // height), -(-self.width // width)
        out = np.zeros((page.samplesperpixel, window.height, window.width), page.dtype)
        for plane in range(planes):
            samples = slice(plane, plane + 1) if planes > 1 else slice(None)
            for row in range(rows.start // height, -(-rows.stop // height)):
                for column in range(columns.start // width, -(-columns.stop // width)):
                    piece = self._segment(index, frame, (plane * down + row) * across + column)
                    _paste(piece, (row * height - rows.start, column * width - columns.start), out[samples])
        return out

    def _read_flat(self, index: int, rows: slice, columns: slice) -> np.ndarray:
        page, frame = self.page, self.pages[index]
        planar = page.planarconfig == 2 and page.samplesperpixel > 1
        samples = page.samplesperpixel
        shape = (samples, self.height, self.width) if planar else (self.height, self.width, samples)
        dtype = page.dtype.newbyteorder(self.file.byteorder)
        # Mapped anew each time: pages of the file that were read count as this process's until they are unmapped.
        pixels = np.memmap(self.path, dtype, "r", frame.dataoffsets[0], shape)
        part = pixels[:, rows, columns] if planar else np.moveaxis(pixels[rows, columns], -1, 0)
        return np.array(part, page.dtype.newbyteorder("="))

    def _segment(self, index: int, frame: Any, number: int) -> np.ndarray:
        """A tile or strip (h, w, S), from memory if it was used lately; an empty one where the file has none."""
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

    def write(self, path: Path, bands: Iterable[tuple[int, np.ndarray]], labels: LabelFile) -> None:
        """See `Raster.write`."""
        import tifffile

        size = self.height * self.width * np.dtype(labels.dtype).itemsize
        colors = labels.colors()[:, :3].T.astype(np.uint16) * 257
        with tifffile.TiffWriter(path, bigtiff=size > 3 << 30) as out:
            out.write(
                _tiles(bands, self.width, labels),
                shape=(self.height, self.width),
                dtype=labels.dtype,
                tile=(BLOCK, BLOCK),
                compression="zlib",
                photometric="palette",
                colormap=colors,
                metadata=None,
                extratags=[(42113, 2, 0, str(labels.ignored), True)],  # GDAL's tag for no data
            )


def _paste(piece: np.ndarray, place: tuple[int, int], out: np.ndarray) -> None:
    """Put what fits of a piece (h, w, S) at a place, which may lie outside, into (S, H, W)."""
    spans = [
        (max(start, 0), min(start + length, limit))
        for start, length, limit in zip(place, piece.shape, out.shape[1:], strict=False)
    ]
    (top, bottom), (left, right) = spans
    part = piece[top - place[0] : bottom - place[0], left - place[1] : right - place[1]]
    if part.size:
        out[:, top:bottom, left:right] = np.moveaxis(part, -1, 0)


def _tiles(bands: Iterable[tuple[int, np.ndarray]], width: int, labels: LabelFile) -> Iterator[np.ndarray]:
    """Bands of rows -> full tiles, as tifffile wants them."""
    for _, rows in in_rows_of_blocks(bands):
        wide = np.full((BLOCK, -(-width // BLOCK) * BLOCK), labels.ignored, labels.dtype)
        wide[: len(rows), :width] = rows
        for left in range(0, wide.shape[1], BLOCK):
            yield np.ascontiguousarray(wide[:, left : left + BLOCK])


def why_not_plain(path: Path) -> str | None:
    """Why tifffile can not do with a file, or None: it has a georeference, or a compression that takes a codec."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
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
