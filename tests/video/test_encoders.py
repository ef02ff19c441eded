"""Files of frames: errors of the encoder, the disk and the sound are distinct, and sound keeps its order."""

import errno
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("av")

import av

from hf_segformer.files import is_full
from hf_segformer.video.encoders import MaskVideo, OverlayVideo, Timing
from tests.support.videos import read_video, write_video

TIMING = Timing(Fraction(1, 12800), Fraction(25))


def test_an_encoder_that_does_not_open_is_named_with_the_size(tmp_path):
    with pytest.raises(
        ValueError, match=r"the encoder libx264 cannot be opened for frames of 20000x20000: Invalid argument$"
    ):
        OverlayVideo(tmp_path / "a.mp4", "mp4", (20000, 20000), TIMING, ())
    with pytest.raises(ValueError, match=r"the encoder ffv1 cannot be opened for frames of 0x64: Invalid argument$"):
        MaskVideo(tmp_path / "a.mkv", (0, 64), TIMING, np.dtype(np.uint8))


@pytest.mark.parametrize("sound", [True, False])
def test_a_full_disk_is_no_sound_that_the_container_does_not_hold(sound, tmp_path, monkeypatch):
    class Full:
        def __init__(self, opened):
            self._opened = opened

        def __getattr__(self, name):
            return getattr(self._opened, name)

        def start_encoding(self):
            raise av.error.OSError(errno.ENOSPC, "No space left on device")

    film, opened = write_video(tmp_path / "film.mp4", 2), av.open
    with av.open(film) as source:
        monkeypatch.setattr(av, "open", lambda *arguments, **options: Full(opened(*arguments, **options)))
        with pytest.raises(OSError, match="No space left") as caught:
            OverlayVideo(tmp_path / "a.mp4", "mp4", (48, 64), TIMING, source.streams.audio if sound else ())
    assert is_full(caught.value)
    assert caught.value.filename == str(tmp_path / "a.mp4")


@pytest.mark.parametrize(("container", "equal"), [("mp4", 0), ("mkv", 1)])  # Matroska holds packets of one time
def test_sound_whose_time_jumps_back_is_left_out_and_counted(container, equal, tmp_path):
    film, path = write_video(tmp_path / "film.ts", 5), tmp_path / f"a.{container}"
    expected = read_video(film)
    with av.open(film) as source, av.open(film) as again:
        output = OverlayVideo(path, container, (48, 64), TIMING, source.streams.audio)
        output.write(np.zeros((48, 64, 3), np.uint8), 0, 512)
        for part in (source, again):  # as in two copies, one behind the other
            for packet in part.demux(part.streams.audio[0]):
                if packet.dts is not None and packet.size:
                    output.copy(packet)
        output.close()
    assert output.sound_dropped == len(expected.sound) - equal > 5
    assert len(read_video(path).sound) == len(expected.sound) + equal
