"""bfloat16 autocast against float32, both here: worth it on a processor with AMX; elsewhere the row says so."""

import sys
from functools import partial

import torch

from hf_segformer.benchmarking.comparison import compare
from hf_segformer.benchmarking.tasks import Task, build_call
from hf_segformer.benchmarking.timing import Call

from .inference import rows_at_512
from .record import Options, Record, main

_TOLERANCE = 0.05  # of the largest logit: eight bits of mantissa, through all blocks


def build_autocast(task: Task) -> Call:
    """Our model under autocast."""
    call = build_call("hf_segformer", task)

    def infer() -> torch.Tensor:
        with torch.autocast(torch.device(task.device).type, torch.bfloat16):
            return call().float()

    return infer


def measure_autocast(row: str, task: Task, options: Options, rounds: int) -> list[Record]:
    """Two records, or one that says what is missing."""
    if task.device == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16"):
        return [Record(row, "hf_segformer bfloat16", note="not measured: this processor has no AMX")]
    builds = {
        "hf_segformer": partial(build_call, "hf_segformer", task),
        "hf_segformer bfloat16": partial(build_autocast, task),
    }
    found = compare(builds, tolerance=_TOLERANCE, device=task.device, **options.turns(rounds))
    return [Record.of(row, each.name, each.timing, difference=each.difference, device=task.device) for each in found]


ROWS = rows_at_512(measure_autocast, b0=99, b2=9)

if __name__ == "__main__":
    sys.exit(main("bfloat16", ROWS, __doc__))
