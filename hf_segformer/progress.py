"""Progress of long jobs on stderr, a bar in a terminal, a line a minute in a log."""

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
_COUNTER = "{desc}: {n_fmt} {unit} [{elapsed}, {rate_noinv_fmt}]"
_SECONDS = 60.0  # between the lines of a log


class Progress:
    """Progress of a job, by its number of steps where that is known.

    Carriage returns fill a log with copies of one bar, so that where stderr is no terminal a line is printed each
    minute, and none for jobs that are shorter.

    Args:
        task: name of the job, such as "predict".
        total: number of steps; None if it is not known.
        unit: what a step is, in the plural: images, tiles.
        initial: steps that were done before.
        is_shown: False prints nothing.

    Examples:
        >>> from hf_segformer.progress import Progress
        >>> with Progress("predict", 3, "images") as progress:
        ...     progress.update(3)
        >>> progress.done
        3
    """

    def __init__(self, task: str, total: int | None, unit: str, initial: int = 0, is_shown: bool = True):
        self.task, self.total, self.unit, self.done = task, total, unit, initial
        self._initial, self._is_shown = initial, is_shown
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        self._began = self._printed = time.monotonic()
        if self._is_shown and self.total != 0 and sys.stderr.isatty():
            self._bar = tqdm(
                desc=self.task,
                total=self.total,
                initial=self.done,
                unit=self.unit,
                bar_format=_COUNTER if self.total is None else _BAR,
                leave=False,
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar is not None:
            self._bar.close()

    def update(self, steps: int = 1) -> None:
        """Count steps as done."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(steps)
        elif self._is_shown and not sys.stderr.isatty() and time.monotonic() - self._printed >= _SECONDS:
            self._print()

    def skip(self, steps: int = 1) -> None:
        """Take steps out of the job."""
        if self.total is None:
            return
        self.total -= steps
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.refresh()

    def _print(self) -> None:
        self._printed = time.monotonic()
        rate = (self.done - self._initial) / (self._printed - self._began)
        of, left = "", ""
        if self.total is not None:
            of = f" of {self.total}"
            left = f", {tqdm.format_interval((self.total - self.done) / rate)} left" if rate else ""
        print(
            f"{self.task}: {self.done}{of} {self.unit}, {rate:.2f} {self.unit}/s{left}",
            file=sys.stderr,
            flush=True,
        )


__all__ = ["Progress"]
