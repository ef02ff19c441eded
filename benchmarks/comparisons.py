"""The comparisons that the page shows and the goals judge, and the figures that they give."""

from collections.abc import Sequence
from dataclasses import dataclass

from . import compiled
from .record import Record

OURS, STOCK = "hf_segformer", "transformers"
COMPILED = ("hf_segformer compiled", "hf_segformer compiled, any size")
RUNTIMES = ("transformers compiled", "transformers in ONNX Runtime", "transformers in OpenVINO")

Row = dict[str, Record]
Results = dict[str, dict[str, Row]]


@dataclass(frozen=True)
class Comparison:
    """Two groups of candidates at one piece of work; the fastest of each counts.

    Attributes:
        work: description of the work.
        script: script whose file holds the row.
        row: name of the row.
        ours: candidates of this package.
        others: candidates that they are compared with.
    """

    work: str
    script: str
    row: str
    ours: tuple[str, ...] = (OURS,)
    others: tuple[str, ...] = (STOCK,)

    def records(self, results: Results) -> Row:
        """Return the records of the row; empty if it was not measured."""
        return results.get(self.script, {}).get(self.row, {})

    def milliseconds(self, results: Results) -> tuple[float | None, float | None]:
        """Return the time of the fastest of ours, and of the others; None where it was not measured."""
        row = self.records(results)
        return _fastest(row, self.ours), _fastest(row, self.others)

    def speed(self, results: Results) -> float | None:
        """Return how many times as fast the fastest of ours is."""
        mine, other = self.milliseconds(results)
        return other / mine if mine and other else None

    def memory(self, results: Results) -> float | None:
        """Return our peak of memory as a share of the others'."""
        row = self.records(results)
        [mine], [other] = (
            [row[name].mebibytes for name in names if name in row][:1] or [None] for names in (self.ours, self.others)
        )
        return mine / other if mine is not None and other else None

    def share_of_peak(self, results: Results) -> float | None:
        """Return the rate of the fastest of ours as a share of the matrix product's."""
        rates = {
            name: each.gigaflop / each.milliseconds for name, each in self.records(results).items() if each.gigaflop
        }
        mine = [rates[name] for name in self.ours if name in rates]
        return max(mine) / rates[compiled.PRODUCT] if mine and compiled.PRODUCT in rates else None


def _fastest(row: Row, names: Sequence[str]) -> float | None:
    return min((row[name].milliseconds for name in names if name in row and row[name].milliseconds), default=None)


COMPARISONS = {
    "b0": Comparison("B0, 1x3x512x512", "inference", "b0"),
    "b2": Comparison("B2, 1x3x512x512", "inference", "b2"),
    "b5": Comparison("B5, 1x3x512x512", "inference", "b5"),
    "b0_batch8": Comparison("B0, 8x3x512x512", "inference", "b0_batch8"),
    "b0_wide": Comparison("B0, 1x3x1024x2048", "inference", "b0_wide"),
    "b0_compiled": Comparison("B0, compiled, against the best of others", "compiled", "b0", COMPILED, RUNTIMES),
    "b2_compiled": Comparison("B2, compiled, against the best of others", "compiled", "b2", COMPILED, RUNTIMES),
    "b0_eager": Comparison("B0, eager, of the product's rate", "compiled", "b0"),
    "b2_eager": Comparison("B2, eager, of the product's rate", "compiled", "b2"),
    "b0_any_size": Comparison("B0, compiled for any size, against eager", "compiled", "b0", COMPILED[1:], (OURS,)),
    "b2_any_size": Comparison("B2, compiled for any size, against eager", "compiled", "b2", COMPILED[1:], (OURS,)),
    "b0_training": Comparison("B0, training step, batch 4", "training", "b0_batch4"),
    "b2_training": Comparison("B2, training step, batch 2", "training", "b2_batch2"),
    "b0_crops128": Comparison("B0, training step, 8 crops of 128x128", "training", "b0_crops128"),
    "b0_crops256": Comparison("B0, training step, 8 crops of 256x256", "training", "b0_crops256"),
    "b0_busy": Comparison("B0, training step, batch 4, one core busy", "training", "b0_batch4_busy"),
    "scene": Comparison("Logits to labels, 19 classes, 1024x2048, scene", "labels", "scene"),
    "noise": Comparison("Logits to labels, 19 classes, 1024x2048, noise", "labels", "noise"),
    "folder": Comparison("100 images, 480x640", "predict", "same"),
    "mixed": Comparison("100 images, four sizes", "predict", "mixed"),
    "b0_bfloat16": Comparison(
        "B0, bfloat16 autocast, against float32", "inference", "b0_bfloat16", ("hf_segformer bfloat16",), (OURS,)
    ),
    "b2_bfloat16": Comparison(
        "B2, bfloat16 autocast, against float32", "inference", "b2_bfloat16", ("hf_segformer bfloat16",), (OURS,)
    ),
}

__all__ = ["COMPARISONS", "COMPILED", "OURS", "RUNTIMES", "STOCK", "Comparison", "Results", "Row"]
