"""Rules of a plan: every setting of a recipe, chosen from the data, the machine and the time.

`plan_run` goes through `RULES`, the table at the end of this file, from top to bottom. Each rule is a function that
chooses one value; its docstring gives the reason, and where that comes from: a paper, a recipe of this package
(`configuration/`), or a measurement. A value that the user gives takes the place of its rule, and later rules see it.
`measuring.py` times steps of the real network on the real data; nothing here imports PyTorch.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from ..config import VALUE_SETTINGS, AugmentationConfig, SplitConfig
from ..data.description import DataDescription
from .draft import (
    Draft,
    estimated_seconds,
    evaluation_seconds,
    image_bytes,
    largest_batch,
    largest_image_bytes,
    memory,
    num_evaluations,
    passes_in_time,
    planned_cost,
    step_seconds,
    steps_in_time,
    target_batch,
)
from .plan import (
    GIVEN,
    Budget,
    Decision,
    Machine,
    Plan,
    Pretrained,
    default_output_dir,
    format_duration,
)
from .recipe import parse_overrides

_PASSES, _PASSES_PRETRAINED = 200, 100
_LEAST_STEPS, _MOST_STEPS = 1000, 40_000
_LARGE_SIDE = 2048  # from here on an image is a raster, whose details count
_RARE, _VERY_RARE = 0.02, 0.001  # shares of the pixels
_VARIANTS = {"b0": 0, "b1": 2_000, "b2": 10_000}  # least number of images for training from scratch
_VARIANT_PASSES = 50


def plan_run(
    description: DataDescription,
    budget: Budget,
    machine: Machine,
    overrides: Iterable[str] = (),
    pretrained: Pretrained | None = None,
    output_dir: str = "",
) -> Plan:
    """Choose every setting of a run.

    Args:
        description: of the data, by `describe_data`.
        budget: length of the run.
        machine: memory, processors, and a function that measures.
        overrides: `table.key=value` of values that the user chooses.
        pretrained: weights to start from, which `model.checkpoint` among the overrides names too.
        output_dir: folder of the run; by default one below outputs/ by the name of the data.

    Raises:
        ValueError: if an override is wrong, the time is too short for a step, or the data do not fit the weights.

    Examples:
        >>> from hf_segformer.data.description import DataDescription
        >>> from hf_segformer.training.plan import Budget, Cost, Machine
        >>> from hf_segformer.training.planning import plan_run
        >>> sizes, shares = ((360, 480),), (0.7, 0.29, 0.01)
        >>> tables = {"source": "camvid", "root": "DIR"}
        >>> description = DataDescription(
        ...     "CamVid", tables, "indices", ("road", "sky", "pole"), "classes.json", 3, "uint8", 1.0, sizes, 367, 101,
        ...     shares, (1.0, 1.0, 0.4), 100, ()
        ... )
        >>> machine = Machine("cpu", 8 * 2**30, 2, False, lambda tables: Cost(1.0, 0.01, 0.1, 40 * 2**20))
        >>> plan = plan_run(description, Budget(seconds=7200), machine, ["trainer.seed=3"])
        >>> {each.key: each.value for each in plan.decisions}["trainer.max_steps"]
        6458
    """
    output_dir = output_dir or default_output_dir(description.tables.get("root", ""))
    draft = Draft(description, budget, machine, parse_overrides(overrides), pretrained, output_dir)
    ruled = {key for key, _ in RULES}
    for key, value in description.tables.items():
        is_replaced = key == "eval_split" and _holds_out(draft)
        if draft.is_given(f"data.{key}"):
            if key in VALUE_SETTINGS and draft[f"data.{key}"] != value:
                draft.decide(f"data.{key}", value, "the masks hold colours: what was given is said in data.mask_colors")
        elif f"data.{key}" not in ruled and not is_replaced:
            draft.decide(f"data.{key}", value, _source_of(key, description))
    AugmentationConfig(**draft.given["augmentation"])  # a trial's crops are not always those that the user named
    for key, rule in RULES:
        if draft.is_given(key):
            draft.decide(key, draft[key], _given_reason(key, pretrained))
        elif (decided := rule(draft)) is not None:
            draft.decide(key, *decided)
    known = {each.key for each in draft.decisions}
    rest = [f"{table}.{key}" for table, values in draft.given.items() for key in values]
    for key in rest:
        if key not in known:
            draft.decide(key, draft[key], GIVEN)
    header = f"Planned for {_count(description.num_train, 'image')} on {machine.device}: {description.layout}."
    return Plan(_in_order(draft.decisions), description.notes, estimated_seconds(draft), header)


# --- Data -------------------------------------------------------------------------------------------------------------


def names(draft: Draft) -> tuple[list[str], str]:
    """Class names as the data bring them, so that the recipe does not depend on a file beside them."""
    source = draft.description.names_source
    found = "no names found: set data.names" if source == "generic" else f"from {source}"
    number = len(draft.description.names)
    binary = ", one logit against the background" if number == 1 else ""
    return list(draft.description.names), f"{number} class{'es' * (number > 1)}{binary}; {found}"


def eval_share(draft: Draft) -> tuple[float, str] | None:
    """Hold 10 % out where there is no evaluation split (recipe binary_b0), at least ten images, at most 30 %."""
    number = draft.description.num_train
    if _holds_out(draft):
        return None
    if found := draft.description.tables.get("eval_share"):
        return found, "no evaluation split: images are held out, drawn by data.seed"
    if draft.description.num_eval or draft["data.eval_split"]:
        return None
    if number < 2:
        raise ValueError(
            f"data.root has {_count(number, 'image')} with a mask; expected at least 2, one to train on and one to "
            "evaluate on"
        )
    share = round(min(0.3, max(0.1, 10 / number)), 3)
    held_out = max(1, round(number * share))
    return share, f"no evaluation split: {held_out} of {number} images are held out, drawn by data.seed"


def _holds_out(draft: Draft) -> bool:
    """Return True if the user holds out groups or a fold, which takes the place of the data's evaluation split."""
    return SplitConfig(**draft.given.get("split", {})).holds_out


def num_channels(draft: Draft) -> tuple[int, str] | None:
    """Take as many channels as the images have; 8-bit grey images are repeated in three, which any encoder takes."""
    description, pretrained = draft.description, draft.pretrained
    found = len(draft["data.bands"] or ()) or description.num_channels
    is_grey = found == 1 and (description.image_dtype == "uint8" or draft["data.value_range"])
    if is_grey and (pretrained is None or pretrained.num_channels == 3):
        return 3, "grey images are repeated in three channels"
    if pretrained is not None and pretrained.num_channels != found:
        raise ValueError(
            f"{pretrained.source} takes images of {_count(pretrained.num_channels, 'channel')}, the data have {found}: "
            f"convert it by `segformer convert {pretrained.source} NEW --num-channels {found}` and give --init NEW"
        )
    return None if found == 3 else (found, f"the images have {_count(found, 'band')}")


# --- Sizes ------------------------------------------------------------------------------------------------------------


def base_size(draft: Draft) -> tuple[list[int], str] | None:
    """Fit images that differ in size, or are large, into one shorter side, as the paper does for ADE20K (4.1).

    The side is the median one, at most 1024 (Cityscapes), on a CPU 512. Rasters from 2048 pixels on keep their
    resolution: what is small in them would vanish.
    """
    sides = _shorter_sides(draft)
    median, most = int(statistics.median(sides)), 512 if draft.machine.is_cpu else 1024
    if median > _LARGE_SIDE:
        return None
    if max(sides) == min(sides) and median <= most:
        return None
    side = min(median, most)
    reason = f"shorter sides are {_range(sides)}: each image is fitted into {side} first, as in the paper for ADE20K"
    return [side, 4 * side], reason


def eval_size(draft: Draft) -> tuple[int, str] | None:
    """Evaluate at the resolution of training: the fitted shorter side, or the median one."""
    sides = _shorter_sides(draft)
    if draft["augmentation.base_size"]:
        return draft["augmentation.base_size"][0], "shorter side as in training"
    if max(sides) == min(sides):
        return None
    return int(statistics.median(sides)), "median shorter side of the images"


def sliding_window(draft: Draft) -> tuple[int, str] | None:
    """See rasters through a window of 1024 pixels, as the paper does for Cityscapes; other images whole."""
    side = draft["augmentation.base_size"] or _shorter_sides(draft)
    if min(side) <= _LARGE_SIDE:
        return None
    return 1024, f"images of {_range(_shorter_sides(draft))} pixels do not fit into the network at once"


def crop_size(draft: Draft) -> tuple[int, str]:
    """Crop the shorter side in multiples of 32, at most 512 (paper, ADE20K), or 1024 of as large images (Cityscapes).

    On a CPU at most 256, as in recipe camvid_b0. Halved while two images do not fit into memory.
    """
    side = (draft["augmentation.base_size"] or [int(statistics.median(_shorter_sides(draft)))])[0]
    most = 256 if draft.machine.is_cpu else 1024 if side >= 1024 else 512
    size = max(32, min(most, side) // 32 * 32)
    limit = "recipe camvid_b0 on a CPU" if draft.machine.is_cpu else "the paper"
    reason = f"at most {most}, as in {limit}, of a shorter side of {side}"
    while size > 64 and 2 * image_bytes(draft, {"augmentation.crop_size": size}) > memory(draft):
        size = size // 2 // 32 * 32
        reason = f"two larger crops do not fit into {_in_bytes(draft.machine.memory)}"
    return size, reason


# --- Loss -------------------------------------------------------------------------------------------------------------


def cross_entropy(draft: Draft) -> tuple[float, str]:
    """Train by cross entropy over the valid pixels (paper, 4.1)."""
    binary = ", of one logit: foreground or not" if len(draft.description.names) == 1 else ""
    return 1.0, f"as in the paper{binary}"


def dice(draft: Draft) -> tuple[float, str] | None:
    """Add Dice where a class has under 2 % of the pixels, and for a single class.

    Cross entropy alone loses thin and rare classes (recipes camvid_b0, binary_b0; Milletari et al. 2016).
    """
    name, share = _rarest(draft)
    if len(draft.description.names) == 1:
        return 1.0, f"{name} has {100 * share:.2g} % of the pixels; recipe binary_b0"
    if share >= _RARE:
        return None
    return 1.0, f"{name} has {100 * share:.2g} % of the pixels, below {100 * _RARE:g} %; recipe camvid_b0"


def class_weights(draft: Draft) -> tuple[str, str] | None:
    """Weigh classes by 1 / ln(1.02 + share), at most 50 (Paszke et al. 2016), where one has under 0.1 % of pixels."""
    name, share = _rarest(draft)
    if len(draft.description.names) == 1 or share >= _VERY_RARE:
        return None
    return "log", f"{name} has {100 * share:.2g} % of the pixels, below {100 * _VERY_RARE:g} %"


def max_class_share(draft: Draft) -> tuple[float, str]:
    """Keep crops in which no class has over 75 % (paper's code), unless one has as much of all pixels."""
    shares = draft.description.class_shares
    if shares and max(shares) > 0.75:
        return 1.0, f"one class has {100 * max(shares):.0f} % of all pixels, most crops would be refused"
    return 0.75, "as in the paper's code"


# --- Network, batch and precision -------------------------------------------------------------------------------------


def bf16(draft: Draft) -> tuple[bool, str]:
    """Train in bfloat16 where an accelerator has it, and on a CPU where it is at least 10 % faster, measured."""
    if not draft.machine.has_bfloat16:
        return False, "the processor does not compute in bfloat16"
    if not draft.machine.is_cpu:
        return True, "the accelerator computes in bfloat16"
    batch = largest_batch(draft)
    full, half = (draft.cost(batch, {"trainer.bf16": value}).step_seconds for value in (False, True))
    measured = f"measured {half:.2g} s a step, {full:.2g} s in float32"
    return half < 0.9 * full, measured


def variant(draft: Draft) -> tuple[str, str] | None:
    """Train B0 from scratch, from 2,000 images on B1, from 10,000 B2, if time allows 50 passes over the images.

    A rule of thumb: the paper trains all sizes on 20,210 images from pretrained encoders. Larger ones cost more than
    they give on few images.
    """
    if draft.is_pretrained:
        return None
    candidates = [name for name, least in _VARIANTS.items() if draft.num_train >= least]
    number = _count(draft.num_train, "image")
    for name in reversed(candidates[1:]):
        if passes_in_time(draft, name) >= _VARIANT_PASSES:
            return name, f"the largest for {number} from scratch that makes {_VARIANT_PASSES} passes in time"
    return candidates[0], f"from scratch on {number}" + ", the time allows no larger one" * (len(candidates) > 1)


def per_device_batch(draft: Draft) -> tuple[int, str]:
    """Take as many images as an optimizer step needs, or as fit into 80 % of the free memory, by a measured step."""
    batch, bytes_needed = largest_batch(draft), largest_image_bytes(draft)
    fits = f"{_in_bytes(batch * bytes_needed)} of {_in_bytes(draft.machine.memory)} free memory"
    return batch, f"{_target_reason(draft)}; {fits}"


def accumulation(draft: Draft) -> tuple[int, str] | None:
    """Accumulate gradients to the batch of 8 (Cityscapes, camvid_b0), on an accelerator 16 (ADE20K)."""
    batch = draft["trainer.per_device_train_batch_size"]
    steps = math.ceil(target_batch(draft) / (batch * draft.machine.processes))
    return None if steps <= 1 else (steps, f"together {steps * batch * draft.machine.processes} images a step")


def num_workers(draft: Draft) -> tuple[int, str]:
    """Start as many as read a batch while one is computed, measured, with half as many again; on a CPU one.

    There a worker shares the processors with the network (recipe camvid_b0).
    """
    free = draft.machine.processors // draft.machine.processes - 1
    cost, batch = planned_cost(draft), draft["trainer.per_device_train_batch_size"]
    reading = cost.reading_seconds * batch * (1 + draft.mixed_share)
    measured = f"reading a batch takes {reading:.2g} s, computing it {cost.step_seconds:.2g} s"
    if free < 1:
        return 0, "there is one processor"
    if draft.machine.is_cpu:
        return 1, measured
    return max(1, min(free, 16, math.ceil(1.5 * reading / cost.step_seconds))), measured


def persistent_workers(draft: Draft) -> tuple[bool, str] | None:
    """Keep the workers over the epochs: to start others takes seconds."""
    return (True, "starting workers takes seconds") if draft["trainer.dataloader_num_workers"] else None


# --- Length -----------------------------------------------------------------------------------------------------------


def max_steps(draft: Draft) -> tuple[int, str] | None:
    """The steps that were asked for, or that fit into the time by the measured step, less 5 % for what is not measured.

    Without either, 200 passes over the images (camvid_b0 makes 196), half as many from a pretrained encoder (the paper
    makes 127 on ADE20K), at least 1,000 steps and at most 40,000, the shortest schedule of mmsegmentation for large
    data sets.
    """
    step = step_seconds(draft)
    if draft.budget.steps is not None:
        return draft.budget.steps, f"given by --steps; {step:.2g} s a step"
    if draft.is_given("trainer.num_train_epochs"):
        return None
    if draft.budget.seconds is not None:
        return steps_in_time(draft), f"fits into {format_duration(draft.budget.seconds)}; {step:.2g} s a step"
    passes = _PASSES_PRETRAINED if draft.is_pretrained else _PASSES
    steps = math.ceil(passes * draft.num_train / draft.batch_size)
    steps = min(_MOST_STEPS, max(_LEAST_STEPS, steps))
    done = steps * draft.batch_size / draft.num_train
    return steps, f"{done:.0f} passes over {_count(draft.num_train, 'image')}; {step:.2g} s a step"


def eval_strategy(draft: Draft) -> tuple[str, str]:
    """Evaluate on the way, up to ten times, as long as that takes under 10 % of the time."""
    number = num_evaluations(draft)
    seconds = evaluation_seconds(draft)
    if not number:
        return "no", f"an evaluation takes {format_duration(seconds)}; there is one at the end"
    return "steps", f"about {_count(number, 'time')} on the way, {format_duration(seconds)} each, and at the end"


def eval_steps(draft: Draft) -> tuple[int, str] | None:
    """Spread the evaluations evenly; the one at the end is made in any case."""
    if draft["trainer.eval_strategy"] != "steps":
        return None
    return draft.num_steps // (num_evaluations(draft) + 1) + 1, "evenly spread"


def save_strategy(draft: Draft) -> tuple[str, str] | None:
    """Keep the best checkpoint where the user stops a run by its evaluations."""
    return ("best", "early_stopping.patience restores the best") if draft["early_stopping.patience"] else None


def save_steps(draft: Draft) -> tuple[int, str] | None:
    """Write a checkpoint every ten minutes: no more is lost when a run is killed."""
    if draft["trainer.save_strategy"] == "best":
        return None
    steps = max(1, round(600 / step_seconds(draft)))
    return min(draft.num_steps, steps), "a checkpoint every ten minutes, and at the end"


def logging_steps(draft: Draft) -> tuple[int, str]:
    """Log every 20 steps (recipes), in short runs more often."""
    return max(1, min(20, draft.num_steps // 20)), "points of the loss curve"


# --- Augmentation and optimizer ---------------------------------------------------------------------------------------


def scale(draft: Draft) -> tuple[list[float], str]:
    """Resize by 0.5 to 2 (paper, 4.1), from scratch to 1.75 (camvid_b0); 0.9 to 1.1 in a short run (shapes_b0)."""
    if draft.is_short:
        return [0.9, 1.1], f"{draft.num_passes:.1f} passes over the images: little danger of overfitting"
    if draft.is_pretrained:
        return [0.5, 2.0], "as in the paper"
    return [0.5, 1.75], "from scratch, recipe camvid_b0"


def distortion(draft: Draft) -> tuple[float, str]:
    """Change colours as in the paper's code, little in a short run (shapes_b0); bands in their own units not at all."""
    is_byte = draft.description.image_dtype == "uint8" and draft.get("model.num_channels", 3) == 3
    if not (is_byte or draft["data.value_range"]):
        return 0.0, "the images are not on the scale of 0 to 255"
    return (0.2, "a short run") if draft.is_short else (1.0, "as in the paper's code")


def drop_path_rate(draft: Draft) -> tuple[float, str] | None:
    """No stochastic depth in a short run (recipe shapes_b0); 0.1 otherwise, the paper's."""
    return (0.0, "a short run needs no regularisation") if draft.is_short else None


def classifier_dropout(draft: Draft) -> tuple[float, str] | None:
    """No dropout in a short run (recipe shapes_b0); 0.1 otherwise, the paper's."""
    return (0.0, "a short run needs no regularisation") if draft.is_short else None


def learning_rate(draft: Draft) -> tuple[float, str]:
    """6e-5 from a pretrained encoder (paper, 4.1); from scratch 1e-3 (camvid_b0), B0 in a short run 2.5e-3 (shapes_b0).

    On request the rate at which the loss falls most steeply in a range test (Smith 2017, arXiv:1506.01186).
    """
    if draft.machine.find_learning_rate is not None:
        return draft.machine.find_learning_rate(draft.tables()), "range test: the steepest descent of the loss"
    if draft.is_pretrained:
        return 6e-5, "from a pretrained encoder, as in the paper"
    if draft.is_short and draft["model.variant"] == "b0":
        return 2.5e-3, "from scratch in a short run, recipe shapes_b0"
    return 1e-3, "from scratch, recipe camvid_b0"


def head_lr_multiplier(draft: Draft) -> tuple[float, str]:
    """Ten times the rate for a fresh head on a pretrained encoder (paper, 4.1); from scratch one rate (camvid_b0)."""
    if draft.is_pretrained:
        return 10.0, "a fresh head on a pretrained encoder, as in the paper"
    return 1.0, "encoder and head are both fresh"


def weight_decay(draft: Draft) -> tuple[float, str]:
    """0.01 (paper), from scratch 0.05 (camvid_b0), in a short run 0.01 (shapes_b0)."""
    if draft.is_pretrained:
        return 0.01, "as in the paper"
    return (0.01, "recipe shapes_b0") if draft.is_short else (0.05, "recipe camvid_b0")


def warmup_steps(draft: Draft) -> tuple[int, str]:
    """A tenth of the steps, from scratch at most 200 (camvid_b0), else at most 1,500 (paper's code)."""
    most, source = (1500, "the paper's code") if draft.is_pretrained else (200, "recipe camvid_b0")
    return max(1, min(most, draft.num_steps // 10)), f"a tenth of the steps, at most {most:,} ({source})"


def max_grad_norm(draft: Draft) -> tuple[float, str]:
    """Clip gradients from scratch (camvid_b0), not from a pretrained encoder (paper's code)."""
    return (0.0, "as in the paper") if draft.is_pretrained else (1.0, "from scratch, recipe camvid_b0")


# --- Fixed ------------------------------------------------------------------------------------------------------------


def output_dir(draft: Draft) -> tuple[str, str]:
    """A folder below outputs/ by the name of the data."""
    return draft.output_dir, "by the name of the data"


def save_total_limit(draft: Draft) -> tuple[int, str]:
    """Keep two checkpoints (recipes): one may be cut off while it is written."""
    return 2, "one may be cut off while it is written"


def seed(draft: Draft) -> tuple[int, str]:
    """A fixed seed, so that the recipe reproduces the run."""
    return 0, "reproduces the run"


RULES: tuple[tuple[str, Callable[[Draft], tuple[Any, str] | None]], ...] = (
    ("data.names", names),
    ("data.eval_share", eval_share),
    ("model.checkpoint", lambda draft: None),
    ("model.num_channels", num_channels),
    ("loss.cross_entropy", cross_entropy),
    ("loss.dice", dice),
    ("loss.class_weights", class_weights),
    ("augmentation.base_size", base_size),
    ("data.eval_size", eval_size),
    ("evaluation.sliding_window", sliding_window),
    ("augmentation.crop_size", crop_size),
    ("augmentation.max_class_share", max_class_share),
    ("trainer.bf16", bf16),
    ("model.variant", variant),
    ("trainer.per_device_train_batch_size", per_device_batch),
    ("trainer.gradient_accumulation_steps", accumulation),
    ("trainer.dataloader_num_workers", num_workers),
    ("trainer.dataloader_persistent_workers", persistent_workers),
    ("trainer.max_steps", max_steps),
    ("trainer.eval_strategy", eval_strategy),
    ("trainer.eval_steps", eval_steps),
    ("trainer.save_strategy", save_strategy),
    ("trainer.save_steps", save_steps),
    ("trainer.save_total_limit", save_total_limit),
    ("trainer.logging_steps", logging_steps),
    ("augmentation.scale", scale),
    ("augmentation.distortion", distortion),
    ("model.drop_path_rate", drop_path_rate),
    ("model.classifier_dropout_prob", classifier_dropout),
    ("optimizer.head_lr_multiplier", head_lr_multiplier),
    ("trainer.learning_rate", learning_rate),
    ("trainer.weight_decay", weight_decay),
    ("trainer.warmup_steps", warmup_steps),
    ("trainer.max_grad_norm", max_grad_norm),
    ("trainer.seed", seed),
    ("trainer.output_dir", output_dir),
)


def _target_reason(draft: Draft) -> str:
    target = target_batch(draft)
    if target == draft.num_train:
        return "all images"
    return f"{target} images a step as in {'recipe camvid_b0' if draft.machine.is_cpu else 'the paper for ADE20K'}"


def _rarest(draft: Draft) -> tuple[str, float]:
    """Name and share of the rarest class that occurs; for a single class the foreground."""
    labels, shares = draft.description.names, draft.description.class_shares
    if len(labels) == 1:
        return labels[0], shares[-1] if shares else 0.0
    present = [(share, name) for name, share in zip(labels, shares, strict=False) if share > 0]
    return min(present)[::-1] if present else ("no class", 1.0)


def _shorter_sides(draft: Draft) -> list[int]:
    return [min(size) for size in draft.description.sizes]


def _range(sides: list[int]) -> str:
    return str(sides[0]) if min(sides) == max(sides) else f"{min(sides)} to {max(sides)}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def _in_bytes(number: float) -> str:
    if number < 1e9:
        return f"{number / 1e6:.0f} MB"
    return f"{number / 1e9:.2g} GB" if number < 1e10 else f"{number / 1e9:.0f} GB"


def _source_of(key: str, description: DataDescription) -> str:
    of_masks = ("label_values", "mask_colors", "palette", "reduce_labels", "ignore_values")
    return f"{description.mask_kind} masks" if key in of_masks else description.layout


def _given_reason(key: str, pretrained: Pretrained | None) -> str:
    if key != "model.checkpoint" or pretrained is None:
        return GIVEN
    return f"{GIVEN}: {pretrained.size}, licence: {pretrained.licence}"


def _in_order(decisions: Iterable[Decision]) -> tuple[Decision, ...]:
    """Sort by the recipe's tables, within a table by the rules."""
    order = ["data", "split", "model", "augmentation", "loss", "optimizer", "trainer", "evaluation"]
    place = {name: index for index, name in enumerate(order)}
    return tuple(sorted(decisions, key=lambda each: place.get(each.key.partition(".")[0], len(place))))


__all__ = ["RULES", "plan_run"]
