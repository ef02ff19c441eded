"""Label maps as pictures: colours, overlays, and panels side by side with a legend.

Only Pillow and numpy, so that it works wherever a model does. Axes: H W pixels, K classes.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

_INK, _PAPER, _FAINT = (32, 33, 36), (255, 255, 255), (95, 99, 104)
_FIRST_COLOR = (51, 102, 204)
_HATCH_DARK, _HATCH_LIGHT = (28, 28, 30), (92, 92, 96)


def default_palette(num_classes: int) -> list[Color]:
    """Colours that are told apart: each next one is the farthest from all before it.

    Distances are taken in OKLab, where equal steps look equally far apart, among colours that are neither nearly
    black, white nor grey. The first colours stay the same however many are asked for.

    Args:
        num_classes: number of colours K, 1 to 1000.

    Returns:
        K different (red, green, blue) of 0..255.

    Raises:
        ValueError: if the number is out of range.

    Example:
        >>> from hf_segformer.visualize import default_palette
        >>> default_palette(2) == default_palette(150)[:2]
        True
    """
    if not 1 <= num_classes <= 1000:
        raise ValueError(f"num_classes is {num_classes}, but a palette has 1 to 1000 colours")
    colors, lab = _candidates()
    chosen = [int(np.abs(colors - _FIRST_COLOR).sum(axis=1).argmin())]
    distance = np.linalg.norm(lab - lab[chosen[0]], axis=1)
    while len(chosen) < num_classes:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return [(int(red), int(green), int(blue)) for red, green, blue in colors[chosen]]


def colorize(labels, palette: Sequence[Color]) -> Image.Image:
    """A label map as a picture in which every class has its colour.

    Pixels that are no class, ignored ones above all, are hatched: no colour could be mistaken for them.

    Args:
        labels: (H, W) integers.
        palette: one (red, green, blue) a class.

    Returns:
        RGB picture of W x H pixels.

    Raises:
        ValueError: if `labels` are not two-dimensional integers.

    Example:
        >>> import numpy as np
        >>> from hf_segformer.visualize import colorize, default_palette
        >>> colorize(np.zeros((4, 6), dtype=np.uint8), default_palette(1)).size
        (6, 4)
    """
    labels = _label_map(labels)
    row, column = np.indices(labels.shape)
    picture = np.where(((row + column) % 6 < 2)[..., None], _HATCH_LIGHT, _HATCH_DARK).astype(np.uint8)
    is_class = (labels >= 0) & (labels < len(palette))
    picture[is_class] = np.asarray(palette, dtype=np.uint8)[labels[is_class]]
    return Image.fromarray(picture)


def overlay(image: Image.Image, labels, palette: Sequence[Color], alpha: float = 0.6) -> Image.Image:
    """The picture with its classes laid over it in colour.

    Args:
        image: any Pillow picture, W x H.
        labels: (H, W) integers; pixels that are no class keep the picture as it is.
        palette: one (red, green, blue) a class.
        alpha: weight of the colours, 0 to 1.

    Returns:
        RGB picture of the same size.

    Raises:
        ValueError: if the sizes differ or alpha is out of range.
    """
    labels = _label_map(labels)
    if image.size != labels.shape[::-1]:
        raise ValueError(f"the image is {image.size} wide and high, its label map {labels.shape[::-1]}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, but it must lie in 0..1")
    photo = np.asarray(image.convert("RGB"))
    blended = np.asarray(Image.blend(image.convert("RGB"), colorize(labels, palette), alpha))
    is_class = (labels >= 0) & (labels < len(palette))
    return Image.fromarray(np.where(is_class[..., None], blended, photo))


def figure(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    names: Sequence[str],
    palette: Sequence[Color],
    captions: Sequence[str] = (),
    panel_height: int = 256,
) -> Image.Image:
    """Pictures in rows under column titles, with a legend of the classes below.

    Args:
        rows: for each row, one picture a title; each is scaled to `panel_height`.
        titles: one a column.
        names: class names of the legend.
        palette: one (red, green, blue) a name.
        captions: a line below each row, or none.
        panel_height: height of every panel in pixels.

    Returns:
        RGB picture.

    Raises:
        ValueError: if a row has not one picture a title, or names and palette differ in length.

    Example:
        >>> import numpy as np
        >>> from hf_segformer.visualize import colorize, default_palette, figure
        >>> colors = default_palette(2)
        >>> mask = colorize(np.eye(8, dtype=np.uint8), colors)
        >>> figure([[mask, mask]], ["truth", "prediction"], ["ground", "path"], colors).mode
        'RGB'
    """
    if len(names) != len(palette):
        raise ValueError(f"{len(names)} names need as many colours, but the palette has {len(palette)}")
    for index, row in enumerate(rows):
        if len(row) != len(titles):
            raise ValueError(f"row {index} has {len(row)} pictures, but there are {len(titles)} titles")
    gap, title_height, caption_height = 16, 44, 28 if captions else 0
    panels = [[_scaled(picture, panel_height) for picture in row] for row in rows]
    widths = [
        max([round(_font(18).getlength(title)), *(row[column].width for row in panels)])
        for column, title in enumerate(titles)
    ]
    width = sum(widths) + gap * (len(widths) + 1)
    legend = _legend(names, palette, width - 2 * gap)
    row_height = panel_height + caption_height + gap
    canvas = Image.new("RGB", (width, title_height + row_height * len(rows) + legend.height + gap), _PAPER)
    draw = ImageDraw.Draw(canvas)
    left = gap
    for column, title in enumerate(titles):
        draw.text((left, title_height - 12), title, fill=_INK, font=_font(18), anchor="ls")
        for index, row in enumerate(panels):
            canvas.paste(row[column], (left, title_height + index * row_height))
        left += widths[column] + gap
    for index, caption in enumerate(captions):
        top = title_height + index * row_height + panel_height
        draw.text((gap, top + 20), caption, fill=_FAINT, font=_font(14), anchor="ls")
    canvas.paste(legend, (gap, title_height + row_height * len(rows)))
    return canvas


def _label_map(labels) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "iub":
        raise ValueError(f"a label map is (H, W) integers, but this is {labels.shape} {labels.dtype}")
    return labels.astype(np.int64)


def _scaled(picture: Image.Image, height: int) -> Image.Image:
    # Enlarged by whole pixels first, so that label maps keep hard edges and pictures show what the model saw.
    width = max(1, round(picture.width * height / picture.height))
    factor = max(1, -(-height // picture.height))
    picture = picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return picture.resize((width, height), Image.Resampling.BOX)


def _legend(names: Sequence[str], palette: Sequence[Color], width: int) -> Image.Image:
    swatch, line, font = 16, 30, _font(15)
    entries = [*zip(names, palette, strict=True), ("ignored", None)]
    places, left, top = [], 0, 0
    for name, _ in entries:
        entry_width = swatch + 8 + round(font.getlength(name)) + 22
        if left and left + entry_width - 22 > width:
            left, top = 0, top + line
        places.append((left, top))
        left += entry_width
    legend = Image.new("RGB", (width, top + line), _PAPER)
    draw = ImageDraw.Draw(legend)
    for (name, color), (left, top) in zip(entries, places, strict=True):
        box = Image.new("RGB", (swatch, swatch), color) if color else colorize(np.full((swatch, swatch), -1), palette)
        legend.paste(box, (left, top + 7))
        draw.rectangle((left, top + 7, left + swatch - 1, top + 6 + swatch), outline=_FAINT)
        draw.text((left + swatch + 8, top + 7 + swatch // 2), name, fill=_INK, font=font, anchor="lm")
    return legend


@lru_cache
def _font(size: int):
    return ImageFont.load_default(size)


def _candidates() -> tuple[np.ndarray, np.ndarray]:
    """The colours to choose from, (N, 3) of 0..255, and the same in OKLab."""
    steps = np.arange(0, 256, 17)
    colors = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(colors)
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    kept = (lightness > 0.35) & (lightness < 0.93) & (chroma > 0.06)
    return colors[kept], lab[kept]


def _oklab(colors: np.ndarray) -> np.ndarray:
    """Colours of 0..255 in OKLab (Björn Ottosson, 2020): lightness, green to red, blue to yellow."""
    rgb = colors / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(
        linear
        @ np.array(
            [
                [0.4122214708, 0.2119034982, 0.0883024619],
                [0.5363325363, 0.6806995451, 0.2817188376],
                [0.0514459929, 0.1073969566, 0.6299787005],
            ]
        )
    )
    return cones @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


__all__ = ["colorize", "default_palette", "figure", "overlay"]
