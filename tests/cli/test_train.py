"""`segformer train` on a folder of images, without a recipe."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import hf_segformer.training.folder_run
import hf_segformer.training.measuring
from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation
from hf_segformer.cli.train import is_data
from hf_segformer.training.folder_run import write_plan
from hf_segformer.training.plan import Decision, Plan
from hf_segformer.training.pretrained import find_licence, inspect_pretrained
from hf_segformer.training.recipe import read_recipe
from tests.support.commands import assert_one_line, run
from tests.support.tiny import TINY
from tests.support.training import launch

SMALL = [
    *(f"model.{name}={value}" for name, value in TINY.items()),
    "trainer.dataloader_num_workers=0",
    "trainer.use_cpu=true",
    "trainer.bf16=false",
    "augmentation.crop_size=32",
]


def labeled(root, number=6, size=(48, 40), channels=3):
    """Images and masks of three classes, in folders of their own."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for index in range(number):
        mask = np.kron(rng.integers(0, 3, (5, 6)), np.ones((8, 8))).astype(np.uint8)
        noise = rng.integers(0, 40, (*mask.shape, channels), dtype=np.uint8)
        Image.fromarray((mask[..., None] * 60 + noise).squeeze()).resize(size).save(root / "images" / f"{index}.png")
        Image.fromarray(mask).resize(size, Image.Resampling.NEAREST).save(root / "masks" / f"{index}.png")
    (root / "classes.json").write_text(json.dumps({"names": ["ground", "disc", "bar"]}))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return labeled(tmp_path_factory.mktemp("data") / "streets")


@pytest.fixture(scope="module")
def planned(folder, tmp_path_factory):
    """A finished run of four steps on the folder."""
    output = tmp_path_factory.mktemp("outputs") / "run"
    assert run("train", folder, "--steps", 4, *SMALL, "trainer.save_steps=2", f"trainer.output_dir={output}") == 0
    return output


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


class TestRun:
    def test_the_run_leaves_its_plan_with_the_reasons(self, planned, folder):
        text = (planned / "recipe.toml").read_text()
        assert "# given by --steps; " in text
        recipe = read_recipe(planned / "recipe.toml")
        assert recipe.trainer["max_steps"] == 4
        assert recipe.data.root == str(folder)
        assert recipe.data.names == ["ground", "disc", "bar"]
        assert recipe.data.eval_share == 0.3

    def test_the_recipe_reproduces_the_run_to_the_last_bit(self, planned, tmp_path):
        again = tmp_path / "run"
        shutil.copytree(planned, again)
        text = (again / "recipe.toml").read_text().replace(str(planned), str(again))
        (again / "recipe.toml").write_text(text)
        assert run("train", again / "recipe.toml", "--overwrite") == 0
        assert weights(again) == weights(planned) == weights(tmp_path / "run.1")
        assert (again / "recipe.toml").read_text() == text

    def test_a_resumed_run_takes_its_recipe_and_plans_nothing(self, planned, folder, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(hf_segformer.training.folder_run, "plan_data", None)
        again = tmp_path / "run"
        shutil.copytree(planned, again)
        shutil.rmtree(again / "checkpoint-4")
        assert run("train", folder, f"trainer.output_dir={again}", "--resume") == 0
        output = capsys.readouterr().out
        assert f"Resuming by {again}/recipe.toml; there is no new plan." in output
        assert "checkpoint-2" in output
        assert weights(again) == weights(planned)

    def test_a_finished_run_is_not_replaced_before_anything_is_planned(self, planned, folder, capsys):
        assert run("train", folder, f"trainer.output_dir={planned}") == 2
        assert_one_line(capsys.readouterr().err, "holds a finished run", "--overwrite")


@pytest.mark.slow
def test_the_first_of_two_processes_plans_for_both(folder, tmp_path):
    """No fit of the batch to one process: two of them share it."""
    output = tmp_path / "run"
    options = ["--steps", "2", *SMALL, f"trainer.output_dir={output}"]
    result = launch("-m", "hf_segformer", "train", str(folder), *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Training and evaluation take about") == 1
    recipe = read_recipe(output / "recipe.toml")
    assert recipe.trainer["per_device_train_batch_size"] == 2  # of 4 images
    assert json.loads((output / "training.json").read_text())["processes"] == 2


class TestDryRun:
    def test_it_prints_and_writes_the_plan_and_trains_nothing(self, folder, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert run("train", folder, "--time", "1h", "--dry-run", *SMALL) == 0
        output = capsys.readouterr().out
        assert re.search(r"^data\.names +\['ground', 'disc', 'bar'\] +3 classes; from classes\.json$", output, re.M)
        assert re.search(r"^model\.depths +\[1, 1, 1, 1\] +given$", output, re.M)
        assert re.search(r"^Training and evaluation take about \d+ min", output, re.M)
        assert "Train by it with: segformer train outputs/streets.toml" in output
        assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["streets.toml"]
        assert read_recipe("outputs/streets.toml").trainer["output_dir"] == "outputs/streets"

    def test_an_earlier_plan_is_kept_unless_it_is_overwritten(self, tmp_path):
        first, second = (Plan((Decision("trainer.seed", seed, "given"),), (), 60, "Planned.") for seed in (1, 2))
        output = tmp_path / "outputs" / "streets"
        assert write_plan(first, output) == write_plan(first, output) == tmp_path / "outputs" / "streets.toml"
        assert write_plan(second, output) == tmp_path / "outputs" / "streets.1.toml"
        assert "seed = 1\n" in (tmp_path / "outputs" / "streets.toml").read_text()
        assert write_plan(second, output, overwrite=True) == tmp_path / "outputs" / "streets.toml"
        assert "seed = 2\n" in (tmp_path / "outputs" / "streets.toml").read_text()

    def test_a_range_test_chooses_the_learning_rate(self, folder, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(hf_segformer.training.measuring, "_RANGE_STEPS", 8)
        assert run("train", folder, "--steps", 9, "-o", "runs/one", "--dry-run", "--find-learning-rate", *SMALL) == 0
        assert "range test" in capsys.readouterr().out
        recipe = read_recipe("runs/one.toml")
        assert 1e-6 < recipe.trainer["learning_rate"] < 1e-1
        assert recipe.trainer["output_dir"] == "runs/one"


class TestPretrained:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        SegFormerForSemanticSegmentation(SegFormerConfig(**TINY)).save_pretrained(tmp_path / "init")
        return tmp_path / "init"

    def test_the_plan_says_size_and_licence(self, folder, checkpoint, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (checkpoint / "README.md").write_text(
            "---\nlicense: other\nlicense_name: mine\nlicense_link: https://example.org/licence\n---\n# Model\n"
        )
        small = [each for each in SMALL if not each.startswith("model.")]
        assert run("train", folder, "--init", checkpoint, "--steps", 9, "--dry-run", *small) == 0
        output = " ".join(capsys.readouterr().out.split())
        assert "licence: other, mine, https://example.org/licence" in output
        recipe = read_recipe("outputs/streets.toml")
        assert recipe.model == {"checkpoint": str(checkpoint)}
        assert recipe.trainer["learning_rate"] == 6e-5

    @pytest.mark.parametrize(
        ("files", "licence"),
        [
            ({}, "not stated"),
            ({"README.md": "# No front matter\nlicense: mit\n"}, "not stated"),
            ({"README.md": "---\nlicense: [unclosed\n---\n"}, "not stated"),
            ({"README.md": "---\nlicense: apache-2.0\n---\n"}, "apache-2.0"),
            ({"README.md": '---\nlicense: "a\\e[1mb"\n---\n'}, "a\\x1b[1mb"),
            ({"LICENSE": "\n  MIT License\n\nText"}, "LICENSE in {path}: MIT License"),
        ],
    )
    def test_licences(self, tmp_path, files, licence):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        assert find_licence(str(tmp_path), tmp_path) == licence.format(path=tmp_path)

    def test_other_channels_name_the_remedy(self, folder, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_channels=4)).save_pretrained("init")
        assert run("train", folder, "--init", "./init", "--dry-run") == 1
        assert_one_line(capsys.readouterr().err, "takes images of 4 channels, the data have 3", "--num-channels 3")

    def test_what_cannot_be_loaded_names_the_remedy(self, folder, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        assert run("train", folder, "--init", tmp_path / "empty", "--dry-run") == 1
        assert_one_line(capsys.readouterr().err, "holds no config.json")
        assert run("train", folder, "--init", "nobody/nothing", "--dry-run") == 1
        assert_one_line(capsys.readouterr().err, "nobody/nothing", "expected a folder with a model")

    def test_sizes_are_recognized(self, checkpoint, tmp_path):
        SegFormerConfig.from_variant("b3").save_pretrained(tmp_path / "b3")
        assert inspect_pretrained(str(tmp_path / "b3")).size == "SegFormer B3"
        assert inspect_pretrained(str(checkpoint)).size.startswith("SegFormer of depths [1, 1, 1, 1]")


class TestErrors:
    """Status 2: found before PyTorch is loaded; status 1: found in the data."""

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--steps", "4", "--time", "2h"], ["--steps and --time are both set"]),
            (["--time", "0"], ["--time: '0' is no time", "2h, 90m"]),
            (["--time", "soon"], ["'soon' is no time"]),
            (["--steps", "0"], ["--steps: got '0'; expected a whole number of at least 1"]),
            (["--dry-run", "--resume"], ["--resume and --dry-run are both set", "recipe.toml"]),
            (["--steps", "4", "--resume"], ["--resume and --steps are both set"]),
            (["--resume"], ["there is no run to resume", "outputs/streets/recipe.toml is missing"]),
            (["--check-data"], ["--check-data is set for a folder", "--dry-run writes one"]),
            (["trainer.max_step=3"], ["did you mean 'trainer.max_steps'?"]),
            (["--output-dir", "x", "trainer.output_dir=y"], ["--output-dir and trainer.output_dir are both set"]),
            (["--init", "x", "model.checkpoint=y"], ["--init and model.checkpoint are both set"]),
            (["--init", "x"], ["--init is x, which does not exist; expected a model's folder"]),
        ],
    )
    def test_options(self, folder, tmp_path, monkeypatch, capsys, options, words):
        monkeypatch.chdir(tmp_path)
        assert run("train", folder, *options) == 2
        assert_one_line(capsys.readouterr().err, *words)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("option", ["--steps=3", "--time=2h", "--dry-run", "--init=x", "--find-learning-rate"])
    def test_plan_options_are_refused_for_a_recipe(self, option, capsys):
        assert run("train", "shapes_b0", option) == 2
        assert_one_line(capsys.readouterr().err, f"{option.partition('=')[0]} is set for a recipe; expected it with a")

    def test_an_empty_folder(self, tmp_path, capsys):
        assert run("train", tmp_path) == 2
        assert_one_line(capsys.readouterr().err, f"{tmp_path} is empty; expected images and masks")

    def test_a_folder_without_masks(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "photos").mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / "photos" / "a.png")
        assert run("train", "photos") == 1
        assert_one_line(capsys.readouterr().err, "photos", "mask")

    def test_too_short_a_time(self, folder, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert run("train", folder, "--time", "1s", *SMALL) == 1
        assert_one_line(capsys.readouterr().err, "--time is 1 s; expected at least")

    def test_the_folder_of_a_finished_run(self, trained_run, capsys):
        assert run("train", trained_run) == 2
        error = capsys.readouterr().err
        assert_one_line(error, "holds a model", f"--init {trained_run}", f"{trained_run}/recipe.toml --resume")


class TestKinds:
    def test_a_folder_that_is_called_like_a_recipe_is_asked_about(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "camvid_b0").mkdir()
        assert run("train", "camvid_b0") == 2
        assert_one_line(capsys.readouterr().err, "./camvid_b0 for the folder", "camvid_b0.toml for the recipe")
        assert is_data("./camvid_b0")

    def test_what_an_argument_names(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder.toml").mkdir()
        (tmp_path / "mine.toml").touch()
        assert [is_data(each) for each in (".", "folder.toml", "owner/name")] == [True] * 3
        assert [is_data(each) for each in ("camvid_b0", "mine.toml", "./mine.toml", "a/b.toml", "unknown")] == [
            False
        ] * 5

    @pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "/nowhere/else", "nowhere/"])
    def test_a_folder_that_is_missing(self, source, capsys):
        assert run("train", source) == 2
        assert_one_line(capsys.readouterr().err, f"there is no folder {source}")
