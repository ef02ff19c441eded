"""Reader of videos: frames in order, upright, with their timestamps, between the packets of sound.

A video is read once, from its beginning, and one frame is in memory at a time. Axes: H W sides of a frame.
"""

import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from ..data.reader_protocol import ImageSource, Kind, ReadOptions, Tile, choose_bands
from ..files import is_full
from ..image_io_segformer import DECODE_ERRORS, check_area
from .containers import (
    INSTALL,
    STREAM_SECONDS,
    SUFFIXES,
    is_playlist,
    is_video,
    missing_bytes,
    open_file,
    open_stream,
    public_address,
)

_FIXED = 1 << 16  # one, in the display matrix
_LEAD = 5.0  # seconds by which a stream's sound may come before its frames
_PATIENCE = 4  # times its seconds that a stream may be waited for


class Frame(NamedTuple):
    """A decoded frame.

    Attributes:
        image: as the model takes it: a Pillow image, RGB or grey, or an array (C, H, W) of chosen bands.
        pts: time of display in units of `VideoFile.time_base`; larger than that of the frame before.
        duration: in the same units; 0 if it is not known.
    """

    image: Any
    pts: int
    duration: int


class Sound(NamedTuple):
    """A packet of sound, as it is stored.

    Attributes:
        packet: PyAV's.
    """

    packet: Any


@dataclass
class Counts:
    """Numbers of frames.

    Attributes:
        decoded: frames that were decoded.
        dropped: packets that the decoder refused; their frames are missing.
        damaged: decoded frames that the decoder marks as damaged.
        retimed: frames without a time, or with one that does not follow the one before, which got the next time.
    """

    decoded: int = 0
    dropped: int = 0
    damaged: int = 0
    retimed: int = 0


class _Orientation(NamedTuple):
    """Turn of a frame: sides are swapped first, then rows and columns run forward (1) or backward (-1)."""

    swaps: bool = False
    rows: int = 1
    columns: int = 1

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Turn pixels (H, W) or (H, W, C)."""
        turned = pixels.swapaxes(0, 1) if self.swaps else pixels
        return np.ascontiguousarray(turned[:: self.rows, :: self.columns])


class VideoFile:
    """Reader of the first video stream of a file; see `data.reader_protocol.Reader`.

    It gives frames by `events` alone: every other way to read it says which command does.

    Args:
        source: the file.
        options: of reading; `ignore_exif` keeps frames as they are stored, whatever the rotation in the file.

    Attributes:
        name: what error messages call it.
        height: of the stored frames, before rotation.
        width: of the stored frames, before rotation.
        time_base: unit of timestamps in seconds.
        rate: average frame rate by the container, None if it is not known.
        pixel_aspect: width of a pixel by its height.
        num_frames: by the container; 0 if it is not known.
        sounds: PyAV's streams of sound.
        counts: of the frames so far.

    Raises:
        ValueError: if PyAV is missing, there is no video in it, or it names other files.
        OSError: if it is cut short or damaged.
    """

    kind: Kind = "video"
    suffixes = SUFFIXES
    may_lack_data = False
    dtype = np.dtype(np.uint8)

    def __init__(self, source: ImageSource, options: ReadOptions):
        self.source, self.options, self.name = source, options, source.name
        self._start(self._open)

    @classmethod
    def claims(cls, source: ImageSource, by_tiles: bool = False) -> Kind | None:
        """See `data.reader_protocol.Reader.claims`."""
        return "video" if is_video(source) else None

    @classmethod
    def count(cls, source: ImageSource) -> int:
        """Return 1: the frames of a video are no pages."""
        return 1

    @property
    def num_bands(self) -> int:
        """Number of bands that are read."""
        return len(self.options.bands) if self.options.bands else self.options.num_channels

    @property
    def nodata(self) -> tuple[float | None, ...]:
        """None for each band."""
        return (None,) * self.num_bands

    def image(self) -> NoReturn:
        """Raise ValueError: a video is no image."""
        raise ValueError(
            f"{self.name} is a video; expected an image: segformer predict takes videos, and other commands take its "
            "frames as images, for instance from ffmpeg -i VIDEO frames/%06d.png"
        )

    def read(self, tile: Tile) -> NoReturn:
        """Raise ValueError, as `image` does."""
        self.image()

    def events(self) -> Iterator[Frame | Sound]:
        """Yield frames and packets of sound in the order of the file; once.

        Raises:
            ValueError: if there is no frame, or frames change their size.
            OSError: if the file is damaged.
        """
        last: int | None = None
        for item in self._guarded(self._items()):
            if isinstance(item, Sound):
                yield item
                continue
            pts = item.pts
            if pts is None or (last is not None and pts <= last):
                pts = 0 if last is None else last + self._step()
                self.counts.retimed += 1
            last = pts
            self.counts.decoded += 1
            self.counts.damaged += bool(item.is_corrupt)
            yield Frame(self._image_of(item), pts, item.duration or (self._step() if self.rate else 0))
        if not self.counts.decoded:
            dropped = f", its {self.counts.dropped} packets are damaged" if self.counts.dropped else ""
            raise ValueError(f"{self.name} holds no frame that can be decoded{dropped}; expected at least one")

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._container.close()
        if (file := self._container.file) is not None:  # opened here
            file.file.close()

    def _open(self) -> Any:
        if is_playlist(self.source.head):
            raise ValueError(
                f"{self.name} names other files or addresses, which are not opened; expected one video file, or a "
                "stream by --stream URL"
            )
        if missing := missing_bytes(self.source.file):
            raise OSError(
                f"{self.name} is cut short: {missing} bytes are missing by its header; what is there may be kept by "
                "ffmpeg -i VIDEO -c copy whole.mkv"
            )
        return open_file(self.source.file)

    def _start(self, open_container: Callable[[], Any]) -> None:
        """Open the container, and read what its header says."""
        require(self.name)
        if self.options.bands is None and self.options.num_channels not in (1, 3):
            raise ValueError(
                f"{self.name} is a video of three colours; expected a model of 1 or 3 channels, not "
                f"{self.options.num_channels}: choose bands (--bands)"
            )
        self.counts = Counts()
        self._container = self._guard(open_container)
        try:
            self._guard(self._read_header)
        except BaseException:
            self.__exit__()
            raise

    def _read_header(self) -> None:
        from av.stream import Disposition

        videos = [each for each in self._container.streams.video if not each.disposition & Disposition.attached_pic]
        if not videos:
            sound = "sound only" if self._container.streams.audio else "no video"
            raise ValueError(f"{self.name} holds {sound}; expected a video")
        self._stream = stream = videos[0]
        context = stream.codec_context
        if context is None:
            raise ValueError(f"{self.name} has a video of a codec that FFmpeg does not know here")
        self.height, self.width = context.height, context.width
        if not self.height or not self.width:
            raise ValueError(
                f"{self.name} showed no frame during the first seconds; expected a video that begins there"
            )
        check_area(self.height, self.width, self.name)
        stream.thread_type, stream.thread_count = "AUTO", min(4, os.cpu_count() or 1)
        context.options = {"max_pixels": str(2 * (Image.MAX_IMAGE_PIXELS or 1 << 30))}
        self.time_base = stream.time_base
        if not self.time_base or not 0 < self.time_base < 3600:
            raise ValueError(f"{self.name} has no unit of time")
        self.rate = _plausible(stream.average_rate) or _plausible(stream.guessed_rate)
        self.pixel_aspect = context.sample_aspect_ratio or Fraction(1)
        self.num_frames = stream.frames
        self.sounds = [each for each in self._container.streams.audio if each.codec_context is not None]
        self._size: tuple[int, int] | None = None
        self._orientation = _Orientation()

    def _items(self) -> Iterator[Any]:
        """Yield PyAV's decoded frames, and `Sound`."""
        for packet in self._packets():
            if packet.stream.index != self._stream.index:
                if packet.dts is not None and packet.size:
                    yield Sound(packet)
                continue
            yield from self._decoded(packet)

    def _packets(self) -> Iterator[Any]:
        return self._container.demux(self._stream, *self.sounds)

    def _decoded(self, packet: Any) -> list[Any]:
        import av

        try:
            return packet.decode()
        except (av.error.EOFError, av.error.MemoryError):
            raise
        except av.FFmpegError:
            self.counts.dropped += 1
            return []

    def _image_of(self, frame: Any) -> Any:
        size = (frame.height, frame.width)
        if self._size not in (None, size):
            old, new = (f"{height}x{width}" for height, width in (self._size or size, size))
            raise ValueError(
                f"{self.name} changes from {old} to {new} at frame {self.counts.decoded}; expected frames of one "
                "size: re-encode it, for instance by ffmpeg -i VIDEO -vf scale=WIDTH:HEIGHT same.mp4"
            )
        if self._size is None:
            check_area(*size, self.name)
            self._size = size
            self._orient(frame)
        is_grey = self.options.num_channels == 1 and self.options.bands is None
        pixels = self._guard(lambda: frame.to_ndarray(format="gray" if is_grey else "rgb24"))
        image = Image.fromarray(self._orientation.apply(pixels))
        return image if self.options.bands is None else choose_bands(image, self.options.bands, self.name)

    def _orient(self, frame: Any) -> None:
        """Read the display matrix of the first frame (ISO/IEC 14496-12, 6.2.2), which is that of all."""
        matrix = next((bytes(each) for each in frame.side_data if each.type.name == "DISPLAYMATRIX"), b"")
        numbers = struct.unpack("9i", matrix[:36]) if len(matrix) >= 36 else ()
        if self.options.ignore_exif or not any(numbers):
            return
        a, b, c, d = (round(numbers[place] / _FIXED, 3) for place in (0, 1, 3, 4))
        if (b, c) == (0, 0) and abs(a) == abs(d) == 1:
            self._orientation = _Orientation(False, int(d), int(a))
        elif (a, d) == (0, 0) and abs(b) == abs(c) == 1:
            self._orientation = _Orientation(True, int(b), int(c))
            self.pixel_aspect = 1 / self.pixel_aspect
        else:
            raise ValueError(
                f"{self.name} is to be displayed by the matrix {a:g} {b:g} {c:g} {d:g}; expected turns of 90 degrees "
                "and mirrors: keep frames as they are stored (--as-stored)"
            )

    def _step(self) -> int:
        """Return the time of a frame in units of the time base."""
        return max(1, round(1 / (self.rate * self.time_base))) if self.rate else 1

    def _guarded(self, items: Iterator[Any]) -> Iterator[Any]:
        while (item := self._guard(lambda: next(items, None))) is not None:
            yield item

    def _guard(self, read: Callable[[], Any]) -> Any:
        """Call a function; name the file in its errors."""
        try:
            return read()
        except (*DECODE_ERRORS, _ffmpeg_error()) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            if is_full(error) or (isinstance(error, OSError | ValueError) and text.startswith(self.name)):
                raise
            raise OSError(self._reason(error)) from error

    def _reason(self, error: BaseException) -> str:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return f"{self.name} is no video of a known format, cut short or damaged: {reason!s:.200}"


class StreamedVideo(VideoFile):
    """A stream of the network or a camera, for a number of seconds.

    Args:
        address: see `containers.check_stream`.
        options: see `VideoFile`.
        seconds: after which it ends, by the times of its frames; where none come, a little later by those of its
            sound, or when it has been waited for during a few times as long.
        clock: returns a time in seconds.

    Raises:
        ValueError: see `VideoFile`.
        OSError: if it does not answer.
    """

    def __init__(self, address: str, options: ReadOptions, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.options, self.name = options, public_address(address)
        self._seconds, self._clock = seconds, clock
        self._start(lambda: open_stream(address))

    def events(self) -> Iterator[Frame | Sound]:
        """Yield frames and packets until the time is over; see `VideoFile.events`."""
        first: Fraction | None = None
        for event in super().events():
            is_frame = isinstance(event, Frame)
            now = event.pts * self.time_base if isinstance(event, Frame) else _time_of(event.packet)
            first = now if first is None and is_frame else first
            if first is None or float(now - first) < self._seconds:
                yield event
            elif is_frame:
                return

    def _packets(self) -> Iterator[Any]:
        """Yield packets until the time is over by those of sound, or by the clock; it stands while others work."""
        packets, waited = super()._packets(), 0.0
        first: Fraction | None = None
        while waited < _PATIENCE * self._seconds + STREAM_SECONDS:
            began = self._clock()
            packet = next(packets, None)
            waited += self._clock() - began
            if packet is None:
                return
            if packet.stream.index != self._stream.index and packet.dts is not None:
                first = _time_of(packet) if first is None else first
                if float(_time_of(packet) - first) >= self._seconds + _LEAD:
                    return
            yield packet

    def _reason(self, error: BaseException) -> str:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return (
            f"{self.name} does not answer, or is no stream of a known format: {reason!s:.200}; expected a stream that "
            "names no other address (no playlist)"
        )


def require(name: str) -> None:
    """Raise ValueError if PyAV is not installed.

    Args:
        name: of the video.
    """
    try:
        is_there = find_spec("av") is not None
    except ValueError:  # a module that was blocked
        is_there = False
    if not is_there:
        raise ValueError(f"{name} is a video, which needs av: {INSTALL}")


def _ffmpeg_error() -> type[Exception]:
    import av

    return av.FFmpegError


def _time_of(packet: Any) -> Fraction:
    """Return the time of a packet in seconds."""
    return packet.dts * packet.time_base


def _plausible(rate: Fraction | None) -> Fraction | None:
    """Return a frame rate, None for one that no video has."""
    return rate if rate is not None and 0 < rate <= 10_000 else None


__all__ = ["Counts", "Frame", "Sound", "StreamedVideo", "VideoFile", "require"]
