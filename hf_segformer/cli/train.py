"""`segformer train`: train by a recipe, or plan a run on a folder of images and train by that."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from ..config import MOST_FOLDS
from ..files import check_writable
from ..training.folds import KINDS, repeated_recipes, train_repeatedly
from ..training.plan import Budget, default_output_dir, parse_duration
from ..training.recipe import Recipe, list_recipes, parse_overrides, read_recipe, recipe_folder
from ..training.recipe_writer import RECIPE_FILE
from ..training.resume import list_checkpoints
from ..training.run_folder import RunFolder
from .options import add_output_dir, whole_number

# Options that only a plan needs, and what has their effect with a recipe.
_OF_PLANS = {
    "steps": "trainer.max_steps=N",
    "time": "trainer.max_steps=N",
    "dry_run": "--check-data",
    "init": "model.checkpoint=FOLDER_OR_REPO",
    "find_learning_rate": "trainer.learning_rate=VALUE",
}


def add_train(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "train",
        help="train on a folder of images and masks, or by a recipe",
        description="Checks the data, trains, evaluates, saves, loads again and compares. For a folder or a data set "
        "it chooses every setting, prints them with their reasons, and writes them as a recipe. Any value can be set "
        "on the command line. Several processes: torchrun --nproc-per-node N -m hf_segformer train ...",
    )
    parser.add_argument(
        "source",
        nargs="?",
        metavar="DATA_OR_RECIPE",
        help="a folder of images and masks or a Hub data set (owner/name); or a recipe: its name (--list), a TOML file",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="table.key=value", help="set a value, for example trainer.max_steps=24"
    )
    add_output_dir(parser, "folder of the run, as trainer.output_dir=DIR")
    parser.add_argument("--list", action="store_true", help="print the names of the recipes, and stop")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a finished run, which is moved to another name"
    )
    parser.add_argument(
        "--folds",
        type=whole_number(2, MOST_FOLDS),
        metavar="K",
        help="train K models, 2 to 20, each without one of K folds of the images, evaluate each on its fold, and "
        "average them",
    )
    parser.add_argument(
        "--seeds",
        type=whole_number(2, MOST_FOLDS),
        metavar="N",
        help="train N models, 2 to 20, that differ in their seed alone",
    )
    parser.add_argument("--check-data", action="store_true", help="read all images and masks of a recipe, and stop")
    parser.add_argument(
        "--show-batch", type=Path, metavar="PNG", help="draw the model's first input by a recipe, and stop"
    )
    parser.add_argument(
        "--allow-code", action="store_true", help="run the code that the recipe's file names in augmentation.custom"
    )
    _add_plan_options(parser)
    parser.set_defaults(check=check, run=train)


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("plan of a run on a folder or a data set")
    group.add_argument("--steps", type=whole_number(1), metavar="N", help="train N steps")
    group.add_argument("--time", metavar="T", help="train and evaluate within this time, such as 2h, 90m or 1h30m")
    group.add_argument("--init", metavar="MODEL", help="start from these weights: a folder or a Hub repository")
    group.add_argument("--dry-run", action="store_true", help="print and write the plan, and stop")
    group.add_argument(
        "--find-learning-rate", action="store_true", help="choose the learning rate by a range test of 100 steps"
    )


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError or OSError if the recipe, an option, an override or the output folder is wrong."""
    if arguments.list:
        arguments.loads_package = False
        return
    if arguments.source is None:
        raise ValueError(
            "no data and no recipe are given; expected a folder of images and masks, or a recipe, whose names --list "
            "prints"
        )
    if arguments.output_dir is not None:
        if "output_dir" in parse_overrides(arguments.overrides)["trainer"]:
            raise ValueError("--output-dir and trainer.output_dir are both set; expected one of them")
        arguments.overrides.append(f"trainer.output_dir={json.dumps(str(arguments.output_dir))}")
    if arguments.resume and arguments.overwrite:
        raise ValueError("--resume and --overwrite are both set; expected one: continue a run, or replace it")
    _check_repeated(arguments)
    arguments.plans = is_data(arguments.source)
    if arguments.plans:
        _check_plan(arguments)
    else:
        _check_recipe(arguments)
    if _is_main():
        print("Loading PyTorch and Transformers ...", flush=True)


def is_data(source: str) -> bool:
    """Return True if an argument names a folder or a Hub data set, False if it names a recipe.

    Raises:
        ValueError: if it is both.
        FileNotFoundError: if it is a path that does not exist.
    """
    path = Path(source)
    if path.is_dir():
        recipe = recipe_folder() / f"{source}.toml"
        if path.name == source and recipe.is_file():
            raise ValueError(
                f"{source} is a folder here, and a recipe of this package; expected ./{source} for the folder, or "
                f"{recipe} for the recipe"
            )
        return True
    if path.suffix == ".toml" or path.is_file() or "/" not in source:
        return False
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or source.endswith("/"):
        raise FileNotFoundError(f"there is no folder {source}; expected one with images and masks, or a recipe")
    return True


def _kind_of_runs(arguments: argparse.Namespace) -> str | None:
    """Name the option of repeated runs; None for a single run."""
    return next((kind for kind in KINDS if getattr(arguments, kind)), None)


def _check_repeated(arguments: argparse.Namespace) -> None:
    """Raise ValueError if repeated runs do not go with the other options."""
    kind = _kind_of_runs(arguments)
    if all(getattr(arguments, each) for each in KINDS):
        raise ValueError(
            "--folds and --seeds are both set; expected one: for several seeds of each fold, call --folds once for "
            "each seed, with trainer.seed and trainer.output_dir"
        )
    for name in ("check_data", "show_batch", "dry_run"):
        if kind and getattr(arguments, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is given with --{kind}, but trains nothing: leave --{kind} out"
            )
    if arguments.folds:
        given = parse_overrides(arguments.overrides)["split"].get("folds", arguments.folds)
        if given != arguments.folds:
            raise ValueError(f"--folds is {arguments.folds}, but split.folds is {given}: leave one of them out")
        arguments.overrides = [*arguments.overrides, f"split.folds={arguments.folds}"]


def _check_recipe(arguments: argparse.Namespace) -> None:
    for name, instead in _OF_PLANS.items():
        if getattr(arguments, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is set for a recipe; expected it with a folder or a data set. With a "
                f"recipe use {instead}"
            )
    arguments.values = read_recipe(arguments.source, arguments.overrides, arguments.allow_code)
    if kind := _kind_of_runs(arguments):
        repeated_recipes(arguments.values, kind, getattr(arguments, kind))
    if arguments.show_batch:
        arguments.values.check_code()
    if not (arguments.check_data or arguments.show_batch):
        arguments.values.check_trainable()
        check_writable(Path(arguments.values.trainer["output_dir"]), "trainer.output_dir")


def _check_plan(arguments: argparse.Namespace) -> None:
    """Check what needs no plan; with `--resume` the recipe that the run left takes its place."""
    if arguments.init:
        _check_init(arguments)
        arguments.overrides.append(f"model.checkpoint={json.dumps(arguments.init)}")
    given, source = parse_overrides(arguments.overrides), arguments.source
    arguments.output_dir = given["trainer"].get("output_dir") or default_output_dir(source)
    _check_folder(Path(source))
    _check_plan_options(arguments)
    check_writable(Path(arguments.output_dir), "trainer.output_dir")
    if arguments.resume:
        arguments.values = _recipe_to_resume(arguments)
    elif not arguments.dry_run and Path(arguments.output_dir).is_dir():
        RunFolder(arguments.output_dir).check_free(arguments.overwrite)


def _check_init(arguments: argparse.Namespace) -> None:
    if parse_overrides(arguments.overrides)["model"].get("checkpoint"):
        raise ValueError("--init and model.checkpoint are both set; expected one of them")
    is_hub_name = arguments.init.count("/") == 1 and arguments.init[0] not in "./~"
    if not is_hub_name and not Path(arguments.init).exists():
        raise FileNotFoundError(
            f"--init is {arguments.init}, which does not exist; expected a model's folder or a Hub repository"
        )


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        return
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds a model; expected a folder of images and masks. To start from this model give --init "
            f"{folder}"
            + (f", to continue its run: segformer train {folder / RECIPE_FILE} --resume")
            * (folder / RECIPE_FILE).is_file()
        )
    if not any(folder.iterdir()):
        raise ValueError(f"{folder} is empty; expected images and masks, in images/ and masks/ for example")


def _check_plan_options(arguments: argparse.Namespace) -> None:
    if arguments.steps and arguments.time:
        raise ValueError("--steps and --time are both set; expected one of them")
    try:
        seconds = parse_duration(arguments.time) if arguments.time else None
    except ValueError as error:
        raise ValueError(f"--time: {error}") from error
    arguments.budget = Budget(arguments.steps, seconds)
    for name in ("check_data", "show_batch"):
        if getattr(arguments, name):
            raise ValueError(f"--{name.replace('_', '-')} is set for a folder; expected a recipe: --dry-run writes one")
    for name in _OF_PLANS:
        if arguments.resume and getattr(arguments, name):
            raise ValueError(
                f"--resume and --{name.replace('_', '-')} are both set; expected --resume alone: a resumed run keeps "
                f"its plan, {Path(arguments.output_dir) / RECIPE_FILE}"
            )


def _recipe_to_resume(arguments: argparse.Namespace) -> Recipe:
    path = Path(arguments.output_dir) / RECIPE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no run to resume, {path} is missing; expected trainer.output_dir=DIR of a run on "
            f"{arguments.source}, or no --resume to plan one"
        )
    recipe = read_recipe(path, arguments.overrides, arguments.allow_code)
    recipe.check_trainable()
    if _is_main():
        print(f"Resuming by {path}; there is no new plan.", flush=True)
    return recipe


def train(arguments: argparse.Namespace) -> None:
    """Run `segformer train`."""
    if arguments.list:
        recipes = list_recipes()
        width = max(map(len, recipes), default=0)
        print("\n".join(f"{name:{width}}  {line}" for name, line in recipes.items()))
        return
    try:
        if arguments.plans and not arguments.resume:
            _plan(arguments)
            if arguments.dry_run:
                return
        from ..training import run
        from ..training.allocator import keep_freed_memory

        keep_freed_memory()
        if arguments.check_data or arguments.show_batch:
            run.inspect_data(arguments.values, arguments.check_data, arguments.show_batch)
        elif kind := _kind_of_runs(arguments):
            number = getattr(arguments, kind)
            train_repeatedly(arguments.values, kind, number, arguments.resume, arguments.overwrite)
        else:
            run.fine_tune(arguments.values, arguments.resume, arguments.overwrite)
    except KeyboardInterrupt:
        if _is_main():
            print(f"\nStopped. {_how_to_resume(arguments)}", file=sys.stderr)
        raise SystemExit(130) from None  # nothing more to say


def _plan(arguments: argparse.Namespace) -> None:
    """Plan the run, print the plan, and write it if nothing else is wanted."""
    from ..training.folder_run import plan_data, write_plan
    from ..training.plan import format_duration

    if _is_main():
        print("Looking at the data, and timing a few steps ...", flush=True)
    plan = plan_data(arguments.source, arguments.budget, arguments.overrides, arguments.find_learning_rate)
    name = Path(arguments.output_dir).name
    arguments.values = plan.to_recipe(name)
    arguments.values.check_trainable()
    if not _is_main():
        return
    print("".join(f"\n{note}" for note in plan.notes) + f"\n\n{plan.format_table()}\n")
    print(f"Training and evaluation take about {format_duration(plan.seconds)}; set any value by table.key=value.")
    if arguments.dry_run:
        path = write_plan(plan, arguments.output_dir, arguments.overwrite)
        print(f"The plan is {path}. Train by it with: {shlex.join(['segformer', 'train', str(path)])}")
    else:
        print(
            f"The plan is kept in {Path(arguments.output_dir) / RECIPE_FILE}, which reproduces the run.\n", flush=True
        )


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _how_to_resume(arguments: argparse.Namespace) -> str:
    recipe: Recipe | None = getattr(arguments, "values", None)
    folder, kind = Path(recipe.trainer["output_dir"]) if recipe else Path(), _kind_of_runs(arguments)
    runs = repeated_recipes(recipe, kind, getattr(arguments, kind)) if recipe and kind else ()
    folders = [folder, *(folder / name for name in runs)] if recipe else []
    checkpoints = [checkpoint for each in folders for checkpoint in list_checkpoints(each)]
    if not checkpoints:
        return "There is no checkpoint to resume from yet; trainer.save_steps says how often one is written."
    options = ["--allow-code", "--resume"] if arguments.allow_code else ["--resume"]
    options = [f"--{kind}", str(getattr(arguments, kind)), *options] if kind else options
    overrides = [each for each in arguments.overrides if not (arguments.folds and each.startswith("split.folds="))]
    command = shlex.join(["segformer", "train", str(arguments.source), *overrides, *options])
    return f"Resume from {folder if kind else checkpoints[0]} with: {command}"


__all__ = ["add_train"]
