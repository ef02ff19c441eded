"""A folder of 100 generated images to segmentation maps: the predictor here, and Transformers' pipeline.

Both have the same B0 of 19 classes with LayerNorm's epsilon at 1e-5, resize images to 512x512 and predict at each
image's size. Files are read each time. The pipeline returns a mask for each class that it finds, the predictor one
segmentation map: each is timed at its own output, and both are compared as segmentation maps. A row's time is that of
all images.
"""

import atexit
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image

from hf_segformer import SegFormerConfig, SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.benchmarking.comparison import compare
from hf_segformer.benchmarking.tasks import Task
from hf_segformer.benchmarking.timing import Call

from .record import Options, Record, Row, main

NUM_IMAGES = 100
_SIZES = {"same": ((480, 640),), "mixed": ((480, 640), (640, 480), (375, 500), (768, 1024))}
_TOLERANCE = 1e-4  # share of pixels: where two classes are equal up to rounding, either may win


@cache
def folder_of(kind: str, number: int) -> list[str]:
    """JPEG files of patches in a folder of this process, always the same."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    rng, paths = np.random.default_rng(0), []
    for index in range(number):
        height, width = _SIZES[kind][index % len(_SIZES[kind])]
        patches = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        paths.append(str(Path(folder.name) / f"{index:03d}.jpg"))
        patches.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def build(candidate: str, kind: str, number: int, device: str) -> Call:
    """Return the call of a candidate, with all images."""
    task, paths = (
        Task(SegFormerConfig.from_variant("b0", num_labels=19), 1, 512, 512, device=device),
        folder_of(kind, number),
    )
    if candidate == "hf_segformer":
        predictor = SegFormerPredictor(task.build_hf_segformer().eval(), SegFormerImageProcessor())
        return lambda: [prediction.segmentation for prediction in predictor(paths)]
    # Transformers' other processor needs torchvision, and gives the same pixels.
    pipeline = transformers.pipeline(
        "image-segmentation",
        model=task.build_transformers().eval(),
        image_processor=transformers.SegformerImageProcessorPil(),
        device=device,
    )
    return lambda: pipeline(paths, subtask="semantic")


def share_of_others(found: Any, expected: Any) -> float:
    """Return the share of pixels of all images whose labels differ."""
    differs = [segmentation_of(one) != segmentation_of(other) for one, other in zip(found, expected, strict=True)]
    return float(np.concatenate([each.ravel() for each in differs]).mean())


def segmentation_of(result: Any) -> np.ndarray:
    """Return a segmentation map as it is, or assembled from the pipeline's masks."""
    if isinstance(result, np.ndarray):
        return result
    labels = np.full(np.asarray(result[0]["mask"]).shape, 255, dtype=np.uint8)
    for each in result:
        labels[np.asarray(each["mask"]) > 0] = int(each["label"].removeprefix("LABEL_"))
    return labels


def row_of(kind: str) -> Row:
    """Return the function that measures a row."""

    def measure(options: Options) -> list[Record]:
        names = ("transformers", "hf_segformer")
        builds = {name: partial(build, name, kind, NUM_IMAGES, options.device) for name in names}
        found = compare(
            builds,
            tolerance=_TOLERANCE,
            difference=share_of_others,
            memory_of=names,
            device=options.device,
            **options.turns(3),
        )
        return [
            Record.of(
                kind,
                each.name,
                each.timing,
                each.memory,
                difference=each.difference,
                device=options.device,
                note=f"{NUM_IMAGES / each.timing.median:.1f} images/s",
            )
            for each in found
        ]

    return measure


ROWS = {kind: row_of(kind) for kind in _SIZES}

if __name__ == "__main__":
    sys.exit(main("predict", ROWS, __doc__))
