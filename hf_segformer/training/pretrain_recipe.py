"""Recipes of pre-training: TOML files like those of fine-tuning, with the tables that pre-training needs."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import EmaConfig
from ..data.pretraining_config import ImageAugmentation, ImageDataConfig, PretrainingConfig
from .recipe import check_tables, find_recipe, read_tables

_OPTIONS = {
    "data": ImageDataConfig,
    "augmentation": ImageAugmentation,
    "pretraining": PretrainingConfig,
    "ema": EmaConfig,
}


@dataclass(frozen=True)
class PretrainRecipe:
    """A recipe of pre-training whose names, types and values are checked.

    Args:
        name: the file's name without suffix.
        tables: all of it, as TOML tables; a table that the file leaves out is empty.
        data: source of the images.
        augmentation: augmentation of training images.
        pretraining: the method.
        ema: the average of the weights.
        text: the TOML text of it all, comments included; empty where bases or overrides add to a file.
    """

    name: str
    tables: dict[str, dict[str, Any]]
    data: ImageDataConfig
    augmentation: ImageAugmentation
    pretraining: PretrainingConfig
    ema: EmaConfig
    text: str = ""

    @property
    def model(self) -> dict[str, Any]:
        """`variant` or `checkpoint`, and any field of `SegFormerConfig`."""
        return self.tables["model"]

    @property
    def trainer(self) -> dict[str, Any]:
        """Keywords of `TrainingArguments`."""
        return self.tables["trainer"]


def read_pretrain_recipe(source: str | Path, overrides: Iterable[str] = ()) -> PretrainRecipe:
    """Read a recipe of pre-training, apply overrides, and check every name, type and value.

    Args:
        source: name of a recipe of this package, such as `imagenet_b0`, or path of a TOML file.
        overrides: `table.key=value`, as for `read_recipe`.

    Raises:
        ValueError: if a table or key is unknown, or a value is of the wrong type or out of range.
        OSError: if the file, or a folder that it names, does not exist.

    Examples:
        >>> from hf_segformer.training.pretrain_recipe import read_pretrain_recipe
        >>> read_pretrain_recipe("single_shapes_b0", ["trainer.max_steps=24"]).pretraining.method
        'classification'
    """
    path = find_recipe(source, "pretrain")
    tables, text = read_tables(path, list(overrides), _OPTIONS, "pretrain")
    check_tables(str(path), tables)
    options = {table: kind(**tables[table]) for table, kind in _OPTIONS.items()}
    recipe = PretrainRecipe(path.stem, tables, **options, text=text)
    recipe.data.check_root()
    recipe.pretraining.check_with(recipe.augmentation)
    if recipe.data.streaming and recipe.trainer.get("max_steps", 0) <= 0:
        raise ValueError("data.streaming is set, but a stream has no length: set trainer.max_steps")
    _check_batch(recipe)
    _check_best(recipe)
    return recipe


def metric_names(recipe: PretrainRecipe) -> tuple[str, ...]:
    """Return the metrics of an evaluation, the one that chooses the best checkpoint first."""
    return ("loss",) if recipe.pretraining.is_masked else ("top1", "top5", "loss")


def _check_batch(recipe: PretrainRecipe) -> None:
    """Check that images which are mixed are not alone in their batch."""
    for name in ("mixup", "cutmix"):
        if getattr(recipe.augmentation, name) and recipe.trainer.get("per_device_train_batch_size") == 1:
            raise ValueError(
                f"augmentation.{name} mixes the images of a batch, but trainer.per_device_train_batch_size is 1: set "
                f"it to at least 2, or augmentation.{name}=0"
            )


def _check_best(recipe: PretrainRecipe) -> None:
    """Check that evaluation measures the metric that chooses the best checkpoint."""
    wanted, known = recipe.trainer.get("metric_for_best_model"), metric_names(recipe)
    if wanted is not None and wanted.removeprefix("eval_") not in known:
        raise ValueError(f"trainer.metric_for_best_model is {wanted!r}; expected one of {', '.join(known)}")


__all__ = ["PretrainRecipe", "metric_names", "read_pretrain_recipe"]
