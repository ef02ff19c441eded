"""handler.py as an Inference Endpoint runs it: from a repository's folder, where hf_segformer is not installed."""

import base64
import io
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import ImageSegmentationOutputElement
from PIL import Image

from hf_segformer import SegFormerImageProcessor
from hf_segformer.hub import endpoint_handler
from hf_segformer.hub.endpoint import handler_files
from hf_segformer.hub.endpoint_handler import (
    encode_mask,
    mean_probability,
    prepare_image,
    read_image,
    read_threshold,
)
from tests.support.encoded import png
from tests.support.hub import (
    NEEDS_AUTO_IMAGE_PROCESSOR,
    PACKAGE,
    SEGMENTATION,
    run_command,
)
from tests.support.remote_code import LABELS, Client, answer_requests, download, image, new_processor, save, segment


def save_binary(folder, threshold):
    """Save a model with one label, part of the image above 0.5."""
    import torch

    import hf_segformer

    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
    config = hf_segformer.SegFormerConfig(**sizes, decoder_hidden_size=16, id2label={0: "crack"})
    model = hf_segformer.SegFormerForSemanticSegmentation(config).eval()
    processor = hf_segformer.SegFormerImageProcessor(size=64, binary_threshold=threshold)
    with torch.no_grad():
        logits = model(**processor(image(), return_tensors="pt")).logits
        model.decode_head.classifier.bias -= logits.mean()
        logits -= logits.mean()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return torch.nn.functional.interpolate(logits, (45, 61), mode="bilinear")[0, 0].numpy()


def probabilities(folder):
    """The author's probabilities (K, H, W) of the image: of the logits, then upsampled."""
    import torch
    from transformers import AutoModelForSemanticSegmentation

    model = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**new_processor()(image(), return_tensors="pt")).logits.double()
    return torch.nn.functional.interpolate(logits.softmax(1), (45, 61), mode="bilinear")[0].numpy()


@pytest.fixture(scope="module")
def user(hub, tmp_path_factory):
    """Somebody without the package."""
    client = Client(tmp_path_factory.mktemp("user") / "home", hub.url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def folder(author, tmp_path_factory):
    """A model's folder."""
    folder = tmp_path_factory.mktemp("saved") / "shapes"
    author(save, SEGMENTATION, str(folder))
    return folder


@pytest.fixture(scope="module")
def published(author, user, folder, tmp_path_factory):
    """The files of its repository, where a user has fetched them."""
    assert author(run_command, str(folder), "me/endpoint")[0] == 0
    target = tmp_path_factory.mktemp("repository") / "model"
    user(download, "me/endpoint", str(target))
    return target


def file_of(drawing, kind="PNG", **options):
    file = io.BytesIO()
    drawing.save(file, kind, **options)
    return file.getvalue()


def in_base64(content):
    return base64.b64encode(content).decode()


def mask_of(segment):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(segment["mask"]))))


@pytest.mark.slow
@NEEDS_AUTO_IMAGE_PROCESSOR
def test_an_endpoint_answers_as_the_pipeline_does_without_a_request(hub, author, user, folder, published):
    expected = author(segment, str(folder))
    scores = author(probabilities, str(folder))
    before = len(hub.requests)
    content = file_of(image())
    turned = file_of(image().transpose(Image.Transpose.ROTATE_90), "PNG", exif=bytes(exif(6)))
    first, *others, upright = user(
        answer_requests,
        str(published),
        {"inputs": image()},
        {"inputs": in_base64(content)},
        {"inputs": "data:image/png;base64," + in_base64(content), "parameters": {"subtask": "semantic"}},
        {"inputs": content, "parameters": {}},
        {"inputs": in_base64(turned)},
    )
    assert len(hub.requests) == before
    assert others == [first] * 3
    parsed = ImageSegmentationOutputElement.parse_obj_as_list(first)  # as huggingface_hub's InferenceClient does
    assert [each.mask for each in parsed] == [each["mask"] for each in first]
    assert {each["label"] for each in first} == expected.keys()
    total = 0
    for each in first:
        mask = mask_of(each)
        assert mask.shape == (45, 61)
        np.testing.assert_array_equal(mask, np.asarray(expected[each["label"]]))
        index = list(LABELS.values()).index(each["label"])
        assert each["score"] == pytest.approx(scores[index][mask == 255].mean(), abs=1e-5)
        total += (mask == 255).sum()
    assert total == 45 * 61
    assert upright == first


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


@pytest.mark.slow
@NEEDS_AUTO_IMAGE_PROCESSOR
def test_a_threshold_leaves_pixels_to_no_class_and_bad_requests_are_answered_in_one_line(user, published):
    none, all_pixels, *errors = user(
        answer_requests,
        str(published),
        {"inputs": image(), "parameters": {"threshold": 1}},
        {"inputs": image(), "parameters": {"threshold": "0.0"}},  # as a query string gives it
        {"inputs": image(), "parameters": {"threshold": 7}},
        {"inputs": None},
        {},
        {"inputs": "/etc/hostname"},
    )
    assert none == []
    assert sum((mask_of(each) == 255).sum() for each in all_pixels) == 45 * 61
    words = ("threshold is 7", "NoneType", "NoneType", "no base64")
    for error, word in zip(errors, words, strict=True):
        assert word in error
        assert "\n" not in error


@pytest.mark.slow
@NEEDS_AUTO_IMAGE_PROCESSOR
def test_a_binary_model_answers_with_background_and_its_threshold(author, user, tmp_path):
    logits = author(save_binary, str(tmp_path / "binary"), 0.52)
    for name, content in handler_files().items():
        (tmp_path / "binary" / name).write_bytes(content)
    [answer, lower] = user(
        answer_requests,
        str(tmp_path / "binary"),
        {"inputs": image()},
        {"inputs": image(), "parameters": {"threshold": 0.5}},
    )
    assert {each["label"] for each in answer} == {"background", "crack"}
    for segments, threshold in ((answer, 0.52), (lower, 0.5)):
        masks = {each["label"]: mask_of(each) == 255 for each in segments}
        expected = 1 / (1 + np.exp(-logits)) > threshold
        assert 0 < expected.sum() < expected.size
        assert (masks["crack"] != expected).sum() <= 2  # rounding at the threshold itself
        np.testing.assert_array_equal(masks["background"], ~masks["crack"])


# --- What it reads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (b"not an image", "inputs is no image, or cut off; expected an image in one of PNG, JPEG"),
        (b"", "no image"),
        ("https://example.org/a.png", "no base64; expected an image's file in base64, not an address or a path"),
        ("photo.jpg", "no base64"),
        (in_base64(b"%!PS-Adobe-3.0"), "no image"),
        ([1, 2], "inputs is a list; expected an image"),
        (Image.new("L", (6000, 5000)), r"5000x6000 \(height x width\); expected at most 25,000,000 pixels"),
        (file_of(Image.new("1", (6000, 5000))), "expected at most 25,000,000 pixels"),
        (file_of(Image.new("P", (9, 9)), "GIF"), "no image"),
        (
            file_of(Image.new("L", (9, 9)), "TIFF", save_all=True, append_images=[Image.new("L", (9, 9))]),
            "holds 2 images; expected one",
        ),
    ],
)
def test_bad_images_are_refused_before_they_are_decoded(inputs, words):
    with pytest.raises(ValueError, match=words):
        read_image(inputs)


def test_a_damaged_image_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"the image is damaged: .*truncated"):
        prepare_image(file_of(image())[:-900], SegFormerImageProcessor(size=16))


@pytest.mark.parametrize("bands", [2, 3, 4])
def test_colors_of_16_bits_are_read_as_from_a_file(bands, tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (6, 9, bands))
    (tmp_path / "image.png").write_bytes(png(values))
    processor = SegFormerImageProcessor(size=16, value_range=[0, 4095])
    pixels, size = prepare_image((tmp_path / "image.png").read_bytes(), processor)
    assert size == (6, 9)
    assert torch.equal(pixels, processor(tmp_path / "image.png", return_tensors="pt").pixel_values)
    assert pixels.std() > 0.5  # 8 bits of these values are nearly black


@pytest.mark.parametrize("kinds", [(0, 1, 5), (1, 0), (0, 4)])
def test_thumbnails_pyramid_levels_and_masks_are_no_further_images(kinds):
    """Kinds of the pages of a TIFF: 0 an image, 1 a reduced one, 4 a mask."""
    pages = []
    for number, kind in enumerate(kinds):
        page = Image.new("RGB", (9 + number, 6), (number, 2, 3))
        page.encoderinfo = {"tiffinfo": {254: kind}}
        pages.append(page)
    content = file_of(pages[0], "TIFF", tiffinfo={254: kinds[0]}, save_all=True, append_images=pages[1:])
    processor = SegFormerImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    pixels, size = prepare_image(content, processor)
    assert size == (6, 9 + kinds.index(0))
    assert pixels[0, :, 0, 0].tolist() == [kinds.index(0), 2, 3]


def test_files_that_are_too_large_are_not_decoded(monkeypatch):
    monkeypatch.setattr(endpoint_handler, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="the image has 1,001 bytes; expected at most 1,000"):
        read_image(bytes(1001))
    with pytest.raises(ValueError, match="2,000 characters; expected at most 1,000 bytes in base64"):
        read_image("A" * 2000)


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="larger than 25,000,000 pixels"):
        read_image(file_of(Image.new("1", (20, 20))))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ([1], "parameters is a list; expected an object"),
        ({"treshold": 0.5}, "parameters has treshold; expected threshold alone"),
        ({"subtask": "panoptic"}, "subtask is 'panoptic'; expected semantic"),
        ({"threshold": "high"}, "threshold is 'high'; expected a number from 0 to 1"),
        ({"threshold": True}, "threshold is True; expected a number from 0 to 1"),
    ],
)
def test_parameters_without_effect_are_refused(parameters, words):
    with pytest.raises(ValueError, match=words):
        read_threshold(parameters)


def test_scores_and_masks_by_hand():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:, 3:] = True
    logits = torch.tensor([0.0, np.log(3)]).view(2, 1, 1).expand(2, 2, 3)
    assert mean_probability(logits, 1, mask) == pytest.approx(0.75)
    assert mean_probability(logits, 0, mask) == pytest.approx(0.25)
    binary = torch.full((1, 2, 3), float(np.log(4)))
    assert mean_probability(binary, 1, mask) == pytest.approx(0.8)
    assert mean_probability(binary, 0, ~mask) == pytest.approx(0.2)
    np.testing.assert_array_equal(mask_of({"mask": encode_mask(mask)}), mask.numpy() * 255)


# --- What a push publishes --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_handler_imports_nothing_that_an_endpoint_lacks(published):
    source = (published / "handler.py").read_text()
    assert source == (PACKAGE / "hub" / "endpoint_handler.py").read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers", "PIL"}
    lines = (published / "requirements.txt").read_text().splitlines()[1:]
    assert {"torch", "transformers", "pillow", "numpy", "safetensors"} == {
        line.split(">")[0].split("<")[0] for line in lines
    }
