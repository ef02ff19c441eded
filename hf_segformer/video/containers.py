"""Containers of videos: by which bytes they are known, whether they are whole, and how FFmpeg may open them.

FFmpeg opens playlists, other files and addresses that a file names. Here it sees the bytes of one file through a file
object, may open nothing besides (`protocol_whitelist`), and knows the formats of `FORMATS` alone (`format_whitelist`).
"""

import os
import re
import struct
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from ..data.reader_protocol import ImageSource

INSTALL = "pip install 'hf-segformer[video]'"
# Endings by which folders are searched. MPEG transport streams (.ts) are known by content: TypeScript has that ending.
SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts"),
    *(".wmv", ".flv", ".ogv", ".3gp"),
)
# FFmpeg's demuxers that read one file and name no other one.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,asf,flv,ogg"
_STREAM_FORMATS = f"{FORMATS},rtsp,mpjpeg"
# Protocols that a stream of each scheme may use; a server may redirect, but to no file of this machine.
_PROTOCOLS = {
    "http": "http,https,httpproxy,tcp,tls",
    "https": "http,https,httpproxy,tcp,tls",
    "rtsp": "rtsp,rtp,tcp",
    "rtsps": "rtsps,rtsp,rtp,tcp,tls",
    "rtmp": "rtmp,tcp",
    "rtmps": "rtmps,tcp,tls",
    "tcp": "tcp",
    "udp": "udp",
}
CAMERAS = ("v4l2", "avfoundation", "dshow")  # of Linux, macOS and Windows
STREAM_SECONDS = 15  # without an answer
_PLAYLISTS = (b"#EXTM3U", b"ffconcat version", b"v=0\r\n", b"v=0\n")
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_ASF = bytes.fromhex("3026b2758e66cf11")
_IMAGE_BRANDS = (
    *(b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"miaf", b"msf1"),
    *(b"jxl ", b"jp2 ", b"jpx ", b"crx "),
)
_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"mfra", b"free", b"skip", b"wide", b"uuid", b"sidx", b"styp", b"meta")
_PACKET = 188  # bytes of an MPEG transport stream


def is_video(source: ImageSource) -> bool:
    """Return True for a file that begins as a video or a playlist, or is named as a video."""
    head = source.head
    return (
        source.suffix in SUFFIXES
        or head.startswith((_EBML, _ASF, b"FLV\x01", b"\0\0\x01\xba"))
        or (head[4:8] == b"ftyp" and head[8:12] not in _IMAGE_BRANDS)
        or (head[4:8] in (b"moov", b"wide", b"mdat") and len(head) >= 16)
        or (head.startswith(b"RIFF") and head[8:12] == b"AVI ")
        or (head.startswith(b"OggS") and b"\x80theora" in head[:64])
        or _is_transport_stream(head)
        or is_playlist(head)
    )


def is_playlist(head: bytes) -> bool:
    """Return True for text that names videos: m3u8, FFmpeg's concat, SDP."""
    return head.startswith(_PLAYLISTS)


def _is_transport_stream(head: bytes) -> bool:
    """Return True where packets of 188 bytes, or of 192 with a time before each, begin with 0x47."""
    return len(head) >= 5 * 192 and any(
        all(head[start + number * size] == 0x47 for number in range(5)) for start, size in ((0, _PACKET), (4, 192))
    )


def missing_bytes(file: Path | BytesIO) -> int:
    """Return how many bytes a file lacks by the sizes in its container, 0 where it is whole or states none.

    FFmpeg reads a Matroska or AVI file that was cut short as if it ended there.
    """
    if isinstance(file, BytesIO):
        return _missing(file, file.getbuffer().nbytes)
    with open(file, "rb") as opened:
        return _missing(opened, os.fstat(opened.fileno()).st_size)


def _missing(file: BinaryIO, length: int) -> int:
    head = file.read(16)
    file.seek(0)
    if head.startswith(_EBML):
        end = _end_of_matroska(file.read(4096))
    elif head.startswith(b"RIFF"):
        (size,) = struct.unpack("<I", head[4:8].ljust(4, b"\0"))
        end = 8 + size if 0 < size < 0xFFFFFFFF else 0
    elif head[4:8] in _BOXES:
        end = _end_of_boxes(file, length)
    else:
        end = 0
    return max(0, end - length)


def _end_of_matroska(head: bytes) -> int:
    """Return where the segment ends by its size, 0 for an unknown size (RFC 8794, section 6)."""
    place = head.find(_SEGMENT)
    if place < 0 or place + 12 > len(head):
        return 0
    first = head[place + 4]
    number = 9 - first.bit_length()  # bytes of the size
    if not first:
        return 0
    size = int.from_bytes(head[place + 4 : place + 4 + number], "big") & ((1 << 7 * number) - 1)
    return 0 if size == (1 << 7 * number) - 1 else place + 4 + number + size


def _end_of_boxes(file: BinaryIO, length: int) -> int:
    """Return where the last box of an MP4 or QuickTime file ends; what follows the boxes is not looked at."""
    place = 0
    while place + 8 <= length:
        file.seek(place)
        header = file.read(16)
        (size,) = struct.unpack(">I", header[:4])
        if header[4:8] not in _BOXES or size == 0:  # a size of 0 reaches to the end of the file
            break
        if size == 1 and len(header) == 16:
            (size,) = struct.unpack(">Q", header[8:])
        if size < 8:
            break
        place += size
    return place


def open_file(file: Path | BytesIO) -> Any:
    """Open a file for reading; it may name no other one.

    Raises:
        av.FFmpegError: if it is none of `FORMATS`, or damaged.
        OSError: if it cannot be read.
    """
    import av

    options = {"protocol_whitelist": "none", "format_whitelist": FORMATS}
    opened = file if isinstance(file, BytesIO) else open(file, "rb")  # noqa: SIM115
    try:
        return av.open(opened, "r", options=options, metadata_errors="replace")
    except BaseException:
        opened.close()
        raise


def check_stream(address: str) -> None:
    """Raise ValueError unless an address has a scheme of a stream, or is a camera."""
    kind, separator, place = address.partition(":")
    if separator and ((kind in CAMERAS and place) or (kind in _PROTOCOLS and re.match(r"//[^/]", place))):
        return
    expected = ", ".join(f"{scheme}://" for scheme in _PROTOCOLS)
    raise ValueError(
        f"the stream {public_address(address)} has another form; expected {expected} with an address, or a camera: "
        "v4l2:/dev/video0, avfoundation:0, dshow:video=NAME"
    )


def open_stream(address: str) -> Any:
    """Open a stream or a camera.

    Args:
        address: see `check_stream`.

    Raises:
        av.FFmpegError: if it does not answer, or is none of the formats that name no other address.
    """
    import av

    kind, _, place = address.partition(":")
    if kind in CAMERAS:
        return av.open(place, "r", format=kind, options={"protocol_whitelist": "file"}, timeout=STREAM_SECONDS)
    options = {"protocol_whitelist": _PROTOCOLS[kind], "format_whitelist": _STREAM_FORMATS}
    if kind in ("rtsp", "rtsps"):
        options["rtsp_transport"] = "tcp"  # frames come over the one connection that was opened
    return av.open(address, "r", options=options, timeout=STREAM_SECONDS, metadata_errors="replace")


def public_address(address: str) -> str:
    """Return the address of a stream without its user, password and query, for messages and records.

    Passwords that are not percent-encoded may hold "/", "?" and "@".
    """
    kind, separator, place = address.partition(":")
    if separator and kind in CAMERAS:
        return address
    shown, _, query = place.partition("?")
    if "@" in query:  # a password with a "?", or a query with a password: which is not known
        return f"{kind}://..."
    return kind.rpartition("@")[2] + separator + re.sub(r"(/*).*@", r"\1", shown, flags=re.DOTALL)


__all__ = [
    "CAMERAS",
    "FORMATS",
    "INSTALL",
    "STREAM_SECONDS",
    "SUFFIXES",
    "check_stream",
    "is_playlist",
    "is_video",
    "missing_bytes",
    "open_file",
    "open_stream",
    "public_address",
]
