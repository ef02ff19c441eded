"""Photometric augmentation beyond the paper's: light, optics, sensor and compression of another camera.

The order is that of the light's way: shadow, exposure, colour temperature, gamma, blur, noise, JPEG. Every function is
deterministic; `augment_photometrically` draws its arguments.

Axes: C bands, H W pixels of an image. Values are on the scale of 0 to 255.
"""

import math
from collections.abc import Callable, Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

from ..config import PHOTOMETRIC, AugmentationConfig

_MOST_EDGES = 4  # of a shadow
_HIGHEST_QUALITY = 95


def augment_photometrically(
    image: Tensor, options: AugmentationConfig, generator: Generator, is_byte_scaled: bool
) -> Tensor:
    """Apply each option of `PHOTOMETRIC` that is on with probability `photometric_probability`.

    Blur averages values and applies to any image; the others need values on the scale of 0 to 255, and colour
    temperature three bands.

    Args:
        image: (C, H, W), uint8 or floating.
        options: see `AugmentationConfig`. An option that is off draws nothing.
        generator: the only source of randomness.
        is_byte_scaled: the image is on the scale of 0 to 255.

    Returns:
        the image in its type, clipped to 0 to 255 where it is on that scale; only uint8 is rounded.

    Raises:
        ValueError: if an option does not apply to such an image; the message names it with the remedy.
    """
    names = [name for name in PHOTOMETRIC if getattr(options, name)]
    if not names:
        return image
    for name in names:
        _check_applies(name, options, image, is_byte_scaled)
    pixels = image.float()
    for name in names:
        if draw_uniform(0, 1, generator) < options.photometric_probability:
            pixels = _DRAWS[name](pixels, getattr(options, name), generator)
            pixels = pixels.clamp(0, 255) if is_byte_scaled else pixels
    return pixels.round().to(torch.uint8) if image.dtype == torch.uint8 else pixels.to(image.dtype)


def draw_uniform(low: float, high: float, generator: Generator) -> float:
    """Draw a number, uniform from `low` to `high`."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def check_byte_scale(name: str, value: float, dtype: torch.dtype, is_byte_scaled: bool) -> None:
    """Raise ValueError where an option that needs the scale of 0 to 255 is on for an image in units of its own."""
    if not is_byte_scaled:
        raise ValueError(
            f"augmentation.{name} is {value} for {str(dtype).removeprefix('torch.')} images in units of their own; "
            f"expected images on the scale of 0 to 255: set data.value_range, or augmentation.{name}=0"
        )


def _check_applies(name: str, options: AugmentationConfig, image: Tensor, is_byte_scaled: bool) -> None:
    value = getattr(options, name)
    if name != "blur":
        check_byte_scale(name, value, image.dtype, is_byte_scaled)
    if name == "temperature" and len(image) != 3:
        raise ValueError(
            f"augmentation.temperature is {value} for images of {len(image)} bands; expected red, green and blue: set "
            "augmentation.temperature=0"
        )


def change_exposure(pixels: Tensor, stops: float) -> Tensor:
    """Multiply by 2^stops."""
    return pixels * 2.0**stops


def change_temperature(pixels: Tensor, stops: float) -> Tensor:
    """Multiply the red of an image (3, H, W) by 2^stops and its blue by 2^-stops: above 0 it is warmer."""
    return pixels * torch.tensor([2.0**stops, 1.0, 2.0**-stops])[:, None, None]


def change_gamma(pixels: Tensor, exponent: float) -> Tensor:
    """Raise values, as shares of 255, to a power: below 1 it is lighter."""
    return 255 * (pixels / 255) ** exponent


def cast_shadow(
    pixels: Tensor, center: Sequence[float], edges: Sequence[tuple[float, float]], softness: float, darkness: float
) -> Tensor:
    """Darken the points that lie behind all of some edges: a half-plane, a wedge or strip, or a polygon.

    Args:
        pixels: (C, H, W).
        center: row and column in the shadow, in pixels.
        edges: of each its angle in radians, counted from the direction of rows to that of columns, and its distance
            from the center in pixels.
        softness: width in pixels over which an edge goes from light to dark.
        darkness: share of the light that is lost.
    """
    rows = torch.arange(pixels.shape[1])[:, None] - center[0]
    columns = torch.arange(pixels.shape[2]) - center[1]
    depth = torch.full(pixels.shape[1:], math.inf)
    for angle, distance in edges:
        depth = torch.minimum(depth, distance - (math.cos(angle) * rows + math.sin(angle) * columns))
    return pixels * (1 - darkness * (depth / softness + 0.5).clamp(0, 1))


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Convolve by a Gaussian of `sigma` pixels, cut off at three of them; edges are continued by their own values."""
    radius = max(1, math.ceil(3 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / max(sigma, 1e-6)) ** 2)
    weights = weights / weights.sum()
    padded = F.pad(pixels[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, weights[None, None, :, None]), weights[None, None, None, :])[:, 0]


def add_noise(pixels: Tensor, std: float, generator: Generator) -> Tensor:
    """Add Gaussian noise, another for each value."""
    return pixels + std * torch.randn(pixels.shape, generator=generator)


def compress(pixels: Tensor, quality: int) -> Tensor:
    """Compress as JPEG and decode again; other than three bands are compressed one by one, as grey."""
    values = pixels.round().clamp(0, 255).to(torch.uint8).numpy()
    if len(values) == 3:
        decoded = _jpeg(values.transpose(1, 2, 0), quality).transpose(2, 0, 1)
    else:
        decoded = np.stack([_jpeg(band, quality) for band in values])
    return torch.from_numpy(decoded.astype(np.float32))


def _jpeg(values: np.ndarray, quality: int) -> np.ndarray:
    buffer = BytesIO()
    Image.fromarray(np.ascontiguousarray(values)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def _draw_shadow(pixels: Tensor, largest: float, generator: Generator) -> Tensor:
    """Cast a shadow of one to four edges around a random point of the image, 0.1 to 0.5 of its longer side away."""
    height, width = pixels.shape[1:]
    number = 1 + int(torch.randint(_MOST_EDGES, (), generator=generator))
    center = draw_uniform(0, height, generator), draw_uniform(0, width, generator)
    first = draw_uniform(0, 2 * math.pi, generator)
    side = max(height, width)
    edges = [(first + 2 * math.pi * edge / number, side * draw_uniform(0.1, 0.5, generator)) for edge in range(number)]
    softness = draw_uniform(1, max(1, side / 16), generator)
    return cast_shadow(pixels, center, edges, softness, draw_uniform(0, largest, generator))


def _draw_jpeg(pixels: Tensor, lowest: int, generator: Generator) -> Tensor:
    return compress(pixels, int(torch.randint(lowest, _HIGHEST_QUALITY + 1, (), generator=generator)))


_DRAWS: dict[str, Callable[[Tensor, float, Generator], Tensor]] = {
    "shadow": _draw_shadow,
    "exposure": lambda pixels, most, rng: change_exposure(pixels, draw_uniform(-most, most, rng)),
    "temperature": lambda pixels, most, rng: change_temperature(pixels, draw_uniform(-most, most, rng)),
    "gamma": lambda pixels, most, rng: change_gamma(pixels, (1 + most) ** draw_uniform(-1, 1, rng)),
    "blur": lambda pixels, most, rng: blur(pixels, draw_uniform(0, most, rng)),
    "noise": lambda pixels, most, rng: add_noise(pixels, draw_uniform(0, most, rng), rng),
    "jpeg": lambda pixels, lowest, rng: _draw_jpeg(pixels, int(lowest), rng),
}

__all__ = [
    "add_noise",
    "augment_photometrically",
    "blur",
    "cast_shadow",
    "change_exposure",
    "change_gamma",
    "change_temperature",
    "check_byte_scale",
    "compress",
    "draw_uniform",
]
