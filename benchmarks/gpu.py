"""Kernels on a GPU: checked against their references, and timed against Transformers, in one call.

A process measures, and this one keeps the file: a kernel that fails, crashes or hangs leaves a row that says so, and
what follows is measured by a new process. When `--minutes` are over, the same command resumes, as long as GPU, versions
and code are the same; what matters most comes first.

`--check` stops before timing. `--compile-only` needs no GPU: it compiles each kernel and writes what it takes of one.
`--device cpu --tiny`, with TRITON_INTERPRET=1, runs all of it in Triton's interpreter, to see that it runs; its times
mean nothing, and go to no file unless `--results` names another folder.
"""

import argparse
import csv
import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .machine import ROOT, machine
from .record import RESULTS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CAPABILITIES = (80, 90)
CANDIDATES = ("transformers", "reference", "kernels", "kernels graph", "transformers compiled", "reference compiled")


class Key(NamedTuple):
    """Key of a row. In a check, `variant` is the kernel, `size` an index of `real_sizes`, `candidate` a dtype."""

    task: str
    variant: str
    size: str
    batch: int
    candidate: str


@dataclass(frozen=True)
class Row:
    """One measurement: a candidate at a task, its median time, peak memory, and share of the peaks measured."""

    task: str
    variant: str
    size: str
    batch: int
    candidate: str
    milliseconds: float | None = None
    mebibytes: float | None = None
    share_of_bandwidth: float | None = None
    share_of_matrix_peak: float | None = None
    is_right: bool | None = None
    note: str = ""
    gpu: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    transformers: str = ""
    commit: str = ""
    code: str = ""

    @property
    def key(self) -> Key:
        """Key of the row."""
        return Key(self.task, self.variant, self.size, self.batch, self.candidate)

    @property
    def has_failed(self) -> bool:
        """Return True if a number is missing or wrong."""
        return not self.is_right if self.task == "check" else self.milliseconds is None

    def __str__(self) -> str:
        words = [self.task, self.variant, self.size, self.batch, self.candidate]
        if self.task == "check":
            words.append("right" if self.is_right else "WRONG")
        if self.milliseconds is not None:
            words.append(f"{self.milliseconds:.3f} ms")
        if self.mebibytes is not None:
            words.append(f"{self.mebibytes:.0f} MiB")
        if self.share_of_bandwidth is not None:
            words.append(f"{self.share_of_bandwidth:.0%} of bandwidth")
        return " ".join(map(str, [*words, self.note]))


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Replace the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    partial.replace(path)


def read_rows(path: Path, about: Mapping[str, str]) -> list[Row]:
    """Return the rows of a file that the same GPU, versions and code gave, at any commit."""
    if not path.exists():
        return []
    readers: dict[Any, Any] = {int: int, str: str, bool | None: lambda cell: cell == "True" if cell else None}
    with path.open(newline="") as file:
        return [
            Row(
                **{
                    each.name: readers.get(each.type, lambda cell: float(cell) if cell else None)(cells[each.name])
                    for each in fields(Row)
                }
            )
            for cells in csv.DictReader(file)
            if all(cells.get(name) == value for name, value in about.items() if name != "commit")
        ]


@dataclass(frozen=True)
class Compiled:
    """Resources of a kernel as the compiler reports them; bytes on the stack are spilled registers."""

    kernel: str
    dtype: str
    capability: int
    registers: int
    stack: int
    shared: int
    triton: str


def launches(dtype: torch.dtype) -> dict[str, Any]:
    """Every kernel as B0 calls it at 8x3x512x512 with 150 classes; tensors have no memory."""
    from hf_segformer.kernels import argmax, cross_entropy, decode_head, depthwise_gelu

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


def plan_checks(tiny: bool) -> list[Key]:
    """Each kernel at each of its sizes, in each type."""
    dtypes = [torch.float32] if tiny else [*DTYPES, torch.float64]
    return [
        Key("check", name, str(number), 1, str(dtype).removeprefix("torch."))
        for name, sizes in real_sizes().items()
        for number in range(1 if tiny else len(sizes))
        for dtype in dtypes
    ]


def plan_times(tiny: bool, device: str) -> list[Key]:
    """Plan single kernels, labels and networks: the goals first, compiled candidates last because they take long.

    CUDA graphs and compilers are left out of the interpreter.
    """
    from .gpu_timing import KERNEL_CALLS

    batch, large = (1, "32x64") if tiny else (8, "1024x2048")
    keys = [Key("peak", "", "", 1, name) for name in ("copy", "matrix")]
    keys += [Key("kernel", "", "", batch, name) for name in KERNEL_CALLS]
    keys += [Key("labels", "", large, 1, name) for name in ("transformers", "reference", "kernels")]
    goals = [("b0", "32x64", 1)] if tiny else [(variant, "512x512", 8) for variant in ("b0", "b2", "b5")]
    places = [
        (variant, *place)
        for variant, *_ in goals
        for place in (("512x512", 1), ("512x512", 32), ("1024x1024", 8), ("1024x1024", 1), (large, 1))
    ]
    networks = [
        Key(task, *place, candidate)
        for place in (goals if tiny else goals + places)
        for task in ("forward", "training")
        if task == "forward" or place[1] != large or tiny
        for candidate in CANDIDATES
        if device == "cuda" or candidate in ("transformers", "reference", "kernels")
    ]
    soon = [key for key in networks if key[1:4] in goals and (key.variant == "b0" or not _compiles(key))]
    later = [key for key in networks if key not in soon]
    return keys + sorted(soon, key=_compiles) + sorted(later, key=_compiles)


def _compiles(key: Key) -> bool:
    return key.candidate.endswith("compiled")


def _patience(key: Key) -> float:
    """Return the seconds after which a row counts as hanging; compiling a large network takes minutes."""
    return 600 if _compiles(key) else 300


def _work(connection: Connection, keys: Sequence[Key], settings: tuple[str, bool, int], wrong: set[str]) -> None:
    """Send each row's key before it is measured, and its result after (the measuring process)."""
    from .gpu_timing import is_usable, measure

    for key in keys:
        connection.send(key)
        result = measure(key, *settings, wrong)
        connection.send(result)
        if key.task == "check" and _bars(key, result.get("is_right")):
            wrong.add(key.variant)
        if not is_usable(settings[0]):
            return  # after a fault no call of this process can succeed


def _bars(key: Key, is_right: bool | None) -> bool:
    """Return True if a check's result excludes the kernel from timing, which is in bfloat16."""
    return not is_right and key.candidate != "float64"


def _results(
    keys: Sequence[Key], settings: tuple[str, bool, int], wrong: set[str], deadline: float
) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Yield the results of one measuring process until it ends, time is over, or a row hangs.

    Raises:
        RuntimeError: if the process dies before it begins with a row.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, keys, settings, wrong), daemon=True)
    process.start()
    theirs.close()  # so that the process's end is the end of what can be received
    key = None
    try:
        while (left := deadline - time.monotonic()) > 0:
            if ours.poll(left if key is None else min(left, _patience(key))):
                received = ours.recv()
                if key is not None:
                    yield key, received
                key = received if key is None else None
            elif time.monotonic() < deadline and key is not None:
                yield key, {"note": f"took more than {_patience(key)} s"}
                return
    except EOFError:
        process.join(30)
        if key is not None:
            yield key, {"note": f"the process died, status {process.exitcode}"}
        elif process.exitcode:
            raise RuntimeError(f"the process that measures died before it began, status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def run(keys: Sequence[Key], arguments: argparse.Namespace, path: Path | None) -> list[Row]:
    """Measure what the file does not hold yet, and write it after each row, until the minutes are over.

    Raises:
        RuntimeError: if a measuring process dies before it begins with a row.
    """
    deadline = time.monotonic() + 60 * arguments.minutes
    about, settings = identity(arguments.device), (arguments.device, arguments.tiny, arguments.rounds)
    rows = read_rows(path, about) if path else []
    while (todo := _missing(keys, rows)) and time.monotonic() < deadline:
        wrong = {row.variant for row in rows if row.task == "check" and _bars(row.key, row.is_right)}
        for key, result in _results(todo, settings, wrong, deadline):
            rows.append(Row(*key, **result, **about))
            if path:
                write_rows(path, rows)
            print(rows[-1], flush=True)
    return rows


def _missing(keys: Sequence[Key], rows: Sequence[Row]) -> list[Key]:
    measured = {row.key for row in rows}
    return [key for key in keys if key not in measured]


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """Yield for each task how many times as fast as Transformers the others are, and their share of its memory."""
    times = [row for row in rows if row.milliseconds and row.task in ("labels", "forward", "training")]
    for base in (row for row in times if row.candidate == "transformers"):
        words = [f"{base.task} {base.variant} {base.size} {base.batch}: {base.milliseconds:.2f} ms"]
        for row in times:
            if row.key[:4] == base.key[:4] and row is not base:
                memory = f", {row.mebibytes / base.mebibytes:.0%}" if row.mebibytes and base.mebibytes else ""
                words.append(f"{row.candidate} {base.milliseconds / row.milliseconds:.2f}x{memory}")
        yield "  ".join(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, check, time; the status is 1 if a kernel is wrong, something could not be done, or is left to do."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, for Triton's interpreter")
    parser.add_argument("--compile-only", action="store_true", help="compile for sm_80 and sm_90; needs no GPU")
    parser.add_argument("--check", action="store_true", help="only compare with the references")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it stops (default: 9)")
    parser.add_argument("--rounds", type=int, default=21, help="samples of each candidate, fewer where they take long")
    parser.add_argument("--results", type=Path, help="folder of the CSV files (default: benchmarks/results)")
    arguments = parser.parse_args(argv)
    if arguments.compile_only:
        compiled = compile_all()
        write_rows((arguments.results or RESULTS) / "gpu_compiled.csv", compiled)
        spilled = sorted({each.kernel for each in compiled if each.stack})
        print(f"{len(compiled)} compiled; registers spilled by: {', '.join(spilled) or 'none'}")
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu: there is no CUDA GPU here; --compile-only needs none", file=sys.stderr)
        return 1
    if arguments.device == "cpu" and not (arguments.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        print("gpu: on a CPU give --tiny, and set TRITON_INTERPRET=1 before", file=sys.stderr)
        return 1
    keys = plan_checks(arguments.tiny)
    if not arguments.check:
        keys += plan_times(arguments.tiny, arguments.device)
    is_kept = arguments.device == "cuda" or arguments.results
    try:
        rows = run(keys, arguments, (arguments.results or RESULTS) / "gpu.csv" if is_kept else None)
    except RuntimeError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 1
    print(*summary(rows), sep="\n")
    failed, missing = [row for row in rows if row.has_failed], _missing(keys, rows)
    if failed:
        print("gpu: wrong, or without a time:", *failed, sep="\n", file=sys.stderr)
    if missing:
        print(f"gpu: {len(missing)} rows are left; the same command continues", file=sys.stderr)
    return 1 if failed or missing else 0


def identity(device: str) -> dict[str, str]:
    """GPU, driver, versions, commit and a digest of the code, as each row holds them."""
    import triton

    code = hashlib.sha256()
    for file in sorted([*ROOT.glob("hf_segformer/**/*.py"), *ROOT.glob("benchmarks/gpu*.py")]):
        code.update(file.read_bytes())
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none: Triton's interpreter",
        "driver": _driver() if device == "cuda" else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": machine()["transformers"],
        "commit": machine()["commit"],
        "code": code.hexdigest()[:10],
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip().split("\n")[0]
    except OSError:  # not every container has it
        return "not known"


if __name__ == "__main__":
    sys.exit(main())
