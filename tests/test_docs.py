"""README, docs and docstrings: every example runs, every link leads somewhere, every shown output is the real one."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import hf_segformer
from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.cli.main import main
from tests.support.tiny import TINY

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]  # results hold model cards: tests/hub/test_model_card.py
MODULES = sorted(module.name for module in pkgutil.iter_modules(hf_segformer.__path__))
FOLDERS = ("hf_segformer", "training", "configuration", "benchmarks", "tests", "docs")
NEEDS_AUTO_IMAGE_PROCESSOR = "this Transformers has no AutoImageProcessor without torchvision"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder that holds what the examples name: a checkpoint of ours, one of Transformers', a photo, labels."""
    monkeypatch.chdir(tmp_path)
    SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=5)).save_pretrained("outputs/shapes_b0")
    SegFormerImageProcessor(size=64).save_pretrained("outputs/shapes_b0")
    SegformerForSemanticSegmentation(SegformerConfig(**TINY, num_labels=5)).save_pretrained("my-segformer")
    Image.new("RGB", (90, 70), "teal").save("photo.jpg")
    for folder, mode in (("images", "RGB"), ("labels", "L")):
        Path(folder).mkdir()
        Image.new(mode, (90, 70)).save(f"{folder}/street.png")
    return tmp_path


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, workplace):
    results = doctest.testmod(importlib.import_module(f"hf_segformer.{name}"), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_every_public_class_has_an_example():
    for name in hf_segformer.__all__:
        public = getattr(hf_segformer, name)
        if isinstance(public, type):
            assert ">>>" in (public.__doc__ or ""), f"{name} has no example"


PYTHON = [(page, number) for page in PAGES for number in range(len(blocks(page, "python")))]


@pytest.mark.parametrize(("page", "number"), PYTHON, ids=[f"{page.stem}-{number}" for page, number in PYTHON])
def test_python_examples_run(page, number, workplace):
    code = blocks(page, "python")[number]
    if "push_to_hub" in code:
        pytest.skip("tests/hub/test_push.py runs it, with a Hub")
    if "onnxruntime" in code:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    if "AutoImageProcessor" in code:
        from transformers import AutoImageProcessor

        if not hasattr(AutoImageProcessor, "_from_auto") and getattr(AutoImageProcessor, "is_dummy", False):
            pytest.skip(NEEDS_AUTO_IMAGE_PROCESSOR)
    torch.manual_seed(0)
    exec(compile(code, f"{page.name} block {number}", "exec"), {"__name__": "example"})


CONSOLE = [(page, block) for page in PAGES for block in blocks(page, "console")]


@pytest.mark.parametrize(("page", "block"), CONSOLE, ids=[f"{page.stem}-{i}" for i, (page, _) in enumerate(CONSOLE)])
def test_shown_output_of_commands_is_what_they_print(page, block):
    command, _, expected = block.partition("\n")
    program, *arguments = shlex.split(command.removeprefix("$ "))
    assert program == "segformer"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(arguments) == 0
    assert printed.getvalue() == expected


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_links_lead_to_files_and_to_tests_that_exist(page):
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http", "#")):
            continue
        path = (page.parent / target).resolve()
        assert path.exists(), f"{page.name} links to {target}, which is not there"
        if text.startswith("test_"):
            assert f"def {text}(" in path.read_text(), f"{page.name} names {text}, which {target} lacks"


def test_the_tree_in_the_readme_names_every_folder_and_module():
    tree = next(block for block in blocks(ROOT / "README.md", "text") if "hf_segformer/" in block)
    for folder in ("hf_segformer", "training", "configuration", "docs"):
        assert f"{folder}/" in tree
    for path in [*ROOT.glob("hf_segformer/*.py"), *ROOT.glob("training/*.py"), *ROOT.glob("configuration/*.toml")]:
        if path.name != "__init__.py" or path.parent.name == "hf_segformer":
            assert path.name in tree, f"README's tree lacks {path.parent.name}/{path.name}"
    for name in re.findall(r"([\w/]+\.(?:py|toml|md))", tree):
        # Not all of the root, in which another test builds the wheel meanwhile.
        places = [ROOT.glob(name), *(ROOT.glob(f"{folder}/**/{name}") for folder in FOLDERS)]
        assert any(map(list, places)), f"README's tree names {name}, which is not there"


def test_training_packages_are_not_imported_with_the_package():
    code = "import sys, hf_segformer; print([name for name in ('datasets', 'evaluate') if name in sys.modules])"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
