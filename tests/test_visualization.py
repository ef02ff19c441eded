"""Label maps as pictures: colours told apart, ignored pixels never mistaken for a class."""

import itertools
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from hf_segformer.visualization import colorize, default_palette, draw_confusion, figure, overlay

PALETTE = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


def test_default_colours_differ_and_do_not_depend_on_how_many_are_asked_for():
    colors = default_palette(150)
    assert colors[:8] == default_palette(8)
    assert len(set(default_palette(1000))) == 1000
    gaps = [sum(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in itertools.combinations(colors[:12], 2)]
    assert min(gaps) > 120


def test_the_palette_can_not_be_spoilt_by_who_asked_first():
    default_palette(3).clear()
    assert len(default_palette(3)) == 3


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint16])
def test_every_class_has_its_colour(dtype):
    labels = np.array([[0, 1, 2], [2, 1, 0]], dtype=dtype)
    picture = colorize(labels, PALETTE)
    assert picture.size == (3, 2)
    assert [[picture.getpixel((column, row)) for column in range(3)] for row in range(2)] == [PALETTE, PALETTE[::-1]]


def test_colours_take_little_more_memory_than_the_picture():
    labels = np.zeros((500, 800), np.uint8)
    tracemalloc.start()
    colorize(labels, PALETTE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * labels.size  # three bytes a pixel are the picture, and nothing is counted in 64 bits


@pytest.mark.parametrize("value", [255, 3, -1])
def test_what_is_no_class_is_hatched_in_grey(value):
    picture = np.asarray(colorize(np.full((6, 9), value), PALETTE))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 2
    assert not (picture[..., None, :] == np.array(PALETTE)).all(axis=-1).any()


def test_overlay_mixes_classes_and_leaves_ignored_pixels_alone():
    image = Image.new("RGB", (3, 2), (100, 100, 100))
    picture = overlay(image, np.array([[0, 1, 255]] * 2), PALETTE, alpha=0.5)
    assert picture.getpixel((0, 0)) == (150, 50, 50)
    assert picture.getpixel((2, 1)) == (100, 100, 100)


def test_a_figure_shows_every_panel_and_every_colour_of_the_legend():
    image = Image.new("RGB", (20, 10), (1, 2, 3))
    picture = figure([[image, image]] * 2, ["left", "right"], ["a", "b", "c"], PALETTE, ["one", "two"], panel_height=50)
    colors = {color for _, color in picture.getcolors(picture.width * picture.height)}
    assert {*PALETTE, (1, 2, 3)} <= colors
    pixels = (np.asarray(picture) == (1, 2, 3)).all(axis=-1).sum()
    assert pixels == 4 * 50 * 100


def test_a_long_legend_wraps_instead_of_running_out_of_the_picture():
    image, names = Image.new("RGB", (20, 10)), [f"a rather long name {index}" for index in range(30)]
    colors = default_palette(30)
    picture = figure([[image]], ["picture"], names, colors, panel_height=100)
    shown = {color for _, color in picture.getcolors(picture.width * picture.height)}
    assert set(colors) <= shown


def test_a_title_wider_than_its_pictures_does_not_run_into_the_next():
    narrow = Image.new("RGB", (2, 40))
    picture = figure([[narrow, narrow]], ["a very long title indeed", "next"], ["a"], PALETTE[:1], panel_height=40)
    assert picture.width > 200


def colors_of(picture):
    return {color for _, color in picture.getcolors(picture.width * picture.height)}


def test_a_confusion_matrix_is_coloured_by_the_share_of_its_row():
    even = colors_of(draw_confusion([[5, 5, 0], [500, 500, 0]], ["a", "b"]))
    assert colors_of(draw_confusion([[1, 1, 0], [9, 9, 0]], ["a", "b"])) == even
    assert colors_of(draw_confusion([[5, 0, 0], [0, 500, 0]], ["a", "b"])) != even


def test_a_confusion_matrix_has_a_column_for_no_class_only_if_it_is_used():
    names = [f"class {index}" for index in range(9)]
    matrix = np.eye(9, 10, dtype=int) * 100
    plain = draw_confusion(matrix, names)
    matrix[4, 9] = 1
    assert draw_confusion(matrix, names).width == plain.width + 40


def test_many_classes_get_small_cells_and_every_label_fits():
    names = ["a name that is much longer than all the others are", *(f"class {index}" for index in range(149))]
    picture = draw_confusion(np.eye(150, 151, dtype=int), names)
    assert 150 * 14 < picture.width < 150 * 20
    assert (np.asarray(picture)[:4] == 255).all()  # labels end before the margin does
    assert (np.asarray(picture)[:, :4] == 255).all()


def test_a_class_without_pixels_is_hatched_not_shown_as_all_wrong():
    empty, wrong = (draw_confusion([[10, 0, 0], row], ["a", "b"]) for row in ([0, 0, 0], [10, 0, 0]))
    assert np.asarray(empty).shape == np.asarray(wrong).shape
    assert (np.asarray(empty) != np.asarray(wrong)).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: default_palette(0), "num_classes is 0"),
        (lambda: colorize(np.zeros((2, 3, 4), int), PALETTE), r"this is \(2, 3, 4\) int64"),
        (lambda: colorize(np.zeros((2, 3)), PALETTE), "this is .* float64"),
        (lambda: overlay(Image.new("RGB", (3, 3)), np.zeros((2, 3), int), PALETTE), r"the image is \(3, 3\)"),
        (lambda: overlay(Image.new("RGB", (3, 2)), np.zeros((2, 3), int), PALETTE, 1.5), "alpha is 1.5"),
        (lambda: figure([], ["a"], ["x"], PALETTE), "1 names need as many colours"),
        (lambda: figure([[]], ["a"], ["x"], PALETTE[:1]), "row 0 has 0 pictures"),
        (lambda: draw_confusion(np.eye(3), ["a", "b", "c"]), r"the matrix is \(3, 3\), but 3 names need \(3, 4\)"),
    ],
)
def test_what_can_not_be_drawn_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
