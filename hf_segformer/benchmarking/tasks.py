"""Benchmark tasks: a forward pass or a training step of SegFormer, here and in Transformers, with equal weights."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from ..configuration_segformer import SegFormerConfig
from ..conversion.to_transformers import to_transformers
from ..dispatch_segformer import explain_fast_paths
from ..modeling_segformer import SegFormerForSemanticSegmentation
from .comparison import Measurement, compare, largest_difference
from .memory import MEBIBYTE
from .timing import Call

EAGER = ("transformers", "hf_segformer")
CANDIDATES = (*EAGER, "transformers compiled", "hf_segformer compiled")
GRADIENT_TOLERANCE = 1e-3  # of the largest value, in float32
_TITLES = ("size", "", "latency", "images/s", "peak memory", "times as fast", "of the memory")


@dataclass(frozen=True)
class Task:
    """One call of a network: a forward pass, or forward with labels and backward.

    Attributes:
        config: configuration of the network. LayerNorm's epsilon is 1e-5 in both, as always in Transformers.
        batch_size: number of images.
        height: image height in pixels.
        width: image width in pixels.
        is_training: measure a training step.
        has_dropout: use dropout and drop path; without them results can be compared.
        device: PyTorch device.
    """

    config: SegFormerConfig
    batch_size: int
    height: int
    width: int
    is_training: bool = False
    has_dropout: bool = True
    device: str = "cpu"

    def inputs(self) -> dict[str, Tensor]:
        """Return random images, and labels for training; the same ones every time."""
        generator = torch.Generator().manual_seed(1)
        size = self.batch_size, self.config.num_channels, self.height, self.width
        inputs = {"pixel_values": torch.randn(size, generator=generator)}
        if self.is_training:
            num_classes = max(self.config.num_labels, 2)
            labels = torch.randint(num_classes, (size[0], *size[2:]), generator=generator)
            labels[:, : self.height // 16] = self.config.semantic_loss_ignore_index
            inputs["labels"] = labels
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def build_hf_segformer(self) -> SegFormerForSemanticSegmentation:
        """Return this package's model with random weights; the same ones every time."""
        config = deepcopy(self.config)
        config.layer_norm_eps = 1e-5
        if not self.has_dropout:
            config.drop_path_rate = config.classifier_dropout_prob = config.hidden_dropout_prob = 0.0
            config.attention_probs_dropout_prob = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = SegFormerForSemanticSegmentation(config)
            norm = model.decode_head.batch_norm  # initial statistics would hide a missing norm
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2.0)
        return model.train(self.is_training).to(self.device)

    def build_transformers(self) -> nn.Module:
        """Return Transformers' model with the same weights."""
        transformers.logging.disable_progress_bar()
        with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            to_transformers(self.build_hf_segformer().eval().cpu(), folder)
            model = transformers.SegformerForSemanticSegmentation.from_pretrained(folder)
        return model.train(self.is_training).to(self.device)


def run_model(model: nn.Module, task: Task, inputs: Mapping[str, Tensor] | None = None) -> Call:
    """Return the call that is measured; it returns logits, or the loss after a backward pass."""
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
    """Return the call of one of `CANDIDATES`."""
    model = task.build_transformers() if name.startswith("transformers") else task.build_hf_segformer()
    call = run_model(model, task)
    if not name.endswith("compiled"):
        return call
    if isinstance(model, SegFormerForSemanticSegmentation):
        return run_model(torch.compile(model, fullgraph=True), task)
    call()  # Transformers' own model compiles only after it has run once
    return run_model(torch.compile(model), task)


def gradient_difference(task: Task) -> float:
    """Return the difference of loss or gradient without dropout, whichever is larger; the gradient is one vector."""
    task = replace(task, is_training=True, has_dropout=False)
    ours, stock = task.build_hf_segformer(), task.build_transformers()
    loss, expected = run_model(ours, task)(), run_model(stock, task)()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    expected_gradients = _gradients_by_file_name(stock)
    error = sum(
        (gradients[name].cpu().double() - expected_gradients[name].double()).square().sum() for name in gradients
    )
    norm = sum(expected_gradients[name].double().square().sum() for name in gradients)
    return max(largest_difference(loss, expected), math.sqrt(error / norm))


def _gradients_by_file_name(model: nn.Module) -> dict[str, Tensor]:
    """Return gradients by the names of files, since Transformers renames on disk only; the weights are overwritten."""
    for parameter in model.parameters():
        parameter.data = parameter.grad
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def measure(task: Task, names: Sequence[str] = EAGER, **settings: Any) -> list[Measurement]:
    """Measure candidates at a task; `settings` are those of `compare` and `interleaved_timing`.

    Raises:
        DisagreementError: if results differ.
    """
    builds = {name: partial(build_call, name, task) for name in names}
    if task.is_training:
        settings |= {"differences": {"hf_segformer": gradient_difference(task)}, "tolerance": GRADIENT_TOLERANCE}
    return compare(builds, **{"memory_of": names, "device": task.device, **settings})


def format_fast_paths(task: Task) -> str:
    """Run a task's model and return a table of the implementation that ran for each operation, or why none did."""
    with torch.set_grad_enabled(task.is_training):
        paths = explain_fast_paths(task.build_hf_segformer(), task.inputs()["pixel_values"])
    kind, width = "training step" if task.is_training else "inference", max(map(len, paths))
    title = f"{task.height}x{task.width}, batch of {task.batch_size}, {task.device}, {kind}"
    return "\n".join([title, *(f"{op:{width}}  {path}" for op, path in paths.items())])


def check_machine(device: str, num_threads: int | None) -> None:
    """Set the number of threads; raise ValueError if the device does not exist."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device is {device!r}, which PyTorch cannot use: {str(error).splitlines()[0]}") from None
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def format_measurements(results: Sequence[tuple[Task, Sequence[Measurement]]]) -> str:
    """Return a table of tasks that differ in size; ratios are relative to the first candidate of a task."""
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
        table.append("Other processes used the machine meanwhile; the figures are not reliable.")
    elif any(timing.is_quiet is None for timing in timings):
        table.append("This system does not say whether other processes used the machine meanwhile.")
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


__all__ = [
    "CANDIDATES",
    "EAGER",
    "GRADIENT_TOLERANCE",
    "Task",
    "build_call",
    "check_machine",
    "format_fast_paths",
    "format_measurements",
    "gradient_difference",
    "measure",
    "run_model",
]
