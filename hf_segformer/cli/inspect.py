"""`segformer inspect MODEL IMAGE`: attention, features and uncertainty of a model on one image."""

import argparse
from pathlib import Path

from .options import add_device, add_model, add_output_dir, whole_number


def add_inspect(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "inspect",
        help="show attention, features and uncertainty of a model on one image",
        description="Writes NAME_inspection.png: prediction, second most probable class and uncertainty, the attention "
        "of one pixel in each stage, and the first three principal components of each stage's features.",
    )
    add_model(parser)
    parser.add_argument("image", metavar="IMAGE", help="an image file")
    parser.add_argument(
        "--point",
        type=whole_number(0),
        nargs=2,
        metavar=("COLUMN", "ROW"),
        help="pixel whose attention is shown (default: the middle of the image)",
    )
    add_output_dir(parser, "folder of the result (default: the current one)")
    add_device(parser)
    parser.set_defaults(check=check, run=run)


def check(arguments: argparse.Namespace) -> None:
    """Raise OSError if there is no such image, and ValueError for a video."""
    from ..data.readers import note_on_videos

    if not Path(arguments.image).is_file():
        raise OSError(f"there is no image {arguments.image}")
    if note := note_on_videos([arguments.image]):
        raise ValueError(note.removeprefix("; "))


def run(arguments: argparse.Namespace) -> None:
    """Inspect the image and write the result."""
    from ..conversion.loading import load_segmentation
    from ..evaluation.inspection import draw_inspection, inspect_image
    from ..files import atomic_write, printable
    from ..inference.predictor import SegFormerPredictor, find_device

    model, processor = load_segmentation(arguments.model)
    predictor = SegFormerPredictor(model.to(find_device(arguments.device)), processor)
    inspection = inspect_image(model, processor, arguments.image, arguments.point)
    folder = arguments.output_dir or Path()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(arguments.image).stem}_inspection.png"
    with atomic_write(path) as partial:
        draw_inspection(inspection, predictor.names, predictor.palette).save(partial, "PNG")
    row, column = inspection.point
    name = predictor.names[inspection.prediction[row, column]]
    uncertainty = inspection.uncertainty[row, column]
    print(f"pixel at column {column}, row {row}: {printable(name)}, uncertainty {uncertainty:.2f} of 1")
    print(f"written to {path}")


__all__ = ["add_inspect"]
