"""A folder for transformers.js: its pipeline in Node gives PyTorch's predictions."""

import json
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.export.exporters import ExportConfig, export_model
from hf_segformer.export.verification import smooth_images
from tests.support.node import check_in_node, expected_segmentation, native_size
from tests.support.tiny import TINY, logits_of

NODE = Path(__file__).resolve().parents[2] / ".cache" / "node"  # `make test-browser` installs the package there


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    names = {0: "sky", 1: "road", 2: "house", 3: "tree", 4: "car"}
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, id2label=names)).eval()
    with torch.no_grad():  # so that every label is given to some pixels
        logits = logits_of(model, torch.randn(1, 3, 96, 128))
        model.decode_head.classifier.bias -= logits.mean(dim=(0, 2, 3))
    return model


@pytest.fixture(scope="module")
def processor():
    return SegFormerImageProcessor(size={"height": 96, "width": 128})


@pytest.fixture(scope="module")
def exported(model, processor, tmp_path_factory):
    """An exported folder, and its parity in Node."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("exported")
    export_model(model, processor, folder, ExportConfig("transformers.js", float16=True, int8="dynamic"))
    files = ["model.onnx", "model_fp16.onnx", "model_quantized.onnx"]
    return folder, check_in_node(folder, model, processor, files, working_folder=NODE)


@pytest.mark.browser
def test_the_pipeline_gives_pytorchs_labels(exported, model, processor):
    folder, figures = exported
    shares = {name: each["pixel_agreement"] for name, each in figures["files"].items()}
    assert shares["model.onnx"] > 0.9999
    assert shares["model_fp16.onnx"] > 0.99
    assert 0.9 < shares["model_quantized.onnx"] <= 1
    assert figures["version"].startswith("4.")
    [image] = smooth_images(1, 96, 128, 3, seed=7)
    assert len(expected_segmentation(model, processor, image).unique()) > 2
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "segformer"
    assert config["id2label"]["2"] == "house"
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"height": 96, "width": 128}


@pytest.mark.browser
def test_other_labels_and_a_broken_file_are_refused(exported, model, processor, tmp_path):
    folder = exported[0]
    other = deepcopy(model)
    torch.nn.init.normal_(other.decode_head.classifier.weight)
    with pytest.raises(ValueError, match=r"in transformers\.js .* of the pixels differ"):
        check_in_node(folder, other, processor, ["model.onnx"], working_folder=NODE)
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "onnx" / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"transformers\.js cannot run the exported files"):
        check_in_node(tmp_path / "broken", model, processor, ["model.onnx"], working_folder=NODE)


@pytest.mark.browser
def test_a_missing_package_is_reported(model, processor, tmp_path):
    message = check_in_node(tmp_path, model, processor, ["model.onnx"], working_folder=tmp_path)
    assert message == {
        "not_run": "Node finds no @huggingface/transformers from here: npm install @huggingface/transformers"
    }


def test_missing_node_is_reported(model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert check_in_node(tmp_path, model, processor, ["model.onnx"]) == {"not_run": "node is not installed"}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"height": 96, "width": 128}, (96, 128)),
        ({"shortest_edge": 64}, (64, 80)),
        ({"shortest_edge": 64, "longest_edge": 70}, (64, 70)),
    ],
)
def test_an_image_of_native_size_is_not_resized(size, expected):
    processor = SegFormerImageProcessor(size=size)
    assert native_size(processor) == processor._target_size(*expected) == expected


def test_a_node_that_never_ends_is_an_error(model, processor, tmp_path, monkeypatch):
    def never_ends(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", never_ends)
    with pytest.raises(ValueError, match="no answer within 600 seconds"):
        check_in_node(tmp_path, model, processor, ["model.onnx"])
