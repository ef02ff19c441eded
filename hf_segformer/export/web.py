"""Folder of a web page that runs the network in the browser, with WebGPU where there is, else WebAssembly.

The page consists of static files: nothing is loaded from other hosts, and images stay in the browser. ONNX Runtime Web
is copied from an installed npm package; nothing is downloaded here.
"""

import json
import re
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from ..image_processing_segformer import SegFormerImageProcessor
from ..modeling_segformer import SegFormerForSemanticSegmentation
from .exportable import MIN_SIDE, require_fixed_range, resize_outside, takes_bytes

PACKAGE = "onnxruntime-web"
_SCRIPT = "ort.webgpu.bundle.min.mjs"  # WebGPU and WebAssembly
_MAX_CLASSES = 256  # of the segmentation map that the page saves, in bytes


def find_onnxruntime_web(given: Path | None = None) -> Path:
    """Find the installed npm package onnxruntime-web: the given folder, or node_modules here or in a parent.

    Raises:
        ValueError: if it is not found, or not a version with WebGPU.
    """
    places = [given] if given else [each / "node_modules" / PACKAGE for each in (Path.cwd(), *Path.cwd().parents)]
    for folder in places:
        if (folder / "dist" / _SCRIPT).is_file() and (folder / "package.json").is_file():
            _binary(folder)
            read_json(folder / "package.json")
            return folder
    if given:
        raise ValueError(
            f"{given} has no package.json and dist/{_SCRIPT}; expected the folder of the npm package {PACKAGE}, "
            "version 1.24 or newer"
        )
    raise ValueError(
        f"node_modules/{PACKAGE} is not found here or in a parent folder: npm install {PACKAGE}, or say where it is "
        "with --onnxruntime-web DIR"
    )


def _binary(package: Path) -> Path:
    """Return the WebAssembly file that the script loads."""
    script = (package / "dist" / _SCRIPT).read_text(encoding="utf-8")
    names = sorted(set(re.findall(r"ort-wasm[\w.-]*\.wasm", script)))
    found = [package / "dist" / name for name in names if (package / "dist" / name).is_file()]
    if len(found) != 1:
        raise ValueError(
            f"{package / 'dist' / _SCRIPT} loads {', '.join(names) or 'no WebAssembly'}, of which {len(found)} files "
            f"are beside it; expected one: install {PACKAGE} again, version 1.24 or newer"
        )
    return found[0]


def require_page(model: SegFormerForSemanticSegmentation, processor: SegFormerImageProcessor) -> None:
    """Raise ValueError for a model, or the value range of its processor, that a page cannot show."""
    if model.config.num_channels != 3:
        raise ValueError(
            f"the model takes {model.config.num_channels} bands; expected 3 for a page, whose images are in colour"
        )
    if model.config.num_labels > _MAX_CLASSES:
        raise ValueError(f"the model has {model.config.num_labels} labels; expected at most {_MAX_CLASSES} for a page")
    require_fixed_range(processor)
    if not takes_bytes(processor):
        raise ValueError(
            f"value_range is {processor.value_range}; expected one within 0 to 255 for a page, as browsers decode "
            "images to bytes"
        )


def write_page(
    processor: SegFormerImageProcessor, metadata: Mapping[str, str], library: Path, folder: Path
) -> dict[str, Any]:
    """Write everything of the page but model.onnx, which contains the processing.

    Args:
        processor: of the model.
        metadata: of `metadata.describe_model`.
        library: folder of the npm package onnxruntime-web.
        folder: to write to.

    Returns:
        The version of onnxruntime-web.
    """
    page = files(__package__) / "page"
    for name in ("index.html", "page.js"):
        (folder / name).write_bytes((page / name).read_bytes())
    (folder / PACKAGE).mkdir()
    for file in (library / "dist" / _SCRIPT, _binary(library)):
        shutil.copyfile(file, folder / PACKAGE / file.name)
    version = read_json(library / "package.json").get("version", "of unknown version")
    licenses = (page / "LICENSES.txt").read_text(encoding="utf-8").format(version=version)
    (folder / "LICENSES.txt").write_text(licenses, encoding="utf-8")
    description = {
        "names": json.loads(metadata["names"]),
        "palette": json.loads(metadata["palette"]),
        "min_side": MIN_SIDE,
        "processor": {**_sizes(processor), "in_graph": not resize_outside(processor)},
    }
    write_json(description, folder / "model.json")
    return {PACKAGE: version}


def _sizes(processor: SegFormerImageProcessor) -> dict[str, Any]:
    """Return the settings by which the page resizes images where the graph does not."""
    return {name: getattr(processor, name) for name in ("do_resize", "size", "keep_ratio", "size_divisor")}


__all__ = ["PACKAGE", "find_onnxruntime_web", "require_page", "write_page"]
