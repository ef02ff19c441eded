"""PyTorch data sets of pre-training: augmented, normalized images of one size, with a class or hidden patches.

A sample depends on its key and the seed alone, and how a batch is mixed on the key of its first sample, so that both
are the same whatever the number of workers, and in a resumed run.

Axes: C bands, H W pixels of an image, S side of the crop, K classes, h side of the grid of patches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..image_processing_segformer import SegFormerImageProcessor
from .decoding import file_name
from .image_transforms import augment_image, center_crop, class_targets, draw_mask, erase, mix_batch
from .pretraining_config import ImageAugmentation, PretrainingConfig
from .readers import read_whole_image
from .torch_datasets import KeyedDataset, KeyedStream, collate, keyed_generator, pixels_checksum

_Sample = dict[str, Tensor]


@dataclass(frozen=True)
class ImageTransform:
    """Transform of a row to a sample of one size.

    A sample has `pixel_values` (C, S, S), and `labels`, an int64 scalar, for classification, or `mask`, bool (h, h)
    with True for hidden patches, for masked images.

    Args:
        augmentation: options of the augmentation.
        pretraining: the method.
        processor: whose channels, value range, mean and standard deviation apply.
        num_classes: K; 0 for masked images.
        bands: numbers, from 1, of the bands to read; None for all.
        seed: of the augmentation.
    """

    augmentation: ImageAugmentation
    pretraining: PretrainingConfig
    processor: SegFormerImageProcessor
    num_classes: int = 0
    bands: tuple[int, ...] | None = None
    seed: int = 0

    def decode(self, row: dict[str, Any], name: str) -> tuple[Tensor, bool]:
        """Decode a row's image: (C, H, W), uint8 or float32, and True if it is on the scale of 0 to 255.

        Raises:
            ValueError: if the image does not fit the processor.
            OSError: if it cannot be read.
        """
        name = file_name(row["image"]) or name
        decoded = self.processor.decode(self.read(row["image"], name), name, is_resized=False)
        bands = decoded.bands if decoded.bands.dtype == np.uint8 else decoded.bands.astype(np.float32)
        return torch.from_numpy(np.array(bands)), decoded.is_byte_scaled

    def read(self, source: Any, name: str = "an image") -> Any:
        """Read an image, a path or an encoded file, as `read_whole_image` does."""
        options = {"any_range": self.processor.value_range is not None, "bands": self.bands}
        return read_whole_image(source, len(self.processor.image_mean), file_name(source) or name, **options)

    def train(self, row: dict[str, Any], image: Tensor, is_byte_scaled: bool, epoch: int, index: int) -> _Sample:
        """Return the training sample of a key, which is in it as `key`."""
        generator = keyed_generator(self.seed, epoch, index)
        pixels = self._normalize(augment_image(image, self.augmentation, generator), is_byte_scaled)
        if self.augmentation.erasing and torch.rand((), generator=generator).item() < self.augmentation.erasing:
            pixels = erase(pixels, generator)
        sample = {"pixel_values": pixels, "key": torch.tensor([epoch, index])}
        return sample | self._target(row, generator)

    def evaluate(self, row: dict[str, Any], index: int) -> _Sample:
        """Return the evaluation sample of a row: the center of the image, and always the same hidden patches."""
        image, is_byte_scaled = self.decode(row, f"evaluation image {index}")
        pixels = self._normalize(center_crop(image, self.augmentation.crop_size), is_byte_scaled)
        return {"pixel_values": pixels} | self._target(row, keyed_generator(self.seed, index))

    def _normalize(self, image: Tensor, is_byte_scaled: bool) -> Tensor:
        if is_byte_scaled and image.is_floating_point():
            image = image.clamp(0, 255)  # a bicubic resize overshoots
        return torch.from_numpy(self.processor.scale(image.numpy()))

    def _target(self, row: dict[str, Any], generator: torch.Generator) -> _Sample:
        if self.pretraining.is_masked:
            side = self.augmentation.crop_size // self.pretraining.mask_size
            return {"mask": draw_mask(side, self.pretraining.mask_ratio, generator)}
        label = row["label"]
        if label is None or not 0 <= label < self.num_classes:
            name = file_name(row["image"]) or "an image"
            raise ValueError(f"{name} has the class {label}; expected 0 to {self.num_classes - 1}")
        return {"labels": torch.tensor(label)}


class PretrainDataset(KeyedDataset):
    """Training samples of `ImageTransform`.

    Args:
        dataset: rows with a column `image` and, for classification, `label`.
        transform: makes the samples.
    """

    def __init__(self, dataset: Any, transform: ImageTransform):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        """Return the sample of a key (epoch, index)."""
        epoch, index = key
        row = self.dataset[index]
        return self.transform.train(row, *self.transform.decode(row, f"training image {index}"), epoch, index)


class PretrainStream(KeyedStream):
    """Training samples of a stream; the checksum of an image's pixels takes the place of its index.

    Args:
        dataset: see `KeyedStream`.
        transform: makes the samples.
    """

    def __init__(self, dataset: Any, transform: ImageTransform):
        super().__init__(dataset, ["image"] if transform.pretraining.is_masked else ["image", "label"])
        self.transform = transform

    def __iter__(self) -> Iterator[_Sample]:
        for epoch, row in self.rows():
            image, is_byte_scaled = self.transform.decode(row, "an image of the stream")
            yield self.transform.train(row, image, is_byte_scaled, epoch, pixels_checksum(image))


class PretrainEvalDataset(KeyedDataset):
    """Evaluation samples of `ImageTransform`, by index.

    Args:
        dataset: see `PretrainDataset`.
        transform: makes the samples.
    """

    def __init__(self, dataset: Any, transform: ImageTransform):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Sample:
        """Return the sample of a row."""
        return self.transform.evaluate(self.dataset[int(index)], int(index))


@dataclass(frozen=True)
class PretrainCollator:
    """Batches of training and evaluation samples.

    Labels of training samples become probabilities (B, K), smoothed and mixed as the options state; those of evaluation
    samples stay numbers (B,).

    Args:
        transform: of the samples.
    """

    transform: ImageTransform

    def __call__(self, samples: list[_Sample]) -> _Sample:
        """Stack samples, and mix those of training."""
        batch = collate(samples)
        keys = batch.pop("key", None)
        if keys is None or "labels" not in batch:
            return batch
        options, smoothing = self.transform.augmentation, self.transform.pretraining.label_smoothing
        targets = class_targets(batch["labels"], self.transform.num_classes, smoothing)
        pixels = batch["pixel_values"]
        if options.mixup or options.cutmix:
            rng = np.random.default_rng([self.transform.seed, *keys[0].tolist(), 1])
            pixels, targets = mix_batch(pixels, targets, options, rng)
        return {"pixel_values": pixels, "labels": targets}


__all__ = ["ImageTransform", "PretrainCollator", "PretrainDataset", "PretrainEvalDataset", "PretrainStream"]
