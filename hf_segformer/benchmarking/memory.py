"""Peak memory of a call, measured in a fresh process."""

import ctypes
import gc
import signal
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from .timing import Call

MEBIBYTE = 2**20
_BUDGET = 6.0  # seconds after which the peak is not measured again


def peak_memory(build: Callable[[], Call], device: str = "cpu") -> int | None:
    """Return the bytes by which a fresh process grows during a call; inputs and weights are not counted.

    The call runs once beforehand, so that one-time costs (threads, kernels, lazy imports) are not counted. Then the
    allocator returns what it keeps, and the peak is measured from there: the median of three calls, because the
    system's count is rough, or of fewer where they are long. On a GPU it is PyTorch's own count.

    Args:
        build: picklable function that makes the call in that process.
        device: PyTorch device.

    Returns:
        The growth in bytes; None where the system does not say: for a CPU it is known on Linux only.

    Raises:
        ValueError: if the process is killed, as happens when memory runs out.
    """
    # Ctrl-C reaches the child too: it ends without a traceback of its own.
    default = signal.SIGINT, signal.SIG_DFL
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=signal.signal, initargs=default) as pool:
        try:
            return pool.submit(_growth, build, torch.get_num_threads(), device).result()
        except BrokenProcessPool:
            raise ValueError(
                "the process that measures memory was killed; free memory, or use a smaller batch or size"
            ) from None


def _growth(build: Callable[[], Call], num_threads: int, device: str) -> int | None:
    torch.set_num_threads(num_threads)
    call = build()
    call()
    is_cuda, began = torch.device(device).type == "cuda", time.perf_counter()
    growths: list[int] = []
    while len(growths) < 3 and (not growths or time.perf_counter() - began < _BUDGET):
        gc.collect()
        try:
            growths.append(_growth_cuda(call) if is_cuda else _growth_linux(call))
        except (OSError, AttributeError):
            return None
    return round(statistics.median(growths))


def _growth_cuda(call: Call) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def _growth_linux(call: Call) -> int:
    """Measure by the kernel's counts; raises OSError or AttributeError on other systems."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


__all__ = ["MEBIBYTE", "peak_memory"]
