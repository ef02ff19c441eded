"""Kernels on a GPU: compiled, checked against their plain twins, and timed against Transformers, in one call.

`--compile-only` needs no GPU: it compiles each kernel and writes what it takes of one. `--check` stops before timing.
`--device cpu --tiny`, with TRITON_INTERPRET=1, runs all of it in Triton's interpreter, to see that it runs; its times
mean nothing, and go to no file unless `--results` names another folder.
"""

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .record import RESULTS, machine

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CAPABILITIES = (80, 90)


@dataclass(frozen=True)
class Row:
    """One measurement: a candidate at a task, its median time, peak memory, and share of the bandwidth measured."""

    task: str
    variant: str
    size: str
    batch: int
    candidate: str
    milliseconds: float | None = None
    mebibytes: float | None = None
    share_of_bandwidth: float | None = None
    share_of_matrix_peak: float | None = None
    note: str = ""
    gpu: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    transformers: str = ""
    commit: str = ""


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Replace the file at once; an interruption leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    partial.replace(path)


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of a GPU, as the compiler says; bytes on the stack are spilled registers."""

    kernel: str
    dtype: str
    capability: int
    registers: int
    stack: int
    shared: int
    triton: str


def launches(dtype: torch.dtype) -> dict[str, Any]:
    """Every kernel as B0 calls it at 8x3x512x512 with 150 classes; tensors have no memory."""
    from hf_segformer.ops import argmax, cross_entropy, decode_head, depthwise_gelu

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    logits = empty(8, 150, 128, 128).to(memory_format=torch.channels_last)
    labels, full = empty(8, 512, 512, of=torch.int64), torch.float32
    tokens, kernel, bias = empty(8, 16384, 128), empty(128, 1, 3, 3), empty(128)
    maps = [empty(8, 128 >> stage, 128 >> stage, 256) for stage in range(4)]
    weights, factor = empty(150, of=full), empty(256, of=full)
    return {
        "upsample_argmax": argmax.plan(logits, labels, empty(0, of=full)),
        "upsample_argmax with probability": argmax.plan(logits, labels, empty(8, 512, 512, of=full)),
        "upsample_cross_entropy": cross_entropy.plan(logits, labels, weights, 255, 0.0, True)[0],
        "upsample_cross_entropy smoothed": cross_entropy.plan(logits, labels, weights, 255, 0.1, True)[0],
        "depthwise_gelu": depthwise_gelu.plan(tokens, kernel, bias, tokens, 128, 128),
        "depthwise_gelu sums": depthwise_gelu.plan_gradient(tokens, tokens, kernel, bias, tokens, 128, 128)[0],
        "depthwise_gelu gradient": depthwise_gelu.plan(tokens, kernel, bias, tokens, 128, 128, is_gradient=True),
        "upsample_sum": decode_head.plan(maps, None, None, maps[0]),
        "upsample_sum_relu": decode_head.plan(maps, factor, factor, maps[0]),
        "upsample_sum gradient": decode_head.plan_gradient(maps[0], maps[3]),
    }


def compile_all() -> list[Compiled]:
    """Every kernel, type and capability; no GPU is needed."""
    import triton

    return [
        Compiled(name, str(dtype).removeprefix("torch."), capability, *launch.compile(capability), triton.__version__)
        for dtype in DTYPES
        for name, launch in launches(dtype).items()
        for capability in CAPABILITIES
    ]


def real_sizes() -> dict[str, list[dict[str, Any]]]:
    """Arguments of the checks on a GPU: a network's own sizes, odd ones, and 1, 63 and 1023."""
    return {
        "upsample_cross_entropy": [
            {"grid": (2, 150, 128, 128), "size": (512, 512), "strided": True},
            {"grid": (1, 19, 65, 129), "size": (257, 1023), "weighted": True, "label_smoothing": 0.1},
            {"grid": (3, 2, 1, 1), "size": (1, 63)},
        ],
        "upsample_argmax": [
            {"grid": (1, 19, 256, 512), "size": (1024, 2048)},
            {"grid": (1, 300, 63, 31), "size": (251, 1023), "strided": True},
            {"grid": (2, 3, 1, 1), "size": (63, 1)},
        ],
        "depthwise_gelu": [
            {"batch": 2, "channels": 128, "size": (128, 128)},
            {"batch": 1, "channels": 63, "size": (1, 1023), "strided": True},
            {"batch": 3, "channels": 2048, "size": (16, 15)},
        ],
        "upsample_sum": [{"dim": 256, "sizes": ((128, 128), (64, 64), (32, 32), (16, 16))}, {"dim": 63}],
        "upsample_sum_relu": [{"dim": 768, "sizes": ((128, 128), (64, 64), (32, 32), (16, 16))}, {"dim": 1}],
    }


def check_all(device: str, tiny: bool) -> int:
    """Each kernel against its plain twin; the number of those that are wrong."""
    from .gpu_checks import CHECKS, tolerance

    num_wrong = 0
    for name, check in CHECKS.items():
        for dtype in [torch.float32] if tiny else [*DTYPES, torch.float64]:
            for options in [{}] if tiny else real_sizes()[name]:
                try:
                    found = check(dtype, device, **options)
                except (RuntimeError, ValueError) as error:
                    found, options = float("inf"), {**options, "error": str(error)[:200]}
                is_right = found <= tolerance(name, dtype)
                num_wrong += not is_right
                print(f"{'right' if is_right else 'WRONG'} {name} {dtype} {options}: {found:.1e}", flush=True)
    return num_wrong


def stopwatch(call: Callable[[], Any], device: str, rounds: int) -> tuple[float, float | None]:
    """Median milliseconds of a call, by CUDA events, and the MiB that it takes at the peak."""
    for _ in range(0 if device == "cpu" else 5):
        call()
    if device == "cpu":
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - began))
        return statistics.median(times), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, pairs = torch.cuda.memory_allocated(), []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return statistics.median(start.elapsed_time(end) for start, end in pairs), peak


def plan_rows(tiny: bool) -> Iterator[tuple[str, str, tuple[int, int], int]]:
    """Task, variant, size and batch of every comparison, those of the goals first."""
    if tiny:
        yield from ((task, "b0", (32, 64), 1) for task in ("forward", "training", "labels"))
        return
    for variant in ("b0", "b2", "b5"):
        for size, batches in (((512, 512), (8, 1, 32)), ((1024, 1024), (8, 1))):
            for batch in batches:
                yield "forward", variant, size, batch
                yield "training", variant, size, batch
        yield "forward", variant, (1024, 2048), 1
    yield "labels", "b0", (1024, 2048), 1


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, check, time; the status is 1 if a kernel is wrong or something could not be done."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, for Triton's interpreter")
    parser.add_argument("--compile-only", action="store_true", help="compile for sm_80 and sm_90; needs no GPU")
    parser.add_argument("--check", action="store_true", help="only compare with the plain versions")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further row is begun")
    parser.add_argument("--rounds", type=int, default=21, help="samples of each candidate")
    parser.add_argument("--results", type=Path, help="folder of the CSV files (default: benchmarks/results)")
    arguments = parser.parse_args(argv)
    if arguments.compile_only:
        rows = compile_all()
        write_rows((arguments.results or RESULTS) / "gpu_compiled.csv", rows)
        spilled = sorted({row.kernel for row in rows if row.stack})
        print(f"{len(rows)} compiled; registers spilled by: {', '.join(spilled) or 'none'}")
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu: there is no CUDA GPU here; --compile-only needs none", file=sys.stderr)
        return 1
    if arguments.device == "cpu" and not (arguments.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        print("gpu: on a CPU give --tiny, and set TRITON_INTERPRET=1 before", file=sys.stderr)
        return 1
    if num_wrong := check_all(arguments.device, arguments.tiny):
        print(f"gpu: {num_wrong} checks are wrong, nothing is timed", file=sys.stderr)
        return 1
    if arguments.check:
        return 0
    from .gpu_timing import measure

    return measure(arguments)


def identity(device: str) -> dict[str, str]:
    """GPU, driver, versions and commit, as each row holds them."""
    import subprocess

    import triton

    driver = ""
    if device == "cuda":
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True).stdout.strip().split("\n")[0]
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none: Triton's interpreter",
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": machine()["transformers"],
        "commit": machine()["commit"],
    }


if __name__ == "__main__":
    sys.exit(main())
