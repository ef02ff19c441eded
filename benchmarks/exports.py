"""Exported files in their runtimes, ours against the same export of Transformers' model, 150 classes.

Files in float32 must agree with PyTorch before they are timed. Those in float16 and int8 differ, and the share of
labels that are PyTorch's is noted. The weights are random, so that is no measure of their quality, which `segformer
export --images DIR --labels DIR` finds out for a trained model.
"""

import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from hf_segformer import SegFormerImageProcessor
from hf_segformer.benchmarking.comparison import TOLERANCE, largest_difference, require_agreement
from hf_segformer.benchmarking.tasks import Task, run_model
from hf_segformer.benchmarking.timing import Call, interleaved_timing
from hf_segformer.export.exportable import DeployedSegFormer, trace
from hf_segformer.export.metadata import describe_model
from hf_segformer.export.quantization import to_float16, to_int8
from hf_segformer.export.runtimes import Runtime, onnx_runtime, open_vino, torch_program
from hf_segformer.export.targets import write_onnx, write_openvino, write_torch
from hf_segformer.upsampling_segformer import upsample_argmax

from .compiled import export as export_theirs
from .inference import rows_at_512
from .record import Options, Record, main

SHORT = ("ONNX Runtime float16", "ONNX Runtime int8 dynamic", "ONNX Runtime int8 static")


def write_files(task: Task, folder: Path) -> dict[str, Runtime]:
    """Every candidate's file, and what runs it; each of ours after its counterpart."""
    model = task.build_hf_segformer().cpu()
    program, pixels = trace(DeployedSegFormer(model)), task.inputs()["pixel_values"].cpu()
    metadata = describe_model(model, SegFormerImageProcessor(), include_processing=False)
    ours, theirs = folder / "ours.onnx", folder / "theirs.onnx"
    export_theirs(task, theirs, any_size=True)  # as ours
    write_onnx(program, ours, metadata)
    write_openvino(program, folder / "ours.xml", metadata)
    write_torch(program, folder / "ours.pt2", metadata)
    short = [folder / f"{name}.onnx" for name in ("float16", "dynamic", "static")]
    to_float16(ours, short[0])
    to_int8(ours, short[1])
    to_int8(ours, short[2], [pixels])
    return {
        "transformers in ONNX Runtime": onnx_runtime(theirs),
        "ONNX Runtime": onnx_runtime(ours),
        "transformers in OpenVINO": open_vino(theirs),
        "OpenVINO": open_vino(folder / "ours.xml"),
        "torch.export": torch_program(folder / "ours.pt2"),
        **{name: onnx_runtime(path) for name, path in zip(SHORT, short, strict=True)},
    }


def measure_exports(row: str, task: Task, options: Options, rounds: int = 99) -> list[Record]:
    """One record a candidate; on a CPU only, as the runtimes' packages for it are those that are tested."""
    if task.device != "cpu":
        raise ValueError("exported files are measured on the CPU")
    pixels = task.inputs()["pixel_values"]
    expected = run_model(task.build_hf_segformer(), task)()
    with TemporaryDirectory() as folder:
        calls: dict[str, Call] = {
            name: partial(runtime, pixels) for name, runtime in write_files(task, Path(folder)).items()
        }
        results = {name: call() for name, call in calls.items()}
        differences = {name: largest_difference(found, expected) for name, found in results.items()}
        require_agreement({name: each for name, each in differences.items() if name not in SHORT}, TOLERANCE)
        timings = interleaved_timing(calls, **options.turns(rounds))
    return [
        Record.of(
            row,
            name,
            timing,
            difference=differences[name],
            note=f"{equal_labels(results[name], expected, task):.1%} of the labels" if name in SHORT else "",
        )
        for name, timing in timings.items()
    ]


def equal_labels(found: Tensor, expected: Tensor, task: Task) -> float:
    """Share of the pixels with the same label."""
    first, second = (upsample_argmax(logits.float(), (task.height, task.width)) for logits in (found, expected))
    return torch.eq(first, second).double().mean().item()


ROWS = rows_at_512(measure_exports, b0=21)

if __name__ == "__main__":
    sys.exit(main("exports", ROWS, __doc__))
