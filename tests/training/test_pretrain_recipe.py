"""Recipes of pre-training: the values of PVT, DeiT and SimMIM, and what is refused."""

import tomllib
from pathlib import Path

import pytest
import torch

from hf_segformer import SegFormerForImageClassification
from hf_segformer.training.building import fresh_config
from hf_segformer.training.pretrain import pretraining_arguments
from hf_segformer.training.pretrain_recipe import read_pretrain_recipe
from hf_segformer.training.recipe import list_recipes, read_recipe, recipe_folder
from hf_segformer.training.recipe_writer import write_recipe

NAMES = ["imagenet_b0", "masked_b0", "single_shapes_b0"]


@pytest.fixture
def read(tmp_path):
    return lambda name, *overrides: read_pretrain_recipe(
        name, [f"data.root={tmp_path}", "trainer.use_cpu=true", f"trainer.output_dir={tmp_path}/run", *overrides]
    )


def test_the_recipes_are_listed():
    assert list(list_recipes("pretrain")) == NAMES
    assert not set(NAMES) & set(list_recipes())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_writes_to_a_folder_of_its_name(tmp_path, name):
    assert read_pretrain_recipe(name, [f"data.root={tmp_path}"]).trainer["output_dir"] == f"outputs/{name}"


def test_imagenet_is_trained_as_by_pvt(read):
    recipe = read("imagenet_b0")
    arguments, augmentation = pretraining_arguments(recipe), recipe.augmentation
    assert 8 * arguments.per_device_train_batch_size == 1024
    assert arguments.num_train_epochs == 300
    assert arguments.learning_rate == 5e-4 * 1024 / 512
    steps = 300 * 1250
    assert arguments.get_warmup_steps(steps) == pytest.approx(5 * 1250, abs=20)
    assert arguments.learning_rate * arguments.lr_scheduler_kwargs["min_lr_rate"] == pytest.approx(1e-5)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.weight_decay) == (0.9, 0.999, 0.05)
    assert arguments.max_grad_norm == 0
    assert (augmentation.crop_size, augmentation.scale, augmentation.flip) == (224, [0.08, 1.0], 0.5)
    assert (augmentation.randaugment, augmentation.randaugment_operations) == (9, 2)
    assert (augmentation.erasing, augmentation.mixup, augmentation.cutmix) == (0.25, 0.8, 1.0)
    assert recipe.pretraining.label_smoothing == 0.1
    assert recipe.ema.decay == 0.9999
    with torch.device("meta"):
        model = SegFormerForImageClassification(fresh_config(recipe.model, num_labels=1000))
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_576_392
    assert model.config.drop_path_rate == 0.1


def test_masked_images_are_those_of_simmim(read):
    recipe = read("masked_b0")
    assert (recipe.pretraining.mask_ratio, recipe.pretraining.mask_size) == (0.6, 32)
    assert (recipe.augmentation.crop_size, recipe.augmentation.scale) == (192, [0.67, 1.0])
    arguments = pretraining_arguments(recipe)
    assert (arguments.weight_decay, arguments.max_grad_norm) == (0.05, 5.0)


def test_a_recipe_can_build_on_one_of_the_package(tmp_path):
    (tmp_path / "mine.toml").write_text(
        f'base = "masked_b0"\n[data]\nroot = "{tmp_path}"\n[trainer]\noutput_dir = "outputs/mine"\n'
    )
    recipe = read_pretrain_recipe(tmp_path / "mine.toml")
    assert recipe.pretraining.is_masked
    assert recipe.data.root == str(tmp_path)


def test_a_written_recipe_reads_the_same(read, tmp_path):
    recipe = read("imagenet_b0", "model.variant=b2")  # its schedule has an inline table
    again = read_pretrain_recipe(write_recipe(recipe, tmp_path))
    assert again.tables == recipe.tables
    source = Path(recipe_folder("pretrain") / "single_shapes_b0.toml").read_text()
    unchanged = read_pretrain_recipe("single_shapes_b0")
    assert write_recipe(unchanged, tmp_path).read_text() == source
    assert tomllib.loads(source)["pretraining"]["method"] == "classification"


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("masked_b0", "pretraining.mask_rati=0.5", "did you mean 'pretraining.mask_ratio'"),
        ("masked_b0", "loss.dice=1", "unknown table 'loss'"),
        ("masked_b0", "augmentation.mixup=0.8", "augmentation.mixup is 0.8, which is for classification"),
        ("imagenet_b0", "trainer.per_device_train_batch_size=1", "augmentation.mixup mixes the images of a batch"),
        ("masked_b0", "data.streaming=true", "data.streaming is set for imagefolder"),
        ("imagenet_b0", "trainer.metric_for_best_model=mean_iou", "expected one of top1, top5, loss"),
        ("masked_b0", "trainer.metric_for_best_model=top1", "expected one of loss"),
        ("imagenet_b0", "model.variant=b9", "model.variant is 'b9'"),
        ("imagenet_b0", "trainer.label_smoothing_factor=0.1", "in pre-training pretraining.label_smoothing"),
        ("imagenet_b0", "trainer.per_device_eval_batch_size=4", "pre-training takes the training's"),
    ],
)
def test_what_does_not_fit_is_named(read, name, override, message):
    with pytest.raises(ValueError, match=r".") as caught:
        read(name, override)
    assert message in str(caught.value)


def test_a_stream_needs_a_number_of_steps(read):
    with pytest.raises(ValueError, match=r"a stream has no length: set trainer\.max_steps"):
        read("imagenet_b0", "data.source=dataset", "data.streaming=true")


def test_recipes_of_the_other_command_are_named():
    with pytest.raises(
        FileNotFoundError, match="imagenet_b0 is no recipe of `segformer train`: run segformer pretrain"
    ):
        read_recipe("imagenet_b0")
    with pytest.raises(FileNotFoundError, match="camvid_b0 is no recipe of `segformer pretrain`: run segformer train"):
        read_pretrain_recipe("camvid_b0")
    with pytest.raises(FileNotFoundError, match=r"did you mean masked_b0\?"):
        read_pretrain_recipe("maskd_b0")
