"""The learning benchmark: what counts as worse, what is recorded, and that its recipe is the one on record."""

import json

import pytest

from benchmarks import learning
from hf_segformer.data.shapes_hard import NAMES
from hf_segformer.training.recipe import read_recipe


@pytest.mark.parametrize(
    ("before", "found", "status"), [(0.37, 0.37, 0), (0.37, 0.34, 1), (0.37, 0.40, 0), (None, 0.2, 0)]
)
def test_a_fall_beyond_noise_fails_and_the_number_is_recorded(tmp_path, monkeypatch, before, found, status):
    monkeypatch.setattr(learning, "measure", lambda overrides: {"mean_iou": found})
    path = tmp_path / "learning.json"
    if before is not None:
        path.write_text(json.dumps({"mean_iou": before}))
    assert learning.main(["--results", str(tmp_path)]) == status
    assert json.loads(path.read_text())["mean_iou"] == found


def test_a_run_with_other_settings_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "measure", lambda overrides: {"mean_iou": 0.9, "overrides": overrides})
    assert learning.main(["trainer.seed=1", "--results", str(tmp_path)]) == 0
    assert not (tmp_path / "learning.json").exists()


def test_the_record_is_of_the_recipe():
    record = json.loads((learning.RESULTS / "learning.json").read_text())
    assert record["recipe"] == learning.RECIPE
    assert not record["overrides"]
    assert tuple(record["classes"]) == NAMES
    assert record["mean_iou"] == pytest.approx(sum(record["classes"].values()) / len(NAMES), abs=1e-3)
    recipe = read_recipe(learning.RECIPE)
    assert (recipe.data.difficulty, recipe.data.seed, recipe.trainer["seed"]) == ("hard", 0, 0)
