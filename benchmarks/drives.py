"""Comparison of options on a drive that was not trained on: docs/camvid-drives.md from camvid_drives.jsonl.

CamVid's training images come from three drives. One is held out, the recipe trains on the other two, once for every
option alone and for as many steps, and the mean IoU is that of the drive held out. The images of val are not used: they
come from one of the drives that are trained on. Several processes may share the file if they measure different parts or
seeds.
"""

import argparse
import contextlib
import datetime
import io
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_segformer.files import read_json
from hf_segformer.training.pretrain import pretrain
from hf_segformer.training.pretrain_recipe import read_pretrain_recipe
from hf_segformer.training.recipe import read_recipe
from hf_segformer.training.run import fine_tune

from .machine import ROOT, machine
from .record import RESULTS
from .training_options import commits_of, comparison_table

RECIPE = "camvid_b0"
BASE = ("augmentation.cutmix=0", "augmentation.class_balance=0")  # the recipe before it got these two from here
DRIVE = "^([^_]+)_"  # in the name of an image
DRIVES = {"0001TP": "at dusk", "0006R0": "by day", "0016E5": "by day, the drive of val"}
HELD_OUT = "0001TP"
SHORT = ("augmentation.crop_size=128", "trainer.max_steps=600", "trainer.warmup_steps=60")
LONG = ("augmentation.crop_size=192", "trainer.max_steps=2000", "trainer.warmup_steps=200")
HALF = ("augmentation.crop_size=256", "trainer.max_steps=4500", "trainer.warmup_steps=200")  # of the recipe's steps
SETTINGS = (
    "trainer.eval_strategy=no",
    "trainer.save_strategy=no",
    "trainer.dataloader_num_workers=0",
    "trainer.dataloader_persistent_workers=false",
    "trainer.use_cpu=true",
    "trainer.disable_tqdm=true",
)
PRETRAINING = (
    "augmentation.crop_size=128",
    "trainer.max_steps=800",
    "trainer.per_device_train_batch_size=8",
    "trainer.eval_strategy=no",
    "trainer.save_strategy=no",
    "trainer.dataloader_num_workers=0",
    "trainer.dataloader_persistent_workers=false",
    "trainer.bf16=true",
    "trainer.use_cpu=true",
    "trainer.disable_tqdm=true",
)
LIGHT = (
    "augmentation.exposure=1.5",
    "augmentation.temperature=0.4",
    "augmentation.gamma=0.5",
    "augmentation.shadow=0.6",
)
CAMERA = ("augmentation.blur=1.5", "augmentation.noise=10", "augmentation.jpeg=40")
CUTMIX = "augmentation.cutmix=0.5"
CLASS_BALANCE = "augmentation.class_balance=0.5"
CLASS_WEIGHTS = "loss.class_weights=inverse_sqrt"
LARGER_IMAGES = ("data.eval_size=540", "augmentation.scale=[0.75, 2.625]")  # 1.5 times the recipe's
FILE = RESULTS / "camvid_drives.jsonl"
PAGE = ROOT / "docs" / "camvid-drives.md"
WHOLE = {"recipe": "camvid_b0_plain", "CutMix and class balance": "camvid_b0"}  # runs in docs/results


class Part(NamedTuple):
    """An option of the recipe, or several.

    Attributes:
        name: name in the table.
        overrides: of the recipe.
        is_pretrained: begin with an encoder pre-trained on the same images without masks.
        budget: crop and steps; the first part of each budget is what its others are compared with.
    """

    name: str
    overrides: tuple[str, ...] = ()
    is_pretrained: bool = False
    budget: tuple[str, ...] = SHORT

    @property
    def recipe_settings(self) -> list[str]:
        """Overrides of the recipe."""
        return [*BASE, *self.budget, *SETTINGS, *self.overrides]

    @property
    def settings(self) -> list[str]:
        """All that a run of this part depends on, except base, drive and seed."""
        pretraining = PRETRAINING if self.is_pretrained else ()
        return [*self.budget, *SETTINGS, *self.overrides, *pretraining]


def _name(*settings: str) -> str:
    return ", ".join(f"`{setting.replace('=', ' = ')}`" for setting in settings)


def _single(setting: str) -> Part:
    return Part(_name(setting), (setting,))


PARTS = (
    Part("recipe"),
    *(_single(setting) for setting in LIGHT),
    Part("light: these four", LIGHT),
    Part(f"camera: {_name(*CAMERA)}", CAMERA),
    Part("light and camera", (*LIGHT, *CAMERA)),
    _single("augmentation.distortion=0"),
    _single("augmentation.scale=[0.5, 2.0]"),
    _single("augmentation.final_crop_size=192"),
    _single(CUTMIX),
    _single("augmentation.classmix=0.5"),
    _single(CLASS_BALANCE),
    Part("CutMix and class balance", (CUTMIX, CLASS_BALANCE)),
    _single("loss.class_weights=log"),
    _single("ema.decay=0.99"),
    _single("model.drop_path_rate=0"),
    _single("model.drop_path_rate=0.2"),
    Part("masked images before, 800 steps", is_pretrained=True),
    Part("recipe, longer", budget=LONG),
    Part("CutMix and class balance, longer", (CUTMIX, CLASS_BALANCE), budget=LONG),
    Part("CutMix, class balance, light and camera, longer", (CUTMIX, CLASS_BALANCE, *LIGHT, *CAMERA), budget=LONG),
    Part(f"{_name(CLASS_WEIGHTS)}, longer", (CLASS_WEIGHTS,), budget=LONG),
    Part("images 1.5 times as large, longer", LARGER_IMAGES, budget=LONG),
    Part(
        "CutMix, class balance, class weights, larger images and gamma, longer",
        (CUTMIX, CLASS_BALANCE, CLASS_WEIGHTS, *LARGER_IMAGES, LIGHT[2]),
        budget=LONG,
    ),
    Part("recipe, half of the whole length", budget=HALF),
    Part("CutMix and class balance, half of the whole length", (CUTMIX, CLASS_BALANCE), budget=HALF),
)


def image_folder(data: Path, held_out: str, folder: Path) -> Path:
    """Fill a folder with links to the training images of the other drives."""
    folder.mkdir()
    for path in sorted((data / "train").iterdir()):
        if not path.name.startswith(f"{held_out}_"):
            (folder / path.name).symlink_to(path.resolve())
    return folder


def train(part: Part, data: Path, held_out: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train in a folder, without a drive, and return the metrics of that drive."""
    overrides = [
        *part.recipe_settings,
        f"split.group={DRIVE}",
        f'split.hold_out=["{held_out}"]',
        f"data.root={data}",
        f"trainer.seed={seed}",
        f"trainer.output_dir={folder / 'run'}",
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        if part.is_pretrained:
            images = image_folder(data, held_out, folder / "images")
            encoder = folder / "encoder"
            settings = [*PRETRAINING, f"data.root={images}", f"trainer.seed={seed}", f"trainer.output_dir={encoder}"]
            pretrain(read_pretrain_recipe("masked_b0", settings))
            overrides.append(f"model.checkpoint={encoder}")
        return read_json(fine_tune(read_recipe(RECIPE, overrides)) / "metrics.json")


def measure(part: Part, data: Path, held_out: str, seed: int, path: Path) -> None:
    """Train on one thread, and append a line to the file."""
    torch.set_num_threads(1)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(part, data, held_out, seed, Path(folder))
    run = {
        "part": part.name,
        "held_out": held_out,
        "seed": seed,
        "mean_iou": round(metrics["mean_iou"], 4),
        "classes": {each["name"]: each["iou"] and round(each["iou"], 4) for each in metrics["classes"]},
        "processor_seconds": round(time.process_time() - began, 1),
        "settings": part.settings,
        "date": datetime.date.today().isoformat(),
        **{name: machine()[name] for name in ("processor", "instructions", "torch", "commit")},
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")
    print(f"{part.name}, seed {seed}: {100 * run['mean_iou']:.1f} %", flush=True)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Runs on record that have today's settings, by seed; none if there is no file."""
    settings = {part.name: part.settings for part in PARTS}
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    runs = [run for run in map(json.loads, lines) if run["settings"] == settings.get(run["part"])]
    return sorted(runs, key=lambda run: run["seed"])


def render(runs: Sequence[dict[str, Any]]) -> str:
    """Write the page from what was measured."""
    tables: dict[str, dict[str, Any]] = {}
    for run in runs:
        columns = {"seeds": [], "mean_iou": [], "processor_seconds": []}
        row = tables.setdefault(run["held_out"], {}).setdefault(run["part"], columns)
        for column, key in zip(columns, ("seed", "mean_iou", "processor_seconds"), strict=True):
            row[column].append(run[key])
    lines = [
        "# Options on another drive",
        "",
        "`python -m benchmarks.drives --data DIR` measures the drives held out, and writes the page.",
        "",
        "CamVid's training images come from three drives. One is held out, a network is trained on the other two, and",
        "the mean IoU is that of the drive held out: val comes from a drive that is trained on, and tells nothing",
        "about another road or hour. `recipe` is `camvid_b0` without CutMix and class balance, which it got from this",
        "comparison; the other rows add an option alone, or those that they name. All start from random weights. The",
        "runs are small parts of the whole recipe's training: what needs long training, such as strong augmentation",
        "against overfitting, shows less here than it may give. Differences and times are those of equal seeds.",
        "",
    ]
    for held_out, rows in tables.items():
        for budget in (SHORT, LONG, HALF):
            names = [part.name for part in PARTS if part.budget == budget]
            found = {name: rows[name] for name in names if name in rows}
            if found:
                lines += [f"## Held out: {held_out}, {DRIVES[held_out]}; {_words(budget)}", ""]
                lines += [*comparison_table(names, found), "", _noise(found), ""]
                lines += _classes([run for run in runs if run["held_out"] == held_out], names)
    processors = ", ".join(Counter(f"{run['processor']}, PyTorch {run['torch']}" for run in runs))
    names_of: dict[str, list[str]] = {}
    for run in runs:
        remark = f", {run['remark']}" if "remark" in run else ""
        names_of.setdefault(run["commit"], []).append(f"{run['part']} (seed {run['seed']}{remark})")
    lines += [
        "## How these were measured",
        "",
        f"Recipe `{RECIPE}` with `{' '.join((*BASE, *SETTINGS))}`. {processors}, 1 thread.",
        "",
    ]
    lines += [f"- {commits_of([commit])}: {', '.join(names)}" for commit, names in names_of.items()]
    return "\n".join([*lines, "", *_whole_runs(), ""])


def _whole_runs() -> list[str]:
    """Table of the runs of the whole length."""
    lines = [
        "## The whole recipe, on all three drives",
        "",
        "`segformer train camvid_b0 data.root=DIR`, the first time with `augmentation.cutmix=0",
        "augmentation.class_balance=0`. Measured was val, which comes from a drive that is trained on; the test split",
        "was not. CutMix and class balance score lower on val; they were chosen because they gain at dusk, with each",
        "of three seeds, and the checkpoint is that of the second run. Whether they gain at dusk in a run of this",
        "length, too, was not measured. Each row is one run, the first one by an earlier state of the program.",
        "",
        "| run | steps | mean IoU on val, % | on the way |",
        "| --- | --- | --- | --- |",
    ]
    for name, folder in WHOLE.items():
        metrics, training = (
            read_json(ROOT / "docs" / "results" / folder / f"{each}.json") for each in ("metrics", "training")
        )
        curve = {each["step"]: each["eval_mean_iou"] for each in training["curve"] if "eval_mean_iou" in each}
        cells = (
            f"[{name}](results/{folder}/training.json)",
            f"{training['steps']:,} of {training['batch_size']} images",
            f"{100 * metrics['mean_iou']:.1f}",
            ", ".join(f"{100 * value:.1f}" for value in curve.values()),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _words(budget: Sequence[str]) -> str:
    """Steps and crops of a budget."""
    crop, steps, warmup = (setting.partition("=")[2] for setting in budget)
    batch = read_recipe(RECIPE, [f"data.root={ROOT}"]).trainer["per_device_train_batch_size"]
    return f"{int(steps):,} steps, {warmup} of them warm-up, of {batch} crops of {crop} pixels"


def _noise(rows: dict[str, Any]) -> str:
    """Say how far apart the runs of one row are."""
    repeated = [row["mean_iou"] for row in rows.values() if len(row["mean_iou"]) > 1]
    if not repeated:
        return "Each row is one run, and what another seed would give was not measured."
    spread = max(max(values) - min(values) for values in repeated)
    return f"The seeds of one row are up to {100 * spread:.1f} points apart. Rows of one seed are one run."


def _classes(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Table of the IoU by class of the first seed's runs."""
    first = {run["part"]: run["classes"] for run in runs if run["seed"] == 0}
    found = [name for name in names if name in first]
    if not found:
        return []
    classes = list(first[found[0]])
    lines = [f"| IoU, %, seed 0 | {' | '.join(classes)} |", f"| --- |{' --- |' * len(classes)}"]
    for name in found:
        cells = ("" if first[name][each] is None else f"{100 * first[name][each]:.0f}" for each in classes)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is not on record, and write the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.drives", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="names of parts, or words in them (default: all)")
    parser.add_argument("--data", type=Path, help="CamVid's folder; without it the page is written alone")
    parser.add_argument("--hold-out", choices=DRIVES, default=HELD_OUT, help=f"drive (default: {HELD_OUT})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    arguments = parser.parse_args(argv)
    names = {part.name for part in PARTS}
    wanted = arguments.parts or [""]
    chosen = [
        part for part in PARTS if any(word == part.name or (word not in names and word in part.name) for word in wanted)
    ]
    if not chosen:
        parser.error(f"no part is called {', '.join(arguments.parts)}; expected words of {[p.name for p in PARTS]}")
    if arguments.data:
        for seed in arguments.seeds:
            for part in chosen:
                known = {(run["part"], run["held_out"], run["seed"]) for run in read_runs(FILE)}
                if (part.name, arguments.hold_out, seed) not in known:
                    measure(part, arguments.data, arguments.hold_out, seed, FILE)
    runs = read_runs(FILE)
    if not runs:
        parser.error(f"{FILE} holds no runs; measure them by --data DIR")
    PAGE.write_text(render(runs), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
