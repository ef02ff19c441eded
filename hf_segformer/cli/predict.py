"""`segformer predict MODEL INPUT... -o DIR`: batch inference over files and data sets."""

import argparse
import os
from dataclasses import replace

from ..config import parse_value_range
from .cluster import add_cluster_options, check_cluster_options, cluster_engine, storage_source
from .maps import add_map_options, check_map_options, map_outputs, map_source
from .options import (
    add_dataset,
    add_device,
    add_inference_options,
    add_model,
    add_output_dir,
    add_reading_options,
    inference_options,
    reading_options,
    whole_number,
)
from .videos import (
    add_video_options,
    check_video_options,
    choose_video_format,
    print_videos,
    stream_source,
    video_outputs,
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
        "--format", choices=["png", "parquet"], help="one file an image, or shards (default: png, on a cluster parquet)"
    )
    parser.add_argument("--overlay", action="store_true", help="also write NAME_overlay.png")
    parser.add_argument("--legend", choices=["right", "below"], help="add a legend to the overlay")
    parser.add_argument(
        "--clear",
        nargs="+",
        default=[],
        metavar="CLASS",
        help="classes that the overlay leaves clear, such as background",
    )
    parser.add_argument(
        "--probabilities", choices=["uint8", "float16"], help="also write NAME_probabilities.npy, of all classes"
    )
    parser.add_argument(
        "--masks-as",
        choices=["palette", "values", "255"],
        default="palette",
        help="masks in colours, whose values are the classes; as grey values; or of two classes as 0 and 255 "
        "(default: palette)",
    )
    parser.add_argument(
        "--keep-identity",
        action="store_true",
        help="copy patient and study from DICOM files to DICOM segmentations, which leave them empty by default",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="probability above which a pixel is foreground, for a model with one label (default: the model's)",
    )
    add_inference_options(parser, tiles=True)
    add_reading_options(parser)
    parser.add_argument(
        "--axis",
        type=whole_number(1, 3),
        metavar="N",
        help="axis, from 1, that NIfTI volumes are cut along into slices (default: 3)",
    )
    add_map_options(parser)
    add_video_options(parser)
    add_cluster_options(parser)
    add_device(parser)
    parser.set_defaults(check=check, run=run)


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError if options do not go together."""
    check_cluster_options(arguments)
    if not arguments.stream and bool(arguments.inputs) == bool(arguments.dataset):
        raise ValueError("expected either images (files, folders, patterns, @FILE) or --dataset NAME")
    check_map_options(arguments)
    if arguments.format == "parquet":
        for option in ("overlay", "probabilities"):
            if getattr(arguments, option):
                raise ValueError(
                    f"--{option} is given with --format parquet, which holds segmentation maps only; use --format png"
                )
    for option in ("legend", "clear"):
        if getattr(arguments, option) and not arguments.overlay:
            raise ValueError(f"--{option} is {getattr(arguments, option)}; expected together with --overlay")
    if arguments.pages and arguments.dataset:
        raise ValueError("--pages is given with --dataset, whose rows hold one image each; leave it out")
    arguments.options = inference_options(arguments)
    if arguments.axis and arguments.dataset:
        raise ValueError("--axis is given with --dataset, whose rows hold images; leave it out")
    for option in ("pages", "dataset"):
        if arguments.keep_identity and getattr(arguments, option):
            raise ValueError(
                f"--keep-identity is given with --{option}, whose masks are images that name nobody; leave it out"
            )
    if arguments.threshold is not None and not 0 < arguments.threshold < 1:
        raise ValueError(f"--threshold is {arguments.threshold}; expected a probability above 0 and below 1")
    arguments.window = arguments.value_range == "window"
    if arguments.window:
        arguments.value_range = None
    else:
        arguments.value_range = parse_value_range(arguments.value_range, "--value-range")
    check_video_options(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Predict, and print how many images are done."""
    from ..data.readers import keeps_identity
    from ..data.sources import DatasetSource, FileSource
    from ..inference.batch import predict_batch
    from ..inference.predictor import SegFormerPredictor, find_device
    from ..inference.writers import Outputs

    outputs = Outputs(
        arguments.format,
        arguments.overlay,
        arguments.legend,
        tuple(arguments.clear),
        arguments.probabilities,
        masks_as=arguments.masks_as,
        keep_identity=arguments.keep_identity,
    )
    source: FileSource | DatasetSource
    reading = reading_options(arguments)
    if arguments.window:
        reading["window"] = True
    if arguments.axis:
        reading["axis"] = arguments.axis - 1
    if arguments.dataset:
        source = DatasetSource(arguments.dataset, arguments.split, arguments.image_column, **reading)
    else:
        source = (
            storage_source(arguments, reading)
            or stream_source(arguments, reading)
            or map_source(arguments, reading)
            or FileSource(arguments.inputs, arguments.output_dir, **reading)
        )
    if arguments.keep_identity and not any(keeps_identity(str(item.source)) for item in source.items()):
        raise ValueError(
            "--keep-identity is given, but no input is a DICOM file, whose identity a mask could keep: leave it out"
        )
    choose_video_format(arguments, source)
    options = map_outputs(arguments, source) or video_outputs(arguments)
    outputs = replace(outputs, kind=arguments.format, options=options)
    cluster = cluster_engine(arguments)
    device = find_device("cpu" if cluster else arguments.device)
    predictor = SegFormerPredictor.from_pretrained(
        arguments.model, device=device, options=arguments.options, engine="torch" if cluster else arguments.engine
    )
    if arguments.value_range is not None or arguments.window:
        predictor.processor.value_range = arguments.value_range
    if arguments.threshold is not None:
        if predictor.model.config.num_labels != 1:
            raise ValueError(
                f"--threshold is given for a model of {predictor.model.config.num_labels} labels; expected one label: "
                "leave it out"
            )
        predictor.processor.binary_threshold = arguments.threshold
    report = predict_batch(predictor, source, arguments.output_dir, outputs, engine=cluster)
    if int(os.environ.get("RANK", "0")):
        return  # the first process speaks for all; if another failed first, torchrun would end it before it has
    resumed = f", {report.num_resumed} of them by earlier runs" if report.num_resumed else ""
    noun = "image" if report.num_images == 1 else "images"
    print(f"{report.num_images} {noun} predicted in {arguments.output_dir}{resumed}", flush=True)
    print_videos(arguments)
    if report.skipped:
        print(report.format_skipped(), flush=True)
    if report.failed:
        raise ValueError(report.format_failures())


__all__ = ["add_predict"]
