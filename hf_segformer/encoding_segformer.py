"""Fast paths of the encoder on a CPU: the same numbers as the plain modules, in less time and memory.

What costs time on a CPU is less the arithmetic than moving the Mix-FFN's fourfold hidden tokens in and out of memory.
So it runs in strips of rows that stay in the cache, with depthwise convolution and GELU in one pass; for its gradient
nothing but its input is kept, and the strip is computed once more. Keys and values come from one product, and residuals
are added by the product that makes the branch.

Weights are read, and joined, anew in every call: they change behind any cache's back.

Axes: B batch, C channels, E = C * mlp_ratio hidden channels, H W a stage's grid, N = H*W tokens, M reduced tokens,
A heads.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .fast_paths_segformer import is_fast_and_full, needs_gradient, only_once

STRIP_BYTES = 1 << 23  # of hidden tokens, or of queries, at once; a quarter of it costs 10 to 30 % more time


class AttentionWeights(NamedTuple):
    """The linear layers of attention, as tensors."""

    query: Tensor  # (C, C)
    query_bias: Tensor  # (C,)
    key: Tensor  # (C, C)
    key_bias: Tensor  # (C,)
    value: Tensor  # (C, C)
    value_bias: Tensor  # (C,)
    output: Tensor  # (C, C)
    output_bias: Tensor  # (C,)


class MixWeights(NamedTuple):
    """LayerNorm and Mix-FFN, as tensors."""

    norm: Tensor  # (C,)
    norm_bias: Tensor  # (C,)
    expand: Tensor  # (E, C)
    expand_bias: Tensor  # (E,)
    kernel: Tensor  # (E, 1, 3, 3)
    kernel_bias: Tensor  # (E,)
    shrink: Tensor  # (C, E)
    shrink_bias: Tensor  # (C,)


class Strip(NamedTuple):
    """A run of images and rows, and the rows about it that a 3x3 window sees."""

    images: slice
    rows: slice
    seen: slice

    @property
    def kept(self) -> slice:
        """Where `rows` lie within `seen`."""
        return slice(self.rows.start - self.seen.start, self.rows.stop - self.seen.start)

    @property
    def missing(self) -> tuple[int, int]:
        """How many rows of `seen` lie before and after `rows`."""
        return self.rows.start - self.seen.start, self.seen.stop - self.rows.stop


def cut(batch: int, height: int, row_bytes: int, limit: int, halo: int) -> Iterator[Strip]:
    """Strips that cover every row of every image once: many whole images, or even parts of one.

    Args:
        batch: number of images.
        height: rows of each.
        row_bytes: what one row takes up.
        limit: what a strip may take up; it has a row at least.
        halo: how many rows before and after a strip are seen.
    """
    rows = max(limit // row_bytes, 1)
    if rows >= height:
        step = min(rows // height, batch)
        for image in range(0, batch, step):
            yield Strip(slice(image, min(image + step, batch)), slice(0, height), slice(0, height))
        return
    parts = -(-height // rows)
    bounds = [height * part // parts for part in range(parts + 1)]
    for image in range(batch):
        for first, last in pairwise(bounds):
            seen = slice(max(first - halo, 0), min(last + halo, height))
            yield Strip(slice(image, image + 1), slice(first, last), seen)


def find_onednn(name: str, *tensors: Tensor) -> Callable[..., Tensor] | None:
    """PyTorch's private oneDNN operation of that name, or None where it is missing or can not take these tensors.

    These are what `torch.compile` emits: the library's product or convolution with what follows in the same pass. They
    know float32 and no gradient.
    """
    if tensors[0].dtype != torch.float32 or not torch.backends.mkldnn.enabled or needs_gradient(*tensors):
        return None
    return getattr(torch.ops.mkldnn, name, None)


def linear(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear`; where oneDNN computes, the bias is added in the product and not copied into place before it."""
    fused = find_onednn("_linear_pointwise", tokens, weight, bias)
    return F.linear(tokens, weight, bias) if fused is None else fused(tokens, weight, bias, "none", [], "")


def convolve(hidden: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Depthwise 3x3 convolution, zero-padded: (B, H, W, E) -> (B, H, W, E)."""
    features = F.conv2d(hidden.permute(0, 3, 1, 2), kernel, bias, padding=1, groups=hidden.shape[-1])
    return features.permute(0, 2, 3, 1)


def convolve_gelu(hidden: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """`convolve` and exact GELU, in one pass where oneDNN computes: (B, H, W, E) -> (B, H, W, E)."""
    fused = find_onednn("_convolution_pointwise", hidden, kernel, bias)
    if fused is None:
        return F.gelu(convolve(hidden, kernel, bias))
    features, ones = hidden.permute(0, 3, 1, 2), [1, 1]
    features = fused(features, kernel, bias, ones, ones, ones, hidden.shape[-1], "gelu", [], "none")
    return features.permute(0, 2, 3, 1)


def are_encodable(*tensors: Tensor) -> bool:
    """Whether the functions here may take these tensors: all full floats of one width, and nothing casts them."""
    return is_fast_and_full(*tensors) and all(tensor.is_contiguous() and tensor.numel() for tensor in tensors)


def branch_base(tokens: Tensor, bias: Tensor, residual: bool, out: Tensor) -> Tensor:
    """Fill `out` with what a branch's last product is added to: its bias and, where `residual`, the tokens."""
    return torch.add(tokens, bias, out=out) if residual else out.copy_(bias)


def mix_forward(tokens: Tensor, height: int, width: int, weights: MixWeights, eps: float, residual: bool) -> Tensor:
    """`mix` without a gradient."""
    batch, _, channels = tokens.shape
    grid = tokens.view(batch, height, width, channels)
    mixed = torch.empty_like(grid)
    hidden_row = width * len(weights.expand) * tokens.element_size()
    for strip in cut(batch, height, hidden_row, STRIP_BYTES, halo=1):
        normed = F.layer_norm(grid[strip.images, strip.seen], (channels,), weights.norm, weights.norm_bias, eps)
        hidden = linear(normed, weights.expand, weights.expand_bias)
        hidden = convolve_gelu(hidden, weights.kernel, weights.kernel_bias)[:, strip.kept].flatten(0, 2)
        here = strip.images, strip.rows
        target = branch_base(grid[here], weights.shrink_bias, residual, mixed[here]).view(-1, channels)
        target.addmm_(hidden, weights.shrink.t())
    return mixed.view_as(tokens)


class Mix(torch.autograd.Function):
    """`mix` with a gradient that keeps nothing but the input, which the residual keeps anyway.

    A strip's hidden tokens are computed once more. It then hands back the gradients of its own rows' outputs, and these
    reach one row beyond it; as everything before the convolution is the same for all rows, or adds up over them, what
    neighbouring strips find for a row between them is summed.
    """

    @staticmethod
    def forward(ctx, tokens, height, width, eps, residual, *weights):
        """As `mix`, the weights one by one."""
        ctx.save_for_backward(tokens, *weights)
        ctx.layout = height, width, eps, residual
        return mix_forward(tokens, height, width, MixWeights(*weights), eps, residual)

    @staticmethod
    @only_once
    def backward(ctx, grad_mixed):
        """Gradients of the tokens and of each of `MixWeights`."""
        tokens, *weights = ctx.saved_tensors
        height, width, eps, residual = ctx.layout
        grads = mix_backward(grad_mixed.contiguous(), tokens, height, width, MixWeights(*weights), eps)
        grad_tokens = grads[0].add_(grad_mixed) if residual else grads[0]
        return grad_tokens, None, None, None, None, *grads[1]


def mix_backward(
    grad_mixed: Tensor, tokens: Tensor, height: int, width: int, weights: MixWeights, eps: float
) -> tuple[Tensor, MixWeights]:
    """The gradients of `mix` without residual: (B, N, C) -> that of the tokens (B, N, C), and those of the weights."""
    batch, _, channels = tokens.shape
    num_hidden = len(weights.expand)
    grid, grad_out = (tensor.view(batch, height, width, channels) for tensor in (tokens, grad_mixed))
    grad_grid = torch.zeros_like(grid)
    grads = MixWeights(*(torch.zeros_like(weight) for weight in weights))
    grads.shrink_bias.copy_(grad_out.sum((0, 1, 2)))
    for strip in cut(batch, height, width * num_hidden * tokens.element_size(), STRIP_BYTES, halo=1):
        seen, rows = (strip.images, strip.seen), (strip.images, strip.rows)
        normed, mean, rstd = torch.native_layer_norm(grid[seen], (channels,), weights.norm, weights.norm_bias, eps)
        hidden = linear(normed, weights.expand, weights.expand_bias)
        convolved = convolve(hidden, weights.kernel, weights.kernel_bias)[:, strip.kept]
        grad_rows = grad_out[rows].reshape(-1, channels)
        grads.shrink.addmm_(grad_rows.t(), F.gelu(convolved).view(-1, num_hidden))
        grad = (grad_rows @ weights.shrink).view_as(convolved)
        grad = torch.ops.aten.gelu_backward.default(grad, convolved)
        del convolved
        grad = F.pad(grad, (0, 0, 0, 0, *strip.missing)) if any(strip.missing) else grad
        grad, grad_kernel, grad_kernel_bias = torch.ops.aten.convolution_backward.default(
            *(tensor.permute(0, 3, 1, 2) for tensor in (grad, hidden)),
            *(weights.kernel, [num_hidden], [1, 1], [1, 1], [1, 1], False, [0, 0], num_hidden, [True] * 3),
        )
        grads.kernel.add_(grad_kernel)
        grads.kernel_bias.add_(grad_kernel_bias)
        grad = grad.permute(0, 2, 3, 1).reshape(-1, num_hidden)
        grads.expand.addmm_(grad.t(), normed.view(-1, channels))
        grads.expand_bias.add_(grad.sum(0))
        grad, grad_norm, grad_norm_bias = torch.ops.aten.native_layer_norm_backward.default(
            (grad @ weights.expand).view_as(normed),
            *(grid[seen], [channels], mean, rstd, weights.norm, weights.norm_bias, [True] * 3),
        )
        grads.norm.add_(grad_norm)
        grads.norm_bias.add_(grad_norm_bias)
        grad_grid[seen].add_(grad)
    return grad_grid.view_as(tokens), grads


def mix(tokens: Tensor, height: int, width: int, weights: MixWeights, eps: float, residual: bool) -> Tensor:
    """LayerNorm and Mix-FFN (paper equation 3), added to their input where `residual`: (B, N, C) -> (B, N, C)."""
    if needs_gradient(tokens, *weights):
        return Mix.apply(tokens, height, width, eps, residual, *weights)
    return mix_forward(tokens, height, width, weights, eps, residual)


def attend(tokens: Tensor, normed: Tensor, reduced: Tensor, weights: AttentionWeights, head_dim: int) -> Tensor:
    """Tokens plus attention of the normed tokens to the reduced ones (paper equation 1).

    Tokens and normed tokens (B, N, C), reduced ones (B, M, C) -> (B, N, C).
    """
    keys_values = linear(
        reduced, torch.cat([weights.key, weights.value]), torch.cat([weights.key_bias, weights.value_bias])
    )
    keys, values = keys_values.unflatten(-1, (2, -1, head_dim)).permute(2, 0, 3, 1, 4)  # each (B, A, M, C/A)

    def context_of(normed: Tensor, images: slice) -> Tensor:
        query = linear(normed, weights.query, weights.query_bias).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        return F.scaled_dot_product_attention(query, keys[images], values[images]).transpose(1, 2).flatten(2)

    batch, length, channels = tokens.shape
    if needs_gradient(tokens, normed, reduced, *weights):
        return tokens + linear(context_of(normed, slice(None)), weights.output, weights.output_bias)
    attended = torch.empty_like(tokens)
    for strip in cut(batch, length, channels * tokens.element_size(), STRIP_BYTES, halo=0):
        here = strip.images, strip.rows
        context = context_of(normed[here], strip.images)
        target = branch_base(tokens[here], weights.output_bias, True, attended[here]).view(-1, channels)
        target.addmm_(context.view(-1, channels), weights.output.t())
    return attended
