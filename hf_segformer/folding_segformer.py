"""The fold of the decode head: its layers before BatchNorm as one matrix for each stage.

Up to BatchNorm the head (paper section 3.2, equation 4) is linear at each pixel, and bilinear weights sum to one. So
the fusing convolution's columns for one stage may be multiplied into that stage's linear layer, applied at that stage's
own resolution, and the results upsampled and summed: the same numbers for a tenth of the multiplications. The product
is formed in every call, in inference and in training, because parameters can change without notice.

The fold consists of PyTorch's own operations, so that it holds in compiled and exported networks, too.

Axes: B batch, C a stage's channels, D width of the head, H W a stage's grid.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from .cpu_runtime_segformer import reference_linear
from .dispatch_segformer import altered, implement
from .upsampling_segformer import at_least_float32, upsample


def unfoldable(head: nn.Module) -> str:
    """Return why a layer before BatchNorm could differ from the linear layer that it was built as; empty if none."""
    for stage, linear in enumerate(head.linear_c):
        name = f"linear_c.{stage}"
        reason = altered(name, linear, "SegFormerMLP") or altered(f"{name}.proj", linear.proj, nn.Linear, bias=True)
        if reason:
            return reason
    fuse = head.linear_fuse
    reason = altered("linear_fuse", fuse, nn.Conv2d)
    if not reason and (fuse.bias is not None or fuse.kernel_size != (1, 1)):
        return "linear_fuse is not a 1x1 convolution without bias"
    return reason


def fold(head: nn.Module) -> tuple[list[Tensor], Tensor]:
    """Multiply linear and fusing weights: a matrix (D, C) for each stage, and the bias (D,) of their sum."""
    matrices, biases = [], []
    columns = head.linear_fuse.weight.flatten(1).chunk(len(head.linear_c), dim=1)[::-1]
    for linear, column in zip(head.linear_c, columns, strict=True):
        with maybe_autocast(column.device.type, enabled=False):
            column = at_least_float32(column)
            matrices.append((column @ at_least_float32(linear.proj.weight)).to(linear.proj.weight.dtype))
            # A copy: autograd saves what is multiplied, and no bias of the reference.
            biases.append(column @ at_least_float32(linear.proj.bias).clone())
    return matrices, sum(biases)


def _subtracts_mean(norm: nn.Module) -> bool:
    """Return True if the layer is a BatchNorm in training whose input nothing changes or sees before it."""
    is_batch_norm = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
    return is_batch_norm and norm.training and not altered("batch_norm", norm, type(norm))


def fuse_folded(head: nn.Module, features: Sequence[Tensor]) -> Tensor:
    """Project each stage's (B, C, H, W) by its matrix, upsample and add up -> (B, D, H, W) at the first one's size."""
    matrices, bias = fold(head)
    if _subtracts_mean(head.batch_norm):
        # Subtracting the mean removes the bias: its gradient is 0, not a rounding error that Adam would make a step of.
        bias = bias.detach() + 0 * bias
    first, *others = [
        reference_linear(stage.permute(0, 2, 3, 1), matrix).permute(0, 3, 1, 2)
        for stage, matrix in zip(features, matrices, strict=True)
    ]
    fused = first + bias.to(first.dtype)[:, None, None]
    return sum((upsample(stage, first.shape[-2:]) for stage in others), fused)


def bind_folded(head: nn.Module, features: Sequence[Tensor]) -> tuple | str:
    """Return the operands of `folded_decode_head`."""
    return unfoldable(head) or (head, features)


def folded_decode_head(head: nn.Module, features: Sequence[Tensor]) -> Tensor:
    """Run the head with the fold, its other layers as modules: (B, C, H, W) of each stage -> logits (B, K, h, w)."""
    return head.classifier(head.dropout(F.relu(head.batch_norm(fuse_folded(head, features)))))


implement("decode_head", "folded", bind_folded, folded_decode_head)

__all__ = ["fold", "folded_decode_head", "unfoldable"]
