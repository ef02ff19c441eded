"""Label maps as pictures: colours, overlays, panels side by side with a legend, and confusion matrices.

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
_GRID = (218, 220, 224)
# Up to so many classes a confusion matrix has numbers in its cells.
_NUMBERED_CLASSES = 30


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
        >>> from hf_segformer.visualization import default_palette
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
        >>> from hf_segformer.visualization import colorize, default_palette
        >>> colorize(np.zeros((4, 6), dtype=np.uint8), default_palette(1)).size
        (6, 4)
    """
    labels = _label_map(labels)
    picture = np.asarray([*palette, _HATCH_DARK], dtype=np.uint8).take(labels, axis=0, mode="clip")
    row, column = np.nonzero((labels < 0) | (labels >= len(palette)))
    picture[row, column] = np.where(((row + column) % 6 < 2)[:, None], _HATCH_LIGHT, _HATCH_DARK)
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


def shown(picture: Image.Image | np.ndarray) -> Image.Image:
    """A picture for the eye: of an array (C, H, W) the first three bands, each stretched to 0..255."""
    if isinstance(picture, Image.Image):
        return picture
    bands = picture[:3] if len(picture) >= 3 else picture[:1].repeat(3, axis=0)
    low, high = bands.min(axis=(1, 2), keepdims=True), bands.max(axis=(1, 2), keepdims=True)
    return Image.fromarray((255.0 * (bands - low) / np.maximum(high - low, 1e-6)).astype(np.uint8).transpose(1, 2, 0))


def with_legend(picture: Image.Image, labels, names: Sequence[str], palette: Sequence[Color], side: str) -> Image.Image:
    """The picture with a legend of the classes that are in its label map and their shares, largest first.

    Args:
        picture: any Pillow picture, W x H.
        labels: (H, W) integers.
        names: of the K classes.
        palette: one (red, green, blue) a name.
        side: `"right"` puts the legend beside the picture, `"below"` below it.

    Returns:
        RGB picture, larger than the given one. Letters grow with the picture.

    Raises:
        ValueError: if the side is another.

    Example:
        >>> import numpy as np
        >>> from hf_segformer.visualization import colorize, default_palette, with_legend
        >>> labels, colors = np.eye(200, dtype=np.uint8), default_palette(2)
        >>> with_legend(colorize(labels, colors), labels, ["ground", "path"], colors, "below").width
        200
    """
    if side not in ("right", "below"):
        raise ValueError(f"side is {side!r}, but a legend stands right or below")
    labels = _label_map(labels)
    counts = np.bincount(labels[(labels >= 0) & (labels < len(names))], minlength=len(names))
    present = [index for index in np.argsort(-counts, kind="stable").tolist() if counts[index]]
    entries = [(f"{names[index]}  {_share(counts[index] / labels.size)}", palette[index]) for index in present]
    if counts.sum() < labels.size:
        entries.append((f"ignored  {_share(1 - counts.sum() / labels.size)}", None))
    font_size = min(64, max(14, round(min(picture.size) / 24)))
    gap = font_size
    room = picture.width - 2 * gap if side == "below" else 0
    legend = _draw_legend(entries, room, font_size)
    if side == "below":
        canvas = Image.new("RGB", (max(picture.width, legend.width), picture.height + legend.height + gap), _PAPER)
        place = (gap if legend.width <= room else 0, picture.height + gap // 2)
    else:
        size = picture.width + legend.width + 2 * gap, max(picture.height, legend.height)
        canvas, place = Image.new("RGB", size, _PAPER), (picture.width + gap, 0)
    canvas.paste(picture.convert("RGB"), (0, 0))
    canvas.paste(legend, place)
    return canvas


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
        >>> from hf_segformer.visualization import colorize, default_palette, figure
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


def draw_confusion(matrix, names: Sequence[str]) -> Image.Image:
    """A confusion matrix as a picture: what became of each class's pixels, in percent.

    Rows are true classes and add up to 100 %, so that rare classes are seen as well as common ones. Few classes have
    the numbers in their cells, many have small cells and colours alone. A row without pixels is hatched.

    Args:
        matrix: (K, K + 1) counts as `metrics.confusion_matrix` gives them, an array or a tensor on the CPU. The last
            column, predictions that are no class, is drawn if there are any.
        names: of the K classes.

    Returns:
        RGB picture.

    Raises:
        ValueError: if the matrix does not fit the names.

    Example:
        >>> from hf_segformer.visualization import draw_confusion
        >>> draw_confusion([[90, 10, 0], [5, 5, 0]], ["ground", "path"]).mode
        'RGB'
    """
    counts, columns = np.asarray(matrix), [*names, "none"]
    if counts.shape != (len(names), len(names) + 1):
        raise ValueError(
            f"the matrix is {counts.shape}, but {len(names)} names need {(len(names), len(names) + 1)}: a row and a "
            "column for each, and a column for what is no class"
        )
    if not counts[:, -1].any():
        counts, columns = counts[:, :-1], columns[:-1]
    totals = np.asarray(matrix).sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    has_numbers = len(names) <= _NUMBERED_CLASSES
    cell, font = (40, _font(15)) if has_numbers else (14, _font(11))
    gap, title, scale = 16, 24, 64
    corner = gap + title + round(max(font.getlength(name) for name in columns)) + 8
    width, height = cell * len(columns), cell * len(names)
    canvas = Image.new("RGB", (corner + max(width, 260) + gap, corner + height + scale + gap), _PAPER)
    draw = ImageDraw.Draw(canvas)
    canvas.paste(_cells(shares, totals[:, 0] > 0, cell, has_numbers), (corner, corner))
    for row, name in enumerate(names):
        draw.text((corner - 8, corner + row * cell + cell // 2), name, fill=_INK, font=font, anchor="rm")
    for column, name in enumerate(columns):
        label = _upright(name, font, cell)
        canvas.paste(label, (corner + column * cell, corner - 6 - label.height))
    draw.text((corner, gap + 4), "predicted", fill=_FAINT, font=_font(15), anchor="lm")
    canvas.paste(_upright("true", _font(15), title, _FAINT), (gap - 8, corner))
    _draw_scale(draw, corner, corner + height + 24)
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
    return _draw_legend([*zip(names, palette, strict=True), ("ignored", None)], width, 15, is_wide=True)


def _draw_legend(
    entries: Sequence[tuple[str, Color | None]], width: int, font_size: int, *, is_wide: bool = False
) -> Image.Image:
    """Names with their colours, hatched without one, in lines of at most this width; 0 puts each on its own.

    It is as wide as its longest line, or as it may be.
    """
    swatch, line, font = font_size + 1, 2 * font_size, _font(font_size)
    inner, outer = (swatch + 1) // 2, round(1.5 * font_size)
    places, left, top, widest = [], 0, 0, 1
    for name, _ in entries:
        entry_width = swatch + inner + round(font.getlength(name))
        if left and left + entry_width > width:
            left, top = 0, top + line
        places.append((left, top))
        left += entry_width + outer
        widest = max(widest, left - outer)
    legend = Image.new("RGB", (width if is_wide else widest, top + line), _PAPER)
    draw, inset = ImageDraw.Draw(legend), (line - swatch) // 2
    for (name, color), (left, top) in zip(entries, places, strict=True):
        box = Image.new("RGB", (swatch, swatch), color) if color else colorize(np.full((swatch, swatch), -1), [])
        legend.paste(box, (left, top + inset))
        draw.rectangle((left, top + inset, left + swatch - 1, top + inset + swatch - 1), outline=_FAINT)
        draw.text((left + swatch + inner, top + inset + swatch // 2), name, fill=_INK, font=font, anchor="lm")
    return legend


def _share(share: float) -> str:
    return "< 1 %" if share < 0.01 else f"{100 * share:.0f} %"


def _heat(shares: np.ndarray) -> np.ndarray:
    """Shares from 0 to 1 -> colours (..., 3), white to dark blue; by the root, so that small shares are seen too."""
    stops = np.array([(255, 255, 255), (158, 188, 232), (51, 102, 204), (14, 34, 92)])
    place = np.sqrt(shares)
    return np.stack([np.interp(place, (0, 0.35, 0.7, 1), band) for band in stops.T], axis=-1).astype(np.uint8)


def _cells(shares: np.ndarray, is_known: np.ndarray, cell: int, has_numbers: bool) -> Image.Image:
    """Shares (K, columns) as squares, with percents in them if wanted; rows that are not known are hatched."""
    pixels = _heat(shares).repeat(cell, axis=0).repeat(cell, axis=1)
    pixels[::cell], pixels[:, ::cell] = _GRID, _GRID
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for top in (np.flatnonzero(~is_known) * cell).tolist():
        for left in range(-cell, picture.width, 8):
            draw.line((left, top + cell - 1, left + cell - 1, top), fill=_GRID)
    if has_numbers:
        for row, column in np.argwhere(shares >= 0.005).tolist():
            ink = _PAPER if shares[row, column] > 0.25 else _INK
            place = (column * cell + cell // 2, row * cell + cell // 2)
            draw.text(place, f"{100 * shares[row, column]:.0f}", fill=ink, font=_font(14), anchor="mm")
    draw.rectangle((0, 0, picture.width - 1, picture.height - 1), outline=_FAINT)
    return picture


def _draw_scale(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    """The colours of `_heat` with their percents, and what they are percents of."""
    width, height, font = 200, 12, _font(12)
    for place, color in enumerate(_heat(np.linspace(0, 1, width) ** 2).tolist()):
        draw.line((left + place, top, left + place, top + height - 1), fill=tuple(color))
    draw.rectangle((left, top, left + width - 1, top + height - 1), outline=_FAINT)
    for percent in (0, 10, 25, 50, 100):
        place = left + round((percent / 100) ** 0.5 * (width - 1))
        draw.text((place, top + height + 4), f"{percent}", fill=_FAINT, font=font, anchor="mt")
    draw.text((left, top + height + 30), "% of the true class's pixels", fill=_FAINT, font=font, anchor="lm")


def _upright(text: str, font, width: int, ink: Color = _INK) -> Image.Image:
    """Text that reads upwards, in the middle of a strip of the given width."""
    line = Image.new("RGB", (round(font.getlength(text)) + 2, width), _PAPER)
    ImageDraw.Draw(line).text((0, width // 2), text, fill=ink, font=font, anchor="lm")
    return line.transpose(Image.Transpose.ROTATE_90)


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


__all__ = ["colorize", "default_palette", "draw_confusion", "figure", "overlay", "shown", "with_legend"]
