"""Sum of the decode head's upsampled stages, with BatchNorm and ReLU in the same pass at inference.

The head is folded: each stage was multiplied at its own resolution, and the kernel upsamples all stages to the first
one's size and adds them up. A program computes some columns of a row and some channels; it reads lower stages as it
needs them, mostly from the cache. In the backward pass each program computes the gradient of one cell of a lower stage
from the pixels that the cell contributes to: no atomic additions, so the result is deterministic.

Memory traffic, in tensors of the first stage's size: forward 1.33 reads and one write (PyTorch: nine reads and seven
writes, with BatchNorm and ReLU two more of each); backward three reads and 0.33 writes, mostly from the cache.

Axes: B images, D channels, h w the first stage's grid, P columns of a block.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cpu_runtime_segformer import once_differentiable
from .bilinear import both_rows, first_new, scale_of, taps
from .launch import Launch, accumulator, power_of_2

_COLUMNS = 16  # of a block
_CHANNELS = 128  # of a block
MOST_STAGES = 4


@triton.jit
def _between(stage, image, row, columns, channels, mask, dim, height, width, new_height, new_width, ACC: tl.constexpr):
    """Interpolate a stage (B, h', w', D) to new columns of a new row -> (P, D)."""
    at, down = taps(row, height, scale_of(height, new_height, ACC), ACC)
    lower, fraction = taps(columns, width, scale_of(width, new_width, ACC), ACC)
    grid = stage + image * height * width * dim
    above, below = both_rows(grid, at, lower, fraction, channels, mask, height, width, width * dim, dim, 1, ACC)
    return above * (1 - down) + below * down


@triton.jit
def _sum(
    first,  # (B, h, w, D)
    second,  # lower stages, each (B, h', w', D)
    third,
    fourth,
    scale,  # (D,)
    shift,  # (D,)
    out,  # (B, h, w, D)
    dim,
    height,
    width,
    height2,
    width2,
    height3,
    width3,
    height4,
    width4,
    NUM_STAGES: tl.constexpr,
    ACTIVATE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    num_blocks = tl.cdiv(width, BLOCK_X)
    columns = tl.program_id(0) % num_blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    row, image = tl.program_id(0) // num_blocks, tl.program_id(2).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (columns < width)[:, None] & (channels < dim)[None, :]
    place = ((image * height + row) * width + columns)[:, None] * dim + channels[None, :]
    found = tl.load(first + place, mask=mask, other=0.0).to(ACC)
    if NUM_STAGES > 1:
        found += _between(second, image, row, columns, channels, mask, dim, height2, width2, height, width, ACC)
    if NUM_STAGES > 2:
        found += _between(third, image, row, columns, channels, mask, dim, height3, width3, height, width, ACC)
    if NUM_STAGES > 3:
        found += _between(fourth, image, row, columns, channels, mask, dim, height4, width4, height, width, ACC)
    if ACTIVATE:
        factor = tl.load(scale + channels, mask=channels < dim, other=0.0).to(ACC)[None, :]
        found = found * factor + tl.load(shift + channels, mask=channels < dim, other=0.0).to(ACC)[None, :]
        found = tl.where(found < 0, 0.0, found)  # a NaN stays one
    tl.store(out + place, found, mask=mask)


@triton.jit
def _gather(
    change,  # (B, h, w, D): gradient of the sum
    out,  # (B, h', w', D): gradient of a lower stage
    dim,
    height,
    width,
    new_height,
    new_width,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    cell, column = tl.program_id(0), tl.program_id(0) % width
    row, image = cell // width, tl.program_id(2).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    scale_y, scale_x = scale_of(height, new_height, ACC), scale_of(width, new_width, ACC)
    last_column = first_new(column + 1, width, new_width, scale_x, ACC)
    found = tl.zeros((BLOCK_X, BLOCK_D), ACC)
    for start in range(first_new(column - 1, width, new_width, scale_x, ACC), last_column, BLOCK_X):
        columns = start + tl.arange(0, BLOCK_X)
        lower, fraction = taps(columns, width, scale_x, ACC)
        upper = tl.minimum(lower + 1, width - 1)
        share = tl.where(lower == column, 1 - fraction, 0.0) + tl.where(upper == column, fraction, 0.0)
        mask = (columns < last_column)[:, None] & (channels < dim)[None, :]
        first = first_new(row - 1, height, new_height, scale_y, ACC)
        for new_row in range(first, first_new(row + 1, height, new_height, scale_y, ACC)):
            at, down = taps(new_row, height, scale_y, ACC)
            weight = tl.where(at == row, 1 - down, 0.0)
            weight += tl.where(tl.minimum(at + 1, height - 1) == row, down, 0.0)
            place = ((image * new_height + new_row) * new_width + columns)[:, None] * dim + channels[None, :]
            found += tl.load(change + place, mask=mask, other=0.0).to(ACC) * (share * weight)[:, None]
    place = ((image * height + row) * width + column) * dim + channels
    tl.store(out + place, tl.sum(found, axis=0), mask=channels < dim)


def plan(maps: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None, out: Tensor) -> Launch:
    """Return the launch that adds up maps (B, h', w', D) into `out` (B, h, w, D)."""
    batch, height, width, dim = out.shape
    block_d = min(power_of_2(dim), _CHANNELS)
    lower = [*maps[1:], *[maps[0]] * (MOST_STAGES - len(maps))]
    sizes = [side for stage in lower for side in stage.shape[1:3]]
    factors = (out, out) if scale is None or shift is None else (scale, shift)
    return Launch(
        _sum,
        (height * triton.cdiv(width, _COLUMNS), triton.cdiv(dim, block_d), batch),
        (maps[0], *lower, *factors, out, dim, height, width, *sizes),
        {
            "NUM_STAGES": len(maps),
            "ACTIVATE": scale is not None,
            "BLOCK_X": _COLUMNS,
            "BLOCK_D": block_d,
            "ACC": accumulator(out.dtype),
        },
    )


def plan_gradient(change: Tensor, out: Tensor) -> Launch:
    """Return the launch that computes a lower stage's gradient (B, h', w', D) from the sum's (B, h, w, D)."""
    batch, height, width, dim = out.shape
    block_d = min(power_of_2(dim), _CHANNELS)
    block_x = min(max(power_of_2(2 * change.shape[2] // width), 4), 16)
    return Launch(
        _gather,
        (height * width, triton.cdiv(dim, block_d), batch),
        (change, out, dim, height, width, *change.shape[1:3]),
        {"BLOCK_X": block_x, "BLOCK_D": block_d, "ACC": accumulator(change.dtype)},
    )


@torch.library.custom_op("hf_segformer::upsample_sum", mutates_args=())
def upsample_sum(maps: list[Tensor]) -> Tensor:
    """Upsample the maps of lower stages to the first one's size and add all up.

    Args:
        maps: one to four of (B, h', w', D), of one type: float16, bfloat16, float32 or float64.

    Returns:
        (B, h, w, D), contiguous.
    """
    maps = [stage.contiguous() for stage in maps]
    out = torch.empty_like(maps[0])
    plan(maps, None, None, out).run()
    return out


@upsample_sum.register_fake
def _fake(maps: list[Tensor]) -> Tensor:
    return torch.empty_like(maps[0], memory_format=torch.contiguous_format)


@torch.library.custom_op("hf_segformer::upsample_gather", mutates_args=())
def upsample_gather(change: Tensor, height: int, width: int) -> Tensor:
    """Compute an upsampled map's gradient (B, height, width, D) from that of the result (B, h, w, D)."""
    out = change.new_empty(len(change), height, width, change.shape[-1])
    plan_gradient(change.contiguous(), out).run()
    return out


@upsample_gather.register_fake
def _fake_gather(change: Tensor, height: int, width: int) -> Tensor:
    return change.new_empty(len(change), height, width, change.shape[-1])


def _keep(ctx: Any, inputs: tuple[list[Tensor]], output: Tensor) -> None:
    ctx.sizes = [stage.shape[1:3] for stage in inputs[0]]


@once_differentiable
def _backward(ctx: Any, change: Tensor) -> list[Tensor]:
    change = change.contiguous()  # once, not for each stage
    return [change, *(upsample_gather(change, *size) for size in ctx.sizes[1:])]


upsample_sum.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("hf_segformer::upsample_sum_relu", mutates_args=())
def upsample_sum_relu(maps: list[Tensor], scale: Tensor, shift: Tensor) -> Tensor:
    """Apply `upsample_sum`, then multiply by `scale` (D,), add `shift` (D,) and apply ReLU; it has no gradient."""
    maps = [stage.contiguous() for stage in maps]
    out = torch.empty_like(maps[0])
    plan(maps, scale.contiguous(), shift.contiguous(), out).run()
    return out


@upsample_sum_relu.register_fake
def _fake_relu(maps: list[Tensor], scale: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(maps[0], memory_format=torch.contiguous_format)


__all__ = ["MOST_STAGES", "plan", "plan_gradient", "upsample_gather", "upsample_sum", "upsample_sum_relu"]
