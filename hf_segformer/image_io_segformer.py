"""Reads whatever people call an image or a label map: paths, PIL images of any mode, arrays, tensors.

The image processor needs two things: bands of numbers for the network, and whole numbers for labels. All guessing that
this takes (modes, layout of axes, number ranges) is here, and what can not be guessed safely is refused.

Axes: C bands, H height, W width. Sizes are (height, width).
"""

import io
import os
import struct
import zlib
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import ChannelDimension
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Modes that hold one number a pixel rather than a colour.
_WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_MASK_MODES = ("1", "L", "P", *_WIDE_MODES)
# What Pillow was seen to raise when files were cut and their bytes changed (tests/fuzz_loaders.py).
DECODE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    SystemError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def check_area(height: int, width: int, name: str) -> None:
    """Refuse images that are empty or larger than twice Pillow's limit, where Pillow refuses files.

    Args:
        height: in pixels.
        width: in pixels.
        name: what the error message calls the image.

    Raises:
        ValueError: names the image and its size.
    """
    if height < 1 or width < 1:
        raise ValueError(f"{name} is {height}x{width} (height x width), but it needs at least one pixel")
    if Image.MAX_IMAGE_PIXELS is not None and height * width > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{name} is {height}x{width} (height x width): {height * width} pixels, more than Pillow's limit of "
            f"{2 * Image.MAX_IMAGE_PIXELS} (2 * PIL.Image.MAX_IMAGE_PIXELS); cut it into tiles"
        )


def _named(source: Any, name: str) -> str:
    """What messages call an image: with its file, where it is known."""
    path = source if isinstance(source, str | os.PathLike) else getattr(source, "filename", None)
    path = os.fsdecode(path) if path else ""
    return name if path in name else f"{name}, {path}"


def _load(source: Any, name: str) -> Image.Image | np.ndarray:
    """A path, BytesIO, PIL image, array or tensor -> an upright PIL image or an array; the source stays as it is."""
    try:
        if isinstance(source, str | os.PathLike | io.BytesIO):
            with Image.open(source) as file:
                return ImageOps.exif_transpose(file)
        if isinstance(source, Image.Image):
            source.load()
            upright = source.getexif().get(ExifTags.Base.Orientation, 1) == 1
            return source if upright else ImageOps.exif_transpose(source)
    except (Image.DecompressionBombError, Warning) as error:  # a warning is raised where its user asked for that
        raise ValueError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise OSError(f"{name}: cut off, or not a picture of a kind that Pillow reads") from error
    except OSError as error:  # of a truncated file Pillow says no name
        raise OSError(f"{name}: {error.strerror or error}") from error
    except DECODE_ERRORS as error:
        raise OSError(f"{name}: damaged, {error or type(error).__name__}") from error
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        return (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    if isinstance(source, np.ndarray):
        return source
    raise ValueError(f"{name} is a {type(source).__name__}, but it must be a path, PIL image, NumPy array or tensor")


def flatten(inputs: Any) -> list:
    """Lists, however nested, and arrays with four axes -> one flat list of single images or maps."""
    if isinstance(inputs, list | tuple):
        return [single for item in inputs for single in flatten(item)]
    if isinstance(inputs, np.ndarray | torch.Tensor) and inputs.ndim == 4:
        return list(inputs)
    return [inputs]


def _channels_first(array: np.ndarray, num_channels: int, data_format: str | None, name: str) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (C, H, W), a view; grey repeats where three channels are wanted."""
    shape = array.shape
    if array.ndim == 2:
        array = array[None]
    elif array.ndim != 3:
        raise ValueError(f"{name} has shape {shape}, but it must be (H, W), (H, W, C) or (C, H, W)")
    elif data_format is not None:
        array = np.moveaxis(array, 0 if ChannelDimension(data_format) == "channels_first" else -1, 0)
    else:
        counts = (3, 1) if num_channels == 3 else (num_channels,)
        axes = [axis for count in counts for axis in (0, -1) if shape[axis] == count]
        # With no fitting axis the shorter one is named as the bands, below.
        array = np.moveaxis(array, axes[0] if axes else (-1 if shape[-1] < shape[0] else 0), 0)
    height, width = array.shape[1:]
    check_area(height, width, name)
    if len(array) == 1 and num_channels == 3:
        return np.broadcast_to(array, (3, height, width))
    if len(array) != num_channels:
        raise ValueError(
            f"{name} has {len(array)} bands (shape {shape}), but image_mean and image_std hold {num_channels}: "
            "give one mean and one standard deviation for each band"
        )
    return array


def _values(array: np.ndarray, name: str) -> np.ndarray:
    """Numbers of any type -> uint8 where they stand for a picture's bytes, else floats."""
    kind = array.dtype.kind
    if kind not in "biuf":
        raise ValueError(f"{name} has dtype {array.dtype}, but pixels are integers, floats or booleans")
    if kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite values")
    if array.dtype == np.uint8:
        return array
    if kind == "b":
        return array.astype(np.uint8) * 255
    if len(array) != 3:
        return array.astype(np.float32)
    if kind == "u" and array.dtype.itemsize == 2:
        if 0 < array.max() <= 255:
            logger.warning_once(
                "A uint16 picture without any value above 255 is divided by 257 like every uint16 picture and becomes "
                'nearly black: where its values are bytes, give image.astype("uint8").'
            )
        # 257 = 65535 / 255: white stays white.
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    fits = array.min() >= 0 and array.max() <= 255
    if kind == "f":
        # Whole numbers in floats are bytes for Transformers, too.
        return array.astype(np.uint8) if fits and np.array_equal(array, np.trunc(array)) else array
    if not fits:
        raise ValueError(
            f"{name} has dtype {array.dtype} and values from {array.min()} to {array.max()}, but a picture's lie in "
            "0 to 255; give 16-bit pictures as uint16, other measurements as float32"
        )
    return array.astype(np.uint8)


def read_image(source: Any, num_channels: int, data_format: str | None, name: str) -> Image.Image | np.ndarray:
    """Reads one image; three channels mean a picture, any other number means bands of measurements.

    A PIL picture stays one, since PIL resizes it without a detour over an array. Mode I stands for uint16 where its
    values lie in 0 to 65535 and one exceeds 255, since Pillow opens 16-bit PGM files so; up to 255 they are bytes.

    Args:
        source: a path, a file's bytes as BytesIO, PIL image, array or tensor; never changed.
        num_channels: how many channels are wanted.
        data_format: `"channels_first"` or `"channels_last"` for an array with three axes; None looks for the axis
            that has as many entries as channels are wanted, first before last.
        name: what error messages call the image.

    Returns:
        A PIL image of mode RGB (three channels) or L (one), or a (C, H, W) array of uint8 or floats.

    Raises:
        ValueError: if bands, values or size do not fit; the message says how.
        OSError: if a file can not be opened, or is truncated.
    """
    name = _named(source, name)
    image = _load(source, name)
    if isinstance(image, Image.Image):
        check_area(image.height, image.width, name)
        mode = {1: "L", 3: "RGB"}.get(num_channels)
        if mode is not None and image.mode not in (*_WIDE_MODES, "F"):
            if image.mode != mode and image.info.get("transparency") is not None:
                # Pillow warns of palettes with transparency unless they go by RGBA.
                image = image.convert("RGBA")
            return image if image.mode == mode else image.convert(mode)
        array = np.asarray(image)
        if image.mode == "I" and array.min() >= 0 and 255 < array.max() <= 65535:
            array = array.astype(np.uint16)
        image, data_format = array, "channels_last"
    return _values(_channels_first(image, num_channels, data_format, name), name)


def read_mask(source: Any, name: str) -> np.ndarray:
    """Reads one label map; a palette's indices are the labels, whatever its colours.

    Args:
        source: a path, PIL image, array or tensor; never changed.
        name: what error messages call the map.

    Returns:
        An (H, W) array of integers or booleans.

    Raises:
        ValueError: if it holds colours or floats.
        OSError: if a file can not be opened.
    """
    name = _named(source, name)
    mask = _load(source, name)
    if isinstance(mask, Image.Image):
        if mask.mode not in _MASK_MODES:
            raise ValueError(
                f"{name} is a PIL image of mode {mask.mode}, but a segmentation map holds one whole number a pixel "
                f"(modes {', '.join(_MASK_MODES)}): turn colours into ids first"
            )
        mask = np.asarray(mask)
    shape = mask.shape
    if mask.ndim == 3 and 1 in (shape[0], shape[-1]):
        mask = mask[0] if shape[0] == 1 else mask[..., 0]
    if mask.ndim != 2:
        raise ValueError(f"{name} has shape {shape}, but a segmentation map is (H, W): turn colours into ids first")
    if mask.dtype.kind not in "biu":
        raise ValueError(f"{name} has dtype {mask.dtype}, but a segmentation map holds whole numbers")
    return mask


__all__ = ["DECODE_ERRORS", "check_area", "flatten", "read_image", "read_mask"]
