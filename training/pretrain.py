"""Pre-train SegFormer's encoder as a recipe says; `segformer pretrain` is the same with checks of its command line.

python -m training.pretrain single_shapes_b0
python -m training.pretrain imagenet_b0 data.root=DIR
python -m training.pretrain masked_b0 data.root=DIR --resume
torchrun --nproc-per-node 8 -m training.pretrain imagenet_b0 data.root=DIR
"""

import argparse
from collections.abc import Sequence

from hf_segformer.training.pretrain import pretrain
from hf_segformer.training.pretrain_recipe import read_pretrain_recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the recipe, apply the overrides, and run it.

    Args:
        arguments: of the command line; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m training.pretrain", description="Pre-train as a recipe says.")
    parser.add_argument("recipe", help="a name such as imagenet_b0, or a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="table.key=value", help="for example trainer.max_steps=24")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="take the place of a finished run")
    options = parser.parse_intermixed_args(arguments)
    recipe = read_pretrain_recipe(options.recipe, options.overrides)
    folder = pretrain(recipe, resume=options.resume, overwrite=options.overwrite)
    print(f"The encoder is in {folder}.")


if __name__ == "__main__":
    main()
