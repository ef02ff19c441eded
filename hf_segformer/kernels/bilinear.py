"""Where new positions lie between old ones in bilinear interpolation, with PyTorch's arithmetic, inside kernels.

A new position n lies at (n + 0.5) * old / new - 0.5, cut off at the first and the last old one. As this never falls,
the new positions between one old position and the next are a run, which `first_new` finds without a search: kernels own
runs, and no two programs ever write to the same place.
"""

import triton
import triton.language as tl


@triton.jit
def scale_of(num_old, num_new, ACC: tl.constexpr):
    """Old positions a new one, rounded as PyTorch does: Triton's own division of float32 is not exact."""
    old, new = tl.full((), num_old, ACC), tl.full((), num_new, ACC)
    if ACC == tl.float64:  # noqa: SIM108, SIM300 (Triton decides it while compiling)
        scale = old / new
    else:
        scale = tl.div_rn(old, new)
    return scale


@triton.jit
def taps(new, num_old, scale, ACC: tl.constexpr):
    """The lower of both old positions, and how far a new one is beyond it (0 to 1)."""
    position = scale * (tl.cast(new, ACC) + 0.5) - 0.5
    position = tl.minimum(tl.maximum(position, 0.0), tl.full((), num_old - 1, ACC))
    lower = position.to(tl.int32)
    return lower, position - lower.to(ACC)


@triton.jit
def first_new(old, num_old, num_new, scale, ACC: tl.constexpr):
    """The first new position that lies at or after an old one: 0 for old ones up to 0, `num_new` for `num_old`."""
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
    """A row of a grid at new columns: pointer to the row, taps (P,), channels (C,), mask (P, C) -> (P, C)."""
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
    """A row of a grid and the next one, or itself where it is the last, at new columns: each (P, C)."""
    above = grid + row * stride_row
    below = grid + tl.minimum(row + 1, height - 1) * stride_row
    return (
        between_columns(above, lower, fraction, width, channels, mask, stride_column, stride_channel, ACC),
        between_columns(below, lower, fraction, width, channels, mask, stride_column, stride_channel, ACC),
    )
