"""Files and rows -> pictures and label maps, when they are asked for.

Here alone it is decided which label a pixel has: after this, labels are 0..K-1, and 255 is what does not count.
Axes: C bands, H W pixels, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..image_io_segformer import DECODE_ERRORS, read_image, read_mask

IGNORE_INDEX = 255

_NUMPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_UNKNOWN = 256


@dataclass(frozen=True)
class LabelMapping:
    """Which value of a label map stands for which class.

    Args:
        values: what the maps hold for classes 0, 1, ...; a single class has two, without and with it.
        ignore: values that do not count. 255 is one of them, unless `values` has it.

    Example:
        >>> import numpy as np
        >>> from hf_segformer.data.decoding import LabelMapping
        >>> LabelMapping(values=(0, 255)).apply(np.array([[0, 255]]), "mask.png").tolist()
        [[0, 1]]
    """

    values: tuple[int, ...]
    ignore: tuple[int, ...] = ()

    def apply(self, labels: np.ndarray, name: str) -> np.ndarray:
        """Values (H, W) -> labels, uint8 (H, W).

        Raises:
            ValueError: if a value is neither a class nor ignored; the message has `name`, the values and what is right.
        """
        table = self._table
        if labels.dtype == np.uint8:  # the table has an entry for each, and this is done for every picture
            result = table[labels]
        else:
            labels = labels.astype(np.int64)
            result = np.where((labels < 0) | (labels >= len(table)), _UNKNOWN, table[labels.clip(0, len(table) - 1)])
        strange = np.unique(labels[result == _UNKNOWN]).tolist()
        if strange:
            shown = ", ".join(map(str, strange[:8])) + (f" and {len(strange) - 8} more" if len(strange) > 8 else "")
            raise ValueError(f"{name} holds {shown}, but the {self}")
        return result.astype(np.uint8)

    def __str__(self) -> str:
        values = self.values
        is_range = len(values) > 2 and values == tuple(range(values[0], values[-1] + 1))
        shown = f"{values[0]} to {values[-1]}" if is_range else ", ".join(map(str, values))
        ignored = sorted({*self.ignore, *({IGNORE_INDEX} - {*values})})
        return f"classes are {shown}, ignored is {', '.join(map(str, ignored)) or 'nothing'}"

    @cached_property
    def _table(self) -> np.ndarray:
        known = {IGNORE_INDEX: IGNORE_INDEX, **{value: label for label, value in enumerate(self.values)}}
        known |= dict.fromkeys(self.ignore, IGNORE_INDEX)
        table = np.full(max(256, *known) + 1, _UNKNOWN, dtype=np.uint16)
        table[list(known)] = list(known.values())
        return table


@dataclass(frozen=True)
class RowReader:
    """Reads rows, whose columns `image` and `label` are paths, encoded files or arrays; for `with_transform`.

    Args:
        num_channels: bands C of a picture.
        rule: of the labels.
        image_dtype: of pictures that are stored as arrays.
        label_dtype: of label maps that are stored as arrays.
    """

    num_channels: int
    rule: LabelMapping
    image_dtype: str | None = None
    label_dtype: str | None = None

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Columns of rows -> columns of pictures, as `read_image` gives them, and labels, uint8 (H, W).

        Raises:
            ValueError: if picture and label map do not fit; names their files.
            OSError: if a file can not be read.
        """
        pairs = [self.read(image, label) for image, label in zip(batch["image"], batch["label"], strict=True)]
        return {"image": [image for image, _ in pairs], "label": [label for _, label in pairs]}

    def read(self, image: Any, label: Any) -> tuple[Image.Image | np.ndarray, np.ndarray]:
        """One picture and its labels; see `__call__`."""
        image_name, label_name = file_name(image) or "the picture", file_name(label) or "the label map"
        pixels = read_picture(image, self.num_channels, self.image_dtype)
        values = read_mask(_open(label, label_name, 1, self.label_dtype), label_name)
        size = (pixels.height, pixels.width) if isinstance(pixels, Image.Image) else pixels.shape[1:]
        if values.shape != tuple(size):
            raise ValueError(
                f"{label_name} is {values.shape[0]}x{values.shape[1]} (height x width), but its picture {image_name} "
                f"is {size[0]}x{size[1]}"
            )
        return pixels, self.rule.apply(values, label_name)


def read_picture(source: Any, num_channels: int, dtype: str | None = None) -> Image.Image | np.ndarray:
    """A path, an encoded file or an array of that type -> a picture, as `read_image` gives it.

    Raises:
        ValueError: if it does not fit; names its file.
        OSError: if the file can not be read.
    """
    name = file_name(source) or "the picture"
    return read_image(_open(source, name, num_channels, dtype), num_channels, None, name)


def file_name(source: Any) -> str | None:
    """The file that a row's value comes from, where it says so."""
    return source.get("path") if isinstance(source, dict) else source if isinstance(source, str) else None


def array_dtype(feature: Any) -> str | None:
    """The number type of a column that holds arrays or nested lists."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return getattr(feature, "dtype", None)


def _open(source: Any, name: str, num_channels: int, dtype: str | None) -> Image.Image | np.ndarray:
    """A path, an encoded file or an array -> a picture that Pillow opened, or an array."""
    if source is None:
        raise ValueError(f"{name} is missing: the row holds nothing there")
    if not isinstance(source, str | dict):
        return np.asarray(source, dtype=dtype)
    content = _content(source, name)
    if content.startswith(_NUMPY):
        try:
            return np.load(BytesIO(content), allow_pickle=False)
        except (TokenError, *DECODE_ERRORS) as error:
            raise ValueError(f"{name} can not be read as a NumPy array: {error!s:.300}") from error
    try:
        picture = Image.open(BytesIO(content))
    except (Image.DecompressionBombError, Warning) as error:
        raise ValueError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        if content.startswith(_TIFF):
            return _open_tiff(content, name)
        raise OSError(f"{name} is cut off, or not a picture of a kind that Pillow reads") from error
    except DECODE_ERRORS as error:
        raise OSError(f"{name} is damaged: {error or type(error).__name__}") from error
    if content.startswith(_TIFF) and num_channels not in (1, 3) and len(picture.getbands()) != num_channels:
        return _open_tiff(content, name)
    return picture


def _content(source: str | dict[str, Any], name: str) -> bytes:
    if isinstance(source, dict) and source.get("bytes") is not None:
        return source["bytes"]
    if "://" in name:  # of a stream from the Hub
        import fsspec

        with fsspec.open(name) as file:
            return file.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise OSError(f"can not read {name}: {error.strerror or error}") from error


def _open_tiff(content: bytes, name: str) -> np.ndarray:
    """A TIFF with more bands, or wider ones, than Pillow has modes for."""
    try:
        import tifffile
    except ImportError as error:
        raise OSError(f"{name} needs tifffile for its bands: pip install 'hf-segformer[geo]'") from error
    try:
        return tifffile.imread(BytesIO(content))
    except (tifffile.TiffFileError, *DECODE_ERRORS) as error:
        raise OSError(f"can not read {name}: {str(error) or type(error).__name__:.300}") from error


def class_values(
    num_classes: int, reduce_labels: bool, label_values: Sequence[int], setting: str = "data.label_values"
) -> tuple[int, ...]:
    """What label maps hold for each label: a single class is told from its absence, so that it takes two.

    Args:
        num_classes: K.
        reduce_labels: whether classes begin at 1, and 0 does not count.
        label_values: the values, if they are others.
        setting: what the message calls `label_values`.

    Raises:
        ValueError: if `label_values` does not have as many entries.
    """
    num_labels = max(num_classes, 2)
    if label_values and len(label_values) != num_labels:
        raise ValueError(f"{setting} has {len(label_values)} entries, but {num_labels} are needed")
    return tuple(label_values) or tuple(range(reduce_labels, num_labels + reduce_labels))
