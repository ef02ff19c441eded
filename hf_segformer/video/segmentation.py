"""Segmentation of a video: frame by frame, in batches, into several files at once.

Axes: K classes, H W sides of a frame.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..inference.pipeline import Prepared, ReadAhead, segment_batch
from ..inference.predictor import SegFormerPredictor
from ..inference.writers import count_pixels
from ..progress import Progress
from .encoders import Timing
from .reader import Frame, Sound, VideoFile
from .smoothing import Smoother

_MOST_SOUND = 1 << 26  # bytes of sound before the first frame


class SegmentedFrame(NamedTuple):
    """A frame with its classes.

    Attributes:
        number: from 1.
        pts: time of display, in units of the video's time base.
        duration: in the same units.
        seconds: time of display.
        image: the frame, a Pillow image or an array (C, H, W).
        segmentation: its classes (H, W).
        counts: number of pixels of each class.
    """

    number: int
    pts: int
    duration: int
    seconds: float
    image: Any
    segmentation: np.ndarray
    counts: list[int]


class FrameOutput(Protocol):
    """A destination of frames."""

    def start(self, size: tuple[int, int], timing: Timing, sounds: Sequence[Any]) -> None:
        """Begin, when the size (H, W) of the frames is known."""

    def add(self, frame: SegmentedFrame) -> None:
        """Take the next frame."""

    def add_sound(self, packet: Any) -> None:
        """Take the next packet of sound."""


@dataclass
class VideoSummary:
    """Size, frames and times of a video that has been read.

    Attributes:
        height: of its upright frames.
        width: of its upright frames.
        frames: number of frames.
        seconds: from the first frame to the end of the last one.
        frame_rate: mean number of frames a second; None for a single frame.
        variable_frame_rate: True if frames are at unequal distances.
        dropped: see `reader.Counts`.
        damaged: see `reader.Counts`.
        retimed: see `reader.Counts`.
    """

    height: int
    width: int
    frames: int
    seconds: float
    frame_rate: float | None
    variable_frame_rate: bool
    dropped: int
    damaged: int
    retimed: int

    def to_json(self) -> dict[str, Any]:
        """The fields other than the size."""
        return {name: value for name, value in asdict(self).items() if name not in ("height", "width")}


def segment_video(
    predictor: SegFormerPredictor,
    video: VideoFile,
    output: FrameOutput,
    *,
    smoothing: float | None = None,
    progress: bool = True,
) -> VideoSummary:
    """Segment the frames of a video in order; memory holds those of two batches.

    Args:
        predictor: of the frames.
        video: the open video, which is read once.
        output: takes frames and sound.
        smoothing: see `Smoother`; None for none. It holds probabilities of two frames: 8 K bytes a pixel.
        progress: show progress in frames.

    Returns:
        Its size, frames and times.

    Raises:
        ValueError: if there is no frame, or frames do not fit the model or into memory.
        OSError: if the video is damaged, or an output cannot be written.
    """
    first, events, early = _first_frame(video)
    clock = _Clock(video)
    height, width = _size(first.image)
    rate = video.rate or Fraction(25)
    output.start((height, width), Timing(video.time_base, rate, video.pixel_aspect), video.sounds)
    for sound in early:
        output.add_sound(sound.packet)
    with Progress(f"predict {video.name}", video.num_frames or None, "frames", is_shown=progress) as bar:
        for frame in _segmented(predictor, video, _chain(first, events), output, smoothing):
            output.add(frame)
            clock.add(frame)
            bar.update()
    return clock.summary(height, width)


def _first_frame(video: VideoFile) -> tuple[Frame, Iterator[Frame | Sound], list[Sound]]:
    """Read up to the first frame; return it, what follows, and the packets of sound before it."""
    early: list[Sound] = []
    events, num_bytes = video.events(), 0
    for event in events:
        if isinstance(event, Frame):
            return event, events, early
        early.append(event)
        num_bytes += event.packet.size
        if num_bytes > _MOST_SOUND:
            break
    raise ValueError(f"{video.name} holds no frame within its first {num_bytes} bytes of sound; expected one")


def _chain(first: Frame, events: Iterator[Frame | Sound]) -> Iterator[Frame | Sound]:
    yield first
    yield from events


def _segmented(
    predictor: SegFormerPredictor,
    video: VideoFile,
    events: Iterator[Frame | Sound],
    output: FrameOutput,
    smoothing: float | None,
) -> Generator[SegmentedFrame, None, None]:
    """Yield the frames with their classes, prepared ahead in threads; sound goes to the output at once."""
    waiting: deque[tuple[int, Frame]] = deque()

    def tasks() -> Iterator[Callable[[], Prepared]]:
        number = 0
        for event in events:
            if isinstance(event, Sound):
                output.add_sound(event.packet)
                continue
            number += 1
            waiting.append((number, event))
            yield partial(predictor.prepare, event.image, f"{video.name}, frame {number}", keep_image=False)

    results = ReadAhead(tasks(), _segmenter_of(predictor, smoothing), predictor.segmenter.batch_size)
    try:
        for segmentation in results:
            number, frame = waiting.popleft()
            counts = count_pixels(segmentation, len(predictor.names))
            seconds = float(frame.pts * video.time_base)
            yield SegmentedFrame(number, frame.pts, frame.duration, seconds, frame.image, segmentation, counts)
    finally:
        results.close()


def _segmenter_of(
    predictor: SegFormerPredictor, smoothing: float | None
) -> Callable[[list[Prepared]], list[np.ndarray]]:
    """Return a function from a batch of frames, in order, to their classes (H, W)."""
    if smoothing is None:
        return lambda batch: [each.segmentation for each in predictor.predict(batch)]
    smoother, dtype = Smoother(smoothing), np.min_scalar_type(len(predictor.names))
    is_binary = predictor.model.config.num_labels == 1

    def segment(batch: list[Prepared]) -> list[np.ndarray]:
        found = []
        for _, probabilities in segment_batch(predictor.segmenter, batch, with_probabilities=True):
            smooth = smoother(probabilities)
            classes = smooth[1] > predictor.processor.binary_threshold if is_binary else smooth.argmax(0)
            found.append(classes.cpu().numpy().astype(dtype))
        return found

    return segment


class _Clock:
    """Times of the frames of a video."""

    def __init__(self, video: VideoFile):
        self._video = video
        self._number, self._first = 0, 0
        self._last = self._end = 0
        self._steps: tuple[int, int] | None = None  # the least and the largest

    def add(self, frame: SegmentedFrame) -> None:
        """Take the next frame."""
        if not self._number:
            self._first = frame.pts
        else:
            step = frame.pts - self._last
            low, high = self._steps or (step, step)
            self._steps = min(low, step), max(high, step)
        self._number += 1
        self._last, self._end = frame.pts, frame.pts + frame.duration

    def summary(self, height: int, width: int) -> VideoSummary:
        """Sum up; containers round times to a tick, so that steps which differ by one are equal."""
        video, counts, low_high = self._video, self._video.counts, self._steps
        first, number = self._first, self._number
        spanned = (self._last - first) * video.time_base
        return VideoSummary(
            height,
            width,
            number,
            round(float((self._end - first) * video.time_base), 6),
            round(float((number - 1) / spanned), 3) if spanned else None,
            low_high is not None and low_high[1] - low_high[0] > 1,
            counts.dropped,
            counts.damaged,
            counts.retimed,
        )


def _size(image: Any) -> tuple[int, int]:
    return (image.height, image.width) if isinstance(image, Image.Image) else image.shape[-2:]


__all__ = ["FrameOutput", "SegmentedFrame", "VideoSummary", "segment_video"]
