"""Recipes as text: what is written is read again, and every run leaves its recipe."""

import tomllib
from dataclasses import replace

import pytest

from hf_segformer.training.recipe import parse_recipe, read_recipe
from hf_segformer.training.recipe_writer import RECIPE_FILE, format_recipe, write_recipe
from tests.support.training import train

TABLES = {
    "data": {"source": "folders", "root": 'a "b"\\c', "names": ["Straße", "日本", "tab\t\x7f\x01", "😀"]},
    "augmentation": {"scale": [0.5, 2.0], "crop_size": 64, "flip": 1.0},
    "loss": {"class_weights": [1.0, 1e-07]},
    "trainer": {"output_dir": "outputs/run", "bf16": False, "learning_rate": 6e-05},
}


def test_tables_of_every_type_are_read_again_as_they_were():
    assert tomllib.loads(format_recipe(TABLES)) == TABLES
    palette = {"data": {"palette": [[1, 2, 3], [4, 5, 6]]}}
    assert tomllib.loads(format_recipe(palette)) == palette


def test_comments_and_header_stay_comments_whatever_they_hold():
    text = format_recipe(TABLES, {"data.root": "two\nlines\r\x1b[1m", "trainer.bf16": "word " * 60}, "head\nline")
    assert tomllib.loads(text) == TABLES
    assert text.startswith("# head\n# line\n")
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", ["camvid_b0", "ade20k_b5", "lora_b0"])
def test_the_recipes_of_this_package_survive(name):
    recipe = read_recipe(name, ["data.root=."])
    again = parse_recipe(format_recipe(recipe.tables), "text", name)
    assert again.tables == recipe.tables


def test_comments_are_kept_while_they_say_the_same(tmp_path):
    text = (
        "# mine\n"
        + format_recipe({"data": {"source": "shapes", "num_train": 2, "num_eval": 1}})
        + ('\n[model]\nvariant = "b0"\n\n[trainer]\noutput_dir = "x"  # here\n')
    )
    recipe = parse_recipe(text, "text", "mine")
    assert write_recipe(recipe, tmp_path).read_text() == text
    changed = replace(recipe, tables={**recipe.tables, "trainer": {"output_dir": "y"}})
    written = write_recipe(changed, tmp_path).read_text()
    assert "# mine" not in written
    assert tomllib.loads(written)["trainer"] == {"output_dir": "y"}


def test_a_run_leaves_its_recipe_with_all_overrides(trained_run):
    recipe = read_recipe(trained_run / RECIPE_FILE)
    assert recipe.trainer["max_steps"] == 8
    assert recipe.model["hidden_sizes"] == [8, 8, 16, 16]


@pytest.mark.slow
def test_the_recipe_that_a_run_left_gives_its_weights(trained_run, tmp_path):
    """Its folder's name is the only difference."""
    again = tmp_path / "again"
    assert train(again, recipe=str(trained_run / RECIPE_FILE), settings=[]) == 0
    assert (again / "model.safetensors").read_bytes() == (trained_run / "model.safetensors").read_bytes()


def test_a_folder_with_nothing_but_a_recipe_is_free(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RECIPE_FILE).write_text("mine")
    assert train(tmp_path / "run", "trainer.max_steps=1") == 0
    assert read_recipe(tmp_path / "run" / RECIPE_FILE).trainer["max_steps"] == 1
