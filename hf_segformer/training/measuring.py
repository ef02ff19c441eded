"""Measurements for a plan: a few steps of the real network on the real data, and a range test of the learning rate."""

import json
import os
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, count, islice, pairwise, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.torch_datasets import EpochSampler, collate
from ..inference.segmenter import Segmenter
from .building import build_model, first_samples, fresh_config, train_samples
from .data import Data, load_data
from .distillation import Teacher, load_teacher
from .losses import SegmentationLoss
from .optimization import freeze, parameter_groups
from .plan import Cost, Machine, Tables
from .recipe import Recipe, parse_recipe
from .recipe_writer import format_recipe

_WARM_UP, _MOST_STEPS, _SECONDS = 2, 8, 3.0  # of timed steps
_NUM_READ = 8
_NOT_TRIED = ("class_balance", "final_crop_size", "final_share")
_MIXING = ("cutmix", "classmix")  # `draft.step_seconds` accounts for what it reads
_SAVED_TO_PEAK = 2.0  # peak memory of a step by what it saves: 1.6 to 2.3, B0 with crops of 256 and 512
_RATES = (1e-6, 1e-1)  # of the range test
_RANGE_STEPS, _SMOOTHING, _DIVERGED = 100, 0.9, 4.0


class Probe:
    """Costs of trial recipes on this machine, each measured once.

    Args:
        device: to train on.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._costs: dict[str, Cost] = {}
        self._data: dict[str, Data] = {}
        self._seconds: dict[str, float] = {}

    def measure(self, tables: Tables) -> Cost:
        """Time reading, training steps and predictions with a trial's tables.

        Raises:
            ValueError: if the recipe or the data are wrong.
            OSError: if files are missing or cannot be read.
        """
        key = _key(tables)
        if key not in self._costs:
            self._costs[key] = self._measure(_as_recipe(tables, (*_NOT_TRIED, *_MIXING)))
        return self._costs[key]

    def find_learning_rate(self, tables: Tables) -> float:
        """Train a fresh network with exponentially rising rates, and return the one where the loss falls most steeply.

        100 steps from 1e-6 to 1e-1 (Smith 2017, arXiv:1506.01186), or until the smoothed loss is four times its least.
        """
        recipe = _as_recipe(tables, _NOT_TRIED)
        data = self._load(recipe)
        model, loss, teacher = self._build(recipe, data)
        groups = parameter_groups(model, 1.0, recipe.trainer.get("weight_decay", 0.01), recipe.optimizer)
        optimizer = torch.optim.AdamW(groups)
        shares = [group["lr"] for group in optimizer.param_groups]
        rates, losses = learning_rates(_RANGE_STEPS), []
        for rate, batch in zip(rates, self._batches(recipe, data), strict=False):
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = rate * share
            losses.append(self._step(model, loss, teacher, optimizer, batch, recipe))
            if has_diverged(losses):
                break
        return float(f"{steepest_descent(rates[: len(losses)], losses):.2g}")

    def _measure(self, recipe: Recipe) -> Cost:
        data = self._load(recipe)
        reading = self._cached("reading", recipe, lambda: _time_reading(data, recipe))
        model, loss, teacher = self._build(recipe, data)
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-5, 0.01, recipe.optimizer))
        size = recipe.trainer["per_device_train_batch_size"]
        samples = first_samples(data, recipe, min(size, len(data.train)))
        batch = collate([samples[index % len(samples)] for index in range(size)])
        needed = self._bytes_of_step(model, loss, teacher, optimizer, batch, recipe)
        for _ in range(_WARM_UP - 1):
            self._step(model, loss, teacher, optimizer, batch, recipe)
        seconds: list[float] = []
        while len(seconds) < _MOST_STEPS and sum(seconds) < _SECONDS:
            began = time.perf_counter()
            self._step(model, loss, teacher, optimizer, batch, recipe)
            seconds.append(time.perf_counter() - began)
        predicting = self._cached("predicting", recipe, lambda: _time_prediction(model, data, recipe))
        return Cost(statistics.median(seconds), reading, predicting, needed // size)

    def _load(self, recipe: Recipe) -> Data:
        key = json.dumps([recipe.tables["data"], recipe.tables.get("split"), recipe.model.get("num_channels")])
        if key not in self._data:
            self._data[key] = load_data(recipe.data, fresh_config(recipe.model).num_channels, recipe.split)
        return self._data[key]

    def _cached(self, kind: str, recipe: Recipe, measure: Any) -> float:
        model = recipe.model if kind == "predicting" else {}
        names = ("data", "augmentation" if kind == "reading" else "evaluation")
        key = json.dumps([kind, model, *(recipe.tables[name] for name in names)])
        if key not in self._seconds:
            self._seconds[key] = measure()
        return self._seconds[key]

    def _build(self, recipe: Recipe, data: Data) -> tuple[nn.Module, SegmentationLoss, Teacher | None]:
        table = dict(recipe.tables["loss"])
        if isinstance(table.get("class_weights"), str):  # numbers come from all masks, at the start of the run
            del table["class_weights"]
        model = build_model(recipe.model, data.names)
        freeze(model, recipe.optimizer)
        teacher = load_teacher(recipe.distill, data.names, data.processor) if recipe.distill.teacher else None
        return model.to(self.device).train(), SegmentationLoss(**table), teacher and teacher.to(self.device)

    def _step(
        self,
        model: nn.Module,
        loss: SegmentationLoss,
        teacher: Teacher | None,
        optimizer: Any,
        batch: dict[str, Tensor],
        recipe: Recipe,
    ) -> float:
        """Train one step as the Trainer does, and return its loss."""
        model.loss_function = loss
        inputs = {name: values.to(self.device) for name, values in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bool(recipe.trainer.get("bf16"))):
            outputs = model(**inputs)
            value = outputs.loss
            if teacher is not None:
                ignore_index = model.config.semantic_loss_ignore_index
                value = value + teacher.loss(outputs.logits, inputs["pixel_values"], inputs["labels"], ignore_index)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.trainer.get("max_grad_norm") or 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    def _bytes_of_step(self, model: nn.Module, *arguments: Any) -> int:
        """Memory of a step: measured on a GPU; elsewhere estimated from what is saved for the backward pass."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._step(model, *arguments)
            return torch.cuda.max_memory_allocated(self.device)
        held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self._step(model, *arguments)
        return int(_SAVED_TO_PEAK * sum(saved.values()))

    def _batches(self, recipe: Recipe, data: Data) -> Iterator[dict[str, Tensor]]:
        """Training batches without an end."""
        samples, size = train_samples(data, recipe), recipe.trainer["per_device_train_batch_size"]
        epochs = count()
        sampler = EpochSampler(len(samples), recipe.data.seed, lambda: next(epochs))
        pairs = chain.from_iterable(repeat(sampler))
        while True:
            yield collate([samples[pair] for pair in islice(pairs, size)])


def learning_rates(number: int) -> list[float]:
    """Rates of a range test, evenly spread by their logarithm."""
    low, high = _RATES
    return [low * (high / low) ** (step / (number - 1)) for step in range(number)]


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential mean of a loss, corrected for its start (Kingma and Ba 2015, section 3)."""
    mean, values = 0.0, []
    for step, loss in enumerate(losses, 1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        values.append(mean / (1 - _SMOOTHING**step))
    return values


def has_diverged(losses: Sequence[float]) -> bool:
    """Return True if the smoothed loss is not finite, or four times its least."""
    values = smoothed(losses)
    return not values[-1] <= _DIVERGED * min(values)


def steepest_descent(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the rate at which the smoothed loss falls most from one step to the next.

    Examples:
        >>> from hf_segformer.training.measuring import steepest_descent
        >>> steepest_descent([1e-4, 1e-3, 1e-2, 1e-1], [2.0, 2.0, 1.0, 1.5])
        0.01
    """
    values = smoothed(losses)
    drops = [after - before for before, after in pairwise(values)]
    return rates[1 + drops.index(min(drops))]


def this_machine(use_cpu: bool = False, find_learning_rate: bool = False) -> Machine:
    """Describe this machine, with a `Probe` of it.

    Args:
        use_cpu: train on the CPU in any case.
        find_learning_rate: run a range test for the learning rate.
    """
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    device = accelerator or torch.device("cpu")
    probe = Probe(device)
    return Machine(
        device.type,
        _free_memory(device),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        _has_bfloat16(device),
        probe.measure,
        probe.find_learning_rate if find_learning_rate else None,
        int(os.environ.get("WORLD_SIZE", 1)),
    )


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    information = Path("/proc/cpuinfo")
    if device.type != "cpu" or not information.is_file():
        return False
    return bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", information.read_text(errors="replace")))


def _free_memory(device: torch.device) -> int:
    """Free bytes of the accelerator, or of the machine within its control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdecimal():
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


def _as_recipe(tables: Tables, dropped: Sequence[str]) -> Recipe:
    """Recipe of a trial, without early stopping, for which it has no evaluations.

    A plan's values are the user's own or decided by its rules, so that code which they name is trusted.

    Args:
        tables: of the plan so far.
        dropped: options of `[augmentation]` that are left out.
    """
    augmentation = {name: value for name, value in tables.get("augmentation", {}).items() if name not in dropped}
    filled = {
        **tables,
        "augmentation": augmentation,
        "early_stopping": {},
        "trainer": {"output_dir": "outputs/trial", **tables.get("trainer", {})},
    }
    recipe = parse_recipe(format_recipe(filled), "the plan", "trial")
    return replace(recipe, trusted_code=augmentation.get("custom", ""))


def _key(tables: Tables) -> str:
    """Values that a cost depends on: decisions that come later in a plan change nothing."""
    trainer, model, augmentation = (tables.get(name, {}) for name in ("trainer", "model", "augmentation"))
    network = {name: value for name, value in model.items() if not name.endswith(("_rate", "_prob"))}
    size = [augmentation.get(name) for name in ("crop_size", "base_size")]
    step = [trainer.get("per_device_train_batch_size"), bool(trainer.get("bf16"))]
    others = [tables.get(name) for name in ("loss", "distill", "evaluation")]
    return json.dumps([tables.get("data"), network, size, *others, step])


def _time_reading(data: Data, recipe: Recipe) -> float:
    """Seconds in which an image and its mask are read and augmented."""
    samples = train_samples(data, recipe)
    pairs = list(islice(EpochSampler(len(samples), recipe.data.seed, lambda: 0), _NUM_READ + 1))
    samples[pairs[0]]
    began = time.perf_counter()
    for pair in pairs[1:] or pairs:
        samples[pair]
    return (time.perf_counter() - began) / len(pairs[1:] or pairs)


def _time_prediction(model: nn.Module, data: Data, recipe: Recipe) -> float:
    """Seconds in which an evaluation image is read and predicted; the first one warms up."""
    segmenter = Segmenter(model, data.processor, recipe.evaluation)
    seconds = []
    for index in range(3):
        began = time.perf_counter()
        row = data.evaluation[index % len(data.evaluation)]
        segmenter.predict(segmenter.preprocess(row["image"]), [row["label"].shape])[0].cpu()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


__all__ = ["Probe", "has_diverged", "learning_rates", "smoothed", "steepest_descent", "this_machine"]
