"""Measures time and memory of SegFormer here and in Transformers, with equal weights, side by side.

Two things make a measurement worth little: a machine that drifts while it lasts, and results that are not the same. So
the candidates take turns in one process, rounds that other processes disturbed are measured again, memory is that of a
fresh process for each candidate, and whoever computes something else is refused a time.
"""

import ctypes
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from ..configuration_segformer import SegFormerConfig
from ..conversion.to_transformers import to_transformers
from ..modeling_segformer import SegFormerForSemanticSegmentation

_TITLES = ("size", "", "latency", "images/s", "peak memory", "times as fast", "of the memory")
MEBIBYTE = 2**20
QUIET = 0.05  # share of the machine that other processes may use
_TICK = 0.03  # seconds by which the kernel's count of busy time may be off
_SAMPLE = 0.1  # seconds: shorter calls are repeated, and their mean is the sample
_MEMORY_TIME = 6.0  # seconds after which the peak is not looked at again
_RETRY = 0.5  # seconds before a disturbed round is measured again: who disturbed it may have gone
_PAUSE = 0.02  # seconds until the threads of the one before have gone to sleep
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3  # of float32, through forty blocks, and backwards

Call = Callable[[], Any]


class DisagreementError(ValueError):
    """Two candidates do not compute the same, so that their times can not be compared."""


# --- Time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """The times of one candidate.

    Attributes:
        seconds: a sample a round.
        num_disturbed: rounds that were thrown away because other processes used the machine.
        is_quiet: whether those that are left were undisturbed; None where the system does not tell.
    """

    seconds: tuple[float, ...]
    num_disturbed: int = 0
    is_quiet: bool | None = None

    @property
    def median(self) -> float:
        """In seconds."""
        return statistics.median(self.seconds)


class OtherLoad:
    """What other processes use of the machine, from one moment to the next (Linux)."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """From now on."""
        self.began, self.own, self.busy = time.perf_counter(), time.process_time(), _busy_seconds()

    def share(self) -> float | None:
        """Share of all cores' time since `start`, 0 to 1; None where the system does not tell."""
        busy = _busy_seconds()
        if busy is None or self.busy is None:
            return None
        others = busy - self.busy - (time.process_time() - self.own) - _TICK
        return max(others, 0.0) / ((time.perf_counter() - self.began) * (os.cpu_count() or 1))


def _busy_seconds() -> float | None:
    """Of all cores since the machine was started; what a hypervisor took away counts, too."""
    statistics_file = Path("/proc/stat")
    if not statistics_file.exists():
        return None
    user, nice, system, _idle, _waiting, *others = map(int, statistics_file.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def interleaved_timing(
    calls: Mapping[str, Call],
    *,
    rounds: int = 7,
    budget: float = 20.0,
    allowed: float = QUIET,
    clock: Callable[[], float] = time.perf_counter,
    load: Any = None,
) -> dict[str, Timing]:
    """Time calls in turn, A B C A B C, so that whatever the machine does meanwhile falls on all of them.

    A round during which others used more than `allowed` of the machine is thrown away and measured again, until the
    budget is spent. If fewer than half of the rounds were quiet by then, all count, and the timing says so.

    Args:
        calls: by name; each runs once beforehand.
        rounds: samples wanted of each.
        budget: seconds after which disturbed rounds are not measured again.
        allowed: share of the machine that others may use.
        clock: gives seconds.
        load: has `start()` and `share()`, as `OtherLoad`.

    Example:
        >>> from hf_segformer.benchmarking.comparison import interleaved_timing
        >>> calls = {"short": lambda: sum(range(100)), "long": lambda: sum(range(100000))}
        >>> timings = interleaved_timing(calls, rounds=3)
        >>> timings["short"].median < timings["long"].median
        True
    """
    load = OtherLoad() if load is None else load
    repeats = {name: _repeats(call, clock) for name, call in calls.items()}
    quiet: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    end, is_known = clock() + budget, True
    while len(quiet) < rounds and (len(quiet) + len(disturbed) < rounds or clock() < end):
        load.start()
        samples = {name: _sample(call, repeats[name], clock) for name, call in calls.items()}
        share = load.share()
        is_known = share is not None
        if share is None or share <= allowed:
            quiet.append(samples)
        else:
            disturbed.append(samples)
            time.sleep(_RETRY)
    is_quiet = len(quiet) >= math.ceil(rounds / 2)
    counted = quiet if is_quiet else quiet + disturbed
    return {
        name: Timing(
            tuple(samples[name] for samples in counted),
            len(disturbed) if is_quiet else 0,
            is_quiet if is_known else None,
        )
        for name in calls
    }


def _repeats(call: Call, clock: Callable[[], float]) -> int:
    """Calls that fill a sample, found by one that warms up; a short one is looked at twice, as its first is slow."""
    for _ in range(2):
        began = clock()
        call()
        seconds = clock() - began
        if seconds >= _SAMPLE:
            return 1
    return math.ceil(min(_SAMPLE / max(seconds, 1e-6), 1000))


def _sample(call: Call, repeats: int, clock: Callable[[], float]) -> float:
    time.sleep(_PAUSE)
    began = clock()
    for _ in range(repeats):
        call()
    return (clock() - began) / repeats


# --- Memory -----------------------------------------------------------------------------------------------------------


def peak_memory(build: Callable[[], Call], device: str = "cpu") -> int | None:
    """Bytes by which a fresh process grows while it makes a call: what inputs and weights need is not counted.

    The call runs once beforehand, so that what happens once (threads, kernels, lazy imports) does not count. Then all
    that the allocator keeps is given back, and the peak is counted from there; the median of three such calls, since
    the system's count is a rough one, or of fewer where they are long. On a GPU it is PyTorch's own count.

    Args:
        build: makes the call in that process; a function that can be pickled.
        device: of PyTorch.

    Returns:
        None where the system does not tell: memory of a CPU is known on Linux only.

    Raises:
        ValueError: if the process is killed, as happens where memory does not suffice.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_growth, build, torch.get_num_threads(), device).result()
        except BrokenProcessPool:
            raise ValueError("the process that measures memory was killed: is there enough of it?") from None


def _growth(build: Callable[[], Call], num_threads: int, device: str) -> int | None:
    torch.set_num_threads(num_threads)
    call = build()
    call()
    is_cuda, began = torch.device(device).type == "cuda", time.perf_counter()
    growths: list[int] = []
    while len(growths) < 3 and (not growths or time.perf_counter() - began < _MEMORY_TIME):
        gc.collect()
        try:
            growths.append(_growth_cuda(call) if is_cuda else _growth_linux(call))
        except (OSError, AttributeError):
            return None
    return round(statistics.median(growths))


def _growth_cuda(call: Call) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def _growth_linux(call: Call) -> int:
    """Raises OSError or AttributeError on other systems."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A field of the process's own status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# --- Agreement --------------------------------------------------------------------------------------------------------


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest value expected; infinite for other shapes, or where anything is not finite."""
    if found.shape != expected.shape:
        return math.inf
    difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    return difference.item() if difference.isfinite() else math.inf


def require_agreement(differences: Mapping[str, float], tolerance: float) -> float:
    """The largest of the candidates' differences.

    Raises:
        DisagreementError: names the candidate that lies farther off than the tolerance.
    """
    name, worst = max(differences.items(), key=lambda item: item[1])
    if not worst <= tolerance:
        raise DisagreementError(
            f"{name} differs by {worst:.1e} of the largest value, but {tolerance:.0e} is allowed: there is no sense in "
            "comparing times"
        )
    return worst


# --- The networks -----------------------------------------------------------------------------------------------------


EAGER = ("transformers", "hf_segformer")
CANDIDATES = (*EAGER, "transformers compiled", "hf_segformer compiled")


@dataclass(frozen=True)
class Task:
    """One call of a network: a forward pass, or forward with labels and backward.

    Attributes:
        config: of the network. Both take LayerNorm's epsilon to be 1e-5, which in Transformers it always is.
        batch_size: pictures.
        height: of them, in pixels.
        width: likewise.
        is_training: whether it is a training step.
        has_dropout: whether dropout and drop path act in it; without, results can be compared.
        device: of PyTorch.
    """

    config: SegFormerConfig
    batch_size: int
    height: int
    width: int
    is_training: bool = False
    has_dropout: bool = True
    device: str = "cpu"

    def inputs(self) -> dict[str, Tensor]:
        """Random pictures, and labels for training: always the same."""
        generator = torch.Generator().manual_seed(1)
        size = self.batch_size, self.config.num_channels, self.height, self.width
        inputs = {"pixel_values": torch.randn(size, generator=generator)}
        if self.is_training:
            num_classes = max(self.config.num_labels, 2)
            labels = torch.randint(num_classes, (size[0], *size[2:]), generator=generator)
            labels[:, : self.height // 16] = self.config.semantic_loss_ignore_index
            inputs["labels"] = labels
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def ours(self) -> SegFormerForSemanticSegmentation:
        """This package's model with random weights: always the same."""
        config = deepcopy(self.config)
        config.layer_norm_eps = 1e-5
        if not self.has_dropout:
            config.drop_path_rate = config.classifier_dropout_prob = config.hidden_dropout_prob = 0.0
            config.attention_probs_dropout_prob = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = SegFormerForSemanticSegmentation(config)
            norm = model.decode_head.batch_norm  # fresh statistics would hide a norm that is left out
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2.0)
        return model.train(self.is_training).to(self.device)

    def theirs(self) -> nn.Module:
        """Transformers' model with the same weights."""
        transformers.logging.disable_progress_bar()
        with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            to_transformers(self.ours().eval().cpu(), folder)
            model = transformers.SegformerForSemanticSegmentation.from_pretrained(folder)
        return model.train(self.is_training).to(self.device)


def run_model(model: nn.Module, task: Task, inputs: Mapping[str, Tensor] | None = None) -> Call:
    """The call that is measured: gives the logits, or in training the loss, with gradients on the parameters."""
    inputs = task.inputs() if inputs is None else inputs
    parameters = list(model.parameters())

    def infer() -> Tensor:
        with torch.inference_mode():
            logits = model(**inputs).logits
        _wait_for(task.device)
        return logits

    def train() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss = model(**inputs).loss
        loss.backward()
        _wait_for(task.device)
        return loss.detach()

    return train if task.is_training else infer


def _wait_for(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def build_call(name: str, task: Task) -> Call:
    """The call of one of `CANDIDATES`."""
    model = task.theirs() if name.startswith("transformers") else task.ours()
    call = run_model(model, task)
    if not name.endswith("compiled"):
        return call
    if isinstance(model, SegFormerForSemanticSegmentation):
        return run_model(torch.compile(model, fullgraph=True), task)
    call()  # Transformers' own model compiles only after it has run once
    return run_model(torch.compile(model), task)


def gradient_difference(task: Task) -> float:
    """How far loss and gradient are apart without dropout: the larger of both, the gradient taken as one vector."""
    task = replace(task, is_training=True, has_dropout=False)
    ours, theirs = task.ours(), task.theirs()
    loss, expected = run_model(ours, task)(), run_model(theirs, task)()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    stock = _gradients_by_file_name(theirs)
    error = sum((gradients[name].cpu().double() - stock[name].double()).square().sum() for name in gradients)
    norm = sum(stock[name].double().square().sum() for name in gradients)
    return max(largest_difference(loss, expected), math.sqrt(error / norm))


def _gradients_by_file_name(model: nn.Module) -> dict[str, Tensor]:
    """Transformers renames parameters on disk only: gradients are saved in their place, and the model is lost."""
    for parameter in model.parameters():
        parameter.data = parameter.grad
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


# --- segformer bench --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """What one candidate took for one task.

    Attributes:
        name: of the candidate.
        timing: of its calls.
        memory: bytes at the peak; None where the system does not tell, or it was not asked.
        difference: of its result from the first candidate's, whose own is None.
    """

    name: str
    timing: Timing
    memory: int | None = None
    difference: float | None = None


def compare(
    builds: Mapping[str, Callable[[], Call]],
    *,
    tolerance: float = TOLERANCE,
    difference: Callable[[Any, Any], float] = largest_difference,
    differences: Mapping[str, float] | None = None,
    memory_of: Sequence[str] = (),
    device: str = "cpu",
    **turns: Any,
) -> list[Measurement]:
    """Time and memory of candidates, once it is known that they compute the same.

    Args:
        builds: what makes each candidate's call; the first one's result is what the others' must be.
        tolerance: by which they may differ.
        difference: of a result from the first one's.
        differences: by candidate, where the results of the calls can not be compared.
        memory_of: candidates whose memory is measured, each in a process of its own.
        device: of PyTorch.
        **turns: go to `interleaved_timing`.

    Raises:
        DisagreementError: if they do not.
    """
    calls = {name: build() for name, build in builds.items()}
    if differences is None:
        [_, expected], *others = [(name, call()) for name, call in calls.items()]
        differences = {name: difference(found, expected) for name, found in others}
    require_agreement(differences, tolerance)
    timings = interleaved_timing(calls, **turns)
    calls.clear()
    memory = {name: peak_memory(builds[name], device) for name in memory_of}
    return [Measurement(name, timings[name], memory.get(name), differences.get(name)) for name in builds]


def measure(task: Task, names: Sequence[str] = EAGER, **turns: Any) -> list[Measurement]:
    """What `CANDIDATES` take for a task; `turns` go to `interleaved_timing`.

    Raises:
        DisagreementError: if they do not compute the same.
    """
    builds = {name: partial(build_call, name, task) for name in names}
    if task.is_training:
        turns |= {"differences": {"hf_segformer": gradient_difference(task)}, "tolerance": GRADIENT_TOLERANCE}
    return compare(builds, **{"memory_of": names, "device": task.device, **turns})


def check_machine(device: str, num_threads: int | None) -> None:
    """Take so many threads; raise ValueError where there is no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}, but PyTorch has none: {str(error).splitlines()[0]}") from None
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def format_measurements(results: Sequence[tuple[Task, Sequence[Measurement]]]) -> str:
    """A table of the candidates of tasks that differ in size; ratios are to the first one of a task."""
    task = results[0][0]
    title = (
        f"{task.config.num_labels} labels, batch of {task.batch_size}, {task.device}, "
        f"{torch.get_num_threads()} threads, {'training step' if task.is_training else 'inference'}, "
        f"medians of {len(results[0][1][0].timing.seconds)}"
    )
    lines = [_TITLES, *(cells for task, measurements in results for cells in _lines(task, measurements))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    ]
    table.insert(0, title)
    timings = [each.timing for _, measurements in results for each in measurements]
    if any(timing.is_quiet is False for timing in timings):
        table.append("Other processes used the machine meanwhile: read the ratios with care.")
    elif any(timing.is_quiet is None for timing in timings):
        table.append("Whether other processes used the machine meanwhile is not known on this system.")
    return "\n".join(table)


def _lines(task: Task, measurements: Sequence[Measurement]) -> list[tuple[str, ...]]:
    first = measurements[0]
    lines: list[tuple[str, ...]] = []
    for each in measurements:
        lines.append(
            (
                f"{task.height}x{task.width}",
                each.name,
                f"{1000 * each.timing.median:,.1f} ms",
                f"{task.batch_size / each.timing.median:,.2f}",
                "not known" if each.memory is None else f"{each.memory / MEBIBYTE:,.0f} MiB",
                f"{first.timing.median / each.timing.median:.2f}",
                f"{each.memory / first.memory:.2f}" if each.memory and first.memory else "not known",
            )
        )
    return lines
