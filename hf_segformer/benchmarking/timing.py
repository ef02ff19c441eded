"""Interleaved timing: the samples of several calls alternate, so that a machine that drifts affects all of them.

Rounds during which other processes used the machine are measured again.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUIET = 0.05  # share of the machine that other processes may use
_TICK = 0.03  # seconds by which the kernel's count of busy time may be off
_SAMPLE = 0.1  # seconds: shorter calls are repeated, and their mean is the sample
_RETRY = 0.5  # seconds before a disturbed round is measured again
_PAUSE = 0.02  # seconds until the threads of the call before are asleep

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Times of one candidate.

    Attributes:
        seconds: one sample per round.
        num_disturbed: rounds that were discarded because other processes used the machine.
        is_quiet: True if the remaining rounds were undisturbed; None where the system does not say.
    """

    seconds: tuple[float, ...]
    num_disturbed: int = 0
    is_quiet: bool | None = None

    @property
    def median(self) -> float:
        """Median sample in seconds."""
        return statistics.median(self.seconds)


class OtherLoad:
    """Share of the machine that other processes use (Linux)."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start an interval."""
        self.began, self.own, self.busy = time.perf_counter(), time.process_time(), _busy_seconds()

    def share(self) -> float | None:
        """Return the share of all cores' time since `start`, 0 to 1; None where the system does not say."""
        busy = _busy_seconds()
        if busy is None or self.busy is None:
            return None
        others = busy - self.busy - (time.process_time() - self.own) - _TICK
        return max(others, 0.0) / ((time.perf_counter() - self.began) * (os.cpu_count() or 1))


def _busy_seconds() -> float | None:
    """Return the busy time of all cores since boot, including time taken by a hypervisor."""
    statistics_file = Path("/proc/stat")
    if not statistics_file.exists():
        return None
    user, nice, system, _idle, _waiting, *others = map(int, statistics_file.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def interleaved_timing(
    calls: Mapping[str, Call],
    *,
    rounds: int = 7,
    budget: float = 20.0,
    allowed: float = QUIET,
    clock: Callable[[], float] = time.perf_counter,
    load: Any = None,
) -> dict[str, Timing]:
    """Time calls in rounds, A B C A B C.

    A round during which other processes used more than `allowed` of the machine is discarded and measured again, until
    the budget is spent. If fewer than half of the rounds were quiet by then, all count, and the timing says so.

    Args:
        calls: callables by name; each runs once beforehand.
        rounds: number of samples of each.
        budget: seconds after which disturbed rounds are not measured again.
        allowed: share of the machine that other processes may use.
        clock: function that returns seconds.
        load: object with `start()` and `share()`, by default an `OtherLoad`.

    Returns:
        The timing of each call.

    Examples:
        >>> from hf_segformer.benchmarking.timing import interleaved_timing
        >>> calls = {"short": lambda: sum(range(100)), "long": lambda: sum(range(100000))}
        >>> timings = interleaved_timing(calls, rounds=3)
        >>> timings["short"].median < timings["long"].median
        True
    """
    load = OtherLoad() if load is None else load
    repeats = {name: _repeats(call, clock) for name, call in calls.items()}
    quiet: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    end, is_known = clock() + budget, True
    while len(quiet) < rounds and (len(quiet) + len(disturbed) < rounds or clock() < end):
        load.start()
        samples = {name: _sample(call, repeats[name], clock) for name, call in calls.items()}
        share = load.share()
        is_known = share is not None
        if share is None or share <= allowed:
            quiet.append(samples)
        else:
            disturbed.append(samples)
            time.sleep(_RETRY)
    is_quiet = len(quiet) >= math.ceil(rounds / 2)
    counted = quiet if is_quiet else quiet + disturbed
    return {
        name: Timing(
            tuple(samples[name] for samples in counted),
            len(disturbed) if is_quiet else 0,
            is_quiet if is_known else None,
        )
        for name in calls
    }


def _repeats(call: Call, clock: Callable[[], float]) -> int:
    """Return how many calls fill a sample, after a warm-up; a short call runs twice, as its first run is slow."""
    for _ in range(2):
        began = clock()
        call()
        seconds = clock() - began
        if seconds >= _SAMPLE:
            return 1
    return math.ceil(min(_SAMPLE / max(seconds, 1e-6), 1000))


def _sample(call: Call, repeats: int, clock: Callable[[], float]) -> float:
    time.sleep(_PAUSE)
    began = clock()
    for _ in range(repeats):
        call()
    return (clock() - began) / repeats


__all__ = ["QUIET", "Call", "OtherLoad", "Timing", "interleaved_timing"]
