"""`segformer predict` on videos: overlays, masks, sound, timestamps and shares, read by PyAV and pyarrow alone."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

import av
import pyarrow.parquet as parquet
from PIL import Image

from hf_segformer import InferenceOptions, SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.data.sources import FileSource
from hf_segformer.inference.batch import predict_batch
from hf_segformer.inference.writers import Outputs
from hf_segformer.video import segmentation
from hf_segformer.video.reader import VideoFile
from hf_segformer.visualization import overlay
from tests.inference.test_predictor import lively
from tests.support.commands import assert_one_line, run
from tests.support.videos import damage_packets, drawn_frames, read_video, write_video

NAMES = ("background", "road", "=tree")
VARIABLE = (1, 2, 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    lively(num_labels=3, id2label=dict(enumerate(NAMES))).save_pretrained(folder)
    SegFormerImageProcessor(do_resize=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("binary")
    lively(num_labels=1, id2label={0: "lesion"}).save_pretrained(folder)
    SegFormerImageProcessor(do_resize=False).save_pretrained(folder)
    return folder


@pytest.fixture
def film(tmp_path):
    return write_video(tmp_path / "film.mp4", 10, steps=VARIABLE, language="deu")


def files(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def line_of(out, name="film"):
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    [line] = [line for line in lines if line["name"] == name]
    return line


def predicted_as_images(checkpoint, frames, folder):
    """Masks that `predict` writes for frames that are PNG files."""
    (folder / "frames").mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / "frames" / f"{index:03d}.png")
    assert run("predict", checkpoint, folder / "frames", "-o", folder / "images") == 0
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "images").glob("*_mask.png"))])


def test_a_video_becomes_overlay_masks_and_shares(checkpoint, film, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("predict", checkpoint, film, "-o", out, "--frame-masks", "video", "--plot-shares") == 0
    printed = capsys.readouterr().out
    assert "film: 10 frames in 0.76 s, 12.5 a second (variable); 0 dropped, 0 damaged" in printed
    shared = ["predictions.jsonl", "settings.json", "summary.json"]
    results = ["film_mask.mkv", "film_overlay.mp4", "film_shares.csv", "film_shares.png"]
    assert files(out) == sorted(results + shared)

    source, drawn, masks = (
        read_video(film),
        read_video(out / "film_overlay.mp4"),
        read_video(out / "film_mask.mkv", "gray"),
    )
    assert drawn.codecs == ["h264", "aac"]
    assert masks.codecs == ["ffv1"]
    expected = predicted_as_images(checkpoint, source.frames, tmp_path)
    assert np.array_equal(masks.frames, expected)  # bit by bit
    assert len(np.unique(expected)) == 3
    assert drawn.times == source.times == [Fraction(n, 25) for n in (0, 1, 3, 6, 7, 9, 12, 13, 15, 18)]
    assert max(abs(a - b) for a, b in zip(masks.times, source.times, strict=True)) <= Fraction(1, 2000)
    assert drawn.sound == source.sound
    assert drawn.sound_times == source.sound_times
    assert len(source.sound) > 20

    palette = SegFormerPredictor.from_pretrained(checkpoint).palette
    for frame, mask, shown in zip(source.frames, expected, drawn.frames, strict=True):
        wanted = np.asarray(overlay(Image.fromarray(frame), mask, palette, alpha=0.5)).astype(int)
        assert abs(shown - wanted).mean() < 6  # chroma has half the resolution
        assert abs(shown.mean(axis=(0, 1)) - wanted.mean(axis=(0, 1))).max() < 3

    with (out / "film_shares.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["frame", "time_s", "background", "road", "'=tree"]
    assert [(int(row[0]), float(row[1])) for row in rows[1:]] == [
        (number, float(time)) for number, time in enumerate(source.times, 1)
    ]
    shares = np.stack([[(mask == label).mean() for label in range(3)] for mask in expected])
    assert np.allclose(np.array([row[2:] for row in rows[1:]], float), shares, atol=1e-6)
    pixels = {name: int((expected == label).sum()) for label, name in enumerate(NAMES)}
    line = line_of(out)
    assert line["pixels"] == pixels
    assert (line["height"], line["width"], line["frames"]) == (48, 64, 10)
    assert (line["frame_rate"], line["variable_frame_rate"]) == (12.5, True)
    with Image.open(out / "film_shares.png") as plot:
        assert plot.size == (900, 450)
        colors = {tuple(color) for color in np.asarray(plot.convert("RGB")).reshape(-1, 3).tolist()}
        assert set(palette) <= colors


def test_the_sound_keeps_its_language(checkpoint, film, tmp_path):
    assert run("predict", checkpoint, film, "-o", tmp_path / "out") == 0
    with av.open(tmp_path / "out" / "film_overlay.mp4") as container:
        assert container.streams.audio[0].language == "deu"
        context = container.streams.video[0].codec_context
        assert (context.pix_fmt, context.colorspace, context.color_range) == ("yuv420p", 1, 1)


def test_frames_in_parquet_are_the_frames_of_the_mask_video(checkpoint, film, tmp_path):
    for kind in ("video", "parquet"):
        arguments = ["-o", tmp_path / kind, "--frame-masks", kind, "--masks-as", "values"]
        assert run("predict", checkpoint, film, *arguments) == 0
    masks = read_video(tmp_path / "video" / "film_mask.mkv", "gray").frames
    table = parquet.read_table(tmp_path / "parquet" / "film_masks.parquet")
    rows = table.to_pylist()
    assert [row["frame"] for row in rows] == list(range(1, 11))
    assert rows[9]["name"] == "film_f000010"
    assert [row["time_s"] for row in rows] == [float(time) for time in read_video(film).times]
    for row, mask in zip(rows, masks, strict=True):
        found = np.asarray(Image.open(BytesIO(row["mask"])))
        assert np.array_equal(found, mask)
        assert row["pixels"] == np.bincount(mask.ravel(), minlength=3).tolist()
        assert (row["height"], row["width"], row["error"]) == (48, 64, None)
    assert json.loads(table.schema.metadata[b"names"]) == list(NAMES)


def smoothed_slowly(probabilities, alpha):
    """Exponential moving average, one pixel and class after the other, in float64."""
    state, found = probabilities[0].astype(np.float64), []
    for index, current in enumerate(probabilities):
        if index:
            for place in np.ndindex(state.shape):
                state[place] = alpha * float(current[place]) + (1 - alpha) * state[place]
        found.append(state.copy())
    return np.stack(found)


@pytest.mark.parametrize("kind", ["classes", "binary"])
def test_smoothing_equals_a_slow_reference(kind, checkpoint, binary, tmp_path):
    model = checkpoint if kind == "classes" else binary
    film = write_video(tmp_path / "film.mkv", drawn_frames(5, 32, 32), sound=False)
    options = ["--frame-masks", "video", "--smoothing", 0.3]
    options += ["--threshold", 0.45, "--masks-as", "255"] if kind == "binary" else []
    assert run("predict", model, film, "-o", tmp_path / "out", *options) == 0
    found = read_video(tmp_path / "out" / "film_mask.mkv", "gray").frames
    frames = [Image.fromarray(frame) for frame in read_video(film).frames]
    predictor = SegFormerPredictor.from_pretrained(model)
    expected = list(predictor(frames, with_probabilities=True))
    smooth = smoothed_slowly([each.probabilities for each in expected], 0.3)
    if kind == "binary":
        wanted, margin = 255 * (smooth[:, 1] > 0.45), abs(smooth[:, 1] - 0.45)
    else:
        ordered = np.sort(smooth, axis=1)
        wanted, margin = smooth.argmax(axis=1), ordered[:, -1] - ordered[:, -2]
    assert (margin > 1e-5).mean() > 0.99
    assert np.array_equal(found[margin > 1e-5], wanted[margin > 1e-5])
    plain = np.stack([each.segmentation for each in expected])
    assert (found[1:] != (255 * plain if kind == "binary" else plain)[1:]).any()  # it has an effect
    assert line_of(tmp_path / "out")["frames"] == 5


@pytest.mark.parametrize(("suffix", "container"), [(".mkv", "mkv"), (".mov", "mov"), (".webm", "mkv"), (".avi", "mp4")])
def test_sound_and_times_survive_in_every_container(suffix, container, checkpoint, tmp_path):
    film = write_video(tmp_path / f"film{suffix}", 5, steps=(1,) if suffix == ".avi" else VARIABLE)
    assert run("predict", checkpoint, film, "-o", tmp_path / "out", "--overlay-as", container) == 0
    source, drawn = read_video(film), read_video(tmp_path / "out" / f"film_overlay.{container}")
    assert drawn.times == source.times
    assert b"".join(drawn.sound) == b"".join(source.sound)
    if suffix == ".avi":  # samples without packets of their own
        return
    assert drawn.sound == source.sound
    assert max(abs(a - b) for a, b in zip(drawn.sound_times, source.sound_times, strict=True)) <= Fraction(1, 1000)


def test_a_container_without_the_kind_of_sound_is_said_in_one_line(checkpoint, tmp_path, capsys):
    film = write_video(tmp_path / "film.webm", 3)
    assert run("predict", checkpoint, film, "-o", tmp_path / "out", "--overlay-as", "mov") == 1
    assert_one_line(capsys.readouterr().err.splitlines(keepends=True)[-1], "opus", "--overlay-as mkv")
    assert files(tmp_path / "out") == ["predictions.jsonl", "settings.json", "summary.json"]


def test_an_odd_size_is_widened_in_the_overlay_alone(checkpoint, tmp_path):
    film = write_video(tmp_path / "film.mkv", drawn_frames(2, 35, 47), sound=False)
    assert run("predict", checkpoint, film, "-o", tmp_path / "out", "--frame-masks", "video") == 0
    assert read_video(tmp_path / "out" / "film_overlay.mp4").frames.shape == (2, 36, 48, 3)
    assert read_video(tmp_path / "out" / "film_mask.mkv", "gray").frames.shape == (2, 35, 47)


def test_a_grey_model_and_chosen_bands(tmp_path):
    lively(num_labels=2, num_channels=1).save_pretrained(tmp_path / "model")
    processor = SegFormerImageProcessor(do_resize=False, image_mean=[0.5], image_std=[0.25])
    processor.save_pretrained(tmp_path / "model")
    film = write_video(tmp_path / "film.mkv", 3, sound=False)
    frames = read_video(film).frames
    predictor = SegFormerPredictor.from_pretrained(tmp_path / "model")
    for name, bands, images in (
        ("grey", [], list(read_video(film, "gray").frames)),
        ("bands", ["--bands", 2], list(frames[..., 1])),
    ):
        out = tmp_path / name
        assert run("predict", tmp_path / "model", film, "-o", out, "--frame-masks", "video", *bands) == 0
        expected = np.stack([each.segmentation for each in predictor([Image.fromarray(each) for each in images])])
        assert np.array_equal(read_video(out / "film_mask.mkv", "gray").frames, expected)


def test_frames_that_cannot_be_decoded_are_counted(checkpoint, tmp_path, capfd):
    film = write_video(tmp_path / "film.mp4", 12, options={"bf": "0", "g": "4"})
    damage_packets(film, (5, 9))
    assert run("predict", checkpoint, film, "-o", tmp_path / "out") == 0
    line, printed = line_of(tmp_path / "out"), capfd.readouterr()
    assert line["frames"] + line["dropped"] == 12
    assert line["dropped"] + line["damaged"] == 2
    assert f"{line['dropped']} dropped, {line['damaged']} damaged" in printed.out
    assert len(read_video(tmp_path / "out" / "film_overlay.mp4").frames) == line["frames"]


def test_joined_recordings_lose_only_the_sound_whose_time_does_not_follow(checkpoint, tmp_path, caplog):
    content = write_video(tmp_path / "part.ts", 5).read_bytes()
    (tmp_path / "film.ts").write_bytes(2 * content)
    assert run("predict", checkpoint, tmp_path / "film.ts", "-o", tmp_path / "out") == 0
    line, part = line_of(tmp_path / "out"), read_video(tmp_path / "part.ts")
    drawn = read_video(tmp_path / "out" / "film_overlay.mp4")
    assert line["frames"] == len(drawn.frames) == 10
    assert drawn.sound == [packet[7:] for packet in part.sound]  # without the header of a transport stream
    assert line["sound_dropped"] == len(part.sound)
    assert f"{len(part.sound)} packets of sound are missing, whose time does not follow" in caplog.text


def test_a_run_is_resumed_and_one_bad_video_stops_no_other(checkpoint, tmp_path, capsys):
    folder, out = tmp_path / "films", tmp_path / "out"
    folder.mkdir()
    write_video(folder / "a.mp4", 3)
    write_video(folder / "b.mp4", 3)
    (folder / "bad.mp4").write_bytes((folder / "a.mp4").read_bytes()[:900])
    Image.fromarray(drawn_frames(1)[0]).save(folder / "photo.png")
    assert run("predict", checkpoint, folder, "-o", out) == 1
    captured = capsys.readouterr()
    assert "3 images predicted" in captured.out
    assert_one_line(captured.err, "1 image could not be predicted", "bad.mp4 is cut short")
    assert (out / "photo_mask.png").exists()
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*_overlay.mp4")}
    (out / "b_overlay.mp4").unlink()
    (folder / "bad.mp4").unlink()
    assert run("predict", checkpoint, folder, "-o", out) == 0
    assert "2 of them by earlier runs" in capsys.readouterr().out
    assert [stamp == (out / name).stat().st_mtime_ns for name, stamp in sorted(stamps.items())] == [True, False]
    assert run("predict", checkpoint, folder, "-o", out, "--smoothing", 0.5) == 1
    assert "choose another output folder" in capsys.readouterr().err


def test_an_interrupted_run_leaves_no_part_of_a_video(checkpoint, film, tmp_path, monkeypatch):
    add = segmentation._Clock.add

    def stop(clock, frame):
        if frame.number == 6:
            raise KeyboardInterrupt
        add(clock, frame)

    monkeypatch.setattr(segmentation._Clock, "add", stop)
    arguments = ("predict", checkpoint, film, "-o", tmp_path / "out", "--frame-masks", "parquet", "--plot-shares")
    assert run(*arguments) == 130
    assert files(tmp_path / "out") == ["settings.json"]
    monkeypatch.undo()
    assert run(*arguments) == 0
    assert len(read_video(tmp_path / "out" / "film_overlay.mp4").frames) == 10


def test_memory_holds_two_batches_of_frames(checkpoint, tmp_path, monkeypatch):
    ahead = [0]
    events, add = VideoFile.events, segmentation._Clock.add

    def count(video):
        for event in events(video):
            ahead[0] += isinstance(event, tuple) and hasattr(event, "image")
            most.append(ahead[0])
            yield event

    def done(clock, frame):
        add(clock, frame)
        ahead[0] -= 1

    most = []
    monkeypatch.setattr(VideoFile, "events", count)
    monkeypatch.setattr(segmentation._Clock, "add", done)
    film = write_video(tmp_path / "film.mkv", drawn_frames(40, 32, 32), sound=False)
    assert run("predict", checkpoint, film, "-o", tmp_path / "out", "--batch-size", 3) == 0
    assert max(most) == 2 * 3
    assert len(most) == 40


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--format", "parquet"), "--format parquet is given with"),
        (("--engine", "ray"), "--engine ray"),
        (("--pages",), "its frames are predicted as one video"),
        (("--overlay", "--legend", "below"), "--legend below is given with"),
        (("--probabilities", "uint8"), "--probabilities uint8 is given with"),
        (("--value-range", "window"), "--value-range window is given with"),
        (("--axis", 1), "--axis is given with"),
        (("--mosaic",), "--mosaic is given with"),
        (("--tile-size", 512), "film.mp4, a video, whose frames are not cut into tiles; leave it out"),
        (("--tile-overlap", 64), "--tile-overlap is given with"),
        (("--confidence",), "--confidence is given with"),
        (("--smoothing", 1), "--smoothing is 1.0; expected a number above 0 and below 1"),
        (("--smoothing", "nan"), "--smoothing is nan; expected a number above 0 and below 1"),
        (("--seconds", 3), "--seconds is given without --stream ADDRESS"),
        (("--masks-as", "255", "--frame-masks", "video"), "masks_as is '255' for a model of 3 classes"),
    ],
)
def test_options_that_a_video_does_not_have_are_refused_by_name(options, reason, checkpoint, film, tmp_path, capsys):
    assert run("predict", checkpoint, film, "-o", tmp_path / "out", *options) in (1, 2)
    assert_one_line(capsys.readouterr().err, reason)


def test_tiles_are_for_images_beside_videos(checkpoint, film, tmp_path, capsys):
    Image.fromarray(drawn_frames(1)[0]).save(tmp_path / "photo.png")
    assert run("predict", checkpoint, film, tmp_path / "photo.png", "-o", tmp_path / "out", "--tile-size", 512) == 0
    stream = ["--stream", "rtsp://host/live", "--seconds", 1]
    capsys.readouterr()
    assert run("predict", checkpoint, *stream, "-o", tmp_path / "b", "--tile-size", 512) == 2
    assert_one_line(capsys.readouterr().err, "--tile-size is given with --stream, a video")


@pytest.mark.parametrize("shown", [True, False])
def test_progress_of_a_video_is_that_of_the_job(shown, checkpoint, film, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_segformer.progress._SECONDS", 0.0)
    predictor, source = SegFormerPredictor.from_pretrained(checkpoint), FileSource([str(film)], tmp_path / "out")
    predict_batch(predictor, source, tmp_path / "out", Outputs("video"), progress=shown)
    assert ("film.mp4: 10 of 10 frames" in capsys.readouterr().err) is shown


def test_an_unknown_number_of_frames_is_not_shown(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_segformer.progress._SECONDS", 0.0)
    film = write_video(tmp_path / "film.mkv", 3)  # which states none
    assert run("predict", checkpoint, film, "-o", tmp_path / "out") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "film.mkv" in line]
    assert [re.sub(r"[0-9.]+ frames/s", "N frames/s", line.rpartition("film.mkv")[2]) for line in lines] == [
        f": {number} frames, N frames/s" for number in (1, 2, 3)
    ]


def test_options_of_videos_are_refused_without_one(checkpoint, tmp_path, capsys):
    Image.fromarray(drawn_frames(1)[0]).save(tmp_path / "photo.png")
    assert run("predict", checkpoint, tmp_path / "photo.png", "-o", tmp_path / "out", "--smoothing", 0.5) == 1
    assert_one_line(capsys.readouterr().err, "--smoothing is given without a video among the inputs")


def test_other_options_of_predict_work_on_videos(checkpoint, tmp_path):
    film = write_video(tmp_path / "film.mkv", 2, sound=False)
    options = ["--flip", "--scales", 0.5, 1, "--value-range=10,200", "--overlay", "--clear", "background"]
    assert run("predict", checkpoint, film, "-o", tmp_path / "out", "--frame-masks", "video", *options) == 0
    source, options_of = read_video(film).frames, InferenceOptions(flip=True, scales=[0.5, 1.0])
    predictor = SegFormerPredictor.from_pretrained(checkpoint, options=options_of)
    predictor.processor.value_range = [10, 200]
    expected = np.stack([each.segmentation for each in predictor([Image.fromarray(frame) for frame in source])])
    assert np.array_equal(read_video(tmp_path / "out" / "film_mask.mkv", "gray").frames, expected)
    shown = read_video(tmp_path / "out" / "film_overlay.mp4").frames
    clear = expected == 0
    assert abs(shown[clear].astype(int) - source[clear]).mean() < 12


def test_without_the_extra_videos_are_refused_in_one_line_and_images_predicted(
    checkpoint, film, tmp_path, capsys, monkeypatch
):
    Image.fromarray(drawn_frames(1)[0]).save(tmp_path / "photo.png")
    for name in [name for name in sys.modules if name.partition(".")[0] == "av"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "av", None)
    assert run("predict", checkpoint, film, tmp_path / "photo.png", "-o", tmp_path / "out") == 1
    assert_one_line(capsys.readouterr().err, "film.mp4 is a video, which needs av: pip install 'hf-segformer[video]'")
    assert (tmp_path / "out" / "photo_mask.png").exists()


def test_without_matplotlib_a_plot_is_refused_before_the_work(checkpoint, film, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("predict", checkpoint, film, "-o", tmp_path / "out", "--plot-shares") == 1
    assert_one_line(capsys.readouterr().err, "pip install 'hf-segformer[plots]'")
    assert not list((tmp_path / "out").glob("film*"))


def test_other_commands_refuse_a_video_in_one_line(checkpoint, tmp_path, capsys):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    film = write_video(tmp_path / "images" / "film.mp4", 3)
    shutil.copy(film, tmp_path / "masks")
    assert run("evaluate", checkpoint, "--images", tmp_path / "images", "--masks", tmp_path / "masks") == 1
    assert_one_line(capsys.readouterr().err, "film.mp4 is a video, which segformer predict takes")
    assert run("train", tmp_path / "images", "--dry-run") != 0
    error = capsys.readouterr().err.splitlines()[-1]
    assert "film.mp4 is a video, which segformer predict takes" in error
    assert run("inspect", checkpoint, film, "-o", tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, "film.mp4 is a video, which segformer predict takes")
    suffixes = ("--image-suffix", ".mp4", "--mask-suffix", ".mp4")
    assert run("evaluate", checkpoint, "--images", tmp_path / "images", "--masks", tmp_path / "masks", *suffixes) == 1
    assert_one_line(capsys.readouterr().err, "film.mp4 is a video; expected an image", "frames/%06d.png")


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="ffprobe is not installed")
def test_ffprobe_agrees(checkpoint, film, tmp_path):
    assert run("predict", checkpoint, film, "-o", tmp_path / "out") == 0
    command = ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-of", "json"]
    printed = subprocess.run([*command, tmp_path / "out/film_overlay.mp4"], capture_output=True, check=True).stdout
    video, sound = json.loads(printed)["streams"]
    assert (video["codec_name"], video["nb_read_frames"], sound["codec_name"]) == ("h264", "10", "aac")


def test_the_commands_of_the_guide_run(checkpoint, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/guides/video.md").read_text()
    commands = re.findall(r"^segformer (predict [^#\n]*)", page, re.MULTILINE)
    assert len(commands) >= 5
    monkeypatch.chdir(tmp_path)
    write_video(Path("film.mp4"), 3)
    Path("films").mkdir()
    write_video(Path("films/other.mkv"), 3)
    for number, command in enumerate(commands):
        words = [{"MODEL": str(checkpoint), "results": f"out{number}"}.get(word, word) for word in shlex.split(command)]
        if "--stream" not in words:  # tests/video/test_streams.py opens one
            assert run(*words) == 0, command
    assert Path("out0/film_overlay.mp4").exists()
