"""Engines behind the predictor: their results, the cache of their files, and what they refuse."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.modeling_outputs import SemanticSegmenterOutput

from hf_segformer import SegFormerForSemanticSegmentation, SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.export import engines
from hf_segformer.inference.engines import engine_names, with_engine
from hf_segformer.inference.ensemble import Ensemble
from tests.support.commands import assert_usage_error, run
from tests.support.tiny import logits_of

IMAGES = [Image.effect_noise((width, height), 60).convert("RGB") for width, height in ((96, 70), (150, 101), (40, 50))]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(engines.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def network(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_the_names_are_those_of_this_package_and_of_others(monkeypatch):
    assert engine_names() == ("torch", "compiled", "onnxruntime", "openvino")


def test_torch_is_the_model_itself(network):
    assert with_engine(network, "torch") is network


def test_an_unknown_engine_is_refused_with_the_known_ones(network):
    with pytest.raises(ValueError, match=r"^engine is 'tensorrt'; expected one of torch, compiled, onnxruntime, openv"):
        SegFormerPredictor(network, SegFormerImageProcessor(), engine="tensorrt")


def test_a_third_partys_engine_is_found_by_its_entry_point(network, monkeypatch):
    class Point:
        name, value = "mine", f"{__name__}:double"

    monkeypatch.setattr("hf_segformer.inference.engines.entry_points", lambda group: [Point])
    monkeypatch.setattr("hf_segformer.inference.engines.import_module", lambda name: Doubled)
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(with_engine(network, "mine")(pixels).logits, 2 * logits_of(network, pixels))


class Doubled:
    @staticmethod
    def double(model):
        class Double(torch.nn.Module):
            config = model.config

            @torch.no_grad()
            def forward(self, pixels):
                return SemanticSegmenterOutput(logits=2 * model(pixels).logits)

        return Double()


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "file"), [("onnxruntime", "model.onnx"), ("openvino", "model.xml")])
def test_a_runtime_predicts_as_pytorch_from_a_file_that_is_kept(network, cache, engine, file, monkeypatch):
    pytest.importorskip(engine)
    processor = SegFormerImageProcessor(do_resize=False)
    expected = list(SegFormerPredictor(network, processor)(IMAGES, with_probabilities=True))
    predictor = SegFormerPredictor(network, processor, engine=engine)
    assert predictor.model is network
    for found, wanted in zip(predictor(IMAGES, with_probabilities=True), expected, strict=True):
        assert np.abs(found.probabilities - wanted.probabilities).max() < 1e-4
        assert (found.segmentation == wanted.segmentation).mean() > 0.999
    [folder] = cache.iterdir()
    good = shutil.copytree(folder, cache.parent / "good")
    written = []

    def write(model, target, folder):
        written.append(folder)
        shutil.copytree(good, folder)

    monkeypatch.setattr(engines, "_write", write)
    with_engine(network, engine)
    assert not written  # the file is there
    (folder / file).write_bytes(b"damaged")
    with_engine(network, engine)
    assert written == [folder]
    with torch.no_grad():
        network.decode_head.classifier.bias += 1
    monkeypatch.setattr(engines, "_key", lambda model, target: folder.name)
    with pytest.raises(ValueError, match=f"{engine} gives other logits than PyTorch"):
        with_engine(network, engine)  # other weights under the same name: compared, written again, compared again
    assert written == [folder, folder]


def test_each_member_of_an_ensemble_computes_by_the_engine(network, monkeypatch):
    class Point:
        name, value = "mine", f"{__name__}:double"

    monkeypatch.setattr("hf_segformer.inference.engines.entry_points", lambda group: [Point])
    monkeypatch.setattr("hf_segformer.inference.engines.import_module", lambda name: Doubled)
    ensemble = Ensemble([network, SegFormerForSemanticSegmentation(network.config).eval()])
    pixels = torch.randn(1, 3, 64, 96)
    for found, member in zip(with_engine(ensemble, "mine").members, ensemble.members, strict=True):
        assert torch.equal(found(pixels).logits, 2 * logits_of(member, pixels))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # Inductor's imports
def test_a_compiled_network_predicts_as_pytorch_and_training_mode_is_left_alone(network):
    network.train()
    compiled = with_engine(network, "compiled")
    assert network.training
    network.eval()
    for pixels in (torch.randn(1, 3, 64, 96), torch.randn(2, 3, 40, 50)):
        with torch.no_grad():
            torch.testing.assert_close(compiled(pixels).logits, network(pixels).logits, rtol=1e-4, atol=1e-5)


def test_a_runtime_refuses_other_types_than_float32(network):
    pytest.importorskip("openvino")
    with pytest.raises(
        ValueError, match=r"^the model is float64 on cpu; the engine openvino computes float32 on the CP"
    ):
        with_engine(network.double(), "openvino")


def test_other_logits_are_refused(network):
    with pytest.raises(
        ValueError, match=r"^a runtime gives other logits than PyTorch, by [0-9.e+-]+ of the largest; exp"
    ):
        engines._verify(network, lambda pixels: 1.01 * network(pixels).logits, "a runtime")


def test_a_network_that_cannot_be_compiled_is_refused_with_the_reason(network, monkeypatch):
    def fail(model, dynamic):
        def call(pixels):
            raise RuntimeError("no compiler was found\nmore")

        return call

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(
        ValueError, match=r"^the network cannot be compiled here \(no compiler was found\); use the engine"
    ):
        with_engine(network, "compiled")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cuda"), "--device cuda is given with --engine openvino; expected cpu"),
        (("--dtype", "bfloat16"), "--dtype bfloat16 is given with --engine openvino; expected float32"),
        (("--retries", "2"), "--retries is given without --engine ray, to which it applies"),
    ],
)
def test_the_command_refuses_what_a_runtime_does_not_follow(tmp_path, arguments, message, capsys):
    pytest.importorskip("openvino")
    command = ("predict", tmp_path, tmp_path, "-o", tmp_path / "out", "--engine", "openvino", *arguments)
    assert_usage_error(command, capsys, message)


@pytest.mark.slow
def test_the_command_predicts_by_a_runtime_as_by_pytorch(network, tmp_path):
    pytest.importorskip("onnxruntime")
    network.save_pretrained(tmp_path / "model")
    SegFormerImageProcessor(size=64).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for index, image in enumerate(IMAGES):
        image.save(tmp_path / "images" / f"{index}.png")
    for engine in ("torch", "onnxruntime"):
        out = tmp_path / engine
        assert run("predict", tmp_path / "model", tmp_path / "images", "-o", out, "--engine", engine) == 0
    for index in range(len(IMAGES)):
        found, expected = (
            np.asarray(Image.open(tmp_path / engine / f"{index}_mask.png")) for engine in ("onnxruntime", "torch")
        )
        assert (found == expected).mean() > 0.999
