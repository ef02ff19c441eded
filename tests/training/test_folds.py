"""Repeated runs: k-fold and several seeds, their sums, and what resumes."""

import json
import shutil
import statistics
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import hf_segformer.training.run
from hf_segformer import SegFormerPredictor
from hf_segformer.data.splits import assign_folds
from hf_segformer.evaluation.metrics import scores
from hf_segformer.files import write_json
from hf_segformer.training.folds import _check_same_recipe, format_runs, repeated_recipes, summarize_runs
from hf_segformer.training.recipe import read_recipe
from hf_segformer.training.recipe_writer import write_recipe
from hf_segformer.training.run_record import without_private
from tests.support.training import SMALL, assert_same_weights, error_of, paired_folders, train

STEPS = ("trainer.max_steps=2", "trainer.save_steps=1", "data.num_train=9")


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """Two folds of nine images, trained for two steps each."""
    folder = tmp_path_factory.mktemp("folds") / "run"
    assert train(folder, *STEPS, "--folds", "2") == 0
    return folder


@pytest.fixture
def folds_copy(folds, tmp_path):
    return Path(shutil.copytree(folds, tmp_path / "run"))


def read(path):
    return json.loads(path.read_text())


class TestFolds:
    def test_a_run_is_the_one_that_its_recipe_gives_alone(self, folds, tmp_path):
        assert train(tmp_path / "alone", *STEPS, "split.folds=2", "split.fold=1") == 0
        assert_same_weights(tmp_path / "alone", folds / "fold_1", tolerance=0)
        alone, fold = (read(folder / "metrics.json") for folder in (tmp_path / "alone", folds / "fold_1"))
        assert {**alone, "seconds": 0} == {**fold, "seconds": 0}
        assert fold["dataset"]["split"] == "fold 1 of 2 of train"
        assert read(folds / "fold_1" / "training.json")["split"] == {
            "folds": 2,
            "fold": 1,
            "seed": 0,
            "train": {"images": 9 - fold["dataset"]["images"]},
            "evaluation": {"images": fold["dataset"]["images"]},
        }

    def test_scores_are_those_of_the_folds_and_of_all_their_images(self, folds):
        found = read(folds / "folds.json")
        metrics = [read(folds / f"fold_{fold}" / "metrics.json") for fold in (0, 1)]
        assert [row["images"] for row in found["runs"]] == np.bincount(assign_folds(9, 2, seed=0)).tolist()
        values = [each["mean_iou"] for each in metrics]
        assert [row["mean_iou"] for row in found["runs"]] == values
        assert found["scores"]["mean_iou"]["mean"] == pytest.approx(sum(values) / 2)
        assert found["scores"]["mean_iou"]["std"] == pytest.approx(statistics.stdev(values))
        for place, row in enumerate(found["classes"]):  # pooled from the shares and pixels of each metrics.json
            known = [each["classes"][place] for each in metrics if each["classes"][place]["pixels"]]
            pixels = sum(each["pixels"] for each in known)
            correct = sum(each["accuracy"] * each["pixels"] for each in known)
            assert row["accuracy"]["pooled"] == pytest.approx(correct / pixels if pixels else None)
            ious = [each["classes"][place]["iou"] for each in metrics if each["classes"][place]["iou"] is not None]
            assert row["iou"]["mean"] == (pytest.approx(statistics.fmean(ious)) if ious else None)

    def test_the_folder_predicts_as_the_mean_of_its_models(self, folds):
        image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        found, *members = (
            SegFormerPredictor.from_pretrained(each, device="cpu")(image, with_probabilities=True).probabilities
            for each in (folds, folds / "fold_0", folds / "fold_1")
        )
        np.testing.assert_allclose(found, np.mean(members, axis=0, dtype=np.float64), rtol=0, atol=1e-6)

    def test_the_card_says_how_it_was_measured(self, folds):
        card = (folds / "README.md").read_text()
        scores = read(folds / "folds.json")["scores"]["mean_iou"]
        assert f"{100 * scores['mean']:.1f} ± {100 * scores['std']:.1f} %" in card
        assert "An ensemble of 2" in card
        assert "divided into 2 folds of 4 to 5 images, drawn with seed 0" in card
        assert "evaluated on the fold" not in card
        assert "measured on the fold that it was not trained on; the ensemble itself was not" in card
        assert "SegFormerPredictor.from_pretrained" in card
        single = (folds / "fold_0" / "README.md").read_text()
        assert "Held out of the training split, and not trained on, were" in single
        assert "fold 0 of 2 (counted from 0), drawn with seed 0" in single


class TestResume:
    def test_finished_runs_are_kept_and_the_others_continue(self, folds, folds_copy, capsys):
        for name in ("folds.json", "ensemble.json", "README.md"):
            (folds_copy / name).unlink()
        for path in (folds_copy / "fold_1").iterdir():
            if path.name not in (".run.json", "checkpoint-1"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        with mock.patch.object(
            hf_segformer.training.run, "fine_tune", wraps=hf_segformer.training.run.fine_tune
        ) as run:
            assert train(folds_copy, *STEPS, "--folds", "2", "--resume") == 0
        assert [call.args[0].split.fold for call in run.call_args_list] == [1]
        assert f"{folds_copy / 'fold_0'} is finished" in capsys.readouterr().out
        assert_same_weights(folds_copy / "fold_1", folds / "fold_1")
        assert read(folds_copy / "folds.json") == read(folds / "folds.json")

    def test_a_run_that_never_began_is_trained_and_another_recipe_is_refused(self, folds_copy, capsys):
        shutil.rmtree(folds_copy / "fold_1")
        error = error_of(capsys, folds_copy, *STEPS, "trainer.learning_rate=0.5", "--folds", "2", "--resume")
        assert "fold_0 is finished with trainer.learning_rate 0.0025, which now is 0.5" in error
        assert not (folds_copy / "fold_1").exists()
        assert train(folds_copy, *STEPS, "--folds", "2", "--resume") == 0
        assert len(read(folds_copy / "folds.json")["runs"]) == 2

    def test_another_place_of_data_or_weights_is_refused_unless_they_were_moved(self, tmp_path):
        run, one, other = (tmp_path / name for name in ("run", "one", "other"))
        for folder in (run, one, other):
            folder.mkdir()

        def recipe(root, *overrides):
            return read_recipe("binary_b0", [f"data.root={root}", *overrides])

        write_recipe(recipe(one), run)
        write_json({"recipe": without_private(recipe(one).tables)}, run / "training.json")
        _check_same_recipe(run, recipe(one))
        _check_same_recipe(run, recipe(f"{one}/../one"))
        with pytest.raises(ValueError, match=f"run is finished with data.root {one}, which now is {other}; expected"):
            _check_same_recipe(run, recipe(other))
        with pytest.raises(ValueError, match=f"with model.checkpoint unset, which now is {other}"):
            _check_same_recipe(run, recipe(one, f"model.checkpoint={other}"))
        one.rename(tmp_path / "moved")
        _check_same_recipe(run, recipe(tmp_path / "moved"))

    def test_a_finished_series_is_replaced_with_overwrite_only_and_kept(self, folds_copy, capsys):
        error = error_of(capsys, folds_copy, *STEPS, "--folds", "2")
        assert "holds a finished run; expected another trainer.output_dir, or --overwrite" in error
        error = error_of(capsys, folds_copy, *STEPS, "--folds", "10", "--overwrite")
        assert "split.folds is 10; expected at most the number of images in the generated shapes, 9" in error
        assert (folds_copy / "folds.json").is_file()
        with mock.patch.object(hf_segformer.training.run, "fine_tune", side_effect=KeyboardInterrupt):
            assert train(folds_copy, *STEPS, "--folds", "2", "--overwrite") == 130
        assert (folds_copy.with_name("run.1") / "folds.json").is_file()

    def test_an_interrupt_names_the_command_that_resumes_all(self, folds_copy, capsys):
        (folds_copy / "fold_1" / "README.md").unlink()
        with mock.patch.object(hf_segformer.training.run, "fine_tune", side_effect=KeyboardInterrupt):
            assert train(folds_copy, *STEPS, "--folds", "2", "--resume") == 130
        error = capsys.readouterr().err
        assert f"Resume from {folds_copy} with: segformer train shapes_b0 " in error
        assert error.endswith("--folds 2 --resume\n")


def test_groups_need_no_other_setting_with_folds(tmp_path, capsys):
    data = paired_folders(tmp_path / "data", [(40, 32)] * 6)
    data = (*data, 'data.names=["a", "b", "c"]', "--folds", "2")
    with mock.patch.object(hf_segformer.training.run, "fine_tune", side_effect=KeyboardInterrupt) as run:
        error = error_of(capsys, tmp_path / "run", *data, "split.group=train([0-2])")
        assert "split.group 'train([0-2])' is not found in the image name 'train3.png', nor in 2 others" in error
        assert train(tmp_path / "run", *data, r"split.group=train(\d)") == 130
    [call] = run.call_args_list
    assert (call.args[0].split.folds, call.args[0].split.fold) == (2, 0)
    assert call.args[0].split.group == r"train(\d)"
    assert "no checkpoint to resume from yet" in capsys.readouterr().err


@pytest.mark.slow
def test_seeds_share_the_images_and_differ_in_weights(tmp_path, capsys):
    assert train(tmp_path / "run", *STEPS, "--seeds", "2") == 0
    found = read(tmp_path / "run" / "seeds.json")
    assert [(row["name"], row["seed"], row["images"]) for row in found["runs"]] == [("seed_0", 0, 6), ("seed_1", 1, 6)]
    assert "pooled" not in found["scores"]["mean_iou"]
    assert "seed_1" in capsys.readouterr().out
    assert "mean ± sample standard deviation over 2 seeds" in (tmp_path / "run" / "README.md").read_text()
    assert train(tmp_path / "alone", *STEPS, "trainer.seed=1", "trainer.data_seed=1") == 0
    assert_same_weights(tmp_path / "alone", tmp_path / "run" / "seed_1", tolerance=0)
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "run" / "seed_0", tmp_path / "run" / "seed_1")


MATRICES = {
    "fold_0": torch.tensor([[8, 2, 0, 0], [1, 9, 0, 0], [0, 0, 0, 0]]),  # the third class is not there
    "fold_1": torch.tensor([[5, 0, 5, 0], [0, 10, 0, 0], [2, 0, 6, 2]]),
}


class TestSummary:
    def test_mean_spread_and_pooled_scores_by_hand(self):
        found = summarize_runs(MATRICES, ["a", "b", "c"], is_pooled=True)
        a, b, c = (row["iou"] for row in found["classes"])
        assert a["mean"] == pytest.approx((8 / 11 + 5 / 12) / 2)
        assert a["std"] == pytest.approx(abs(8 / 11 - 5 / 12) / 2**0.5)
        assert a["pooled"] == pytest.approx(13 / 23)  # not the mean of the folds
        assert b == {"mean": pytest.approx((9 / 12 + 1) / 2), "std": pytest.approx(0.25 / 2**0.5), "pooled": 19 / 22}
        assert c == {"mean": 6 / 15, "std": None, "pooled": 6 / 15}
        overall = found["scores"]["mean_iou"]
        runs = [(8 / 11 + 9 / 12) / 2, (5 / 12 + 1 + 6 / 15) / 3]
        assert overall["mean"] == pytest.approx(sum(runs) / 2)
        assert overall["pooled"] == pytest.approx(scores(sum(MATRICES.values()))["mean_iou"])
        assert found["runs"][0]["classes"][2] == {"name": "c", "iou": None, "accuracy": None}

    def test_the_table_has_a_line_for_each_run_and_class(self):
        lines = format_runs(summarize_runs(MATRICES, ["a", "b", "\x1b[31mc"], is_pooled=True)).splitlines()
        assert [line.split()[0] for line in lines if line.strip()] == [
            *("mIoU", "fold_0", "fold_1"),
            *("-" * 26, "mean", "std", "pooled", "IoU", "a", "b", r"\x1b[31mc"),
        ]
        assert lines[1].split() == ["fold_0", "73.9", "85.0"]
        assert lines[-1].split() == [r"\x1b[31mc", "40.0", "-", "40.0"]

    def test_few_groups_are_named_in_the_line_of_their_run(self):
        summary = summarize_runs(MATRICES, ["a", "b", "c"], is_pooled=True)
        for row, images in zip(summary["runs"], (9, 8), strict=True):
            row["images"] = images
        lines = format_runs(summary, {"fold_0": ["p1", "p\n2"], "fold_1": ["a", "b", "c", "d"]}).splitlines()
        assert lines[1].endswith(r"  on 9 images: p1, p\n2")
        assert lines[2].endswith("  on 8 images")


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--folds", "2", "--seeds", "2"), "--folds and --seeds are both set"),
            (("--folds", "2", "--check-data"), "--check-data is given with --folds"),
            (("--folds", "3", "split.folds=2"), "--folds is 3, but split.folds is 2"),
            (("--folds", "1"), "expected a whole number from 2 to 20"),
            (("--seeds", "21"), "expected a whole number from 2 to 20"),
        ],
    )
    def test_what_does_not_go_together(self, arguments, message, tmp_path, capsys):
        assert message in error_of(capsys, tmp_path / "run", *arguments)

    def test_a_recipe_that_holds_images_out_already(self, tmp_path):
        root = ["data.source=folders", f"data.root={tmp_path}", "data.num_train=0", "data.num_eval=0"]
        recipe = read_recipe("shapes_b0", [*SMALL, *root, "data.eval_share=0.2"])
        with pytest.raises(ValueError, match=r"set data\.eval_share=0"):
            repeated_recipes(recipe, "folds", 3)
        assert len(repeated_recipes(recipe, "seeds", 3)) == 3

    def test_a_damaged_table_of_counts_names_the_remedy(self, folds_copy, capsys):
        (folds_copy / "fold_0" / "confusion.csv").write_text("mask,a\na,x\n")
        error = error_of(capsys, folds_copy, *STEPS, "--folds", "2", "--resume")
        assert "fold_0/confusion.csv is no table of counts" in error
        assert f"remove {folds_copy / 'fold_0'} and add --resume" in error
