"""Recipes as TOML text, and the recipe that every run leaves in its folder."""

import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import atomic_write, toml_value
from .pretrain_recipe import PretrainRecipe
from .recipe import Recipe

RECIPE_FILE = "recipe.toml"

_WIDTH = 118


def format_recipe(
    tables: Mapping[str, Mapping[str, Any]], comments: Mapping[str, str] | None = None, header: str = ""
) -> str:
    """Return a recipe's tables as TOML; empty ones are left out.

    Args:
        tables: texts, numbers, truth values, lists and inline tables of these, by table and key.
        comments: of `table.key`, printed above its line.
        header: comment at the top.

    Examples:
        >>> from hf_segformer.training.recipe_writer import format_recipe
        >>> print(format_recipe({"trainer": {"bf16": True}}, {"trainer.bf16": "faster here"}), end="")
        [trainer]
        # faster here
        bf16 = true
    """
    parts = ["\n".join(_comment(line) for line in header.splitlines())] if header else []
    for table, values in tables.items():
        lines = [f"[{table}]"]
        for key, value in values.items():
            if comment := (comments or {}).get(f"{table}.{key}"):
                lines.append(_comment(comment))
            lines.append(f"{key} = {toml_value(value)}")
        if values:
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def write_recipe(recipe: Recipe | PretrainRecipe, folder: Path) -> Path:
    """Write the recipe of a run into its folder, with the comments of its text where that says the same.

    Raises:
        OSError: if it cannot be written.
    """
    tables = {table: values for table, values in recipe.tables.items() if values}
    is_same = bool(recipe.text) and tomllib.loads(recipe.text) == tables
    path = folder / RECIPE_FILE
    with atomic_write(path) as partial:
        partial.write_text(recipe.text if is_same else format_recipe(tables), encoding="utf-8")
    return path


def _comment(text: str) -> str:
    lines = textwrap.wrap(" ".join(text.split()), _WIDTH - 2, break_long_words=False)
    return "\n".join(f"# {''.join(char if char.isprintable() else '?' for char in line)}" for line in lines)


__all__ = ["RECIPE_FILE", "format_recipe", "write_recipe"]
