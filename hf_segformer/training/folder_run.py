"""Plan of a run on a folder or a Hub data set, where nobody wrote a recipe."""

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..data.description import describe_data
from ..files import atomic_write, with_suffix_added
from ..inference.distributed import DistributedContext
from .measuring import this_machine
from .plan import Budget, Plan, default_output_dir
from .planning import plan_run
from .pretrained import inspect_pretrained
from .recipe import parse_overrides


def plan_data(
    root: str, budget: Budget | None = None, overrides: Sequence[str] = (), find_learning_rate: bool = False
) -> Plan:
    """Describe a data set, measure this machine, and plan a run.

    Several processes (torchrun) get the plan of the first one.

    Args:
        root: folder, or Hub data set as `owner/name`.
        budget: length of the run.
        overrides: `table.key=value` of values that the user chooses.
        find_learning_rate: run a range test for the learning rate.

    Raises:
        ValueError: if the layout is unknown or ambiguous, an override is wrong, or the time is too short.
        OSError: if files are missing or cannot be read.
    """
    given = parse_overrides(overrides)
    _start_processes(given["trainer"])
    context = DistributedContext()
    plan, failure = None, None
    try:
        if context.is_main:
            plan = _plan(root, budget or Budget(), overrides, find_learning_rate)
    except (ValueError, OSError) as error:
        failure = error
    plan, failed = context.gather((plan, failure is not None))[0]
    if failure is not None:
        raise failure
    if plan is None or failed:
        raise ValueError("the first process has no plan, see its message")
    return plan


def write_plan(plan: Plan, output_dir: str, overwrite: bool = False) -> Path:
    """Write a plan's recipe beside the folder of its run, `OUTPUT_DIR.toml`.

    Another plan there is kept, and the new one gets a number, `OUTPUT_DIR.1.toml`.

    Args:
        plan: the plan.
        output_dir: folder of the run.
        overwrite: replace another plan.

    Raises:
        OSError: if it cannot be written.
    """
    folder, text, number = Path(output_dir), plan.to_toml(), 0
    path = with_suffix_added(folder, ".toml")
    while not overwrite and path.exists() and path.read_text(encoding="utf-8") != text:
        number += 1
        path = with_suffix_added(folder, f".{number}.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _start_processes(trainer: Mapping[str, Any]) -> None:
    """Let the processes meet as the Trainer does, which takes their group over: a second one would not come about."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        use_cpu = bool(trainer.get("use_cpu")) or not torch.accelerator.is_available()
        timeout = timedelta(seconds=trainer.get("ddp_timeout", 1800))
        PartialState(cpu=use_cpu, backend=trainer.get("ddp_backend"), timeout=timeout)


def _plan(root: str, budget: Budget, overrides: Sequence[str], find_learning_rate: bool) -> Plan:
    given = parse_overrides(overrides)
    checkpoint = given["model"].get("checkpoint")
    pretrained = inspect_pretrained(checkpoint) if checkpoint else None
    try:
        description = describe_data(root, given["data"])
    except OSError as error:
        if Path(root).exists():
            raise
        raise OSError(
            f"there is no folder {root}, and no Hub data set of that name can be read "
            f"({' '.join(str(error).split())}); expected a folder of images and masks"
        ) from error
    machine = this_machine(bool(given["trainer"].get("use_cpu")), find_learning_rate)
    return plan_run(description, budget, machine, overrides, pretrained, default_output_dir(root))


__all__ = ["plan_data", "write_plan"]
