"""Batch inference: atomic files, resumable jobs, separate runs, processes that share a job."""

import errno
import io
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer import (
    SegFormerConfig,
    SegFormerForSemanticSegmentation,
    SegFormerImageProcessor,
    SegFormerPredictor,
)
from hf_segformer.cli.main import main
from hf_segformer.config import InferenceOptions
from hf_segformer.data.sources import DatasetSource, FileSource, InputItem, find_inputs
from hf_segformer.files import atomic_write, differences
from hf_segformer.inference.batch import predict_batch
from hf_segformer.inference.large_image import segment_raster
from hf_segformer.inference.png_writer import PngWriter
from hf_segformer.inference.segmenter import predict
from hf_segformer.inference.writers import Outputs, segmentation_to_png
from hf_segformer.locks import LOCK, locked_folder
from hf_segformer.progress import Progress
from hf_segformer.visualization import default_palette
from tests.inference.test_predictor import lively, make_image
from tests.support.tiny import TINY

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
def images(tmp_path):
    """Five images of two sizes, one of them in a subfolder."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for index in range(4):
        make_image(*[(40, 60), (50, 36)][index % 2], seed=index).save(folder / f"{index}.png")
    make_image(40, 60, seed=9).save(folder / "below" / "0.png")
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def run(*arguments):
    return main(["predict", *(str(argument) for argument in arguments)])


def files(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def mask_files(out):
    return sorted(out.rglob("*_mask.png"))


def pixels(source):
    with Image.open(source) as image:
        return np.asarray(image)


def stamps(out):
    return {path: path.stat().st_mtime_ns for path in mask_files(out)}


def assert_predictions_of_evaluation(checkpoint, images, out, options=None):
    predictor = SegFormerPredictor.from_pretrained(checkpoint)
    for path in mask_files(out):
        source = images / path.relative_to(out).with_name(path.name.replace("_mask", ""))
        with Image.open(path) as labels, Image.open(source) as image:
            assert labels.mode == "P"
            assert labels.size == image.size
            size = (image.height, image.width)
            expected = predict(predictor.model, predictor.processor, image.copy(), size, options).numpy()
            assert (np.asarray(labels) != expected).mean() < 1e-3, source  # rounding differs in batches


def summed(out):
    """Contents of summary.json, checked against the masks."""
    summary = json.loads((out / "summary.json").read_text())
    counts = sum(np.bincount(pixels(path).ravel(), minlength=5) for path in mask_files(out))
    assert [each["pixels"] for each in summary["classes"]] == counts.tolist()
    assert summary["images"] == len(mask_files(out))
    np.testing.assert_allclose([each["share"] for each in summary["classes"]], counts / counts.sum(), atol=1e-6)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == [
        path.relative_to(out).as_posix().removesuffix("_mask.png") for path in mask_files(out)
    ]
    assert all(sum(line["pixels"].values()) == line["height"] * line["width"] for line in lines)
    return summary


def test_folder_becomes_masks_of_the_same_tree(checkpoint, images, out, capsys):
    (images / "notes.txt").write_text("no image")
    (images / ".hidden.png").write_text("no image either")
    assert run(checkpoint, images, "--output-dir", out) == 0
    names = ["0", "1", "2", "3", "below/0"]
    expected = [f"{name}_mask.png" for name in names]
    assert files(out) == sorted([*expected, "predictions.jsonl", "settings.json", "summary.json"])
    assert_predictions_of_evaluation(checkpoint, images, out)
    assert summed(out)["failed"] == []
    assert "5 images predicted" in capsys.readouterr().out


def test_overlay_legend_and_probabilities(checkpoint, images, out):
    assert run(checkpoint, images / "0.png", "--output-dir", out, "--overlay", "--probabilities", "uint8") == 0
    assert pixels(out / "0_overlay.png").shape == (40, 60, 3)
    scores = np.load(out / "0_probabilities.npy")
    assert (scores.shape, scores.dtype) == ((5, 40, 60), np.uint8)
    assert abs(scores.sum(axis=0, dtype=int) - 255).max() <= 3
    arguments = ["--overlay", "--legend", "right", "--probabilities", "float16", "--flip", "--scales", 1, 1.5]
    assert run(checkpoint, images / "0.png", "--output-dir", out / "2", *arguments) == 0
    assert pixels(out / "2" / "0_overlay.png").shape[1] > 60
    scores = np.load(out / "2" / "0_probabilities.npy").astype(np.float32)
    assert scores.shape == (5, 40, 60)
    np.testing.assert_allclose(scores.sum(axis=0), 1, atol=1e-2)
    assert_predictions_of_evaluation(checkpoint, images, out / "2", InferenceOptions(flip=True, scales=[1.0, 1.5]))


def test_png_files_hold_any_number_of_classes():
    labels = np.array([[0, 4, 255]], dtype=np.uint8)
    image = segmentation_to_png(labels, default_palette(5))
    assert image.mode == "P"
    assert image.getpalette()[:3] == list(default_palette(1)[0])
    assert np.array_equal(np.asarray(image), labels)
    wide = segmentation_to_png(np.array([[0, 299]], dtype=np.uint16), default_palette(300))
    assert (wide.mode, np.asarray(wide).tolist()) == ("I;16", [[0, 299]])


def test_value_255_survives_the_file(tmp_path):
    segmentation_to_png(np.array([[0, 255, 4]], dtype=np.uint8), default_palette(5)).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[0, 255, 4]]


def test_images_are_kept_for_overlays_only(checkpoint, images, out, monkeypatch):
    own, kept = PngWriter.write, []

    def write(self, item, prepared, prediction):
        kept.append(prepared.image)
        own(self, item, prepared, prediction)

    monkeypatch.setattr(PngWriter, "write", write)
    assert run(checkpoint, images / "0.png", "--output-dir", out) == 0
    assert run(checkpoint, images / "0.png", "--output-dir", out / "2", "--overlay") == 0
    assert kept[0] is None
    assert kept[1].size == (60, 40)


def test_bad_files_fail_alone_and_are_reported_at_the_end(checkpoint, images, out, capsys):
    content = (images / "2.png").read_bytes()
    (images / BAD).write_bytes(content[: len(content) // 2])
    (images / "empty.jpg").touch()
    for before in ("", ", 5 of them by earlier runs"):
        assert run(checkpoint, images, "--output-dir", out) == 1
        captured = capsys.readouterr()
        assert captured.out == f"5 images predicted in {out}{before}\n"
        error = captured.err.splitlines()[-1]
        assert error.startswith("segformer: 2 images could not be predicted: ")
        assert str(images / BAD) in error
        assert str(images / "empty.jpg") in error
    assert {each["name"] for each in summed(out)["failed"]} == {"cut", "empty"}
    (images / BAD).write_bytes(content)
    (images / "empty.jpg").unlink()
    assert run(checkpoint, images, "--output-dir", out) == 0
    assert summed(out)["failed"] == []
    assert len(mask_files(out)) == 6


def test_damaged_rasters_and_unreadable_files_fail_alone(checkpoint, images, out, capsys, monkeypatch):
    whole = io.BytesIO()
    make_image(40, 60).save(whole, "JPEG2000")
    for name, content in {
        "empty.jp2": b"",
        "cut.jp2": whole.getvalue()[:90],
        "half.tif": b"II*\0\x08\0\0\0\xff\xff",
    }.items():
        (images / name).write_bytes(content)
    for name in ("secret.png", "secret_too.tif"):
        make_image(40, 60).save(images / name)

    def refuse(path, *arguments, own=open, **others):
        if "secret" in str(path) and str(images) in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return own(path, *arguments, **others)

    monkeypatch.setattr("builtins.open", refuse)  # root may read every file
    monkeypatch.setattr("io.open", refuse)
    assert run(checkpoint, images, "--output-dir", out) == 1
    monkeypatch.undo()
    assert len(mask_files(out)) == 5
    errors = {each["name"]: each["error"] for each in json.loads((out / "summary.json").read_text())["failed"]}
    assert sorted(errors) == ["cut", "empty", "half", "secret", "secret_too"]
    assert errors["secret"] == f"cannot read {images / 'secret.png'}: Permission denied"
    assert errors["secret_too"] == f"cannot read {images / 'secret_too.tif'}: Permission denied"
    assert "5 images predicted" in capsys.readouterr().out


def test_names_of_any_bytes_and_of_any_length(checkpoint, images, out, capfd):
    odd, long = os.fsdecode(b"caf\xe9"), "x" * 248  # fits with .png, not with _mask.png
    try:
        make_image(40, 60).save(images / f"{odd}.png")
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    make_image(40, 60).save(images / f"{long}.png")
    (images / f"{odd}_too.png").write_text("no image")
    for before in ("", ", 6 of them by earlier runs"):
        assert run(checkpoint, images, "--output-dir", out) == 1
        assert capfd.readouterr().out == f"6 images predicted in {out}{before}\n"
        failed = {each["name"]: each["error"] for each in json.loads((out / "summary.json").read_text())["failed"]}
        assert failed.keys() == {long, f"{odd}_too"}
        assert failed[long] == f"{images / long}.png: File name too long"
    assert (out / f"{odd}_mask.png").exists()
    assert run(checkpoint, images, "--output-dir", out / "2", "--format", "parquet") == 1
    assert "caf\\udce9" in [row["name"] for row in rows_of(out / "2")]


def test_message_counts_images_of_earlier_runs(checkpoint, images, out, capsys):
    assert run(checkpoint, images / "0.png", "--output-dir", out) == 0
    assert run(checkpoint, images / "1.png", "--output-dir", out) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"2 images predicted in {out}, 1 of them by earlier runs"
    (images / BAD).write_text("no image")
    for before in ("", ", 5 of them by earlier runs"):
        assert run(checkpoint, images, "--output-dir", out / "2", "--format", "parquet") == 1
        assert capsys.readouterr().out == f"5 images predicted in {out / '2'}{before}\n"


def test_second_run_predicts_only_missing_images(checkpoint, images, out):
    assert run(checkpoint, images, "--output-dir", out) == 0
    before, summary = stamps(out), (out / "summary.json").read_text()
    (out / "1_mask.png").unlink()
    assert run(checkpoint, images, "--output-dir", out) == 0
    after = stamps(out)
    assert {path.name for path in before if before[path] != after[path]} == {"1_mask.png"}
    assert (out / "summary.json").read_text() == summary
    make_image(40, 60, seed=5).save(images / "new.png")
    assert run(checkpoint, images, "--output-dir", out) == 0
    assert {path: stamp for path, stamp in stamps(out).items() if path.name != "new_mask.png"} == after
    summed(out)


def test_incomplete_record_lines_are_skipped(checkpoint, images, out):
    assert run(checkpoint, images, "--output-dir", out) == 0
    lines = (out / "predictions.jsonl").read_text().splitlines(keepends=True)
    (out / "predictions.jsonl").write_text("".join(lines[:3]))
    (out / ".predictions.jsonl.00000").write_text(lines[2] + lines[3] + lines[4][:20])
    before = stamps(out)
    assert run(checkpoint, images, "--output-dir", out) == 0
    assert sum(before[path] != stamp for path, stamp in stamps(out).items()) == 1
    summed(out)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--flip"], "flip False"),
        (["--scales", 2], "scales"),
        (["--dtype", "bfloat16"], "dtype float32"),
        (["--overlay"], "overlay False"),
    ],
)
def test_results_of_other_options_are_not_mixed(checkpoint, images, out, arguments, word, capsys):
    assert run(checkpoint, images, "--output-dir", out) == 0
    before = stamps(out)
    assert run(checkpoint, images, "--output-dir", out, *arguments) == 1
    assert f"{out} was made with {word}" in capsys.readouterr().err
    assert stamps(out) == before


def test_of_a_table_or_a_long_list_what_differs_is_named(checkpoint, images, out, tmp_path, capsys):
    assert run(checkpoint, images, "--output-dir", out) == 0
    processor = SegFormerImageProcessor(do_resize=False, image_std=[0.3, 0.3, 0.3], rescale_factor=0.5)
    other = shutil.copytree(checkpoint, tmp_path / "other")
    processor.save_pretrained(other)
    assert run(other, images, "--output-dir", out) == 1
    assert (
        f"{out} was made with processor.rescale_factor 0.00392156862745098, which now is 0.5 and processor.image_std "
        "[0.229, 0.224, 0.225], which now is [0.3, 0.3, 0.3]: choose another output folder, or the same processor to "
        "resume"
    ) in " ".join(capsys.readouterr().err.split())
    names = [f"class number {number}" for number in range(20)]
    assert list(differences("classes", names, [*names[:-1], "sky"])) == [("classes[19]", "class number 19", "sky")]
    assert list(differences("classes", names, names[:-1])) == [("classes[19]", "class number 19", "None")]


def test_rows_of_a_job_in_a_folder_below_are_kept(checkpoint, images, out):
    spool = ".0123456789abcdef.tiles"
    for folder in ("site/deep", "unknown"):
        (out / folder / spool).mkdir(parents=True)
    (out / "site" / "settings.json").write_text("{}")
    assert run(checkpoint, images, "--output-dir", out) == 0
    assert (out / "site" / "deep" / spool).is_dir()
    assert not (out / "unknown" / spool).exists()


def test_results_of_another_model_are_not_mixed(checkpoint, images, out, tmp_path, capsys):
    assert run(checkpoint, images, "--output-dir", out) == 0
    model = lively()
    with torch.no_grad():
        model.decode_head.classifier.bias[0] += 1
    model.save_pretrained(tmp_path / "other")
    SegFormerImageProcessor(do_resize=False).save_pretrained(tmp_path / "other")
    assert run(tmp_path / "other", images, "--output-dir", out) == 1
    assert f"{out} was made with other weights" in capsys.readouterr().err
    (out / "settings.json").unlink()
    assert run(checkpoint, images, "--output-dir", out) == 1
    assert "holds masks without the settings.json" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_image_of_the_same_name_from_another_folder_is_refused(checkpoint, images, out, tmp_path, kind, capsys):
    assert run(checkpoint, images / "below", "--output-dir", out, "--format", kind) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "others").mkdir()
    make_image(40, 60, seed=7).save(tmp_path / "others" / "0.png")
    assert run(checkpoint, tmp_path / "others", "--output-dir", out, "--format", kind) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"segformer: {out} ")
    assert kind == "parquet" or (
        str(images / "below" / "0.png") in error and str(tmp_path / "others" / "0.png") in error
    )
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_rows_of_another_split_are_refused(checkpoint, out, tmp_path, capsys):
    import datasets

    splits = {
        name: datasets.Dataset.from_dict({"image": [make_image(40, 60, seed=seed)]}) for seed, name in enumerate("ab")
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "data"))
    assert run(checkpoint, "--dataset", tmp_path / "data", "--split", "a", "--output-dir", out) == 0
    assert run(checkpoint, "--dataset", tmp_path / "data", "--split", "b", "--output-dir", out) == 1
    assert "holds the prediction of row 0, column image, split a of" in capsys.readouterr().err
    assert run(checkpoint, "--dataset", tmp_path / "data", "--split", "a", "--output-dir", out) == 0


def test_bad_rows_fail_alone_and_are_named(checkpoint, images, out, tmp_path, capsys):
    import datasets

    whole, data = (images / "0.png").read_bytes(), tmp_path / "data"
    rows = [{"bytes": held, "path": None} for held in (whole, whole[:-99], b"no image", b"II*\0" + bytes(99))]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": [*rows, None, rows[0]]}, features=features)
    datasets.DatasetDict({"train": rows.cast_column("image", datasets.Image())}).save_to_disk(str(data))
    assert run(checkpoint, "--dataset", data, "--output-dir", out) == 1
    errors = [each["error"] for each in json.loads((out / "summary.json").read_text())["failed"]]
    assert [error.split(" of ")[0] for error in errors] == ["row 1", "row 2", "row 3", "row 4"]
    assert all("BytesIO" not in error for error in errors)
    assert len(mask_files(out)) == 2
    assert "4 images could not be predicted" in capsys.readouterr().err


def test_unreadable_data_set_is_one_line(checkpoint, out, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.parquet").write_text("no parquet")
    assert run(checkpoint, "--dataset", tmp_path / "broken", "--output-dir", out) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"segformer: {tmp_path / 'broken'} cannot be read: ")


def test_full_disk_is_one_line_and_finished_work_stays(checkpoint, images, out, capsys, monkeypatch):
    own, written = PngWriter.write, []

    def write(self, item, *arguments):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{item.name}_mask.png")
        written.append(item.name)
        own(self, item, *arguments)

    monkeypatch.setattr(PngWriter, "num_threads", 1)
    monkeypatch.setattr(PngWriter, "write", write)
    assert run(checkpoint, images, "--output-dir", out) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("segformer: ")
    assert "No space left on device" in error
    assert len(mask_files(out)) == 2
    before = stamps(out)
    monkeypatch.undo()
    assert run(checkpoint, images, "--output-dir", out) == 0
    assert before.items() <= stamps(out).items()
    summed(out)


@pytest.mark.parametrize("arguments", [[], ["--overlay"], ["--probabilities", "uint8"], ["--format", "parquet"]])
def test_unwritable_output_is_named(checkpoint, images, out, capsys, arguments):
    make_image(200, 300).save(images / "0.png")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # All modules are imported, and their bytecode written, before the limit applies.
    assert run(checkpoint, images / "1.png", "--output-dir", out) == 0
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
        assert run(checkpoint, images / "0.png", "--output-dir", out / "2", *arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"segformer: {out / '2'}")
    assert "File too large" in error
    assert files(out / "2") == ["settings.json"]


def test_failed_write_leaves_nothing(checkpoint, images, out, monkeypatch):
    def fail(self, file, *_):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Image.Image, "save", fail)
    assert run(checkpoint, images, "--output-dir", out) == 1
    assert [name for name in files(out) if name != "settings.json"] == []


def test_ctrl_c_can_be_resumed(checkpoint, images, out, monkeypatch, capsys):
    own = SegFormerPredictor.predict

    def interrupt(self, batch, **others):
        if (out / "0_mask.png").exists():
            raise KeyboardInterrupt
        return own(self, batch, **others)

    monkeypatch.setattr(SegFormerPredictor, "predict", interrupt)
    assert run(checkpoint, images, "--output-dir", out, "--batch-size", 1) == 130
    assert "interrupted" in capsys.readouterr().err
    before = stamps(out)
    assert 0 < len(before) < 5
    monkeypatch.undo()
    assert run(checkpoint, images, "--output-dir", out) == 0
    assert before.items() <= stamps(out).items()
    summed(out)


def test_inputs_of_every_kind_keep_folders_in_their_names(images, tmp_path, out, monkeypatch):
    def names(*inputs):
        return [item.name for item in find_inputs([str(each) for each in inputs], out)]

    assert names(images) == ["0", "1", "2", "3", "below/0"]
    assert names(images / "1.png", images / "0.png") == ["0", "1"]
    assert names(images / "*.png") == ["0", "1", "2", "3"]
    assert names(images / "**" / "0.png") == ["0", "below/0"]
    monkeypatch.chdir(images)
    (tmp_path / "list.txt").write_text(f"below/0.png\n\n{images / '3.png'}\n")
    assert names(f"@{tmp_path / 'list.txt'}") == ["3", "below/0"]
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfbelow/0.png\r\ncaf\xe9.png\n")
    assert names(f"@{tmp_path / 'list.txt'}") == ["below/0", os.fsdecode(b"caf\xe9")]
    make_image(40, 60).save(images / "a[1].png")
    assert "a[1]" in names(images / "a[1].png")


def test_the_remedy_for_two_files_of_one_name_works(tmp_path, out):
    for name in ("a.png", "a.gif", "b.gif"):
        make_image(40, 60).save(tmp_path / name)
    with pytest.raises(ValueError, match="would both be filed as a: rename one of them, or predict ") as error:
        find_inputs([str(tmp_path)], out)
    patterns = str(error.value).split("predict ")[1].removesuffix(" into two folders").split(" and ")
    found = [[item.source for item in find_inputs([pattern], out)] for pattern in sorted(patterns)]
    assert found == [[str(tmp_path / "a.gif"), str(tmp_path / "b.gif")], [str(tmp_path / "a.png")]]


def test_results_below_the_images_are_not_predicted(checkpoint, images):
    for _ in range(2):
        assert run(checkpoint, images, "--output-dir", images / "below" / "labels") == 0
    assert len(mask_files(images / "below" / "labels")) == 5


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["none"], "no such file, folder or pattern: none"),
        (["no*ne"], "no*ne holds no images"),
        (["empty"], "empty holds no images"),
        (["out/*.png"], "or only ones that were given already or are in out"),
        (["images", "same"], "would both be filed as 0"),
        (["images/0.png", "images/below/0.png"], "would both be filed as 0"),
        (["@none.txt"], "none.txt"),
        (["@images/0.png"], "images/0.png is no text file; expected the path of an image on each line"),
        (["out"], "out is the folder of the images"),
        ([], "expected either images"),
        (["images", "--dataset", "images"], "or --dataset NAME"),
        (["images", "--batch-size", "0"], "--batch-size is 0"),
        (["images", "--sliding-window", "7"], "--sliding-window is 7"),
        (["images", "--stride", "64"], "set --sliding-window, too"),
        (["images", "--tile-size", "100"], "--tile-size is 100; expected a multiple of 32"),
        (["images", "--legend", "right"], "--legend is right; expected together with --overlay"),
        (["images", "--clear", "road"], "expected together with --overlay"),
        (["images", "--format", "parquet", "--overlay"], "use --format png"),
        (["images", "--device", "toaster"], "device is 'toaster'"),
        (["--dataset", "images", "--split", "test"], "has no split 'test'; expected one of train"),
        (["--dataset", "images", "--image-column", "photo"], "has no column 'photo'; expected one of image"),
    ],
)
def test_wrong_inputs_are_one_line_before_anything_is_written(
    checkpoint, images, out, inputs, words, monkeypatch, capsys
):
    monkeypatch.chdir(images.parent)
    for name in ("empty", "same", "out"):
        (images.parent / name).mkdir()
    make_image(40, 60).save("same/0.jpg")
    assert run(checkpoint, *inputs, "--output-dir", "out") in (1, 2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("segformer: ")
    assert words in error
    assert files(out) == []


def test_unwritable_folder_is_one_line(checkpoint, images, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(checkpoint, images, "--output-dir", tmp_path / "file") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("segformer: ")


def rows_of(folder):
    import pyarrow.parquet as parquet

    return [row for path in sorted(folder.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]


def test_parquet_shards_hold_the_same_masks(checkpoint, images, out, tmp_path, monkeypatch, capsys):
    from io import BytesIO

    (images / BAD).write_text("no image")
    assert run(checkpoint, images, "--output-dir", tmp_path / "png") == 1
    monkeypatch.setattr("hf_segformer.inference.parquet_writer._SHARD_SIZE", 2)
    assert run(checkpoint, images, "--output-dir", out, "--format", "parquet") == 1
    assert BAD in capsys.readouterr().err
    rows = rows_of(out)
    assert [row["name"] for row in rows] == ["0", "1", "2", "3", "below/0", "cut"]
    assert rows[5]["mask"] is None
    assert BAD in rows[5]["error"]
    for row in rows[:5]:
        labels = pixels(BytesIO(row["mask"]))
        expected = pixels(tmp_path / "png" / f"{row['name']}_mask.png")
        assert labels.shape == (row["height"], row["width"])
        assert (labels != expected).mean() < 1e-3
        assert row["pixels"] == np.bincount(labels.ravel(), minlength=5).tolist()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["images"], len(summary["failed"])) == (5, 1)
    shards = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(shards) == 3
    (out / "masks-00001-of-00003.parquet").unlink()
    monkeypatch.undo()
    assert run(checkpoint, images, "--output-dir", out, "--format", "parquet") == 1
    changed = [path.name for path, stamp in shards.items() if path.stat().st_mtime_ns != stamp]
    assert changed == ["masks-00001-of-00003.parquet"]
    assert rows_of(out) == rows
    (images / BAD).unlink()
    assert run(checkpoint, images, "--output-dir", out, "--format", "parquet") == 1
    assert "other images" in capsys.readouterr().err


def test_shards_of_other_runs_and_damaged_ones_are_refused(checkpoint, images, out, tmp_path, capsys):
    assert run(checkpoint, images, "--output-dir", out, "--format", "parquet", "--flip") == 0
    assert run(checkpoint, images, "--output-dir", tmp_path / "other", "--format", "parquet") == 0
    shard = tmp_path / "other" / "masks-00000-of-00001.parquet"
    held = parquet_metadata(shard)
    assert json.loads(held[b"names"]) == list(SegFormerPredictor.from_pretrained(checkpoint).names)
    settings = json.loads((tmp_path / "other" / "settings.json").read_text())
    assert held[b"weights"].decode() == settings["weights"]
    assert held[b"run"] != parquet_metadata(out / shard.name)[b"run"]
    shard.replace(out / shard.name)
    assert run(checkpoint, images, "--output-dir", out, "--format", "parquet", "--flip") == 1
    assert f"{out / shard.name} is of another run: choose another output folder" in capsys.readouterr().err
    (out / shard.name).write_bytes(b"PAR1 no more")
    assert run(checkpoint, images, "--output-dir", out, "--format", "parquet", "--flip") == 1
    assert f"{out / shard.name} is damaged" in capsys.readouterr().err
    (out / shard.name).unlink()
    assert run(checkpoint, images, "--output-dir", out, "--format", "parquet", "--flip") == 0


def parquet_metadata(path):
    from pyarrow import parquet

    return parquet.read_metadata(path).metadata


def test_rows_of_a_data_set(checkpoint, images, out, tmp_path, capsys):
    import datasets

    paths = [str(images / f"{index}.png") for index in range(3)]
    data = datasets.Dataset.from_dict({"photo": paths}).cast_column("photo", datasets.Image())
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "data"))
    arguments = ["--dataset", tmp_path / "data", "--split", "test", "--image-column", "photo"]
    assert run(checkpoint, *arguments, "--output-dir", out) == 0
    assert [path.name for path in mask_files(out)] == [f"{index:08d}_mask.png" for index in range(3)]
    assert run(checkpoint, *[images / f"{index}.png" for index in range(3)], "--output-dir", out / "files") == 0
    for index in range(3):
        found, expected = out / f"{index:08d}_mask.png", out / "files" / f"{index}_mask.png"
        assert (pixels(found) != pixels(expected)).mean() < 1e-3
    assert DatasetSource(str(tmp_path / "data"), "test", "photo").describe(InputItem("2", 2)).startswith("row 2 of")


def geotiff(path, num_bands=3):
    """Write a raster of 130x100 pixels."""
    tifffile = pytest.importorskip("tifffile")
    bands = np.array(make_image(130, 100, seed=3))[..., [0, 1, 2, 0, 1][:num_bands]]
    tags = [(33550, "d", 3, (1.0, 1.0, 0.0), True), (33922, "d", 6, (0.0, 0.0, 0.0, 5.0, 7.0, 0.0), True)]
    layout = {"photometric": "rgb" if num_bands == 3 else "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(path, bands, **layout, extratags=tags)


def test_raster_is_predicted_by_tiles(checkpoint, images, out):
    pytest.importorskip("rasterio")
    geotiff(images / "scene.tif")
    assert run(checkpoint, images, "--output-dir", out, "--batch-size", 4) == 0
    with Image.open(out / "scene_mask.tif") as mask:
        assert mask.size == (100, 130)
    assert json.loads((out / "summary.json").read_text())["images"] == 6
    stamp = (out / "scene_mask.tif").stat().st_mtime_ns
    assert run(checkpoint, images, "--output-dir", out, "--batch-size", 4) == 0
    assert (out / "scene_mask.tif").stat().st_mtime_ns == stamp


def test_progress_of_a_raster_counts_tiles(checkpoint, images, out, monkeypatch, capsys):
    pytest.importorskip("rasterio")
    geotiff(images / "scene.tif")
    assert run(checkpoint, images / "scene.tif", "--output-dir", out) == 0
    assert "predict scene.tif" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(checkpoint, images / "scene.tif", "--output-dir", out / "2") == 0
    assert "predict scene.tif" in capsys.readouterr().err


def test_full_disk_stops_at_the_first_raster(checkpoint, images, out, capsys, monkeypatch):
    pytest.importorskip("rasterio")
    for name in ("a.tif", "b.tif"):
        geotiff(images / name)
    began = []

    def fill(*_, **__):
        began.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    monkeypatch.setattr("hf_segformer.inference.large_image.segment_rows", fill)
    assert run(checkpoint, images, "--output-dir", out) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"segformer: {out / 'a_mask.tif'}: No space left on device"
    assert len(began) == 1
    monkeypatch.undo()
    assert run(checkpoint, images, "--output-dir", out) == 0


def test_rasters_are_refused_for_parquet_and_bad_ones_are_named(checkpoint, images, out):
    pytest.importorskip("rasterio")
    geotiff(images / "scene.tif")
    assert run(checkpoint, images, "--output-dir", out, "--format", "parquet") == 1
    [failed] = json.loads((out / "summary.json").read_text())["failed"]
    assert failed["error"].startswith(f"{images / 'scene.tif'} is a raster or damaged; expected an image for")
    assert failed["error"].endswith("choose --format png")
    geotiff(images / "scene.tif", num_bands=5)
    assert run(checkpoint, images, "--output-dir", out / "2") == 1
    [failed] = json.loads((out / "2" / "summary.json").read_text())["failed"]
    assert failed["error"].startswith(f"{images / 'scene.tif'} has 5 bands; expected 3, as many as the model takes")


def without_memory(monkeypatch, error, height):
    """Raise the error for images of this height."""
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
def test_out_of_memory_is_one_failure_or_one_line(checkpoint, images, out, capsys, monkeypatch, error):
    without_memory(monkeypatch, error, 50)
    assert run(checkpoint, images, "--output-dir", out) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == "segformer: 2 images of 50x36 at once do not fit into memory: set a smaller batch size"
    assert run(checkpoint, images, "--output-dir", out, "--batch-size", 1) == 1
    assert "1.png: 50x36 pixels at once do not fit into memory: set sliding_window" in capsys.readouterr().err
    assert len(mask_files(out)) == 3


def test_other_runtime_errors_are_not_out_of_memory(checkpoint, images, out, monkeypatch):
    without_memory(monkeypatch, RuntimeError("a defect"), 50)
    with pytest.raises(RuntimeError, match="a defect"):
        run(checkpoint, images, "--output-dir", out)


def test_predict_batch_from_python(images, out):
    predictor = SegFormerPredictor(lively(), SegFormerImageProcessor(do_resize=False), InferenceOptions(batch_size=2))
    report = predict_batch(predictor, FileSource([str(images)], out), out, progress=False)
    assert (report.num_images, report.failed, report.num_resumed) == (5, [], 0)
    assert sum(report.pixels.values()) == 3 * 40 * 60 + 2 * 50 * 36


# The command; its first argument "dies" kills it at its fifth mask, with half of it written.
PROGRAM = """
import os, signal, sys
from hf_segformer.cli import main as cli
from hf_segformer.inference import parquet_writer, png_writer

class Half:
    def save(self, file, kind):
        file.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

def segmentation_to_png(*arguments):
    number.append(1)
    return Half() if len(number) == 5 else own(*arguments)

own, number = png_writer.segmentation_to_png, []
parquet_writer._SHARD_SIZE = 3
if sys.argv[1] == "dies":
    parquet_writer.segmentation_to_png = png_writer.segmentation_to_png = segmentation_to_png
sys.exit(cli.main(["predict", *sys.argv[2:]]))
"""


def launched(folder, word, *arguments):
    (folder / "program.py").write_text(PROGRAM)
    command = [*LAUNCH, str(folder / "program.py"), word, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def many(folder):
    """Write twelve images and a file that is no image."""
    folder.mkdir()
    for index in range(12):
        make_image(40, 60, seed=index).save(folder / f"{index:02d}.png")
    (folder / BAD).write_text("no image")
    return folder


def assert_one_failed(job, out):
    assert job.returncode == 1, job.stderr
    assert job.stderr.count("segformer: 1 image could not be predicted") == 1, job.stderr
    assert BAD in job.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["images"], [each["name"] for each in summary["failed"]]) == (12, ["cut"])
    assert sum(each["pixels"] for each in summary["classes"]) == 12 * 40 * 60
    assert not list(out.glob(".*"))


needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")


@needs_processes
@pytest.mark.slow
def test_two_killed_processes_resume_and_match_one_process(checkpoint, tmp_path):
    images, out = many(tmp_path / "images"), tmp_path / "out"
    killed = launched(tmp_path, "dies", checkpoint, images, "--output-dir", out)
    assert "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr
    before = stamps(out)
    assert 3 <= len(before) < 12  # the other process goes on until it is ended
    assert not (out / "summary.json").exists()
    assert any(path.read_bytes() == b"half" for path in out.glob(".*_mask.png.*.partial"))
    assert_predictions_of_evaluation(checkpoint, images, out)
    job = launched(tmp_path, "lives", checkpoint, images, "--output-dir", out)
    assert_one_failed(job, out)
    assert f"12 images predicted in {out}, {len(before)} of them by earlier runs" in job.stdout
    assert before.items() <= stamps(out).items()
    assert_predictions_of_evaluation(checkpoint, images, out)
    summed(out)


@needs_processes
@pytest.mark.slow
def test_two_processes_finish_shards_of_one(checkpoint, tmp_path, monkeypatch):
    images, out = many(tmp_path / "images"), tmp_path / "out"
    monkeypatch.setattr("hf_segformer.inference.parquet_writer._SHARD_SIZE", 3)
    own = SegFormerPredictor.predict

    def interrupt(self, batch, **others):
        if len(list(out.glob("*.parquet"))) == 2:
            raise KeyboardInterrupt
        return own(self, batch, **others)

    monkeypatch.setattr(SegFormerPredictor, "predict", interrupt)
    arguments = (checkpoint, images, "--output-dir", out, "--format", "parquet", "--batch-size", 1)
    assert run(*arguments) == 130
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(before) == 2
    assert not list(out.glob(".*"))
    assert_one_failed(launched(tmp_path, "lives", *arguments), out)
    after = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(after) == 5
    assert before.items() <= after.items()
    assert [row["name"] for row in rows_of(out)] == [*(f"{index:02d}" for index in range(12)), "cut"]


def small_predictor(**options):
    return SegFormerPredictor(lively(), SegFormerImageProcessor(do_resize=False), InferenceOptions(**options))


def predict_folder(folder, out, outputs=None, **options):
    return predict_batch(small_predictor(**options), FileSource([str(folder)], out), out, outputs, progress=False)


def test_tiles_of_a_raster_are_those_of_the_options(images, out, monkeypatch):
    pytest.importorskip("rasterio")
    geotiff(images / "scene.tif")
    monkeypatch.setattr("hf_segformer.inference.batch.segment_raster", wrapped := Recorder(segment_raster))
    predict_folder(images / "scene.tif", out, tile_size=96, tile_overlap=32)
    assert (wrapped.result["tiles"], wrapped.result["tile_size"]) == (4, 96)


class Recorder:
    """A function whose last result is kept."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments, **keywords):
        self.result = self.function(*arguments, **keywords)
        return self.result


def test_overlay_and_probabilities_of_a_raster_are_refused(images, out):
    pytest.importorskip("rasterio")
    geotiff(images / "scene.tif")
    report = predict_folder(images, out, Outputs(overlay=True, probabilities="uint8"))
    assert report.num_images == 5
    [failed] = report.failed
    assert failed["name"] == "scene"
    assert "--overlay and --probabilities cannot be written for a raster" in failed["error"]
    assert not (out / "scene_mask.tif").exists()


def test_skipped_files_are_counted(images, out, checkpoint, capsys):
    for name in ("a.dat", "b.dat", "notes.txt", "README"):
        (images / name).write_text("no image")
    report = predict_folder(images, out)
    assert report.skipped == {".dat": 2, ".txt": 1, "": 1}
    assert report.format_skipped() == "4 files skipped, not images: 1 without suffix, 2 .dat, 1 .txt"
    assert replace(report, skipped={".txt": 1}).format_skipped() == "1 file skipped, not an image: 1 .txt"
    assert json.loads((out / "summary.json").read_text())["skipped"] == report.skipped
    assert run(checkpoint, images, "--output-dir", out / "2") == 0
    assert "4 files skipped" in capsys.readouterr().out


def test_shares_have_one_denominator_and_lines_are_sorted(images, out):
    pytest.importorskip("rasterio")
    import rasterio

    values = np.array(make_image(130, 100, seed=3)).transpose(2, 0, 1).copy()
    values[:, :, :40] = 0
    profile = {"driver": "GTiff", "count": 3, "height": 130, "width": 100, "dtype": "uint8", "nodata": 0}
    profile |= {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, 5e5, 0, -0.5, 5e6)}
    for name in ("a", "z"):
        with rasterio.open(images / f"{name}.tif", "w", **profile) as file:
            file.write(values)
    report = predict_folder(images, out)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["0", "1", "2", "3", "a", "below/0", "z"]
    raster = lines[4]
    assert sum(raster["pixels"].values()) < 130 * 100  # some pixels hold no data
    totals = dict.fromkeys(report.pixels, 0)
    for line in lines:
        assert sum(line["share"].values()) == pytest.approx(1, abs=1e-5)
        for name, count in line["pixels"].items():
            totals[name] += count
    summary = json.loads((out / "summary.json").read_text())
    assert {each["name"]: each["pixels"] for each in summary["classes"]} == totals
    assert sum(each["share"] for each in summary["classes"]) == pytest.approx(1, abs=1e-5)


def test_classes_are_left_clear_in_overlays(images, out):
    predictor = small_predictor()
    chosen = predictor.names[0]
    for folder, clear in (("all", ()), ("clear", (chosen,))):
        source = FileSource([str(images / "0.png")], out)
        predict_batch(predictor, source, out / folder, Outputs(overlay=True, clear=clear), progress=False)
    mask, image = pixels(out / "all" / "0_mask.png"), pixels(images / "0.png")
    with Image.open(out / "clear" / "0_overlay.png") as overlay:
        clear = np.asarray(overlay)
    assert (clear[mask == 0] == image[mask == 0]).all()
    assert (clear[mask != 0] == pixels(out / "all" / "0_overlay.png")[mask != 0]).all()
    assert (clear[mask != 0] != image[mask != 0]).any()
    with pytest.raises(ValueError, match="clear has 'sea'; expected names of the model's classes: LABEL_0"):
        predict_folder(images, out / "3", Outputs(overlay=True, clear=("sea",)))
    with pytest.raises(ValueError, match="expected an overlay"):
        Outputs(clear=("sea",))


def test_folder_is_locked_by_one_job(images, out):
    out.mkdir()
    with (
        locked_folder(out, "a test"),
        pytest.raises(ValueError, match=rf"is in use by a test of process {os.getpid()}"),
    ):
        predict_folder(images, out)
    assert predict_folder(images, out).num_images == 5
    assert not list(out.glob(".*"))


def test_stale_locks_are_taken_over(out):
    out.mkdir()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    here = {"job": "x", "user": "u", "host": socket.gethostname(), "pid": int(dead.stdout), "born": None, "began": "t"}
    (out / LOCK).write_text(json.dumps(here))
    with locked_folder(out, "a test"):
        assert json.loads((out / LOCK).read_text())["pid"] == os.getpid()
    other = {**here, "host": "elsewhere"}
    (out / LOCK).write_text(json.dumps(other))
    with pytest.raises(ValueError, match="of u on elsewhere, since t"), locked_folder(out, "a test"):
        pass
    os.utime(out / LOCK, (0, 0))
    with locked_folder(out, "a test"):
        pass
    reused = {**here, "pid": os.getpid(), "born": "1"}  # of a process before this one with the same number
    (out / LOCK).write_text(json.dumps(reused))
    with locked_folder(out, "a test"):
        pass
    assert not (out / LOCK).exists()


def test_a_stale_lock_is_taken_over_by_one_job(out, monkeypatch):
    """The other one takes it over between the first one's look at the lock and its attempt."""
    out.mkdir()
    (out / LOCK).write_text("{}")
    os.utime(out / LOCK, (0, 0))
    with ExitStack() as stack:

        def late(path, held):
            monkeypatch.undo()
            stack.enter_context(locked_folder(out, "the other"))
            return True

        monkeypatch.setattr("hf_segformer.locks._is_stale", late)
        with pytest.raises(ValueError, match="is in use by the other"), locked_folder(out, "a test"):
            pass
        assert [path.name for path in out.iterdir()] == [LOCK]
    assert not any(out.iterdir())


def test_writers_of_one_file_have_separate_partial_files(tmp_path):
    target = tmp_path / "a.txt"
    with atomic_write(target) as first, atomic_write(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"  # whose block ends last
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    with atomic_write(tmp_path / ("x" * 250)) as partial:
        partial.write_text("a name as long as the file system takes")
    assert (tmp_path / ("x" * 250)).exists()


def test_progress_prints_a_line_a_minute_into_a_log(monkeypatch, capsys):
    now = iter([0.0, 30.0, 61.0, 61.0, 70.0])
    monkeypatch.setattr("hf_segformer.progress.time.monotonic", lambda: next(now))
    with Progress("predict", 10, "tiles") as progress:
        for _ in range(3):
            progress.update(2)
    assert capsys.readouterr().err == "predict: 4 of 10 tiles, 0.07 tiles/s, 01:31 left\n"


# --- Values of masks --------------------------------------------------------------------------------------------------


def binary_checkpoint(folder, bias=0.0):
    config = SegFormerConfig(**TINY, num_labels=1)
    torch.manual_seed(3)
    model = SegFormerForSemanticSegmentation(config)
    torch.nn.init.constant_(model.decode_head.classifier.bias, bias)
    model.save_pretrained(folder)
    SegFormerImageProcessor(size=64).save_pretrained(folder)
    return folder


def test_masks_as_palette_values_and_black_and_white(tmp_path, images, checkpoint):
    binary = binary_checkpoint(tmp_path / "binary")
    found = {}
    for kind in ("palette", "values", "255"):
        assert run(binary, images / "0.png", "-o", tmp_path / kind, "--masks-as", kind) == 0
        with Image.open(tmp_path / kind / "0_mask.png") as mask:
            assert mask.mode == ("P" if kind == "palette" else "L")
            found[kind] = np.asarray(mask)
    assert set(np.unique(found["palette"])) == {0, 1}
    np.testing.assert_array_equal(found["values"], found["palette"])
    np.testing.assert_array_equal(found["255"], found["palette"] * 255)


def test_black_and_white_masks_need_two_classes(images, out, checkpoint, capsys):
    assert run(checkpoint, images, "-o", out, "--masks-as", "255") == 1
    assert "masks_as is '255' for a model of 5 classes; expected two" in capsys.readouterr().err


def test_a_higher_threshold_leaves_less_foreground_in_every_way_to_predict(tmp_path, images):
    binary = binary_checkpoint(tmp_path / "binary")
    probabilities = SegFormerPredictor.from_pretrained(binary)(images / "0.png", with_probabilities=True).probabilities
    threshold = float(np.quantile(probabilities[1], 0.7))
    ways = {"whole": (), "flip": ("--flip",), "slide": ("--sliding-window", 32, "--stride", 16)}
    for name, options in ways.items():
        shares = []
        for each in (0.5, threshold):
            folder = tmp_path / f"{name}{each}"
            assert run(binary, images / "0.png", "-o", folder, "--threshold", each, *options) == 0
            shares.append((pixels(folder / "0_mask.png") == 1).mean())
            if name == "whole":
                np.testing.assert_array_equal(pixels(folder / "0_mask.png"), probabilities[1] > each)
        assert shares[0] != shares[1]


def test_a_threshold_needs_a_model_with_one_label(images, out, checkpoint, capsys):
    assert run(checkpoint, images, "-o", out, "--threshold", 0.4) == 1
    assert "--threshold is given for a model of 5 labels; expected one label" in capsys.readouterr().err
    assert run(checkpoint, images, "-o", out, "--threshold", 1) == 2
