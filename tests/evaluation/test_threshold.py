"""The best threshold of a binary model: found, saved, and used by what loads the model."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.cli.main import main
from hf_segformer.evaluation.threshold import evaluate_at_best_threshold, save_threshold
from hf_segformer.hub.model_card import _threshold_note, card_text
from tests.support.tiny import TINY

SIZE = (40, 64)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A binary model that is right above a probability of about 0.7, its images and its masks."""
    folder = tmp_path_factory.mktemp("binary")
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, id2label={0: "crack"})).eval()
    with torch.no_grad():
        model.decode_head.classifier.weight.normal_(0, 3)
    model.save_pretrained(folder / "model")
    SegFormerImageProcessor(do_resize=False).save_pretrained(folder / "model")
    predictor = SegFormerPredictor.from_pretrained(folder / "model", device="cpu")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for index in range(3):
        generator = np.random.default_rng(index)
        image = Image.fromarray(generator.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
        found = predictor(image, with_probabilities=True).probabilities[1]
        mask = (found + 0.05 * generator.standard_normal(SIZE) > 0.7).astype(np.uint8)
        image.save(folder / "images" / f"p{index // 2}_{index}.png")
        Image.fromarray(mask).save(folder / "masks" / f"p{index // 2}_{index}.png")
    return folder


@pytest.fixture
def rows(saved):
    names = sorted(path.name for path in (saved / "images").iterdir())
    return [{kind: str(saved / f"{kind}s" / name) for kind in ("image", "mask")} for name in names]


def test_threshold_is_found_saved_and_used(saved, tmp_path, rows, capsys):
    model = shutil.copytree(saved / "model", tmp_path / "model")
    before = json.loads((model / "preprocessor_config.json").read_text())
    folders = ["--images", saved / "images", "--masks", saved / "masks"]
    options = ["--save-threshold", "-o", model, "--group", "^(p[0-9]+)_", "--device", "cpu"]
    assert main([str(word) for word in ("evaluate", model, *folders, *options)]) == 0
    assert "chosen on these images, is saved in" in capsys.readouterr().out

    after = json.loads((model / "preprocessor_config.json").read_text())
    threshold = after["binary_threshold"]
    assert 0.6 < threshold < 0.8
    assert after == {**before, "binary_threshold": threshold}
    probability, truth, found = [], [], []
    predictor = SegFormerPredictor.from_pretrained(model, device="cpu")
    for row in rows:
        prediction = predictor(row["image"], with_probabilities=True)
        probability.append(prediction.probabilities[1].ravel())
        found.append(prediction.segmentation.ravel())
        truth.append(np.asarray(Image.open(row["mask"])).ravel())
    probability, truth, found = (np.concatenate(each) for each in (probability, truth, found))
    best = max(f1_score(truth, probability > each) for each in np.linspace(0.01, 0.99, 99))
    assert f1_score(truth, found) >= best
    assert ((probability > threshold) == found).mean() > 0.999

    metrics = json.loads((model / "metrics.json").read_text())
    assert metrics["classes"][1]["dice"] == pytest.approx(f1_score(truth, found))
    assert metrics["binary"]["threshold"] == metrics["binary"]["best"]["threshold"] == threshold
    assert metrics["binary"]["at_half"]["dice"] == pytest.approx(f1_score(truth, probability > 0.5))
    assert metrics["intervals"]["unit"] == "groups"
    assert (model / "report.html").read_text().count(f"{threshold:.5g}") == 2
    assert f"above a probability of {threshold:.5g}" in " ".join(card_text(model).split())
    assert f"{100 * metrics['binary']['average_precision']:.1f} %" in card_text(model)
    assert "before that was changed" not in " ".join(card_text(model).split())
    save_threshold(model, threshold / 2)  # by an evaluation whose scores are elsewhere
    wanted = f"were measured with {threshold:.5g}, before that was changed"
    assert wanted in " ".join(card_text(model).split())


@pytest.mark.parametrize(("threshold", "shown"), [(2**-16, "1.5259e-05"), (1 - 2**-16, "0.99998"), (0.25, "0.25")])
def test_a_threshold_is_shown_as_prediction_takes_it(saved, tmp_path, threshold, shown):
    model = shutil.copytree(saved / "model", tmp_path / "model")
    line = save_threshold(model, threshold)
    assert line.startswith(f"threshold {shown}, chosen")
    config = SegFormerConfig(**TINY, num_labels=1)
    assert f"above a probability of {shown}, the" in _threshold_note(model, config, ["crack"], {})


def test_only_binary_models_with_a_folder_have_a_threshold(saved, model, rows, capsys):
    arguments = ["--images", str(saved / "images"), "--masks", str(saved / "masks"), "--save-threshold"]
    assert main(["evaluate", "owner/model", *arguments]) == 2
    assert "expected the folder of a model with its preprocessor_config.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the model has 5 labels; expected one"):
        evaluate_at_best_threshold(model, SegFormerImageProcessor(do_resize=False), rows)
    empty = [{"image": Image.new("RGB", (64, 40)), "label": Image.new("L", (64, 40))}]
    binary = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=1)).eval()
    with pytest.raises(ValueError, match="no mask has a pixel of the model's class"):
        evaluate_at_best_threshold(binary, SegFormerImageProcessor(do_resize=False), empty, progress=False)
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):
        save_threshold(saved / "images", 0.5)
