"""The labelling job: whole files or none, nothing twice, no two runs mixed, shared out over processes."""

import errno
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer import SegFormerForSemanticSegmentation, SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.cli.main import main
from hf_segformer.config import InferenceOptions
from hf_segformer.data.sources import DatasetSource, FileSource, InputItem, find_inputs
from hf_segformer.inference.batch import predict_batch
from hf_segformer.inference.segmenter import predict
from hf_segformer.inference.writers import PngWriter, segmentation_to_png
from hf_segformer.visualization import default_palette
from tests.inference.test_predictor import lively, picture

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
BAD = "cut.png"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    lively().save_pretrained(folder)
    SegFormerImageProcessor(do_resize=False).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Five pictures of two sizes, one of them in a folder below."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for index in range(4):
        picture(*[(40, 60), (50, 36)][index % 2], seed=index).save(folder / f"{index}.png")
    picture(40, 60, seed=9).save(folder / "below" / "0.png")
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def run(*arguments):
    return main(["predict", *(str(argument) for argument in arguments)])


def files(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def label_files(out):
    return sorted(out.rglob("*_labels.png"))


def pixels(source):
    with Image.open(source) as image:
        return np.asarray(image)


def stamps(out):
    return {path: path.stat().st_mtime_ns for path in label_files(out)}


def assert_labels_of_evaluation(checkpoint, pictures, out, options=None):
    predictor = SegFormerPredictor.from_pretrained(checkpoint)
    for path in label_files(out):
        source = pictures / path.relative_to(out).with_name(path.name.replace("_labels", ""))
        with Image.open(path) as labels, Image.open(source) as image:
            assert labels.mode == "P"
            assert labels.size == image.size
            size = (image.height, image.width)
            expected = predict(predictor.model, predictor.processor, image.copy(), size, options).numpy()
            assert (np.asarray(labels) != expected).mean() < 1e-3, source  # rounding differs in batches


def summed(out):
    """summary.json, after a look at it by the label maps themselves."""
    summary = json.loads((out / "summary.json").read_text())
    counts = sum(np.bincount(pixels(path).ravel(), minlength=5) for path in label_files(out))
    assert [each["pixels"] for each in summary["classes"]] == counts.tolist()
    assert summary["pictures"] == len(label_files(out))
    np.testing.assert_allclose([each["share"] for each in summary["classes"]], counts / counts.sum(), atol=1e-6)
    lines = [json.loads(line) for line in (out / "pictures.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == [
        path.relative_to(out).as_posix().removesuffix("_labels.png") for path in label_files(out)
    ]
    assert all(sum(line["pixels"].values()) == line["height"] * line["width"] for line in lines)
    return summary


def test_a_folder_becomes_label_maps_of_the_same_tree(checkpoint, pictures, out, capsys):
    (pictures / "notes.txt").write_text("no picture")
    (pictures / ".hidden.png").write_text("no picture either")
    assert run(checkpoint, pictures, "--out", out) == 0
    names = ["0", "1", "2", "3", "below/0"]
    expected = [f"{name}_labels.png" for name in names]
    assert files(out) == sorted([*expected, "pictures.jsonl", "settings.json", "summary.json"])
    assert_labels_of_evaluation(checkpoint, pictures, out)
    assert summed(out)["failed"] == []
    assert "5 pictures labelled" in capsys.readouterr().out


def test_overlay_legend_and_probabilities(checkpoint, pictures, out):
    assert run(checkpoint, pictures / "0.png", "--out", out, "--overlay", "--probabilities", "uint8") == 0
    assert pixels(out / "0_overlay.png").shape == (40, 60, 3)
    scores = np.load(out / "0_probabilities.npy")
    assert (scores.shape, scores.dtype) == ((5, 40, 60), np.uint8)
    assert abs(scores.sum(axis=0, dtype=int) - 255).max() <= 3
    arguments = ["--overlay", "--legend", "right", "--probabilities", "float16", "--flip", "--scales", 1, 1.5]
    assert run(checkpoint, pictures / "0.png", "--out", out / "2", *arguments) == 0
    assert pixels(out / "2" / "0_overlay.png").shape[1] > 60
    scores = np.load(out / "2" / "0_probabilities.npy").astype(np.float32)
    assert scores.shape == (5, 40, 60)
    np.testing.assert_allclose(scores.sum(axis=0), 1, atol=1e-2)
    assert_labels_of_evaluation(checkpoint, pictures, out / "2", InferenceOptions(flip=True, scales=[1.0, 1.5]))


def test_label_pictures_hold_classes_up_to_any_number():
    labels = np.array([[0, 4, 255]], dtype=np.uint8)
    picture = segmentation_to_png(labels, default_palette(5))
    assert picture.mode == "P"
    assert picture.getpalette()[:3] == list(default_palette(1)[0])
    assert np.array_equal(np.asarray(picture), labels)
    wide = segmentation_to_png(np.array([[0, 299]], dtype=np.uint16), default_palette(300))
    assert (wide.mode, np.asarray(wide).tolist()) == ("I;16", [[0, 299]])


def test_a_label_map_with_255_survives_the_file(tmp_path):
    segmentation_to_png(np.array([[0, 255, 4]], dtype=np.uint8), default_palette(5)).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[0, 255, 4]]


def test_pictures_are_kept_for_overlays_alone(checkpoint, pictures, out, monkeypatch):
    own, kept = PngWriter.write, []

    def write(self, name, origin, prepared, prediction):
        kept.append(prepared.picture)
        own(self, name, origin, prepared, prediction)

    monkeypatch.setattr(PngWriter, "write", write)
    assert run(checkpoint, pictures / "0.png", "--out", out) == 0
    assert run(checkpoint, pictures / "0.png", "--out", out / "2", "--overlay") == 0
    assert kept[0] is None
    assert kept[1].size == (60, 40)


def test_bad_files_are_told_at_the_end_and_stop_nothing(checkpoint, pictures, out, capsys):
    content = (pictures / "2.png").read_bytes()
    (pictures / BAD).write_bytes(content[: len(content) // 2])
    (pictures / "empty.jpg").touch()
    for before in ("", ", 5 of them before"):
        assert run(checkpoint, pictures, "--out", out) == 1
        told = capsys.readouterr()
        assert told.out == f"5 pictures labelled in {out}{before}\n"
        error = told.err.splitlines()[-1]
        assert error.startswith("segformer: 2 pictures could not be labelled: ")
        assert str(pictures / BAD) in error
        assert str(pictures / "empty.jpg") in error
    assert {each["name"] for each in summed(out)["failed"]} == {"cut", "empty"}
    (pictures / BAD).write_bytes(content)
    (pictures / "empty.jpg").unlink()
    assert run(checkpoint, pictures, "--out", out) == 0
    assert summed(out)["failed"] == []
    assert len(label_files(out)) == 6


def test_no_damaged_raster_and_no_refused_file_stops_the_others(checkpoint, pictures, out, capsys, monkeypatch):
    whole = io.BytesIO()
    picture(40, 60).save(whole, "JPEG2000")
    for name, content in {
        "empty.jp2": b"",
        "cut.jp2": whole.getvalue()[:90],
        "half.tif": b"II*\0\x08\0\0\0\xff\xff",
    }.items():
        (pictures / name).write_bytes(content)
    for name in ("secret.png", "secret_too.tif"):
        picture(40, 60).save(pictures / name)

    def refuse(path, *arguments, own=open, **others):
        if "secret" in str(path) and str(pictures) in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return own(path, *arguments, **others)

    monkeypatch.setattr("builtins.open", refuse)  # tests may be run by one whom no file refuses
    monkeypatch.setattr("io.open", refuse)
    assert run(checkpoint, pictures, "--out", out) == 1
    monkeypatch.undo()
    assert len(label_files(out)) == 5
    told = {each["name"]: each["error"] for each in json.loads((out / "summary.json").read_text())["failed"]}
    assert sorted(told) == ["cut", "empty", "half", "secret", "secret_too"]
    assert told["secret"] == f"{pictures / 'secret.png'}: Permission denied"
    assert told["secret_too"] == f"{pictures / 'secret_too.tif'}: Permission denied"
    assert "5 pictures labelled" in capsys.readouterr().out


def test_names_of_any_bytes_and_of_any_length(checkpoint, pictures, out, capfd):
    odd, long = os.fsdecode(b"caf\xe9"), "x" * 240  # room for .png, none for _labels.png
    try:
        picture(40, 60).save(pictures / f"{odd}.png")
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    picture(40, 60).save(pictures / f"{long}.png")
    (pictures / f"{odd}_too.png").write_text("no picture")
    for before in ("", ", 6 of them before"):
        assert run(checkpoint, pictures, "--out", out) == 1
        assert capfd.readouterr().out == f"6 pictures labelled in {out}{before}\n"
        failed = {each["name"]: each["error"] for each in json.loads((out / "summary.json").read_text())["failed"]}
        assert failed.keys() == {long, f"{odd}_too"}
        assert failed[long] == f"{pictures / long}.png: File name too long"
    assert (out / f"{odd}_labels.png").exists()
    assert run(checkpoint, pictures, "--out", out / "2", "--format", "parquet") == 1
    assert "caf\\udce9" in [row["name"] for row in rows_of(out / "2")]


def test_the_message_counts_what_was_there_before(checkpoint, pictures, out, capsys):
    assert run(checkpoint, pictures / "0.png", "--out", out) == 0
    assert run(checkpoint, pictures / "1.png", "--out", out) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"2 pictures labelled in {out}, 1 of them before"
    (pictures / BAD).write_text("no picture")
    for before in ("", ", 5 of them before"):
        assert run(checkpoint, pictures, "--out", out / "2", "--format", "parquet") == 1
        assert capsys.readouterr().out == f"5 pictures labelled in {out / '2'}{before}\n"


def test_a_second_run_does_only_what_is_missing(checkpoint, pictures, out):
    assert run(checkpoint, pictures, "--out", out) == 0
    before, summary = stamps(out), (out / "summary.json").read_text()
    (out / "1_labels.png").unlink()
    assert run(checkpoint, pictures, "--out", out) == 0
    after = stamps(out)
    assert {path.name for path in before if before[path] != after[path]} == {"1_labels.png"}
    assert (out / "summary.json").read_text() == summary
    picture(40, 60, seed=5).save(pictures / "new.png")
    assert run(checkpoint, pictures, "--out", out) == 0
    assert {path: stamp for path, stamp in stamps(out).items() if path.name != "new_labels.png"} == after
    summed(out)


def test_a_line_that_a_killed_process_left_incomplete_is_passed_over(checkpoint, pictures, out):
    assert run(checkpoint, pictures, "--out", out) == 0
    lines = (out / "pictures.jsonl").read_text().splitlines(keepends=True)
    (out / "pictures.jsonl").write_text("".join(lines[:3]))
    (out / ".pictures.jsonl.00000").write_text(lines[2] + lines[3] + lines[4][:20])
    before = stamps(out)
    assert run(checkpoint, pictures, "--out", out) == 0
    assert sum(before[path] != stamp for path, stamp in stamps(out).items()) == 1
    summed(out)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--flip"], "flip False"),
        (["--scales", 2], "scales"),
        (["--half"], "dtype float32"),
        (["--overlay"], "overlay False"),
    ],
)
def test_other_options_are_not_mixed_with_earlier_results(checkpoint, pictures, out, arguments, word, capsys):
    assert run(checkpoint, pictures, "--out", out) == 0
    before = stamps(out)
    assert run(checkpoint, pictures, "--out", out, *arguments) == 1
    assert f"{out} was made with {word}" in capsys.readouterr().err
    assert stamps(out) == before


def test_another_model_is_not_mixed_with_earlier_results(checkpoint, pictures, out, tmp_path, capsys):
    assert run(checkpoint, pictures, "--out", out) == 0
    model = lively()
    with torch.no_grad():
        model.decode_head.classifier.bias[0] += 1
    model.save_pretrained(tmp_path / "other")
    SegFormerImageProcessor(do_resize=False).save_pretrained(tmp_path / "other")
    assert run(tmp_path / "other", pictures, "--out", out) == 1
    assert f"{out} was made with other weights" in capsys.readouterr().err
    (out / "settings.json").unlink()
    assert run(checkpoint, pictures, "--out", out) == 1
    assert "no settings.json" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_a_picture_of_the_same_name_from_elsewhere_is_not_taken_for_done(
    checkpoint, pictures, out, tmp_path, kind, capsys
):
    assert run(checkpoint, pictures / "below", "--out", out, "--format", kind) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "others").mkdir()
    picture(40, 60, seed=7).save(tmp_path / "others" / "0.png")
    assert run(checkpoint, tmp_path / "others", "--out", out, "--format", kind) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"segformer: {out} ")
    assert kind == "parquet" or (
        str(pictures / "below" / "0.png") in error and str(tmp_path / "others" / "0.png") in error
    )
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_the_rows_of_another_split_are_not_taken_for_done(checkpoint, out, tmp_path, capsys):
    import datasets

    splits = {
        name: datasets.Dataset.from_dict({"image": [picture(40, 60, seed=seed)]}) for seed, name in enumerate("ab")
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "data"))
    assert run(checkpoint, "--dataset", tmp_path / "data", "--split", "a", "--out", out) == 0
    assert run(checkpoint, "--dataset", tmp_path / "data", "--split", "b", "--out", out) == 1
    assert "holds the labels of row 0, column image, split a of" in capsys.readouterr().err
    assert run(checkpoint, "--dataset", tmp_path / "data", "--split", "a", "--out", out) == 0


def test_bad_rows_are_named_and_stop_nothing(checkpoint, pictures, out, tmp_path, capsys):
    import datasets

    whole, data = (pictures / "0.png").read_bytes(), tmp_path / "data"
    rows = [{"bytes": held, "path": None} for held in (whole, whole[:-99], b"no picture", b"II*\0" + bytes(99))]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": [*rows, None, rows[0]]}, features=features)
    datasets.DatasetDict({"train": rows.cast_column("image", datasets.Image())}).save_to_disk(str(data))
    assert run(checkpoint, "--dataset", data, "--out", out) == 1
    told = [each["error"] for each in json.loads((out / "summary.json").read_text())["failed"]]
    assert [error.split(" of ")[0] for error in told] == ["row 1", "row 2", "row 3", "row 4"]
    assert all("BytesIO" not in error for error in told)
    assert len(label_files(out)) == 2
    assert "4 pictures could not be labelled" in capsys.readouterr().err


def test_a_data_set_that_can_not_be_read_is_one_line(checkpoint, out, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.parquet").write_text("no parquet")
    assert run(checkpoint, "--dataset", tmp_path / "broken", "--out", out) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"segformer: {tmp_path / 'broken'} is not read: ")


def test_a_full_disk_is_one_line_and_what_was_finished_stays(checkpoint, pictures, out, capsys, monkeypatch):
    own, written = PngWriter.write, []

    def write(self, name, *arguments):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{name}_labels.png")
        written.append(name)
        own(self, name, *arguments)

    monkeypatch.setattr("hf_segformer.inference.batch._NUM_WRITERS", 1)
    monkeypatch.setattr(PngWriter, "write", write)
    assert run(checkpoint, pictures, "--out", out) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("segformer: ")
    assert "No space left on device" in error
    assert len(label_files(out)) == 2
    before = stamps(out)
    monkeypatch.undo()
    assert run(checkpoint, pictures, "--out", out) == 0
    assert before.items() <= stamps(out).items()
    summed(out)


@pytest.mark.parametrize("arguments", [[], ["--overlay"], ["--probabilities", "uint8"], ["--format", "parquet"]])
def test_what_can_not_be_written_is_named(checkpoint, pictures, out, capsys, arguments):
    picture(200, 300).save(pictures / "0.png")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert run(checkpoint, pictures / "1.png", "--out", out) == 0  # all modules are read, and may have been written
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
        assert run(checkpoint, pictures / "0.png", "--out", out / "2", *arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"segformer: {out / '2'}")
    assert "File too large" in error
    assert files(out / "2") == ["settings.json"]


def test_a_file_that_fails_half_way_leaves_nothing(checkpoint, pictures, out, monkeypatch):
    def fail(self, file, *_):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Image.Image, "save", fail)
    assert run(checkpoint, pictures, "--out", out) == 1
    assert [name for name in files(out) if name != "settings.json"] == []


def test_ctrl_c_can_be_resumed(checkpoint, pictures, out, monkeypatch, capsys):
    own = SegFormerPredictor.predict

    def interrupt(self, batch, **others):
        if (out / "0_labels.png").exists():
            raise KeyboardInterrupt
        return own(self, batch, **others)

    monkeypatch.setattr(SegFormerPredictor, "predict", interrupt)
    assert run(checkpoint, pictures, "--out", out, "--batch-size", 1) == 130
    assert "interrupted" in capsys.readouterr().err
    before = stamps(out)
    assert 0 < len(before) < 5
    monkeypatch.undo()
    assert run(checkpoint, pictures, "--out", out) == 0
    assert before.items() <= stamps(out).items()
    summed(out)


def test_inputs_of_every_kind_keep_folders_in_their_names(pictures, tmp_path, out, monkeypatch):
    def names(*inputs):
        return [item.name for item in find_inputs([str(each) for each in inputs], out)]

    assert names(pictures) == ["0", "1", "2", "3", "below/0"]
    assert names(pictures / "1.png", pictures / "0.png") == ["0", "1"]
    assert names(pictures / "*.png") == ["0", "1", "2", "3"]
    assert names(pictures / "**" / "0.png") == ["0", "below/0"]
    monkeypatch.chdir(pictures)
    (tmp_path / "list.txt").write_text(f"below/0.png\n\n{pictures / '3.png'}\n")
    assert names(f"@{tmp_path / 'list.txt'}") == ["3", "below/0"]
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfbelow/0.png\r\ncaf\xe9.png\n")
    assert names(f"@{tmp_path / 'list.txt'}") == ["below/0", os.fsdecode(b"caf\xe9")]
    picture(40, 60).save(pictures / "a[1].png")
    assert "a[1]" in names(pictures / "a[1].png")


def test_results_below_the_pictures_are_not_labelled_again(checkpoint, pictures):
    for _ in range(2):
        assert run(checkpoint, pictures, "--out", pictures / "below" / "labels") == 0
    assert len(label_files(pictures / "below" / "labels")) == 5


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["none"], "no such file, folder or pattern: none"),
        (["no*ne"], "no*ne holds no pictures"),
        (["empty"], "empty holds no pictures"),
        (["out/*.png"], "or only such as were given already or lie in out"),
        (["pictures", "twins"], "would both be filed as 0"),
        (["pictures/0.png", "pictures/below/0.png"], "would both be filed as 0"),
        (["@none.txt"], "none.txt"),
        (["@pictures/0.png"], "pictures/0.png must be a text file"),
        (["out"], "out is the folder of the pictures"),
        ([], "give pictures"),
        (["pictures", "--dataset", "pictures"], "one of the two"),
        (["pictures", "--batch-size", "0"], "batch_size is 0"),
        (["pictures", "--window", "7"], "--window is 7"),
        (["pictures", "--stride", "64"], "--stride is 64, but it is the step of a window"),
        (["pictures", "--legend", "right"], "only an overlay has a legend"),
        (["pictures", "--format", "parquet", "--overlay"], "label maps alone"),
        (["pictures", "--device", "toaster"], "device is 'toaster'"),
        (["--dataset", "pictures", "--split", "test"], "has no split 'test': there are train"),
        (["--dataset", "pictures", "--column", "photo"], "has no column 'photo': there are image"),
    ],
)
def test_wrong_inputs_are_one_line_before_anything_is_written(
    checkpoint, pictures, out, inputs, words, monkeypatch, capsys
):
    monkeypatch.chdir(pictures.parent)
    for name in ("empty", "twins", "out"):
        (pictures.parent / name).mkdir()
    picture(40, 60).save("twins/0.jpg")
    assert run(checkpoint, *inputs, "--out", "out") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("segformer: ")
    assert words in error
    assert files(out) == []


def test_a_folder_that_can_not_be_written_is_one_line(checkpoint, pictures, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(checkpoint, pictures, "--out", tmp_path / "file") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("segformer: ")


def rows_of(folder):
    import pyarrow.parquet as parquet

    return [row for path in sorted(folder.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]


def test_parquet_shards_hold_the_same_labels(checkpoint, pictures, out, tmp_path, monkeypatch, capsys):
    from io import BytesIO

    (pictures / BAD).write_text("no picture")
    assert run(checkpoint, pictures, "--out", tmp_path / "png") == 1
    monkeypatch.setattr("hf_segformer.inference.batch._SHARD_SIZE", 2)
    assert run(checkpoint, pictures, "--out", out, "--format", "parquet") == 1
    assert BAD in capsys.readouterr().err
    rows = rows_of(out)
    assert [row["name"] for row in rows] == ["0", "1", "2", "3", "below/0", "cut"]
    assert rows[5]["labels"] is None
    assert BAD in rows[5]["error"]
    for row in rows[:5]:
        labels = pixels(BytesIO(row["labels"]))
        expected = pixels(tmp_path / "png" / f"{row['name']}_labels.png")
        assert labels.shape == (row["height"], row["width"])
        assert (labels != expected).mean() < 1e-3
        assert row["pixels"] == np.bincount(labels.ravel(), minlength=5).tolist()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["pictures"], len(summary["failed"])) == (5, 1)
    shards = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(shards) == 3
    (out / "labels-00001-of-00003.parquet").unlink()
    monkeypatch.undo()
    assert run(checkpoint, pictures, "--out", out, "--format", "parquet") == 1
    changed = [path.name for path, stamp in shards.items() if path.stat().st_mtime_ns != stamp]
    assert changed == ["labels-00001-of-00003.parquet"]
    assert rows_of(out) == rows
    (pictures / BAD).unlink()
    assert run(checkpoint, pictures, "--out", out, "--format", "parquet") == 1
    assert "other pictures" in capsys.readouterr().err


def test_the_rows_of_a_data_set(checkpoint, pictures, out, tmp_path, capsys):
    import datasets

    paths = [str(pictures / f"{index}.png") for index in range(3)]
    data = datasets.Dataset.from_dict({"photo": paths}).cast_column("photo", datasets.Image())
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "data"))
    arguments = ["--dataset", tmp_path / "data", "--split", "test", "--column", "photo"]
    assert run(checkpoint, *arguments, "--out", out) == 0
    assert [path.name for path in label_files(out)] == [f"{index:08d}_labels.png" for index in range(3)]
    assert run(checkpoint, *[pictures / f"{index}.png" for index in range(3)], "--out", out / "files") == 0
    for index in range(3):
        found, expected = out / f"{index:08d}_labels.png", out / "files" / f"{index}_labels.png"
        assert (pixels(found) != pixels(expected)).mean() < 1e-3
    assert DatasetSource(str(tmp_path / "data"), "test", "photo").call(InputItem("2", 2)).startswith("row 2 of")


def geotiff(path, num_bands=3):
    """A raster of 130x100 pixels."""
    tifffile = pytest.importorskip("tifffile")
    bands = np.array(picture(130, 100, seed=3))[..., [0, 1, 2, 0, 1][:num_bands]]
    tags = [(33550, "d", 3, (1.0, 1.0, 0.0), True), (33922, "d", 6, (0.0, 0.0, 0.0, 5.0, 7.0, 0.0), True)]
    layout = {"photometric": "rgb" if num_bands == 3 else "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(path, bands, **layout, extratags=tags)


def test_a_raster_is_labelled_by_windows_and_counted(checkpoint, pictures, out):
    pytest.importorskip("rasterio")
    geotiff(pictures / "scene.tif")
    assert run(checkpoint, pictures, "--out", out, "--window", 96, "--stride", 64) == 0
    with Image.open(out / "scene_labels.tif") as labels:
        assert labels.size == (100, 130)
    assert json.loads((out / "summary.json").read_text())["pictures"] == 6
    stamp = (out / "scene_labels.tif").stat().st_mtime_ns
    assert run(checkpoint, pictures, "--out", out, "--window", 96, "--stride", 64) == 0
    assert (out / "scene_labels.tif").stat().st_mtime_ns == stamp


def test_a_raster_shows_how_far_it_is_to_who_watches(checkpoint, pictures, out, monkeypatch, capsys):
    pytest.importorskip("rasterio")
    geotiff(pictures / "scene.tif")
    assert run(checkpoint, pictures / "scene.tif", "--out", out) == 0
    assert "labelling scene.tif" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(checkpoint, pictures / "scene.tif", "--out", out / "2") == 0
    assert "labelling scene.tif" in capsys.readouterr().err


def test_a_full_disk_stops_at_the_first_raster(checkpoint, pictures, out, capsys, monkeypatch):
    pytest.importorskip("rasterio")
    for name in ("a.tif", "b.tif"):
        geotiff(pictures / name)
    began = []

    def fill(*_, **__):
        began.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    monkeypatch.setattr("hf_segformer.inference.large_image.label_bands", fill)
    assert run(checkpoint, pictures, "--out", out) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"segformer: {out / 'a_labels.tif'}: No space left on device"
    assert len(began) == 1
    monkeypatch.undo()
    assert run(checkpoint, pictures, "--out", out) == 0


def test_rasters_go_into_no_shard_and_wrong_ones_are_named_once(checkpoint, pictures, out):
    pytest.importorskip("rasterio")
    geotiff(pictures / "scene.tif")
    assert run(checkpoint, pictures, "--out", out, "--format", "parquet") == 1
    [failed] = json.loads((out / "summary.json").read_text())["failed"]
    assert (
        failed["error"] == f"{pictures / 'scene.tif'} is a raster or damaged, and goes into no Parquet shard: take png"
    )
    assert run(checkpoint, pictures, "--out", out / "3", "--window", 100) == 1
    [failed] = json.loads((out / "3" / "summary.json").read_text())["failed"]
    assert (
        "scene.tif: a window of 100 in steps of 64 does not do: tile is 100, but it must be a multiple"
        in failed["error"]
    )
    geotiff(pictures / "scene.tif", num_bands=5)
    assert run(checkpoint, pictures, "--out", out / "2") == 1
    [failed] = json.loads((out / "2" / "summary.json").read_text())["failed"]
    assert failed["error"].startswith(f"{pictures / 'scene.tif'} has 5 bands, but the model takes 3")


def without_memory(monkeypatch, error, height):
    """As if pictures of this height did not fit into memory."""
    own = SegFormerForSemanticSegmentation.forward

    def forward(self, pixel_values, **others):
        if pixel_values.shape[-2] == height:
            raise error
        return own(self, pixel_values, **others)

    monkeypatch.setattr(SegFormerForSemanticSegmentation, "forward", forward)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_too_little_memory_is_one_picture_s_failure_or_one_line(checkpoint, pictures, out, capsys, monkeypatch, error):
    without_memory(monkeypatch, error, 50)
    assert run(checkpoint, pictures, "--out", out) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "segformer: there is not enough memory for 2 pictures of 50x36 at once: give a smaller batch size"
    assert run(checkpoint, pictures, "--out", out, "--batch-size", 1) == 1
    assert "1.png: there is not enough memory for 50x36 pixels at once: slide a window" in capsys.readouterr().err
    assert len(label_files(out)) == 3


def test_other_runtime_errors_are_no_lack_of_memory(checkpoint, pictures, out, monkeypatch):
    without_memory(monkeypatch, RuntimeError("a defect"), 50)
    with pytest.raises(RuntimeError, match="a defect"):
        run(checkpoint, pictures, "--out", out)


def test_the_same_from_python(pictures, out):
    predictor = SegFormerPredictor(lively(), SegFormerImageProcessor(do_resize=False), batch_size=2)
    report = predict_batch(predictor, FileSource([str(pictures)], out), out, progress=False)
    assert (report.num_pictures, report.failed, report.num_before) == (5, [], 0)
    assert sum(report.pixels.values()) == 3 * 40 * 60 + 2 * 50 * 36


# The command, which dies at its fifth label map with half of it written if it is told to.
PROGRAM = """
import os, signal, sys
from hf_segformer.cli import main as cli
from hf_segformer.inference import writers as label_outputs
from hf_segformer.inference import batch as labelling

class Half:
    def save(self, file, kind):
        file.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

def segmentation_to_png(*arguments):
    number.append(1)
    return Half() if len(number) == 5 else own(*arguments)

own, number = label_outputs.segmentation_to_png, []
labelling._SHARD_SIZE = 3
if sys.argv[1] == "dies":
    label_outputs.segmentation_to_png = segmentation_to_png
sys.exit(cli.main(["predict", *sys.argv[2:]]))
"""


def launched(folder, word, *arguments):
    (folder / "program.py").write_text(PROGRAM)
    command = [*LAUNCH, str(folder / "program.py"), word, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def many(folder):
    """Twelve pictures, and a file that is none."""
    folder.mkdir()
    for index in range(12):
        picture(40, 60, seed=index).save(folder / f"{index:02d}.png")
    (folder / BAD).write_text("no picture")
    return folder


def assert_one_failed(job, out):
    assert job.returncode == 1, job.stderr
    assert job.stderr.count("segformer: 1 picture could not be labelled") == 1, job.stderr
    assert BAD in job.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["pictures"], [each["name"] for each in summary["failed"]]) == (12, ["cut"])
    assert sum(each["pixels"] for each in summary["classes"]) == 12 * 40 * 60
    assert not list(out.glob(".*"))


needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")


@needs_processes
def test_two_processes_that_are_killed_in_the_middle_go_on_and_leave_what_one_leaves(checkpoint, tmp_path):
    pictures, out = many(tmp_path / "pictures"), tmp_path / "out"
    killed = launched(tmp_path, "dies", checkpoint, pictures, "--out", out)
    assert "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr
    before = stamps(out)
    assert 3 <= len(before) < 12  # the other process goes on until it is ended
    assert not (out / "summary.json").exists()
    assert any(path.read_bytes() == b"half" for path in out.glob(".*_labels.png.partial"))
    assert_labels_of_evaluation(checkpoint, pictures, out)
    job = launched(tmp_path, "lives", checkpoint, pictures, "--out", out)
    assert_one_failed(job, out)
    assert f"12 pictures labelled in {out}, {len(before)} of them before" in job.stdout
    assert before.items() <= stamps(out).items()
    assert_labels_of_evaluation(checkpoint, pictures, out)
    summed(out)


@needs_processes
def test_shards_that_one_process_began_are_finished_by_two(checkpoint, tmp_path, monkeypatch):
    pictures, out = many(tmp_path / "pictures"), tmp_path / "out"
    monkeypatch.setattr("hf_segformer.inference.batch._SHARD_SIZE", 3)
    own = SegFormerPredictor.predict

    def interrupt(self, batch, **others):
        if len(list(out.glob("*.parquet"))) == 2:
            raise KeyboardInterrupt
        return own(self, batch, **others)

    monkeypatch.setattr(SegFormerPredictor, "predict", interrupt)
    arguments = (checkpoint, pictures, "--out", out, "--format", "parquet", "--batch-size", 1)
    assert run(*arguments) == 130
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(before) == 2
    assert not list(out.glob(".*"))
    assert_one_failed(launched(tmp_path, "lives", *arguments), out)
    after = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(after) == 5
    assert before.items() <= after.items()
    assert [row["name"] for row in rows_of(out)] == [*(f"{index:02d}" for index in range(12)), "cut"]
