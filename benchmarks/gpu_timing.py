"""Measurement of one row of `python -m benchmarks.gpu`: a check, a single kernel, or a network.

A candidate is built anew for each row.
"""

import gc
import statistics
import time
from collections.abc import Callable, Set
from functools import cache
from typing import Any

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, set_fast_paths
from hf_segformer.benchmarking.cost import model_info
from hf_segformer.kernels import argmax, cross_entropy, decode_head, depthwise_gelu
from hf_segformer.kernels.switch import disable, enable
from hf_segformer.upsampling_segformer import upsample_argmax

from .gpu import Key, real_sizes
from .gpu_checks import CHECKS, tolerance

_TINY = {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1] * 4,
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}
_CACHE = 1 << 28  # bytes: more than any GPU's cache holds
_SECONDS = 5  # for the samples of a row

Call = Callable[[], Any]


def is_usable(device: str) -> bool:
    """Return True if the device still works; after a fault every call of the process fails."""
    try:
        torch.ones(1, device=device).sum().item()
    except RuntimeError:
        return False
    return True


def measure(key: Key, device: str, tiny: bool, rounds: int, wrong: Set[str]) -> dict[str, Any]:
    """The numbers of a row, or a note that says why there are none.

    Args:
        key: the row.
        device: "cuda", or "cpu" for the interpreter.
        tiny: whether sizes are the smallest.
        rounds: samples at most.
        wrong: kernels that are not to be used.
    """
    try:
        return _TASKS.get(key.task, _measure_network)(key, device, tiny, rounds, wrong)
    except Exception as error:  # of Triton, the compiler or CUDA; what follows shall be measured all the same
        return {"note": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        disable()
        torch._dynamo.reset()
        gc.collect()
        if device == "cuda" and is_usable(device):
            torch.cuda.empty_cache()


def stopwatch(call: Call, device: str, rounds: int) -> tuple[float, float | None]:
    """Median milliseconds of a call, by CUDA events, and the MiB that it takes at the peak.

    Before each sample the GPU's cache is filled with something else; meanwhile the call can be prepared.
    """
    if device == "cpu":
        began = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - began), None
    other = torch.empty(_CACHE, dtype=torch.uint8, device=device)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    while len(times) < 5 or (len(times) < rounds and sum(times) < 1000 * _SECONDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**20


@cache
def peaks(device: str, tiny: bool) -> dict[str, tuple[float, float]]:
    """Milliseconds of a copy and of a bfloat16 matrix product, and the bytes or operations a second that this is."""
    side = 64 if tiny else 8192
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    other = torch.empty_like(matrix)
    copy, _ = stopwatch(lambda: other.copy_(matrix), device, 11)
    product, _ = stopwatch(lambda: torch.mm(matrix, matrix, out=other), device, 11)
    return {"copy": (copy, 2 * matrix.nbytes / copy * 1000), "matrix": (product, 2 * side**3 / product * 1000)}


def _measure_peak(key: Key, device: str, tiny: bool, rounds: int, wrong: Set[str]) -> dict[str, Any]:
    milliseconds, rate = peaks(device, tiny)[key.candidate]
    return {"milliseconds": milliseconds, "note": f"{rate / 1e12:.2f} T{'B' if key.candidate == 'copy' else 'op'}/s"}


def _measure_check(key: Key, device: str, tiny: bool, rounds: int, wrong: Set[str]) -> dict[str, Any]:
    dtype, options = getattr(torch, key.candidate), {} if tiny else real_sizes()[key.variant][int(key.size)]
    found, allowed = CHECKS[key.variant](dtype, device, **options), tolerance(key.variant, dtype)
    return {"is_right": found <= allowed, "note": f"{found:.1e} of {allowed:.0e} at {options}"}


def _measure_kernel(key: Key, device: str, tiny: bool, rounds: int, wrong: Set[str]) -> dict[str, Any]:
    module, build = KERNEL_CALLS[key.candidate]
    if bad := wrong & module:
        return {"note": f"not timed: {', '.join(sorted(bad))} is wrong"}
    call, num_bytes = build(torch.float32 if tiny else torch.bfloat16, device, tiny)
    found, memory = stopwatch(call, device, rounds)
    share = num_bytes / found * 1000 / peaks(device, tiny)["copy"][1]
    return {"milliseconds": found, "mebibytes": memory, "share_of_bandwidth": share}


def _measure_labels(key: Key, device: str, tiny: bool, rounds: int, wrong: Set[str]) -> dict[str, Any]:
    note, size = _switch(key.candidate, device, wrong), _sides(key)
    logits = torch.randn(key.batch, 19, size[0] // 4, size[1] // 4, device=device, dtype=torch.bfloat16)

    def transformers() -> torch.Tensor:  # as its image processors do, whatever they are called
        full = torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return full.argmax(dim=1)

    call = transformers if key.candidate == "transformers" else lambda: upsample_argmax(logits, size)
    found, memory = stopwatch(call, device, rounds)
    return {"milliseconds": found, "mebibytes": memory, "note": note}


def _measure_network(key: Key, device: str, tiny: bool, rounds: int, wrong: Set[str]) -> dict[str, Any]:
    num_labels, size, note = 5 if tiny else 150, _sides(key), _switch(key.candidate, device, wrong)
    if tiny:
        config = SegFormerConfig(**_TINY, num_labels=num_labels)
    else:
        config = SegFormerConfig.from_variant(key.variant, num_labels=num_labels)
    model = build_model(key.candidate, config).to(device, torch.bfloat16).train(key.task == "training")
    call = _build_call(model, key, size, num_labels, device)
    if key.candidate.endswith("graph"):
        call = _capture(call)
    found, memory = stopwatch(call, device, rounds)
    result = {"milliseconds": found, "mebibytes": memory, "note": note}
    if key.candidate.endswith("graph"):
        result["mebibytes"] = None  # of a memory of its own, from before
    if key.task == "forward":
        work = 2 * key.batch * sum(stage.num_multiply_adds for stage in model_info(config, *size))
        result["share_of_matrix_peak"] = work / found * 1000 / peaks(device, tiny)["matrix"][1]
    return result


def build_model(candidate: str, config: SegFormerConfig) -> Any:
    """A network of one of the candidates."""
    torch.manual_seed(0)
    if candidate.startswith("transformers"):
        names = ("hidden_sizes", "depths", "num_attention_heads", "decoder_hidden_size", "num_labels")
        model: Any = SegformerForSemanticSegmentation(
            SegformerConfig(**{name: getattr(config, name) for name in names})
        )
    else:
        model = SegFormerForSemanticSegmentation(config)
    if candidate.endswith("compiled"):
        model.compile()
    return model


def _build_call(model: Any, key: Key, size: tuple[int, int], num_labels: int, device: str) -> Call:
    images = torch.randn(key.batch, 3, *size, device=device, dtype=torch.bfloat16)
    if key.task == "training":
        labels = torch.randint(0, num_labels, (key.batch, *size), device=device)

        def step() -> None:
            model(images, labels=labels).loss.backward()
            model.zero_grad(set_to_none=True)

        return step

    def infer() -> Any:
        with torch.inference_mode():
            return model(images).logits

    return infer


def _capture(call: Call) -> Call:
    """The call as a CUDA graph; it is run on another stream before, as PyTorch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()  # a graph writes its result to the same place each time

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def _switch(candidate: str, device: str, wrong: Set[str]) -> str:
    """Kernels on or off, all but the wrong ones; a note that names these."""
    set_fast_paths(True)
    disable()
    if not candidate.startswith("kernels"):
        return ""
    enable(device, without=wrong)
    return f"without {', '.join(sorted(wrong))}" if wrong else ""


def _sides(key: Key) -> tuple[int, int]:
    height, width = map(int, key.size.split("x"))
    return height, width


def _logits(dtype: torch.dtype, device: str, tiny: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch, num_classes, side = (1, 5, 4) if tiny else (8, 150, 128)
    logits = torch.randn(batch, num_classes, side, side, device=device, dtype=dtype)
    labels = torch.randint(0, num_classes, (batch, 4 * side, 4 * side), device=device)
    return logits.to(memory_format=torch.channels_last), labels


def _call_argmax(dtype: torch.dtype, device: str, tiny: bool) -> tuple[Call, int]:
    logits, labels = _logits(dtype, device, tiny)
    size = labels.shape[1:]
    return lambda: argmax.upsample_argmax(logits, *size, False), logits.nbytes + labels.nbytes


def _call_cross_entropy(dtype: torch.dtype, device: str, tiny: bool) -> tuple[Call, int]:
    logits, labels = _logits(dtype, device, tiny)
    weight = torch.ones(logits.shape[1], device=device)
    num_bytes = logits.nbytes + labels.nbytes + 4 * logits.numel()
    return lambda: cross_entropy.sum_cross_entropy(logits, labels, weight, 255, 0.0, True), num_bytes


def _convolution(dtype: torch.dtype, device: str, tiny: bool) -> tuple[list[torch.Tensor], int]:
    batch, side, channels = (1, 4, 8) if tiny else (8, 128, 128)
    shapes = ((batch, side * side, channels), (channels, 1, 3, 3), (channels,))
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes], side


def _call_convolution(dtype: torch.dtype, device: str, tiny: bool) -> tuple[Call, int]:
    tensors, side = _convolution(dtype, device, tiny)
    return lambda: depthwise_gelu.depthwise_gelu(*tensors, side, side), 2 * tensors[0].nbytes


def _call_convolution_backward(dtype: torch.dtype, device: str, tiny: bool) -> tuple[Call, int]:
    tensors, side = _convolution(dtype, device, tiny)
    change = torch.randn_like(tensors[0])
    call = depthwise_gelu.depthwise_gelu_backward
    return lambda: call(change, *tensors, side, side), 5 * change.nbytes


def _maps(dtype: torch.dtype, device: str, tiny: bool) -> list[torch.Tensor]:
    batch, side, dim = (1, 4, 8) if tiny else (8, 128, 256)
    return [torch.randn(batch, side >> i, side >> i, dim, device=device, dtype=dtype) for i in range(3 if tiny else 4)]


def _call_sum(dtype: torch.dtype, device: str, tiny: bool) -> tuple[Call, int]:
    maps = _maps(dtype, device, tiny)
    return lambda: decode_head.upsample_sum(maps), sum(stage.nbytes for stage in maps) + maps[0].nbytes


def _call_sum_relu(dtype: torch.dtype, device: str, tiny: bool) -> tuple[Call, int]:
    maps = _maps(dtype, device, tiny)
    factor, num_bytes = torch.ones(maps[0].shape[-1], device=device), sum(stage.nbytes for stage in maps)
    return lambda: decode_head.upsample_sum_relu(maps, factor, factor), num_bytes + maps[0].nbytes


def _call_gather(dtype: torch.dtype, device: str, tiny: bool) -> tuple[Call, int]:
    change, lower, *_ = _maps(dtype, device, tiny)
    return lambda: decode_head.upsample_gather(change, *lower.shape[1:3]), change.nbytes + lower.nbytes


# For each: the checks that speak for it, and what builds its call and counts the bytes that it must move at the least;
# the sizes are those of B0 at 8x3x512x512 with 150 classes.
KERNEL_CALLS: dict[str, tuple[set[str], Callable[[torch.dtype, str, bool], tuple[Call, int]]]] = {
    "upsample_argmax": ({"upsample_argmax"}, _call_argmax),
    "upsample_cross_entropy": ({"upsample_cross_entropy"}, _call_cross_entropy),
    "depthwise_gelu": ({"depthwise_gelu"}, _call_convolution),
    "depthwise_gelu_backward": ({"depthwise_gelu"}, _call_convolution_backward),
    "upsample_sum": ({"upsample_sum"}, _call_sum),
    "upsample_sum_relu": ({"upsample_sum_relu"}, _call_sum_relu),
    "upsample_gather": ({"upsample_sum"}, _call_gather),
}
_TASKS = {"peak": _measure_peak, "check": _measure_check, "kernel": _measure_kernel, "labels": _measure_labels}


__all__ = ["KERNEL_CALLS", "build_model", "is_usable", "measure", "peaks", "stopwatch"]
