"""One way of predicting for the whole package: whole pictures or windows, mirrored and at several scales.

A picture is prepared once for each scale, which needs no model and may go on in other threads, and then predicted alone
or in a batch of others of the same prepared size.

Axes: B pictures, C bands, K classes, H W the label map's sides, H' W' the prepared picture's, h w those of the logits.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..config import InferenceOptions
from ..image_processing_segformer import SegFormerImageProcessor


def predict(
    model: PreTrainedModel,
    processor: SegFormerImageProcessor,
    image: Any,
    size: Sequence[int],
    options: InferenceOptions | None = None,
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
        >>> from hf_segformer.config import InferenceOptions
        >>> from hf_segformer.inference.segmenter import predict
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig(depths=[1, 1, 1, 1], num_labels=5))
        >>> processor = SegFormerImageProcessor(size={"shortest_edge": 64}, keep_ratio=True, size_divisor=32)
        >>> predict(model, processor, Image.new("RGB", (90, 60)), (60, 90), InferenceOptions(flip=True)).shape
        torch.Size([60, 90])
    """
    options = options or InferenceOptions()
    views = prepare_views(processor, image, options)
    return label_maps(model, processor, views, [size], options)[0]


def prepare_views(
    processor: SegFormerImageProcessor, image: Any, options: InferenceOptions, data_format: str | None = None
) -> list[Tensor]:
    """A picture -> (1, C, H', W') for each scale, at that multiple of the processor's size.

    Args:
        processor: prepares the picture.
        image: whatever the processor takes.
        options: say which scales.
        data_format: `"channels_first"` or `"channels_last"`, where an array's shape does not tell.

    Raises:
        ValueError: if the picture does not fit the processor.
        OSError: if it can not be read.
    """
    return [_prepare(processor, image, scale, data_format) for scale in options.scales]


def label_maps(
    model: PreTrainedModel,
    processor: SegFormerImageProcessor,
    views: Sequence[Tensor],
    sizes: Sequence[Sequence[int]],
    options: InferenceOptions,
) -> list[Tensor]:
    """The label maps of a batch, int64 (H, W) each, on the model's device.

    Args:
        model: see `predict`.
        processor: makes label maps of logits.
        views: the batch (B, C, H', W') at each scale.
        sizes: (height, width) of each label map.
        options: how.
    """
    with inference_mode_of(model):
        if _num_views(options) == 1:
            [logits] = _logits_of_views(model, views, options)
            found = processor.post_process_semantic_segmentation({"logits": logits}, sizes)
        else:
            found = [_labels(processor, each) for each in _mean_probabilities(model, views, sizes, options)]
    return [labels.clone() for labels in found]  # one from inside inference mode could not be changed in place


def labels_and_scores(
    model: PreTrainedModel,
    processor: SegFormerImageProcessor,
    views: Sequence[Tensor],
    sizes: Sequence[Sequence[int]],
    options: InferenceOptions,
) -> list[tuple[Tensor, Tensor]]:
    """The same label maps with the probabilities, float32 (K, H, W), that they come from; a binary model has two."""
    with inference_mode_of(model):
        if _num_views(options) == 1:
            [logits] = _logits_of_views(model, views, options)
            found = processor.post_process_semantic_segmentation({"logits": logits}, sizes)
            means = list(_mean([logits], sizes))
        else:
            means = list(_mean_probabilities(model, views, sizes, options))
            found = [_labels(processor, each) for each in means]
        pairs = zip(found, means, strict=True)
        return [(labels.clone(), _of_every_class(scores[0]).clone()) for labels, scores in pairs]


def class_names(config: Any, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the classes that a model tells apart: a binary one's are background and its own.

    Args:
        config: of the model.
        names: by default the config's.

    Raises:
        ValueError: if there are more names or fewer than classes.
    """
    given = [config.id2label[index] for index in range(config.num_labels)] if names is None else names
    if config.num_labels == 1 and len(given) == 1:
        given = ["background", *given]
    num_classes = max(2, config.num_labels)  # of two a binary model has the logits of one
    if len(given) != num_classes:
        raise ValueError(f"{len(given)} names are given, but the model tells {num_classes} classes apart")
    return tuple(given)


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with the class's number where one stands for several."""
    return [name if names.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(names)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of its accelerator was too small; on a CPU PyTorch says so by its text."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def inference_mode_of(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation and inference mode; then every module is in the mode that it was in."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in trained:
            module.training = True


def _num_views(options: InferenceOptions) -> int:
    return len(options.scales) * (2 if options.flip else 1)


def _logits_of_views(model: PreTrainedModel, views: Sequence[Tensor], options: InferenceOptions) -> Iterator[Tensor]:
    """Logits (B, K, h, w) at each scale, of the pictures and of their mirror images, turned back."""
    for view in views:
        pixels = view.to(model.device, model.dtype)
        yield _logits(model, pixels, options)
        if options.flip:
            yield _logits(model, pixels.flip(-1), options).flip(-1)


def _mean_probabilities(
    model: PreTrainedModel, views: Sequence[Tensor], sizes: Sequence[Sequence[int]], options: InferenceOptions
) -> Iterator[Tensor]:
    """Probabilities (1, K, H, W) of each picture, averaged over the views."""
    logits: Iterable[Tensor] = _logits_of_views(model, views, options)
    yield from _mean(logits if len(sizes) == 1 else list(logits), sizes, _num_views(options))


def _mean(logits: Iterable[Tensor], sizes: Sequence[Sequence[int]], num_views: int = 1) -> Iterator[Tensor]:
    for index, size in enumerate(sizes):
        yield sum(_probabilities(each[index : index + 1], size) for each in logits) / num_views


def _labels(processor: SegFormerImageProcessor, probabilities: Tensor) -> Tensor:
    """Probabilities (1, K, H, W) -> labels (H, W)."""
    logits = probabilities.logit() if probabilities.shape[1] == 1 else probabilities.log()
    return processor.post_process_semantic_segmentation({"logits": logits})[0]


def _of_every_class(scores: Tensor) -> Tensor:
    """Probabilities (K, H, W), those of the background too where a model knows one class."""
    return torch.cat([1 - scores, scores]) if len(scores) == 1 else scores


def _prepare(processor: SegFormerImageProcessor, image: Any, scale: float, data_format: str | None) -> Tensor:
    """A picture -> (1, C, H', W'), at a multiple of the processor's size."""

    def pixels(**overrides: Any) -> Tensor:
        return processor(image, return_tensors="pt", input_data_format=data_format, **overrides).pixel_values

    if scale == 1:
        return pixels()
    if processor.do_resize:
        return pixels(size={name: _scaled(side, scale) for name, side in processor.size.items()})
    height, width = pixels().shape[-2:]
    return pixels(do_resize=True, size={"height": _scaled(height, scale), "width": _scaled(width, scale)})


def _scaled(side: int, scale: float) -> int:
    return max(1, int(side * scale + 0.5))


def _logits(model: PreTrainedModel, pixels: Tensor, options: InferenceOptions) -> Tensor:
    """Pictures (B, C, H', W') -> logits, a quarter of their sides, or their own sides where a window slides."""
    height, width = pixels.shape[-2:]
    window, step = options.sliding_window, options.effective_stride
    if not window or window >= max(height, width):
        return model(pixels).logits
    total = torch.zeros(len(pixels), model.config.num_labels, height, width, device=pixels.device)
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


__all__ = [
    "InferenceOptions",
    "class_names",
    "distinct",
    "inference_mode_of",
    "is_out_of_memory",
    "label_maps",
    "labels_and_scores",
    "predict",
    "prepare_views",
]
