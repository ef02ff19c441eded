"""Images of segmentation maps: palettes, overlays, and panels side by side with a legend.

Only Pillow and numpy, so that it works wherever a model does. Axes: C channels, H W pixels, K classes.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, cycle, islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

BACKGROUND_COLOR = (214, 209, 196)  # of the background of a model with one label

_INK, _PAPER, _FAINT = (32, 33, 36), (255, 255, 255), (95, 99, 104)
_FIRST_COLOR, _MOST_COLORS = (51, 102, 204), 1000
_MOST_WIDE = 4  # width of a panel in heights
_HATCH_DARK, _HATCH_LIGHT = (28, 28, 30), (92, 92, 96)
# Linear RGB as people without long, middle and short wave cones see it (Machado et al. 2009, severity 1).
_COLOR_BLIND = np.array(
    [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)
# Colours of land cover as maps draw it, by the words of a class name; the first match counts.
_LAND_COVER: tuple[tuple[str, Color], ...] = (
    (r"wetland|marsh|swamp|mangrove|bog|peat", (46, 134, 124)),
    (r"water|river|lake|sea|ocean|pond|reservoir|stream", (40, 98, 178)),
    (r"snow|ice|glacier", (226, 240, 247)),
    (r"forest|tree|wood|woodland|canopy", (30, 96, 48)),
    (r"shrub|scrub|bush|heath", (150, 150, 52)),
    (r"grass|grassland|meadow|pasture|lawn|rangeland", (126, 182, 84)),
    (r"crop|cropland|farm|farmland|field|agriculture|agricultural|cultivated|orchard|vineyard", (228, 198, 88)),
    (r"road|street|pavement|asphalt|railway|runway", (122, 120, 118)),
    (r"building|built|builtup|urban|city|settlement|residential|industrial|impervious|developed|roof", (190, 66, 54)),
    (r"sand|beach|dune|desert", (238, 220, 174)),
    (r"bare|barren|soil|rock|earth|mine|quarry", (160, 122, 84)),
    (r"moss|lichen|tundra", (200, 204, 160)),
    (r"cloud|clouds", (250, 250, 250)),
    (r"shadow|shade", (58, 54, 74)),
)


def default_palette(num_classes: int) -> list[Color]:
    """Colours that are easily distinguished, by colour-blind people, too: each is the farthest from all before it.

    The distance of two colours is the smallest one in OKLab, where equal steps look equally large, as seen by people
    with normal vision, protanopia, deuteranopia and tritanopia. Nearly black, white and grey colours are left out. The
    first colours are the same for every number of classes.

    Args:
        num_classes: number of colours K, at least 1.

    Returns:
        K (red, green, blue) of 0 to 255; the first 1000 differ, and are repeated beyond.

    Raises:
        ValueError: if the number is below 1.

    Examples:
        >>> from hf_segformer.visualization import default_palette
        >>> default_palette(2) == default_palette(150)[:2]
        True
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected at least 1")
    colors, seen = _candidates()
    chosen = [int(np.abs(colors - _FIRST_COLOR).sum(axis=1).argmin())]
    distance = _distance(seen, chosen[0])
    while len(chosen) < min(num_classes, _MOST_COLORS):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, _distance(seen, chosen[-1]))
    palette = [(int(red), int(green), int(blue)) for red, green, blue in colors[chosen]]
    return list(islice(cycle(palette), num_classes))


def land_cover_palette(names: Sequence[str]) -> list[Color]:
    """Colours of maps for classes of land cover: blue water, green forest, yellow fields, red buildings.

    Further classes of one kind get lighter and darker shades of its colour, as long as there are any; other classes get
    default colours.

    Args:
        names: names of the K classes.

    Returns:
        K (red, green, blue), which differ as long as there are default colours left.

    Examples:
        >>> from hf_segformer.visualization import land_cover_palette
        >>> land_cover_palette(["open water", "forest"])
        [(40, 98, 178), (30, 96, 48)]
    """
    known = [_land_cover_color(name) for name in names]
    drawn = np.array([color for color in known if color] or [_PAPER])
    others = cycle(color for color in default_palette(min(_MOST_COLORS, 4 * len(names) + 40)) if _is_far(color, drawn))
    palette: list[Color] = []
    taken: set[Color] = set()
    for color in known:
        candidates = chain(_shades(color) if color else (), islice(others, _MOST_COLORS))
        chosen = next((each for each in candidates if each not in taken), None) or next(others)
        taken.add(chosen)
        palette.append(chosen)
    return palette


def palette_for(names: Sequence[str]) -> list[Color]:
    """`land_cover_palette` where at least three names, and two thirds of them, are land cover; else `default_palette`.

    Beyond 1000 names colours are repeated.

    Examples:
        >>> from hf_segformer.visualization import default_palette, palette_for
        >>> palette_for(["sky", "road", "car"]) == default_palette(3)
        True
    """
    known = sum(_land_cover_color(name) is not None for name in names)
    return land_cover_palette(names) if known >= max(3, 2 * len(names) / 3) else default_palette(len(names))


def colorize(labels, palette: Sequence[Color]) -> Image.Image:
    """Image of a mask or segmentation map in which every class has its colour.

    Pixels that are no class, ignored ones above all, are hatched: no colour can be mistaken for them.

    Args:
        labels: (H, W) integers.
        palette: one (red, green, blue) for each class.

    Returns:
        RGB image of W x H pixels.

    Raises:
        ValueError: if `labels` are not two-dimensional integers.

    Examples:
        >>> import numpy as np
        >>> from hf_segformer.visualization import colorize, default_palette
        >>> colorize(np.zeros((4, 6), dtype=np.uint8), default_palette(1)).size
        (6, 4)
    """
    labels = _integer_map(labels)
    pixels = np.asarray([*palette, _HATCH_DARK], dtype=np.uint8).take(labels, axis=0, mode="clip")
    _hatch(pixels, (labels < 0) | (labels >= len(palette)))
    return Image.fromarray(pixels)


def overlay(
    image: Image.Image,
    labels,
    palette: Sequence[Color],
    alpha: float = 0.6,
    *,
    clear: Collection[int] = (),
    padding: np.ndarray | None = None,
) -> Image.Image:
    """Blend the colours of a mask or segmentation map into an image.

    Args:
        image: Pillow image of any mode, W x H.
        labels: (H, W) integers; pixels that are no class show the image alone.
        palette: one (red, green, blue) for each class.
        alpha: 0 shows the image alone, 1 the colours alone.
        clear: classes without colour, such as the background.
        padding: bool (H, W), True where the image holds no data; these pixels are hatched.

    Returns:
        RGB image of the same size.

    Raises:
        ValueError: if the sizes differ or alpha is out of range.
    """
    labels = _integer_map(labels)
    if image.size != labels.shape[::-1]:
        raise ValueError(f"labels are {labels.shape[::-1]} wide and high; expected the size of the image, {image.size}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected 0 to 1")
    pixels = np.array(image.convert("RGB"))
    blended = np.asarray(Image.blend(Image.fromarray(pixels), colorize(labels, palette), alpha))
    is_colored = (labels >= 0) & (labels < len(palette)) & ~np.isin(labels, list(clear))
    pixels[is_colored] = blended[is_colored]
    if padding is not None:
        _hatch(pixels, padding)
    return Image.fromarray(pixels)


class Stretch(NamedTuple):
    """Values of a set of images that are displayed as black and white; one for the whole set, so that they compare.

    Attributes:
        low: value of each channel that becomes 0.
        high: value of each channel that becomes 255.
    """

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of_processor(cls, processor: Any) -> "Stretch":
        """Two standard deviations on either side of the mean by which a processor normalises, in units of the images.

        The statistics are those of the training data, so that every image of a job, in every process, is displayed
        alike.
        """
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (np.asarray(values, float) / factor for values in (processor.image_mean, processor.image_std))
        return cls(mean - 2 * std, mean + 2 * std)

    @classmethod
    def of_images(cls, images: Iterable[Image.Image | np.ndarray]) -> "Stretch":
        """The 1st and 99th percentile of each channel over a set of arrays (C, H, W); Pillow images do not count."""
        arrays = [image for image in images if isinstance(image, np.ndarray)]
        if not arrays:
            return cls(np.zeros(1), np.full(1, 255.0))
        values = np.concatenate(
            [array.reshape(len(array), -1)[:, :: max(1, array[0].size >> 16)] for array in arrays], 1
        )
        low, high = np.percentile(values, (1, 99), axis=1)
        return cls(low, high)


def displayable(image: Image.Image | np.ndarray, stretch: Stretch) -> Image.Image:
    """8-bit image for display: the first three channels of an array (C, H, W), or the first.

    Args:
        image: a Pillow image, which is returned as it is, or an array. Three channels of bytes are displayed as they
            are, all others by the stretch.
        stretch: range of values of the whole set of images.
    """
    if isinstance(image, Image.Image):
        return image
    values, shown = np.asarray(image), [0, 1, 2] if len(image) >= 3 else [0, 0, 0]
    if values.dtype != np.uint8 or len(values) != 3:
        low, high = (np.broadcast_to(limits, len(values))[:, None, None] for limits in stretch)
        values = 255.0 * (values - low) / np.maximum(high - low, 1e-6)
    return Image.fromarray(values[shown].clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0))


def displayed_as_fed(image: Image.Image | np.ndarray, processor: Any) -> Image.Image:
    """8-bit image for display, with the value range of a processor, or that of 16-bit colours: as the network sees it.

    Args:
        image: a Pillow image or an array (C, H, W).
        processor: of the model.
    """
    is_16_bit = isinstance(image, np.ndarray) and image.dtype == np.uint16 and len(processor.image_mean) == 3
    if processor.value_range is not None or is_16_bit:
        data_format = "channels_first" if isinstance(image, np.ndarray) else None
        image = np.ma.filled(processor.apply_range(image, data_format=data_format), 0).round().astype(np.uint8)
    if isinstance(image, np.ndarray) and len(image) == 1 and len(processor.image_mean) == 3:
        image = image.repeat(3, axis=0)  # grey
    return displayable(image, Stretch.of_processor(processor))


def with_legend(image: Image.Image, labels, names: Sequence[str], palette: Sequence[Color], side: str) -> Image.Image:
    """Add a legend of the classes that occur and their shares of the classified pixels, largest first.

    Args:
        image: Pillow image of any mode, W x H.
        labels: (H, W) integers.
        names: names of the K classes.
        palette: one (red, green, blue) for each name.
        side: `"right"` puts the legend beside the image, `"below"` below it.

    Returns:
        RGB image, larger than the given one. The letters grow with the image.

    Raises:
        ValueError: if the side is another.

    Examples:
        >>> import numpy as np
        >>> from hf_segformer.visualization import colorize, default_palette, with_legend
        >>> labels, colors = np.eye(200, dtype=np.uint8), default_palette(2)
        >>> with_legend(colorize(labels, colors), labels, ["ground", "path"], colors, "below").width
        200
    """
    if side not in ("right", "below"):
        raise ValueError(f"side is {side!r}; expected 'right' or 'below'")
    labels = _integer_map(labels)
    counts = np.bincount(labels[(labels >= 0) & (labels < len(names))], minlength=len(names))
    present = [index for index in np.argsort(-counts, kind="stable").tolist() if counts[index]]
    entries: list[tuple[str, Color | None]] = [
        (f"{names[index]}  {_share(counts[index] / counts.sum())}", palette[index]) for index in present
    ]
    if counts.sum() < labels.size:
        entries.append(("ignored", None))
    font_size = min(64, max(14, round(min(image.size) / 24)))
    gap = font_size
    room = image.width - 2 * gap if side == "below" else 0
    legend = _draw_legend(entries, room, font_size)
    if side == "below":
        canvas = Image.new("RGB", (max(image.width, legend.width), image.height + legend.height + gap), _PAPER)
        place = (gap if legend.width <= room else 0, image.height + gap // 2)
    else:
        size = image.width + legend.width + 2 * gap, max(image.height, legend.height)
        canvas, place = Image.new("RGB", size, _PAPER), (image.width + gap, 0)
    canvas.paste(image.convert("RGB"), (0, 0))
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
    """Images in rows under column titles, with a legend of the classes below.

    Args:
        rows: one image for each title in every row; each is scaled to `panel_height`, or to four times that in width
            where it would be wider.
        titles: titles of the columns.
        names: class names of the legend.
        palette: one (red, green, blue) for each name.
        captions: a line below each row, or none.
        panel_height: largest height of a panel in pixels.

    Returns:
        RGB image.

    Raises:
        ValueError: if the number of images in a row is not that of the titles, or names and palette differ in length.

    Examples:
        >>> import numpy as np
        >>> from hf_segformer.visualization import colorize, default_palette, figure
        >>> colors = default_palette(2)
        >>> mask = colorize(np.eye(8, dtype=np.uint8), colors)
        >>> figure([[mask, mask]], ["truth", "prediction"], ["ground", "path"], colors).mode
        'RGB'
    """
    if len(names) != len(palette):
        raise ValueError(f"palette has {len(palette)} colours; expected one for each of {len(names)} names")
    for index, row in enumerate(rows):
        if len(row) != len(titles):
            raise ValueError(f"row {index} has {len(row)} images; expected one for each of {len(titles)} titles")
    gap, title_height, caption_height = 16, 44, 28 if captions else 0
    panels = [[_scaled(image, panel_height) for image in row] for row in rows]
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


def _integer_map(labels) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "iub":
        raise ValueError(f"labels are {labels.shape} {labels.dtype}; expected (H, W) integers")
    return labels.astype(np.int64)


def _hatch(pixels: np.ndarray, where: np.ndarray) -> None:
    """Hatch pixels (H, W, 3) in place."""
    row, column = np.nonzero(where)
    pixels[row, column] = np.where(((row + column) % 6 < 2)[:, None], _HATCH_LIGHT, _HATCH_DARK)


def _scaled(image: Image.Image, panel_height: int) -> Image.Image:
    """Image of a panel's height, or lower where it would be wider than four times that."""
    scale = min(panel_height / image.height, _MOST_WIDE * panel_height / image.width)
    width, height = (max(1, round(side * scale)) for side in image.size)
    # Enlarged by whole pixels first, so that masks keep hard edges and images show the pixels that the model saw.
    factor = max(1, -(-height // image.height))
    image = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize((width, height), Image.Resampling.BOX)


def _legend(names: Sequence[str], palette: Sequence[Color], width: int) -> Image.Image:
    return _draw_legend([*zip(names, palette, strict=True), ("ignored", None)], width, 15, is_wide=True)


def _draw_legend(
    entries: Sequence[tuple[str, Color | None]], width: int, font_size: int, *, is_wide: bool = False
) -> Image.Image:
    """Names with their colours, hatched without one, in lines of at most this width; 0 puts each on its own line.

    The image is as wide as its longest line, or with `is_wide` as wide as it may be.
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


@lru_cache
def _font(size: int):
    return ImageFont.load_default(size)


def _land_cover_color(name: str) -> Color | None:
    words = "|".join(re.split(r"[^a-z]+", name.lower()))
    found = (color for pattern, color in _LAND_COVER if re.search(rf"\b({pattern})s?\b", words))
    return next(found, None)


def _is_far(color: Color, others: np.ndarray) -> bool:
    """Return True if a colour differs clearly from each of (N, 3) others."""
    return bool(np.abs(others - color).sum(axis=1).min() >= 100)


def _shades(color: Color) -> Iterator[Color]:
    """Yield a colour, then lighter and darker shades of it, some of them several times."""
    yield color
    for step in range(1, 200):
        factor = (1 - 0.12 * (step + 1) / 2) if step % 2 else (1 + 0.12 * step / 2)
        red, green, blue = (min(255, max(0, round(value * factor) + step // 16)) for value in color)
        yield red, green, blue


def _candidates() -> tuple[np.ndarray, np.ndarray]:
    """Colours to choose from, (N, 3) of 0 to 255, and the same in OKLab, (4, N, 3), for each kind of vision."""
    steps = np.arange(0, 256, 17)
    colors = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    linear = _linear(colors)
    lab = _oklab(linear)
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    kept = (lightness > 0.35) & (lightness < 0.93) & (chroma > 0.06)
    blind = [_oklab((linear[kept] @ matrix.T).clip(0, 1)) for matrix in _COLOR_BLIND]
    return colors[kept], np.stack([lab[kept], *blind])


def _distance(seen: np.ndarray, index: int) -> np.ndarray:
    """Distance (N,) of each colour from one of them, the smallest over all kinds of vision."""
    return np.linalg.norm(seen - seen[:, index : index + 1], axis=2).min(axis=0)


def _linear(colors: np.ndarray) -> np.ndarray:
    """Colours of 0 to 255 -> linear RGB from 0 to 1."""
    rgb = colors / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _oklab(linear: np.ndarray) -> np.ndarray:
    """Linear RGB in OKLab (Björn Ottosson, 2020): lightness, green to red, blue to yellow."""
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


__all__ = [
    "BACKGROUND_COLOR",
    "Color",
    "Stretch",
    "colorize",
    "default_palette",
    "displayable",
    "displayed_as_fed",
    "figure",
    "land_cover_palette",
    "overlay",
    "palette_for",
    "with_legend",
]
