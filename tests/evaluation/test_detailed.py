"""Evaluation with a report, of a real model on files."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer import SegFormerImageProcessor
from hf_segformer.config import InferenceOptions
from hf_segformer.evaluation.detailed import as_displayed, build_report, evaluate_in_detail
from hf_segformer.evaluation.evaluate import evaluate
from hf_segformer.evaluation.naming import image_names
from hf_segformer.inference.segmenter import Segmenter
from hf_segformer.visualization import default_palette

SIZES = [(40, 64), (40, 64), (48, 32), (40, 64), (33, 70)]


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    result = []
    for size in SIZES:
        labels = generator.integers(0, 5, size, dtype=np.uint8)
        labels[:3] = 255
        image = Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8))
        result.append({"image": image, "label": Image.fromarray(labels)})
    return result


@pytest.mark.parametrize("options", [InferenceOptions(batch_size=2), InferenceOptions(flip=True)])
def test_accumulator_counts_what_evaluate_counts(model, rows, options):
    processor = SegFormerImageProcessor(size=64)
    evaluation, accumulator = evaluate_in_detail(model, processor, rows, options, progress=False)
    assert accumulator.matrix.equal(evaluation.matrix)
    assert evaluation.matrix.equal(evaluate(model, processor, rows, options, progress=False).matrix)
    assert accumulator.indices == list(range(len(rows)))
    assert accumulator.calibration[..., 0].sum() == accumulator.matrix.sum()
    for place, row in enumerate(rows):
        single = evaluate(model, processor, [row], options, progress=False).matrix
        np.testing.assert_array_equal(accumulator.counts[place, 1], single.sum(dim=1))


def test_report_of_a_model(tmp_path, model, rows):
    processor, options = SegFormerImageProcessor(size=64), InferenceOptions()
    evaluation, accumulator = evaluate_in_detail(model, processor, rows, options, progress=False)
    report = build_report(
        evaluation,
        accumulator,
        Segmenter(model, processor, options),
        rows,
        default_palette(5),
        title="noise",
        split="test",
        details={"Model": "tiny"},
        group_pattern="[0-3]|4",
        num_samples=2,
    )
    report.write(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["dataset"] == {"title": "noise", "split": "test", "images": 5}
    assert metrics["mean_iou"] == pytest.approx(evaluation.metrics["mean_iou"])
    assert [row["name"] for row in metrics["classes"]] == list(evaluation.names)
    assert metrics["intervals"]["unit"] == "groups"
    assert report.details["Flip"] == "False"
    assert len(report.worst) == len(report.typical) == 2


def test_binary_models_have_two_classes(tiny_config, rows):
    from hf_segformer import SegFormerForSemanticSegmentation

    model = SegFormerForSemanticSegmentation(tiny_config(num_labels=1)).eval()
    for row in rows:
        row["label"] = Image.fromarray((np.asarray(row["label"]) > 2).astype(np.uint8))
    _, accumulator = evaluate_in_detail(model, SegFormerImageProcessor(size=64), rows, progress=False)
    above = accumulator.histogram[:, 2**15 :].sum(dim=1)
    assert above.equal(accumulator.matrix[:, 1])


def test_images_are_named_by_their_files(tmp_path):
    paths = [str(tmp_path / "images" / name) for name in ("a/1.png", "b/2.png")]
    by_path = datasets.Dataset.from_dict({"image": paths})
    assert image_names(by_path) == ["a/1.png", "b/2.png"]
    assert image_names(by_path.with_transform(lambda batch: {"image": [None]})) == ["a/1.png", "b/2.png"]
    by_image = by_path.cast_column("image", datasets.Image())
    assert image_names(by_image.select([1, 0])) == ["b/2.png", "a/1.png"]
    assert image_names([{"image": None}] * 3) == ["0", "1", "2"]
    inline = datasets.Dataset.from_dict({"image": [{"bytes": b"", "path": None}]}).cast_column(
        "image", datasets.Image(decode=False)
    )
    assert image_names(inline) == ["0"]
    paged = datasets.Dataset.from_dict({"image": ["/d/a/scan.v2.tif", "/d/a/scan.v2.tif"], "page": [0, 11]})
    assert image_names(paged) == ["scan.v2_p001.tif", "scan.v2_p012.tif"]


def test_arrays_of_any_layout_are_displayed(tmp_path):
    Image.new("L", (5, 4)).save(tmp_path / "a.png")
    assert as_displayed(tmp_path / "a.png").mode == "RGB"
    assert as_displayed(np.zeros((4, 5))).shape == (1, 4, 5)
    assert as_displayed(np.zeros((40, 50, 7))).shape == (7, 40, 50)
    assert as_displayed(torch.zeros(7, 40, 50).numpy()).shape == (7, 40, 50)


def test_files_are_displayed_as_they_are_read(tmp_path, monkeypatch):
    stored = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(as_displayed(tmp_path / "turned.png")), np.rot90(stored, -1))
    np.save(tmp_path / "bands.npy", np.zeros((5, 6, 9), np.float32))
    assert as_displayed(str(tmp_path / "bands.npy"), 5).shape == (5, 6, 9)
    # No other program is run for a PostScript file in disguise.
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a program was run"))
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n%%EndComments\n%%EOF\n")
    with pytest.raises(OSError, match=r"a\.png: a PostScript file"):
        as_displayed(tmp_path / "a.png")
