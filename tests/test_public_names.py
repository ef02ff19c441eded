"""The public names of the package: frozen, importable, and lazy where they need more than the model."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_segformer

# Removing or renaming one of these breaks users: it needs a new major version and a line in CHANGELOG.md.
PUBLIC = [
    "InferenceOptions",
    "SegFormerBackbone",
    "SegFormerConfig",
    "SegFormerForImageClassification",
    "SegFormerForSemanticSegmentation",
    "SegFormerImageProcessor",
    "SegFormerModel",
    "SegFormerPredictor",
    "SegFormerTrainer",
    "SegmentationLoss",
    "SegmentationMetrics",
    "__version__",
    "convert_checkpoint",
    "evaluate",
    "explain_fast_paths",
    "load_segmentation",
    "override_builtin",
    "predict_large_image",
    "set_fast_paths",
    "upsample_argmax",
    "upsample_cross_entropy",
]

HOMES = {
    "InferenceOptions": "hf_segformer.config",
    "SegFormerPredictor": "hf_segformer.inference.predictor",
    "SegFormerTrainer": "hf_segformer.training.trainer",
    "SegmentationLoss": "hf_segformer.training.losses",
    "SegmentationMetrics": "hf_segformer.evaluation.metrics",
    "convert_checkpoint": "hf_segformer.conversion.convert",
    "evaluate": "hf_segformer.evaluation.evaluate",
    "explain_fast_paths": "hf_segformer.dispatch_segformer",
    "load_segmentation": "hf_segformer.conversion.loading",
    "override_builtin": "hf_segformer.auto_classes",
    "predict_large_image": "hf_segformer.inference.large_image",
    "set_fast_paths": "hf_segformer.dispatch_segformer",
    "upsample_argmax": "hf_segformer.upsampling_segformer",
    "upsample_cross_entropy": "hf_segformer.upsampling_segformer",
}

LIGHT = """
import sys
import hf_segformer
from transformers import AutoConfig
assert AutoConfig.for_model("hf_segformer").__class__ is hf_segformer.SegFormerConfig
ours = ("training", "evaluation", "inference", "conversion", "data", "hub", "export", "app", "cli", "benchmarking")
print([name for name in ours if f"hf_segformer.{name}" in sys.modules])
"""


def test_public_names_are_frozen():
    assert sorted(hf_segformer.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_importable_from_the_package(name):
    namespace = {}
    exec(f"from hf_segformer import {name}", namespace)
    if name in HOMES:
        assert namespace[name].__module__ == HOMES[name]


def test_dir_lists_public_names():
    assert set(PUBLIC) <= set(dir(hf_segformer))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'SegFormerForDepth'"):
        hf_segformer.SegFormerForDepth  # noqa: B018


def test_importing_the_package_registers_the_model_and_imports_no_more_than_it_needs():
    result = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_type_checkers_see_the_homes_of_lazy_names():
    """The imports under TYPE_CHECKING and the table of lazy names are the same."""
    tree = ast.parse(Path(hf_segformer.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == hf_segformer._LAZY
