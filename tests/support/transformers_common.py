"""Transformers' own common tests, as the package `transformers_tests`.

`make install` stores the `tests` folder of its source distribution in `.cache/`. There can be only one package called
`tests`, so that the folder is mounted under another name. Modules that it imports and the distribution lacks are
replaced: the export and generation tests by empty classes, the common configuration fields by a table here.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import transformers

FOLDER = Path(__file__).resolve().parents[2] / ".cache" / f"transformers-tests-{transformers.__version__}" / "tests"
PACKAGE = "transformers_tests"

if not FOLDER.is_dir():
    pytest.fail(
        f"{FOLDER} is missing: run `make install` or `python tests/support/fetch_transformers_tests.py`",
        pytrace=False,
    )

# The fields that all configurations share, each with a value that is not its default.
COMMON_FIELDS = {
    "architectures": ["SegFormerModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "road", 1: "sky"},
    "is_encoder_decoder": True,
    "label2id": {"road": 0, "sky": 1},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}


class _AnyMark:
    """Replacement of `pytest.mark`: the folder uses marks that the strict list of this project lacks."""

    def __getattr__(self, name):
        return lambda test: test


def _mount(name: str, **contents) -> None:
    module = ModuleType(f"{PACKAGE}{name}")
    vars(module).update(contents)
    sys.modules[module.__name__] = module


_mount("", __path__=[str(FOLDER)])
_mount(".exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
_mount(".generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
_mount(".utils.test_configuration_utils", config_common_kwargs=COMMON_FIELDS)

backbone = importlib.import_module(f"{PACKAGE}.test_backbone_common")
# The import searches for the source tree of the library, and does not use it.
with patch("transformers.utils.direct_transformers_import"):
    configuration = importlib.import_module(f"{PACKAGE}.test_configuration_common")
with patch("pytest.mark", _AnyMark()):
    modeling = importlib.import_module(f"{PACKAGE}.test_modeling_common")

# A script beside the library's source tree, which fetches images that no test here asks for.
_fetch = ModuleType("fetch_hub_objects_for_ci")
vars(_fetch)["url_to_local_path"] = lambda url: url
with (
    patch("pytest.mark", _AnyMark()),
    patch.dict(sys.modules, {"fetch_hub_objects_for_ci": _fetch}),
    patch.object(sys, "path", list(sys.path)),
):
    image_processing = importlib.import_module(f"{PACKAGE}.test_image_processing_common")
