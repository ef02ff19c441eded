"""`override_builtin()`: opt-in, and models saved under it remain checkpoints for Transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import json, sys
import torch
from tests.support.tiny import TINY
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForSemanticSegmentation,
    SegformerConfig, SegformerForSemanticSegmentation,
)
import hf_segformer

folder, again = sys.argv[1:]
stock = SegformerForSemanticSegmentation(SegformerConfig(**TINY, num_labels=5)).eval()
stock.save_pretrained(folder)
with open(folder + "/preprocessor_config.json", "w") as file:
    json.dump({"image_processor_type": "SegformerImageProcessor", "do_reduce_labels": True}, file)
facts = {"before": type(AutoModelForSemanticSegmentation.from_pretrained(folder)).__module__}
hf_segformer.override_builtin()
hf_segformer.override_builtin()  # twice is once
classes = (AutoModel, AutoModelForSemanticSegmentation, AutoModelForImageClassification)
facts["classes"] = [
    isinstance(auto.from_pretrained(folder), getattr(hf_segformer, name))
    for auto, name in zip(classes, (
        "SegFormerModel", "SegFormerForSemanticSegmentation", "SegFormerForImageClassification"), strict=True)
]
try:
    AutoImageProcessor.register
    processor = AutoImageProcessor.from_pretrained(folder)
    facts["processor"] = isinstance(processor, hf_segformer.SegFormerImageProcessor)
    facts["reduces"] = processor.do_reduce_labels
    processor.save_pretrained(again)
except ImportError:
    facts["processor"] = None
model = AutoModelForSemanticSegmentation.from_pretrained(folder, layer_norm_eps=1e-5).eval()
model.save_pretrained(again)
loaded, info = SegformerForSemanticSegmentation.from_pretrained(again, output_loading_info=True)
pixel_values = torch.randn(1, 3, 40, 56)
with torch.no_grad():
    facts["difference"] = (model(pixel_values).logits - loaded.eval()(pixel_values).logits).abs().max().item()
facts["clean"] = not info["missing_keys"] and not info["unexpected_keys"]
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Facts printed by a separate process, as `override_builtin` cannot be undone."""
    folder = tmp_path_factory.mktemp("builtin")
    again = folder / "again"
    command = [sys.executable, "-c", SCRIPT, str(folder / "stock"), str(again)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout.splitlines()[-1])
    facts["config"] = json.loads((again / "config.json").read_text())
    facts["files"] = sorted(path.name for path in again.iterdir())
    facts["preprocessor"] = json.loads((again / "preprocessor_config.json").read_text()) if facts["processor"] else None
    return facts


def test_auto_classes_are_unchanged_before_the_call(facts):
    assert facts["before"].startswith("transformers.models.segformer")


def test_auto_classes_return_this_packages_models_after_the_call(facts):
    assert facts["classes"] == [True, True, True]


def test_saved_models_load_in_transformers_and_contain_no_code(facts):
    assert facts["config"]["model_type"] == "segformer"
    assert facts["config"]["architectures"] == ["SegformerForSemanticSegmentation"]
    assert "auto_map" not in facts["config"]
    assert not [name for name in facts["files"] if name.endswith(".py")]
    assert facts["clean"]
    assert facts["difference"] < 1e-6


def test_the_image_processor_is_overridden_too(facts):
    if facts["processor"] is None:
        pytest.skip("this Transformers has no AutoImageProcessor without torchvision")
    assert facts["processor"]
    assert facts["reduces"]
    assert facts["preprocessor"]["image_processor_type"] == "SegformerImageProcessor"
    assert "auto_map" not in facts["preprocessor"]
