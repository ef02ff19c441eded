"""The package's one way to judge a model: predict picture by picture, count in one confusion matrix.

Whole pictures or a sliding window, mirrored and at several scales if asked for, as in the paper's code. Predictions are
compared with label maps at the maps' own size, and nothing is kept of a picture but its counts, so memory does not grow
with the data.

Axes: C bands, K classes, H W the label map's sides, h w those of the logits.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..config import InferenceOptions
from ..data.torch_datasets import ignore_no_data
from ..files import write_json
from ..image_io_segformer import read_mask
from ..image_processing_segformer import SegFormerImageProcessor
from ..inference.segmenter import class_names, predict
from .metrics import confusion_matrix, scores


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What came of an evaluation.

    Attributes:
        matrix: (K, K + 1) counts of pixels as `metrics.confusion_matrix` gives them.
        names: of the K classes.
        worst: index and mean IoU of the pictures that came out worst, worst first.
        seconds: that it took.
        num_images: number of pictures.
    """

    matrix: Tensor
    names: tuple[str, ...]
    worst: tuple[tuple[int, float], ...]
    seconds: float
    num_images: int

    @property
    def metrics(self) -> dict[str, Any]:
        """The `metrics.scores` of the matrix."""
        return scores(self.matrix)

    def to_json(self, title: str, split: str, options: InferenceOptions) -> dict[str, Any]:
        """All that metrics.json says; what can not be known (an absent class) is None.

        Args:
            title: name of the data.
            split: name of its part that was evaluated.
            options: how.
        """
        metrics = self.metrics
        columns = (self.names, metrics["per_category_iou"], metrics["per_category_accuracy"], self._pixels())
        return {
            **{name: _known(metrics[name]) for name in ("mean_iou", "mean_accuracy", "overall_accuracy")},
            "classes": [
                {"name": name, "iou": _known(iou), "accuracy": _known(accuracy), "pixels": pixels}
                for name, iou, accuracy, pixels in zip(*columns, strict=True)
            ],
            "dataset": {"title": title, "split": split, "images": self.num_images},
            "method": {
                "window": options.window,
                "stride": options.step,
                "flip": options.flip,
                "scales": list(options.scales),
            },
            "seconds": round(self.seconds, 2),
        }

    def format_table(self) -> str:
        """IoU, accuracy and share of the pixels by class, in percent, for a terminal."""
        metrics, pixels = self.metrics, self._pixels()
        shares = [count / max(1, sum(pixels)) for count in pixels]
        columns = (self.names, metrics["per_category_iou"], metrics["per_category_accuracy"], shares)
        width = max(len(name) for name in ("mean", *self.names))
        lines = [f"  {'':{width}}    IoU  accuracy  pixels"]
        for name, *values in zip(*columns, strict=True):
            iou, accuracy, share = (_percent(value) for value in values)
            lines.append(f"  {name:{width}}  {iou:>5}  {accuracy:>8}  {share:>6}")
        lines.append("  " + "-" * (width + 25))
        lines.append(f"  {'mean':{width}}  {_percent(metrics['mean_iou']):>5}  {_percent(metrics['mean_accuracy']):>8}")
        lines.append(f"  {_percent(metrics['overall_accuracy'])} % of all pixels are right")
        return "\n".join(lines)

    def misses_its_class(self) -> bool:
        """Whether there are two classes, and no pixel is of the second: so are masks of 0 and 255 read by default."""
        return len(self.names) == 2 and not self.matrix[1].any()

    def _pixels(self) -> list[int]:
        return self.matrix.sum(dim=1).tolist()


def evaluate(
    model: PreTrainedModel,
    processor: SegFormerImageProcessor,
    dataset: Any,
    options: InferenceOptions | None = None,
    *,
    names: Sequence[str] | None = None,
    num_worst: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Predict every picture and compare with its label map, at the map's own size.

    Several processes (torchrun, `accelerate launch`) share the pictures, and every one of them gets the whole result,
    which is exactly that of one process.

    Args:
        model: see `predict`; a binary one is judged on two classes.
        processor: prepares pictures. Label maps are taken as they are, whatever its `do_reduce_labels`.
        dataset: rows with `image` and `label`, with a length and indices: a `datasets.Dataset`, a list of dicts.
            Labels are 0..K-1, and the model's `semantic_loss_ignore_index` does not count.
        options: how to predict; by default whole and once.
        names: of the classes; by default the model's. To the one of a binary model `background` is added.
        num_worst: how many of the worst pictures to name.
        progress: whether to show a bar.

    Returns:
        the `Evaluation`.

    Raises:
        ValueError: if there are no pictures, a row does not fit (the message gives its index), or names do not.
        OSError: if a file can not be read.

    Example:
        >>> from PIL import Image
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
        >>> from hf_segformer.evaluation.evaluate import evaluate
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig(depths=[1, 1, 1, 1], num_labels=2))
        >>> rows = [{"image": Image.new("RGB", (90, 60)), "label": Image.new("L", (90, 60))}]
        >>> evaluate(model, SegFormerImageProcessor(size=64), rows, progress=False).matrix.sum().item()
        5400
    """
    options, names = options or InferenceOptions(), class_names(model.config, names)
    num_images, start = len(dataset), time.perf_counter()
    if num_images == 0:
        raise ValueError("the data set to evaluate on is empty")
    # Not told that it is on CPUs, accelerate takes each of several processes for the only one.
    state = PartialState(cpu=not torch.accelerator.is_available())
    matrix = torch.zeros(len(names), len(names) + 1, dtype=torch.int64, device=model.device)
    worst: list[tuple[float, int]] = []
    with state.split_between_processes(list(range(num_images))) as indices:
        silent = not (progress and state.is_main_process)
        for index in tqdm(indices, desc="inference_mode_of", leave=False, disable=silent):
            counts = _count(model, processor, dataset[index], index, options, len(names))
            matrix += counts
            score = scores(counts)["mean_iou"]
            if not math.isnan(score):  # of a picture without labels nothing is known
                worst = nsmallest(num_worst, [*worst, (score, index)])
    matrix = reduce(matrix.to(state.device), "sum").cpu()
    worst = nsmallest(num_worst, gather_object(worst))
    seconds = time.perf_counter() - start
    return Evaluation(matrix, names, tuple((index, score) for score, index in worst), seconds, num_images)


def _count(
    model: PreTrainedModel,
    processor: SegFormerImageProcessor,
    row: dict[str, Any],
    index: int,
    options: InferenceOptions,
    num_classes: int,
) -> Tensor:
    """The confusion matrix (K, K + 1) of one row."""
    try:
        ignore_index = model.config.semantic_loss_ignore_index
        mask = read_mask(row["label"], "its mask").astype("int64")
        labels = torch.from_numpy(ignore_no_data(mask, row["image"], ignore_index))
        prediction = predict(model, processor, row["image"], labels.shape, options)
        return confusion_matrix(prediction, labels.to(prediction.device), num_classes, ignore_index)
    except ValueError as error:
        raise ValueError(f"row {index} of the data: {error}") from error
    except OSError as error:
        raise OSError(f"row {index} of the data: {error}") from error


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


__all__ = ["Evaluation", "InferenceOptions", "evaluate", "predict", "write_json"]
