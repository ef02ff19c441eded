"""`segformer evaluate MODEL`: metrics of a model on images with masks."""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from .options import (
    add_device,
    add_inference_options,
    add_labeled_data,
    add_model,
    add_output_dir,
    inference_options,
)


def add_evaluate(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="evaluate a model on images with masks",
        description="Prints IoU and accuracy by class; with --output-dir also writes metrics.json, which the model "
        "card and `segformer push` read, and a plot of the confusion matrix. Under torchrun, processes share the work.",
    )
    add_model(parser)
    add_labeled_data(parser)
    add_inference_options(parser)
    add_output_dir(parser, "write metrics.json and confusion.png to this folder")
    parser.add_argument("--title", help="name of the data in metrics.json and the card (default: the folder's name)")
    add_device(parser)
    parser.set_defaults(check=check, run=run)


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError if options do not go together, or OSError if the output folder is not writable."""
    folders = [folder is not None for folder in (arguments.images, arguments.masks)]
    if any(folders) != all(folders) or any(folders) == (arguments.dataset is not None):
        raise ValueError("expected images with masks, either by --images DIR and --masks DIR or by --dataset NAME")
    for option in ("images", "masks"):
        if (folder := getattr(arguments, option)) is not None and not folder.is_dir():
            raise ValueError(f"--{option} is {folder}; expected a folder")
    arguments.options = inference_options(arguments)
    if arguments.output_dir is not None:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        TemporaryDirectory(dir=arguments.output_dir).cleanup()


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the table, and write metrics.json and confusion.png."""
    import torch
    from accelerate import PartialState

    from ..conversion.loading import load_segmentation
    from ..evaluation.evaluate import evaluate
    from ..files import atomic_write, write_json
    from ..inference.predictor import find_device
    from ..visualization import draw_confusion

    device = find_device(arguments.device)
    state = PartialState(cpu=not torch.accelerator.is_available())
    model, processor = load_segmentation(arguments.model)
    dataset = _load_data(arguments, model.config, processor.do_reduce_labels)
    result = evaluate(model.to(device), processor, dataset, arguments.options)
    if not state.is_main_process:  # every process has the whole result
        return
    print(result.format_table())
    _warn_of_missing_class(result, arguments)
    if arguments.output_dir is None:
        return
    title = arguments.title or Path(arguments.dataset or arguments.images).resolve().name
    values = result.to_json(title, arguments.split if arguments.dataset else "", arguments.options)
    write_json(values, arguments.output_dir / "metrics.json")
    with atomic_write(arguments.output_dir / "confusion.png") as partial:
        draw_confusion(result.matrix, result.names).save(partial, "PNG")
    print(f"written to {arguments.output_dir}: metrics.json, confusion.png")


def _load_data(arguments: argparse.Namespace, config, reduce_labels: bool):
    """Return the images and masks as a data set that decodes them when they are asked for."""
    from ..data.pairing import decode_dataset, open_split, pair_images_and_masks

    if arguments.dataset is None:
        suffixes = (arguments.image_suffix, arguments.mask_suffix)
        dataset = pair_images_and_masks(arguments.images, arguments.masks, *suffixes)
    else:
        columns = (arguments.image_column, arguments.mask_column)
        dataset = open_split(arguments.dataset, arguments.split, *columns)
    values = {"label_values": arguments.label_values, "ignore": arguments.ignore_values}
    return decode_dataset(dataset, config.num_channels, config.num_labels, reduce_labels=reduce_labels, **values)


def _warn_of_missing_class(result, arguments: argparse.Namespace) -> None:
    """Warn where no pixel is of a binary model's one class: masks of 0 and 255 are the most common reason."""
    if result.misses_its_class() and not arguments.label_values:
        print(
            f"segformer: no mask has a pixel of {result.names[1]!r}; if 255 stands for it, add --label-values 0 255",
            file=sys.stderr,
        )


__all__ = ["add_evaluate"]
