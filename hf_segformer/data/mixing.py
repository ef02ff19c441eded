"""CutMix and ClassMix: a part of one training sample, with its labels, pasted into another.

Axes: C bands, H W pixels; both samples have the same.
"""

import math

import torch
from torch import Generator, Tensor

from ..config import AugmentationConfig

_Sample = dict[str, Tensor]


def draw_mix(sample: _Sample, other: _Sample, options: AugmentationConfig, generator: Generator, ignore: int) -> Tensor:
    """Draw the pixels that `other` gives to `sample`: by CutMix or ClassMix, chosen by their probabilities.

    Args:
        sample: `pixel_values` (C, H, W) and `labels` (H, W).
        other: the same of another sample.
        options: `cutmix` + `classmix` is above 0.
        generator: the only source of randomness.
        ignore: label of ignored pixels.

    Returns:
        bool (H, W).
    """
    height, width = sample["labels"].shape
    which = torch.rand((), generator=generator).item() * (options.cutmix + options.classmix)
    if which < options.cutmix:
        return draw_box(height, width, generator)
    return torch.isin(other["labels"], draw_classes(other["labels"], generator, ignore))


def paste(sample: _Sample, other: _Sample, pasted: Tensor) -> _Sample:
    """Replace the pixels `pasted` (H, W) of a sample, and their labels, by those of another one."""
    return {
        "pixel_values": torch.where(pasted, other["pixel_values"], sample["pixel_values"]),
        "labels": torch.where(pasted, other["labels"], sample["labels"]),
    }


def draw_box(height: int, width: int, generator: Generator) -> Tensor:
    """Draw CutMix's box (Yun et al. 2019, section 3.1): its share of the image and its center are uniform.

    Returns:
        bool (H, W), True inside.
    """
    share, row, column = torch.rand(3, generator=generator).tolist()
    return box(height, width, share, (row, column))


def box(height: int, width: int, share: float, center: tuple[float, float]) -> Tensor:
    """Mark a box of the image's aspect ratio, cut off at its edges: bool (H, W).

    Args:
        height: H.
        width: W.
        share: of the image's area, if nothing is cut off.
        center: row and column as shares of height and width.
    """
    inside = torch.zeros(height, width, dtype=torch.bool)
    reach = math.sqrt(share) / 2
    top, left = (round(max(0.0, at - reach) * side) for at, side in zip(center, (height, width), strict=True))
    bottom, right = (round((at + reach) * side) for at, side in zip(center, (height, width), strict=True))
    inside[top:bottom, left:right] = True
    return inside


def draw_classes(labels: Tensor, generator: Generator, ignore: int) -> Tensor:
    """Draw half of the classes of an image for ClassMix, rounded down: an image of one class gives nothing.

    Olsson et al. 2021, section 3.1, with true labels in place of predicted ones. Ignored pixels are of no class.

    Args:
        labels: (H, W).
        generator: the only source of randomness.
        ignore: label of ignored pixels.
    """
    classes = labels.unique()
    classes = classes[classes != ignore]
    return classes[torch.randperm(len(classes), generator=generator)[: len(classes) // 2]]


__all__ = ["box", "draw_box", "draw_classes", "draw_mix", "paste"]
