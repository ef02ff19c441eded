"""PyTorch data sets of training and evaluation samples.

Training samples are augmented, normalized, padded to one size and, if that is on, mixed with another one. A sample
depends on its key and the seed alone, so that it is the same whatever the number of workers or processes, and in a
resumed run.

Axes: C bands, H W pixels of an image, S side of the crop.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, Sampler

from ..config import AugmentationConfig
from ..image_io_segformer import read_mask
from ..image_processing_segformer import SegFormerImageProcessor
from .custom import CustomAugmentation
from .mixing import draw_mix, paste
from .reader_protocol import has_data
from .sampling import ClassBalance, SampleKey
from .transforms import augment


class Sample(NamedTuple):
    """A decoded row.

    Attributes:
        image: (C, H, W), uint8, or float32.
        labels: int64 (H, W).
        is_byte_scaled: the image is on the scale of 0 to 255.
    """

    image: Tensor
    labels: Tensor
    is_byte_scaled: bool


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """Return the one source of randomness of the sample of a key."""
    entropy = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy))


class KeyedDataset(Dataset):
    """A data set whose samples depend on a seed and on their key (epoch, index) alone.

    `SegFormerTrainer` draws the keys by `EpochSampler`.

    Attributes:
        balance: how often images and classes are drawn; None takes each image once.
    """

    balance: ClassBalance | None = None


class KeyedStream(IterableDataset):
    """A stream of such samples, pass after pass without an end: `max_steps` says when a Trainer stops.

    Since it does not end, a resumed Trainer, which counts a stream as one epoch, finds its place again.

    Args:
        dataset: a `datasets.IterableDataset`; shuffle it before. Each of several workers gets shards of its own.
        columns: names of the columns to read.
    """

    def __init__(self, dataset: Any, columns: Sequence[str]):
        self.dataset, self.columns = dataset, list(columns)

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield rows with the number of the pass."""
        rows = self.dataset.select_columns(self.columns)  # a copy: workers share the original's epoch
        for epoch in count(self.dataset.epoch):
            rows.set_epoch(epoch)
            row = None
            for row in rows:
                yield epoch, row
            if row is None:  # fewer shards than workers
                return


class _Transform:
    """Transform of an image (C, H, W) and labels (H, W) to augmented, normalized and padded tensors."""

    def __init__(self, augmentation: AugmentationConfig, processor: SegFormerImageProcessor, seed: int):
        self.augmentation, self.processor, self.seed = augmentation, processor, seed
        self.custom = CustomAugmentation(augmentation.custom) if augmentation.custom else None
        self.mixed_share = augmentation.cutmix + augmentation.classmix

    def generator(self, *key: int) -> torch.Generator:
        """The one source of randomness of the sample of a key."""
        return keyed_generator(self.seed, *key)

    def __call__(self, sample: Sample, generator: torch.Generator, focus: int | None = None) -> dict[str, Tensor]:
        ignore_index, side = self.processor.ignore_index, self.augmentation.crop_size
        image, labels = augment(
            sample.image, sample.labels, self.augmentation, generator, ignore_index, sample.is_byte_scaled, focus
        )
        if self.custom is not None:
            image, labels = self.custom(image, labels, generator)
        pixels = torch.from_numpy(self.processor.scale(image.numpy()))
        right, below = (side - each for each in (pixels.shape[2], pixels.shape[1]))
        if min(right, below) < 0:
            raise ValueError(
                f"augmentation.custom {self.augmentation.custom} returned {pixels.shape[1]}x{pixels.shape[2]} pixels; "
                f"expected at most the crop's {side} either way"
            )
        return {
            "pixel_values": F.pad(pixels, (0, right, 0, below)),
            "labels": F.pad(labels.long(), (0, right, 0, below), value=ignore_index),
        }

    def draws_mix(self, generator: torch.Generator) -> bool:
        """Draw whether a sample is mixed with another one."""
        return self.mixed_share > 0 and torch.rand((), generator=generator).item() < self.mixed_share

    def mix(self, sample: dict[str, Tensor], other: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Paste a part of another sample into one."""
        return paste(sample, other, draw_mix(sample, other, self.augmentation, generator, self.processor.ignore_index))


def decode_row(row: dict[str, Any], processor: SegFormerImageProcessor, name: str) -> Sample:
    """Decode columns `image` and `label` of a row in the size of the image.

    Args:
        row: values that `SegFormerImageProcessor` takes: paths, PIL images, arrays; pixels that are masked in all bands
            get the label `processor.ignore_index`.
        processor: whose channels and value range apply.
        name: what an error calls the image.

    Raises:
        ValueError: if image or mask do not fit, or their sizes differ.
        OSError: if a file cannot be read.
    """
    decoded = processor.decode(row["image"], name, is_resized=False)
    labels = read_mask(row["label"], f"mask of {name}").astype(np.int64)
    if decoded.size != labels.shape:
        sizes = ["x".join(map(str, shape)) for shape in (decoded.size, labels.shape)]
        raise ValueError(f"{name} is {sizes[0]} (height x width), but its mask {sizes[1]}; expected one size")
    bands = decoded.bands if decoded.bands.dtype == np.uint8 else decoded.bands.astype(np.float32)
    labels = ignore_no_data(labels, row["image"], processor.ignore_index)
    return Sample(torch.from_numpy(bands.copy()), torch.from_numpy(labels), decoded.is_byte_scaled)


def ignore_no_data(labels: np.ndarray, image: Any, ignore_index: int) -> np.ndarray:
    """Return labels (H, W) with `ignore_index` where an image (C, H, W) is masked in all bands."""
    valid = has_data(image) if isinstance(image, np.ndarray) and image.ndim == 3 else None
    return labels if valid is None or valid.shape != labels.shape else np.where(valid, labels, ignore_index)


class TrainDataset(KeyedDataset):
    """Augmented, normalized training samples of one size, for a Trainer.

    With a pair (epoch, index) or a `SampleKey` for an index, as `EpochSampler` gives it, a sample depends on the seed
    and that key alone, the one that is mixed into it too. With a plain index, as a Trainer's own sampler gives it,
    PyTorch's global generator augments it.

    Args:
        dataset: rows with columns `image` and `label`: a `datasets.Dataset`, or anything with a length and indices.
        augmentation: options of the augmentation.
        processor: whose value range, mean, standard deviation and `ignore_index` apply.
        seed: of the augmentation.
        balance: how often images and classes are drawn, for `augmentation.class_balance`.
        final_epoch: first epoch whose crops have a side of `augmentation.final_crop_size`, and None without that
            option. Samples of a plain index belong to none.

    Raises:
        ValueError: if `augmentation.class_balance` is on without `balance`, or `augmentation.final_crop_size` without
            `final_epoch`, or `augmentation.custom` names nothing.

    Examples:
        >>> from PIL import Image
        >>> from hf_segformer import SegFormerImageProcessor
        >>> from hf_segformer.config import AugmentationConfig
        >>> from hf_segformer.data.torch_datasets import TrainDataset
        >>> rows = [{"image": Image.new("RGB", (64, 48)), "label": Image.new("L", (64, 48))}]
        >>> dataset = TrainDataset(rows, AugmentationConfig(crop_size=32), SegFormerImageProcessor(), seed=0)
        >>> {name: tuple(values.shape) for name, values in dataset[0, 0].items()}
        {'pixel_values': (3, 32, 32), 'labels': (32, 32)}
    """

    def __init__(
        self,
        dataset: Any,
        augmentation: AugmentationConfig,
        processor: SegFormerImageProcessor,
        seed: int = 0,
        balance: ClassBalance | None = None,
        final_epoch: int | None = None,
    ):
        if augmentation.class_balance and balance is None:
            raise ValueError(
                f"augmentation.class_balance is {augmentation.class_balance} without counts of the classes; expected "
                "TrainDataset(..., balance=ClassBalance(counts, share))"
            )
        if bool(augmentation.final_crop_size) != (final_epoch is not None):
            raise ValueError(
                f"augmentation.final_crop_size is {augmentation.final_crop_size} and final_epoch {final_epoch}; "
                "expected a size and the first epoch that has it, or 0 and None"
            )
        self.dataset, self.balance, self.final_epoch = dataset, balance, final_epoch
        self.transform = self.final_transform = _Transform(augmentation, processor, seed)
        if final_epoch is not None:
            final = replace(augmentation, crop_size=augmentation.final_crop_size)
            self.final_transform = _Transform(final, processor, seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int] | SampleKey) -> dict[str, Tensor]:
        """Return `pixel_values` (C, S, S) and `labels` (S, S)."""
        epoch, index = key[:2] if isinstance(key, tuple) else (int(torch.randint(2**31, ())), int(key))
        focus, place = (key.focus, (key.position + 1,)) if isinstance(key, SampleKey) else (None, ())
        is_final = isinstance(key, tuple) and self.final_epoch is not None and epoch >= self.final_epoch
        transform = self.final_transform if is_final else self.transform
        generator = transform.generator(epoch, index, *place)

        def prepare(number: int, focus: int | None = None) -> dict[str, Tensor]:
            decoded = decode_row(self.dataset[number], transform.processor, f"image {number}")
            return transform(decoded, generator, focus)

        sample = prepare(index, focus)
        if transform.draws_mix(generator):
            other = prepare(int(torch.randint(len(self), (), generator=generator)))
            sample = transform.mix(sample, other, generator)
        return sample


class TrainStream(KeyedStream):
    """Training samples from a stream.

    Rows of a stream have no index: the checksum of an image's pixels takes its place. A sample is mixed with the one
    before.

    Args:
        dataset: see `KeyedStream`; it has the columns `image` and `label`.
        augmentation: see `TrainDataset`.
        processor: see `TrainDataset`.
        seed: of the augmentation.

    Raises:
        ValueError: if `augmentation.class_balance` or `augmentation.final_crop_size` is on.
    """

    def __init__(
        self, dataset: Any, augmentation: AugmentationConfig, processor: SegFormerImageProcessor, seed: int = 0
    ):
        if augmentation.class_balance:
            raise ValueError(
                f"augmentation.class_balance is {augmentation.class_balance} for a stream, whose images cannot be "
                "drawn; expected 0, or data.streaming=false"
            )
        if augmentation.final_crop_size:
            raise ValueError(
                f"augmentation.final_crop_size is {augmentation.final_crop_size} for a stream, which has no last "
                "passes; expected 0, or data.streaming=false"
            )
        super().__init__(dataset, ["image", "label"])
        self.transform = _Transform(augmentation, processor, seed)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        previous: dict[str, Tensor] | None = None
        for epoch, row in self.rows():
            decoded = decode_row(row, self.transform.processor, "an image of the stream")
            generator = self.transform.generator(epoch, pixels_checksum(decoded.image))
            sample = self.transform(decoded, generator)
            if self.transform.draws_mix(generator) and previous is not None:
                yield self.transform.mix(sample, previous, generator)
            else:
                yield sample
            previous = sample


def pixels_checksum(image: Tensor) -> int:
    """Return the checksum of an image's pixels, which takes the place of an index in a stream."""
    return zlib.crc32(image.numpy().tobytes())


class EvalDataset(Dataset):
    """Whole images, prepared by the processor, with masks in their own size.

    Args:
        dataset: see `TrainDataset`.
        processor: prepares the images.
    """

    def __init__(self, dataset: Any, processor: SegFormerImageProcessor):
        self.dataset, self.processor = dataset, processor

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `pixel_values` (C, H', W') and `labels` (H, W)."""
        row = self.dataset[int(index)]
        labels = read_mask(row["label"], f"mask {index}").astype(np.int64)
        labels = ignore_no_data(labels, row["image"], self.processor.ignore_index)
        return {
            "pixel_values": self.processor(row["image"], return_tensors="pt").pixel_values[0],
            "labels": torch.from_numpy(labels),
        }


class EpochSampler(Sampler):
    """Sampler of keys (epoch, index) in an order that depends on seed and epoch only.

    The key reaches the workers with the sample, persistent ones too, which do not learn of a new epoch otherwise.

    Args:
        length: number of samples.
        seed: of the order.
        epoch: called at the start of each pass for its number.
        balance: draws a share of the samples by their classes, with a `SampleKey`; None takes each image once.
    """

    def __init__(self, length: int, seed: int, epoch: Callable[[], int], balance: ClassBalance | None = None):
        self.length, self.seed, self.epoch, self.balance = length, seed, epoch, balance

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int] | SampleKey]:
        epoch = self.epoch()
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.length)
        if self.balance is not None:
            return iter(self.balance.draw(epoch, order, rng))
        return iter([(epoch, int(index)) for index in order])


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples into a batch.

    Raises:
        ValueError: if they differ in size.
    """
    for name in samples[0]:
        sizes = {tuple(sample[name].shape[-2:]) for sample in samples}
        if len(sizes) > 1:
            raise ValueError(
                f"images of sizes {', '.join(f'{height}x{width}' for height, width in sorted(sizes))} do not fit "
                "into one batch: set trainer.per_device_eval_batch_size=1"
            )
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


__all__ = [
    "EpochSampler",
    "EvalDataset",
    "KeyedDataset",
    "KeyedStream",
    "Sample",
    "TrainDataset",
    "TrainStream",
    "collate",
    "decode_row",
    "keyed_generator",
    "pixels_checksum",
]
