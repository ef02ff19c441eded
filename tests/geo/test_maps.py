"""Deliverables of a predicted scene, each opened by a reader of its own."""

import csv
import json
import math
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest

from hf_segformer import SegFormerImageProcessor
from hf_segformer.files import remove_stale_partials
from hf_segformer.inference.large_image import predict_large_image
from tests.geo.test_large_images import lively, scene, write_geotiff
from tests.support.cog import cog_errors
from tests.support.commands import assert_one_line, run

rasterio = pytest.importorskip("rasterio")
shapely = pytest.importorskip("shapely")
pyogrio = pytest.importorskip("pyogrio")
pyproj = pytest.importorskip("pyproj")
tifffile = pytest.importorskip("tifffile")

from rasterio.features import rasterize  # noqa: E402

from hf_segformer.geo import cog, maps, vectors  # noqa: E402
from hf_segformer.geo.areas import NO_DATA, AreaMeasure  # noqa: E402
from hf_segformer.geo.cog import Reference  # noqa: E402
from hf_segformer.geo.maps import MapOptions  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")

UTM = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)}
FEET = {"crs": "EPSG:2263", "transform": rasterio.Affine(2, 0, 1_000_000, 0, -2, 200_000)}  # US survey feet
DEGREES = {"crs": "EPSG:4326", "transform": rasterio.Affine(1e-4, 0, 11, 0, -1e-4, 48)}
COS, SIN = math.cos(0.4), math.sin(0.4)
TURNED = {"crs": "EPSG:32633", "transform": rasterio.Affine(COS, SIN, 500_000, SIN, -COS, 5_000_000)}
TURNED_DEGREES = {
    "crs": "EPSG:4326",
    "transform": rasterio.Affine(1e-4 * COS, 1e-4 * SIN, 11, 1e-4 * SIN, -1e-4 * COS, 48),
}
PLACES = {"utm": UTM, "feet": FEET, "degrees": DEGREES, "turned": TURNED, "turned degrees": TURNED_DEGREES}
TILES = ["--tile-size", 96, "--tile-overlap", 32]
NAMES = [f"LABEL_{index}" for index in range(5)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    lively().save_pretrained(folder)
    SegFormerImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def coarse(num_bands=3, height=150, width=210, side=30):
    """Patches of 30 pixels, so that a map has some large polygons."""
    values = np.random.default_rng(0).integers(1, 255, (num_bands, height // side + 1, width // side + 1), np.uint8)
    return values.repeat(side, 1).repeat(side, 2)[:, :height, :width]


def with_hole(pixels):
    pixels = pixels.copy()
    pixels[:, 50:90, 60:100] = 0
    return pixels


def predict(checkpoint, source, out, *options):
    sources = source if isinstance(source, list) else [source]
    assert run("predict", checkpoint, *sources, "-o", out, *TILES, "--device", "cpu", *options) == 0


def labels_of(out, name="scene"):
    with rasterio.open(out / f"{name}_mask.tif") as file:
        return file.read(1)


def areas_of(out, name="scene"):
    with (out / f"{name}_areas.csv").open(newline="") as file:
        return {row["class"]: row for row in csv.DictReader(file)}


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_scene_becomes_a_cog_with_style_and_areas(tmp_path, checkpoint, out):
    predict(checkpoint, write_geotiff(tmp_path / "scene.tif", with_hole(scene()), UTM, nodata=0), out)
    assert cog_errors(out / "scene_mask.tif") == []
    labels = labels_of(out)
    rows = areas_of(out)
    assert list(rows) == [*NAMES, NO_DATA]
    for value, name in [*enumerate(NAMES), (255, NO_DATA)]:
        pixels = int((labels == value).sum())
        assert int(rows[name]["pixels"]) == pixels
        assert float(rows[name]["square_metres"]) == pytest.approx(pixels * 0.25)
        assert float(rows[name]["hectares"]) == pytest.approx(pixels * 0.25 / 10_000)
    assert int(rows[NO_DATA]["pixels"]) == 1600
    style = ElementTree.parse(out / "scene_mask.qml").getroot()
    entries = style.findall("./pipe/rasterrenderer/colorPalette/paletteEntry")
    with rasterio.open(out / "scene_mask.tif") as file:
        colors = file.colormap(1)
    assert [(each.get("value"), each.get("label")) for each in entries] == [(str(i), NAMES[i]) for i in range(5)]
    assert [each.get("color") for each in entries] == ["#{:02x}{:02x}{:02x}".format(*colors[i][:3]) for i in range(5)]


def test_a_large_map_has_overviews_in_the_order_of_a_cog(tmp_path):
    from hf_segformer.geo.cog import write_cog
    from hf_segformer.inference.tiling import MaskLayout

    labels = np.random.default_rng(0).integers(0, 3, (1300, 1100), np.uint8)
    layout = MaskLayout(np.uint8, 255, [(1, 2, 3)] * 3, ["a", "b", "c"])
    crs = rasterio.crs.CRS.from_string(UTM["crs"])
    write_cog(tmp_path / "map.tif", [(0, labels)], layout, Reference(*labels.shape, crs, UTM["transform"]))
    assert cog_errors(tmp_path / "map.tif") == []
    with rasterio.open(tmp_path / "map.tif") as file:
        assert np.array_equal(file.read(1), labels)
        assert file.overviews(1) == [2, 4]
    assert [each.name for each in tmp_path.iterdir()] == ["map.tif"]


def test_a_reference_system_that_a_geotiff_cannot_hold_is_named(tmp_path, monkeypatch):
    from hf_segformer.inference.tiling import MaskLayout

    messages = []
    monkeypatch.setattr(cog.logger, "warning", messages.append)
    labels, layout = np.zeros((40, 50), np.uint8), MaskLayout(np.uint8, 255, [(1, 2, 3)], ["a"])
    local = 'LOCAL_CS["site",UNIT["metre",1]]'
    shifted = "+proj=tmerc +lat_0=0 +lon_0=12 +k=1 +x_0=4500000 +ellps=bessel +towgs84=598,73,418,0.2,0.05,-2.5,6.7"
    for place in (UTM["crs"], "EPSG:4979", "EPSG:2263", "EPSG:7405", local, shifted):
        crs = rasterio.crs.CRS.from_user_input(place)
        cog.write_cog(tmp_path / "map.tif", [(0, labels)], layout, Reference(40, 50, crs, UTM["transform"]))
        assert not messages, place
    rotated = "+proj=ob_tran +o_proj=longlat +o_lon_p=-162 +o_lat_p=39.25 +lon_0=180 +to_meter=0.0174532925199433"
    crs = rasterio.crs.CRS.from_string(rotated)
    cog.write_cog(tmp_path / "map.tif", [(0, labels)], layout, Reference(40, 50, crs, UTM["transform"]))
    assert "map.tif cannot hold the coordinate reference system of the raster; it has none" in messages[0]
    assert [each.name for each in tmp_path.iterdir()] == ["map.tif"]


def test_rows_of_an_earlier_run_without_its_settings_are_not_continued(tmp_path, checkpoint, out, monkeypatch):
    from hf_segformer.inference import large_image

    def killed(*_, **__):
        raise KeyboardInterrupt

    source = write_geotiff(tmp_path / "scene.tif", scene(), UTM)
    with monkeypatch.context() as patched:
        patched.setattr(large_image, "_counted", killed)
        assert run("predict", checkpoint, source, "-o", out, *TILES, "--device", "cpu", "--confidence") == 130
    [folder] = out.glob(large_image.SPOOLS)
    for plane in folder.glob("*.raw"):
        plane.write_bytes(bytes(plane.stat().st_size))  # as another model would have predicted
    (out / "settings.json").unlink()
    predict(checkpoint, source, out, "--confidence")
    assert labels_of(out).any()
    assert not list(out.glob(large_image.SPOOLS))


def predict_scene(folder):
    source = write_geotiff(folder.parent / "scene.tif", scene(), UTM)
    predict_large_image(lively(), SegFormerImageProcessor(), source, folder / "a.tif", progress=False)


PLACE = Reference(30, 40, rasterio.crs.CRS.from_string(UTM["crs"]), UTM["transform"])
WORKS = {
    "geo.cog._copy": lambda folder: cog.write_cog(
        folder / "a_mask.tif", [(0, np.ones((30, 40), np.uint8))], maps.CONFIDENCE, PLACE
    ),
    "geo.vectors._write_geopackage": lambda folder: vectors.write_features(folder / "a.gpkg", [], PLACE.crs, "gpkg"),
    "inference.spool.Spool.append": predict_scene,
}


@pytest.mark.parametrize("name", WORKS)
def test_folders_of_a_killed_run_are_removed(tmp_path, monkeypatch, name):
    """They are copied in the middle of the work, as a killed process leaves them."""
    out, left = tmp_path / "out", tmp_path / "left"
    out.mkdir()

    def killed(*arguments):
        shutil.copytree(out, left)
        raise KeyboardInterrupt

    monkeypatch.setattr(f"hf_segformer.{name}", killed)
    with pytest.raises(KeyboardInterrupt):
        WORKS[name](out)
    assert not list(out.iterdir())
    assert [path for path in left.iterdir() if path.is_dir()]
    remove_stale_partials(left)
    assert list(left.iterdir())  # of a process that is alive
    monkeypatch.setattr("hf_segformer.files.is_process_alive", lambda pid: False)
    remove_stale_partials(left)
    assert not list(left.iterdir())


def test_the_validator_refuses_a_plain_geotiff(tmp_path):
    path = write_geotiff(tmp_path / "plain.tif", scene(1, height=600, width=700), UTM)
    assert cog_errors(path) == ["there are no overviews", "an image is not tiled"]
    path = write_geotiff(
        tmp_path / "late.tif", scene(1, height=600, width=700), UTM, tiled=True, blockxsize=256, blockysize=256
    )
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2])
    assert any("directories are at" in error or "before a directory" in error for error in cog_errors(path))


def test_confidence_is_in_percent(tmp_path, checkpoint, out):
    predict(checkpoint, write_geotiff(tmp_path / "scene.tif", with_hole(scene()), UTM, nodata=0), out, "--confidence")
    assert cog_errors(out / "scene_confidence.tif") == []
    with rasterio.open(out / "scene_confidence.tif") as file:
        confidence = file.read(1)
        assert (file.dtypes, file.nodata, file.crs.to_string()) == (("uint8",), 255, UTM["crs"])
        assert file.transform == UTM["transform"]
    labels = labels_of(out)
    assert ((confidence == 255) == (labels == 255)).all()
    assert confidence[labels != 255].min() >= 20
    assert confidence[labels != 255].max() <= 100
    assert len(np.unique(confidence)) > 5


# --- Polygons ---------------------------------------------------------------------------------------------------------


def read_gpkg(path):
    about, _, wkb, fields = pyogrio.raw.read(path)
    return about, shapely.from_wkb(wkb), dict(zip(about["fields"], fields, strict=True))


@pytest.mark.parametrize(
    "place",
    [pytest.param(PLACES[each], marks=[pytest.mark.slow] * (each in ("feet", "turned")), id=each) for each in PLACES],
)
def test_polygons_have_the_pixels_of_the_map_and_areas_of_the_crs(tmp_path, checkpoint, out, place):
    source = write_geotiff(tmp_path / "scene.tif", with_hole(coarse()), place, nodata=0)
    predict(checkpoint, source, out, "--polygons", "gpkg", "--simplify", 0)
    labels, (about, polygons, fields) = labels_of(out), read_gpkg(out / "scene_polygons.gpkg")
    assert about["crs"] == place["crs"]
    assert about["geometry_type"] == "Polygon"
    drawn = rasterize(zip(polygons, fields["class_id"], strict=True), labels.shape, 255, transform=place["transform"])
    assert np.array_equal(drawn, labels)
    assert [NAMES[index] for index in fields["class_id"]] == fields["class"].tolist()
    assert ((fields["confidence"] > 0.2) & (fields["confidence"] <= 1)).all()

    crs = pyproj.CRS(place["crs"])
    if crs.is_geographic:
        geod = pyproj.Geod(ellps="WGS84")  # whose edges are geodesics, not straight in degrees
        expected = [abs(geod.geometry_area_perimeter(shapely.orient_polygons(each))[0]) for each in polygons]
    else:
        expected = shapely.area(polygons) * crs.axis_info[0].unit_conversion_factor ** 2
    tolerance = 1e-4 if crs.is_geographic else 1e-9
    np.testing.assert_allclose(fields["area_m2"], expected, rtol=tolerance, atol=1e-4)
    rows = areas_of(out)
    for index, name in enumerate(NAMES):
        total = fields["area_m2"][fields["class_id"] == index].sum()
        assert float(rows[name]["square_metres"]) == pytest.approx(total, rel=1e-9, abs=0.01)


def test_geojson_is_in_degrees_with_the_exterior_counterclockwise(tmp_path, checkpoint, out):
    predict(
        checkpoint,
        write_geotiff(tmp_path / "scene.tif", with_hole(coarse()), UTM, nodata=0),
        out / "1",
        "--polygons",
        "geojson",
        "--confidence",
    )
    predict(checkpoint, tmp_path / "scene.tif", out / "2", "--polygons", "gpkg")
    content = json.loads((out / "1" / "scene_polygons.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    assert "crs" not in content  # RFC 7946
    _, polygons, fields = read_gpkg(out / "2" / "scene_polygons.gpkg")
    back = pyproj.Transformer.from_crs("EPSG:4326", UTM["crs"], always_xy=True)
    assert len(content["features"]) == len(polygons)
    for index, feature in enumerate(content["features"]):
        exterior = shapely.LinearRing(feature["geometry"]["coordinates"][0])
        assert exterior.is_ccw
        assert not any(shapely.LinearRing(ring).is_ccw for ring in feature["geometry"]["coordinates"][1:])
        found = shapely.transform(
            shapely.geometry.shape(feature["geometry"]), lambda x, y: back.transform(x, y), interleaved=False
        )
        assert found.symmetric_difference(polygons[index]).area < 0.01
        properties = feature["properties"]
        assert properties["class_id"] == fields["class_id"][index]
        assert properties["area_m2"] == pytest.approx(fields["area_m2"][index], abs=1e-3)
        assert properties["confidence"] == pytest.approx(fields["confidence"][index], abs=1e-4)
    assert (out / "1" / "scene_confidence.tif").exists()
    assert not (out / "2" / "scene_confidence.tif").exists()


@pytest.mark.slow
def test_small_polygons_are_left_out_with_a_message(tmp_path, checkpoint, out, monkeypatch):
    messages = []
    monkeypatch.setattr(maps.logger, "warning", messages.append)
    source = write_geotiff(tmp_path / "scene.tif", scene(), UTM)
    predict(checkpoint, source, out / "all", "--polygons", "gpkg")
    _, _, fields = read_gpkg(out / "all" / "scene_polygons.gpkg")
    least = float(np.median(fields["area_m2"]))
    assert messages == []
    predict(checkpoint, source, out / "some", "--polygons", "gpkg", "--min-area", least)
    small = fields["area_m2"][fields["area_m2"] < least]
    [message] = messages
    assert f"scene: {len(small)} polygons below {least:g} square metres are left out, {small.sum():.1f}" in message
    _, _, kept = read_gpkg(out / "some" / "scene_polygons.gpkg")
    assert sorted(kept["area_m2"]) == sorted(fields["area_m2"][fields["area_m2"] >= least])
    predict(checkpoint, source, out / "none", "--polygons", "gpkg", "--min-area", 1e9)
    assert len(read_gpkg(out / "none" / "scene_polygons.gpkg")[1]) == 0
    predict(checkpoint, source, out / "none json", "--polygons", "geojson", "--min-area", 1e9)
    assert json.loads((out / "none json" / "scene_polygons.geojson").read_text())["features"] == []


# --- Areas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [DEGREES, TURNED_DEGREES, UTM, FEET, TURNED], ids=str)
def test_areas_of_pixels_are_those_of_their_polygons(place):
    crs = rasterio.crs.CRS.from_string(place["crs"])
    measure = AreaMeasure(Reference(30, 40, crs, place["transform"]), "scene")
    areas = np.broadcast_to(measure.of_rows(10, 5, 40), (5, 40))
    for row, column in ((0, 0), (4, 39)):
        corners = [(column + x, row + 10 + y) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))]
        polygon = shapely.Polygon([place["transform"] * corner for corner in corners])
        assert areas[row, column] == pytest.approx(measure.of_polygons([polygon])[0], rel=1e-6)


def test_the_areas_of_the_globe_add_up_to_that_of_the_ellipsoid():
    transform = rasterio.Affine(1, 0, -180, 0, -1, 90)
    measure = AreaMeasure(Reference(180, 360, rasterio.crs.CRS.from_epsg(4326), transform), "globe")
    assert measure.of_rows(0, 180, 360).sum() * 360 == pytest.approx(5.10065621724e14, rel=1e-11)


def test_wide_polygons_have_the_areas_of_their_pixels():
    transform = rasterio.Affine(2, 0, -180, 0, -3, 90)
    measure = AreaMeasure(Reference(60, 180, rasterio.crs.CRS.from_epsg(4326), transform), "globe")
    band = shapely.box(-180, 48, 180, 60).difference(shapely.box(10, 51, 70, 57))
    rows = measure.of_rows(0, 60, 180)[:, 0]
    assert measure.of_polygons([band])[0] == pytest.approx(180 * rows[10:14].sum() - 30 * rows[11:13].sum(), rel=1e-11)
    slanted = shapely.Polygon([(0, 20), (40, 20), (0, 50)])
    geod = pyproj.Geod(ellps="WGS84")
    expected = geod.geometry_area_perimeter(shapely.segmentize(slanted, 0.01))[0]
    assert measure.of_polygons([slanted])[0] == pytest.approx(expected, rel=1e-6)


def test_a_projection_that_distorts_areas_is_named(tmp_path, checkpoint, out, monkeypatch):
    from hf_segformer.geo import areas

    messages = []
    monkeypatch.setattr(areas.logger, "warning", messages.append)
    mercator = {"crs": "EPSG:3857", "transform": rasterio.Affine(1, 0, 1_200_000, 0, -1, 6_100_000)}
    predict(checkpoint, write_geotiff(tmp_path / "scene.tif", scene(), mercator), out)
    [message] = messages
    assert "the areas of WGS 84 / Pseudo-Mercator are 2.2" in message


def test_a_raster_without_a_crs_has_no_areas(tmp_path, checkpoint, out):
    write_geotiff(tmp_path / "scene.tif", scene(5), {"transform": UTM["transform"]})
    predict(checkpoint, tmp_path / "scene.tif", out, "--bands", 1, 2, 3)
    assert sorted(path.name for path in out.glob("scene*")) == ["scene_mask.qml", "scene_mask.tif"]


# --- Wrong usage ------------------------------------------------------------------------------------------------------


def failure(checkpoint, source, out, capsys, *options):
    assert run("predict", checkpoint, source, "-o", out, *TILES, "--device", "cpu", *options) > 0
    return capsys.readouterr().err.splitlines()[-1]


def test_polygons_without_a_reference_are_refused_before_the_work(tmp_path, checkpoint, out, capsys):
    write_geotiff(tmp_path / "scene.tif", scene(), {"transform": UTM["transform"]})
    line = failure(checkpoint, tmp_path / "scene.tif", out, capsys, "--polygons", "gpkg")
    assert "scene.tif has no coordinate reference system; expected one" in line
    assert not (out / "scene_mask.tif").exists()
    tifffile.imwrite(tmp_path / "plain.tif", scene(3).transpose(1, 2, 0), extratags=[(42113, 2, 0, "0", True)])
    line = failure(checkpoint, tmp_path / "plain.tif", out, capsys, "--polygons", "gpkg")
    assert "plain.tif is no raster; expected one for a map" in line
    (tmp_path / "scan.nii").touch()
    line = failure(checkpoint, tmp_path / "scan.nii", out / "scan", capsys, "--confidence")
    assert "scan.nii: it is a volume; expected a raster for a map" in line


@pytest.mark.parametrize(
    ("crs", "name"),
    [
        ('LOCAL_CS["site grid",UNIT["metre",1]]', "site grid"),
        pytest.param("+proj=moll +a=1737400 +b=1737400 +units=m", "unknown", marks=pytest.mark.slow),
    ],
    ids=["local", "moon"],
)
def test_a_scene_without_places_on_the_earth_has_no_geojson(tmp_path, checkpoint, out, capsys, crs, name):
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    place = {**UTM, "crs": rasterio.crs.CRS.from_user_input(crs)}
    source = write_geotiff(scenes / "a.tif", coarse(), place)
    write_geotiff(scenes / "b.tif", coarse(), UTM)
    line = failure(checkpoint, scenes, out, capsys, "--polygons", "geojson")
    assert f"1 image could not be predicted: {source} has no GeoJSON: the reference system {name} has no" in line
    assert "longitudes and latitudes on the Earth; choose --polygons gpkg" in line
    assert not list(out.glob("a_*"))
    assert (out / "b_polygons.geojson").exists()
    predict(checkpoint, source, out / "gpkg", "--polygons", "gpkg")
    assert pyogrio.read_info(out / "gpkg" / "a_polygons.gpkg")["features"]


def test_a_scene_of_ground_control_points_is_warped_as_the_message_says(tmp_path, checkpoint, out, capsys, monkeypatch):
    from rasterio.rio.main import main_group

    from hf_segformer.geo import areas

    messages = []
    monkeypatch.setattr(areas.logger, "warning", messages.append)
    monkeypatch.chdir(tmp_path)
    pixels, transform = scene(), UTM["transform"]
    height, width = pixels.shape[1:]
    points = [
        rasterio.control.GroundControlPoint(row, column, *(transform * (column, row)))
        for row in (0, height)
        for column in (0, width)
    ]
    write_geotiff(tmp_path / "scene.tif", pixels, {"gcps": points, "crs": UTM["crs"]})
    line = failure(checkpoint, "scene.tif", out, capsys, "--polygons", "gpkg")
    command = line.partition("warp it first (rio ")[2].partition(")")[0].replace("EPSG:...", UTM["crs"])
    with pytest.raises(SystemExit, match="0"):
        main_group(command.split())
    predict(checkpoint, "warped.tif", out, "--polygons", "gpkg")
    with rasterio.open("warped.tif") as file:
        assert np.array_equal(file.read(), pixels)
        assert file.transform.almost_equals(transform, 1e-6)
    assert (out / "warped_polygons.gpkg").exists()
    predict(checkpoint, "scene.tif", out / "plain")
    assert "no areas are written, since the scene has ground control points alone" in messages[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--min-area", 5], "--min-area is given without --polygons"),
        (["--simplify", 2], "--simplify is given without --polygons"),
        (["--polygons", "gpkg", "--min-area", -1], "--min-area is -1.0; expected a number of at least 0"),
        (["--confidence", "--format", "parquet"], "--confidence is given with --format parquet"),
        (["--aoi", "nowhere.gpkg"], "nowhere.gpkg"),
    ],
)
def test_options_that_do_not_go_together(checkpoint, out, capsys, options, words):
    assert run("predict", checkpoint, "scene.tif", "-o", out, *options) == 2
    assert_one_line(capsys.readouterr().err, words)


def test_the_extra_is_named_where_it_is_missing(tmp_path, checkpoint, out, capsys, monkeypatch):
    from hf_segformer.geo import vectors

    monkeypatch.setattr(vectors, "is_installed", lambda name: name != "shapely")
    write_geotiff(tmp_path / "scene.tif", scene(), UTM)
    line = failure(checkpoint, tmp_path / "scene.tif", out, capsys, "--polygons", "gpkg")
    assert line == "segformer: polygons needs shapely: pip install 'hf-segformer[geo]'"


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="polygons is 'shp'; expected one of gpkg, geojson"):
        MapOptions(polygons="shp")
    with pytest.raises(ValueError, match=r"min_area is 5; expected 0 without polygons"):
        MapOptions(min_area=5)


def test_a_changed_option_does_not_mix_with_earlier_results(tmp_path, checkpoint, out, capsys):
    source = write_geotiff(tmp_path / "scene.tif", scene(), UTM)
    predict(checkpoint, source, out, "--confidence")
    line = failure(checkpoint, source, out, capsys, "--polygons", "gpkg")
    assert "was made with options" in line
