"""What `python -m benchmarks.gpu` times: whole networks and single kernels, against Transformers and the plain version.

A candidate is built anew for each row, and one that fails (out of memory, say) leaves a row that says so.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, set_fast_paths
from hf_segformer.info import model_info
from hf_segformer.ops import disable, enable
from hf_segformer.upsampling_segformer import upsample_argmax

from .gpu import RESULTS, Row, identity, plan_rows, stopwatch, write_rows

CANDIDATES = ("transformers", "transformers compiled", "plain", "plain compiled", "kernels", "kernels graph")
_TINY = {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1] * 4,
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}


def peaks(device: str, tiny: bool) -> tuple[float, float]:
    """Bytes a second that a copy moves (reads and writes), and bfloat16 operations a second of a matrix product."""
    side = 64 if tiny else 8192
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    other = torch.empty_like(matrix)
    copy, _ = stopwatch(lambda: other.copy_(matrix), device, 11)
    product, _ = stopwatch(lambda: torch.mm(matrix, matrix, out=other), device, 11)
    return 2 * matrix.nbytes / copy * 1000, 2 * side**3 / product * 1000


def build_model(candidate: str, config: SegFormerConfig, device: str, training: bool) -> torch.nn.Module:
    """A network of one of the candidates, in bfloat16, its switch set."""
    set_fast_paths(True)
    disable()
    torch.manual_seed(0)
    if candidate.startswith("transformers"):
        names = ("hidden_sizes", "depths", "num_attention_heads", "decoder_hidden_size", "num_labels")
        model: Any = SegformerForSemanticSegmentation(
            SegformerConfig(**{name: getattr(config, name) for name in names})
        )
    else:
        model = SegFormerForSemanticSegmentation(config)
    if candidate.startswith("kernels"):
        enable(device)
    model = model.to(device, torch.bfloat16).train(training)
    return torch.compile(model) if candidate.endswith("compiled") else model


def build_call(
    task: str, candidate: str, config: SegFormerConfig, size: tuple[int, int], batch: int, device: str
) -> Callable[[], Any]:
    """What is timed."""
    if task == "labels":
        return _build_labels(candidate, size, batch, device)
    model = build_model(candidate, config, device, task == "training")
    images = torch.randn(batch, 3, *size, device=device, dtype=torch.bfloat16)
    if task == "training":
        labels = torch.randint(0, config.num_labels, (batch, *size), device=device)

        def step() -> None:
            model(images, labels=labels).loss.backward()
            model.zero_grad(set_to_none=True)

        return step

    def infer() -> Any:
        with torch.inference_mode():
            return model(images).logits

    if not candidate.endswith("graph"):
        return infer
    for _ in range(3):
        infer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        infer()
    return graph.replay


def _build_labels(candidate: str, size: tuple[int, int], batch: int, device: str) -> Callable[[], Any]:
    logits = torch.randn(batch, 19, size[0] // 4, size[1] // 4, device=device, dtype=torch.bfloat16)
    set_fast_paths(True)
    disable()
    if candidate == "kernels":
        enable(device)
    if candidate == "transformers":  # as its image processors do, whatever they are called
        return lambda: torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(
            dim=1
        )
    return lambda: upsample_argmax(logits, size)


def candidates_of(task: str, device: str) -> list[str]:
    """Those that the task knows; CUDA graphs and compilers are left out of the interpreter."""
    if task == "labels":
        return ["transformers", "plain", "kernels"]
    return [
        name
        for name in CANDIDATES
        if not (name.endswith("graph") and (task != "forward" or device == "cpu"))
        and not (name.endswith("compiled") and device == "cpu")
    ]


def _kernel_calls(dtype: torch.dtype, device: str, tiny: bool) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Each kernel's name, call, and the bytes that it must move at the least, B0 at 8x3x512x512 with 150 classes."""
    from hf_segformer.ops import argmax, cross_entropy, decode_head, depthwise_gelu

    side, batch = (4, 1) if tiny else (128, 8)
    num_classes, channels, dim = (5, 8, 8) if tiny else (150, 128, 256)
    logits = torch.randn(batch, num_classes, side, side, device=device, dtype=dtype)
    logits = logits.to(memory_format=torch.channels_last)
    labels = torch.randint(0, num_classes, (batch, 4 * side, 4 * side), device=device)
    weight = torch.ones(num_classes, device=device)
    tokens = torch.randn(batch, side * side, channels, device=device, dtype=dtype)
    kernel, bias = (
        torch.randn(channels, 1, 3, 3, device=device, dtype=dtype),
        torch.randn(channels, device=device, dtype=dtype),
    )
    maps = [torch.randn(batch, side >> i, side >> i, dim, device=device, dtype=dtype) for i in range(3)]
    factor = torch.ones(dim, device=device)
    size = 4 * side
    lower = sum(stage.nbytes for stage in maps)
    yield "upsample_argmax", lambda: argmax.upsample_argmax(logits, size, size, False), logits.nbytes + labels.nbytes
    yield (
        "upsample_cross_entropy",
        lambda: cross_entropy.sum_cross_entropy(logits, labels, weight, 255, 0.0, True),
        logits.nbytes + labels.nbytes + 4 * logits.numel(),
    )
    yield "depthwise_gelu", lambda: depthwise_gelu.depthwise_gelu(tokens, kernel, bias, side, side), 2 * tokens.nbytes
    yield (
        "depthwise_gelu_backward",
        lambda: depthwise_gelu.depthwise_gelu_backward(tokens, tokens, kernel, bias, side, side),
        5 * tokens.nbytes,
    )
    yield "upsample_sum_relu", lambda: decode_head.upsample_sum_relu(maps, factor, factor), lower + maps[0].nbytes
    yield (
        "upsample_gather",
        lambda: decode_head.upsample_gather(maps[0], side >> 1, side >> 1),
        maps[0].nbytes + maps[1].nbytes,
    )


def measure(arguments: argparse.Namespace) -> int:
    """Time everything, and write the file after each row; the status is 1 if something failed or there was no time."""
    device, tiny, began = arguments.device, arguments.tiny, time.perf_counter()
    about, status = identity(device), 0
    bandwidth, matrix_peak = peaks(device, tiny)
    rows = [
        Row("peak", "", "", 1, "copy", note=f"{bandwidth / 1e9:.1f} GB/s", **about),
        Row("peak", "", "", 1, "matrix", note=f"{matrix_peak / 1e12:.2f} Top/s", **about),
    ]
    path = (arguments.results or RESULTS) / "gpu.csv"
    rounds = 1 if tiny else arguments.rounds

    def add(row: Row) -> None:
        rows.append(row)
        if device == "cuda" or arguments.results:
            write_rows(path, rows)
        print(row.task, row.variant, row.size, row.batch, row.candidate, row.milliseconds, row.note, flush=True)

    for name, call, num_bytes in _kernel_calls(torch.float32 if tiny else torch.bfloat16, device, tiny):
        found, memory = stopwatch(call, device, rounds)
        add(Row("kernel", "", "", 1 if tiny else 8, name, found, memory, num_bytes / found * 1000 / bandwidth, **about))
    for task, variant, size, batch in plan_rows(tiny):
        if time.perf_counter() - began > 60 * arguments.minutes:
            print(f"gpu: no time left for {task} {variant} {size} and what follows: --minutes", file=sys.stderr)
            return 1
        num_labels = 5 if tiny else 150
        config = (
            SegFormerConfig(**_TINY, num_labels=num_labels)
            if tiny
            else SegFormerConfig.from_variant(variant, num_labels=num_labels)
        )
        for candidate in candidates_of(task, device):
            where = (task, variant, f"{size[0]}x{size[1]}", batch, candidate)
            share = None
            try:
                found, memory = stopwatch(build_call(task, candidate, config, size, batch, device), device, rounds)
                if task == "forward":
                    work = 2 * batch * sum(stage.num_multiply_adds for stage in model_info(config, *size))
                    share = work / found * 1000 / matrix_peak
                add(Row(*where, found, memory, share_of_matrix_peak=share, **about))
            except (RuntimeError, ValueError) as error:
                status = 1
                add(Row(*where, note=" ".join(str(error).split())[:200], **about))
            torch._dynamo.reset()
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    disable()
    return status


__all__ = ["CANDIDATES", "measure"]
