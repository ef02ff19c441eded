"""A folder of 100 generated pictures to label maps: the predictor here, and Transformers' pipeline with its SegFormer.

Both have the same B0 of 19 classes with LayerNorm's epsilon at 1e-5, squash pictures to 512x512 and give labels at each
picture's size. Files are read each time. The pipeline gives a mask for each class that it finds, and the predictor one
label map: each is timed at what it gives, and both are compared as label maps. A row's time is that of all pictures.
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
from hf_segformer.benchmarking.comparison import Call, Task, compare

from .record import Options, Record, Row, main

NUM_PICTURES = 100
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
    """The call of one candidate, with all pictures."""
    task, paths = (
        Task(SegFormerConfig.from_variant("b0", num_labels=19), 1, 512, 512, device=device),
        folder_of(kind, number),
    )
    if candidate == "hf_segformer":
        predictor = SegFormerPredictor(task.ours().eval(), SegFormerImageProcessor())
        return lambda: [prediction.segmentation for prediction in predictor(paths)]
    # Transformers' other processor needs torchvision, and gives the same pixels.
    pipeline = transformers.pipeline(
        "image-segmentation",
        model=task.theirs().eval(),
        image_processor=transformers.SegformerImageProcessorPil(),
        device=device,
    )
    return lambda: pipeline(paths, subtask="semantic")


def share_of_others(found: Any, expected: Any) -> float:
    """Share of the pixels of all pictures whose labels differ."""
    differs = [label_map(one) != label_map(other) for one, other in zip(found, expected, strict=True)]
    return float(np.concatenate([each.ravel() for each in differs]).mean())


def label_map(result: Any) -> np.ndarray:
    """A label map as it is, or out of the pipeline's masks."""
    if isinstance(result, np.ndarray):
        return result
    labels = np.full(np.asarray(result[0]["mask"]).shape, 255, dtype=np.uint8)
    for each in result:
        labels[np.asarray(each["mask"]) > 0] = int(each["label"].removeprefix("LABEL_"))
    return labels


def row_of(kind: str) -> Row:
    """What measures a row."""

    def measure(options: Options) -> list[Record]:
        names = ("transformers", "hf_segformer")
        builds = {name: partial(build, name, kind, NUM_PICTURES, options.device) for name in names}
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
                note=f"{NUM_PICTURES / each.timing.median:.1f} pictures/s",
            )
            for each in found
        ]

    return measure


ROWS = {kind: row_of(kind) for kind in _SIZES}

if __name__ == "__main__":
    sys.exit(main("predict", ROWS, __doc__))
