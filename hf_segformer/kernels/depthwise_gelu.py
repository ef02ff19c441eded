"""Depthwise 3x3 convolution, bias and exact GELU on tokens (B, N, C): the middle of the Mix-FFN.

A program owns some columns and channels and walks down the rows of a strip. The rows above, here and below, each in
three shifts, are in registers; a step loads one row. Tokens are read and written in their own layout, without copies.

The backward pass keeps only the tokens. One kernel recomputes the convolution, differentiates GELU, writes the result,
and sums the gradients of kernel and bias for each strip. The forward kernel with a flipped convolution kernel then
computes the gradient of the tokens.

Memory traffic, in passes over (B, N, C): forward one read and one write; PyTorch reads and writes twice, and more where
it changes the layout. Backward three reads and two writes; PyTorch reads eight times and writes three times.

Axes: B images, C channels, H W the grid, N = H*W tokens, P columns of a block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cpu_runtime_segformer import once_differentiable
from .launch import Launch, accumulator, power_of_2

_CHANNELS = 64  # of a block: 128 bytes of 16-bit floats, a whole line of the cache
_COLUMNS = 8  # of a block: nine tiles of it and ten sums are alive in the gradient
_ROWS = 16  # of a strip: 2 in 18 rows are read twice


@triton.jit
def _read_row(
    tokens, row, columns, channels, height, width, num_channels, stride_token, stride_channel, ACC: tl.constexpr
):
    """Load a row's tokens one column to the left, here, and one to the right, each (P, C); 0 beyond the grid."""
    start = tokens + row * width * stride_token + channels[None, :] * stride_channel
    rows = row + tl.zeros_like(channels)  # Triton's interpreter (3.9) cannot broadcast a single truth value
    is_row = ((rows >= 0) & (rows < height) & (channels < num_channels))[None, :]
    here = columns[:, None]
    left = tl.load(start + (here - 1) * stride_token, mask=is_row & (here > 0) & (here <= width), other=0.0).to(ACC)
    middle = tl.load(start + here * stride_token, mask=is_row & (here < width), other=0.0).to(ACC)
    right = tl.load(start + (here + 1) * stride_token, mask=is_row & (here + 1 < width), other=0.0).to(ACC)
    return left, middle, right


@triton.jit
def _read_kernel_row(kernel, channels, num_channels, first, step, ACC: tl.constexpr):
    """Load three of the nine weights, each (1, C)."""
    place, is_channel = kernel + channels * 9 + first, channels < num_channels
    left = tl.load(place, mask=is_channel, other=0.0).to(ACC)[None, :]
    middle = tl.load(place + step, mask=is_channel, other=0.0).to(ACC)[None, :]
    right = tl.load(place + 2 * step, mask=is_channel, other=0.0).to(ACC)[None, :]
    return left, middle, right


@triton.jit
def _convolve(
    tokens,  # (B, N, C) of any strides
    kernel,  # (C, 1, 3, 3)
    bias,  # (C,)
    out,  # (B, N, C)
    num_channels,
    height,
    width,
    stride_image,
    stride_token,
    stride_channel,
    num_rows,
    IS_GRADIENT: tl.constexpr,  # flipped kernel, no bias, no GELU
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    num_blocks = tl.cdiv(width, BLOCK_X)
    columns = tl.program_id(0) % num_blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    first = tl.program_id(0) // num_blocks * num_rows
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(2).to(tl.int64)
    tokens += image * stride_image
    out += image * height * width * num_channels
    if IS_GRADIENT:
        k00, k01, k02 = _read_kernel_row(kernel, channels, num_channels, 8, -1, ACC)
        k10, k11, k12 = _read_kernel_row(kernel, channels, num_channels, 5, -1, ACC)
        k20, k21, k22 = _read_kernel_row(kernel, channels, num_channels, 2, -1, ACC)
    else:
        k00, k01, k02 = _read_kernel_row(kernel, channels, num_channels, 0, 1, ACC)
        k10, k11, k12 = _read_kernel_row(kernel, channels, num_channels, 3, 1, ACC)
        k20, k21, k22 = _read_kernel_row(kernel, channels, num_channels, 6, 1, ACC)
        shift = tl.load(bias + channels, mask=channels < num_channels, other=0.0).to(ACC)[None, :]
    a0, a1, a2 = _read_row(
        tokens, first - 1, columns, channels, height, width, num_channels, stride_token, stride_channel, ACC
    )
    b0, b1, b2 = _read_row(
        tokens, first, columns, channels, height, width, num_channels, stride_token, stride_channel, ACC
    )
    mask = (columns < width)[:, None] & (channels < num_channels)[None, :]
    for row in range(first, tl.minimum(first + num_rows, height)):
        c0, c1, c2 = _read_row(
            tokens, row + 1, columns, channels, height, width, num_channels, stride_token, stride_channel, ACC
        )
        found = a0 * k00 + a1 * k01 + a2 * k02
        found += b0 * k10 + b1 * k11 + b2 * k12
        found += c0 * k20 + c1 * k21 + c2 * k22
        if not IS_GRADIENT:
            found += shift
            found = 0.5 * found * (1 + tl.erf(found * 0.7071067811865476))
        place = (row * width + columns)[:, None] * num_channels + channels[None, :]
        tl.store(out + place, found, mask=mask)
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2


@triton.jit
def _gradient(
    change,  # (B, N, C), contiguous: the gradient of the output
    tokens,  # (B, N, C) of any strides
    kernel,  # (C, 1, 3, 3)
    bias,  # (C,)
    before,  # (B, N, C): the gradient before GELU
    sums,  # (programs of a block of channels, 10, C): gradients of the nine weights and of the bias
    num_channels,
    height,
    width,
    stride_image,
    stride_token,
    stride_channel,
    num_rows,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    num_blocks = tl.cdiv(width, BLOCK_X)
    columns = tl.program_id(0) % num_blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    first = tl.program_id(0) // num_blocks * num_rows
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(2).to(tl.int64)
    tokens += image * stride_image
    change += image * height * width * num_channels
    before += image * height * width * num_channels
    k00, k01, k02 = _read_kernel_row(kernel, channels, num_channels, 0, 1, ACC)
    k10, k11, k12 = _read_kernel_row(kernel, channels, num_channels, 3, 1, ACC)
    k20, k21, k22 = _read_kernel_row(kernel, channels, num_channels, 6, 1, ACC)
    shift = tl.load(bias + channels, mask=channels < num_channels, other=0.0).to(ACC)[None, :]
    a0, a1, a2 = _read_row(
        tokens, first - 1, columns, channels, height, width, num_channels, stride_token, stride_channel, ACC
    )
    b0, b1, b2 = _read_row(
        tokens, first, columns, channels, height, width, num_channels, stride_token, stride_channel, ACC
    )
    zero = tl.zeros((BLOCK_X, BLOCK_C), ACC)
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    mask = (columns < width)[:, None] & (channels < num_channels)[None, :]
    for row in range(first, tl.minimum(first + num_rows, height)):
        c0, c1, c2 = _read_row(
            tokens, row + 1, columns, channels, height, width, num_channels, stride_token, stride_channel, ACC
        )
        found = a0 * k00 + a1 * k01 + a2 * k02
        found += b0 * k10 + b1 * k11 + b2 * k12
        found += c0 * k20 + c1 * k21 + c2 * k22 + shift
        density = tl.exp(found * found * -0.5) * 0.3989422804014327
        slope = 0.5 * (1 + tl.erf(found * 0.7071067811865476)) + found * density
        place = (row * width + columns)[:, None] * num_channels + channels[None, :]
        # Beyond the grid the gradient is 0 and adds nothing to the sums.
        found = tl.load(change + place, mask=mask, other=0.0).to(ACC) * slope
        tl.store(before + place, found, mask=mask)
        s0, s1, s2 = s0 + found * a0, s1 + found * a1, s2 + found * a2
        s3, s4, s5 = s3 + found * b0, s4 + found * b1, s5 + found * b2
        s6, s7, s8 = s6 + found * c0, s7 + found * c1, s8 + found * c2
        s9 += found
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2
    program = image * tl.num_programs(0) + tl.program_id(0)
    target, is_channel = sums + program * 10 * num_channels + channels, channels < num_channels
    tl.store(target, tl.sum(s0, axis=0), mask=is_channel)
    tl.store(target + num_channels, tl.sum(s1, axis=0), mask=is_channel)
    tl.store(target + num_channels * 2, tl.sum(s2, axis=0), mask=is_channel)
    tl.store(target + num_channels * 3, tl.sum(s3, axis=0), mask=is_channel)
    tl.store(target + num_channels * 4, tl.sum(s4, axis=0), mask=is_channel)
    tl.store(target + num_channels * 5, tl.sum(s5, axis=0), mask=is_channel)
    tl.store(target + num_channels * 6, tl.sum(s6, axis=0), mask=is_channel)
    tl.store(target + num_channels * 7, tl.sum(s7, axis=0), mask=is_channel)
    tl.store(target + num_channels * 8, tl.sum(s8, axis=0), mask=is_channel)
    tl.store(target + num_channels * 9, tl.sum(s9, axis=0), mask=is_channel)


def _layout(tokens: Tensor, height: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Return the grid, arguments and constants that all launches share."""
    batch, _, num_channels = tokens.shape
    block_c = min(power_of_2(num_channels), _CHANNELS)
    num_strips = triton.cdiv(height, _ROWS) * triton.cdiv(width, _COLUMNS)
    grid = (num_strips, triton.cdiv(num_channels, block_c), batch)
    arguments = (num_channels, height, width, *tokens.stride(), _ROWS)
    return grid, arguments, {"BLOCK_X": _COLUMNS, "BLOCK_C": block_c, "ACC": accumulator(tokens.dtype)}


def plan(
    tokens: Tensor, kernel: Tensor, bias: Tensor, out: Tensor, height: int, width: int, is_gradient: bool = False
) -> Launch:
    """Return the launch that convolves tokens (B, N, C) into `out`; `is_gradient`: flipped kernel, no GELU."""
    grid, arguments, constants = _layout(tokens, height, width)
    constants = {"IS_GRADIENT": is_gradient, **constants}
    return Launch(_convolve, grid, (tokens, kernel, bias, out, *arguments), constants)


def plan_gradient(
    change: Tensor, tokens: Tensor, kernel: Tensor, bias: Tensor, before: Tensor, height: int, width: int
) -> tuple[Launch, Tensor]:
    """Return the launch that fills `before` (B, N, C) and sums (programs, 10, C), and these sums."""
    grid, arguments, constants = _layout(tokens, height, width)
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    sums = tokens.new_empty((grid[0] * grid[2], 10, tokens.shape[2]), dtype=dtype)
    return Launch(_gradient, grid, (change, tokens, kernel, bias, before, sums, *arguments), constants), sums


@torch.library.custom_op("hf_segformer::depthwise_gelu", mutates_args=())
def depthwise_gelu(tokens: Tensor, kernel: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Apply the zero-padded depthwise convolution and GELU.

    Args:
        tokens: (B, N, C) of any strides; float16, bfloat16, float32 or float64.
        kernel: (C, 1, 3, 3).
        bias: (C,).
        height: H.
        width: W; H * W is N.

    Returns:
        (B, N, C), contiguous, with the tokens' dtype.
    """
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    plan(tokens, kernel.contiguous(), bias.contiguous(), out, height, width).run()
    return out


@depthwise_gelu.register_fake
def _fake(tokens: Tensor, kernel: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


@torch.library.custom_op("hf_segformer::depthwise_gelu_backward", mutates_args=())
def depthwise_gelu_backward(
    change: Tensor, tokens: Tensor, kernel: Tensor, bias: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of tokens, kernel and bias, in their shapes, from that of the result (B, N, C)."""
    change, kernel, bias = change.contiguous(), kernel.contiguous(), bias.contiguous()
    before, found = torch.empty_like(change), torch.empty_like(change)
    launch, sums = plan_gradient(change, tokens, kernel, bias, before, height, width)
    launch.run()
    plan(before, kernel, bias, found, height, width, is_gradient=True).run()
    weights, [shift] = sums.sum(0).split([9, 1])
    # Copies: the outputs of an operation may not share memory.
    return found, weights.t().to(kernel.dtype, copy=True).reshape(kernel.shape), shift.to(bias.dtype, copy=True)


@depthwise_gelu_backward.register_fake
def _fake_backward(
    change: Tensor, tokens: Tensor, kernel: Tensor, bias: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(change, memory_format=torch.contiguous_format),
        kernel.new_empty(kernel.shape),
        bias.new_empty(bias.shape),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, kernel, bias, *ctx.size = inputs
    ctx.save_for_backward(tokens, kernel, bias)


@once_differentiable
def _backward(ctx: Any, change: Tensor) -> tuple[Tensor | None, ...]:
    return (*depthwise_gelu_backward(change, *ctx.saved_tensors, *ctx.size), None, None)


depthwise_gelu.register_autograd(_backward, setup_context=_keep)

__all__ = ["depthwise_gelu", "depthwise_gelu_backward", "plan", "plan_gradient"]
