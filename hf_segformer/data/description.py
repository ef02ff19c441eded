"""Description of a folder or Hub data set of images with masks: where they are, and what their values mean.

`describe_data` finds the layout, measures a sample, and says by which `[data]` table the data are read. Nothing is
guessed: where two readings fit, it refuses and names the setting that decides. Axes: H W pixels, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

_NO_CHOICES: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class DataDescription:
    """Layout, meaning and measures of a data set.

    Attributes:
        layout: its name, for people.
        tables: keyword arguments of `DataConfig` that read exactly these data; only what differs from the defaults.
        mask_kind: `"indices"`, `"palette"`, `"colors"`, `"binary"` or `"polygons"`.
        names: names of the K classes; one for a binary task.
        names_source: where the names come from: `"classes.json"`, `"label_colors.txt"`, `"features"`, `"data.names"`,
            the layout's own, or `"generic"` for `"class 0"` and so on.
        num_channels: bands of the images as stored: 1 for grey, 3 for colours; an alpha channel does not count.
        image_dtype: NumPy name of their type.
        value_share: part of the integer type's range that the sampled images use, from 0 to 1; None for floats.
        sizes: (H, W) of the sampled images.
        num_train: number of training images.
        num_eval: number of evaluation images.
        class_shares: for each label (two for a binary task) its share of the counted pixels of the sampled masks.
        class_image_shares: for each label the share of the sampled masks that hold it.
        num_sampled: number of masks that were read.
        notes: what was found and decided, one line each.
    """

    layout: str
    tables: dict[str, Any]
    mask_kind: str
    names: tuple[str, ...]
    names_source: str
    num_channels: int
    image_dtype: str
    value_share: float | None
    sizes: tuple[tuple[int, int], ...]
    num_train: int
    num_eval: int
    class_shares: tuple[float, ...]
    class_image_shares: tuple[float, ...]
    num_sampled: int
    notes: tuple[str, ...]


def describe_data(root: str, choices: Mapping[str, Any] = _NO_CHOICES) -> DataDescription:
    """Find the layout of a data set, and measure a seeded sample of it.

    Args:
        root: a folder, or a Hub data set as `owner/name`.
        choices: keys of the table `[data]` that the user has given; they settle what is ambiguous, and win.

    Raises:
        ValueError: if there is no known layout, or two readings fit; the message names the setting for each.
        OSError: if there is no such folder or data set, or a file cannot be read.
    """
    raise NotImplementedError


__all__ = ["DataDescription", "describe_data"]
