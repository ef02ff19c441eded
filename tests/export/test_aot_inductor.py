"""AOTInductor packages: equal to PyTorch in a process without this package, a compiler or Transformers; refusals."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.cli.main import main
from hf_segformer.export.aot_inductor import aoti_package
from hf_segformer.export.metadata import describe_model
from tests.support.tiny import TWO_STAGES, logits_of

SIZES = [(1, 64, 64), (3, 101, 67), (2, 75, 160)]  # images, height, width
NAMES = {0: 'sky "above"', 1: "Straße", 2: "roof, tiled"}

# What docs/guides/export.md shows, without a compiler on the path.
ALONE = """
import json, sys
import torch
network = torch._inductor.aoti_load_package("model.pt2")
outputs = {name: network(inputs) for name, inputs in torch.load("inputs.pt", weights_only=True).items()}
torch.save(outputs, "outputs.pt")
assert not {"transformers", "hf_segformer"} & set(sys.modules)
print(json.dumps(dict(network.get_metadata())))
"""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SegFormerForSemanticSegmentation(SegFormerConfig(**TWO_STAGES, id2label=NAMES)).eval()


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    SegFormerImageProcessor(size={"height": 64, "width": 96}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run_alone(folder, inputs, **environment):
    torch.save(inputs, folder / "inputs.pt")
    return subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=folder,
        env=os.environ | {"PATH": str(folder), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # Inductor's imports
def test_a_package_runs_by_pytorch_alone_at_any_size(checkpoint, model, tmp_path, capsys):
    if shutil.which("g++") is None and "CXX" not in os.environ:
        pytest.skip("needs a C++ compiler: apt-get install g++")
    destination = tmp_path / "exported"
    # Unoptimized, and without a precompiled header: the compiler takes most of the time.
    with torch._inductor.config.patch({"aot_inductor.debug_compile": True, "aot_inductor.precompile_headers": False}):
        assert main(["export", str(checkpoint), str(destination), "--to", "aoti"]) == 0
    assert "model.pt2 in AOTInductor: 100.000% of the pixels as in PyTorch" in capsys.readouterr().out
    inputs = {f"{num}x{height}x{width}": torch.randn(num, 3, height, width) for num, height, width in SIZES}
    checked = {"AOTI_RUNTIME_CHECK_INPUTS": "1"}  # off by default
    done = run_alone(destination, inputs, **checked)
    assert done.returncode == 0, done.stderr
    outputs = torch.load(destination / "outputs.pt", weights_only=True)
    for name, pixels in inputs.items():
        expected = logits_of(model, pixels)
        assert (outputs[name] - expected).abs().max() < 1e-4 * expected.abs().max()
    processor = SegFormerImageProcessor.from_pretrained(destination)
    description = describe_model(model, processor, include_processing=False)
    assert description.items() <= json.loads(done.stdout).items()
    wrong = run_alone(destination, {"wrong": torch.zeros(1, 3, 64, 64, dtype=torch.float64)}, **checked)
    assert wrong.returncode != 0
    assert "dtype" in wrong.stderr


def test_a_missing_compiler_is_one_line(checkpoint, tmp_path, capsys):
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert main(["export", str(checkpoint), str(tmp_path / "exported"), "--to", "aoti"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("segformer: no C++ compiler is found, which aoti (--to aoti) compiles with")
    assert error.count("\n") == 1
    assert not (tmp_path / "exported").exists()


def test_a_package_that_does_not_load_is_named(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"no package")
    runtime = aoti_package(tmp_path / "model.pt2")
    with pytest.raises(ValueError, match=r"model\.pt2 does not run: \w*Error"):
        runtime(torch.zeros(1, 3, 64, 64))
