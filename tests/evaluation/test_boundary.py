"""Boundary IoU and boundary F1 against slow references written with SciPy's morphology, one class at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from hf_segformer.evaluation.boundary import BoundaryCounts, band_radius, boundary_counts, boundary_scores

K, IGNORE = 4, 255

shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24)


@st.composite
def masks(draw):
    """Random class ids, enlarged so that there are regions and not only noise."""
    shape, zoom = draw(shapes), draw(st.sampled_from([1, 3, 6]))
    labels = draw(hnp.arrays(np.int64, shape, elements=st.sampled_from([*range(K), IGNORE])))
    prediction = draw(hnp.arrays(np.int64, shape, elements=st.sampled_from([-1, *range(K), K, 200])))
    height, width = shape
    return [mask.repeat(zoom, 0).repeat(zoom, 1)[:height, :width] for mask in (prediction, labels)]


def drawn_masks():
    """Two discs, of which the prediction is shifted, and an ignored stripe."""
    row, column = np.mgrid[:70, :110]
    labels, prediction = np.zeros((70, 110), dtype=np.int64), np.zeros((70, 110), dtype=np.int64)
    labels[(row - 30) ** 2 + (column - 40) ** 2 < 20**2] = 1
    labels[(row - 50) ** 2 + (column - 90) ** 2 < 25**2] = 2
    prediction[(row - 32) ** 2 + (column - 43) ** 2 < 20**2] = 1
    prediction[(row - 50) ** 2 + (column - 90) ** 2 < 22**2] = 2
    labels[:, 60:64] = IGNORE
    return prediction, labels


def paper_band(mask, radius):
    """The paper's mask_to_boundary: pad by zeros, erode by 3x3 squares, and take what is lost."""
    padded = np.pad(mask, 1)
    eroded = ndimage.binary_erosion(padded, np.ones((3, 3)), iterations=radius, border_value=1)
    return mask & ~eroded[1:-1, 1:-1]


def outline_of(classes, category):
    """Pixels with one of the eight neighbours in another class, by loops."""
    outline = np.zeros(classes.shape, dtype=bool)
    for row, column in np.argwhere(classes == category):
        near = classes[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        outline[row, column] = ((near != category) & (near != -1)).any()
    return outline


def slow_counts(prediction, labels, ratio, tolerance):
    counted = labels != IGNORE
    is_class = (prediction >= 0) & (prediction < K)
    truth = np.where(counted, labels, -1)
    found = np.where(counted, np.where(is_class, prediction, -2), -1)
    radius = max(1, round(ratio * math.hypot(*labels.shape)))
    rows = []
    for category in range(K):
        bands = [paper_band(classes == category, radius) for classes in (truth, found)]
        outlines = [outline_of(classes, category) for classes in (truth, found)]
        near = [
            ndimage.distance_transform_edt(~other) <= tolerance if other.any() else np.zeros(labels.shape, dtype=bool)
            for other in outlines[::-1]
        ]
        rows.append(
            [
                (bands[0] & bands[1]).sum(),
                bands[0].sum(),
                bands[1].sum(),
                outlines[0].sum(),
                (outlines[0] & near[0]).sum(),
                outlines[1].sum(),
                (outlines[1] & near[1]).sum(),
            ]
        )
    return np.array(rows).T


def counts_of(prediction, labels, ratio, tolerance):
    tensors = torch.from_numpy(prediction), torch.from_numpy(labels)
    return boundary_counts(*tensors, K, IGNORE, dilation_ratio=ratio, tolerance=tolerance)


@settings(deadline=None)
@given(masks(), st.sampled_from([0.02, 0.1, 0.3]), st.integers(0, 4))
def test_counts_equal_those_of_the_definition(pair, ratio, tolerance):
    np.testing.assert_array_equal(counts_of(*pair, ratio, tolerance), slow_counts(*pair, ratio, tolerance))


@pytest.mark.parametrize("ratio", [0.005, 0.02, 0.2])
def test_counts_of_drawn_masks_equal_those_of_the_definition(ratio):
    counts = counts_of(*drawn_masks(), ratio, 2)
    np.testing.assert_array_equal(counts, slow_counts(*drawn_masks(), ratio, 2))
    assert (counts[0, :3] > 0).all()


def test_scores_of_drawn_masks():
    counts = counts_of(*drawn_masks(), 0.02, 2)
    scores, rows = boundary_scores(counts), BoundaryCounts(*counts.tolist())
    union = rows.true_band[1] + rows.predicted_band[1] - rows.intersection[1]
    assert scores["boundary_iou"][1] == pytest.approx(rows.intersection[1] / union)
    precision, recall = rows.correct[1] / rows.predicted_outline[1], rows.found[1] / rows.true_outline[1]
    assert scores["boundary_f1"][1] == pytest.approx(2 * precision * recall / (precision + recall))
    assert all(math.isnan(scores[name][3]) for name in scores)  # the class is nowhere


def test_the_image_border_is_an_outline_for_boundary_iou_only():
    whole = np.zeros((50, 50), dtype=np.int64)
    rows = BoundaryCounts(*counts_of(whole, whole, 0.04, 3).tolist())
    assert rows.true_band[0] == 50 * 50 - 44 * 44  # three pixels from each side
    assert rows.true_outline[0] == 0


def test_an_outline_that_is_nowhere_near_has_f1_zero():
    labels, prediction = np.zeros((40, 40), dtype=np.int64), np.zeros((40, 40), dtype=np.int64)
    labels[4:8, 4:8], prediction[30:34, 30:34] = 1, 1
    scores = boundary_scores(counts_of(prediction, labels, 0.02, 2))
    assert scores["boundary_f1"][1] == scores["boundary_iou"][1] == 0.0
    missed = boundary_scores(counts_of(np.zeros_like(labels), labels, 0.02, 2))
    assert missed["boundary_f1"][1] == 0.0
    assert math.isnan(missed["boundary_precision"][1])


def test_ignored_pixels_do_not_depend_on_the_prediction():
    prediction, labels = drawn_masks()
    changed = np.where(labels == IGNORE, 3, prediction)
    assert counts_of(changed, labels, 0.02, 2).equal(counts_of(prediction, labels, 0.02, 2))


def test_counts_of_images_add_up():
    pair = drawn_masks()
    counts = counts_of(*pair, 0.02, 2)
    assert boundary_scores(counts + counts)["boundary_f1"] == pytest.approx(
        boundary_scores(counts)["boundary_f1"], nan_ok=True
    )


def test_band_radius_is_a_share_of_the_diagonal():
    assert band_radius(300, 400) == 10
    assert band_radius(3, 4) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dilation_ratio": 0.0}, "dilation_ratio is 0.0; expected a share"),
        ({"tolerance": -1}, "tolerance is -1; expected a whole number"),
        ({"tolerance": 1.5}, "tolerance is 1.5"),
    ],
)
def test_distances_out_of_range_are_refused(options, message):
    labels = torch.zeros(4, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        boundary_counts(labels, labels, K, IGNORE, **options)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"prediction is \(4, 6\) and labels are \(6, 4\)"):
        boundary_counts(torch.zeros(4, 6), torch.zeros(6, 4), K, IGNORE)
