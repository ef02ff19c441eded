"""Inference of SegFormer here and in Transformers, both eager, 150 classes, float32: time and memory."""

import sys
from collections.abc import Callable, Sequence

from hf_segformer import SegFormerConfig
from hf_segformer.benchmarking.tasks import EAGER, Task, measure

from .record import Options, Record, Row, main


def task_of(variant: str, batch_size: int, height: int, width: int, **others) -> Task:
    """With 150 classes, as in ADE20K."""
    config = SegFormerConfig.from_variant(variant, num_labels=150)
    return Task(config, batch_size, height, width, **others)


def measure_eager(
    row: str, task: Task, options: Options, candidates: Sequence[str] = EAGER, rounds: int = 99, **turns
) -> list[Record]:
    """One record a candidate; `turns` go to `interleaved_timing`."""
    return [
        Record.of(row, each.name, each.timing, each.memory, difference=each.difference, device=task.device)
        for each in measure(task, candidates, **options.turns(rounds, **turns))
    ]


def row_of(row: str, rounds: int, *task: object) -> Row:
    """What measures a row."""
    return lambda options: measure_eager(row, task_of(*task, device=options.device), options, rounds=rounds)


def rows_at_512(measure_row: Callable[..., list[Record]], **rounds: int) -> dict[str, Row]:
    """For each variant what measures it at 1x3x512x512 in so many rounds: a function of row, task, options, rounds."""
    return {
        variant: lambda options, variant=variant, number=number: measure_row(
            variant, task_of(variant, 1, 512, 512, device=options.device), options, number
        )
        for variant, number in rounds.items()
    }


ROWS = {
    row: row_of(row, rounds, *task)
    for row, rounds, *task in (
        ("b0", 99, "b0", 1, 512, 512),
        ("b2", 5, "b2", 1, 512, 512),
        ("b5", 5, "b5", 1, 512, 512),
        ("b0_batch8", 5, "b0", 8, 512, 512),
        ("b0_wide", 3, "b0", 1, 1024, 2048),
    )
}

if __name__ == "__main__":
    sys.exit(main("inference", ROWS, __doc__))
