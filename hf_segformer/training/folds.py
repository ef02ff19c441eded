"""Repeated runs of one recipe: a model for each fold of the data, or for each of several seeds.

Every run is an ordinary one, in a folder of its own below the recipe's: `fold_0`, `fold_1` or `seed_7`, `seed_8`. At
the end their scores are summed up, and their folder is an ensemble that predicts as one model. Axes: K classes.
"""

import csv
import json
import math
import os
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import MOST_FOLDS
from ..evaluation.numbers import known, percent
from ..files import differences, printable, read_json, write_json
from .recipe import Recipe
from .recipe_writer import RECIPE_FILE

if TYPE_CHECKING:
    import torch

KINDS = ("folds", "seeds")

_DEFAULT_SEED = 42  # of TrainingArguments
_OVERALL = ("mean_iou", "mean_accuracy", "overall_accuracy")
_NUM_LISTED = 3
_PLACES = (("data", "root"), ("model", "checkpoint"), ("distill", "teacher"))  # which training.json leaves out
_WRITTEN_LAST = ("metrics.json", "training.json", "README.md")  # after config.json and the weights


def repeated_recipes(recipe: Recipe, kind: str, number: int) -> dict[str, Recipe]:
    """The recipe of each run, by the name of its folder below the recipe's.

    Folds share everything but the images that are held out. Seeds share the data and their division, and differ in
    first weights, order, augmentation and dropout.

    Args:
        recipe: of all runs.
        kind: `"folds"` or `"seeds"`.
        number: of runs, 2 to 20.

    Raises:
        ValueError: if the number is out of range, or the recipe cannot be divided into folds.

    Examples:
        >>> from hf_segformer.training.folds import repeated_recipes
        >>> from hf_segformer.training.recipe import read_recipe
        >>> runs = repeated_recipes(read_recipe("shapes_b0"), "folds", 2)
        >>> [(name, run.split.fold, run.trainer["output_dir"]) for name, run in runs.items()]
        [('fold_0', 0, 'outputs/shapes_b0/fold_0'), ('fold_1', 1, 'outputs/shapes_b0/fold_1')]
    """
    if not 2 <= number <= MOST_FOLDS:
        raise ValueError(f"--{kind} is {number}; expected 2 to {MOST_FOLDS}")
    folder = Path(recipe.trainer["output_dir"])
    if kind == "folds":
        if recipe.split.folds not in (0, number):
            raise ValueError(f"--folds is {number}, but split.folds is {recipe.split.folds}: leave one of them out")
        changes: dict[str, dict[str, Any]] = {
            f"fold_{fold}": {"split": {"folds": number, "fold": fold}} for fold in range(number)
        }
    else:
        first = recipe.trainer.get("seed", _DEFAULT_SEED)
        seeds = range(first, first + number)
        changes = {f"seed_{seed}": {"trainer": {"seed": seed, "data_seed": seed}} for seed in seeds}
    return {
        name: recipe.with_values({**change, "trainer": {**change.get("trainer", {}), "output_dir": str(folder / name)}})
        for name, change in changes.items()
    }


def train_repeatedly(recipe: Recipe, kind: str, number: int, resume: bool = False, overwrite: bool = False) -> Path:
    """Train and evaluate every run, one after another, and sum up.

    Args:
        recipe: of all runs.
        kind: `"folds"` or `"seeds"`.
        number: of runs.
        resume: continue where it stopped; finished runs are kept as they are.
        overwrite: if the folder holds finished runs, move them away and take their place.

    Returns:
        the folder of all runs; it holds `folds.json` or `seeds.json`, ensemble.json and a card beside their folders.

    Raises:
        ValueError: see `run.fine_tune`; or if a finished run followed another recipe.
        OSError: see `run.fine_tune`.
        KeyboardInterrupt: if it was stopped.
    """
    from ..data.labeled import open_source
    from .building import final_epoch, training_arguments
    from .recipe_writer import write_recipe
    from .resume import list_checkpoints
    from .run import fine_tune
    from .run_folder import RunFolder

    runs, folder = repeated_recipes(recipe, kind, number), Path(recipe.trainer["output_dir"])
    is_main = int(os.environ.get("RANK", "0")) == 0
    with RunFolder(folder, is_owner=is_main) as owner:
        if is_main and not resume:
            owner.check_free(overwrite)
            first = next(iter(runs.values()))
            source = open_source(first.data, first.split)  # before an earlier run is moved
            if not first.data.streaming:
                final_epoch(first.augmentation, training_arguments(first), len(source.train))
            if archive := owner.archive_previous_run():
                print(f"{folder} held an earlier run, which is now {archive} (--resume would have continued it)")
        if is_main:
            write_recipe(recipe, folder)
        for place, (name, run) in enumerate(runs.items(), start=1):
            if is_main:
                print(f"\n--- {name}, run {place} of {number} ---\n", flush=True)
            if resume and is_finished_run(folder / name):
                _check_same_recipe(folder / name, run)
                if is_main:
                    print(f"{folder / name} is finished")
                continue
            fine_tune(run, resume=resume and bool(list_checkpoints(folder / name)))
        if is_main:
            _finish(folder, kind, list(runs))
    return folder


def is_finished_run(folder: Path) -> bool:
    """Return True if a run has written all of its files."""
    return all((folder / name).is_file() for name in ("config.json", *_WRITTEN_LAST))


def summarize_runs(matrices: Mapping[str, "torch.Tensor"], names: Sequence[str], is_pooled: bool) -> dict[str, Any]:
    """Mean and sample standard deviation of scores over runs, and their scores on all images together.

    A class that neither occurs nor is predicted in a run has no score there; its mean is over the other runs.

    Args:
        matrices: (K, K + 1) counts of each run, by its name.
        names: of the K classes.
        is_pooled: add the scores of the sum of all matrices, for runs that were evaluated on different images.

    Returns:
        `runs`, a list with the scores of each; `scores`, by name, and `classes`, a list, each with `mean`, `std` (None
        with fewer than two values) and `pooled`.
    """
    import torch

    from ..evaluation.metrics import scores

    rows = {name: scores(matrix) for name, matrix in matrices.items()}
    pooled: dict[str, Any] = scores(torch.stack([*matrices.values()]).sum(dim=0)) if is_pooled else {}

    def sum_up(values: Sequence[float], pooled_value: float | None) -> dict[str, float | None]:
        defined = [value for value in values if not math.isnan(value)]
        summary = {
            "mean": statistics.fmean(defined) if defined else None,
            "std": statistics.stdev(defined) if len(defined) > 1 else None,
        }
        return {**summary, "pooled": known(pooled_value)} if pooled_value is not None else summary

    def by_class(key: str, place: int) -> dict[str, float | None]:
        column = f"per_category_{key}"
        return sum_up([row[column][place] for row in rows.values()], pooled[column][place] if pooled else None)

    return {
        "runs": [
            {
                "name": name,
                **{key: known(row[key]) for key in _OVERALL},
                "classes": [
                    {"name": each, "iou": known(iou), "accuracy": known(accuracy)}
                    for each, iou, accuracy in zip(
                        names, row["per_category_iou"], row["per_category_accuracy"], strict=True
                    )
                ],
            }
            for name, row in rows.items()
        ],
        "scores": {key: sum_up([row[key] for row in rows.values()], pooled.get(key)) for key in _OVERALL},
        "classes": [
            {"name": name, "iou": by_class("iou", place), "accuracy": by_class("accuracy", place)}
            for place, name in enumerate(names)
        ],
    }


def format_runs(summary: Mapping[str, Any], groups: Mapping[str, Sequence[str]] | None = None) -> str:
    """Scores of each run, and by class, in percent, for a terminal.

    Args:
        summary: of `summarize_runs`, with the number of `images` of each run if it is known.
        groups: the groups of images that each run was evaluated on, by its name.
    """
    columns = [key for key in ("mean", "std", "pooled") if key in summary["scores"]["mean_iou"]]
    width = max(len(printable(row["name"])) for row in (*summary["runs"], *summary["classes"], {"name": "pooled"}))
    lines = [f"  {'':{width}}   mIoU  accuracy"]
    for row in summary["runs"]:
        images = f"  on {row['images']} images" if "images" in row else ""
        if (held_out := (groups or {}).get(row["name"])) and len(held_out) <= _NUM_LISTED:
            images += f": {', '.join(map(printable, held_out))}"
        lines.append(
            f"  {row['name']:{width}}  {percent(row['mean_iou']):>5}  {percent(row['overall_accuracy']):>8}{images}"
        )
    lines.append("  " + "-" * (width + 17))
    for key in columns:
        overall = [summary["scores"][name][key] for name in ("mean_iou", "overall_accuracy")]
        lines.append(f"  {key:{width}}  {percent(overall[0]):>5}  {percent(overall[1]):>8}")
    lines += ["", f"  {'IoU by class':{width}}" + "".join(f"{key:>8}" for key in columns)]
    for row in summary["classes"]:
        lines.append(
            f"  {printable(row['name']):{width}}" + "".join(f"{percent(row['iou'][key]):>8}" for key in columns)
        )
    return "\n".join(lines)


def _finish(folder: Path, kind: str, names: list[str]) -> None:
    from ..conversion.ensembles import write_ensemble
    from ..data.splits import held_out_groups
    from ..hub.ensemble_card import write_ensemble_card

    summary = _summary(folder, kind, names)
    write_json(summary, folder / f"{kind}.json")
    write_ensemble(folder, names)
    write_ensemble_card(folder)
    print(f"\n{len(names)} runs with different {kind}, in percent; std is the sample standard deviation:\n")
    print(format_runs(summary, {name: held_out_groups(folder / name) for name in names}))
    if kind == "folds":
        print("\nEach model was evaluated on the fold that it was not trained on. pooled: on all folds together.")
    print(f"  {folder / f'{kind}.json'}  these scores")
    print(f"  {folder}  the ensemble of all models, for segformer predict, evaluate and push")


def _summary(folder: Path, kind: str, names: Sequence[str]) -> dict[str, Any]:
    from .report import CONFUSION_FILE

    metrics = {name: read_json(folder / name / "metrics.json") for name in names}
    records = {name: read_json(folder / name / "training.json") for name in names}
    found = {name: _read_confusion(folder / name / CONFUSION_FILE) for name in names}
    classes = next(iter(found.values()))[0]
    matrices = {name: matrix for name, (_, matrix) in found.items()}
    summary = summarize_runs(matrices, classes, is_pooled=kind == "folds")
    split = dict(records[names[0]].get("split") or {})
    for row in summary["runs"]:
        name = row["name"]
        row["images"] = metrics[name]["dataset"]["images"]
        row["seed"] = records[name]["arguments"]["seed"]
        sides = records[name].get("split") or {}
        row |= {side: sides[side] for side in ("train", "evaluation") if side in sides}
    if kind == "folds":
        split = {key: value for key, value in split.items() if key not in ("fold", "train", "evaluation")}
    dataset = metrics[names[0]]["dataset"]
    shared = {"title": dataset["title"], **({} if kind == "folds" else {"split": dataset["split"]})}
    return {"kind": kind, "number": len(names), "dataset": shared, **({"split": split} if split else {}), **summary}


def _read_confusion(path: Path) -> tuple[list[str], "torch.Tensor"]:
    """Class names and counts (K, K + 1) that a run has left."""
    import torch

    try:
        with path.open(newline="", encoding="utf-8") as file:
            _, *rows = csv.reader(file)
        return [row[0] for row in rows], torch.tensor([[int(cell) for cell in row[1:]] for row in rows])
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no table of counts ({error}): remove {path.parent} and add --resume") from error


def _check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Raise ValueError if a finished run followed another recipe, or had its data or weights from another place."""
    from .run_record import without_private

    path = folder / RECIPE_FILE
    followed = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for table, key in _PLACES:
        before, now = (str(tables.get(table, {}).get(key, "")) for tables in (followed, recipe.tables))
        is_moved = bool(before and now) and (not Path(before).exists() or Path(before).resolve() == Path(now).resolve())
        if before != now and not is_moved:
            raise ValueError(
                f"{folder} is finished with {table}.{key} {before or 'unset'}, which now is {now or 'unset'}; expected "
                "the same one to resume: choose another trainer.output_dir"
            )
    held = read_json(folder / "training.json").get("recipe") or {}
    wanted = json.loads(json.dumps(without_private(recipe.tables)))
    for table in dict.fromkeys((*wanted, *held)):
        ours, theirs = wanted.get(table, {}), held.get(table, {})
        for key, before, now in differences(table, theirs, ours):
            raise ValueError(
                f"{folder} is finished with {key} {before}, which now is {now}; expected the same recipe to resume: "
                "choose another trainer.output_dir"
            )


__all__ = [
    "KINDS",
    "format_runs",
    "is_finished_run",
    "repeated_recipes",
    "summarize_runs",
    "train_repeatedly",
]
