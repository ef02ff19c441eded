"""Exporters and quantizers that users call themselves: right logits at several sizes and batches."""

import shutil
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from hf_segformer import SegFormerForSemanticSegmentation

SHAPES = [(2, 64, 96), (1, 97, 131), (3, 128, 72)]
EXAMPLE = torch.linspace(-2, 2, 2 * 3 * 64 * 96).view(2, 3, 64, 96)
DYNAMIC = {"pixel_values": {0: Dim("batch"), 2: Dim("height", min=64), 3: Dim("width", min=64)}}

# Of the exporters themselves, and the tracer's note that Python looks at sizes.
pytestmark = pytest.mark.filterwarnings("ignore")


class Logits(nn.Module):
    """The model with a tensor as its output, as exporters want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        """Return the logits."""
        return self.model(pixel_values).logits


@pytest.fixture(params=["sdpa", "eager"])
def network(request, tiny_config):
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(tiny_config(attn_implementation=request.param))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Logits(model).eval().requires_grad_(False)


def assert_right(run, network, tolerance=2e-5):
    for batch, height, width in SHAPES:
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected, found = network(images), torch.as_tensor(run(images))
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def session_of(path):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})[0]


def export_by_torchscript(network, path):
    pytest.importorskip("onnx")
    axes = {0: "batch", 2: "height", 3: "width"}
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    torch.onnx.export(
        network, (EXAMPLE,), path, dynamo=False, dynamic_axes=dict.fromkeys(("pixel_values", "logits"), axes), **names
    )
    return path


def test_torch_jit_trace(network, tmp_path):
    traced = torch.jit.trace(network, EXAMPLE, check_trace=False)
    traced.save(tmp_path / "model.pt")
    assert_right(torch.jit.load(tmp_path / "model.pt"), network)


def test_torch_jit_freeze(network):
    assert_right(torch.jit.freeze(torch.jit.trace(network, EXAMPLE, check_trace=False)), network)


@pytest.mark.slow
def test_torch_export(network):
    assert_right(export(network, (EXAMPLE,), dynamic_shapes=DYNAMIC).module(), network)


def test_onnx_by_torchscript(network, tmp_path):
    assert_right(session_of(export_by_torchscript(network, tmp_path / "model.onnx")), network)


@pytest.mark.slow
def test_onnx_by_dynamo(network, tmp_path):
    pytest.importorskip("onnxscript")
    torch.onnx.export(network, (EXAMPLE,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    assert_right(session_of(tmp_path / "model.onnx"), network)


@pytest.mark.slow
def test_openvino_convert_model(network):
    openvino = pytest.importorskip("openvino")
    converted = openvino.convert_model(network, example_input=EXAMPLE)
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_right(lambda images: compiled([images.numpy()])[0], network)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_aot_inductor(network, tmp_path):
    program = export(network, (EXAMPLE,), dynamic_shapes=DYNAMIC)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_right(torch._inductor.aoti_load_package(path), network)


def test_dynamic_quantization(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    assert_right(quantized, network, tolerance=0.15)  # eight bits, over a dozen layers
    traced = torch.jit.trace(quantized, EXAMPLE, check_trace=False)
    assert_right(traced, quantized, tolerance=0.05)  # the range of inputs is that of each call


def test_static_quantization_of_the_onnx_graph(network, tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Calibration(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"pixel_values": torch.randn(2, 3, 64, 96).numpy()} for _ in range(4)])

        def get_next(self):
            return next(self.batches, None)

    path = export_by_torchscript(network, tmp_path / "model.onnx")
    quantization.quantize_static(path, tmp_path / "int8.onnx", Calibration(), per_channel=True)
    assert_right(session_of(tmp_path / "int8.onnx"), network, tolerance=0.25)
