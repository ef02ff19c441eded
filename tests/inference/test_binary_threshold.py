"""The threshold of binary models: one number of the image processor, in whichever way an image is segmented."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer import (
    InferenceOptions,
    SegFormerConfig,
    SegFormerForSemanticSegmentation,
    SegFormerImageProcessor,
    SegFormerPredictor,
)
from hf_segformer.conversion.to_transformers import transformers_processor
from hf_segformer.export.exportable import DeployedSegFormer, SegFormerWithProcessing
from hf_segformer.export.verification import ParityReport
from hf_segformer.inference.segmenter import Segmenter
from hf_segformer.inference.tiling import segment_rows
from tests.support.tiny import TINY

THRESHOLD = 0.62
SIZE = (64, 96)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, id2label={0: "crack"})).eval()
    with torch.no_grad():
        model.decode_head.classifier.weight.normal_(0, 3)
    return model


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def processor():
    return SegFormerImageProcessor(do_resize=False, binary_threshold=THRESHOLD)


def probability_of(model, processor, image):
    """The foreground's probability (H, W), by PyTorch's own operations."""
    with torch.no_grad():
        logits = model(processor(image, return_tensors="pt").pixel_values).logits
    return torch.nn.functional.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False)[0, 0].sigmoid()


def test_every_way_of_segmenting_uses_it(model, processor, image):
    probability = probability_of(model, processor, image)
    expected = (probability > THRESHOLD).numpy()
    assert (expected != (probability > 0.5).numpy()).mean() > 0.02
    predictor = SegFormerPredictor(model, processor)
    np.testing.assert_array_equal(predictor(image).segmentation, expected)
    found = predictor(image, with_probabilities=True)
    np.testing.assert_array_equal(found.segmentation, expected)
    np.testing.assert_allclose(found.probabilities[1], probability, atol=1e-6)

    tile = np.asarray(image).transpose(2, 0, 1)
    for scales in ((1.0,), (1.0, 1.0)):  # of one view and, as the mean of two, of several
        options = InferenceOptions(tile_size=128, tile_overlap=32, scales=scales)
        segmenter = Segmenter(model, processor, options)
        rows = segment_rows(*SIZE, options, lambda tiles, segmenter=segmenter: segmenter.tile_logits([tile]))
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in rows]), expected)

    graph = SegFormerWithProcessing(DeployedSegFormer(model), processor)
    exported = graph(torch.from_numpy(np.array(image))[None])
    assert (exported[0].numpy() == expected).mean() > 0.999
    logits = model(processor(image, return_tensors="pt").pixel_values).logits.detach()
    report = ParityReport.of_segmentation((1,), exported, logits, SIZE, processor.binary_logit)
    assert report.pixel_agreement > 0.999
    assert ParityReport.of_segmentation((1,), exported, logits, SIZE).pixel_agreement < 0.98


def test_mean_probabilities_are_compared_with_it(model, processor, image):
    segmenter = Segmenter(model, processor, InferenceOptions(flip=True))
    views = segmenter.preprocess(image)
    [(segmentation, probabilities)] = segmenter.predict_probabilities(views, [SIZE])
    assert ((probabilities[1] > THRESHOLD).long() == segmentation).float().mean() > 0.999
    assert torch.equal(segmenter.predict(views, [SIZE])[0], segmentation)


def test_it_is_saved_and_means_nothing_for_several_classes(tmp_path, processor, caplog):
    processor.save_pretrained(tmp_path)
    assert SegFormerImageProcessor.from_pretrained(tmp_path).binary_threshold == THRESHOLD
    logits = torch.randn(1, 3, 5, 7)
    default = SegFormerImageProcessor()
    assert (default.binary_threshold, default.binary_logit) == (0.5, 0.0)
    for each in (processor, default):
        [found] = each.post_process_semantic_segmentation({"logits": logits})
        assert torch.equal(found, logits[0].argmax(dim=0))
    [given] = processor.post_process_semantic_segmentation({"logits": logits[:, :1]}, threshold=0.5)
    assert torch.equal(given, (logits[0, 0] > 0).long())
    assert "binary_threshold" not in transformers_processor(processor)
    assert "binary_threshold is 0.62, which Transformers' own processor does not have" in caplog.text


@pytest.mark.parametrize("value", [0, 1, 1.5, float("nan"), "0.5", None])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match=r"binary_threshold is .*; expected a number above 0 and below 1"):
        SegFormerImageProcessor(binary_threshold=value)
