"""Report of a run: progress bar, evaluation report and figures."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel, ProgressCallback

from ..data.labeled import evaluation_name
from ..data.splits import count_division
from ..evaluation.accumulator import MetricAccumulator
from ..evaluation.detailed import build_report
from ..evaluation.evaluate import Evaluation
from ..evaluation.metrics import confusion_matrix, scores
from ..evaluation.report import write_file
from ..files import csv_text
from ..inference.segmenter import Segmenter, predict
from ..progress import Progress
from ..visualization import Color, Stretch, colorize, displayable, figure
from .data import Data
from .recipe import Recipe

CONFUSION_FILE = "confusion.csv"  # counts of pixels: a row for each class of the masks
_NUM_DRAWN = 4

Sample = tuple[Image.Image | np.ndarray, np.ndarray, np.ndarray]  # image, mask and prediction (H, W)


class ProgressBar(ProgressCallback):
    """Progress of a training: a bar that ends in the newest numbers, or a line a minute where stderr is no terminal."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar, or begin to print lines."""
        self.lines: Progress | None = None
        if sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)
        elif state.is_world_process_zero:
            self.lines = Progress("train", state.max_steps, "steps", initial=state.global_step).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step."""
        if self.lines is None:
            super().on_step_end(args, state, control, **kwargs)
        else:
            self.lines.update()

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Show a bar for evaluations, too."""
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.lines is None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the loss, and mean IoU or accuracy once it is known."""
        if self.training_bar is None or not logs:
            return
        shown = {"loss": logs.get("loss"), "mIoU": logs.get("eval_mean_iou"), "top-1": logs.get("eval_top1")}
        self.numbers = {**getattr(self, "numbers", {}), **{k: f"{v:.3f}" for k, v in shown.items() if v is not None}}
        self.training_bar.set_postfix(self.numbers)


def write_evaluation(
    evaluation: Evaluation, accumulator: MetricAccumulator, model: Any, data: Data, recipe: Recipe, folder: Path
) -> None:
    """Write the report of `segformer evaluate`, and `confusion.csv`.

    Args:
        evaluation: of the evaluation data.
        accumulator: its counts.
        model: predicts the images of the report's sheets.
        data: the images and masks.
        recipe: of the run.
        folder: of the run.

    Raises:
        OSError: if they cannot be written.
    """
    build_report(
        evaluation,
        accumulator,
        Segmenter(model, data.processor, recipe.evaluation),
        data.evaluation,
        with_background(data.names, data.palette)[1],
        title=recipe.data.title or recipe.data.source,
        split=evaluation_name(recipe.data, recipe.split),
        details={"Recipe": recipe.name},
    ).write(folder)
    header = ["mask", *evaluation.names, "no class"]
    rows = zip(evaluation.names, evaluation.matrix.tolist(), strict=True)
    write_file(folder / CONFUSION_FILE, csv_text([header, *([name, *counts] for name, counts in rows)]))


def split_record(recipe: Recipe, data: Data) -> dict[str, Any]:
    """Describe how evaluation images were held out of the training split; empty where they have a split of their own.

    Groups are counted and not named, except those that the recipe names: a pattern may find patients.
    """
    split, share = recipe.split, recipe.data.eval_share
    if not (share or split.holds_out):
        return {}
    fold = {"folds": split.folds, "fold": split.fold} if split.folds else {}
    kind = {"hold_out": list(split.hold_out), **fold, "share": share}
    groups = {"group": split.group, "column": split.column}
    known = {key: value for key, value in {**kind, **groups}.items() if value}
    return known | fold | {"seed": recipe.data.seed, **count_division(data.train, data.evaluation)}


def class_count(number: int) -> str:
    """Return "1 class" or "N classes"."""
    return "1 class" if number == 1 else f"{number} classes"


def spread(length: int, count: int = _NUM_DRAWN) -> list[int]:
    """Return up to `count` indices, spread evenly."""
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()


def predict_some(model: PreTrainedModel, data: Data) -> list[Sample]:
    """Predict a few images of the evaluation data, whole and once."""
    rows = [data.evaluation[index] for index in spread(len(data.evaluation))]
    return [
        (row["image"], row["label"], predict(model, data.processor, row["image"], row["label"].shape).cpu().numpy())
        for row in rows
    ]


def draw_predictions(samples: Sequence[Sample], names: Sequence[str], palette: Sequence[Color]) -> Image.Image:
    """Draw image, mask and prediction in a row for each sample, with the share of correct pixels below.

    Args:
        samples: one for each row.
        names: names of the K classes.
        palette: one colour a class.
    """
    names, palette = with_background(names, palette)
    stretch = Stretch.of_images(image for image, _, _ in samples)
    rows, captions = [], []
    for image, mask, prediction in samples:
        rows.append([displayable(image, stretch), colorize(mask, palette), colorize(prediction, palette)])
        share = scores(confusion_matrix(prediction, mask, len(names)))["overall_accuracy"]
        captions.append(f"{100 * share:.1f} % of the pixels are correct")
    return figure(rows, ("image", "mask", "prediction"), names, palette, captions)


def with_background(names: Sequence[str], palette: Sequence[Color]) -> tuple[list[str], list[Color]]:
    """Return names and colours of the labels; a single class has two labels, 0 and 1."""
    if len(names) == 1:
        return ["background", *names], [(214, 209, 196), *palette]
    return [*names], [*palette]


__all__ = [
    "CONFUSION_FILE",
    "ProgressBar",
    "Sample",
    "class_count",
    "draw_predictions",
    "predict_some",
    "split_record",
    "spread",
    "with_background",
    "write_evaluation",
]
