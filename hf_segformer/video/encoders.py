"""Files of frames: videos by an encoder, with the timestamps of the source and its packets of sound.

Frames are encoded in their order (no B-frames), so that no timestamp moves. Axes: H W sides of a frame.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ..files import is_full, named

CONTAINERS = {"mp4": "mp4", "mkv": "matroska", "mov": "mov"}
# Visually lossless, and no reordered frames.
_H264 = {"crf": "18", "preset": "veryfast", "bf": "0"}
_BT709, _LIMITED, _FULL = 1, 1, 2  # as FFmpeg numbers them


class Timing(NamedTuple):
    """Timing and shape of pixels that a file of frames takes over.

    Attributes:
        time_base: unit of timestamps in seconds.
        rate: frame rate that the header states.
        pixel_aspect: width of a pixel by its height.
    """

    time_base: Fraction
    rate: Fraction
    pixel_aspect: Fraction = Fraction(1)


class _Frames:
    """A video that is being written; `add` takes frames, `close` ends it."""

    codec: str
    options: dict[str, str]

    def __init__(
        self,
        path: Path,
        container: str,
        size: tuple[int, int],
        pixel_format: str,
        timing: Timing,
        **container_options: str,
    ):
        import av

        self._path, self._time_base = path, timing.time_base
        self._durations: dict[int, int] = {}
        with self._named():
            container_format = CONTAINERS[container]
            self._output = cast(Any, av.open(f"file:{path}", "w", format=container_format, options=container_options))
            # The encoder states a rate of at most 1000 / 1001 parts; a header's odd rate would be refused.
            self._video = self._output.add_stream(
                self.codec,
                rate=timing.rate.limit_denominator(1001),
                options=self.options,
                time_base=timing.time_base,
            )
        (self._video.height, self._video.width), self._video.pix_fmt = size, pixel_format
        context = self._video.codec_context
        context.time_base, context.sample_aspect_ratio = timing.time_base, timing.pixel_aspect

    def add(self, frame: Any, pts: int, duration: int) -> None:
        """Encode a frame of PyAV at its time, in units of the time base."""
        frame.pts, frame.time_base, frame.duration = pts, self._time_base, duration
        self._durations[pts] = duration
        with self._named():
            self._mux(self._video.encode(frame))

    def close(self) -> None:
        """End the file.

        Raises:
            OSError: if it cannot be written.
        """
        with self._named():
            self._mux(self._video.encode(None))
            self._output.close()

    def discard(self) -> None:
        """Close the file, which is not complete."""
        import av

        with suppress(av.FFmpegError, OSError):
            self._output.close()

    def _open_encoder(self) -> None:
        import av

        size = f"{self._video.height}x{self._video.width}"
        try:
            self._video.codec_context.open()
        except av.FFmpegError as error:
            self.discard()
            raise ValueError(
                f"the encoder {self.codec} cannot be opened for frames of {size}: {error.strerror}"
            ) from error

    def _mux(self, packets: Iterable[Any]) -> None:
        for packet in packets:
            packet.duration = self._durations.pop(packet.pts, 0) or packet.duration
            self._output.mux(packet)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Raise OSError for the errors of FFmpeg, with the file's name."""
        import av

        with named(self._path):
            try:
                yield
            except av.FFmpegError as error:
                raise OSError(error.errno, error.strerror or str(error)) from error


class OverlayVideo(_Frames):
    """H.264 (yuv420p, BT.709) with the sound of the source, copied packet by packet.

    Args:
        path: the file.
        container: one of `CONTAINERS`.
        size: (H, W) of the frames; an odd side is widened by a copy of its last row or column.
        timing: of the source.
        sounds: PyAV's streams of sound.

    Attributes:
        sound_dropped: packets of sound whose time does not follow that of the packet before, which are left out.

    Raises:
        ValueError: if the container holds no sound of that kind, or the encoder does not open.
        OSError: if it cannot be written.
    """

    codec, options = "libx264", _H264

    def __init__(self, path: Path, container: str, size: tuple[int, int], timing: Timing, sounds: Sequence[Any]):
        self._padding = size[0] % 2, size[1] % 2
        container_options = {} if container == "mkv" else {"movflags": "+faststart"}
        padded = size[0] + self._padding[0], size[1] + self._padding[1]
        super().__init__(path, container, padded, "yuv420p", timing, **container_options)
        context = self._video.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        self.sound_dropped = 0
        self._last: dict[int, int] = {}  # by stream of sound
        self._least_step = 0 if container == "mkv" else 1  # Matroska may round two packets to one millisecond
        self._open_encoder()
        self._copy_header(container, sounds)

    def _copy_header(self, container: str, sounds: Sequence[Any]) -> None:
        import av

        try:
            self._sounds = {each.index: self._output.add_stream_from_template(each) for each in sounds}
            for each in sounds:
                if each.language:
                    self._sounds[each.index].metadata["language"] = each.language
            self._output.start_encoding()
        except (av.FFmpegError, ValueError) as error:
            self.discard()
            if is_full(error) or not sounds:
                with self._named():
                    raise
            codecs = ", ".join(each.codec_context.name for each in sounds)
            raise ValueError(
                f"the container {container} holds no sound of the kind {codecs} ({error}); expected mkv for it "
                "(--overlay-as mkv)"
            ) from error

    def write(self, pixels: np.ndarray, pts: int, duration: int) -> None:
        """Write a frame, uint8 (H, W, 3)."""
        import av

        rows, columns = self._padding
        padded = np.pad(pixels, ((0, rows), (0, columns), (0, 0)), mode="edge") if rows or columns else pixels
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        self.add(frame, pts, duration)

    def copy(self, packet: Any) -> None:
        """Copy a packet of sound whose time follows; its time goes back where recordings were joined."""
        stream = packet.stream.index
        if packet.dts < self._last.get(stream, packet.dts - 1) + self._least_step:
            self.sound_dropped += 1
            return
        self._last[stream] = packet.dts
        packet.stream = self._sounds[stream]
        with self._named():
            self._output.mux(packet)


class MaskVideo(_Frames):
    """FFV1, lossless: the grey values of a frame are its classes. Times are rounded to milliseconds by Matroska.

    Args:
        path: the file.
        size: (H, W) of the frames.
        timing: of the source.
        dtype: uint8, or uint16 for more classes.

    Raises:
        ValueError: if the encoder does not open.
        OSError: if it cannot be written.
    """

    codec, options = "ffv1", {"level": "3", "slicecrc": "1"}

    def __init__(self, path: Path, size: tuple[int, int], timing: Timing, dtype: np.dtype):
        self._format = "gray" if dtype == np.uint8 else "gray16le"
        super().__init__(path, "mkv", size, self._format, timing)
        self._video.codec_context.color_range = _FULL
        self._open_encoder()

    def write(self, mask: np.ndarray, pts: int, duration: int) -> None:
        """Write a mask (H, W) of the stream's dtype."""
        import av

        self.add(av.VideoFrame.from_ndarray(np.ascontiguousarray(mask), format=self._format), pts, duration)


__all__ = ["CONTAINERS", "MaskVideo", "OverlayVideo", "Timing"]
