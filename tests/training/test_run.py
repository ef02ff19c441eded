"""`segformer train`: the folder that it leaves, resumed runs, and errors in one line."""

import json
import re
import shutil
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import get_worker_info
from transformers import AutoModelForSemanticSegmentation

import hf_segformer.training.run
from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.config import DataConfig
from hf_segformer.data import shapes
from hf_segformer.data.torch_datasets import TrainDataset
from hf_segformer.evaluation.mean_iou import MeanIoU
from hf_segformer.training.building import build_model, build_trainer, first_samples, training_arguments
from hf_segformer.training.data import load_data
from hf_segformer.training.evaluation import evaluate_recipe
from hf_segformer.training.recipe import read_recipe
from hf_segformer.training.resume import find_defect, newest_whole_checkpoint
from hf_segformer.training.run import prepare_data
from hf_segformer.training.tracking import LogPredictions
from tests.support.tiny import TINY
from tests.support.training import SMALL, error_of, train

NAMES = ("ground", "disc", "bar")


@pytest.fixture
def finished(trained_run):
    return trained_run


@pytest.fixture
def run_folder(trained_run_copy):
    return trained_run_copy


def road_scenes(root, size=(60, 44), suffixes=(".webp", ".png")):
    """A small CamVid: images whose pixels encode their labels, and masks."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 3), ("val", 2)):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for index in range(number):
            labels = np.kron(rng.integers(0, 12, (4, 5)), np.ones((11, 12))).astype(np.uint8)
            Image.fromarray(labels).save(root / f"{split}annot" / f"frame{index}.png")
            image = Image.fromarray(np.stack([labels * 20] * 3, axis=-1)).resize(size)
            image.save(root / split / f"frame{index}{suffixes[index % 2]}", lossless=True)
    return root


class TestRun:
    def test_the_folder_holds_model_processor_metrics_and_figures(self, finished, caplog):
        model, info = AutoModelForSemanticSegmentation.from_pretrained(finished, output_loading_info=True)
        assert not any(info.values())
        assert "dropped" not in caplog.text  # no field of config.json is refused
        assert model.config.id2label[6] == "star"
        assert SegFormerImageProcessor.from_pretrained(finished).do_resize is False
        with Image.open(finished / "prediction.png") as image:
            assert image.width > 700

    def test_metrics_are_those_of_the_saved_model_on_whole_images(self, finished):
        model = AutoModelForSemanticSegmentation.from_pretrained(finished).eval()
        processor = SegFormerImageProcessor.from_pretrained(finished)
        data = load_data(DataConfig(source="shapes", image_size=32, num_train=1, num_eval=6))
        metric = MeanIoU(len(data.names))
        for row in data.evaluation:
            with torch.no_grad():
                outputs = model(**processor(row["image"], return_tensors="pt"))
            [labels] = processor.post_process_semantic_segmentation(outputs, [(32, 32)])
            metric.add(prediction=labels, reference=np.array(row["label"]))
        results = json.loads((finished / "metrics.json").read_text())
        expected = metric.compute()
        assert results["mean_iou"] == pytest.approx(expected["mean_iou"], abs=1e-6)
        assert [row["name"] for row in results["classes"]] == list(data.names)
        assert results["classes"][0]["iou"] == pytest.approx(expected["per_category_iou"][0], abs=1e-6)
        assert results["dataset"] == {"title": "generated shapes", "split": "validation", "images": 6}

    def test_a_finished_run_is_replaced_with_overwrite_only_and_kept(self, run_folder, capsys):
        before = (run_folder / "model.safetensors").read_bytes()
        error = error_of(capsys, run_folder, "trainer.max_steps=1", "trainer.seed=5")
        assert error.endswith(f"or --overwrite, which moves that run to {run_folder}.1")
        assert (run_folder / "model.safetensors").read_bytes() == before
        assert train(run_folder, "trainer.max_steps=1", "trainer.seed=5", "--overwrite") == 0
        assert f"now {run_folder}.1" in capsys.readouterr().out
        assert (run_folder.with_name("run.1") / "model.safetensors").read_bytes() == before
        assert [path.name for path in run_folder.glob("checkpoint-*")] == ["checkpoint-1"]
        assert not (run_folder.with_name("run.1") / ".segformer.lock").exists()

    def test_an_unfinished_run_is_archived(self, run_folder, capsys):
        (run_folder / "config.json").unlink()
        assert train(run_folder, "trainer.max_steps=1") == 0
        assert (run_folder.with_name("run.1") / "checkpoint-8").is_dir()

    def test_the_seed_decides_the_weights(self, finished, tmp_path):
        assert train(tmp_path / "again", "trainer.max_steps=8", "trainer.save_steps=4") == 0
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


class TestResume:
    @pytest.mark.parametrize("step", [4, 6], ids=["within an epoch", "between epochs"])
    def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(self, finished, tmp_path, step, capsys):
        arguments = ("trainer.max_steps=8", f"trainer.save_steps={step}")
        assert train(tmp_path / "run", *arguments) == 0
        shutil.rmtree(tmp_path / "run" / "checkpoint-8")
        assert train(tmp_path / "run", *arguments, "--resume") == 0
        assert f"from {tmp_path / 'run'}/checkpoint-{step}" in capsys.readouterr().out
        expected, found = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path / "run"))
        for name, weights in expected.items():
            torch.testing.assert_close(found[name], weights, rtol=0, atol=1e-6)

    def test_a_broken_checkpoint_is_named_and_skipped(self, run_folder, capsys):
        weights = run_folder / "checkpoint-8" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert newest_whole_checkpoint(run_folder) == run_folder / "checkpoint-4"
        assert "checkpoint-8, which is broken: model.safetensors does not open" in capsys.readouterr().out

    @pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "rng_state.pth", "config.json"])
    def test_a_file_cut_short_is_a_defect(self, run_folder, name):
        file = run_folder / "checkpoint-8" / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert find_defect(file.parent).startswith(f"{name} does not open")

    def test_a_changed_byte_in_the_optimizer_is_a_defect(self, run_folder):
        file = run_folder / "checkpoint-8" / "optimizer.pt"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        assert "wrong checksum" in find_defect(file.parent)

    @pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "scheduler.pt"])
    def test_a_missing_file_is_a_defect(self, run_folder, name):
        (run_folder / "checkpoint-8" / name).unlink()
        assert "missing" in find_defect(run_folder / "checkpoint-8")

    def test_a_missing_shard_is_a_defect(self, run_folder):
        index = run_folder / "checkpoint-8" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
        assert "model-00002-of-00002.safetensors" in find_defect(index.parent)

    def test_a_whole_checkpoint_has_no_defect(self, finished):
        assert find_defect(finished / "checkpoint-8") is None

    def test_a_finished_run_is_not_trained_any_further(self, run_folder):
        before = (run_folder / "model.safetensors").read_bytes()
        assert train(run_folder, "trainer.max_steps=8", "--resume") == 0
        assert (run_folder / "model.safetensors").read_bytes() == before

    @pytest.mark.parametrize("epochs", [1, 1.5])
    def test_a_run_that_was_finished_by_epochs_is_not_trained_any_further_either(self, tmp_path, epochs):
        arguments = ("trainer.max_steps=-1", f"trainer.num_train_epochs={epochs}", "trainer.save_steps=3")
        steps = []
        for more in ([], ["--resume"], ["--resume", "trainer.num_train_epochs=2"]):
            assert train(tmp_path / "run", *arguments, *more) == 0
            steps.append(json.loads((tmp_path / "run" / "training.json").read_text())["steps"])
        assert steps == [6 * epochs, 6 * epochs, 12]

    def test_nothing_to_resume_is_an_error(self, tmp_path, capsys):
        assert "no checkpoint in" in error_of(capsys, tmp_path / "run", "--resume")

    def test_another_network_than_the_recipe_s_is_not_resumed(self, run_folder, capsys):
        error = error_of(capsys, run_folder, "--resume", "model.decoder_hidden_size=24")
        assert "decoder_hidden_size is 24; expected 16, as in" in error

    def test_ctrl_c_prints_the_command_to_resume(self, run_folder, monkeypatch, capsys):
        def interrupted(recipe, resume, overwrite):
            raise KeyboardInterrupt

        monkeypatch.setattr(hf_segformer.training.run, "fine_tune", interrupted)
        assert train(run_folder, "trainer.max_steps=8") == 130
        error = capsys.readouterr().err
        assert f"Resume from {run_folder}/checkpoint-8 with: segformer train shapes_b0 " in error
        assert "--resume\n" in error
        assert train(run_folder / "none") == 130
        assert "no checkpoint to resume from yet" in capsys.readouterr().err


def test_a_log_gets_no_carriage_returns(tmp_path, capsys):
    evaluated = ("trainer.max_steps=2", "trainer.eval_strategy=steps", "trainer.eval_steps=1")
    assert train(tmp_path / "run", *evaluated) == 0
    printed = capsys.readouterr()
    assert "\r" not in printed.out + printed.err


class TestData:
    def test_check_data_reads_all_and_trains_nothing(self, tmp_path, capsys):
        assert train(tmp_path / "run", "--check-data") == 0
        assert "triangle" in capsys.readouterr().out
        assert not (tmp_path / "run").exists()

    def test_show_batch_draws_the_first_input_and_trains_nothing(self, tmp_path, capsys):
        assert train(tmp_path / "run", "--show-batch", str(tmp_path / "batch.png")) == 0
        with Image.open(tmp_path / "batch.png") as image:
            assert image.width > 300
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("seeds", [(), ("trainer.seed=3",), ("trainer.seed=3", "trainer.data_seed=5")])
    def test_the_batch_that_is_shown_is_the_trainers_first(self, tmp_path, seeds):
        recipe = read_recipe("shapes_b0", [*SMALL, f"trainer.output_dir={tmp_path / 'run'}", *seeds])
        arguments = training_arguments(recipe)
        data, loss = prepare_data(recipe, arguments, None)
        trainer = build_trainer(build_model(recipe.model, data.names), arguments, recipe, loss, data)
        shown = [sample["pixel_values"] for sample in first_samples(data, recipe, 4, arguments)]
        assert torch.equal(next(iter(trainer.get_train_dataloader()))["pixel_values"], torch.stack(shown))

    def test_faults_of_the_data_are_reported_before_training(self, tmp_path, capsys):
        root = road_scenes(tmp_path / "data")
        Image.new("L", (60, 44), 77).save(root / "trainannot" / "frame1.png")
        arguments = (f"data.root={root}", "data.num_train=0", "data.num_eval=0")
        error = error_of(capsys, tmp_path / "run", *arguments, recipe="camvid_b0")
        assert "frame1" in error
        assert "77" in error
        assert not (tmp_path / "run").exists()

    def test_a_clash_of_classes_names_both_lists(self, finished, tmp_path, capsys):
        names = '["floor", "disc", "triangle", "bar", "ring", "cross", "star"]'
        error = error_of(capsys, tmp_path / "run", f"model.checkpoint={finished}", f"data.names={names}")
        assert "ground, disc" in error
        assert "floor, disc" in error


class TestOtherData:
    """Streams, other numbers of bands and a single class, through a whole run and an evaluation of its result."""

    def evaluated(self, folder, arguments):
        written = {path.name for path in folder.iterdir()}
        assert {"metrics.json", "confusion.png", "prediction.png", "README.md", "training.json"} <= written
        assert {"report.html", "table.csv", "per_image.csv", "worst.png", "reliability.png"} <= written
        first = json.loads((folder / "metrics.json").read_text())
        evaluate_recipe(str(folder), read_recipe("shapes_b0", arguments), folder)
        assert {"report.html", "table.csv", "per_image.csv", "worst.png"} <= {path.name for path in folder.iterdir()}
        again = json.loads((folder / "metrics.json").read_text())
        shared = first["classes"][0].keys()
        assert [{key: row[key] for key in shared} for row in again["classes"]] == first["classes"]
        assert {key: again[key] for key in first if key not in ("classes", "seconds")} == {
            key: first[key] for key in first if key not in ("classes", "seconds")
        }
        return first

    def stream(self, root):
        """Overrides for eight training images in two files, and two others."""
        rng = np.random.default_rng(0)
        features = Features({"image": ImageColumn(), "label": ImageColumn()})
        root.mkdir()
        for name, count in (("train-0", 4), ("train-1", 4), ("validation", 2)):
            rows = [
                {
                    "image": Image.fromarray(rng.integers(0, 256, (40, 52, 3), dtype=np.uint8)),
                    "label": Image.fromarray(rng.integers(0, 3, (40, 52), dtype=np.uint8)),
                }
                for _ in range(count)
            ]
            Dataset.from_list(rows, features=features).to_parquet(root / f"{name}.parquet")
        return (
            "data.source=dataset",
            f"data.root={root}",
            "data.streaming=true",
            "augmentation.class_balance=0",  # a stream cannot be drawn from
            'data.names=["ground", "disc", "bar"]',
            "data.num_train=0",
            "data.num_eval=0",
        )

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_stream_resumes_in_its_second_pass(self, tmp_path, workers, capsys):
        data = self.stream(tmp_path / "data")
        accumulated = ("trainer.per_device_train_batch_size=3", "trainer.gradient_accumulation_steps=2")
        settings = ("trainer.max_steps=4", "trainer.save_steps=2", *accumulated)
        settings = (*settings, f"trainer.dataloader_num_workers={workers}")
        assert train(tmp_path / "run", *data, *settings) == 0
        assert "a stream of images to train on, 2 others" in capsys.readouterr().out
        assert self.evaluated(tmp_path / "run", data)["dataset"]["images"] == 2
        facts = json.loads((tmp_path / "run" / "training.json").read_text())
        assert "epochs" not in facts  # a stream has no length
        assert facts["steps"] == 4
        whole = load_file(tmp_path / "run" / "model.safetensors")
        shutil.rmtree(tmp_path / "run" / "checkpoint-4")
        assert train(tmp_path / "run", *data, *settings, "--resume") == 0
        for name, weights in load_file(tmp_path / "run" / "model.safetensors").items():
            torch.testing.assert_close(weights, whole[name], rtol=0, atol=1e-6)

    def test_the_first_batch_of_a_stream_is_drawn(self, tmp_path):
        data = self.stream(tmp_path / "data")
        assert train(tmp_path / "run", *data, "--show-batch", str(tmp_path / "batch.png")) == 0
        assert (tmp_path / "batch.png").is_file()

    def folders(self, root, bands, labels):
        rng = np.random.default_rng(0)
        for index in range(6):
            for folder in ("images", "masks"):
                (root / folder).mkdir(parents=True, exist_ok=True)
            image = rng.integers(0, 4000, (bands, 40, 52)).astype(np.uint16)
            np.save(root / "images" / f"{index}.npy", image)
            Image.fromarray(rng.choice(labels, (40, 52)).astype(np.uint8)).save(root / "masks" / f"{index}.png")
        return (
            "data.source=folders",
            f"data.root={root}",
            "data.eval_share=0.4",
            "data.num_train=0",
            "data.num_eval=0",
        )

    def test_four_bands_and_a_single_class(self, tmp_path):
        data = (
            *self.folders(tmp_path / "data", 4, [0, 255]),
            'data.names=["water"]',
            "data.label_values=[0, 255]",
            "model.num_channels=4",
            "augmentation.distortion=0",
        )
        evaluation = ("trainer.max_steps=2", "trainer.eval_strategy=steps", "trainer.eval_steps=2")
        assert train(tmp_path / "run", *data, *evaluation, "loss.dice=1.0", "loss.class_weights=log") == 0
        found = self.evaluated(tmp_path / "run", data)
        assert [row["name"] for row in found["classes"]] == ["background", "water"]
        assert sum(row["pixels"] for row in found["classes"]) == found["dataset"]["images"] * 40 * 52

    def test_wide_images_cannot_be_distorted_and_an_earlier_run_is_not_archived(self, tmp_path, run_folder, capsys):
        data = (*self.folders(tmp_path / "data", 4, [0, 1]), 'data.names=["a", "b"]', "model.num_channels=4")
        assert "or augmentation.distortion=0" in error_of(capsys, run_folder, *data, "--overwrite")
        assert not run_folder.with_name("run.1").exists()


class TestRecipe:
    def test_loss_and_class_weights_come_from_the_recipe(self, finished, tmp_path):
        weighted = ("loss.dice=1.0", "loss.class_weights=inverse_sqrt")
        assert train(tmp_path / "run", "trainer.max_steps=2", *weighted) == 0
        first, plain = (
            json.loads((folder / "training.json").read_text())["curve"][0]["loss"]
            for folder in (tmp_path / "run", finished)
        )
        assert first > plain + 0.5  # Dice starts near 1

    # PEFT asks by the name that Transformers 5.23 renamed.
    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
    def test_adapters_are_merged_into_a_model_that_needs_no_peft(self, finished, tmp_path, capsys):
        pytest.importorskip("peft")
        arguments = (f"model.checkpoint={finished}", "lora.rank=2", "trainer.max_steps=3")
        assert train(tmp_path / "run", *arguments) == 0
        _, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run", output_loading_info=True)
        assert not any(info.values())
        before, after = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path / "run"))
        changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
        assert {"query", "value", "classifier"} <= changed
        assert "dense1" not in changed
        assert train(tmp_path / "run", *arguments, "--resume", "lora.alpha=4") == 1
        assert "lora.alpha is 4; expected 16, as in" in capsys.readouterr().err
        assert train(tmp_path / "run", *arguments, "--resume", "lora.rank=0") == 1
        assert "holds adapters, but lora.rank is 0" in capsys.readouterr().err


class TestTrackers:
    def test_tensorboard_gets_predictions_at_each_evaluation(self, tmp_path, monkeypatch):
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
        evaluated = ("trainer.max_steps=2", "trainer.eval_strategy=steps", "trainer.eval_steps=1")
        assert train(tmp_path / "run", *evaluated, 'trainer.report_to=["tensorboard"]') == 0
        board = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
        assert [event.step for event in board.Images("predictions")] == [1, 2]
        assert board.Images("predictions")[0].width > 700
        assert "eval/mean_iou" in board.Tags()["scalars"]

    @pytest.mark.parametrize("name", ["wandb", "trackio"])
    def test_other_trackers_get_predictions(self, finished, name, monkeypatch):
        logged = []
        module = SimpleNamespace(log=logged.append, Image=lambda image: ("image", image.size))
        monkeypatch.setitem(sys.modules, name, module)
        data = load_data(DataConfig(source="shapes", image_size=32, num_train=1, num_eval=3))
        trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[]))
        model = AutoModelForSemanticSegmentation.from_pretrained(finished)
        arguments, state = SimpleNamespace(report_to=[name]), SimpleNamespace(is_world_process_zero=True)
        LogPredictions(trainer, data).on_evaluate(arguments, state, None, model=model)
        [[(key, (kind, size))]] = [entry.items() for entry in logged]
        assert (key, kind) == ("predictions", "image")
        assert size[0] > 700


class TestErrors:
    def test_a_folder_that_cannot_be_written_is_reported_before_the_data_are_read(self, tmp_path, capsys):
        (tmp_path / "file").touch()
        error = error_of(capsys, tmp_path / "file" / "run", "data.source=folders", "data.root=/")
        assert f"{tmp_path}/file/run cannot be written to ({tmp_path}/file: Not a directory)" in error
        assert "trainer.output_dir" in error

    def test_a_stream_needs_a_number_of_steps(self, tmp_path, capsys):
        arguments = ("data.source=dataset", f"data.root={tmp_path}", "data.streaming=true", "trainer.max_steps=-1")
        assert error_of(capsys, tmp_path / "run", *arguments).endswith("set trainer.max_steps")

    def test_an_error_in_a_worker_is_one_line(self, tmp_path, capsys):
        """The check before the training sees the first image, which is good."""
        worker = "trainer.dataloader_num_workers=1"

        def broken(self, key):
            if get_worker_info() is None:
                return original(self, key)
            raise ValueError(f"image {key[1]} is\nnot good: at all")

        original = TrainDataset.__getitem__
        with mock.patch.object(TrainDataset, "__getitem__", broken):
            error = error_of(capsys, tmp_path / "run", worker, "trainer.max_steps=1")
        assert re.fullmatch(r"segformer: image \d+ is not good: at all", error)

    def test_adapters_need_a_trained_encoder(self, tmp_path, capsys):
        assert error_of(capsys, tmp_path / "run", "lora.rank=2").endswith("set model.checkpoint")

    def test_a_run_without_a_step_is_an_error(self, tmp_path, capsys):
        arguments = ("trainer.per_device_train_batch_size=100", "trainer.dataloader_drop_last=true")
        assert "nothing was trained" in error_of(capsys, tmp_path / "run", *arguments)

    def test_the_best_metric_must_be_one_that_is_measured(self, tmp_path, capsys):
        steps = ("trainer.eval_strategy=steps", "trainer.eval_steps=6", "trainer.save_steps=6")
        arguments = ("trainer.load_best_model_at_end=true", *steps)
        error = error_of(capsys, tmp_path / "run", *arguments, "trainer.metric_for_best_model=miou")
        assert "trainer.metric_for_best_model is 'miou'; expected one of mean_iou" in error
        assert "iou_star" in error

    def test_the_best_metric_must_be_of_a_class_that_is_there(self, tmp_path, capsys, monkeypatch):
        counts = np.ones((2, len(shapes.NAMES) + 1), dtype=np.int64)
        counts[1, shapes.NAMES.index("star")] = 0
        monkeypatch.setattr("hf_segformer.training.run.check_data", lambda *arguments: counts)
        metric = ("trainer.eval_strategy=steps", "trainer.metric_for_best_model=iou_star", "trainer.max_steps=1")
        error = error_of(capsys, tmp_path / "run", *metric, "trainer.save_strategy=best")
        assert "is iou_star, but no pixel of the evaluation images is 'star': set it to mean_iou" in error
        assert not (tmp_path / "run").exists()

    def test_an_impossible_number_names_its_key(self, tmp_path, capsys):
        assert "trainer.logging_steps: " in error_of(capsys, tmp_path / "run", "trainer.logging_steps=0")

    def test_an_impossible_value_is_one_line(self, tmp_path, capsys):
        error = error_of(capsys, tmp_path / "run", "trainer.lr_scheduler_type=linaer")
        assert "trainer.lr_scheduler_type: linaer is not a valid SchedulerType" in error


class TestModel:
    def test_a_checkpoint_keeps_its_encoder_and_gets_a_head_for_these_classes(self, tmp_path):
        config = SegFormerConfig(**TINY, num_labels=5)
        SegFormerForSemanticSegmentation(config).save_pretrained(tmp_path)
        model = build_model({"variant": "b0", "checkpoint": str(tmp_path), "drop_path_rate": 0.3}, NAMES)
        assert (model.config.num_labels, model.config.drop_path_rate) == (3, 0.3)
        saved = load_file(tmp_path / "model.safetensors")
        for name, weights in model.segformer.state_dict().items():
            assert torch.equal(weights, saved[f"segformer.{name}"])

    def test_a_checkpoint_of_another_shape_is_refused(self, tmp_path):
        SegFormerForSemanticSegmentation(SegFormerConfig(**TINY)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"lacks .* weights of the encoder"):
            build_model({"checkpoint": str(tmp_path), "hidden_sizes": [16, 16, 16, 16]}, NAMES)


class TestCamVid:
    def test_real_images_train_from_their_folder_or_its_parent(self, tmp_path, capsys):
        road_scenes(tmp_path / "data" / "CamVid")
        arguments = (f"data.root={tmp_path / 'data'}", "data.num_train=0", "data.num_eval=0", "trainer.max_steps=2")
        assert train(tmp_path / "run", *arguments, recipe="camvid_b0") == 0
        assert "bicyclist" in capsys.readouterr().out
        processor = SegFormerImageProcessor.from_pretrained(tmp_path / "run")
        assert processor(Image.new("RGB", (60, 44)), return_tensors="pt").pixel_values.shape == (1, 3, 64, 64)
