"""Polygons in degrees for GeoJSON: within -180 to 180, cut where they cross it, and closed around the poles."""

import json

import numpy as np
import pytest

shapely = pytest.importorskip("shapely")
pyproj = pytest.importorskip("pyproj")
rasterio = pytest.importorskip("rasterio")

from hf_segformer.geo import vectors  # noqa: E402
from hf_segformer.geo.antimeridian import to_wgs84  # noqa: E402
from hf_segformer.geo.areas import AreaMeasure  # noqa: E402
from hf_segformer.geo.cog import Reference  # noqa: E402

GEOD = pyproj.Geod(ellps="WGS84")
NORTH, SOUTH, UTM, LAEA = (pyproj.CRS(f"EPSG:{code}") for code in (3413, 3031, 32601, 3571))
DEGREES = pyproj.CRS("EPSG:4326")


def inverse(geometry, crs):
    """Back to the reference system."""
    back = pyproj.Transformer.from_crs("OGC:CRS84", crs, always_xy=True)
    return shapely.transform(geometry, lambda x, y: back.transform(x, y), interleaved=False)


def contains(geometry, crs, points):
    """Return which points of the reference system are within a geometry in degrees."""
    to_degrees = pyproj.Transformer.from_crs(crs, "OGC:CRS84", always_xy=True)
    x, y = to_degrees.transform(*np.transpose(points))
    return shapely.contains_xy(geometry, x, y)


def check(polygon, crs, num_points=400):
    """Compare a polygon with the same one in degrees by points of both."""
    [found] = to_wgs84([polygon], crs)
    assert shapely.is_valid(found)
    west, south, east, north = found.bounds
    assert west >= -180
    assert east <= 180
    assert south >= -90
    assert north <= 90
    for part in shapely.get_parts(found):
        assert part.exterior.is_ccw
        assert not any(ring.is_ccw for ring in part.interiors)
    (left, low, right, high), random = polygon.bounds, np.random.default_rng(0)
    margin = 0.2 * np.array([right - left, high - low])
    points = random.uniform(np.array([left, low]) - margin, np.array([right, high]) + margin, (num_points, 2))
    near = shapely.distance(shapely.points(points), polygon.boundary) < 2e-3 * max(right - left, high - low)
    expected = shapely.contains_xy(polygon, *points.T)
    assert np.array_equal(contains(found, crs, points)[~near], expected[~near])
    return found


def test_a_polygon_of_a_projection_is_cut_at_the_antimeridian():
    hole = shapely.box(320_000, 7_020_000, 360_000, 7_060_000)
    found = check(shapely.box(290_000, 7_000_000, 440_000, 7_100_000).difference(hole), UTM)
    assert found.geom_type == "MultiPolygon"
    assert {round(part.bounds[0]) == -180 or round(part.bounds[2]) == 180 for part in found.geoms} == {True}
    area = abs(GEOD.geometry_area_perimeter(found)[0])
    assert area == pytest.approx(150e3 * 100e3 - 40e3 * 40e3, rel=2e-3)  # UTM's scale


@pytest.mark.parametrize("crs", [NORTH, SOUTH, LAEA], ids=["north", "south", "equal area"])
@pytest.mark.parametrize(
    "polygon",
    [
        shapely.box(-2e6, -1e6, 1e6, 3e6),  # the pole inside
        shapely.box(-2e6, -1e6, 1e6, 3e6).difference(shapely.box(-3e5, -5e5, 4e5, 2e5)),  # a ring around it
        shapely.box(-2e6, -1e6, 1e6, 3e6).difference(shapely.box(-1e6, 1e6, 5e5, 2e6)),  # and beside a hole
        shapely.box(0, 0, 1e6, 2e6),  # at a corner
        shapely.box(-1e6, 0, 1e6, 2e6),  # on an edge
        shapely.box(-1e6, -1e6, 1e6, 2e6).difference(shapely.box(-1e6, -1e6, 0, 0)),  # at a corner that is bent in
        shapely.box(1e5, -1e6, 9e5, 2e6),  # outside, edges pass it
    ],
    ids=["inside", "ring", "hole", "corner", "edge", "bent in", "outside"],
)
def test_poles_are_inside_outside_or_on_the_border(crs, polygon):
    found = check(polygon, crs)
    if crs is LAEA:
        assert abs(GEOD.geometry_area_perimeter(found)[0]) == pytest.approx(polygon.area, rel=2e-3)


def test_longitudes_to_360_and_wide_polygons_are_kept_as_they_are_elsewhere():
    wide = shapely.box(-180, 48, 180, 60).difference(shapely.box(10, 51, 70, 57))
    [found] = to_wgs84([wide], DEGREES)
    assert found.equals(wide)
    [found] = to_wgs84([shapely.box(170, -10, 250, 20)], DEGREES)
    assert found.equals(shapely.union(shapely.box(170, -10, 180, 20), shapely.box(-180, -10, -110, 20)))
    [found] = to_wgs84([shapely.box(0, -90.5, 360, 90.5).difference(shapely.box(100, 0, 300, 10))], DEGREES)
    assert found.area == pytest.approx(360 * 180 - 200 * 10, rel=1e-9)
    [found] = to_wgs84([shapely.box(200, 0, 210, 5)], DEGREES)
    assert found.equals(shapely.box(-160, 0, -150, 5))


def test_neighbours_keep_their_common_border():
    halves = [shapely.box(-1e6, -1e6, 0, 1e6), shapely.box(0, -1e6, 1e6, 1e6)]
    west, east = to_wgs84(halves, NORTH)
    [whole] = to_wgs84([shapely.box(-1e6, -1e6, 1e6, 1e6)], NORTH)
    assert shapely.intersection(west, east).area < 1e-4
    assert shapely.union(west, east).area == pytest.approx(whole.area, rel=1e-6)


def test_small_polygons_get_no_further_vertices():
    near = shapely.box(500_000, 5_000_000, 501_024, 5_001_024)
    [found] = to_wgs84([near], pyproj.CRS("EPSG:32633"))
    assert shapely.get_num_coordinates(found) == 5


def test_rings_in_lobes_of_an_interrupted_projection_are_apart():
    crs = pyproj.CRS("+proj=igh")
    to_plane = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True)
    boxes = []
    for longitude, latitude in ((-100, 60), (30, 60)):
        x, y = to_plane.transform(longitude, latitude)
        boxes.append(shapely.box(x - 500, y - 500, x + 500, y + 500))
    for found, expected in zip(to_wgs84(boxes, crs), ((-100, 60), (30, 60)), strict=True):
        assert found.centroid.distance(shapely.Point(expected)) < 1e-3


@pytest.mark.parametrize("code", [5513, 2065])
def test_a_mirrored_map_keeps_its_polygons(code):
    crs = pyproj.CRS(code)
    x, y = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(15, 50)
    hole = shapely.box(x - 100, y - 100, x + 100, y + 100)
    [found] = to_wgs84([shapely.box(x - 500, y - 500, x + 500, y + 500) - hole], crs)
    assert found.exterior.is_ccw
    assert found.covers(shapely.Point(15.004, 50.0)) or found.covers(shapely.Point(15.0, 50.003))
    assert not found.covers(shapely.Point(15, 50))


def test_places_beyond_the_globe_are_refused():
    with pytest.raises(ValueError, match="leaves WGS 84"):
        to_wgs84([shapely.box(0, 91, 10, 95)], DEGREES)
    with pytest.raises(ValueError, match="leaves WGS 84"):
        to_wgs84([shapely.box(-2e7, -2e7, 2e7, 2e7)], pyproj.CRS("+proj=ortho"))
    with pytest.raises(ValueError, match="encloses both poles"):
        to_wgs84([shapely.Point(0, 0).buffer(1.26e7)], pyproj.CRS("+proj=laea"))


def test_the_file_holds_the_parts(tmp_path):
    polygon = shapely.box(290_000, 7_000_000, 440_000, 7_100_000)
    feature = vectors.Feature(polygon, 1, "sea ice", polygon.area, None)
    vectors.write_features(tmp_path / "a.geojson", [feature], UTM, "geojson")
    [found] = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert found["geometry"]["type"] == "MultiPolygon"
    assert len(found["geometry"]["coordinates"]) == 2
    place = rasterio.Affine(10_000, 0, 290_000, 0, -10_000, 7_100_000)
    scene = AreaMeasure(Reference(10, 15, rasterio.crs.CRS.from_epsg(32601), place), "scene")
    read = vectors.read_polygons(tmp_path / "a.geojson", scene)
    assert shapely.symmetric_difference(shapely.union_all(read.polygons.tolist()), polygon).area < 1e-4 * polygon.area
    far = feature._replace(polygon=shapely.box(0, 91, 10, 95))
    with pytest.raises(ValueError, match=r"b.geojson cannot be written: a polygon leaves WGS 84; choose --polygons"):
        vectors.write_features(tmp_path / "b.geojson", [far], DEGREES, "geojson")
