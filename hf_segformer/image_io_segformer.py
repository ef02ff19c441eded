"""Decoding of images and masks: paths, bytes, PIL images of any mode, arrays and tensors.

The image processor needs bands of numbers for the network and integers for labels. Everything that has to be inferred
for that (modes, layout of axes, number ranges) is inferred here, and what cannot be inferred safely is refused. Files
are opened by their content, and only in the formats of `IMAGE_FORMATS`: a name's ending decides nothing, and formats
that run other programs (EPS) are never tried. Sizes are checked from the header, before pixels are decoded.

Pixels without data are the masked ones of a `numpy.ma.MaskedArray`, band by band.

Axes: C bands, H height, W width. Sizes are (height, width).
"""

import io
import os
import struct
import sys
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from transformers.image_utils import ChannelDimension

# Pillow's readers that decode pixels by themselves.
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "DIB", "GIF", "JPEG2000", "AVIF", "PPM", "TGA")
# Modes that hold one number a pixel rather than a colour.
_WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_MASK_MODES = ("1", "L", "P", *_WIDE_MODES)
# Formats that are recognized only to name them in errors, by offset and first bytes.
_FOREIGN = {
    "a DICOM file: export its frames as PNG or TIFF": (128, b"DICM"),
    "a PostScript file": (0, b"%!PS"),
    "a PostScript file with a preview": (0, b"\xc5\xd0\xd3\xc6"),
    "a PDF file": (0, b"%PDF"),
    "an HDF5 or NetCDF file: export its arrays as TIFF": (0, b"\x89HDF"),
    "a virtual raster (VRT): its name has to end in .vrt": (0, b"<VRTDataset"),
    "an XML or SVG file": (0, b"<?xml"),
}
# Errors that Pillow raises for cut and damaged files (found by tests/support/fuzz_loaders.py).
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
# Factors by which Pillow stretches grey of 2 and 4 bits to 8, by the end of its raw mode ("L;4", "L;2IR").
_STRETCH = {"2": 85, "4": 17}
_GREY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601), as Pillow has it
_ORIENTATION = ExifTags.Base.Orientation
_UNDO = {  # the operation that turns an upright image back into the stored one, by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def check_area(height: int, width: int, name: str) -> None:
    """Refuse images that are empty or larger than twice Pillow's limit, where Pillow refuses files.

    Args:
        height: in pixels.
        width: in pixels.
        name: name of the image in the error message.

    Raises:
        ValueError: names the image and its size.
    """
    if height < 1 or width < 1:
        raise ValueError(f"{name} is {height}x{width} (height x width); expected at least one pixel")
    if Image.MAX_IMAGE_PIXELS is not None and height * width > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{name} is {height}x{width} (height x width), {height * width} pixels; {_limit()}")


def _limit() -> str:
    """Return the end of a message about an image that is too large."""
    return (
        f"expected at most Pillow's limit, {2 * (Image.MAX_IMAGE_PIXELS or 0)} (2 * PIL.Image.MAX_IMAGE_PIXELS): "
        "cut it into tiles"
    )


def image_name(source: Any, name: str) -> str:
    """Return the name of an image for messages, with its file where that is known."""
    path = source if isinstance(source, str | os.PathLike) else getattr(source, "filename", None)
    path = os.fsdecode(path) if path else ""
    return name if path in name else f"{name}, {path}"


@cache
def _formats() -> tuple[str, ...]:
    """Return the allowed formats that this build of Pillow reads."""
    Image.init()
    return tuple(each for each in IMAGE_FORMATS if each in Image.OPEN)


def open_image_file(
    source: Any,
    name: str,
    page: int | None = None,
    ignore_exif: bool = False,
    check_size: Callable[[int, int], None] | None = None,
    keeps_values: bool = False,
    num_channels: int = 0,
    is_mask: bool = False,
) -> Image.Image | np.ndarray:
    """Decode a file of one of `IMAGE_FORMATS`, recognized by its content.

    Args:
        source: a path, or a file's bytes as BytesIO.
        name: name of the image in error messages.
        page: which image of a file with several (a TIFF's pages, an animation's frames), from 0; None expects one.
        ignore_exif: keep the image as it is stored, whatever its EXIF orientation.
        check_size: called with height and width before pixels are decoded.
        keeps_values: return the stored values of PGM and PPM files of less than 8 bits, which stand for 0 to 255
            otherwise. Those of more than 8 bits are always kept.
        num_channels: for colours of 16 bits: 1 makes them grey, 3 leaves out an alpha band, 0 keeps all bands.
        is_mask: grey values are labels: return those that the file stores, whatever their number of bits and which of
            them is white.

    Returns:
        the decoded image, upright unless `ignore_exif` is set; colours of 16 bits, which Pillow has no mode for, as
        uint16 (H, W, C) or (H, W), and so is grey that has an alpha band.

    Raises:
        ValueError: if it is too large, holds several images, or values that Pillow cannot keep.
        OSError: if it cannot be opened, is cut short or damaged.
    """
    try:
        with Image.open(source, formats=_formats()) as file:
            check_area(file.height, file.width, name)
            if check_size is not None:
                _check_either(check_size, *file.size)
            frames = _frames(file)
            if page is None and len(frames) > 1:
                raise ValueError(
                    f"{name} holds {len(frames)} images; expected one: read them as separate images with pages "
                    "(--pages, data.pages=true), or store the one that is meant as a file of its own"
                )
            if page is not None and page >= len(frames):
                raise ValueError(f"{name} has no page {page + 1}; expected at most {len(frames)}")
            if frames[page or 0]:
                file.seek(frames[page or 0])
                check_area(file.height, file.width, name)
            return _decode(file, source, name, ignore_exif, keeps_values, num_channels, is_mask)
    except Image.DecompressionBombError as error:  # it names the number of pixels
        raise ValueError(f"{name}: {str(error).partition(',')[0]}; {_limit()}") from error
    except Warning as error:  # raised where a filter asks for it
        raise ValueError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise OSError(f"{name}: {_unidentified(source)}") from error
    except OSError as error:  # Pillow does not name a truncated file
        raise OSError(f"{name}: {error.strerror or error}") from error
    except DECODE_ERRORS as error:
        if isinstance(error, ValueError) and str(error).startswith(name):  # one of those above
            raise
        raise OSError(f"{name}: damaged, {error or type(error).__name__}") from error


def _decode(
    file: ImageFile.ImageFile,
    source: Any,
    name: str,
    ignore_exif: bool = False,
    keeps_values: bool = False,
    num_channels: int = 0,
    is_mask: bool = False,
) -> Image.Image | np.ndarray:
    """Decode the present frame of an open file, of a path or BytesIO; see `open_image_file`."""
    if file.format == "TIFF" and _orientation(file) in (5, 6, 7, 8):
        file.filename = ""  # Pillow maps uncompressed files by name, with the sides swapped (Pillow 12.3)
    maxval, raw_mode = _maxval(file), _raw_mode(file)
    image = _as_stored(file) if ignore_exif else ImageOps.exif_transpose(file)
    if _low_bytes(raw_mode):
        rest = _decode_low_bytes(source, file.tell(), ignore_exif)
        return _join_bytes(np.asarray(image), np.asarray(rest), raw_mode, num_channels)
    if maxval is not None:
        image = _with_stored_values(image, maxval, keeps_values or is_mask, name)
    if is_mask:
        image = _with_stored_labels(image, raw_mode, file.format)
    image.format = file.format
    return image


def _loses_values(image: Image.Image, is_mask: bool) -> bool:
    """Return True for an image that is not decoded yet if Pillow changes its values then, and no longer says how."""
    if image.format not in _formats() or getattr(image, "fp", None) is None:
        return False
    raw_mode = _raw_mode(image)
    is_changed_grey = is_mask and _grey_changes(raw_mode, image.format) != (1, False)
    return is_changed_grey or bool(_low_bytes(raw_mode)) or _maxval(image) not in (None, 255, 65535)


def _decode_copy(image: Any, name: str, **options: Any) -> Image.Image | np.ndarray:
    """Decode the file of a PIL image that is not decoded yet, and leave it so; options are those of `_decode`."""
    position = image.fp.tell()
    image.fp.seek(0)
    content = io.BytesIO(image.fp.read())
    image.fp.seek(position)
    with Image.open(content, formats=_formats()) as copy:
        if image.tell():
            copy.seek(image.tell())
        return _decode(copy, content, name, **options)


def _check_either(check_size: Callable[[int, int], None], width: int, height: int) -> None:
    """Check a size of which EXIF may swap the sides; EXIF of a PNG may follow its pixels, which are not decoded yet."""
    try:
        check_size(height, width)
    except ValueError as error:
        try:
            check_size(width, height)
        except ValueError:
            raise error from None


def _as_stored(file: Image.Image) -> Image.Image:
    """Return an image without regard to its EXIF orientation, and without it, so that nothing turns it later."""
    turn = _orientation(file) if file.format == "TIFF" else 1
    file.load()  # which turns a TIFF upright by itself
    image = file.transpose(_UNDO[turn]) if turn in _UNDO else file.copy()
    for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        image.info.pop(key, None)
    return image


def _raw_mode(file: Image.Image) -> str:
    """Return how a file that is not decoded yet stores its pixels, by Pillow's name; empty if that is not known."""
    tiles = getattr(file, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    found = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return found if isinstance(found, str) else ""


def _low_bytes(raw_mode: str) -> str:
    """Return the raw mode that reads the bytes which Pillow leaves out of colours of 16 bits; empty for others."""
    if raw_mode == "LA;16B":
        return "RGBA"  # all four bytes of a pixel
    bands, _, order = raw_mode.partition(";16")
    order = sys.byteorder[0].upper() if order == "N" else order
    other = {"B": "L", "L": "B"}.get(order)
    return f"{bands};16{other}" if other and bands in ("RGB", "RGBA", "RGBX") else ""


def _decode_low_bytes(source: Any, frame: int, ignore_exif: bool) -> Image.Image:
    """Decode a file of 16-bit colours once more, for the bytes that Pillow leaves out."""
    with Image.open(source, formats=_formats()) as file:
        if frame:
            file.seek(frame)
        file.filename = ""  # see `_decode`
        low = _low_bytes(_raw_mode(file))
        file.tile = [
            tile._replace(args=(low, *tile.args[1:]) if isinstance(tile.args, tuple) else low) for tile in file.tile
        ]
        return _as_stored(file) if ignore_exif else ImageOps.exif_transpose(file)


def _join_bytes(high: np.ndarray, low: np.ndarray, raw_mode: str, num_channels: int) -> np.ndarray:
    """Join two decodings of a file of 16-bit colours to uint16; see `open_image_file`."""
    if raw_mode == "LA;16B":
        return low[..., 0].astype(np.uint16) << 8 | low[..., 1]
    joined = high.astype(np.uint16) << 8 | low
    if num_channels == 1:
        return np.rint(joined[..., :3] @ np.array(_GREY)).astype(np.uint16)
    return joined[..., :3] if num_channels == 3 else joined


def _maxval(file: Image.Image) -> int | None:
    """Return the largest value by the header of a PGM or PPM file; None for others, and once pixels are decoded."""
    tiles = getattr(file, "tile", None)
    if file.format != "PPM" or not tiles or file.mode not in ("L", "I", "RGB"):
        return None
    arguments = tiles[0][3]  # a mode, or a mode and the largest value
    return arguments[-1] if isinstance(arguments, tuple) else 65535 if file.mode == "I" else 255


def _with_stored_values(image: Image.Image, maxval: int, keeps_values: bool, name: str) -> Image.Image:
    """Undo Pillow's stretch of a PGM or PPM file from 0..maxval to all of 8 or 16 bits."""
    if image.mode == "I":
        return Image.fromarray(np.rint(np.asarray(image) * (maxval / 65535)).astype(np.uint16))
    if maxval == 255 or not keeps_values:
        return image
    if maxval > 255:
        raise ValueError(f"{name} is a PPM file of colours up to {maxval}, read as 8 bits; expected a PNG or TIFF file")
    return Image.fromarray(np.rint(np.asarray(image) * (maxval / 255)).astype(np.uint8))


def _grey_changes(raw_mode: str, file_format: str | None) -> tuple[int, bool]:
    """Return by which factor Pillow stretches grey of few bits, and True if it inverts a TIFF file whose 0 is white."""
    mode, _, layout = raw_mode.partition(";")
    if mode not in ("1", "L"):
        return 1, False
    return _STRETCH.get(layout[:1], 1), file_format == "TIFF" and "I" in layout  # a PBM file cannot choose its white


def _with_stored_labels(image: Image.Image, raw_mode: str, file_format: str | None) -> Image.Image:
    """Undo Pillow's stretch and inversion of grey."""
    factor, is_inverted = _grey_changes(raw_mode, file_format)
    values = ~np.asarray(image) if is_inverted else np.asarray(image)
    values = values // np.uint8(factor) if factor > 1 else values
    return Image.fromarray(values) if is_inverted or factor > 1 else image


def count_images(source: Any, name: str = "the image") -> int:
    """Return the number of images in a file: a TIFF's pages, an animation's frames, 1 for others.

    Raises:
        OSError: if the file cannot be read.
    """
    try:
        with Image.open(source, formats=_formats()) as file:
            return len(_frames(file))
    except (Warning, *DECODE_ERRORS) as error:
        raise OSError(f"{name}: {error or type(error).__name__}") from error


def size_in_header(source: Any, name: str = "the image") -> tuple[int, int]:
    """Return height and width of an upright image without decoding its pixels.

    EXIF that follows the pixels of a PNG is not used, since only decoding finds it.

    Raises:
        ValueError: if it has more pixels than Pillow opens.
        OSError: if the header cannot be read.
    """
    try:
        with Image.open(source, formats=_formats()) as file:
            if file.format == "TIFF" and (frame := _frames(file)[0]):  # after a thumbnail
                file.seek(frame)
            orientation = Image.Image.getexif(file).get(_ORIENTATION, 1)  # that of PNG files decodes their pixels
            return file.size if orientation in (5, 6, 7, 8) else file.size[::-1]
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error}") from error
    except (Warning, *DECODE_ERRORS) as error:
        raise OSError(f"{name}: {error or type(error).__name__}") from error


def exif_orientation(source: Any) -> int:
    """Return the EXIF orientation of a file, 1 (upright) where it has none or cannot be read."""
    try:
        with Image.open(source, formats=_formats()) as file:
            return _orientation(file)
    except (Warning, *DECODE_ERRORS):
        return 1


def _orientation(file: Image.Image) -> int:
    return file.getexif().get(_ORIENTATION, 1)


def _frames(file: Image.Image) -> list[int]:
    """Return the frames that are images of their own: no thumbnails, pyramid levels or masks of a TIFF page."""
    number = getattr(file, "n_frames", 1)
    if number == 1 or file.format == "MPO":  # a camera's JPEG: further frames are previews and depth
        return [0]
    if file.format != "TIFF":
        return list(range(number))
    frames = []
    for frame in range(number):
        file.seek(frame)
        if not file.tag_v2.get(254, 0) & 5:  # type: ignore[attr-defined]  # NewSubfileType: reduced, mask
            frames.append(frame)
    file.seek(0)
    return frames or [0]


def _unidentified(source: Any) -> str:
    """Return why Pillow opens a file in none of the allowed formats."""
    try:
        if isinstance(source, io.BytesIO):
            head = source.getvalue()[:256]
        else:
            with open(source, "rb") as file:
                head = file.read(256)
    except OSError:
        head = b""
    for kind, (offset, magic) in _FOREIGN.items():
        if head[offset:].lstrip().startswith(magic):
            return kind
    return f"cut off, or not an image in one of the formats that are read ({', '.join(IMAGE_FORMATS)})"


def _load(
    source: Any,
    name: str,
    page: int | None = None,
    check_size: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Image.Image | np.ndarray:
    """Decode a path, BytesIO, PIL image, array or tensor to an upright PIL image or an array; copy, never modify."""
    if isinstance(source, str | os.PathLike | io.BytesIO):
        return open_image_file(source, name, page, check_size=check_size, **options)
    if isinstance(source, Image.Image):
        try:
            if _loses_values(source, options.get("is_mask", False)):
                return _decode_copy(source, name, **options)
            source.load()
            is_upright = options.get("ignore_exif") or source.getexif().get(_ORIENTATION, 1) == 1
            return source if is_upright else ImageOps.exif_transpose(source)
        except (Image.DecompressionBombError, Warning) as error:
            raise ValueError(f"{name}: {error}") from error
        except OSError as error:
            raise OSError(f"{name}: {error.strerror or error}") from error
        except DECODE_ERRORS as error:
            raise OSError(f"{name}: damaged, {error or type(error).__name__}") from error
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        return (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    if isinstance(source, np.ndarray):
        return source
    raise ValueError(f"{name} is a {type(source).__name__}; expected a path, PIL image, NumPy array or tensor")


def flatten(inputs: Any) -> list:
    """Turn nested lists and arrays with four axes into one flat list of single images or masks."""
    if isinstance(inputs, list | tuple):
        return [single for item in inputs for single in flatten(item)]
    if isinstance(inputs, np.ndarray | torch.Tensor) and inputs.ndim == 4:
        return list(inputs)
    return [inputs]


def _channels_first(
    array: np.ndarray, num_channels: int, data_format: str | None, name: str, convert_rgb: bool
) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (C, H, W), a view; grey repeats where three channels are wanted."""
    shape = array.shape
    if array.ndim == 2:
        array = array[None]
    elif array.ndim != 3:
        raise ValueError(f"{name} has shape {shape}; expected (H, W), (H, W, C) or (C, H, W)")
    elif data_format is not None:
        array = np.moveaxis(array, 0 if ChannelDimension(data_format) == "channels_first" else -1, 0)
    else:
        counts = (3, 1) if num_channels == 3 else (num_channels,)
        axes = [axis for count in counts for axis in (0, -1) if shape[axis] == count]
        # Where no axis fits, the message below calls the shorter one the bands.
        array = np.moveaxis(array, axes[0] if axes else (-1 if shape[-1] < shape[0] else 0), 0)
    height, width = array.shape[1:]
    check_area(height, width, name)
    if len(array) == 1 and num_channels == 3 and convert_rgb:
        return _repeated(array)
    if len(array) != num_channels:
        raise ValueError(
            f"{name} has {len(array)} bands (shape {shape}); expected {num_channels}, as many as image_mean and "
            "image_std have entries: give one mean and one standard deviation for each band, or choose bands by their "
            "numbers, from 1 (--bands, data.bands)"
        )
    return array


def _native(image: Image.Image | np.ndarray) -> np.ndarray:
    """Return the pixels as an array in this machine's byte order: `np.uint16` is no other."""
    array = np.asanyarray(image)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _repeated(array: np.ndarray) -> np.ndarray:
    """(1, H, W) -> (3, H, W), a view, masked where the band is."""
    shape = (3, *array.shape[1:])
    if isinstance(array, np.ma.MaskedArray):
        return np.ma.MaskedArray(np.broadcast_to(array.data, shape), np.broadcast_to(np.ma.getmaskarray(array), shape))
    return np.broadcast_to(array, shape)


def _check_values(array: np.ndarray, name: str, any_range: bool) -> np.ndarray:
    """Refuse values that are not pixels; return uint8 where whole numbers of 0 to 255 make a colour image."""
    kind = array.dtype.kind
    if kind not in "biuf":
        raise ValueError(f"{name} has dtype {array.dtype}; expected integers, floats or booleans")
    if kind == "f" and not np.isfinite(array).all():  # masked pixels may hold any value
        raise ValueError(
            f"{name} holds NaN or infinite values where no no-data value is declared: declare it in the file "
            "(rio edit-info --nodata nan FILE), or give a numpy.ma.MaskedArray that masks them"
        )
    if array.dtype == np.uint8:
        return array
    if kind == "b":
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16 and (any_range or len(array) == 3):
        return array
    if any_range or len(array) != 3:
        return array.astype(np.float32)
    known = array.compressed() if isinstance(array, np.ma.MaskedArray) else array
    low, high = (known.min(), known.max()) if known.size else (0, 0)
    fits = low >= 0 and high <= 255
    if kind == "f":
        # Transformers, too, takes whole numbers in floats for bytes.
        return array.astype(np.uint8) if fits and np.array_equal(known, np.trunc(known)) else array
    if not fits:
        raise ValueError(
            f"{name} has dtype {array.dtype} and values from {low} to {high}; expected 0 to 255, or uint16: give "
            "16-bit images as uint16, other measurements as float32, or set value_range"
        )
    return array.astype(np.uint8)


def read_image(
    source: Any,
    num_channels: int,
    data_format: str | None,
    name: str,
    any_range: bool = False,
    convert_rgb: bool = True,
    **options: Any,
) -> Image.Image | np.ndarray:
    """Decode one image; three channels mean a colour image, any other number means bands of measurements.

    An 8-bit PIL image stays one, since PIL resizes it without a detour over an array. PGM and PNG files of mode I are
    uint16. Other images of mode I are uint16 where their values are from 0 to 65535 and one exceeds 255; up to 255 they
    are bytes.

    Args:
        source: a path, a file's bytes as BytesIO, PIL image, array (masked where there is no data) or tensor; never
            modified.
        num_channels: number of channels C that are wanted.
        data_format: `"channels_first"` or `"channels_last"` for an array with three axes; None looks for the axis
            that has as many entries as channels are wanted, first before last.
        name: name of the image in error messages.
        any_range: take a colour image's integers whatever their range, since a value range is applied to them.
        convert_rgb: turn grey, palette, CMYK and alpha images into RGB where three channels are wanted.
        **options: `page`, `ignore_exif` and `check_size` of `open_image_file`.

    Returns:
        A PIL image of mode RGB (three channels) or L (one), or a (C, H, W) array of uint8, uint16 or floats.

    Raises:
        ValueError: if bands, values or size do not fit; the message gives the remedy.
        OSError: if a file cannot be opened, or is truncated.
    """
    name = image_name(source, name)
    image = _load(source, name, keeps_values=any_range, num_channels=num_channels, **options)
    if isinstance(image, Image.Image):
        check_area(image.height, image.width, name)
        mode = {1: "L", 3: "RGB"}.get(num_channels)
        if mode == "RGB" and image.mode != mode and not convert_rgb:
            raise ValueError(f"{name} has mode {image.mode}; expected RGB, since do_convert_rgb is False")
        if mode is not None and image.mode not in (*_WIDE_MODES, "F"):
            if image.mode != mode and image.info.get("transparency") is not None:
                # Pillow warns about palettes with transparency unless they are converted by way of RGBA.
                image = image.convert("RGBA")
            return image if image.mode == mode else image.convert(mode)
        array = np.asarray(image)
        if image.mode == "I" and array.min() >= 0 and array.max() <= 65535:
            is_16_bit = image.format in ("PPM", "PNG") or array.max() > 255
            array = array.astype(np.uint16) if is_16_bit else array
        image, data_format = array, "channels_last"
    image = _native(image)
    return _check_values(_channels_first(image, num_channels, data_format, name, convert_rgb), name, any_range)


def read_mask(source: Any, name: str, **options: Any) -> np.ndarray:
    """Decode one mask; the stored values are the labels, of a palette its indices, whatever their colours.

    Args:
        source: a path, a file's bytes as BytesIO, PIL image, array or tensor; never modified.
        name: name of the mask in error messages.
        **options: `page` and `ignore_exif` of `open_image_file`.

    Returns:
        An (H, W) array of integers or booleans.

    Raises:
        ValueError: if it holds colours or floats.
        OSError: if a file cannot be opened.
    """
    name = image_name(source, name)
    mask = _load(source, name, is_mask=True, **options)
    if isinstance(mask, Image.Image):
        if mask.format == "JPEG":
            raise ValueError(f"{name} is a JPEG file, whose compression changes labels; expected PNG or TIFF")
        if mask.mode not in _MASK_MODES:
            raise ValueError(
                f"{name} is a PIL image of mode {mask.mode}; expected one integer a pixel (modes "
                f"{', '.join(_MASK_MODES)}): convert colours to labels first"
            )
    mask = _native(mask)
    shape = mask.shape
    if mask.ndim == 3 and 1 in (shape[0], shape[-1]):
        mask = mask[0] if shape[0] == 1 else mask[..., 0]
    if mask.ndim != 2:
        raise ValueError(f"{name} has shape {shape}; expected a mask (H, W): convert colours to labels first")
    if mask.dtype.kind not in "biu":
        raise ValueError(f"{name} has dtype {mask.dtype}; expected a mask of integers")
    return mask


__all__ = [
    "DECODE_ERRORS",
    "IMAGE_FORMATS",
    "check_area",
    "count_images",
    "exif_orientation",
    "flatten",
    "image_name",
    "open_image_file",
    "read_image",
    "read_mask",
    "size_in_header",
]
