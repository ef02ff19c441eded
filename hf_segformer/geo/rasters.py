"""What a raster is: an image that is read by windows, beside which a label map is written by bands of rows.

Neither is ever in memory as a whole. `geotiff` reads and writes by rasterio, `plain_tiff` by tifffile; here is what
they share, and how to tell that a file is one for them.

Axes: C bands, H height, W width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ..image_io_segformer import DECODE_ERRORS
from ..inference.tiling import Tile as Window

Color = tuple[int, int, int]

BLOCK = 512  # side in pixels of the tiles that a label map is written in
LEAST_CACHE, MOST_CACHE = 64 << 20, 512 << 20  # bytes of decoded pixels
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
GEOREFERENCE = (33550, 33922, 34264, 34735, 50844)  # TIFF tags: scale, tie points, matrix, keys, RPCs
_ONLY_RASTERS = (".vrt", ".img")  # Pillow reads neither


def is_raster(path: str | Path) -> bool:
    """Whether a file is better labelled by windows than as one picture.

    That is a TIFF file, or a JPEG 2000 one, with a georeference, with more pixels than Pillow opens without a warning,
    or whose bands make no picture that Pillow opens, and GDAL's virtual rasters. Neither rasterio nor tifffile is
    needed to tell.

    Args:
        path: of a file; one that is not there is no raster.

    Raises:
        OSError: if it can not be opened.

    Example:
        >>> from hf_segformer.geo.rasters import is_raster
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
        is_tiff = file.read(4) in _TIFF
    if not is_tiff and suffix not in (".jp2", ".j2k"):
        return False
    reader: Callable[..., Image.Image] = TiffImageFile if is_tiff else Jpeg2KImageFile  # no warning of many pixels
    try:
        with reader(path) as image:
            is_large = Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS
            tags = getattr(image, "tag_v2", {})
            return is_large or any(tag in tags for tag in GEOREFERENCE) or len(image.getbands()) not in (1, 3, 4)
    except (*DECODE_ERRORS, Warning):  # a warning is raised where its user asked for that
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

    Args:
        path: of the file.
        num_channels: of the model.
        bands: numbers, from 1 on, of those that the model takes, in its order; None for all.
        num_rows: height of the windows to come.

    Attributes:
        path: of the file.
        height: in pixels.
        width: likewise.
        num_bands: without an alpha band that only tells where there is no data.
        may_lack_data: whether some pixels may hold none.
        file: of the library that reads it.
        bands: indices of those that are read, in the model's order.
        alpha: index of the one that tells where there is data, or None.
        cache: bytes of decoded pixels to keep at hand.
    """

    path: Path
    height: int
    width: int
    num_bands: int
    may_lack_data: bool
    file: Any
    bands: list[int]
    alpha: int | None
    cache: int

    def __init__(self, path: Path, num_channels: int, bands: Sequence[int] | None, num_rows: int):
        self.path = path
        self.file = self._open()
        try:
            self._look(num_channels, bands, num_rows)
        except BaseException:
            self.file.close()
            raise

    def _open(self) -> Any:
        raise NotImplementedError

    def _look(self, num_channels: int, bands: Sequence[int] | None, num_rows: int) -> None:
        """Set the attributes, or raise ValueError."""
        raise NotImplementedError

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

    def choose_bands(self, total: int, has_alpha: bool, num_channels: int, bands: Sequence[int] | None) -> None:
        """Set `bands` (indices), `num_bands` and `alpha` (the index of that band, or None).

        A last band that may be alpha is it only where the model takes one band less: a fourth one may be near infrared,
        which GDAL calls alpha unless told otherwise.

        Args:
            total: of bands in the file.
            has_alpha: whether the last one is said to be alpha.
            num_channels: of the model.
            bands: numbers from 1 on that were asked for, or None.

        Raises:
            ValueError: if they do not fit the model.
        """
        if bands is not None and not (bands and all(band in range(1, total + 1) for band in bands)):
            raise ValueError(f"bands are {list(bands)}, but those of {self.path} have the numbers 1 to {total}")
        counts = (num_channels, 1) if num_channels == 3 else (num_channels,)  # grey stands for three channels
        drops_alpha = bands is None and has_alpha and total - 1 in counts
        self.alpha = total - 1 if drops_alpha else None
        self.bands = list(range(total - drops_alpha)) if bands is None else [band - 1 for band in bands]
        self.num_bands = len(self.bands)
        if self.num_bands not in counts:
            raise ValueError(
                f"{self.path} has {total} bands, but the model takes {num_channels}: choose {num_channels} of them by "
                "their numbers (bands, from 1 on), or take a model for as many"
                if bands is None
                else f"bands are {list(bands)}, {len(bands)} of {self.path}, but the model takes {num_channels}"
            )

    def keep_at_hand(self, block: tuple[int, int], pixel: int, num_rows: int, is_compressed: bool = True) -> None:
        """Set `cache`, the bytes of decoded pixels to keep.

        Pieces as wide as the image are needed again by the next window, so that a row of windows is kept of them.

        Args:
            block: height and width of the pieces in which the file is stored.
            pixel: bytes of all bands.
            num_rows: of a window.
            is_compressed: whether a piece is read as a whole.

        Raises:
            ValueError: if pieces are too large for that.
        """
        height, width = min(block[0], self.height), block[1]
        num_bytes = height * width * pixel
        if is_compressed and num_bytes > MOST_CACHE:
            raise ValueError(
                f"{self.path} is stored in compressed pieces of {height}x{width} pixels (height x width), "
                f"{num_bytes >> 20} MiB each, which can not be read by windows: write it in tiles first, for instance "
                "by gdal_translate -co TILED=YES -co COMPRESS=DEFLATE -co BIGTIFF=IF_SAFER"
            )
        needed = (num_rows + 2 * height) * width * pixel if width >= self.width else 0
        self.cache = min(max(needed, LEAST_CACHE), MOST_CACHE)

    def damaged(self, window: Window, error: BaseException) -> OSError:
        """What to raise where a window can not be read."""
        return OSError(
            f"{self.path} can not be read in rows {window.top} to {window.top + window.height} and columns "
            f"{window.left} to {window.left + window.width}: it is cut short or damaged ({error.__cause__ or error})"
        )


def holds_data(pixels: np.ndarray, nodata: Sequence[float | None]) -> np.ndarray | None:
    """Where any band of (C, h, w) differs from its value for no data; None where one has no such value."""
    if any(value is None for value in nodata):
        return None
    valid = np.zeros(pixels.shape[1:], bool)
    for band, value in zip(pixels, nodata, strict=True):
        valid |= ~np.isnan(band) if value is not None and np.isnan(value) else band != value
    return valid


def in_rows_of_blocks(bands: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
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


__all__ = ["LabelFile", "Raster", "is_raster"]
