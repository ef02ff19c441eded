"""Rasters larger than memory, from file to file, by rasterio and by tifffile."""

import errno
import io
import json
import re
import resource
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.config import InferenceOptions
from hf_segformer.data.image_measures import measure_image
from hf_segformer.data.reader_protocol import ImageSource, Tile
from hf_segformer.data.readers import count_pages, find_reader, kind_of, open_raster, read_whole_image, read_whole_mask
from hf_segformer.files import is_full
from hf_segformer.geo.tiff import PlainRaster
from hf_segformer.inference.large_image import predict_large_image
from hf_segformer.inference.segmenter import predict
from hf_segformer.inference.tiling import count_tiles
from hf_segformer.upsampling_segformer import upsample, upsample_argmax
from tests.support.tiny import TINY

rasterio = pytest.importorskip("rasterio")
tifffile = pytest.importorskip("tifffile")

from rasterio.control import GroundControlPoint  # noqa: E402
from rasterio.enums import ColorInterp, Resampling  # noqa: E402
from rasterio.rpc import RPC  # noqa: E402

from hf_segformer.geo.geotiff import GeoRaster  # noqa: E402

# rasterio multiplies its transforms in a way that their package will drop.
pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")

HEIGHT, WIDTH = 150, 210
PLACE = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)}
TILES = {"tile_size": 96, "tile_overlap": 32}
TILED = InferenceOptions(**TILES)


def lively(num_channels=3, num_labels=5):
    """Build a network whose predictions vary from pixel to pixel."""
    torch.manual_seed(1)
    config = SegFormerConfig(**TINY, num_channels=num_channels, num_labels=num_labels)
    model = SegFormerForSemanticSegmentation(config).eval()
    with torch.no_grad():
        for parameter in model.decode_head.parameters():
            parameter.mul_(3)
        bias = model(torch.randn(1, num_channels, 64, 96)).logits.mean(dim=(0, 2, 3))
        model.decode_head.classifier.bias -= bias
    return model


@pytest.fixture(scope="module")
def model():
    return lively()


@pytest.fixture
def processor():
    return SegFormerImageProcessor()


def scene(num_bands=3, dtype=np.uint8, height=HEIGHT, width=WIDTH):
    """Random patches of 7 pixels, (C, H, W), none of them 0."""
    top = 256 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    shape = num_bands, height // 7 + 1, width // 7 + 1
    values = np.random.default_rng(0).integers(1, top, shape).astype(dtype)
    return values.repeat(7, 1).repeat(7, 2)[:, :height, :width]


def write_geotiff(path, pixels, place=PLACE, **others):
    profile = {"driver": "GTiff", "count": len(pixels), "height": pixels.shape[1], "width": pixels.shape[2], **place}
    with warnings.catch_warnings():
        if "crs" not in profile:
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", dtype=pixels.dtype, **profile, **others) as file:
            file.write(pixels)
    return path


def predict_raster(model, processor, source, destination, options=TILED, **others):
    """Predict a raster; return the summary and the written labels."""
    summary = predict_large_image(model, processor, source, destination, options, progress=False, **others)
    assert [each.name for each in destination.parent.glob(".*")] == []  # no partial file is left
    return summary, np.asarray(tifffile.imread(destination))


def expected(model, processor, pixels, side=None):
    """Predict the same array as one image."""
    processor.do_resize = False
    return predict(model, processor, pixels, side or pixels.shape[1:]).numpy()


# --- GeoTIFF ----------------------------------------------------------------------------------------------------------


def test_a_geotiff_keeps_its_georeference_tags_and_overviews(tmp_path, model, processor):
    source = write_geotiff(tmp_path / "scene.tif", scene(), blockxsize=64, blockysize=64, tiled=True, compress="lzw")
    with rasterio.open(source, "r+") as file:
        file.update_tags(MISSION="test flight")
        file.build_overviews([2, 4], Resampling.average)
    palette = [(index, 2 * index, 255 - index) for index in range(5)]
    summary, labels = predict_raster(model, processor, source, tmp_path / "labels.tif", palette=palette)
    with rasterio.open(tmp_path / "labels.tif") as file:
        assert file.crs == rasterio.crs.CRS.from_string(PLACE["crs"])
        assert file.transform == PLACE["transform"]
        assert (file.shape, file.count, file.dtypes, file.nodata) == ((HEIGHT, WIDTH), 1, ("uint8",), 255)
        assert file.overviews(1) == [2, 4]
        assert file.tags()["MISSION"] == "test flight"
        assert file.tags(1)["class_4"] == "LABEL_4"
        assert (file.profile["tiled"], file.profile["compress"]) == (True, "deflate")
        assert [file.colormap(1)[index][:3] for index in range(5)] == palette
        assert file.colormap(1)[255][3] == 0
        small = file.read(1, out_shape=(HEIGHT // 2, WIDTH // 2))
        assert set(np.unique(small)) <= set(np.unique(labels))  # nearest: labels cannot be averaged
    assert summary["pixels"] == {f"LABEL_{index}": int((labels == index).sum()) for index in range(5)}
    assert len(np.unique(labels)) > 2
    assert (summary["height"], summary["width"], summary["no_data"]) == (HEIGHT, WIDTH, 0)
    assert json.loads(json.dumps(summary))["tiles"] == count_tiles(HEIGHT, WIDTH, TILED)


def test_a_raster_of_one_tile_is_predicted_like_an_image(tmp_path, model, processor):
    pixels = scene(height=88, width=96)
    source = write_geotiff(tmp_path / "scene.tif", pixels)
    _, labels = predict_raster(model, processor, source, tmp_path / "labels.tif")
    assert (labels == expected(model, processor, pixels)).all()


def test_a_tile_is_normalized_like_the_same_part_of_the_image(tmp_path, processor):
    pixels = scene()
    with open_raster(write_geotiff(tmp_path / "scene.tif", pixels), 3) as raster:
        part, valid = raster.read(Tile(32, 64, 96, 100))
    assert valid is None
    whole = processor(pixels, do_resize=False, return_tensors="np").pixel_values
    cut = processor(part, do_resize=False, return_tensors="np").pixel_values
    assert (cut == whole[..., 32:128, 64:164]).all()


@pytest.mark.parametrize(("num_bands", "dtype"), [(4, np.uint8), (4, np.uint16), (5, np.float32), (1, np.int16)])
def test_any_number_of_bands_of_any_type(tmp_path, num_bands, dtype):
    pixels = scene(num_bands, dtype, 88, 96)
    scale = float(pixels.max())
    processor = SegFormerImageProcessor(
        do_rescale=False, image_mean=[scale / 2] * num_bands, image_std=[scale / 4] * num_bands
    )
    model = lively(num_bands)
    source = write_geotiff(tmp_path / "scene.tif", pixels)
    _, labels = predict_raster(model, processor, source, tmp_path / "labels.tif")
    assert (labels == expected(model, processor, pixels)).all()


def test_16_bit_images_are_scaled_to_8_bits(tmp_path, model, processor):
    narrow = scene()
    wide = write_geotiff(tmp_path / "wide.tif", narrow.astype(np.uint16) * 257)
    _, first = predict_raster(model, processor, wide, tmp_path / "first.tif")
    _, second = predict_raster(
        model, processor, write_geotiff(tmp_path / "narrow.tif", narrow), tmp_path / "second.tif"
    )
    assert (first == second).all()


def test_bands_are_chosen_by_number(tmp_path, model, processor):
    pixels = scene(6)
    _, labels = predict_raster(
        model, processor, write_geotiff(tmp_path / "six.tif", pixels), tmp_path / "labels.tif", bands=[4, 3, 2]
    )
    three = write_geotiff(tmp_path / "three.tif", pixels[[3, 2, 1]])
    _, same = predict_raster(model, processor, three, tmp_path / "same.tif")
    assert (labels == same).all()


def test_a_palette_without_a_table_is_no_colour(tmp_path):
    """Virtual rasters of label images may declare one."""
    labels = scene(1) % 4
    write_geotiff(tmp_path / "labels.tif", labels)
    (tmp_path / "labels.vrt").write_text(
        f'<VRTDataset rasterXSize="{labels.shape[2]}" rasterYSize="{labels.shape[1]}"><VRTRasterBand dataType="Byte" '
        'band="1"><ColorInterp>Palette</ColorInterp><SimpleSource><SourceFilename relativeToVRT="1">labels.tif'
        "</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    np.testing.assert_array_equal(read_whole_mask(tmp_path / "labels.vrt"), labels[0])
    np.testing.assert_array_equal(read_whole_image(tmp_path / "labels.vrt", 1), labels)
    with pytest.raises(ValueError, match=r"labels\.vrt declares a palette but holds no colour table"):
        read_whole_image(tmp_path / "labels.vrt", 3)


def test_grey_and_palette_files_are_read_as_rgb(tmp_path, model, processor):
    grey = scene(1)
    source = write_geotiff(tmp_path / "grey.tif", grey)
    _, labels = predict_raster(model, processor, source, tmp_path / "labels.tif")
    _, same = predict_raster(
        model, processor, write_geotiff(tmp_path / "rgb.tif", grey.repeat(3, 0)), tmp_path / "same.tif"
    )
    assert (labels == same).all()
    with rasterio.open(source, "r+") as file:
        file.write_colormap(1, {index: (255 - index, index // 2, 7) for index in range(256)})
    with open_raster(source, 3) as raster:
        colors, _ = raster.read(Tile(0, 0, 5, 5))
        assert (raster.num_bands, raster.dtype) == (3, np.uint8)
    assert (colors == np.stack([255 - grey[0, :5, :5], grey[0, :5, :5] // 2, np.full((5, 5), 7)])).all()


@pytest.mark.parametrize("place", [PLACE, {}])
def test_a_palette_is_measured_by_its_colours(tmp_path, place):
    source = write_geotiff(tmp_path / "palette.tif", scene(1) % 4, place, nodata=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(source, "r+") as file:
            file.write_colormap(1, {index: (80 * index, 250 - index, 7) for index in range(4)})
    assert find_reader(ImageSource(source))[0] is (GeoRaster if place else PlainRaster)
    measure = measure_image(str(source), None)
    assert (measure.num_bands, measure.dtype, measure.low, measure.high) == (3, "uint8", 0, 250)


# --- No data ----------------------------------------------------------------------------------------------------------


def test_pixels_without_data_are_255_and_do_not_count(tmp_path, model, processor):
    pixels = scene()
    pixels[:, 40:130, 20:] = 0
    pixels[0, 50, 60] = 9  # a value in any band is data
    summary, labels = predict_raster(
        model, processor, write_geotiff(tmp_path / "scene.tif", pixels, nodata=0), tmp_path / "labels.tif"
    )
    lacks_data = (pixels == 0).all(0)
    assert (labels == 255).sum() == lacks_data.sum() == summary["no_data"]
    assert (labels[lacks_data] == 255).all()
    assert sum(summary["pixels"].values()) == HEIGHT * WIDTH - lacks_data.sum()


def test_values_stored_for_no_data_do_not_change_the_prediction(tmp_path):
    pixels, model = scene(5, np.float32), lively(5)
    processor = SegFormerImageProcessor(do_rescale=False, image_mean=[100.0] * 5, image_std=[50.0] * 5)
    found = []
    for value in (np.nan, -9999.0):
        pixels[:, 100:, :90] = value
        source = write_geotiff(tmp_path / "scene.tif", pixels, nodata=value)
        _, labels = predict_raster(model, processor, source, tmp_path / "labels.tif")
        assert ((labels == 255) == (np.arange(HEIGHT)[:, None] >= 100) & (np.arange(WIDTH) < 90)).all()
        found.append(labels)
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("kind", ["mask", "alpha"])
def test_masks_and_alpha_bands_mark_no_data(tmp_path, model, processor, kind):
    pixels, valid = scene(), np.ones((HEIGHT, WIDTH), bool)
    valid[:70, 30:100] = False
    source = tmp_path / "scene.tif"
    if kind == "alpha":
        write_geotiff(source, np.concatenate([pixels, 255 * valid[None].astype(np.uint8)]))
        with rasterio.open(source) as file:
            assert file.colorinterp[3] == ColorInterp.alpha
    else:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(write_geotiff(source, pixels), "r+") as file:
            file.write_mask(valid)
    summary, labels = predict_raster(model, processor, source, tmp_path / "labels.tif")
    assert ((labels == 255) == ~valid).all()
    assert summary["no_data"] == (~valid).sum()


def test_a_fourth_band_that_the_model_takes_is_no_alpha(tmp_path):
    pixels = scene(4)
    pixels[3, :50] = 0
    processor = SegFormerImageProcessor(image_mean=[0.5] * 4, image_std=[0.2] * 4)
    summary, _ = predict_raster(
        lively(4), processor, write_geotiff(tmp_path / "nir.tif", pixels), tmp_path / "labels.tif"
    )
    assert summary["no_data"] == 0


@pytest.mark.parametrize("kind", ["geo", "plain"])
def test_alpha_marks_no_data_whatever_bands_are_chosen(tmp_path, kind):
    pixels, valid = scene(), np.ones((HEIGHT, WIDTH), bool)
    valid[:70, 30:100] = False
    pixels = np.concatenate([pixels, 255 * valid[None].astype(np.uint8)])
    if kind == "geo":
        path = write_geotiff(tmp_path / "a.tif", pixels, photometric="rgb", alpha="yes")
    else:
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, pixels.transpose(1, 2, 0), photometric="rgb", extrasamples=["unassalpha"])
    for bands in ([1, 2, 3], [3, 1, 1], [2, 3, 1]):
        found = read_whole_image(path, 3, bands=bands)
        assert np.array_equal(np.ma.getmaskarray(found), np.broadcast_to(~valid, found.shape))
        assert np.array_equal(found.data, pixels[[band - 1 for band in bands]])
        with open_raster(path, 3, bands=bands) as raster:
            assert np.array_equal(raster.read(Tile(10, 20, 90, 100))[1], valid[10:100, 20:120])
    # A chosen alpha band is data.
    found = read_whole_image(path, 3, bands=[4, 1, 2])
    assert not np.ma.is_masked(found)
    assert np.array_equal(found, pixels[[3, 0, 1]])


def test_tiles_without_data_are_not_predicted(tmp_path, model, processor, monkeypatch):
    pixels = np.zeros((3, HEIGHT, 400), np.uint8)
    pixels[:, :, :90] = 7
    calls = []
    monkeypatch.setattr(model, "forward", lambda given, forward=model.forward: calls.append(1) or forward(given))
    source = write_geotiff(tmp_path / "scene.tif", pixels, nodata=0)
    summary, _ = predict_raster(model, processor, source, tmp_path / "labels.tif")
    assert len(calls) < summary["tiles"]
    assert summary["no_data"] == HEIGHT * 310


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_exif_turns_a_file_that_is_no_map(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of which Pillow would warn
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.moveaxis(scene(), 0, -1)).save(path, exif=exif)
    with open_raster(path) as raster:
        assert (raster.height, raster.width) == (WIDTH, HEIGHT)
        turned = raster.read(Tile(0, 0, WIDTH, HEIGHT))[0]
    with open_raster(path, ignore_exif=True) as raster:
        stored = raster.read(Tile(0, 0, HEIGHT, WIDTH))[0]
    assert np.array_equal(turned, np.rot90(stored, -1, (1, 2)))
    path.with_suffix({".jpg": ".jgw", ".png": ".pgw"}[suffix]).write_text("0.5\n0\n0\n-0.5\n500000\n5000000\n")
    with open_raster(path) as raster:
        assert np.array_equal(raster.read(Tile(0, 0, HEIGHT, WIDTH))[0], stored)


# --- Other georeferences ---------------------------------------------------------------------------------------------


def test_ground_control_points_and_rpcs_are_kept(tmp_path, model, processor):
    points = [GroundControlPoint(row, column, 10 + column, 50 - row) for row, column in ((0, 0), (0, 99), (99, 0))]
    ones = [1.0] * 20
    rpcs = RPC(100.0, 50.0, 45.0, 1.0, ones, ones, 75.0, 80.0, 10.0, 1.0, ones, ones, 105.0, 110.0)
    source = write_geotiff(tmp_path / "scene.tif", scene(), place={}, gcps=points, crs="EPSG:4326", rpcs=rpcs)
    predict_raster(model, processor, source, tmp_path / "labels.tif")
    with rasterio.open(tmp_path / "labels.tif") as file:
        found, reference = file.gcps
        assert [(each.row, each.col, each.x, each.y) for each in found] == [
            (each.row, each.col, each.x, each.y) for each in points
        ]
        assert reference.to_epsg() == 4326
        assert (file.rpcs.line_off, file.rpcs.samp_scale, file.rpcs.line_num_coeff) == (75, 110, ones)


def test_without_tifffile_rasterio_reads_plain_files_too(tmp_path, model, processor, monkeypatch):
    pixels = scene()
    tifffile.imwrite(tmp_path / "plain.tif", np.moveaxis(pixels, 0, -1), photometric="rgb")
    _, labels = predict_raster(model, processor, tmp_path / "plain.tif", tmp_path / "first.tif")
    hide(monkeypatch, "tifffile")
    with open_raster(tmp_path / "plain.tif", 3) as raster:
        assert isinstance(raster, GeoRaster)
    _, same = predict_raster(model, processor, tmp_path / "plain.tif", tmp_path / "second.tif")
    assert (labels == same).all()


@pytest.mark.parametrize("between", ["mask", "overview"])
def test_masks_and_overviews_are_no_pages(tmp_path, between):
    first, second = scene(), scene()[::-1]
    path = tmp_path / "pages.tif"
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write_geotiff(path, first)
        with rasterio.open(path, "r+") as file:
            if between == "mask":
                file.write_mask(np.tri(HEIGHT, WIDTH, dtype=bool))
            else:
                file.build_overviews([2], Resampling.nearest)
    write_geotiff(path, second, APPEND_SUBDATASET="YES")
    assert count_pages(path) == 2
    for page, pixels in enumerate((first, second)):
        found = read_whole_image(path, 3, page=page)
        assert np.array_equal(np.ma.getdata(found), pixels)
        assert np.ma.is_masked(found) == (between == "mask" and page == 0)


def test_the_orientation_is_that_of_the_page(tmp_path):
    path = tmp_path / "pages.tif"
    scale, turned = (33550, 12, 3, (0.5, 0.5, 0.0), True), (274, 3, 1, 6, True)
    with tifffile.TiffWriter(path) as file:
        for subfiletype, tags in ((0, [scale]), (1, [turned]), (0, [scale])):
            pixels = np.moveaxis(scene(), 0, -1)
            file.write(pixels, photometric="rgb", metadata=None, subfiletype=subfiletype, extratags=tags)
    assert np.array_equal(read_whole_image(path, 3, page=1), scene())


def test_bands_of_several_types_are_read_as_one_that_holds_them(tmp_path):
    integers, floats = scene(1, np.uint16), scene(1, np.float32) + 0.5
    floats[:, :9] = -1
    names = [
        write_geotiff(tmp_path / f"{pixels.dtype}.tif", pixels, nodata=value).name
        for pixels, value in ((integers, None), (floats, -1))
    ]
    bands = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{number}">{value}<SimpleSource><SourceFilename relativeToVRT="1">'
        f"{name}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
        for number, (kind, name, value) in enumerate(
            (("UInt16", names[0], ""), ("Float32", names[1], "<NoDataValue>-1</NoDataValue>")), 1
        )
    )
    size = f'rasterXSize="{WIDTH}" rasterYSize="{HEIGHT}"'
    (tmp_path / "s.vrt").write_text(f"<VRTDataset {size}><SRS>EPSG:32633</SRS>{bands}</VRTDataset>")
    found = read_whole_image(tmp_path / "s.vrt", 2)
    assert found.dtype == np.float32
    assert np.array_equal(found.data, np.concatenate([integers, floats]))
    assert np.array_equal(found.mask, np.concatenate([np.zeros_like(integers, bool), floats == -1]))


# --- Plain TIFF -------------------------------------------------------------------------------------------------------

CONTIGUOUS = {"photometric": "rgb", "planarconfig": "contig"}
PLANAR = {"photometric": "rgb", "planarconfig": "separate"}


@pytest.mark.parametrize(
    "layout",
    [
        CONTIGUOUS,
        {**CONTIGUOUS, "byteorder": ">", "bigtiff": True},
        {**CONTIGUOUS, "tile": (64, 48)},
        {**CONTIGUOUS, "tile": (64, 48), "compression": "zlib", "predictor": True},
        {**CONTIGUOUS, "rowsperstrip": 7, "compression": "zlib"},
        {**CONTIGUOUS, "rowsperstrip": 7},
        PLANAR,
        {**PLANAR, "tile": (48, 64), "compression": "zlib"},
        {**PLANAR, "rowsperstrip": 40, "compression": "zlib"},
    ],
    ids=lambda layout: "-".join(map(str, layout.values())),
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_plain_files_of_any_layout(tmp_path, layout, dtype):
    pixels = scene(dtype=dtype)
    axes = pixels if layout["planarconfig"] == "separate" else np.moveaxis(pixels, 0, -1)
    writing = {key: layout.pop(key) for key in ("byteorder", "bigtiff") if key in (layout := dict(layout))}
    with tifffile.TiffWriter(tmp_path / "plain.tif", **writing) as file:
        file.write(axes, **layout)
    with open_raster(tmp_path / "plain.tif", 3) as raster:
        assert isinstance(raster, PlainRaster)
        assert (raster.height, raster.width, raster.num_bands) == (HEIGHT, WIDTH, 3)
        for tile in (Tile(0, 0, 96, 96), Tile(54, 114, 96, 96), Tile(0, 0, HEIGHT, WIDTH)):
            part, valid = raster.read(tile)
            top, left, height, width = tile
            assert valid is None
            assert part.dtype == dtype
            assert (part == pixels[:, top : top + height, left : left + width]).all()


def test_a_plain_tiff_is_predicted_like_the_same_geotiff(tmp_path, model, processor):
    pixels = scene()
    tifffile.imwrite(tmp_path / "plain.tif", np.moveaxis(pixels, 0, -1), photometric="rgb", tile=(64, 64))
    summary, labels = predict_raster(model, processor, tmp_path / "plain.tif", tmp_path / "first.tif")
    _, same = predict_raster(model, processor, write_geotiff(tmp_path / "geo.tif", pixels), tmp_path / "second.tif")
    assert (labels == same).all()
    assert sum(summary["pixels"].values()) == HEIGHT * WIDTH
    with tifffile.TiffFile(tmp_path / "first.tif") as file:
        assert file.pages[0].is_tiled
        assert file.pages[0].nodata == 255
        assert not file.pages[0].is_geotiff
    with Image.open(tmp_path / "first.tif") as image:
        assert image.mode == "P"
        assert (np.asarray(image) == labels).all()


def test_jpeg_blocks_use_the_tables_of_the_file_and_are_refused_when_truncated(tmp_path, monkeypatch):
    source = tmp_path / "slide.tif"
    layout = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "jpeg", "photometric": "ycbcr"}
    smooth = np.linspace(0, 255, HEIGHT)[:, None] * np.ones(WIDTH) * [[[0.9]], [[0.5]], [[1.0]]]  # no edges in colour
    write_geotiff(source, smooth.astype(np.uint8), place={}, **layout)
    whole = Tile(0, 0, HEIGHT, WIDTH)
    with open_raster(source, 3) as raster:
        assert isinstance(raster, GeoRaster)  # no codec for tifffile is installed
        expected, _ = raster.read(whole)

    def decode(data, *, tables, **others):  # libjpeg, too, fills truncated blocks with grey
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        with Image.open(io.BytesIO(tables[:-2] + data[2:])) as image:
            return np.asarray(image)

    monkeypatch.setattr("tifffile.tifffile.imagecodecs.jpeg_decode", decode, raising=False)
    monkeypatch.setitem(tifffile.TIFF.DECOMPRESSORS._codecs, 7, decode)
    with open_raster(source, 3) as raster:
        assert isinstance(raster, PlainRaster)
        found, _ = raster.read(whole)
    assert np.abs(found.astype(int) - expected).mean() < 1
    source.write_bytes(source.read_bytes()[:-9])
    with open_raster(source, 3) as raster, pytest.raises(OSError, match=r"slide\.tif .* is cut short or damaged"):
        raster.read(whole)


def test_pyramids_are_read_at_full_size(tmp_path):
    pixels = scene()
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as file:
        file.write(np.moveaxis(pixels, 0, -1), subifds=1, photometric="rgb", tile=(64, 64))
        file.write(np.moveaxis(pixels, 0, -1)[::2, ::2], subfiletype=1, photometric="rgb", tile=(64, 64))
    with open_raster(tmp_path / "pyramid.tif", 3) as raster:
        part, _ = raster.read(Tile(0, 0, HEIGHT, WIDTH))
    assert (part == pixels).all()


def test_pages_are_bands(tmp_path):
    pixels = scene(5, np.uint16)
    tifffile.imwrite(tmp_path / "pages.tif", pixels, photometric="minisblack", tile=(64, 64), compression="zlib")
    with open_raster(tmp_path / "pages.tif", 5) as raster:
        part, _ = raster.read(Tile(32, 64, 96, 100))
    assert (part == pixels[:, 32:128, 64:164]).all()
    with pytest.raises(ValueError, match="has 5 bands; expected 3"):
        open_raster(tmp_path / "pages.tif", 3)


def test_plain_files_with_alpha_no_data_palette_or_white_as_zero(tmp_path):
    pixels, part = scene(4), Tile(10, 20, 50, 60)
    here = (slice(10, 60), slice(20, 80))
    pixels[3, :30] = 0
    path = tmp_path / "plain.tif"
    tifffile.imwrite(path, np.moveaxis(pixels, 0, -1), photometric="rgb", extrasamples=["unassalpha"])
    with open_raster(path, 3) as raster:
        found, valid = raster.read(part)
    assert (found == pixels[:3, *here]).all()
    assert (valid == (pixels[3][here] > 0)).all()
    tifffile.imwrite(path, np.moveaxis(pixels[1:], 0, -1), photometric="rgb", extratags=[(42113, 2, 0, "0", True)])
    with open_raster(path, 3) as raster:
        assert raster.may_lack_data
        _, valid = raster.read(part)
    assert valid.all()
    colors = np.random.default_rng(1).integers(0, 256, (3, 256)).astype(np.uint16)
    tifffile.imwrite(path, pixels[0], photometric="palette", colormap=colors * 257)
    with open_raster(path, 3) as raster:
        assert (raster.read(part)[0] == colors[:, pixels[0][here]]).all()
    tifffile.imwrite(path, pixels[0], photometric="miniswhite")
    with open_raster(path, 3) as raster:
        assert (raster.read(part)[0] == 255 - pixels[0][here]).all()
    tifffile.imwrite(path, pixels[0] > 99, photometric="miniswhite")
    with open_raster(path, 3) as raster:
        assert (raster.read(part)[0] == (pixels[0][here] <= 99)).all()


def test_decoded_blocks_are_cached_within_the_limit(tmp_path):
    path = tmp_path / "strips.tif"
    tifffile.imwrite(path, np.moveaxis(scene(), 0, -1), photometric="rgb", rowsperstrip=10, compression="zlib")
    with open_raster(path, 3) as raster:
        raster.read(Tile(0, 0, 96, 96))
        kept = dict(raster.segments)
        assert len(kept) == 10
        raster.read(Tile(0, 96, 96, 96))
        assert all(raster.segments[key] is kept[key] for key in kept)
        raster.cache = 3 * kept[0, 0].nbytes
        raster.read(Tile(54, 0, 96, 96))
        assert raster.num_cached == sum(piece.nbytes for piece in raster.segments.values()) <= raster.cache


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_labels", [1, 5])
def test_flips_and_scales_average_probabilities_on_the_grid(tmp_path, processor, num_labels):
    model, pixels = lively(num_labels=num_labels), scene(height=96, width=128)
    options = InferenceOptions(tile_size=128, tile_overlap=0, flip=True, scales=[1.0, 1.5])
    source = write_geotiff(tmp_path / "scene.tif", pixels)
    arguments = model, processor, source, tmp_path / "labels.tif"
    summary = predict_large_image(*arguments, options=options, progress=False)
    views = []
    for size in ((96, 128), (144, 192)):
        given = processor(pixels, size=size, return_tensors="pt").pixel_values
        with torch.no_grad():
            views += [model(given).logits, model(given.flip(-1)).logits.flip(-1)]
    views = [upsample(view, (24, 32)).double() for view in views]  # float32 rounds probabilities to 0 and 1
    if num_labels == 1:
        mean, rest = sum(view.sigmoid() for view in views), sum((-view).sigmoid() for view in views)
        labels = upsample_argmax((mean / rest).log(), (96, 128))[0]
    else:
        labels = upsample_argmax((sum(view.softmax(1) for view in views) / 4).log(), (96, 128))[0]
    assert (tifffile.imread(tmp_path / "labels.tif") == labels.numpy()).mean() > 0.999
    assert (upsample_argmax(views[0], (96, 128))[0] != labels).float().mean() > 0.01
    assert len(summary["pixels"]) == max(num_labels, 2)
    assert num_labels > 1 or list(summary["pixels"]) == ["background", "LABEL_0"]


@pytest.mark.parametrize("num_labels", [1, 2])
def test_probabilities_of_exactly_0_and_1_are_averaged(tmp_path, processor, monkeypatch, num_labels):
    model = lively(num_labels=num_labels)

    def sure(pixels):
        logits = torch.full((len(pixels), num_labels, pixels.shape[2] // 4, pixels.shape[3] // 4), -200.0)
        if num_labels == 2:
            logits[:, 0] = 200
        return SimpleNamespace(logits=logits)

    monkeypatch.setattr(model, "forward", sure)
    source = write_geotiff(tmp_path / "scene.tif", scene())
    _, labels = predict_raster(
        model, processor, source, tmp_path / "labels.tif", options=InferenceOptions(**TILES, flip=True)
    )
    assert (labels == 0).all()


def test_batches_and_half_precision_give_nearly_the_same(tmp_path, model, processor):
    source = write_geotiff(tmp_path / "scene.tif", scene())
    _, labels = predict_raster(model, processor, source, tmp_path / "first.tif")
    _, batched = predict_raster(
        model, processor, source, tmp_path / "second.tif", InferenceOptions(**TILES, batch_size=3)
    )
    _, half = predict_raster(
        model, processor, source, tmp_path / "third.tif", InferenceOptions(**TILES, dtype="bfloat16")
    )
    assert (labels == batched).all()  # on a CPU tiles go one by one
    assert 0.9 < (labels == half).mean() < 1  # rounded, so it is another computation


def test_many_classes_take_16_bits(tmp_path, processor):
    pixels = scene(height=64, width=64)
    pixels[:, :8] = 0
    source = write_geotiff(tmp_path / "scene.tif", pixels, nodata=0)
    summary, labels = predict_raster(lively(num_labels=300), processor, source, tmp_path / "labels.tif")
    assert labels.dtype == np.uint16
    assert (labels[:8] == 65535).all()
    assert summary["no_data"] == 8 * 64


def test_classes_of_one_name_are_counted_apart(tmp_path, processor):
    model = lively()
    model.config.id2label = dict(enumerate(["road", "sky", "road", "tree", "road"]))
    summary, labels = predict_raster(
        model, processor, write_geotiff(tmp_path / "scene.tif", scene()), tmp_path / "labels.tif"
    )
    assert list(summary["pixels"]) == ["road (0)", "sky", "road (2)", "tree", "road (4)"]
    assert list(summary["pixels"].values()) == np.bincount(labels.ravel(), minlength=5).tolist()


def test_running_out_of_memory_names_the_tile(tmp_path, model, processor, monkeypatch):
    def forward(given):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ValueError, match=r"scene\.tif, rows 0 to 96 and columns 0 to 96: .*can't allocate memory"):
        predict_raster(model, processor, write_geotiff(tmp_path / "scene.tif", scene()), tmp_path / "labels.tif")


def test_colours_are_those_of_the_model_and_one_for_each_class(tmp_path, processor):
    source = write_geotiff(tmp_path / "scene.tif", scene())
    model, colors = lively(), [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255]]
    model.config.palette = colors
    predict_raster(model, processor, source, tmp_path / "labels.tif")
    with rasterio.open(tmp_path / "labels.tif") as file:
        assert [list(file.colormap(1)[index][:3]) for index in range(5)] == colors
    for palette in ([], colors[:4], [*colors, [1, 2, 3]]):
        model.forward = None  # before the work
        with pytest.raises(ValueError, match=f"palette has {len(palette)} colours; expected 5, one for each class"):
            predict_raster(model, processor, source, tmp_path / "wrong.tif", palette=palette)
    model.config.palette = colors[:4]
    with pytest.raises(ValueError, match=r"the palette of the model's configuration is .*each of 5 classes"):
        predict_raster(model, processor, source, tmp_path / "wrong.tif")


def test_the_mode_of_the_model_is_restored(tmp_path, processor):
    model = lively().train()
    predict_raster(model, processor, write_geotiff(tmp_path / "scene.tif", scene()), tmp_path / "labels.tif")
    assert model.training


# --- Kinds of files -----------------------------------------------------------------------------------------------


def test_rasters_are_recognized_by_content(tmp_path, monkeypatch):
    hide(monkeypatch, "rasterio", "tifffile")
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.tif")
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    Image.new("RGBA", (40, 30)).save(tmp_path / "alpha.tif")
    tifffile.imwrite(
        tmp_path / "five.tif", scene(5).transpose(1, 2, 0), photometric="minisblack", planarconfig="contig"
    )
    write_geotiff(tmp_path / "geo.tif", scene())
    (tmp_path / "mosaic.vrt").write_text("<VRTDataset/>")
    found = {path.name for path in tmp_path.iterdir() if kind_of(path) == "raster"}
    assert found == {"five.tif", "geo.tif", "mosaic.vrt"}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert kind_of(tmp_path / "photo.tif") == "raster"
    assert kind_of(tmp_path / "photo.png") == "image"
    assert kind_of(tmp_path / "nowhere.tif") == "image"


# --- Errors -----------------------------------------------------------------------------------------------------------


def hide(monkeypatch, *names):
    """Make packages appear not to be installed."""
    monkeypatch.setattr("hf_segformer.geo.rasters.find_spec", lambda name: None if name in names else find_spec(name))


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    source = write_geotiff(tmp_path / "scene.tif", scene())
    hide(monkeypatch, "rasterio")
    with pytest.raises(ValueError, match=r"needs rasterio, or tifffile .*: pip install 'hf-segformer\[geo\]'"):
        open_raster(source, 3)
    hide(monkeypatch, "rasterio", "tifffile")
    with pytest.raises(ValueError, match=r"needs rasterio.*pip install 'hf-segformer\[geo\]'"):
        open_raster(source, 3)


def test_wrong_bands_are_refused(tmp_path, model, processor):
    source = write_geotiff(tmp_path / "scene.tif", scene(5))
    with pytest.raises(ValueError, match=r"scene.tif has 5 bands; expected 3, as many as the model takes"):
        predict_raster(model, processor, source, tmp_path / "labels.tif")
    with pytest.raises(ValueError, match=r"bands are \[1, 2, 6\]; expected numbers from 1 to 5, those of .*scene.tif"):
        predict_raster(model, processor, source, tmp_path / "labels.tif", bands=[1, 2, 6])
    with pytest.raises(ValueError, match=r"bands are \[1, 2\], 2 of .*scene.tif; expected 3"):
        predict_raster(model, processor, source, tmp_path / "labels.tif", bands=[1, 2])
    assert not (tmp_path / "labels.tif").exists()


def test_damaged_and_missing_files_are_named(tmp_path, model, processor):
    (tmp_path / "text.tif").write_text("no image")
    with pytest.raises(OSError, match=r"text\.tif"):
        predict_large_image(model, processor, tmp_path / "text.tif", tmp_path / "labels.tif", progress=False)
    with pytest.raises(OSError, match=r"nowhere\.tif"):
        predict_large_image(model, processor, tmp_path / "nowhere.tif", tmp_path / "labels.tif", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["text.tif"]


@pytest.mark.parametrize("kind", ["geo", "plain", "plain tiles", "flat"])
def test_a_truncated_file_names_the_tile_and_leaves_earlier_results(tmp_path, model, processor, kind):
    source, noise = tmp_path / "cut.tif", np.random.default_rng(0).integers(0, 255, (3, HEIGHT, WIDTH), np.uint8)
    if kind == "geo":
        write_geotiff(source, noise, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    else:
        layout = {} if kind == "flat" else {"tile": (64, 64), "compression": "zlib" if kind == "plain" else None}
        tifffile.imwrite(source, np.moveaxis(noise, 0, -1), photometric="rgb", **layout)
    source.write_bytes(source.read_bytes()[:60_000])
    (tmp_path / "labels.tif").write_text("earlier results")
    with pytest.raises(OSError, match=r"cut\.tif cannot be read in rows \d+ to \d+ and columns .*: it is cut short"):
        predict_large_image(model, processor, source, tmp_path / "labels.tif", options=TILED, progress=False)
    assert (tmp_path / "labels.tif").read_text() == "earlier results"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.tif", "labels.tif"]


def test_undeclared_nan_is_refused_with_its_tile(tmp_path):
    pixels = scene(5, np.float32)
    pixels[2, 140, 7] = np.nan
    processor = SegFormerImageProcessor(do_rescale=False, image_mean=[100.0] * 5, image_std=[50.0] * 5)
    source = write_geotiff(tmp_path / "scene.tif", pixels)
    with pytest.raises(ValueError, match=r"scene\.tif, rows 64 to 150 and columns 0 to 96: .*NaN"):
        predict_raster(lively(5), processor, source, tmp_path / "labels.tif")


@pytest.mark.parametrize("kind", ["geo", "plain"])
def test_one_large_compressed_strip_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("hf_segformer.geo.rasters.MOST_CACHE", 10_000)
    source = tmp_path / "strip.tif"
    if kind == "geo":
        write_geotiff(source, scene(), blockysize=HEIGHT, compress="deflate")
    else:
        tifffile.imwrite(source, scene().transpose(1, 2, 0), photometric="rgb", rowsperstrip=HEIGHT, compression="zlib")
    with pytest.raises(ValueError, match=r"strip\.tif is stored in compressed blocks of 150x210 .*rio convert"):
        open_raster(source, 3)


def test_the_destination_is_checked_first(tmp_path, model, processor):
    source = write_geotiff(tmp_path / "scene.tif", scene())
    with pytest.raises(ValueError, match="is the raster itself"):
        predict_large_image(model, processor, source, source, progress=False)
    with pytest.raises(ValueError, match="is a folder"):
        predict_large_image(model, processor, source, tmp_path, progress=False)
    with pytest.raises(OSError, match="nowhere"):
        predict_large_image(model, processor, source, tmp_path / "nowhere" / "labels.tif", progress=False)


def test_options_that_do_not_apply_to_rasters_are_refused(tmp_path, model, processor):
    source = write_geotiff(tmp_path / "scene.tif", scene())
    with pytest.raises(ValueError, match=r"evaluation\.sliding_window is 64; expected 0 for a raster"):
        predict_raster(model, processor, source, tmp_path / "labels.tif", InferenceOptions(sliding_window=64))


def test_an_interrupted_run_leaves_no_file(tmp_path, model, processor, monkeypatch):
    source, calls = write_geotiff(tmp_path / "scene.tif", scene()), []

    def forward(given, whole=model.forward):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(given)

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        predict_large_image(model, processor, source, tmp_path / "labels.tif", options=TILED, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


@pytest.fixture
def full_disk():
    """Limit files to 4 kB; Python ignores the signal that comes with it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", ["geo", "plain"])
def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path, model, processor, full_disk, kind):
    source, noise = tmp_path / "scene.tif", np.random.default_rng(0).integers(0, 255, (3, HEIGHT, 600), np.uint8)
    if kind == "geo":
        write_geotiff(source, noise)
    else:
        tifffile.imwrite(source, noise.transpose(1, 2, 0), photometric="rgb")
    full_disk()
    with pytest.raises(OSError, match=r"labels\.tif") as caught:
        predict_large_image(model, processor, source, tmp_path / "labels.tif", options=TILED, progress=False)
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


def test_a_failed_gdal_write_on_a_full_disk_is_enospc(tmp_path, model, processor, monkeypatch):
    source = write_geotiff(tmp_path / "scene.tif", scene())
    monkeypatch.setattr("hf_segformer.geo.cog.shutil.disk_usage", lambda _: SimpleNamespace(free=99))
    sums = iter(range(99))
    monkeypatch.setattr("hf_segformer.geo.cog.zlib.crc32", lambda _: next(sums))
    with pytest.raises(OSError, match=r"0 MiB are free.*labels\.tif") as caught:
        predict_large_image(model, processor, source, tmp_path / "labels.tif", options=TILED, progress=False)
    assert is_full(caught.value)


def test_the_example_of_the_guide_runs(tmp_path, processor, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "guides" / "large-rasters.md").read_text()
    examples = re.findall(r"^```py\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    [example] = [each for each in examples if "predict_large_image" in each]
    monkeypatch.chdir(tmp_path)
    lively().save_pretrained("outputs/shapes_b0")
    processor.save_pretrained("outputs/shapes_b0")
    write_geotiff(tmp_path / "scene.tif", scene())
    exec(compile(example, "large-rasters.md", "exec"), {"__name__": "example"})
    assert "LABEL_4" in capsys.readouterr().out
    assert tifffile.imread("mask.tif").shape == (HEIGHT, WIDTH)


@pytest.mark.parametrize("side", [70, 150, 1000])
def test_overviews_that_gdal_rounds_are_best_effort(tmp_path, model, processor, side):
    source = write_geotiff(tmp_path / "scene.tif", scene(height=side, width=side), tiled=True)
    with rasterio.open(source, "r+") as file:
        file.build_overviews([2, 4, 8, 16, 32], Resampling.nearest)
    options = InferenceOptions(tile_size=512, tile_overlap=32) if side == 1000 else TILED
    predict_large_image(model, processor, source, tmp_path / "labels.tif", options, progress=False)
    with rasterio.open(tmp_path / "labels.tif") as file:
        assert len(file.overviews(1)) == 5
        assert (file.read(1, out_shape=(side // 2, side // 2)) < 5).all()


def test_overviews_that_cannot_be_built_leave_the_pixels(tmp_path, model, processor, monkeypatch):
    source = write_geotiff(tmp_path / "scene.tif", scene())
    with rasterio.open(source, "r+") as file:
        file.build_overviews([2], Resampling.nearest)
    monkeypatch.setattr(GeoRaster, "_overviews", lambda self: [2, 4096])
    _, labels = predict_raster(model, processor, source, tmp_path / "labels.tif")
    assert labels.shape == (HEIGHT, WIDTH)


def test_overviews_in_other_files_are_not_opened(tmp_path, model, processor):
    """Never let GDAL open files or addresses that tags name."""
    source = write_geotiff(tmp_path / "scene.tif", scene())
    with rasterio.open(source, "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(write_geotiff(tmp_path / "other.tif", scene())))
    with open_raster(source, 3) as raster:
        assert raster._overviews() == []


def test_no_data_of_one_band_is_filled_and_counts_only_where_all_lack_data(tmp_path):
    pixels = scene(4, np.float32)
    pixels[1, :40] = -9999
    pixels[:, 100:, :50] = -9999
    source = write_geotiff(tmp_path / "scene.tif", pixels, nodata=-9999)
    processor = SegFormerImageProcessor(do_rescale=False, image_mean=[100.0] * 4, image_std=[50.0] * 4)
    summary, labels = predict_raster(lively(4), processor, source, tmp_path / "labels.tif")
    assert ((labels == 255) == (pixels == -9999).all(0)).all()
    filled = np.where(pixels == -9999, 100, pixels).astype(np.float32)
    _, same = predict_raster(
        lively(4), processor, write_geotiff(tmp_path / "filled.tif", filled), tmp_path / "same.tif"
    )
    outside = np.s_[:95, :]
    assert (labels[outside] == same[outside]).all()
    assert summary["no_data"] == 50 * 50


def test_evaluation_agrees_with_a_prediction_of_the_same_scene(tmp_path, tiny_config):
    """Prediction, statistics and evaluation read no data by one rule."""
    from hf_segformer.data.pairing import decode_dataset, pair_images_and_masks
    from hf_segformer.evaluation.evaluate import evaluate

    model = lively(4)
    processor = SegFormerImageProcessor(do_resize=False, do_rescale=False, image_mean=[100.0] * 4, image_std=[50.0] * 4)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    pixels = scene(4, np.float32, 96, 96)
    pixels[:, :, :30] = -9999
    source = write_geotiff(tmp_path / "images/scene.tif", pixels, nodata=-9999)
    predict_raster(model, processor, source, tmp_path / "masks/scene.tif")
    rows = decode_dataset(pair_images_and_masks(tmp_path / "images", tmp_path / "masks"), 4, 5)
    result = evaluate(model, processor, rows, progress=False)
    assert result.metrics["overall_accuracy"] == 1
    assert result.matrix.sum() == 96 * 66
