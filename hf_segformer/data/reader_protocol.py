"""Protocol of image readers, and what they are given: the file, the options of reading, and tiles.

A `Reader` claims a file by its content and says its kind: an image, which is read as a whole, a raster, which is read
and predicted by tiles, a volume, which is read and predicted slice by slice, or a video, which is predicted frame by
frame. `readers` finds the one for a file.

Axes: C bands, H height, W width, h w a tile's sides.
"""

import os
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

Kind = Literal["image", "raster", "volume", "video"]

_HEAD = 4096  # bytes that readers claim a file by
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
        num_channels: number of channels that the model takes; 0 is any, for a raster. For 0 and 3 a palette is
            read as its three colours.
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
    `gather(paths)`, which joins files of one folder that make up one image (see `readers.gather`), `states_window`,
    True if its files may state a window for display, `keeps_identity`, True if a mask may name the person of the image,
    and for volumes `mask_reader`, `module:function`, which reads the mask of a slice (see `medical.masks.read_labels`).

    Attributes:
        name: what error messages call it.
        kind: `"image"`, to be read as a whole, `"raster"`, to be read and predicted by tiles, `"volume"`, to be read
            and predicted slice by slice (see `inference.volumes.VolumeReader`), or `"video"`, which only a writer of
            videos reads.
        height: in pixels.
        width: in pixels.
        num_bands: number of bands that are read.
        dtype: dtype of the pixels.
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


def has_data(image: Image.Image | np.ndarray) -> np.ndarray | None:
    """Return where any band of an image (C, H, W) holds data, bool (H, W); None where all of it does."""
    if not isinstance(image, np.ma.MaskedArray) or not np.ma.is_masked(image):
        return None
    valid = np.asarray(~np.ma.getmaskarray(image).all(axis=0))
    return None if valid.all() else valid


__all__ = ["ImageSource", "Kind", "ReadOptions", "Reader", "Tile", "choose_bands", "has_data", "is_hub_file"]
