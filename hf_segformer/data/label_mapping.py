"""Mapping of mask values, integers or colours, to labels.

After it labels are 0..K-1, and one further value stands for ignored pixels. A colour is one integer,
65536 red + 256 green + blue. Axes: K classes, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..configuration_segformer import default_ignore_index
from ..files import IGNORE_INDEX

_NUM_SHOWN = 8


@dataclass(frozen=True)
class LabelMapping:
    """Mapping from the values of a mask to labels.

    Args:
        values: mask values of classes 0, 1, ..., any integers; a single class has two, without and with it.
        ignore: mask values to ignore, even those of classes. 255 and `ignore_index` are among them unless
            `values` has them.
        ignore_index: label of ignored pixels, by default that of a model with as many classes.
        are_colors: values are colours, as `pack_color` gives them, of which none is ignored unless `ignore` has it.

    Raises:
        ValueError: if `ignore_index` is the label of a class.

    Examples:
        >>> import numpy as np
        >>> from hf_segformer.data.label_mapping import LabelMapping
        >>> LabelMapping(values=(0, 255)).apply(np.array([[0, 255]]), "mask.png").tolist()
        [[0, 1]]
        >>> LabelMapping(values=(-1, 1), ignore=(0,)).apply(np.array([[-1, 0, 1]]), "mask.tif").tolist()
        [[0, 255, 1]]
    """

    values: tuple[int, ...]
    ignore: tuple[int, ...] = ()
    ignore_index: int = None  # type: ignore[assignment]
    are_colors: bool = False

    def __post_init__(self):
        if self.ignore_index is None:
            object.__setattr__(self, "ignore_index", default_ignore_index(len(self.values)))
        if 0 <= self.ignore_index < len(self.values):
            raise ValueError(
                f"ignore_index is {self.ignore_index}, a label of {len(self.values)} classes; expected -100"
            )

    @property
    def dtype(self) -> np.dtype:
        """The smallest integer type that holds every label, uint8 for up to 255 classes."""
        return np.result_type(np.min_scalar_type(self.ignore_index), np.min_scalar_type(len(self.values) - 1))

    def apply(self, mask: np.ndarray, name: str) -> np.ndarray:
        """Map mask values (H, W) to labels (H, W); masked pixels, which hold no data, are ignored.

        Args:
            mask: integers of any type, or booleans.
            name: what the error message calls it.

        Raises:
            ValueError: if a value is neither a class nor ignored; the message has `name`, the values and the remedy.
        """
        no_data = np.ma.getmaskarray(mask) if isinstance(mask, np.ma.MaskedArray) else None
        values = np.ma.getdata(mask)
        if no_data is not None:  # whatever is stored there
            values = np.where(no_data, values.dtype.type(0), values)
        if values.dtype == np.uint8:  # one look-up an entry: this runs for every image
            labels, known = (table[values] for table in self._bytes)
        else:
            labels, known = self._look_up(values)
        if no_data is not None:
            labels, known = np.where(no_data, labels.dtype.type(self.ignore_index), labels), known | no_data
        if not known.all():
            strange = np.unique(values[~known]).tolist()
            more = f" and {len(strange) - _NUM_SHOWN} more" if len(strange) > _NUM_SHOWN else ""
            keys = ("mask-colors", "ignore-colors") if self.are_colors else ("label-values", "ignore-values")
            classes, ignored = (f"--{key}, data.{key.replace('-', '_')}" for key in keys)
            raise ValueError(
                f"{name} holds {self._format(strange[:_NUM_SHOWN])}{more}; expected {self}: name others as classes "
                f"({classes}) or leave them out ({ignored})"
            )
        return labels

    def __str__(self) -> str:
        values = self.values
        is_range = len(values) > 2 and values == tuple(range(values[0], values[-1] + 1))
        shown = f"{values[0]} to {values[-1]}" if is_range and not self.are_colors else self._format(values)
        return f"the classes {shown}, or {self._format(sorted(self._ignored)) or 'nothing'} for ignored pixels"

    def _format(self, values: Sequence[int]) -> str:
        return ", ".join(str(unpack_color(value) if self.are_colors else value) for value in values)

    @property
    def _ignored(self) -> set[int]:
        return {*self.ignore, *(set() if self.are_colors else {IGNORE_INDEX, self.ignore_index} - {*self.values})}

    @cached_property
    def _bytes(self) -> tuple[np.ndarray, np.ndarray]:
        return self._look_up(np.arange(256))

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Known values in ascending order, and their labels."""
        known = {value: label for label, value in enumerate(self.values)}
        known |= dict.fromkeys(self._ignored, self.ignore_index)
        order = sorted(known)
        return np.array(order, np.int64), np.array([known[value] for value in order]).astype(self.dtype)

    def _look_up(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return labels of values of any shape, and a mask of the known ones."""
        order, labels = self._sorted
        is_small = values <= np.iinfo(np.int64).max if values.dtype == np.uint64 else True
        values = values.astype(np.int64)
        places = np.searchsorted(order, values).clip(max=len(order) - 1)
        return labels[places], (order[places] == values) & is_small


def pack_color(color: Sequence[int]) -> int:
    """Return the integer that stands for a colour.

    Examples:
        >>> from hf_segformer.data.label_mapping import pack_color, unpack_color
        >>> pack_color([0, 1, 2]), unpack_color(258)
        (258, [0, 1, 2])
    """
    red, green, blue = color
    return red << 16 | green << 8 | blue


def unpack_color(value: int) -> list[int]:
    """Return [red, green, blue] of the integer that stands for a colour."""
    return [value >> 16 & 255, value >> 8 & 255, value & 255]


def build_mapping(
    num_classes: int,
    *,
    reduce_labels: bool = False,
    label_values: Sequence[int] = (),
    ignore_values: Sequence[int] = (),
    mask_colors: Sequence[Sequence[int]] = (),
    ignore_colors: Sequence[Sequence[int]] = (),
    ignore_index: int | None = None,
    setting: str = "data.{}",
) -> LabelMapping:
    """Return the mapping for masks of integers, or of colours where `mask_colors` are given.

    Args:
        num_classes: K; a binary task has the labels 0 and 1.
        reduce_labels: classes begin at 1, and 0 is ignored.
        label_values: the mask value of each class, if they are not 0, 1, 2 and so on.
        ignore_values: mask values to ignore, beside 255.
        mask_colors: the colour of each class.
        ignore_colors: colours to ignore.
        ignore_index: label of ignored pixels, by default that of a model with as many classes.
        setting: what messages call a setting, with a field for its name.

    Raises:
        ValueError: if there is not one value, or colour, a class.
    """
    if mask_colors:
        colors = [pack_color(color) for color in mask_colors]
        values = class_values(num_classes, False, colors, _spell(setting, "mask_colors"))
        return LabelMapping(values, tuple(map(pack_color, ignore_colors)), ignore_index, True)  # type: ignore[arg-type]
    values = class_values(num_classes, reduce_labels, label_values, _spell(setting, "label_values"))
    ignore = {*ignore_values, *((0,) if reduce_labels and not label_values else ())}
    return LabelMapping(values, tuple(sorted(ignore)), ignore_index)  # type: ignore[arg-type]


def _spell(setting: str, name: str) -> str:
    return setting.format(name.replace("_", "-") if setting.startswith("--") else name)


def class_values(
    num_classes: int, reduce_labels: bool, label_values: Sequence[int], setting: str = "data.label_values"
) -> tuple[int, ...]:
    """Return the mask value of each label; a single class has two, without and with it.

    Args:
        num_classes: K.
        reduce_labels: classes begin at 1, and 0 is ignored.
        label_values: the values, if they are others.
        setting: what the message calls `label_values`.

    Raises:
        ValueError: if `label_values` does not have as many entries, or one twice.
    """
    num_labels = max(num_classes, 2)
    if label_values and len(label_values) != num_labels:
        raise ValueError(f"{setting} has {len(label_values)} entries; expected {num_labels}, one a class")
    if len(set(label_values)) < len(label_values):
        raise ValueError(f"{setting} is {list(label_values)}; expected a value of its own for each class")
    return tuple(label_values) or tuple(range(reduce_labels, num_labels + reduce_labels))


__all__ = ["LabelMapping", "build_mapping", "class_values", "pack_color", "unpack_color"]
