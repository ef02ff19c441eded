"""Fine-tune SegFormer as a recipe says: train, evaluate, save, load again, draw.

python -m training.finetune configuration/shapes_b0.toml
python -m training.finetune configuration/camvid_b0.toml data.root=DIR trainer.max_steps=500
python -m training.finetune configuration/camvid_b0.toml data.root=DIR --resume
python -m training.finetune configuration/camvid_b0.toml data.root=DIR --check-data
python -m training.finetune configuration/camvid_b0.toml data.root=DIR --show-batch batch.png
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_segformer.training.program import add_recipe, check_writable, run_program
from hf_segformer.training.recipe import Recipe, read_recipe
from hf_segformer.training.resume import list_checkpoints


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: of the command line; by default those of the process.

    Returns:
        exit code: 0, 1 after an error, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training.finetune",
        description="Fine-tune SegFormer as a recipe says, on generated or real pictures.",
    )
    add_recipe(parser, "trainer.max_steps=24")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    parser.add_argument("--check-data", action="store_true", help="read all pictures and label maps, and stop there")
    parser.add_argument(
        "--show-batch", type=Path, metavar="PNG", help="draw what the model would be fed first, and stop there"
    )
    options = parser.parse_intermixed_args(arguments)
    return run_program(lambda: _run(options), options.debug)


def _run(options: argparse.Namespace) -> int:
    recipe = read_recipe(options.recipe, options.overrides)
    is_look = bool(options.check_data or options.show_batch)
    if not is_look:
        check_writable(Path(recipe.trainer["output_dir"]), "trainer.output_dir")
    print("Loading PyTorch and Transformers ...", flush=True)
    try:
        from hf_segformer.training import run  # after the recipe was checked: this import takes seconds

        if is_look:
            run.inspect_data(recipe, options.check_data, options.show_batch)
        else:
            run.fine_tune(recipe, options.resume)
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"\nStopped. {_way_on(recipe, options)}", file=sys.stderr)
        return 130
    return 0


def _way_on(recipe: Recipe, options: argparse.Namespace) -> str:
    checkpoints = list_checkpoints(Path(recipe.trainer["output_dir"]))
    if not checkpoints:
        return "There is no checkpoint yet to go on from; trainer.save_steps says how often one is written."
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    command = shlex.join([str(python), "-m", "training.finetune", str(options.recipe), *options.overrides, "--resume"])
    return f"Go on from {checkpoints[0]} with: {command}"


if __name__ == "__main__":
    sys.exit(main())
