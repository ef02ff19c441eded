"""Results of the page without Gradio: predictions, overlays, downloads, descriptions, examples."""

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer import SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.app.session import (
    MAX_PIXELS,
    draw,
    predict_upload,
    summary,
    timing,
    write_mask,
    write_selection,
)


@pytest.fixture
def predictor(model):
    """Predictor of five classes, several of which it predicts."""
    torch.manual_seed(1)
    torch.nn.init.normal_(model.decode_head.classifier.weight)
    return SegFormerPredictor(model, SegFormerImageProcessor(size={"shortest_edge": 32}, keep_ratio=True))


@pytest.fixture
def photo(tmp_path):
    """Image of random blocks, 90 wide and 60 high."""
    blocks = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(10, axis=0).repeat(10, axis=1)).save(tmp_path / "my street.png")
    return tmp_path / "my street.png"


def test_upload_equals_the_prediction(predictor, photo):
    result = predict_upload(predictor, photo)
    np.testing.assert_array_equal(result.segmentation, predictor(photo).segmentation)
    assert result.segmentation.shape == (60, 90)
    assert len(result.pixels) > 1
    assert sum(result.pixels.values()) == 60 * 90
    assert list(result.pixels.values()) == sorted(result.pixels.values(), reverse=True)
    assert all((result.segmentation == index).sum() == count for index, count in result.pixels.items())
    assert min(result.seconds_preparing, result.seconds_predicting) > 0


def test_hidden_classes_show_the_image_and_chosen_ones_their_colour(predictor, photo):
    result = predict_upload(predictor, photo)
    chosen = list(result.pixels)[:1]
    pixels = np.asarray(draw(result, chosen, predictor.palette, 1.0))
    inside = result.segmentation == chosen[0]
    assert (pixels[inside] == predictor.palette[chosen[0]]).all()
    np.testing.assert_array_equal(pixels[~inside], np.asarray(result.shown)[~inside])
    np.testing.assert_array_equal(draw(result, list(result.pixels), predictor.palette, 0.0), result.shown)
    np.testing.assert_array_equal(draw(result, [], predictor.palette, 1.0), result.shown)


def test_downloads_have_the_size_of_the_image(predictor, photo, tmp_path):
    result = predict_upload(predictor, photo)
    mask = write_mask(result, tmp_path)
    assert mask.name == "my street_mask.png"
    np.testing.assert_array_equal(np.asarray(Image.open(mask)), result.segmentation)
    chosen = list(result.pixels)[1:]
    selection = np.asarray(Image.open(write_selection(result, chosen, tmp_path)))
    np.testing.assert_array_equal(selection, np.isin(result.segmentation, chosen) * 255)


def test_large_image_is_displayed_smaller_with_its_own_classes(predictor, tmp_path):
    Image.new("RGB", (1500, 40), "teal").save(tmp_path / "wide.png")
    result = predict_upload(predictor, tmp_path / "wide.png")
    assert result.segmentation.shape == (40, 1500)
    assert result.shown.size == (1280, 34)
    assert result.shown_segmentation.shape == (34, 1280)
    assert set(np.unique(result.shown_segmentation)) <= set(result.pixels)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.png", b"no image at all", "not an image in one of the formats"),
        ("empty.png", b"", "empty"),
        ("cut.png", None, "cut"),
    ],
)
def test_bad_upload_is_named_without_its_folder(name, content, words, predictor, photo, tmp_path):
    path = tmp_path / name
    path.write_bytes(photo.read_bytes()[:-60] if content is None else content)
    with pytest.raises((ValueError, OSError)) as raised:
        predict_upload(predictor, path)
    message = str(raised.value)
    assert name in message
    assert words in message
    assert str(tmp_path) not in message
    assert "\n" not in message


def test_image_beyond_the_limit_of_pillow_is_refused(predictor, photo, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"my street\.png.*(5400|limit)"):
        predict_upload(predictor, photo)


def test_strip_that_would_be_huge_is_refused_by_its_header(predictor, tmp_path, monkeypatch):
    processor = SegFormerImageProcessor(size={"shortest_edge": 48}, keep_ratio=True)
    predictor = SegFormerPredictor(predictor.model, processor)
    width = MAX_PIXELS // 48**2 + 1
    Image.new("RGB", (width, 1)).save(tmp_path / "strip.png")
    monkeypatch.setattr(SegFormerPredictor, "prepare", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"strip\.png would be 48x\d+ .* cut it into pieces"):
        predict_upload(predictor, tmp_path / "strip.png")


def test_one_pixel_is_an_image(predictor, tmp_path):
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    assert predict_upload(predictor, tmp_path / "dot.png").segmentation.shape == (1, 1)


def test_description_of_model_and_time(predictor, photo):
    description = summary(predictor)
    parameters = sum(parameter.numel() for parameter in predictor.model.parameters())
    for part in ("5 classes", f"{parameters:,} parameters", "shorter side 32 pixels", "float32 on cpu"):
        assert part in description
    result = replace(predict_upload(predictor, photo), seconds_preparing=0.005, seconds_predicting=2.5)
    assert "prepared in 5 ms · predicted in 2.50 s on cpu" in timing(result, torch.device("cpu"))


def test_result_of_a_large_image_is_small(predictor, tmp_path):
    Image.new("RGB", (3000, 2000), "teal").save(tmp_path / "large.png")
    result = predict_upload(predictor, tmp_path / "large.png")
    assert result.segmentation.shape == result.size == (2000, 3000)
    assert len(result.mask_file) < 100_000
    assert not [each for each in vars(result).values() if isinstance(each, np.ndarray) and each.size > 1280**2]


def test_uploads_are_refused_by_the_size_in_their_header(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(SegFormerPredictor, "prepare", lambda *_: pytest.fail("it was decoded"))
    Image.new("1", (8193, 8193)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"large\.png is 8193x8193 .* expected at most 67,108,864 pixels"):
        predict_upload(predictor, tmp_path / "large.png")
    turned, exif = Image.new("L", (1, 20000)), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    with pytest.raises(ValueError, match=r"turned\.png would be 32x640000"):
        predict_upload(predictor, tmp_path / "turned.png")
    np.save(tmp_path / "strip.npy", np.zeros((1, 20000, 3), np.uint8))
    with pytest.raises(ValueError, match=r"strip\.npy would be"):
        predict_upload(predictor, tmp_path / "strip.npy")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_the_size_of_an_upload_is_found_without_decoding(predictor, tmp_path, monkeypatch):
    """By content, whatever the name: EXIF behind the pixels of a PNG, arrays and rasters."""
    monkeypatch.setattr(SegFormerPredictor, "prepare", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda _: pytest.fail("it was decoded"))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8193, 8193, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(8193 * 1026)))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "late.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + exif + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=r"late\.png is 8193x8193"):
        predict_upload(predictor, tmp_path / "late.png")
    with (tmp_path / "array.png").open("wb") as file:
        np.save(file, np.zeros((1, 20000, 3), np.uint8))
    with pytest.raises(ValueError, match=r"array\.png would be"):
        predict_upload(predictor, tmp_path / "array.png")
    rasterio = pytest.importorskip("rasterio")
    profile = {"driver": "GTiff", "width": 8193, "height": 8193, "count": 3, "dtype": "uint16", "sparse_ok": True}
    profile |= {"crs": "EPSG:4326", "transform": rasterio.Affine(1e-4, 0, 0, 0, -1e-4, 1)}
    with rasterio.open(tmp_path / "raster.tif", "w", **profile, tiled=True, compress="deflate"):
        pass
    with pytest.raises(ValueError, match=r"raster\.tif is 8193x8193"):
        predict_upload(predictor, tmp_path / "raster.tif")


def test_postscript_is_not_opened(predictor, tmp_path, monkeypatch):
    Image.new("RGB", (9, 6)).save(tmp_path / "a.eps", "EPS")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    monkeypatch.setattr("PIL.EpsImagePlugin.EpsImageFile._open", lambda _: pytest.fail("it was opened"))
    with pytest.raises(OSError, match=r"a\.png: a PostScript file"):
        predict_upload(predictor, tmp_path / "a.png")
