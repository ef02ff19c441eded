"""Matrix products in float32 by oneDNN, which PyTorch brings along, and by PyTorch's own call wherever it can not be.

PyTorch's own call goes to MKL, which on processors that are not Intel's makes use of half of what they can do. oneDNN
does not mind whose they are, adds a bias and a further tensor while the product is in registers, and takes either
factor transposed. It is reached by the private operations that `torch.compile` emits.

It is a thousand times slower on columns of a wider matrix: whoever calls copies them first.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch_segformer import OPERATIONS, is_compiled_and_full, needs_gradient, once_differentiable


def find_onednn(name: str, *tensors: Tensor) -> Any:
    """PyTorch's private oneDNN operation of that name, or None where it is missing or can not take these tensors.

    They know float32, a CPU and no gradient.
    """
    first = tensors[0]
    if first.dtype != torch.float32 or first.device.type != "cpu":
        return None
    if not torch.backends.mkldnn.enabled or needs_gradient(*tensors):
        return None
    return getattr(torch.ops.mkldnn, name, None)


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None) -> Tensor:
    """`F.linear`, plus `added` where it is given: (..., C) by (D, C) -> (..., D)."""
    if needs_gradient(tokens, weight, *(tensor for tensor in (bias, added) if tensor is not None)):
        product = _Linear.apply(tokens, weight, bias)
        return product if added is None else product + added
    fused = find_onednn("_linear_pointwise", tokens)
    if fused is None:
        product = F.linear(tokens, weight, bias)
        return product if added is None else product.add_(added)
    if added is None:
        return fused(tokens, weight, bias, "none", [], "")
    return fused.binary(tokens, added, weight, bias, "add")


def multiply_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """The product that sums over what both have most of, `left.T @ right`: (P, N) and (P, K) -> (N, K)."""
    if left.shape[1] > right.shape[1]:  # oneDNN is faster, up to four times, with the smaller one first
        return multiply_over_rows(right, left).t()
    return linear(left.t(), right.t())


class _Linear(torch.autograd.Function):
    """`F.linear` with a gradient by the products here."""

    @staticmethod
    def forward(ctx, tokens, weight, bias):
        """(..., C), (D, C) and (D,) or None -> (..., D)."""
        ctx.save_for_backward(tokens, weight)
        return linear(tokens, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """Of each argument."""
        tokens, weight = ctx.saved_tensors
        wants_tokens, wants_weight, wants_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2).contiguous()
        return (
            linear(rows, weight.t()).view_as(tokens) if wants_tokens else None,
            multiply_over_rows(rows, tokens.flatten(0, -2)) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


@torch.library.custom_op(f"{OPERATIONS}::linear", mutates_args=())
def _compiled_linear(tokens: Tensor, weight: Tensor) -> Tensor:
    return linear(tokens, weight)


@_compiled_linear.register_fake
def _outputs(tokens: Tensor, weight: Tensor) -> Tensor:
    return tokens.new_empty(*tokens.shape[:-1], len(weight))


def plain_linear(tokens: Tensor, weight: Tensor) -> Tensor:
    """`F.linear`, for which a compiler that would take MKL's product is given `linear`."""
    return _compiled_linear(tokens, weight) if is_compiled_and_full(tokens, weight) else F.linear(tokens, weight)


__all__: list[str] = []
