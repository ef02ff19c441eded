"""Evaluation of a checkpoint on the evaluation data of a recipe: a table by class and a report."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import logging

from ..conversion.checkpoints import locate
from ..conversion.ensembles import member_folders
from ..conversion.loading import own_processor
from ..data.labeled import evaluation_name
from ..evaluation.detailed import build_report, describe_leakage, evaluate_in_detail
from ..evaluation.evaluate import Evaluation
from ..evaluation.threshold import evaluate_at_best_threshold
from ..evaluation.threshold import save_threshold as write_threshold
from ..inference.ensemble import load_model_or_ensemble
from ..inference.segmenter import Segmenter
from .data import load_data
from .recipe import Recipe
from .report import class_count, with_background


def evaluate_recipe(
    checkpoint: str,
    recipe: Recipe,
    folder: Path,
    device: torch.device | None = None,
    *,
    group_pattern: str | None = None,
    save_threshold: bool = False,
) -> Evaluation:
    """Print the table by class, and write the report: metrics.json, report.html, tables and figures.

    Several processes (torchrun, `accelerate launch`) share the images; the main one prints and writes.

    Args:
        checkpoint: a folder, a file of weights or a Hub repository, of a model or an ensemble.
        recipe: its evaluation data and `[evaluation]` are used.
        folder: where to write.
        device: by default the accelerator of this process if there is one, else the CPU.
        group_pattern: see `build_report`; by default the groups of the recipe's `[split]`, if there are any.
        save_threshold: find the best threshold of a binary model, and save it in the checkpoint's folder.

    Returns:
        the result, in every process that of all images.

    Raises:
        ValueError: if the checkpoint holds no segmentation model, or its classes are not those of the data.
        OSError: if it or the data cannot be read, or the results cannot be written.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    logging.disable_progress_bar()
    path = locate(checkpoint)
    model, _ = load_model_or_ensemble(path)
    processor = own_processor(member_folders(path)[0], model)
    ignore_index = model.config.semantic_loss_ignore_index
    data = load_data(recipe.data, model.config.num_channels, recipe.split, ignore_index=ignore_index)
    _check_classes(checkpoint, model.config, data.names)
    folder.mkdir(parents=True, exist_ok=True)
    model, processor = model.to(device or state.device), processor or data.processor
    if state.is_main_process:
        print(f"Model    {checkpoint}, {model.num_parameters():,} parameters, {class_count(len(data.names))}")
        print(f"Data     {len(data.evaluation)} images\n", flush=True)
        if leakage := describe_leakage(path, data.evaluation):
            print(f"segformer: {leakage}", file=sys.stderr)
    count = evaluate_at_best_threshold if save_threshold else evaluate_in_detail
    result, accumulator = count(model, processor, data.evaluation, recipe.evaluation, names=data.names)
    if state.is_main_process:
        print(result.format_table())
        if save_threshold:
            print(write_threshold(checkpoint, processor.binary_threshold))
        report = build_report(
            result,
            accumulator,
            Segmenter(model, processor, recipe.evaluation),
            data.evaluation,
            with_background(data.names, data.palette)[1],
            title=recipe.data.title or recipe.data.source,
            split=evaluation_name(recipe.data, recipe.split),
            details={"Model": checkpoint, "Recipe": recipe.name},
            group_pattern=group_pattern,
            source=path,
        )
        print(f"\nWritten to {folder}: {', '.join(path.name for path in report.write(folder))}")
    return result


def _check_classes(checkpoint: str, config: Any, names: Sequence[str]) -> None:
    own = [config.id2label[index].strip() for index in range(config.num_labels)]
    is_unnamed = own == [f"LABEL_{index}" for index in range(len(own))]  # weights that came without names
    if own != list(names) and not (is_unnamed and len(own) == len(names)):
        raise ValueError(
            f"{checkpoint} has {class_count(len(own))}, {', '.join(own)}; expected the {len(names)} of the data: "
            f"{', '.join(names)}"
        )


__all__ = ["evaluate_recipe"]
