"""Goals for speed and memory, and how far the records reach them: `python -m benchmarks.goals`.

CONTRIBUTING.md says how they are measured; docs/benchmarks.md shows results only.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import compiled
from .comparisons import COMPARISONS, OURS, Comparison, Results
from .record import RESULTS
from .report import instructions_of, name_of, read_processors, table

speed, memory, share_of_peak = Comparison.speed, Comparison.memory, Comparison.share_of_peak


@dataclass(frozen=True)
class Goal:
    """A figure to reach, or for memory not to exceed.

    Attributes:
        name: key of `COMPARISONS`.
        goal: the figure.
        quantity: method of `Comparison` that measures it.
        narrow: the figure on a processor without AVX-512, where it is another.
    """

    name: str
    goal: float
    quantity: Callable[[Comparison, Results], float | None] = speed
    narrow: float | None = None

    def on(self, results: Results) -> "Goal":
        """Return the goal for the processor of these results."""
        is_narrow = self.narrow is not None and instructions_of(results) != "AVX-512"
        return replace(self, goal=self.narrow, narrow=None) if is_narrow else self

    @property
    def comparison(self) -> Comparison:
        """The comparison that measures it."""
        return COMPARISONS[self.name]

    def measured(self, results: Results) -> float | None:
        """Return the figure, or None where it was not measured."""
        return self.quantity(self.comparison, results)

    def is_reached(self, measured: float) -> bool:
        """Return True if the figure is as good as the goal."""
        return measured <= self.goal if self.quantity is memory else measured >= self.goal

    def format(self, number: float) -> str:
        """Return a figure with its unit."""
        if self.quantity is share_of_peak:
            return f"{number:.0%} of the peak"
        return f"{number:.2f} of the memory" if self.quantity is memory else f"{number:.2f}x"


GOALS = (
    Goal("b0", 4.5, narrow=3.5),
    Goal("b2", 8, narrow=5),
    Goal("b5", 4.2),
    Goal("b0", 1 / 6, memory),
    Goal("b2", 1 / 6, memory),
    Goal("b5", 1 / 6, memory),
    Goal("b0_batch8", 4),
    Goal("b0_wide", 6),
    Goal("b0_compiled", 1.8),
    Goal("b2_compiled", 2.2),
    Goal("b0_eager", 0.45, share_of_peak),
    Goal("b2_eager", 0.60, share_of_peak),
    Goal("b0_any_size", 1),
    Goal("b2_any_size", 1),
    Goal("b0_training", 5, narrow=3.5),
    Goal("b0_training", 0.22, memory),
    Goal("b2_training", 3.6),
    Goal("b2_training", 0.45, memory),
    Goal("b0_crops128", 2.5),
    Goal("b0_crops256", 2.5),
    Goal("b0_busy", 1),
    Goal("scene", 5),
    Goal("scene", 0.05, memory),
    Goal("noise", 5),
    Goal("noise", 0.05, memory),
    Goal("b0_bfloat16", 1.8),
    Goal("b2_bfloat16", 1.8),
)


def goal_table(results: Results) -> str:
    """Return the goals with what was measured, as Markdown."""
    lines = []
    for goal in (each.on(results) for each in GOALS):
        work, measured, row = goal.comparison.work, goal.measured(results), goal.comparison.records(results)
        if measured is None:
            notes = {each.note for each in row.values() if each.note and each.milliseconds is None}
            lines.append((work, goal.format(goal.goal), "", "; ".join(notes) or "not measured", ""))
            continue
        reached = "reached" if goal.is_reached(measured) else "**not reached**"
        if any(each.quiet is False for each in row.values()):
            reached += ", machine disturbed"
        [commit] = {each.commit for each in row.values()}
        lines.append((work, goal.format(goal.goal), goal.format(measured), reached, f"`{commit}`"))
    return table(("work", "goal", "measured", "", "commit"), lines)


def demand_table(results: Results) -> str:
    """Return the time that each goal of speed leaves, and the share of the peak that it asks of the products."""
    lines = []
    for goal in (each.on(results) for each in GOALS):
        comparison = goal.comparison
        _, took = comparison.milliseconds(results)
        row = results.get("compiled", {}).get(comparison.row, {})
        rates = [each.gigaflop for each in row.values() if each.gigaflop]
        is_asked = goal.quantity is speed and comparison.script in ("inference", "compiled")
        if not (is_asked and comparison.others != (OURS,) and rates and took):
            continue
        wanted, peak = took / goal.goal, row[compiled.PRODUCT].gigaflop / row[compiled.PRODUCT].milliseconds
        cells = (f"{took:,.1f}", f"{wanted:,.1f}", f"{rates[0] / wanted / peak:.0%}")
        lines.append((comparison.work, goal.format(goal.goal), *cells))
    return table(("work", "goal", "others, ms", "the goal leaves, ms", "of the peak"), lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser("python -m benchmarks.goals", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the processors' folders")
    try:
        processors = read_processors(parser.parse_args(argv).results)
    except ValueError as error:
        print(f"goals: {error}", file=sys.stderr)
        return 1
    for results in processors.values():
        goals = [each.on(results) for each in GOALS]
        measured = [(goal, figure) for goal in goals if (figure := goal.measured(results)) is not None]
        reached = sum(goal.is_reached(figure) for goal, figure in measured)
        print(f"{name_of(results)}: {len(GOALS)} goals, {len(measured)} measured, {reached} reached\n")
        print(f"{goal_table(results)}\n")
        print(f"What the goals of speed ask of the network's products:\n\n{demand_table(results)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
