"""`upsample_cross_entropy` on a GPU: loss and gradient in one pass over the labels, without logits at full size.

A program owns a patch of the grid, some rows high and some columns wide, with all classes. It walks down the rows. The
pixels between two rows of the grid are upsampled, one row of pixels at a time. Their softmax gives the loss and the
gradient, which is split between the grid rows above and below. The row above is then complete: columns of pixels are
summed into columns of the grid, and the row is written once, in a fixed order. Pixels beyond the patch's left and upper
edge contribute to it, too, and are computed by both neighbours; their loss counts once.

Memory traffic for B = 8, 512x512 from 128x128, 150 classes, bfloat16: 39 MB of logits and 17 MB of labels are read,
79 MB of gradient written in float32, and read again to be scaled. PyTorch's own operations move the 1,258 MB of float32
logits at full size about eight times. The remaining cost is arithmetic: 315 million exponentials, and about a third
more for the edges and for padding the classes to the next power of two.

Axes: B images, K classes, h w the grid, H W the labels, P columns of pixels that contribute to a patch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cpu_runtime_segformer import once_differentiable
from .bilinear import both_rows, first_new, scale_of, taps
from .launch import Launch, accumulator, power_of_2

_TILE = 2048  # columns times classes: five of them are alive at once; twice as much spills registers (sm_80, sm_90)
_LARGEST_TILE = 1 << 15  # beyond, as with labels far larger than the grid, registers spill and the reference is faster
_NUM_PROGRAMS = 1024  # wanted: a few for each multiprocessor of a large GPU
_MOST_ROWS = 32  # of a patch: the row computed twice is then one of 33


@triton.jit
def _cross_entropy(
    logits,  # (B, K, h, w) of any strides
    labels,  # (B, H, W)
    class_weights,  # (K,)
    losses,  # (programs,)
    numbers,  # (programs,): sum of the weights of the valid pixels
    gradient,  # (B, h, w, K)
    num_classes,
    height,
    width,
    new_height,
    new_width,
    stride_image,
    stride_class,
    stride_row,
    stride_column,
    num_rows,
    num_columns,
    ignore_index,
    SMOOTHING: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    scale_y, scale_x = scale_of(height, new_height, ACC), scale_of(width, new_width, ACC)
    first_row, first_column = tl.program_id(1) * num_rows, tl.program_id(0) * num_columns
    last_row = tl.minimum(first_row + num_rows, height)
    last_column = tl.minimum(first_column + num_columns, width)
    start = first_new(first_column - 1, width, new_width, scale_x, ACC)
    columns = start + tl.arange(0, BLOCK_X)
    is_touching = columns < first_new(last_column, width, new_width, scale_x, ACC)
    lower, fraction = taps(columns, width, scale_x, ACC)
    upper = tl.minimum(lower + 1, width - 1)
    classes = tl.arange(0, BLOCK_K)
    is_class = classes < num_classes
    mask = is_touching[:, None] & is_class[None, :]
    weights = tl.load(class_weights + classes, mask=is_class, other=0.0).to(ACC)
    all_weights = tl.sum(weights, axis=0)
    each = tl.full((), SMOOTHING, ACC) / tl.full((), num_classes, ACC)
    loss = tl.zeros((BLOCK_X,), ACC)
    number = tl.zeros((BLOCK_X,), ACC)
    carried = tl.zeros((BLOCK_X, BLOCK_K), ACC)
    grid = logits + image * stride_image
    for row in range(tl.maximum(first_row - 1, 0), last_row):
        above, below = both_rows(
            grid, row, lower, fraction, classes, mask, height, width, stride_row, stride_column, stride_class, ACC
        )
        to_above = carried
        to_below = tl.zeros((BLOCK_X, BLOCK_K), ACC)
        first = first_new(row, height, new_height, scale_y, ACC)
        last = first_new(row + 1, height, new_height, scale_y, ACC)
        is_own = (lower >= first_column) & (row >= first_row)
        for new_row in range(first, last):
            _, down = taps(new_row, height, scale_y, ACC)
            place = (image * new_height + new_row) * new_width + columns
            label = tl.load(labels + place, mask=is_touching, other=ignore_index)
            # Labels are not checked while compiling: one out of range must not be used as an address.
            counts = is_touching & (label != ignore_index) & (label >= 0) & (label < num_classes)
            weight = tl.load(class_weights + label, mask=counts, other=0.0).to(ACC)
            own = weight * (1 - SMOOTHING)
            values = above * (1 - down) + below * down
            values = tl.where(is_class[None, :], values, float("-inf"))
            highest = tl.max(values, axis=1)
            powers = tl.exp(values - highest[:, None])
            total = tl.sum(powers, axis=1)
            log_total = tl.log(total) + highest
            is_label = classes[None, :] == label[:, None]
            likelihood = tl.sum(tl.where(is_label, values, 0.0), axis=1)
            here = own * (log_total - likelihood)
            if SMOOTHING > 0:
                spread = tl.sum(tl.where(is_class[None, :], values, 0.0) * weights[None, :], axis=1)
                here += (all_weights * log_total - spread) * each
            loss += tl.where(counts & is_own, here, 0.0)
            number += tl.where(counts & is_own, weight, 0.0)
            if WITH_GRADIENT:
                slope = own
                if SMOOTHING > 0:
                    slope += all_weights * each
                change = powers * (slope / total)[:, None] - tl.where(is_label, own[:, None], 0.0)
                if SMOOTHING > 0:
                    change -= weights[None, :] * each
                change = tl.where(counts[:, None], change, 0.0)
                to_above += change * (1 - down)
                to_below += change * down
        if WITH_GRADIENT:
            if row >= first_row:
                target = gradient + ((image * height + row) * width) * num_classes + classes
                for column in range(first_column, last_column):
                    share = tl.where(lower == column, 1 - fraction, 0.0) + tl.where(upper == column, fraction, 0.0)
                    found = tl.sum(to_above * share[:, None], axis=0)
                    tl.store(target + column * num_classes, found, mask=is_class)
            carried = to_below
    program = (image * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(losses + program, tl.sum(loss, axis=0))
    tl.store(numbers + program, tl.sum(number, axis=0))


def _block(num_classes: int, width: int, new_width: int) -> tuple[int, int, int]:
    """Return a tile's columns of pixels and classes, and the number of grid columns of a patch."""
    block_k, ratio = power_of_2(num_classes), new_width / width
    # Two runs of pixels touch a column. Rounding may add a pixel, but not where the ratio is a power of two.
    spare = 0 if ratio.is_integer() and int(ratio).bit_count() == 1 else 1
    block_x = max(_TILE // block_k, 8, power_of_2(int(-(-2 * ratio // 1)) + spare))
    return block_x, block_k, min(max(int((block_x - spare) / ratio) - 1, 1), 64)


def fits(num_classes: int, width: int, new_width: int) -> bool:
    """Return True if a tile is small enough; widths may be symbols, as while compiling for any size."""
    most_columns = _LARGEST_TILE // power_of_2(num_classes)
    return most_columns >= 8 and 2 * new_width <= (most_columns - 1) * width


def plan(
    logits: Tensor, labels: Tensor, weight: Tensor, ignore_index: int, label_smoothing: float, with_gradient: bool
) -> tuple[Launch, Tensor, Tensor, Tensor]:
    """Return the launch and its outputs: losses and numbers (programs,), and the gradient (B, h, w, K)."""
    batch, num_classes, height, width = logits.shape
    block_x, block_k, num_columns = _block(num_classes, width, labels.shape[2])
    num_patches = triton.cdiv(width, num_columns)
    num_rows = min(max(batch * num_patches * height // _NUM_PROGRAMS, 1), _MOST_ROWS)
    grid = (num_patches, triton.cdiv(height, num_rows), batch)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses, numbers = (logits.new_empty(grid[0] * grid[1] * grid[2], dtype=dtype) for _ in range(2))
    gradient = logits.new_empty((batch, height, width, num_classes) if with_gradient else (0,), dtype=dtype)
    arguments = (logits, labels, weight, losses, numbers, gradient, num_classes, height, width, *labels.shape[1:])
    constants = {
        "SMOOTHING": float(label_smoothing),
        "BLOCK_X": block_x,
        "BLOCK_K": block_k,
        "WITH_GRADIENT": with_gradient,
        "ACC": accumulator(logits.dtype),
    }
    arguments = (*arguments, *logits.stride(), num_rows, num_columns, ignore_index)
    return Launch(_cross_entropy, grid, arguments, constants, num_warps=8), losses, numbers, gradient


@torch.library.custom_op("hf_segformer::upsample_cross_entropy", mutates_args=())
def sum_cross_entropy(
    logits: Tensor, labels: Tensor, weight: Tensor, ignore_index: int, label_smoothing: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the sum of the losses, the sum of the weights of the valid pixels, and the first sum's gradient.

    Args:
        logits: (B, K, h, w) of any strides; float16, bfloat16, float32 or float64.
        labels: int64 (B, H, W); values that are neither a class nor `ignore_index` are ignored, too.
        weight: (K,).
        ignore_index: label of ignored pixels.
        label_smoothing: share of the target that is spread over the classes.
        with_gradient: True computes the gradient.

    Returns:
        (), (), and (B, h, w, K) or (0,), all in float32 (float64 for float64 logits).
    """
    launch, losses, numbers, gradient = plan(
        logits, labels.contiguous(), weight.contiguous(), ignore_index, label_smoothing, with_gradient
    )
    launch.run()
    loss, number = (sums.sum(dtype=torch.float64).to(sums.dtype) for sums in (losses, numbers))
    return loss, number, gradient


@sum_cross_entropy.register_fake
def _fake(
    logits: Tensor, labels: Tensor, weight: Tensor, ignore_index: int, label_smoothing: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_classes, height, width = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    gradient = logits.new_empty((batch, height, width, num_classes) if with_gradient else (0,), dtype=dtype)
    return logits.new_empty((), dtype=dtype), logits.new_empty((), dtype=dtype), gradient


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2])
    ctx.dtype = inputs[0].dtype


@once_differentiable
def _scale(ctx: Any, loss_scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    [gradient] = ctx.saved_tensors
    # Scaled and rounded in one pass.
    scaled = torch.mul(gradient, loss_scale, out=torch.empty_like(gradient, dtype=ctx.dtype))
    return scaled.permute(0, 3, 1, 2), None, None, None, None, None


sum_cross_entropy.register_autograd(_scale, setup_context=_keep)


def upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    weight: Tensor | None,
    label_smoothing: float,
    with_gradient: bool,
) -> Tensor:
    """Average the losses over the valid pixels, 0 if there are none.

    Arguments are those of `sum_cross_entropy`; without `weight` every class has weight 1. The sizes must pass `fits`.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weight = logits.new_ones(logits.shape[1], dtype=dtype) if weight is None else weight.to(logits.device, dtype)
    total, number, _ = sum_cross_entropy(logits, labels, weight, ignore_index, label_smoothing, with_gradient)
    return total / number.where(number > 0, 1)


__all__ = ["fits", "plan", "sum_cross_entropy", "upsample_cross_entropy"]
