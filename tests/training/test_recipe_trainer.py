"""Evaluation during a recipe's training: the metric of the card, the best checkpoint by it, failures at once."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from hf_segformer.training import recipe_trainer
from tests.support.training import assert_same_weights, error_of, paired_folders, train

EVALUATED = ("trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.save_steps=2", "trainer.max_steps=6")


def history(folder):
    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((steps[-1] / "trainer_state.json").read_text())


@pytest.mark.parametrize("precision", ["trainer.bf16=true", "trainer.bf16=false"])
@pytest.mark.slow
def test_the_last_evaluation_is_the_cards_to_the_digit(tmp_path, precision):
    """Sliding window, flip and scales included; with autocast in the training steps alone."""
    options = (
        "evaluation.sliding_window=32",
        "evaluation.stride=16",
        "evaluation.flip=true",
        "evaluation.scales=[1, 2]",
    )
    assert train(tmp_path / "run", *EVALUATED, *options, precision, "data.image_size=48") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["method"]["flip"] is True
    row = [row for row in history(tmp_path / "run")["log_history"] if "eval_mean_iou" in row][-1]
    for name in ("mean_iou", "mean_accuracy", "overall_accuracy"):
        assert row[f"eval_{name}"] == metrics[name]
    for entry in metrics["classes"]:
        if entry["iou"] is not None:
            assert row[f"eval_iou_{entry['name']}"] == entry["iou"]


def test_the_best_checkpoint_is_chosen_by_the_cards_metric(tmp_path):
    assert train(tmp_path / "run", *EVALUATED, "evaluation.flip=true", "trainer.load_best_model_at_end=true") == 0
    state = history(tmp_path / "run")
    rows = {row["step"]: row["eval_mean_iou"] for row in state["log_history"] if "eval_mean_iou" in row}
    best = max(rows, key=rows.get)
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{best}"
    assert_same_weights(tmp_path / "run", tmp_path / "run" / f"checkpoint-{best}", 0)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["mean_iou"] == rows[best]


def test_evaluation_changes_no_weight(tmp_path):
    """Neither the evaluations nor the trial before the first step leave a trace in weights or random numbers."""
    assert train(tmp_path / "with", *EVALUATED) == 0
    assert train(tmp_path / "without", "trainer.max_steps=6", "trainer.save_steps=6") == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name


def test_evaluation_that_fails_does_so_before_the_first_step(tmp_path, capsys):
    """Images of unequal size need no setting; another failure is the first thing that happens."""
    calls = []

    def broken(*arguments, **keywords):
        calls.append(len(arguments[2]))
        raise ValueError("evaluation fails")

    with mock.patch.object(recipe_trainer, "evaluate_in_detail", broken):
        assert error_of(capsys, tmp_path / "run", *EVALUATED).endswith("evaluation fails")
    assert calls == [6]
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_images_of_unequal_size_are_evaluated_during_the_training(tmp_path):
    data = paired_folders(tmp_path / "data", ((60, 44), (44, 60), (52, 52)))
    arguments = ("trainer.eval_strategy=steps", "trainer.eval_steps=1", "trainer.max_steps=1")
    assert train(tmp_path / "run", *data, 'data.names=["a", "b", "c"]', *arguments) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["dataset"]["images"] == 3


def test_the_loss_logged_after_a_resume_is_the_mean_since_the_last_log(tmp_path):
    """Logged every 3 steps, interrupted after 4: the next row is the mean of steps 4 to 6."""
    arguments = ("trainer.max_steps=9", "trainer.logging_steps=3", "trainer.save_steps=4", "trainer.save_total_limit=9")
    assert train(tmp_path / "whole", *arguments) == 0
    assert train(tmp_path / "every", "trainer.max_steps=9", "trainer.logging_steps=1") == 0
    each, expected = (
        {row["step"]: row["loss"] for row in json.loads((tmp_path / name / "training.json").read_text())["curve"]}
        for name in ("every", "whole")
    )
    assert expected[6] == pytest.approx((each[4] + each[5] + each[6]) / 3, rel=1e-6)
    (tmp_path / "run").mkdir()
    (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "run" / "checkpoint-4")
    assert train(tmp_path / "run", *arguments, "--resume") == 0
    rows = json.loads((tmp_path / "run" / "training.json").read_text())["curve"]
    found = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert found == pytest.approx(expected, rel=1e-5)
