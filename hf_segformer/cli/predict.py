"""`segformer predict MODEL INPUT... -o DIR`: batch inference over files and data sets."""

import argparse
import os

from .options import (
    DTYPES,
    add_dataset,
    add_device,
    add_inference_options,
    add_model,
    add_output_dir,
    inference_options,
    whole_number,
)


def add_predict(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "predict",
        help="predict segmentation maps of files, folders, patterns or a data set",
        description="Writes NAME_mask.png for every image, at the image's size and in the model's colours. A run that "
        "was stopped resumes. Under torchrun or accelerate launch, processes share the work.",
    )
    add_model(parser)
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="a file, a folder with everything below it, a pattern, or @FILE with a list of paths",
    )
    add_dataset(parser, "predict the images of a data set instead: a folder or a Hub repository", split="train")
    add_output_dir(parser, "folder of the results", required=True)
    parser.add_argument(
        "--format", choices=["png", "parquet"], default="png", help="one file an image, or shards (default: png)"
    )
    parser.add_argument("--overlay", action="store_true", help="also write NAME_overlay.png")
    parser.add_argument("--legend", choices=["right", "below"], help="add a legend to the overlay")
    parser.add_argument(
        "--probabilities", choices=["uint8", "float16"], help="also write NAME_probabilities.npy, of all classes"
    )
    add_inference_options(parser)
    parser.add_argument(
        "--batch-size", type=whole_number(1), default=8, metavar="N", help="images per batch (default: 8)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="data type of the network (default: float32)")
    add_device(parser)
    parser.set_defaults(check=check, run=run)


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError if options do not go together."""
    if bool(arguments.inputs) == bool(arguments.dataset):
        raise ValueError("expected either images (files, folders, patterns, @FILE) or --dataset NAME")
    if arguments.format == "parquet":
        for option in ("overlay", "probabilities"):
            if getattr(arguments, option):
                raise ValueError(
                    f"--{option} is given with --format parquet, which holds segmentation maps only; use --format png"
                )
    if arguments.legend and not arguments.overlay:
        raise ValueError(f"--legend is {arguments.legend}; expected together with --overlay")
    arguments.options = inference_options(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Predict, and print how many images are done."""
    import torch

    from ..data.sources import DatasetSource, FileSource
    from ..inference.batch import Outputs, predict_batch
    from ..inference.predictor import SegFormerPredictor, find_device

    outputs = Outputs(arguments.format, arguments.overlay, arguments.legend, arguments.probabilities)
    source: FileSource | DatasetSource
    if arguments.dataset:
        source = DatasetSource(arguments.dataset, arguments.split, arguments.image_column)
    else:
        source = FileSource(arguments.inputs, arguments.output_dir)
    predictor = SegFormerPredictor.from_pretrained(
        arguments.model,
        device=find_device(arguments.device),
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        options=arguments.options,
        batch_size=arguments.batch_size,
    )
    report = predict_batch(predictor, source, arguments.output_dir, outputs)
    if int(os.environ.get("RANK", "0")):
        return  # the first process speaks for all; if another failed first, torchrun would end it before it has
    before = f", {report.num_before} of them before" if report.num_before else ""
    noun = "image" if report.num_pictures == 1 else "images"
    print(f"{report.num_pictures} {noun} predicted in {arguments.output_dir}{before}", flush=True)
    if report.failed:
        raise ValueError(report.told())


__all__ = ["add_predict"]
