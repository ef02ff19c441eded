"""Triton kernels as implementations of the dispatch table's operations: what they need, and how they are called."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..cpu_encoder_segformer import altered_convolution
from ..dispatch_segformer import altered, needs_gradient
from ..folding_segformer import fold, unfoldable
from ..upsampling_segformer import at_least_float32, bind_cross_entropy
from .argmax import upsample_argmax
from .cross_entropy import fits, upsample_cross_entropy
from .decode_head import MOST_STAGES, upsample_sum, upsample_sum_relu
from .depthwise_gelu import depthwise_gelu

_MOST_ELEMENTS = 1 << 31  # of an image: kernels count within one in 32 bits


def _unsuitable(*tensors: Tensor) -> str:
    """Return why a kernel cannot take one of these tensors."""
    if not all(tensor.numel() for tensor in tensors):
        return "a tensor is empty"
    is_small = all(tensor.numel() < _MOST_ELEMENTS * len(tensor) for tensor in tensors)
    return "" if is_small else "an image has more elements than 32 bits can count"


def bind_mix_ffn(layer: nn.Module, tokens: Tensor, height: int, width: int) -> tuple | str:
    """Return the operands of `mix_ffn`."""
    reason = altered_convolution(layer.mlp)
    if reason:
        return reason
    convolution = layer.mlp.dwconv.dwconv
    hidden = tokens[:, :, :1].expand(-1, -1, convolution.out_channels)
    return _unsuitable(hidden) or (layer, tokens, height, width, convolution.weight, convolution.bias)


def mix_ffn(layer: nn.Module, tokens: Tensor, height: int, width: int, kernel: Tensor, bias: Tensor) -> Tensor:
    """Run the Mix-FFN with its convolution and GELU in one kernel: (B, N, C) -> (B, N, C)."""
    mlp = layer.mlp
    hidden = depthwise_gelu(mlp.dense1(layer.layer_norm_2(tokens)), kernel, bias, height, width)
    return tokens + layer.drop_path(mlp.dropout(mlp.dense2(mlp.dropout(hidden))))


def bind_decode_head(head: nn.Module, features: Sequence[Tensor]) -> tuple | str:
    """Return the operands of `decode_head`."""
    if len(features) > MOST_STAGES:
        return f"there are more than {MOST_STAGES} stages"
    return unfoldable(head) or _unsuitable(*features) or (head, features)


def decode_head(head: nn.Module, features: Sequence[Tensor]) -> Tensor:
    """Run the folded head with its sum in one kernel: (B, C, H, W) of each stage -> logits (B, K, h, w)."""
    matrices, bias = fold(head)
    fused = upsample_sum(_project(features, matrices, bias)).permute(0, 3, 1, 2)
    return head.classifier(head.dropout(F.relu(head.batch_norm(fused))))


def bind_decode_head_at_inference(head: nn.Module, features: Sequence[Tensor]) -> tuple | str:
    """Return the operands of `decode_head_at_inference`."""
    norm = head.batch_norm
    reason = altered("batch_norm", norm, nn.BatchNorm2d, bias=True) or altered("dropout", head.dropout, nn.Dropout2d)
    if reason:
        return reason
    if norm.running_mean is None or norm.training or head.dropout.training:
        return "batch_norm or dropout is in training mode, or batch_norm has no running statistics"
    return bind_decode_head(head, features)


def decode_head_at_inference(head: nn.Module, features: Sequence[Tensor]) -> Tensor:
    """Run the folded head with sum, BatchNorm and ReLU in one kernel: (B, C, H, W) of each stage -> (B, K, h, w)."""
    (matrices, bias), norm = fold(head), head.batch_norm
    # In float32, as BatchNorm itself computes: in 16 bits a channel would be off everywhere in the same direction.
    variance, weight = at_least_float32(norm.running_var), at_least_float32(norm.weight)
    scale = weight * (variance + norm.eps).rsqrt()
    shift = (bias - norm.running_mean) * scale + norm.bias
    return head.classifier(upsample_sum_relu(_project(features, matrices, None), scale, shift).permute(0, 3, 1, 2))


def _project(features: Sequence[Tensor], matrices: list[Tensor], bias: Tensor | None) -> list[Tensor]:
    """Multiply each stage's (B, C, H, W) by its matrix -> (B, H, W, D); the first one gets the bias."""
    biases = [None if bias is None else bias.to(matrices[0].dtype), *[None] * (len(matrices) - 1)]
    return [
        F.linear(stage.permute(0, 2, 3, 1), matrix, bias)
        for stage, matrix, bias in zip(features, matrices, biases, strict=True)
    ]


def bind_loss(_: None, logits: Tensor, labels: Tensor, *options: Any) -> tuple | str:
    """Return the operands of the loss."""
    reason = _unsuitable(logits)
    if not reason and not fits(logits.shape[1], logits.shape[3], labels.shape[2]):
        reason = "there are too many classes at too large a size"
    return reason or bind_cross_entropy(None, logits, labels, *options)


def loss(logits: Tensor, labels: Tensor, ignore_index: int, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """Compute the cross entropy, with its gradient if autograd needs one."""
    return upsample_cross_entropy(logits, labels, ignore_index, weight, label_smoothing, needs_gradient(logits))


def bind_classes(_: None, logits: Tensor, size: Sequence[int], with_probability: bool) -> tuple | str:
    """Return the operands of argmax."""
    if logits.shape[1] < 2:
        return "there is one logit"
    return _unsuitable(logits) or (logits, size, with_probability)


def classes(logits: Tensor, size: Sequence[int], with_probability: bool) -> Any:
    """Compute argmax at full size, with the winner's probability on demand."""
    labels, probabilities = upsample_argmax(logits, *size, with_probability)
    return (labels, probabilities) if with_probability else labels


IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "depthwise_gelu": (bind_mix_ffn, mix_ffn),
    "upsample_sum_relu": (bind_decode_head_at_inference, decode_head_at_inference),
    "upsample_sum": (bind_decode_head, decode_head),
    "upsample_cross_entropy": (bind_loss, loss),
    "upsample_argmax": (bind_classes, classes),
}

__all__ = ["IMPLEMENTATIONS"]
