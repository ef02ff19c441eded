"""Effect of each training option on the generated shapes: docs/training-options.md from training_options.json.

Every option is trained alone, for as many steps and with the same seeds as the run without any; a table shows the mean
IoU of both, whatever came out. Runs from a checkpoint begin with a model that was trained on other shapes, which is the
teacher, too. A few minutes of processor time on one thread; what is measured is kept, and `--missing` goes on.
"""

import argparse
import contextlib
import datetime
import io
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_segformer.files import read_json, write_json
from hf_segformer.training.recipe import read_recipe
from hf_segformer.training.run import fine_tune

from .machine import ROOT, machine
from .record import RESULTS

RECIPE = "shapes_b0"
SEEDS = (0, 1)
SETTINGS = (
    "model.hidden_sizes=[16, 32, 64, 96]",
    "model.depths=[1, 1, 1, 1]",
    "model.num_attention_heads=[1, 1, 2, 3]",
    "model.decoder_hidden_size=64",
    "data.image_size=64",
    "data.num_train=400",
    "data.num_eval=100",
    "augmentation.crop_size=64",
    "augmentation.class_balance=0",
    "trainer.max_steps=200",
    "trainer.per_device_train_batch_size=8",
    "trainer.eval_strategy=no",
    "trainer.save_strategy=no",
    "trainer.dataloader_num_workers=0",
    "trainer.logging_steps=50",
    "trainer.use_cpu=true",
    "trainer.disable_tqdm=true",
)
CHECKPOINT = ("data.seed=7", "trainer.seed=7", "trainer.max_steps=600")  # of the checkpoint, on shapes of its own
SCRATCH, FINE_TUNED = "from scratch", "from a checkpoint"
LOWER = "trainer.learning_rate=5e-4"
PAGE = ROOT / "docs" / "training-options.md"
FILE = "training_options.json"


class Variant(NamedTuple):
    """One option, alone.

    Attributes:
        name: name in the table.
        overrides: of the recipe; {checkpoint} stands for the trained model.
        start: which runs it is compared with.
    """

    name: str
    overrides: tuple[str, ...] = ()
    start: str = SCRATCH


VARIANTS = (
    Variant("none"),
    Variant("`ema.decay = 0.98`", ("ema.decay=0.98",)),
    Variant("`loss.dice = 1`", ("loss.dice=1",)),
    Variant("`loss.tversky = 1`", ("loss.tversky=1",)),
    Variant("`loss.lovasz = 1`", ("loss.lovasz=1",)),
    Variant("`loss.focal = 1`, no cross entropy", ("loss.focal=1", "loss.cross_entropy=0")),
    Variant('`loss.class_weights = "log"`', ("loss.class_weights=log",)),
    Variant("`distill.teacher`", ("distill.teacher={checkpoint}",)),
    Variant("`augmentation.rotation = 30`", ("augmentation.rotation=30",)),
    Variant("`augmentation.quarter_turns = 0.75`", ("augmentation.quarter_turns=0.75",)),
    Variant("`augmentation.exposure = 1`", ("augmentation.exposure=1",)),
    Variant("`augmentation.cutmix = 0.5`", ("augmentation.cutmix=0.5",)),
    Variant("`augmentation.classmix = 0.5`", ("augmentation.classmix=0.5",)),
    Variant("`augmentation.class_balance = 0.5`", ("augmentation.class_balance=0.5",)),
    Variant("none, all weights", ("model.checkpoint={checkpoint}", LOWER), FINE_TUNED),
    *(
        Variant(
            f"`optimizer.{key} = {value}`",
            ("model.checkpoint={checkpoint}", LOWER, f"optimizer.{key}={value}"),
            FINE_TUNED,
        )
        for key, value in (("freeze_stages", 2), ("freeze_encoder", "true"), ("layer_lr_decay", 0.8))
    ),
)


def train(folder: Path, overrides: Sequence[str]) -> float:
    """Train in a folder and return the mean IoU on the evaluation images."""
    recipe = read_recipe(RECIPE, [*SETTINGS, *overrides, f"trainer.output_dir={folder}"])
    with contextlib.redirect_stdout(io.StringIO()):
        fine_tune(recipe)
    return read_json(folder / "metrics.json")["mean_iou"]


def measure(path: Path, missing: bool) -> dict[str, Any]:
    """Train every variant with every seed, and write the file after each run.

    Args:
        path: the file.
        missing: keep what it holds of the same settings.
    """
    torch.set_num_threads(1)
    facts: dict[str, Any] = {
        "recipe": RECIPE,
        "settings": list(SETTINGS),
        "checkpoint": list(CHECKPOINT),
        "seeds": list(SEEDS),
        **{name: machine()[name] for name in ("processor", "instructions", "torch")},
    }
    held = read_json(path) if missing and path.exists() else {}
    runs = held["runs"] if all(held.get(name) == value for name, value in facts.items()) else {}
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, run = Path(temporary, "checkpoint"), Path(temporary, "run")
        facts["checkpoint_mean_iou"] = round(train(checkpoint, CHECKPOINT), 4)
        if held.get("checkpoint_mean_iou") != facts["checkpoint_mean_iou"]:  # the code has changed since
            names = {each.name for each in VARIANTS if any("{checkpoint}" in one for one in each.overrides)}
            runs = {name: row for name, row in runs.items() if name not in names}
        for number, variant in itertools.product(range(len(SEEDS)), VARIANTS):
            row = runs.setdefault(variant.name, {"mean_iou": [], "processor_seconds": [], "commits": []})
            if len(row["mean_iou"]) > number:
                continue
            began = time.process_time()
            overrides = [each.format(checkpoint=checkpoint) for each in variant.overrides]
            row["mean_iou"].append(round(train(run, [*overrides, f"trainer.seed={SEEDS[number]}"]), 4))
            row["processor_seconds"].append(round(time.process_time() - began, 1))
            row["commits"].append(machine()["commit"])
            shutil.rmtree(run)
            print(f"{variant.name}: {row}", flush=True)
            write_json(
                {**facts, "date": datetime.date.today().isoformat(), **machine(), "threads": 1, "runs": runs}, path
            )
    return read_json(path)


def render(found: dict[str, Any]) -> str:
    """Write the page from what was measured."""
    runs = {name: row for name, row in found["runs"].items() if row["mean_iou"]}
    twice = [row["mean_iou"] for row in runs.values() if len(row["mean_iou"]) > 1]
    noise = "Each row is one run so far: small effects are noise."
    if twice:
        spread = max(max(values) - min(values) for values in twice)
        noise = f"Two seeds of one row differ by up to {100 * spread:.1f} points: smaller effects are noise."
    settings = [each for each in found["settings"] if "trainer.use" not in each]
    commits = commits_of(commit for row in runs.values() for commit in row["commits"])
    absent = [each.name for each in VARIANTS if each.name not in runs]
    lines = [
        "# Effect of training options",
        "",
        "`python -m benchmarks.training_options` measures this and writes the page; no number is written by hand.",
        "",
        "Each option of [fine-tuning](guides/fine-tune.md) and [augmentation](guides/augmentation.md) alone, on the",
        "generated shapes: runs of equal length, with the same seeds for each, of a network smaller than B0. They",
        "show that an option works, on small clean images and after very short training, and are no advice for other",
        f"data. {noise}",
        "",
        *_section(SCRATCH, runs),
        *_section(FINE_TUNED, runs),
        *([f"Not measured so far (`--missing` measures them): {', '.join(absent)}.", ""] if absent else []),
        "The checkpoint, which is the teacher, too, was trained three times as long on shapes of another seed: mean",
        f"IoU {100 * found['checkpoint_mean_iou']:.1f} % on evaluation images of its own. Runs from it have a fifth of",
        "the learning rate. Early stopping has no row: it ends a training sooner, and changes nothing in it.",
        "",
        f"Recipe `{found['recipe']}` with `{' '.join(settings)}`. {found['processor']}, {found['threads']} thread,",
        f"PyTorch {found['torch']}, {commits}, {found['date']}.",
        "",
    ]
    return "\n".join(lines)


def commits_of(commits: Iterable[str]) -> str:
    """Name commits, each once."""
    found = list(dict.fromkeys(commits))
    return f"{'commit' if len(found) == 1 else 'commits'} {', '.join(found)}"


def comparison_table(names: Sequence[str], runs: dict[str, Any]) -> list[str]:
    """Rows of runs that have some; the first name is what the others are compared with, seed by seed.

    Args:
        names: in the order of the rows.
        runs: of each name, lists of equal length: `seeds`, `mean_iou` and `processor_seconds`.
    """
    base = names[0]
    without = _by_seed(runs[base]) if base in runs else {}
    lines = ["| option | mean IoU, % | each seed | difference, points | time |", "| --- | --- | --- | --- | --- |"]
    for name in (name for name in names if name in runs):
        values = runs[name]["mean_iou"]
        pairs = [(run, without[seed]) for seed, run in _by_seed(runs[name]).items() if seed in without]
        gains = [run[0] - other[0] for run, other in pairs]
        times = [run[1] / other[1] for run, other in pairs]
        cells = (
            name,
            f"{100 * statistics.mean(values):.1f}",
            ", ".join(f"{100 * value:.1f}" for value in values),
            f"{100 * statistics.mean(gains):+.1f}" if gains and name != base else "",
            f"{statistics.mean(times):.2f}x" if times else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _by_seed(row: dict[str, Any]) -> dict[int, tuple[float, float]]:
    """Mean IoU and processor seconds of each seed's run."""
    return dict(zip(row["seeds"], zip(row["mean_iou"], row["processor_seconds"], strict=True), strict=True))


def _section(start: str, runs: dict[str, Any]) -> list[str]:
    """Heading and table of the variants that begin alike."""
    names = [each.name for each in VARIANTS if each.start == start]
    runs = {name: {**row, "seeds": SEEDS[: len(row["mean_iou"])]} for name, row in runs.items()}
    return [f"## Training {start}", "", *comparison_table(names, runs), ""] if names[0] in runs else []


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.training_options", description=__doc__)
    parser.add_argument("--missing", action="store_true", help="keep what was measured with the same settings")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    arguments = parser.parse_args(argv)
    path = RESULTS / FILE
    if arguments.page and not path.exists():
        parser.error(f"{path} is not there; leave out --page to measure")
    found = read_json(path) if arguments.page else measure(path, arguments.missing)
    PAGE.write_text(render(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
