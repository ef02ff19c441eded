"""Description of a model inside its file; tests/export/test_exporters.py reads it back in the runtimes."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.export.metadata import describe_model, openvino_info
from tests.support.tiny import TINY

NAMES = {0: "sky", 1: "traffic  light", 2: 'a "quoted" \u00e9t\u00e9'}
PALETTE = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def build(**options):
    return SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, **options))


def test_names_palette_and_processor_can_be_read_back():
    model = build(id2label=NAMES, palette=PALETTE)
    processor = SegFormerImageProcessor(size={"shortest_edge": 64}, keep_ratio=True, size_divisor=32)
    found = describe_model(model, processor, include_processing=True)
    assert json.loads(found["names"]) == list(NAMES.values())
    assert json.loads(found["palette"]) == PALETTE
    assert json.loads(found["include_processing"]) is True
    again = SegFormerImageProcessor(**json.loads(found["processor"]))
    assert again.to_dict() == processor.to_dict()


def test_a_binary_model_has_two_names_and_colours():
    found = describe_model(build(id2label={0: "crack"}), SegFormerImageProcessor(binary_threshold=0.3), False)
    assert json.loads(found["names"]) == ["background", "crack"]
    assert len(json.loads(found["palette"])) == 2
    assert json.loads(found["processor"])["binary_threshold"] == 0.3


def test_no_path_enters():
    model, processor = build(num_labels=3), SegFormerImageProcessor()
    model.name_or_path = processor.name_or_path = model.config.name_or_path = "/home/somebody/patients"
    assert "somebody" not in str(openvino_info(describe_model(model, processor, False)))


def test_a_palette_of_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match=r"the palette .* expected .* for each of 3 classes"):
        describe_model(build(num_labels=3, palette=PALETTE[:2]), SegFormerImageProcessor(), False)


@pytest.mark.parametrize(
    "keywords", [{}, {"do_normalize": False}, {"do_rescale": False, "image_mean": [9, 8, 7], "image_std": [3, 4, 5]}]
)
def test_openvinos_mean_and_scale_give_the_processors_pixels(keywords):
    processor = SegFormerImageProcessor(do_resize=False, **keywords)
    info = openvino_info(describe_model(build(num_labels=3), processor, include_processing=False))
    mean, scale = (np.array(info[name].split(), float)[:, None, None] for name in ("mean_values", "scale_values"))
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    expected = processor(Image.fromarray(image), return_tensors="np").pixel_values[0]
    np.testing.assert_allclose((image.transpose(2, 0, 1) - mean) / scale, expected, atol=2e-5, rtol=2e-6)
    assert info["reverse_input_channels"] == "False"


def test_openvinos_labels_are_one_word_each_and_a_graph_with_processing_needs_no_mean():
    info = openvino_info(describe_model(build(id2label=NAMES), SegFormerImageProcessor(), include_processing=True))
    assert info["labels"].split(" ") == ["sky", "traffic_light", 'a_"quoted"_\u00e9t\u00e9']
    assert info["model_type"] == "Segmentation"
    assert not info.keys() & {"mean_values", "scale_values", "reverse_input_channels"}
    assert "mean_values" not in openvino_info(
        describe_model(build(num_labels=3), SegFormerImageProcessor(value_range=[0, 4000]), include_processing=False)
    )
