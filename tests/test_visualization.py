"""Images of segmentation maps: distinct colours, hatched pixels without a class, overlays, legends, matrices."""

import itertools
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from hf_segformer import SegFormerImageProcessor, visualization
from hf_segformer.visualization import (
    Stretch,
    colorize,
    default_palette,
    displayable,
    displayed_as_fed,
    figure,
    land_cover_palette,
    overlay,
    palette_for,
    with_legend,
)

PALETTE = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


def test_default_colours_differ_and_do_not_depend_on_how_many_are_asked_for():
    colors = default_palette(150)
    assert colors[:8] == default_palette(8)
    assert len(set(default_palette(1000))) == 1000


def test_default_colours_are_repeated_beyond_a_thousand():
    colors = default_palette(2001)
    assert colors == 2 * default_palette(1000) + colors[:1]
    assert palette_for([f"class {index}" for index in range(2001)]) == colors


def test_any_number_of_classes_of_one_kind_of_land_cover_has_colours():
    colors = palette_for([f"cloud {index}" for index in range(300)])
    assert len(set(colors)) == 300
    assert colors[0] == (250, 250, 250)
    assert len(palette_for([f"cloud {index}" for index in range(1500)])) == 1500


def test_palettes_are_independent_copies():
    default_palette(3).clear()
    assert len(default_palette(3)) == 3


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint16])
def test_every_class_has_its_colour(dtype):
    labels = np.array([[0, 1, 2], [2, 1, 0]], dtype=dtype)
    drawn = colorize(labels, PALETTE)
    assert drawn.size == (3, 2)
    assert [[drawn.getpixel((column, row)) for column in range(3)] for row in range(2)] == [PALETTE, PALETTE[::-1]]


def test_colorize_takes_little_more_memory_than_the_image():
    labels = np.zeros((500, 800), np.uint8)
    tracemalloc.start()
    colorize(labels, PALETTE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * labels.size  # three bytes of each pixel are the image, and no array is 64 bits wide


@pytest.mark.parametrize("value", [255, 3, -1])
def test_pixels_without_a_class_are_hatched_in_grey(value):
    drawn = np.asarray(colorize(np.full((6, 9), value), PALETTE))
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) == 2
    assert not (drawn[..., None, :] == np.array(PALETTE)).all(axis=-1).any()


def test_overlay_mixes_classes_and_leaves_ignored_pixels_alone():
    image = Image.new("RGB", (3, 2), (100, 100, 100))
    drawn = overlay(image, np.array([[0, 1, 255]] * 2), PALETTE, alpha=0.5)
    assert drawn.getpixel((0, 0)) == (150, 50, 50)
    assert drawn.getpixel((2, 1)) == (100, 100, 100)


def test_a_figure_shows_every_panel_and_every_colour_of_the_legend():
    image = Image.new("RGB", (20, 10), (1, 2, 3))
    drawn = figure([[image, image]] * 2, ["left", "right"], ["a", "b", "c"], PALETTE, ["one", "two"], panel_height=50)
    colors = {color for _, color in drawn.getcolors(drawn.width * drawn.height)}
    assert {*PALETTE, (1, 2, 3)} <= colors
    pixels = (np.asarray(drawn) == (1, 2, 3)).all(axis=-1).sum()
    assert pixels == 4 * 50 * 100


def test_a_strip_is_drawn_in_a_panel_of_bounded_width():
    strip = Image.new("RGB", (3000, 3), (200, 10, 10))
    drawn = np.asarray(figure([[strip, strip]], ["left", "right"], ["a"], PALETTE[:1], panel_height=50))
    assert drawn.shape[1] == 2 * 200 + 3 * 16
    assert (drawn == (200, 10, 10)).all(axis=2).sum() == 2 * 200


def test_a_long_legend_wraps():
    image, names = Image.new("RGB", (20, 10)), [f"a rather long name {index}" for index in range(30)]
    colors = default_palette(30)
    drawn = figure([[image]], ["image"], names, colors, panel_height=100)
    shown = {color for _, color in drawn.getcolors(drawn.width * drawn.height)}
    assert set(colors) <= shown


def test_a_title_wider_than_its_images_does_not_overlap_the_next():
    narrow = Image.new("RGB", (2, 40))
    drawn = figure([[narrow, narrow]], ["a very long title indeed", "next"], ["a"], PALETTE[:1], panel_height=40)
    assert drawn.width > 200


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: default_palette(0), "num_classes is 0"),
        (lambda: colorize(np.zeros((2, 3, 4), int), PALETTE), r"labels are \(2, 3, 4\) int64"),
        (lambda: colorize(np.zeros((2, 3)), PALETTE), "labels are .* float64"),
        (
            lambda: overlay(Image.new("RGB", (3, 3)), np.zeros((2, 3), int), PALETTE),
            r"expected the size of the image, \(3, 3\)",
        ),
        (lambda: overlay(Image.new("RGB", (3, 2)), np.zeros((2, 3), int), PALETTE, 1.5), "alpha is 1.5"),
        (lambda: figure([], ["a"], ["x"], PALETTE), "palette has 3 colours; expected one for each of 1 names"),
        (lambda: figure([[]], ["a"], ["x"], PALETTE[:1]), "row 0 has 0 images"),
    ],
)
def test_invalid_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def simulate(colors, matrix):
    """Colours of 0 to 255 in OKLab as seen through a matrix on linear RGB."""
    linear = visualization._linear(np.array(colors)) @ np.array(matrix).T
    return visualization._oklab(linear.clip(0, 1))


@pytest.mark.parametrize(
    "matrix", [np.eye(3), *visualization._COLOR_BLIND], ids=["normal", "protan", "deutan", "tritan"]
)
def test_default_colours_differ_for_every_kind_of_vision(matrix):
    for number, least in ((8, 0.14), (12, 0.11), (20, 0.075)):
        seen = simulate(default_palette(number), matrix)
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > least


def test_land_cover_has_the_colours_of_maps():
    names = ["Tree cover", "Open water", "cropland", "Built-up", "water (deep)", "lesion", "Grassland"]
    colors = land_cover_palette(names)
    assert colors == palette_for(names)
    assert len(set(colors)) == len(names)
    tree, water, crop, built, deep, _, grass = colors
    assert max(tree) == tree[1]
    assert max(grass) == grass[1]
    assert max(water) == water[2]
    assert max(deep) == deep[2]
    assert max(built) == built[0]
    assert min(crop) == crop[2]
    assert sum(abs(a - b) for a, b in zip(colors[5], water, strict=True)) >= 100
    street = ["sky", "building", "road", "car", "tree", "person"]
    assert palette_for(street) == default_palette(6)
    assert palette_for(["streetlight", "watermelon", "icecream"]) == default_palette(3)  # whole words alone


def test_overlay_leaves_classes_clear_and_hatches_padding():
    image = Image.new("RGB", (3, 2), (100, 100, 100))
    labels, padding = np.array([[0, 1, 255]] * 2), np.array([[False] * 3, [False, False, True]])
    drawn = overlay(image, labels, PALETTE, alpha=0.5, clear=[0], padding=padding)
    assert drawn.getpixel((0, 0)) == (100, 100, 100)
    assert drawn.getpixel((1, 0)) == (50, 150, 50)
    assert drawn.getpixel((2, 0)) == (100, 100, 100)
    assert drawn.getpixel((2, 1)) in ((28, 28, 30), (92, 92, 96))


def test_one_stretch_displays_a_whole_set():
    dark, bright = np.full((4, 2, 3), 100.0, np.float32), np.full((4, 2, 3), 900.0, np.float32)
    stretch = Stretch.of_images([dark, bright])
    first, second = (np.asarray(displayable(image, stretch)) for image in (dark, bright))
    assert first.max() < 10
    assert second.min() > 245
    processor = SegFormerImageProcessor(do_rescale=False, image_mean=[500.0] * 4, image_std=[200.0] * 4)
    stretch = Stretch.of_processor(processor)
    assert (stretch.low[0], stretch.high[0]) == (100.0, 900.0)
    assert np.asarray(displayable(np.full((4, 2, 3), 500.0), stretch)).tolist() == [[[128] * 3] * 3] * 2
    whole = np.full((3, 2, 3), 77, np.uint8)
    assert (np.asarray(displayable(whole, stretch)) == 77).all()  # bytes of three channels are an image


@pytest.mark.parametrize("bands", [1, 3])
def test_colours_of_16_bits_are_displayed_as_they_are_fed(bands):
    image = np.arange(0, 65536, 257, dtype=np.uint16).reshape(1, 16, 16).repeat(bands, axis=0)
    shown = np.asarray(displayed_as_fed(image, SegFormerImageProcessor()))
    assert (shown == np.arange(256).reshape(16, 16, 1)).all()


def test_shares_of_a_legend_are_those_of_the_classified_pixels(monkeypatch):
    entries = []
    draw = visualization._draw_legend
    monkeypatch.setattr(
        visualization, "_draw_legend", lambda *args, **kw: (entries.extend(args[0]), draw(*args, **kw))[1]
    )
    labels = np.array([[0, 1, 255, 255]])
    with_legend(colorize(labels, PALETTE), labels, ["a", "b", "c"], PALETTE, "right")
    assert [text for text, _ in entries] == ["a  50 %", "b  50 %", "ignored"]
