"""Rows of measurements in CSV files, with machine, versions and commit.

A row is a comparison, such as B0 at 512x512, with a record for each candidate. It is replaced as a whole, only by one
that succeeded, and only by one of the same processor.
"""

import argparse
import csv
import datetime
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from hf_segformer.benchmarking.memory import MEBIBYTE
from hf_segformer.benchmarking.tasks import check_machine
from hf_segformer.benchmarking.timing import Timing

from .machine import ROOT, machine

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Options:
    """Options of the command line.

    Attributes:
        device: of PyTorch.
        rounds: samples wanted of each candidate; a row may ask for fewer where a call takes seconds.
        budget: seconds a row may spend on measuring disturbed rounds again.
    """

    device: str = "cpu"
    rounds: int = 11
    budget: float = 20.0

    def turns(self, most: int = 99, **others: Any) -> dict[str, Any]:
        """Arguments of `interleaved_timing`, with at most so many rounds."""
        return {"rounds": min(self.rounds, most), "budget": self.budget, **others}


@dataclass(frozen=True)
class Record:
    """One candidate in one row.

    Attributes:
        row: what is compared.
        candidate: who computes it.
        milliseconds: median.
        fastest: fastest sample, in milliseconds.
        slowest: slowest sample, in milliseconds.
        samples: that the median is taken of.
        disturbed: rounds that were thrown away.
        quiet: whether other processes left the machine alone; None where the system does not tell.
        mebibytes: by which memory grows at the peak.
        first_call: seconds, with compiling.
        difference: from the first candidate, relative to the largest value; how the row takes it, the row says.
        gigaflop: billions of operations in a call, two a multiply-add.
        note: why there are no numbers, or what is particular.
        device: of PyTorch; with the number of threads on a CPU.
        machine: see `machine`.
        date: of the measurement.
    """

    row: str
    candidate: str
    milliseconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    samples: int | None = None
    disturbed: int | None = None
    quiet: bool | None = None
    mebibytes: float | None = None
    first_call: float | None = None
    difference: float | None = None
    gigaflop: float | None = None
    note: str = ""
    device: str = "cpu"
    threads: int = field(default_factory=torch.get_num_threads)
    processor: str = field(default_factory=lambda: machine()["processor"])
    instructions: str = field(default_factory=lambda: machine()["instructions"])
    caches: str = field(default_factory=lambda: machine()["caches"])
    cores: int | None = field(default_factory=lambda: machine()["cores"])
    gibibytes: int | None = field(default_factory=lambda: machine()["gibibytes"])
    system: str = field(default_factory=lambda: machine()["system"])
    python: str = field(default_factory=lambda: machine()["python"])
    torch: str = field(default_factory=lambda: machine()["torch"])
    transformers: str = field(default_factory=lambda: machine()["transformers"])
    runtimes: str = field(default_factory=lambda: machine()["runtimes"])
    commit: str = field(default_factory=lambda: machine()["commit"])
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    @classmethod
    def of(cls, row: str, candidate: str, timing: Timing, memory: int | None = None, **others: Any) -> "Record":
        """Return the record of a result of `interleaved_timing` and `peak_memory`."""
        if (device := torch.device(others.get("device", "cpu"))).type == "cuda":  # the card is what computed
            others |= {"processor": torch.cuda.get_device_name(device), "instructions": "CUDA"}
        return cls(
            row,
            candidate,
            milliseconds=_digits(1000 * timing.median),
            fastest=_digits(1000 * min(timing.seconds)),
            slowest=_digits(1000 * max(timing.seconds)),
            samples=len(timing.seconds),
            disturbed=timing.num_disturbed,
            quiet=timing.is_quiet,
            mebibytes=None if memory is None else round(memory / MEBIBYTE, 1),
            **others,
        )


def _digits(number: float) -> float:
    return float(f"{number:.5g}")


_READERS: dict[Any, Callable[[str], Any]] = {
    float | None: lambda cell: float(cell) if cell else None,
    int | None: lambda cell: int(cell) if cell else None,
    bool | None: lambda cell: cell == "True" if cell else None,
    int: int,
    str: str,
}


def file_of(folder: Path, script: str, device: str) -> Path:
    """Return the file of a script's records; each processor, and each graphics card, has a folder of its own."""
    if torch.device(device).type == "cpu":
        name = f"{machine()['processor']} {machine()['instructions']} {machine()['cores']} cores"
    else:
        name = torch.cuda.get_device_name(device)
    return folder / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") / f"{script}.csv"


def read_records(path: Path) -> list[Record]:
    """All records of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Record(**{each.name: _READERS[each.type](cells[each.name]) for each in fields(Record)})
            for cells in csv.DictReader(file)
        ]


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Replace the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Record)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(record) for record in records)
    partial.replace(path)


def replace_row(path: Path, records: Sequence[Record]) -> None:
    """Put a row's records in the place of its old ones, at the same place in the file.

    Raises:
        ValueError: if the old ones are better: they hold times and the new ones do not, or they were measured on an
            undisturbed machine and the new ones were not.
    """
    [row] = {record.row for record in records}
    old = read_records(path)
    standing = [record for record in old if record.row == row]
    if _is_measured(standing) and not _is_measured(records):
        raise ValueError(f"{row} could not be measured, and its old numbers stay in {path}")
    if _is_undisturbed(standing) and not _is_undisturbed(records):
        raise ValueError(
            f"other processes disturbed {row}, and its old numbers, which nobody disturbed, stay in {path}; delete "
            "them there to have the new ones"
        )
    places = [place for place, record in enumerate(old) if record.row == row]
    place = places[0] if places else len(old)
    write_records(path, [*old[:place], *records, *(record for record in old[place:] if record.row != row)])


def _is_measured(records: Sequence[Record]) -> bool:
    return any(record.milliseconds is not None for record in records)


def _is_undisturbed(records: Sequence[Record]) -> bool:
    return _is_measured(records) and all(record.quiet is not False for record in records)


Row = Callable[[Options], Sequence[Record]]


def main(name: str, rows: Mapping[str, Row], description: str, argv: Sequence[str] | None = None) -> int:
    """Measure rows of one script and write them to its file; the status is 1 if one of them failed.

    Args:
        name: of the script, and of its file.
        rows: what measures each row.
        description: for --help.
        argv: arguments after the program's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=description)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(rows)} (default: all)")
    parser.add_argument("--device", default=Options.device, help="of PyTorch (default: cpu)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and of other runtimes (default: 2)")
    parser.add_argument("--rounds", type=int, default=Options.rounds, help="samples wanted (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=Options.budget, help="seconds a row for disturbed rounds")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.rows) - set(rows):
        parser.error(f"unknown rows {', '.join(sorted(unknown))}: there are {', '.join(rows)}")
    try:
        check_machine(arguments.device, arguments.threads)
    except ValueError as error:
        parser.error(str(error))
    options, status = Options(arguments.device, arguments.rounds, arguments.budget), 0
    for row in arguments.rows or rows:
        try:
            records = rows[row](options)
            replace_row(file_of(arguments.results, name, arguments.device), records)
        except (ValueError, RuntimeError, OSError) as error:
            print(f"{name} {row}: {' '.join(str(error).split())}", file=sys.stderr)
            status = 1
            continue
        for record in records:
            print(summary(record), flush=True)
    return status


def summary(record: Record) -> str:
    """Return a record as one line."""
    words = [f"{record.row:<16} {record.candidate:<28}"]
    if record.milliseconds is not None:
        spread = f" ({record.fastest:,.1f} to {record.slowest:,.1f})" if record.samples else ""
        words.append(f"{record.milliseconds:>10,.1f} ms{spread}")
    if record.mebibytes is not None:
        words.append(f"{record.mebibytes:>8,.0f} MiB")
    if record.first_call is not None:
        words.append(f"first call {record.first_call:.1f} s")
    if record.difference is not None:
        words.append(f"difference {record.difference:.0e}")
    if record.quiet is False:
        words.append("DISTURBED")
    return "  ".join([*words, record.note]).rstrip()
