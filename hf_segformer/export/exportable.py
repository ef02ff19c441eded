"""Network in the form that is exported: head folded, BatchNorm merged, image processing on demand.

A model in PyTorch multiplies the head's matrices in every call, because its parameters may change. For export the
products are formed once, and BatchNorm's scale and shift, which are constants, are merged into them. The exported head
is a matrix a stage, a sum and the classifier.

Axes: B images, C channels, H W an image's sides, h w those of the network's input, D width of the head, K classes.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..dispatch_segformer import altered
from ..folding_segformer import fold, unfoldable
from ..image_processing_segformer import SegFormerImageProcessor, range_limits
from ..modeling_segformer import SegFormerDecodeHead, SegFormerForSemanticSegmentation
from ..upsampling_segformer import upsample

MIN_SIDE = 64  # pixels: below, torch.export cannot distinguish a grid's side from 1
_SOURCES = ("torch.nn.modules.", "transformers.activations", f"{__name__.partition('.')[0]}.")
_LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)


class DeployedSegFormer(nn.Module):
    """Segmentation model with the head's constants multiplied out; it gives the model's logits.

    Args:
        model: not modified; weights are copied, in float32.

    Raises:
        ValueError: if the model is another one, or a layer is wrapped or changed (LoRA, quantisation, hooks), so that
            its weights alone do not define the computation.

    Examples:
        >>> import torch
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation
        >>> from hf_segformer.export.exportable import DeployedSegFormer
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig(depths=[1, 1, 1, 1], num_labels=5)).eval()
        >>> deployed = DeployedSegFormer(model)
        >>> pixels = torch.randn(1, 3, 64, 96)
        >>> torch.allclose(deployed(pixels), model(pixels).logits, atol=1e-5)
        True
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        require_plain(model)
        self.encoder = deepcopy(model.segformer.encoder)
        self.encoder.config._attn_implementation = "sdpa"  # of the copy alone
        head = model.decode_head
        matrices, bias = merged_head(head)
        # As convolutions, so that runtimes keep one layout from here to the classifier.
        self.projections = nn.ModuleList(
            nn.Conv2d(matrix.shape[1], matrix.shape[0], 1, bias=stage == 0) for stage, matrix in enumerate(matrices)
        )
        with torch.no_grad():
            for projection, matrix in zip(self.projections, matrices, strict=True):
                projection.weight.copy_(matrix[:, :, None, None])
            self.projections[0].bias.copy_(bias)
        self.classifier = deepcopy(head.classifier)
        self.float().cpu().eval().requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, h, w) -> logits (B, K, ceil(h / 4), ceil(w / 4))."""
        stages, _ = self.encoder(pixel_values)
        first, *others = [projection(stage) for projection, stage in zip(self.projections, stages, strict=True)]
        fused = sum((upsample(stage, first.shape[-2:]) for stage in others), first)
        return self.classifier(F.relu(fused))


@torch.no_grad()
def merged_head(head: SegFormerDecodeHead) -> tuple[list[Tensor], Tensor]:
    """Merge linear layers, fusing convolution and BatchNorm into one matrix (D, C) a stage, and a bias (D,).

    The products are formed in float64, so that they are rounded once.
    """
    head = deepcopy(head).double()
    matrices, bias = fold(head)
    norm = head.batch_norm
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return [scale[:, None] * matrix for matrix in matrices], (bias - norm.running_mean) * scale + norm.bias


def require_plain(model: nn.Module) -> None:
    """Raise ValueError unless the model is a segmentation model of unmodified layers."""
    if not isinstance(model, SegFormerForSemanticSegmentation):
        merge = ": merge_and_unload() gives the model itself" if hasattr(model, "merge_and_unload") else ""
        raise ValueError(
            f"the model is a {type(model).__name__}; expected SegFormerForSemanticSegmentation for export{merge}"
        )
    for name, module in model.named_modules():
        if name.split(".")[0] == "loss_function":  # which is not exported
            continue
        if any(True for _ in module.parameters(recurse=False)):
            is_known = not all(altered(name, module, kind) for kind in _LAYERS)
        else:
            is_known = type(module).__module__.startswith(_SOURCES) and not altered(name, module, type(module))
        if not is_known:
            raise ValueError(
                f"{name or 'the model'} is a modified {type(module).__name__} (LoRA, quantisation, hooks); expected "
                "plain layers for export: merge adapters (merge_and_unload), or load the model in float32"
            )
    head = model.decode_head
    if type(head) is not SegFormerDecodeHead or unfoldable(head) or head.batch_norm.running_mean is None:
        raise ValueError("the decode head is modified; expected SegFormer's own, which is folded for export")


class SegFormerWithProcessing(nn.Module):
    """Network with its pre- and post-processing: images -> segmentation maps of their size.

    Images are uint8 (B, H, W, 3), as decoders give them; with another number of channels, or a value range that is not
    one of bytes, they are float32 in their own units. The graph contains a fixed value range, rescaling, normalisation
    and, where the processor squashes images to one size by PIL's bilinear filter, resizing; see `resize_outside` for
    other processors.

    Args:
        deployed: the network.
        processor: its image processor.

    Raises:
        ValueError: if the value range depends on the image, or is applied before a resize outside the graph.
    """

    def __init__(self, deployed: DeployedSegFormer, processor: SegFormerImageProcessor):
        super().__init__()
        require_fixed_range(processor)
        self.deployed = deployed
        self.num_channels = len(processor.image_mean)
        self.limits = range_limits(processor.value_range)
        self.takes_bytes = takes_bytes(processor)
        self.size = None if resize_outside(processor) or not processor.do_resize else target_size(processor)
        self.binary_logit = processor.binary_logit
        self.factor = processor.rescale_factor if processor.do_rescale else 1.0
        ones, zeros = [1.0] * self.num_channels, [0.0] * self.num_channels
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (zeros, ones)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W, C) -> int32 (B, H, W)."""
        height, width = images.shape[1:3]
        pixels = images.permute(0, 3, 1, 2).float()
        if self.limits is not None:
            low, high = self.limits
            pixels = ((pixels - low) * 255 / (high - low)).clamp(0, 255)
        if self.size is not None:
            pixels = resize(pixels, self.size, as_bytes=self.takes_bytes and self.limits is None)
        logits = self.deployed((pixels * self.factor - self.mean) / self.std)
        logits = upsample(logits, (height, width))
        segmentation = (logits[:, 0] > self.binary_logit) if logits.shape[1] == 1 else logits.argmax(dim=1)
        return segmentation.int()


def takes_bytes(processor: SegFormerImageProcessor) -> bool:
    """Return True if the graph's images are uint8: in colour, any value range one of bytes, not of floats up to 1."""
    low, high = range_limits(processor.value_range) or (0, 255)
    return len(processor.image_mean) == 3 and low >= 0 and 1 < high <= 255


def require_fixed_range(processor: SegFormerImageProcessor) -> None:
    """Raise ValueError if the processor's value range cannot be part of a graph."""
    if processor.value_range is None:
        return
    if range_limits(processor.value_range) is None:
        raise ValueError(
            f"value_range is {processor.value_range}, a range of each image; expected a fixed one, [low, high], for "
            "processing in the graph: set it in preprocessor_config.json, or export the network alone"
        )
    if reason := resize_outside(processor):
        raise ValueError(
            f"value_range is {processor.value_range}, which applies before images are resized, and the graph cannot "
            f"resize them ({reason}): export the network alone, without its processing"
        )


def resize_outside(processor: SegFormerImageProcessor) -> str:
    """Return the reason why images must be resized before they enter the graph; empty where they need not be."""
    if not processor.do_resize:
        return ""
    if processor.keep_ratio or "height" not in processor.size:
        return "the processor keeps the aspect ratio, so that each image has a size of its own"
    if processor.resample != Image.Resampling.BILINEAR:
        return f"the processor resizes by PIL's {Image.Resampling(processor.resample).name} filter, not BILINEAR"
    return ""


def target_size(processor: SegFormerImageProcessor) -> tuple[int, int]:
    """Return the one size (h, w) that the processor squashes images to."""
    return processor._target_size(processor.size["height"], processor.size["width"])


def resize(pixels: Tensor, size: Sequence[int], as_bytes: bool) -> Tensor:
    """Resize (B, C, H, W) -> (B, C, h, w) by PIL's bilinear filter: columns, then rows, bytes rounded after each."""
    pixels = pixels @ resize_weights(pixels.shape[3], size[1]).t()
    pixels = (pixels + 0.5).floor() if as_bytes else pixels
    pixels = resize_weights(pixels.shape[2], size[0]) @ pixels
    return (pixels + 0.5).floor() if as_bytes else pixels


def resize_weights(num_old: int, num_new: int) -> Tensor:
    """Compute PIL's bilinear filter as a matrix (new, old): a triangle as wide as the larger of a new and an old pixel.

    Distances are integers, in halves of old times new pixels, so that rounding does not spoil them in large images.
    """
    old, new = torch.arange(num_old), torch.arange(num_new)
    distance = ((2 * old + 1) * num_new - (2 * new + 1)[:, None] * num_old).abs().float()
    weights = torch.maximum(1 - distance / (2 * num_old), 1 - distance / (2 * num_new)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def dynamic_axes(name: str) -> dict[str, dict[int, Dim]]:
    """Return the dynamic axes of the graph's input, `images` or `pixel_values`."""
    height, width = (1, 2) if name == "images" else (2, 3)
    return {name: {0: Dim("batch"), height: Dim("height", min=MIN_SIDE), width: Dim("width", min=MIN_SIDE)}}


def bounded_axes(name: str, max_size: tuple[int, int]) -> dict[str, dict[int, Dim]]:
    """Return the dynamic axes of the graph's input for one image of at most `max_size` (height, width)."""
    sides = [axis for axis in dynamic_axes(name)[name] if axis > 0]
    limits = zip(sides, ("height", "width"), max_size, strict=True)
    return {name: {axis: Dim(side, min=MIN_SIDE, max=limit) for axis, side, limit in limits if limit > MIN_SIDE}}


def trace(
    network: DeployedSegFormer | SegFormerWithProcessing, max_size: tuple[int, int] | None = None
) -> ExportedProgram:
    """Trace the network's graph for images of any size from `MIN_SIDE` up.

    Args:
        network: the network, alone or with processing.
        max_size: largest (height, width); the graph then takes one image at a time, without it any number.
    """
    num, height, width = (1, *max_size) if max_size else (2, 96, 128)
    if isinstance(network, SegFormerWithProcessing):
        name, dtype = "images", torch.uint8 if network.takes_bytes else torch.float32
        example = torch.zeros(num, height, width, network.num_channels, dtype=dtype)
    else:
        name, example = "pixel_values", torch.zeros(num, network.encoder.config.num_channels, height, width)
    axes = bounded_axes(name, max_size) if max_size else dynamic_axes(name)
    with torch.no_grad():
        program = torch.export.export(network, (example,), dynamic_shapes=axes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the source code on this machine
    return program


__all__ = [
    "MIN_SIDE",
    "DeployedSegFormer",
    "SegFormerWithProcessing",
    "bounded_axes",
    "dynamic_axes",
    "merged_head",
    "require_fixed_range",
    "require_plain",
    "resize",
    "resize_outside",
    "resize_weights",
    "takes_bytes",
    "target_size",
    "trace",
]
