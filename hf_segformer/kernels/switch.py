"""Switch of the Triton kernels, which fill their rows of the dispatch table.

Each operation has a reference in the shipped files. The kernels pass Triton's interpreter and compiler but have never
run on a GPU: until they have (`python -m benchmarks.gpu`), they run only on request, by `enable()` or
HF_SEGFORMER_KERNELS=1. Triton is imported then, not before.
"""

import importlib
import os
from collections.abc import Collection
from importlib.util import find_spec

import torch

from ..dispatch_segformer import implement

ON_BY_DEFAULT = False  # until a GPU has shown that the kernels are right: docs/gpu.md describes how

# Operation and row of the dispatch table that each kernel fills.
ROWS = {
    "depthwise_gelu": ("mix_ffn", "triton_depthwise_gelu"),
    "upsample_sum_relu": ("decode_head", "triton_upsample_sum_relu"),
    "upsample_sum": ("decode_head", "triton_upsample_sum"),
    "upsample_cross_entropy": ("upsample_cross_entropy", "triton_cross_entropy"),
    "upsample_argmax": ("upsample_argmax", "triton_argmax"),
}


def enable(device: str = "cuda", without: Collection[str] = ()) -> None:
    """Let kernels run in this process and in those that it starts, wherever fast paths may.

    Sets HF_SEGFORMER_KERNELS, which is the same switch. `set_fast_paths(False)` and HF_SEGFORMER_PLAIN=1 take
    precedence.

    Args:
        device: kind of device; "cpu" is for tests, with TRITON_INTERPRET=1 set before Python starts.
        without: names of kernels to leave out, keys of `ROWS`.

    Raises:
        ValueError: if Triton is missing, or the device is a CPU without Triton's interpreter.
    """
    if find_spec("triton") is None:
        raise ValueError("kernels need Triton, which is not installed: pip install triton")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "kernels run on a CPU only in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
        )
    implementations = importlib.import_module(".implementations", __package__).IMPLEMENTATIONS
    for name, (op, row) in ROWS.items():
        bind, run = (None, None) if name in without else implementations[name]
        implement(op, row, bind, run, device=device)
    if device == "cuda":
        os.environ["HF_SEGFORMER_KERNELS"] = "1"


def disable() -> None:
    """Empty the kernels' rows of the dispatch table, and set HF_SEGFORMER_KERNELS=0."""
    for op, row in ROWS.values():
        implement(op, row, None, None, device="cuda")
    os.environ["HF_SEGFORMER_KERNELS"] = "0"


def enable_if_wanted() -> None:
    """Enable kernels if the environment or the default asks for them; called when the package is imported."""
    wanted = os.environ.get("HF_SEGFORMER_KERNELS", "1" if ON_BY_DEFAULT else "0") not in ("", "0")
    if wanted and find_spec("triton") is not None and torch.cuda.is_available():
        enable()


__all__ = ["ON_BY_DEFAULT", "ROWS", "disable", "enable", "enable_if_wanted"]
