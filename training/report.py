"""What a run tells: a progress bar, IoU by class, and a picture of what the model sees."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import EvalPrediction, ProgressCallback

from hf_segformer.metrics import MeanIoU, confusion_matrix, scores
from hf_segformer.visualize import Color, colorize, figure


def predict_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits (B, K, h, w) -> class ids (B, H, W) in the labels' size, which the Trainer keeps in place of logits."""
    return F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False).argmax(dim=1)


class SegmentationMetrics:
    """`compute_metrics` for a Trainer with `batch_eval_metrics`: counts batch by batch, then gives numbers by class.

    Args:
        names: of the K classes.
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, names: Sequence[str], ignore_index: int = 255):
        self.names = names
        self.metric = MeanIoU(len(names), ignore_index)

    def __call__(self, evaluation: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Add a batch; after the last, return `mean_iou`, ..., `iou_NAME` and `accuracy_NAME` of each class."""
        self.metric.add_batch(predictions=evaluation.predictions, references=evaluation.label_ids)
        if not compute_result:
            return {}
        results = self.metric.compute()
        for kind in ("iou", "accuracy"):
            values = results.pop(f"per_category_{kind}")
            results |= {f"{kind}_{name}": value for name, value in zip(self.names, values, strict=True)}
        return results


def format_table(metrics: dict[str, float], names: Sequence[str]) -> str:
    """Evaluation metrics, as the Trainer returns them, as a table of percent by class."""
    rows = [(name, metrics[f"eval_iou_{name}"], metrics[f"eval_accuracy_{name}"]) for name in names]
    rows.append(("mean", metrics["eval_mean_iou"], metrics["eval_mean_accuracy"]))
    width = max(len(name) for name, *_ in rows)
    lines = [f"  {'':{width}}    IoU  accuracy"]
    lines += [f"  {name:{width}}  {_percent(iou):>5}  {_percent(accuracy):>8}" for name, iou, accuracy in rows]
    lines.insert(-1, "  " + "-" * (width + 17))
    return "\n".join([*lines, f"  {_percent(metrics['eval_overall_accuracy'])} % of all pixels are right"])


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.1f}"


class ProgressBar(ProgressCallback):
    """The Trainer's bar with the newest numbers at its end, where the original prints a dictionary for each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the loss, and mean IoU once there is one."""
        if self.training_bar is None or not logs:
            return
        shown = {"loss": logs.get("loss"), "mIoU": logs.get("eval_mean_iou")}
        self.numbers = {**getattr(self, "numbers", {}), **{k: f"{v:.3f}" for k, v in shown.items() if v is not None}}
        self.training_bar.set_postfix(self.numbers)


def draw_predictions(
    samples: Sequence[tuple[Image.Image, np.ndarray, np.ndarray]], names: Sequence[str], palette: Sequence[Color]
) -> Image.Image:
    """A figure with picture, truth and prediction in a row, and the share of right pixels below.

    Args:
        samples: picture, true and predicted label map (H, W) of each row.
        names: of the K classes.
        palette: one colour a class.
    """
    rows, captions = [], []
    for image, truth, prediction in samples:
        rows.append([image, colorize(truth, palette), colorize(prediction, palette)])
        share = scores(confusion_matrix(prediction, truth, len(names)))["overall_accuracy"]
        captions.append(f"{_percent(share)} % of the pixels are right")
    return figure(rows, ("picture", "truth", "prediction"), names, palette, captions)
