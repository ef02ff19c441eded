"""Dispatch of fast paths: one table decides which implementation of an operation runs.

The model asks `run_fast` and computes the operation itself, as the paper writes it, where the answer is NotImplemented.
The model's own code is the reference: the ground truth, and the only code that runs wherever a fast path could be
wrong. That is while something records the operations (export, tracing, function transforms, dispatch modes), where a
module is not exactly what its class says (LoRA, quantization, hooks, subclasses), and after `set_fast_paths(False)`.

The rows of `TABLE` say where an implementation may run. The files that implement them fill the rows by `implement` when
they are imported: the files for CPUs with the model, Triton kernels by `hf_segformer.kernels.switch.enable()`. Kernels
are not shipped with checkpoints. Each copy of these files has its own table.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

# Namespace of the custom operations, and the module of the model's classes. Checkpoints bring a copy of these files
# along, and each copy has its own.
NAMESPACE = re.sub(r"\W", "_", __name__)
_MODELING = re.sub(r"dispatch_segformer$", "modeling_segformer", __name__)
_PARAMETER_TYPES = (nn.Parameter, Tensor, FakeTensor)  # the last one while exporting


class Implementation(NamedTuple):
    """One row of the table.

    Attributes:
        name: what `explain_fast_paths` reports.
        device: kind of device, or "any".
        modes: those of `CallContext.mode` in which it may run.
        full_precision: needs all tensors in float32 or all in float64, and no autocast.
        bind: takes the module and the arguments of the call, and returns the operands of `run`, or the reason why it
            cannot run. It computes nothing. None while the row is not filled.
        run: takes the operands and returns the result.
    """

    name: str
    device: str
    modes: tuple[str, ...]
    full_precision: bool = False
    bind: Callable[..., Any] | None = None
    run: Callable[..., Any] | None = None


_EAGER = ("inference", "training")
_COMPILED = ("compiled", "compiled training")

# The first row that can run does.
TABLE: dict[str, list[Implementation]] = {
    "mix_ffn": [
        Implementation("triton_depthwise_gelu", "cuda", (*_EAGER, *_COMPILED)),
        Implementation("cpu_strips", "cpu", (*_EAGER, "compiled"), full_precision=True),
    ],
    "attention": [
        Implementation("cpu_strips", "cpu", (*_EAGER, "compiled"), full_precision=True),
    ],
    "decode_head": [
        Implementation("triton_upsample_sum_relu", "cuda", ("inference", "compiled")),
        Implementation("triton_upsample_sum", "cuda", (*_EAGER, *_COMPILED)),
        Implementation("cpu_bands", "cpu", _EAGER, full_precision=True),
        Implementation("folded", "any", (*_EAGER, *_COMPILED, "recorded")),
    ],
    "upsample_cross_entropy": [
        Implementation("triton_cross_entropy", "cuda", (*_EAGER, *_COMPILED)),
        Implementation("cpu_bands", "cpu", _EAGER),
    ],
    "upsample_argmax": [
        Implementation("triton_argmax", "cuda", (*_EAGER, *_COMPILED)),
        Implementation("cpu_bands", "cpu", _EAGER),
    ],
}


def implement(
    op: str, name: str, bind: Callable[..., Any] | None, run: Callable[..., Any] | None, device: str | None = None
) -> None:
    """Fill a row of the table, or empty it with None.

    Args:
        op: key of `TABLE`.
        name: of the row.
        bind: see `Implementation`.
        run: see `Implementation`.
        device: another kind of device than the row's, for Triton's interpreter.
    """
    rows = TABLE[op]
    [index] = [index for index, row in enumerate(rows) if row.name == name]
    rows[index] = rows[index]._replace(bind=bind, run=run, device=device or rows[index].device)


# The switch


def set_fast_paths(enabled: bool) -> None:
    """Switch every fast path on or off, for all models in this process and the processes that it starts.

    Sets the environment variable HF_SEGFORMER_PLAIN, which is the same switch.

    Args:
        enabled: False runs the reference of every operation.
    """
    os.environ["HF_SEGFORMER_PLAIN"] = "0" if enabled else "1"


def are_fast_paths_on() -> bool:
    """Return the state of the switch."""
    return os.environ.get("HF_SEGFORMER_PLAIN", "0") in ("", "0")


# Properties of a call


class CallContext(NamedTuple):
    """Properties of a call that decide which implementations may run.

    Attributes:
        device: kind of device of the tensors.
        dtype: type of the first tensor.
        mode: "inference", or "training" if a gradient is wanted; "compiled" and "compiled training" in a graph of
            `torch.compile`; "recorded" where only PyTorch's own operations may run.
        autocast: True if autocast is enabled on the device.
        reason: why the mode is "recorded".
    """

    device: str
    dtype: torch.dtype
    mode: str
    autocast: bool
    reason: str


def context_of(module: nn.Module | None, tensors: list[Tensor]) -> CallContext:
    """Return the context of a call of a module on these tensors."""
    device, dtype = tensors[0].device.type, tensors[0].dtype
    autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    reason = _find_recorder() or _find_unusual(tensors, tensors[0].device)
    if reason:
        return CallContext(device, dtype, "recorded", autocast, reason)
    mode = "training" if needs_gradient(*tensors) or needs_gradient(*_parameters_of(module)) else "inference"
    if torch.compiler.is_compiling():
        mode = "compiled training" if mode == "training" else "compiled"
    return CallContext(device, dtype, mode, autocast, "")


def needs_gradient(*tensors: Tensor) -> bool:
    """Return True if autograd has to be able to differentiate with respect to one of the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _parameters_of(module: nn.Module | None) -> Iterable[Tensor]:
    """Return the module's parameters where autograd records; nothing asks for them elsewhere."""
    return module.parameters() if module is not None and torch.is_grad_enabled() else ()


def _find_recorder() -> str:
    """Return what records or transforms the operations of this call; `torch.compile` does not count."""
    if torch.compiler.is_exporting():
        return "torch.export records the operations"
    if torch.compiler.is_compiling():
        return ""
    if torch.jit.is_tracing():
        return "torch.jit.trace records the operations"
    if torch._C._are_functorch_transforms_active():
        return "a function transform (torch.func) is active"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode (fake tensors, a FLOP counter) is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if nn.modules.module._has_any_global_hook():
        return "a hook for all modules is registered"
    return ""


def _find_unusual(tensors: list[Tensor], device: torch.device) -> str:
    """Return what is unusual about the first tensor that is not a dense, plain tensor on the device."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"a tensor is a {type(tensor).__name__}"
        if tensor.layout is not torch.strided:
            return "a tensor is not dense"
        if tensor.device != device:
            return "the tensors are on several devices"
    return "" if tensors[0].is_floating_point() else "the first tensor does not hold floats"


# What a module must be


def altered(name: str, module: Any, kind: type[nn.Module] | str, bias: bool = False) -> str:
    """Return why a call of the module could differ from its class's `forward` on its parameters; empty if it cannot.

    LoRA and parametrizations change the type of a layer, quantization the type of its weight, hooks and offloading the
    call. Where any of them is at work, only calling the module is right.

    Args:
        name: path of the module, for the reason.
        module: to look at.
        kind: the class that it must have, not a subclass; by name for a class of the model.
        bias: True if it must have a bias.
    """
    found = type(module)
    is_own = isinstance(kind, str) and found.__name__ == kind and found.__module__ == _MODELING
    if not is_own and found is not kind:
        return f"{name} is a {found.__module__}.{found.__name__}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks"
    if "forward" in module.__dict__:
        return f"{name}.forward is replaced"
    if hasattr(module, "weight") and type(module.weight) not in _PARAMETER_TYPES:
        return f"{name}.weight is a {type(module.weight).__name__}"
    if bias and type(module.bias) not in _PARAMETER_TYPES:
        return f"{name}.bias is a {type(module.bias).__name__}"
    return ""


def altered_dropout(name: str, dropout: nn.Module) -> str:
    """Return why the dropout could change its input; empty if it cannot."""
    reason = altered(name, dropout, nn.Dropout)
    return reason or (f"{name} is active" if dropout.training and dropout.p else "")


# Dispatch


def run_fast(op: str, module: nn.Module | None, *arguments: Any) -> Any:
    """Run an operation by the first implementation that can run.

    Args:
        op: key of `TABLE`.
        module: whose operation it is; None for functions.
        arguments: of the operation; the first one is a tensor, or a tuple of tensors.

    Returns:
        The result, or NotImplemented if the caller has to run the reference.
    """
    implementation, operands = _choose(op, module, arguments)
    if _calls is not None:
        _calls.append((op, "", operands) if implementation is None else (op, implementation.name, ""))
    if implementation is None or implementation.run is None:
        return NotImplemented
    return implementation.run(*operands)


def _choose(op: str, module: nn.Module | None, arguments: tuple[Any, ...]) -> tuple[Implementation | None, Any]:
    """Return the implementation and its operands, or None and the first reason why no implementation can run."""
    if not are_fast_paths_on():
        return None, "fast paths are switched off (set_fast_paths, HF_SEGFORMER_PLAIN)"
    context = context_of(module, _tensors_of(arguments))
    first_reason = ""
    for implementation in TABLE[op]:
        if implementation.device not in (context.device, "any"):
            continue
        operands: Any = _excludes(implementation, context)
        if not operands and implementation.bind is not None:
            operands = implementation.bind(module, *arguments)
            if not isinstance(operands, str):
                operands = _misfit(implementation, context, _tensors_of(operands)) or operands
        if not isinstance(operands, str):
            return implementation, operands
        first_reason = first_reason or operands
    return None, first_reason or f"there is no fast path for tensors on {context.device}"


def _excludes(implementation: Implementation, context: CallContext) -> str:
    """Return why the implementation may not run in this context."""
    if implementation.bind is None:
        return "kernels are off (hf_segformer.kernels.switch.enable() switches them on)"
    if context.mode not in implementation.modes:
        return context.reason or f"the mode is {context.mode}"
    if implementation.full_precision and context.autocast:
        return "autocast is enabled"
    if implementation.full_precision and context.dtype not in (torch.float32, torch.float64):
        return f"tensors are {str(context.dtype).removeprefix('torch.')}"
    return ""


def _misfit(implementation: Implementation, context: CallContext, tensors: list[Tensor]) -> str:
    """Return why the implementation cannot take these operands, parameters among them."""
    if context.mode == "recorded":
        return ""
    reason = _find_unusual(tensors, tensors[0].device)
    if not reason and implementation.full_precision and any(tensor.dtype != context.dtype for tensor in tensors):
        return "tensors and parameters are of several types"
    return reason


def _tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """Return all tensors in nested tuples and lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found.extend(_tensors_of(value))
    return found


# Explanation

_calls: list[tuple[str, str, str]] | None = None


@contextmanager
def record_fast_paths() -> Iterator[list[tuple[str, str, str]]]:
    """Record every call of `run_fast` in this process: operation, implementation or "", and the reason if none ran."""
    global _calls
    outer, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = outer


def explain_fast_paths(model: Callable[..., Any], pixel_values: Tensor) -> dict[str, str]:
    """Run a model once and say which implementation of each operation ran.

    The call is the caller's own: it obeys the model's mode, gradient mode and autocast. Buffers and the random state
    are restored. If the model returns logits, loss and argmax at the images' size are run as well.

    Args:
        model: a model of this package, or any callable that runs one.
        pixel_values: (B, num_channels, height, width).

    Returns:
        For each operation the implementation that ran, or "reference: " and the first reason. Where blocks differ,
        both, with the number of calls.

    Examples:
        >>> import torch
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation
        >>> from hf_segformer.dispatch_segformer import explain_fast_paths
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig.from_variant("b0")).eval()
        >>> with torch.no_grad():
        ...     explain_fast_paths(model, torch.zeros(1, 3, 512, 512))["decode_head"]
        'cpu_bands'
    """
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    try:
        with torch.random.fork_rng(devices=[]), record_fast_paths() as calls:
            logits = getattr(model(pixel_values), "logits", None)
            if isinstance(logits, Tensor) and logits.ndim == 4:
                size = pixel_values.shape[-2:]
                labels = torch.zeros((len(logits), *size), dtype=torch.int64, device=logits.device)
                run_fast("upsample_cross_entropy", None, logits, labels, 255, None, 0.0)
                run_fast("upsample_argmax", None, logits, size, False)
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
    return {op: _summarize([call[1:] for call in calls if call[0] == op]) for op in TABLE if _has(calls, op)}


def _has(calls: list[tuple[str, str, str]], op: str) -> bool:
    """Return True if the operation was called."""
    return any(call[0] == op for call in calls)


def _summarize(calls: list[tuple[str, str]]) -> str:
    """Return one line about the calls of an operation, each an implementation and the reason if none ran."""
    names = dict.fromkeys(name or f"reference: {reason}" for name, reason in calls)
    ran = list(dict.fromkeys(name for name, _ in calls if name))
    reasons = [reason for name, reason in calls if not name]
    if len(names) == 1 or not (ran and reasons):
        return next(iter(names)) if not ran else ", ".join(ran)
    return f"{', '.join(ran)} in {len(calls) - len(reasons)} of {len(calls)} calls; reference: {reasons[0]}"


__all__ = ["CallContext", "Implementation", "explain_fast_paths", "record_fast_paths", "run_fast", "set_fast_paths"]
