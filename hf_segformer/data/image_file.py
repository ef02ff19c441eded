"""Reader of ordinary image files, by Pillow, and of NumPy arrays.

Axes: C bands, H height, W width, h w a tile's sides.
"""

from tokenize import TokenError
from typing import Any

import numpy as np
from PIL import Image

from ..image_io_segformer import DECODE_ERRORS, count_images, open_image_file, read_image
from .reader_protocol import ImageSource, Kind, ReadOptions, Tile, choose_bands

NUMPY_MAGIC = b"\x93NUMPY"


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
        """Dtype of the pixels."""
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


__all__ = ["NUMPY_MAGIC", "ImageFile", "read_array_file"]
