"""Augmentation of training images: as in the paper (section 4.1 and the original code), and options beyond it.

In this order: resize by a random ratio, random crop in which no class may fill too much (rotated, if that is on),
flips, quarter turns, photometric distortion, and the options of `photometric`. All randomness comes from one
`torch.Generator`, from which an option that is off draws nothing.

Axes: C bands, H W pixels of an image, S side of the crop.
"""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..config import AugmentationConfig
from ..files import IGNORE_INDEX
from .photometric import augment_photometrically, check_byte_scale, draw_uniform

_NUM_DRAWS = 10


def augment(
    image: Tensor,
    labels: Tensor,
    options: AugmentationConfig,
    generator: Generator,
    ignore_index: int = IGNORE_INDEX,
    is_byte_scaled: bool | None = None,
    focus: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Resize, crop, flip and distort an image and its labels; normalizing and padding are left to `TrainDataset`.

    Args:
        image: (C, H, W), uint8 or floating.
        labels: (H, W), integers.
        options: see `AugmentationConfig`.
        generator: the only source of randomness.
        ignore_index: label of ignored pixels.
        is_byte_scaled: the image is on the scale of 0 to 255; by default if it is uint8.
        focus: class of which the crop holds a pixel, where there is one. A crop that a rotation would turn it out of is
            not rotated.

    Returns:
        image (C, S', S'') and labels (S', S'') of the same types, where S' and S'' are at most S.

    Raises:
        ValueError: if an option is on that does not apply to such an image, as distortion to one that is not on the
            scale of 0 to 255.

    Examples:
        >>> import torch
        >>> from hf_segformer.config import AugmentationConfig
        >>> from hf_segformer.data.transforms import augment
        >>> image, labels = torch.zeros(3, 48, 36, dtype=torch.uint8), torch.zeros(48, 36, dtype=torch.uint8)
        >>> augment(image, labels, AugmentationConfig(crop_size=16), torch.Generator().manual_seed(0))[0].shape
        torch.Size([3, 16, 16])
    """
    if is_byte_scaled is None:
        is_byte_scaled = image.dtype == torch.uint8
    image, labels = _resize(image, labels, options, generator)
    top, left = _draw_crop(labels, options, generator, ignore_index, focus)
    window = (slice(top, top + options.crop_size), slice(left, left + options.crop_size))
    crop = image[:, *window], labels[window]
    if options.rotation:
        degrees = draw_uniform(-options.rotation, options.rotation, generator)
        turned = crop_rotated(image, labels, (top, left), options.crop_size, degrees, ignore_index)
        is_lost = focus is not None and bool((crop[1] == focus).any()) and not (turned[1] == focus).any()
        crop = crop if is_lost else turned
    image, labels = crop
    image, labels = _turn(image, labels, options, generator)
    if options.distortion:
        check_byte_scale("distortion", options.distortion, image.dtype, is_byte_scaled)
        image = photometric_distortion(image, options.distortion, generator)
    return augment_photometrically(image, options, generator, is_byte_scaled), labels


def _turn(image: Tensor, labels: Tensor, options: AugmentationConfig, generator: Generator) -> tuple[Tensor, Tensor]:
    """Flip at random, and turn by quarters."""
    if draw_uniform(0, 1, generator) < options.flip:
        image, labels = image.flip(-1), labels.flip(-1)
    if options.vertical_flip and draw_uniform(0, 1, generator) < options.vertical_flip:
        image, labels = image.flip(-2), labels.flip(-2)
    if options.quarter_turns and draw_uniform(0, 1, generator) < options.quarter_turns:
        number = 1 + int(torch.randint(3, (), generator=generator))
        image, labels = image.rot90(number, (-2, -1)), labels.rot90(number)
    return image, labels


def _resize(image: Tensor, labels: Tensor, options: AugmentationConfig, generator: Generator) -> tuple[Tensor, Tensor]:
    height, width = labels.shape
    low, high = options.scale
    ratio = draw_uniform(low, high, generator)
    if options.base_size:
        ratio *= min(options.base_size[0] / min(height, width), options.base_size[1] / max(height, width))
    size = (max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5)))
    if size == (height, width):
        return image, labels
    image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    # float32 holds every label that a configuration allows, below 2**20.
    return image, F.interpolate(labels[None, None].float(), size=size, mode="nearest")[0, 0].to(labels.dtype)


def _draw_crop(
    labels: Tensor, options: AugmentationConfig, generator: Generator, ignore_index: int, focus: int | None
) -> tuple[int, int]:
    """Draw the upper left corner of a crop; after ten that one class fills, the eleventh is taken unseen."""
    free = [max(0, side - options.crop_size) + 1 for side in labels.shape]
    pixels = None if focus is None else (labels == focus).nonzero()
    for draw in range(_NUM_DRAWS + 1):
        if pixels is None or not len(pixels):
            top, left = (int(torch.randint(positions, (), generator=generator)) for positions in free)
        else:
            top, left = _draw_around(pixels, options.crop_size, free, generator)
        if draw == _NUM_DRAWS or options.max_class_share == 1:
            break
        crop = labels[top : top + options.crop_size, left : left + options.crop_size]
        counts = torch.bincount(crop[(crop != ignore_index) & (crop >= 0)].flatten())
        counts = counts[counts > 0]
        if len(counts) > 1 and counts.max() / counts.sum() < options.max_class_share:
            break
    return top, left


def _draw_around(pixels: Tensor, side: int, free: list[int], generator: Generator) -> tuple[int, int]:
    """Draw one of some pixels (N, 2), and a corner of those from which a crop holds it."""
    pixel = pixels[int(torch.randint(len(pixels), (), generator=generator))].tolist()
    corners = []
    for at, positions in zip(pixel, free, strict=True):
        first = max(0, at - side + 1)
        corners.append(first + int(torch.randint(min(at, positions - 1) - first + 1, (), generator=generator)))
    return corners[0], corners[1]


def crop_rotated(
    image: Tensor, labels: Tensor, corner: tuple[int, int], side: int, degrees: float, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """Cut a crop that is turned around its center; what it needs from around itself is taken from the image.

    Args:
        image: (C, H, W), uint8 or floating; resampled bilinearly, and mirrored at its edges.
        labels: (H, W); of the nearest pixel, and `ignore_index` outside the image.
        corner: top and left of the crop before it is turned.
        side: S of the crop; less where the image ends.
        degrees: anticlockwise turn of what the crop shows.
        ignore_index: label of ignored pixels.

    Returns:
        image (C, S', S'') and labels (S', S'') in their types, of the same size as without the turn.
    """
    height, width = labels.shape
    rows, columns = (
        torch.arange(start, min(start + side, stop), dtype=torch.float64)
        for start, stop in zip(corner, (height, width), strict=True)
    )
    down, right = (rows - rows.mean())[:, None], columns - columns.mean()
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    at_row = rows.mean() + cosine * down + sine * right
    at_column = columns.mean() + cosine * right - sine * down
    # Only the part that is needed becomes floating.
    low = [max(0, math.floor(float(at.min())) - 1) for at in (at_row, at_column)]
    high = [min(stop, math.ceil(float(at.max())) + 2) for at, stop in ((at_row, height), (at_column, width))]
    part = image[:, low[0] : high[0], low[1] : high[1]].float()
    sizes = torch.tensor([high[1] - low[1], high[0] - low[0]])
    grid = torch.stack([at_column - low[1], at_row - low[0]], dim=-1)
    grid = ((2 * grid + 1) / sizes - 1).float()  # pixel centers; -1 and 1 are the part's outer edges
    turned = F.grid_sample(part[None], grid[None], "bilinear", "reflection", align_corners=False)[0]
    nearest = [at.round().long() for at in (at_row, at_column)]
    outside = (nearest[0] < 0) | (nearest[0] >= height) | (nearest[1] < 0) | (nearest[1] >= width)
    found = labels[nearest[0].clamp(0, height - 1), nearest[1].clamp(0, width - 1)]
    turned = turned.round().to(torch.uint8) if image.dtype == torch.uint8 else turned.to(image.dtype)
    return turned, found.masked_fill(outside, ignore_index)


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
        return draw_uniform(0, 1, generator) < 0.5

    def contrast(pixels: Tensor) -> Tensor:
        if not is_drawn():
            return pixels
        return (pixels * (1 + strength * draw_uniform(-0.5, 0.5, generator))).clamp(0, 255)

    if is_drawn():
        pixels = (pixels + strength * draw_uniform(-32, 32, generator)).clamp(0, 255)
    contrast_first = is_drawn()
    if contrast_first:
        pixels = contrast(pixels)
    if len(pixels) == 3:
        saturation = 1 + strength * draw_uniform(-0.5, 0.5, generator) if is_drawn() else 1.0
        turn = strength * draw_uniform(-0.6, 0.6, generator) if is_drawn() else 0.0
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


__all__ = ["augment", "crop_rotated", "photometric_distortion"]
