"""`segformer convert SOURCE DESTINATION`: checkpoints of other code bases to and from this package."""

import argparse
from pathlib import Path

from ..files import atomic_directory, check_new_or_empty
from .options import whole_number


def add_convert(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "convert",
        help="convert checkpoints of other code bases to this package, or back to Transformers",
        description="Reads the paper's .pth files, mmsegmentation's encoders, segmentation_models_pytorch, "
        "Transformers' own SegFormer and this package's checkpoints, and writes a folder for from_pretrained.",
    )
    parser.add_argument("source", help="a file, a folder, or a Hub repository (owner/name)")
    parser.add_argument("destination", type=Path, help="a new or an empty folder")
    parser.add_argument(
        "--num-channels",
        type=whole_number(1),
        metavar="N",
        help="number of input channels; the pretrained filters are adapted",
    )
    parser.add_argument("--encoder-only", action="store_true", help="leave the head out")
    parser.add_argument(
        "--to", choices=["transformers"], help="write for Transformers' own SegFormer, without remote code"
    )
    parser.set_defaults(check=check, run=run)


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError if the destination is taken."""
    check_new_or_empty(arguments.destination)


def run(arguments: argparse.Namespace) -> None:
    """Convert, and print what was found."""
    from ..conversion.checkpoints import locate
    from ..conversion.convert import convert_checkpoint
    from ..conversion.loading import image_processor_for
    from ..conversion.to_transformers import to_transformers

    source = locate(arguments.source)
    model = convert_checkpoint(source, num_channels=arguments.num_channels, encoder_only=arguments.encoder_only)
    processor = image_processor_for(source, model.config.num_channels)
    with atomic_directory(arguments.destination) as folder:
        if arguments.to == "transformers":
            difference = to_transformers(model, folder, processor)
        else:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
    config, name = model.config, type(model).__name__
    labels = "no head" if name == "SegFormerModel" else f"{config.num_labels} labels"
    print(
        f"{name}: depths {list(config.depths)}, hidden sizes {list(config.hidden_sizes)}, "
        f"{config.num_channels} channels, {labels}"
    )
    if arguments.to == "transformers":
        print(
            f"loaded in Transformers, its output differs by at most {difference:.1e} of the largest value "
            f"(LayerNorm epsilon there 1e-05, here {config.layer_norm_eps:.0e})"
        )
    print(f"written to {arguments.destination}")


__all__ = ["add_convert"]
