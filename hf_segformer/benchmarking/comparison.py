"""Comparison of candidates in time and memory, once their results agree.

A candidate that computes something else gets no figures.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .memory import peak_memory
from .timing import Call, Timing, interleaved_timing

TOLERANCE = 1e-4  # of the largest value, in float32 through forty blocks


class DisagreementError(ValueError):
    """Two candidates compute different results, so their times cannot be compared."""


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value; infinite for other shapes or NaN."""
    if found.shape != expected.shape:
        return math.inf
    difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    return difference.item() if difference.isfinite() else math.inf


def require_agreement(differences: Mapping[str, float], tolerance: float) -> float:
    """Return the largest of the candidates' differences.

    Raises:
        DisagreementError: if one exceeds the tolerance; the message names the candidate.
    """
    name, worst = max(differences.items(), key=lambda item: item[1])
    if not worst <= tolerance:
        raise DisagreementError(
            f"{name} differs by {worst:.1e} of the largest value; expected at most {tolerance:.0e}, so times are not "
            "compared"
        )
    return worst


@dataclass(frozen=True)
class Measurement:
    """Time and memory of one candidate.

    Attributes:
        name: name of the candidate.
        timing: timing of its calls.
        memory: bytes at the peak; None where the system does not say, or it was not measured.
        difference: difference of its result from the first candidate's, whose own is None.
    """

    name: str
    timing: Timing
    memory: int | None = None
    difference: float | None = None


def compare(
    builds: Mapping[str, Callable[[], Call]],
    *,
    tolerance: float = TOLERANCE,
    difference: Callable[[Any, Any], float] = largest_difference,
    differences: Mapping[str, float] | None = None,
    memory_of: Sequence[str] = (),
    device: str = "cpu",
    **settings: Any,
) -> list[Measurement]:
    """Measure time and memory of candidates whose results agree.

    Args:
        builds: functions that make each candidate's call; the first one's result is the reference.
        tolerance: difference that is allowed.
        difference: function of a result and the reference.
        differences: differences by candidate, where the results of the calls cannot be compared.
        memory_of: candidates whose memory is measured, each in a process of its own.
        device: PyTorch device.
        **settings: arguments of `interleaved_timing`.

    Raises:
        DisagreementError: if results differ.
    """
    calls = {name: build() for name, build in builds.items()}
    if differences is None:
        [_, expected], *others = [(name, call()) for name, call in calls.items()]
        differences = {name: difference(found, expected) for name, found in others}
    require_agreement(differences, tolerance)
    timings = interleaved_timing(calls, **settings)
    calls.clear()
    memory = {name: peak_memory(builds[name], device) for name in memory_of}
    return [Measurement(name, timings[name], memory.get(name), differences.get(name)) for name in builds]


__all__ = ["TOLERANCE", "DisagreementError", "Measurement", "compare", "largest_difference", "require_agreement"]
