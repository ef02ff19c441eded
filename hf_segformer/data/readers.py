"""Readers of images and masks: one way for every command to open a file, in memory or on disk.

A `Reader` claims a file by its content and says its kind: an image, which is read as a whole, a raster, which is read
and predicted by tiles, a volume, which is read and predicted slice by slice, or a video, which is predicted frame by
frame. The readers of this package, and those of others that announce a class under the entry points
`hf_segformer.readers`, are asked in turn; what none of them claims is read as an ordinary image by Pillow, or as a
NumPy array. Pixels without data are masked, band by band.

Axes: C bands, H height, W width, h w a tile's sides.
"""

import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..files import IMAGE_SUFFIXES
from ..image_io_segformer import (
    DECODE_ERRORS,
    check_area,
    count_images,
    exif_orientation,
    open_image_file,
    read_image,
    read_mask,
)

Kind = Literal["image", "raster", "volume", "video"]

ENTRY_POINTS = "hf_segformer.readers"
# This package's own entry points, known without installed metadata.
_OWN_READERS = (
    "hf_segformer.geo.tiff:PlainRaster",
    "hf_segformer.geo.geotiff:GeoRaster",
    "hf_segformer.medical.dicom:DicomVolume",
    "hf_segformer.medical.nifti:NiftiVolume",
    "hf_segformer.video.reader:VideoFile",
)
_COLOR_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")
_HEAD = 4096  # bytes that readers claim a file by
NUMPY_MAGIC = b"\x93NUMPY"
_HUB_FILE = re.compile(
    r"((zip|tar|gzip|bz2|xz|lz4|zstd)://[^:]*::)*hf://datasets/(?P<repository>[\w.-]+/[\w.-]+)(@[^/]+)?/[^:]+"
)


class Tile(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class ReadOptions(NamedTuple):
    """Options of reading, common to all readers.

    Attributes:
        num_channels: number of channels that the model takes; 0 is any, for a raster.
        bands: numbers, from 1, of the bands to read, in the model's order; None for all.
        page: which image of a file with several, from 0; None expects a single one, of slices a volume.
        ignore_exif: keep images as they are stored, whatever their EXIF orientation.
        any_range: accept integers of any range in three channels, since a value range is applied later.
        num_rows: height of the tiles to be read, for which decoded pixels are cached.
        is_mask: a mask is read, of one band.
        axis: axis, from 0, that a volume is cut along into slices; None for the one of its format.
        window: read 8-bit grey values by the window that the file states for display.
    """

    num_channels: int = 3
    bands: tuple[int, ...] | None = None
    page: int | None = None
    ignore_exif: bool = False
    any_range: bool = False
    num_rows: int = 1024
    is_mask: bool = False
    axis: int | None = None
    window: bool = False


class ImageSource:
    """An encoded image, on disk or in memory.

    Args:
        value: a path, the bytes of a file, or both as `{"bytes": ..., "path": ...}`, as data sets store files.
        name: what error messages call it; by default its path.
        files: all files of an image that is stored in several, of which `value` is one.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if there is neither a path nor bytes.
    """

    def __init__(self, value: Any, name: str = "", files: Sequence[str] = ()):
        self.files = tuple(files)
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
        if isinstance(value, bytes | BytesIO):
            content, path = value, None
        content = content.getvalue() if isinstance(content, BytesIO) else content
        self.name = name or (os.fspath(path) if path else "the image")
        if content is None and not path:
            raise ValueError(f"{self.name} is missing: the row holds neither a path nor bytes")
        if content is None and isinstance(value, dict) and is_hub_file(path):  # of a stream
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


def is_hub_file(path: Any, repository: str = "") -> bool:
    """Return True for the address of a file in a data set of the Hub, or in an archive there, as streams name files.

    Other addresses (of web servers, local files, cloud storage) are never opened.

    Args:
        path: the address.
        repository: `owner/name` that it has to be in; any without one.
    """
    match = _HUB_FILE.fullmatch(path) if isinstance(path, str) else None
    return match is not None and repository in ("", match["repository"]) and ".." not in re.split(r"[/\\:]", path)


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

    A reader of further formats may have `suffixes`, the endings in lower case by which folders are searched for them,
    `gather(paths)`, which joins files of one folder that make up one image (see `gather`), `states_window`, True if
    its files may state a window for display, `keeps_identity`, True if a mask may name the person of the image,
    and for volumes `mask_reader`, `module:function`, which reads the mask of a slice (see `medical.masks.read_labels`).

    Attributes:
        name: what error messages call it.
        kind: `"image"`, to be read as a whole, `"raster"`, to be read and predicted by tiles, `"volume"`, to be read
            and predicted slice by slice (see `inference.volumes.VolumeReader`), or `"video"`, which only a writer of
            videos reads.
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
        self._array = read_array_file(source) if source.head.startswith(NUMPY_MAGIC) else None
        self._image: Image.Image | np.ndarray | None = None

    @classmethod
    def claims(cls, source: ImageSource, by_tiles: bool = False) -> Kind | None:
        """See `Reader.claims`."""
        return "image"

    @classmethod
    def count(cls, source: ImageSource) -> int:
        """See `Reader.count`."""
        return 1 if source.head.startswith(NUMPY_MAGIC) else count_images(source.file, source.name)

    def image(self) -> Image.Image | np.ndarray:
        """See `Reader.image`."""
        if self._image is None:
            options = self.options
            decoded: Any = self._array
            if decoded is None:
                decoded = open_image_file(
                    self.source.file,
                    self.name,
                    options.page,
                    options.ignore_exif,
                    keeps_values=options.any_range,
                    num_channels=0 if options.bands is not None else options.num_channels,
                )
            if options.bands is not None:
                decoded = choose_bands(decoded, options.bands, self.name)
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


def read_array_file(source: ImageSource) -> np.ndarray:
    """Read a NumPy file.

    Raises:
        ValueError: if it is damaged, or holds objects.
    """
    try:
        return np.load(source.file, allow_pickle=False)
    except (TokenError, *DECODE_ERRORS) as error:
        raise ValueError(f"{source.name} cannot be read as a NumPy array: {error!s:.300}") from error


def choose_bands(image: Image.Image | np.ndarray, bands: tuple[int, ...], name: str) -> np.ndarray:
    """Return the chosen bands (C, H, W) of an image of any layout.

    Args:
        image: a PIL image, or an array (H, W), (H, W, C) or (C, H, W).
        bands: their numbers, from 1.
        name: what error messages call the image.

    Raises:
        ValueError: if there is no such band.
    """
    if isinstance(image, Image.Image) and image.mode in ("1", "P", "PA"):  # whose values are no intensities
        has_alpha = image.mode == "PA" or "transparency" in image.info
        image = image.convert("L" if image.mode == "1" else "RGBA" if has_alpha else "RGB")
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


@cache
def image_suffixes() -> tuple[str, ...]:
    """Return the endings of the files that a folder is searched for, in lower case."""
    return IMAGE_SUFFIXES + tuple(suffix for reader in _readers() for suffix in getattr(reader, "suffixes", ()))


@cache
def suffixes_of(kind: Kind) -> tuple[str, ...]:
    """Return the endings, in lower case, that readers of one kind declare."""
    readers = [reader for reader in _readers() if getattr(reader, "kind", "") == kind]
    return tuple(suffix for reader in readers for suffix in getattr(reader, "suffixes", ()))


def note_on_videos(paths: Iterable[str | Path]) -> str:
    """Return the end of a message about files of which none is an image: what to do with a video; empty without one."""
    video = next((path for path in paths if str(path).lower().endswith(suffixes_of("video"))), None)
    if video is None:
        return ""
    return (
        f"; {video} is a video, which segformer predict takes: write its frames as images, for instance by ffmpeg -i "
        "VIDEO frames/%06d.png"
    )


def without_suffix(path: str) -> str:
    """Return a path without its ending, which may have two parts if a reader says so.

    Examples:
        >>> from hf_segformer.data.readers import without_suffix
        >>> without_suffix("scans/head.nii.gz"), without_suffix("drive.1/left.png")
        ('scans/head', 'drive.1/left')
    """
    parts = sorted((each for each in image_suffixes() if each.count(".") > 1), key=len, reverse=True)
    ending = next((each for each in parts if path.lower().endswith(each)), "")
    if ending:
        return path[: -len(ending)]
    name, suffix = os.path.splitext(path)
    return path if suffix[1:].isdigit() else name  # a number is no ending, as in 1.2.840.1


def is_listed(path: str) -> bool:
    """Return True for a file that a folder is searched for: by its ending, or where it has none by its content."""
    if path.lower().endswith(image_suffixes()):
        return True
    if os.path.splitext(path)[1].strip(".0123456789"):
        return False
    try:
        return find_reader(ImageSource(path))[0] is not ImageFile
    except OSError:
        return False


def gather(paths: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Join the files of one folder that make up one image, by the readers that claim them.

    Returns:
        the files of each image of several by a name, unique in the folder (empty for the folder's only one), and the
        files that are no images though their reader claims them.
    """
    groups: dict[str, tuple[str, ...]] = {}
    dropped: list[str] = []
    for reader in _readers():
        if hasattr(reader, "gather"):
            found, others = reader.gather([path for path in paths if _is_claimed(reader, path)])
            groups, dropped = {**groups, **found}, [*dropped, *others]
    return groups, dropped


def _is_claimed(reader: Any, path: str) -> bool:
    if path.lower().endswith(IMAGE_SUFFIXES):
        return False
    try:
        return find_reader(ImageSource(path))[0] is reader
    except OSError:
        return False


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
    reader, kind = find_reader(source)
    if options.get("window") and not getattr(reader, "states_window", False):
        raise ValueError(
            f"{source.name} states no window for display; expected its numbers: --value-range window:CENTER,WIDTH"
        )
    if options.get("axis") is not None and kind != "volume":
        raise ValueError(f"{source.name} is no volume that is cut along an axis; leave --axis out")
    return reader(source, ReadOptions(num_channels, **options))


def open_raster(source: Any, num_channels: int = 3, name: str = "", **options: Any) -> Reader:
    """Open a file to be read by tiles, whatever its kind; arguments and errors are those of `open_image`."""
    source = source if isinstance(source, ImageSource) else ImageSource(source, name)
    if options.get("bands") is not None:
        options["bands"] = tuple(options["bands"])
    return find_reader(source, by_tiles=True)[0](source, ReadOptions(num_channels, **options))


def kind_of(source: Any) -> Kind:
    """Return the kind of a file: `"image"`, `"raster"`, `"volume"` or `"video"`; `"image"` if it does not exist.

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


def keeps_identity(path: str) -> bool:
    """Return True for a file whose mask may say who is in the image, if that is asked for; see `Reader`."""
    return os.path.isfile(path) and getattr(find_reader(ImageSource(path))[0], "keeps_identity", False)


def count_pages(source: Any, axis: int | None = None) -> int:
    """Return the number of images in a file: pages, frames, slices, or planes that its axes call so.

    Args:
        source: a path or an `ImageSource`.
        axis: see `ReadOptions`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if a volume cannot be cut so.
    """
    source = source if isinstance(source, ImageSource) else ImageSource(source)
    reader, kind = find_reader(source)
    if kind != "volume":
        return reader.count(source)
    with reader(source, ReadOptions(page=0, axis=axis)) as volume:  # which need not make up one volume
        return volume.num_slices


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
        if source.head.startswith(NUMPY_MAGIC):
            return read_mask(read_array_file(source), source.name)
        return read_mask(source.file, source.name, page=page, ignore_exif=ignore_exif)
    with reader(source, ReadOptions(1, page=page, ignore_exif=ignore_exif, is_mask=True)) as opened:
        check_area(opened.height, opened.width, source.name)
        labels = opened.image()
    if labels.dtype.kind not in "biu":
        raise ValueError(f"{source.name} has dtype {labels.dtype}; expected a mask of integers")
    return labels[0]


def read_color_mask(source: Any, name: str = "", page: int | None = None, ignore_exif: bool = False) -> np.ndarray:
    """Read a mask whose colours are the classes, by the reader that claims it; see `read_whole_mask`.

    A palette's indices become its colours, grey has three equal ones, and an alpha channel is left out.

    Returns:
        integers (H, W), 65536 red + 256 green + blue, masked where the file declares no data.

    Raises:
        ValueError: if it does not hold bytes of one or three bands, or several images.
        OSError: if it cannot be read.
    """
    source = source if isinstance(source, ImageSource) else ImageSource(source, name)
    if find_reader(source)[0] is ImageFile and not source.head.startswith(NUMPY_MAGIC):
        image = open_image_file(source.file, source.name, page, ignore_exif)
        if isinstance(image, Image.Image) and image.format == "JPEG":
            raise ValueError(f"{source.name} is a JPEG file, whose compression changes colours; expected PNG or TIFF")
        pixels: Any = image
        if isinstance(image, Image.Image) and image.mode in _COLOR_MODES:
            pixels = image.convert("RGB")
    else:
        pixels = read_whole_image(source, 3, page=page, ignore_exif=ignore_exif)
    array = np.asanyarray(pixels)
    array = np.moveaxis(array, -1, 0) if isinstance(pixels, Image.Image) and array.ndim == 3 else array
    if array.dtype != np.uint8 or array.ndim != 3 or len(array) != 3:
        raise ValueError(f"{source.name} has no 8-bit colours; expected a mask of red, green and blue")
    red, green, blue = array.astype(np.int32)
    return red * 65536 + green * 256 + blue


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
        mask: the same; polygons have no EXIF either.
    """

    def is_turned(each: Any) -> bool:
        try:
            return isinstance(each, str | dict) and exif_orientation(ImageSource(each).file) != 1
        except (OSError, ValueError):  # polygons are no file, and others are refused where they are read
            return False

    return is_turned(image) and not is_turned(mask)


__all__ = [
    "ENTRY_POINTS",
    "NUMPY_MAGIC",
    "ImageFile",
    "ImageSource",
    "ReadOptions",
    "Reader",
    "Tile",
    "choose_bands",
    "count_pages",
    "find_reader",
    "gather",
    "has_data",
    "image_suffixes",
    "is_hub_file",
    "is_listed",
    "is_turned_alone",
    "keeps_identity",
    "kind_of",
    "note_on_videos",
    "open_image",
    "open_raster",
    "read_array_file",
    "read_color_mask",
    "read_whole_image",
    "read_whole_mask",
    "suffixes_of",
    "without_suffix",
]
