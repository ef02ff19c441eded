"""`segformer compare` and `segformer inspect`, with tiny models on files."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hf_segformer import SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.cli.compare import add_compare, model_names
from hf_segformer.cli.inspect import add_inspect


def run(*argv):
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    add_compare(commands)
    add_inspect(commands)
    arguments = parser.parse_args([str(argument) for argument in argv])
    arguments.check(arguments)
    arguments.run(arguments)


@pytest.fixture
def models(tmp_path, tiny_config):
    folders = []
    for name in ("first", "second"):
        model = SegFormerForSemanticSegmentation(tiny_config())
        model.save_pretrained(tmp_path / name)
        SegFormerImageProcessor(size=64).save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    return folders


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for name in ("a_1", "a_2", "b_1", "c_1"):
        Image.fromarray(generator.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(
            tmp_path / "images" / f"{name}.png"
        )
        Image.fromarray(generator.integers(0, 5, (40, 60), dtype=np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    return ["--images", tmp_path / "images", "--masks", tmp_path / "masks"]


def test_models_are_compared(tmp_path, models, data, capsys):
    pytest.importorskip("matplotlib")
    run("compare", *models, *data, "-o", tmp_path / "out", "--resamples", 200, "--group", "^([a-z])_", "--title", "ab")
    printed = capsys.readouterr().out
    assert "baseline: first; 4 images" in printed
    assert "paired bootstrap over groups, 200 resamples" in printed
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(result["models"]) == ["first", "second"]
    names = ["comparison.csv", "comparison.html", "comparison.json", "differences.png", "per_image.csv"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert "a_1.png" in (tmp_path / "out" / "per_image.csv").read_text()


def test_an_image_is_inspected(tmp_path, models, data, capsys):
    run("inspect", models[0], tmp_path / "images" / "a_1.png", "--point", 5, 6, "-o", tmp_path / "new")
    assert "pixel at column 5, row 6: LABEL_" in capsys.readouterr().out
    with Image.open(tmp_path / "new" / "a_1_inspection.png") as image:
        assert image.width > 1000


def test_models_have_short_names():
    assert model_names(["runs/a", "runs/b/"]) == ("a", "b")
    assert model_names(["runs/a/best", "runs/b/best", "owner/c"]) == ("runs/a/best", "runs/b/best", "c")
    with pytest.raises(ValueError, match="the model runs/a is given 2 times"):
        model_names(["runs/a", "runs/b", "runs/a/"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compare", "a", "--dataset", "x"], "there is one model, a; expected at least two"),
        (["compare", "a", "b"], "expected images with masks"),
        (["inspect", "a", "no.png"], r"there is no image no\.png"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(argv, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(*argv)


def test_models_of_other_classes_are_refused(tmp_path, models, data, tiny_config):
    SegFormerForSemanticSegmentation(tiny_config(id2label={0: "x", 1: "y", 2: "z", 3: "u", 4: "v"})).save_pretrained(
        models[1]
    )
    with pytest.raises(ValueError, match="second has the classes x, y, z, u, v; expected those of first"):
        run("compare", *models, *data)


def test_parsers_import_nothing_heavy():
    """Besides the package itself, whose `__init__` the light entry module defers."""
    code = (
        "import sys, hf_segformer; before = set(sys.modules);"
        "import hf_segformer.cli.compare, hf_segformer.cli.inspect; new = set(sys.modules) - before;"
        "assert not any(name.startswith(('matplotlib', 'hf_segformer.evaluation')) for name in new), new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
