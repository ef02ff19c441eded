"""Fast paths of the encoder on a CPU: the numbers of the reference, in less time and memory.

Moving the Mix-FFN's fourfold hidden tokens in and out of memory costs more time on a CPU than the arithmetic. So it
runs in strips of rows that stay in the cache, with depthwise convolution and GELU in one pass. Its gradient keeps
nothing but the input and computes each strip once more, except where little memory is enough to keep all results. Keys
and values come from one product, and residuals are added by the product that makes the branch.

Weights are read, and joined, in every call: they can change without notice.

Axes: B batch, C channels, E = C * mlp_ratio hidden channels, H W a stage's grid, N = H*W tokens, M reduced tokens,
A heads.
"""

from collections.abc import Iterator
from itertools import pairwise, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cpu_runtime_segformer import (
    find_onednn,
    linear,
    multiply_over_rows,
    once_differentiable,
    prefers_onednn,
    train_allocator,
)
from .dispatch_segformer import NAMESPACE, altered, altered_dropout, implement, needs_gradient

STRIP_BYTES = 1 << 23  # of hidden tokens, or of queries, at once; a quarter of it costs 10 to 30 % more time
KEPT_BYTES = 1 << 22  # of hidden tokens up to which training keeps them, and two results of their size
FEW_SCORES = 1 << 16  # of a head: below, PyTorch's attention of all heads at once is faster in any case
SCORE_BYTES = 1 << 22  # of attention's scores at once, which fit into two cores' second-level caches

_ExactGELU = type(ACT2FN["gelu"])


class AttentionWeights(NamedTuple):
    """Parameters of attention's linear layers."""

    query: Tensor  # (C, C)
    query_bias: Tensor  # (C,)
    key: Tensor  # (C, C)
    key_bias: Tensor  # (C,)
    value: Tensor  # (C, C)
    value_bias: Tensor  # (C,)
    output: Tensor  # (C, C)
    output_bias: Tensor  # (C,)


class MixWeights(NamedTuple):
    """Parameters of LayerNorm and Mix-FFN."""

    norm: Tensor  # (C,)
    norm_bias: Tensor  # (C,)
    expand: Tensor  # (E, C)
    expand_bias: Tensor  # (E,)
    kernel: Tensor  # (E, 1, 3, 3)
    kernel_bias: Tensor  # (E,)
    shrink: Tensor  # (C, E)
    shrink_bias: Tensor  # (C,)


class Hidden(NamedTuple):
    """Results of a strip that the gradient of Mix-FFN needs."""

    normed: Tensor  # (B, H, W, C), of the rows seen
    mean: Tensor  # (B, H, W, 1)
    rstd: Tensor  # (B, H, W, 1)
    expanded: Tensor  # (B, H, W, E)
    convolved: Tensor  # (B, H, W, E), of the strip's own rows
    active: Tensor  # (B, H, W, E), of these, too


class Strip(NamedTuple):
    """A run of images and rows, and the rows around it that a 3x3 window reads."""

    images: slice
    rows: slice
    seen: slice

    @property
    def kept(self) -> slice:
        """Position of `rows` within `seen`."""
        return slice(self.rows.start - self.seen.start, self.rows.stop - self.seen.start)

    @property
    def missing(self) -> tuple[int, int]:
        """Number of rows of `seen` before and after `rows`."""
        return self.rows.start - self.seen.start, self.seen.stop - self.rows.stop


def cut(batch: int, height: int, row_bytes: int, limit: int, halo: int) -> Iterator[Strip]:
    """Cut a batch into strips that cover every row of every image once: many whole images, or even parts of one.

    Args:
        batch: number of images.
        height: rows of each.
        row_bytes: size of one row.
        limit: size of a strip, which has at least one row.
        halo: number of rows that are read before and after a strip.
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
    """Apply `convolve` and exact GELU, in one pass if oneDNN can: (B, H, W, E) -> (B, H, W, E)."""
    fused = find_onednn("_convolution_pointwise", hidden, kernel, bias)
    if fused is None:
        return F.gelu(convolve(hidden, kernel, bias))
    features, ones = hidden.permute(0, 3, 1, 2), [1, 1]
    features = fused(features, kernel, bias, ones, ones, ones, hidden.shape[-1], "gelu", [], "none")
    return features.permute(0, 2, 3, 1)


def join(pieces: list[Tensor]) -> Tensor:
    """Concatenate strips; a single one is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def mix_forward(tokens: Tensor, height: int, width: int, weights: MixWeights, eps: float, residual: bool) -> Tensor:
    """Compute LayerNorm and Mix-FFN (paper equation 3), plus the tokens where `residual`: (B, N, C) -> (B, N, C)."""
    train_allocator()
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


def mix_hidden(grid: Tensor, weights: MixWeights, eps: float, own: slice) -> Hidden:
    """Compute what the gradient of a strip needs, from its tokens (B, H, W, C), of which some rows are its own."""
    normed, mean, rstd = torch.native_layer_norm(grid, (grid.shape[-1],), weights.norm, weights.norm_bias, eps)
    expanded = linear(normed, weights.expand, weights.expand_bias)
    convolved = convolve(expanded, weights.kernel, weights.kernel_bias)[:, own]
    return Hidden(normed, mean, rstd, expanded, convolved, F.gelu(convolved))


class Mix(torch.autograd.Function):
    """`mix_forward` with a gradient that keeps nothing but the input, which the residual keeps anyway.

    The hidden tokens of a strip are computed once more. The strip then returns the gradients that come from its own
    rows' outputs, which reach one row beyond it; as everything before the convolution is the same for all rows, or adds
    up over them, the contributions of neighbouring strips to a row between them are summed. Up to `KEPT_BYTES` there is
    one strip, and its results are kept.
    """

    @staticmethod
    def forward(ctx, tokens, height, width, eps, residual, *weights):
        """Take the arguments of `mix_forward`, the weights one by one."""
        # Biases of linear layers and convolutions are saved as copies: the reference does not save them, so that
        # changing one before the backward pass is no error.
        norm, norm_bias, *pairs = weights
        saved = [each.clone() if index % 2 else each for index, each in enumerate(pairs)]
        ctx.layout = height, width, eps, residual
        weights = MixWeights(*weights)
        if tokens.shape[:2].numel() * len(weights.expand) * tokens.element_size() > min(KEPT_BYTES, STRIP_BYTES):
            ctx.save_for_backward(tokens, norm, norm_bias, *saved)
            return mix_forward(tokens, height, width, weights, eps, residual)
        train_allocator()
        hidden = mix_hidden(tokens.unflatten(1, (height, width)), weights, eps, slice(None))
        ctx.save_for_backward(tokens, norm, norm_bias, *saved, *hidden)
        rows = tokens.flatten(0, 1) if residual else None
        return linear(hidden.active.flatten(0, 2), weights.shrink, weights.shrink_bias, rows).view_as(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mixed):
        """Return the gradients of the tokens and of each of `MixWeights`."""
        tokens, *saved = ctx.saved_tensors
        height, width, eps, residual = ctx.layout
        num_weights = len(MixWeights._fields)
        weights, hidden = MixWeights(*saved[:num_weights]), saved[num_weights:]
        grads = mix_backward(
            grad_mixed.contiguous(), tokens, height, width, weights, eps, Hidden(*hidden) if hidden else None
        )
        grad_tokens = grads[0].add_(grad_mixed) if residual else grads[0]
        return grad_tokens, None, None, None, None, *grads[1]


def mix_backward(
    grad_mixed: Tensor,
    tokens: Tensor,
    height: int,
    width: int,
    weights: MixWeights,
    eps: float,
    saved: Hidden | None = None,
) -> tuple[Tensor, MixWeights]:
    """Differentiate `mix_forward` without residual: (B, N, C) -> gradients of the tokens (B, N, C) and the weights.

    `saved` are the results of the forward pass if they were kept, of a single strip.
    """
    batch, _, channels = tokens.shape
    num_hidden = len(weights.expand)
    grid, grad_out = (tensor.view(batch, height, width, channels) for tensor in (tokens, grad_mixed))
    grad_grid = torch.zeros_like(grid)
    grads = MixWeights(*(torch.zeros_like(weight) for weight in weights))
    grads.shrink_bias.copy_(grad_out.sum((0, 1, 2)))
    for strip in cut(batch, height, width * num_hidden * tokens.element_size(), STRIP_BYTES, halo=1):
        seen, rows = (strip.images, strip.seen), (strip.images, strip.rows)
        normed, mean, rstd, expanded, convolved, active = saved or mix_hidden(grid[seen], weights, eps, strip.kept)
        grad_rows = grad_out[rows].reshape(-1, channels)
        grads.shrink.add_(multiply_over_rows(grad_rows, active.view(-1, num_hidden)))
        del active
        grad = linear(grad_rows, weights.shrink.t()).view_as(convolved)
        grad = torch.ops.aten.gelu_backward.default(grad, convolved)
        del convolved
        grad = F.pad(grad, (0, 0, 0, 0, *strip.missing)) if any(strip.missing) else grad
        grad, grad_kernel, grad_kernel_bias = torch.ops.aten.convolution_backward.default(
            *(tensor.permute(0, 3, 1, 2) for tensor in (grad, expanded)),
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


def split_heads(tokens: Tensor, head_dim: int) -> Tensor:
    """(B, N, C) -> (B, A, N, C/A), a view."""
    return tokens.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def cut_scores(query: Tensor, keys: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Yield image, head and rows of the query whose scores stay in the cache."""
    batch, num_heads, length, _ = query.shape
    rows = max(SCORE_BYTES // (keys.shape[2] * keys.element_size()), 1)
    for image, head, start in product(range(batch), range(num_heads), range(0, length, rows)):
        yield image, head, slice(start, start + rows)


def attention_maps(query: Tensor, keys: Tensor) -> Tensor:
    """Compute the softmax of the scores: (n, C/A) and (M, C/A) -> (n, M)."""
    scores = linear(query, keys)
    return torch.softmax(scores, -1, out=scores)


class Attention(torch.autograd.Function):
    """Scaled query (B, A, N, C/A), keys and values (B, A, M, C/A) -> context (B, N, C).

    The gradient keeps nothing but the arguments and computes the maps once more.
    """

    @staticmethod
    def forward(ctx, query, keys, values):
        """Compute the maps of a strip of rows at a time."""
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
        """Return the gradients of query, keys and values."""
        query, keys, values = ctx.saved_tensors
        gradient = split_heads(gradient, query.shape[-1]).contiguous()
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
    """Scaled query (B, A, N, C/A), keys and values (B, A, M, C/A) -> context (B, N, C).

    PyTorch's attention forms scores, softmax and context of a few rows at a time, in all heads at once, by products of
    MKL. Only where oneDNN's are far faster, and scores are many, are strips of scores.
    """
    if prefers_onednn() and query.shape[2] * keys.shape[2] >= FEW_SCORES:
        return Attention.apply(*(each.contiguous() for each in (query, keys, values)))
    return F.scaled_dot_product_attention(query, keys, values, scale=1.0).transpose(1, 2).flatten(2)


def attend(tokens: Tensor, normed: Tensor, reduced: Tensor, weights: AttentionWeights, head_dim: int) -> Tensor:
    """Add attention of the normed tokens to the reduced ones to the tokens (paper equation 1).

    Tokens and normed tokens (B, N, C), reduced ones (B, M, C) -> (B, N, C).
    """
    train_allocator()
    keys_values = linear(
        reduced,
        torch.cat([weights.key, weights.value]),
        torch.cat([weights.key_bias, weights.value_bias]),
        sources=(weights.key, weights.value),
    )
    keys, values = (split_heads(half, head_dim) for half in keys_values.chunk(2, dim=-1))
    query_weights = weights.query * head_dim**-0.5, weights.query_bias * head_dim**-0.5
    batch, length, channels = tokens.shape
    if needs_gradient(tokens, normed, reduced, *weights):
        query = split_heads(linear(normed, *query_weights, sources=(weights.query,)), head_dim)
        return linear(context_of(query, keys, values), weights.output, weights.output_bias, tokens)
    pieces = []
    for strip in cut(batch, length, channels * tokens.element_size(), STRIP_BYTES, halo=0):
        query = split_heads(linear(normed[strip.images, strip.rows], *query_weights), head_dim)
        context = context_of(query, keys[strip.images], values[strip.images])
        added = tokens[strip.images, strip.rows]
        pieces.append(linear(context, weights.output, weights.output_bias, added).flatten(0, 1))
    return join(pieces).view_as(tokens)


# Operations that `torch.compile` calls without looking into them: its own products are MKL's.
@torch.library.custom_op(f"{NAMESPACE}::mix_ffn", mutates_args=())
def _compiled_mix(tokens: Tensor, height: int, width: int, weights: list[Tensor], eps: float, residual: bool) -> Tensor:
    return mix_forward(tokens, height, width, MixWeights(*weights), eps, residual)


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def _compiled_attend(tokens: Tensor, normed: Tensor, reduced: Tensor, weights: list[Tensor], head_dim: int) -> Tensor:
    return attend(tokens, normed, reduced, AttentionWeights(*weights), head_dim)


@_compiled_mix.register_fake
@_compiled_attend.register_fake
def _like_tokens(tokens: Tensor, *_others: object) -> Tensor:
    return torch.empty_like(tokens)


# Rows of the dispatch table


def altered_convolution(mlp: nn.Module) -> str:
    """Return why the Mix-FFN's middle could differ from a zero-padded depthwise 3x3 convolution and exact GELU."""
    reason = (
        altered("mlp", mlp, "SegFormerMixFFN")
        or altered("mlp.dwconv", mlp.dwconv, "SegFormerDWConv")
        or altered("mlp.dwconv.dwconv", mlp.dwconv.dwconv, nn.Conv2d, bias=True)
        or altered("mlp.activation", mlp.activation, _ExactGELU)
    )
    if reason:
        return reason
    convolution = mlp.dwconv.dwconv
    is_as_built = (
        convolution.kernel_size == (3, 3)
        and convolution.stride == convolution.padding == convolution.dilation == (1, 1)
        and convolution.groups == convolution.in_channels == convolution.out_channels
        and convolution.padding_mode == "zeros"
    )
    return "" if is_as_built else "mlp.dwconv.dwconv is not a zero-padded depthwise 3x3 convolution"


def unsuitable_memory(tokens: Tensor, weights: tuple[Tensor, ...]) -> str:
    """Return which of these tensors the functions here cannot take."""
    if not tokens.numel():
        return "there are no tokens"
    return "" if all(each.is_contiguous() for each in (tokens, *weights)) else "a tensor is not contiguous"


def is_idle(drop_path: nn.Module) -> bool:
    """Return True if the drop path passes its input on: `nn.Identity`, or the model's own while it drops nothing."""
    if not altered("drop_path", drop_path, nn.Identity):
        return True
    is_own = not altered("drop_path", drop_path, "SegFormerDropPath")
    return is_own and not (drop_path.training and drop_path.probability > 0.0)


def bind_mix_ffn(layer: nn.Module, tokens: Tensor, height: int, width: int) -> tuple | str:
    """Return the operands of `fused_mix_ffn`."""
    mlp, norm = layer.mlp, layer.layer_norm_2
    reason = (
        altered_convolution(mlp)
        or altered("layer_norm_2", norm, nn.LayerNorm, bias=True)
        or altered("mlp.dense1", mlp.dense1, nn.Linear, bias=True)
        or altered("mlp.dense2", mlp.dense2, nn.Linear, bias=True)
        or altered_dropout("mlp.dropout", mlp.dropout)
    )
    if reason:
        return reason
    layers = norm, mlp.dense1, mlp.dwconv.dwconv, mlp.dense2
    weights = MixWeights(*(tensor for each in layers for tensor in (each.weight, each.bias)))
    return unsuitable_memory(tokens, weights) or (layer, tokens, height, width, weights)


def fused_mix_ffn(layer: nn.Module, tokens: Tensor, height: int, width: int, weights: MixWeights) -> Tensor:
    """Add LayerNorm, Mix-FFN (paper equation 3) and drop path to the tokens: (B, N, C) -> (B, N, C)."""
    eps, residual = layer.layer_norm_2.eps, is_idle(layer.drop_path)
    if torch.compiler.is_compiling():
        mixed = _compiled_mix(tokens, height, width, list(weights), eps, residual)
    elif needs_gradient(tokens, *weights):
        mixed = Mix.apply(tokens, height, width, eps, residual, *weights)
    else:
        mixed = mix_forward(tokens, height, width, weights, eps, residual)
    return mixed if residual else tokens + layer.drop_path(mixed)


def bind_attention(layer: nn.Module, tokens: Tensor, height: int, width: int, output_attentions: bool) -> tuple | str:
    """Return the operands of `fused_attention`."""
    if output_attentions:
        return "attention maps are asked for"
    attention = layer.attention
    reason = (
        altered("attention", attention, "SegFormerAttention")
        or altered("attention.self", attention.self, "SegFormerEfficientSelfAttention")
        or altered("attention.output", attention.output, "SegFormerSelfOutput")
        or altered_dropout("attention.output.dropout", attention.output.dropout)
        or altered("layer_norm_1", layer.layer_norm_1, nn.LayerNorm, bias=True)
        or _altered_attention(attention.self)
        or altered("attention.output.dense", attention.output.dense, nn.Linear, bias=True)
        or ("" if is_idle(layer.drop_path) else "drop_path is active, or not the model's own")
    )
    if reason:
        return reason
    inner = attention.self
    layers = inner.query, inner.key, inner.value, attention.output.dense
    weights = AttentionWeights(*(tensor for each in layers for tensor in (each.weight, each.bias)))
    return unsuitable_memory(tokens, weights) or (layer, tokens, height, width, weights)


def _altered_attention(inner: nn.Module) -> str:
    """Return why the attention could differ from scaled dot products of linear layers' outputs."""
    implementation = inner.config._attn_implementation
    if implementation != "sdpa":
        return f"attention is {implementation!r}, not 'sdpa'"
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        return "another function is registered as 'sdpa'"
    if inner.training and inner.config.attention_probs_dropout_prob:
        return "attention's dropout is active"
    reason = (
        altered("attention.self.query", inner.query, nn.Linear, bias=True)
        or altered("attention.self.key", inner.key, nn.Linear, bias=True)
        or altered("attention.self.value", inner.value, nn.Linear, bias=True)
    )
    if reason or inner.sr_ratio == 1:
        return reason
    return altered("attention.self.sr", inner.sr, nn.Conv2d) or altered(
        "attention.self.layer_norm", inner.layer_norm, nn.LayerNorm
    )


def fused_attention(layer: nn.Module, tokens: Tensor, height: int, width: int, weights: AttentionWeights) -> Tensor:
    """Add LayerNorm and efficient self-attention (paper equation 1) to the tokens: (B, N, C) -> (B, N, C)."""
    inner, normed = layer.attention.self, layer.layer_norm_1(tokens)
    reduced = inner.reduce(normed, height, width) if inner.sr_ratio > 1 else normed
    if torch.compiler.is_compiling():
        return _compiled_attend(tokens, normed, reduced, list(weights), inner.head_dim)
    return attend(tokens, normed, reduced, weights, inner.head_dim)


implement("mix_ffn", "cpu_strips", bind_mix_ffn, fused_mix_ffn)
implement("attention", "cpu_strips", bind_attention, fused_attention)

__all__ = ["altered_convolution", "fused_attention", "fused_mix_ffn"]
