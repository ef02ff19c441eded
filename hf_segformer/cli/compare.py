"""`segformer compare A B ...`: several models on the same images, with paired tests."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import parse_value_range
from ..files import check_writable
from .labeled import check_labeled_data, check_pattern, load_labeled_data
from .options import (
    add_device,
    add_inference_options,
    add_labeled_data,
    add_output_dir,
    add_reading_options,
    inference_options,
    whole_number,
)


def add_compare(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compare",
        help="compare models on the same images",
        description="Prints scores of all models side by side, and each one's differences to the first model with "
        "p-values of a paired bootstrap over images; with --output-dir also writes comparison.html, .csv and .json, "
        "per_image.csv and the images that differ most. Under torchrun, processes share the work.",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="folders, files of weights or Hub repositories; the first is the baseline",
    )
    add_labeled_data(parser)
    add_inference_options(parser)
    add_reading_options(parser)
    group = parser.add_argument_group("statistics")
    group.add_argument(
        "--group",
        metavar="REGEX",
        help="draw groups of images instead of images or volumes; the first bracket of the pattern, or its match, in "
        "the name of an image is its group, such as '^(patient[0-9]+)_'",
    )
    group.add_argument(
        "--resamples",
        type=whole_number(100, 10**7),
        metavar="N",
        help="resamples of the bootstrap (default: 10000, or more where there are many classes)",
    )
    add_output_dir(parser, "write tables, the page and sample images to this folder")
    parser.add_argument("--title", help="heading of the page (default: the folder's name)")
    add_device(parser)
    parser.set_defaults(check=check, run=run)


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError if options do not go together, or OSError if the output folder is not writable."""
    if len(arguments.models) < 2:
        raise ValueError(f"there is one model, {arguments.models[0]}; expected at least two to compare")
    arguments.names = model_names(arguments.models)
    check_labeled_data(arguments)
    check_pattern(arguments.group)
    arguments.options = inference_options(arguments)
    arguments.value_range = parse_value_range(arguments.value_range, "--value-range")
    if arguments.output_dir is not None:
        check_writable(arguments.output_dir, "--output-dir")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate every model, print the comparison, and write it."""
    from ..evaluation.comparison import compare
    from ..evaluation.comparison_report import difference_sheet, format_comparison, write_comparison
    from ..evaluation.detailed import evaluate_in_detail, groups_of
    from ..inference.distributed import DistributedContext
    from ..inference.predictor import find_device

    accumulators, class_names = {}, None
    for name, source in zip(arguments.names, arguments.models, strict=True):
        model, processor, dataset = load_labeled_data(source, arguments, find_device(arguments.device))
        _check_volumes(dataset, arguments.group)
        evaluation, accumulators[name] = evaluate_in_detail(model, processor, dataset, arguments.options)
        if class_names is not None and evaluation.names != class_names:
            raise ValueError(
                f"{name} has the classes {', '.join(evaluation.names)}; expected those of {arguments.names[0]}, "
                f"{', '.join(class_names)}"
            )
        class_names = evaluation.names
    if not DistributedContext().is_main:  # every process has the whole result
        return
    groups = groups_of(accumulators[arguments.names[0]], dataset, arguments.group)
    comparison = compare(accumulators, class_names or (), groups=groups, num_resamples=arguments.resamples)
    print(format_comparison(comparison))
    if arguments.output_dir is None:
        return
    load, palette = _sample_loader(arguments, [comparison.indices[place] for place in comparison.most_different()])
    title = arguments.title or Path(arguments.dataset or arguments.images).resolve().name
    sheet = difference_sheet(comparison, load, palette)
    paths = write_comparison(comparison, arguments.output_dir, title, sheet)
    print(f"written to {arguments.output_dir}: {', '.join(path.name for path in paths)}")


def _check_volumes(dataset: Any, pattern: str | None) -> None:
    """Refuse the slices of a single volume, unless a pattern draws them, before they are predicted."""
    from ..data.splits import GROUP_COLUMN

    columns = getattr(dataset, "column_names", None) or ()
    if pattern is None and GROUP_COLUMN in columns and len(set(dataset.with_format(None)[GROUP_COLUMN])) < 2:
        raise ValueError(
            "the images are slices of one volume, which cannot show how models differ on other volumes; expected two "
            "volumes or more, or --group .+ to draw slices as if they were independent"
        )


def model_names(sources: Sequence[str]) -> tuple[str, ...]:
    """Short names of models: the last part of each source where it is the only one, else the whole source.

    Raises:
        ValueError: if a source is given twice.
    """
    wholes = [source.rstrip("/") for source in sources]
    for whole in wholes:
        if wholes.count(whole) > 1:
            raise ValueError(f"the model {whole} is given {wholes.count(whole)} times; expected different models")
    lasts = [Path(whole).name or whole for whole in wholes]
    return tuple(last if lasts.count(last) == 1 else whole for last, whole in zip(lasts, wholes, strict=True))


def _sample_loader(arguments: argparse.Namespace, indices: Sequence[int]) -> tuple[Any, Any]:
    """Predict a few images by every model once more; return a function that gives them, and the palette."""
    from ..evaluation.detailed import sample_loader
    from ..inference.predictor import SegFormerPredictor, find_device
    from ..inference.segmenter import Segmenter

    images: dict[int, tuple[Any, Any]] = {}
    predictions: dict[int, dict[str, Any]] = {index: {} for index in indices}
    palette = None
    for name, source in zip(arguments.names, arguments.models, strict=True):
        model, processor, dataset = load_labeled_data(source, arguments, find_device(arguments.device))
        palette = palette or SegFormerPredictor(model, processor).palette
        load = sample_loader(Segmenter(model, processor, arguments.options), dataset)
        for index in indices:
            image, predictions[index][name], labels = load(index)
            images.setdefault(index, (image, labels))
    return (lambda index: (*images[index], predictions[index])), palette


__all__ = ["add_compare", "model_names"]
