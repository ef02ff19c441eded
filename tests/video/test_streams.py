"""Addresses are opened where a command names them, and nowhere else."""

import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import count
from typing import Any, NamedTuple

import pytest

pytest.importorskip("av")

import av

from hf_segformer import SegFormerImageProcessor
from hf_segformer.data.reader_protocol import ReadOptions
from hf_segformer.video.containers import check_stream, open_file, public_address
from hf_segformer.video.reader import Frame, Sound, StreamedVideo, VideoFile
from tests.inference.test_predictor import lively
from tests.support.commands import assert_one_line, run
from tests.support.videos import read_video, write_video


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    lively(num_labels=3).save_pretrained(folder)
    SegFormerImageProcessor(do_resize=False).save_pretrained(folder)
    return folder


@pytest.fixture
def server(tmp_path):
    """A server on the loop-back interface, with the paths that were asked for."""
    write_video(tmp_path / "film.ts", 20)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            name = self.path.partition("?")[0].strip("/")
            file = tmp_path / name
            if self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", f"file://{tmp_path}/film.ts")
                self.end_headers()
                return
            content = file.read_bytes() if file.is_file() else b""
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    paths = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.paths = paths
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def address(server, path, user=""):
    return f"http://{user}127.0.0.1:{server.server_port}/{path}"


def test_a_stream_is_predicted_for_its_seconds_and_its_password_kept_secret(checkpoint, server, tmp_path, capsys):
    out = tmp_path / "out"
    stream = address(server, "film.ts?key=SECRET", "me:SECRET@")
    assert run("predict", checkpoint, "--stream", stream, "--seconds", 0.4, "-o", out) == 0
    printed = capsys.readouterr()
    assert "stream: 10 frames in 0.4 s" in printed.out
    source, drawn = read_video(tmp_path / "film.ts"), read_video(out / "stream_overlay.mp4")
    assert drawn.times == source.times[:10]
    assert server.paths == ["/film.ts?key=SECRET"]
    for path in out.iterdir():
        assert b"SECRET" not in path.read_bytes(), path
    assert "SECRET" not in printed.out + printed.err


def test_an_address_among_the_inputs_is_not_opened(checkpoint, server, tmp_path, capsys):
    assert run("predict", checkpoint, address(server, "film.ts"), "-o", tmp_path / "out") != 0
    assert_one_line(capsys.readouterr().err, "is an address; expected files")
    assert server.paths == []


def playlists(target):
    return {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
        "list.ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
        "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "list.mpd": '<?xml version="1.0"?>'
        f'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{target}</BaseURL></MPD>',
        "list.asx": f'<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
        "list.strm": target,
    }


def test_a_resumed_folder_takes_no_other_seconds(checkpoint, server, tmp_path, capsys):
    arguments = ["predict", checkpoint, "--stream", address(server, "film.ts"), "-o", tmp_path / "out"]
    assert run(*arguments, "--seconds", 0.2) == 0
    assert run(*arguments, "--seconds", 0.2) == 0
    capsys.readouterr()
    assert run(*arguments, "--seconds", 0.4) == 1
    assert_one_line(capsys.readouterr().err, "film.ts for 0.2 s", "film.ts for 0.4 s", "choose another output folder")


class Packet(NamedTuple):
    """A packet of a stream in which no frame can be decoded."""

    stream: Any
    dts: int
    time_base: Fraction = Fraction(1, 10)
    size: int = 1

    def decode(self):
        raise av.error.InvalidDataError(1, "damaged")


def opened(server, seconds, **options):
    return StreamedVideo(address(server, "film.ts"), ReadOptions(), seconds, **options)


def test_a_stream_without_frames_ends_by_the_time_of_its_sound(server, monkeypatch):
    with opened(server, 2) as video:
        [sound] = video.sounds
        packets = iter([Packet(sound, dts) for dts in range(50, 1000)])
        monkeypatch.setattr(VideoFile, "_packets", lambda self: packets)
        with pytest.raises(ValueError, match="no frame that can be decoded"):
            list(video.events())
        assert next(packets).dts == 50 + 70 + 1  # two seconds, and five by which sound may be early


def test_a_stream_without_frames_or_sound_ends_by_the_clock(server, monkeypatch):
    times = count()
    with opened(server, 2, clock=lambda: float(next(times))) as video:
        packets = iter([Packet(video._stream, dts) for dts in range(1000)])
        monkeypatch.setattr(VideoFile, "_packets", lambda self: packets)
        with pytest.raises(ValueError, match="no frame that can be decoded, its 23 packets are damaged"):
            list(video.events())  # after four times two seconds, and fifteen


def test_the_sound_of_a_stream_ends_with_its_seconds(server):
    with opened(server, 0.4) as video:
        events = list(video.events())
    first = next(event.pts * video.time_base for event in events if isinstance(event, Frame))
    times = [event.packet.dts * event.packet.time_base - first for event in events if isinstance(event, Sound)]
    assert 0.3 < max(times) < 0.4


@pytest.mark.parametrize("rename", [True, False])
@pytest.mark.parametrize("name", playlists(""))
def test_a_file_that_names_others_opens_none(name, rename, checkpoint, server, tmp_path, capsys):
    for number, target in enumerate((address(server, "film.ts"), f"file:{tmp_path}/film.ts", f"{tmp_path}/film.ts")):
        path = tmp_path / (f"{number}{name}.mp4" if rename else f"{number}{name}")
        path.write_text(playlists(target)[name])
        assert run("predict", checkpoint, path, "-o", tmp_path / f"out{number}") == 1
        assert_one_line(capsys.readouterr().err, path.name)
        assert not list((tmp_path / f"out{number}").glob("*overlay*"))
    assert server.paths == []


@pytest.mark.parametrize("name", playlists(""))
def test_ffmpeg_may_open_no_other_file(name, server, tmp_path):
    for number, target in enumerate((address(server, "film.ts"), f"file:{tmp_path}/film.ts", "film.ts")):
        content = playlists(target)[name].encode()
        (tmp_path / f"{number}{name}").write_bytes(content)
        for file in (tmp_path / f"{number}{name}", BytesIO(content)):
            with pytest.raises(av.FFmpegError):
                open_file(file)
    assert server.paths == []


def test_ffmpeg_would_open_other_files_without_the_guard(server, tmp_path):
    path = tmp_path / "list.m3u8"
    path.write_text(playlists(f"{tmp_path}/film.ts")[path.name])
    with av.open(path) as container:
        assert len(list(container.decode(video=0))) == 20


def test_a_stream_is_no_playlist_and_leads_to_no_file(checkpoint, server, tmp_path, capsys):
    (tmp_path / "list.m3u8").write_text(playlists(address(server, "film.ts"))["list.m3u8"])
    for path in ("list.m3u8", "moved", "missing.mp4"):
        out = tmp_path / f"out-{path}"
        assert run("predict", checkpoint, "--stream", address(server, path), "--seconds", 1, "-o", out) == 1
        assert_one_line(capsys.readouterr().err, f"/{path} does not answer, or is no stream", "names no other address")
    assert "/film.ts" not in server.paths


def test_names_that_look_like_addresses_are_files(checkpoint, server, tmp_path, monkeypatch):
    """FFmpeg would take these names for protocols."""
    monkeypatch.chdir(tmp_path)
    film = write_video(tmp_path / "film.mp4", 2)
    film.rename(tmp_path / "concat:a|b.mp4")
    (tmp_path / "out:side").mkdir()
    assert run("predict", checkpoint, "concat:a|b.mp4", "-o", "out:side", "--frame-masks", "video") == 0
    assert len(read_video(tmp_path / "out:side" / "concat:a|b_overlay.mp4").frames) == 2


@pytest.mark.parametrize(
    "text", ["film.mp4", "file:///etc/passwd", "concat:a|b", "http:/x", "v4l2:", "lavfi:x", "-", ""]
)
def test_what_is_no_address_of_a_stream_is_refused(text, checkpoint, tmp_path, capsys):
    assert run("predict", checkpoint, f"--stream={text}", "--seconds", 1, "-o", tmp_path / "out") != 0
    assert_one_line(capsys.readouterr().err)


@pytest.mark.parametrize("text", ["rtsp://me:word@host/live", "https://host/a.mp4", "udp://@:1234", "v4l2:/dev/video0"])
def test_addresses_of_streams_and_cameras(text):
    check_stream(text)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://me:SECRET@host:554/live?token=SECRET", "rtsp://host:554/live"),
        ("rtsp://admin:p@SECRET@host/x", "rtsp://host/x"),
        ("rtsp://admin:pa/SECRET@host/x", "rtsp://host/x"),
        ("rtsp://admin:pa?SECRET@host/x", "rtsp://..."),
        ("https://host/x?mail=me@host&key=SECRET", "https://..."),
        ("rtsp:/admin:SECRET@host/x", "rtsp:/host/x"),
        ("host/x", "host/x"),
        ("dshow:video=Camera", "dshow:video=Camera"),
        ("dshow:video=@device_pnp_\\\\?\\usb", "dshow:video=@device_pnp_\\\\?\\usb"),
    ],
)
def test_an_address_in_public(address, shown):
    assert public_address(address) == shown


def test_a_stream_needs_its_end_and_is_alone(checkpoint, tmp_path, capsys):
    arguments = ["predict", checkpoint, "-o", tmp_path / "out", "--stream", "rtsp://host/live"]
    assert run(*arguments) == 2
    assert_one_line(capsys.readouterr().err, "--stream is given without --seconds S")
    assert run(*arguments, "--seconds", 3, tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "--stream is given with other images")
