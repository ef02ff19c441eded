"""Runtime of the CPU's fast paths: matrix products by oneDNN, threads, and memory.

PyTorch's own float32 products go to MKL. oneDNN adds a bias and a further tensor while the product is in registers, and
is twice as fast on AMD's Zen 5, of whose vectors MKL uses half. It is reached by the private operations that
`torch.compile` emits; where they are missing, PyTorch's own call runs. oneDNN is a thousand times slower on columns of
a wider matrix: callers copy them first.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from threading import Lock, Thread
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .dispatch_segformer import NAMESPACE, context_of, needs_gradient

logger = logging.get_logger(__name__)

Item = TypeVar("Item")

# Matrix products

_CPUINFO = Path("/proc/cpuinfo")
_ZEN_5 = 26  # family, by CPUID
_LEAST_WIDTH = 16  # columns from which on MKL sums over rows faster than oneDNN


@cache
def prefers_onednn() -> bool:
    """Return True where oneDNN's products are so much faster than MKL's that copies of their operands pay.

    That is on AMD's Zen 5 and later under Linux, with AVX-512: twice as fast, where on Zen 3 and 4 both take about as
    long. A rule, not a measurement, which could change the last bits of a resumed run. HF_SEGFORMER_PRODUCTS, onednn or
    mkl, sets it by hand; it is read once a process.

    Raises:
        ValueError: if the variable has another value.
    """
    chosen = os.environ.get("HF_SEGFORMER_PRODUCTS", "")
    if chosen not in ("", "onednn", "mkl"):
        raise ValueError(f"HF_SEGFORMER_PRODUCTS is {chosen!r}; expected 'onednn' or 'mkl', or leave it unset")
    if chosen or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return chosen == "onednn"
    try:
        text = _CPUINFO.read_text()
    except OSError:  # not Linux
        return False
    fields = first_processor(text)
    return fields.get("vendor_id") == "AuthenticAMD" and int(fields.get("cpu family", 0)) >= _ZEN_5


def first_processor(cpuinfo: str) -> dict[str, str]:
    """Return the fields of the first processor in the text of /proc/cpuinfo."""
    return dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", cpuinfo.partition("\n\n")[0], re.MULTILINE))


def find_onednn(name: str, *tensors: Tensor) -> Any:
    """Return PyTorch's private oneDNN operation of that name, or None if it is missing or cannot take these tensors.

    The operations support float32 on a CPU, without a gradient.
    """
    first = tensors[0]
    if first.dtype != torch.float32 or first.device.type != "cpu":
        return None
    if not torch.backends.mkldnn.enabled or needs_gradient(*tensors):
        return None
    return getattr(torch.ops.mkldnn, name, None)


def linear(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    sources: tuple[Tensor, ...] = (),
) -> Tensor:
    """Compute `F.linear`, plus `added` if it is given: (..., C) by (D, C) -> (..., D).

    Args:
        tokens: (..., C).
        weight: (D, C).
        bias: (D,).
        added: (..., D).
        sources: parameters that the weight was made of. Changing one in place before the backward pass is an error, as
            it is for the weight of `F.linear`.
    """
    if needs_gradient(tokens, weight, *(tensor for tensor in (bias, added) if tensor is not None)):
        product = _Linear.apply(tokens, weight, bias, *sources)
        return product if added is None else product + added
    fused = find_onednn("_linear_pointwise", tokens)
    if fused is None:
        product = F.linear(tokens, weight, bias)
        return product if added is None else product.add_(added)
    if added is None:
        return fused(tokens, weight, bias, "none", [], "")
    return fused.binary(tokens, added, weight, bias, "add")


def multiply_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """Multiply `left.T @ right`, which sums over the long dimension: (P, N) and (P, K) -> (N, K).

    oneDNN copies both factors to transpose them, which takes as long as the product. So float32 goes to PyTorch's own
    library, MKL as a rule, except where that is slow: a side shorter than 16, or Zen 5 (see `prefers_onednn`).
    """
    narrow, wide = (left, right) if left.shape[1] <= right.shape[1] else (right, left)
    if narrow.dtype == torch.float32 and narrow.shape[1] >= _LEAST_WIDTH and not prefers_onednn():
        product = torch.mm(wide.t(), narrow).t()
    else:
        product = linear(narrow.t(), wide.t())
    return product if narrow is left else product.t()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `backward` of an autograd function to refuse a second derivative, which would be wrong."""

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fast paths cannot be differentiated twice, as create_graph=True requires: call "
                "hf_segformer.set_fast_paths(False) first"
            )
        with torch.autocast("cpu", enabled=False):  # as in the forward pass
            return backward(ctx, *gradients)

    return checked


class _Linear(torch.autograd.Function):
    """`F.linear` with a gradient by the products here."""

    @staticmethod
    def forward(ctx, tokens, weight, bias, *sources):
        """(..., C), (D, C) and (D,) or None -> (..., D)."""
        wants_tokens, wants_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            tokens if wants_weight else None, *((weight, *sources) if wants_tokens else (None,))
        )  # what F.linear saves
        ctx.shape = tokens.shape
        return linear(tokens, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """Return the gradient of each argument."""
        tokens, weight, *_ = ctx.saved_tensors
        wants_tokens, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        rows = gradient.flatten(0, -2).contiguous()
        return (
            linear(rows, weight.t()).view(ctx.shape) if wants_tokens else None,
            multiply_over_rows(rows, tokens.flatten(0, -2)) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
            *(None for _ in ctx.needs_input_grad[3:]),
        )


@torch.library.custom_op(f"{NAMESPACE}::linear", mutates_args=())
def _compiled_linear(tokens: Tensor, weight: Tensor) -> Tensor:
    return linear(tokens, weight)


@_compiled_linear.register_fake
def _outputs(tokens: Tensor, weight: Tensor) -> Tensor:
    return tokens.new_empty(*tokens.shape[:-1], len(weight))


def reference_linear(tokens: Tensor, weight: Tensor) -> Tensor:
    """Compute `F.linear`; a compiler that would take MKL's product is given `linear`."""
    if not torch.compiler.is_compiling():
        return F.linear(tokens, weight)
    context = context_of(None, [tokens, weight])
    is_full = context.dtype == weight.dtype and context.dtype in (torch.float32, torch.float64)
    if context.mode == "compiled" and context.device == "cpu" and is_full and not context.autocast:
        return _compiled_linear(tokens, weight)
    return F.linear(tokens, weight)


# Types


def warn_of_slow_type(dtype: torch.dtype, device: torch.device) -> None:
    """Warn once about weights of a 16-bit type on a CPU without instructions for it, which converts every operand."""
    name = {torch.float16: "_is_mkldnn_fp16_supported", torch.bfloat16: "_is_mkldnn_bf16_supported"}.get(dtype)
    if name is None or device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    is_supported = getattr(torch.ops.mkldnn, name, None)
    if is_supported is None or not is_supported():
        logger.warning_once(
            f"the weights are {str(dtype).removeprefix('torch.')}, which is several times slower than float32 on this "
            "CPU: load the model with dtype=torch.float32, or call model.float()"
        )


# Memory


@cache
def train_allocator() -> None:
    """Keep glibc from returning the memory of each layer to the system, once a process.

    glibc returns memory at the end of its heap once it is more than twice the largest block freed so far, 64 MiB at
    most. Within a network that is every layer, and getting it again takes a sixth of B0's time. A large block, freed
    without having been touched, raises the limit to its maximum.
    """
    torch.empty((1 << 25) - (1 << 16), dtype=torch.uint8, device="cpu")


# Threads


def parallel_for(work: Callable[[Iterator[Item]], None], items: Sequence[Item]) -> None:
    """Run `work` in as many threads as PyTorch uses, over items that are dealt out one by one.

    Each thread computes on one core, so that its working set stays in that core's cache, no operation waits for another
    core, and a busy core merely gets fewer items.

    Args:
        work: called once in every thread with an iterator over the thread's items. Gradients are not recorded, and
            there is no autocast.
        items: in any order.
    """
    train_allocator()
    dealt, errors, inference = iter(items), [], torch.is_inference_mode_enabled()

    def run() -> None:
        torch.set_num_threads(1)  # of this thread, and the default of threads yet to start
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
            try:
                work(dealt)
            except BaseException as error:
                errors.append(error)
                drain(dealt)

    with _restored_threads() as num_threads:
        threads: list[Thread] = []
        try:
            for _ in range(min(num_threads, len(items)) - 1):
                threads.append(Thread(target=run))
                threads[-1].start()
            run()
            for thread in threads:
                thread.join()
        finally:  # after Ctrl-C while waiting, or a thread that could not start
            drain(dealt)
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
    if errors:
        raise errors[0]


def drain(dealt: Iterator[Item]) -> None:
    """Take all remaining items, so that every thread stops."""
    for _ in dealt:
        pass


@contextmanager
def _restored_threads() -> Iterator[int]:
    """Yield PyTorch's number of threads, and restore it for this thread and for threads yet to start.

    PyTorch has one number for each thread, and another for threads yet to start, which setting the first one sets, too.
    Where calls of `parallel_for` overlap, one that begins in a new thread would find 1, and leave 1 behind.
    """
    own = torch.get_num_threads()
    with _running.lock:
        if not _running.count:
            _running.default = own
        elif own == 1:
            own = _running.default
        _running.count += 1
    try:
        yield own
    finally:
        torch.set_num_threads(own)
        with _running.lock:
            _running.count -= 1
            is_spoilt = not _running.count and own != _running.default
        if is_spoilt:
            thread = Thread(target=torch.set_num_threads, args=(_running.default,))
            thread.start()
            thread.join()


class _Running:
    """Number of running calls of `parallel_for`, and the number of threads when the first of them began."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set the state in which no call is running."""
        self.lock, self.count, self.default = Lock(), 0, 1


_running = _Running()
if hasattr(os, "register_at_fork"):  # none of the parent's calls runs in the child
    os.register_at_fork(after_in_child=_running.reset)


__all__ = [
    "find_onednn",
    "first_processor",
    "linear",
    "multiply_over_rows",
    "once_differentiable",
    "parallel_for",
    "prefers_onednn",
    "reference_linear",
    "train_allocator",
    "warn_of_slow_type",
]
