"""The package's one way to judge a model: predict picture by picture, count in one confusion matrix.

Whole pictures or a sliding window, mirrored and at several scales if asked for, as in the paper's code. Predictions are
compared with label maps at the maps' own size, and nothing is kept of a picture but its counts, so memory does not grow
with the data.

Axes: C bands, K classes, H W the label map's sides, h w those of the logits.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import nsmallest
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from .image_processing_segformer import SegFormerImageProcessor
from .metrics import confusion_matrix, scores
from .reading_segformer import read_mask


@dataclass(frozen=True)
class EvaluationOptions:
    """How a prediction is made.

    Args:
        window: side in pixels of a window that slides over the resized picture; 0 sees pictures whole.
        stride: step of the window in pixels; 0 is three quarters of it in multiples of 32. Without a window it means
            nothing.
        flip: predict the mirrored picture too, and average the probabilities.
        scales: sizes to predict at, as multiples of the image processor's; the probabilities are averaged.

    Raises:
        ValueError: if a value is out of range; the message names it as `evaluation.name`.

    Example:
        The paper's evaluation on Cityscapes.

        >>> from hf_segformer.evaluation import EvaluationOptions
        >>> EvaluationOptions(window=1024).step
        768
    """

    window: int = 0
    stride: int = 0
    flip: bool = False
    scales: list[float] = field(default_factory=lambda: [1.0])

    def __post_init__(self):
        if self.window and self.window < 32:
            raise ValueError(f"evaluation.window is {self.window}, but it must be at least 32, or 0 for whole pictures")
        if self.stride < 0:
            raise ValueError(
                f"evaluation.stride is {self.stride}, but it must be at least 1, or 0 to follow the window"
            )
        if 0 < self.window < self.stride:
            raise ValueError(
                f"evaluation.stride is {self.stride}, but a window of {self.window} would leave gaps: it must be at "
                f"most {self.window}"
            )
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"evaluation.scales is {self.scales}, but it must list numbers above 0")

    @property
    def step(self) -> int:
        """The window's step in pixels: `stride`, or what 0 stands for; 0 without a window."""
        if not self.window:
            return 0
        return self.stride or max(32, self.window * 3 // 4 // 32 * 32)


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

    def to_json(self, title: str, split: str, options: EvaluationOptions) -> dict[str, Any]:
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

    def _pixels(self) -> list[int]:
        return self.matrix.sum(dim=1).tolist()


def predict(
    model: PreTrainedModel,
    processor: SegFormerImageProcessor,
    image: Any,
    size: Sequence[int],
    options: EvaluationOptions | None = None,
) -> Tensor:
    """The label map of one picture.

    Windows are shifted inward at the borders, and the logits of overlapping ones averaged; mirrored pictures and scales
    are averaged as probabilities at the label map's size. The model is left as it was, in training mode or not;
    autocast is the caller's business.

    Args:
        model: a segmentation model. One label is binary: 1 where its probability is above one half.
        processor: prepares the picture.
        image: whatever the processor takes.
        size: (height, width) of the label map.
        options: how; by default whole and once.

    Returns:
        int64 (H, W) on the model's device.

    Raises:
        ValueError: if the picture does not fit the processor.
        OSError: if it can not be read.

    Example:
        >>> from PIL import Image
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
        >>> from hf_segformer.evaluation import EvaluationOptions, predict
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig(depths=[1, 1, 1, 1], num_labels=5))
        >>> processor = SegFormerImageProcessor(size={"shortest_edge": 64}, keep_ratio=True, size_divisor=32)
        >>> predict(model, processor, Image.new("RGB", (90, 60)), (60, 90), EvaluationOptions(flip=True)).shape
        torch.Size([60, 90])
    """
    options = options or EvaluationOptions()
    num_views = len(options.scales) * (2 if options.flip else 1)
    with _evaluating(model):
        views = _views(model, processor, image, options)
        if num_views == 1:
            [labels] = processor.post_process_semantic_segmentation({"logits": next(views)}, [size])
        else:
            probabilities = sum(_probabilities(logits, size) for logits in views) / num_views  # (1, K, H, W)
            logits = probabilities.logit() if probabilities.shape[1] == 1 else probabilities.log()
            [labels] = processor.post_process_semantic_segmentation({"logits": logits})
    return labels.clone()  # one from inside inference mode could not be changed in place


def evaluate(
    model: PreTrainedModel,
    processor: SegFormerImageProcessor,
    dataset: Any,
    options: EvaluationOptions | None = None,
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
            Labels are 0..K-1, and 255 does not count.
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
        >>> from hf_segformer.evaluation import evaluate
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig(depths=[1, 1, 1, 1], num_labels=2))
        >>> rows = [{"image": Image.new("RGB", (90, 60)), "label": Image.new("L", (90, 60))}]
        >>> evaluate(model, SegFormerImageProcessor(size=64), rows, progress=False).matrix.sum().item()
        5400
    """
    options, names = options or EvaluationOptions(), _class_names(model.config, names)
    num_images, start = len(dataset), time.perf_counter()
    if num_images == 0:
        raise ValueError("the data set to evaluate on is empty")
    # Not told that it is on CPUs, accelerate takes each of several processes for the only one.
    state = PartialState(cpu=not torch.accelerator.is_available())
    matrix = torch.zeros(len(names), len(names) + 1, dtype=torch.int64, device=model.device)
    worst: list[tuple[float, int]] = []
    with state.split_between_processes(list(range(num_images))) as indices:
        silent = not (progress and state.is_main_process)
        for index in tqdm(indices, desc="evaluating", leave=False, disable=silent):
            counts = _count(model, processor, dataset[index], index, options, len(names))
            matrix += counts
            score = scores(counts)["mean_iou"]
            if not math.isnan(score):  # of a picture without labels nothing is known
                worst = nsmallest(num_worst, [*worst, (score, index)])
    matrix = reduce(matrix.to(state.device), "sum").cpu()
    worst = nsmallest(num_worst, gather_object(worst))
    seconds = time.perf_counter() - start
    return Evaluation(matrix, names, tuple((index, score) for score, index in worst), seconds, num_images)


def write_json(values: dict[str, Any], path: str | Path) -> None:
    """Write a JSON file whole or not at all: what reads it never finds half of it.

    Args:
        values: without NaN, which JSON does not have.
        path: the file.

    Raises:
        ValueError: if a value is NaN.
        OSError: if the file can not be written.
    """
    path, text = Path(path), json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation and inference mode; then every module is in the mode that it was in."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in trained:
            module.training = True


def _views(
    model: PreTrainedModel, processor: SegFormerImageProcessor, image: Any, options: EvaluationOptions
) -> Iterator[Tensor]:
    """Logits (1, K, h, w) at each scale, of the picture and of its mirror image, turned back."""
    for scale in options.scales:
        pixels = _prepare(processor, image, scale).to(model.device, model.dtype)  # (1, C, H', W')
        yield _logits(model, pixels, options)
        if options.flip:
            yield _logits(model, pixels.flip(-1), options).flip(-1)


def _prepare(processor: SegFormerImageProcessor, image: Any, scale: float) -> Tensor:
    """A picture -> (1, C, H', W'), at a multiple of the processor's size."""
    if scale == 1:
        return processor(image, return_tensors="pt").pixel_values
    if processor.do_resize:
        size = {name: _scaled(side, scale) for name, side in processor.size.items()}
        return processor(image, size=size, return_tensors="pt").pixel_values
    height, width = processor(image, return_tensors="pt").pixel_values.shape[-2:]
    size = {"height": _scaled(height, scale), "width": _scaled(width, scale)}
    return processor(image, do_resize=True, size=size, return_tensors="pt").pixel_values


def _scaled(side: int, scale: float) -> int:
    return max(1, int(side * scale + 0.5))


def _logits(model: PreTrainedModel, pixels: Tensor, options: EvaluationOptions) -> Tensor:
    """Pictures (1, C, H', W') -> logits, a quarter of their sides, or their own sides where a window slides."""
    height, width = pixels.shape[-2:]
    window, step = options.window, options.step
    if not window or window >= max(height, width):
        return model(pixels).logits
    total = torch.zeros(1, model.config.num_labels, height, width, device=pixels.device)
    num_visits = torch.zeros(height, width, device=pixels.device)
    for top in _starts(height, window, step):
        for left in _starts(width, window, step):
            here = (..., slice(top, top + window), slice(left, left + window))
            total[here] += _upsample(model(pixels[here]).logits, pixels[here].shape[-2:])
            num_visits[here] += 1
    return total / num_visits


def _starts(length: int, window: int, step: int) -> list[int]:
    """Where windows begin along a side, the last one shifted inward."""
    last = max(length - window, 0)
    return [min(start, last) for start in range(0, last + step, step)]


def _upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


def _probabilities(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (1, K, h, w) -> probabilities (1, K, H, W)."""
    logits = _upsample(logits, size)
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)


def _class_names(config: Any, names: Sequence[str] | None) -> tuple[str, ...]:
    given = [config.id2label[index] for index in range(config.num_labels)] if names is None else names
    if config.num_labels == 1 and len(given) == 1:
        given = ["background", *given]
    num_classes = max(2, config.num_labels)  # of two a binary model has the logits of one
    if len(given) != num_classes:
        raise ValueError(f"{len(given)} names are given, but the model tells {num_classes} classes apart")
    return tuple(given)


def _count(
    model: PreTrainedModel,
    processor: SegFormerImageProcessor,
    row: dict[str, Any],
    index: int,
    options: EvaluationOptions,
    num_classes: int,
) -> Tensor:
    """The confusion matrix (K, K + 1) of one row."""
    try:
        labels = torch.from_numpy(read_mask(row["label"], "its label map").astype("int64"))
        prediction = predict(model, processor, row["image"], labels.shape, options)
        return confusion_matrix(prediction, labels.to(prediction.device), num_classes)
    except ValueError as error:
        raise ValueError(f"row {index} of the data: {error}") from error
    except OSError as error:
        raise OSError(f"row {index} of the data: {error}") from error


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


__all__ = ["Evaluation", "EvaluationOptions", "evaluate", "predict", "write_json"]
