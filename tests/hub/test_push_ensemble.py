"""Publication of an ensemble: its members, one card with the scores of all runs, and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from tests.hub.test_push import push
from tests.support.hub import CODE, SEGMENTATION, assert_refused, run_command
from tests.support.remote_code import LABELS, image, save

MEMBERS = ("fold_0", "fold_1")
OF_A_MODEL = {"config.json", "model.safetensors", "preprocessor_config.json", *CODE}
STRAY = (
    "split.csv",
    "recipe.toml",
    "fold_0/split.csv",
    "fold_0/confusion.csv",
    "fold_0/recipe.toml",
    "fold_0/checkpoint-2/model.safetensors",
    "fold_0/checkpoint-2/training_weights.pt",
    "fold_2/model.safetensors",
)


def save_ensemble(folder):
    """Save two members and their file."""
    from hf_segformer.conversion.ensembles import write_ensemble

    for seed, name in enumerate(MEMBERS):
        save(SEGMENTATION, str(Path(folder) / name), seed)
    write_ensemble(folder, MEMBERS)


def predict(source):
    """Probabilities of the predictor of a folder or repository."""
    from hf_segformer import SegFormerPredictor

    return SegFormerPredictor.from_pretrained(source, device="cpu")(image(), with_probabilities=True).probabilities


def score(*values):
    return {"mean": sum(values) / 2, "std": abs(values[0] - values[1]) / 2**0.5, "pooled": 0.55}


def record():
    runs = [
        {"name": name, "images": images, "mean_iou": iou, "seed": 0}
        for name, images, iou in zip(MEMBERS, (10, 12), (0.5, 0.6), strict=True)
    ]
    return {
        "kind": "folds",
        "number": 2,
        "dataset": {"title": "frogs|toads"},
        "split": {"folds": 2, "seed": 7, "group": r"^(pond\d|`)_"},
        "runs": runs,
        "scores": {name: score(0.5, 0.6) for name in ("mean_iou", "mean_accuracy", "overall_accuracy")},
        "classes": [{"name": name, "iou": score(0.4, 0.6), "accuracy": score(0.4, 0.6)} for name in LABELS.values()],
    }


@pytest.fixture
def folder(author, tmp_path):
    folder = tmp_path / "ensemble"
    author(save_ensemble, str(folder))
    for name in STRAY:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stray")
    for name in MEMBERS:
        (folder / name / "README.md").write_text("# A member")
        (folder / name / "metrics.json").write_text('{"mean_iou": 0.5}')
    (folder / "folds.json").write_text(json.dumps(record()))
    return str(folder)


def test_members_scores_and_one_card_are_published_and_load_again(hub, author, folder):
    oid, _ = author(push, folder, "me/folds")
    files = hub.repositories["me/folds"].files()
    members = {f"{name}/{file}" for name in MEMBERS for file in {*OF_A_MODEL, "metrics.json"}}
    assert files.keys() == members | {"README.md", "ensemble.json", "folds.json", ".gitattributes"}
    assert hub.repositories["me/folds"].branches["main"] == oid
    np.testing.assert_allclose(author(predict, "me/folds"), author(predict, folder), rtol=0, atol=1e-6)
    singles = [author(predict, f"{folder}/{name}") for name in MEMBERS]
    np.testing.assert_allclose(author(predict, folder), np.mean(singles, axis=0), rtol=0, atol=1e-6)


def test_the_card_has_mean_spread_and_protocol(hub, author, folder):
    author(push, folder, "me/carded")
    card = ModelCard(hub.repositories["me/carded"].files()["README.md"].content.decode())
    assert 'SegFormerPredictor.from_pretrained("me/carded")' in card.text
    assert "| 55.0 ± 7.1 % | 55.0 ± 7.1 % | 55.0 ± 7.1 % |" in card.text
    assert "| disc | 50.0 ± 14.1 | 50.0 ± 14.1 | 55.0 |" in card.text
    assert "Mean IoU is 55.0 ± 7.1 % (mean ± sample standard deviation over 2 folds; 50.0, 60.0)" in card.text
    assert "divided into 2 folds of 10 to 12 images, drawn with seed 7." in card.text
    assert r"No group is on both sides; groups follow from the pattern ``^(pond\d|`)_``" in card.text
    [result] = [each for each in card.data.eval_results if each.metric_type == "mean_iou"]
    assert result.metric_value == 0.55
    assert result.dataset_split == "mean of 2 held-out folds"


def test_an_evaluation_of_the_ensemble_itself_comes_first(hub, author, folder):
    values = {"mean_iou": 0.75, "mean_accuracy": 0.8, "overall_accuracy": 0.9, "classes": []}
    dataset = {"title": "lakes", "split": "test", "images": 4, "trained_on": 3}
    (Path(folder) / "metrics.json").write_text(json.dumps({**values, "dataset": dataset}))
    author(push, folder, "me/measured")
    files = hub.repositories["me/measured"].files()
    card = files["README.md"].content.decode()
    assert "metrics.json" in files
    assert "| 75.0 %" in card
    assert "Measured on 4 images of lakes (split test). **The model was trained on 3 of them: the scores" in card
    assert "Mean IoU is 55.0 ± 7.1 %" in card


def test_a_model_and_an_ensemble_replace_each_other_whole(hub, author, folder, tmp_path):
    author(save, SEGMENTATION, str(tmp_path / "single"))
    author(push, str(tmp_path / "single"), "me/both")
    author(push, folder, "me/both")
    repository = hub.repositories["me/both"]
    assert not {"config.json", "model.safetensors", "preprocessor_config.json"} & repository.files().keys()
    assert author(predict, "me/both").shape == (3, 45, 61)
    author(push, str(tmp_path / "single"), "me/both")
    left = repository.files().keys()
    assert "ensemble.json" not in left
    assert "folds.json" not in left
    assert not [name for name in left if name.startswith("fold_")]


def test_the_command_says_how_to_load_it(author, folder):
    status, out, _ = author(run_command, folder, "me/printed")
    assert status == 0
    assert 'SegFormerPredictor.from_pretrained("me/printed")' in out
    assert "AutoModel" not in out


def test_a_damaged_member_is_refused_before_any_request(hub, author, folder):
    (Path(folder) / "fold_1" / "model.safetensors").write_bytes(b"\x10")
    before = len(hub.requests)
    assert_refused(author, folder, "me/faulty", "fold_1/model.safetensors is damaged")
    (Path(folder) / "ensemble.json").write_text('{"members": ["fold_0", "../fold_1"]}')
    assert_refused(author, folder, "me/faulty", "expected folders below it")
    assert len(hub.requests) == before
