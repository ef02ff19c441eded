"""`segformer app MODEL`: a web page to try a model on."""

import argparse

from .options import add_device, add_model, whole_number


def add_app(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "app",
        help="serve a web page to try a model on",
        description="Serves a page on this machine: drop an image, see its classes, download the segmentation map. "
        "Nothing leaves the machine. Ctrl-C ends it.",
    )
    add_model(parser)
    parser.add_argument(
        "--port", type=whole_number(1, 65535), metavar="N", help="default: the first free one from 7860 on"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="0.0.0.0 serves the whole network (default: this machine)"
    )
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    from ..app.server import serve

    serve(arguments.model, host=arguments.host, port=arguments.port, device=arguments.device)


__all__ = ["add_app"]
