"""Every kernel against its reference: results and gradients, at sizes that are no multiples of anything.

They run on a GPU at real sizes, and in Triton's interpreter at small ones. Output
memory is filled with NaN beforehand. The references run in float64, so that a tolerance is a kernel's own rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_segformer.kernels.argmax import upsample_argmax
from hf_segformer.kernels.cross_entropy import upsample_cross_entropy
from hf_segformer.kernels.decode_head import upsample_sum, upsample_sum_relu
from hf_segformer.kernels.depthwise_gelu import depthwise_gelu
from hf_segformer.upsampling_segformer import reference_argmax, reference_cross_entropy, upsample

# Of the largest value. What comes in is rounded already, so what is left is the rounding of what goes out, 2^-8 for
# bfloat16 and 2^-11 for float16, with a margin of two; and float32's own arithmetic, whose coordinates at size 1023 are
# off by 1e-5 of a pixel. Float64 shows the formulas.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# The convolution's gradient is rounded twice: that before GELU is stored in the tokens' type, too.
_ROUNDINGS = {"depthwise_gelu": 2}


def tolerance(name: str, dtype: torch.dtype) -> float:
    """Return the allowed error of a kernel, relative to the largest value."""
    return TOLERANCES[dtype] * _ROUNDINGS.get(name, 1)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill the memory of `torch.empty` with NaN, and with the largest integers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Return random values, the same on every device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).to(device)


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinite if there is a NaN."""
    found, expected = found.detach().double(), expected.detach().double()
    if found.shape != expected.shape:
        raise ValueError(f"shape {tuple(found.shape)}, but {tuple(expected.shape)} was expected")
    worst = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return worst.item() if worst.isfinite() else float("inf")


def _worst(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    has_gradient: bool = True,
) -> float:
    """Return the largest difference of results and gradients; `reference` gets the tensors in float64."""
    ours = [tensor.clone().requires_grad_(has_gradient) for tensor in tensors]
    theirs = [tensor.double().requires_grad_(has_gradient) for tensor in tensors]
    with poisoned():
        results = [function(*ours)]
        change = draw(*results[0].shape, dtype=results[0].dtype, device=str(results[0].device), seed=9)
        if has_gradient:
            results += torch.autograd.grad(results[0], ours, change)
    # Not poisoned: it would be slow, and PyTorch warn of its own operations.
    expected = [reference(*theirs)]
    if has_gradient:
        expected += torch.autograd.grad(expected[0], theirs, change.double())
    return max(map(difference, results, expected))


def check_cross_entropy(
    dtype: torch.dtype,
    device: str,
    grid: Sequence[int] = (2, 5, 7, 9),
    size: Sequence[int] = (28, 36),
    label_smoothing: float = 0.0,
    weighted: bool = False,
    strided: bool = False,
) -> float:
    """`upsample_cross_entropy`: loss and gradient of logits (B, K, h, w) and labels (B, H, W)."""
    batch, num_classes, *_ = grid
    logits = draw(*grid, dtype=dtype, device=device) * 3
    if strided:
        logits = logits.to(memory_format=torch.channels_last)
    labels = torch.randint(0, num_classes, (batch, *size), generator=torch.Generator().manual_seed(1)).to(device)
    labels[:, : size[0] // 4] = 255
    weight = (torch.arange(num_classes, device=device) % 4 + 0.5).double() if weighted else None

    def ours(logits: Tensor) -> Tensor:
        loss = upsample_cross_entropy(logits, labels, 255, weight, label_smoothing, True)
        if loss is None:
            raise ValueError(f"a patch of {grid} at {size} does not fit into registers")
        return loss * labels.numel()  # or the gradients of a mean would be below what float16 holds

    def reference(logits: Tensor) -> Tensor:
        loss = reference_cross_entropy(logits, labels, weight=weight, label_smoothing=label_smoothing)
        return loss * labels.numel()

    return _worst(ours, reference, [logits])


def check_argmax(
    dtype: torch.dtype,
    device: str,
    grid: Sequence[int] = (2, 5, 7, 9),
    size: Sequence[int] = (28, 36),
    strided: bool = False,
) -> float:
    """`upsample_argmax`: probabilities, and how much less the chosen class's logit is than the best one's."""
    logits = draw(*grid, dtype=dtype, device=device)
    if strided:
        logits = logits.to(memory_format=torch.channels_last)
    with poisoned():
        labels, probabilities = upsample_argmax(logits, *size, True)
        alone, nothing = upsample_argmax(logits, *size, False)
    if not torch.equal(alone, labels) or nothing.numel() or not ((labels >= 0) & (labels < grid[1])).all():
        raise ValueError("labels differ without probabilities, or are no classes")
    full = upsample(logits.double(), size)
    chosen = full.gather(1, labels[:, None])[:, 0]
    _, expected = reference_argmax(logits.double(), size, with_probability=True)
    return max(difference(chosen, full.amax(1)), difference(probabilities, expected))


def check_depthwise_gelu(
    dtype: torch.dtype,
    device: str,
    batch: int = 2,
    channels: int = 5,
    size: Sequence[int] = (7, 9),
    strided: bool = False,
) -> float:
    """`depthwise_gelu`: result, and gradients of tokens, kernel and bias."""
    tokens = draw(batch, size[0] * size[1], channels, dtype=dtype, device=device)
    if strided:
        tokens = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    kernel = draw(channels, 1, 3, 3, dtype=dtype, device=device, seed=1)
    bias = draw(channels, dtype=dtype, device=device, seed=2)

    def reference(tokens: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        features = tokens.transpose(1, 2).unflatten(2, tuple(size))
        return F.gelu(F.conv2d(features, kernel, bias, padding=1, groups=channels)).flatten(2).transpose(1, 2)

    return _worst(lambda *tensors: depthwise_gelu(*tensors, *size), reference, [tokens, kernel, bias])


def _reference_sum(*maps: Tensor) -> Tensor:
    first, *others = [stage.permute(0, 3, 1, 2) for stage in maps]
    return sum((upsample(stage, first.shape[-2:]) for stage in others), first).permute(0, 2, 3, 1)


def _maps(dtype: torch.dtype, device: str, batch: int, dim: int, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    return [draw(batch, *size, dim, dtype=dtype, device=device, seed=seed) for seed, size in enumerate(sizes)]


def check_upsample_sum(
    dtype: torch.dtype,
    device: str,
    batch: int = 2,
    dim: int = 5,
    sizes: Sequence[Sequence[int]] = ((9, 13), (5, 7), (3, 4), (2, 2)),
) -> float:
    """`upsample_sum`: result, and each stage's gradient."""
    return _worst(lambda *maps: upsample_sum(list(maps)), _reference_sum, _maps(dtype, device, batch, dim, sizes))


def check_upsample_sum_relu(
    dtype: torch.dtype,
    device: str,
    batch: int = 2,
    dim: int = 5,
    sizes: Sequence[Sequence[int]] = ((9, 13), (5, 7), (3, 4), (2, 2)),
) -> float:
    """`upsample_sum_relu`: result."""
    scale, shift = (draw(dim, dtype=torch.float32, device=device, seed=seed) for seed in (7, 8))
    return _worst(
        lambda *maps: upsample_sum_relu(list(maps), scale, shift),
        lambda *maps: F.relu(_reference_sum(*maps) * scale + shift),
        _maps(dtype, device, batch, dim, sizes),
        has_gradient=False,
    )


CHECKS = {
    "upsample_cross_entropy": check_cross_entropy,
    "upsample_argmax": check_argmax,
    "depthwise_gelu": check_depthwise_gelu,
    "upsample_sum": check_upsample_sum,
    "upsample_sum_relu": check_upsample_sum_relu,
}
