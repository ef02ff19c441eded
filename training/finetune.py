"""Fine-tune SegFormer as a recipe says; `segformer train` is the same with checks of its command line.

python -m training.finetune shapes_b0
python -m training.finetune camvid_b0 data.root=DIR trainer.max_steps=500
python -m training.finetune camvid_b0 data.root=DIR --resume
torchrun --nproc-per-node 2 -m training.finetune camvid_b0 data.root=DIR
"""

import argparse
from collections.abc import Sequence

from hf_segformer.training.allocator import keep_freed_memory
from hf_segformer.training.recipe import read_recipe
from hf_segformer.training.run import fine_tune


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the recipe, apply the overrides, and run it.

    Args:
        arguments: of the command line; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m training.finetune", description="Fine-tune as a recipe says.")
    parser.add_argument("recipe", help="a name such as camvid_b0, or a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="table.key=value", help="for example trainer.max_steps=24")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="take the place of a finished run")
    options = parser.parse_intermixed_args(arguments)
    recipe = read_recipe(options.recipe, options.overrides)
    keep_freed_memory()
    folder = fine_tune(recipe, resume=options.resume, overwrite=options.overwrite)
    print(f"The trained model is in {folder}.")


if __name__ == "__main__":
    main()
