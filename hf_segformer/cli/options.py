"""Options that several commands share, and the checks of their values; nothing here imports PyTorch."""

import argparse
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..cluster.options import is_address, shown_address
from ..config import DTYPES, InferenceOptions


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return an argument type: a whole number in a range."""
    expected = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"

    def parse(text: str) -> int:
        number = int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None
        if number is None or number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"got {text!r}; expected {expected}")
        return number

    return parse


def image_size(text: str) -> tuple[int, int]:
    """Argument type: `"480x640"` to height and width in pixels."""
    sides = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})", text)
    if sides is None or "0" in (sides[1].strip("0") or "0", sides[2].strip("0") or "0"):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected HEIGHTxWIDTH in pixels, such as 512x512")
    return int(sides[1]), int(sides[2])


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the argument `model`."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a file of weights, or a Hub repository (owner/name)")


def add_device(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add `--device`."""
    shown = default or "the accelerator if there is one, else cpu"
    parser.add_argument("--device", default=default, metavar="D", help=f"PyTorch device (default: {shown})")


def add_output_dir(parser: argparse.ArgumentParser, help: str, required: bool = False) -> None:
    """Add `--output-dir` / `-o`."""
    parser.add_argument("-o", "--output-dir", type=_folder, required=required, metavar="DIR", help=help)


def _folder(text: str) -> Path:
    if is_address(text):
        raise argparse.ArgumentTypeError(f"{shown_address(text)} is an address; expected a folder of this machine")
    return Path(text)


def color(text: str) -> list[int]:
    """Parse red, green and blue, 0 to 255, with commas between them."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) <= 255 for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected red,green,blue from 0 to 255, such as 128,64,128")
    return [int(part) for part in parts]


def add_label_values(parser: Any) -> None:
    """Add `--label-values` to a parser or a group."""
    parser.add_argument(
        "--label-values",
        type=whole_number(-(2**31), 2**31 - 1),
        nargs="+",
        default=[],
        metavar="N",
        help="mask value of each class, in order, such as 0 255 (default: 0 1 2 ...)",
    )


def add_labeled_data(parser: argparse.ArgumentParser, or_recipe: bool = False) -> None:
    """Add the options that name images with masks: two folders, or a data set, on request also a recipe."""
    kinds = "two folders, a data set, or the data of a recipe" if or_recipe else "two folders or a data set"
    group = parser.add_argument_group("images with masks", kinds)
    group.add_argument("--images", type=Path, metavar="DIR", help="folder of images")
    group.add_argument("--masks", type=Path, metavar="DIR", help="folder of masks with the same names")
    group.add_argument("--image-suffix", default="", metavar="END", help="end of image names, such as _rgb.tif")
    group.add_argument("--mask-suffix", default="", metavar="END", help="end of mask names, such as _mask")
    group.add_argument("--image-prefix", default="", metavar="START", help="beginning of image names, such as img_")
    group.add_argument("--mask-prefix", default="", metavar="START", help="beginning of mask names, such as mask_")
    if or_recipe:
        group.add_argument(
            "--recipe", metavar="RECIPE", help="evaluate as this recipe of `segformer train` does: name or TOML file"
        )
    add_dataset(group, "a folder that datasets can read, or a Hub repository", split="validation")
    group.add_argument("--mask-column", default="label", metavar="NAME", help="of the data set (default: label)")
    add_label_values(group)
    group.add_argument(
        "--ignore-values",
        type=whole_number(-(2**31), 2**31 - 1),
        nargs="+",
        default=[],
        metavar="N",
        help="mask values to leave out of the score, besides the model's ignore index",
    )
    add_mask_colors(group)


def add_mask_colors(group: Any) -> None:
    """Add `--mask-colors` and `--ignore-colors`."""
    for name, text in (
        ("--mask-colors", "colour of each class in masks that hold colours, in order, such as 0,0,0 128,64,128"),
        ("--ignore-colors", "colours of the masks to leave out of the score"),
    ):
        group.add_argument(name, type=color, nargs="+", default=[], metavar="R,G,B", help=text)


def add_dataset(group: Any, help: str, split: str) -> None:
    """Add `--dataset`, `--split` and `--image-column`."""
    group.add_argument("--dataset", metavar="NAME", help=help)
    group.add_argument("--split", default=split, metavar="NAME", help=f"of the data set (default: {split})")
    group.add_argument("--image-column", default="image", metavar="NAME", help="of the data set (default: image)")


def add_inference_options(parser: argparse.ArgumentParser, tiles: bool = False) -> None:
    """Add the options of `InferenceOptions`, those of tiles only on request."""
    group, default = parser.add_argument_group("inference"), InferenceOptions()
    group.add_argument("--flip", action="store_true", help="average with the prediction of the mirrored image")
    group.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=default.scales,
        metavar="S",
        help="average over these multiples of the size",
    )
    for name, help in (
        ("sliding_window", "side of a window that slides over each image, as in the paper (default: whole images)"),
        ("stride", "step of the sliding window (default: three quarters of it)"),
        ("tile_size", f"side of the tiles of large images (default: {default.tile_size})"),
        ("tile_overlap", f"least overlap of tiles (default: {default.tile_overlap})"),
        ("batch_size", f"most images or tiles at once (default: {default.batch_size})"),
    ):
        if name.startswith("tile_") and not tiles:
            continue
        option = "--" + name.replace("_", "-")
        group.add_argument(option, type=whole_number(0), default=getattr(default, name), metavar="N", help=help)
    group.add_argument("--dtype", choices=DTYPES, help="dtype of the network (default: float32)")


def inference_options(arguments: argparse.Namespace) -> InferenceOptions:
    """Return the checked inference options of a command line.

    Raises:
        ValueError: if a value is out of range or does not go with another; the message names the options.
    """
    known = {each.name for each in fields(InferenceOptions)}
    try:
        return InferenceOptions(**{name: value for name, value in vars(arguments).items() if name in known})
    except ValueError as error:
        raise ValueError(as_options(str(error))) from error


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how images are read."""
    group = parser.add_argument_group("reading images")
    group.add_argument(
        "--value-range",
        default="",
        metavar="RANGE",
        help="values that become black and white, as in recipes: LOW,HIGH, percentiles:LOW,HIGH (of each image), or "
        "window:CENTER,WIDTH; for 16-bit and medical images (default: the image processor's). A negative LOW needs "
        "the form --value-range=-1000,400",
    )
    group.add_argument(
        "--pages", action="store_true", help="take every image of a multi-page file, as NAME_p001, NAME_p002, ..."
    )
    group.add_argument("--as-stored", action="store_true", help="do not rotate images by their EXIF orientation")
    group.add_argument(
        "--bands",
        type=whole_number(1),
        nargs="+",
        metavar="N",
        help="bands that the model takes, numbered from 1, in its order",
    )


def reading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords of the readers for the options that are given."""
    options = {"pages": arguments.pages, "ignore_exif": arguments.as_stored}
    given: dict[str, Any] = {name: True for name, is_given in options.items() if is_given}
    return given | {"bands": tuple(arguments.bands)} if arguments.bands else given


def as_options(message: str) -> str:
    """Return an error message with `evaluation.name` spelled as on the command line, `--name`."""
    return re.sub(r"evaluation\.(\w+)", lambda match: "--" + match[1].replace("_", "-"), message)


__all__ = [
    "add_dataset",
    "add_device",
    "add_inference_options",
    "add_label_values",
    "add_labeled_data",
    "add_mask_colors",
    "add_model",
    "add_output_dir",
    "add_reading_options",
    "as_options",
    "color",
    "image_size",
    "inference_options",
    "reading_options",
    "whole_number",
]
