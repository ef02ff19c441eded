"""`segformer pretrain`: it learns, resumes to the same weights, and leaves what fine-tuning starts from."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, EvalPrediction, TrainingArguments

from hf_segformer import SegFormerConfig, SegFormerForImageClassification, SegFormerImageProcessor
from hf_segformer.cli.main import main
from hf_segformer.config import EmaConfig
from hf_segformer.data.pretraining_config import ImageAugmentation, PretrainingConfig
from hf_segformer.data.pretraining_datasets import ImageTransform
from hf_segformer.hub.model_card import card_text
from hf_segformer.training.building import build_model
from hf_segformer.training.pretrain_recipe import read_pretrain_recipe
from hf_segformer.training.pretrain_trainer import PretrainTrainer, class_loss, rank_of_class, top_accuracies
from hf_segformer.training.pretrained import inspect_pretrained
from tests.support.classes import CLASSES, MASKED, NETWORK, NOISY, image_classes, pretrain
from tests.support.tiny import TINY
from tests.support.training import ENVIRONMENT, ROOT, assert_same_weights, paired_folders, train
from training import pretrain as program

FULL = ["trainer.max_steps=8", "trainer.save_steps=4", "trainer.eval_strategy=steps", "trainer.eval_steps=4"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return image_classes(tmp_path_factory.mktemp("classes"), number=8)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier with all that is random: read only."""
    folder = tmp_path_factory.mktemp("classifier") / "run"
    assert pretrain(folder, *NOISY, *FULL) == 0
    return folder


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """An encoder of masked images: read only."""
    folder = tmp_path_factory.mktemp("masked") / "run"
    assert pretrain(folder, *MASKED, *FULL) == 0
    return folder


def encoder_of(weights):
    """Weights of the encoder alone, by their names in it."""
    return {key.partition("encoder.")[2]: weight for key, weight in weights.items() if "encoder." in key}


class TestResult:
    def test_a_classifier_loads_with_its_classes_and_processor(self, classifier):
        model, found = AutoModelForImageClassification.from_pretrained(classifier, output_loading_info=True)
        assert not any(found.values())
        assert list(model.config.id2label.values()) == ["disc", "triangle", "bar", "ring", "cross", "star"]
        processor = SegFormerImageProcessor.from_pretrained(classifier)
        with torch.no_grad():
            pixels = processor(Image.new("RGB", (50, 40)), return_tensors="pt").pixel_values
            assert pixels.shape == (1, 3, 32, 40)
            assert model(pixels).logits.shape == (1, 6)
        metrics = json.loads((classifier / "metrics.json").read_text())
        assert {"top1", "top5", "loss"} < set(metrics)
        record = json.loads((classifier / "training.json").read_text())
        assert record["steps"] == 8
        assert "it predicts one of 6 classes for an image" in card_text(classifier, repo_id="me/classifier")
        assert read_pretrain_recipe(classifier / "recipe.toml").augmentation.mixup == 0.8

    def test_transformers_own_class_takes_the_classifier(self, classifier, images):
        theirs, found = transformers.SegformerForImageClassification.from_pretrained(
            classifier, output_loading_info=True
        )
        assert not any(found.values())
        ours = SegFormerForImageClassification.from_pretrained(classifier, layer_norm_eps=1e-5).eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(images).logits, theirs.eval()(images).logits, rtol=1e-4, atol=1e-5)

    def test_masked_images_leave_the_encoder(self, masked):
        model, found = AutoModel.from_pretrained(masked, output_loading_info=True)
        assert not any(found.values())
        assert type(model).__name__ == "SegFormerModel"
        assert "without a head" in card_text(masked, repo_id="me/masked")
        assert set(json.loads((masked / "metrics.json").read_text())) == {"loss", "method", "dataset"}
        theirs, found = transformers.SegformerModel.from_pretrained(masked, output_loading_info=True)
        assert not any(found.values())
        pixels = torch.randn(1, 3, 40, 72)
        with torch.no_grad():
            ours = model.eval()(pixels).last_hidden_state
            torch.testing.assert_close(theirs.eval()(pixels).last_hidden_state, ours, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("kind", ["classifier", "masked"])
    def test_fine_tuning_starts_with_these_weights(self, kind, tmp_path, request):
        folder = request.getfixturevalue(kind)
        expected = encoder_of(load_file(folder / "model.safetensors"))
        assert len(expected) == len(encoder_of(build_model({"variant": "b0", **_network()}, ["a"]).state_dict()))
        model = build_model({"checkpoint": str(folder)}, ["a", "b", "c"])
        started = encoder_of(model.state_dict())
        assert all(torch.equal(started[name], weight) for name, weight in expected.items())
        assert inspect_pretrained(str(folder)).num_channels == 3

    def test_a_run_at_rate_zero_keeps_the_encoder(self, classifier, tmp_path):
        expected, run = encoder_of(load_file(classifier / "model.safetensors")), tmp_path / "run"
        assert train(run, f"model.checkpoint={classifier}", "trainer.learning_rate=0.0", "trainer.max_steps=1") == 0
        trained = encoder_of(load_file(run / "model.safetensors"))
        assert all(torch.equal(trained[name], weight) for name, weight in expected.items())

    def test_a_classifier_starts_from_masked_images(self, masked, tmp_path):
        arguments = (f"model.checkpoint={masked}", "trainer.learning_rate=0.0", "trainer.max_steps=1")
        assert pretrain(tmp_path / "run", *arguments) == 0
        found, expected = (encoder_of(load_file(each / "model.safetensors")) for each in (tmp_path / "run", masked))
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def _network():
    tables = read_pretrain_recipe("single_shapes_b0", NETWORK).tables["model"]
    return {key: value for key, value in tables.items() if key != "variant"}


class TestLearning:
    def test_classes_are_learned(self, root, tmp_path):
        arguments = [
            "data.source=imagefolder",
            "data.image_size=64",
            f"data.root={root}",
            "data.num_train=0",
            "data.num_eval=0",
        ]
        schedule = ["trainer.max_steps=30", "trainer.learning_rate=1e-2", "trainer.per_device_train_batch_size=12"]
        assert pretrain(tmp_path / "run", *arguments, *schedule, "augmentation.mixup=0.2") == 0
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert metrics["top1"] > 0.9  # a third by chance
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
        assert tuple(model.config.id2label.values()) == CLASSES

    @pytest.mark.slow
    def test_hidden_patches_are_learned(self, root, tmp_path):
        arguments = [
            "data.source=imagefolder",
            "data.image_size=64",
            f"data.root={root}",
            "data.num_train=0",
            "data.num_eval=0",
        ]
        schedule = ["trainer.max_steps=60", "trainer.learning_rate=1e-2", "trainer.per_device_train_batch_size=12"]
        assert pretrain(tmp_path / "run", *MASKED, *arguments, *schedule) == 0
        record = json.loads((tmp_path / "run" / "training.json").read_text())
        losses = [row["loss"] for row in record["curve"] if "loss" in row]
        assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:3])
        assert json.loads((tmp_path / "run" / "metrics.json").read_text())["loss"] < 0.75 * losses[0]


class TestResume:
    @pytest.mark.parametrize("kind", ["classifier", "masked"])
    def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(self, kind, tmp_path, request):
        finished = request.getfixturevalue(kind)
        run = shutil.copytree(finished, tmp_path / "run")
        shutil.rmtree(run / "checkpoint-8")
        settings = [*(MASKED if kind == "masked" else NOISY), *FULL]
        assert pretrain(run, *settings, "--resume") == 0
        assert_same_weights(run, finished, tolerance=0)

    def test_a_checkpoint_of_the_other_method_is_refused(self, classifier, tmp_path, capsys):
        run = shutil.copytree(classifier, tmp_path / "run")
        assert pretrain(run, *MASKED, *FULL, "--resume") == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "holds SegFormerForImageClassification, but the recipe's pretraining.method needs" in error

    def test_a_finished_run_is_kept(self, classifier, tmp_path, capsys):
        run = shutil.copytree(classifier, tmp_path / "run")
        assert pretrain(run, *FULL) == 1
        assert "holds a finished run" in capsys.readouterr().err

    @pytest.mark.slow
    @pytest.mark.parametrize("settings", [NOISY, MASKED], ids=["classification", "masked images"])
    def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(self, settings, root, tmp_path):
        data = [
            "data.source=imagefolder",
            "data.image_size=64",
            f"data.root={root}",
            "data.num_train=0",
            "data.num_eval=0",
        ]
        steps = ["trainer.max_steps=40", "trainer.save_steps=5", "trainer.dataloader_num_workers=1"]
        arguments = [*settings, *data, *steps, "trainer.dataloader_persistent_workers=true"]
        assert pretrain(tmp_path / "whole", *arguments) == 0
        run = tmp_path / "killed"
        command = [sys.executable, "-m", "training.pretrain", "single_shapes_b0", *NETWORK, *arguments]
        process = subprocess.Popen([*command, f"trainer.output_dir={run}"], cwd=ROOT, env=ENVIRONMENT)
        while not (run / "checkpoint-10" / "trainer_state.json").is_file():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (run / "config.json").exists()
        assert pretrain(run, *arguments, "--resume") == 0
        assert_same_weights(run, tmp_path / "whole", tolerance=0)


class TestStream:
    @pytest.mark.slow
    def test_a_stream_trains_and_resumes(self, root, tmp_path):
        data = [
            "data.source=dataset",
            "data.image_size=64",
            f"data.root={root}",
            "data.num_train=0",
            "data.streaming=true",
        ]
        arguments = [*data, *NOISY, "trainer.max_steps=8", "trainer.save_steps=4"]
        assert pretrain(tmp_path / "whole", *arguments) == 0
        run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
        shutil.rmtree(run / "checkpoint-8")
        assert pretrain(run, *arguments, "--resume") == 0
        assert_same_weights(run, tmp_path / "whole", tolerance=0)


@pytest.mark.slow
def test_the_plan_of_a_folder_starts_from_the_encoder(masked, tmp_path):
    """`segformer train DIR --init FOLDER`, as the guide says."""
    paired_folders(tmp_path / "data", [(40, 36)] * 6)
    arguments = ["--init", str(masked), "--steps", "1", f"trainer.output_dir={tmp_path}/run"]
    rate = ["trainer.learning_rate=0.0", "augmentation.crop_size=32", "trainer.use_cpu=true", "ema.decay=0"]
    names = 'data.names=["a", "b", "c"]'
    assert main(["train", str(tmp_path / "data"), *arguments, *rate, names]) == 0
    found, expected = (encoder_of(load_file(each / "model.safetensors")) for each in (tmp_path / "run", masked))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


class TestTrainer:
    def test_ranks_and_accuracies_are_those_of_a_sort(self):
        logits, labels = torch.randn(50, 8), torch.randint(8, (50,))
        ranks = rank_of_class(logits, labels)
        for row, label, rank in zip(logits, labels, ranks, strict=True):
            assert row.argsort(descending=True).tolist().index(label.item()) == rank
        found = top_accuracies(EvalPrediction(ranks.numpy(), labels.numpy()))
        assert found["top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
        assert found["top5"] == pytest.approx((logits.topk(5).indices == labels[:, None]).any(1).float().mean().item())

    def test_undecided_and_broken_networks_are_right_about_nothing(self):
        labels = torch.tensor([0, 1])
        for logits in (torch.zeros(2, 8), torch.full((2, 8), torch.nan)):
            ranks = rank_of_class(logits, labels)
            assert top_accuracies(EvalPrediction(ranks.numpy(), labels.numpy())) == {"top1": 0.0, "top5": 0.0}

    def test_the_loss_is_the_cross_entropy_of_soft_targets(self):
        logits, targets = torch.randn(4, 6), torch.rand(4, 6).softmax(1)
        expected = -(targets * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(class_loss(targets, logits, None), expected)
        assert class_loss(targets.bfloat16().float(), logits.bfloat16(), None).dtype == torch.float32

    def test_biases_and_norms_do_not_decay(self, tmp_path):
        model = SegFormerForImageClassification(SegFormerConfig(**TINY, num_labels=3))
        arguments = TrainingArguments(
            tmp_path, weight_decay=0.05, learning_rate=1e-3, remove_unused_columns=False, report_to="none", use_cpu=True
        )
        transform = ImageTransform(ImageAugmentation(), PretrainingConfig(), SegFormerImageProcessor(), 3)
        trainer = PretrainTrainer(model, arguments, transform, [{}], [{}], EmaConfig())
        decayed, others = trainer.parameter_groups(model)
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
        assert {id(each) for each in decayed["params"]} == {
            id(each) for name, each in model.named_parameters() if each.ndim > 1
        }
        assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
        assert decayed["lr"] == others["lr"] == 1e-3


def test_the_program_runs_a_recipe(tmp_path, capsys):
    arguments = [*NETWORK, "trainer.max_steps=1", "trainer.save_strategy=no", f"trainer.output_dir={tmp_path}/run"]
    program.main(["single_shapes_b0", *arguments])
    assert f"The encoder is in {tmp_path}/run." in capsys.readouterr().out


def test_a_folder_in_place_of_a_recipe_is_named(tmp_path, capsys):
    assert pretrain(tmp_path / "run", recipe=str(tmp_path)) == 2
    assert f"expected a recipe, such as masked_b0 data.root={tmp_path}" in capsys.readouterr().err


def test_a_best_checkpoint_is_chosen_by_accuracy(tmp_path):
    steps = ["trainer.max_steps=4", "trainer.save_steps=2", "trainer.eval_strategy=steps", "trainer.eval_steps=2"]
    assert pretrain(tmp_path / "run", *steps, "trainer.load_best_model_at_end=true") == 0
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    scores = {row["step"]: row["eval_top1"] for row in state["log_history"] if "eval_top1" in row}
    assert state["best_metric"] == max(scores.values())
