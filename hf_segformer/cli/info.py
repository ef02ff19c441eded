"""`segformer info SOURCE`: the cost of a model, stage by stage."""

import argparse

from .options import image_size, whole_number


def add_info(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "info",
        help="show grids, tokens, parameters and multiply-adds of a model",
        description="Shows the grid, parameters and multiply-adds of each stage, without running the model.",
    )
    parser.add_argument("source", help="b0 to b5, a config.json, a checkpoint, or a Hub repository (owner/name)")
    parser.add_argument(
        "--size", type=image_size, default="512x512", metavar="HxW", help="image size in pixels (default: 512x512)"
    )
    parser.add_argument("--num-labels", type=whole_number(1), metavar="K", help="replace the number of labels")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the table."""
    from ..benchmarking.cost import format_info, load_config
    from ..conversion.ensembles import is_ensemble, member_folders

    source = arguments.source
    if is_ensemble(source):
        members = member_folders(source)
        print(f"an ensemble of {len(members)} models, which take {len(members)} times what {members[0]} takes:\n")
        source = str(members[0])
    print(format_info(load_config(source, arguments.num_labels), *arguments.size))


__all__ = ["add_info"]
