"""Bilinear interpolation inside kernels, with PyTorch's arithmetic.

New position n has the source coordinate (n + 0.5) * old / new - 0.5, clamped to the first and the last old position.
The coordinate never decreases, so the new positions between two neighbouring old ones are contiguous, and `first_new`
finds their start without a search. Each program computes such a range, and no two programs write to the same address.
"""

import triton
import triton.language as tl


@triton.jit
def scale_of(num_old, num_new, ACC: tl.constexpr):
    """Return the number of old positions per new one, rounded as in PyTorch: `/` of float32 is not exact in Triton."""
    old, new = tl.full((), num_old, ACC), tl.full((), num_new, ACC)
    if ACC == tl.float64:  # noqa: SIM108, SIM300 (Triton decides it while compiling)
        scale = old / new
    else:
        scale = tl.div_rn(old, new)
    return scale


@triton.jit
def taps(new, num_old, scale, ACC: tl.constexpr):
    """Return the lower of the two old positions, and the fraction (0 to 1) by which the new one is beyond it."""
    position = scale * (tl.cast(new, ACC) + 0.5) - 0.5
    position = tl.minimum(tl.maximum(position, 0.0), tl.full((), num_old - 1, ACC))
    lower = position.to(tl.int32)
    return lower, position - lower.to(ACC)


@triton.jit
def first_new(old, num_old, num_new, scale, ACC: tl.constexpr):
    """Return the first new position at or after an old one: 0 for old ones up to 0, `num_new` for `num_old`."""
    # Rounding moves the estimate by less than 1: the position is one of three, and each earlier one is counted.
    guess = ((tl.full((), old, ACC) + 0.5) / scale - 0.5).to(tl.int32) - 1
    guess = tl.minimum(tl.maximum(guess, 0), num_new)
    found = guess
    for step in tl.static_range(4):
        lower, _ = taps(guess + step, num_old, scale, ACC)
        found += tl.where((lower < old) & (guess + step < num_new), 1, 0)
    found = tl.where(old <= 0, 0, found)
    return tl.where(old >= num_old, num_new, found)


@triton.jit
def between_columns(row, lower, fraction, width, channels, mask, stride_column, stride_channel, ACC: tl.constexpr):
    """Interpolate a row of a grid: pointer to the row, taps (P,), channels (C,), mask (P, C) -> (P, C)."""
    lower = tl.minimum(lower, width - 1)
    upper = tl.minimum(lower + 1, width - 1)
    channels = channels[None, :] * stride_channel
    left = tl.load(row + lower[:, None] * stride_column + channels, mask=mask, other=0.0).to(ACC)
    right = tl.load(row + upper[:, None] * stride_column + channels, mask=mask, other=0.0).to(ACC)
    return left * (1 - fraction)[:, None] + right * fraction[:, None]


@triton.jit
def both_rows(
    grid,
    row,
    lower,
    fraction,
    channels,
    mask,
    height,
    width,
    stride_row,
    stride_column,
    stride_channel,
    ACC: tl.constexpr,
):
    """Interpolate a row of a grid and the next one (the last row: itself) to new columns: each (P, C)."""
    above = grid + row * stride_row
    below = grid + tl.minimum(row + 1, height - 1) * stride_row
    return (
        between_columns(above, lower, fraction, width, channels, mask, stride_column, stride_channel, ACC),
        between_columns(below, lower, fraction, width, channels, mask, stride_column, stride_channel, ACC),
    )


__all__ = ["between_columns", "both_rows", "first_new", "scale_of", "taps"]
