"""Options of `segformer predict` for videos, streams and cameras."""

import argparse
import os
from typing import Any

from ..config import InferenceOptions

_OPTIONS = ("frame_masks", "smoothing", "overlay_as", "plot_shares")


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("videos", "which become NAME_overlay.mp4 and NAME_shares.csv")
    group.add_argument(
        "--frame-masks",
        choices=["video", "parquet"],
        help="also write the masks of the frames: NAME_mask.mkv, lossless, or NAME_masks.parquet",
    )
    group.add_argument(
        "--smoothing",
        type=float,
        metavar="ALPHA",
        help="average the probabilities over time, exponentially: ALPHA, above 0 and below 1, is the weight of the "
        "newest frame (default: no smoothing)",
    )
    group.add_argument(
        "--overlay-as", choices=["mp4", "mkv", "mov"], help="container of the overlay, H.264 in each (default: mp4)"
    )
    group.add_argument("--plot-shares", action="store_true", help="also write NAME_shares.png")
    group.add_argument(
        "--stream",
        metavar="ADDRESS",
        help="predict a stream or a camera instead of files: rtsp://..., https://..., v4l2:/dev/video0",
    )
    group.add_argument("--seconds", type=float, metavar="S", help="end of the stream, in seconds after its first frame")


def check_video_options(arguments: argparse.Namespace) -> None:
    """Raise ValueError if options do not go together."""
    smoothing, seconds = arguments.smoothing, arguments.seconds
    if smoothing is not None and not 0 < smoothing < 1:
        raise ValueError(f"--smoothing is {smoothing}; expected a number above 0 and below 1")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ValueError(f"--seconds is {seconds}; expected a number above 0")
    if (arguments.stream is None) != (seconds is None):
        given, missing = ("--stream", "--seconds S") if seconds is None else ("--seconds", "--stream ADDRESS")
        raise ValueError(f"{given} is given without {missing}; expected both")
    if arguments.stream is None:
        return
    if arguments.inputs or arguments.dataset:
        raise ValueError("--stream is given with other images; expected the stream alone")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--stream is one video, which one process predicts; start a single one")
    _check_for_videos(arguments, "--stream")
    _check_tiles(arguments, "--stream")


def stream_source(arguments: argparse.Namespace, reading: dict[str, Any]) -> Any:
    """Return the source of `--stream`, or None where it is not given."""
    if arguments.stream is None:
        return None
    from ..video.streams import StreamSource

    return StreamSource(arguments.stream, arguments.seconds, **reading)


def choose_video_format(arguments: argparse.Namespace, source: Any) -> None:
    """Set the format to `video` where an input is one.

    Raises:
        ValueError: if options are given that videos do not have, or that only videos have.
    """
    given = [f"--{name.replace('_', '-')}" for name in _OPTIONS if getattr(arguments, name)]
    items = () if arguments.dataset else source.items()
    found = next((source.describe(item) for item in items if arguments.stream or _is_video(item)), None)
    if found is None:
        if given:
            raise ValueError(f"{given[0]} is given without a video among the inputs; leave it out")
        return
    _check_for_videos(arguments, found)
    if not arguments.stream and all(map(_is_video, items)):
        _check_tiles(arguments, found)
    arguments.format = "video"


def _check_for_videos(arguments: argparse.Namespace, found: str) -> None:
    """Raise ValueError for the options that a video cannot have."""
    refused = {
        "engine": ("ray",),
        "format": ("parquet",),
        "pages": (True,),
        "legend": ("right", "below"),
        "probabilities": ("uint8", "float16"),
        "window": (True,),
        "axis": tuple(range(1, 4)),
    }
    remedies = {
        "format": "use --frame-masks parquet for the masks of its frames",
        "pages": "its frames are predicted as one video: leave it out",
        "window": "a video states no window: leave --value-range out, or give its numbers",
    }
    names = {"window": "value-range window"}
    for name in ("confidence", "polygons", "aoi", "mosaic"):
        if getattr(arguments, name):
            raise ValueError(f"--{name} is given with {found}, a video; leave it out")
    for name, values in refused.items():
        value = getattr(arguments, name, None)
        if value in values:
            option = "--" + names.get(name, name) + ("" if isinstance(value, bool | int) else f" {value}")
            raise ValueError(f"{option} is given with {found}, a video; {remedies.get(name, 'leave it out')}")


def _check_tiles(arguments: argparse.Namespace, found: str) -> None:
    """Raise ValueError for the options of tiles, which images beside videos may have."""
    defaults = InferenceOptions()
    for name in ("tile_size", "tile_overlap"):
        if getattr(arguments, name) != getattr(defaults, name):
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} is given with {found}, a video, whose frames are not cut into tiles; leave it out"
            )


def _is_video(item: Any) -> bool:
    """Return True for a video; files that are named as images are not opened."""
    from ..data.readers import kind_of, suffixes_of
    from ..files import IMAGE_SUFFIXES

    if not isinstance(item.source, str) or item.source.lower().endswith(IMAGE_SUFFIXES):
        return False
    return item.source.lower().endswith(suffixes_of("video")) or kind_of(item.source) == "video"


def video_outputs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return `Outputs.options` of the format of videos; empty for other formats."""
    if arguments.format != "video":
        return {}
    return {
        "container": arguments.overlay_as or "mp4",
        "frame_masks": arguments.frame_masks,
        "smoothing": arguments.smoothing,
        "plot_shares": arguments.plot_shares,
    }


def print_videos(arguments: argparse.Namespace) -> None:
    """Print frames and frame rate of each video."""
    if arguments.format == "video":
        from ..video.writer import describe_videos

        for line in describe_videos(arguments.output_dir):
            print(line, flush=True)


__all__ = [
    "add_video_options",
    "check_video_options",
    "choose_video_format",
    "print_videos",
    "stream_source",
    "video_outputs",
]
