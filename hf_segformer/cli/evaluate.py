"""`segformer evaluate MODEL`: metrics of a model on images with masks."""

import argparse
import sys
from pathlib import Path

from ..files import check_writable
from ..training.recipe import read_recipe
from .options import (
    add_device,
    add_inference_options,
    add_labeled_data,
    add_model,
    add_output_dir,
    add_reading_options,
    inference_options,
    reading_options,
    value_range,
)

# Options that a recipe sets itself, and the key of the recipe that takes their place.
_IN_RECIPE = {
    "images": "data.root",
    "masks": "data.root",
    "image_suffix": "data.image_suffix",
    "mask_suffix": "data.mask_suffix",
    "dataset": "data.root",
    "split": "data.eval_split",
    "image_column": "data.image_column",
    "mask_column": "data.mask_column",
    "label_values": "data.label_values",
    "ignore_values": "data.ignore_values",
    "title": "data.title",
    "value_range": "data.value_range",
    "pages": "data.pages",
    "as_stored": "data.ignore_exif",
    **{name: f"evaluation.{name}" for name in ("flip", "scales", "sliding_window", "stride", "batch_size", "dtype")},
}


def add_evaluate(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="evaluate a model on images with masks",
        description="Prints IoU and accuracy by class; with --output-dir also writes metrics.json, which the model "
        "card and `segformer push` read, and a plot of the confusion matrix. Under torchrun, processes share the work.",
    )
    add_model(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="table.key=value", help="set a value of the recipe, such as data.root=DIR"
    )
    add_labeled_data(parser)
    add_inference_options(parser)
    add_reading_options(parser)
    add_output_dir(parser, "write the results to this folder (with --recipe by default the model's)")
    parser.add_argument("--title", help="name of the data in metrics.json and the card (default: the folder's name)")
    add_device(parser)
    parser.set_defaults(check=check, run=run, defaults={name: parser.get_default(name) for name in _IN_RECIPE})


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError if options do not go together, or OSError if the output folder is not writable."""
    if arguments.recipe:
        for name, key in _IN_RECIPE.items():
            if getattr(arguments, name) != arguments.defaults[name]:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} is given with --recipe, which says it; set {key}=VALUE instead")
        arguments.values = read_recipe(arguments.recipe, arguments.overrides)
        if arguments.output_dir is None:
            is_folder = Path(arguments.model).is_dir()
            arguments.output_dir = Path(arguments.model) if is_folder else Path("outputs/evaluation")
    elif arguments.overrides:
        raise ValueError(f"{arguments.overrides[0]} is given; expected together with --recipe, whose values it sets")
    else:
        _check_data(arguments)
        arguments.options = inference_options(arguments)
        arguments.value_range = value_range(arguments.value_range)
    if arguments.output_dir is not None:
        check_writable(arguments.output_dir, "--output-dir")


def _check_data(arguments: argparse.Namespace) -> None:
    folders = [folder is not None for folder in (arguments.images, arguments.masks)]
    if any(folders) != all(folders) or any(folders) == (arguments.dataset is not None):
        raise ValueError(
            "expected images with masks: either --images DIR and --masks DIR, or --dataset NAME, or --recipe RECIPE"
        )
    if arguments.pages and arguments.dataset:
        raise ValueError("--pages is given with --dataset, whose rows hold one image each; leave it out")
    for option in ("images", "masks"):
        if (folder := getattr(arguments, option)) is not None and not folder.is_dir():
            raise ValueError(f"--{option} is {folder}; expected a folder")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the table, and write metrics.json and confusion.png."""
    from ..inference.predictor import find_device

    device = find_device(arguments.device)
    if arguments.recipe:
        from ..training.evaluation import evaluate_recipe

        evaluate_recipe(arguments.model, arguments.values, arguments.output_dir, device)
        return
    result, is_main = _evaluate(arguments, device)
    if not is_main:  # every process has the whole result
        return
    print(result.format_table())
    if result.misses_its_class() and not arguments.label_values:  # masks of 0 and 255 are the most common reason
        print(
            f"segformer: no mask has a pixel of {result.names[1]!r}; if 255 stands for it, add --label-values 0 255",
            file=sys.stderr,
        )
    if arguments.output_dir is not None:
        _write(result, arguments)


def _evaluate(arguments: argparse.Namespace, device):
    """Return the evaluation, and True in the main process."""
    import torch
    from accelerate import PartialState

    from ..conversion.loading import load_segmentation
    from ..data.pairing import decode_dataset, open_split, pair_images_and_masks
    from ..evaluation.evaluate import evaluate

    state = PartialState(cpu=not torch.accelerator.is_available())
    model, processor = load_segmentation(arguments.model)
    if arguments.value_range is not None:
        processor.value_range = arguments.value_range
    reading = reading_options(arguments)
    if arguments.dataset is None:
        suffixes = (arguments.image_suffix, arguments.mask_suffix)
        pages = {"pages": reading.pop("pages")} if "pages" in reading else {}
        dataset = pair_images_and_masks(arguments.images, arguments.masks, *suffixes, **pages)
    else:
        columns = (arguments.image_column, arguments.mask_column)
        dataset = open_split(arguments.dataset, arguments.split, *columns)
    dataset = decode_dataset(
        dataset,
        model.config.num_channels,
        model.config.num_labels,
        reduce_labels=processor.do_reduce_labels,
        label_values=arguments.label_values,
        ignore=arguments.ignore_values,
        ignore_index=model.config.semantic_loss_ignore_index,
        any_range=processor.value_range is not None,
        **reading,
    )
    dtype = getattr(torch, arguments.options.dtype) if arguments.options.dtype else None
    return evaluate(model.to(device, dtype), processor, dataset, arguments.options), state.is_main_process


def _write(result, arguments: argparse.Namespace) -> None:
    from ..files import write_json
    from ..training.plots import draw_confusion, save_plot

    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    title = arguments.title or Path(arguments.dataset or arguments.images).resolve().name
    values = result.to_json(title, arguments.split if arguments.dataset else "", arguments.options)
    write_json(values, folder / "metrics.json")
    has_plot = save_plot(folder / "confusion.png", draw_confusion, result.matrix, result.names)
    print(f"written to {folder}: metrics.json" + ", confusion.png" * has_plot)


__all__ = ["add_evaluate"]
