"""Engines: what computes the network behind a `Segmenter`, found by name.

`torch` is PyTorch's eager network. The other engines of this package are in `hf_segformer.export.engines`, and a third
party adds its own by the entry point `hf_segformer.engines`: a function that takes a segmentation model and returns a
module with the same `config`, `device`, `dtype` and outputs.
"""

from copy import deepcopy
from importlib import import_module
from importlib.metadata import entry_points

from torch import nn

from .ensemble import Ensemble

ENTRY_POINTS = "hf_segformer.engines"
TORCH = "torch"
_OWN_ENGINES = {
    "compiled": "hf_segformer.export.engines:compile_network",
    "onnxruntime": "hf_segformer.export.engines:load_onnxruntime",
    "openvino": "hf_segformer.export.engines:load_openvino",
}


def engine_names() -> tuple[str, ...]:
    """Names of the engines, with those of installed packages."""
    return (TORCH, *_engines())


def with_engine(model: nn.Module, engine: str) -> nn.Module:
    """Return a model that computes by an engine; of an ensemble each member does.

    Args:
        model: a segmentation model or an ensemble of them; it is not changed.
        engine: one of `engine_names`.

    Raises:
        ValueError: if the engine is unknown or not installed, cannot compute this model, or gives other logits.
    """
    if engine == TORCH:
        return model
    engines = _engines()
    if engine not in engines:
        raise ValueError(f"engine is {engine!r}; expected one of {', '.join(engine_names())}")
    module, _, name = engines[engine].partition(":")
    load = getattr(import_module(module), name)
    if any(each.training for each in model.modules()):
        model = deepcopy(model).eval()
    return Ensemble([load(member) for member in model.members]) if isinstance(model, Ensemble) else load(model)


def _engines() -> dict[str, str]:
    return {**{point.name: point.value for point in entry_points(group=ENTRY_POINTS)}, **_OWN_ENGINES}


__all__ = ["ENTRY_POINTS", "TORCH", "engine_names", "with_engine"]
