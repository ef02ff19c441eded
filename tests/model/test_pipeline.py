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
def images():
    """Noise, none of it square."""
    values = np.random.default_rng(0)
    return [Image.fromarray(values.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


@pytest.fixture(params=[2, 5], ids=["two labels", "five labels"])
def model(request):
    """A tiny model; the tests check that it finds several labels in noise."""
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
    """Errors that Transformers logs; its loggers do not propagate."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.get_records("setup") if record.levelno >= logging.ERROR]
    logger.removeHandler(caplog.handler)


@pytest.fixture
def questions(monkeypatch):
    """Questions at the terminal, answered with no."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "n")
    return questions


def expected_segmentation(model, processor, image):
    """The segmentation map of model and processor without a pipeline."""
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    return processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0].numpy()


def test_masks_have_the_images_size_and_the_configs_names(segmenter, model, processor, images):
    for image, segments in zip(images, segmenter(images), strict=True):
        labels = expected_segmentation(model, processor, image)
        found = np.unique(labels)
        assert len(found) > 1
        assert [segment["label"] for segment in segments] == [NAMES[label] for label in found]
        for label, segment in zip(found, segments, strict=True):
            assert segment["mask"].size == image.size
            np.testing.assert_array_equal(segment["mask"], 255 * (labels == label))


def test_an_image_may_be_given_by_its_path(segmenter, images, tmp_path):
    images[0].save(tmp_path / "image.png")
    assert segmenter(str(tmp_path / "image.png")) == segmenter(images[0])


def test_the_pipeline_supports_the_model(errors, segmenter):
    assert errors() == []


def test_the_plugin_needs_no_remote_code(questions, segmenter):
    assert questions == []


def test_one_label_is_refused_with_the_remedy(processor, images):
    """Transformers would call the background by the label's name, and fail on the label."""
    config = SegFormerConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2])
    config.id2label = {0: "lesion"}
    model = SegFormerForSemanticSegmentation(config).eval()
    segment = pipeline("image-segmentation", model=model, image_processor=processor, device="cpu")
    with pytest.raises(ValueError, match=r"the model has 1 label.*SegFormerPredictor"):
        segment(images[0])
    assert expected_segmentation(model, processor, images[0]).shape == images[0].size[::-1]
