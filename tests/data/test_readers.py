"""Readers: files by their content, no data band by band, several images in a file, and what is never opened."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hf_segformer import SegFormerForSemanticSegmentation, SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.config import AugmentationConfig
from hf_segformer.data.decoding import RowReader
from hf_segformer.data.label_mapping import LabelMapping
from hf_segformer.data.pairing import decode_dataset, pair_images_and_masks
from hf_segformer.data.reader_protocol import ImageSource, Tile
from hf_segformer.data.readers import (
    count_pages,
    is_turned_alone,
    kind_of,
    open_image,
    read_whole_image,
    read_whole_mask,
)
from hf_segformer.data.sources import FileSource, find_inputs
from hf_segformer.data.torch_datasets import TrainDataset

tifffile = pytest.importorskip("tifffile")
rasterio = pytest.importorskip("rasterio")

PLACE = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)}
pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")
PLAIN = AugmentationConfig(crop_size=32, scale=[1.0, 1.0], max_class_share=1.0, flip=0.0, distortion=0.0)


def write_geotiff(path, pixels, **others):
    shape = {"count": len(pixels), "height": pixels.shape[1], "width": pixels.shape[2]}
    with rasterio.open(path, "w", driver="GTiff", dtype=pixels.dtype, **shape, **{**PLACE, **others}) as file:
        file.write(pixels)
    return path


def values(num_bands=3, height=32, width=40, dtype=np.float32):
    return np.random.default_rng(0).integers(1, 200, (num_bands, height, width)).astype(dtype)


# --- No data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodata", [-9999.0, np.nan, -3.4028234663852886e38])
@pytest.mark.parametrize("kind", ["geo", "plain", "plain tiles", "bytes"])
def test_declared_no_data_is_masked_in_every_reader(tmp_path, nodata, kind):
    pixels = values(4)
    pixels[:, :, :20] = nodata
    path = tmp_path / "chip.tif"
    if kind == "plain" or kind == "plain tiles":
        tile = {"tile": (16, 16)} if kind == "plain tiles" else {}
        tags = [(42113, 2, 0, str(nodata), True)]
        tifffile.imwrite(
            path, pixels.transpose(1, 2, 0), photometric="minisblack", extratags=tags, planarconfig="contig", **tile
        )
    else:
        write_geotiff(path, pixels, nodata=nodata)
    source = {"bytes": path.read_bytes(), "path": "chip.tif"} if kind == "bytes" else path
    image = read_whole_image(source, 4)
    assert np.array_equal(np.ma.getmaskarray(image), np.broadcast_to(np.arange(40) < 20, (4, 32, 40)))
    assert np.array_equal(image[:, :, 20:], pixels[:, :, 20:])


def test_no_data_of_one_band_masks_that_band_alone(tmp_path):
    pixels = values(4)
    pixels[2, :8] = np.nan
    source = tmp_path / "chip.vrt"
    write_geotiff(tmp_path / "chip.tif", pixels)
    bands = "".join(
        f'<VRTRasterBand dataType="Float32" band="{band}">{"<NoDataValue>nan</NoDataValue>" if band == 3 else ""}'
        f'<SimpleSource><SourceFilename relativeToVRT="1">chip.tif</SourceFilename><SourceBand>{band}</SourceBand>'
        "</SimpleSource></VRTRasterBand>"
        for band in range(1, 5)
    )
    source.write_text(f'<VRTDataset rasterXSize="40" rasterYSize="32">{bands}</VRTDataset>')
    with open_image(source, 4) as reader:
        assert (reader.kind, reader.height, reader.width, reader.num_bands) == ("raster", 32, 40, 4)
        assert [value is None for value in reader.nodata] == [True, True, False, True]
        image, (_, valid) = reader.image(), reader.read(Tile(0, 0, 32, 40))
    assert np.ma.getmaskarray(image).sum(axis=(1, 2)).tolist() == [0, 0, 8 * 40, 0]
    assert valid is None or valid.all()
    processor = SegFormerImageProcessor(
        do_resize=False, do_rescale=False, image_mean=[9.0, 8.0, 7.0, 6.0], image_std=[1.0] * 4
    )
    prepared = processor(image, return_tensors="np").pixel_values[0]
    assert (prepared[2, :8] == 0).all()  # the band's mean
    assert np.array_equal(prepared[2, 8:], pixels[2, 8:] - 7)


def test_undeclared_nan_is_refused_with_the_remedy(tmp_path):
    pixels = values(4)
    pixels[2, 3, 4] = np.nan
    write_geotiff(tmp_path / "chip.tif", pixels)
    processor = SegFormerImageProcessor(do_rescale=False, image_mean=[0.0] * 4, image_std=[1.0] * 4)
    with pytest.raises(ValueError, match=r"NaN .* no no-data value is declared.*rio edit-info --nodata nan"):
        processor.decode(read_whole_image(tmp_path / "chip.tif", 4))


def test_sparse_tiles_of_a_plain_file_hold_the_declared_value(tmp_path):
    pixels = np.full((64, 64), 5, np.int16)
    tags = [(42113, 2, 0, "-7", True)]
    path = tmp_path / "sparse.tif"
    tifffile.imwrite(path, pixels, tile=(32, 32), photometric="minisblack", extratags=tags)
    with tifffile.TiffFile(path, mode="r+") as file:
        page = file.pages[0]
        counts = [0, *page.databytecounts[1:]]
        page.tags["TileOffsets"].overwrite([0, *page.dataoffsets[1:]])
        page.tags["TileByteCounts"].overwrite(counts)
    mask = read_whole_mask(path)
    assert np.ma.getmaskarray(mask)[:32, :32].all()
    assert np.ma.getmaskarray(mask).sum() == 32 * 32
    assert (mask[32:] == 5).all()


@pytest.mark.parametrize("kind", ["alpha", "mask", "plain alpha"])
def test_alpha_and_mask_bands_count_in_training(tmp_path, kind):
    pixels, valid = values(dtype=np.uint8), np.ones((32, 40), bool)
    valid[:, :10] = False
    path = tmp_path / "a.tif"
    if kind == "plain alpha":
        stacked = np.dstack([*pixels, 255 * valid.astype(np.uint8)])
        tifffile.imwrite(path, stacked, photometric="rgb", extrasamples=["unassalpha"])
    elif kind == "alpha":
        write_geotiff(
            path, np.concatenate([pixels, 255 * valid[None].astype(np.uint8)]), photometric="rgb", alpha="yes"
        )
    else:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(write_geotiff(path, pixels), "r+") as file:
            file.write_mask(valid)
    Image.new("L", (40, 32), 1).save(tmp_path / "a.png")
    reader = RowReader(3, LabelMapping((0, 1, 2)))
    row = {"image": [str(path)], "label": [str(tmp_path / "a.png")]}
    columns = reader(row)
    assert np.array_equal(columns["label"][0], np.where(valid, 1, 255))
    processor = SegFormerImageProcessor()
    rows = [{name: column[0] for name, column in columns.items()}]
    sample = TrainDataset(rows, AugmentationConfig(40, [], [1.0, 1.0], 1.0, 0.0, 0.0), processor)[0, 0]
    # The mean colour, rounded to a byte, is nearly 0.
    assert sample["pixel_values"][:, :32, :10].abs().max() < 0.01
    assert (sample["labels"][:32, :10] == 255).all()
    assert (sample["labels"][:32, 10:] == 1).all()


def test_a_mask_s_no_data_is_ignored(tmp_path):
    labels = np.zeros((1, 32, 40), np.uint8)
    labels[0, :, :5] = 200
    write_geotiff(tmp_path / "mask.tif", labels, nodata=200)
    mapped = LabelMapping((0, 1)).apply(read_whole_mask(tmp_path / "mask.tif"), "mask.tif")
    assert np.array_equal(mapped, np.where(np.arange(40) < 5, 255, 0) * np.ones((32, 1), int))


def test_no_data_is_255_in_a_prediction_of_a_whole_image(tmp_path, tiny_config):
    from hf_segformer import SegFormerForSemanticSegmentation

    pixels = values(dtype=np.uint8)
    pixels[:, :, :20] = 0
    tags = [(42113, 2, 0, "0", True)]
    tifffile.imwrite(tmp_path / "a.tif", pixels.transpose(1, 2, 0), photometric="rgb", extratags=tags)
    assert kind_of(tmp_path / "a.tif") == "image"
    predictor = SegFormerPredictor(
        SegFormerForSemanticSegmentation(tiny_config()).eval(), SegFormerImageProcessor(size=64)
    )
    prediction = predictor(tmp_path / "a.tif")
    assert np.array_equal(prediction.segmentation == 255, np.broadcast_to(np.arange(40) < 20, (32, 40)))


# --- Labels beyond a byte ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.uint32, np.int32, np.int64])
def test_wide_labels_survive_reading_and_augmentation(tmp_path, dtype):
    stored = np.random.default_rng(0).choice([0, 255, 256, 257, 299], (32, 32)).astype(dtype)
    tifffile.imwrite(tmp_path / "mask.tif", stored, photometric="minisblack")
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    reader = RowReader(3, LabelMapping(tuple(range(300))))
    [labels] = reader({"image": [str(tmp_path / "image.png")], "label": [str(tmp_path / "mask.tif")]})["label"]
    assert np.array_equal(labels, stored)
    processor = SegFormerImageProcessor(ignore_index=-100)
    row = {"image": Image.new("RGB", (32, 32)), "label": labels}
    sample = TrainDataset([row], AugmentationConfig(64, [], [1.0, 1.0], 0.75, 0.0, 0.0), processor)[0, 0]
    assert np.array_equal(sample["labels"][:32, :32], stored)
    assert (sample["labels"][32:] == -100).all()


def test_negative_mask_values_are_classes_or_ignored(tmp_path):
    stored = np.array([[-1, 0, 1, 7]], np.int16)
    tifffile.imwrite(tmp_path / "mask.tif", stored, photometric="minisblack")
    mask = read_whole_mask(tmp_path / "mask.tif")
    assert LabelMapping((-1, 0, 1), (7,)).apply(mask, "mask").tolist() == [[0, 1, 2, 255]]
    assert LabelMapping((0, 1, 7), (-1,)).apply(mask, "mask").tolist() == [[255, 0, 1, 2]]
    with pytest.raises(ValueError, match=r"mask holds -1, 7; expected the classes 0, 1, or 255 for ignored pixels"):
        LabelMapping((0, 1)).apply(mask, "mask")


def test_a_value_far_beyond_64_bits_of_sign_is_no_label():
    mask = np.array([[2**64 - 1, 0]], np.uint64)
    with pytest.raises(ValueError, match="holds 18446744073709551615; expected"):
        LabelMapping((0, -1)).apply(mask, "mask")


# --- Several images in a file -----------------------------------------------------------------------------------------


def write_pages(folder):
    """Files with several images by what each of them holds."""
    pages = [Image.fromarray(np.full((6, 9, 3), 10 * index, np.uint8)) for index in range(3)]
    first, rest = pages[0], {"save_all": True, "append_images": pages[1:]}
    first.save(folder / "pages.tif", **rest)
    first.save(folder / "moving.gif", **rest)
    first.save(folder / "lossless.webp", lossless=True, **rest)
    first.save(folder / "animated.png", **rest)
    stack = np.stack([np.asarray(page) for page in pages])
    tifffile.imwrite(folder / "imagej.tif", stack, imagej=True, metadata={"axes": "ZYXS"})
    tifffile.imwrite(
        folder / "time.ome.tif", stack[..., 0], ome=True, metadata={"axes": "TYX"}, photometric="minisblack"
    )
    return sorted(path.name for path in folder.iterdir())


def test_several_images_in_a_file_are_refused_or_read_one_by_one(tmp_path):
    names = write_pages(tmp_path)
    for name in names:
        path = tmp_path / name
        assert count_pages(path) == 3, name
        with pytest.raises(ValueError, match=rf"{name} holds 3 images; expected one: .*--pages"):
            read_whole_image(path, 3)
        levels = [np.ma.getdata(np.asarray(read_whole_image(path, 3, page=page))).max() for page in range(3)]
        assert levels == [0, 10, 20], name
        with pytest.raises(ValueError, match="has no page 4; expected at most 3"):
            read_whole_image(path, 3, page=3)
    with pytest.raises(ValueError, match="holds 3 images"):
        SegFormerImageProcessor()(tmp_path / "moving.gif")
    items = find_inputs([str(tmp_path)], tmp_path / "out", pages=True)
    assert len(items) == 3 * len(names)
    assert [item.name for item in items if item.name.startswith("pages")] == ["pages_p001", "pages_p002", "pages_p003"]
    source = FileSource([str(tmp_path / "pages.tif")], tmp_path / "out", pages=True)
    assert [np.asarray(source.read(item)).max() for item in source.items()] == [0, 10, 20]
    assert len({source.origin(item) for item in source.items()}) == 3


def test_a_page_filed_under_the_name_of_another_image_is_refused(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    page = Image.new("RGB", (9, 6))
    page.save(images / "a.tif", save_all=True, append_images=[page])
    page.save(images / "a_p001.png")
    with pytest.raises(ValueError, match=r"a\.tif, page 1 and .*a_p001\.png would both be filed as a_p001: rename"):
        find_inputs([str(images)], tmp_path / "out", pages=True)
    assert [item.name for item in find_inputs([str(images)], tmp_path / "out")] == ["a", "a_p001"]
    (images / "a_p001.png").rename(images / "a_p003.png")
    names = [item.name for item in find_inputs([str(images)], tmp_path / "out", pages=True)]
    assert names == ["a_p001", "a_p002", "a_p003"]


def test_channels_of_imagej_and_ome_are_bands(tmp_path):
    bands = values(5, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", bands, imagej=True, metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "b.ome.tif", bands, ome=True, metadata={"axes": "CYX"}, photometric="minisblack")
    for name in ("a.tif", "b.ome.tif"):
        assert count_pages(tmp_path / name) == 1
        assert np.array_equal(read_whole_image(tmp_path / name, 5), bands)
    both = np.stack([bands, bands + 1])
    tifffile.imwrite(tmp_path / "c.ome.tif", both, ome=True, metadata={"axes": "ZCYX"}, photometric="minisblack")
    assert count_pages(tmp_path / "c.ome.tif") == 2
    assert np.array_equal(read_whole_image(tmp_path / "c.ome.tif", 5, page=1), bands + 1)


def test_masks_with_pages_pair_with_images_with_pages(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    pages = [Image.new("RGB", (9, 6), (index,) * 3) for index in range(2)]
    masks = [Image.new("L", (9, 6), index) for index in range(2)]
    pages[0].save(tmp_path / "images/a.tif", save_all=True, append_images=pages[1:])
    masks[0].save(tmp_path / "masks/a.tif", save_all=True, append_images=masks[1:])
    with pytest.raises(ValueError, match=r"masks/a\.tif holds 2 images"):
        read_whole_mask(tmp_path / "masks/a.tif")
    pairs = pair_images_and_masks(tmp_path / "images", tmp_path / "masks", pages=True)
    rows = decode_dataset(pairs, 3, 2)
    assert [(np.asarray(row["image"]).max(), row["label"].max()) for row in rows] == [(0, 0), (1, 1)]
    masks[0].save(tmp_path / "masks/a.tif")
    with pytest.raises(ValueError, match=r"a\.tif holds 2 images and .*a\.tif 1; expected as many masks as images"):
        pair_images_and_masks(tmp_path / "images", tmp_path / "masks", pages=True)


# --- EXIF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_read_as_stored_on_request(tmp_path, suffix, orientation):
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(
        tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {})
    )
    found = read_whole_image(tmp_path / f"a.{suffix}", 3, ignore_exif=True)
    assert np.abs(np.asarray(found).astype(int) - stored).max() < 40
    # The image that was read says nothing of a turn that would be made later.
    assert np.array_equal(
        SegFormerImageProcessor(do_resize=False).decode(found).bands, np.asarray(found).transpose(2, 0, 1)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("reader", ["tifffile", "rasterio"])
@pytest.mark.parametrize("tile", [{}, {"tile": (16, 16)}])
def test_images_without_data_are_turned_like_others(tmp_path, orientation, reader, tile, monkeypatch):
    if reader == "rasterio":
        monkeypatch.setattr("hf_segformer.geo.tiff.is_installed", lambda name: False)
    stored = values(3, 20, 33, np.uint8).transpose(1, 2, 0)
    alpha = np.full((20, 33, 1), 255, np.uint8)
    alpha[:5, :9] = 0
    tags = [(274, 3, 1, orientation, True)]
    path, colours = tmp_path / "a.tif", tmp_path / "colours.tif"
    options = {"photometric": "rgb", "extratags": tags, **tile}
    tifffile.imwrite(path, np.concatenate([stored, alpha], 2), extrasamples=["unassalpha"], **options)
    tifffile.imwrite(colours, stored, **options)
    expected = np.asarray(read_whole_image(colours, 3)).transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "alpha.tif", alpha[..., 0], photometric="minisblack", extratags=tags)
    valid = np.asarray(read_whole_mask(tmp_path / "alpha.tif")) != 0
    assert np.array_equal(read_whole_mask((tmp_path / "alpha.tif").read_bytes()) != 0, valid)
    found = read_whole_image(path, 3)
    assert np.array_equal(found.data, expected)
    assert np.array_equal(~np.ma.getmaskarray(found), np.broadcast_to(valid, found.shape))
    with open_image(path, 3) as opened:
        assert type(opened).__name__ == {"tifffile": "PlainRaster", "rasterio": "GeoRaster"}[reader]
        assert (opened.height, opened.width) == valid.shape
        pixels, part = opened.read(Tile(3, 2, 15, 17))
        assert np.array_equal(pixels.data, expected[:, 3:18, 2:19])
        assert np.array_equal(part, valid[3:18, 2:19])
    found = read_whole_image(path, 3, ignore_exif=True)
    assert np.array_equal(found.data, stored.transpose(2, 0, 1))
    # A mask that declares no data is turned like one that does not.
    no_data = (42113, 2, 0, "0", True)
    tifffile.imwrite(tmp_path / "mask.tif", alpha[..., 0], photometric="minisblack", extratags=[*tags, no_data])
    mask = read_whole_mask(tmp_path / "mask.tif")
    assert np.array_equal(mask.filled(0) != 0, valid)
    assert read_whole_mask(tmp_path / "mask.tif", ignore_exif=True).shape == (20, 33)


def test_a_raster_that_is_to_be_turned_is_refused(tmp_path):
    tags = [(274, 3, 1, 6, True), (33550, 12, 3, (0.5, 0.5, 0.0), True)]
    pixels = values(3, 20, 33, np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels.transpose(1, 2, 0), photometric="rgb", extratags=tags)
    with pytest.raises(ValueError, match=r"a\.tif is a raster of orientation 6 .*expected 1, upright: .*--as-stored"):
        open_image(tmp_path / "a.tif")
    assert np.array_equal(read_whole_image(tmp_path / "a.tif", 3, ignore_exif=True), pixels)


def test_an_image_turned_beside_an_unturned_mask_is_found(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (9, 6)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("L", (9, 6)).save(tmp_path / "mask.png")
    assert is_turned_alone(str(tmp_path / "turned.jpg"), str(tmp_path / "mask.png"))
    assert not is_turned_alone(str(tmp_path / "mask.png"), str(tmp_path / "mask.png"))
    assert is_turned_alone({"bytes": (tmp_path / "turned.jpg").read_bytes(), "path": None}, str(tmp_path / "mask.png"))
    assert is_turned_alone(str(tmp_path / "turned.jpg"), {"path": "annotations.json, image 1", "polygons": "{}"})
    assert not is_turned_alone(str(tmp_path / "missing.jpg"), str(tmp_path / "mask.png"))
    exif[0x0112] = 6
    Image.new("RGB", (9, 6)).save(tmp_path / "turned.jpg", exif=exif)
    row = {"image": [str(tmp_path / "turned.jpg")], "label": [str(tmp_path / "mask.png")]}
    with pytest.raises(ValueError, match=r"mask\.png is 6x9 .*turned\.jpg, 9x6\. EXIF turns .*--as-stored"):
        RowReader(3, LabelMapping((0, 1)))(row)
    assert RowReader(3, LabelMapping((0, 1)), ignore_exif=True)(row)["label"][0].shape == (6, 9)


# --- What is never opened ---------------------------------------------------------------------------------------------


def test_formats_are_told_by_content_and_foreign_ones_named(tmp_path, monkeypatch):
    Image.new("RGB", (9, 6)).save(tmp_path / "a.eps", "EPS")
    (tmp_path / "eps.png").write_bytes((tmp_path / "a.eps").read_bytes())
    (tmp_path / "scan.png").write_bytes(bytes(128) + b"DICM" + bytes(200))
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    for read in (
        read_whole_image,
        lambda path, _: SegFormerImageProcessor()(path),
        lambda path, _: read_whole_mask(path),
    ):
        with pytest.raises(OSError, match="a PostScript file"):
            read(tmp_path / "eps.png", 3)
    with pytest.raises(OSError, match="a DICOM file"):  # which readers open, but not the processor alone
        SegFormerImageProcessor()(tmp_path / "scan.png")
    Image.new("RGB", (9, 6), "red").save(tmp_path / "red.tiff", "PNG")
    assert np.asarray(read_whole_image(tmp_path / "red.tiff", 3))[0, 0].tolist() == [255, 0, 0]


VRT = (
    '<VRTDataset rasterXSize="4" rasterYSize="4"><VRTRasterBand dataType="Byte" band="1"{}>{}</VRTRasterBand>'
    "</VRTDataset>"
)
SOURCE = '<SimpleSource><SourceFilename relativeToVRT="{}">{}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>'


@pytest.mark.parametrize("name", ["a.jp2", "a.tif", "a.img", "a.png"])
def test_a_virtual_raster_in_disguise_is_not_opened(tmp_path, name):
    write_geotiff(tmp_path / "secret.tif", values(1, 4, 4, np.uint8))
    (tmp_path / name).write_text(VRT.format("", SOURCE.format(1, "secret.tif")))
    with pytest.raises(OSError, match=rf"{name}.*virtual raster|{name}.*no TIFF"):
        read_whole_image(tmp_path / name, 1)


@pytest.mark.parametrize(
    ("band", "content", "message"),
    [
        ("", SOURCE.format(1, "../secret.tif"), "inside its own folder"),
        ("", SOURCE.format(0, "/vsicurl/http://127.0.0.1:9/a.tif"), "inside its own folder"),
        ("", SOURCE.format(0, "http://127.0.0.1:9/a.tif"), "inside its own folder"),
        ("", SOURCE.format(0, "good.tif"), "inside its own folder"),  # relative to the working directory
        ("", SOURCE.format(1, "link.tif"), "inside its own folder"),
        ("", SOURCE.format(1, "nested.vrt"), "expected a TIFF"),
        ("", SOURCE.format(1, "good.tif").replace("SourceFilename", "sourcefilename"), "element sourcefilename"),
        ("", "<PixelFunctionCode>import os</PixelFunctionCode>", "element PixelFunctionCode"),
        (' subClass="VRTDerivedRasterBand"', SOURCE.format(1, "good.tif"), "VRTDerivedRasterBand"),
        (' subClass="VRTRawRasterBand"', SOURCE.format(1, "good.tif"), "VRTRawRasterBand"),
    ],
)
def test_virtual_rasters_may_not_reach_outside_their_folder(tmp_path, band, content, message):
    folder = tmp_path / "inside"
    folder.mkdir()
    write_geotiff(tmp_path / "secret.tif", values(1, 4, 4, np.uint8))
    write_geotiff(folder / "good.tif", values(1, 4, 4, np.uint8))
    (folder / "link.tif").symlink_to(tmp_path / "secret.tif")
    (folder / "nested.vrt").write_text(VRT.format("", SOURCE.format(0, "/vsicurl/http://127.0.0.1:9/a.tif")))
    (folder / "a.vrt").write_text(VRT.format(band, content))
    with pytest.raises(ValueError, match=message):
        read_whole_image(folder / "a.vrt", 1)
    (folder / "a.vrt").write_text(VRT.format("", SOURCE.format(1, "good.tif")))
    assert np.array_equal(read_whole_image(folder / "a.vrt", 1), values(1, 4, 4, np.uint8))


def test_files_beside_a_raster_must_be_what_their_names_say(tmp_path):
    path = write_geotiff(tmp_path / "scene.tif", values(1, 4, 4, np.uint8))
    vrt = VRT.format("", SOURCE.format(0, "/vsicurl/http://127.0.0.1:9/a.tif"))
    for name in ("scene.tif.ovr", "scene.tif.msk", "scene.tif.msk.ovr"):
        (tmp_path / name).write_text(vrt)
        with pytest.raises(ValueError, match=f"{name} is not the raster that its name says"):
            read_whole_image(path, 1)
        (tmp_path / name).unlink()
    text = '<PAMDataset><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">/etc/x</MDI></Metadata></PAMDataset>'
    (tmp_path / "scene.tif.aux.xml").write_text(text)
    with pytest.raises(ValueError, match=r"scene\.tif\.aux\.xml refers to other files"):
        read_whole_image(path, 1)


def test_results_stay_below_the_output_folder(tmp_path, monkeypatch):
    (tmp_path / "a/x").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    Image.new("RGB", (9, 6)).save(tmp_path / "b/c.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"would be filed outside /.*/out; expected a pattern that stays below"):
        find_inputs(["a/*/../../b/*.png"], tmp_path / "out")


def header(height, width):
    """A PNG that is no more than a header and a few bytes of pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(height * (width + 1)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_sizes_are_checked_before_pixels_are_decoded(tmp_path, monkeypatch):
    (tmp_path / "strip.png").write_bytes(header(349, 1))
    processor = SegFormerImageProcessor(size={"shortest_edge": 512}, keep_ratio=True, size_divisor=32)
    with monkeypatch.context() as patch:
        patch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", lambda _: pytest.fail("pixels were decoded"))
        with pytest.raises(ValueError, match=r"349x1 .* would be resized to 178688x512; expected at most 33554432"):
            processor(tmp_path / "strip.png")
    with pytest.raises(ValueError, match="would be resized"):
        processor(Image.new("L", (1, 349)))
    assert processor(Image.new("L", (40, 349))).pixel_values[0].shape == (3, 4480, 512)


# --- Sources ----------------------------------------------------------------------------------------------------------


def test_one_reader_opens_every_form_of_a_file(tmp_path):
    bands = values(5)
    tifffile.imwrite(tmp_path / "a.tif", bands.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig")
    np.save(tmp_path / "a.npy", bands)
    for name in ("a.tif", "a.npy"):
        content = (tmp_path / name).read_bytes()
        forms = (tmp_path / name, str(tmp_path / name), content, io.BytesIO(content), ImageSource(tmp_path / name))
        for form in forms:
            assert np.array_equal(read_whole_image(form, 5), bands)
    assert np.array_equal(read_whole_image(tmp_path / "a.npy", 3, bands=[5, 1, 2]), bands[[4, 0, 1]])
    assert np.array_equal(read_whole_image(tmp_path / "a.tif", 3, bands=[5, 1, 2]), bands[[4, 0, 1]])


@pytest.mark.parametrize(("image", "mask"), [("{}.png", "{}_mask.png"), ("{}_rgb.png", "{}.png")])
def test_a_shared_ending_is_suggested(tmp_path, image, mask):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for stem in ("a", "a1", "b"):
        Image.new("L", (4, 4)).save(tmp_path / "images" / image.format(stem))
        Image.new("L", (4, 4)).save(tmp_path / "masks" / mask.format(stem))
    wanted = r"set data\.mask_suffix=_mask" if "mask" in mask else r"set data\.image_suffix=_rgb"
    with pytest.raises(ValueError, match=wanted):
        pair_images_and_masks(tmp_path / "images", tmp_path / "masks")


def test_jpeg_masks_are_refused_by_name(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / folder / "a.jpg")
    with pytest.raises(ValueError, match=r"masks/a\.jpg is a JPEG file, whose compression changes labels: .*PNG"):
        pair_images_and_masks(tmp_path / "images", tmp_path / "masks")
    with pytest.raises(ValueError, match=r"a\.jpg is a JPEG file"):
        read_whole_mask(tmp_path / "masks/a.jpg")


def test_bands_are_chosen_for_evaluation_and_training(tmp_path):
    """The remedy that the message names works where it is read."""
    stored = values(5, 8, 12, np.uint8)
    write_geotiff(tmp_path / "scene.tif", stored)
    Image.new("L", (12, 8), 1).save(tmp_path / "mask.png")
    row = {"image": [str(tmp_path / "scene.tif")], "label": [str(tmp_path / "mask.png")]}
    with pytest.raises(ValueError, match=r"has 5 bands; expected 3.*--bands, data\.bands"):
        RowReader(3, LabelMapping((0, 1)))(row)
    reader = RowReader(3, LabelMapping((0, 1)), bands=(4, 3, 2))
    assert np.array_equal(reader(row)["image"][0], stored[[3, 2, 1]])
    assert np.array_equal(reader({**row, "image": [stored.tolist()]})["image"][0], stored[[3, 2, 1]])


def test_damaged_tiff_files_print_no_log_of_tifffile(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own would hide the last resort's
    path = tmp_path / "scene.tif"
    tifffile.imwrite(path, values(5, 8, 12, np.uint8), photometric="minisblack")
    content = bytearray(path.read_bytes())
    content[20:60] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        read_whole_image(path, 5)
    assert capsys.readouterr().err == ""


def test_an_array_of_rgb_pages_is_several_images(tmp_path):
    path, stored = tmp_path / "pages.tif", np.random.default_rng(0).integers(0, 255, (3, 8, 12, 3), dtype=np.uint8)
    tifffile.imwrite(path, stored, photometric="rgb")
    assert count_pages(path) == 3
    with pytest.raises(ValueError, match=r"pages\.tif holds 3 images; expected one.*--pages"):
        read_whole_image(path, 3)
    for page in range(3):
        assert np.array_equal(np.asarray(read_whole_image(path, 3, page=page)), stored[page])


def test_a_mask_of_several_pages_is_refused_with_the_remedy(tmp_path):
    tifffile.imwrite(tmp_path / "mask.tif", np.ones((2, 8, 12), np.uint8), photometric="minisblack")
    with pytest.raises(ValueError, match=r"mask\.tif has 2 bands or pages; expected one of labels.*--pages"):
        read_whole_mask(tmp_path / "mask.tif")
    assert read_whole_mask(tmp_path / "mask.tif", page=1).shape == (8, 12)


def test_pages_of_a_raster_are_predicted_one_by_one(tmp_path, tiny_config):
    from hf_segformer.data.readers import open_raster
    from hf_segformer.inference.large_image import segment_raster

    stored = values(6, 64, 96, np.uint8).reshape(2, 3, 64, 96)
    path = tmp_path / "pages.tif"
    with tifffile.TiffWriter(path) as file:
        for page in stored:
            file.write(np.moveaxis(page, 0, -1), photometric="rgb", tile=(32, 32), metadata=None, contiguous=False)
    model = SegFormerForSemanticSegmentation(tiny_config())
    predictor = SegFormerPredictor(model, SegFormerImageProcessor(do_resize=False))
    for index, page in enumerate(stored):
        out = tmp_path / f"{index}.tif"
        with open_raster(path, page=index) as raster:
            segment_raster(predictor.segmenter, raster, out, progress=False)
        assert np.array_equal(tifffile.imread(out), predictor(np.moveaxis(page, 0, -1)).segmentation)


def test_evaluate_names_images_that_exif_turns_alone(tmp_path, tiny_config, capsys):
    """Turned by 180 degrees an image keeps the size of its mask."""
    from hf_segformer.cli.main import main

    exif = Image.Exif()
    exif[0x0112] = 3
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (96, 64)).save(tmp_path / "images/a.jpg", exif=exif)
    Image.new("L", (96, 64)).save(tmp_path / "masks/a.png")
    SegFormerForSemanticSegmentation(tiny_config()).save_pretrained(tmp_path / "model")
    SegFormerImageProcessor(size=64).save_pretrained(tmp_path / "model")
    words = ["evaluate", tmp_path / "model", "--images", tmp_path / "images", "--masks", tmp_path / "masks"]
    assert main([str(word) for word in words]) == 0
    assert "EXIF turns 1 of 1 images but not their masks, such as" in capsys.readouterr().err
    assert main([*map(str, words), "--as-stored"]) == 0
    assert "EXIF" not in capsys.readouterr().err
