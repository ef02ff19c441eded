"""Publication of a CamVid run: half precision, no code, no images of CamVid, and a card with numbers from its files."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks import camvid
from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.data.camvid import NAMES
from hf_segformer.files import read_json, write_json
from tests.support.tiny import TINY

CURVE = [{"step": 20, "loss": 1.0}, {"step": 1000, "eval_mean_iou": 0.5}, {"step": 2000, "eval_mean_iou": 0.634}]


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for split, number in (("train", 1), ("val", 4)):
        for name, make in ((split, lambda: (48, 64, 3)), (f"{split}annot", lambda: (48, 64))):
            folder = tmp_path / "data" / name
            folder.mkdir(parents=True)
            for index in range(number):
                values = rng.integers(0, 256 if len(make()) == 3 else 12, make(), dtype=np.uint8)
                Image.fromarray(values).save(folder / f"{index}.png")
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    config = SegFormerConfig(**TINY, num_labels=11, id2label=dict(enumerate(NAMES)), label2id=None)
    SegFormerForSemanticSegmentation(config).save_pretrained(folder)
    SegFormerImageProcessor(do_resize=False).save_pretrained(folder)
    record = {"steps": 2000, "curve": CURVE, "dataset": {"title": "CamVid"}, "hardware": "a processor"}
    write_json(record, folder / "training.json")
    Image.new("RGB", (4, 4)).save(folder / "curve.png")
    return folder


def test_a_run_is_published(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(camvid, "FRAMES", ((0, 1), (2, 3)))
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "left_over.png").write_bytes(b"of an earlier run")
    camvid.publish(run, data, folder)
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json", "training.json", "metrics.json"),
        *("metrics_flip_and_two_scales.json", "curve.png", "confusion.png", "reliability.png", "predicted.png"),
    }
    stored, trained = (load_file(each / "model.safetensors") for each in (folder, run))
    assert all(torch.equal(stored[name], weights.half()) for name, weights in trained.items())
    assert "auto_map" not in read_json(folder / "config.json")
    once, augmented = (
        read_json(folder / name)["method"] for name in ("metrics.json", "metrics_flip_and_two_scales.json")
    )
    assert (once["flip"], once["scales"]) == (False, [1.0])
    assert (augmented["flip"], augmented["scales"]) == (True, [1.0, 1.25])
    card = (folder / "README.md").read_text()
    assert "Mean IoU on val every 1,000 steps: 50.0, 63.4 %" in card
    augmented_iou = read_json(folder / "metrics_flip_and_two_scales.json")["mean_iou"]
    assert f"mean IoU is\n{100 * augmented_iou:.1f} %" in card
    assert card.index("## Evaluation results") < card.index("## About this run") < card.index("## Environment")
    assert "<!-- Rendered" not in card  # else it would be rendered again, without the section


def test_the_section_stands_at_the_end_of_a_card_without_an_environment():
    assert camvid.with_section("# Title\n\n<!-- Rendered by -->\n", "## About this run\n") == (
        "# Title\n## About this run\n"
    )


def test_classes_are_listed_as_in_a_sentence():
    assert [camvid._join(items) for items in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]


def test_an_evaluation_that_fails_changes_nothing(run, data, tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "README.md").write_text("earlier")
    shutil.rmtree(data / "valannot")
    with pytest.raises(ValueError, match=r"segformer evaluate .* ended with status"):
        camvid.publish(run, data, folder)
    assert [path.name for path in folder.iterdir()] == ["README.md"]
