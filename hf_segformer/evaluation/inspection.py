"""Inside view of a model on one image: attention of a pixel, principal components of the features, and uncertainty.

The attention of one pixel is one row of a stage's attention maps. It is computed from the block's own query and keys,
so the maps of all N x M pairs are never held, and images of any size can be inspected.

Axes: A heads, C channels, H W the image's sides, h w a stage's grid, N = h*w tokens, M reduced tokens, K classes.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from ..data.readers import read_whole_image
from ..image_io_segformer import read_image
from ..inference.segmenter import Segmenter, inference_mode_of
from ..visualization import Color, colorize, displayed_as_fed, overlay, with_legend

_HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
_PAPER, _INK = (255, 255, 255), (32, 33, 36)
_PANEL_WIDTH, _MOST_PANEL_HEIGHT, _GAP, _TITLE = 320, 4 * 320, 12, 28


@dataclass(frozen=True, eq=False)
class Inspection:
    """Inside view of a model on one image.

    Attributes:
        image: the image, RGB.
        point: row and column of the chosen pixel.
        prediction: int64 (H, W) class ids.
        runner_up: int64 (H, W), the second most probable class, of a binary model the other one.
        uncertainty: float32 (H, W), entropy of the classes' probabilities as a share of the largest, log K.
        attention: of each stage, float32 (h, w): weights that the last block's heads give in the mean to each place
            for the chosen pixel; tokens that were reduced into one share its weight.
        components: of each stage, float32 (h, w, 3): the features' first three principal components, from 0 to 1.
    """

    image: Image.Image
    point: tuple[int, int]
    prediction: np.ndarray
    runner_up: np.ndarray
    uncertainty: np.ndarray
    attention: tuple[np.ndarray, ...]
    components: tuple[np.ndarray, ...]


def inspect_image(model: Any, processor: Any, image: Any, point: Sequence[int] | None = None) -> Inspection:
    """Run a model on an image once and look at its stages.

    Args:
        model: a `SegFormerForSemanticSegmentation`; it is left as it was.
        processor: prepares the image.
        image: a path, Pillow image or array, as the processor takes it.
        point: column and row of the chosen pixel of the image; by default its middle.

    Returns:
        the `Inspection`.

    Raises:
        ValueError: if the image does not fit the processor, or the point is outside.
        OSError: if the image cannot be read.

    Examples:
        >>> from PIL import Image
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
        >>> from hf_segformer.evaluation.inspection import inspect_image
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig(depths=[1, 1, 1, 1], num_labels=5))
        >>> inspection = inspect_image(model, SegFormerImageProcessor(size=64), Image.new("RGB", (90, 60)), (10, 20))
        >>> [attention.shape for attention in inspection.attention]
        [(16, 16), (8, 8), (4, 4), (2, 2)]
    """
    num_channels, any_range = model.config.num_channels, processor.value_range is not None
    if isinstance(image, str | os.PathLike):
        pixels = read_whole_image(image, num_channels, any_range=any_range)
    else:
        pixels = read_image(image, num_channels, None, "the image", any_range)
    is_array = isinstance(pixels, np.ndarray)
    height, width = pixels.shape[-2:] if isinstance(pixels, np.ndarray) else pixels.size[::-1]
    row, column = _checked_point(point, height, width)
    segmenter = Segmenter(model, processor)
    [view] = segmenter.preprocess(pixels, "channels_first" if is_array else None)
    view = view.to(model.device, model.dtype)
    place = (row + 0.5) / height, (column + 0.5) / width
    with inference_mode_of(model), _attention_of(model.segformer.encoder, place) as attention:
        outputs = model(view, output_hidden_states=True)
    probabilities = _probabilities(outputs.logits, (height, width))
    prediction, runner_up = probabilities.topk(2, dim=0).indices.cpu().numpy()
    if model.config.num_labels == 1:
        prediction = (probabilities[1] > processor.binary_threshold).long().cpu().numpy()
        runner_up = 1 - prediction
    return Inspection(
        image=displayed_as_fed(pixels, processor).convert("RGB"),
        point=(row, column),
        prediction=prediction,
        runner_up=runner_up,
        uncertainty=relative_entropy(probabilities).cpu().numpy(),
        attention=tuple(attention),
        components=tuple(principal_components(features[0]) for features in outputs.hidden_states),
    )


def draw_inspection(inspection: Inspection, names: Sequence[str], palette: Sequence[Color]) -> Image.Image:
    """One image of everything: predictions and uncertainty, attention by stage, features by stage, with a legend.

    Args:
        inspection: of `inspect_image`.
        names: of the K classes.
        palette: one (red, green, blue) a class.
    """
    image, size = inspection.image, _panel_size(inspection.image)
    row, column = inspection.point
    mark = round((column + 0.5) / image.width * size[0]), round((row + 0.5) / image.height * size[1])
    heat = _heat(inspection.uncertainty / max(float(inspection.uncertainty.max()), 1e-6))
    panels = [
        ("image", _with_mark(image.resize(size), mark)),
        ("prediction", overlay(image, inspection.prediction, palette).resize(size)),
        ("second most probable class", colorize(inspection.runner_up, palette).resize(size)),
        (f"uncertainty, at most {float(inspection.uncertainty.max()):.2f}", heat.resize(size)),
    ]
    for stage, weights in enumerate(inspection.attention, start=1):
        panels.append((f"attention of the pixel, stage {stage}", _with_mark(_attention_panel(image, weights), mark)))
    for stage, components in enumerate(inspection.components, start=1):
        colors = Image.fromarray((255 * components).round().astype(np.uint8))
        panels.append((f"features, stage {stage}", colors.resize(size, Image.Resampling.NEAREST)))
    grid = _grid(panels, 4)
    # Below a strip, since letters grow with the image that a legend is for.
    legend = with_legend(Image.new("RGB", (grid.width, 1), _PAPER), inspection.prediction, names, palette, "below")
    canvas = Image.new("RGB", (max(grid.width, legend.width), grid.height + legend.height), _PAPER)
    canvas.paste(grid, (0, 0))
    canvas.paste(legend, (0, grid.height))
    return canvas


def relative_entropy(probabilities: Tensor) -> Tensor:
    """Entropy of probabilities (K, H, W) as a share of log K, that of a model that knows nothing: (H, W), 0 to 1.

    Examples:
        >>> import torch
        >>> from hf_segformer.evaluation.inspection import relative_entropy
        >>> relative_entropy(torch.tensor([[[0.5, 1.0]], [[0.5, 0.0]]])).tolist()
        [[1.0, 0.0]]
    """
    entropy = torch.special.entr(probabilities).sum(dim=0)
    return (entropy / np.log(len(probabilities))).clamp(0, 1)


def principal_components(features: Tensor, number: int = 3) -> np.ndarray:
    """First principal components of features, for display.

    Each is scaled from its 1st to its 99th percentile; its sign is that of its largest loading, which is positive.

    Args:
        features: (C, h, w).
        number: of components; where there are fewer, the others are 0.5.

    Returns:
        float32 (h, w, number), 0 to 1.
    """
    channels, height, width = features.shape
    values = features.double().flatten(1).cpu()  # (C, N)
    centered = values - values.mean(dim=1, keepdim=True)
    strength, loadings = torch.linalg.eigh(centered @ centered.T)  # ascending
    result = np.full((height * width, number), 0.5, dtype=np.float32)
    for place in range(min(number, channels)):
        loading = loadings[:, -1 - place]
        if strength[-1 - place] <= 1e-12 * max(strength[-1].item(), 1e-300):
            continue  # nothing but rounding
        scores = (loading * loading[loading.abs().argmax()].sign() @ centered).numpy()
        low, high = np.percentile(scores, (1, 99))
        result[:, place] = np.clip((scores - low) / max(high - low, 1e-12), 0, 1)
    return result.reshape(height, width, number)


@contextmanager
def _attention_of(encoder: Any, place: tuple[float, float]) -> Iterator[list[np.ndarray]]:
    """A list that a forward pass fills with the attention (h, w) of each stage's last block.

    Args:
        encoder: of the model.
        place: the chosen pixel as shares of height and width.
    """
    rows: list[np.ndarray] = []

    def record(module: Any, inputs: tuple) -> None:
        tokens, height, width = inputs[:3]
        rows.append(_attention_row(module, tokens, height, width, place).cpu().numpy())

    # A module with a hook is left to the reference implementation, which calls it.
    hooks = [blocks[-1].attention.self.register_forward_pre_hook(record) for blocks in encoder.block]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def _attention_row(module: Any, tokens: Tensor, height: int, width: int, place: tuple[float, float]) -> Tensor:
    """Weights (h, w) of one token's query, the mean over the heads, at every place of the grid."""
    row, column = (min(int(share * side), side - 1) for share, side in zip(place, (height, width), strict=True))
    token = tokens[:, row * width + column].unsqueeze(1)
    ratio = module.sr_ratio
    reduced = module.reduce(tokens, height, width) if ratio > 1 else tokens
    scores = module.split_heads(module.query(token)) @ module.split_heads(module.key(reduced)).transpose(-2, -1)
    weights = (scores.float() * module.scaling).softmax(dim=-1).mean(dim=1)  # (1, 1, M)
    grid = weights.reshape(max(1, height // ratio), max(1, width // ratio))
    spread = grid.repeat_interleave(ratio, 0).repeat_interleave(ratio, 1)[:height, :width] / ratio**2
    # Rows and columns that do not fill a window of the reduction have no key.
    return F.pad(spread, (0, width - spread.shape[1], 0, height - spread.shape[0]))


def _probabilities(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (1, K, h, w) -> probabilities (K, H, W); of a binary model both classes'."""
    logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)[0]
    if len(logits) > 1:
        return logits.softmax(dim=0)
    return torch.cat([(-logits).sigmoid(), logits.sigmoid()])


def _checked_point(point: Sequence[int] | None, height: int, width: int) -> tuple[int, int]:
    """Row and column of the point, which is column and row."""
    if point is None:
        return height // 2, width // 2
    column, row = point
    if not (0 <= column < width and 0 <= row < height):
        raise ValueError(f"point is {column} {row}; expected a column below {width} and a row below {height}")
    return row, column


def _panel_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of a panel: the usual width, unless the panel of a narrow image would be too high."""
    width = min(_PANEL_WIDTH, _MOST_PANEL_HEIGHT * image.width / image.height)
    return max(1, round(width)), max(1, round(width * image.height / image.width))


def _heat(shares: np.ndarray) -> Image.Image:
    """Shares from 0 to 1 as colours from black over red to pale yellow."""
    stops = np.linspace(0, 1, len(_HEAT))
    bands = [np.interp(shares, stops, band) for band in zip(*_HEAT, strict=True)]
    return Image.fromarray(np.stack(bands, axis=-1).round().astype(np.uint8))


def _attention_panel(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """The pale image with heat over it, the more opaque the larger the weight."""
    size = _panel_size(image)
    coarse = Image.fromarray((weights / max(float(weights.max()), 1e-12)).astype(np.float32))
    shares = np.asarray(coarse.resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
    pale = 110 + np.asarray(image.convert("L").resize(size)).astype(np.float64)[..., None] * (145 / 255)
    opacity = 0.9 * np.sqrt(shares)[..., None]
    warm = np.asarray(_heat(0.25 + 0.6 * shares), dtype=np.float64)
    return Image.fromarray((opacity * warm + (1 - opacity) * pale).round().astype(np.uint8))


def _with_mark(panel: Image.Image, mark: tuple[int, int]) -> Image.Image:
    """The panel with a ring around the chosen pixel."""
    panel = panel.copy()
    draw = ImageDraw.Draw(panel)
    for radius, color in ((7, (0, 0, 0)), (6, (255, 255, 255)), (5, (255, 255, 255)), (4, (0, 0, 0))):
        draw.circle(mark, radius, outline=color)
    return panel


def _grid(panels: Sequence[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Panels of one size in rows, each below its title, which may be wider than a narrow panel."""
    width, height = _PANEL_WIDTH, panels[0][1].height
    rows = -(-len(panels) // columns)
    canvas = Image.new("RGB", (_GAP + columns * (width + _GAP), rows * (height + _TITLE + _GAP)), _PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for place, (title, panel) in enumerate(panels):
        left, top = _GAP + place % columns * (width + _GAP), place // columns * (height + _TITLE + _GAP)
        draw.text((left, top + _TITLE - 8), title, fill=_INK, font=font, anchor="ls")
        canvas.paste(panel, (left, top + _TITLE))
    return canvas


__all__ = ["Inspection", "draw_inspection", "inspect_image", "principal_components", "relative_entropy"]
