"""Engines behind a predictor: the network compiled, in ONNX Runtime or in OpenVINO, compared with PyTorch at load.

The file of a runtime is kept in a cache folder by the digest of weights, configuration and versions, so that a second
start need not export again.
"""

import hashlib
import json
import os
import shutil
import tempfile
from importlib import import_module
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from torch import nn
from transformers import PreTrainedModel

from ..conversion.loading import digest_of_weights
from ..version import __version__
from .exportable import DeployedSegFormer, trace
from .runtimes import Runtime, RuntimeModel, require
from .targets import TARGETS
from .verification import ParityReport

CACHE = "HF_SEGFORMER_CACHE"  # environment variable: folder of the cache
TOLERANCE = 1e-4  # of the largest logit, in float32; in shorter types four steps of the type
_SIZES = ((1, 64, 96), (2, 101, 67))  # images, height, width of the comparison


def compile_network(model: PreTrainedModel) -> nn.Module:
    """Compile the network by `torch.compile` for any size.

    Raises:
        ValueError: if it cannot be compiled, for example without a compiler, or gives other logits.
    """
    compiled = torch.compile(model, dynamic=True)
    try:
        _verify(model, lambda pixels: compiled(pixels).logits, "torch.compile")
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the network cannot be compiled here ({reason}); use the engine torch") from error
    return compiled


def load_onnxruntime(model: PreTrainedModel) -> RuntimeModel:
    """Load the network in ONNX Runtime; see `_load`."""
    return _load(model, "onnx", "onnxruntime")


def load_openvino(model: PreTrainedModel) -> RuntimeModel:
    """Load the network in OpenVINO; see `_load`."""
    return _load(model, "openvino", "openvino")


def _load(model: PreTrainedModel, target: str, engine: str) -> RuntimeModel:
    """Load the cached file of a target, or write it first.

    Raises:
        ValueError: if a package is missing, the model is not in float32 on a CPU or cannot be exported, or the runtime
            gives other logits.
    """
    require(*TARGETS[target].packages)
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ValueError(
            f"the model is {str(model.dtype).removeprefix('torch.')} on {model.device}; the engine {engine} computes "
            "float32 on the CPU: leave out device and dtype, or use the engine torch or compiled"
        )
    folder = _cache_folder() / _key(model, target)
    path = folder / TARGETS[target].file
    if folder.is_dir():
        try:
            return _run(model, path, target, engine)
        except (ValueError, RuntimeError, OSError):  # a damaged file, which is written again
            shutil.rmtree(folder, ignore_errors=True)
    _write(model, target, folder)
    return _run(model, path, target, engine)


def _run(model: PreTrainedModel, path: Path, target: str, engine: str) -> RuntimeModel:
    runtime = TARGETS[target].run(path)
    _verify(model, runtime, engine)
    return RuntimeModel(runtime, model.config, model)


@torch.inference_mode()
def _verify(model: PreTrainedModel, runtime: Runtime, name: str) -> None:
    """Compare logits of random images with the model's; raise ValueError beyond the tolerance."""
    generator, tolerance = torch.Generator().manual_seed(0), max(TOLERANCE, 4 * torch.finfo(model.dtype).eps)
    for number, height, width in _SIZES:
        shape = (number, model.config.num_channels, height, width)
        pixels = torch.randn(shape, generator=generator).to(model.device, model.dtype)
        report = ParityReport.of_logits(shape, runtime(pixels).float(), model(pixels).logits.float(), (height, width))
        if not report.relative_error <= tolerance:
            raise ValueError(
                f"{name} gives other logits than PyTorch, by {report.relative_error:.1e} of the largest; expected at "
                f"most {tolerance:.0e}: use the engine torch"
            )


def _cache_folder() -> Path:
    return Path(os.environ.get(CACHE) or Path(HF_HOME) / "hf_segformer")


def _key(model: PreTrainedModel, target: str) -> str:
    """Name of the folder of a file: target, and a digest of everything that it is made from."""
    versions = [import_module(name).__version__ for name in ("torch", *TARGETS[target].packages)]
    made_from = [__version__, *versions, digest_of_weights(model), model.config.to_dict()]
    return f"{target}-{hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()[:16]}"


def _write(model: PreTrainedModel, target: str, folder: Path) -> None:
    """Export into a folder that appears whole; of two processes the first one's stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
        path = Path(partial) / "export" / TARGETS[target].file
        path.parent.mkdir()
        TARGETS[target].write(trace(DeployedSegFormer(model)), path, {})
        if not folder.is_dir():
            try:
                path.parent.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise


__all__ = ["CACHE", "compile_network", "load_onnxruntime", "load_openvino"]
