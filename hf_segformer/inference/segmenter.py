"""Inference engine of the package: preprocessing, logits and segmentation maps under one set of options.

The predictor, evaluation, batch inference, large images and the browser demo each hold a `Segmenter`. An image is
prepared once for each scale, which needs no model and may run in other threads; the network then sees it alone or in a
batch of images of the same prepared size.

Axes: B images, C channels, K classes, H W sides of the segmentation map, H' W' sides of the prepared image, h w sides
of the logits.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import InferenceOptions
from ..configuration_segformer import default_ignore_index
from ..files import BACKGROUND
from ..image_processing_segformer import SegFormerImageProcessor
from ..upsampling_segformer import upsample_argmax
from .engines import TORCH, with_engine
from .ensemble import members_of
from .tiling import CELL

logger = logging.get_logger(__name__)


class Confidence(NamedTuple):
    """The most probable class of each pixel, whatever the threshold of a binary model.

    Attributes:
        winner: int64 (H, W), the class.
        probability: float32 (H, W), its probability.
    """

    winner: Tensor
    probability: Tensor


class Segmenter:
    """A segmentation model with its image processor and the options of inference.

    The network computes in the dtype of its weights. Where `options.dtype` asks for another one, and where the
    weights are in half precision on a CPU, the segmenter computes by a copy of the model; the model that is passed in
    is never changed, and stays in training mode if it is in it.

    Args:
        model: a segmentation model, or an `Ensemble` of several. One label is binary: class 1 where its probability is
            above the processor's `binary_threshold`.
        processor: prepares images.
        options: see `InferenceOptions`; by default images are seen whole and once.
        engine: what computes the network, one of `engines.engine_names`.

    Attributes:
        model: the model in PyTorch, or its copy.
        network: what computes the logits: the model, or that of the engine.
        names: names of the classes; a model with one label has two, background and its own.
        ignore_index: label of ignored pixels.

    Raises:
        ValueError: if the model cannot compute in `options.dtype`, or by the engine.

    Examples:
        >>> from PIL import Image
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
        >>> from hf_segformer.config import InferenceOptions
        >>> from hf_segformer.inference.segmenter import Segmenter
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig(depths=[1, 1, 1, 1], num_labels=5))
        >>> processor = SegFormerImageProcessor(size={"shortest_edge": 64}, keep_ratio=True, size_divisor=32)
        >>> segmenter = Segmenter(model, processor, InferenceOptions(flip=True))
        >>> [segmentation] = segmenter.predict(segmenter.preprocess(Image.new("RGB", (90, 60))), [(60, 90)])
        >>> segmentation.shape
        torch.Size([60, 90])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: SegFormerImageProcessor,
        options: InferenceOptions | None = None,
        engine: str = TORCH,
    ):
        self.options = options or InferenceOptions()
        self.model, self.processor = _in_dtype(model, self.options.dtype), processor
        self.network = with_engine(self.model, engine)
        self.names = class_names(model.config)
        default = default_ignore_index(len(self.names))
        self.ignore_index: int = getattr(model.config, "semantic_loss_ignore_index", default)

    @property
    def batch_size(self) -> int:
        """Largest number of images at once; 1 with a sliding window, whose logits are as large as the image."""
        return 1 if self.options.sliding_window else self.options.batch_size

    @property
    def tile_batch_size(self) -> int:
        """Most tiles that the network sees at once: one on a CPU, where a tile occupies all cores."""
        return 1 if self.model.device.type == "cpu" else self.options.batch_size

    def preprocess(self, image: Any, data_format: str | None = None) -> list[Tensor]:
        """Prepare an image: (1, C, H', W') for each scale, at that multiple of the processor's size.

        Args:
            image: any image that the processor takes.
            data_format: `"channels_first"` or `"channels_last"`, for an array whose shape is ambiguous.

        Raises:
            ValueError: if the image does not fit the processor.
            OSError: if it cannot be read.
        """
        return [self._prepare(image, scale, data_format) for scale in self.options.scales]

    def prepared_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """(H', W') at each scale of an image of this size, without reading it."""
        processor, sizes = self.processor, []
        for scale in self.options.scales:
            if processor.do_resize and scale != 1:
                scaled = deepcopy(processor)
                scaled.size = {name: _scaled(side, scale) for name, side in processor.size.items()}
                sizes.append(scaled._target_size(height, width))
            else:
                new_height, new_width = processor._target_size(height, width)
                sizes.append((_scaled(new_height, scale), _scaled(new_width, scale)))
        return sizes

    def preprocess_tiles(self, tiles: Sequence[np.ndarray]) -> list[Tensor]:
        """Prepare tiles (C, H, W) of one size at their own resolution: (B, C, H', W') for each scale."""
        height, width = tiles[0].shape[1:]
        sizes = [(max(1, round(height * scale)), max(1, round(width * scale))) for scale in self.options.scales]
        return [
            self.processor(
                list(tiles),
                do_resize=scale != 1,
                size={"height": size[0], "width": size[1]},
                keep_ratio=False,
                size_divisor=None,
                input_data_format="channels_first",
                return_tensors="pt",
            ).pixel_values
            for scale, size in zip(self.options.scales, sizes, strict=True)
        ]

    def logits(self, views: Sequence[Tensor]) -> Iterator[Tensor]:
        """Logits (B, K, h, w) at each scale, each followed by those of the mirrored images if `options.flip`.

        Of an ensemble those of each member, in order, at each scale.

        Their sides are a quarter of the prepared ones, or the prepared ones where a window slides.

        Args:
            views: the batch (B, C, H', W') at each scale, from `preprocess`.
        """
        for view in views:
            pixels = view.to(self.model.device, self.model.dtype)
            for member in members_of(self.network):
                yield self._slide(member, pixels)
                if self.options.flip:
                    yield self._slide(member, pixels.flip(-1)).flip(-1)

    def predict(self, views: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Segmentation maps of a batch, int64 (H, W) each, on the model's device.

        Logits of overlapping windows are averaged; mirrored images and scales are averaged as probabilities at the
        size of the map.

        Args:
            views: see `logits`.
            sizes: (height, width) of each map.
        """
        with inference_mode_of(self.model):
            if self._num_views == 1:
                [only] = self.logits(views)
                found = self.processor.post_process_semantic_segmentation({"logits": only}, sizes)
            else:
                logits: Iterable[Tensor] = self.logits(views)
                logits = logits if len(sizes) == 1 else list(logits)
                found = [self._best_class(self._mean(logits, index, size)) for index, size in enumerate(sizes)]
        return [classes.clone() for classes in found]  # a tensor of inference mode cannot be modified in place

    def predict_probabilities(
        self, views: Sequence[Tensor], sizes: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Segmentation maps as `predict` returns them, each with its probabilities, float32 (K, H, W).

        The network sees the whole batch; an image's logits are upsampled in its turn, so that memory holds the
        probabilities of one image: 210 MB for 150 classes at 512x683. A binary model has those of two classes.
        """
        with inference_mode_of(self.model):
            logits: Iterable[Tensor] = self.logits(views)
            if len(sizes) > 1 or self._num_views == 1:  # else each view is computed, added and dropped below
                logits = list(logits)
            maps: list[Tensor] | None = None
            if self._num_views == 1:
                [only] = logits
                maps = self.processor.post_process_semantic_segmentation({"logits": only}, sizes)
        for index, size in enumerate(sizes):
            with inference_mode_of(self.model):
                mean = self._mean(logits, index, size)
                classes = self._best_class(mean) if maps is None else maps[index]
            yield classes.clone(), _of_every_class(mean[0]).clone()  # of inference mode, see `predict`

    def predict_confidences(
        self, views: Sequence[Tensor], sizes: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Tensor, Confidence]]:
        """Segmentation maps as `predict` returns them, each with the most probable class and its probability.

        Of one view they are computed in bands, which takes a seventh of the time and 1/K of the memory of
        `predict_probabilities` for 150 classes.
        """
        if self._num_views > 1:
            for classes, probabilities in self.predict_probabilities(views, sizes):
                probability, winner = probabilities.max(dim=0)
                yield classes, Confidence(winner, probability)
            return
        with inference_mode_of(self.model):
            [logits] = self.logits(views)
            maps = self.processor.post_process_semantic_segmentation({"logits": logits}, sizes)
        for each, size, classes in zip(logits, sizes, maps, strict=True):
            with inference_mode_of(self.model):
                winner, probability = upsample_argmax(each[None].float(), size, with_probability=True)
            yield classes.clone(), Confidence(winner[0].clone(), probability[0].clone())

    def tile_logits(self, tiles: Sequence[np.ndarray]) -> Tensor:
        """Logits (B, K, h, w) of tiles (C, H, W) of one size, on the grid of a quarter of their sides.

        Of several views they are the logarithm of the mean probabilities, up to a constant. Those of a binary model are
        relative to its threshold: above 0 is foreground.
        """
        grid = [-(-side // CELL) for side in tiles[0].shape[1:]]
        with inference_mode_of(self.model):
            views = [logits.float() for logits in self.logits(self.preprocess_tiles(tiles))]
            shift = self.processor.binary_logit if views[0].shape[1] == 1 else 0.0
            if len(views) == 1:
                return views[0] - shift if shift else views[0]
            sized = [F.interpolate(view, size=grid, mode="bilinear", align_corners=False) for view in views]
            # Logarithms, since the logit of a probability that is rounded to 0 or 1 is infinite, and upsampled next to
            # others it is NaN, which wins.
            if sized[0].shape[1] == 1:
                logits = torch.stack(sized)
                return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0) - shift
            return torch.stack([view.log_softmax(dim=1) for view in sized]).logsumexp(0)

    @property
    def _num_views(self) -> int:
        return len(self.options.scales) * (2 if self.options.flip else 1) * len(members_of(self.model))

    def _prepare(self, image: Any, scale: float, data_format: str | None) -> Tensor:
        processor = self.processor

        def pixels(**overrides: Any) -> Tensor:
            return processor(image, return_tensors="pt", input_data_format=data_format, **overrides).pixel_values

        if scale == 1:
            return pixels()
        if processor.do_resize:
            return pixels(size={name: _scaled(side, scale) for name, side in processor.size.items()})
        height, width = pixels().shape[-2:]
        return pixels(do_resize=True, size={"height": _scaled(height, scale), "width": _scaled(width, scale)})

    def _slide(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Images (B, C, H', W') -> logits; windows are shifted inward at the borders, and overlapping ones averaged."""
        height, width = pixels.shape[-2:]
        window, stride = self.options.sliding_window, self.options.effective_stride
        if not window or window >= max(height, width):
            return model(pixels).logits
        total = torch.zeros(len(pixels), self.model.config.num_labels, height, width, device=pixels.device)
        num_visits = torch.zeros(height, width, device=pixels.device)
        for top in _window_starts(height, window, stride):
            for left in _window_starts(width, window, stride):
                here = (..., slice(top, top + window), slice(left, left + window))
                total[here] += _upsample(model(pixels[here]).logits, pixels[here].shape[-2:])
                num_visits[here] += 1
        return total / num_visits

    def _mean(self, logits: Iterable[Tensor], index: int, size: Sequence[int]) -> Tensor:
        """Probabilities (1, K, H, W) of an image of the batch, averaged over the views."""
        return sum(_probabilities(each[index : index + 1], size) for each in logits) / self._num_views

    def _best_class(self, probabilities: Tensor) -> Tensor:
        """Probabilities (1, K, H, W) -> classes (H, W)."""
        logits = probabilities.logit() if probabilities.shape[1] == 1 else probabilities.log()
        return self.processor.post_process_semantic_segmentation({"logits": logits})[0]


def predict(
    model: PreTrainedModel,
    processor: SegFormerImageProcessor,
    image: Any,
    size: Sequence[int],
    options: InferenceOptions | None = None,
) -> Tensor:
    """Segmentation map of one image, int64 (H, W) on the model's device.

    Args:
        model: see `Segmenter`.
        processor: see `Segmenter`.
        image: any image that the processor takes.
        size: (height, width) of the map.
        options: see `Segmenter`.

    Raises:
        ValueError: if the image does not fit the processor.
        OSError: if it cannot be read.
    """
    segmenter = Segmenter(model, processor, options)
    return segmenter.predict(segmenter.preprocess(image), [size])[0]


def class_names(config: Any, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the classes that a model distinguishes; those of a binary model are background and its own.

    Args:
        config: the model's configuration.
        names: names to use instead of the configuration's.

    Raises:
        ValueError: if the number of names is not that of the classes.
    """
    given = [config.id2label[index] for index in range(config.num_labels)] if names is None else names
    if config.num_labels == 1 and len(given) == 1:
        given = [BACKGROUND, *given]
    num_classes = max(2, config.num_labels)  # a binary model has one logit for its two classes
    if len(given) != num_classes:
        raise ValueError(f"names has {len(given)} entries; expected one for each of the model's {num_classes} classes")
    return tuple(given)


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, with the index of the class added where several classes share one; no two results are equal."""
    used = {name for name in names if names.count(name) == 1}
    unique = []
    for index, name in enumerate(names):
        if names.count(name) > 1:
            name = f"{name} ({index})"
            while name in used:
                name = f"{name} ({index})"
            used.add(name)
        unique.append(name)
    return unique


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the machine or its accelerator ran out of memory; PyTorch on a CPU says so by its text alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def inference_mode_of(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation and inference mode within the block; every module then returns to the mode that it was in."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in trained:
            module.training = True


def _in_dtype(model: PreTrainedModel, dtype: str | None) -> PreTrainedModel:
    """The model, or where it computes in another dtype than it should, a copy."""
    if dtype is not None:
        wanted = getattr(torch, dtype)
    elif model.device.type == "cpu" and model.dtype in (torch.float16, torch.bfloat16):
        wanted, held = torch.float32, str(model.dtype).removeprefix("torch.")
        logger.warning_once(
            f"The weights are {held}, which is several times slower than float32 on a CPU: inference uses a float32 "
            "copy of them. Load the model with dtype=torch.float32 to avoid the copy, or set "
            f"InferenceOptions(dtype={held!r}) to compute in {held}."
        )
    else:
        wanted = model.dtype
    if model.dtype == wanted:
        return model
    copied = deepcopy(model).to(wanted)
    if copied.dtype != wanted:
        raise ValueError(f"dtype is {dtype}; expected {str(model.dtype).removeprefix('torch.')}, the model's only type")
    return copied


def _of_every_class(probabilities: Tensor) -> Tensor:
    """Probabilities (K, H, W), of a binary model those of the background, too."""
    return torch.cat([1 - probabilities, probabilities]) if len(probabilities) == 1 else probabilities


def _scaled(side: int, scale: float) -> int:
    return max(1, int(side * scale + 0.5))


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    """Starts of the windows along a side; the last one is shifted inward."""
    last = max(length - window, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def _upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


def _probabilities(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (1, K, h, w) -> probabilities (1, K, H, W)."""
    logits = _upsample(logits, size)
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)


__all__ = [
    "Confidence",
    "Segmenter",
    "class_names",
    "inference_mode_of",
    "is_out_of_memory",
    "predict",
    "unique_names",
]
