"""Plan of a training run as data: budget, machine, decisions with their reasons, and the recipe that they make.

Nothing here imports PyTorch.
"""

import math
import re
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .recipe import Recipe, parse_recipe
from .recipe_writer import format_recipe

GIVEN = "given"

Tables = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Budget:
    """Length of a run: at most one of the two; without both it follows from the number of images.

    Args:
        steps: number of optimizer steps.
        seconds: time for training and evaluation.
    """

    steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Cost:
    """Measured cost of a trial.

    Attributes:
        step_seconds: forward, backward and update of one batch in one process.
        reading_seconds: reading and augmentation of one image.
        evaluation_seconds: prediction of one evaluation image.
        image_bytes: memory that one more image in a batch takes.
    """

    step_seconds: float
    reading_seconds: float
    evaluation_seconds: float
    image_bytes: int


@dataclass(frozen=True)
class Machine:
    """The machine that a run is planned for.

    Args:
        device: `"cpu"`, or the type of the accelerator.
        memory: free bytes, of the accelerator if there is one.
        processors: number of processors that this process may use.
        has_bfloat16: the device computes in bfloat16.
        measure: gives the cost of a few steps with trial tables of a recipe; every trial names a variant or checkpoint,
            a crop and a batch size.
        find_learning_rate: runs a range test with trial tables; None if none is wanted.
        processes: number of processes that train together.
    """

    device: str
    memory: int
    processors: int
    has_bfloat16: bool
    measure: Callable[[Tables], Cost]
    find_learning_rate: Callable[[Tables], float] | None = None
    processes: int = 1

    @property
    def is_cpu(self) -> bool:
        """Return True if there is no accelerator."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Pretrained:
    """Weights to start from.

    Args:
        source: folder or Hub repository.
        num_channels: channels C of its input.
        size: its size for people, such as `"B0"`.
        licence: as its model card states it.
    """

    source: str
    num_channels: int
    size: str
    licence: str


@dataclass(frozen=True)
class Decision:
    """One value of the plan.

    Args:
        key: as in a recipe, `table.key`.
        value: as in a recipe.
        reason: for people; `"given"` where the user chose.
    """

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Plan:
    """A planned run.

    Args:
        decisions: every value, in the order of the rules.
        notes: what was found in the data, one line each.
        seconds: estimated time of training and evaluations.
        header: first line of the recipe.
    """

    decisions: tuple[Decision, ...]
    notes: tuple[str, ...]
    seconds: float
    header: str

    @property
    def tables(self) -> Tables:
        """The recipe's tables."""
        tables: Tables = {}
        for each in self.decisions:
            table, _, key = each.key.partition(".")
            tables.setdefault(table, {})[key] = each.value
        return tables

    def to_toml(self) -> str:
        """Return the recipe as TOML, with the reasons as comments."""
        reasons = {each.key: each.reason for each in self.decisions}
        header = f"{self.header}\nEstimated time: {format_duration(self.seconds)} on the machine it was planned on."
        return format_recipe(self.tables, reasons, header)

    def to_recipe(self, name: str) -> Recipe:
        """Return the checked recipe; code to run can only be the user's own choice, and is trusted.

        Args:
            name: the recipe's name.

        Raises:
            ValueError: if values do not go together; the message names them.
        """
        recipe = parse_recipe(self.to_toml(), "the plan", name)
        return replace(recipe, trusted_code=recipe.tables["augmentation"].get("custom", ""))

    def format_table(self, width: int | None = None) -> str:
        """Return the plan as aligned columns: key, value and reason.

        Args:
            width: of a line; by default that of the terminal.
        """
        width = width or shutil.get_terminal_size((120, 24)).columns
        rows = [(each.key, _shorten(each.value), each.reason) for each in self.decisions]
        key_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
        indent = " " * (key_width + value_width + 4)
        lines = []
        for key, value, reason in rows:
            start = f"{key:{key_width}}  {value:{value_width}}  "
            wrapped = textwrap.wrap(reason, max(30, width - len(start))) or [""]
            lines.append("\n".join([start + wrapped[0], *(indent + line for line in wrapped[1:])]).rstrip())
        return "\n".join(lines)


def default_output_dir(root: str) -> str:
    """Return the folder of a run on a folder of images or a Hub data set.

    Examples:
        >>> from hf_segformer.training.plan import default_output_dir
        >>> default_output_dir("data/streets/"), default_output_dir("owner/streets")
        ('outputs/streets', 'outputs/streets')
    """
    return f"outputs/{Path(root).resolve().name or 'run'}"


def format_duration(seconds: float) -> str:
    """Format a duration, such as "2 h 3 min".

    Examples:
        >>> from hf_segformer.training.plan import format_duration
        >>> format_duration(7384), format_duration(95), format_duration(0.25)
        ('2 h 3 min', '1 min 35 s', '0.25 s')
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    minutes = round(whole / 60)
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")


def parse_duration(text: str) -> float:
    """Parse a time such as `2h`, `90m`, `45s` or `1h30m`, to seconds.

    Raises:
        ValueError: if it is none, or not above 0.

    Examples:
        >>> from hf_segformer.training.plan import parse_duration
        >>> parse_duration("1h30m"), parse_duration("0.5h")
        (5400.0, 1800.0)
    """
    parts = re.fullmatch(r"(?:([0-9.]+)h)?(?:([0-9.]+)m)?(?:([0-9.]+)s)?", text.strip())
    try:
        numbers = [float(part or 0) for part in parts.groups()] if parts else [0.0]
    except ValueError:
        numbers = [0.0]
    seconds = sum(number * unit for number, unit in zip(numbers, (3600, 60, 1), strict=False))
    if not 0 < seconds < math.inf:
        raise ValueError(f"{text!r} is no time; expected one above 0 such as 2h, 90m, 45s or 1h30m")
    return seconds


def _shorten(value: Any, most: int = 30) -> str:
    if isinstance(value, str):
        return value if len(value) <= most else f"...{value[3 - most :]}"
    text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


__all__ = [
    "GIVEN",
    "Budget",
    "Cost",
    "Decision",
    "Machine",
    "Plan",
    "Pretrained",
    "Tables",
    "default_output_dir",
    "format_duration",
    "parse_duration",
]
