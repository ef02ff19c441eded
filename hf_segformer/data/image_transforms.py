"""Augmentation of single images and of batches with class targets, for pre-training.

Every function takes its random numbers from a `torch.Generator` alone. Axes: B images, C bands, H W pixels, S side of
the crop, K classes, h w sides of a grid of patches.
"""

import math

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .mixing import box
from .photometric import draw_uniform
from .pretraining_config import ImageAugmentation
from .randaugment import randaugment

_NUM_DRAWS = 10
_ERASED_SHARE = (0.02, 1 / 3)
_ERASED_LOG_RATIO = -math.log(0.3)
_EVALUATED_SHARE = 0.875  # side of the center crop over that of the resized image

Window = tuple[int, int, int, int]  # top, left, height, width


def augment_image(image: Tensor, options: ImageAugmentation, generator: Generator) -> Tensor:
    """Cut a random window, resize it to S x S, flip it, and apply RandAugment.

    Args:
        image: (C, H, W), uint8 or floating.
        options: see `ImageAugmentation`.
        generator: the only source of randomness.

    Returns:
        (C, S, S) in its type.
    """
    top, left, height, width = draw_window(image.shape[1], image.shape[2], options, generator)
    image = resize(image[:, top : top + height, left : left + width], options.crop_size, options.crop_size)
    if draw_uniform(0, 1, generator) < options.flip:
        image = image.flip(-1)
    if options.randaugment:
        image = randaugment(image, options.randaugment, options.randaugment_operations, generator)
    return image


def draw_window(height: int, width: int, options: ImageAugmentation, generator: Generator) -> Window:
    """Draw a window whose share of the area is uniform and whose aspect ratio is log-uniform (Szegedy et al. 2015).

    After ten draws that do not fit into the image, its central part is taken, with the nearest ratio that is allowed.
    """
    low, high = options.ratio
    for _ in range(_NUM_DRAWS):
        area = height * width * draw_uniform(options.scale[0], options.scale[1], generator)
        ratio = math.exp(draw_uniform(math.log(low), math.log(high), generator))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = (
                int(torch.randint(free + 1, (), generator=generator)) for free in (height - rows, width - columns)
            )
            return top, left, rows, columns
    ratio = min(max(width / height, low), high)
    rows, columns = min(height, max(1, round(width / ratio))), min(width, max(1, round(height * ratio)))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize (C, H, W) bicubically, over the area of each new pixel where it becomes smaller."""
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", align_corners=False, antialias=True)[0]


def center_crop(image: Tensor, side: int) -> Tensor:
    """Resize the shorter side of (C, H, W) to `side` / 0.875, and cut the center: (C, side, side)."""
    shorter = round(side / _EVALUATED_SHARE)
    ratio = shorter / min(image.shape[1:])
    image = resize(image, *(max(shorter, round(length * ratio)) for length in image.shape[1:]))
    top, left = ((length - side) // 2 for length in image.shape[1:])
    return image[:, top : top + side, left : left + side]


def erase(pixels: Tensor, generator: Generator) -> Tensor:
    """Replace a rectangle of normalized pixels (C, H, W) by noise (Zhong et al. 2020, with a value for each pixel).

    Its share of the area is uniform from 2 % to a third, its aspect ratio log-uniform from 0.3 to 1 / 0.3. After ten
    draws that do not fit nothing is erased.
    """
    bands, height, width = pixels.shape
    for _ in range(_NUM_DRAWS):
        area = height * width * draw_uniform(*_ERASED_SHARE, generator)
        ratio = math.exp(draw_uniform(-_ERASED_LOG_RATIO, _ERASED_LOG_RATIO, generator))
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < rows < height and 0 < columns < width:
            top = int(torch.randint(height - rows + 1, (), generator=generator))
            left = int(torch.randint(width - columns + 1, (), generator=generator))
            erased = pixels.clone()
            erased[:, top : top + rows, left : left + columns] = torch.randn(bands, rows, columns, generator=generator)
            return erased
    return pixels


def draw_mask(side: int, ratio: float, generator: Generator) -> Tensor:
    """Hide a share of the patches of a square grid, rounded up to a whole number: bool (side, side), True is hidden."""
    number = side * side
    hidden = torch.zeros(number, dtype=torch.bool)
    hidden[torch.randperm(number, generator=generator)[: math.ceil(number * ratio)]] = True
    return hidden.view(side, side)


def class_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Probabilities of the classes: 1 - smoothing for that of each label, and smoothing / K for every one.

    Args:
        labels: (B,) integers.
        num_classes: K.
        smoothing: share of the target that is spread evenly (Szegedy et al. 2016).

    Returns:
        float32 (B, K).

    Examples:
        >>> import torch
        >>> from hf_segformer.data.image_transforms import class_targets
        >>> class_targets(torch.tensor([1]), num_classes=2, smoothing=0.5)
        tensor([[0.2500, 0.7500]])
    """
    return F.one_hot(labels.long(), num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mix_batch(
    pixels: Tensor, targets: Tensor, options: ImageAugmentation, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with that at the mirrored place, by mixup or CutMix, and their targets by that share.

    The share is one for the whole batch, as in timm's default that DeiT's recipe uses. CutMix takes the share that its
    box has left after it was cut off at the edges.

    Args:
        pixels: (B, C, H, W).
        targets: (B, K) probabilities.
        options: `mixup` or `cutmix`, or both, are above 0.
        rng: the only source of randomness.
    """
    is_cutmix = rng.random() < 0.5 if options.mixup and options.cutmix else bool(options.cutmix)
    alpha = options.cutmix if is_cutmix else options.mixup
    kept = float(rng.beta(alpha, alpha))
    others = pixels.flip(0)
    if is_cutmix:
        center = (float(rng.random()), float(rng.random()))
        pasted = box(pixels.shape[2], pixels.shape[3], 1 - kept, center)
        kept = 1 - pasted.float().mean().item()
        mixed = torch.where(pasted, others, pixels)
    else:
        mixed = torch.lerp(others, pixels, kept)
    return mixed, torch.lerp(targets.flip(0), targets, kept)


__all__ = [
    "Window",
    "augment_image",
    "center_crop",
    "class_targets",
    "draw_mask",
    "draw_window",
    "erase",
    "mix_batch",
    "resize",
]
