"""Loading and predicting import what Transformers' Auto classes import, and nothing else but this package.

All entries run in one process, one after another: the first that imports a package is the one that is named.
"""

import json
import subprocess
import sys

import pytest
from PIL import Image

from hf_segformer import SegFormerImageProcessor

# Of training, evaluation and the extras; Transformers itself imports accelerate, scipy, jinja2 and triton if they are
# installed, which does not count.
HEAVY = {
    *("pandas", "pyarrow", "datasets", "evaluate", "sklearn", "matplotlib", "peft", "tensorboard", "optuna"),
    *("gradio", "onnx", "onnxruntime", "openvino", "rasterio", "shapely", "pyproj", "pyogrio", "tifffile"),
    *("pydicom", "highdicom", "nibabel", "torchvision", "fsspec"),
}
STAGES = """
import json, sys

def packages():
    return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names

model, image, folder, out = sys.argv[1:5]
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline
found, known = {"transformers": sorted(packages())}, packages()
for name, code in json.loads(sys.argv[5]).items():
    exec(code)
    found[name], known = sorted(packages() - known), packages()
json.dump(found, sys.stderr)
"""
ENTRIES = {
    "package": "import hf_segformer",
    "model": "hf_segformer.SegFormerForSemanticSegmentation.from_pretrained(model)",
    "processor": "hf_segformer.SegFormerImageProcessor.from_pretrained(model)",
    "predictor": "hf_segformer.SegFormerPredictor.from_pretrained(model)(image)",
    "pipeline": "pipeline('image-segmentation', model)(image)",
    "segformer predict": "import segformer_command\n"
    "assert segformer_command.main(['predict', model, folder, '-o', out, '--overlay']) == 0",
}


def third_party_imports(tmp_path, model, entries):
    """The packages that each entry imports first, beside the standard library; those of Transformers come first."""
    model.save_pretrained(tmp_path / "model")
    SegFormerImageProcessor().save_pretrained(tmp_path / "model")
    image = tmp_path / "images" / "a.png"
    image.parent.mkdir()
    Image.new("RGB", (64, 48)).save(image)
    arguments = [tmp_path / "model", image, image.parent, tmp_path / "out", json.dumps(entries)]
    command = [sys.executable, "-c", STAGES, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()[-1])


@pytest.fixture
def imported(tmp_path, model):
    """Imports of all entries, and of one more that imports what must not be."""
    return third_party_imports(tmp_path, model, {**ENTRIES, "guard": "import pyarrow, segformer_command"})


def test_loading_and_predicting_import_nothing_but_the_package(imported):
    by_transformers, guard = imported.pop("transformers"), imported.pop("guard")
    assert {name for names in imported.values() for name in names} <= {"hf_segformer", "segformer_command"}, imported
    assert imported["package"] == ["hf_segformer"]
    assert not HEAVY & set(by_transformers), "Transformers imports more than it did: look at what is listed"
    assert "pyarrow" in guard  # an import is seen
