"""Inference of SegFormer here and in Transformers, both eager, 150 classes, float32: time and memory.

Four rows measure B0 from 256x256 to 2048x2048. Two measure bfloat16 autocast against float32, both of this package, on
a processor with AMX; elsewhere the row says that it was not measured.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from hf_segformer import SegFormerConfig
from hf_segformer.benchmarking.comparison import compare
from hf_segformer.benchmarking.tasks import EAGER, Task, build_call, measure
from hf_segformer.benchmarking.timing import Call

from .record import Options, Record, Row, main

_BFLOAT16_TOLERANCE = 0.05  # of the largest logit: eight bits of mantissa, through all blocks


def task_of(variant: str, batch_size: int, height: int, width: int, **others) -> Task:
    """Return a task with 150 classes, as in ADE20K."""
    config = SegFormerConfig.from_variant(variant, num_labels=150)
    return Task(config, batch_size, height, width, **others)


def measure_eager(
    row: str, task: Task, options: Options, candidates: Sequence[str] = EAGER, rounds: int = 99, **turns
) -> list[Record]:
    """Measure one record per candidate; `turns` are arguments of `interleaved_timing`."""
    return [
        Record.of(row, each.name, each.timing, each.memory, difference=each.difference, device=task.device)
        for each in measure(task, candidates, **options.turns(rounds, **turns))
    ]


def row_of(row: str, rounds: int, *task: object) -> Row:
    """Return the function that measures a row."""
    return lambda options: measure_eager(row, task_of(*task, device=options.device), options, rounds=rounds)


def rows_at_512(measure_row: Callable[..., list[Record]], **rounds: int) -> dict[str, Row]:
    """Return for each variant the function that measures it at 1x3x512x512, by `measure_row`, in so many rounds."""
    return {
        variant: lambda options, variant=variant, number=number: measure_row(
            variant, task_of(variant, 1, 512, 512, device=options.device), options, number
        )
        for variant, number in rounds.items()
    }


def build_autocast(task: Task) -> Call:
    """Return the call of this package's model under autocast."""
    call = build_call("hf_segformer", task)

    def infer() -> torch.Tensor:
        with torch.autocast(torch.device(task.device).type, torch.bfloat16):
            return call().float()

    return infer


def measure_bfloat16(variant: str, task: Task, options: Options, rounds: int) -> list[Record]:
    """Measure two records, or one that says what is missing."""
    row = f"{variant}_bfloat16"
    if task.device == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16"):
        return [Record(row, "hf_segformer bfloat16", note="not measured: this processor has no AMX")]
    builds = {
        "hf_segformer": partial(build_call, "hf_segformer", task),
        "hf_segformer bfloat16": partial(build_autocast, task),
    }
    found = compare(builds, tolerance=_BFLOAT16_TOLERANCE, device=task.device, **options.turns(rounds))
    return [Record.of(row, each.name, each.timing, difference=each.difference, device=task.device) for each in found]


ROWS = {
    row: row_of(row, rounds, *task)
    for row, rounds, *task in (
        ("b0", 99, "b0", 1, 512, 512),
        ("b2", 5, "b2", 1, 512, 512),
        ("b5", 5, "b5", 1, 512, 512),
        ("b0_batch8", 5, "b0", 8, 512, 512),
        ("b0_wide", 3, "b0", 1, 1024, 2048),
        ("b0_256", 15, "b0", 1, 256, 256),
        ("b0_1024", 5, "b0", 1, 1024, 1024),
        ("b0_2048", 3, "b0", 1, 2048, 2048),
    )
} | {f"{variant}_bfloat16": measure for variant, measure in rows_at_512(measure_bfloat16, b0=99, b2=9).items()}
SIDES = {256: "b0_256", 512: "b0", 1024: "b0_1024", 2048: "b0_2048"}  # rows of B0 at square images

if __name__ == "__main__":
    sys.exit(main("inference", ROWS, __doc__))
