"""Mapping of mask values to labels.

After it labels are 0..K-1, and one further value stands for pixels that do not count. Axes: K classes, H W pixels.
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
        ignore: mask values that do not count, even those of classes. 255 and `ignore_index` are among them unless
            `values` has them.
        ignore_index: label of pixels that do not count, by default that of a model with as many classes.

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
        """Map mask values (H, W) to labels (H, W); masked pixels, which hold no data, do not count.

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
            raise ValueError(f"{name} holds {', '.join(map(str, strange[:_NUM_SHOWN]))}{more}; expected {self}")
        return labels

    def __str__(self) -> str:
        values = self.values
        is_range = len(values) > 2 and values == tuple(range(values[0], values[-1] + 1))
        shown = f"{values[0]} to {values[-1]}" if is_range else ", ".join(map(str, values))
        return f"the classes {shown}, or {', '.join(map(str, sorted(self._ignored))) or 'nothing'} for ignored pixels"

    @property
    def _ignored(self) -> set[int]:
        return {*self.ignore, *({IGNORE_INDEX, self.ignore_index} - {*self.values})}

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


def class_values(
    num_classes: int, reduce_labels: bool, label_values: Sequence[int], setting: str = "data.label_values"
) -> tuple[int, ...]:
    """Return the mask value of each label; a single class has two, without and with it.

    Args:
        num_classes: K.
        reduce_labels: classes begin at 1, and 0 does not count.
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


__all__ = ["LabelMapping", "class_values"]
