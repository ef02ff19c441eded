"""Images with masks that a command line names, checked before and loaded after the heavy imports."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from .options import reading_options

# Defaults of options that mean nothing for folders.
_OF_DATA_SETS = {"split": "validation", "image_column": "image", "mask_column": "label"}


def check_labeled_data(arguments: argparse.Namespace, *, or_recipe: bool = False) -> None:
    """Raise ValueError unless the options name images with masks in one way.

    Args:
        arguments: of `add_labeled_data` and `add_reading_options`.
        or_recipe: True for a command that takes `--recipe`, too.
    """
    folders = [folder is not None for folder in (arguments.images, arguments.masks)]
    if any(folders) != all(folders) or any(folders) == (arguments.dataset is not None):
        raise ValueError(
            "expected images with masks: either --images DIR and --masks DIR, or --dataset NAME"
            + ", or --recipe RECIPE" * or_recipe
        )
    for option, default in _OF_DATA_SETS.items():
        if arguments.dataset is None and getattr(arguments, option) != default:
            raise ValueError(f"--{option.replace('_', '-')} is given; it requires --dataset NAME, which has such names")
    if arguments.pages and arguments.dataset:
        raise ValueError("--pages is given with --dataset, whose rows hold one image each; leave it out")
    values = [*arguments.label_values, *arguments.ignore_values]
    check_mask_kind(values, arguments.mask_colors, arguments.ignore_colors)
    for option in ("images", "masks"):
        if (folder := getattr(arguments, option)) is not None and not folder.is_dir():
            raise ValueError(f"--{option} is {folder}; expected a folder")


def check_mask_kind(values: Sequence[int], mask_colors: Sequence[Any], ignore_colors: Sequence[Any]) -> None:
    """Raise ValueError if options describe masks of values and masks of colours at once."""
    if mask_colors and values:
        raise ValueError("--mask-colors is given with values of masks; expected masks of one kind: --ignore-colors")
    if ignore_colors and not mask_colors:
        raise ValueError("--ignore-colors is given; it requires --mask-colors, the colours of the classes")


def check_pattern(pattern: str | None) -> None:
    """Raise ValueError if `--group` is no regular expression."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"--group is {pattern!r}; expected a regular expression: {error}") from error


def load_labeled_data(source: str, arguments: argparse.Namespace, device: Any) -> tuple[Any, Any, Any]:
    """Load a model, its processor, and the images with masks as the model takes them.

    Args:
        source: a folder, a file of weights or a Hub repository.
        arguments: of `add_labeled_data`, `add_inference_options` and `add_reading_options`, checked.
        device: PyTorch device.
    """
    import torch

    from ..config import SplitConfig
    from ..data.pairing import decode_dataset, open_split, pair_images_and_masks
    from ..data.splits import add_groups
    from ..evaluation.detailed import describe_leakage
    from ..inference.ensemble import load_model_or_ensemble
    from ..inference.segmenter import class_names

    model, processor = load_model_or_ensemble(source)
    if arguments.value_range is not None:
        processor.value_range = arguments.value_range
    reading = reading_options(arguments)
    if arguments.dataset is None:
        suffixes = (arguments.image_suffix, arguments.mask_suffix)
        named = {"image_prefix": arguments.image_prefix, "mask_prefix": arguments.mask_prefix}
        named |= {"pages": reading.pop("pages")} if "pages" in reading else {}
        pairs = pair_images_and_masks(arguments.images, arguments.masks, *suffixes, **named)
        dataset = add_groups(pairs, SplitConfig(), arguments.images, None)
    else:
        columns = (arguments.image_column, arguments.mask_column)
        dataset = open_split(arguments.dataset, arguments.split, *columns)
    if not arguments.as_stored:
        _warn_of_turned_images(dataset)
    if (leakage := describe_leakage(source, dataset)) and not int(os.environ.get("RANK", "0")):
        print(f"segformer: {leakage}", file=sys.stderr)
    rows = decode_dataset(
        dataset,
        model.config.num_channels,
        model.config.num_labels,
        reduce_labels=processor.do_reduce_labels,
        label_values=arguments.label_values,
        ignore=arguments.ignore_values,
        mask_colors=arguments.mask_colors,
        ignore_colors=arguments.ignore_colors,
        ignore_index=model.config.semantic_loss_ignore_index,
        any_range=processor.value_range is not None,
        names=class_names(model.config),
        **reading,
    )
    dtype = getattr(torch, arguments.options.dtype) if arguments.options.dtype else None
    return model.to(device, dtype), processor, rows


def _warn_of_turned_images(dataset: Any) -> None:
    """Print how many images EXIF turns whose masks it does not: turned by 180 degrees they still have one size."""
    from ..data.decoding import file_name
    from ..data.readers import is_turned_alone

    turned = [row["image"] for row in dataset if is_turned_alone(row["image"], row["label"])]
    if turned and not int(os.environ.get("RANK", "0")):
        example = file_name(turned[0])
        print(
            f"segformer: EXIF turns {len(turned)} of {len(dataset)} images but not their masks"
            f"{f', such as {example}' if example else ''}: if masks are drawn on images as stored, add --as-stored",
            file=sys.stderr,
        )


__all__ = ["check_labeled_data", "check_mask_kind", "check_pattern", "load_labeled_data"]
