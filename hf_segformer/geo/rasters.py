"""Rasters: images that are read by tiles, beside which a segmentation map is written row by row.

Neither is ever in memory as a whole. `geotiff` reads and writes by rasterio, `tiff` by tifffile; here is what they
share, and how a file is recognized as one for them.

Axes: C bands, H height, W width.
"""

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from ..data.reader_protocol import ImageSource, Kind, ReadOptions, Tile
from ..image_io_segformer import DECODE_ERRORS, check_area
from ..inference.tiling import MaskLayout

BLOCK = 512  # side in pixels of the tiles that a segmentation map is written in
LEAST_CACHE, MOST_CACHE = 64 << 20, 512 << 20  # bytes of decoded pixels
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
JPEG_2000_MAGIC = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
HFA_MAGIC = b"EHFA_HEADER_TAG"
PNG_MAGIC, JPEG_MAGIC = b"\x89PNG\r\n", b"\xff\xd8\xff"
GEOREFERENCE = (33550, 33922, 34264, 34735, 50844)  # TIFF tags: scale, tie points, matrix, keys, RPCs
NODATA = 42113  # GDAL's TIFF tag
ORIENTATION = 274  # TIFF tag, as in EXIF
_BITS, _SAMPLES, _PLANES, _EXTRA_SAMPLES = 258, 277, 284, 338  # TIFF tags
_MOST_FLOAT32 = 3.4e38  # beyond it a value for no data means the largest float32, however many digits it is written in
INSTALL = "pip install 'hf-segformer[geo]'"


def raster_kind(source: ImageSource) -> Kind | None:
    """Return the kind of a file that a raster reader opens, None for others.

    A raster is a TIFF or JPEG 2000 file with a georeference, with more pixels than Pillow opens without a warning, or
    with bands that Pillow has no mode for, and GDAL's virtual and Erdas rasters. A TIFF that says where it holds no
    data, by a value or an alpha band, or of which Pillow would leave out bands, is an image, to be read by a raster
    reader. Neither rasterio nor tifffile is needed to tell.
    """
    if source.suffix == ".vrt" and source.head.lstrip().startswith(b"<VRTDataset"):
        return "raster"
    if source.head.startswith(HFA_MAGIC):
        return "raster"
    is_tiff = source.head.startswith(TIFF_MAGIC)
    if not is_tiff and not source.head.startswith(JPEG_2000_MAGIC):
        return None
    reader: Any = TiffImageFile if is_tiff else Jpeg2KImageFile  # unlike Image.open they do not warn of many pixels
    try:
        with reader(source.file) as image:
            is_large = Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS
            tags = getattr(image, "tag_v2", {})
            if is_large or any(tag in tags for tag in GEOREFERENCE) or len(image.getbands()) not in (1, 3, 4):
                return "raster"
            if NODATA in tags or (is_tiff and _loses_bands(image)):
                return "image"
            extra = tags.get(_EXTRA_SAMPLES) or ()
            has_alpha = (extra if isinstance(extra, tuple) else (extra,))[-1:] in ((1,), (2,))
            return "image" if has_alpha and (is_installed("tifffile") or is_installed("rasterio")) else None
    except (*DECODE_ERRORS, Warning):  # a warning is raised where a filter asks for it
        return "raster"


def _loses_bands(image: TiffImageFile) -> bool:
    """Return True if Pillow leaves out bands of a TIFF, or cannot read them where each is stored apart."""
    tags = image.tag_v2
    samples, bits = tags.get(_SAMPLES, 1), tags.get(_BITS, (1,))
    return samples != len(image.getbands()) or (tags.get(_PLANES) == 2 and samples > 1 and max(bits) > 8)


def tiff_orientation(source: ImageSource, directory: int) -> int:
    """Return the orientation of a directory, from 1, of a TIFF file by its tag, 1 for other files and without one."""
    if not source.head.startswith(TIFF_MAGIC):
        return 1
    with source.path.open("rb") if source.path is not None else BytesIO(source.content or b"") as file:
        tags = ImageFileDirectory_v2(file.read(16 if source.head[2:4] in (b"+\0", b"\0+") else 8))
        for _ in range(directory):
            file.seek(tags.next)
            tags.load(file)
    return tags.get(ORIENTATION, 1)


def exif_orientation(source: ImageSource) -> int:
    """Return the EXIF orientation of a JPEG or PNG file by its header, 1 for other files and without one."""
    readers: dict[bytes, Any] = {JPEG_MAGIC: JpegImageFile, PNG_MAGIC: PngImageFile}
    reader = next((reader for magic, reader in readers.items() if source.head.startswith(magic)), None)
    if reader is None:
        return 1
    try:
        with reader(source.file) as image:  # unlike Image.open without a warning of many pixels
            return Image.Image.getexif(image).get(ORIENTATION, 1)  # that of PNG files decodes their pixels
    except DECODE_ERRORS:
        return 1


def is_installed(name: str) -> bool:
    """Return True if a package can be imported."""
    try:
        return find_spec(name) is not None
    except ValueError:  # a module without a specification, or one that was blocked
        return False


class Raster:
    """An open raster; see `data.reader_protocol.Reader`.

    Args:
        source: the file.
        options: of reading; `num_rows` is the height of the tiles to come.

    Attributes:
        name: what error messages call it.
        path: of the file, None in memory.
        kind: of the file.
        height: in pixels, of the upright image.
        width: in pixels.
        orientation: EXIF orientation of the stored pixels; 1 if they are upright, or read as they are stored.
        num_bands: number of bands that are read, without an alpha band that only says where there is no data.
        dtype: dtype of the pixels.
        nodata: the value for no data of each band that is read, None where a band has none.
        may_lack_data: some pixels may hold none.
        file: the open file of the library that reads it.
        bands: indices of the bands that are read, in the model's order.
        alpha: index of the band that says where there is data, or None.
        cache: bytes of decoded pixels to keep.
    """

    name: str
    path: Path | None
    kind: Kind
    height: int
    width: int
    orientation: int = 1
    num_bands: int
    dtype: np.dtype
    nodata: tuple[float | None, ...]
    may_lack_data: bool
    file: Any
    bands: list[int]
    alpha: int | None
    cache: int

    def __init__(self, source: ImageSource, options: ReadOptions):
        self.source, self.options = source, options
        self.name, self.path, self.kind = source.name, source.path, raster_kind(source) or "image"
        try:
            self.file = self._open()
            try:
                self._look(options)
                self._turn(self._orientation())
            except BaseException:
                self.file.close()
                raise
        except DECODE_ERRORS as error:
            if isinstance(error, OSError | ValueError) and self.name in str(error):
                raise
            raise OSError(f"{self.name} is damaged, or no image that can be read: {_in_a_line(error)}") from error

    def _open(self) -> Any:
        raise NotImplementedError

    def _look(self, options: ReadOptions) -> None:
        """Set the attributes, height and width as stored, or raise ValueError."""
        raise NotImplementedError

    def _orientation(self) -> int:
        """Return the EXIF orientation of the file."""
        raise NotImplementedError

    def _turn(self, orientation: int) -> None:
        """Read the image upright from now on; refuse a raster, whose georeference would not be turned with it."""
        self.stored_height, self.stored_width = self.height, self.width
        if self.options.ignore_exif or orientation not in range(2, 9):
            return
        if self.kind == "raster":
            raise ValueError(
                f"{self.name} is a raster of orientation {orientation} (TIFF tag 274); expected 1, upright: remove the "
                "tag, or take it as stored (--as-stored, or data.ignore_exif=true)"
            )
        self.orientation = orientation
        if orientation >= 5:
            self.height, self.width = self.width, self.height

    def read(self, tile: Tile) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a tile of the upright image; see `data.reader_protocol.Reader.read`.

        Raises:
            OSError: if the file is cut or damaged there.
        """
        if self.orientation == 1:
            return self._read(tile)
        is_transposed = self.orientation >= 5
        down, across = -1 if self.orientation in (3, 4, 6, 7) else 1, -1 if self.orientation in (2, 3, 7, 8) else 1
        top, left, height, width = tile
        if is_transposed:
            top, left, height, width = left, top, width, height
        top = top if down == 1 else self.stored_height - top - height
        left = left if across == 1 else self.stored_width - left - width

        def upright(array: np.ndarray) -> np.ndarray:
            array = array[..., ::down, ::across]
            return array.swapaxes(-1, -2) if is_transposed else array

        pixels, valid = self._read(Tile(top, left, height, width))
        return upright(pixels), None if valid is None else upright(valid)

    def _read(self, tile: Tile) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a tile of the stored image."""
        raise NotImplementedError

    def image(self) -> np.ndarray:
        """Return the whole raster; see `data.reader_protocol.Reader.image`."""
        check_area(self.height, self.width, self.name)
        return self.read(Tile(0, 0, self.height, self.width))[0]

    def write(self, path: Path, bands: Iterable[tuple[int, np.ndarray]], labels: MaskLayout) -> None:
        """Write rows of labels, from top to bottom, to a file of the raster's size.

        Raises:
            OSError: if it cannot be written.
        """
        raise NotImplementedError

    def write_beside(self, path: Path, labels: np.ndarray, layout: MaskLayout) -> None:
        """Write the files that belong beside a segmentation map (H, W): none, unless a subclass has any."""

    def __enter__(self) -> "Raster":
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def choose_page(self, total: int) -> int:
        """Return the index of the page to read.

        Raises:
            ValueError: if there are several and none was asked for, or fewer.
        """
        page = self.options.page
        if page is None and total > 1:
            raise ValueError(
                f"{self.name} holds {total} images; expected one: read them as separate images with pages (--pages, "
                "data.pages=true), or store the one that is meant as a file of its own"
            )
        if page is not None and page >= total:
            raise ValueError(f"{self.name} has no page {page + 1}; expected at most {total}")
        return page or 0

    def choose_bands(self, total: int, has_alpha: bool, num_channels: int, bands: Sequence[int] | None) -> None:
        """Set `bands` (indices), `num_bands` and `alpha` (the index of that band, or None).

        A last band that may be alpha is it where bands are asked for and it is not among them. Where none are, it is
        alpha only if the model takes one band less: a fourth one may be near infrared, which GDAL calls alpha by
        default.

        Args:
            total: number of bands in the file.
            has_alpha: the last one is said to be alpha.
            num_channels: of the model; 0 takes any number.
            bands: numbers, from 1, that were asked for, or None.

        Raises:
            ValueError: if they do not fit the model.
        """
        if bands is not None and not (bands and all(band in range(1, total + 1) for band in bands)):
            raise ValueError(f"bands are {list(bands)}; expected numbers from 1 to {total}, those of {self.name}")
        counts = (num_channels, 1) if num_channels == 3 else (num_channels,)  # grey stands for three channels
        drops_alpha = has_alpha and (total - 1 in counts if bands is None else total not in bands)
        self.alpha = total - 1 if drops_alpha else None
        self.bands = list(range(total - drops_alpha)) if bands is None else [band - 1 for band in bands]
        self.num_bands = len(self.bands)
        if self.options.is_mask and self.num_bands > 1:
            raise ValueError(
                f"{self.name} has {total} bands or pages; expected one of labels: convert colours to labels first, or "
                "read pages as separate masks (--pages, data.pages=true)"
            )
        if num_channels and self.num_bands not in counts:
            raise ValueError(
                f"{self.name} has {total} bands; expected {num_channels}, as many as the model takes: choose bands by "
                "their numbers, from 1 (--bands, data.bands), or use a model for as many"
                if bands is None
                else f"bands are {list(bands)}, {len(bands)} of {self.name}; expected {num_channels}, as many as the "
                "model takes"
            )

    def keep_at_hand(self, block: tuple[int, int], pixel: int, num_rows: int, is_compressed: bool = True) -> None:
        """Set `cache`, the bytes of decoded pixels to keep.

        Blocks as wide as the image are needed again by the next tile, so that a row of tiles is kept of them.

        Args:
            block: height and width of the blocks in which the file is stored.
            pixel: bytes of all bands.
            num_rows: of a tile.
            is_compressed: a block is read as a whole.

        Raises:
            ValueError: if blocks are too large for that.
        """
        height, width = min(block[0], self.height), block[1]
        num_bytes = height * width * pixel
        if is_compressed and num_bytes > MOST_CACHE:
            raise ValueError(
                f"{self.name} is stored in compressed blocks of {height}x{width} pixels (height x width), "
                f"{num_bytes >> 20} MiB each, which cannot be read by tiles: write it in tiles first, for instance "
                "by rio convert with --co TILED=YES --co COMPRESS=DEFLATE --co BIGTIFF=IF_SAFER"
            )
        needed = (num_rows + 2 * height) * width * pixel if width >= self.width else 0
        self.cache = min(max(needed, LEAST_CACHE), MOST_CACHE)

    def damaged(self, tile: Tile, error: BaseException) -> OSError:
        """Return the error to raise where a tile cannot be read."""
        return OSError(
            f"{self.name} cannot be read in rows {tile.top} to {tile.top + tile.height} and columns "
            f"{tile.left} to {tile.left + tile.width}: it is cut short or damaged "
            f"({_in_a_line(error.__cause__ or error)})"
        )


def _in_a_line(error: BaseException) -> str:
    """Return an error's text in one line of bounded length."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"


def without_data(band: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """Return where a band (h, w) holds its value for no data; None where it has no such value.

    A value of the size of the largest float32 stands for it, with whatever digits it was written.
    """
    if nodata is None:
        return None
    if np.isnan(nodata):
        return np.isnan(band) if band.dtype.kind == "f" else np.zeros(band.shape, bool)
    if band.dtype.kind != "f":
        return band == nodata
    if abs(nodata) >= _MOST_FLOAT32 and band.dtype == np.float32:
        return band <= -_MOST_FLOAT32 if nodata < 0 else band >= _MOST_FLOAT32
    return band == band.dtype.type(nodata)


def mask_no_data(
    pixels: np.ndarray, nodata: Sequence[float | None], valid: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Mask a tile (C, h, w) band by band where it holds no data.

    Args:
        pixels: the tile.
        nodata: the value for no data of each band, None where a band has none.
        valid: where a mask or an alpha band says that there is data, bool (h, w); None everywhere.

    Returns:
        the tile, masked if any pixel lacks data, and where any band holds data; None everywhere.
    """
    masks = [without_data(band, value) for band, value in zip(pixels, nodata, strict=True)]
    if valid is None and not any(mask is not None and mask.any() for mask in masks):
        return pixels, None
    outside = np.zeros(pixels.shape[1:], bool) if valid is None else ~valid
    masked = np.stack([outside if mask is None else mask | outside for mask in masks])
    any_valid = np.asarray(~masked.all(axis=0))
    return np.ma.MaskedArray(pixels, masked), any_valid


def in_rows_of_blocks(bands: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    """Regroup rows into whole blocks, so that each block is compressed and written once."""
    waiting: list[np.ndarray] = []
    first = num_rows = 0
    for _, rows in bands:
        while len(rows):
            taken = rows[: BLOCK - num_rows]
            waiting.append(taken.copy())  # the next rows overwrite it
            num_rows, rows = num_rows + len(taken), rows[len(taken) :]
            if num_rows == BLOCK:
                yield first, np.concatenate(waiting)
                first, num_rows, waiting = first + BLOCK, 0, []
    if waiting:
        yield first, np.concatenate(waiting)


__all__ = ["Raster", "raster_kind"]
