"""Evaluate a checkpoint on the evaluation data of a recipe: a table by class, metrics.json and two pictures.

python -m training.evaluate outputs/shapes_b0 configuration/shapes_b0.toml
python -m training.evaluate outputs/camvid_b0 configuration/camvid_b0.toml data.root=DIR evaluation.flip=true
python -m training.evaluate OWNER/NAME configuration/camvid_b0.toml data.root=DIR --out outputs/theirs
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_segformer.training.program import add_recipe, check_writable, run_program
from hf_segformer.training.recipe import Recipe, read_recipe

_NUM_WORST = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: of the command line; by default those of the process.

    Returns:
        exit code: 0, 1 after an error, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description="Evaluate a checkpoint on a recipe's evaluation data, in the way that its [evaluation] says.",
    )
    parser.add_argument("checkpoint", help="a folder, a file of weights or a Hub repository")
    add_recipe(parser, "evaluation.sliding_window=512")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write (default: the checkpoint's folder, or outputs/evaluation)",
    )
    options = parser.parse_intermixed_args(arguments)
    return run_program(lambda: _run(options), options.debug)


def _run(options: argparse.Namespace) -> int:
    recipe = read_recipe(options.recipe, options.overrides)
    _check_checkpoint(options.checkpoint, Path(recipe.trainer["output_dir"]))
    is_folder = Path(options.checkpoint).is_dir()
    folder = options.out or (Path(options.checkpoint) if is_folder else Path("outputs/evaluation"))
    check_writable(folder, "--out")
    print("Loading PyTorch and Transformers ...", flush=True)
    evaluate_checkpoint(options.checkpoint, recipe, folder)
    return 0


def _check_checkpoint(checkpoint: str, output_dir: Path) -> None:
    """Tell a missing folder before anything heavy is imported; where the recipe's runs lie no repository is meant."""
    path = Path(checkpoint)
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", checkpoint) and path.parent != output_dir.parent
    if not path.exists() and (not is_name or path.parent.is_dir()):
        raise FileNotFoundError(f"there is no checkpoint {checkpoint}")


def evaluate_checkpoint(checkpoint: str, recipe: Recipe, folder: Path) -> None:
    """Print the table, and write metrics.json, confusion.png and worst.png.

    Args:
        checkpoint: a folder, a file of weights or a Hub repository.
        recipe: whose evaluation data and `[evaluation]` count.
        folder: where to write.

    Raises:
        ValueError: if the checkpoint holds no segmentation model, or its classes are not those of the data.
        OSError: if it or the data can not be read, or the results not be written.
    """
    # These take seconds to import; the arguments were checked by now.
    import torch
    from accelerate import PartialState
    from transformers import logging

    from hf_segformer.conversion.checkpoints import locate
    from hf_segformer.conversion.convert import own_processor, segmentation_model
    from hf_segformer.evaluation.evaluate import evaluate
    from hf_segformer.training.data import load_data
    from hf_segformer.training.report import write_evaluation

    options, state = recipe.evaluation, PartialState(cpu=not torch.accelerator.is_available())
    logging.disable_progress_bar()
    path = locate(checkpoint)
    model = segmentation_model(path)
    processor = own_processor(path, model)
    data = load_data(recipe.data, model.config.num_channels)
    _check_classes(checkpoint, model.config, data.names)
    folder.mkdir(parents=True, exist_ok=True)
    model, processor = model.to(state.device), processor or data.processor
    if state.is_main_process:
        print(f"Model    {checkpoint}, {model.num_parameters():,} parameters, {len(data.names)} classes")
        print(f"Data     {len(data.evaluation)} pictures\n", flush=True)
    result = evaluate(model, processor, data.evaluation, options, names=data.names, num_worst=_NUM_WORST)
    if not state.is_main_process:
        return
    print(result.format_table())
    write_evaluation(result, recipe, folder)
    _draw_worst(model, processor, data, options, result).save(folder / "worst.png")
    print(f"\nWritten to {folder}: metrics.json, confusion.png, worst.png")


def _check_classes(checkpoint: str, config, names: Sequence[str]) -> None:
    own = [config.id2label[index].strip() for index in range(config.num_labels)]
    is_unnamed = own == [f"LABEL_{index}" for index in range(len(own))]  # weights that came without names
    if own != list(names) and not (is_unnamed and len(own) == len(names)):
        raise ValueError(
            f"{checkpoint} tells {len(own)} classes apart, {', '.join(own)}, but the data have {len(names)}: "
            f"{', '.join(names)}"
        )


def _draw_worst(model, processor, data, options, result):
    """A figure of the worst pictures: what was seen, the truth and the prediction laid over it, mean IoU below."""
    import numpy as np

    from hf_segformer.inference.segmenter import predict
    from hf_segformer.training.report import with_background
    from hf_segformer.visualization import Stretch, displayable, figure, overlay

    names, palette = with_background(data.names, data.palette)
    rows, captions, stretch = [], [], Stretch.of_processor(processor)
    for index, score in result.worst:
        row = data.evaluation[index]
        truth, picture = np.asarray(row["label"]), displayable(row["image"], stretch)
        prediction = predict(model, processor, row["image"], truth.shape, options).cpu()
        rows.append([picture, overlay(picture, truth, palette), overlay(picture, prediction, palette)])
        captions.append(f"{data.describe('evaluation', index)}: mean IoU {100 * score:.1f} %")
    return figure(rows, ("picture", "truth", "prediction"), names, palette, captions, panel_height=200)


if __name__ == "__main__":
    sys.exit(main())
