"""An exported folder in transformers.js, under Node, compared with PyTorch."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_segformer.export.verification import smooth_images
from hf_segformer.image_processing_segformer import SegFormerImageProcessor
from hf_segformer.modeling_segformer import SegFormerForSemanticSegmentation

PACKAGE = "@huggingface/transformers"
DTYPES = {"model.onnx": "fp32", "model_fp16.onnx": "fp16", "model_quantized.onnx": "q8"}
_TIMEOUT = 600  # seconds
_ALLOWED = 1e-3  # share of the labels that may differ in float32: two classes may be equal up to rounding
_NOT_THERE = 3  # status of the script where the package is missing
# Arguments: folder, image, types of weights, file to write. Labels are written by their names' places in config.json.
_SCRIPT = """
const path = require('path');
const fs = require('fs');
let file;
try {
  file = require.resolve('@huggingface/transformers', { paths: [process.cwd()] });
} catch {
  process.exit(3);
}
const { env, pipeline, RawImage } = require(file);

async function main([folder, file_name, dtypes, output]) {
  env.allowRemoteModels = false;
  env.localModelPath = path.dirname(folder);
  const results = { version: env.version, labels: {} };
  const pixels = await RawImage.read(file_name);
  for (const dtype of dtypes.split(',')) {
    const segment = await pipeline('image-segmentation', path.basename(folder), { dtype, device: 'cpu' });
    const names = segment.model.config.id2label;
    const ids = Object.keys(names).map(Number).sort((a, b) => a - b);
    const map = new Array(pixels.width * pixels.height).fill(-1);
    for (const { label, mask } of await segment(pixels)) {
      const id = ids.find((each) => names[each] === label);
      mask.data.forEach((value, pixel) => { if (value) map[pixel] = id; });
    }
    results.labels[dtype] = map;
    await segment.dispose();
  }
  fs.writeFileSync(output, JSON.stringify(results));
}

main(process.argv.slice(2)).catch((error) => { console.error(error); process.exit(1); });
"""


def check_in_node(
    folder: Path,
    model: SegFormerForSemanticSegmentation,
    processor: SegFormerImageProcessor,
    files: Sequence[str],
    *,
    working_folder: Path | None = None,
) -> dict[str, Any]:
    """Compare the predictions of `pipeline('image-segmentation')` in Node with PyTorch's.

    The image has the size that the processor would give it, so that neither of the two resizes it: their filters
    differ.

    Args:
        folder: that was exported.
        model: in PyTorch.
        processor: its image processor.
        files: to compare, of `DTYPES`.
        working_folder: from where Node looks for the package, in node_modules upwards or by NODE_PATH; the current
            one by default.

    Returns:
        `version` and, by file, `pixel_agreement`; or `not_run` with the reason, where Node or the package is missing.

    Raises:
        ValueError: if Node fails or does not end, or the labels of the float32 file are others.
    """
    node = shutil.which("node")
    if node is None:
        return {"not_run": "node is not installed"}
    height, width = native_size(processor)
    [image] = smooth_images(1, height, width, 3, seed=7)
    if model.config.num_channels != 3:
        return {"not_run": f"transformers.js reads images, and the model takes {model.config.num_channels} bands"}
    with TemporaryDirectory() as temporary:
        script, png, output = (Path(temporary) / name for name in ("check.cjs", "image.png", "labels.json"))
        script.write_text(_SCRIPT)
        image.save(png)
        dtypes = ",".join(DTYPES[name] for name in files)
        command = [node, str(script), str(folder.resolve()), str(png), dtypes, str(output)]
        try:
            done = subprocess.run(command, cwd=working_folder, capture_output=True, text=True, timeout=_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"transformers.js gives no answer within {_TIMEOUT} seconds") from error
        if done.returncode == _NOT_THERE:
            return {"not_run": f"Node finds no {PACKAGE} from here: npm install {PACKAGE}"}
        if done.returncode:
            raise ValueError(f"transformers.js cannot run the exported files: {done.stderr.strip()[-500:]}")
        found = json.loads(output.read_text())
    expected = expected_segmentation(model, processor, image)
    shares = {name: _equal(found["labels"][DTYPES[name]], expected) for name in files}
    if shares["model.onnx"] < 1 - _ALLOWED:
        raise ValueError(
            f"in transformers.js {1 - shares['model.onnx']:.2%} of the pixels differ from PyTorch's, but at most "
            f"{_ALLOWED:.2%} may, where two classes are equal up to rounding"
        )
    return {"version": found["version"], "files": {name: {"pixel_agreement": share} for name, share in shares.items()}}


def native_size(processor: SegFormerImageProcessor) -> tuple[int, int]:
    """Sides of a image that the processor leaves as it is, by its own rule and by that of Transformers' own."""
    size = processor.size
    if "height" in size:
        return size["height"], size["width"]
    side = size["shortest_edge"]
    return side, min(side * 5 // 4, size.get("longest_edge", side * 2))


def expected_segmentation(
    model: SegFormerForSemanticSegmentation, processor: SegFormerImageProcessor, image: Image.Image
) -> Tensor:
    """(H, W), with the first of the classes that have the same name."""
    pixels = processor(image, return_tensors="pt", do_resize=False).pixel_values
    with torch.no_grad():
        outputs = model(pixels)
    sizes = [(image.height, image.width)]
    [labels] = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    names = [model.config.id2label[index] for index in range(len(model.config.id2label))]
    return torch.tensor([names.index(name) for name in names])[labels]


def _equal(found: list[int], expected: Tensor) -> float:
    return float(np.mean(np.array(found) == expected.flatten().numpy()))


__all__ = ["check_in_node"]
