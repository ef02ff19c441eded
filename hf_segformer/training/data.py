"""Data of a run: the images and masks of a recipe's `[data]`, and the processor that the model is saved with.

Nothing is decoded before it is used; `data_checks.py` reads everything once before a training. Axes: C bands, H W
pixels, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from PIL import Image

from ..config import DataConfig, SplitConfig, check_palette, parse_value_range
from ..configuration_segformer import default_ignore_index
from ..data.decoding import RowReader, array_dtype, file_name
from ..data.label_mapping import build_mapping
from ..data.labeled import open_source
from ..data.readers import is_turned_alone
from ..data.sampling import ClassBalance
from ..image_processing_segformer import SegFormerImageProcessor
from ..visualization import Color, default_palette

_NUM_MEASURED = 100


@dataclass(frozen=True)
class Data:
    """Training and evaluation data with their classes.

    A row has the columns `image`, a Pillow image or, with other than one or three bands, an array (C, H, W), and
    `label`, integers (H, W): 0..K-1, and the processor's `ignore_index` for ignored pixels. A single class
    has the labels 0 and 1.

    Args:
        train: a `Dataset`, or a shuffled `IterableDataset`.
        evaluation: images that are never trained on.
        names: names of the K classes.
        palette: one colour a class.
        processor: prepares whole images for evaluation and inference.
        ignore_exif: True takes images as they are stored.
        balance: how often training images and their classes are drawn; None until they are counted, and where a recipe
            does not balance classes.
    """

    train: Dataset | IterableDataset
    evaluation: Dataset
    names: tuple[str, ...]
    palette: tuple[Color, ...]
    processor: SegFormerImageProcessor
    ignore_exif: bool = False
    balance: ClassBalance | None = None

    @property
    def is_stream(self) -> bool:
        """Return True if `train` has neither length nor indices."""
        return not isinstance(self.train, Dataset)

    def is_turned_alone(self, split: str, index: int) -> bool:
        """Return True if EXIF turns an image but not its mask."""
        if self.ignore_exif or (split == "train" and self.is_stream):
            return False
        row = getattr(self, split).with_format(None)[index]
        return is_turned_alone(row["image"], row["label"])

    def describe(self, split: str, index: int) -> str:
        """Name an image in messages: its file, where it has one, with split and row.

        Args:
            split: `"train"` or `"evaluation"`.
            index: number of the row.
        """
        place = f"{split} row {index}"
        if split == "train" and self.is_stream:
            return place
        path = file_name(getattr(self, split).with_format(None)[index]["image"])
        return f"{path} ({place})" if path else place


def load_data(
    config: DataConfig, num_channels: int = 3, split: SplitConfig | None = None, *, ignore_index: int | None = None
) -> Data:
    """Find or generate the images and masks of a recipe.

    Shapes are evaluated as they are. Real images are evaluated whole, their shorter side resized to
    `config.eval_size`, sides rounded up to multiples of 32, as the paper does (section 4.1). Images of other than
    three bands are normalised by mean and standard deviation of up to a hundred training images, in their own units.
    Folds share one processor, whose size and statistics come from the images of all folds, so that their models can be
    averaged; no mask has a part in them.

    Args:
        config: the table `[data]`.
        num_channels: bands C.
        split: the table `[split]`.
        ignore_index: label of ignored pixels, the model's `semantic_loss_ignore_index`; by default that of a
            new model with as many classes.

    Raises:
        ValueError: if the data do not fit the recipe, or there are no class names.
        OSError: if folders or files are missing or cannot be read.

    Examples:
        >>> from hf_segformer.config import DataConfig
        >>> from hf_segformer.training.data import load_data
        >>> data = load_data(DataConfig("shapes", image_size=32, num_train=2, num_eval=1))
        >>> data.train[1]["label"].shape
        (32, 32)
    """
    source = open_source(config, split)
    names = tuple(config.names) or source.names
    if not names:
        raise ValueError(
            f"the classes of {config.root} have no names: set data.names, or put classes.json beside the data, "
            '{"names": ["road", ...]}'
        )
    mapping = build_mapping(
        len(names),
        reduce_labels=config.reduce_labels,
        label_values=config.label_values,
        ignore_values=(*config.ignore_values, *source.ignore_values),
        mask_colors=config.mask_colors,
        ignore_colors=config.ignore_colors,
        ignore_index=ignore_index,
    )
    reader = RowReader(
        num_channels,
        mapping,
        image_dtype=array_dtype(source.evaluation.features["image"]),
        label_dtype=array_dtype(source.evaluation.features["label"]),
        ignore_exif=config.ignore_exif,
        any_range=bool(config.value_range),
        bands=tuple(config.bands) or None,
        names=names,
    )
    chosen = source.train if config.max_background == 1 else _without_background(source.train, reader, config)
    train = chosen.map(_Row(reader)) if config.streaming else chosen.with_transform(reader)
    evaluation = source.evaluation.with_transform(reader)
    measured = [rows if source.pool is None else source.pool.with_transform(reader) for rows in (train, evaluation)]
    processor = _processor(config, num_channels, len(mapping.values), *measured)
    own = source.palette or tuple((red, green, blue) for red, green, blue in config.mask_colors)
    palette = _palette(config, names, own)
    return Data(train, evaluation, names, palette, processor, config.ignore_exif)


def _without_background(rows: Dataset, reader: RowReader, config: DataConfig) -> Dataset:
    """Leave out images of background at random until their share is `max_background`; every mask is read."""
    decoded = rows.with_transform(reader)
    empty = [index for index in range(len(rows)) if not _shows_a_class(decoded[index]["label"], reader)]
    others, most = len(rows) - len(empty), config.max_background
    allowed = int(most / (1 - most) * others + 1e-9)
    dropped = set(np.random.default_rng(config.seed).permutation(empty)[allowed:].tolist())
    if len(dropped) == len(rows):
        first = reader.names[0] if len(reader.names) > 1 else "background"
        wanted = "other classes" if len(reader.names) > 1 else f"some that show {reader.names[0]}"
        raise ValueError(f"all {len(rows)} training images show nothing but {first}; expected {wanted}")
    return rows.select([index for index in range(len(rows)) if index not in dropped])


def _shows_a_class(labels: np.ndarray, reader: RowReader) -> bool:
    """Return True if any pixel is of another class than the first one."""
    return bool(((labels != 0) & (labels != reader.mapping.ignore_index)).any())


@dataclass(frozen=True)
class _Row:
    """A reader for `IterableDataset.map`, which passes single rows."""

    reader: RowReader

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        image, label = self.reader.read(row["image"], row["label"])
        return {"image": image, "label": label}


def _palette(config: DataConfig, names: Sequence[str], own: tuple[Color, ...]) -> tuple[Color, ...]:
    if config.palette:
        check_palette("data.palette", config.palette, len(names))
        return tuple((red, green, blue) for red, green, blue in config.palette)
    return own if len(own) == len(names) else tuple(default_palette(len(names)))


def _processor(
    config: DataConfig, num_channels: int, num_labels: int, train: Any, evaluation: Dataset
) -> SegFormerImageProcessor:
    size: dict[str, Any] = {"do_resize": False}
    keywords: dict[str, Any] = {
        "value_range": parse_value_range(config.value_range, "data.value_range"),
        "ignore_index": default_ignore_index(num_labels),
    }
    if config.eval_size or config.source != "shapes":
        edge = config.eval_size or min(_bands(evaluation[0]["image"]).shape[1:])
        size = {"size": {"shortest_edge": edge}, "keep_ratio": True, "size_divisor": 32}
    if num_channels == 3:
        return SegFormerImageProcessor(**size, **keywords)
    keywords["image_mean"], keywords["image_std"] = [0.0] * num_channels, [1.0] * num_channels
    unscaled = SegFormerImageProcessor(do_resize=False, do_rescale=False, do_normalize=False, **keywords)
    keywords["image_mean"], keywords["image_std"] = measure_bands(train, unscaled)
    return SegFormerImageProcessor(**size, do_rescale=False, **keywords)


def _bands(image: Image.Image | np.ndarray) -> np.ndarray:
    """A row's image as an array (C, H, W)."""
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1) if isinstance(image, Image.Image) else image


def measure_bands(train: Any, processor: SegFormerImageProcessor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each band over the first images of a stream, or some of the whole data set.

    They are those of the values that the network is fed, on the scale of the value range, and of the pixels that hold
    data.

    Raises:
        ValueError: if a band holds no data in any of them.
    """
    if isinstance(train, Dataset):
        rows = train.select(np.linspace(0, len(train) - 1, min(_NUM_MEASURED, len(train))).astype(int))
    else:
        rows = train.take(_NUM_MEASURED)
    sums = np.zeros((3, len(processor.image_mean)))
    for row in rows:
        pixels = np.ma.MaskedArray(processor.apply_range(row["image"]), dtype=np.float64)
        sums += np.stack([pixels.count((1, 2)), pixels.sum((1, 2)).filled(0), (pixels**2).sum((1, 2)).filled(0)])
    if not sums[0].all():
        band = int(np.argmin(sums[0])) + 1
        raise ValueError(f"band {band} holds no data in the first {_NUM_MEASURED} images; expected some to measure")
    mean = sums[1] / sums[0]
    std = np.sqrt(np.maximum(sums[2] / sums[0] - mean**2, 0))
    return mean.tolist(), np.where(std > 0, std, 1.0).tolist()  # a band that never varies is only centred


__all__ = ["Data", "load_data", "measure_bands"]
