"""Options of augmentation in runs: resumed bit-equal, counted without a second pass, recorded, and who may run code."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_segformer.config import AugmentationConfig, DataConfig
from hf_segformer.data.sampling import ClassBalance, SampleKey
from hf_segformer.data.torch_datasets import TrainDataset, TrainStream
from hf_segformer.image_processing_segformer import SegFormerImageProcessor
from hf_segformer.training.building import final_epoch, first_samples, train_samples, training_arguments
from hf_segformer.training.data import load_data
from hf_segformer.training.data_checks import check_data
from hf_segformer.training.recipe import parse_recipe, read_recipe
from hf_segformer.training.recipe_trainer import RecipeTrainer
from hf_segformer.training.run import inspect_data
from tests.support.training import error_of, train

EVERYTHING = (
    "augmentation.scale=[0.8, 1.2]",
    "augmentation.vertical_flip=0.5",
    "augmentation.quarter_turns=0.75",
    "augmentation.rotation=15",
    "augmentation.shadow=0.5",
    "augmentation.exposure=0.5",
    "augmentation.temperature=0.3",
    "augmentation.gamma=0.4",
    "augmentation.blur=1.0",
    "augmentation.noise=8",
    "augmentation.jpeg=40",
    "augmentation.cutmix=0.3",
    "augmentation.classmix=0.4",
    "augmentation.class_balance=0.5",
)
MODULE = """
from pathlib import Path

import numpy as np

Path(__file__).with_name("it_ran").write_text("")


def augment(image, mask):
    return (image // 2 + np.random.randint(0, 9, image.shape)).astype(np.uint8), mask
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's in the current folder; `it_ran` appears beside it when its code runs."""
    (tmp_path / "users_augmentation.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "users_augmentation:augment"
    sys.modules.pop("users_augmentation", None)


@pytest.fixture
def recipe_file(tmp_path, module):
    path = tmp_path / "theirs.toml"
    path.write_text(f'base = "shapes_b0"\n[augmentation]\ncustom = "{module}"\n[trainer]\noutput_dir = "run"\n')
    return path


@pytest.fixture(scope="module")
def augmented_run(tmp_path_factory):
    """A finished run with every option on, and checkpoints at 4 and 8."""
    folder = tmp_path_factory.mktemp("augmented") / "run"
    assert train(folder, "trainer.max_steps=8", "trainer.save_steps=4", *EVERYTHING) == 0
    return folder


def test_a_run_with_every_option_resumes_bit_equal(augmented_run, tmp_path):
    folder = shutil.copytree(augmented_run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-8")
    assert train(folder, "trainer.max_steps=8", "trainer.save_steps=4", *EVERYTHING, "--resume") == 0
    expected, found = (load_file(each / "model.safetensors") for each in (augmented_run, folder))
    assert all(torch.equal(found[name], weights) for name, weights in expected.items())


def test_the_run_record_and_the_card_hold_the_options(augmented_run):
    recorded = json.loads((augmented_run / "training.json").read_text())["recipe"]["augmentation"]
    values = dict(each.removeprefix("augmentation.").split("=") for each in EVERYTHING)
    for name, value in values.items():
        assert json.loads(value) == recorded[name]
        assert f"{name} = " in (augmented_run / "README.md").read_text()
    assert read_recipe("shapes_b0", EVERYTHING).augmentation.shadow == 0.5


def test_counts_come_from_the_check_of_the_data():
    data = load_data(DataConfig("shapes", image_size=32, num_train=9, num_eval=2))
    image_counts = []
    counts = check_data(data, 7, quiet=True, image_counts=image_counts)
    assert counts[0].tolist() == np.sum(image_counts, axis=0).tolist()
    for row, found in zip(data.train, image_counts, strict=True):
        assert found[:-1].tolist() == [int((row["label"] == label).sum()) for label in range(7)]


def test_samples_are_balanced_by_a_run(tmp_path):
    overrides = ["data.image_size=32", "data.num_train=9", "data.num_eval=2", f"trainer.output_dir={tmp_path}/run"]
    recipe = read_recipe("shapes_b0", [*overrides, "augmentation.class_balance=1.0", "augmentation.crop_size=16"])
    data = load_data(recipe.data)
    with pytest.raises(ValueError, match=r"class_balance is 1.0 without counts"):
        train_samples(data, recipe)
    image_counts = []
    check_data(data, 7, quiet=True, image_counts=image_counts)
    balance = ClassBalance(np.stack(image_counts)[:, :-1], 1.0)
    samples = first_samples(replace(data, balance=balance), recipe, 9)
    keys = balance.draw(0, range(9), np.random.default_rng(0))
    assert all(isinstance(key, SampleKey) for key in keys)
    assert len(samples) == 9


def test_streams_are_not_balanced(tmp_path):
    message = r"augmentation.class_balance is 0.5, but images of a stream cannot be drawn: set data.streaming=false"
    overrides = ["data.source=imagefolder", f"data.root={tmp_path}", "data.streaming=true", "trainer.max_steps=3"]
    with pytest.raises(ValueError, match=message):
        read_recipe("shapes_b0", [*overrides, "augmentation.class_balance=0.5"])


# --- Crops of the last passes -----------------------------------------------------------------------------------------

FINAL = ("augmentation.crop_size=32", "augmentation.final_crop_size=48", "augmentation.final_share=0.5")


def arguments_of(*overrides):
    recipe = read_recipe("shapes_b0", [*FINAL, *overrides, "trainer.use_cpu=true", "trainer.output_dir=unused"])
    return recipe.augmentation, training_arguments(recipe)


@pytest.mark.parametrize(
    ("overrides", "num_images", "first"),
    [
        (["trainer.max_steps=30", "trainer.per_device_train_batch_size=4"], 12, 5),  # 10 passes
        (["trainer.max_steps=9", "trainer.per_device_train_batch_size=4"], 13, 1),  # 2 1/4 of 4 steps: the last two
        (["trainer.max_steps=9", "trainer.gradient_accumulation_steps=2"], 64, 2),  # 4 1/2 of 2 steps
        (["trainer.max_steps=10", "trainer.dataloader_drop_last=true"], 31, 5),  # 10 of 1 step
        (["trainer.max_steps=100", "augmentation.final_share=0.07"], 16, 93),  # 0.07 * 100 > 7
        (["trainer.max_steps=-1", "trainer.num_train_epochs=5"], 12, 2),
        (["trainer.max_steps=3", "augmentation.final_share=1.0"], 640, 0),
        (["trainer.max_steps=30", "augmentation.final_crop_size=0"], 12, None),
    ],
)
def test_the_last_passes_are_a_share_rounded_up(overrides, num_images, first):
    batch = ["trainer.per_device_train_batch_size=16"]
    assert final_epoch(*arguments_of(*batch, *overrides), num_images) == first


def test_too_few_passes_are_refused():
    message = (
        r"final_share is 0.5, which of 0.75 passes over the images, .* is all: train for longer, or set .*_share=1"
    )
    with pytest.raises(ValueError, match=message):
        final_epoch(*arguments_of("trainer.max_steps=3", "trainer.per_device_train_batch_size=4"), 16)


def test_streams_have_no_last_passes(tmp_path):
    overrides = ["data.source=imagefolder", f"data.root={tmp_path}", "data.streaming=true", "trainer.max_steps=3"]
    message = r"final_crop_size is 48, but a stream has no last passes: .* augmentation.final_crop_size=0"
    with pytest.raises(ValueError, match=message):
        read_recipe("shapes_b0", [*overrides, "augmentation.class_balance=0", *FINAL])


def test_a_data_set_needs_the_first_of_the_last_passes():
    message = r"final_crop_size is 48 and final_epoch None; expected a size and the first epoch that has it"
    with pytest.raises(ValueError, match=message):
        TrainDataset([], AugmentationConfig(final_crop_size=48), SegFormerImageProcessor())
    with pytest.raises(ValueError, match=r"final_crop_size is 0 and final_epoch 3"):
        TrainDataset([], AugmentationConfig(), SegFormerImageProcessor(), final_epoch=3)
    with pytest.raises(ValueError, match=r"final_crop_size is 48 for a stream, which has no last passes"):
        TrainStream([], AugmentationConfig(final_crop_size=48), SegFormerImageProcessor())


def test_too_few_passes_move_no_earlier_run(tmp_path, capsys):
    assert train(tmp_path / "run", "trainer.max_steps=1", "trainer.save_strategy=no") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    error = error_of(capsys, tmp_path / "run", *FINAL, "trainer.max_steps=1", "--overwrite")
    assert "final_share is 0.5, which of 0.1667 passes" in error  # 24 images, 4 a step
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_too_few_passes_of_folds_move_no_earlier_runs(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    error = error_of(capsys, tmp_path / "run", *FINAL, "trainer.max_steps=1", "--folds", "3", "--overwrite")
    assert "final_share is 0.5, which of 0.25 passes" in error  # 16 of 24 images, 4 a step
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_batch_that_changes_its_size_changes_the_passes():
    with pytest.raises(ValueError, match=r"but trainer.auto_find_batch_size changes how many passes there are: set"):
        read_recipe("shapes_b0", [*FINAL, "trainer.auto_find_batch_size=true"])


def test_show_batch_draws_the_size_of_the_first_pass(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr("hf_segformer.training.run.show_batch", lambda batch, *others: sizes.append(batch))
    for share in ("0.5", "1.0"):
        options = (*FINAL, f"augmentation.final_share={share}", "trainer.max_steps=12")
        assert train(tmp_path / "run", *options, "--show-batch", str(tmp_path / "batch.png")) == 0
    assert [{sample["labels"].shape for sample in batch} for batch in sizes] == [{(32, 32)}, {(48, 48)}]


def test_an_augmentation_that_fails_on_the_last_crops_fails_before_the_training(module, tmp_path):
    code = MODULE.replace("return (", "assert mask.shape[0] < 40\n    return (")
    (tmp_path / "users_augmentation.py").write_text(code)
    options = (*FINAL, "data.image_size=64", "trainer.max_steps=12", f"augmentation.custom={module}")
    with pytest.raises(AssertionError):
        train(tmp_path / "run", *options)
    assert not (tmp_path / "run" / "recipe.toml").exists()


class SeenSizes:
    """Sides of what the network is trained on, by step."""

    def __init__(self, monkeypatch):
        self.sides = []
        step = RecipeTrainer.training_step

        def recorded(trainer, model, inputs, *rest):
            assert inputs["pixel_values"].shape[-2:] == inputs["labels"].shape[-2:]
            self.sides.append(inputs["pixel_values"].shape[-1])
            return step(trainer, model, inputs, *rest)

        monkeypatch.setattr(RecipeTrainer, "training_step", recorded)


def test_a_run_crops_its_last_passes_larger_and_resumes_bit_equal(tmp_path, monkeypatch):
    """Two steps a pass: three passes, the last two with larger crops; the run is cut off in the third."""
    options = (*FINAL, "data.num_train=8", "trainer.per_device_train_batch_size=4", "augmentation.cutmix=0.5")
    seen, folder = SeenSizes(monkeypatch), tmp_path / "run"
    assert train(folder, *options, "trainer.max_steps=6", "trainer.save_steps=5") == 0
    assert seen.sides == [32, 32, 48, 48, 48, 48]
    cut = shutil.copytree(folder, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoint-6")
    assert train(cut, *options, "trainer.max_steps=6", "trainer.save_steps=5", "--resume") == 0
    assert seen.sides[6:] == [48]
    expected, found = (load_file(each / "model.safetensors") for each in (folder, cut))
    assert all(torch.equal(found[name], weights) for name, weights in expected.items())


def test_show_batch_draws_balanced_and_mixed_samples(tmp_path):
    assert train(tmp_path / "run", *EVERYTHING, "--show-batch", str(tmp_path / "batch.png")) == 0
    with Image.open(tmp_path / "batch.png") as image:
        assert image.width > 300


# --- Code runs where its user asked for it ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--show-batch", "batch.png")])
def test_code_that_a_file_names_is_not_run(recipe_file, module, tmp_path, capsys, options):
    error = error_of(capsys, tmp_path / "run", *options, recipe=str(recipe_file))
    assert error == (
        f"segformer: augmentation.custom is '{module}' in a file, and files do not run code; expected --allow-code if "
        f"you trust it, augmentation.custom={module} on the command line, or augmentation.custom= for none"
    )
    assert not (tmp_path / "it_ran").exists()
    assert not (tmp_path / "run").exists()


def test_a_library_call_does_not_run_it_either(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file, ["data.num_train=2", "data.num_eval=1", "data.image_size=32"])
    for call in (
        recipe.check_trainable,
        lambda: train_samples(None, recipe),
        lambda: inspect_data(recipe, False, tmp_path / "batch.png"),
        parse_recipe('[model]\nvariant="b0"\n[data]\nsource="shapes"\nnum_train=1\nnum_eval=1\n[trainer]\n'
                     'output_dir="o"\n[augmentation]\ncustom="a:b"\n', "text", "name").check_code,
        recipe.with_values({"trainer": {"seed": 1}}).check_code,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="files do not run code"):
            call()
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("remedy", ["--allow-code", "augmentation.custom=users_augmentation:augment"])
def test_each_remedy_works(recipe_file, tmp_path, remedy):
    options = (remedy, "--show-batch", str(tmp_path / "batch.png"))
    assert train(tmp_path / "run", *options, recipe=str(recipe_file)) == 0
    assert (tmp_path / "it_ran").exists()
    assert (tmp_path / "batch.png").exists()


def test_no_code_at_all_is_a_remedy_too(recipe_file, tmp_path):
    options = ("augmentation.custom=", "--show-batch", str(tmp_path / "batch.png"))
    assert train(tmp_path / "run", *options, recipe=str(recipe_file)) == 0
    assert not (tmp_path / "it_ran").exists()


def test_an_override_of_other_code_is_not_a_permission_for_the_file_s(recipe_file, module):
    recipe = read_recipe(recipe_file, ["augmentation.custom=other:function"])
    recipe.check_code()
    with pytest.raises(ValueError, match="files do not run code"):
        recipe.with_values({"augmentation": {"custom": module}}).check_code()


def test_data_can_be_checked_without_running_it(recipe_file, tmp_path, capsys):
    assert train(tmp_path / "run", "--check-data", recipe=str(recipe_file)) == 0
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.slow
def test_a_run_with_code_resumes_bit_equal_and_is_not_resumed_without_permission(recipe_file, module, tmp_path, capsys):
    arguments = ("trainer.max_steps=6", "trainer.save_steps=3", f"augmentation.custom={module}")
    assert train(tmp_path / "first", *arguments) == 0
    folder = shutil.copytree(tmp_path / "first", tmp_path / "again")
    shutil.rmtree(folder / "checkpoint-6")
    assert train(folder, *arguments, "--resume") == 0
    expected, found = (load_file(each / "model.safetensors") for each in (tmp_path / "first", folder))
    assert all(torch.equal(found[name], weights) for name, weights in expected.items())
    assert json.loads((folder / "training.json").read_text())["recipe"]["augmentation"]["custom"] == module
    assert "files do not run code" in error_of(capsys, folder, "--resume", recipe=str(recipe_file))
