"""Recipes: every name and value is checked, the nearest known name suggested, nothing heavy imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_segformer.cli.main import main
from hf_segformer.config import DataConfig, LoraConfig
from hf_segformer.training.recipe import find_recipe, list_recipes, parse_overrides, read_recipe, recipe_folder

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
        ("trainer.max_step=3", "unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'"),
        ("data.imagesize=64", "did you mean 'data.image_size'"),
        ("model.deph=[1]", "did you mean 'model.depths'"),
        ("trainr.max_steps=3", "unknown table 'trainr'; did you mean 'trainer'"),
        ("trainer.max_steps=many", r"trainer.max_steps is 'many' \(str\); expected int"),
        ("trainer.max_steps=1.5", "expected int"),
        ("trainer.bf16=1", "expected bool"),
        ("trainer.bf16=True", "expected bool"),
        ("model.depths=3", "model.depths is 3"),
        ('model.depths=["a"]', "expected list"),
        ("model.depths=[1, 2", "is not TOML"),
        (
            "trainer.batch_eval_metrics=false",
            "trainer.batch_eval_metrics cannot be set: evaluation counts batch by batch",
        ),
        ("trainer.push_to_hub=true", "publish a finished run by `segformer push`"),
        ("max_steps=3", "table.key=value"),
        ("trainer.max_steps", "table.key=value"),
        ("data.source=shape", "data.source is 'shape'; expected one of shapes"),
        ("data.image_size=8", "data.image_size is 8"),
        ("data.num_train=0", "data.num_train is 0"),
        ("data.num_eval=-1", "data.num_eval is -1"),
        ("data.seed=-1", "data.seed is -1"),
        ("data.source=camvid", "data.root is not set"),
        ("model.variant=b9", "model.variant is 'b9'; expected one of b0, b1"),
        ("augmentation.crop=64", "did you mean 'augmentation.crop_size'"),
        ("loss.dise=1.0", "did you mean 'loss.dice'"),
        ("loss.class_weights=3", "expected list"),
        ("optimizer.head_lr=10", "did you mean 'optimizer.head_lr_multiplier'"),
        ("evaluation.slidingwindow=512", "did you mean 'evaluation.sliding_window'"),
        ("model.freeze=true", "unknown key 'model.freeze'; did you mean 'optimizer.freeze_encoder'"),
        ("model.learning_rate=1", "did you mean 'trainer.learning_rate'"),
        ("lora.qqqq=1", "unknown key 'lora.qqqq'; expected one of rank, alpha, dropout, target_modules"),
        ("trainer.qqqqqq=1", r"the fields of transformers.TrainingArguments are the keys of \[trainer\]"),
        ("data.qqqq=1", r"the fields of hf_segformer.config.DataConfig are the keys of \[data\]"),
        ("trainer.label_smoothing_factor=0.1", "trainer.label_smoothing_factor cannot be set: .*loss.label_smoothing"),
        ("trainer.per_device_eval_batch_size=2", "set evaluation.batch_size"),
        ("trainer.dataloader_persistent_workers=true", "set trainer.dataloader_persistent_workers=false"),
        ("trainer.dataloader_prefetch_factor=2", "leave trainer.dataloader_prefetch_factor out"),
        ("trainer.max_steps=0", "trainer.max_steps is 0"),
        ("trainer.per_device_train_batch_size=0", "trainer.per_device_train_batch_size is 0"),
        ("trainer.dataloader_num_workers=-1", "trainer.dataloader_num_workers is -1"),
        ("trainer.learning_rate=-1.0", "trainer.learning_rate is -1.0"),
        ("lora.rank=-1", "lora.rank is -1"),
        ("lora.dropout=1.0", "lora.dropout is 1.0"),
        ("lora.target_modules=[]", "lora.target_modules is empty"),
    ],
)
def test_wrong_overrides_are_one_line(override, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(SHAPES, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model\n", "is not TOML"),
        ('[modle]\nvariant = "b0"\n', "recipe.toml: unknown table 'modle'; did you mean 'model'"),
        ("model = 3\n", "recipe.toml: model is 3; expected a table"),
        ('[data]\nsource = "shapes"\n[trainer]\noutput_dir = "o"\n', "names no model"),
        ('[model]\nvariant = "b0"\n', "does not set data.source"),
        ('[model]\nvariant = "b0"\n[data]\nsource = "shapes"\n', "does not set trainer.output_dir"),
        ("base = 3\n", "base is 3; expected the name of a recipe"),
        ('base = "recipe.toml"\n', "inherits from itself"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe_file(tmp_path, text))


def test_a_missing_file_names_the_nearest():
    with pytest.raises(FileNotFoundError, match=r"there is no recipe .*shape_b0.toml: did you mean .*shapes_b0.toml"):
        read_recipe(SHAPES.with_name("shape_b0.toml"))


def test_the_data_table_is_checked_without_a_file_too():
    with pytest.raises(ValueError, match=r"data\.num_train is 0; expected at least 1"):
        DataConfig(source="shapes")


@pytest.mark.parametrize("name", ["2024", "2024-05-01", "1e3", "12:30:00"])
def test_names_that_look_like_numbers_or_dates_are_texts(name):
    assert parse_overrides([f"data.root={name}"])["data"] == {"root": name}
    assert parse_overrides([f"trainer.run_name={name}"])["trainer"] == {"run_name": name}
    assert parse_overrides(["trainer.warmup_steps=2"])["trainer"] == {"warmup_steps": 2}


def test_a_recipe_overrides_its_base(tmp_path):
    base = recipe_file(tmp_path, SHAPES.read_text())
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text(f'base = "{base.name}"\n[trainer]\nmax_steps = 5\nseed = 3\n')
    second.write_text('base = "first.toml"\n[trainer]\nseed = 4\n[loss]\ndice = 1.0\n')
    recipe = read_recipe(second)
    assert (recipe.trainer["max_steps"], recipe.trainer["seed"], recipe.trainer["save_steps"]) == (5, 4, 500)
    assert recipe.loss.dice == 1.0
    assert recipe.data == read_recipe(SHAPES).data


def test_a_base_may_be_a_packaged_recipe(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "shapes_b0").write_text("no recipe")
    path = recipe_file(tmp_path, 'base = "shapes_b0"\n[trainer]\nseed = 4\n')
    for folder in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(folder)
        assert read_recipe(path).tables["model"] == read_recipe(SHAPES).tables["model"]
    path.write_text('base = "shapes_b"\n')
    with pytest.raises(FileNotFoundError, match=r"there is no recipe .*shapes_b\.toml: did you mean .*shapes_b0\.toml"):
        read_recipe(path)


def test_a_base_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no recipe .*none.toml"):
        read_recipe(recipe_file(tmp_path, 'base = "none.toml"\n'))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.root=no/such/folder", r"data.root is no/such/folder, which does not exist"),
        ("model.checkpoint=./nowhere", r"model.checkpoint is \./nowhere, which does not exist"),
    ],
)
def test_a_missing_folder_is_named_at_once(override, message):
    with pytest.raises(FileNotFoundError, match=message):
        read_recipe(SHAPES.with_name("camvid_b0.toml"), [f"data.root={ROOT}", override])


def test_every_table_becomes_its_options():
    recipe = read_recipe(
        SHAPES,
        [
            "augmentation.crop_size=64",
            "optimizer.power=0.9",
            "evaluation.flip=true",
            "lora.rank=4",
            f"model.checkpoint={ROOT}",
        ],
    )
    assert recipe.augmentation.crop_size == 64
    assert recipe.optimizer.power == 0.9
    assert recipe.evaluation.flip is True
    assert recipe.lora == LoraConfig(rank=4)


def test_adapters_need_a_trained_encoder():
    with pytest.raises(ValueError, match=r"lora.rank is set, .*: set model.checkpoint"):
        read_recipe(SHAPES, ["lora.rank=2"]).check_trainable()


@pytest.mark.parametrize("frozen", ["freeze_encoder=true", "freeze_stages=2"])
def test_only_a_trained_encoder_without_adapters_is_frozen(frozen):
    name = frozen.partition("=")[0]
    with pytest.raises(ValueError, match=rf"optimizer.{name} is set, but the encoder is random: set model.checkpoint"):
        read_recipe(SHAPES, [f"optimizer.{frozen}"]).check_trainable()
    overrides = [f"optimizer.{frozen}", f"model.checkpoint={ROOT}"]
    read_recipe(SHAPES, overrides).check_trainable()
    with pytest.raises(ValueError, match=rf"{name} and lora.rank are both set.*: leave optimizer.{name} out"):
        read_recipe(SHAPES, [*overrides, "lora.rank=2"]).check_trainable()


def test_persistent_workers_need_a_worker(tmp_path):
    """A recipe that has both is overridden in one of them."""
    with pytest.raises(ValueError, match=r"trainer.dataloader_num_workers is 0: .*dataloader_persistent_workers=false"):
        read_recipe("camvid_b0", [f"data.root={tmp_path}", "trainer.dataloader_num_workers=0"])


def test_recipes_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    assert find_recipe("shapes_b0") == recipe_folder() / "shapes_b0.toml" == find_recipe(SHAPES)
    (tmp_path / "mine.toml").write_text(SHAPES.read_text())
    monkeypatch.chdir(tmp_path)
    assert read_recipe("mine.toml").name == "mine"
    with pytest.raises(FileNotFoundError, match=r"there is no recipe shape_b0: did you mean shapes_b0\?"):
        find_recipe("shape_b0")
    with pytest.raises(FileNotFoundError, match="`segformer train --list` names the recipes"):
        find_recipe("nothing_like_it")


def test_every_recipe_has_a_line_of_description():
    recipes = list_recipes()
    assert {"shapes_b0", "camvid_b0", "ade20k_b5"} <= recipes.keys()
    assert all(10 < len(line) <= 110 and line.endswith(".") for line in recipes.values()), recipes


def test_the_command_lists_recipes(capsys):
    assert main(["train", "--list"]) == 0
    assert "camvid_b0       Road scenes of CamVid, B0 from scratch." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no data and no recipe are given"),
        (["shapes_b0", "--resume", "--overwrite"], "--resume and --overwrite are both set"),
        (["shapes_b0", "trainer.max_step=3"], "did you mean 'trainer.max_steps'"),
    ],
)
def test_wrong_commands_are_one_line(arguments, message, capsys):
    assert main(["train", *arguments]) in (1, 2)
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.count("\n") == 1


def test_a_misspelt_key_is_reported_before_anything_heavy_is_imported():
    pytest.importorskip("segformer_command")
    code = (
        "import sys; from segformer_command import main; code = main(['train', 'shapes_b0', 'trainer.max_step=3']); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "did you mean 'trainer.max_steps'" in result.stderr
