"""Reads images by windows and writes label maps by bands of rows, so that neither is ever in memory as a whole.

rasterio (GDAL) reads whatever has a georeference, and writes it back with the labels. tifffile reads plain TIFF files,
big ones and pyramids among them, and writes a plain TIFF file. Each is an extra that is imported where it is needed.

Axes: C bands, H height, W width.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from .tiling import Window

Color = tuple[int, int, int]

BLOCK = 512  # side in pixels of the tiles that a label map is written in
_LEAST_CACHE, _MOST_CACHE = 64 << 20, 512 << 20  # bytes of decoded pixels
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GEOREFERENCE = (33550, 33922, 34264, 34735, 50844)  # TIFF tags: scale, tie points, matrix, keys, RPCs
_ONLY_RASTERS = (".vrt", ".img")  # Pillow reads neither
_INSTALL = "pip install 'hf-segformer[geo]'"


def is_raster(path: str | Path) -> bool:
    """Whether a file is better labelled by windows than as one picture.

    That is a TIFF file, or a JPEG 2000 one, with a georeference, with more pixels than Pillow opens without a warning,
    or with bands that make no picture (two, five and more, three of 16 bits), and GDAL's virtual rasters. Neither
    rasterio nor tifffile is needed to tell.

    Args:
        path: of a file; one that is not there is no raster.

    Example:
        >>> from hf_segformer.rasters import is_raster
        >>> is_raster("photo.jpg")
        False
    """
    path = Path(path)
    if not path.is_file():
        return False
    suffix = path.suffix.lower()
    if suffix in _ONLY_RASTERS:
        return True
    with path.open("rb") as file:
        if file.read(4) not in _TIFF and suffix not in (".jp2", ".j2k"):
            return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                tags = getattr(image, "tag_v2", {})
                return any(tag in tags for tag in _GEOREFERENCE) or len(image.getbands()) not in (1, 3, 4)
    except (UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return True


class LabelFile(NamedTuple):
    """What is to be written beside the labels.

    Attributes:
        dtype: of the labels, uint8 or uint16.
        ignored: the label of pixels that hold no data.
        palette: one (red, green, blue) a class.
        names: of the classes.
    """

    dtype: type[np.integer]
    ignored: int
    palette: Sequence[Color]
    names: Sequence[str]

    def colors(self) -> np.ndarray:
        """(256 or 65536, 4): red, green, blue, opacity of every value."""
        table = np.zeros((np.iinfo(self.dtype).max + 1, 4), np.uint8)
        table[: len(self.palette), :3] = self.palette
        table[: len(self.palette), 3] = 255
        return table


class Raster:
    """An image that is read by windows.

    Attributes:
        path: of the file.
        height: in pixels.
        width: likewise.
        num_bands: without an alpha band that only tells where there is no data.
        may_lack_data: whether some pixels may hold none.
    """

    path: Path
    height: int
    width: int
    num_bands: int
    may_lack_data: bool
    file: Any

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
        """(C, h, w) of a window, and where it holds data, bool (h, w); None where it holds data everywhere.

        Raises:
            OSError: if the file is cut or damaged there.
        """
        raise NotImplementedError

    def write(self, path: Path, bands: Iterable[tuple[int, np.ndarray]], labels: LabelFile) -> None:
        """Write bands of labels, whole rows from top to bottom, to a file of the raster's size.

        Raises:
            OSError: if it can not be written.
        """
        raise NotImplementedError

    def __enter__(self) -> "Raster":
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def _refuse_block(self, height: int, width: int, num_bytes: int) -> None:
        if num_bytes > _MOST_CACHE:
            raise ValueError(
                f"{self.path} is stored in compressed pieces of {height}x{width} pixels (height x width), "
                f"{num_bytes >> 20} MiB each, which can not be read by windows: write it in tiles first, with "
                "gdal_translate -co TILED=YES -co COMPRESS=DEFLATE -co BIGTIFF=IF_SAFER, for instance"
            )

    def _check_bands(self, num_channels: int) -> None:
        grey = self.num_bands == 1 and num_channels == 3
        if self.num_bands != num_channels and not grey:
            raise ValueError(
                f"{self.path} has {self.num_bands} bands, but the model takes {num_channels}: choose {num_channels} "
                "of them by their numbers, from 1 on (bands), or take a model for as many"
            )


def _chosen(path: Path, bands: Sequence[int] | None, num_bands: int) -> list[int] | None:
    """Numbers of bands from 1 on -> indices from 0 on."""
    if bands is None:
        return None
    if not bands or not all(isinstance(band, int) and 1 <= band <= num_bands for band in bands):
        raise ValueError(f"bands are {list(bands)}, but those of {path} have the numbers 1 to {num_bands}")
    return [band - 1 for band in bands]


def _cache_size(num_bytes: int) -> int:
    """Room for what a row of windows is decoded from, within limits."""
    return min(max(num_bytes, _LEAST_CACHE), _MOST_CACHE)


class _GdalRaster(Raster):
    """A raster by rasterio.

    What GDAL keeps of decoded blocks, of this file and of that to be written, is bounded: by default it is a share of
    the machine's memory.
    """

    def __init__(self, path: Path, num_channels: int, bands: Sequence[int] | None, num_rows: int):
        import rasterio
        from rasterio.enums import ColorInterp, MaskFlags

        self.path = path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            self.file = file = rasterio.open(path)
        self.height, self.width = file.height, file.width
        colors = file.colorinterp
        chosen = _chosen(path, bands, file.count)
        # A fourth band may be near infrared, which GDAL writes as alpha if not told otherwise.
        has_alpha = chosen is None and colors[-1] == ColorInterp.alpha and file.count == num_channels + 1
        grey_alpha = chosen is None and colors[-1] == ColorInterp.alpha and (file.count, num_channels) == (2, 3)
        self.alpha = file.count if has_alpha or grey_alpha else None
        self.bands = [band + 1 for band in chosen or range(file.count - (self.alpha is not None))]
        self.num_bands = len(self.bands)
        self._check_bands(num_channels)
        self.colors: np.ndarray | None = None
        if colors[self.bands[0] - 1] == ColorInterp.palette and self.num_bands == 1 and num_channels == 3:
            self.colors = _color_table(file.colormap(self.bands[0]))
        self.has_mask = any(file.mask_flag_enums[band - 1] == [MaskFlags.per_dataset] for band in self.bands)
        self.nodata = [file.nodatavals[band - 1] for band in self.bands]
        self.may_lack_data = bool(self.alpha or self.has_mask or all(value is not None for value in self.nodata))
        block = max(file.block_shapes)
        pixel = sum(np.dtype(file.dtypes[band - 1]).itemsize for band in self.bands)
        self._refuse_block(*block, block[0] * block[1] * pixel)
        needed = min(num_rows + 2 * block[0], self.height + block[0]) * (self.width + block[1]) * pixel
        self.cache = _cache_size(needed if block[1] >= self.width else 0)

    def __enter__(self) -> "Raster":
        import rasterio

        self.limit = rasterio.Env(GDAL_CACHEMAX=self.cache)
        self.limit.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()
        self.limit.__exit__(*error)

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
        import rasterio

        part = rasterio.windows.Window(window.left, window.top, window.width, window.height)
        try:
            pixels = self.file.read(self.bands, window=part)
            if self.alpha:
                valid = self.file.read(self.alpha, window=part) != 0
            elif self.has_mask:
                valid = self.file.read_masks(self.bands[0], window=part) != 0
            else:
                valid = _holds_data(pixels, self.nodata)
        except OSError as error:
            raise OSError(_damaged(self.path, window, error)) from error
        if self.colors is not None:
            pixels = np.moveaxis(self.colors[pixels[0]], -1, 0)
        return pixels, valid

    def write(self, path: Path, bands: Iterable[tuple[int, np.ndarray]], labels: LabelFile) -> None:
        import rasterio

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path, "w", **self._profile(labels)) as out:
                self._describe(out, labels)
                for top, rows in _in_rows_of_blocks(bands):
                    out.write(rows, 1, window=rasterio.windows.Window(0, top, self.width, len(rows)))
            if factors := self.file.overviews(self.bands[0]):
                with rasterio.open(path, "r+") as out:
                    out.build_overviews(factors, rasterio.enums.Resampling.nearest)

    def _profile(self, labels: LabelFile) -> dict[str, Any]:
        profile = {
            "driver": "GTiff",
            "height": self.height,
            "width": self.width,
            "count": 1,
            "dtype": np.dtype(labels.dtype).name,
            "nodata": labels.ignored,
            "tiled": True,
            "blockxsize": BLOCK,
            "blockysize": BLOCK,
            "compress": "deflate",
            "bigtiff": "if_safer",
        }
        if not self.file.gcps[0]:
            profile |= {"crs": self.file.crs, "transform": self.file.transform}
        return profile

    def _describe(self, out: Any, labels: LabelFile) -> None:
        points, reference = self.file.gcps
        if points:
            out.gcps = points, reference
        if self.file.rpcs is not None:
            out.rpcs = self.file.rpcs
        out.update_tags(**self.file.tags())
        out.update_tags(1, **{f"class_{index}": name for index, name in enumerate(labels.names)})
        out.write_colormap(1, {index: tuple(color) for index, color in enumerate(labels.colors().tolist())})


def _color_table(colors: dict[int, tuple[int, ...]]) -> np.ndarray:
    table = np.zeros((max(colors) + 1 if max(colors) > 255 else 256, 3), np.uint8)
    for value, color in colors.items():
        table[value] = color[:3]
    return table


def _holds_data(pixels: np.ndarray, nodata: Sequence[float | None]) -> np.ndarray | None:
    """Where any band of (C, h, w) differs from its value for no data; None where one has no such value."""
    if any(value is None for value in nodata):
        return None
    valid = np.zeros(pixels.shape[1:], bool)
    for band, value in zip(pixels, nodata, strict=True):
        valid |= ~np.isnan(band) if value is not None and np.isnan(value) else band != value
    return valid


def _damaged(path: Path, window: Window, error: Exception) -> str:
    bottom, right = window.top + window.height, window.left + window.width
    return (
        f"{path} can not be read in rows {window.top} to {bottom} and columns {window.left} to {right}: it is cut short "
        f"or damaged ({error.__cause__ or error})"
    )


def _in_rows_of_blocks(bands: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    """Bands of any height -> bands of whole blocks, so that each block is compressed and written once."""
    waiting: list[np.ndarray] = []
    first = num_rows = 0
    for _, rows in bands:
        while len(rows):
            taken = rows[: BLOCK - num_rows]
            waiting.append(taken.copy())  # the next band overwrites it
            num_rows, rows = num_rows + len(taken), rows[len(taken) :]
            if num_rows == BLOCK:
                yield first, np.concatenate(waiting)
                first, num_rows, waiting = first + BLOCK, 0, []
    if waiting:
        yield first, np.concatenate(waiting)


class _PlainRaster(Raster):
    """A TIFF file without georeference, by tifffile: its first series at full size, whose pages may be the bands."""

    def __init__(self, path: Path, num_channels: int, bands: Sequence[int] | None, num_rows: int):
        import tifffile

        self.path = path
        try:
            self.file = tifffile.TiffFile(path)
            series = self.file.series[0].levels[0]
            self.pages = [page for page in series.pages if page is not None]
        except (tifffile.TiffFileError, IndexError) as error:
            raise OSError(f"{path} is no TIFF file that can be read: {error}") from error
        self.page = page = self.pages[0].aspage()
        self.height, self.width = page.imagelength, page.imagewidth
        num_samples = page.samplesperpixel
        self._check_layout(series)
        total = num_samples * len(self.pages)
        chosen = _chosen(path, bands, total)
        is_alpha = bool(page.extrasamples) and int(page.extrasamples[-1]) in (1, 2) and len(self.pages) == 1
        drops_alpha = chosen is None and is_alpha and num_samples in (num_channels + 1, 2 if num_channels == 3 else 0)
        self.bands = list(range(total - drops_alpha)) if chosen is None else chosen
        self.alpha = total - 1 if drops_alpha else None
        self.num_bands = len(self.bands)
        self._check_bands(num_channels)
        has_colors = page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None
        self.colors = (page.colormap >> 8).astype(np.uint8).T if has_colors and num_channels == 3 else None
        self.is_inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and num_channels == 3
        self.nodata = page.nodata if 42113 in page.tags else None
        self.may_lack_data = self.alpha is not None or self.nodata is not None
        self._choose_reader(num_rows)

    def _check_layout(self, series: Any) -> None:
        page = self.page
        if page.imagedepth != 1 or any(
            (other.imagelength, other.imagewidth) != (self.height, self.width) for other in self.pages[1:]
        ):
            raise ValueError(f"{self.path} holds {series.shape} values ({series.axes}), but an image has two sides")

    def _choose_reader(self, num_rows: int) -> None:
        page = self.page
        pixel = page.dtype.itemsize * page.samplesperpixel
        self.is_flat = page.is_memmappable and page.is_contiguous
        self.segments: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self.cached = 0
        height, width = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        height = min(height, page.imagelength)
        if not self.is_flat:
            self._refuse_block(height, width, height * width * pixel)
        needed = (num_rows + 2 * height) * (self.width + width) * pixel * len(self.pages)
        self.cache = _cache_size(needed if width >= self.width else 0)

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
        try:
            parts = [self._read_page(index, window) for index in range(len(self.pages))]
        except Exception as error:  # what decoders of damaged data raise is of every kind
            raise OSError(_damaged(self.path, window, error)) from error
        samples = np.concatenate(parts)
        valid = None if self.alpha is None else samples[self.alpha] != 0
        pixels = samples[self.bands]
        if self.nodata is not None and valid is None:
            valid = _holds_data(pixels, [self.nodata] * len(pixels))
        if self.colors is not None:
            pixels = np.moveaxis(self.colors[pixels[0]], -1, 0)
        if self.is_inverted and pixels.dtype.kind == "u":
            pixels = np.iinfo(pixels.dtype).max - pixels
        return pixels, valid

    def _read_page(self, index: int, window: Window) -> np.ndarray:
        """(S, h, w) of one page."""
        rows = slice(window.top, window.top + window.height)
        columns = slice(window.left, window.left + window.width)
        if self.is_flat:
            return self._read_flat(index, rows, columns)
        page, frame = self.page, self.pages[index]
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        height, width = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
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
        if len(data) < size:
            raise OSError(f"{size} bytes are missing at {frame.dataoffsets[number]}")
        piece = self.page.decode(data if size else None, number)[0]
        piece = np.zeros((0, 0, 1), self.page.dtype) if piece is None else piece[0]
        self.segments[key] = piece
        self.cached += piece.nbytes
        while self.cached > self.cache and len(self.segments) > 1:
            self.cached -= self.segments.popitem(last=False)[1].nbytes
        return piece

    def write(self, path: Path, bands: Iterable[tuple[int, np.ndarray]], labels: LabelFile) -> None:
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
    for _, rows in _in_rows_of_blocks(bands):
        wide = np.full((BLOCK, -(-width // BLOCK) * BLOCK), labels.ignored, labels.dtype)
        wide[: len(rows), :width] = rows
        for left in range(0, wide.shape[1], BLOCK):
            yield np.ascontiguousarray(wide[:, left : left + BLOCK])


def _plain_reason(path: Path) -> str | None:
    """Why tifffile can not do with a file, or None: it has a georeference, or a compression that takes a codec."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0].aspage()
            if any(tag in page.tags for tag in _GEOREFERENCE):
                return "has a georeference, which only rasterio keeps"
            try:
                if page.compression != 1:
                    tifffile.TIFF.DECOMPRESSORS[page.compression]
                if page.predictor != 1:
                    tifffile.TIFF.UNPREDICTORS[page.predictor]
            except KeyError as error:
                return f"is compressed in a way that tifffile does not read by itself ({error.args[0]})"
    except (tifffile.TiffFileError, OSError, IndexError) as error:
        return f"is no TIFF file that tifffile reads ({error})"
    return None


def _is_installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def open_raster(path: Path, num_channels: int, bands: Sequence[int] | None = None, num_rows: int = 1024) -> Raster:
    """Open an image to be read by windows, and look whether it suits a model.

    tifffile takes plain TIFF files if it is installed and needs no further codec for them, rasterio all others.

    Args:
        path: of a file.
        num_channels: of the model.
        bands: numbers, from 1 on, of those that the model takes, in its order; by default all.
        num_rows: height of the windows to come, for which decoded pixels are kept at hand.

    Raises:
        ValueError: if bands do not fit, the file is stored so that it can not be read by windows, or a library is
            missing.
        OSError: if the file can not be read.
    """
    path = Path(path)
    path.stat()  # says what is wrong with the path better than any library
    reason = _plain_reason(path) if _is_installed("tifffile") else "is an image for which tifffile is missing"
    if reason is None:
        return _PlainRaster(path, num_channels, bands, num_rows)
    if not _is_installed("rasterio"):
        raise ValueError(f"{path} {reason}, and rasterio is not installed: {_INSTALL}")
    return _GdalRaster(path, num_channels, bands, num_rows)


__all__ = ["LabelFile", "Raster", "is_raster", "open_raster"]
