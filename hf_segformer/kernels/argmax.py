"""`upsample_argmax` on a GPU: logits to a segmentation map of any size, without logits of that size.

A program computes the output rows between two rows of the grid, in a block of columns. Both grid rows are interpolated
to the output columns once and stay in registers; each output row blends them and takes the argmax.

Memory traffic: the grid is read (each row twice, the second time from the cache), the segmentation map is written. At
1024x2048 from 256x512, 19 classes, bfloat16: 20 MB read, 17 MB written. PyTorch's own operations write and read 159 MB
of float32 logits.

Axes: B images, K classes, h w the grid, H W the segmentation map, P columns of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bilinear import both_rows, first_new, scale_of, taps
from .launch import Launch, accumulator, power_of_2

_TILE = 4096  # columns times classes: two rows and their blend take 96 registers of each of 128 threads
_MOST_CLASSES = 256  # at once


@triton.jit
def _argmax(
    logits,  # (B, K, h, w) of any strides
    labels,  # (B, H, W)
    probabilities,  # (B, H, W)
    num_classes,
    height,
    width,
    new_height,
    new_width,
    stride_image,
    stride_class,
    stride_row,
    stride_column,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    WITH_PROBABILITY: tl.constexpr,
    ACC: tl.constexpr,
):
    old_row, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    scale_y, scale_x = scale_of(height, new_height, ACC), scale_of(width, new_width, ACC)
    lower, fraction = taps(columns, width, scale_x, ACC)
    grid = logits + image * stride_image
    is_inside = columns < new_width
    classes = tl.arange(0, BLOCK_K)
    mask = is_inside[:, None] & (classes < num_classes)[None, :]
    if NUM_BLOCKS == 1:
        above, below = both_rows(
            grid, old_row, lower, fraction, classes, mask, height, width, stride_row, stride_column, stride_class, ACC
        )
    first = first_new(old_row, height, new_height, scale_y, ACC)
    last = first_new(old_row + 1, height, new_height, scale_y, ACC)
    for row in range(first, last):
        _, down = taps(row, height, scale_y, ACC)
        best = tl.full((BLOCK_X,), float("-inf"), ACC)
        label = tl.zeros((BLOCK_X,), tl.int32)
        total = tl.zeros((BLOCK_X,), ACC)
        for block in range(NUM_BLOCKS):
            if NUM_BLOCKS > 1:
                classes = block * BLOCK_K + tl.arange(0, BLOCK_K)
                mask = is_inside[:, None] & (classes < num_classes)[None, :]
                above, below = both_rows(
                    grid,
                    old_row,
                    lower,
                    fraction,
                    classes,
                    mask,
                    height,
                    width,
                    stride_row,
                    stride_column,
                    stride_class,
                    ACC,
                )
            values = above * (1 - down) + below * down
            values = tl.where(values == values, values, float("inf"))  # a NaN wins, as in PyTorch
            values = tl.where((classes < num_classes)[None, :], values, float("-inf"))
            here, index = tl.max(values, axis=1, return_indices=True)
            better = here > best  # the first of equal ones wins
            label = tl.where(better, index.to(tl.int32) + block * BLOCK_K, label)
            if WITH_PROBABILITY:
                highest = tl.where(better, here, best)
                total = total * tl.exp(best - highest) + tl.sum(tl.exp(values - highest[:, None]), axis=1)
            best = tl.where(better, here, best)
        place = (image * new_height + row) * new_width + columns
        tl.store(labels + place, label.to(tl.int64), mask=is_inside)
        if WITH_PROBABILITY:
            tl.store(probabilities + place, 1.0 / total, mask=is_inside)


def plan(logits: Tensor, labels: Tensor, probabilities: Tensor) -> Launch:
    """Return the launch for logits (B, K, h, w), labels (B, H, W) and probabilities (B, H, W), or (0,) for none."""
    batch, num_classes, height, width = logits.shape
    block_k = min(power_of_2(num_classes), _MOST_CLASSES)
    block_x = min(max(_TILE // block_k, 16), 128)
    return Launch(
        _argmax,
        (triton.cdiv(labels.shape[2], block_x), height, batch),
        (logits, labels, probabilities, num_classes, height, width, *labels.shape[1:], *logits.stride()),
        {
            "BLOCK_X": block_x,
            "BLOCK_K": block_k,
            "NUM_BLOCKS": triton.cdiv(num_classes, block_k),
            "WITH_PROBABILITY": probabilities.numel() > 0,
            "ACC": accumulator(logits.dtype),
        },
    )


def _outputs(logits: Tensor, height: int, width: int, with_probability: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    labels = logits.new_empty((len(logits), height, width), dtype=torch.int64)
    return labels, logits.new_empty(labels.shape if with_probability else (0,), dtype=dtype)


@torch.library.custom_op("hf_segformer::upsample_argmax", mutates_args=())
def upsample_argmax(logits: Tensor, height: int, width: int, with_probability: bool) -> tuple[Tensor, Tensor]:
    """Compute the argmax of logits upsampled to a size, and the probability of each predicted class.

    Args:
        logits: (B, K, h, w) of any strides; float16, bfloat16, float32 or float64.
        height: H.
        width: W.
        with_probability: True computes the probabilities.

    Returns:
        int64 (B, H, W), and probabilities (B, H, W) in float32 (float64 for float64 logits), or (0,).
    """
    labels, probabilities = _outputs(logits, height, width, with_probability)
    plan(logits, labels, probabilities).run()
    return labels, probabilities


upsample_argmax.register_fake(_outputs)

__all__ = ["plan", "upsample_argmax"]
