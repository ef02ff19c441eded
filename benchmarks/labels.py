"""Logits to labels: 19 classes, 256x512 to 1024x2048, by the image processors here and in Transformers.

One row has logits that change slowly, as a network's do; the other has noise, where neighbours have different
best classes: the worst case.
"""

import sys
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.modeling_outputs import SemanticSegmenterOutput

from hf_segformer import SegFormerImageProcessor
from hf_segformer.benchmarking.comparison import compare
from hf_segformer.benchmarking.timing import Call

from .record import Options, Record, Row, main

SIZE = 1024, 2048
_COARSE = {"scene": (16, 32), "noise": (256, 512)}
_TOLERANCE = 1e-5  # share of pixels: where two classes are equal up to rounding, either may win


def logits_of(kind: str) -> Tensor:
    """Random values on a coarse grid, upsampled to (1, 19, 256, 512)."""
    values = torch.randn(1, 19, *_COARSE[kind], generator=torch.Generator().manual_seed(0))
    return F.interpolate(values, size=(256, 512), mode="bicubic", align_corners=False)


def build(candidate: str, kind: str, device: str) -> Call:
    """Return the call of a processor."""
    # Transformers' other processor needs torchvision, and has the same method.
    ours, theirs = SegFormerImageProcessor(), transformers.SegformerImageProcessorPil()
    processor = ours if candidate == "hf_segformer" else theirs
    outputs = SemanticSegmenterOutput(logits=logits_of(kind).to(device))

    def post_process() -> Tensor:
        with torch.inference_mode():
            return processor.post_process_semantic_segmentation(outputs, target_sizes=[SIZE])[0].cpu()

    return post_process


def share_of_others(found: Tensor, expected: Tensor) -> float:
    """Return the share of pixels whose labels differ."""
    return (found != expected).float().mean().item()


def row_of(kind: str) -> Row:
    """Return the function that measures a row."""

    def measure(options: Options) -> list[Record]:
        builds = {name: partial(build, name, kind, options.device) for name in ("transformers", "hf_segformer")}
        found = compare(
            builds,
            tolerance=_TOLERANCE,
            difference=share_of_others,
            memory_of=tuple(builds),
            device=options.device,
            **options.turns(),
        )
        return [
            Record.of(kind, each.name, each.timing, each.memory, difference=each.difference, device=options.device)
            for each in found
        ]

    return measure


ROWS = {kind: row_of(kind) for kind in _COARSE}

if __name__ == "__main__":
    sys.exit(main("labels", ROWS, __doc__))
