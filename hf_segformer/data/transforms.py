"""Augmentation of training images as in the paper (section 4.1 and the original code).

In this order: resize by a random ratio, random crop in which no class may fill too much, horizontal flip, photometric
distortion. All randomness comes from one `torch.Generator`.

Axes: C bands, H W pixels of an image, S side of the crop.
"""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..config import AugmentationConfig
from ..files import IGNORE_INDEX

_NUM_DRAWS = 10


def augment(
    image: Tensor,
    labels: Tensor,
    options: AugmentationConfig,
    generator: Generator,
    ignore_index: int = IGNORE_INDEX,
    is_byte_scaled: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Resize, crop, flip and distort an image and its labels; normalizing and padding are left to `TrainDataset`.

    Args:
        image: (C, H, W), uint8 or floating.
        labels: (H, W), integers.
        options: see `AugmentationConfig`.
        generator: the only source of randomness.
        ignore_index: label of pixels that do not count.
        is_byte_scaled: the image is on the scale of 0 to 255; by default if it is uint8.

    Returns:
        image (C, S', S'') and labels (S', S'') of the same types, where S' and S'' are at most S.

    Raises:
        ValueError: if distortion is on for an image that is not on the scale of 0 to 255.

    Examples:
        >>> import torch
        >>> from hf_segformer.config import AugmentationConfig
        >>> from hf_segformer.data.transforms import augment
        >>> image, labels = torch.zeros(3, 48, 36, dtype=torch.uint8), torch.zeros(48, 36, dtype=torch.uint8)
        >>> augment(image, labels, AugmentationConfig(crop_size=16), torch.Generator().manual_seed(0))[0].shape
        torch.Size([3, 16, 16])
    """
    image, labels = _resize(image, labels, options, generator)
    top, left = _draw_crop(labels, options, generator, ignore_index)
    window = (slice(top, top + options.crop_size), slice(left, left + options.crop_size))
    image, labels = image[:, *window], labels[window]
    if _uniform(0, 1, generator) < options.flip:
        image, labels = image.flip(-1), labels.flip(-1)
    if options.distortion:
        if not (image.dtype == torch.uint8 if is_byte_scaled is None else is_byte_scaled):
            raise ValueError(
                f"augmentation.distortion is {options.distortion} for {str(image.dtype).removeprefix('torch.')} images "
                "in units of their own; expected images on the scale of 0 to 255: set data.value_range, or "
                "augmentation.distortion=0"
            )
        image = photometric_distortion(image, options.distortion, generator)
    return image, labels


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _resize(image: Tensor, labels: Tensor, options: AugmentationConfig, generator: Generator) -> tuple[Tensor, Tensor]:
    height, width = labels.shape
    low, high = options.scale
    ratio = _uniform(low, high, generator)
    if options.base_size:
        ratio *= min(options.base_size[0] / min(height, width), options.base_size[1] / max(height, width))
    size = (max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5)))
    if size == (height, width):
        return image, labels
    image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    # float32 holds every label that a configuration allows, below 2**20.
    return image, F.interpolate(labels[None, None].float(), size=size, mode="nearest")[0, 0].to(labels.dtype)


def _draw_crop(labels: Tensor, options: AugmentationConfig, generator: Generator, ignore_index: int) -> tuple[int, int]:
    """Draw the upper left corner of a crop; after ten that one class fills, the eleventh is taken unseen."""
    free = [max(0, side - options.crop_size) + 1 for side in labels.shape]
    for draw in range(_NUM_DRAWS + 1):
        top, left = (int(torch.randint(positions, (), generator=generator)) for positions in free)
        if draw == _NUM_DRAWS or options.max_class_share == 1:
            break
        crop = labels[top : top + options.crop_size, left : left + options.crop_size]
        counts = torch.bincount(crop[(crop != ignore_index) & (crop >= 0)].flatten())
        counts = counts[counts > 0]
        if len(counts) > 1 and counts.max() / counts.sum() < options.max_class_share:
            break
    return top, left


def photometric_distortion(image: Tensor, strength: float, generator: Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue, each with probability 1/2 (SSD, as in the paper's code).

    At full strength brightness moves by up to 32 of 255, contrast and saturation are multiplied by 0.5 to 1.5, and hue
    turns by up to 36 degrees. Contrast comes before saturation and hue or after them, at random. Saturation and hue
    are those of a three-band image; others keep them.

    Args:
        image: (C, H, W), uint8, or floats on the scale of 0 to 255.
        strength: 0 to 1, multiplies every range.
        generator: the only source of randomness.

    Returns:
        the image in its type; only uint8 is rounded.
    """
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
    return pixels.round().to(torch.uint8) if image.dtype == torch.uint8 else pixels.to(image.dtype)


def _turn_colours(pixels: Tensor, saturation: float, turn: float) -> Tensor:
    """Multiply saturation, and turn hue by sixths of the circle, in the hexagonal cone (HSV)."""
    if saturation == 1 and turn == 0:
        return pixels
    value, chroma = pixels.amax(0), pixels.amax(0) - pixels.amin(0)
    if turn == 0:  # the distance of a band from the brightest grows with saturation
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


__all__ = ["augment", "photometric_distortion"]
