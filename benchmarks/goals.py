"""What is asked of speed and memory, and what the records say of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import compiled
from .record import Record

OURS, THEIRS = "hf_segformer", "transformers"
COMPILED = ("hf_segformer compiled", "hf_segformer compiled, any size")
RUNTIMES = ("transformers compiled", "transformers in ONNX Runtime", "transformers in OpenVINO")

Row = dict[str, Record]
Results = dict[str, dict[str, Row]]


def speed(row: Row, ours: Sequence[str], theirs: Sequence[str]) -> float | None:
    """The fastest of theirs over the fastest of ours: how many times as fast."""
    fastest = [
        min((row[name].milliseconds for name in names if name in row and row[name].milliseconds), default=None)
        for names in (theirs, ours)
    ]
    return fastest[0] / fastest[1] if all(fastest) else None


def memory(row: Row, ours: Sequence[str], theirs: Sequence[str]) -> float | None:
    """Our peak as a share of theirs."""
    [mine], [other] = ([row[name].mebibytes for name in names if name in row] or [None] for names in (ours, theirs))
    return mine / other if mine is not None and other else None


def share_of_peak(row: Row, ours: Sequence[str], theirs: Sequence[str]) -> float | None:
    """The fastest of ours as a share of the matrix product's rate."""
    rates = {name: each.gigaflop / each.milliseconds for name, each in row.items() if each.gigaflop}
    mine = [rates[name] for name in ours if name in rates]
    return max(mine) / rates[compiled.PRODUCT] if mine and compiled.PRODUCT in rates else None


@dataclass(frozen=True)
class Goal:
    """One claim.

    Attributes:
        work: what is done, in words.
        script: whose file has the row.
        row: in that file.
        goal: number to reach, or not to exceed where it is memory.
        quantity: `speed`, `memory` or `share_of_peak`.
        ours: candidates of which the fastest counts.
        theirs: likewise.
    """

    work: str
    script: str
    row: str
    goal: float
    quantity: Callable[..., float | None] = speed
    ours: tuple[str, ...] = (OURS,)
    theirs: tuple[str, ...] = (THEIRS,)

    def measured(self, results: Results) -> float | None:
        """The number, or None where it was not measured."""
        return self.quantity(results.get(self.script, {}).get(self.row, {}), self.ours, self.theirs)

    def is_reached(self, measured: float) -> bool:
        """Whether the number is as good as the goal."""
        return measured <= self.goal if self.quantity is memory else measured >= self.goal

    def format(self, number: float) -> str:
        """The number with its unit."""
        if self.quantity is share_of_peak:
            return f"{number:.0%} of the peak"
        return f"{number:.2f} of the memory" if self.quantity is memory else f"{number:.2f}x"


_AUTOCAST = {"ours": ("hf_segformer bfloat16",), "theirs": (OURS,)}
_WIDE = "B0, 1x3x1024x2048, eager"
GOALS = (
    Goal("B0, 1x3x512x512, eager", "inference", "b0", 6),
    Goal("B2, 1x3x512x512, eager", "inference", "b2", 9),
    Goal("B5, 1x3x512x512, eager", "inference", "b5", 4.2),
    Goal("B0, 1x3x512x512, eager", "inference", "b0", 1 / 6, memory),
    Goal("B2, 1x3x512x512, eager", "inference", "b2", 1 / 6, memory),
    Goal("B5, 1x3x512x512, eager", "inference", "b5", 1 / 6, memory),
    Goal("B0, 8x3x512x512, eager", "inference", "b0_batch8", 4),
    Goal(_WIDE, "inference", "b0_wide", 6),
    Goal("B0, compiled, against the best of others", "compiled", "b0", 2.6, speed, COMPILED, RUNTIMES),
    Goal("B2, compiled, against the best of others", "compiled", "b2", 3, speed, COMPILED, RUNTIMES),
    Goal("B0, compiled or eager", "compiled", "b0", 0.45, share_of_peak, (OURS, *COMPILED)),
    Goal("B2, compiled or eager", "compiled", "b2", 0.60, share_of_peak, (OURS, *COMPILED)),
    Goal("B0, compiled for any size, against eager", "compiled", "b0", 1, speed, COMPILED[1:], (OURS,)),
    Goal("B2, compiled for any size, against eager", "compiled", "b2", 1, speed, COMPILED[1:], (OURS,)),
    Goal("B0, training step, batch 4", "training", "b0_batch4", 5),
    Goal("B0, training step, batch 4", "training", "b0_batch4", 0.28, memory),
    Goal("B2, training step, batch 2", "training", "b2_batch2", 3.6),
    Goal("B2, training step, batch 2", "training", "b2_batch2", 0.45, memory),
    Goal("B0, training step, batch 4, one core busy", "training", "b0_batch4_busy", 1),
    Goal("Labels of 19 classes, 1024x2048, scene", "labels", "scene", 5),
    Goal("Labels of 19 classes, 1024x2048, scene", "labels", "scene", 0.10, memory),
    Goal("Labels of 19 classes, 1024x2048, noise", "labels", "noise", 5),
    Goal("Labels of 19 classes, 1024x2048, noise", "labels", "noise", 0.10, memory),
    Goal("B0, bfloat16 autocast, against float32", "bfloat16", "b0", 1.8, **_AUTOCAST),
    Goal("B2, bfloat16 autocast, against float32", "bfloat16", "b2", 1.8, **_AUTOCAST),
)
