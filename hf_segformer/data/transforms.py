"""Training pictures as the paper varies them (section 4.1 and the original code), and data sets that serve them.

In this order: resize by a random ratio, random crop in which no class may fill too much, horizontal flip, photometric
distortion, normalise, pad. All chance comes from one `torch.Generator`, which is seeded by (seed, epoch, index): a
picture comes out the same whatever the number of workers or processes, and in a run that is resumed.

Axes: C bands, H W pixels of a picture, S side of the crop.
"""

import zlib
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, Sampler

from ..config import AugmentationConfig
from ..image_io_segformer import read_image, read_mask
from ..image_processing_segformer import SegFormerImageProcessor

IGNORE_INDEX = 255

_NUM_DRAWS = 10


def augment(image: Tensor, labels: Tensor, how: AugmentationConfig, generator: Generator) -> tuple[Tensor, Tensor]:
    """Resize, crop, flip and photometric_distortion; normalising and padding are left to `TrainDataset`.

    Args:
        image: (C, H, W), uint8 or floating.
        labels: (H, W), integers; `IGNORE_INDEX` for what does not count.
        how: see `AugmentationConfig`.
        generator: the only source of chance.

    Returns:
        image (C, S', S'') and labels (S', S'') of the same types, where S' and S'' are at most S.

    Raises:
        ValueError: if a distortion is asked for that the image's type does not allow.

    Example:
        >>> import torch
        >>> from hf_segformer.config import AugmentationConfig
        >>> from hf_segformer.data.transforms import augment
        >>> image, labels = torch.zeros(3, 48, 36, dtype=torch.uint8), torch.zeros(48, 36, dtype=torch.uint8)
        >>> augment(image, labels, AugmentationConfig(crop_size=16), torch.Generator().manual_seed(0))[0].shape
        torch.Size([3, 16, 16])
    """
    image, labels = _resize(image, labels, how, generator)
    top, left = _draw_crop(labels, how, generator)
    window = (slice(top, top + how.crop_size), slice(left, left + how.crop_size))
    image, labels = image[:, *window], labels[window]
    if _uniform(0, 1, generator) < how.flip:
        image, labels = image.flip(-1), labels.flip(-1)
    return (photometric_distortion(image, how.distortion, generator) if how.distortion else image), labels


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _resize(image: Tensor, labels: Tensor, how: AugmentationConfig, generator: Generator) -> tuple[Tensor, Tensor]:
    height, width = labels.shape
    low, high = how.scale
    ratio = _uniform(low, high, generator)
    if how.base_size:
        ratio *= min(how.base_size[0] / min(height, width), how.base_size[1] / max(height, width))
    size = (max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5)))
    if size == (height, width):
        return image, labels
    image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    return image, F.interpolate(labels[None, None].float(), size=size, mode="nearest")[0, 0].to(labels.dtype)


def _draw_crop(labels: Tensor, how: AugmentationConfig, generator: Generator) -> tuple[int, int]:
    """Upper left corner of a crop; after ten that one class fills the eleventh is taken as it is."""
    free = [max(0, side - how.crop_size) + 1 for side in labels.shape]
    for draw in range(_NUM_DRAWS + 1):
        top, left = (int(torch.randint(positions, (), generator=generator)) for positions in free)
        if draw == _NUM_DRAWS or how.max_class_share == 1:
            break
        crop = labels[top : top + how.crop_size, left : left + how.crop_size]
        counts = torch.bincount(crop[crop != IGNORE_INDEX].flatten())
        counts = counts[counts > 0]
        if len(counts) > 1 and counts.max() / counts.sum() < how.max_class_share:
            break
    return top, left


def photometric_distortion(image: Tensor, strength: float, generator: Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, each changed every other time (SSD's scheme, as in the paper's code).

    At full strength brightness moves by up to 32 of 255, contrast and saturation are multiplied by 0.5 to 1.5, and hue
    turns by up to 36 degrees. Contrast comes before saturation and hue or after them, at random. Saturation and hue
    are those of a three-band image; others keep them.

    Args:
        image: uint8, (C, H, W).
        strength: 0 to 1, multiplies every range.
        generator: the only source of chance.

    Raises:
        ValueError: if the image is not uint8: brightness has no scale there.
    """
    if image.dtype != torch.uint8:
        raise ValueError(
            f"augmentation.distortion is {strength}, but the images are {str(image.dtype).removeprefix('torch.')} and "
            "it is made for 8-bit ones: set augmentation.distortion=0"
        )
    pixels = image.float()

    def is_drawn() -> bool:
        return _uniform(0, 1, generator) < 0.5

    def contrast(pixels: Tensor) -> Tensor:
        if not is_drawn():
            return pixels
        return (pixels * (1 + strength * _uniform(-0.5, 0.5, generator))).clamp(0, 255)

    if is_drawn():
        pixels = (pixels + strength * _uniform(-32, 32, generator)).clamp(0, 255)
    contrast_first = is_drawn()
    if contrast_first:
        pixels = contrast(pixels)
    if len(pixels) == 3:
        saturation = 1 + strength * _uniform(-0.5, 0.5, generator) if is_drawn() else 1.0
        turn = strength * _uniform(-0.6, 0.6, generator) if is_drawn() else 0.0
        pixels = _turn_colours(pixels, saturation, turn)
    if not contrast_first:
        pixels = contrast(pixels)
    return pixels.round().to(torch.uint8)


def _turn_colours(pixels: Tensor, saturation: float, turn: float) -> Tensor:
    """Multiply saturation, and turn hue by sixths of the circle, in the hexagonal cone (HSV)."""
    if saturation == 1 and turn == 0:
        return pixels
    value, chroma = pixels.amax(0), pixels.amax(0) - pixels.amin(0)
    if turn == 0:  # what a band lacks to the brightest grows with saturation
        factor = (value / chroma.clamp(min=1e-6)).clamp(max=saturation)
        return value - (value - pixels) * factor
    red, green, blue = pixels
    safe = chroma.clamp(min=1e-6)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    chroma = torch.minimum(chroma * saturation, value)
    sixths = (hue + turn + torch.tensor([5.0, 3.0, 1.0])[:, None, None]) % 6
    return value - chroma * torch.minimum(sixths, 4 - sixths).clamp(0, 1)


class _Transform:
    """Image (C, H, W) and labels (H, W) -> varied, normalised, padded tensors for the model."""

    def __init__(self, augmentation: AugmentationConfig, processor: SegFormerImageProcessor, seed: int):
        self.augmentation, self.seed = augmentation, seed
        self.processor = SegFormerImageProcessor.from_dict({**processor.to_dict(), "do_resize": False})
        self.num_channels = len(processor.image_mean)

    def __call__(self, image: Tensor, labels: Tensor, epoch: int, index: int) -> dict[str, Tensor]:
        entropy = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(entropy))
        image, labels = augment(image, labels, self.augmentation, generator)
        pixels = self.processor(image, input_data_format="channels_first", return_tensors="pt").pixel_values[0]
        right, below = (self.augmentation.crop_size - side for side in (pixels.shape[2], pixels.shape[1]))
        return {
            "pixel_values": F.pad(pixels, (0, right, 0, below)),
            "labels": F.pad(labels.long(), (0, right, 0, below), value=IGNORE_INDEX),
        }


def read_row(row: dict[str, Any], num_channels: int, name: str) -> tuple[Tensor, Tensor]:
    """Columns `image` and `label` of a row -> image (C, H, W), uint8 where it has 8 bits, and labels (H, W).

    Args:
        row: whatever `SegFormerImageProcessor` takes: paths, PIL images, arrays.
        num_channels: C.
        name: what an error calls the picture.

    Raises:
        ValueError: if image or label map can not be what they must be, or their sizes differ.
        OSError: if a file can not be read.
    """
    image = read_image(row["image"], num_channels, None, name)
    if isinstance(image, Image.Image):
        image = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
    labels = read_mask(row["label"], f"label map of {name}")
    if image.shape[1:] != labels.shape:
        sizes = ["x".join(map(str, shape)) for shape in (image.shape[1:], labels.shape)]
        raise ValueError(f"{name} is {sizes[0]} (height x width), but its label map {sizes[1]}")
    image = image if image.dtype == np.uint8 else image.astype(np.float32)
    return torch.from_numpy(image.copy()), torch.from_numpy(labels.astype(np.int64))


class TrainDataset(Dataset):
    """Varied, normalised training samples of one size, for a Trainer.

    An index is a pair (epoch, index), as `EpochSampler` gives it: then a sample depends on the seed and that pair
    alone. A plain index, as a Trainer's own sampler gives it, is varied by PyTorch's global generator.

    Args:
        dataset: rows with columns `image` and `label`: a `datasets.Dataset`, or anything with a length and indices.
        augmentation: how they are varied.
        processor: whose mean and standard deviation count.
        seed: of the variation.

    Example:
        >>> from PIL import Image
        >>> from hf_segformer import SegFormerImageProcessor
        >>> from hf_segformer.config import AugmentationConfig
        >>> from hf_segformer.data.transforms import TrainDataset
        >>> rows = [{"image": Image.new("RGB", (64, 48)), "label": Image.new("L", (64, 48))}]
        >>> dataset = TrainDataset(rows, AugmentationConfig(crop_size=32), SegFormerImageProcessor(), seed=0)
        >>> {name: tuple(values.shape) for name, values in dataset[0, 0].items()}
        {'pixel_values': (3, 32, 32), 'labels': (32, 32)}
    """

    def __init__(
        self, dataset: Any, augmentation: AugmentationConfig, processor: SegFormerImageProcessor, seed: int = 0
    ):
        self.dataset = dataset
        self.transform = _Transform(augmentation, processor, seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """`pixel_values` (C, S, S) and `labels` (S, S)."""
        epoch, index = key if isinstance(key, tuple) else (int(torch.randint(2**31, ())), int(key))
        image, labels = read_row(self.dataset[index], self.transform.num_channels, f"picture {index}")
        return self.transform(image, labels, epoch, index)


class TrainStream(IterableDataset):
    """The same from a stream, pass after pass without an end: `max_steps` says when a Trainer stops.

    Rows of a stream have no index: the checksum of a picture's pixels takes its place. That it does not end lets a
    resumed Trainer, which counts a stream as one epoch, find its place again.

    Args:
        dataset: a `datasets.IterableDataset` with columns `image` and `label`; shuffle it before. Each of several
            workers gets shards of its own.
        augmentation: see `TrainDataset`.
        processor: see `TrainDataset`.
        seed: of the variation.
    """

    def __init__(
        self, dataset: Any, augmentation: AugmentationConfig, processor: SegFormerImageProcessor, seed: int = 0
    ):
        self.dataset = dataset
        self.transform = _Transform(augmentation, processor, seed)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = self.dataset.select_columns(["image", "label"])  # a copy: workers share the original's epoch
        for epoch in count(self.dataset.epoch):
            rows.set_epoch(epoch)
            row = None
            for row in rows:
                image, labels = read_row(row, self.transform.num_channels, "a picture of the stream")
                yield self.transform(image, labels, epoch, zlib.crc32(image.numpy().tobytes()))
            if row is None:  # fewer shards than workers
                return


class EvalDataset(Dataset):
    """Whole pictures, prepared by the processor, with label maps in their own size.

    Args:
        dataset: see `TrainDataset`.
        processor: prepares the pictures.
    """

    def __init__(self, dataset: Any, processor: SegFormerImageProcessor):
        self.dataset, self.processor = dataset, processor

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`pixel_values` (C, H', W') and `labels` (H, W)."""
        row = self.dataset[int(index)]
        labels = read_mask(row["label"], f"label map {index}")
        return {
            "pixel_values": self.processor(row["image"], return_tensors="pt").pixel_values[0],
            "labels": torch.from_numpy(labels.astype(np.int64)),
        }


class EpochSampler(Sampler):
    """Pairs (epoch, index) in an order that depends on seed and epoch only.

    The pair travels to the workers with the sample, persistent ones too, which never hear of a new epoch otherwise.

    Args:
        length: number of samples.
        seed: of the order.
        epoch: asked at the start of each pass for its number.
    """

    def __init__(self, length: int, seed: int, epoch: Callable[[], int]):
        self.length, self.seed, self.epoch = length, seed, epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch()
        order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        return iter([(epoch, int(index)) for index in order])


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples to a batch.

    Raises:
        ValueError: if they differ in size.
    """
    for name in samples[0]:
        sizes = {tuple(sample[name].shape[-2:]) for sample in samples}
        if len(sizes) > 1:
            raise ValueError(
                f"pictures of sizes {', '.join(f'{height}x{width}' for height, width in sorted(sizes))} do not fit "
                "into one batch: set trainer.per_device_eval_batch_size=1"
            )
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
