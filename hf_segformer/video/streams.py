"""Streams and cameras as sources of a job, which only a command or a program names."""

from collections import Counter
from typing import Any

from ..data.reader_protocol import Kind, ReadOptions
from ..data.sources import InputItem
from .containers import check_stream, public_address
from .reader import StreamedVideo, VideoFile, require


class StreamSource:
    """One stream or camera; see `data.sources.FileSource`.

    Args:
        address: such as `rtsp://HOST/PATH`, or `v4l2:/dev/video0`; see `containers.check_stream`.
        seconds: after which it ends.
        bands: see `FileSource`.
        ignore_exif: keep frames as they are stored, whatever their rotation.

    Raises:
        ValueError: if the address has another form, or PyAV is missing.
    """

    axis, window = None, False

    def __init__(
        self, address: str, seconds: float, *, bands: tuple[int, ...] | None = None, ignore_exif: bool = False
    ):
        check_stream(address)
        require(public_address(address))
        if not 0 < seconds < float("inf"):
            raise ValueError(f"seconds is {seconds}; expected a number above 0")
        self._address, self._seconds = address, seconds
        self.bands, self.ignore_exif = bands, ignore_exif
        self.skipped: Counter[str] = Counter()

    def items(self) -> list[InputItem]:
        """Return the only item, `stream`."""
        return [InputItem("stream", public_address(self._address))]

    def kind(self, item: InputItem) -> Kind:
        """Return `"video"`."""
        return "video"

    def open(self, item: InputItem, num_channels: int = 3, **options: Any) -> VideoFile:
        """Open the stream.

        Args:
            item: the only one.
            num_channels: see `FileSource.open`.
            **options: further fields of `ReadOptions`.
        """
        options = {"ignore_exif": self.ignore_exif, "bands": self.bands, **options}
        return StreamedVideo(self._address, ReadOptions(num_channels, **options), self._seconds)

    def describe(self, item: InputItem) -> str:
        """Return the address without user, password and query."""
        return public_address(self._address)

    def origin(self, item: InputItem) -> str:
        """Return what `describe` does, and the seconds."""
        return f"stream {public_address(self._address)} for {self._seconds:g} s"


__all__ = ["StreamSource"]
