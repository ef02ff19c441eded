"""The recipes in configuration/: each is complete, and the paper's have the values of the paper and its code."""

from pathlib import Path

import pytest
import torch

from hf_segformer import SegFormerForSemanticSegmentation
from hf_segformer.training.building import fresh_config, training_arguments
from hf_segformer.training.optimization import poly_lr_with_warmup
from hf_segformer.training.recipe import read_recipe

FILES = sorted((Path(__file__).parents[2] / "configuration").glob("*.toml"))
VARIANTS = ["b0", "b1", "b2", "b3", "b4", "b5"]
# Network with a head of 150 or 19 classes (facts of the original code).
PARAMETERS = {
    "ade20k": [3_752_694, 13_715_798, 27_461_974, 47_337_814, 64_108_374, 84_708_694],
    "cityscapes": [3_719_027, 13_682_131, 27_361_235, 47_237_075, 64_007_635, 84_607_955],
}
PAPER = [(data, variant) for data in PARAMETERS for variant in VARIANTS]


@pytest.fixture
def read(tmp_path):
    """Reads a recipe of the repository, on a CPU and with a folder of data that is there."""

    def read(name, *overrides):
        path = next(file for file in FILES if file.stem == name)
        root = f"data.root={tmp_path}"
        return read_recipe(path, [root, "trainer.use_cpu=true", f"trainer.output_dir={tmp_path}/run", *overrides])

    return read


def test_the_recipes_are_complete():
    others = ["binary_b0", "camvid_b0", "lora_b0", "shapes_b0", "shapes_hard_b0"]
    assert [file.stem for file in FILES] == sorted(others + [f"{data}_{variant}" for data, variant in PAPER])


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_a_recipe_builds_every_part_of_a_run(read, name):
    recipe = read(name)
    arguments = training_arguments(recipe)
    config = fresh_config(recipe.model, num_labels=len(recipe.data.names) or 4)
    with torch.device("meta"):
        model = SegFormerForSemanticSegmentation(config)
    assert model.decode_head.classifier.out_channels == (len(recipe.data.names) or 4)
    assert recipe.augmentation.crop_size % 32 == 0
    assert recipe.loss.cross_entropy == 1.0
    assert recipe.evaluation.scales == [1.0]
    assert arguments.max_steps > arguments.get_warmup_steps(arguments.max_steps) > 0
    assert recipe.optimizer.power == 1.0
    # Every evaluation is of a checkpoint.
    assert arguments.eval_steps % arguments.save_steps == 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_writes_to_a_folder_of_its_name(tmp_path, file):
    assert read_recipe(file, [f"data.root={tmp_path}"]).trainer["output_dir"] == f"outputs/{file.stem}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_of_real_images_needs_their_folder(file):
    if file.stem.startswith("shapes"):
        assert read_recipe(file).data.source == "shapes"
        return
    with pytest.raises(ValueError, match=r"data\.root is not set"):
        read_recipe(file)


@pytest.mark.parametrize(("data", "variant"), PAPER)
def test_optimiser_and_schedule_are_the_papers(read, data, variant):
    recipe = read(f"{data}_{variant}")
    arguments, how = training_arguments(recipe), recipe.optimizer
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    assert batch == {"ade20k": 16, "cityscapes": 8}[data]
    assert arguments.optim.startswith("adamw")
    assert arguments.learning_rate == 6e-5
    assert (arguments.adam_beta1, arguments.adam_beta2) == (0.9, 0.999)
    assert arguments.weight_decay == 0.01
    assert (how.head_lr_multiplier, how.layer_lr_decay, how.freeze_encoder) == (10.0, 1.0, False)
    assert arguments.max_steps == 160_000
    assert arguments.max_grad_norm == 0  # its gradients are not clipped
    assert arguments.lr_scheduler_type == "linear"  # which SegFormerTrainer takes for the paper's schedule
    warmup = arguments.get_warmup_steps(arguments.max_steps)
    rate = 6e-5 * poly_lr_with_warmup(1500, arguments.max_steps, warmup, how.power)
    assert warmup == 1500
    assert rate == pytest.approx(5.94375e-5)
    loss = recipe.loss
    assert (loss.cross_entropy, loss.ohem, loss.dice, loss.focal, loss.class_weights) == (1.0, 0.0, 0.0, 0.0, None)
    assert loss.label_smoothing == 0


@pytest.mark.parametrize(("data", "variant"), PAPER)
def test_augmentation_and_evaluation_are_the_papers(read, data, variant):
    recipe = read(f"{data}_{variant}")
    side = 1024 if data == "cityscapes" else 640 if variant == "b5" else 512
    augmentation = recipe.augmentation
    assert augmentation.crop_size == side
    assert augmentation.base_size == [side, 2048]
    assert augmentation.scale == [0.5, 2.0]
    assert (augmentation.max_class_share, augmentation.flip, augmentation.distortion) == (0.75, 0.5, 1.0)
    assert recipe.data.eval_size == side
    window = (recipe.evaluation.sliding_window, recipe.evaluation.stride)
    assert window == ((1024, 768) if data == "cityscapes" else (0, 0))
    assert not recipe.evaluation.flip


@pytest.mark.parametrize(("data", "variant"), PAPER)
def test_the_network_is_the_papers(read, data, variant):
    recipe = read(f"{data}_{variant}")
    config = fresh_config(recipe.model, num_labels=len(recipe.data.names))
    with torch.device("meta"):
        model = SegFormerForSemanticSegmentation(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[data][VARIANTS.index(variant)]
    assert (config.drop_path_rate, config.classifier_dropout_prob) == (0.1, 0.1)


def test_ade20k_has_its_150_classes_and_ignores_the_rest(read):
    data = read("ade20k_b0").data
    assert data.reduce_labels
    assert len(data.names) == 150
    some = {0: "wall", 2: "sky", 12: "person", 20: "car", 80: "bus", 127: "bicycle", 136: "traffic light", 149: "flag"}
    assert {index: data.names[index] for index in some} == some
    assert (data.train_split, data.eval_split_name) == ("training", "validation")


def test_cityscapes_has_its_19_classes_in_their_colours(read):
    data = read("cityscapes_b0").data
    assert not data.reduce_labels
    colors = dict(zip(data.names, map(tuple, data.palette), strict=True))
    assert len(colors) == len(set(colors.values())) == 19
    assert list(colors)[:3] == ["road", "sidewalk", "building"]
    assert list(colors)[-3:] == ["train", "motorcycle", "bicycle"]
    assert colors["road"] == (128, 64, 128)
    assert colors["vegetation"] == (107, 142, 35)
    assert colors["car"] == (0, 0, 142)
    assert colors["bicycle"] == (119, 11, 32)


@pytest.mark.parametrize("data", PARAMETERS)
@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_larger_networks_share_the_data_of_b0(read, data, variant):
    def table(name):
        return {**read(name).tables["data"], "eval_size": 0}

    assert table(f"{data}_{variant}") == table(f"{data}_b0")


def test_the_binary_recipe_is_of_one_logit_and_dice(read):
    recipe = read("binary_b0", 'data.names=["water"]')
    assert recipe.data.names == ["water"]
    assert recipe.data.label_values == [0, 255]
    assert recipe.loss.dice == 1.0
    value = recipe.loss(torch.zeros(1, 1, 8, 12), torch.ones(1, 32, 48, dtype=torch.long))
    assert value.item() == pytest.approx(0.693147 + 1 / 3, rel=1e-5)


def test_the_lora_recipe_trains_adapters(read):
    recipe = read("lora_b0")
    assert recipe.lora.rank == 16
    assert recipe.lora.target_modules == ["query", "value"]
    assert read("ade20k_b0").lora.rank == 0
