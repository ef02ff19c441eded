"""Exported files in their own runtimes.

Axes: B images, C channels, H W sides of an image, K classes, h w sides of the logits.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SemanticSegmenterOutput

from ..configuration_segformer import SegFormerConfig
from .exportable import MIN_SIDE

Runtime = Callable[[Tensor], Tensor]


def require(*names: str) -> None:
    """Raise ValueError where an optional package is missing."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise ValueError(f"{name} is not installed: pip install 'hf-segformer[export]'") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log lines below errors, and one deprecation, of exporters and quantisers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # PyTorch 2.13 copies its own graph signatures in a deprecated way.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        logging.disable(before)


def onnx_runtime(path: str | Path) -> Runtime:
    """Load an ONNX file in ONNX Runtime, with PyTorch's number of threads; idle ones sleep."""
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds have no base in common
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is no model that ONNX Runtime can load: {reason}") from error
    name = session.get_inputs()[0].name
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])


def open_vino(path: str | Path) -> Runtime:
    """Load an OpenVINO or ONNX file in OpenVINO, in float32 even where the processor has a shorter type."""
    require("openvino")
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    return lambda inputs: torch.from_numpy(compiled([inputs.numpy()])[0])


def torch_program(path: str | Path) -> Runtime:
    """Load a file of torch.export in PyTorch."""
    program = torch.export.load(path).module()

    def run(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return program(inputs)

    return run


class RuntimeModel(nn.Module):
    """Adapter of a runtime to the interface of a segmentation model, for evaluation and for engines.

    Args:
        runtime: pixel values -> logits.
        config: of the model that was exported.
        model: computes images with a side below `MIN_SIDE`, which the graph does not take; None refuses them.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, runtime: Runtime, config: SegFormerConfig, model: nn.Module | None = None):
        super().__init__()
        self.runtime, self.config, self.model = runtime, config, model

    def forward(self, pixel_values: Tensor) -> SemanticSegmenterOutput:
        """(B, C, H, W) -> `logits` (B, K, h, w)."""
        if self.model is not None and min(pixel_values.shape[-2:]) < MIN_SIDE:
            return self.model(pixel_values)
        return SemanticSegmenterOutput(logits=self.runtime(pixel_values))


__all__ = ["Runtime", "RuntimeModel", "onnx_runtime", "open_vino", "quiet", "require", "torch_program"]
