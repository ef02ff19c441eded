"""Volumes: what the readers of DICOM and NIfTI share.

A volume is a number of slices of one size, (C, H, W) each. What can be known from the header is checked before any
pixel is read.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..data.reader_protocol import ImageSource, Kind, ReadOptions, Tile, choose_bands
from ..files import is_full
from ..image_io_segformer import DECODE_ERRORS, check_area
from ..inference.areas import Spacing

INSTALL = "pip install 'hf-segformer[medical]'"
MOST_VOXELS = 1 << 30
_quiet = threading.RLock()


class Volume:
    """An open volume; see `data.reader_protocol.Reader` and `inference.volumes.VolumeReader`.

    Args:
        source: the file, or the files of a series.
        options: of reading.

    Attributes:
        name: what error messages call it.
        height: of a slice, in pixels.
        width: of a slice, in pixels.
        num_slices: number of slices.
        num_bands: number of bands of a slice.
        dtype: dtype of the pixels.
        spacing: distance of slices, rows and columns in mm, None where it is not known.
        quotes_fields: errors of the libraries may quote fields that name a person; messages name only their kind.
    """

    kind: Kind = "volume"
    states_window, quotes_fields = True, False
    mask_reader = "hf_segformer.medical.masks:read_labels"
    suffixes: tuple[str, ...] = ()
    name: str
    height: int
    width: int
    num_slices: int
    num_bands: int
    dtype: np.dtype
    spacing: Spacing
    may_lack_data = False

    def __init__(self, source: ImageSource, options: ReadOptions):
        self.source, self.options, self.name = source, options, source.name
        self._guard("", self._open)

    @classmethod
    def count(cls, source: ImageSource) -> int:
        """See `data.reader_protocol.Reader.count`."""
        with cls(source, ReadOptions(page=0)) as volume:
            return volume.num_slices

    @property
    def nodata(self) -> tuple[float | None, ...]:
        """None for each band: no value stands for no data."""
        return (None,) * self.num_bands

    def _open(self) -> None:
        """Set the attributes from the header, or raise ValueError."""
        raise NotImplementedError

    def _slice(self, index: int) -> np.ndarray:
        """Read a slice (H, W) or (C, H, W)."""
        raise NotImplementedError

    def slice(self, index: int) -> np.ndarray:
        """Read a slice (C, H, W), masked where it holds no data.

        Args:
            index: from 0.

        Raises:
            ValueError: if its values need a value range that is not given, or the bands do not exist.
            OSError: if the file is cut short or damaged.
        """
        pixels = self._guard(f", slice {index + 1}", self._slice, index)
        pixels = pixels[None] if pixels.ndim == 2 else pixels
        options = self.options
        if options.bands is not None:
            pixels = choose_bands(pixels, options.bands, self.name)
        if options.num_channels == 3 and pixels.dtype != np.uint8 and not (options.any_range or options.is_mask):
            low, high = (pixels.min(), pixels.max()) if pixels.size else (0, 0)
            raise ValueError(
                f"{self.name} holds values in units of its own, from {low:g} to {high:g} in slice {index + 1}; "
                "expected a value range: --value-range LOW,HIGH or window:CENTER,WIDTH in these units (in recipes "
                "data.value_range), or of predict window for what the file states"
            )
        return pixels

    def image(self) -> np.ndarray:
        """Return the slice of `ReadOptions.page`, or the only one; see `data.reader_protocol.Reader.image`."""
        page = self.options.page
        if page is None and self.num_slices > 1:
            raise ValueError(
                f"{self.name} holds {self.num_slices} slices; expected one image: read them as separate images with "
                "pages (--pages, data.pages=true), or predict them as one volume by segformer predict"
            )
        if page is not None and page >= self.num_slices:
            raise ValueError(f"{self.name} has no slice {page + 1}; expected at most {self.num_slices}")
        return self.slice(page or 0)

    def grid(self) -> np.ndarray | None:
        """Return the matrix (4, 4) from column, row and slice, from 0, to mm; None where it is not known.

        Axes point to the right, to the front and upwards.
        """
        return None

    def read(self, tile: Tile) -> tuple[np.ndarray, np.ndarray | None]:
        """See `data.reader_protocol.Reader.read`."""
        pixels = self.image()[:, tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
        return pixels, None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave: no file stays open."""

    def check_size(self) -> None:
        """Raise ValueError for slices, or a volume, that are larger than may be read."""
        check_area(self.height, self.width, self.name)
        if self.num_slices * self.height * self.width > MOST_VOXELS:
            raise ValueError(
                f"{self.name} is {self.num_slices} slices of {self.height}x{self.width}; expected at most "
                f"{MOST_VOXELS} voxels: cut it into parts"
            )

    def require(self, package: str, format_name: str) -> None:
        """Raise ValueError if a package is not installed."""
        try:
            is_there = find_spec(package) is not None
        except ValueError:  # a module that was blocked
            is_there = False
        if not is_there:
            raise ValueError(f"{self.name} is a {format_name} file, which needs {package}: {INSTALL}")

    def _guard(self, place: str, read: Callable, *arguments: Any) -> Any:
        """Call a function; name the file in its errors."""
        try:
            with quiet():
                return read(*arguments)
        except decode_errors() as error:
            names = (self.name, *map(str, self.source.files))
            if is_full(error) or (isinstance(error, OSError | ValueError) and str(error).startswith(names)):
                raise
            text = type(error).__name__ if self.quotes_fields else describe(error)
            raise OSError(f"{self.name}{place} is cut short, damaged or unusual: {text:.300}") from error


def decode_errors() -> tuple[type[BaseException], ...]:
    """Return what reading a damaged file may raise: with pydicom also errors that are neither values' nor files'."""
    pydicom = sys.modules.get("pydicom.errors")
    return (*DECODE_ERRORS, *((pydicom.BytesLengthException, pydicom.InvalidDicomError) if pydicom else ()))


def describe(error: BaseException) -> str:
    """Return the text of an error in one line; only its kind where the text may quote a file's bytes."""
    is_quoting = type(error).__module__.startswith("pydicom")
    return type(error).__name__ if is_quoting else " ".join(str(error).split()) or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, which name tags and their values; in one thread at a time, as the filters are the process's."""
    with _quiet, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale values from low..high to 0..255, clipped and rounded, as uint8."""
    scaled = (values.astype(np.float64) - low) * (255.0 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


__all__ = ["INSTALL", "MOST_VOXELS", "Volume", "decode_errors", "describe", "quiet", "to_bytes"]
