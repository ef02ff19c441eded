"""What an exported file is compared with: PyTorch's own logits, on random pictures and on those that are given.

Axes: B pictures, C bands, H W a picture's sides, K classes, h w sides of the logits.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.readers import read_whole_image
from ..image_processing_segformer import SegFormerImageProcessor
from ..modeling_segformer import SegFormerForSemanticSegmentation
from .exportable import MIN_SIDE, DeployedSegFormer, PicturesToLabels, target_size
from .runtimes import ParityReport, Runtime, smooth_pictures

_SIZES = ((1, 64, 96), (2, 101, 67), (3, 96, 131))  # pictures, height, width


class ReferenceOutputs:
    """PyTorch's answers: what goes into a graph, and the logits that belong to it.

    Args:
        model: in float32, on the CPU, in evaluation mode.
        processor: its image processor.
        network: that was exported.

    Raises:
        ValueError: if what the processor makes of pictures is too small for a graph.
    """

    def __init__(
        self,
        model: SegFormerForSemanticSegmentation,
        processor: SegFormerImageProcessor,
        network: DeployedSegFormer | PicturesToLabels,
    ):
        self.model, self.processor = model, processor
        self.is_labelling = isinstance(network, PicturesToLabels)
        self.resizes = isinstance(network, PicturesToLabels) and network.size is not None
        native = target_size(processor) if "height" in processor.size else (256, 320)
        self._native = (max(native[0], MIN_SIDE), max(native[1], MIN_SIDE))
        resized = processor._target_size(*self._native)
        if min(resized) < MIN_SIDE and not self.resizes:
            raise ValueError(
                f"the image processor makes {resized[0]}x{resized[1]} of a picture, but sides must be {MIN_SIDE} at "
                "least to enter a graph: give it a larger size, or let the graph resize (with processing)"
            )

    def cases(self, given: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs of the graph and logits (B, K, h, w), of random pictures of several sizes and of those given.

        Raises:
            ValueError: if a given one does not fit the model, or is too small for a graph.
            OSError: if a file can not be read.
        """
        num_channels = self.model.config.num_channels
        for seed, (num, height, width) in enumerate(_SIZES):
            pictures = smooth_pictures(num, height, width, num_channels, seed)
            yield self._case(pictures, at_own_size=not self.resizes)
        yield self._case(smooth_pictures(1, *self._native, num_channels, len(_SIZES)))
        for picture in given:
            inputs, logits = self._case([opened(picture, num_channels)])
            height, width = inputs.shape[1:3] if self.is_labelling else inputs.shape[2:]
            if min(height, width) < MIN_SIDE:
                name = picture if isinstance(picture, str | os.PathLike) else "a picture to compare on"
                raise ValueError(
                    f"{name} enters the graph at {height}x{width} pixels, but sides must be {MIN_SIDE} at least"
                )
            yield inputs, logits

    @torch.no_grad()
    def _case(self, pictures: Sequence[Any], at_own_size: bool = False) -> tuple[Tensor, Tensor]:
        inputs, logits = self._inputs_and_logits(pictures, {"do_resize": False} if at_own_size else {})
        return inputs.contiguous(), logits

    def _inputs_and_logits(self, pictures: Sequence[Any], resized: dict[str, bool]) -> tuple[Tensor, Tensor]:
        pixels = self.processor(pictures, return_tensors="pt", **resized).pixel_values
        if not self.is_labelling:
            return pixels, self.model(pixels).logits
        if self.resizes:
            resized = {"do_resize": False}
        raw = self.processor(pictures, return_tensors="pt", do_rescale=False, do_normalize=False, **resized)
        inputs = raw.pixel_values.permute(0, 2, 3, 1)
        return inputs.byte() if len(self.processor.image_mean) == 3 else inputs, self.model(pixels).logits

    def agreement(self, runtime: Runtime, inputs: Tensor, logits: Tensor) -> ParityReport:
        """Of what the runtime makes of these inputs."""
        found = runtime(inputs)
        if self.is_labelling:
            return ParityReport.of_labels(inputs.shape, found, logits, inputs.shape[1:3])
        return ParityReport.of_logits(inputs.shape, found, logits, inputs.shape[2:])


def opened(picture: Any, num_channels: int) -> Any:
    """The picture of a file, of any kind that labelled pictures may have; anything else as it is."""
    return read_whole_image(os.fspath(picture), num_channels) if isinstance(picture, str | os.PathLike) else picture
