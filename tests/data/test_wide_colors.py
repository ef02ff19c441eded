"""Colours of 16 bits, which Pillow has no mode for, and TIFF files of which it would leave out bands."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from hf_segformer import SegFormerImageProcessor
from hf_segformer.data.image_measures import measure_image
from hf_segformer.data.readers import read_color_mask, read_whole_image, read_whole_mask
from hf_segformer.image_io_segformer import open_image_file, size_in_header
from tests.support.encoded import exif, png

tifffile = pytest.importorskip("tifffile")
HEIGHT, WIDTH = 6, 9


def values(bands):
    return np.random.default_rng(bands).integers(0, 4096, (HEIGHT, WIDTH, bands)).astype(np.uint16)


@pytest.mark.parametrize(
    ("bands", "num_channels"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 3), (4, 3), (4, 4)], ids=lambda number: str(number)
)
def test_png_keeps_all_bits(tmp_path, bands, num_channels):
    array = values(bands)
    path = tmp_path / "a.png"
    path.write_bytes(png(array))
    read = read_whole_image(path, num_channels)
    expected = array[..., [0] * num_channels] if bands < 3 else array[..., :num_channels]
    np.testing.assert_array_equal(read, np.moveaxis(expected, -1, 0))
    np.testing.assert_array_equal(read_whole_image({"bytes": png(array), "path": "a.png"}, num_channels), read)


def test_colors_turn_grey_as_those_of_8_bits(tmp_path):
    array = values(3)
    (tmp_path / "a.png").write_bytes(png(array))
    [grey] = read_whole_image(tmp_path / "a.png", 1)
    expected = np.asarray(Image.fromarray((array >> 4).astype(np.uint8)).convert("L"))
    assert np.abs(grey / 16 - expected).max() < 2


def test_an_image_after_its_thumbnail_is_read(tmp_path):
    image = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(image[:2, :3], photometric="rgb", subfiletype=1)
        file.write(image, photometric="rgb")
    assert size_in_header(tmp_path / "a.tif") == (6, 9)
    np.testing.assert_array_equal(np.asarray(open_image_file(tmp_path / "a.tif", "a")), image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_all_bits(tmp_path, orientation):
    array = values(3)
    (tmp_path / "a.png").write_bytes(png(array, exif_data=exif(orientation)))
    Image.fromarray((array >> 4).astype(np.uint8)).save(tmp_path / "b.png", exif=exif(orientation))
    expected = np.asarray(read_whole_image(tmp_path / "b.png", 3))
    np.testing.assert_array_equal(np.moveaxis(read_whole_image(tmp_path / "a.png", 3), 0, -1) >> 4, expected)
    stored = read_whole_image(tmp_path / "a.png", 3, ignore_exif=True)
    np.testing.assert_array_equal(np.moveaxis(stored, 0, -1), array)


def test_the_processor_sees_what_it_sees_of_an_array():
    array = values(3)
    processor = SegFormerImageProcessor(do_resize=False, value_range=(0, 4095))
    for source in (BytesIO(png(array)), array):
        pixels = processor(source, return_tensors="np").pixel_values
        assert len(np.unique(pixels)) > 100
        np.testing.assert_allclose(pixels, processor(array, return_tensors="np").pixel_values)


@pytest.mark.parametrize("bands", [2, 3, 4])
def test_pil_images_that_are_not_decoded_yet_keep_all_bits_and_stay_so(bands):
    array, processor = values(bands), SegFormerImageProcessor(do_resize=False, value_range=(0, 4095))
    for content, expected in ((png(array), array), (png(array, exif_data=exif(6)), np.rot90(array, -1))):
        expected = expected[..., [0] * 3] if bands == 2 else expected[..., :3]
        with Image.open(BytesIO(content)) as image:
            for _ in range(2):  # the first call leaves the image as it is
                pixels = processor(image)["pixel_values"][0]
                np.testing.assert_allclose(pixels, processor(expected)["pixel_values"][0])
            assert image.tile, "the image has been decoded"


def test_the_present_page_of_a_pil_image_keeps_all_bits():
    file, pages = BytesIO(), [values(3), values(3)[::-1]]
    with tifffile.TiffWriter(file) as writer:
        for page in pages:
            writer.write(page, photometric="rgb", compression="deflate")
    with Image.open(file) as image:
        image.seek(1)
        pixels = SegFormerImageProcessor(do_resize=False, value_range=(0, 4095))(image)["pixel_values"][0]
        expected = SegFormerImageProcessor(do_resize=False, value_range=(0, 4095))(pages[1])["pixel_values"][0]
        np.testing.assert_allclose(pixels, expected)


def test_a_measure_says_uint16(tmp_path):
    (tmp_path / "a.png").write_bytes(png(values(4)))
    measure = measure_image(str(tmp_path / "a.png"), None)
    assert (measure.num_bands, measure.dtype) == (3, "uint16")
    assert measure.high == values(4)[..., :3].max()


def test_chosen_bands_keep_all_bits(tmp_path):
    (tmp_path / "a.png").write_bytes(png(values(4)))
    read = read_whole_image(tmp_path / "a.png", 2, bands=(4, 1))
    np.testing.assert_array_equal(read, np.moveaxis(values(4)[..., [3, 0]], -1, 0))


def test_masks_of_16_bit_colors_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(values(3)))
    with pytest.raises(ValueError, match=r"a.png has shape \(6, 9, 3\); expected a mask \(H, W\)"):
        read_whole_mask(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png has no 8-bit colours"):
        read_color_mask(tmp_path / "a.png")


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("photometric", ["rgb", "minisblack"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_tiff_keeps_all_bits_and_bands(tmp_path, dtype, photometric, planes, compression, byteorder):
    for bands in (3, 4):
        array = (values(bands) // (1 if dtype != "uint8" else 16)).astype(dtype)
        stored = array if planes == "contig" else np.moveaxis(array, -1, 0)
        options = {"photometric": photometric, "planarconfig": planes, "compression": compression}
        extra = {"extrasamples": ["unspecified"]} if bands == 4 and photometric == "rgb" else {}
        tifffile.imwrite(tmp_path / "a.tif", stored, byteorder=byteorder, **options, **extra)
        read = read_whole_image(tmp_path / "a.tif", bands, any_range=True)
        read = np.asarray(read) if isinstance(read, np.ndarray) else np.moveaxis(np.asarray(read), -1, 0)
        np.testing.assert_array_equal(read, np.moveaxis(array, -1, 0))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_band_that_is_no_alpha_is_not_left_out(tmp_path, dtype):
    array = (values(4) >> 4).astype(dtype)  # red, green, blue and near infrared
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", extrasamples=["unspecified"])
    with pytest.raises(ValueError, match=r"a.tif has 4 bands; expected 3, .*: choose bands by their numbers"):
        read_whole_image(tmp_path / "a.tif", 3)
    read = read_whole_image(tmp_path / "a.tif", 3, bands=(4, 1, 2), any_range=True)
    np.testing.assert_array_equal(read, np.moveaxis(array[..., [3, 0, 1]], -1, 0))
