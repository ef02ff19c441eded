"""The inside view: attention as the model computes it, components as SciPy's, uncertainty by definition."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from hf_segformer import (
    SegFormerConfig,
    SegFormerForSemanticSegmentation,
    SegFormerImageProcessor,
    SegFormerPredictor,
)
from hf_segformer.evaluation.inspection import (
    Inspection,
    _panel_size,
    draw_inspection,
    inspect_image,
    principal_components,
    relative_entropy,
)
from hf_segformer.inference.segmenter import Segmenter
from hf_segformer.visualization import default_palette
from tests.support.tiny import TINY


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))


@pytest.fixture
def processor():
    return SegFormerImageProcessor(do_resize=False)


@pytest.mark.parametrize("point", [(0, 0), (89, 49), (30, 20)])
def test_attention_is_the_models_own(model, image, processor, point):
    found = inspect_image(model, processor, image, point).attention
    [view] = Segmenter(model, processor).preprocess(image)
    with torch.no_grad():
        outputs = model(view, output_attentions=True, output_hidden_states=True)
    for stage, (weights, features) in enumerate(zip(found, outputs.hidden_states, strict=True)):
        height, width = features.shape[-2:]
        assert weights.shape == (height, width)
        row, column = int((point[1] + 0.5) / 50 * height), int((point[0] + 0.5) / 90 * width)
        maps = outputs.attentions[stage][0, :, row * width + column].mean(dim=0)  # (M,)
        ratio = model.config.sr_ratios[stage]
        expected = np.zeros((height, width))
        columns = max(1, width // ratio)
        for y, x in np.ndindex(height, width):
            if (y // ratio < max(1, height // ratio)) and (x // ratio < columns):
                expected[y, x] = maps[y // ratio * columns + x // ratio] / ratio**2
        np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_prediction_is_that_of_the_segmenter(model, image, processor):
    found = inspect_image(model, processor, image)
    segmenter = Segmenter(model, processor)
    [(prediction, probabilities)] = segmenter.predict_probabilities(segmenter.preprocess(image), [(50, 90)])
    assert (found.prediction == prediction.numpy()).mean() > 0.999  # ties of rounding apart
    np.testing.assert_array_equal(found.runner_up, probabilities.topk(2, dim=0).indices[1])
    assert found.point == (25, 45)
    expected = stats.entropy(probabilities.numpy(), axis=0) / np.log(5)
    np.testing.assert_allclose(found.uncertainty, expected, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_a_binary_model_keeps_to_its_threshold(image, threshold):
    config = SegFormerConfig(**TINY, num_labels=1)
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(config).eval()
    model.decode_head.classifier.weight.data *= 30
    processor = SegFormerImageProcessor(do_resize=False, binary_threshold=threshold)
    found = inspect_image(model, processor, image)
    expected = SegFormerPredictor(model, processor)(image).segmentation
    assert 0.02 < expected.mean() < 0.98
    assert (found.prediction == expected).mean() > 0.999  # ties of rounding apart
    np.testing.assert_array_equal(found.runner_up, 1 - found.prediction)


def test_files_are_read_as_for_prediction(model, tmp_path):
    values = np.random.default_rng(0).integers(0, 4000, (50, 90, 3)).astype(np.uint16)
    np.save(tmp_path / "a.npy", values)
    processor = SegFormerImageProcessor(do_resize=False, value_range=(0, 4095))
    found = inspect_image(model, processor, str(tmp_path / "a.npy"))
    assert (found.prediction == SegFormerPredictor(model, processor)(values).segmentation).mean() > 0.999


def test_the_model_is_left_as_it_was(model, image, processor):
    model.train()
    inspect_image(model, processor, image)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="the image"):
        inspect_image(model, processor, Image.new("RGB", (0, 5)))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_components_are_those_of_the_singular_value_decomposition():
    features = torch.randn(12, 9, 7) * torch.logspace(1, -1, 12)[:, None, None]
    found = principal_components(features)
    values = features.flatten(1).T.double().numpy()
    values = values - values.mean(axis=0)
    left, strength, _ = np.linalg.svd(values, full_matrices=False)
    for place in range(3):
        scores = found[..., place].ravel()
        assert scores.min() == 0
        assert scores.max() == 1
        inner = (scores > 0) & (scores < 1)
        assert abs(np.corrcoef(scores[inner], (left * strength)[inner, place])[0, 1]) > 0.999
    np.testing.assert_array_equal(found, principal_components(features.clone()))


def test_features_that_do_not_vary_are_grey():
    assert (principal_components(torch.ones(8, 4, 5)) == 0.5).all()
    assert principal_components(torch.randn(2, 4, 5)).shape == (4, 5, 3)


def test_entropy_of_certainty_and_ignorance():
    probabilities = torch.stack([torch.full((2, 3), 0.25)] * 4)
    assert relative_entropy(probabilities).allclose(torch.ones(2, 3))
    assert relative_entropy(torch.eye(4)[:, :, None]).eq(0).all()


@pytest.mark.parametrize("num_labels", [1, 5])
def test_everything_is_drawn_in_one_image(tiny_config, image, processor, num_labels):
    model = SegFormerForSemanticSegmentation(tiny_config(num_labels=num_labels)).eval()
    inspection = inspect_image(model, processor, image, (5, 6))
    num_classes = max(2, num_labels)
    drawn = draw_inspection(inspection, [f"class {k}" for k in range(num_classes)], default_palette(num_classes))
    assert drawn.mode == "RGB"
    assert drawn.width > 4 * 320


@pytest.mark.parametrize(("width", "panel"), [(3, (13, 1280)), (1, (4, 1280)), (300, (320, 320))])
def test_a_narrow_image_is_drawn_in_panels_of_bounded_height(width, panel):
    image, zeros = Image.new("RGB", (width, 300)), np.zeros((300, width), int)
    weights = (np.ones((9, 1), np.float32),)
    inspection = Inspection(image, (150, 0), zeros, zeros, zeros / 1.0, weights, (np.ones((9, 1, 3)),))
    assert _panel_size(image) == panel
    drawn = draw_inspection(inspection, ["a", "b"], default_palette(2))
    assert drawn.width == 4 * (320 + 12) + 12
    assert 2 * panel[1] < drawn.height < 2 * panel[1] + 200


def test_bands_are_inspected_too(tiny_config):
    model = SegFormerForSemanticSegmentation(tiny_config(num_channels=5)).eval()
    processor = SegFormerImageProcessor(do_resize=False, image_mean=[0.0] * 5, image_std=[1.0] * 5, do_rescale=False)
    inspection = inspect_image(model, processor, np.random.default_rng(0).normal(size=(5, 40, 64)))
    assert inspection.image.size == (64, 40)


def test_points_outside_are_refused(model, image, processor):
    with pytest.raises(ValueError, match="point is 90 3; expected a column below 90 and a row below 50"):
        inspect_image(model, processor, image, (90, 3))
