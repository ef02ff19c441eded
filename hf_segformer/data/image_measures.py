"""Measures of stored images: size, bands, dtype, and the part of the type's range that is used.

Axes: C bands, H W pixels.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..image_io_segformer import open_image_file
from .decoding import file_name
from .image_file import NUMPY_MAGIC, ImageFile, read_array_file
from .reader_protocol import ImageSource, ReadOptions, Tile
from .readers import find_reader

NARROW = 0.25  # share of the value range below which a network hardly sees differences
_LARGEST_TILE = 1024
_GREY_MODES, _ALPHA_MODES = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"), ("LA", "PA", "RGBA")


class ImageMeasure(NamedTuple):
    """Measures of one image.

    Attributes:
        name: its file, for messages.
        height: H.
        width: W.
        num_bands: C, without an alpha channel; a palette has the 3 of its colours.
        dtype: name of the NumPy dtype.
        low: lowest value.
        high: highest value.
    """

    name: str
    height: int
    width: int
    num_bands: int
    dtype: str
    low: float
    high: float


def measure_image(value: Any, dtype: str | None, page: int | None = None, ignore_exif: bool = False) -> ImageMeasure:
    """Measure an image as it is stored; of a raster, a tile in its middle.

    Args:
        value: of a row: a path, a stored file or an array.
        dtype: dtype of images that are stored as arrays.
        page: which image of a file with several.
        ignore_exif: keep the sides as they are stored.

    Raises:
        ValueError: if it is no image.
        OSError: if the file cannot be read.
    """
    name = file_name(value) or "an image"
    if not isinstance(value, str | dict):
        return _measure_array(np.asarray(value, dtype=dtype), name)
    source = ImageSource(value, name)
    reader = find_reader(source)[0]
    if reader is not ImageFile:
        with reader(source, ReadOptions(0, page=page, ignore_exif=ignore_exif)) as opened:
            height, width = (min(side, _LARGEST_TILE) for side in (opened.height, opened.width))
            corner = (opened.height - height) // 2, (opened.width - width) // 2
            pixels = opened.read(Tile(*corner, height, width))[0]
            return _measure(pixels, name, (opened.height, opened.width), opened.num_bands)
    if source.head.startswith(NUMPY_MAGIC):
        return _measure_array(read_array_file(source), name)
    image = open_image_file(source.file, name, page, ignore_exif, num_channels=3)
    return _measure_image(image, name) if isinstance(image, Image.Image) else _measure_array(image, name)


def _measure_image(image: Image.Image, name: str) -> ImageMeasure:
    size, num_bands = (image.height, image.width), 1 if image.mode in _GREY_MODES else 3
    if image.mode in _ALPHA_MODES or image.mode in ("1", "P"):
        image = image.convert("L" if image.mode in ("LA", "1") else "RGB")
    array = np.asarray(image)
    if array.dtype == np.int32 and array.min() >= 0 and array.max() <= 0xFFFF:  # mode I: 16 bits of some formats
        array = array.astype(np.uint16)
    return _measure(array, name, size, num_bands)


def _measure_array(array: np.ndarray, name: str) -> ImageMeasure:
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; expected an image (H, W), (H, W, C) or (C, H, W)")
    array = array[None] if array.ndim == 2 else array
    array = array if array.shape[0] < array.shape[-1] else np.moveaxis(array, -1, 0)
    return _measure(array, name, (array.shape[1], array.shape[2]), len(array))


def _measure(pixels: np.ndarray, name: str, size: tuple[int, int], num_bands: int) -> ImageMeasure:
    known = pixels.compressed() if isinstance(pixels, np.ma.MaskedArray) else pixels
    limits = (float(known.min()), float(known.max())) if known.size else (math.nan, math.nan)
    return ImageMeasure(name, *size, num_bands, pixels.dtype.name, *limits)


def count_bands(images: Sequence[ImageMeasure]) -> int:
    """Return the number of bands of all images; grey ones among colours count as colours.

    Raises:
        ValueError: if they differ otherwise; the message names two files.
    """
    found = {image.num_bands: image.name for image in reversed(images)}
    if {*found} == {1, 3}:
        return 3
    if len(found) > 1:
        (one, first), (other, second) = sorted(found.items())[:2]
        raise ValueError(f"{first} has {one} bands and {second} {other}; expected one number: set data.bands")
    return next(iter(found))


def find_dtype(images: Sequence[ImageMeasure]) -> str:
    """Return the dtype that holds the values of all images."""
    return str(np.result_type(*{image.dtype for image in images}))


def used_share(images: Sequence[ImageMeasure], dtype: str) -> float | None:
    """Return the share of an integer type's range that all images together use; None for floats, or without values."""
    lows = [image.low for image in images if not math.isnan(image.low)]
    if np.dtype(dtype).kind not in "iu" or not lows:
        return None
    limits = np.iinfo(dtype)
    high = max(image.high for image in images if not math.isnan(image.high))
    return (high - min(lows)) / (limits.max - limits.min)


def range_of_bits(images: Sequence[ImageMeasure]) -> str:
    """Return the range of the fewest bits that hold all values, `"0,4095"` for 12, as `data.value_range` takes it."""
    high = max(image.high for image in images if not math.isnan(image.high))
    return f"0,{2 ** max(1, int(high).bit_length()) - 1}"


__all__ = ["NARROW", "ImageMeasure", "count_bands", "find_dtype", "measure_image", "range_of_bits", "used_share"]
