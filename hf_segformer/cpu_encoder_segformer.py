"""Fast paths of the encoder on a CPU: the same numbers as the plain modules, in less time and memory.

What costs time on a CPU is less the arithmetic than moving the Mix-FFN's fourfold hidden tokens in and out of memory.
So it runs in strips of rows that stay in the cache, with depthwise convolution and GELU in one pass; for its gradient
nothing but its input is kept, and the strip is computed once more. Keys and values come from one product, and residuals
are added by the product that makes the branch.

Weights are read, and joined, anew in every call: they change behind any cache's back.

Axes: B batch, C channels, E = C * mlp_ratio hidden channels, H W a stage's grid, N = H*W tokens, M reduced tokens,
A heads.
"""

from collections.abc import Iterator
from itertools import pairwise, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_runtime_segformer import find_onednn, linear, multiply_over_rows
from .dispatch_segformer import OPERATIONS, is_compiled_and_full, is_fast_and_full, needs_gradient, once_differentiable

STRIP_BYTES = 1 << 23  # of hidden tokens, or of queries, at once; a quarter of it costs 10 to 30 % more time
FEW_SCORES = 1 << 16  # of a head: below, PyTorch's attention of all heads at once is faster than strips one by one
SCORE_BYTES = 1 << 22  # of attention's scores at once, which two cores' second caches hold


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
    is_taken = is_compiled_and_full(*tensors) or is_fast_and_full(*tensors)
    return is_taken and all(tensor.is_contiguous() and tensor.numel() for tensor in tensors)


def join(pieces: list[Tensor]) -> Tensor:
    """Strips one after the other; nothing is copied where there is only one."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def mix_forward(tokens: Tensor, height: int, width: int, weights: MixWeights, eps: float, residual: bool) -> Tensor:
    """`mix` without a gradient."""
    batch, _, channels = tokens.shape
    grid, pieces = tokens.view(batch, height, width, channels), []
    hidden_row = width * len(weights.expand) * tokens.element_size()
    for strip in cut(batch, height, hidden_row, STRIP_BYTES, halo=1):
        normed = F.layer_norm(grid[strip.images, strip.seen], (channels,), weights.norm, weights.norm_bias, eps)
        hidden = linear(normed, weights.expand, weights.expand_bias)
        hidden = convolve_gelu(hidden, weights.kernel, weights.kernel_bias)[:, strip.kept].flatten(0, 2)
        added = grid[strip.images, strip.rows].reshape(-1, channels) if residual else None
        pieces.append(linear(hidden, weights.shrink, weights.shrink_bias, added))
    return join(pieces).view_as(tokens)


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
    @once_differentiable
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
        grads.shrink.add_(multiply_over_rows(grad_rows, F.gelu(convolved).view(-1, num_hidden)))
        grad = linear(grad_rows, weights.shrink.t()).view_as(convolved)
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
        grads.expand.add_(multiply_over_rows(grad, normed.view(-1, channels)))
        grads.expand_bias.add_(grad.sum(0))
        grad, grad_norm, grad_norm_bias = torch.ops.aten.native_layer_norm_backward.default(
            linear(grad, weights.expand.t()).view_as(normed),
            *(grid[seen], [channels], mean, rstd, weights.norm, weights.norm_bias, [True] * 3),
        )
        grads.norm.add_(grad_norm)
        grads.norm_bias.add_(grad_norm_bias)
        grad_grid[seen].add_(grad)
    return grad_grid.view_as(tokens), grads


def mix(tokens: Tensor, height: int, width: int, weights: MixWeights, eps: float, residual: bool) -> Tensor:
    """LayerNorm and Mix-FFN (paper equation 3), added to their input where `residual`: (B, N, C) -> (B, N, C)."""
    if torch.compiler.is_compiling():
        return _compiled_mix(tokens, height, width, list(weights), eps, residual)
    if needs_gradient(tokens, *weights):
        return Mix.apply(tokens, height, width, eps, residual, *weights)
    return mix_forward(tokens, height, width, weights, eps, residual)


def split_heads(tokens: Tensor, head_dim: int) -> Tensor:
    """(B, N, C) -> (B, A, N, C/A), each head's in one piece."""
    return tokens.unflatten(-1, (-1, head_dim)).transpose(1, 2).contiguous()


def cut_scores(query: Tensor, keys: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Image, head and rows of the query whose scores stay in the cache."""
    batch, num_heads, length, _ = query.shape
    rows = max(SCORE_BYTES // (keys.shape[2] * keys.element_size()), 1)
    for image, head, start in product(range(batch), range(num_heads), range(0, length, rows)):
        yield image, head, slice(start, start + rows)


def attention_maps(query: Tensor, keys: Tensor) -> Tensor:
    """Softmax of the scores: (n, C/A) and (M, C/A) -> (n, M)."""
    scores = linear(query, keys)
    return torch.softmax(scores, -1, out=scores)


class Attention(torch.autograd.Function):
    """Scaled query (B, A, N, C/A), keys and values (B, A, M, C/A) -> context (B, N, C).

    Nothing but the arguments is kept for the gradient; the maps are computed once more.
    """

    @staticmethod
    def forward(ctx, query, keys, values):
        """Maps of a strip of rows at a time."""
        ctx.save_for_backward(query, keys, values)
        batch, num_heads, length, head_dim = query.shape
        turned = values.transpose(2, 3).contiguous()
        context = query.new_empty(batch, length, num_heads, head_dim)
        for image, head, rows in cut_scores(query, keys):
            maps = attention_maps(query[image, head, rows], keys[image, head])
            context[image, rows, head] = linear(maps, turned[image, head])
        return context.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """Of the query, of keys and values."""
        query, keys, values = ctx.saved_tensors
        gradient = split_heads(gradient, query.shape[-1])
        turned = keys.transpose(2, 3).contiguous()
        grads = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
        for image, head, rows in cut_scores(query, keys):
            here, grad_context = query[image, head, rows], gradient[image, head, rows]
            maps = attention_maps(here, keys[image, head])
            grads[2][image, head] += multiply_over_rows(maps, grad_context)
            grad_scores = linear(grad_context, values[image, head])
            grad_scores = torch._softmax_backward_data(grad_scores, maps, -1, maps.dtype)
            grads[1][image, head] += multiply_over_rows(grad_scores, here)
            grads[0][image, head, rows] = linear(grad_scores, turned[image, head])
        return grads


def context_of(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As `Attention`."""
    if query.shape[2] * keys.shape[2] < FEW_SCORES:
        return F.scaled_dot_product_attention(query, keys, values, scale=1.0).transpose(1, 2).flatten(2)
    return Attention.apply(query, keys, values)


def attend(tokens: Tensor, normed: Tensor, reduced: Tensor, weights: AttentionWeights, head_dim: int) -> Tensor:
    """Tokens plus attention of the normed tokens to the reduced ones (paper equation 1).

    Tokens and normed tokens (B, N, C), reduced ones (B, M, C) -> (B, N, C).
    """
    if torch.compiler.is_compiling():
        return _compiled_attend(tokens, normed, reduced, list(weights), head_dim)
    keys_values = linear(
        reduced, torch.cat([weights.key, weights.value]), torch.cat([weights.key_bias, weights.value_bias])
    )
    keys, values = (split_heads(half, head_dim) for half in keys_values.chunk(2, dim=-1))
    query_weights = weights.query * head_dim**-0.5, weights.query_bias * head_dim**-0.5
    batch, length, channels = tokens.shape
    if needs_gradient(tokens, normed, reduced, *weights):
        query = split_heads(linear(normed, *query_weights), head_dim)
        return linear(context_of(query, keys, values), weights.output, weights.output_bias, tokens)
    pieces = []
    for strip in cut(batch, length, channels * tokens.element_size(), STRIP_BYTES, halo=0):
        query = split_heads(linear(normed[strip.images, strip.rows], *query_weights), head_dim)
        context = context_of(query, keys[strip.images], values[strip.images])
        added = tokens[strip.images, strip.rows]
        pieces.append(linear(context, weights.output, weights.output_bias, added).flatten(0, 1))
    return join(pieces).view_as(tokens)


# What `torch.compile` is to call without looking into it: its own products are MKL's, and its attention is slower.
@torch.library.custom_op(f"{OPERATIONS}::mix", mutates_args=())
def _compiled_mix(tokens: Tensor, height: int, width: int, weights: list[Tensor], eps: float, residual: bool) -> Tensor:
    return mix_forward(tokens, height, width, MixWeights(*weights), eps, residual)


@torch.library.custom_op(f"{OPERATIONS}::attend", mutates_args=())
def _compiled_attend(tokens: Tensor, normed: Tensor, reduced: Tensor, weights: list[Tensor], head_dim: int) -> Tensor:
    return attend(tokens, normed, reduced, AttentionWeights(*weights), head_dim)


@_compiled_mix.register_fake
@_compiled_attend.register_fake
def _like_tokens(tokens: Tensor, *_others: object) -> Tensor:
    return torch.empty_like(tokens)
