"""Time by operation: those of a forward pass and of a training step, 150 classes, float32, one thread.

PyTorch's profiler counts what each operation takes itself. The fast paths share their work among threads of Python,
which it does not look into; so all runs in one thread here, and shares are of that thread's time. What no operation
accounts for is Python, and launching operations.
"""

import sys
import time
from collections.abc import Mapping

import torch
from torch.profiler import ProfilerActivity, profile

from hf_segformer.benchmarking.tasks import Task, build_call
from hf_segformer.benchmarking.timing import QUIET, OtherLoad

from .inference import task_of
from .record import Record, Row, main

OUTSIDE = "Python, and launching"
# By the first of these words that an operation's name holds; PyTorch's own names.
KINDS = {
    "convolutions": ("conv",),
    "matrix products": ("mm", "linear", "matmul", "dot"),
    "GELU, softmax, exponentials": ("gelu", "softmax", "exp", "log"),
    "LayerNorm, BatchNorm": ("norm",),
    "sums, products, maxima": ("add", "mul", "sub", "div", "sum", "mean", "var", "amax", "threshold", "relu", "clamp"),
}
MOVING = "moving: copies, indexing, fills"
_REPEATS = 5


def kind_of(operation: str) -> str:
    """Return the kind of an operation by PyTorch's name."""
    name = operation.removeprefix("aten::")
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), MOVING)


def shares_of(task: Task) -> Mapping[str, float]:
    """Seconds a call by kind of operation, the largest first; what is left over last."""
    call = build_call("hf_segformer", task)
    call()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(_REPEATS):
            call()
    began = time.perf_counter()  # without the profiler, which itself takes time
    for _ in range(_REPEATS):
        call()
    total, kinds = (time.perf_counter() - began) / _REPEATS, {}
    for event in found.key_averages():
        if "::" in event.key:
            kind = kind_of(event.key)
            kinds[kind] = kinds.get(kind, 0.0) + event.self_cpu_time_total / 1e6 / _REPEATS
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    return {**ordered, OUTSIDE: max(total - sum(ordered.values()), 0.0)}


def measure_shares(row: str, task: Task) -> list[Record]:
    """One record a kind of operation."""
    num_threads, load = torch.get_num_threads(), OtherLoad()
    torch.set_num_threads(1)
    try:
        kinds = shares_of(task)
        share = load.share()
        quiet = None if share is None else share <= QUIET
        return [
            Record(row, kind, milliseconds=float(f"{1000 * took:.4g}"), quiet=quiet) for kind, took in kinds.items()
        ]
    finally:
        torch.set_num_threads(num_threads)


def row_of(row: str, *task: object, **options: bool) -> Row:
    """Return the function that measures a row, always on the CPU."""
    return lambda _: measure_shares(row, task_of(*task, **options))


ROWS = {
    "b0": row_of("b0", "b0", 1, 512, 512),
    "b2": row_of("b2", "b2", 1, 512, 512),
    "b0_batch4_training": row_of("b0_batch4_training", "b0", 4, 512, 512, is_training=True),
}

if __name__ == "__main__":
    sys.exit(main("profile", ROWS, __doc__))
