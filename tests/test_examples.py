"""The notebooks in examples/ are valid, hold no outputs, and run from top to bottom."""

import json
from pathlib import Path

import pytest
import torch

# rasterio 1.4 multiplies transforms in a way that affine 3.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
NEEDED = {"large_raster": ["rasterio"], "export": ["onnx", "onnxscript", "onnxruntime"]}
SLOW = {"export"}  # traces a B0; test_docs.py runs the same calls on a tiny network
# Values for the cell with the tag `parameters`, so that the tests take seconds.
PARAMETERS = {
    "fine_tune": {"MAX_STEPS": 2, "NUM_TRAIN": 8, "IMAGE_SIZE": 32, "OUTPUT_DIR": "outputs"},
    "large_raster": {"REPEATS": 1, "TILE_SIZE": 256, "TILE_OVERLAP": 32},
}


def cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def examples_folder(tmp_path, monkeypatch):
    """An empty working directory in the place of examples/, next to the repository's docs."""
    folder = tmp_path / "examples"
    folder.mkdir()
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(folder)
    return folder


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"quickstart", "fine_tune", "large_raster", "export"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_version_4_without_outputs(path):
    content = json.loads(path.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(path))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW), id=path.stem) for path in NOTEBOOKS],
)
def test_notebooks_run(path, examples_folder):
    for name in NEEDED.get(path.stem, ()):
        pytest.importorskip(name)
    torch.manual_seed(0)
    namespace = {"__name__": "notebook"}
    parameters = dict(PARAMETERS.get(path.stem, {}))
    for number, cell in enumerate(cells(path)):
        exec(compile("".join(cell["source"]), f"{path.name} code cell {number}", "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert parameters.keys() <= namespace.keys(), "a parameter of this test is not one of the notebook"
            namespace.update(parameters)
            parameters = {}
    assert not parameters, "the notebook has no cell with the tag `parameters`"
