"""How a training picture is varied, step by step, before the model sees it.

A step takes a Pillow picture, its label map and a numpy generator, and gives back a picture and a label map; a training
transform is a list of steps. All chance comes from that generator, which is seeded by (seed, epoch, index): a run that
is resumed sees what an uninterrupted one would have seen, whatever else draws random numbers.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

IGNORE_INDEX = 255

Step = Callable[[Image.Image, Image.Image, np.random.Generator], tuple[Image.Image, Image.Image]]


def random_scale(low: float, high: float) -> Step:
    """Resize by a factor drawn evenly on a logarithmic scale, so that halving is as likely as doubling."""

    def step(image, labels, rng):
        factor = np.exp(rng.uniform(np.log(low), np.log(high)))
        size = tuple(max(1, round(side * factor)) for side in image.size)
        return image.resize(size, Image.Resampling.BILINEAR), labels.resize(size, Image.Resampling.NEAREST)

    return step


def random_crop(size: int) -> Step:
    """Cut out size x size pixels; what lies beyond the picture is black and ignored."""

    def step(image, labels, rng):
        left, top = (int(rng.integers(min(0, side - size), max(0, side - size) + 1)) for side in image.size)
        window = Image.new("RGB", (size, size))
        label_window = Image.new("L", (size, size), IGNORE_INDEX)
        window.paste(image, (-left, -top))
        label_window.paste(labels, (-left, -top))
        return window, label_window

    return step


def random_flip(image: Image.Image, labels: Image.Image, rng: np.random.Generator):
    """Mirror left and right, every other time."""
    if rng.random() < 0.5:
        return image, labels
    mirror = Image.Transpose.FLIP_LEFT_RIGHT
    return image.transpose(mirror), labels.transpose(mirror)


def color_jitter(share: float) -> Step:
    """Vary brightness, contrast and the balance of the three channels, each by up to the given share."""

    def step(image, labels, rng):
        contrast, brightness = 1 + rng.uniform(-share, share), 255 * rng.uniform(-share, share) / 2
        balance = 1 + rng.uniform(-share, share, 3) / 2
        # A byte has 256 values, so that a table a channel says it all.
        table = (np.arange(256) - 128) * contrast * balance[:, None] + 128 + brightness
        return image.point(table.clip(0, 255).round().astype(int).ravel().tolist()), labels

    return step


def augment(image: Image.Image, labels: Image.Image, steps: Sequence[Step], rng: np.random.Generator):
    """Take the steps one after the other.

    Args:
        image: picture of any mode; it is made RGB first.
        labels: 8-bit label map of its size.
        steps: see above.
        rng: the only source of chance.

    Returns:
        RGB picture and label map.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from training.augmentation import augment, random_crop, random_flip
        >>> image, labels = Image.new("RGB", (48, 36)), Image.new("L", (48, 36))
        >>> augment(image, labels, [random_flip, random_crop(32)], np.random.default_rng(0))[0].size
        (32, 32)
    """
    image = image.convert("RGB")
    for step in steps:
        image, labels = step(image, labels, rng)
    return image, labels
