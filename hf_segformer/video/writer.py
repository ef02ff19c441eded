"""The writer of videos: of each video its overlay and class shares, and on request the masks of its frames.

It is the writer of PNG files otherwise, and found by the entry point `hf_segformer.writers` under the name `video`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..data.sources import InputItem
from ..files import atomic_write, resolve_inside
from ..inference.png_writer import RECORD, PngWriter
from ..inference.volumes import black_and_white
from ..inference.writers import WriterArguments
from ..visualization import Stretch, displayable, overlay
from .encoders import CONTAINERS, MaskVideo, OverlayVideo, Timing
from .frame_table import FrameTable
from .reader import VideoFile
from .segmentation import SegmentedFrame, VideoSummary, segment_video
from .shares import SharesCurve, SharesTable, require_plots

logger = logging.get_logger(__name__)

FRAME_MASKS = {"video": "mask.mkv", "parquet": "masks.parquet"}


@dataclass(frozen=True)
class VideoOptions:
    """Options of `Outputs.options` for the kind `video`.

    Args:
        container: of `NAME_overlay`: `mp4`, `mkv` or `mov`.
        frame_masks: also write the masks of the frames: as `video`, `NAME_mask.mkv`, lossless, or as `parquet`,
            `NAME_masks.parquet`.
        smoothing: weight of the newest frame in a moving average of the probabilities; see `smoothing.Smoother`.
        plot_shares: also write `NAME_shares.png`.

    Raises:
        ValueError: if a value is out of range, or matplotlib is missing for a plot.
    """

    container: str = "mp4"
    frame_masks: str | None = None
    smoothing: float | None = None
    plot_shares: bool = False

    def __post_init__(self):
        for name, known in (("container", tuple(CONTAINERS)), ("frame_masks", (None, *FRAME_MASKS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, known))}")
        if self.smoothing is not None and not 0 < self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}; expected a number above 0 and below 1")
        if self.plot_shares:
            require_plots()


class VideoWriter(PngWriter):
    """`NAME_overlay.mp4` and `NAME_shares.csv` of each video, with what `VideoOptions` ask for; see `PngWriter`.

    Args:
        arguments: see `WriterArguments`.
        rank: see `PngWriter`.

    Raises:
        ValueError: if an option is unknown or wrong, or a package is missing.
    """

    takes_videos = True

    def __init__(self, arguments: WriterArguments, rank: int = 0):
        super().__init__(arguments, rank)
        known = {each.name for each in fields(VideoOptions)}
        unknown = sorted(set(self.outputs.options) - known)
        if unknown:
            raise ValueError(f"options have {unknown[0]!r}; expected some of {', '.join(sorted(known))}")
        self.options, self._predictor = VideoOptions(**self.outputs.options), arguments.predictor
        self._shown_range = Stretch.of_processor(arguments.predictor.processor)
        for name in ("legend", "probabilities"):
            if getattr(self.outputs, name):
                raise ValueError(f"--{name} cannot be written for a video: leave it out")

    def write_video(self, item: InputItem, open_video: Callable[[], VideoFile], progress: bool = True) -> None:
        """Write the results of a video; the overlay comes last.

        Args:
            item: the video.
            open_video: opens it.
            progress: show progress in frames.

        Raises:
            ValueError: if it does not fit the model or the container, or holds no frame.
            OSError: if it is damaged, or a file cannot be written.
        """
        path = self._path(item.name, f"overlay.{self.options.container}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as files, open_video() as video:
            output = _Files(self, item.name, path, files)
            with output.closing():
                summary = segment_video(
                    self._predictor, video, output, smoothing=self.options.smoothing, progress=progress
                )
            if self.options.plot_shares:
                output.curve.draw(self._path(item.name, "shares.png"), self.names, self.palette, item.name)
            extras = {"overlay": path.name, **summary.to_json(), "sound_dropped": output.sound_dropped}
            self._note(item, (summary.height, summary.width), output.counts.tolist(), **extras)
        _warn(video.name, summary, output.sound_dropped)

    def draw(self, frame: SegmentedFrame) -> np.ndarray:
        """Return the classes on a frame, uint8 (H, W, 3)."""
        image = displayable(frame.image, self._shown_range)
        return np.asarray(overlay(image, frame.segmentation, self.palette, alpha=0.5, clear=self._clear))

    def path(self, name: str, ending: str) -> Path:
        """Return the path of a file of a video."""
        return resolve_inside(self.out, f"{name}_{ending}")

    def _exists(self, line: Mapping[str, Any]) -> bool:
        """Return True if the results of a line of the record are there; those of a video end with its overlay."""
        if "overlay" not in line:
            return super()._exists(line)
        return resolve_inside(self.out, Path(line["name"]).parent / line["overlay"]).exists()


class _Files:
    """The files of one video; see `segmentation.FrameOutput`.

    Args:
        writer: whose options apply.
        name: of the video.
        path: of the overlay.
        files: within which files are partial.
    """

    def __init__(self, writer: VideoWriter, name: str, path: Path, files: ExitStack):
        self._writer, self._name, self._files = writer, name, files
        self.counts = np.zeros(len(writer.names), np.int64)
        self.curve = SharesCurve(len(writer.names))
        self._open: list[Any] = []
        self._overlay_path = files.enter_context(atomic_write(path))
        self._overlay_path.touch()  # fails before the work where nothing can be written
        self._table = self._opened(SharesTable, self._partial("shares.csv"), writer.names)
        self._masks: Any = None

    def _partial(self, ending: str) -> Path:
        return self._files.enter_context(atomic_write(self._writer.path(self._name, ending)))

    def _opened(self, kind: Callable[..., Any], *arguments: Any) -> Any:
        file = kind(*arguments)
        self._open.append(file)
        return file

    def start(self, size: tuple[int, int], timing: Timing, sounds: Sequence[Any]) -> None:
        """See `segmentation.FrameOutput.start`."""
        writer, wanted = self._writer, self._writer.options.frame_masks
        container = writer.options.container
        self._overlay = self._opened(OverlayVideo, self._overlay_path, container, size, timing, sounds)
        if wanted == "video":
            dtype = np.dtype(np.min_scalar_type(len(writer.names)))
            self._masks = self._opened(MaskVideo, self._partial(FRAME_MASKS[wanted]), size, timing, dtype)
        elif wanted == "parquet":
            names, palette, masks_as = writer.names, writer.palette, writer.outputs.masks_as
            path = self._partial(FRAME_MASKS[wanted])
            self._masks = self._opened(FrameTable, path, self._name, names, palette, masks_as)

    def add(self, frame: SegmentedFrame) -> None:
        """See `segmentation.FrameOutput.add`."""
        shares = np.array(frame.counts) / max(1, sum(frame.counts))
        self.counts += frame.counts
        self._table.add(frame.number, frame.seconds, shares)
        if self._writer.options.plot_shares:
            self.curve.add(frame.seconds, shares)
        self._overlay.write(self._writer.draw(frame), frame.pts, frame.duration)
        if isinstance(self._masks, FrameTable):
            self._masks.add(frame.number, frame.seconds, frame.segmentation, frame.counts)
        elif self._masks is not None:
            is_binary = self._writer.outputs.masks_as == "255"
            mask = black_and_white(frame.segmentation) if is_binary else frame.segmentation
            self._masks.write(mask, frame.pts, frame.duration)

    @property
    def sound_dropped(self) -> int:
        """Number of packets of sound that are left out; see `OverlayVideo`."""
        return self._overlay.sound_dropped

    def add_sound(self, packet: Any) -> None:
        """See `segmentation.FrameOutput.add_sound`."""
        self._overlay.copy(packet)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """End all files after the block, or discard them after an error."""
        try:
            yield
            while self._open:
                self._open.pop().close()
        finally:
            for file in self._open:
                getattr(file, "discard", file.close)()


def _warn(name: str, summary: VideoSummary, sound_dropped: int) -> None:
    """Say which frames and packets of sound are missing or doubtful."""
    problems = [
        f"{number} {text}"
        for number, text in (
            (summary.dropped, "frames could not be decoded and are missing"),
            (summary.damaged, "frames are damaged"),
            (summary.retimed, "frames had no time of their own"),
        )
        if number
    ]
    if problems:
        logger.warning(f"{name}: of {summary.frames + summary.dropped} frames {', '.join(problems)}")
    if sound_dropped:
        logger.warning(f"{name}: {sound_dropped} packets of sound are missing, whose time does not follow")


def describe_videos(out: Path) -> list[str]:
    """Return a line for each video in the record of an output folder.

    Args:
        out: the folder.
    """
    lines = []
    with (out / RECORD).open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            if "overlay" not in line:
                continue
            kind = "variable" if line["variable_frame_rate"] else "constant"
            rate = f", {line['frame_rate']:g} a second ({kind})" if line["frame_rate"] else ""
            lines.append(
                f"{line['name']}: {line['frames']} frames in {line['seconds']:g} s{rate}; {line['dropped']} dropped, "
                f"{line['damaged']} damaged"
            )
    return lines


__all__ = ["FRAME_MASKS", "VideoOptions", "VideoWriter", "describe_videos"]
