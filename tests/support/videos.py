"""Small videos with sound, by PyAV's encoders, and their contents as PyAV reads them."""

from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

FORMATS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov", ".avi": "avi", ".webm": "webm", ".ts": "mpegts"}
CODECS = {".mp4": "libx264", ".mkv": "ffv1", ".mov": "mpeg4", ".avi": "mpeg4", ".webm": "libvpx", ".ts": "libx264"}
SOUNDS = {".mp4": "aac", ".mkv": "flac", ".mov": "pcm_s16le", ".avi": "pcm_s16le", ".webm": "libopus", ".ts": "aac"}


def drawn_frames(number: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Frames, uint8 (H, W, 3): a slope whose colour changes, and a square that moves."""
    found = []
    for index in range(number):
        rows, columns = np.mgrid[:height, :width]
        frame = np.stack([4 * rows, 3 * columns, np.full_like(rows, 20 * index)], axis=-1) % 256
        frame[5:20, 3 * index : 3 * index + 12] = (250, 240, 10)
        found.append(frame.astype(np.uint8))
    return found


def write_video(
    path: Path,
    frames: list[np.ndarray] | int = 10,
    *,
    codec: str = "",
    sound: bool = True,
    steps: tuple[int, ...] = (1,),
    time_base: Fraction = Fraction(1, 12800),
    matrix: tuple[int, ...] | None = None,
    options: dict[str, str] | None = None,
    language: str = "",
) -> Path:
    """Write a video of 25 frames a second.

    Args:
        path: its ending chooses container and codecs.
        frames: uint8 (H, W, 3) each, or how many of `drawn_frames`.
        codec: of the frames; by default that of the ending.
        sound: with a second stream of noise.
        steps: distances of frames in 1/25 s, in turns; another one than (1,) makes the frame rate vary.
        time_base: unit of timestamps.
        matrix: display matrix.
        options: of the encoder.
        language: of the sound.
    """
    frames = drawn_frames(frames) if isinstance(frames, int) else frames
    time_base = Fraction(1, 25) if path.suffix == ".avi" else time_base
    with av.open(f"file:{path}", "w", format=FORMATS[path.suffix]) as container:
        video = container.add_stream(codec or CODECS[path.suffix], rate=25, options=options or {}, time_base=time_base)
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "bgr0" if video.codec_context.name == "ffv1" else "yuv420p"
        video.codec_context.time_base = time_base
        if matrix is not None:
            video.set_display_matrix(matrix)
        audio = None
        if sound:
            audio = container.add_stream(SOUNDS[path.suffix], rate=48000)
            audio.layout = "mono"
            if language:
                audio.metadata["language"] = language
        pts = samples = 0
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = pts, time_base
            pts += round(steps[index % len(steps)] / (25 * time_base))
            container.mux(video.encode(frame))
            while audio is not None and samples < pts * time_base * 48000:
                container.mux(audio.encode(_noise(samples)))
                samples += 960
        container.mux(video.encode(None))
        if audio is not None:
            container.mux(audio.encode(None))
    return path


def _noise(start: int) -> av.AudioFrame:
    values = np.random.default_rng(start).integers(-9000, 9000, (1, 960)).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(values, format="s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
    return frame


class Content(NamedTuple):
    """Contents of a file.

    Attributes:
        frames: uint8, (N, H, W, 3) or (N, H, W).
        times: of the frames, in seconds.
        sound: bytes of each packet.
        sound_times: in seconds.
        codecs: of the streams.
    """

    frames: np.ndarray
    times: list[Fraction]
    sound: list[bytes]
    sound_times: list[Fraction]
    codecs: list[str]


def read_video(path: Path, format: str = "rgb24") -> Content:
    """Decode a file by PyAV alone."""
    with av.open(f"file:{path}") as container:
        codecs = [stream.codec_context.name for stream in container.streams]
        frames = list(container.decode(video=0))
    sound = []
    with av.open(f"file:{path}") as container:
        if container.streams.audio:
            packets = [packet for packet in container.demux(audio=0) if packet.size]
            sound = [(bytes(packet), packet.pts * packet.time_base) for packet in packets]
    return Content(
        np.stack([frame.to_ndarray(format=format) for frame in frames]),
        [frame.pts * frame.time_base for frame in frames],
        [content for content, _ in sound],
        [time for _, time in sound],
        codecs,
    )


def packets_of(path: Path) -> list[tuple[int, int]]:
    """Place and size of each packet of frames in a file."""
    with av.open(f"file:{path}") as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def damage_packets(path: Path, numbers: tuple[int, ...]) -> None:
    """Damage packets of frames within a file."""
    content, places = bytearray(path.read_bytes()), packets_of(path)
    for number in numbers:
        place, size = places[number]
        for index in range(place + 8, place + size):
            content[index] ^= 0x5A
    path.write_bytes(content)


def write_videos(folder: Path) -> list[Path]:
    """One video of each container, of 24 x 32 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_video(folder / f"film{suffix}", drawn_frames(4, 24, 32), sound=suffix != ".webm")
        for suffix in FORMATS
        if suffix != ".ts"  # states no length: it may be cut between packets
    ]
