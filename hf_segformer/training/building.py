"""Parts of a training run, built from a recipe: arguments, network, samples and Trainer."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, logging

from ..config import AugmentationConfig, LoraConfig
from ..configuration_segformer import SegFormerConfig, default_ignore_index
from ..data.torch_datasets import EpochSampler, TrainDataset, TrainStream
from ..evaluation.metrics import LOWER_IS_BETTER
from ..modeling_segformer import SegFormerForSemanticSegmentation
from .data import Data
from .distillation import Teacher
from .losses import SegmentationLoss
from .recipe import Recipe
from .recipe_trainer import RecipeTrainer


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's `[trainer]` with the defaults of segmentation.

    Raises:
        ValueError: if a value is out of range; the message names its key.
    """
    defaults: dict[str, Any] = {}
    if recipe.early_stopping.patience:
        defaults["load_best_model_at_end"] = True
    if recipe.trainer.get("load_best_model_at_end", recipe.early_stopping.patience):
        defaults["metric_for_best_model"] = "mean_iou"
    if metric := recipe.trainer.get("metric_for_best_model", defaults.get("metric_for_best_model")):
        # Transformers goes by the name: the IoU of a class "forest_loss" would be one to lower.
        defaults["greater_is_better"] = metric.removeprefix("eval_") not in LOWER_IS_BETTER
    return build_arguments(recipe.trainer, defaults)


def build_arguments(table: dict[str, Any], defaults: dict[str, Any]) -> TrainingArguments:
    """A recipe's table `[trainer]` with the defaults of every run and further ones.

    Raises:
        ValueError: if a value is out of range; the message names its key.
    """
    logging.disable_progress_bar()  # those of reading and writing weights, which would break up the training's
    common = {
        "remove_unused_columns": False,  # the transforms need the images
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # else bf16 is refused there
    }
    try:
        return TrainingArguments(**{**common, **defaults, **table})
    except ValueError as error:
        words = str(error).split()
        key = next((key for key, value in table.items() if {str(value), f"--{key}"} & {*words}), None)
        raise ValueError(f"trainer.{key}: {error}" if key else f"[trainer]: {error}") from error


def fresh_config(table: dict[str, Any], **labels: Any) -> SegFormerConfig:
    """The configuration of the recipe's `[model]`.

    Raises:
        ValueError: if a value is out of range.
        OSError: if the checkpoint cannot be read.
    """
    fields = {key: value for key, value in table.items() if key not in ("variant", "checkpoint")}
    if table.get("checkpoint"):
        return SegFormerConfig.from_pretrained(locate_checkpoint(table["checkpoint"]), **fields, **labels)
    return SegFormerConfig.from_variant(table["variant"], **fields, **labels)


def locate_checkpoint(source: str) -> Path:
    """The local path of `model.checkpoint`, downloaded if it is a Hub repository.

    Raises:
        OSError: if there is no such folder or repository, or the Hub cannot be reached; one line with the remedy.
    """
    from ..conversion.checkpoints import locate

    try:
        return locate(source)
    except OSError as error:
        raise OSError(
            f"model.checkpoint is {source}, which cannot be loaded ({' '.join(str(error).split())}); expected a folder "
            "with a model, or a Hub repository and a network"
        ) from error


def build_model(table: dict[str, Any], names: Sequence[str]) -> SegFormerForSemanticSegmentation:
    """Build a fresh network of a variant, or load a checkpoint with a head for these classes.

    Args:
        table: the recipe's `[model]`; with `checkpoint` its `variant` is not used.
        names: class names.

    Raises:
        ValueError: if a value is out of range, or the checkpoint holds no SegFormer encoder of its config's shape.
        OSError: if the checkpoint cannot be read.
    """
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    labels["semantic_loss_ignore_index"] = default_ignore_index(max(len(names), 2))
    return build_network(SegFormerForSemanticSegmentation, table, labels)


def build_network(kind: Any, table: dict[str, Any], labels: dict[str, Any]) -> Any:
    """Build a fresh network, or load the encoder of a checkpoint, and of its head what has the same shape.

    Args:
        kind: class of the model.
        table: see `build_model`.
        labels: fields of the configuration that describe the classes.

    Raises:
        ValueError: see `build_model`.
        OSError: if the checkpoint cannot be read.
    """
    source = table.get("checkpoint")
    if not source:
        return kind(fresh_config(table, **labels))
    fields = {key: value for key, value in table.items() if key not in ("variant", "checkpoint")}
    model, found = kind.from_pretrained(
        locate_checkpoint(source), ignore_mismatched_sizes=True, output_loading_info=True, **fields, **labels
    )
    fresh = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    lost = sorted(key for key in fresh if key.startswith("segformer."))
    if lost:
        raise ValueError(f"model.checkpoint {source} lacks {len(lost)} weights of the encoder, {lost[0]} first")
    if not Path(source).exists():
        model.config._name_or_path = source  # the run record names a repository, never a cache folder
    return model


def with_adapters(model: SegFormerForSemanticSegmentation, recipe: LoraConfig):
    """Wrap the model with low-rank adapters (PEFT); its head is trained whole.

    Raises:
        ValueError: if PEFT is not installed, or no layer has such a name.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError("lora.rank is set, but PEFT is not installed: pip install peft") from error
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            lora_dropout=recipe.dropout,
            target_modules=recipe.target_modules,
            modules_to_save=["decode_head"],
        ),
    )


def train_samples(data: Data, recipe: Recipe, arguments: TrainingArguments | None = None) -> TrainDataset | TrainStream:
    """Training samples with the recipe's augmentation.

    Args:
        data: images and masks.
        recipe: description of the run.
        arguments: of the training, whose last passes are cropped to `augmentation.final_crop_size`; without them no
            pass is.

    Raises:
        ValueError: if a file names code to run that nobody allowed, classes are to be balanced and were not counted, or
            the training has too few passes.
    """
    recipe.check_code()
    augmentation, seed = recipe.augmentation, recipe.trainer.get("data_seed", recipe.data.seed)
    if data.is_stream:
        return TrainStream(data.train, augmentation, data.processor, seed)
    if arguments is None:
        augmentation = replace(augmentation, final_crop_size=0)
        return TrainDataset(data.train, augmentation, data.processor, seed, data.balance)
    final = final_epoch(augmentation, arguments, len(data.train))
    return TrainDataset(data.train, augmentation, data.processor, seed, data.balance, final)


def final_epoch(augmentation: AugmentationConfig, arguments: TrainingArguments, num_images: int) -> int | None:
    """Return the first pass that is cropped to `augmentation.final_crop_size`; None without that option.

    Args:
        augmentation: options of the augmentation.
        arguments: of the training.
        num_images: number of training images.

    Raises:
        ValueError: if a share below 1 of the passes is all of them.
    """
    if not augmentation.final_crop_size:
        return None
    passes = float(arguments.num_train_epochs)
    if arguments.max_steps > 0:  # counted as the Trainer does
        batches = num_images / (arguments.train_batch_size * arguments.world_size)
        batches = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
        passes = arguments.max_steps / max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    first = math.ceil(passes) - math.ceil(round(passes * augmentation.final_share, 6))
    if first == 0 and augmentation.final_share < 1:
        raise ValueError(
            f"augmentation.final_share is {augmentation.final_share:g}, which of {passes:.4g} passes over the images, "
            "rounded up to whole ones, is all: train for longer, or set augmentation.final_share=1 to crop all of them "
            "alike, or augmentation.final_crop_size=0"
        )
    return first


def first_samples(
    data: Data, recipe: Recipe, number: int, arguments: TrainingArguments | None = None, epoch: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Up to `number` samples, as the Trainer begins a pass; a stream has its first pass alone.

    Args:
        data: images and masks.
        recipe: description of the run.
        number: of samples.
        arguments: see `train_samples`.
        epoch: number of the pass.
    """
    samples = train_samples(data, recipe, arguments)
    if isinstance(samples, TrainStream):
        return list(islice(samples, number))
    seed = recipe.trainer.get("data_seed", recipe.trainer.get("seed", TrainingArguments.seed))
    sampler = EpochSampler(len(samples), seed, lambda: epoch, samples.balance)
    return [samples[key] for key in islice(sampler, number)]


def build_trainer(
    model: SegFormerForSemanticSegmentation,
    arguments: TrainingArguments,
    recipe: Recipe,
    loss: SegmentationLoss,
    data: Data,
    teacher: Teacher | None = None,
) -> RecipeTrainer:
    """Build a Trainer on the recipe's data, with its loss and its evaluation."""
    model.loss_function = loss
    return RecipeTrainer(
        with_adapters(model, recipe.lora) if recipe.lora.rank else model,
        arguments,
        data,
        train_samples(data, recipe, arguments),
        recipe,
        teacher,
    )


__all__ = [
    "build_arguments",
    "build_model",
    "build_network",
    "build_trainer",
    "final_epoch",
    "first_samples",
    "fresh_config",
    "locate_checkpoint",
    "train_samples",
    "training_arguments",
    "with_adapters",
]
