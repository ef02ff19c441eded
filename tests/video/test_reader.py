"""The reader of videos: what it claims, rotation, cut and damaged files."""

from io import BytesIO
from itertools import product

import numpy as np
import pytest

pytest.importorskip("av")

import av
from PIL import Image

from hf_segformer.data.reader_protocol import ImageSource
from hf_segformer.data.readers import find_reader, image_suffixes, kind_of, open_image
from hf_segformer.video.containers import missing_bytes
from hf_segformer.video.reader import Frame, VideoFile
from hf_segformer.video.shares import SharesCurve
from tests.support.videos import FORMATS, damage_packets, drawn_frames, read_video, write_video

ONE = 1 << 16


def frames_of(path, **options):
    with open_image(path, **options) as video:
        return np.stack([np.asarray(event.image) for event in video.events() if isinstance(event, Frame)])


@pytest.mark.parametrize("suffix", FORMATS)
def test_videos_are_claimed_by_content_and_read_as_pyav_reads_them(suffix, tmp_path):
    path = write_video(tmp_path / f"film{suffix}", 4)
    source = ImageSource(path.read_bytes(), "film")  # a name without an ending
    assert find_reader(source) == (VideoFile, "video")
    assert np.array_equal(frames_of(path), read_video(path).frames)
    assert np.array_equal(frames_of(BytesIO(path.read_bytes())), frames_of(path))


def test_images_of_related_containers_are_no_videos(tmp_path):
    image = Image.fromarray(drawn_frames(1)[0])
    for name in ("a.avif", "a.webp", "a.gif", "a.png", "a.jp2"):
        image.save(tmp_path / name)
        assert kind_of(tmp_path / name) == "image"
    (tmp_path / "index.ts").write_text("export const answer = 42;\n")
    assert kind_of(tmp_path / "index.ts") == "image"
    assert ".mp4" in image_suffixes()
    assert ".ts" not in image_suffixes()


@pytest.mark.parametrize("brand", [b"hevc", b"hevx", b"mif2", b"miaf", b"crx ", b"jpx ", b"mif1"])
def test_brands_of_images_are_no_videos(brand):
    assert find_reader(ImageSource(b"\0\0\0\x18ftyp" + brand + b"\0" * 100, "a"))[1] == "image"
    assert find_reader(ImageSource(b"\0\0\0\x18ftypisom" + b"\0" * 100, "a"))[1] == "video"


@pytest.mark.parametrize(("a", "d", "swaps"), list(product((1, -1), (1, -1), (False, True))))
def test_a_display_matrix_is_applied_pixel_by_pixel(a, d, swaps, tmp_path):
    """Against ISO/IEC 14496-12: the point (x, y) is displayed at (a x + c y, b x + d y), moved to be positive."""
    matrix = (0, a, d, 0) if swaps else (a, 0, 0, d)  # a b c d
    numbers = (matrix[0] * ONE, matrix[1] * ONE, 0, matrix[2] * ONE, matrix[3] * ONE, 0, 0, 0, 1 << 30)
    path = write_video(tmp_path / "film.mov", drawn_frames(2, 16, 24), sound=False, matrix=numbers)
    stored = read_video(path).frames
    places = {}
    for y, x in product(range(16), range(24)):
        places[y, x] = (matrix[0] * x + matrix[2] * y, matrix[1] * x + matrix[3] * y)
    left, top = (min(place[axis] for place in places.values()) for axis in (0, 1))
    expected = np.zeros((2, 24, 16, 3) if swaps else stored.shape, np.uint8)
    for (y, x), (right, down) in places.items():
        expected[:, down - top, right - left] = stored[:, y, x]
    assert np.array_equal(frames_of(path), expected)
    assert np.array_equal(frames_of(path, ignore_exif=True), stored)


def test_other_matrices_are_refused_unless_frames_stay_as_stored(tmp_path):
    path = write_video(tmp_path / "film.mov", 2, sound=False, matrix=(46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30))
    with pytest.raises(ValueError, match=r"film.mov is to be displayed by the matrix 0.707 0.707 .*--as-stored"):
        frames_of(path)
    assert len(frames_of(path, ignore_exif=True)) == 2


@pytest.mark.parametrize("suffix", [suffix for suffix in FORMATS if suffix != ".ts"])
def test_a_video_cut_anywhere_is_refused(suffix, tmp_path):
    whole = write_video(tmp_path / f"film{suffix}", 4).read_bytes()
    path = tmp_path / f"cut{suffix}"
    assert missing_bytes(BytesIO(whole)) == 0
    for length in (0, 1, 9, 40, 300, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(OSError, match=f"{path.name} is (cut short|no video)") as caught:
            frames_of(path)
        assert "\n" not in str(caught.value)
    assert missing_bytes(BytesIO(whole[:-10])) == 10
    assert missing_bytes(BytesIO(whole + b"\0" * 100)) == 0  # as some cameras append


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text.mp4", "text.mp4 is no video of a known format, cut short or damaged"),
        ("empty.mkv", "empty.mkv is no video of a known format, cut short or damaged"),
        ("sound.mp4", "sound.mp4 holds sound only; expected a video"),
        ("none.mkv", "none.mkv is no video of a known format, cut short or damaged: End of file"),
        ("broken.avi", "broken.avi holds no frame that can be decoded, its 3 packets are damaged"),
        ("sizes.ts", "sizes.ts changes from 48x64 to 32x40 at frame 5; expected frames of one size"),
        ("list.mp4", "list.mp4 names other files or addresses, which are not opened"),
        ("six.mkv", "expected a model of 1 or 3 channels, not 6"),
    ],
)
def test_bad_files_get_one_line(name, reason, tmp_path):
    path, options = tmp_path / name, {}
    if name == "text.mp4":
        path.write_text("this is no film\n" * 100)
    elif name == "empty.mkv":
        path.write_bytes(b"")
    elif name == "sound.mp4":
        film = write_video(tmp_path / "film.mp4", 3)
        with av.open(film) as source, av.open(path, "w", format="mp4") as target:
            stream = target.add_stream_from_template(source.streams.audio[0])
            for packet in source.demux(audio=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
    elif name == "none.mkv":
        with av.open(path, "w", format="matroska") as target:
            stream = target.add_stream("ffv1", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "bgr0"
            target.start_encoding()
    elif name == "broken.avi":
        damage_packets(write_video(path, 3, codec="ffv1"), (0, 1, 2))
    elif name == "sizes.ts":
        second = write_video(tmp_path / "second.ts", drawn_frames(4, 32, 40), sound=False)
        path.write_bytes(write_video(tmp_path / "first.ts", 4, sound=False).read_bytes() + second.read_bytes())
    elif name == "list.mp4":
        path.write_text("#EXTM3U\nhttp://127.0.0.1/film.ts\n")
    else:
        write_video(path, 2)
        options = {"num_channels": 6}
    with pytest.raises((ValueError, OSError), match=reason) as caught:
        frames_of(path, **options)
    assert "\n" not in str(caught.value)


def test_a_curve_of_many_frames_is_bounded_and_keeps_its_mean():
    curve, shares = SharesCurve(2), np.random.default_rng(0).random(10_000)
    for index, share in enumerate(shares):
        curve.add(index / 25, np.array([share, 1 - share]))
    points = curve.points()
    assert len(points) <= 2048
    assert np.allclose(points[:-1, 1], shares[: 8 * (len(points) - 1)].reshape(-1, 8).mean(axis=1))
    assert np.allclose(points[0, 0], np.arange(8).mean() / 25)
