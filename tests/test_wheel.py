"""The built wheel without the checkout: its files, and the whole way from training to publishing."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from hf_segformer import SegFormerForSemanticSegmentation, SegFormerImageProcessor
from tests.support.hub_server import LoopbackHub
from tests.support.training import SMALL, train_command

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent

# datasets, evaluate and accelerate cannot be imported here: loading and predicting must not need them.
ALONE = """
import json, sys
for name in ("datasets", "evaluate", "accelerate", "peft", "hf_segformer.training.trainer"):
    sys.modules[name] = None
import numpy, torch
from transformers import AutoModelForSemanticSegmentation
import hf_segformer
from hf_segformer import SegFormerImageProcessor
model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1])
processor = SegFormerImageProcessor.from_pretrained(sys.argv[1])
inputs = processor(numpy.zeros((50, 70, 3), dtype="uint8"), return_tensors="pt")
labels = processor.post_process_semantic_segmentation(model(**inputs), target_sizes=[(50, 70)])[0]
print(json.dumps({"file": hf_segformer.__file__, "labels": list(labels.shape)}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the wheel installed, and the names of the wheel's files."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    wheel = next(folder.glob("*.whl"))
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    return target, zipfile.ZipFile(wheel).namelist()


def run(site, folder, *command):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_holds_the_package_and_nothing_else(site):
    _, names = site
    assert "hf_segformer/py.typed" in names
    assert "hf_segformer/model_card.md" in names
    assert {f"hf_segformer/export/page/{name}" for name in ("index.html", "page.js", "LICENSES.txt")} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("hf_segformer/", "hf_segformer-", "segformer_command.py")) for name in names)


def test_the_wheel_loads_a_checkpoint_and_predicts_without_the_training_packages(site, tiny_config, tmp_path):
    target, _ = site
    SegFormerForSemanticSegmentation(tiny_config()).save_pretrained(tmp_path)
    SegFormerImageProcessor(size=64).save_pretrained(tmp_path)
    facts = json.loads(run(target, tmp_path, "-c", ALONE, str(tmp_path)).splitlines()[-1])
    assert Path(facts["file"]).is_relative_to(target)
    assert facts["labels"] == [50, 70]


def test_the_wheel_renders_a_card_by_the_template_that_it_carries(site, tiny_config, tmp_path):
    target, _ = site
    SegFormerForSemanticSegmentation(tiny_config()).save_pretrained(tmp_path)
    code = "import sys; from hf_segformer.hub.model_card import write_card; print(write_card(sys.argv[1]).read_text())"
    assert "it predicts one of 5 classes for every pixel of an image" in run(
        target, tmp_path, "-c", code, str(tmp_path)
    )
    assert (target / "hf_segformer/model_card.md").read_bytes() == (ROOT / "model_card.md").read_bytes()


@pytest.mark.slow
def test_the_wheel_trains_evaluates_predicts_exports_and_publishes(site, tmp_path):
    """Every step is the command `segformer` where neither the checkout nor its editable install can be imported."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    target, names = site
    assert "hf_segformer/configuration/shapes_b0.toml" in names

    def segformer(*arguments, **environment):
        paths = os.pathsep.join([str(target), sysconfig.get_path("purelib")])
        # -S leaves out the .pth files, by one of which an editable install is found.
        command = [sys.executable, "-S", "-m", "hf_segformer", *map(str, arguments)]
        values = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=values)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    assert "shapes_b0" in segformer("train", "--list")
    segformer(*train_command("run", "trainer.max_steps=4"))
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 4
    for folder, mode, value in (("images", "RGB", "teal"), ("masks", "L", 1)):
        (tmp_path / folder).mkdir()
        Image.new(mode, (60, 44), value).save(tmp_path / folder / "a.png")
    data = [each for each in SMALL if each.startswith("data.")]
    assert "star" in segformer("evaluate", "run", "--recipe", "shapes_b0", *data)
    segformer("evaluate", "run", "--images", "images", "--masks", "masks", "-o", "metrics")
    assert (tmp_path / "metrics" / "metrics.json").is_file()
    segformer("predict", "run", "images", "-o", "predictions")
    with Image.open(tmp_path / "predictions" / "a_mask.png") as mask:
        assert mask.size == (60, 44)
    segformer("export", "run", "onnx", "--to", "onnx")
    assert list((tmp_path / "onnx").glob("*.onnx"))
    with LoopbackHub({"hf_me": "me"}) as hub:
        login = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_me", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        assert "me/shapes" in segformer("push", "run", "me/shapes", **login, HF_HOME=str(tmp_path / "home"))


def test_a_source_distribution_holds_template_and_recipes(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run([*command, "sdist", "--dist-dir", str(tmp_path)], check=True, cwd=ROOT, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = files.getnames()
    for file in ("model_card.md", "configuration/shapes_b0.toml"):
        assert any(name.endswith(f"/{file}") for name in names)


def test_the_wheel_answers_help(site, tmp_path):
    target, _ = site
    assert "usage: segformer" in run(target, tmp_path, target / "bin" / "segformer", "--help")
