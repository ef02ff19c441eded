"""Early stopping: when a run ends, which weights it restores, and a resume that goes on waiting."""

import json
import os
import shutil
import signal

import pytest

from hf_segformer.training import recipe_trainer
from hf_segformer.training.building import training_arguments
from hf_segformer.training.recipe import read_recipe
from tests.support.distributed import tiny_trainer
from tests.support.training import SMALL, assert_same_weights, error_of, train, with_sender

STOPPING = (
    "early_stopping.patience=2",
    "trainer.eval_strategy=steps",
    "trainer.eval_steps=1",
    "trainer.save_steps=1",
    "trainer.save_total_limit=9",
    "trainer.max_steps=9",
)
# By step, from 1 on.
SCORES = [0.0, 0.3, 0.5, 0.4, 0.6, 0.55, 0.58, 0.1, 0.1, 0.1]


@pytest.fixture
def scored(monkeypatch):
    """Evaluations whose mean IoU is that of a list by step; returns those that were made."""

    def make(scores):
        made = []

        def evaluation_loop(trainer, *arguments, **keywords):
            step = trainer.state.global_step
            made.append(step)
            metrics = {"eval_mean_iou": scores[step]}
            return recipe_trainer.EvalLoopOutput(None, None, metrics, 1)

        monkeypatch.setattr(recipe_trainer.RecipeTrainer, "evaluation_loop", evaluation_loop)
        monkeypatch.setattr(recipe_trainer.RecipeTrainer, "try_evaluation", lambda trainer: None)
        return made

    return make


def test_a_run_ends_after_its_patience_also_when_it_was_resumed(scored, tmp_path, capsys):
    made = scored(SCORES)
    folder, again = tmp_path / "run", tmp_path / "again"
    assert train(folder, *STOPPING) == 0
    assert made == [1, 2, 3, 4, 5, 6]  # 0.6 at step 4 is the best; two worse ones follow
    assert_same_weights(folder, folder / "checkpoint-4", 0)
    assert "Ended early, after step 6: no evaluation since step 4 was better" in capsys.readouterr().out
    assert json.loads((folder / "training.json").read_text())["steps"] == 6
    for step in (4, 5):
        shutil.copytree(folder / f"checkpoint-{step}", again / f"checkpoint-{step}")
    state = again / "checkpoint-5" / "trainer_state.json"
    state.write_text(state.read_text().replace(str(folder), str(again)))
    made.clear()
    assert train(again, *STOPPING, "--resume") == 0
    assert made == [6]
    assert_same_weights(again, folder, 0)


@pytest.mark.slow
def test_a_gain_below_the_least_difference_does_not_count(scored, tmp_path):
    made = scored(SCORES)
    assert train(tmp_path / "run", *STOPPING, "early_stopping.min_delta=0.15") == 0
    assert made == [1, 2, 3, 4]  # 0.6 is no more than 0.15 above 0.5, but the best of all


@pytest.mark.slow
def test_a_run_that_ended_early_is_over_and_with_more_patience_goes_on(scored, tmp_path):
    made = scored(SCORES)
    folder = tmp_path / "run"
    assert train(folder, *STOPPING) == 0
    made.clear()
    assert train(folder, *STOPPING, "--resume") == 0
    assert made == []
    assert train(folder, *STOPPING, "early_stopping.patience=3", "--resume") == 0
    assert made == [7]


@pytest.mark.slow
def test_a_run_that_had_no_patience_can_be_given_some(scored, tmp_path):
    made = scored(SCORES)
    folder = tmp_path / "run"
    assert train(folder, *STOPPING[1:], "trainer.load_best_model_at_end=true", "trainer.max_steps=3") == 0
    shutil.rmtree(folder / "checkpoint-3")
    made.clear()
    assert train(folder, *STOPPING, "--resume") == 0
    assert made == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.eval_strategy=no"], "but trainer.eval_strategy is no: set trainer.eval_strategy=steps"),
        (["trainer.load_best_model_at_end=false"], "load_best_model_at_end is false; expected true: leave it out"),
        (["trainer.eval_steps=2"], "save_steps is 1 and trainer.eval_steps 2; .*: set trainer.save_strategy=best"),
        (
            ["trainer.eval_strategy=epoch"],
            "save_steps is 1 and trainer.eval_steps epoch; expected a checkpoint of every",
        ),
        (["early_stopping.patience=-1"], "early_stopping.patience is -1; expected at least 0"),
        (["early_stopping.min_delta=-1"], "early_stopping.min_delta is -1"),
        (["early_stopping.patience=0", "early_stopping.min_delta=0.1"], "early_stopping.patience is 0: set it, too"),
    ],
)
def test_what_cannot_stop_early_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        read_recipe("shapes_b0", [*SMALL, *STOPPING, *overrides])


@pytest.mark.slow
def test_best_checkpoints_alone_are_enough(scored, tmp_path):
    made = scored(SCORES)
    folder = tmp_path / "run"
    assert train(folder, *STOPPING, "trainer.save_strategy=best", "trainer.save_total_limit=1") == 0
    assert made == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert_same_weights(folder, folder / "checkpoint-4", 0)


@pytest.mark.parametrize(
    ("metric", "higher"), [("calibration_error", False), ("mean_iou", True), ("iou_forest_loss", True)]
)
def test_errors_are_best_low_and_scores_high(metric, higher):
    overrides = ["early_stopping.patience=1", f"trainer.metric_for_best_model={metric}", *STOPPING[1:3]]
    arguments = training_arguments(read_recipe("shapes_b0", [*SMALL, *overrides, "trainer.save_steps=1"]))
    assert arguments.greater_is_better is higher


def test_the_highest_error_is_not_the_best(tmp_path):
    with pytest.raises(ValueError, match="expected greater_is_better=False"):
        tiny_trainer(tmp_path, False, metric_for_best_model="eval_calibration_error", greater_is_better=True)


def test_a_signal_leaves_a_checkpoint_where_only_better_ones_are_saved(scored, tmp_path):
    made = scored([0.0, 0.5, 0.4, 0.3, 0.2])
    folder = tmp_path / "run"
    arguments = (
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=1",
        "trainer.save_strategy=best",
        "trainer.load_best_model_at_end=true",
        "trainer.max_steps=4",
    )
    with with_sender(lambda: os.kill(os.getpid(), signal.SIGTERM), 1):
        assert train(folder, *arguments) == 130
    assert made == [1, 2]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert train(folder, *arguments, "--resume") == 0
    assert made == [1, 2, 3, 4]
    assert_same_weights(folder, folder / "checkpoint-1", 0)


def test_an_unfinished_run_that_was_moved_ends_with_its_best_weights(scored, tmp_path):
    scored([0.0, 0.5, 0.4, 0.3])
    folder, moved = tmp_path / "run", tmp_path / "moved"
    arguments = (
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=1",
        "trainer.save_strategy=best",
        "trainer.load_best_model_at_end=true",
        "trainer.max_steps=3",
    )
    with with_sender(lambda: os.kill(os.getpid(), signal.SIGTERM), 1):
        assert train(folder, *arguments) == 130
    folder.rename(moved)
    assert train(moved, *arguments, "--resume") == 0
    assert_same_weights(moved, moved / "checkpoint-1", 0)


def test_a_finished_run_that_was_moved_ends_with_its_best_weights(scored, tmp_path, capsys):
    scored([0.0, 0.5, 0.4])
    folder, moved = tmp_path / "run", tmp_path / "moved"
    arguments = (
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=1",
        "trainer.save_steps=1",
        "trainer.load_best_model_at_end=true",
        "trainer.max_steps=2",
    )
    assert train(folder, *arguments) == 0
    folder.rename(moved)
    assert train(moved, *arguments, "--resume") == 0
    assert_same_weights(moved, moved / "checkpoint-1", 0)
    shutil.rmtree(moved / "checkpoint-1")
    error = error_of(capsys, moved, *arguments, "--resume")
    assert f"{moved / 'checkpoint-1'}, the best checkpoint of the finished run, is missing" in error
