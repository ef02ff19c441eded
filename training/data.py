"""From a recipe's `[data]` to the pictures that the Trainer draws, and the processor that the model is saved with.

Axes: B pictures, H W pixels, K classes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_segformer import SegFormerImageProcessor
from hf_segformer.visualize import Color

from . import camvid, shapes
from .augmentation import Step, augment, color_jitter, random_crop, random_flip, random_scale
from .recipe import DataRecipe


@dataclass(frozen=True)
class Data:
    """What a run trains on and is judged by.

    Args:
        train: columns `image` and `label`.
        evaluation: the same, of pictures that are never trained on.
        names: of the K classes.
        palette: one colour a class.
        processor: prepares whole pictures for evaluation and later use.
    """

    train: Dataset
    evaluation: Dataset
    names: tuple[str, ...]
    palette: tuple[Color, ...]
    processor: SegFormerImageProcessor


def load_data(recipe: DataRecipe) -> Data:
    """Draw or read the pictures that a recipe names.

    Shapes are seen as they are. Real pictures are evaluated whole and at their own scale, sides rounded up to
    multiples of 32, as the paper does (section 4.1).

    Raises:
        ValueError: if pictures and label maps do not fit.
        OSError: if folders or files are missing.
    """
    if recipe.name == "shapes":
        train, evaluation = (
            shapes.shapes_dataset(split, num_samples, recipe.image_size, recipe.seed)
            for split, num_samples in zip(shapes.SPLITS, (recipe.num_train, recipe.num_eval), strict=True)
        )
        processor = SegFormerImageProcessor(do_resize=False)
        return Data(train, evaluation, shapes.NAMES, shapes.PALETTE, processor)
    train = camvid.camvid_dataset(recipe.root, "train", recipe.num_train)
    evaluation = camvid.camvid_dataset(recipe.root, "validation", recipe.num_eval)
    edge = min(evaluation[0]["image"].size)
    processor = SegFormerImageProcessor(size={"shortest_edge": edge}, keep_ratio=True, size_divisor=32)
    return Data(train, evaluation, camvid.NAMES, camvid.PALETTE, processor)


class TrainTransform:
    """Varies pictures and prepares them for the model; for `Dataset.with_transform`.

    Args:
        recipe: how pictures are varied.
        processor: whose mean and standard deviation count.

    Attributes:
        epoch: number of the pass over the data; set it at the start of each, so that pictures come out differently.
    """

    def __init__(self, recipe: DataRecipe, processor: SegFormerImageProcessor):
        self.steps: list[Step] = [
            random_scale(*recipe.scale),
            random_crop(recipe.image_size),
            random_flip,
            color_jitter(recipe.jitter),
        ]
        self.seed, self.epoch = recipe.seed, 0
        self.processor = SegFormerImageProcessor(
            do_resize=False, image_mean=processor.image_mean, image_std=processor.image_std
        )

    def __call__(self, batch: dict[str, list]) -> dict[str, torch.Tensor]:
        """Columns `index`, `image`, `label` -> `pixel_values` (B, 3, H, W) and `labels` (B, H, W)."""
        samples = [
            augment(image, label, self.steps, np.random.default_rng([self.seed, self.epoch, index]))
            for index, image, label in zip(batch["index"], batch["image"], batch["label"], strict=True)
        ]
        images, labels = zip(*samples, strict=True)
        return dict(self.processor(list(images), list(labels), return_tensors="pt"))


class EvalTransform:
    """Prepares whole pictures and keeps label maps in their own size; for `Dataset.with_transform`."""

    def __init__(self, processor: SegFormerImageProcessor):
        self.processor = processor

    def __call__(self, batch: dict[str, list]) -> dict[str, list[torch.Tensor]]:
        """Columns `image`, `label` -> lists of `pixel_values` (3, H', W') and `labels` (H, W)."""
        pixels = [self.processor(image, return_tensors="pt").pixel_values[0] for image in batch["image"]]
        labels = [torch.from_numpy(np.array(label, dtype=np.int64)) for label in batch["label"]]
        return {"pixel_values": pixels, "labels": labels}


def with_index(dataset: Dataset) -> Dataset:
    """The data set with the column `index`, from which `TrainTransform` seeds each picture."""
    return dataset.add_column("index", np.arange(len(dataset)))


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
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
