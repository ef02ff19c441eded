"""Evaluation of a checkpoint on the evaluation data of a recipe: a table by class, metrics.json and two figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from transformers import logging

from ..conversion.checkpoints import locate
from ..conversion.loading import load_segmentation, own_processor
from ..evaluation.evaluate import Evaluation, evaluate
from ..inference.segmenter import predict
from ..visualization import Stretch, displayable, figure, overlay
from .data import Data, load_data
from .recipe import Recipe
from .report import with_background, write_evaluation

_NUM_WORST = 10


def evaluate_recipe(checkpoint: str, recipe: Recipe, folder: Path, device: torch.device | None = None) -> Evaluation:
    """Print the table, and write metrics.json, confusion.png and worst.png.

    Several processes (torchrun, `accelerate launch`) share the images; the main one prints and writes.

    Args:
        checkpoint: a folder, a file of weights or a Hub repository.
        recipe: its evaluation data and `[evaluation]` are used.
        folder: where to write.
        device: by default the accelerator of this process if there is one, else the CPU.

    Returns:
        the result, in every process that of all images.

    Raises:
        ValueError: if the checkpoint holds no segmentation model, or its classes are not those of the data.
        OSError: if it or the data cannot be read, or the results cannot be written.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    logging.disable_progress_bar()
    path = locate(checkpoint)
    model, _ = load_segmentation(path)
    processor = own_processor(path, model)
    data = load_data(recipe.data, model.config.num_channels)
    _check_classes(checkpoint, model.config, data.names)
    folder.mkdir(parents=True, exist_ok=True)
    model, processor = model.to(device or state.device), processor or data.processor
    if state.is_main_process:
        print(f"Model    {checkpoint}, {model.num_parameters():,} parameters, {len(data.names)} classes")
        print(f"Data     {len(data.evaluation)} images\n", flush=True)
    result = evaluate(model, processor, data.evaluation, recipe.evaluation, names=data.names, num_worst=_NUM_WORST)
    if state.is_main_process:
        print(result.format_table())
        write_evaluation(result, recipe, folder)
        _draw_worst(model, processor, data, recipe, result).save(folder / "worst.png")
        print(f"\nWritten to {folder}: metrics.json, confusion.png, worst.png")
    return result


def _check_classes(checkpoint: str, config: Any, names: Sequence[str]) -> None:
    own = [config.id2label[index].strip() for index in range(config.num_labels)]
    is_unnamed = own == [f"LABEL_{index}" for index in range(len(own))]  # weights that came without names
    if own != list(names) and not (is_unnamed and len(own) == len(names)):
        raise ValueError(
            f"{checkpoint} has {len(own)} classes, {', '.join(own)}; expected the {len(names)} of the data: "
            f"{', '.join(names)}"
        )


def _draw_worst(model: Any, processor: Any, data: Data, recipe: Recipe, result: Evaluation) -> Image.Image:
    """A figure of the worst images: the image, mask and prediction laid over it, mean IoU below."""
    names, palette = with_background(data.names, data.palette)
    rows, captions, stretch = [], [], Stretch.of_processor(processor)
    for index, score in result.worst:
        row = data.evaluation[index]
        mask, image = np.asarray(row["label"]), displayable(row["image"], stretch)
        prediction = predict(model, processor, row["image"], mask.shape, recipe.evaluation).cpu()
        rows.append([image, overlay(image, mask, palette), overlay(image, prediction, palette)])
        captions.append(f"{data.describe('evaluation', index)}: mean IoU {100 * score:.1f} %")
    return figure(rows, ("image", "mask", "prediction"), names, palette, captions, panel_height=200)


__all__ = ["evaluate_recipe"]
