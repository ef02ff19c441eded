"""`segformer chips SCENE LABELS -o DIR`: training chips of a scene."""

import argparse
import importlib.util
from pathlib import Path

from ..files import check_new_or_empty, printable
from .options import add_output_dir, whole_number


def add_chips(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "chips",
        help="cut a scene with labels into georeferenced training chips",
        description="Writes images/train, masks/train, images/val, masks/val, classes.json and chips.json, which a "
        "recipe reads as data.source=folders data.root=DIR. Blocks of the scene belong to one split each.",
    )
    parser.add_argument("scene", type=Path, metavar="SCENE", help="a raster with a coordinate reference system")
    parser.add_argument("labels", type=Path, metavar="LABELS", help="a raster on the same grid, or a vector file")
    add_output_dir(parser, "a new or empty folder for the chips", required=True)
    parser.add_argument("--size", type=whole_number(32), default=512, metavar="N", help="side of a chip (default: 512)")
    parser.add_argument(
        "--stride", type=whole_number(1), metavar="N", help="pixels between chips (default: the size, no overlap)"
    )
    parser.add_argument(
        "--block", type=whole_number(1), default=4, metavar="N", help="chips along a side of a block (default: 4)"
    )
    for name, default, help in (
        ("val_share", 0.2, "share of the blocks for validation"),
        ("max_no_data", 0.2, "largest share of a chip without data or label"),
        ("max_background", 1.0, "largest share of chips with nothing but the first class"),
    ):
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=float, default=default, metavar="S", help=f"{help} (default: {default:g})")
    parser.add_argument("--attribute", metavar="NAME", help="of the vector file, whose values are the classes")
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="names of the classes in order")
    parser.add_argument(
        "--ignore-outside", action="store_true", help="ignore pixels outside all polygons; they are not background"
    )
    parser.add_argument("--bands", type=whole_number(1), nargs="+", metavar="N", help="bands to keep, numbered from 1")
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="of the split (default: 0)")
    parser.set_defaults(check=check, run=run)


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError if options are wrong, or packages are missing."""
    for name, least, most in (("val_share", 1e-9, 1 - 1e-9), ("max_no_data", 0, 1), ("max_background", 0, 1)):
        value = getattr(arguments, name)
        if not least <= value <= most:
            option, ends = "--" + name.replace("_", "-"), "" if name != "val_share" else ", without these"
            raise ValueError(f"{option} is {value}; expected a share from 0 to 1{ends}")
    if arguments.ignore_outside and arguments.max_background < 1:
        raise ValueError("--max-background is given with --ignore-outside, which leaves no background; leave one out")
    check_new_or_empty(arguments.output_dir)
    missing = [name for name in ("rasterio", "shapely", "pyproj") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"chips need {' and '.join(missing)}: pip install 'hf-segformer[geo]'")


def run(arguments: argparse.Namespace) -> None:
    """Cut the chips, and print how many there are and what they hold."""
    from ..geo.chips import SPLITS, ChipOptions, cut_chips

    options = ChipOptions(
        size=arguments.size,
        stride=arguments.stride or 0,
        block=arguments.block,
        val_share=arguments.val_share,
        max_no_data=arguments.max_no_data,
        max_background=arguments.max_background,
        attribute=arguments.attribute,
        classes=tuple(arguments.classes),
        ignore_outside=arguments.ignore_outside,
        bands=tuple(arguments.bands) if arguments.bands else None,
        seed=arguments.seed,
    )
    report = cut_chips(arguments.scene, arguments.labels, arguments.output_dir, options)
    for split in SPLITS:
        print(f"{split}: {report[split]['chips']} chips, {report[split]['background_chips']} of background alone")
    for train, validation in zip(report["train"]["classes"], report["val"]["classes"], strict=True):
        shares = f"{train['share']:.2%} of train, {validation['share']:.2%} of val"
        print(f"  {printable(train['name'])}: {shares}".replace("%", " %"))
    for reason, number in report["left_out"].items():
        if number:
            print(f"left out: {number} ({reason})")
    print(f"chips in {arguments.output_dir}; train on them with: segformer train {arguments.output_dir}", flush=True)


__all__ = ["add_chips"]
