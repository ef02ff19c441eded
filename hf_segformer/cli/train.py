"""`segformer train RECIPE`: fine-tune a model by a recipe."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from ..files import check_writable
from ..training.recipe import Recipe, list_recipes, read_recipe
from ..training.resume import list_checkpoints


def add_train(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "train",
        help="fine-tune a model by a recipe",
        description="Checks the data, trains, evaluates, saves, loads again and compares. RECIPE is the name of a "
        "recipe (--list) or a TOML file; any of its values can be set on the command line. Several processes: "
        "torchrun --nproc-per-node N -m hf_segformer train RECIPE ...",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a name such as camvid_b0, or a TOML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="table.key=value", help="set a value, for example trainer.max_steps=24"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the recipes, and stop")
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a finished run, which is moved to another name"
    )
    parser.add_argument("--check-data", action="store_true", help="read all images and masks, and stop")
    parser.add_argument("--show-batch", type=Path, metavar="PNG", help="draw the model's first input, and stop")
    parser.add_argument(
        "--allow-code", action="store_true", help="run the code that the recipe's file names in augmentation.custom"
    )
    parser.set_defaults(check=check, run=train)


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError or OSError if the recipe, an override or the output folder is wrong."""
    if arguments.list:
        arguments.loads_package = False
        return
    if arguments.recipe is None:
        raise ValueError("no recipe is given; expected its name or a TOML file: --list prints the names")
    if arguments.resume and arguments.overwrite:
        raise ValueError("--resume and --overwrite are both set; expected one: continue a run, or replace it")
    arguments.values = read_recipe(arguments.recipe, arguments.overrides, arguments.allow_code)
    if arguments.show_batch:
        arguments.values.check_code()
    if not (arguments.check_data or arguments.show_batch):
        arguments.values.check_trainable()
        check_writable(Path(arguments.values.trainer["output_dir"]), "trainer.output_dir")
    if _is_main():
        print("Loading PyTorch and Transformers ...", flush=True)


def train(arguments: argparse.Namespace) -> None:
    """Run `segformer train`."""
    if arguments.list:
        recipes = list_recipes()
        width = max(map(len, recipes), default=0)
        print("\n".join(f"{name:{width}}  {line}" for name, line in recipes.items()))
        return
    try:
        from ..training import run

        if arguments.check_data or arguments.show_batch:
            run.inspect_data(arguments.values, arguments.check_data, arguments.show_batch)
        else:
            run.fine_tune(arguments.values, arguments.resume, arguments.overwrite)
    except KeyboardInterrupt:
        if _is_main():
            print(f"\nStopped. {_how_to_resume(arguments.values, arguments)}", file=sys.stderr)
        raise SystemExit(130) from None  # nothing more to say


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _how_to_resume(recipe: Recipe, arguments: argparse.Namespace) -> str:
    checkpoints = list_checkpoints(Path(recipe.trainer["output_dir"]))
    if not checkpoints:
        return "There is no checkpoint to resume from yet; trainer.save_steps says how often one is written."
    options = ["--allow-code", "--resume"] if arguments.allow_code else ["--resume"]
    command = shlex.join(["segformer", "train", str(arguments.recipe), *arguments.overrides, *options])
    return f"Resume from {checkpoints[0]} with: {command}"


__all__ = ["add_train"]
