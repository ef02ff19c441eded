"""Sheets of sample images with their errors: image, labels, prediction and the pixels that are wrong.

Axes: K classes, H W the mask's sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..visualization import Color, colorize, figure

_WRONG = (214, 39, 40)
_PANEL_HEIGHT = 220


@dataclass(frozen=True, eq=False)
class Sample:
    """One image of a sheet.

    Attributes:
        image: RGB image, of any size.
        prediction: (H, W) class ids.
        labels: (H, W) true class ids.
        caption: line below it.
    """

    image: Image.Image
    prediction: np.ndarray
    labels: np.ndarray
    caption: str = ""


def error_map(image: Image.Image, prediction: np.ndarray, labels: np.ndarray, ignore_index: int) -> Image.Image:
    """Pixels that are wrong in red over the pale image; ignored ones are hatched.

    Args:
        image: any image; it is scaled to the labels' size.
        prediction: (H, W) class ids.
        labels: (H, W) true class ids.
        ignore_index: label of ignored pixels.

    Returns:
        RGB image of W x H pixels.

    Raises:
        ValueError: if prediction and labels differ in shape.

    Examples:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from hf_segformer.evaluation.samples import error_map
        >>> labels = np.array([[0, 1], [0, 255]])
        >>> error_map(Image.new("RGB", (2, 2)), np.zeros((2, 2), dtype=int), labels, 255).getpixel((1, 0))
        (214, 39, 40)
    """
    if prediction.shape != labels.shape:
        raise ValueError(f"prediction is {prediction.shape} and labels are {labels.shape}; expected the same shape")
    height, width = labels.shape
    pale = 150 + np.asarray(image.convert("L").resize((width, height))).astype(np.float64) * (105 / 255)
    pixels = np.repeat(pale.astype(np.uint8)[..., None], 3, axis=-1)
    is_ignored = labels == ignore_index
    pixels[(prediction != labels) & ~is_ignored] = _WRONG
    hatched = np.asarray(colorize(np.full(labels.shape, -1), []))
    return Image.fromarray(np.where(is_ignored[..., None], hatched, pixels))


def sample_sheet(
    samples: Sequence[Sample], class_names: Sequence[str], palette: Sequence[Color], ignore_index: int
) -> Image.Image:
    """Samples in rows, image, labels, prediction and errors in columns, with a legend of the classes that occur.

    Args:
        samples: at least one.
        class_names: of the K classes.
        palette: one (red, green, blue) a class.
        ignore_index: label of ignored pixels.

    Raises:
        ValueError: if there is no sample.
    """
    if not samples:
        raise ValueError("there are no samples to draw; expected at least one")
    rows, present = [], set()
    for sample in samples:
        prediction, labels = np.asarray(sample.prediction), np.asarray(sample.labels)
        present |= set(np.unique(prediction).tolist()) | set(np.unique(labels).tolist())
        errors = error_map(sample.image, prediction, labels, ignore_index)
        masks = [colorize(_as_no_class(mask, ignore_index), palette) for mask in (labels, prediction)]
        panels = [sample.image.convert("RGB").resize(errors.size), *masks, errors]
        rows.append([_reduced(panel) for panel in panels])
    shown = [place for place in range(len(class_names)) if place in present and place != ignore_index]
    legend = [f"{class_names[place]}" for place in shown], [palette[place] for place in shown]
    captions = [sample.caption for sample in samples]
    return figure(rows, ["image", "labels", "prediction", "errors"], *legend, captions, panel_height=_PANEL_HEIGHT)


def _as_no_class(mask: np.ndarray, ignore_index: int) -> np.ndarray:
    return np.where(mask == ignore_index, -1, mask.astype(np.int64))


def _reduced(panel: Image.Image) -> Image.Image:
    """The panel at twice the height it is drawn at, at most; a hundred megapixels need not go through the sheet."""
    factor = max(1, panel.height // (2 * _PANEL_HEIGHT))
    return panel.reduce(factor) if factor > 1 else panel


__all__ = ["Sample", "error_map", "sample_sheet"]
