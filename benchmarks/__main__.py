"""All rows, each in a process of its own, then the page (`make bench`).

The longest, folders of images and images of up to 30,000 x 30,000 pixels, are measured only when they are named.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

from .machine import ROOT, machine
from .record import RESULTS, file_of, read_records
from .report import SCRIPTS

LONG = ("predict", "large_images")  # twenty minutes, which `make bench` leaves to `make bench-large`


def is_measured(script: str, row: str, device: str = "cpu") -> bool:
    """Return True if the row was measured on this processor at this commit, undisturbed."""
    records = [record for record in read_records(file_of(RESULTS, script, device)) if record.row == row]
    return bool(records) and all(
        record.commit == machine()["commit"] and record.quiet is not False for record in records
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the page whatever failed; the status is 1 if anything failed."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "scripts", nargs="*", metavar="SCRIPT", help=f"of {', '.join(SCRIPTS)} (default: all but {', '.join(LONG)})"
    )
    parser.add_argument("--missing", action="store_true", help="only rows that were not measured at this commit")
    parser.add_argument("--device", default="cpu", help="PyTorch device (default: cpu)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.scripts) - set(SCRIPTS):
        parser.error(f"unknown scripts {', '.join(sorted(unknown))}; expected {', '.join(SCRIPTS)}")
    began, failed = time.perf_counter(), []
    for script in arguments.scripts or [name for name in SCRIPTS if name not in LONG]:
        for row in SCRIPTS[script]:
            if arguments.missing and is_measured(script, row, arguments.device):
                continue
            minutes = (time.perf_counter() - began) / 60
            print(f"--- {script} {row} (after {minutes:.1f} minutes)", flush=True)
            command = [sys.executable, "-m", f"benchmarks.{script}", row, "--device", arguments.device]
            if subprocess.run(command, cwd=ROOT).returncode:
                failed.append(f"{script} {row}")
    status = subprocess.run([sys.executable, "-m", "benchmarks.report"], cwd=ROOT).returncode
    if failed:
        print(f"not measured, old figures kept: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or status else 0


if __name__ == "__main__":
    sys.exit(main())
