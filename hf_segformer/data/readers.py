"""Readers of images and masks: one way for every command to open a file, in memory or on disk.

A `Reader` claims a file by its content and says its kind: an image, which is read as a whole, or a raster, which is
read and predicted by tiles. The readers of this package, and those of others that announce a class under the entry
points `hf_segformer.readers`, are asked in turn; what none of them claims is read as an ordinary image by Pillow, or
as a NumPy array. Pixels without data are masked, band by band.

Axes: C bands, H height, W width, h w a tile's sides.
"""

import os
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..image_io_segformer import (
    DECODE_ERRORS,
    check_area,
    count_images,
    exif_orientation,
    open_image_file,
    read_image,
    read_mask,
)

Kind = Literal["image", "raster"]

ENTRY_POINTS = "hf_segformer.readers"
# This package's own entry points, known without installed metadata.
_OWN_READERS = ("hf_segformer.geo.tiff:PlainRaster", "hf_segformer.geo.geotiff:GeoRaster")
_HEAD = 4096  # bytes that readers claim a file by
_NUMPY = b"\x93NUMPY"


class Tile(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class ReadOptions(NamedTuple):
    """Options of reading, common to all readers.

    Attributes:
        num_channels: number of channels that the model takes.
        bands: numbers, from 1, of the bands to read, in the model's order; None for all.
        page: which image of a file with several, from 0; None expects a single one.
        ignore_exif: keep images as they are stored, whatever their EXIF orientation.
        any_range: accept integers of any range in three channels, since a value range is applied later.
        num_rows: height of the tiles to be read, for which decoded pixels are cached.
    """

    num_channels: int = 3
    bands: tuple[int, ...] | None = None
    page: int | None = None
    ignore_exif: bool = False
    any_range: bool = False
    num_rows: int = 1024


class ImageSource:
    """An encoded image, on disk or in memory.

    Args:
        value: a path, the bytes of a file, or both as `{"bytes": ..., "path": ...}`, as data sets store files.
        name: what error messages call it; by default its path.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if there is neither a path nor bytes.
    """

    def __init__(self, value: Any, name: str = ""):
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
        if isinstance(value, bytes | BytesIO):
            content, path = value, None
        content = content.getvalue() if isinstance(content, BytesIO) else content
        self.name = name or (os.fspath(path) if path else "the image")
        if content is None and not path:
            raise ValueError(f"{self.name} is missing: the row holds neither a path nor bytes")
        if content is None and "://" in str(path):  # a stream's file on the Hub
            content = _download(str(path))
        self.content: bytes | None = content
        self.path = None if content is not None else Path(str(os.fspath(path or "")))
        self.head = content[:_HEAD] if content is not None else _read_head(self.path, self.name)

    @property
    def file(self) -> Path | BytesIO:
        """The path, or a new stream of the bytes."""
        return self.path if self.path is not None else BytesIO(self.content or b"")

    @property
    def suffix(self) -> str:
        """Ending of the name, in lower case."""
        return Path(self.name).suffix.lower()


def _download(address: str) -> bytes:
    import fsspec

    with fsspec.open(address) as file:
        return file.read()


def _read_head(path: Path | None, name: str) -> bytes:
    try:
        with open(path or "", "rb") as file:
            return file.read(_HEAD)
    except OSError as error:
        raise OSError(f"cannot read {name}: {error.strerror or error}") from error


class Reader(Protocol):
    """An open image.

    Attributes:
        name: what error messages call it.
        kind: `"image"`, to be read as a whole, or `"raster"`, to be read and predicted by tiles.
        height: in pixels.
        width: in pixels.
        num_bands: number of bands that are read.
        dtype: number type of the pixels.
        nodata: the value for no data of each band, None where a band has none.
        may_lack_data: some pixels may hold no data.
    """

    name: str
    kind: Kind
    height: int
    width: int
    num_bands: int
    dtype: np.dtype
    nodata: tuple[float | None, ...]
    may_lack_data: bool

    def __init__(self, source: ImageSource, options: ReadOptions): ...

    @classmethod
    def claims(cls, source: ImageSource, by_tiles: bool = False) -> Kind | None:
        """Return the kind of a file that this reader opens, None for others.

        Must not raise for damaged files.

        Args:
            source: the file.
            by_tiles: claim ordinary images too, if this reader reads them by tiles without decoding all of them.
        """

    @classmethod
    def count(cls, source: ImageSource) -> int:
        """Return the number of images in a file that this reader claims."""

    def image(self) -> Image.Image | np.ndarray:
        """Return the whole image: a PIL image, or an array (C, H, W), masked where it holds no data."""

    def read(self, tile: Tile) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a tile (C, h, w), masked where it holds no data, and where any band holds data, bool (h, w) or None.

        None stands for data everywhere.
        """

    def __enter__(self) -> "Reader": ...

    def __exit__(self, *error: Any) -> None: ...


class ImageFile:
    """Reader of ordinary files: the formats of `IMAGE_FORMATS` by Pillow, and NumPy arrays; see `Reader`."""

    kind: Kind = "image"
    may_lack_data = False

    def __init__(self, source: ImageSource, options: ReadOptions):
        self.source, self.options, self.name = source, options, source.name
        self._array = _load_array(source) if source.head.startswith(_NUMPY) else None
        self._image: Image.Image | np.ndarray | None = None

    @classmethod
    def claims(cls, source: ImageSource, by_tiles: bool = False) -> Kind | None:
        """See `Reader.claims`."""
        return "image"

    @classmethod
    def count(cls, source: ImageSource) -> int:
        """See `Reader.count`."""
        return 1 if source.head.startswith(_NUMPY) else count_images(source.file, source.name)

    def image(self) -> Image.Image | np.ndarray:
        """See `Reader.image`."""
        if self._image is None:
            options = self.options
            decoded: Any = self._array
            if decoded is None:
                decoded = open_image_file(self.source.file, self.name, options.page, options.ignore_exif)
            if options.bands is not None:
                decoded = _choose(decoded, options.bands, self.name)
            self._image = read_image(decoded, options.num_channels, None, self.name, options.any_range)
        return self._image

    def read(self, tile: Tile) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Reader.read`."""
        pixels = self._pixels[:, tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
        return pixels, None

    @property
    def _pixels(self) -> np.ndarray:
        image = self.image()
        if isinstance(image, np.ndarray):
            return image
        array = np.asarray(image)
        return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)

    @property
    def height(self) -> int:
        """In pixels."""
        return self._pixels.shape[1]

    @property
    def width(self) -> int:
        """In pixels."""
        return self._pixels.shape[2]

    @property
    def num_bands(self) -> int:
        """Number of bands that are read."""
        return len(self._pixels)

    @property
    def dtype(self) -> np.dtype:
        """Number type of the pixels."""
        return self._pixels.dtype

    @property
    def nodata(self) -> tuple[float | None, ...]:
        """None for each band: ordinary files declare no value."""
        return (None,) * self.num_bands

    def __enter__(self) -> "ImageFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._image = self._array = None


def _load_array(source: ImageSource) -> np.ndarray:
    try:
        return np.load(source.file, allow_pickle=False)
    except (TokenError, *DECODE_ERRORS) as error:
        raise ValueError(f"{source.name} cannot be read as a NumPy array: {error!s:.300}") from error


def _choose(image: Image.Image | np.ndarray, bands: tuple[int, ...], name: str) -> np.ndarray:
    """The chosen bands (C, H, W) of an image of any layout that has more than one."""
    array = np.asarray(image)
    axis = 0 if isinstance(image, np.ndarray) and array.ndim == 3 and array.shape[0] < array.shape[-1] else -1
    total = array.shape[axis] if array.ndim == 3 else 1
    if not bands or not all(1 <= band <= total for band in bands):
        raise ValueError(f"bands are {list(bands)}; expected numbers from 1 to {total}, those of {name}")
    array = array[None] if array.ndim == 2 else np.moveaxis(array, axis, 0)
    return array[[band - 1 for band in bands]]


@cache
def _readers() -> tuple[Any, ...]:
    """Reader classes in the order in which they are asked: those of other packages, ours, ordinary files."""
    others = sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name)
    foreign = [entry.load() for entry in others if entry.value not in _OWN_READERS]
    own = [getattr(import_module(module), name) for module, name in (each.split(":") for each in _OWN_READERS)]
    return (*foreign, *own, ImageFile)


def find_reader(source: ImageSource, by_tiles: bool = False) -> tuple[Any, Kind]:
    """Return the reader class that claims a file, and the file's kind; see `Reader.claims`."""
    for reader in _readers():
        kind = reader.claims(source, by_tiles)
        if kind is not None:
            return reader, kind
    raise AssertionError("ImageFile claims every file")


def open_image(source: Any, num_channels: int = 3, name: str = "", **options: Any) -> Reader:
    """Open an image by the reader that claims it.

    Args:
        source: a path, bytes or an `ImageSource`.
        num_channels: number of channels that the model takes.
        name: what error messages call it; by default its path.
        **options: further fields of `ReadOptions`.

    Raises:
        ValueError: if bands do not fit, the file holds several images, or a library is missing.
        OSError: if the file cannot be read.

    Examples:
        >>> import io
        >>> from PIL import Image
        >>> from hf_segformer.data.readers import open_image
        >>> buffer = io.BytesIO()
        >>> Image.new("RGB", (9, 6)).save(buffer, "PNG")
        >>> with open_image(buffer) as reader:
        ...     reader.kind, reader.height, reader.width, reader.num_bands
        ('image', 6, 9, 3)
    """
    source = source if isinstance(source, ImageSource) else ImageSource(source, name)
    if options.get("bands") is not None:
        options["bands"] = tuple(options["bands"])
    return find_reader(source)[0](source, ReadOptions(num_channels, **options))


def open_raster(source: Any, num_channels: int = 3, name: str = "", **options: Any) -> Reader:
    """Open a file to be read by tiles, whatever its kind; arguments and errors are those of `open_image`."""
    source = source if isinstance(source, ImageSource) else ImageSource(source, name)
    if options.get("bands") is not None:
        options["bands"] = tuple(options["bands"])
    return find_reader(source, by_tiles=True)[0](source, ReadOptions(num_channels, **options))


def kind_of(source: Any) -> Kind:
    """Return the kind of a file: `"image"` or `"raster"`; `"image"` for a file that does not exist.

    Examples:
        >>> from hf_segformer.data.readers import kind_of
        >>> kind_of("photo.jpg")
        'image'
    """
    if not isinstance(source, ImageSource):
        if isinstance(source, str | os.PathLike) and not Path(source).is_file():
            return "image"
        source = ImageSource(source)
    return find_reader(source)[1]


def count_pages(source: Any) -> int:
    """Return the number of images in a file: pages, frames, or planes that its axes call so.

    Raises:
        OSError: if it cannot be read.
    """
    source = source if isinstance(source, ImageSource) else ImageSource(source)
    return find_reader(source)[0].count(source)


def read_whole_image(source: Any, num_channels: int, name: str = "", **options: Any) -> Image.Image | np.ndarray:
    """Read a whole image by the reader that claims it.

    Args:
        source: see `open_image`.
        num_channels: see `open_image`.
        name: see `open_image`.
        **options: further fields of `ReadOptions`.

    Returns:
        a PIL image, or an array (C, H, W), masked where it holds no data.

    Raises:
        ValueError: see `open_image`.
        OSError: see `open_image`.
    """
    with open_image(source, num_channels, name, **options) as reader:
        return reader.image()


def read_whole_mask(source: Any, name: str = "", page: int | None = None, ignore_exif: bool = False) -> np.ndarray:
    """Read a mask by the reader that claims it.

    Args:
        source: a path, bytes or an `ImageSource`.
        name: what error messages call it; by default its path.
        page: see `ReadOptions`.
        ignore_exif: see `ReadOptions`.

    Returns:
        integers (H, W), masked where the file declares no data.

    Raises:
        ValueError: if it holds colours or floats, or several images.
        OSError: if it cannot be read.
    """
    source = source if isinstance(source, ImageSource) else ImageSource(source, name)
    reader = find_reader(source)[0]
    if reader is ImageFile:
        if source.head.startswith(_NUMPY):
            return read_mask(_load_array(source), source.name)
        return read_mask(source.file, source.name, page=page, ignore_exif=ignore_exif)
    with reader(source, ReadOptions(1, page=page)) as opened:
        check_area(opened.height, opened.width, source.name)
        labels = opened.image()
    if labels.dtype.kind not in "biu":
        raise ValueError(f"{source.name} has dtype {labels.dtype}; expected a mask of integers")
    return labels[0]


def has_data(image: Image.Image | np.ndarray) -> np.ndarray | None:
    """Return where any band of an image (C, H, W) holds data, bool (H, W); None where all of it does."""
    if not isinstance(image, np.ma.MaskedArray) or not np.ma.is_masked(image):
        return None
    valid = np.asarray(~np.ma.getmaskarray(image).all(axis=0))
    return None if valid.all() else valid


def is_turned_alone(image: Any, mask: Any) -> bool:
    """Return True if EXIF turns an image but not its mask, so that they do not lie on each other.

    Args:
        image: a path or a stored file, `{"bytes": ..., "path": ...}`; others have no EXIF.
        mask: the same.
    """
    turns = []
    for each in (image, mask):
        try:
            turns.append(exif_orientation(ImageSource(each).file) if isinstance(each, str | dict) else 1)
        except (OSError, ValueError):
            return False
    return turns[0] != 1 and turns[1] == 1


__all__ = [
    "ENTRY_POINTS",
    "ImageFile",
    "ImageSource",
    "ReadOptions",
    "Reader",
    "Tile",
    "count_pages",
    "find_reader",
    "has_data",
    "is_turned_alone",
    "kind_of",
    "open_image",
    "open_raster",
    "read_whole_image",
    "read_whole_mask",
]
