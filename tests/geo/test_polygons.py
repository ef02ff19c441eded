"""Polygons of a segmentation map: exact before simplification, and a coverage without gaps after it."""

import numpy as np
import pytest

shapely = pytest.importorskip("shapely")
pytest.importorskip("rasterio")

from rasterio.features import rasterize, shapes  # noqa: E402

from hf_segformer.geo.polygons import trace_regions  # noqa: E402

IGNORED = 255


def patches(height, width, num_classes=4, side=3, seed=0):
    random = np.random.default_rng(seed)
    small = random.integers(0, num_classes, (height // side + 1, width // side + 1)).astype(np.uint8)
    labels = small.repeat(side, 0).repeat(side, 1)[:height, :width]
    return np.where(labels == num_classes - 1, np.uint8(IGNORED), labels)


def smooth(height, width, seed=0):
    y, x = np.mgrid[:height, :width]
    waves = np.sin(x / 9 + seed) + np.cos(y / 7) + np.sin((x + y) / 23)
    return np.digitize(waves, [-1, 0, 1]).astype(np.uint8)


def whole(labels):
    """Polygons of the whole map at once, by GDAL."""
    return [
        (shapely.geometry.shape(polygon), int(label))
        for polygon, label in shapes(labels.astype(np.int32), mask=labels != IGNORED, connectivity=4)
    ]


def key(label, polygon):
    return label, *polygon.bounds, polygon.area


@pytest.mark.parametrize("block_size", [7, 16, 64])
@pytest.mark.parametrize("seed", range(2))
def test_regions_are_those_of_the_whole_map(seed, block_size):
    labels = patches(45, 61, seed=seed)
    found = list(trace_regions(labels, IGNORED, tolerance=0, block_size=block_size))
    expected = whole(labels)
    assert len(found) == len(expected)
    pairs = zip(
        sorted(found, key=lambda region: key(region.label, region.polygon)),
        sorted(expected, key=lambda each: key(each[1], each[0])),
        strict=True,
    )
    for region, (polygon, label) in pairs:
        assert region.label == label
        assert region.polygon.equals(polygon)
        assert region.num_pixels == polygon.area
        assert region.confidence is None


@pytest.mark.parametrize("tolerance", [0, 1, 3])
@pytest.mark.parametrize("labels", [patches(50, 70), smooth(100, 90), patches(40, 40, side=1)], ids=["3", "waves", "1"])
def test_simplified_regions_leave_no_gap_and_no_overlap(labels, tolerance):
    regions = list(trace_regions(labels, IGNORED, tolerance=tolerance, block_size=32))
    polygons = np.array([region.polygon for region in regions])
    assert shapely.is_valid(polygons).all()
    assert {polygon.geom_type for polygon in polygons} == {"Polygon"}
    assert shapely.coverage_is_valid(polygons)  # common borders have the same vertices
    everything = list(trace_regions(np.where(labels == IGNORED, np.uint8(9), labels), 10, None, tolerance, 32))
    assert sum(region.polygon.area for region in everything) == pytest.approx(labels.size, rel=1e-12)
    assert shapely.union_all([region.polygon for region in everything]).area == pytest.approx(labels.size, rel=1e-12)
    assert sum(region.num_pixels for region in regions) == (labels != IGNORED).sum()


def test_simplification_removes_the_steps_of_pixels():
    labels = smooth(200, 200)
    exact, simple = (
        sum(shapely.get_num_coordinates(region.polygon) for region in trace_regions(labels, IGNORED, None, tolerance))
        for tolerance in (0, 1.5)
    )
    assert simple < exact / 3
    found = np.full(labels.shape, IGNORED, np.uint8)
    regions = trace_regions(labels, IGNORED, tolerance=1.5)
    rasterize([(region.polygon, region.label) for region in regions], out=found)
    assert (found != labels).mean() < 0.03


def test_a_straight_border_through_many_blocks_has_no_vertex_in_between():
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 32:] = 1
    for region in trace_regions(labels, IGNORED, block_size=64):
        assert shapely.get_num_coordinates(region.polygon) == 5


def test_confidence_is_the_mean_of_a_regions_pixels():
    labels = patches(40, 50, seed=3)
    confidence = np.random.default_rng(0).integers(0, 101, labels.shape).astype(np.uint8)
    regions = list(trace_regions(labels, IGNORED, confidence, 2.0, 16))
    assert len(regions) == len(whole(labels))
    by_cell = {key(label, polygon)[:5]: polygon for polygon, label in whole(labels)}
    for region in trace_regions(labels, IGNORED, confidence, 0, 16):
        inside = rasterize([(by_cell[key(region.label, region.polygon)[:5]], 1)], labels.shape) == 1
        assert region.confidence == pytest.approx(confidence[inside].mean())
    total = sum(region.confidence * region.num_pixels for region in regions)
    assert total == pytest.approx(confidence[labels != IGNORED].sum(dtype=float))


def test_holes_are_kept():
    labels = np.zeros((60, 60), np.uint8)
    labels[10:50, 10:50] = 1
    labels[28:36, 28:36] = IGNORED
    by_label = {region.label: region.polygon for region in trace_regions(labels, IGNORED, block_size=25)}
    assert [len(by_label[label].interiors) for label in (0, 1)] == [1, 1]
    assert by_label[1].area == 40 * 40 - 8 * 8


def test_a_map_without_data_has_no_regions():
    assert list(trace_regions(np.full((9, 9), IGNORED, np.uint8), IGNORED)) == []


def test_regions_are_released_when_they_are_complete(monkeypatch):
    """Memory holds the parts of the row of blocks in work, not of the whole map."""
    from hf_segformer.geo import polygons

    held = []
    join = polygons._Groups.join
    monkeypatch.setattr(polygons._Groups, "join", lambda self, *rest: (held.append(len(self.parts)), join(self, *rest)))
    labels = patches(400, 40, side=2)
    regions = sum(1 for _ in trace_regions(labels, IGNORED, block_size=20))
    assert max(held) < regions / 4
