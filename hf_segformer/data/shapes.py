"""A generated data set: textured shapes that hide one another on cluttered ground.

It needs no download, and any number of images can be drawn. Shapes are vivid, ground and clutter dull, but textures and
colours have one distribution for all classes: only the outline identifies a class. Image i of a split is a function of
(seed, split, i) alone.

Outlines are signed distances: negative inside, in pixels, from which both the label (below 0) and the soft edge of
the image follow. Axes: H W pixels, here H = W.
"""

from collections.abc import Callable
from io import BytesIO
from math import cos, pi, sin

import numpy as np
from PIL import Image

from ..files import IGNORE_INDEX
from ..progress import Progress

NAMES = ("ground", "disc", "triangle", "bar", "ring", "cross", "star")
PALETTE = (
    (214, 209, 196),
    (66, 109, 190),
    (226, 104, 60),
    (242, 190, 60),
    (74, 160, 98),
    (150, 84, 166),
    (214, 72, 122),
)
SPLITS = ("train", "validation")

# (generator, across (h, w), along (h, w), radius) -> signed distance (h, w), all in pixels
Outline = Callable[[np.random.Generator, np.ndarray, np.ndarray, float], np.ndarray]
Window = tuple[slice, slice]
# (seed, split, index, size) -> image and mask
Draw = Callable[[int, str, int, int], tuple[Image.Image, Image.Image]]

_NUM_PATCHES = 7


def draw_sample(seed: int, split: str, index: int, size: int = 128) -> tuple[Image.Image, Image.Image]:
    """Draw one image and its mask.

    Args:
        seed: of the whole data set.
        split: `"train"` or `"validation"`; they share no image.
        index: of the image.
        size: sides H = W in pixels, 16 or more.

    Returns:
        RGB image and 8-bit grey mask; 255 where edges are declared uncertain and under smudges.

    Raises:
        ValueError: if the split is unknown, the index is negative or the size is below 16.

    Examples:
        >>> from hf_segformer.data.shapes import draw_sample
        >>> image, mask = draw_sample(seed=0, split="train", index=3, size=64)
        >>> image.size, mask.mode
        ((64, 64), 'L')
    """
    check_sample(split, index, size)
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = Scene(rng, size)
    for _ in range(rng.integers(2, 5)):
        scene.add_clutter()
    for _ in range(rng.integers(3, 6)):
        scene.add_shape(int(rng.integers(1, len(NAMES))))
    if rng.random() < 0.3:
        scene.add_smudge()
    return scene.finish()


def draw_single(seed: int, split: str, index: int, size: int = 64) -> tuple[Image.Image, int]:
    """Draw an image of one large shape on cluttered ground, for classification.

    Args:
        seed: of the whole data set.
        split: `"train"` or `"validation"`.
        index: of the image.
        size: sides H = W in pixels, 16 or more.

    Returns:
        RGB image, and the number of its shape in `NAMES[1:]`.

    Raises:
        ValueError: see `draw_sample`.
    """
    check_sample(split, index, size)
    rng = np.random.default_rng([seed, SPLITS.index(split), index, 1])
    scene = _SingleScene(rng, size)
    for _ in range(rng.integers(1, 4)):
        scene.add_clutter()
    label = int(rng.integers(1, len(NAMES)))
    scene.add_shape(label)
    return scene.finish()[0], label - 1


def check_sample(split: str, index: int, size: int) -> None:
    """Raise ValueError if the split is unknown, the index is negative or the size is below 16."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected {', '.join(SPLITS)}")
    if size < 16 or index < 0:
        raise ValueError(f"size is {size} and index {index}; expected at least 16 and at least 0")


def shapes_dataset(split: str, num_samples: int, size: int = 128, seed: int = 0, draw: Draw = draw_sample):
    """Draw the first images of a split as a `datasets.Dataset`, held in memory.

    Args:
        split: `"train"` or `"validation"`.
        num_samples: number of images.
        size: sides H = W in pixels.
        seed: of the whole data set.
        draw: `draw_sample` of this module, or of `shapes_hard`.

    Returns:
        data set with the columns `image` (RGB) and `label` (8-bit grey), both as PNG.

    Raises:
        ValueError: see `draw_sample`.
    """
    import datasets

    columns: dict[str, list] = {"image": [], "label": []}
    with Progress(f"draw shapes, {split}", num_samples, "images") as bar:
        for index in range(num_samples):
            for column, image in zip(columns.values(), draw(seed, split, index, size), strict=True):
                column.append({"bytes": _png(image), "path": None})
            bar.update()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    return datasets.Dataset.from_dict(columns, features=features)


def single_shapes_dataset(split: str, num_samples: int, size: int = 64, seed: int = 0):
    """Draw the first images of a split of `draw_single` as a `datasets.Dataset`, held in memory.

    Returns:
        data set with the columns `image` (RGB, as PNG) and `label` (`ClassLabel`).
    """
    import datasets

    columns: dict[str, list] = {"image": [], "label": []}
    for index in range(num_samples):
        image, label = draw_single(seed, split, index, size)
        columns["image"].append({"bytes": _png(image), "path": None})
        columns["label"].append(label)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES[1:]))})
    return datasets.Dataset.from_dict(columns, features=features)


def _png(image: Image.Image) -> bytes:
    """Encode a mask with compression, an image without: noise shrinks by a quarter, and then decodes in triple time."""
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=int(image.mode == "L"))
    return buffer.getvalue()


class Scene:
    """An image under construction: `colors` (H, W, 3) of 0..1, `labels` and `owners` (H, W).

    Attributes:
        outlines: of the classes, from 1.
        radii: smallest and largest radius of a shape as shares of the image's side.
        margin: distance of a shape's centre from the image's edge, as a share of its side.
        max_hidden: share of a shape that others may hide; more would leave outlines that are truly ambiguous.
        thin: classes without uncertain edges, which would cover them.
    """

    outlines: tuple[Outline, ...]
    radii = (0.16, 0.27)
    margin = 0.17
    max_hidden = 0.2
    thin: tuple[int, ...] = ()

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size = rng, size
        self.grid = np.indices((size, size), dtype=np.float32)
        self.labels = np.zeros((size, size), dtype=np.uint8)
        self.owners = np.zeros((size, size), dtype=np.uint8)  # number of the shape on top, 0 is the ground
        self.may_hide = [size * size]  # pixels of each shape that may still be hidden; of the ground all
        self.colors = np.empty((size, size, 3), dtype=np.float32)
        self.tone = rng.uniform(0.3, 0.7) + rng.uniform(-0.06, 0.06, 3)  # of ground and clutter
        self._lay_ground()

    def _lay_ground(self) -> None:
        """Cover the ground in patches around random centres, each with its own texture."""
        centers = self.rng.uniform(0, self.size, (_NUM_PATCHES, 2, 1, 1)).astype(np.float32)
        nearest = np.square(self.grid - centers).sum(axis=1).argmin(axis=0)
        for patch in range(_NUM_PATCHES):
            inside = nearest == patch
            self.colors[inside] = _texture(self.rng, self.grid[:, inside], self.size, self.dull())

    def dull(self) -> np.ndarray:
        """Two tones near that of the ground, (2, 3)."""
        return (self.tone + self.rng.uniform(-0.12, 0.12, (2, 3))).astype(np.float32)

    def tones_of_shape(self) -> np.ndarray:
        """Two tones of one strong colour, (2, 3)."""
        return _vivid(self.rng)

    def add_shape(self, label: int) -> None:
        """Put a shape on top, at a place where it does not hide another one too much; if there is none, do not."""
        for _ in range(10):
            window, distance = self.place(self.outlines[label - 1])
            inside = distance < 0
            hidden = np.bincount(self.owners[window][inside], minlength=len(self.may_hide))
            if inside.any() and (hidden <= self.may_hide).all():
                self.paint(window, distance, self.tones_of_shape())
                self._label(window, distance, label)
                self.may_hide = [*(self.may_hide - hidden), int(self.max_hidden * inside.sum())]
                return

    def add_clutter(self) -> None:
        """Put a wobbly blob or a stroke on the ground: textured and shaded as shapes are, but no class."""
        self.paint(*self.place(blob if self.rng.random() < 0.6 else _stroke), self.dull())

    def add_smudge(self) -> None:
        """Wipe out a spot, and ignore it."""
        radius, center = self.size * self.rng.uniform(0.05, 0.09), self.rng.uniform(0, self.size, (2, 1, 1))
        inside = np.square(self.grid - center).sum(axis=0) < radius**2
        self.colors[inside] = self.colors[inside].mean(axis=0)
        self.labels[inside] = IGNORE_INDEX

    def finish(self) -> tuple[Image.Image, Image.Image]:
        """Light the scene from one side, add the camera's noise and round to 8 bits."""
        angle = self.rng.uniform(0, 2 * pi)
        slope = (self.grid[0] * sin(angle) + self.grid[1] * cos(angle)) / self.size
        noise = self.rng.standard_normal(self.colors.shape, dtype=np.float32)
        lit = self.colors * (1 + 0.25 * (slope - slope.mean()))[..., None] + 0.02 * noise
        return Image.fromarray((np.clip(lit, 0, 1) * 255).astype(np.uint8)), Image.fromarray(self.labels)

    def place(self, outline: Outline, radii: tuple[float, float] | None = None) -> tuple[Window, np.ndarray]:
        """Take a random place, size and angle: the window around it and the outline's signed distance in there."""
        radius = self.size * self.rng.uniform(*(radii or self.radii))
        center = self.rng.uniform(self.margin, 1 - self.margin, 2) * self.size
        low, high = np.clip([center - 1.7 * radius, center + 1.7 * radius], 0, self.size).astype(int)
        window = slice(low[0], high[0]), slice(low[1], high[1])
        angle = self.rng.uniform(0, 2 * pi)
        down, right = self.grid[0][window] - center[0], self.grid[1][window] - center[1]
        across = right * cos(angle) + down * sin(angle)
        along = down * cos(angle) - right * sin(angle)
        return window, outline(self.rng, across, along, radius).astype(np.float32)

    def paint(self, window: Window, distance: np.ndarray, colors: np.ndarray) -> None:
        """Lay a texture inside the outline, darker towards its edge, with a soft shadow around it."""
        shadow = 0.35 * np.exp(-np.maximum(distance, 0) / (0.02 * self.size))
        rim = 1 - 0.3 * np.exp(np.minimum(distance, 0) / (0.025 * self.size))
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        texture = _texture(self.rng, self.grid[:, *window], self.size, colors)
        below = self.colors[window] * (1 - shadow)[..., None]
        self.colors[window] = below + (texture * rim[..., None] - below) * cover

    def _label(self, window: Window, distance: np.ndarray, label: int) -> None:
        """Mark the inside, and on a third of the shapes, thin ones apart, declare a band along the edge uncertain."""
        inside = distance < 0
        self.owners[window][inside] = len(self.may_hide)
        self.labels[window][inside] = label
        if self.rng.random() < 0.33 and label not in self.thin:
            self.labels[window][np.abs(distance) < self.size / 100] = IGNORE_INDEX


class _SingleScene(Scene):
    """A scene of one shape, which takes up most of it."""

    radii = (0.32, 0.42)
    margin = 0.42


def _disc(rng, across, along, radius):
    return np.hypot(across, along) - 0.85 * radius


def _triangle(rng, across, along, radius):
    return _polygon(
        across, along, radius * np.array([1.0, 1.0, 1.0]), np.array([0.0, 2.1, 4.2]) + rng.uniform(-0.15, 0.15, 3)
    )


def _bar(rng, across, along, radius):
    return box(across, along, 1.2 * radius, radius * rng.uniform(0.34, 0.46))


def _ring(rng, across, along, radius):
    width = radius * rng.uniform(0.2, 0.27)
    return np.abs(np.hypot(across, along) - (radius - width)) - width


def _cross(rng, across, along, radius):
    width = radius * rng.uniform(0.28, 0.38)
    return np.minimum(box(across, along, radius, width), box(across, along, width, radius))


def _star(rng, across, along, radius):
    radii = 1.1 * radius * np.array([1.0, rng.uniform(0.42, 0.5)] * 5)
    return _polygon(across, along, radii, np.arange(10) * pi / 5)


OUTLINES: tuple[Outline, ...] = (_disc, _triangle, _bar, _ring, _cross, _star)
Scene.outlines = OUTLINES


def blob(rng, across, along, radius):
    """Signed distance to a wobbly blob, about."""
    angle = np.arctan2(along, across)
    wobble = sum(rng.uniform(0.1, 0.25) * np.sin(waves * angle + rng.uniform(0, 2 * pi)) for waves in (2, 3, 5))
    return 0.7 * (np.hypot(across, along) - radius * (0.75 + wobble))


def _stroke(rng, across, along, radius):
    bend = radius * rng.uniform(0.3, 0.6) * np.sin(across / radius * rng.uniform(1.5, 2.5))
    return np.maximum(0.7 * (np.abs(along - bend) - rng.uniform(0.06, 0.12) * radius), np.abs(across) - 1.4 * radius)


def box(across, along, half_width, half_height):
    """Signed distance to a rectangle by its larger coordinate."""
    return np.maximum(np.abs(across) - half_width, np.abs(along) - half_height)


def _polygon(across, along, radii, angles):
    """Signed distance to a closed polygon given by its corners, going round, in polar coordinates."""
    corners = radii * np.cos(angles), radii * np.sin(angles)
    nearest = np.full(across.shape, np.inf, dtype=np.float32)
    inside = np.zeros(across.shape, dtype=bool)
    for right, down, next_right, next_down in zip(*corners, *(np.roll(corner, -1) for corner in corners), strict=True):
        edge = next_right - right, next_down - down
        share = ((across - right) * edge[0] + (along - down) * edge[1]) / (edge[0] ** 2 + edge[1] ** 2)
        share = np.clip(share, 0, 1)
        nearest = np.minimum(nearest, np.hypot(across - right - share * edge[0], along - down - share * edge[1]))
        between = (down > along) != (next_down > along)
        # A ray to the right crosses an edge once on each way out, so an odd number of crossings is inside.
        inside ^= between & (across - right < (along - down) * edge[0] / (edge[1] or 1e-9))
    return np.where(inside, -nearest, nearest)


def _vivid(rng):
    """Two tones of one strong colour, (2, 3) of 0..1."""
    hue, saturation, value = rng.uniform(0, 1), rng.uniform(0.5, 1), rng.uniform(0.6, 1)
    pure = np.clip(np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1, 0, 1)
    color = value * (1 - saturation * (1 - pure))
    return np.stack([color, color * rng.uniform(0.55, 0.8)]).astype(np.float32)


def _texture(rng, grid, size, colors):
    """Stripes, checks, dots or marble between two colours: rows and columns (2, ...) -> (..., 3) of 0..1."""
    row, column = grid
    angle, period = rng.uniform(0, pi), size * rng.uniform(0.04, 0.12)
    across = (column * cos(angle) + row * sin(angle)) * (2 * pi / period)
    along = (row * cos(angle) - column * sin(angle)) * (2 * pi / period)
    kind = rng.integers(4)
    if kind == 0:
        wave = np.sin(across)
    elif kind == 1:
        wave = np.sin(across) * np.sin(along) * 2
    elif kind == 2:
        wave = np.cos(across) + np.cos(along) - 0.8
    else:
        wave = np.sin(across * 0.3 + 2 * np.sin(along * 0.35 + rng.uniform(0, 6)) + np.sin(across * 0.7))
    share = np.clip(0.5 + 1.5 * wave, 0, 1)[..., None]
    return colors[0] * (1 - share) + colors[1] * share


__all__ = [
    "NAMES",
    "OUTLINES",
    "PALETTE",
    "SPLITS",
    "Draw",
    "Outline",
    "Scene",
    "Window",
    "blob",
    "box",
    "check_sample",
    "draw_sample",
    "draw_single",
    "shapes_dataset",
    "single_shapes_dataset",
]
