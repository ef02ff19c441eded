"""Compiled SegFormer here, against Transformers' own compiled and exported to ONNX Runtime and OpenVINO.

A product of two large matrices is interleaved with them: its rate is the machine's peak in float32. First calls are
timed with empty caches.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.export import Dim

from hf_segformer.benchmarking.comparison import TOLERANCE, largest_difference, require_agreement
from hf_segformer.benchmarking.cost import model_info
from hf_segformer.benchmarking.tasks import Task, build_call, run_model
from hf_segformer.benchmarking.timing import Call, interleaved_timing
from hf_segformer.cpu_runtime_segformer import linear
from hf_segformer.export.runtimes import onnx_runtime, open_vino

from .inference import rows_at_512
from .record import Options, Record, main

PRODUCT = "matrix product"
_SIDES = (1024, 2048, 3072)


class _Logits(nn.Module):
    """Transformers' model with a tensor as its output, as exporters expect."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def export(task: Task, path: Path, any_size: bool = False) -> None:
    """Export Transformers' model to ONNX by PyTorch's exporter, for the task's size or for any."""
    pixels = task.inputs()["pixel_values"]
    torch.onnx.export(
        _Logits(task.build_transformers()).eval(),
        (torch.zeros(2, *pixels.shape[1:]) if any_size else pixels,),  # an axis of one would stay at one
        path,
        dynamo=True,
        dynamic_shapes=(dict.fromkeys((0, 2, 3), Dim.DYNAMIC),) if any_size else None,
        verbose=False,
        external_data=False,
    )


def build_onnxruntime(task: Task, path: Path) -> Call:
    """Return the call of the exported model in ONNX Runtime; idle threads sleep."""
    return partial(onnx_runtime(path), task.inputs()["pixel_values"])


def build_openvino(task: Task, path: Path) -> Call:
    """Return the call of the exported model in OpenVINO, in float32 on every processor."""
    return partial(open_vino(path), task.inputs()["pixel_values"])


def build_any_size(task: Task) -> Call:
    """Return the call of this package's model compiled for any height and width."""
    inputs = task.inputs()
    torch._dynamo.mark_dynamic(inputs["pixel_values"], [2, 3])
    return run_model(torch.compile(task.build_hf_segformer(), fullgraph=True), task, inputs)


def build_product(side: int, by_onednn: bool, device: str) -> Call:
    """Return the call of a product of two square matrices, by PyTorch's default library or by oneDNN."""
    first, second = torch.randn(2, side, side, device=device)

    def multiply() -> Tensor:
        result = linear(first, second) if by_onednn else torch.mm(first, second)
        return result if device == "cpu" else result[0, 0].item()  # waits for the device

    return multiply


def fastest_product(device: str) -> tuple[int, bool]:
    """Return the side of the fastest matrix product, and True if it is oneDNN's."""
    tried = list(product(_SIDES, (False, True)))
    timings = interleaved_timing({str(each): build_product(*each, device) for each in tried}, rounds=5, budget=10)
    return max(tried, key=lambda each: each[0] ** 3 / timings[str(each)].median)


def measure_compiled(row: str, task: Task, options: Options, rounds: int = 99) -> list[Record]:
    """Measure one record per candidate, and one for the matrix product."""
    is_cpu = task.device == "cpu"
    with TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        path = Path(folder) / "model.onnx"
        builds: dict[str, Callable[[], Call]] = {
            "transformers": partial(build_call, "transformers", task),
            "hf_segformer": partial(build_call, "hf_segformer", task),
            "transformers compiled": partial(build_call, "transformers compiled", task),
            "hf_segformer compiled": partial(build_call, "hf_segformer compiled", task),
            "hf_segformer compiled, any size": partial(build_any_size, task),
        }
        if is_cpu:
            export(task, path)
            builds["transformers in ONNX Runtime"] = partial(build_onnxruntime, task, path)
            builds["transformers in OpenVINO"] = partial(build_openvino, task, path)
        calls, results, first_calls = {}, {}, {}
        for name, build in builds.items():
            began = time.perf_counter()
            calls[name] = build()
            results[name] = calls[name]()
            if "compiled" in name:
                first_calls[name] = round(time.perf_counter() - began, 1)
        expected = results.pop("transformers")
        differences = {name: largest_difference(found, expected) for name, found in results.items()}
        require_agreement(differences, TOLERANCE)
        del calls["transformers"]
        side, by_onednn = fastest_product(task.device)
        calls[PRODUCT] = build_product(side, by_onednn, task.device)
        timings = interleaved_timing(calls, **options.turns(rounds))
    flop = 2 * sum(stage.num_multiply_adds for stage in model_info(task.config, task.height, task.width))
    flop *= task.batch_size
    return [
        Record.of(
            row,
            name,
            timing,
            difference=differences.get(name),
            first_call=first_calls.get(name),
            gigaflop=(2 * side**3 if name == PRODUCT else flop if name.startswith("hf_segformer") else None),
            note=f"{side}x{side}{', oneDNN' if by_onednn else ''}" if name == PRODUCT else "",
            device=task.device,
        )
        for name, timing in timings.items()
    ]


ROWS = rows_at_512(measure_compiled, b0=21, b2=9)

if __name__ == "__main__":
    sys.exit(main("compiled", ROWS, __doc__))
