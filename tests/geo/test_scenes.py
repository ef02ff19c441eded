"""Areas of interest and mosaics: the same predictions as without, for the part that is asked for."""

import contextlib
import json
import os
import sqlite3
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hf_segformer.data.reader_protocol import Tile
from hf_segformer.data.readers import open_raster
from hf_segformer.inference.segmenter import Segmenter
from hf_segformer.inference.tiling import count_tiles
from tests.geo.test_large_images import TILED, scene, write_geotiff
from tests.geo.test_maps import DEGREES, TURNED, UTM, checkpoint, labels_of, out, predict  # noqa: F401
from tests.support.commands import run

rasterio = pytest.importorskip("rasterio")
shapely = pytest.importorskip("shapely")
pyogrio = pytest.importorskip("pyogrio")
pyproj = pytest.importorskip("pyproj")

from rasterio.features import rasterize  # noqa: E402

from hf_segformer.geo.areas import AreaMeasure  # noqa: E402
from hf_segformer.geo.cog import Reference  # noqa: E402
from hf_segformer.geo.mosaic import MosaicRaster  # noqa: E402
from hf_segformer.geo.scenes import Region, SceneSource  # noqa: E402
from hf_segformer.geo.vectors import from_pixels, read_polygons  # noqa: E402
from hf_segformer.geo.vrt import checked_vrt  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")

TRIANGLE = shapely.Polygon([(10.3, 12.4), (40.2, 20.7), (30.6, 50.1)])  # in pixels, off their centres
CORNER = shapely.box(170.2, 110.3, 200.2, 130.3)


def write_vectors(path, polygons, crs, **fields):
    """Write polygons as GeoPackage, shapefile or GeoJSON, with columns of attributes."""
    if path.suffix == ".geojson":
        columns = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
        features = [
            {
                "type": "Feature",
                "properties": columns[index] if columns else {},
                "geometry": shapely.geometry.mapping(p),
            }
            for index, p in enumerate(polygons)
        ]
        path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        return path
    driver = {".gpkg": "GPKG", ".shp": "ESRI Shapefile"}[path.suffix]
    types = {each.geom_type for each in polygons}
    pyogrio.raw.write(
        path,
        shapely.to_wkb(polygons),
        [np.array(values, object if isinstance(values[0], str) else None) for values in fields.values()],
        list(fields),
        driver=driver,
        geometry_type=types.pop() if len(types) == 1 else "Unknown",
        crs=crs,
    )
    return path


@pytest.mark.parametrize(
    ("place", "suffix"),
    [
        pytest.param(UTM, ".gpkg", id="utm"),
        pytest.param(UTM, ".shp", id="shapefile", marks=pytest.mark.slow),
        pytest.param(DEGREES, ".geojson", id="degrees", marks=pytest.mark.slow),
        pytest.param(TURNED, ".geojson", id="turned"),
    ],
)
def test_an_area_of_interest_changes_no_pixel_inside_it(tmp_path, checkpoint, out, monkeypatch, place, suffix):  # noqa: F811
    source = write_geotiff(tmp_path / "scene.tif", scene(), place)
    area = from_pixels([TRIANGLE, CORNER], place["transform"])
    crs = place["crs"]
    if suffix == ".geojson":  # of another reference system than the scene
        forth = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
        area, crs = shapely.transform(area, lambda x, y: forth.transform(x, y), interleaved=False), "EPSG:4326"
    aoi = write_vectors(tmp_path / f"aoi{suffix}", area, crs, name=["a", "b"])
    predict(checkpoint, source, out / "whole", "--confidence")
    calls = []
    forward = Segmenter.tile_logits
    monkeypatch.setattr(Segmenter, "tile_logits", lambda self, tiles: (calls.append(1), forward(self, tiles))[1])
    predict(checkpoint, source, out / "aoi", "--aoi", aoi, "--confidence")
    assert len(calls) < count_tiles(150, 210, TILED)
    inside = rasterize([TRIANGLE, CORNER], (150, 210)) == 1
    for name in ("mask", "confidence"):
        with rasterio.open(out / "whole" / f"scene_{name}.tif") as file:
            whole = file.read(1)
        with rasterio.open(out / "aoi" / f"scene_{name}.tif") as file:
            found = file.read(1)
        assert np.array_equal(found[inside], whole[inside])
        assert (found[~inside] == 255).all()


def test_another_area_is_another_job(tmp_path, checkpoint, out, capsys):  # noqa: F811
    source = write_geotiff(tmp_path / "scene.tif", scene(), UTM)
    for polygon, status in ((TRIANGLE, 0), (CORNER, 1)):
        aoi = write_vectors(tmp_path / "aoi.gpkg", from_pixels([polygon], UTM["transform"]), UTM["crs"])
        assert run("predict", checkpoint, source, "-o", out, "--aoi", aoi, "--device", "cpu") == status
        aoi.unlink()
    assert "was made with options" in capsys.readouterr().err


# --- Mosaics ----------------------------------------------------------------------------------------------------------


def part(path, pixels, top, left, height, width, place=UTM, **others):
    matrix = place["transform"]
    corner = [a * left + b * top + c for a, b, c in (matrix[:3], matrix[3:6])]
    moved = rasterio.Affine(matrix.a, matrix.b, corner[0], matrix.d, matrix.e, corner[1])
    piece = pixels[:, top : top + height, left : left + width]
    return write_geotiff(path, piece, {**place, "transform": moved}, **others)


@pytest.mark.parametrize("place", [pytest.param(UTM, marks=pytest.mark.slow), TURNED], ids=["utm", "turned"])
def test_a_mosaic_is_predicted_as_the_whole_scene(tmp_path, checkpoint, out, place):  # noqa: F811
    pixels = scene()
    (tmp_path / "parts").mkdir()
    part(tmp_path / "parts" / "b.tif", pixels, 0, 0, 150, 100, place)
    part(tmp_path / "parts" / "a.tif", pixels, 0, 90, 80, 120, place)  # overlaps
    part(tmp_path / "parts" / "c.tif", pixels, 80, 100, 70, 110, place)
    predict(checkpoint, tmp_path / "parts", out / "mosaic", "--mosaic", "--polygons", "gpkg")
    predict(checkpoint, write_geotiff(tmp_path / "scene.tif", pixels, place), out / "whole", "--polygons", "gpkg")
    assert np.array_equal(labels_of(out / "mosaic", "mosaic"), labels_of(out / "whole"))
    with rasterio.open(out / "mosaic" / "mosaic_mask.tif") as file:
        np.testing.assert_allclose(file.transform, place["transform"])
    areas = [(out / folder / f"{name}_areas.csv").read_text() for folder, name in (("mosaic",) * 2, ("whole", "scene"))]
    assert areas[0] == areas[1]
    assert (out / "mosaic" / "mosaic_polygons.gpkg").exists()


def test_scenes_of_a_mosaic_may_have_one_name(tmp_path):
    pixels = scene()
    for number in range(2):
        (tmp_path / f"{number}").mkdir()
        part(tmp_path / f"{number}" / "tile.tif", pixels, 0, 100 * number, 150, 100)
    again = tmp_path / "1" / ".." / "0" / "tile.tif"  # one scene, however it is named
    inputs = [str(tmp_path / "0"), str(tmp_path / "1"), str(tmp_path / "0" / "tile.tif"), str(again)]
    [item] = SceneSource(inputs, tmp_path / "out", mosaic=True).items()
    assert item.files == (str(tmp_path / "0" / "tile.tif"), str(tmp_path / "1" / "tile.tif"))
    with pytest.raises(ValueError, match="would both be filed as tile"):
        SceneSource(inputs, tmp_path / "out")


def test_scenes_without_a_reference_system_get_the_remedy(tmp_path):
    paths = [str(tmp_path / f"{name}.tif") for name in "ab"]
    for path in paths:
        Image.fromarray(np.moveaxis(scene(), 0, -1)).save(path)
    with pytest.raises(ValueError, match=r"a\.tif has no transform to a reference system; expected one"):
        MosaicRaster.join(paths)


def test_the_first_scene_that_holds_data_counts_and_gaps_are_no_data(tmp_path):
    first, second = scene(), 255 - scene()
    first[:, :40, :50] = 0
    paths = [
        part(tmp_path / "1.tif", first, 0, 0, 60, 80, nodata=0),
        part(tmp_path / "2.tif", second, 20, 30, 100, 90, nodata=0),
    ]
    with MosaicRaster.join([str(path) for path in paths]) as raster:
        assert (raster.height, raster.width) == (120, 120)
        pixels, valid = raster.read(Tile(0, 0, 120, 120))
    expected = np.zeros((3, 120, 120), np.uint8)
    expected[:, 20:120, 30:120] = second[:, 20:120, 30:120]
    here = np.zeros((120, 120), bool)
    here[:60, :80] = (first != 0).any(0)[:60, :80]
    expected[:, here] = first[:, :120, :120][:, here]
    assert np.array_equal(np.ma.getdata(pixels)[:, valid], expected[:, valid])
    assert np.array_equal(valid, (expected != 0).any(0))
    assert np.ma.getmaskarray(pixels)[:, ~valid].all()


def test_scenes_with_palettes_are_joined_by_their_colours(tmp_path):
    indices = scene(1) % 8
    paths, expected = [], np.zeros((3, 150, 210), np.uint8)
    for number, left in enumerate((0, 100)):
        paths.append(part(tmp_path / f"{number}.tif", indices, 0, left, 150, 100))
        colors = {index: (index * 30, 200 - index * 20, number * 90, 255) for index in range(8)}
        with rasterio.open(paths[-1], "r+") as file:
            file.write_colormap(1, colors)
        here = slice(left, left + 100)
        expected[:, :, here] = np.moveaxis(np.array(list(colors.values()), np.uint8)[indices[0, :, here]], -1, 0)[:3]
    with MosaicRaster.join([str(path) for path in paths]) as raster:
        assert (raster.num_bands, raster.dtype) == (3, np.uint8)
        assert np.array_equal(raster.read(Tile(0, 0, 150, 200))[0], expected[:, :, :200])
        raster.restrict(NearTheLeft())
        assert raster.read(Tile(0, 64, 32, 32))[0].shape == (3, 32, 32)


def test_many_scenes_are_not_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_segformer.geo.mosaic._MOST_OPEN", 2)
    pixels = scene()
    paths = [part(tmp_path / f"{i}.tif", pixels, 0, 30 * i, 150, 30) for i in range(7)]
    with MosaicRaster.join([str(path) for path in paths]) as raster:
        whole, _ = raster.read(Tile(0, 0, 150, 210))
        assert len(raster._opened) == 2
    assert np.array_equal(whole, pixels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crs": "EPSG:32632"}, "has the coordinate reference system EPSG:32632; expected EPSG:32633"),
        ({"transform": rasterio.Affine(0.6, 0, 500_000, 0, -0.6, 5_000_000)}, "is not on the grid of"),
        ({"transform": rasterio.Affine(0.5, 0, 500_000.2, 0, -0.5, 5_000_000)}, "0.40 columns and 0.00 rows away"),
    ],
)
def test_scenes_that_do_not_fit_together_are_refused(tmp_path, checkpoint, out, capsys, change, words):  # noqa: F811
    (tmp_path / "parts").mkdir()
    write_geotiff(tmp_path / "parts" / "a.tif", scene(), UTM)
    write_geotiff(tmp_path / "parts" / "b.tif", scene(), {**UTM, **change})
    assert run("predict", checkpoint, tmp_path / "parts", "-o", out, "--mosaic", "--device", "cpu") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "b.tif" in line
    assert words in line
    assert "rio warp" in line


@pytest.mark.parametrize("name", ["a.jpg", "z.jpg", "a.webp", "z.tif"])
def test_a_preview_beside_the_scenes_is_named(tmp_path, name):
    write_geotiff(tmp_path / "scene.tif", scene(), UTM)
    Image.fromarray(np.moveaxis(scene(), 0, -1)).save(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} is no raster with .*: move it elsewhere, or give a pattern"):
        MosaicRaster.join([str(path) for path in sorted(tmp_path.iterdir())])


def test_a_damaged_scene_is_named_instead_of_the_first_one(tmp_path):
    write_geotiff(tmp_path / "a.tif", scene(), UTM)
    (tmp_path / "b.tif").write_bytes(b"II*\0" + bytes(20))
    with pytest.raises(OSError, match=r"^'\S*b\.tif' not recognized"):
        MosaicRaster.join([str(tmp_path / "a.tif"), str(tmp_path / "b.tif")])


def test_scenes_of_other_types_are_refused(tmp_path):
    write_geotiff(tmp_path / "a.tif", scene(), UTM)
    write_geotiff(tmp_path / "b.tif", scene(dtype=np.uint16), UTM)
    with pytest.raises(ValueError, match=r"b\.tif has the type uint16; expected uint8"):
        MosaicRaster.join([str(tmp_path / "a.tif"), str(tmp_path / "b.tif")])


# --- Vector files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def utm():
    reference = Reference(150, 210, rasterio.crs.CRS.from_string(UTM["crs"]), UTM["transform"])
    return AreaMeasure(reference, "scene.tif")


def test_bad_vector_files_are_named_in_a_line(tmp_path, utm):
    box = shapely.box(500_000, 4_999_900, 500_050, 5_000_000)
    shp = write_vectors(tmp_path / "a.shp", [box], UTM["crs"], name=["a"])
    os.unlink(tmp_path / "a.prj")
    with pytest.raises(ValueError, match=r"a\.shp has no coordinate reference system; expected one"):
        read_polygons(shp, utm)
    gpkg = write_vectors(tmp_path / "a.gpkg", [box], UTM["crs"], name=["a"])
    with pytest.raises(ValueError, match=r"a\.gpkg has no attribute 'class'; expected one of name"):
        read_polygons(gpkg, utm, "class")
    points = write_vectors(tmp_path / "points.gpkg", [shapely.Point(5e5, 5e6)], UTM["crs"], name=["a"])
    with pytest.raises(ValueError, match=r"points\.gpkg holds no polygons; expected at least one"):
        read_polygons(points, utm)
    empty = tmp_path / "empty.geojson"
    empty.write_text('{"type": "FeatureCollection", "features": []}')
    with pytest.raises(ValueError, match="holds no polygons"):
        read_polygons(empty, utm)
    empty.write_text('{"type": "FeatureCollection"}')
    with pytest.raises(ValueError, match="is no GeoJSON with polygons"):
        read_polygons(empty, utm)
    empty.write_text("{")
    with pytest.raises(ValueError, match="is no GeoJSON"):
        read_polygons(empty, utm)
    other = tmp_path / "other.gpkg"
    other.write_bytes(b"<OGRVRTDataSource>")
    with pytest.raises(ValueError, match="is no GeoPackage, GeoJSON file or shapefile"):
        read_polygons(other, utm)
    gpkg.write_bytes(gpkg.read_bytes()[:200] + bytes(5000))
    with pytest.raises((ValueError, OSError), match=r"a\.gpkg"):
        read_polygons(gpkg, utm)


@pytest.mark.parametrize(
    "module", ["VirtualShape('/x')", "VirtualOGR('/x')", "rtree_(a)", "VirtualShape('x USING rtree(')"]
)
def test_a_geopackage_whose_table_is_another_file_is_not_opened(tmp_path, utm, monkeypatch, module):
    path = write_vectors(
        tmp_path / "a.gpkg", [shapely.box(500_000, 4_999_900, 500_050, 5_000_000)], UTM["crs"], name=["a"]
    )
    assert len(read_polygons(path, utm).polygons) == 1  # with its index, which is virtual
    made = f"CREATE VIRTUAL TABLE other USING {module}"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA writable_schema = ON")
        database.execute("INSERT INTO sqlite_master VALUES ('table', 'other', 'other', 0, ?)", [made])
        database.commit()
    monkeypatch.setattr(pyogrio, "list_layers", None)
    with pytest.raises(ValueError, match=r"a\.gpkg has a table other that is virtual; expected tables of its own"):
        read_polygons(path, utm)


@pytest.mark.parametrize(("suffix", "name"), [(".gpkg", "a.csv"), (".gpkg", "a.kmz"), (".shp", "a.gpkg")])
def test_gdal_chooses_no_driver_by_a_wrong_name(tmp_path, utm, monkeypatch, suffix, name):
    path = tmp_path / f"whole{suffix}"
    write_vectors(path, [shapely.box(500_000, 4_999_900, 500_050, 5_000_000)], UTM["crs"], name=["a"])
    monkeypatch.setattr(pyogrio, "list_layers", None)
    with pytest.raises(ValueError, match=rf"of another name; expected one that ends in \{suffix}: rename it"):
        read_polygons(path.rename(tmp_path / name), utm)


GRIDS = "+proj=longlat +ellps=bessel +nadgrids=/etc/hostname"


def test_no_file_of_grid_shifts_is_opened(tmp_path, utm):
    path = tmp_path / "a.gpkg"
    wkb = shapely.to_wkb([shapely.box(0, 0, 1, 1)])
    pyogrio.raw.write(path, wkb, [], [], driver="GPKG", geometry_type="Polygon", crs=pyproj.CRS(GRIDS).to_wkt())
    with pytest.raises(ValueError, match=r"a\.gpkg has a reference system that names a file of grid shifts"):
        read_polygons(path, utm)
    write_geotiff(tmp_path / "scene.tif", scene(), UTM)
    vrt = f"<VRTDataset rasterXSize='210' rasterYSize='150'><SRS>{GRIDS}</SRS></VRTDataset>"
    (tmp_path / "s.vrt").write_text(vrt)
    with pytest.raises(ValueError, match=r"s\.vrt has a reference system that names a file"):
        checked_vrt(tmp_path / "s.vrt")
    checked_vrt_of_mercator = vrt.replace(GRIDS, "+proj=merc +a=6378137 +nadgrids=@null +wktext")
    (tmp_path / "s.vrt").write_text(checked_vrt_of_mercator)
    checked_vrt(tmp_path / "s.vrt")
    crs = rasterio.crs.CRS.from_string(GRIDS)
    with pytest.raises(ValueError, match="scene has a reference system that names a file"):
        AreaMeasure(Reference(9, 9, crs, UTM["transform"]), "scene")


@pytest.mark.parametrize("options", [{"USE_SPILL": "YES"}, {"DEPENDENT_FILE": "../other.img"}], ids=str)
def test_an_erdas_file_whose_pixels_are_elsewhere_is_refused(tmp_path, options):
    path = write_geotiff(tmp_path / "a.img", scene(), {**UTM, "driver": "HFA"})
    with open_raster(str(path), 3) as raster:
        np.testing.assert_array_equal(raster.image(), scene())
    write_geotiff(path, scene(), {**UTM, "driver": "HFA"}, **options)
    with pytest.raises(ValueError, match=r"a\.img says that its pixels are in another file; .* \(rio convert\)"):
        open_raster(str(path), 3)


def test_older_geojson_may_name_its_reference_system_by_code_alone(tmp_path, utm):
    path = write_vectors(tmp_path / "a.geojson", [shapely.box(500_000, 4_999_900, 500_050, 5_000_000)], None)
    content = json.loads(path.read_text())
    content["crs"] = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}
    path.write_text(json.dumps(content))
    [polygon] = read_polygons(path, utm).polygons
    assert polygon.bounds == (500_000, 4_999_900, 500_050, 5_000_000)
    content["crs"]["properties"]["name"] = "+init=/etc/passwd:1"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected an EPSG code, or none"):
        read_polygons(path, utm)


def test_an_area_elsewhere_and_one_for_an_image_are_refused(tmp_path, checkpoint, out, capsys):  # noqa: F811
    source = write_geotiff(tmp_path / "scene.tif", scene(), UTM)
    aoi = write_vectors(
        tmp_path / "aoi.gpkg", from_pixels([shapely.box(900, 900, 950, 950)], UTM["transform"]), UTM["crs"]
    )
    assert run("predict", checkpoint, source, "-o", out, "--aoi", aoi, "--device", "cpu") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{aoi} does not meet {source}: its polygons are within columns 900 to 950 and rows 900 to 950" in line


ICE = {"crs": "EPSG:3413", "transform": rasterio.Affine(25_000, 0, -700_000, 0, -25_000, -600_000)}
SHEET = {"crs": "EPSG:32633", "transform": rasterio.Affine(500, 0, 399_960, 0, -500, 5_400_000)}
# Diagonal through the origin of the projection, on the two sides of which its edges bend to opposite sides.
EQUATOR = {"crs": "EPSG:32633", "transform": rasterio.Affine(5000, 0, 0, 0, -5000, 500_000)}


@pytest.mark.parametrize(
    ("place", "shape", "corners"),
    [
        (ICE, (116, 68), [(-60, 65), (-20, 65), (-20, 80), (-60, 80)]),
        (SHEET, (220, 220), [(14, 47.9), (15.3, 47.9), (15.3, 48.5), (14, 48.5)]),
        (EQUATOR, (200, 200), [(10.6, -4.4), (19.4, 4.4), (10.6, 4.4)]),
    ],
    ids=["polar", "utm", "equator"],
)
def test_edges_are_straight_in_the_system_of_their_file(tmp_path, place, shape, corners):
    reference = Reference(*shape, rasterio.crs.CRS.from_string(place["crs"]), place["transform"])
    raster = SimpleNamespace(name="scene.tif", height=shape[0], width=shape[1], reference=lambda: reference)
    region = Region.read(write_vectors(tmp_path / "aoi.geojson", [shapely.Polygon(corners)], None), raster)
    rows, columns = np.indices(shape) + 0.5
    x, y = place["transform"] * (columns, rows)
    back = pyproj.Transformer.from_crs(place["crs"], "OGC:CRS84", always_xy=True)
    expected = shapely.contains_xy(shapely.Polygon(corners), *back.transform(x, y))
    found = region.inside(Tile(0, 0, *shape))
    assert (found != expected).sum() <= 4  # centres within a hundredth of a pixel of an edge
    assert 0 < expected.sum() < expected.size


def test_edges_far_from_the_scene_get_no_further_vertices(tmp_path, utm):
    country = shapely.box(-20, 40, 11, 60).difference(shapely.box(14.99, 44, 15.1, 45.2))
    world = shapely.union_all([country, shapely.box(14, 44, 15.001, 45.153)])
    read = read_polygons(write_vectors(tmp_path / "a.geojson", [world], None), utm)
    assert shapely.get_num_coordinates(read.polygons).sum() < 300


class NearTheLeft:
    """A region without pixels whose surroundings are the first columns."""

    def is_near(self, tile):
        return tile.left < 50

    def inside(self, tile):
        return np.zeros((tile.height, tile.width), bool)


def test_a_raster_of_a_region_is_read_only_near_it(tmp_path):
    pixels = scene()
    with open_raster(write_geotiff(tmp_path / "scene.tif", pixels, UTM)) as raster:
        raster.restrict(NearTheLeft())
        near, valid = raster.read(Tile(0, 0, 32, 32))
        assert np.array_equal(near, pixels[:, :32, :32])
        assert not valid.any()
        far, valid = raster.read(Tile(0, 64, 32, 32))
        assert np.ma.getmaskarray(far).all()
        assert not valid.any()
