"""Parity of exported files with PyTorch, on random images and on given ones.

Axes: B images, C channels, H W an image's sides, K classes, h w sides of the logits.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.readers import read_whole_image
from ..image_io_segformer import read_image
from ..image_processing_segformer import SegFormerImageProcessor, range_limits
from ..modeling_segformer import SegFormerForSemanticSegmentation
from ..upsampling_segformer import upsample, upsample_argmax
from .exportable import MIN_SIDE, DeployedSegFormer, SegFormerWithProcessing, takes_bytes, target_size
from .runtimes import Runtime

_SIZES = ((1, 64, 96), (2, 101, 67), (3, 96, 131))  # images, height, width


@dataclass(frozen=True)
class ParityReport:
    """Difference between a runtime's outputs and PyTorch's on one batch of inputs.

    Attributes:
        shape: of the inputs.
        max_error: largest difference of a logit. For segmentation maps: the largest gap, in PyTorch, between the logit
            of a pixel's predicted class and the pixel's best logit.
        relative_error: the largest error relative to the largest logit.
        pixel_agreement: share of the pixels with the same predicted class, at the inputs' height and width.
    """

    shape: tuple[int, ...]
    max_error: float
    relative_error: float
    pixel_agreement: float

    @classmethod
    def of_logits(cls, shape: Sequence[int], found: Tensor, expected: Tensor, size: Sequence[int]) -> "ParityReport":
        """Compare logits (B, K, h, w) of inputs of this shape with sides `size`."""
        if found.shape != expected.shape or not found.isfinite().all():
            return cls(tuple(shape), math.inf, math.inf, 0.0)
        classes = upsample_argmax(found.float(), size), upsample_argmax(expected, size)
        return cls._of(shape, (found - expected).abs().max(), expected, *classes)

    @classmethod
    def of_segmentation(
        cls, shape: Sequence[int], found: Tensor, expected: Tensor, size: Sequence[int], binary_logit: float = 0.0
    ) -> "ParityReport":
        """Compare segmentation maps (B, H, W) with logits (B, K, h, w); one is foreground above `binary_logit`."""
        logits = upsample(expected, size)
        if logits.shape[1] == 1:
            logits = torch.cat([torch.full_like(logits, binary_logit), logits], dim=1)
        if found.shape != (len(logits), *size) or found.min() < 0 or found.max() >= logits.shape[1]:
            return cls(tuple(shape), math.inf, math.inf, 0.0)
        gap = logits.amax(1) - logits.gather(1, found.long()[:, None])[:, 0]
        return cls._of(shape, gap.max(), expected, found, logits.argmax(1))

    @classmethod
    def _of(
        cls, shape: Sequence[int], error: Tensor, logits: Tensor, found: Tensor, expected: Tensor
    ) -> "ParityReport":
        relative = error / logits.abs().max().clamp(min=1e-30)
        equal = (found == expected).double().mean()
        return cls(tuple(shape), error.item(), relative.item(), equal.item())


def summarise(reports: Iterable[ParityReport]) -> dict[str, Any]:
    """Summarise reports: the worst errors, the agreement over all pixels, and the single comparisons."""
    reports = list(reports)
    pixels = [math.prod(each.shape) for each in reports]
    equal = sum(each.pixel_agreement * number for each, number in zip(reports, pixels, strict=True)) / sum(pixels)
    return {
        "max_error": max(each.max_error for each in reports),
        "relative_error": max(each.relative_error for each in reports),
        "pixel_agreement": equal,
        "compared": [
            {"shape": list(each.shape), "relative_error": each.relative_error, "pixel_agreement": each.pixel_agreement}
            for each in reports
        ],
    }


def smooth_images(num: int, height: int, width: int, num_channels: int, seed: int = 0) -> list[Any]:
    """Generate random images with more structure than noise: large blobs, small ones, and a little grain.

    Returns:
        PIL images, or with another number of channels than three float arrays (H, W, C) within 0 to 255.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = [
        upsample(
            torch.randn(num, num_channels, -(-height // cell) + 1, -(-width // cell) + 1, generator=generator),
            (height, width),
        )
        for cell in (48, 12, 1)
    ]
    pixels = 127.5 + 70 * layers[0] + 30 * layers[1] + 5 * layers[2]
    arrays = pixels.clamp(0, 255).round().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array.astype(np.uint8)) if num_channels == 3 else array for array in arrays]


class ReferenceOutputs:
    """PyTorch's logits, with the inputs of the exported graph that belong to them.

    Args:
        model: in float32, on the CPU, in evaluation mode.
        processor: its image processor.
        network: the exported network.
        max_size: largest (height, width) of the graph; None for any.

    Raises:
        ValueError: if the processor resizes images below the graph's smallest side.
    """

    def __init__(
        self,
        model: SegFormerForSemanticSegmentation,
        processor: SegFormerImageProcessor,
        network: DeployedSegFormer | SegFormerWithProcessing,
        max_size: tuple[int, int] | None = None,
    ):
        self.model, self.processor = model, processor
        self.has_processing = isinstance(network, SegFormerWithProcessing)
        self.takes_bytes = self.has_processing and takes_bytes(processor)
        self.resizes = isinstance(network, SegFormerWithProcessing) and network.size is not None
        native = target_size(processor) if "height" in processor.size else (256, 320)
        self._native = (max(native[0], MIN_SIDE), max(native[1], MIN_SIDE))
        self._max_size = max_size
        resized = processor._target_size(*self._native)
        if min(resized) < MIN_SIDE and not self.resizes:
            raise ValueError(
                f"the image processor resizes images to {resized[0]}x{resized[1]}; expected sides of {MIN_SIDE} pixels "
                "or more for a graph: set a larger size in preprocessor_config.json, or let the graph resize "
                "(include_processing, --include-processing)"
            )

    def cases(self, given: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs of the graph and logits (B, K, h, w), for random images of several sizes and for given ones.

        Raises:
            ValueError: if a given image does not fit the model, or is too small for a graph.
            OSError: if a file cannot be read.
        """
        for seed, (num, height, width) in enumerate(_SIZES):
            largest = self._max_size or (height, width)
            images = self._random(num, min(height, largest[0]), min(width, largest[1]), seed)
            yield self._case(images, at_own_size=not self.resizes)
        last = self._random(1, *(self._max_size or self._native), len(_SIZES))
        yield self._case(last, at_own_size=self._max_size is not None and not self.resizes)
        for image in given:
            inputs, logits = self._case([self.read(image)])
            height, width = inputs.shape[1:3] if self.has_processing else inputs.shape[2:]
            if min(height, width) < MIN_SIDE:
                name = image if isinstance(image, str | os.PathLike) else "an image to compare on"
                raise ValueError(
                    f"{name} enters the graph at {height}x{width} pixels; expected sides of {MIN_SIDE} or more"
                )
            yield inputs, logits

    def read(self, image: Any) -> Any:
        """Read an image from a file of any kind that batch inference reads; return anything else as it is."""
        if not isinstance(image, str | os.PathLike):
            return image
        any_range = self.processor.value_range is not None
        return read_whole_image(os.fspath(image), self.model.config.num_channels, any_range=any_range)

    def _random(self, num: int, height: int, width: int, seed: int) -> list[Any]:
        """Generate random images whose values exceed a fixed value range at both ends."""
        images = smooth_images(num, height, width, self.model.config.num_channels, seed)
        limits = range_limits(self.processor.value_range)
        if limits is None:
            return images
        low, high = limits
        shares = [1.2 * np.asarray(image, np.float32) / 255 - 0.1 for image in images]
        arrays = [low + share * (high - low) for share in shares]
        return [array.round().clip(0, 255).astype(np.uint8) for array in arrays] if self.takes_bytes else arrays

    @torch.no_grad()
    def _case(self, images: Sequence[Any], at_own_size: bool = False) -> tuple[Tensor, Tensor]:
        resized = {"do_resize": False} if at_own_size else {}
        pixels = self.processor(images, return_tensors="pt", **resized).pixel_values
        inputs = self._raw(images, resized) if self.has_processing else pixels
        return inputs.contiguous(), self.model(pixels).logits

    def inputs(self, image: Any) -> Tensor:
        """Input of the graph for one image: its pixel values, or the image itself if the graph contains processing."""
        if self.has_processing:
            return self._raw([image], {}).contiguous()
        return self.processor(image, return_tensors="pt").pixel_values

    def _raw(self, images: Sequence[Any], resized: dict[str, bool]) -> Tensor:
        """Images (B, H, W, C) for a graph with processing, resized only where the graph does not resize.

        Raises:
            ValueError: if an image has pixels without data, or is no image of bytes where the graph takes bytes.
        """
        if any(np.ma.is_masked(image) for image in images):
            raise ValueError(
                "an image has pixels without data, which a graph with processing cannot know; leave it out"
            )
        if self.processor.value_range is not None:  # which is in the graph, and so is any resizing
            num_channels = len(self.processor.image_mean)
            read = [read_image(image, num_channels, None, "an image", any_range=True) for image in images]
            arrays = [each if isinstance(each, Image.Image) else np.moveaxis(each, 0, -1) for each in read]
            pixels = torch.from_numpy(np.stack([np.atleast_3d(np.asarray(each, np.float32)) for each in arrays]))
        else:
            resized = {"do_resize": False} if self.resizes else resized
            raw = self.processor(images, return_tensors="pt", do_rescale=False, do_normalize=False, **resized)
            pixels = raw.pixel_values.permute(0, 2, 3, 1)
        if self.takes_bytes and not torch.equal(pixels, pixels.byte().float()):
            raise ValueError(
                "an image has values that are not whole numbers from 0 to 255; expected bytes for the graph"
            )
        return pixels.byte() if self.takes_bytes else pixels

    def compare(self, runtime: Runtime, inputs: Tensor, logits: Tensor) -> ParityReport:
        """Compare a runtime's outputs for these inputs with PyTorch's logits."""
        found = runtime(inputs)
        if self.has_processing:
            binary_logit = self.processor.binary_logit
            return ParityReport.of_segmentation(inputs.shape, found, logits, inputs.shape[1:3], binary_logit)
        return ParityReport.of_logits(inputs.shape, found, logits, inputs.shape[2:])


__all__ = ["ParityReport", "ReferenceOutputs", "smooth_images", "summarise"]
