"""Readers of images and masks: one way for every command to open a file, in memory or on disk.

The readers of this package, and those of others that announce a class under the entry points `hf_segformer.readers`,
are asked in turn whether they claim a file (see `reader_protocol`); what none of them claims is read as an ordinary
image by Pillow, or as a NumPy array. Pixels without data are masked, band by band.

Axes: C bands, H height, W width.
"""

import os
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import IMAGE_SUFFIXES
from ..image_io_segformer import check_area, exif_orientation, open_image_file, read_mask, size_in_header
from .image_file import NUMPY_MAGIC, ImageFile, read_array_file
from .reader_protocol import ImageSource, Kind, Reader, ReadOptions

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
    """Return a hint about videos for a message about missing images; empty if there is no video."""
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
        files that are not images though their reader claims them.
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


def image_size(source: Any) -> tuple[int, int]:
    """Return height and width of an image by its header, without decoding its pixels.

    Args:
        source: a path, bytes or an `ImageSource`; no NumPy array.

    Raises:
        ValueError: if it has more pixels than Pillow opens, the file holds several images, or a library is missing.
        OSError: if the header cannot be read.

    Examples:
        >>> import io
        >>> from PIL import Image
        >>> from hf_segformer.data.readers import image_size
        >>> buffer = io.BytesIO()
        >>> Image.new("RGB", (9, 6)).save(buffer, "PNG")
        >>> image_size(buffer)
        (6, 9)
    """
    source = source if isinstance(source, ImageSource) else ImageSource(source)
    reader = find_reader(source)[0]
    if reader is ImageFile:
        return size_in_header(source.file, source.name)
    with reader(source, ReadOptions(0)) as opened:
        return opened.height, opened.width


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


def is_turned_alone(image: Any, mask: Any) -> bool:
    """Return True if EXIF turns an image but not its mask, so that they no longer align.

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
    "count_pages",
    "find_reader",
    "gather",
    "image_size",
    "image_suffixes",
    "is_listed",
    "is_turned_alone",
    "keeps_identity",
    "kind_of",
    "note_on_videos",
    "open_image",
    "open_raster",
    "read_color_mask",
    "read_whole_image",
    "read_whole_mask",
    "suffixes_of",
    "without_suffix",
]
