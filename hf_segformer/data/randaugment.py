"""RandAugment (Cubuk et al. 2020): a few operations of a list, drawn for each image by itself.

List and ranges are those of the recipe that DeiT (Touvron et al. 2021) and PVT (Wang et al. 2021) train with, timm's
`rand-m9-mstd0.5-inc1`: every operation changes the image more with a higher magnitude, the magnitude varies with a
standard deviation of 0.5, and an operation is applied with probability 1/2.

Axes: H W pixels of an image.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Generator, Tensor

from .photometric import draw_uniform
from .pretraining_config import LARGEST_MAGNITUDE

_DEVIATION = 0.5  # of the magnitude
_PROBABILITY = 0.5  # of an operation


def randaugment(image: Tensor, magnitude: float, num_operations: int, generator: Generator) -> Tensor:
    """Apply operations of `OPERATIONS`, each drawn by itself.

    Args:
        image: uint8 (3, H, W).
        magnitude: 0 to 10.
        num_operations: number of draws.
        generator: the only source of randomness.

    Returns:
        uint8 (3, H, W).

    Raises:
        ValueError: if the image is not of three bands of bytes.
    """
    if image.dtype != torch.uint8 or len(image) != 3:
        kind = str(image.dtype).removeprefix("torch.")
        raise ValueError(
            f"augmentation.randaugment is {magnitude:g} for {kind} images of {len(image)} bands; expected 8-bit images "
            "of red, green and blue: set augmentation.randaugment=0"
        )
    pixels = Image.fromarray(np.ascontiguousarray(image.numpy().transpose(1, 2, 0)))
    names = list(OPERATIONS)
    for _ in range(num_operations):
        name = names[int(torch.randint(len(names), (), generator=generator))]
        drawn = magnitude + _DEVIATION * torch.randn((), generator=generator).item()
        sign = 1 if draw_uniform(0, 1, generator) < 0.5 else -1
        if draw_uniform(0, 1, generator) < _PROBABILITY:
            level = min(max(drawn, 0.0), LARGEST_MAGNITUDE) / LARGEST_MAGNITUDE
            pixels = OPERATIONS[name](pixels, level, sign)
    return torch.from_numpy(np.array(pixels).transpose(2, 0, 1).copy())


def _enhance(kind: Callable) -> Callable[[Image.Image, float, int], Image.Image]:
    """Move away from a factor of 1 by up to 0.9."""
    return lambda image, level, sign: kind(image).enhance(max(0.1, 1 + sign * 0.9 * level))


def _affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    """Take the pixel at (x, y) from (a x + b y + c, d x + e y + f), and the mean of ImageNet outside the image."""
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC, fillcolor=_OUTSIDE
    )


def _rotate(image: Image.Image, level: float, sign: int) -> Image.Image:
    """Turn by up to 30 degrees."""
    return image.rotate(sign * 30 * level, Image.Resampling.BICUBIC, fillcolor=_OUTSIDE)


def _solarize_add(image: Image.Image, level: float, sign: int) -> Image.Image:
    """Add up to 110 to values below 128."""
    values = np.arange(256)
    table = np.where(values < 128, np.minimum(values + int(110 * level), 255), values)
    return image.point(table.tolist() * len(image.getbands()))


_OUTSIDE = (124, 116, 104)  # mean of ImageNet
# name -> (image, level from 0 to 1, sign of 1 or -1) -> image of the same size
OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "autocontrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": lambda image, level, sign: ImageOps.posterize(image, 4 - int(4 * level)),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, sign: _affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0)),
    "shear_y": lambda image, level, sign: _affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0)),
    "translate_x": lambda image, level, sign: _affine(image, (1, 0, sign * 0.45 * level * image.width, 0, 1, 0)),
    "translate_y": lambda image, level, sign: _affine(image, (1, 0, 0, 0, 1, sign * 0.45 * level * image.height)),
}

__all__ = ["OPERATIONS", "randaugment"]
