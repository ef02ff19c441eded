"""What the page shows and hands out, without Gradio: results, overlays, files, words."""

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
    write_labels,
    write_mask,
)


@pytest.fixture
def predictor(model):
    """Of five classes; the head is made to see several of them."""
    torch.manual_seed(1)
    torch.nn.init.normal_(model.decode_head.classifier.weight)
    return SegFormerPredictor(model, SegFormerImageProcessor(size={"shortest_edge": 32}, keep_ratio=True))


@pytest.fixture
def photo(tmp_path):
    """A picture of random blocks, 90 wide and 60 high."""
    blocks = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(10, axis=0).repeat(10, axis=1)).save(tmp_path / "my street.png")
    return tmp_path / "my street.png"


def test_an_upload_becomes_what_the_predictor_says(predictor, photo):
    result = predict_upload(predictor, photo)
    np.testing.assert_array_equal(result.labels, predictor(photo).labels)
    assert result.labels.shape == (60, 90)
    assert len(result.pixels) > 1
    assert sum(result.pixels.values()) == 60 * 90
    assert list(result.pixels.values()) == sorted(result.pixels.values(), reverse=True)
    assert all((result.labels == index).sum() == count for index, count in result.pixels.items())
    assert min(result.seconds_preparing, result.seconds_predicting) > 0


def test_hidden_classes_show_the_picture_and_chosen_ones_their_colour(predictor, photo):
    result = predict_upload(predictor, photo)
    chosen = list(result.pixels)[:1]
    pixels = np.asarray(draw(result, chosen, predictor.palette, 1.0))
    inside = result.labels == chosen[0]
    assert (pixels[inside] == predictor.palette[chosen[0]]).all()
    np.testing.assert_array_equal(pixels[~inside], np.asarray(result.shown)[~inside])
    np.testing.assert_array_equal(draw(result, list(result.pixels), predictor.palette, 0.0), result.shown)
    np.testing.assert_array_equal(draw(result, [], predictor.palette, 1.0), result.shown)


def test_the_label_map_and_the_mask_are_at_the_pictures_size(predictor, photo, tmp_path):
    result = predict_upload(predictor, photo)
    labels = write_labels(result, tmp_path)
    assert labels.name == "my street_labels.png"
    np.testing.assert_array_equal(np.asarray(Image.open(labels)), result.labels)
    chosen = list(result.pixels)[1:]
    mask = np.asarray(Image.open(write_mask(result, chosen, tmp_path)))
    np.testing.assert_array_equal(mask, np.isin(result.labels, chosen) * 255)


def test_a_large_picture_is_shown_smaller_with_the_labels_that_it_has(predictor, tmp_path):
    Image.new("RGB", (1500, 40), "teal").save(tmp_path / "wide.png")
    result = predict_upload(predictor, tmp_path / "wide.png")
    assert result.labels.shape == (40, 1500)
    assert result.shown.size == (1280, 34)
    assert result.shown_labels.shape == (34, 1280)
    assert set(np.unique(result.shown_labels)) <= set(result.pixels)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.png", b"no picture at all", "not a picture of a kind"),
        ("empty.png", b"", "empty"),
        ("cut.png", None, "cut"),
    ],
)
def test_a_bad_upload_is_told_by_its_name_alone(name, content, words, predictor, photo, tmp_path):
    path = tmp_path / name
    path.write_bytes(photo.read_bytes()[:-60] if content is None else content)
    with pytest.raises((ValueError, OSError)) as raised:
        predict_upload(predictor, path)
    message = str(raised.value)
    assert name in message
    assert words in message
    assert str(tmp_path) not in message
    assert "\n" not in message


def test_a_picture_beyond_pillows_limit_is_told(predictor, photo, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"my street\.png.*(5400|limit)"):
        predict_upload(predictor, photo)


def test_a_strip_that_would_be_huge_for_the_network_is_told_before_it_runs(predictor, tmp_path):
    predictor.processor = SegFormerImageProcessor(size={"shortest_edge": 48}, keep_ratio=True)
    width = MAX_PIXELS // 48**2 + 1
    Image.new("RGB", (width, 1)).save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match=r"strip\.png would be 48x\d+ .* cut it into pieces"):
        predict_upload(predictor, tmp_path / "strip.png")


def test_one_pixel_is_a_picture(predictor, tmp_path):
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    assert predict_upload(predictor, tmp_path / "dot.png").labels.shape == (1, 1)


def test_words_on_model_and_time(predictor, photo):
    words = summary(predictor)
    parameters = sum(parameter.numel() for parameter in predictor.model.parameters())
    for part in ("5 classes", f"{parameters:,} parameters", "shorter side 32 pixels", "float32 on cpu"):
        assert part in words
    result = replace(predict_upload(predictor, photo), seconds_preparing=0.005, seconds_predicting=2.5)
    assert "prepared in 5 ms · labelled in 2.50 s on cpu" in timing(result, torch.device("cpu"))


def test_what_is_kept_of_a_large_picture_is_small(predictor, tmp_path):
    Image.new("RGB", (3000, 2000), "teal").save(tmp_path / "large.png")
    result = predict_upload(predictor, tmp_path / "large.png")
    assert result.labels.shape == result.size == (2000, 3000)
    assert len(result.label_file) < 100_000
    assert not [each for each in vars(result).values() if isinstance(each, np.ndarray) and each.size > 1280**2]
