"""The predictor: predictions of evaluation, at the size of each image, in order, with errors in their turn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.config import InferenceOptions
from hf_segformer.evaluation.evaluate import evaluate
from hf_segformer.inference.predictor import find_device
from hf_segformer.inference.segmenter import Segmenter, predict, unique_names
from hf_segformer.visualization import default_palette
from tests.support.tiny import TINY

OPTIONS = {
    "whole": InferenceOptions(),
    "flip": InferenceOptions(flip=True),
    "scales": InferenceOptions(scales=[0.75, 1.5]),
    "window": InferenceOptions(sliding_window=64),
    "all": InferenceOptions(sliding_window=96, stride=64, flip=True, scales=[1.0, 1.5]),
}


def lively(**overrides):
    """Untrained model whose predictions vary within an image."""
    torch.manual_seed(1)
    config = SegFormerConfig(**{**TINY, "num_labels": 5, **overrides})
    model = SegFormerForSemanticSegmentation(config).eval()
    with torch.no_grad():
        for parameter in model.decode_head.parameters():
            parameter.mul_(3)
        pixels = torch.randn(1, config.num_channels, 64, 96)
        model.decode_head.classifier.bias -= model(pixels).logits.mean(dim=(0, 2, 3))
    return model


def make_image(height=70, width=110, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def predictor(options=None, batch_size=3, model=None, **processing):
    processor = SegFormerImageProcessor(**{"do_resize": False, **processing})
    options = replace(options or InferenceOptions(), batch_size=batch_size)
    return SegFormerPredictor(model or lively(), processor, options)


def share_of_others(labels, expected):
    assert labels.shape == tuple(expected.shape)
    assert len(np.unique(labels)) > 1, "a map of one class proves nothing"
    return (labels != expected.numpy()).mean()


@pytest.mark.parametrize("num_labels", [1, 5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_segmentation_equals_that_of_evaluation(options, num_labels):
    found = predictor(options, model=lively(num_labels=num_labels))
    images = [make_image(*size, seed=seed) for seed, size in enumerate([(70, 110), (90, 66), (70, 110)])]
    for image, prediction in zip(images, found(images), strict=True):
        expected = predict(found.model, found.processor, image, (image.height, image.width), options)
        assert share_of_others(prediction.segmentation, expected) < 1e-3  # rounding differs in batches
        alone = found(image).segmentation
        assert np.array_equal(alone, expected.numpy())
        assert alone.dtype == np.uint8


@pytest.mark.parametrize("num_labels", [1, 5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_probabilities_agree_with_the_segmentation(options, num_labels):
    found = predictor(options, model=lively(num_labels=num_labels))
    for prediction in found([make_image(), make_image(seed=1)], with_probabilities=True):
        assert prediction.probabilities.shape == (len(found.names), 70, 110)
        assert prediction.probabilities.dtype == np.float32
        np.testing.assert_allclose(prediction.probabilities.sum(axis=0), 1, atol=1e-5)
        chosen = np.take_along_axis(prediction.probabilities, prediction.segmentation[None].astype(int), 0)[0]
        np.testing.assert_allclose(chosen, prediction.probabilities.max(axis=0), atol=1e-5)
    assert found(make_image()).probabilities is None


def test_binary_model_has_two_names_and_two_colours():
    found = predictor(model=lively(num_labels=1, id2label={0: "crack"}))
    assert found.names == ("background", "crack")
    assert len(found.palette) == 2
    found = predictor(model=lively(num_labels=1, palette=[[1, 2, 3]]))
    assert found.palette[1] == (1, 2, 3)


def test_palette_of_the_configuration_or_default(tmp_path):
    assert predictor().palette == default_palette(5)
    colors = [[index, 0, 255 - index] for index in range(5)]
    model = lively()
    model.config.palette = colors
    model.save_pretrained(tmp_path)
    SegFormerImageProcessor(size=64).save_pretrained(tmp_path)
    assert SegFormerPredictor.from_pretrained(tmp_path).palette == [tuple(color) for color in colors]
    for wrong in (colors[:3], [[0, 0]] * 5, [[0, 0, 256]] * 5, "red", 7):
        model.config.palette = wrong
        with pytest.raises(ValueError, match="the palette of the model's configuration is"):
            predictor(model=model)


def batches_of(found, monkeypatch):
    sizes, own = [], found.predict
    monkeypatch.setattr(found, "predict", lambda batch, **others: (sizes.append(len(batch)), own(batch, **others))[1])
    return sizes


def test_images_of_one_prepared_size_share_a_batch_in_order(monkeypatch):
    found = predictor(batch_size=2, do_resize=True, size={"shortest_edge": 32}, keep_ratio=True, size_divisor=32)
    sizes = [(64, 96), (96, 64), (66, 96), (96, 64), (64, 96)]  # the first and the third prepared alike
    batches = batches_of(found, monkeypatch)
    shapes = [each.segmentation.shape for each in found(make_image(*size) for size in sizes)]
    assert shapes == sizes
    assert batches == [2, 2, 1]


def test_large_images_are_batches_of_one(monkeypatch):
    monkeypatch.setattr("hf_segformer.inference.pipeline.BATCH_PIXELS", 10_000)
    found = predictor()
    batches = batches_of(found, monkeypatch)
    assert len(list(found([make_image()] * 3))) == 3
    assert batches == [1, 1, 1]


def test_endless_iterables_are_read_ahead_within_bounds():
    taken = []

    def endless():
        while True:
            taken.append(make_image())
            yield taken[-1]

    results = predictor(batch_size=2)(endless())
    assert not taken
    assert next(results).segmentation.shape == (70, 110)
    assert len(taken) == 4
    next(results), next(results)
    assert len(taken) == 6


def test_errors_are_raised_in_order(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    good = make_image()
    good.save(tmp_path / "good.png")
    bands, nan = np.zeros((70, 110, 5), np.uint8), np.full((3, 70, 110), np.nan)
    np.save(tmp_path / "bands.npy", bands)
    files = [tmp_path / name for name in ("good.png", "text.png", "none.png", "bands.npy")]
    inputs = [*files[:2], good, files[2], bands, nan, 7, good, files[3]]
    results, outcomes = predictor()(inputs), []
    for _ in inputs:
        try:
            outcomes.append(next(results).segmentation.shape)
        except (ValueError, OSError) as error:
            outcomes.append(str(error))
    assert [each for each in outcomes if each == (70, 110)] == [(70, 110)] * 3
    assert outcomes[1].startswith(f"{tmp_path / 'text.png'}: ")
    assert outcomes[3] == f"{tmp_path / 'none.png'}: No such file or directory"
    assert outcomes[4].startswith("image 4 has 5 bands")
    assert outcomes[5].startswith("image 5 holds NaN")
    assert outcomes[6].startswith("image 6 is a int")
    assert outcomes[8].startswith(f"{files[3]} has 5 bands")
    with pytest.raises(StopIteration):
        next(results)


def test_error_of_the_iterable_comes_after_the_images_before_it():
    def broken():
        yield make_image()
        raise RuntimeError("the camera is gone")

    results = predictor()(broken())
    assert next(results).segmentation.shape == (70, 110)
    with pytest.raises(RuntimeError, match="camera"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_image_refused_by_the_network_fails_alone(monkeypatch):
    found = predictor()
    own = found.model.forward

    def refuse(pixel_values, **others):
        if pixel_values.shape[-2:] == (40, 50):
            raise ValueError("40x50 is too small")
        return own(pixel_values, **others)

    monkeypatch.setattr(found.model, "forward", refuse)
    results = found([make_image(), make_image(40, 50), make_image(40, 50), make_image()])
    assert next(results).segmentation.shape == (70, 110)
    for index in (1, 2):
        with pytest.raises(ValueError, match=f"^image {index}: 40x50 is too small"):
            next(results)
    assert next(results).segmentation.shape == (70, 110)


def test_images_of_any_kind_at_their_upright_size(tmp_path):
    turned, exif = make_image(), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    array = np.array(make_image())
    np.save(tmp_path / "array.npy", array)
    found = predictor()
    assert found(tmp_path / "turned.jpg").segmentation.shape == (110, 70)
    expected = found(make_image()).segmentation
    same = [array, array.transpose(2, 0, 1), torch.from_numpy(array), str(tmp_path / "array.npy"), array[None]]
    for image in same[:4]:
        assert np.array_equal(found(image).segmentation, expected)
    assert np.array_equal(next(found(same[4])).segmentation, expected)
    for image in (array[..., 0], make_image().convert("RGBA"), array.astype(np.uint16) * 257):
        assert found(image).segmentation.shape == (70, 110)


def test_bands_of_measurements():
    model = lively(num_channels=4)
    found = predictor(model=model, image_mean=[0.5] * 4, image_std=[0.3] * 4)
    bands = np.random.default_rng(0).random((40, 50, 4)).astype(np.float32)
    expected = predict(model, found.processor, bands, (40, 50))
    assert np.array_equal(found(bands).segmentation, expected.numpy())


def test_more_than_256_classes_take_16_bits():
    assert predictor(model=lively(num_labels=300))(make_image()).segmentation.dtype == np.uint16


def test_images_read_ahead_are_not_kept(monkeypatch):
    found, kept = predictor(), []
    own = found.predict
    monkeypatch.setattr(found, "predict", lambda batch, **others: (kept.extend(batch), own(batch, **others))[1])
    assert [each.segmentation.shape for each in found([make_image()] * 2)] == [(70, 110)] * 2
    assert [each.image for each in kept] == [None, None]
    assert found.prepare(make_image()).image.size == (110, 70)


def test_npy_files_with_pickles_are_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects\.npy"):
        predictor()(tmp_path / "objects.npy")


def test_mode_of_the_model_is_restored():
    found = predictor(model=lively().train())
    found(make_image())
    assert found.model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in found.model.parameters())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: predictor(batch_size=0), "evaluation.batch_size is 0"),
        (lambda: predictor()(7), "images is a int"),
        (lambda: find_device("cuda:99"), "device is 'cuda:99', which does not exist here"),
        (lambda: find_device("toaster"), "device is 'toaster', which does not exist here"),
    ],
)
def test_invalid_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_processes_share_the_accelerators(monkeypatch):
    for name, value in {"is_available": True, "current_accelerator": torch.device("meta"), "device_count": 2}.items():
        monkeypatch.setattr(torch.accelerator, name, lambda value=value: value)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert find_device() == find_device("meta") == torch.device("meta", 1)
    assert find_device("meta:0") == torch.device("meta", 0)
    assert find_device("cpu") == torch.device("cpu")


def test_from_pretrained_takes_device_and_dtype(tmp_path):
    lively().save_pretrained(tmp_path)
    SegFormerImageProcessor(do_resize=False).save_pretrained(tmp_path)
    found = SegFormerPredictor.from_pretrained(
        tmp_path, device="cpu", options=InferenceOptions(dtype="bfloat16", batch_size=2)
    )
    assert (found.model.dtype, found.options.batch_size) == (torch.bfloat16, 2)
    whole = SegFormerPredictor.from_pretrained(tmp_path, device="cpu")(make_image()).segmentation
    assert (found(make_image()).segmentation == whole).mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_compute_in_float32_on_a_cpu(dtype):
    model = lively().to(dtype)
    found = predictor(model=model)
    assert found.model.dtype == torch.float32
    assert model.dtype == dtype
    expected = predictor(model=lively().to(dtype).float())(make_image()).segmentation
    assert np.array_equal(found(make_image()).segmentation, expected)


def test_half_precision_is_reported_once_with_the_remedy(monkeypatch):
    messages = []
    monkeypatch.setattr("hf_segformer.inference.segmenter.logger.warning_once", messages.append)
    predictor(model=lively())
    assert messages == []
    predictor(model=lively().half())
    assert len(messages) == 1
    assert "dtype=torch.float32" in messages[0]
    assert "InferenceOptions(dtype='float16')" in messages[0]


def test_dtype_casts_a_copy_in_predictor_evaluation_and_tiles():
    model = lively()
    options = InferenceOptions(dtype="bfloat16")
    found = predictor(options, model=model)
    assert (model.dtype, found.model.dtype) == (torch.float32, torch.bfloat16)
    cast = lively().to(torch.bfloat16)
    processor = found.processor
    pixels = processor(make_image(), return_tensors="pt").pixel_values.to(torch.bfloat16)
    with torch.no_grad():
        logits = cast(pixels).logits
    [expected] = processor.post_process_semantic_segmentation({"logits": logits}, [(70, 110)])
    assert np.array_equal(found(make_image()).segmentation, expected.numpy())
    row = {"image": make_image(), "label": expected.numpy()}
    assert evaluate(model, processor, [row], options, progress=False).metrics["overall_accuracy"] == 1.0
    tile = np.asarray(make_image()).transpose(2, 0, 1)
    torch.testing.assert_close(found.segmenter.tile_logits([tile]), logits.float(), rtol=0, atol=0)


def test_dtype_of_a_model_with_a_fixed_type_is_refused():
    class Fixed(torch.nn.Module):
        device, dtype, config = torch.device("cpu"), torch.float32, lively().config

    with pytest.raises(ValueError, match="dtype is bfloat16; expected float32"):
        Segmenter(Fixed(), SegFormerImageProcessor(), InferenceOptions(dtype="bfloat16"))


def test_unique_names_never_collide():
    assert unique_names(["a", "b"]) == ["a", "b"]
    for names in (["a", "a", "a (0)"], ["a", "a", "a (1)", "a (0)"], ["a (0)", "a (0)", "a (0) (0)"]):
        assert len(set(unique_names(names))) == len(names)
        assert all(name in found for name, found in zip(names, unique_names(names), strict=True))
