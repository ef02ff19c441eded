"""A regression benchmark of learning quality: mean IoU on the hard shapes after one run with a fixed seed.

`make learn` runs it. It follows the recipe shapes_hard_b0 on one thread, about six minutes of processor time. The
number is compared with the one on record, then takes its place. The same code gives other numbers on processors that
round differently, and with another seed; the spread of these numbers is not measured yet, so that only a fall by more
than `NOISE` counts as a change that learns worse.
"""

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_segformer.files import read_json, write_json
from hf_segformer.training.recipe import read_recipe
from hf_segformer.training.run import fine_tune

from .machine import machine
from .record import RESULTS

RECIPE = "shapes_hard_b0"
NOISE = 0.02  # of mean IoU


def measure(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train by the recipe and return mean IoU, IoU by class, minutes of processor time, and the machine.

    Args:
        overrides: `table.key=value`, which the record names.
    """
    torch.set_num_threads(1)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        settings = ["trainer.use_cpu=true", "trainer.disable_tqdm=true", *overrides, f"trainer.output_dir={folder}/run"]
        run = fine_tune(read_recipe(RECIPE, settings))
        metrics = read_json(run / "metrics.json")
    return {
        "recipe": RECIPE,
        "overrides": list(overrides),
        "mean_iou": round(metrics["mean_iou"], 4),
        "classes": {each["name"]: each["iou"] and round(each["iou"], 4) for each in metrics["classes"]},
        "processor_minutes": round((time.process_time() - began) / 60, 1),
        "date": datetime.date.today().isoformat(),
        **machine(),
        "threads": torch.get_num_threads(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and compare; the status is 1 if the run learned worse than the one on record."""
    parser = argparse.ArgumentParser("python -m benchmarks.learning", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="table.key=value", help="of the recipe; not recorded then")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of learning.json")
    arguments = parser.parse_args(argv)
    path = arguments.results / "learning.json"
    before = read_json(path).get("mean_iou") if path.exists() else None
    found = measure(arguments.overrides)
    print(json.dumps(found, indent=2))
    if before is not None:
        print(f"mean IoU {found['mean_iou']:.4f}, on record {before:.4f}")
    if not arguments.overrides:
        write_json(found, path)
    return int(before is not None and found["mean_iou"] < before - NOISE)


if __name__ == "__main__":
    sys.exit(main())
