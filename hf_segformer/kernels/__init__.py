"""Kernels for the GPU, in Triton, and the table through which the shipped files find them.

Each operation has a plain twin in the shipped files, its ground truth. Kernels have passed Triton's interpreter and
compiler but never run on a GPU: until they have (`python -m benchmarks.gpu`), they run only where the user says so, by
`enable()` or HF_SEGFORMER_KERNELS=1. Triton is imported then, not before.
"""

import importlib
import os
from importlib.util import find_spec

import torch

from ..dispatch_segformer import KERNELS

ON_BY_DEFAULT = False  # until a GPU has shown the kernels right: docs/gpu.md says how

_MODULES = {
    "upsample_argmax": "argmax",
    "upsample_cross_entropy": "cross_entropy",
    "depthwise_gelu": "depthwise_gelu",
    "upsample_sum": "decode_head",
    "upsample_sum_relu": "decode_head",
}


def enable(device: str = "cuda") -> None:
    """Let kernels run in this process and in those that it starts, wherever fast paths may.

    It sets HF_SEGFORMER_KERNELS, which is the same switch. `set_fast_paths(False)` and HF_SEGFORMER_PLAIN=1 win.

    Args:
        device: kind of device; "cpu" is for tests, with TRITON_INTERPRET=1 set before Python starts.

    Raises:
        ValueError: if Triton is missing, or the device is a CPU without its interpreter.
    """
    if find_spec("triton") is None:
        raise ValueError("kernels need Triton, which is not installed: pip install triton")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "kernels run on a CPU only in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
        )
    for name, module in _MODULES.items():
        KERNELS[device, name] = getattr(importlib.import_module(f".{module}", __name__), name)
    if device == "cuda":
        os.environ["HF_SEGFORMER_KERNELS"] = "1"


def disable() -> None:
    """Take all kernels out of the table again."""
    KERNELS.clear()
    os.environ["HF_SEGFORMER_KERNELS"] = "0"


def enable_if_wanted() -> None:
    """What happens when the package is imported: kernels where the environment, or the default, asks for them."""
    wanted = os.environ.get("HF_SEGFORMER_KERNELS", "1" if ON_BY_DEFAULT else "0") not in ("", "0")
    if wanted and find_spec("triton") is not None and torch.cuda.is_available():
        enable()


__all__ = ["disable", "enable"]
