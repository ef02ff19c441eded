"""The commands that label pictures: `segformer predict`, and `segformer evaluate` where the labels are known."""

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory


def add_evaluate(commands) -> None:
    """`segformer evaluate MODEL`: how well a model labels pictures whose labels are known."""
    parser = commands.add_parser(
        "evaluate",
        help="judge a model on labelled pictures",
        description="Labels pictures and compares with their label maps: a table by class, and with --out metrics.json "
        "(which the model card and `segformer push` read) and a picture of the confusions.",
    )
    parser.add_argument("model", help="a folder, a file of weights or a Hub repository")
    add_labelled(parser)
    parser.add_argument("--window", type=int, default=0, metavar="N", help="slide a window of N pixels")
    parser.add_argument("--stride", type=int, default=0, metavar="N", help="its step (default: three quarters of it)")
    parser.add_argument("--flip", action="store_true", help="average with the mirrored picture's prediction")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="X", help="average over these sizes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write metrics.json and confusion.png there")
    parser.add_argument("--title", help="what metrics.json and the card call the data (default: their folder's name)")
    parser.add_argument("--device", help="of PyTorch, such as cuda (default: the accelerator if there is one)")
    parser.set_defaults(run=evaluate)


def add_labelled(parser: argparse.ArgumentParser) -> None:
    """The options that say where labelled pictures lie, and what their labels mean."""
    sources = parser.add_argument_group("labelled pictures", "two folders, or a data set")
    sources.add_argument("--images", type=Path, metavar="DIR", help="pictures")
    sources.add_argument("--labels", type=Path, metavar="DIR", help="label maps, of the same names")
    sources.add_argument(
        "--image-suffix", default="", metavar="END", help="how pictures' names end, _image or _rgb.tif"
    )
    sources.add_argument("--label-suffix", default="", metavar="END", help="how label maps' names end, such as _labels")
    sources.add_argument("--dataset", metavar="NAME", help="a folder that datasets reads or saved, or a Hub repository")
    sources.add_argument("--split", default="validation", help="of the data set (default: validation)")
    sources.add_argument("--image-column", default="image", metavar="NAME", help="default: image")
    sources.add_argument("--label-column", default="label", metavar="NAME", help="default: label")
    sources.add_argument(
        "--label-values", type=int, nargs="+", default=[], metavar="N", help="what maps hold for each class, 0 255 say"
    )
    sources.add_argument(
        "--ignore", type=int, nargs="+", default=[], metavar="N", help="values that do not count, beside 255"
    )


def evaluate(arguments: argparse.Namespace) -> None:
    """Run `segformer evaluate`."""
    options = _checked(arguments)
    import torch
    from accelerate import PartialState

    from ..conversion.convert import load_segmentation
    from ..evaluation.evaluate import evaluate as evaluate_model
    from ..files import atomic_write, write_json
    from ..inference.predictor import find_device
    from ..visualization import draw_confusion

    device = find_device(arguments.device)
    state = PartialState(cpu=not torch.accelerator.is_available())
    model, processor = load_segmentation(arguments.model)
    rows = _labelled_rows(arguments, model.config, processor.do_reduce_labels, processor.value_range is not None)
    result = evaluate_model(model.to(device), processor, rows, options)
    if not state.is_main_process:  # several processes share the pictures, and each has the whole result
        return
    print(result.format_table())
    _warn_of_dropped_masks(result, arguments)
    if arguments.out is None:
        return
    title = arguments.title or Path(arguments.dataset or arguments.images).resolve().name
    values = result.to_json(title, arguments.split if arguments.dataset else "", options)
    write_json(values, arguments.out / "metrics.json")
    with atomic_write(arguments.out / "confusion.png") as partial:
        draw_confusion(result.matrix, result.names).save(partial, "PNG")
    print(f"written to {arguments.out}: metrics.json, confusion.png")


def _checked(arguments: argparse.Namespace):
    """How to predict; what else is wrong with the options is told here, too, before anything is read."""
    folders = [folder is not None for folder in (arguments.images, arguments.labels)]
    if any(folders) != all(folders) or any(folders) == (arguments.dataset is not None):
        raise ValueError("say where the labelled pictures are: by --images DIR and --labels DIR, or by --dataset NAME")
    options = _evaluation_options(arguments)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        TemporaryDirectory(dir=arguments.out).cleanup()
    return options


def _warn_of_dropped_masks(result, arguments: argparse.Namespace) -> None:
    """Say so where no pixel is of the one class that is looked for: masks of 0 and 255 are the most common ones."""
    if result.misses_its_class() and not arguments.label_values:
        print(
            f"segformer: the label maps have no pixel of {result.names[1]!r}: where 255 stands for it, it did "
            "not count, give --label-values 0 255",
            file=sys.stderr,
        )


def _evaluation_options(arguments: argparse.Namespace):
    """How to predict, in the words of the command line."""
    from ..config import InferenceOptions

    if arguments.stride and not arguments.window:
        raise ValueError(f"--stride is {arguments.stride}, but it is the step of a window: give --window, too")
    try:
        return InferenceOptions(arguments.window, arguments.stride, arguments.flip, arguments.scales)
    except ValueError as error:
        raise ValueError(str(error).replace("evaluation.", "--")) from error


def _labelled_rows(arguments: argparse.Namespace, config, reduce_labels: bool, any_range: bool):
    """The labelled pictures, read when they are asked for."""
    from ..data.pairing import decode_dataset, open_split, pair_images_and_masks

    if arguments.dataset is None:
        suffixes = (arguments.image_suffix, arguments.label_suffix)
        dataset = pair_images_and_masks(arguments.images, arguments.labels, *suffixes)
    else:
        columns = (arguments.image_column, arguments.label_column)
        dataset = open_split(arguments.dataset, arguments.split, *columns)
    values = {"label_values": arguments.label_values, "ignore": arguments.ignore}
    values |= {"ignore_index": config.semantic_loss_ignore_index, "any_range": any_range}
    return decode_dataset(dataset, config.num_channels, config.num_labels, reduce_labels=reduce_labels, **values)


def add_predict(commands) -> None:
    """`segformer predict MODEL INPUT... --out DIR`: label pictures."""
    parser = commands.add_parser(
        "predict",
        help="label pictures: files, folders, patterns, or a data set",
        description="Writes NAME_labels.png for every picture, at the picture's size and with the model's colours. "
        "Run again, it goes on where it stopped. Under torchrun or accelerate launch, processes share the work.",
    )
    parser.add_argument("model", help="a folder, a file of weights or a Hub repository")
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="a file, a folder with all below it, a pattern or @FILE, a list of paths",
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="label the rows of a data set instead: a folder or one of the Hub"
    )
    parser.add_argument("--split", default="train", help="of the data set (default: train)")
    parser.add_argument("--column", default="image", help="of the data set (default: image)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--format", choices=["png", "parquet"], default="png", help="a file a picture, or shards (default: png)"
    )
    parser.add_argument("--overlay", action="store_true", help="also NAME_overlay.png, the classes over the picture")
    parser.add_argument(
        "--legend", choices=["right", "below"], help="of the overlay: which classes, and how much of each"
    )
    parser.add_argument(
        "--probabilities", choices=["uint8", "float16"], help="also NAME_probabilities.npy, those of all classes"
    )
    parser.add_argument("--flip", action="store_true", help="predict the mirrored picture, too, and average")
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="S",
        help="predict at these multiples of the size, and average",
    )
    parser.add_argument("--window", type=int, default=0, metavar="N", help="slide a window of N pixels (rasters: 1024)")
    parser.add_argument("--stride", type=int, default=0, metavar="N", help="its step (default: three quarters of it)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures at once (default: 8)")
    parser.add_argument("--half", action="store_true", help="in 16 bits: faster on a GPU, on few CPUs")
    parser.add_argument("--device", help="of PyTorch (default: a GPU where there is one)")
    parser.set_defaults(run=predict)


def predict(arguments: argparse.Namespace) -> None:
    """Run `segformer predict`."""
    from ..data.sources import DatasetSource, FileSource
    from ..inference.batch import Outputs, predict_batch
    from ..inference.predictor import SegFormerPredictor, find_device, preferred_half_dtype

    if bool(arguments.inputs) == bool(arguments.dataset):
        raise ValueError("give pictures (files, folders, patterns, @FILE), or --dataset NAME: one of the two")
    outputs = Outputs(arguments.format, arguments.overlay, arguments.legend, arguments.probabilities)
    options = _evaluation_options(arguments)
    pictures: FileSource | DatasetSource
    if arguments.dataset:
        pictures = DatasetSource(arguments.dataset, arguments.split, arguments.column)
    else:
        pictures = FileSource(arguments.inputs, arguments.out)
    device = find_device(arguments.device)
    predictor = SegFormerPredictor.from_pretrained(
        arguments.model,
        device=device,
        dtype=preferred_half_dtype(device) if arguments.half else None,
        options=options,
        batch_size=arguments.batch_size,
    )
    report = predict_batch(predictor, pictures, arguments.out, outputs)
    if int(os.environ.get("RANK", "0")):
        return  # the first process speaks for all; were another to fail first, torchrun would end it before it has
    before = f", {report.num_before} of them before" if report.num_before else ""
    noun = "picture" if report.num_pictures == 1 else "pictures"
    print(f"{report.num_pictures} {noun} labelled in {arguments.out}{before}", flush=True)
    if report.failed:
        raise ValueError(report.told())
