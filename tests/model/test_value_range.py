"""Value ranges of the image processor: fixed, of each image, and windows; kept in float and saved with a model."""

import numpy as np
import pytest
from PIL import Image

from hf_segformer import SegFormerImageProcessor
from hf_segformer.config import parse_value_range
from hf_segformer.data.readers import read_whole_image
from hf_segformer.image_io_segformer import read_mask

RAW = {"do_resize": False, "do_rescale": False, "do_normalize": False}
VALUES = np.linspace(125, 902, 24).round().astype(np.uint16).reshape(4, 6)  # of a 12-bit camera


def scaled(image, value_range, **keywords):
    return SegFormerImageProcessor(**{**RAW, **keywords}, value_range=value_range)(image)["pixel_values"][0]


@pytest.mark.parametrize("form", ["array", "PIL", "png", "tif", "float", "int16"])
def test_a_fixed_range_reaches_0_and_255_in_floating_point(form, tmp_path):
    image = {
        "array": lambda: VALUES,
        "PIL": lambda: Image.fromarray(VALUES),
        "float": lambda: VALUES.astype(np.float64),
        "int16": lambda: VALUES.astype(np.int16),
    }.get(form)
    if image is None:
        Image.fromarray(VALUES).save(tmp_path / f"a.{form}")
    pixels = scaled(tmp_path / f"a.{form}" if image is None else image(), [125, 902])
    assert pixels.shape == (3, 4, 6)
    np.testing.assert_allclose(pixels[0], (VALUES - 125.0) / 777 * 255, atol=1e-4)
    assert len(np.unique(pixels)) == len(np.unique(VALUES))  # five without a range


def test_values_beyond_the_range_are_clipped():
    assert scaled(np.array([[-50, 0, 50, 100, 9000]], np.int16), [0, 100])[0].tolist() == [[0, 0, 127.5, 255, 255]]


def test_a_window_is_given_by_centre_and_width():
    pixels = scaled(np.array([[-161, -160, 40, 240, 241]], np.int16), {"center": 40, "width": 400})
    assert pixels[0].tolist() == [[0, 0, 127.5, 255, 255]]


def test_percentiles_follow_each_image_and_ignore_no_data():
    image = np.arange(101, dtype=np.float32)[None] * 3 + 7
    expected = ((np.arange(101) - 10) / 80 * 255).clip(0, 255)
    np.testing.assert_allclose(scaled(image, {"percentiles": [10, 90]})[0, 0], expected, atol=1e-3)
    masked = np.ma.MaskedArray(np.concatenate([image, np.full_like(image, -9999)]), [[False] * 101, [True] * 101])
    np.testing.assert_allclose(scaled(masked, {"percentiles": [10, 90]})[0, 0], expected, atol=1e-3)


def test_percentiles_of_bands_are_their_own_and_of_colours_shared():
    bands = np.stack([np.arange(11.0), np.arange(11.0) * 100, np.arange(11.0), np.arange(11.0)])[:, None]
    scales = {"image_mean": [0.0] * 4, "image_std": [1.0] * 4}
    four = scaled(bands, {"percentiles": [0, 100]}, **scales)
    assert (four == four[0]).all()
    assert scaled(bands[:3], {"percentiles": [0, 100]})[0].max() == pytest.approx(2.55)


def test_a_range_is_applied_to_bytes_too():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_allclose(scaled(Image.fromarray(image), [0, 51])[0], (image * 5.0).clip(0, 255), atol=1e-3)


def test_a_range_is_resized_and_normalized_as_floats():
    wide = np.kron(VALUES, np.ones((8, 8), np.uint16))
    processor = SegFormerImageProcessor(size=16, value_range=[125, 902])
    exact = SegFormerImageProcessor(size=16, do_rescale=False)
    expected = exact(((wide - 125.0) / 777).astype(np.float64).clip(0, 1) * 1.0, do_resize=False)["pixel_values"][0]
    found = processor(wide, do_resize=False)["pixel_values"][0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert processor(wide)["pixel_values"][0].shape == (3, 16, 16)
    assert len(np.unique(processor(wide)["pixel_values"][0][0])) > 100


def test_a_range_is_saved_with_the_model(tmp_path):
    for value_range in ([0, 4095], {"percentiles": [1.0, 99.0]}, {"center": 40, "width": 400}):
        SegFormerImageProcessor(value_range=value_range).save_pretrained(tmp_path)
        assert SegFormerImageProcessor.from_pretrained(tmp_path).value_range == value_range


@pytest.mark.parametrize(
    "value_range",
    [
        *("0,1", 5, [1], [2, 1], [0, float("nan")], [0, "1"], {"percentiles": [0, 101]}, {"percentiles": [9, 9]}),
        *({"center": 1}, {"center": 1, "width": 0}, {"low": 0, "high": 1}),
    ],
)
def test_impossible_ranges_are_named(value_range):
    with pytest.raises(ValueError, match=r"value_range is .*; expected \[low, high\]"):
        SegFormerImageProcessor(value_range=value_range)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("0,4095", [0, 4095]),
        ("-1.5 2e3", [-1.5, 2000]),
        ("percentiles:1,99", {"percentiles": [1, 99]}),
        ("window: 40, 400", {"center": 40, "width": 400}),
    ],
)
def test_ranges_of_recipes_and_command_lines(text, expected):
    assert parse_value_range(text) == expected
    SegFormerImageProcessor(value_range=parse_value_range(text))


@pytest.mark.parametrize("text", ["5", "1,2,3", "2,1", "a,b", "percent:1,2", ":1,2", "percentiles:1,101", "window:1,0"])
def test_other_texts_are_no_ranges(text):
    with pytest.raises(ValueError, match=r"--value-range is .*; expected LOW,HIGH"):
        parse_value_range(text, "--value-range")


def test_the_used_part_of_a_range_is_measured():
    processor = SegFormerImageProcessor()
    assert processor.used_range(VALUES) == (125, 902, 0, 65535)
    assert processor.used_range(Image.new("RGB", (4, 4), (9, 9, 9))) is None
    assert SegFormerImageProcessor(value_range=[100, 1000]).used_range(VALUES) == (125, 902, 100, 1000)
    assert SegFormerImageProcessor(value_range={"percentiles": [1, 99]}).used_range(VALUES) is None


@pytest.mark.parametrize("side", [None, 12])
def test_labels_are_ignored_where_image_or_mask_holds_no_data(side):
    size = {"do_resize": False} if side is None else {"size": side}
    processor = SegFormerImageProcessor(do_reduce_labels=True, **size)
    hidden, uncertain = np.zeros((3, 6, 6), bool), np.zeros((6, 6), bool)
    hidden[:, :2], hidden[0, 4], uncertain[:, 3:4] = True, True, True  # one band of row 4 alone
    image = np.ma.MaskedArray(np.full((3, 6, 6), 80, np.uint8), hidden)
    mask = np.ma.MaskedArray(np.full((6, 6), 5, np.uint8), uncertain)
    expected = np.where(hidden.all(axis=0) | uncertain, 255, 4)
    expected = expected if side is None else expected.repeat(2, 0).repeat(2, 1)
    for given in (None, "np", "pt"):
        [labels] = processor(image, mask, return_tensors=given)["labels"]
        assert not isinstance(labels, np.ma.MaskedArray)
        assert np.array_equal(np.asarray(labels), expected)
    [labels] = processor(image, mask.data)["labels"]
    assert np.array_equal(labels[:, 0], expected[:, 0])
    assert (labels[4:] == 4).all()
    [labels] = processor(image.data, mask.data)["labels"]
    assert (labels == 4).all()


def write_pgm(path, values, maxval, is_plain=False):
    height, width = values.shape
    if is_plain:
        body = b" ".join(str(value).encode() for value in values.ravel()) + b"\n"
    else:
        body = values.astype(">u2" if maxval > 255 else np.uint8).tobytes()
    path.write_bytes(f"{'P2' if is_plain else 'P5'}\n{width} {height}\n{maxval}\n".encode() + body)
    return path


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("maxval", [3, 100, 255, 300, 4095, 65535])
def test_stored_values_of_pgm_files_are_ranged_whatever_their_largest(tmp_path, maxval, is_plain):
    values = np.linspace(0, maxval, 24).round().astype(np.uint16).reshape(4, 6)
    path = write_pgm(tmp_path / "a.pgm", values, maxval, is_plain)
    assert np.array_equal(read_mask(path, "mask"), values)
    with Image.open(path) as image:
        for source in (path, image, image):  # the first call leaves it as it is
            np.testing.assert_allclose(scaled(source, [0, maxval])[0], values / maxval * 255, atol=1e-4)
    assert np.array_equal(read_whole_image(path, 1, bands=(1,), any_range=True)[0], values)


def test_dark_pgm_files_are_no_bytes(tmp_path):
    values = np.linspace(0, 199, 24).round().astype(np.uint16).reshape(4, 6)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = SegFormerImageProcessor(**RAW)(tmp_path / "a.png")["pixel_values"][0]
    assert expected.max() < 1
    path = write_pgm(tmp_path / "a.pgm", values, 65535)
    loaded = Image.open(path)
    loaded.load()
    for source in (path, Image.open(path), loaded, read_whole_image(path, 3)):
        assert np.array_equal(SegFormerImageProcessor(**RAW)(source)["pixel_values"][0], expected)
    # 300 of 4095 are 18.7 of 255.
    path = write_pgm(tmp_path / "b.pgm", np.full((2, 2), 300), 4095)
    assert scaled(path, [0, 4095]) == pytest.approx(18.68, abs=0.01)


def test_colours_of_16_bit_ppm_files_have_no_range(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6\n1 1\n4095\n" + np.array([0, 300, 4095], ">u2").tobytes())
    with pytest.raises(ValueError, match=r"a\.ppm is a PPM file of colours up to 4095, .*expected a PNG or TIFF file"):
        scaled(tmp_path / "a.ppm", [0, 4095])
    (tmp_path / "a.ppm").write_bytes(b"P6\n1 1\n100\n" + bytes([0, 50, 100]))
    assert scaled(tmp_path / "a.ppm", [0, 100]).ravel().tolist() == [0, 127.5, 255]
