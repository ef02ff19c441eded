"""`segformer evaluate MODEL`: metrics of a model on images with masks."""

import argparse
import sys
from pathlib import Path

from ..config import parse_value_range
from ..conversion.ensembles import member_folders
from ..files import check_writable
from ..training.recipe import read_recipe
from .labeled import check_labeled_data, check_pattern, load_labeled_data
from .options import (
    add_device,
    add_inference_options,
    add_labeled_data,
    add_model,
    add_output_dir,
    add_reading_options,
    inference_options,
)

# Options that a recipe sets itself, and the key of the recipe that takes their place.
_IN_RECIPE = {
    "images": "data.root",
    "masks": "data.root",
    "image_suffix": "data.image_suffix",
    "mask_suffix": "data.mask_suffix",
    "image_prefix": "data.image_prefix",
    "mask_prefix": "data.mask_prefix",
    "dataset": "data.root",
    "split": "data.eval_split",
    "image_column": "data.image_column",
    "mask_column": "data.mask_column",
    "label_values": "data.label_values",
    "ignore_values": "data.ignore_values",
    "mask_colors": "data.mask_colors",
    "ignore_colors": "data.ignore_colors",
    "title": "data.title",
    "value_range": "data.value_range",
    "pages": "data.pages",
    "as_stored": "data.ignore_exif",
    "bands": "data.bands",
    **{name: f"evaluation.{name}" for name in ("flip", "scales", "sliding_window", "stride", "batch_size", "dtype")},
}


def add_evaluate(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="evaluate a model on images with masks",
        description="Prints IoU and accuracy by class; with --output-dir also writes metrics.json, which the model "
        "card and `segformer push` read, and report.html with all figures, their confidence intervals and the worst "
        "images. Under torchrun, processes share the work.",
    )
    add_model(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="table.key=value", help="set a value of the recipe, such as data.root=DIR"
    )
    add_labeled_data(parser, or_recipe=True)
    add_inference_options(parser)
    add_reading_options(parser)
    parser.add_argument(
        "--group",
        metavar="REGEX",
        help="draw groups of images for confidence intervals instead of images or volumes; the first bracket of the "
        "pattern, or its match, in the name of an image is its group, such as '^(patient[0-9]+)_'",
    )
    parser.add_argument(
        "--save-threshold",
        action="store_true",
        help="of a binary model: find the threshold of the highest Dice on these images, evaluate with it, and save it "
        "in the model's preprocessor_config.json (of an ensemble, in each member's), from which prediction and export "
        "take it",
    )
    add_output_dir(parser, "write the results to this folder (with --recipe by default the model's)")
    parser.add_argument("--title", help="name of the data in metrics.json and the card (default: the folder's name)")
    add_device(parser)
    parser.set_defaults(check=check, run=run, defaults={name: parser.get_default(name) for name in _IN_RECIPE})


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError if options do not go together, or OSError if the output folder is not writable."""
    for member in member_folders(arguments.model) if arguments.save_threshold else ():
        if not (member / "preprocessor_config.json").is_file():
            raise ValueError(
                f"--save-threshold is given for {member}; expected the folder of a model with its "
                "preprocessor_config.json, which holds the threshold"
            )
    check_pattern(arguments.group)
    if arguments.recipe:
        for name, key in _IN_RECIPE.items():
            if getattr(arguments, name) != arguments.defaults[name]:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} is given with --recipe, which already sets it; set {key}=VALUE instead")
        arguments.values = read_recipe(arguments.recipe, arguments.overrides)
        if arguments.output_dir is None:
            is_folder = Path(arguments.model).is_dir()
            arguments.output_dir = Path(arguments.model) if is_folder else Path("outputs/evaluation")
    elif arguments.overrides:
        raise ValueError(f"{arguments.overrides[0]} is given; expected together with --recipe, whose values it sets")
    else:
        check_labeled_data(arguments, or_recipe=True)
        if arguments.output_dir is None:
            for option in ("title", "group"):
                if getattr(arguments, option) is not None:
                    raise ValueError(f"--{option} is given; it requires --output-dir DIR, the folder of the report")
        arguments.options = inference_options(arguments)
        arguments.value_range = parse_value_range(arguments.value_range, "--value-range")
    if arguments.output_dir is not None:
        check_writable(arguments.output_dir, "--output-dir")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the table, and write metrics.json and the report."""
    from ..evaluation.detailed import evaluate_in_detail
    from ..evaluation.evaluate import evaluate
    from ..evaluation.threshold import evaluate_at_best_threshold, save_threshold
    from ..inference.distributed import DistributedContext
    from ..inference.predictor import find_device

    device = find_device(arguments.device)
    if arguments.recipe:
        from ..training.evaluation import evaluate_recipe

        options = {"group_pattern": arguments.group, "save_threshold": arguments.save_threshold}
        evaluate_recipe(arguments.model, arguments.values, arguments.output_dir, device, **options)
        return
    model, processor, dataset = load_labeled_data(arguments.model, arguments, device)
    if arguments.save_threshold:
        result, accumulator = evaluate_at_best_threshold(model, processor, dataset, arguments.options)
    elif arguments.output_dir is None:
        result, accumulator = evaluate(model, processor, dataset, arguments.options), None
    else:  # the figures of a report take the probabilities, which a table does not
        result, accumulator = evaluate_in_detail(model, processor, dataset, arguments.options)
    if not DistributedContext().is_main:  # every process has the whole result
        return
    print(result.format_table())
    if result.misses_its_class() and not arguments.label_values:  # masks of 0 and 255 are the most common reason
        print(
            f"segformer: no mask has a pixel of {result.names[1]!r}; if 255 stands for it, add --label-values 0 255",
            file=sys.stderr,
        )
    if arguments.save_threshold:
        print(save_threshold(arguments.model, processor.binary_threshold))
    if arguments.output_dir is not None:
        _write(result, accumulator, model, processor, dataset, arguments)


def _write(result, accumulator, model, processor, dataset, arguments: argparse.Namespace) -> None:
    from ..evaluation.detailed import build_report
    from ..inference.predictor import SegFormerPredictor

    predictor, folder = SegFormerPredictor(model, processor, arguments.options), arguments.output_dir
    data = arguments.dataset or arguments.images
    report = build_report(
        result,
        accumulator,
        predictor.segmenter,
        dataset,
        predictor.palette,
        title=arguments.title or Path(data).resolve().name,
        split=arguments.split if arguments.dataset else "",
        details={"Model": arguments.model, "Data": str(data)},
        group_pattern=arguments.group,
        source=arguments.model,
    )
    print(f"written to {folder}: {', '.join(path.name for path in report.write(folder))}")


__all__ = ["add_evaluate"]
