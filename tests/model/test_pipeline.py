"""`pipeline("image-segmentation")`, from a folder and from objects, gives one mask for each label it finds."""

import logging

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import pipeline

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor

NAMES = ["sky", "road", "tree", "car", "sign"]
SIZES = [(61, 45), (33, 70)]  # width, height

# In older versions a placeholder stands in its place where there is no torchvision.
HAS_AUTO_IMAGE_PROCESSOR = not hasattr(transformers.AutoImageProcessor, "_backends")
SOURCES = [
    "objects",
    pytest.param(
        "folder",
        marks=pytest.mark.skipif(
            not HAS_AUTO_IMAGE_PROCESSOR, reason="in this Transformers AutoImageProcessor itself needs torchvision"
        ),
    ),
]


@pytest.fixture
def pictures():
    """Noise, none of it square."""
    values = np.random.default_rng(0)
    return [Image.fromarray(values.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


@pytest.fixture(params=[2, 5], ids=["two labels", "five labels"])
def model(request):
    """A tiny model; that it finds several labels in noise is checked where it matters."""
    torch.manual_seed(0)
    config = SegFormerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        id2label=dict(enumerate(NAMES[: request.param])),
    )
    return SegFormerForSemanticSegmentation(config).eval()


@pytest.fixture
def processor():
    return SegFormerImageProcessor(size={"height": 40, "width": 56})


@pytest.fixture(params=SOURCES)
def segmenter(request, model, processor, tmp_path):
    """The pipeline, built from the objects or from the folder they were saved to."""
    if request.param == "objects":
        return pipeline("image-segmentation", model=model, image_processor=processor, device="cpu")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return pipeline("image-segmentation", model=str(tmp_path), device="cpu")


@pytest.fixture
def errors(caplog):
    """The errors that Transformers logs; its loggers hand nothing on by themselves."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.get_records("setup") if record.levelno >= logging.ERROR]
    logger.removeHandler(caplog.handler)


@pytest.fixture
def questions(monkeypatch):
    """What the user is asked at the terminal, and denies."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "n")
    return questions


def expected_labels(model, processor, picture):
    """The label map that model and processor give without a pipeline."""
    with torch.no_grad():
        outputs = model(**processor(picture, return_tensors="pt"))
    return processor.post_process_semantic_segmentation(outputs, target_sizes=[picture.size[::-1]])[0].numpy()


def test_masks_have_the_images_size_and_the_configs_names(segmenter, model, processor, pictures):
    for picture, segments in zip(pictures, segmenter(pictures), strict=True):
        labels = expected_labels(model, processor, picture)
        found = np.unique(labels)
        assert len(found) > 1
        assert [segment["label"] for segment in segments] == [NAMES[label] for label in found]
        for label, segment in zip(found, segments, strict=True):
            assert segment["mask"].size == picture.size
            np.testing.assert_array_equal(segment["mask"], 255 * (labels == label))


def test_a_picture_may_be_given_by_its_path(segmenter, pictures, tmp_path):
    pictures[0].save(tmp_path / "picture.png")
    assert segmenter(str(tmp_path / "picture.png")) == segmenter(pictures[0])


def test_transformers_does_not_call_the_model_unsupported(errors, segmenter):
    assert errors() == []


def test_nobody_is_asked_to_trust_code_that_the_plugin_has(questions, segmenter):
    assert questions == []
