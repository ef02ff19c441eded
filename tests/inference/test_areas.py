"""Areas and diameters against every pair of corners of every region."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import ndimage

from hf_segformer.inference.areas import AREA_COLUMNS, Area, Areas, foreground, longest_diameter, write_areas


def test_a_table_has_neither_binary_digits_nor_rounded_ones(tmp_path):
    rows = [("", "a", 3, 3 * 0.1, 1234567.125, None), (1, "a", 3, 1e-6, 0.0, 2 / 3)]
    write_areas(tmp_path / "a.csv", [Area(*row) for row in rows])
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines == [",".join(AREA_COLUMNS), ",a,3,0.3,1234567.12,", "1,a,3,0.000001,0,0.666666667"]


def slow_diameter(mask, spacing):
    """Regions by scipy, then all pairs of corners of all their pixels."""
    labels, number = ndimage.label(mask, np.ones((3, 3)))
    longest = 0.0
    for region in range(1, number + 1):
        corners = {(y + a, x + b) for y, x in np.argwhere(labels == region) for a in (0, 1) for b in (0, 1)}
        for (y, x), (v, u) in combinations(corners, 2):
            longest = max(longest, math.hypot((y - v) * spacing[0], (x - u) * spacing[1]))
    return longest


@pytest.mark.parametrize("seed", range(30))
def test_longest_diameter_is_that_of_all_pairs_of_corners(seed):
    chance = np.random.default_rng(seed)
    mask = chance.random((chance.integers(1, 13), chance.integers(1, 17))) < chance.choice([0.1, 0.3, 0.6, 1.0])
    spacing = tuple(chance.uniform(0.2, 3, 2))
    assert longest_diameter(mask, spacing) == pytest.approx(slow_diameter(mask, spacing), rel=1e-12)


def test_two_regions_have_no_common_diameter():
    mask = np.zeros((20, 30), bool)
    mask[2:4, 2:5] = mask[15:17, 25:28] = True
    assert longest_diameter(mask, (1, 1)) == pytest.approx(math.hypot(2, 3))
    mask[4:15, 5:25] = True  # joined by corners
    assert longest_diameter(mask, (1, 1)) == pytest.approx(math.hypot(15, 26))


def test_areas_of_a_volume():
    slices = np.zeros((3, 8, 9), np.uint8)
    slices[0, 1:3, 1:4] = 1
    slices[2, 4:8, 2:3] = 1
    slices[1, 0, 0] = 2
    slices[2, 0, :2] = 255  # no data
    areas = Areas(["Background", "liver", "lesion", "spleen"], (5.0, 2.0, 0.5))
    for each in slices:
        areas.add(each)
    liver, lesion, spleen, *of_slices = areas.rows()
    assert liver == ("", "liver", 10, 6.0, 50.0, pytest.approx(math.hypot(8, 0.5)))
    assert lesion == ("", "lesion", 1, 1.0, 5.0, pytest.approx(math.hypot(2, 0.5)))
    assert spleen == ("", "spleen", 0, 0.0, 0.0, 0.0)
    assert [(area.slice, area.class_name, area.pixels, area.square_mm) for area in of_slices] == [
        (1, "liver", 6, 6.0),
        (2, "lesion", 1, 1.0),
        (3, "liver", 4, 4.0),
    ]


def test_one_slice_has_an_area_but_no_volume():
    areas = Areas(["background", "lesion"], (None, 2.0, 3.0))
    areas.add(np.ones((2, 2), int))
    assert areas.rows() == [("", "lesion", 4, 24.0, None, pytest.approx(math.hypot(4, 6)))]


def test_pixels_are_counted_where_the_spacing_is_not_known():
    areas = Areas(["background", "lesion"], (2.0, None, None))
    areas.add(np.ones((2, 2), int))
    areas.add(np.ones((2, 2), int))
    assert [area[:3] for area in areas.rows()] == [("", "lesion", 8), (1, "lesion", 4), (2, "lesion", 4)]
    assert all(area.cubic_mm is area.square_mm is area.diameter_mm is None for area in areas.rows())


def test_classes_called_background_are_left_out():
    assert foreground(["BACKGROUND", "a", "b"]) == {1: "a", 2: "b"}
    assert foreground(["a", "b"]) == {0: "a", 1: "b"}
