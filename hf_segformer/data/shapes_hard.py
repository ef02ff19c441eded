"""A harder generated data set, whose mean IoU measures how well a recipe learns.

As in `shapes`, outlines alone identify a class. What is harder: shapes are smaller, most have about the colour of the
ground, and more of them hides behind others and behind clutter; three more classes are thin or small; light falls off
across the image, with cast shadows, and the camera is noisier. Evaluation images are darker, with a colour cast and a
slight blur, which no training image has: a recipe that overfits the training images' light is seen. Image i of a split
is a function of (seed, split, i) alone.
"""

from math import cos, pi, sin

import numpy as np
from PIL import Image

from . import shapes
from .shapes import SPLITS, Outline, Scene, check_sample

NAMES = (*shapes.NAMES, "needle", "dot", "wire")
PALETTE = (*shapes.PALETTE, (90, 196, 210), (128, 84, 52), (60, 60, 70))

_MAX_HIDDEN = 0.45  # of a shape
_SHARE_VIVID = 0.25


def draw_sample(seed: int, split: str, index: int, size: int = 128) -> tuple[Image.Image, Image.Image]:
    """Draw one image and its mask.

    Args:
        seed: of the whole data set.
        split: `"train"` or `"validation"`; the latter's images are darker.
        index: of the image.
        size: sides H = W in pixels, 16 or more; thin classes are two pixels wide at 96.

    Returns:
        RGB image and 8-bit grey mask; 255 where edges are declared uncertain and under smudges.

    Raises:
        ValueError: if the split is unknown, the index is negative or the size is below 16.

    Examples:
        >>> from hf_segformer.data.shapes_hard import draw_sample
        >>> draw_sample(seed=0, split="validation", index=3, size=64)[0].size
        (64, 64)
    """
    check_sample(split, index, size)
    rng = np.random.default_rng([seed, SPLITS.index(split), index, 1])
    scene = _HardScene(rng, size)
    for _ in range(rng.integers(2, 5)):
        scene.add_clutter()
    for _ in range(rng.integers(6, 10)):
        scene.add_shape(int(rng.integers(1, len(NAMES))))
    for _ in range(rng.integers(1, 4)):
        scene.add_occluder()
    if rng.random() < 0.3:
        scene.add_smudge()
    return scene.finish(is_shifted=split == "validation")


class _HardScene(Scene):
    """A scene of smaller shapes in the ground's tones, under uneven light."""

    outlines: tuple[Outline, ...]
    radii = (0.1, 0.21)
    margin = 0.08
    max_hidden = _MAX_HIDDEN
    thin = tuple(range(len(shapes.NAMES), len(NAMES)))

    def tones_of_shape(self) -> np.ndarray:
        """Two tones of a shape (2, 3): some vivid, most a step from the ground's tone in any direction of colour."""
        if self.rng.random() < _SHARE_VIVID:
            return super().tones_of_shape()
        step = self.rng.standard_normal(3)
        tone = self.tone + step / np.linalg.norm(step) * self.rng.uniform(0.18, 0.36)
        return np.clip(tone + self.rng.uniform(-0.06, 0.06, (2, 3)), 0, 1).astype(np.float32)

    def add_clutter(self) -> None:
        """Put a wobbly blob on the ground."""
        self.paint(*self.place(shapes.blob), self.dull())

    def add_occluder(self) -> None:
        """Put a small blob over anything; its pixels are ground."""
        window, distance = self.place(shapes.blob, (0.05, 0.09))
        self.paint(window, distance, self.dull())
        self.labels[window][distance < 0] = 0

    def light(self, is_shifted: bool) -> np.ndarray:
        """Factors (H, W, 3) of the light: a gradient, a cast shadow on every other image, and the split's shift."""
        light = 1 + self.rng.uniform(0.2, 0.6) * self._slope()
        if self.rng.random() < 0.5:
            edge = (self._slope() - self.rng.uniform(-0.3, 0.3)) * self.size / 3  # three pixels of penumbra
            light = light * (1 - self.rng.uniform(0.3, 0.55) * np.clip(edge, 0, 1))
        if not is_shifted:
            return np.repeat(light[..., None], 3, axis=2)
        warmth = self.rng.uniform(-0.2, 0.2)
        return light[..., None] * self.rng.uniform(0.4, 0.75) * np.array([1 + warmth, 1, 1 - warmth])

    def finish(self, is_shifted: bool = False) -> tuple[Image.Image, Image.Image]:
        """Light the scene, add blur and the camera's noise, and round to 8 bits."""
        lit = self.colors * self.light(is_shifted)
        if is_shifted:
            lit = _blur(lit)
        noise = self.rng.standard_normal(lit.shape) * self.rng.uniform(0.02, 0.05)
        return Image.fromarray((np.clip(lit + noise, 0, 1) * 255).astype(np.uint8)), Image.fromarray(self.labels)

    def _slope(self) -> np.ndarray:
        """A plane (H, W) of mean 0 that rises by about 1 across the image in a random direction."""
        angle = self.rng.uniform(0, 2 * pi)
        slope = (self.grid[0] * sin(angle) + self.grid[1] * cos(angle)) / self.size
        return slope - slope.mean()


def _blur(colors: np.ndarray) -> np.ndarray:
    """Average (H, W, 3) with weights 1 2 1 along both sides."""
    for axis in (0, 1):
        padding = [(1, 1) if each == axis else (0, 0) for each in range(3)]
        padded = np.pad(colors, padding, mode="edge")
        before, after = (np.take(padded, range(start, start + colors.shape[axis]), axis) for start in (0, 2))
        colors = (before + 2 * colors + after) / 4
    return colors


def _needle(rng, across, along, radius):
    return shapes.box(across, along, 1.3 * radius, 0.065 * radius)


def _dot(rng, across, along, radius):
    return np.hypot(across, along) - 0.24 * radius


def _wire(rng, across, along, radius):
    bend = radius * rng.uniform(0.25, 0.4) * np.sin(across / radius * rng.uniform(3.0, 4.5))
    return np.maximum(0.6 * (np.abs(along - bend) - 0.1 * radius), np.abs(across) - 1.3 * radius)


_HardScene.outlines = (*shapes.OUTLINES, _needle, _dot, _wire)

__all__ = ["NAMES", "PALETTE", "draw_sample"]
