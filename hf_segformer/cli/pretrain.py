"""`segformer pretrain`: train an encoder on images without masks, by a recipe."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from ..files import check_writable
from ..training.pretrain_recipe import read_pretrain_recipe
from ..training.recipe import list_recipes
from ..training.resume import list_checkpoints


def add_pretrain(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "pretrain",
        help="train an encoder on images without masks, by a recipe",
        description="Trains an encoder to classify images, or to reconstruct masked parts of images without labels, "
        "and leaves a folder for `segformer train DIR --init FOLDER`. Any value of the recipe can be set on the "
        "command line. Several processes: torchrun --nproc-per-node N -m hf_segformer pretrain ...",
    )
    parser.add_argument(
        "source", nargs="?", metavar="RECIPE", help="the name of a recipe of pre-training (--list), or a TOML file"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="table.key=value", help="set a value, for example data.root=DIR"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the recipes, and stop")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a finished run, which is moved to another name"
    )
    parser.set_defaults(check=check, run=pretrain)


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError or OSError if the recipe, an override or the output folder is wrong."""
    if arguments.list:
        arguments.loads_package = False
        return
    if arguments.source is None:
        raise ValueError("no recipe is given; expected one of those that --list prints, or a TOML file")
    if arguments.resume and arguments.overwrite:
        raise ValueError("--resume and --overwrite are both set; expected one: continue a run, or replace it")
    if Path(arguments.source).is_dir():
        raise ValueError(
            f"{arguments.source} is a folder; expected a recipe, such as masked_b0 data.root={arguments.source}"
        )
    arguments.values = read_pretrain_recipe(arguments.source, arguments.overrides)
    check_writable(Path(arguments.values.trainer["output_dir"]), "trainer.output_dir")
    if _is_main():
        print("Loading PyTorch and Transformers ...", flush=True)


def pretrain(arguments: argparse.Namespace) -> None:
    """Run `segformer pretrain`."""
    if arguments.list:
        recipes = list_recipes("pretrain")
        width = max(map(len, recipes), default=0)
        print("\n".join(f"{name:{width}}  {line}" for name, line in recipes.items()))
        return
    from ..training.pretrain import pretrain as run

    try:
        run(arguments.values, arguments.resume, arguments.overwrite)
    except KeyboardInterrupt:
        if _is_main():
            print(f"\nStopped. {_how_to_resume(arguments)}", file=sys.stderr)
        raise SystemExit(130) from None  # nothing more to say


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _how_to_resume(arguments: argparse.Namespace) -> str:
    checkpoints = list_checkpoints(Path(arguments.values.trainer["output_dir"]))
    if not checkpoints:
        return "There is no checkpoint to resume from yet; trainer.save_steps says how often one is written."
    command = shlex.join(["segformer", "pretrain", str(arguments.source), *arguments.overrides, "--resume"])
    return f"Resume from {checkpoints[0]} with: {command}"


__all__ = ["add_pretrain"]
