"""Recipes: every name and value checked at once, the nearest right one named, nothing heavy imported for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_segformer.training.data_recipe import DataRecipe
from hf_segformer.training.recipe import LoraRecipe, read_recipe

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "configuration" / "shapes_b0.toml"


def recipe_file(folder, text):
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_command_line_wins_over_the_file():
    overrides = ["trainer.max_steps=24", "data.image_size=64", "trainer.learning_rate=1", "trainer.output_dir=a b=c"]
    recipe = read_recipe(SHAPES, overrides)
    assert recipe.data.image_size == 64
    assert recipe.trainer["max_steps"] == 24
    assert recipe.trainer["learning_rate"] == 1
    assert recipe.trainer["output_dir"] == "a b=c"


@pytest.mark.parametrize(
    ("literal", "value"),
    [("[8, 8, 16, 16]", [8, 8, 16, 16]), ("[1]", [1])],
)
def test_lists_are_written_as_in_toml(literal, value):
    assert read_recipe(SHAPES, [f"model.hidden_sizes={literal}"]).model["hidden_sizes"] == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_step=3", "unknown key 'trainer.max_step', did you mean 'trainer.max_steps'"),
        ("data.imagesize=64", "did you mean 'data.image_size'"),
        ("model.deph=[1]", "did you mean 'model.depths'"),
        ("trainr.max_steps=3", "unknown table 'trainr', did you mean 'trainer'"),
        ("trainer.max_steps=many", r"trainer.max_steps is 'many' \(str\), but it must be int"),
        ("trainer.max_steps=1.5", "but it must be int"),
        ("trainer.bf16=1", "but it must be bool"),
        ("trainer.bf16=True", "but it must be bool"),
        ("model.depths=3", "model.depths is 3"),
        ('model.depths=["a"]', "but it must be list"),
        ("model.depths=[1, 2", "can not read the value"),
        ("trainer.batch_eval_metrics=false", "settled by the program"),
        ("trainer.push_to_hub=true", "publish what was trained by `segformer push`"),
        ("max_steps=3", "table.key=value"),
        ("trainer.max_steps", "table.key=value"),
        ("data.source=shape", "unknown data.source 'shape', did you mean 'shapes'"),
        ("data.image_size=8", "data.image_size is 8"),
        ("data.num_train=0", "data.num_train is 0"),
        ("data.num_eval=-1", "data.num_eval is -1"),
        ("data.seed=-1", "data.seed is -1"),
        ("data.source=camvid", "data.root is not set"),
        ("model.variant=b9", "unknown model.variant 'b9', did you mean 'b"),
        ("augmentation.crop=64", "did you mean 'augmentation.crop_size'"),
        ("loss.dise=1.0", "did you mean 'loss.dice'"),
        ("loss.class_weights=3", "but it must be list"),
        ("optimizer.head_lr=10", "did you mean 'optimizer.head_lr_multiplier'"),
        ("evaluation.sliding_windows=512", "did you mean 'evaluation.sliding_window'"),
        ("trainer.max_steps=0", "trainer.max_steps is 0"),
        ("trainer.per_device_train_batch_size=0", "trainer.per_device_train_batch_size is 0"),
        ("trainer.dataloader_num_workers=-1", "trainer.dataloader_num_workers is -1"),
        ("trainer.learning_rate=-1.0", "trainer.learning_rate is -1.0"),
        ("lora.rank=-1", "lora.rank is -1"),
        ("lora.dropout=1.0", "lora.dropout is 1.0"),
        ("lora.target_modules=[]", "lora.target_modules is empty"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(override, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(SHAPES, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model\n", "is not TOML"),
        ('[modle]\nvariant = "b0"\n', "recipe.toml: unknown table 'modle', did you mean 'model'"),
        ("model = 3\n", "recipe.toml: model is 3, but it must be a table"),
        ('[data]\nsource = "shapes"\n[trainer]\noutput_dir = "o"\n', "names no model"),
        ('[model]\nvariant = "b0"\n', "does not set data.source"),
        ('[model]\nvariant = "b0"\n[data]\nsource = "shapes"\n', "does not set trainer.output_dir"),
        ("base = 3\n", "base is 3, but it must be the name of a recipe"),
        ('base = "recipe.toml"\n', "builds on itself"),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe_file(tmp_path, text))


def test_a_missing_file_names_the_one_that_was_meant():
    with pytest.raises(FileNotFoundError, match=r"there is no recipe .*shape_b0.toml: did you mean .*shapes_b0.toml"):
        read_recipe(SHAPES.with_name("shape_b0.toml"))


def test_the_data_table_is_checked_without_a_file_too():
    with pytest.raises(ValueError, match=r"data\.num_train is 0, but it must be at least 1"):
        DataRecipe(source="shapes")


def test_a_recipe_builds_on_another_and_wins(tmp_path):
    base = recipe_file(tmp_path, SHAPES.read_text())
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text(f'base = "{base.name}"\n[trainer]\nmax_steps = 5\nseed = 3\n')
    second.write_text('base = "first.toml"\n[trainer]\nseed = 4\n[loss]\ndice = 1.0\n')
    recipe = read_recipe(second)
    assert (recipe.trainer["max_steps"], recipe.trainer["seed"], recipe.trainer["save_steps"]) == (5, 4, 300)
    assert recipe.loss.dice == 1.0
    assert recipe.data == read_recipe(SHAPES).data


def test_a_base_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no recipe .*none.toml"):
        read_recipe(recipe_file(tmp_path, 'base = "none.toml"\n'))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.root=no/such/folder", r"there is no folder no/such/folder: data.root must name"),
        ("model.checkpoint=./nowhere", r"there is no \./nowhere, which model.checkpoint names"),
    ],
)
def test_a_missing_folder_is_named_at_once(override, message):
    with pytest.raises(FileNotFoundError, match=message):
        read_recipe(SHAPES.with_name("camvid_b0.toml"), [f"data.root={ROOT}", override])


def test_every_table_becomes_what_it_stands_for():
    recipe = read_recipe(
        SHAPES, ["augmentation.crop_size=64", "optimizer.power=0.9", "evaluation.flip=true", "lora.rank=4"]
    )
    assert recipe.augmentation.crop_size == 64
    assert recipe.optimization.power == 0.9
    assert recipe.evaluation.flip is True
    assert recipe.lora == LoraRecipe(rank=4)


def test_a_misspelt_key_is_told_before_anything_heavy_is_imported():
    code = (
        "import sys; from training.finetune import main; "
        f"code = main([{str(SHAPES)!r}, 'trainer.max_step=3']); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "did you mean 'trainer.max_steps'" in result.stderr
