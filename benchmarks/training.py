"""A training step of SegFormer here and in Transformers: forward with labels and backward, 150 classes, float32.

One row runs while another process keeps a core busy. Time is that of the step as one trains, with dropout and drop
path; that loss and gradient agree is looked at without.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hf_segformer.benchmarking.timing import QUIET

from .inference import measure_eager, task_of
from .record import Options, Record, Row, main


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy by another process."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure_busy(options: Options) -> list[Record]:
    """B0, while another process wants a core."""
    task = task_of("b0", 4, 512, 512, is_training=True, device=options.device)
    allowed = 1 / (os.cpu_count() or 1) + QUIET
    with busy_core():
        return measure_eager("b0_batch4_busy", task, options, rounds=5, allowed=allowed, memory_of=())


def row_of(row: str, variant: str, batch_size: int, side: int, rounds: int) -> Row:
    """Return the function that measures a row, of square crops."""
    return lambda options: measure_eager(
        row, task_of(variant, batch_size, side, side, is_training=True, device=options.device), options, rounds=rounds
    )


ROWS = {
    "b0_batch4": row_of("b0_batch4", "b0", 4, 512, 5),
    "b2_batch2": row_of("b2_batch2", "b2", 2, 512, 3),
    "b0_crops128": row_of("b0_crops128", "b0", 8, 128, 11),
    "b0_crops256": row_of("b0_crops256", "b0", 8, 256, 11),
    "b0_batch4_busy": measure_busy,
}

if __name__ == "__main__":
    sys.exit(main("training", ROWS, __doc__))
