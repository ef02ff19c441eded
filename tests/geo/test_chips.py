"""Training chips: georeferenced, balanced, split without a leak, and read by a recipe."""

import json
from dataclasses import replace

import numpy as np
import pytest

from hf_segformer.data.reader_protocol import Tile
from hf_segformer.data.readers import open_raster, read_whole_image, read_whole_mask
from tests.geo.test_large_images import scene, write_geotiff
from tests.geo.test_maps import UTM
from tests.geo.test_scenes import write_vectors
from tests.support.commands import assert_one_line, run

rasterio = pytest.importorskip("rasterio")
shapely = pytest.importorskip("shapely")
pyogrio = pytest.importorskip("pyogrio")
pyproj = pytest.importorskip("pyproj")

from rasterio.enums import ColorInterp  # noqa: E402
from rasterio.features import rasterize  # noqa: E402

from hf_segformer.geo.chip_labels import DrawnLabels  # noqa: E402
from hf_segformer.geo.chips import ChipOptions, chip_places, cut_chips  # noqa: E402
from hf_segformer.geo.vectors import from_pixels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")

HEIGHT, WIDTH, SIZE = 200, 300, 32
OPTIONS = ChipOptions(size=SIZE, block=2, classes=("ground", "water", "tree"))


@pytest.fixture
def pixels():
    return scene(4, np.uint16, HEIGHT, WIDTH)


@pytest.fixture
def drawn():
    labels = np.random.default_rng(0).integers(0, 3, (HEIGHT // 20, WIDTH // 20)).astype(np.uint8)
    return labels.repeat(20, 0).repeat(20, 1)


def chips_of(out, kind="images"):
    return {path.relative_to(out / kind).as_posix(): path for path in sorted((out / kind).rglob("*.tif"))}


def tile_of(path):
    top, left = path.stem.split("_")[-2:]
    return int(top[1:]), int(left[1:])


def test_chips_hold_the_pixels_and_labels_of_their_place(tmp_path, pixels, drawn):
    source = write_geotiff(tmp_path / "scene.tif", pixels, UTM)
    labels = write_geotiff(tmp_path / "labels.tif", drawn[None], UTM, nodata=255)
    report = cut_chips(source, labels, tmp_path / "out", OPTIONS, progress=False)
    images, masks = chips_of(tmp_path / "out"), chips_of(tmp_path / "out", "masks")
    assert list(images) == list(masks)
    assert len(images) == report["train"]["chips"] + report["val"]["chips"]
    for name, path in images.items():
        top, left = tile_of(path)
        here = np.s_[top : top + SIZE, left : left + SIZE]
        assert np.array_equal(read_whole_image(path, 4), pixels[:, *here])
        assert np.array_equal(read_whole_mask(masks[name]), drawn[here])
        for each in (path, masks[name]):
            with rasterio.open(each) as file:
                assert file.crs.to_string() == UTM["crs"]
                assert (file.transform.c, file.transform.f) == (500_000 + left / 2, 5_000_000 - top / 2)
    names = json.loads((tmp_path / "out" / "classes.json").read_text())["names"]
    assert names == ["ground", "water", "tree"]
    for split in ("train", "val"):
        counts = sum(
            np.bincount(read_whole_mask(path).ravel(), minlength=3)
            for name, path in masks.items()
            if name.startswith(split)
        )
        assert [each["pixels"] for each in report[split]["classes"]] == counts.tolist()
        assert sum(each["share"] for each in report[split]["classes"]) == pytest.approx(1, abs=1e-5)
    assert report == json.loads((tmp_path / "out" / "chips.json").read_text())


@pytest.mark.parametrize("stride", [pytest.param(0, marks=pytest.mark.slow), 20])
def test_no_chip_of_a_split_meets_a_block_of_the_other(tmp_path, pixels, drawn, stride):
    source = write_geotiff(tmp_path / "scene.tif", pixels, UTM)
    labels = write_geotiff(tmp_path / "labels.tif", drawn[None], UTM)
    options = ChipOptions(size=SIZE, stride=stride, block=2, classes=("a", "b", "c"), val_share=0.3)
    report = cut_chips(source, labels, tmp_path / "out", options, progress=False)
    covered = {"train": np.zeros((HEIGHT, WIDTH), bool), "val": np.zeros((HEIGHT, WIDTH), bool)}
    blocks = {"train": set(), "val": set()}
    for name, path in chips_of(tmp_path / "out").items():
        split, (top, left) = name.split("/")[0], tile_of(path)
        covered[split][top : top + SIZE, left : left + SIZE] = True
        blocks[split] |= {(y // 64, x // 64) for y in (top, top + SIZE - 1) for x in (left, left + SIZE - 1)}
    assert not (covered["train"] & covered["val"]).any()
    assert not blocks["train"] & blocks["val"]
    assert blocks["val"]
    number = len(list(chip_places(HEIGHT, WIDTH, options)))
    kept = report["train"]["chips"] + report["val"]["chips"]
    assert kept + sum(report["left_out"].values()) == number
    assert (report["left_out"]["between splits"] > 0) == (stride > 0) or stride == 0


def test_places_cover_the_scene_up_to_its_border():
    places = [chip.tile for chip in chip_places(HEIGHT, WIDTH, OPTIONS)]
    covered = np.zeros((HEIGHT, WIDTH), bool)
    for tile in places:
        covered[tile.top : tile.top + SIZE, tile.left : tile.left + SIZE] = True
    assert covered.all()
    assert len(set(places)) == len(places)


def test_chips_without_data_are_left_out_and_the_rest_is_ignored(tmp_path, pixels, drawn):
    pixels[:, :45, :75] = 0
    source = write_geotiff(tmp_path / "scene.tif", pixels, UTM, nodata=0)
    labels = write_geotiff(tmp_path / "labels.tif", drawn[None], UTM)
    options = ChipOptions(size=SIZE, block=2, classes=("a", "b", "c"), max_no_data=0.5)
    report = cut_chips(source, labels, tmp_path / "out", options, progress=False)
    assert report["left_out"]["no data"] > 0
    seen = 0
    for name, path in chips_of(tmp_path / "out", "masks").items():
        image = read_whole_image(tmp_path / "out" / "images" / name, 4)
        missing = np.ma.getmaskarray(image).all(0)
        assert missing.mean() <= 0.5
        assert np.array_equal(np.ma.getmaskarray(read_whole_mask(path)), missing)
        seen += missing.any()
    assert seen


def test_chips_of_a_scene_with_a_palette_have_its_colours(tmp_path, drawn):
    indices = scene(1, np.uint8, HEIGHT, WIDTH) % 5
    source = write_geotiff(tmp_path / "scene.tif", indices, UTM, nodata=4)
    with rasterio.open(source, "r+") as file:
        file.write_colormap(1, {index: (60 * index, 200 - 40 * index, 7, 255) for index in range(5)})
    labels = write_geotiff(tmp_path / "labels.tif", drawn[None], UTM)
    cut_chips(source, labels, tmp_path / "out", replace(OPTIONS, max_no_data=1), progress=False)
    expected = np.concatenate([60 * indices, 200 - 40 * indices, np.full_like(indices, 7)])
    for name, path in chips_of(tmp_path / "out").items():
        top, left = tile_of(path)
        here = np.s_[top : top + SIZE, left : left + SIZE]
        colors, missing = read_whole_image(path, 3), np.repeat(indices[:, *here] == 4, 3, axis=0)
        assert np.array_equal(np.ma.getmaskarray(colors), missing)
        assert np.array_equal(np.ma.getdata(colors)[~missing], expected[:, *here][~missing])
        with rasterio.open(tmp_path / "out" / "masks" / name) as file:
            assert file.colorinterp == (ColorInterp.gray,)


def test_nan_stays_the_value_for_no_data_of_several_bands(tmp_path, drawn):
    pixels = scene(3, np.float32, HEIGHT, WIDTH)
    pixels[1, 30:90, 50:120] = np.nan
    source = write_geotiff(tmp_path / "scene.tif", pixels, UTM, nodata=np.nan)
    labels = write_geotiff(tmp_path / "labels.tif", drawn[None], UTM)
    cut_chips(source, labels, tmp_path / "out", OPTIONS, progress=False)
    seen = 0
    for path in chips_of(tmp_path / "out").values():
        top, left = tile_of(path)
        missing = np.isnan(pixels[:, top : top + SIZE, left : left + SIZE])
        assert np.array_equal(np.ma.getmaskarray(read_whole_image(path, 3)), missing)
        seen += missing.any()
    assert seen


def test_a_fourth_band_of_bytes_is_no_alpha(tmp_path, drawn):
    pixels = scene(4, np.uint8, HEIGHT, WIDTH)
    pixels[3, :, ::2] = 0
    source = write_geotiff(tmp_path / "scene.tif", pixels, UTM, alpha="unspecified")
    labels = write_geotiff(tmp_path / "labels.tif", drawn[None], UTM)
    cut_chips(source, labels, tmp_path / "out", OPTIONS, progress=False)
    for path in chips_of(tmp_path / "out").values():
        assert np.ma.getmaskarray(read_whole_image(path, 3, bands=(1, 2, 3))).sum() == 0


def test_background_chips_are_capped(tmp_path, pixels, drawn):
    drawn[:, :200] = 0
    source = write_geotiff(tmp_path / "scene.tif", pixels, UTM)
    labels = write_geotiff(tmp_path / "labels.tif", drawn[None], UTM)
    whole = cut_chips(source, labels, tmp_path / "1", OPTIONS, progress=False)
    options = ChipOptions(size=SIZE, block=2, classes=OPTIONS.classes, max_background=0.25)
    report = cut_chips(source, labels, tmp_path / "2", options, progress=False)
    again = cut_chips(source, labels, tmp_path / "3", options, progress=False)
    assert report == again
    for split in ("train", "val"):
        chips, background = report[split]["chips"], report[split]["background_chips"]
        assert background <= 0.25 * chips
        assert chips - background == whole[split]["chips"] - whole[split]["background_chips"]
    assert report["left_out"]["background"] > 0


# --- Vectors ----------------------------------------------------------------------------------------------------------


FIELDS = [shapely.box(10, 10, 120, 190), shapely.box(100.3, 40, 290, 120), shapely.Point(220, 150).buffer(35)]


@pytest.mark.parametrize("suffix", [".gpkg", pytest.param(".geojson", marks=pytest.mark.slow)])
def test_masks_are_drawn_by_an_attribute(tmp_path, pixels, suffix):
    source = write_geotiff(tmp_path / "scene.tif", pixels, UTM)
    forth = pyproj.Transformer.from_crs(UTM["crs"], "EPSG:4326", always_xy=True)
    polygons = shapely.transform(
        shapely.segmentize(from_pixels(FIELDS, UTM["transform"]), 5.0),
        lambda x, y: forth.transform(x, y),
        interleaved=False,
    )
    vectors = write_vectors(tmp_path / f"fields{suffix}", polygons, "EPSG:4326", crop=["wheat", "maize", "wheat"])
    options = ChipOptions(size=SIZE, block=2, attribute="crop")
    cut_chips(source, vectors, tmp_path / "out", options, progress=False)
    names = json.loads((tmp_path / "out" / "classes.json").read_text())["names"]
    assert names == ["background", "maize", "wheat"]
    expected = rasterize(list(zip(FIELDS, (2, 1, 2), strict=True)), (HEIGHT, WIDTH), dtype="uint8")
    wrong = total = 0
    for path in chips_of(tmp_path / "out", "masks").values():
        top, left = tile_of(path)
        wrong += (read_whole_mask(path) != expected[top : top + SIZE, left : left + SIZE]).sum()
        total += SIZE * SIZE
    assert wrong / total < 1e-3  # centres on an edge, after two projections


def test_whole_numbers_are_classes_in_their_order_and_the_outside_may_be_ignored(tmp_path, pixels):
    source = write_geotiff(tmp_path / "scene.tif", pixels, UTM)
    polygons = from_pixels(FIELDS, UTM["transform"])
    vectors = write_vectors(tmp_path / "fields.gpkg", polygons, UTM["crs"], code=[10, 9, 10])
    options = ChipOptions(size=SIZE, block=2, attribute="code", ignore_outside=True, max_no_data=1)
    cut_chips(source, vectors, tmp_path / "out", options, progress=False)
    assert json.loads((tmp_path / "out" / "classes.json").read_text())["names"] == ["9", "10"]
    expected = rasterize(list(zip(FIELDS, (1, 0, 1), strict=True)), (HEIGHT, WIDTH), 255, dtype="uint8")
    for path in chips_of(tmp_path / "out", "masks").values():
        top, left = tile_of(path)
        found = np.ma.filled(read_whole_mask(path), 255)
        assert np.array_equal(found, expected[top : top + SIZE, left : left + SIZE])


def test_polygons_of_the_background_are_of_its_one_class(tmp_path, pixels):
    source = write_geotiff(tmp_path / "scene.tif", pixels, UTM)
    crops = ["wheat", "background", "wheat"]
    polygons = from_pixels(FIELDS, UTM["transform"])
    vectors = write_vectors(tmp_path / "fields.gpkg", polygons, UTM["crs"], crop=crops)
    with open_raster(source, 0) as raster:
        for ignore_outside, outside in ((False, 0), (True, 255)):
            labels = DrawnLabels(vectors, raster, "crop", (), ignore_outside)
            assert labels.names == ["background", "wheat"]
            expected = rasterize(list(zip(FIELDS, (1, 0, 1), strict=True)), (HEIGHT, WIDTH), outside, dtype="uint8")
            assert np.array_equal(labels.read(Tile(0, 0, HEIGHT, WIDTH)), expected)
        only = write_vectors(tmp_path / "background.gpkg", polygons, UTM["crs"], crop=crops)
        with pytest.raises(ValueError, match=r"background\.gpkg has polygons of the class background alone"):
            DrawnLabels(only, raster, None, (), False)


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_that_it_names_trains_on_the_chips(tmp_path, drawn, capsys):
    source = write_geotiff(tmp_path / "scene.tif", scene(3, np.uint8, HEIGHT, WIDTH), UTM)
    labels = write_geotiff(tmp_path / "labels.tif", drawn[None], UTM)
    out = tmp_path / "chips"
    command = ["chips", source, labels, "--size", SIZE, "--block", 2, "--classes", "ground", "water", "tree", "-o", out]
    assert run(*command) == 0
    printed = capsys.readouterr().out
    assert "train: " in printed
    assert printed.endswith(f"train on them with: segformer train {out}\n")
    settings = [
        *(f"trainer.output_dir={tmp_path / 'run'}", "trainer.max_steps=1", "augmentation.crop_size=32"),
        *("trainer.per_device_train_batch_size=2", "trainer.warmup_steps=0", "trainer.eval_strategy=no"),
    ]
    assert run("train", out, *settings) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["ground", "water", "tree"]


def test_bad_input_is_one_line(tmp_path, pixels, drawn, capsys):
    source = write_geotiff(tmp_path / "scene.tif", pixels, UTM)
    out = ["-o", tmp_path / "out", "--size", SIZE, "--block", 2]

    def refused(labels, *options):
        assert run("chips", source, labels, *out, *options) == 1
        error = capsys.readouterr().err
        line = error.splitlines()[-1] + "\n"
        assert_one_line(line)
        assert not (tmp_path / "out").exists()
        return line

    polygons = from_pixels(FIELDS, UTM["transform"])
    fields = write_vectors(tmp_path / "fields.gpkg", polygons, UTM["crs"], crop=["a", "b", "a"])
    assert "has no attribute 'kind'; expected one of crop" in refused(fields, "--attribute", "kind")
    line = refused(fields, "--attribute", "crop", "--classes", "b", "c")
    assert "has the value 'a' in crop; expected one of b, c" in line
    assert "--classes has 'b' twice" in refused(fields, "--attribute", "crop", "--classes", "b", "a", "b")
    far = write_vectors(tmp_path / "far.gpkg", from_pixels([shapely.box(900, 0, 950, 9)], UTM["transform"]), UTM["crs"])
    assert "far.gpkg does not meet" in refused(far)
    shifted = {**UTM, "transform": rasterio.Affine(0.5, 0, 500_001, 0, -0.5, 5_000_000)}
    labels = write_geotiff(tmp_path / "shifted.tif", drawn[None], shifted)
    assert "shifted.tif is not on the grid of" in refused(labels)
    labels = write_geotiff(tmp_path / "labels.tif", drawn[None], UTM)
    assert "labels.tif does not name its classes; expected their names by --classes" in refused(labels)
    assert "labels.tif holds the value 2 near row 0" in refused(labels, "--classes", "a", "b")
    assert "--attribute is given, but" in refused(labels, "--attribute", "crop")
    assert "expected at least 2 blocks" in refused(labels, "--classes", "a", "b", "c", "--block", 99)
    assert "expected at least one chip of 512x512" in refused(labels, "--classes", "a", "b", "c", "--size", 512)
    floats = write_geotiff(tmp_path / "floats.tif", drawn[None].astype(np.float32), UTM)
    assert "floats.tif has the type float32; expected integers" in refused(floats, "--classes", "a")
    text = tmp_path / "labels.txt"
    text.write_text("no labels")
    assert "is no GeoPackage, GeoJSON file or shapefile" in refused(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--val-share", 0], "--val-share is 0.0; expected a share from 0 to 1, without these"),
        (["--max-no-data", 2], "--max-no-data is 2.0; expected a share from 0 to 1"),
        (["--ignore-outside", "--max-background", 0.5], "--max-background is given with --ignore-outside"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, capsys, options, words):
    assert run("chips", "scene.tif", "labels.tif", "-o", tmp_path / "out", *options) == 2
    assert_one_line(capsys.readouterr().err, words)
