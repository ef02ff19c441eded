"""Exported files in their own runtimes, and how near their answers are to PyTorch's.

Axes: B pictures, C bands, H W sides of a picture, K classes, h w those of the logits.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import SemanticSegmenterOutput

from ..configuration_segformer import SegFormerConfig
from ..upsampling_segformer import upsample, upsample_argmax

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
    """Without what exporters and quantisers tell their own developers: log lines below errors, and one deprecation."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # PyTorch 2.13 copies its own graph signatures in a way that it deprecates.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        logging.disable(before)


def onnx_runtime(path: str | Path) -> Runtime:
    """An ONNX file in ONNX Runtime, with PyTorch's number of threads; idle ones sleep."""
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])


def open_vino(path: str | Path) -> Runtime:
    """A file of OpenVINO's, or ONNX, in OpenVINO, in float32 even where the processor has something shorter."""
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
    """A file of torch.export in PyTorch."""
    program = torch.export.load(path).module()

    def run(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return program(inputs)

    return run


class RuntimeModel(nn.Module):
    """A runtime where a segmentation model is expected, in `evaluation.evaluate` say.

    Args:
        runtime: pixel values -> logits.
        config: of the model that was exported.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, runtime: Runtime, config: SegFormerConfig):
        super().__init__()
        self.runtime, self.config = runtime, config

    def forward(self, pixel_values: Tensor) -> SemanticSegmenterOutput:
        """(B, C, H, W) -> `logits` (B, K, h, w)."""
        return SemanticSegmenterOutput(logits=self.runtime(pixel_values))


# --- Agreement ---


@dataclass(frozen=True)
class ParityReport:
    """How near a runtime's answers on some inputs are to PyTorch's.

    Attributes:
        shape: of the inputs.
        max_error: largest difference of a logit. Of label maps: by how much, at most, the logit of a pixel's label lies
            below the pixel's best one, in PyTorch.
        relative_error: the same, relative to the largest logit.
        equal_labels: share of the pixels with the same label, at the inputs' height and width.
    """

    shape: tuple[int, ...]
    max_error: float
    relative_error: float
    equal_labels: float

    @classmethod
    def of_logits(cls, shape: Sequence[int], found: Tensor, expected: Tensor, size: Sequence[int]) -> "ParityReport":
        """Of logits (B, K, h, w), for inputs of this shape with sides `size`."""
        if found.shape != expected.shape or not found.isfinite().all():
            return cls(tuple(shape), math.inf, math.inf, 0.0)
        labels = upsample_argmax(found.float(), size), upsample_argmax(expected, size)
        return cls._of(shape, (found - expected).abs().max(), expected, *labels)

    @classmethod
    def of_labels(cls, shape: Sequence[int], found: Tensor, expected: Tensor, size: Sequence[int]) -> "ParityReport":
        """Of label maps (B, H, W), against logits (B, K, h, w)."""
        logits = upsample(expected, size)
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        if found.shape != (len(logits), *size) or found.min() < 0 or found.max() >= logits.shape[1]:
            return cls(tuple(shape), math.inf, math.inf, 0.0)
        gap = logits.amax(1) - logits.gather(1, found.long()[:, None])[:, 0]
        return cls._of(shape, gap.max(), expected, found, logits.argmax(1))

    @classmethod
    def _of(
        cls, shape: Sequence[int], error: Tensor, logits: Tensor, labels: Tensor, expected_labels: Tensor
    ) -> "ParityReport":
        relative = error / logits.abs().max().clamp(min=1e-30)
        equal = (labels == expected_labels).double().mean()
        return cls(tuple(shape), error.item(), relative.item(), equal.item())


def summarise(agreements: Iterable[ParityReport]) -> dict[str, Any]:
    """The worst errors and the share of equal labels over all pixels, and what they come from."""
    agreements = list(agreements)
    pixels = [math.prod(each.shape) for each in agreements]
    equal = sum(each.equal_labels * number for each, number in zip(agreements, pixels, strict=True)) / sum(pixels)
    return {
        "max_error": max(each.max_error for each in agreements),
        "relative_error": max(each.relative_error for each in agreements),
        "equal_labels": equal,
        "compared": [
            {"shape": list(each.shape), "relative_error": each.relative_error, "equal_labels": each.equal_labels}
            for each in agreements
        ],
    }


def smooth_pictures(num: int, height: int, width: int, num_channels: int, seed: int = 0) -> list[Any]:
    """Random pictures that look more like photographs than noise does: large blots, small ones, and a little grain.

    Returns:
        PIL images, or with another number of bands than three float arrays (H, W, C) within 0 to 255.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = [
        upsample(
            torch.randn(num, num_channels, -(-height // cell) + 1, -(-width // cell) + 1, generator=generator),
            (height, width),
        )
        for cell in (48, 12, 1)
    ]
    pixels = 127.5 + 70 * layers[0] + 30 * layers[1] + 5 * layers[2]
    arrays = pixels.clamp(0, 255).round().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array.astype(np.uint8)) if num_channels == 3 else array for array in arrays]
