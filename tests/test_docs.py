"""Documentation: examples run, commands parse, recipe fragments are valid, links resolve, figures are measured."""

import contextlib
import csv
import doctest
import importlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import hf_segformer
from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor, config
from hf_segformer.cli.main import build_parser, main, parse
from hf_segformer.data.pretraining_config import PretrainingConfig
from tests.support.tiny import TINY

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"  # model cards, which tests/hub/test_model_card.py checks
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(page for page in ROOT.glob("docs/**/*.md") if not page.is_relative_to(RESULTS)),
]
NAMES = [page.relative_to(ROOT).as_posix().removesuffix(".md") for page in PAGES]
SOURCES = sorted(ROOT.glob("hf_segformer/**/*.py"))
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCES
    if ">>>" in path.read_text()
]
TABLES = {
    "data": config.DataConfig,
    "split": config.SplitConfig,
    "augmentation": config.AugmentationConfig,
    "optimizer": config.OptimizerConfig,
    "loss": config.LossConfig,
    "evaluation": config.InferenceOptions,
    "lora": config.LoraConfig,
    "ema": config.EmaConfig,
    "early_stopping": config.EarlyStoppingConfig,
    "distill": config.DistillationConfig,
    "pretraining": PretrainingConfig,
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def all_blocks(language: str) -> list:
    return [
        pytest.param(page, block, id=f"{name}-{number}")
        for page, name in zip(PAGES, NAMES, strict=True)
        for number, block in enumerate(blocks(page, language))
    ]


@pytest.fixture(scope="module")
def example_files(tmp_path_factory):
    """The files that examples name: checkpoints, images and masks, and the repository's docs."""
    folder = tmp_path_factory.mktemp("examples") / "files"
    SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=5)).save_pretrained(
        folder / "outputs/shapes_b0"
    )
    SegFormerImageProcessor(size=64).save_pretrained(folder / "outputs/shapes_b0")
    SegformerForSemanticSegmentation(SegformerConfig(**TINY, num_labels=5)).save_pretrained(folder / "my-segformer")
    Image.new("RGB", (90, 70), "teal").save(folder / "photo.jpg")
    for name, mode in (("images", "RGB"), ("masks", "L")):
        (folder / name).mkdir()
        Image.new(mode, (90, 70)).save(folder / name / "street.png")
        (folder / "my-streets" / name).mkdir(parents=True)
        for index in range(4):
            image = Image.new(mode, (48, 40))
            image.paste(1 if mode == "L" else "teal", (0, 0, 20, 40))
            image.save(folder / "my-streets" / name / f"{index}.png")
    (folder / "docs").symlink_to(ROOT / "docs")
    return folder


@pytest.fixture
def workplace(example_files, tmp_path, monkeypatch):
    """A working directory with a copy of `example_files`."""
    folder = shutil.copytree(example_files, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, workplace):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.startswith("hf_segformer"):
            raise
        pytest.skip(f"{error.name} is not installed")
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_every_public_class_has_an_example():
    for name in hf_segformer.__all__:
        public = getattr(hf_segformer, name)
        if isinstance(public, type):
            assert ">>>" in (public.__doc__ or ""), f"{name} has no example"


@pytest.mark.parametrize(("page", "code"), all_blocks("python"))
def test_python_examples_run(page, code, workplace):
    if "push_to_hub" in code:
        pytest.skip("tests/hub/test_push.py runs it, with a Hub")
    if "onnxruntime" in code:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    torch.manual_seed(0)
    exec(compile(code, page.name, "exec"), {"__name__": "example"})


@pytest.mark.parametrize(("page", "block"), all_blocks("console"))
def test_shown_output_of_commands_is_what_they_print(page, block):
    command, _, expected = block.partition("\n")
    program, *arguments = shlex.split(command.removeprefix("$ "))
    assert program == "segformer"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(arguments) == 0
    assert printed.getvalue() == expected


@pytest.mark.parametrize(("page", "block"), all_blocks("sh"))
def test_commands_parse(page, block, capsys):
    for line in block.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:^|-m hf_)segformer (.*)", line)
        if found:
            arguments = shlex.split(found[1], comments=True)
            try:
                parse(arguments)
            except SystemExit:
                pytest.fail(f"{page.name}: {line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize(("page", "block"), all_blocks("toml"))
def test_recipe_fragments_have_fields_that_exist(page, block):
    for table, values in tomllib.loads(block).items():
        if table in TABLES:
            unknown = values.keys() - {each.name for each in fields(TABLES[table])}
            assert not unknown, f"{page.name}: [{table}] has no {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_to_tests_that_exist(page):
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http", "#")):
            continue
        path = (page.parent / target.partition("#")[0]).resolve()
        assert path.exists(), f"{page.name} links to {target}, which does not exist"
        if re.fullmatch(r"test_\w+", text):
            assert f"def {text}(" in path.read_text(), f"{page.name} names {text}, which {target} lacks"


def test_the_architecture_page_names_every_module_and_package():
    page = (ROOT / "docs/explanation/architecture.md").read_text()
    for path in sorted((ROOT / "hf_segformer").iterdir()):
        name = f"`{path.name}/`" if path.is_dir() else f"`{path.name}`"
        if path.name.startswith("cpu_"):
            name = "`cpu_*_segformer.py`"
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and not path.name.startswith("__"):
            assert name in page or path.name == "version.py", f"docs/explanation/architecture.md lacks {name}"


def test_the_layers_are_the_same_in_both_places():
    [architecture] = [text for text in blocks(ROOT / "docs/explanation/architecture.md", "text") if "<-" in text]
    [contributing] = [text for text in blocks(ROOT / "CONTRIBUTING.md", "text") if "<-" in text]
    assert architecture == contributing


def test_the_page_of_the_command_line_lists_every_option():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = (ROOT / "docs/reference/cli.md").read_text()
    assert hooks.OPTIONS_MARK in page
    _, *sections = re.split(r"^## segformer ", hooks.options_of_commands(), flags=re.MULTILINE)
    _, commands = build_parser()
    assert [section.split()[0] for section in sections] == list(commands)
    options: set[str] = set()
    for section, parser in zip(sections, commands.values(), strict=True):
        own = {name for action in parser._actions for name in action.option_strings} - {"-h", "--help"}
        listed = " ".join(re.findall(r"^\| `([^`]+)`", section, flags=re.MULTILINE))
        assert own - set(re.findall(r"--?[a-z][a-z0-9-]*", listed)) <= {"--debug"}
        options |= own
    assert set(re.findall(r"`(--[a-z-]+)`", page)) <= options


def test_figures_in_the_readme_are_measured():
    def measured(file: str, row: str) -> tuple[dict, dict]:
        with (ROOT / "benchmarks/results/amd-epyc-zen-5-avx-512-2-cores" / file).open(newline="") as lines:
            rows = {each["candidate"]: each for each in csv.DictReader(lines) if each["row"] == row}
        return rows["hf_segformer"], rows["transformers"]

    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
    for variant in ("b0", "b2"):
        ours, theirs = (float(each["milliseconds"]) for each in measured("inference.csv", variant))
        assert f"{ours:,.0f} ms instead of {theirs:,.0f} ms" in readme
    ours, theirs = measured("training.csv", "b0_batch4")
    assert f"{float(theirs['milliseconds']) / float(ours['milliseconds']):.1f} times as fast" in readme
    assert f"{float(ours['mebibytes']) / float(theirs['mebibytes']):.0%} of".replace("%", " %") in readme
    assert f"{ours['processor']}, {ours['cores']} cores" in readme
    mean_iou = json.loads((RESULTS / "camvid_b0/metrics.json").read_text())["mean_iou"]
    assert f"mean IoU {100 * mean_iou:.1f} % on val" in readme
