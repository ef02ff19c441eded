"""A plan in the making, and the figures that its rules need: batch, steps and seconds, from measured costs."""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from ..data.description import DataDescription
from .plan import Budget, Cost, Decision, Machine, Pretrained, Tables, format_duration

_MEMORY_SHARE = 0.8  # of the memory that is free
_EVALUATION_SHARE = 0.1  # of the time
_MOST_EVALUATIONS = 10
_SPARE = 0.05  # of the time, for what was not measured
_START_SECONDS = 5.0  # of building, saving and loading the model
_SHORT_PASSES = 20  # over the images, at most; shapes_b0 makes 20, camvid_b0 196


class Draft:
    """A plan in the making: what is known so far.

    Args:
        description: of the data.
        budget: length of the run.
        machine: that it is planned for.
        given: the user's values.
        pretrained: weights to start from.
        output_dir: folder of the run.
    """

    def __init__(
        self,
        description: DataDescription,
        budget: Budget,
        machine: Machine,
        given: Tables,
        pretrained: Pretrained | None = None,
        output_dir: str = "",
    ):
        self.description, self.budget, self.machine = description, budget, machine
        self.given, self.pretrained, self.output_dir = given, pretrained, output_dir
        self.decisions: list[Decision] = []
        self._tables = deepcopy(given)

    def __getitem__(self, key: str) -> Any:
        return self.get(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value that was given or decided."""
        table, _, name = key.partition(".")
        return self._tables[table].get(name, default)

    def is_given(self, key: str) -> bool:
        """Return True if the user chose the value."""
        table, _, name = key.partition(".")
        return name in self.given[table]

    def decide(self, key: str, value: Any, reason: str) -> None:
        """Add a decision."""
        table, _, name = key.partition(".")
        self._tables[table][name] = value
        self.decisions.append(Decision(key, value, reason))

    def cost(self, batch_size: int, changes: Mapping[str, Any] | None = None) -> Cost:
        """Measure steps with the values so far.

        Args:
            batch_size: images in a step of one process.
            changes: other values to try, by key.
        """
        defaults = {} if self["model.checkpoint"] else {"model.variant": self.get("model.variant", "b0")}
        defaults["augmentation.crop_size"] = self.get("augmentation.crop_size", 512)
        changed = defaults | dict(changes or {}) | {"trainer.per_device_train_batch_size": batch_size}
        trial = deepcopy(self._tables)
        for key, value in changed.items():
            table, _, name = key.partition(".")
            trial[table][name] = value
        return self.machine.measure(trial)

    def tables(self) -> Tables:
        """Return a copy of all values so far."""
        return deepcopy(self._tables)

    @property
    def is_pretrained(self) -> bool:
        """Return True if training starts from a checkpoint."""
        return bool(self["model.checkpoint"])

    @property
    def mixed_share(self) -> float:
        """Share of the samples that another one is read for."""
        return self.get("augmentation.cutmix", 0.0) + self.get("augmentation.classmix", 0.0)

    @property
    def holds_out_share(self) -> float:
        """Share of the training images that is held out."""
        return self.get("data.eval_share", 0.0)

    @property
    def num_train(self) -> int:
        """Number of training images."""
        number = self.description.num_train
        left = number - max(1, round(number * self.holds_out_share)) if self._is_undivided else number
        return self["data.num_train"] or left

    @property
    def num_eval(self) -> int:
        """Number of evaluation images."""
        number = self.description.num_eval
        if self._is_undivided:
            number = max(1, round(self.description.num_train * self.holds_out_share))
        return self["data.num_eval"] or number or max(1, round(0.1 * self.description.num_train))

    @property
    def _is_undivided(self) -> bool:
        """Return True if the share is still among the images that the description counts for training."""
        return bool(self.holds_out_share) and not self.description.num_eval

    @property
    def batch_size(self) -> int:
        """Images in an optimizer step of all processes."""
        per_process = self["trainer.per_device_train_batch_size"] * self.get("trainer.gradient_accumulation_steps", 1)
        return per_process * self.machine.processes

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps."""
        if (steps := self.get("trainer.max_steps", -1)) > 0:
            return steps
        return max(1, math.ceil(self.get("trainer.num_train_epochs", 3) * self.num_train / self.batch_size))

    @property
    def num_passes(self) -> float:
        """Passes over the training images."""
        return self.num_steps * self.batch_size / self.num_train

    @property
    def is_short(self) -> bool:
        """Return True for training from scratch that sees each image rarely."""
        most = math.ceil(_SHORT_PASSES * self.num_train / self.batch_size)  # the last step of a pass may be a small one
        return not self.is_pretrained and self.num_steps <= most


def estimated_seconds(draft: Draft) -> float:
    """Estimate the time of training, checks and evaluations."""
    number = num_evaluations(draft) if draft["trainer.eval_strategy"] != "no" else 0
    training = draft.num_steps * step_seconds(draft)
    return training + fixed_seconds(draft) + number * evaluation_seconds(draft)


def target_batch(draft: Draft) -> int:
    """Images in an optimizer step: 8 (Cityscapes, camvid_b0), on an accelerator 16 (ADE20K), or all."""
    return max(1, min(8 if draft.machine.is_cpu else 16, draft.num_train))


def image_bytes(draft: Draft, changes: Mapping[str, Any] | None = None) -> int:
    """Bytes that one more image in a batch takes, measured."""
    return draft.cost(2, {**(changes or {}), "trainer.bf16": False}).image_bytes


def largest_image_bytes(draft: Draft, changes: Mapping[str, Any] | None = None) -> int:
    """Bytes that one more image takes with the largest crops of the run."""
    side = max(draft.get("augmentation.crop_size", 512), draft.get("augmentation.final_crop_size", 0))
    return image_bytes(draft, {**(changes or {}), "augmentation.crop_size": side})


def memory(draft: Draft) -> float:
    """Bytes for a training step of one process."""
    shared = draft.machine.processes if draft.machine.is_cpu else 1
    return _MEMORY_SHARE * draft.machine.memory / shared


def largest_batch(draft: Draft, changes: Mapping[str, Any] | None = None) -> int:
    """Images in a step of one process: the share of the target, halved until it fits into memory."""
    batch = max(1, target_batch(draft) // draft.machine.processes)
    needed = largest_image_bytes(draft, changes)
    while batch > 1 and batch * needed > memory(draft):
        batch = (batch + 1) // 2
    return batch


def planned_cost(draft: Draft) -> Cost:
    """Cost of a step of one process with the values so far."""
    return draft.cost(draft.get("trainer.per_device_train_batch_size") or largest_batch(draft))


def step_seconds(draft: Draft) -> float:
    """Seconds of an optimizer step, reading included, in the mean over the run."""
    return _mean_over_crops(draft, lambda side: _seconds_with_crops(draft, side))


def _mean_over_crops(draft: Draft, seconds: Callable[[int], float]) -> float:
    """Mean over a run with larger crops at its end, by the share that is planned until the passes are known."""
    mean, final = seconds(draft.get("augmentation.crop_size", 512)), draft["augmentation.final_crop_size"]
    if not final:
        return mean
    share = draft.get("augmentation.final_share", 0.2)
    if draft["trainer.max_steps"] and draft["trainer.per_device_train_batch_size"]:
        passes = math.ceil(draft.num_passes)
        share = math.ceil(round(passes * share, 6)) / passes
    return mean + share * (seconds(final) - mean)


def _seconds_with_crops(draft: Draft, side: int) -> float:
    """Seconds of an optimizer step with crops of one size.

    On a CPU workers take processor time from the network; an accelerator waits for the slower of the two.
    """
    batch = draft["trainer.per_device_train_batch_size"]
    cost = draft.cost(batch, {"augmentation.crop_size": side})
    workers = draft.get("trainer.dataloader_num_workers", 0)
    reading = cost.reading_seconds * batch * (1 + draft.mixed_share)
    if not workers:
        seconds = cost.step_seconds + reading
    elif draft.machine.is_cpu:
        seconds = max(cost.step_seconds + reading / draft.machine.processors, reading / workers)
    else:
        seconds = max(cost.step_seconds, reading / workers)
    return seconds * draft.get("trainer.gradient_accumulation_steps", 1)


def evaluation_seconds(draft: Draft) -> float:
    """Seconds of an evaluation."""
    return draft.num_eval * planned_cost(draft).evaluation_seconds / draft.machine.processes


def fixed_seconds(draft: Draft) -> float:
    """Seconds of what is done once: the check of all images, the evaluation at the end, figures, and the model."""
    cost = planned_cost(draft)
    check = cost.reading_seconds * (draft.num_train + draft.num_eval)
    return _START_SECONDS + check + evaluation_seconds(draft) + 20 * cost.evaluation_seconds


def num_evaluations(draft: Draft) -> int:
    """Evaluations before the one at the end."""
    if draft.is_given("trainer.eval_steps"):
        return draft.num_steps // max(1, int(draft["trainer.eval_steps"]))
    has_time = draft.budget.seconds is not None and not draft.is_given("trainer.max_steps")
    total = draft.budget.seconds if has_time else draft.num_steps * step_seconds(draft)
    most = min(_MOST_EVALUATIONS, int(_EVALUATION_SHARE * (total or 0) / max(evaluation_seconds(draft), 1e-9)))
    known = draft.get("trainer.max_steps", -1)
    return min(most, known - 1) if known > 0 else most


def steps_in_time(draft: Draft) -> int:
    """Optimizer steps that fit into the time beside checks and evaluations.

    Raises:
        ValueError: if there is no time for one.
    """
    seconds, step = draft.budget.seconds or 0.0, step_seconds(draft)
    needed = fixed_seconds(draft) + num_evaluations(draft) * evaluation_seconds(draft)
    steps = int(((1 - _SPARE) * seconds - needed) / step)
    if steps < 1:
        least = math.ceil((needed + step) / (1 - _SPARE))
        raise ValueError(
            f"--time is {format_duration(seconds)}; expected at least {format_duration(least)}: "
            f"{format_duration(needed)} for checks and evaluation, and {format_duration(step)} for a step"
        )
    return steps


def passes_in_time(draft: Draft, name: str) -> float:
    """Passes over the images that a variant makes within the budget."""
    if draft.budget.steps is not None:
        return draft.budget.steps * target_batch(draft) / draft.num_train
    if draft.budget.seconds is None:
        return math.inf
    changes = {"model.variant": name}
    batch = largest_batch(draft, changes)
    step = _mean_over_crops(
        draft, lambda side: draft.cost(batch, {**changes, "augmentation.crop_size": side}).step_seconds
    )
    images = draft.machine.processes * batch / step
    return (1 - _SPARE - _EVALUATION_SHARE) * draft.budget.seconds * images / draft.num_train


__all__ = [
    "Draft",
    "estimated_seconds",
    "evaluation_seconds",
    "image_bytes",
    "largest_batch",
    "largest_image_bytes",
    "memory",
    "num_evaluations",
    "passes_in_time",
    "planned_cost",
    "step_seconds",
    "steps_in_time",
    "target_batch",
]
