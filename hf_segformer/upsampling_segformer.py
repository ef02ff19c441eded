"""Bilinear upsampling followed by cross entropy or argmax, without holding large logits at full size.

SegFormer's logits come at a quarter of the image's sides; loss and segmentation map are wanted at full size. Upsampled,
150 classes take more memory, and more time, than the network. The fast paths here cut an image into bands of a few
rows. The logits of a band are made by two products with bilinear weights, used, and dropped; the loss forms its
gradient at the same time, while the softmax is available.

Axes: B images, K classes, h w the logits' grid, H W the sides of labels or segmentation map, S rows of the grid that a
band comes from, R its own rows, V windows that its W columns are cut into, of Q columns each, which come from D columns
of the grid.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_segformer import default_ignore_index
from .cpu_runtime_segformer import once_differentiable, parallel_for
from .dispatch_segformer import implement, run_fast

_BAND_SIZE = 1 << 20  # floats: much larger bands leave the cache, smaller ones spend their time in Python
_ARGMAX_BAND_SIZE = 1 << 19  # a quarter less memory in the same time; half of it takes twice the time
_SMALL_SIZE = 1 << 22  # floats at full size, up to which PyTorch's own cross entropy is faster on a CPU
_BAND_HEIGHT = 32  # rows at most: the product with the weights of S rows wastes work where S is large
WINDOW_WIDTH = 32  # columns, for the same reason


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert a tensor to float32 unless it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def upsample(features: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate (B, C, h, w) -> (B, C, *size) bilinearly, with corners not aligned, as everywhere in SegFormer."""
    return F.interpolate(features, size=list(size), mode="bilinear", align_corners=False)


def check_labels(labels: Tensor, shape: tuple[int | str, ...], num_classes: int, ignore_index: int) -> Tensor:
    """Check shape, type and values of class indices, and convert them to int64.

    Args:
        labels: class indices of any integer type.
        shape: their shape; a word stands for any size.
        num_classes: classes go from 0 to one less.
        ignore_index: value that is allowed besides.

    Raises:
        ValueError: names the wrong shape, type or values. Values are not checked while compiling, under function
            transforms, or while a CUDA graph is captured, as nothing can depend on values there.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        kind = getattr(labels, "dtype", type(labels).__name__)
        raise ValueError(f"labels are of type {kind}; expected a tensor of integers, the class indices")
    fits = zip(labels.shape, shape, strict=False)
    if labels.ndim != len(shape) or not all(isinstance(wanted, str) or side == wanted for side, wanted in fits):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"labels have shape {tuple(labels.shape)}; expected ({wanted}) for these images")
    labels = labels.long()
    if _has_readable_values(labels):
        wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)]
        if wrong.numel():
            values = wrong.unique().tolist()
            shown = ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
            raise ValueError(
                f"labels hold {shown}; expected classes 0 to {num_classes - 1}, or {ignore_index} for pixels to ignore"
            )
    return labels


def _has_readable_values(tensor: Tensor) -> bool:
    """Return True if Python may look at the tensor's values."""
    if torch.compiler.is_compiling():
        return False
    is_captured = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return not is_captured and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


class Taps(NamedTuple):
    """The two old positions around each new one, and its distance from the lower one (0 to 1)."""

    lower: Tensor
    upper: Tensor
    fraction: Tensor

    @classmethod
    def of(cls, num_old: int, num_new: int, dtype: torch.dtype, beyond: int = 0) -> "Taps":
        """Compute the taps of PyTorch's bilinear interpolation in the same type; `beyond` repeat the last position."""
        scale = torch.tensor(num_old, dtype=dtype, device="cpu") / num_new
        centre = torch.arange(num_new + beyond, dtype=dtype, device="cpu") + 0.5
        position = (scale * centre - 0.5).clamp(0, num_old - 1)
        lower = position.long()
        return cls(lower, (lower + 1).clamp(max=num_old - 1), position - lower)

    def weights(self, first: Tensor, num_old: int) -> Tensor:
        """Build a matrix (..., new, `num_old`) over the old positions from `first` (...,) on; taps are (..., new)."""
        matrix, first = self.fraction.new_zeros(*self.lower.shape, num_old), first[..., None]
        matrix.scatter_add_(-1, (self.lower - first)[..., None], (1 - self.fraction)[..., None])
        return matrix.scatter_add_(-1, (self.upper - first)[..., None], self.fraction[..., None])


class Band(NamedTuple):
    """A band of upsampled rows, the rows of the grid that they come from, and the weights (R, S)."""

    new: slice
    old: slice
    weights: Tensor


def cut_into_bands(num_old: int, num_new: int, height: int, dtype: torch.dtype) -> list[Band]:
    """Cut into bands of `height` upsampled rows; the last one takes the remainder."""
    taps, bands = Taps.of(num_old, num_new, dtype), []
    for start in range(0, num_new, height):
        here = Taps(*(tap[start : start + height] for tap in taps))
        old = slice(int(here.lower[0]), int(here.upper[-1]) + 1)
        weights = here.weights(torch.tensor(old.start, device="cpu"), old.stop - old.start)
        bands.append(Band(slice(start, start + len(weights)), old, weights))
    return bands


class Windows(NamedTuple):
    """The columns of the grid (V, D) that each window of upsampled columns comes from, and the weights (V, Q, D)."""

    columns: Tensor
    weights: Tensor

    @classmethod
    def of(cls, num_old: int, num_new: int, dtype: torch.dtype) -> "Windows":
        """Cut into windows of `WINDOW_WIDTH`; the last one reaches beyond the last column and repeats it."""
        taps = Taps.of(num_old, num_new, dtype, beyond=-num_new % WINDOW_WIDTH)
        taps = Taps(*(tap.view(-1, WINDOW_WIDTH) for tap in taps))
        num_columns = int((taps.upper[:, -1] - taps.lower[:, 0]).max()) + 1
        first = taps.lower[:, 0].clamp(max=num_old - num_columns)
        return cls(first[:, None] + torch.arange(num_columns, device="cpu"), taps.weights(first, num_columns))


def cut(grid: Tensor, size: Sequence[int], dtype: torch.dtype, band_size: int) -> tuple[list[Band], Windows]:
    """Return bands of at most so many floats, and windows, in which a grid (B, h, w, K) is upsampled to `size`."""
    _, height, width, num_classes = grid.shape
    windows = Windows.of(width, size[1], dtype)
    row_size = windows.weights.shape[:2].numel() * num_classes
    band_height = min(max(band_size // row_size, 1), _BAND_HEIGHT)
    return cut_into_bands(height, size[0], band_height, dtype), windows


def reference_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute `upsample_cross_entropy` by PyTorch's own operations, at full size."""
    num_classes = max(logits.shape[1], 2)
    ignore_index = default_ignore_index(num_classes) if ignore_index is None else ignore_index
    labels = check_labels(labels, (len(logits), "height", "width"), num_classes, ignore_index)
    logits = upsample(_with_background(at_least_float32(logits)), labels.shape[-2:])
    if weight is not None:
        weight = weight.to(logits)
    total = F.cross_entropy(logits, labels, weight, None, ignore_index, None, "sum", label_smoothing)
    counted = labels != ignore_index
    number = counted.sum() if weight is None else (weight[labels.where(counted, 0)] * counted).sum()
    return total / number.where(number > 0, 1)


def upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of logits upsampled to the labels' size, averaged over the valid pixels.

    Value and gradient are those of bilinear interpolation and `F.cross_entropy`, in float32 at least, with or without
    autocast. One logit means two classes, background at 0 and foreground. If no pixel is valid, the loss is 0 with zero
    gradient. The fast paths' gradient cannot be differentiated again.

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W) of any integer type, 0..K-1 (0 and 1 where K is 1) or `ignore_index`; any size.
        ignore_index: label of ignored pixels; by default `default_ignore_index(K)`.
        weight: (K,), with one logit (2,); the weight of a pixel is that of its class.
        label_smoothing: share of the target that is spread evenly over the classes.

    Raises:
        ValueError: if labels do not fit, see `check_labels`, or the number of weights is not that of the classes.

    Examples:
        >>> import torch
        >>> from hf_segformer import upsample_cross_entropy
        >>> round(upsample_cross_entropy(torch.zeros(2, 4, 8, 12), torch.ones(2, 32, 48, dtype=torch.long)).item(), 4)
        1.3863
    """
    num_classes = max(logits.shape[1], 2)
    if weight is not None:
        if weight.shape != (num_classes,):
            raise ValueError(f"weight has shape {tuple(weight.shape)}; expected one for each of {num_classes} classes")
        weight = weight.to(logits.device, torch.promote_types(logits.dtype, torch.float32))
    ignore_index = default_ignore_index(num_classes) if ignore_index is None else ignore_index
    labels = check_labels(labels, (len(logits), "height", "width"), num_classes, ignore_index)
    fast = run_fast("upsample_cross_entropy", None, logits, labels, ignore_index, weight, label_smoothing)
    if fast is not NotImplemented:
        return fast
    return reference_cross_entropy(
        logits, labels, ignore_index=ignore_index, weight=weight, label_smoothing=label_smoothing
    )


def _with_background(logits: Tensor) -> Tensor:
    """Turn one logit (B, 1, h, w) into those of two classes."""
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits


def reference_argmax(logits: Tensor, size: Sequence[int], *, with_probability: bool = False) -> Any:
    """Compute `upsample_argmax` by PyTorch's own operations, at full size."""
    logits = _with_background(at_least_float32(logits))
    if tuple(size) != logits.shape[-2:]:
        logits = upsample(logits, size)
    labels = logits.argmax(dim=1)
    return (labels, logits.softmax(dim=1).amax(dim=1)) if with_probability else labels


def upsample_argmax(logits: Tensor, size: Sequence[int], *, with_probability: bool = False) -> Any:
    """Class indices of logits upsampled to any size.

    Classes are those of bilinear interpolation in float32 at least and argmax. Without probabilities, most of an image
    is not even computed: where all logits that a window comes from agree on a class, it wins in between, too.

    Args:
        logits: (B, K, h, w). One logit means two classes, background at 0 and foreground.
        size: H, W of the result.
        with_probability: True returns the winner's probability, too.

    Returns:
        int64 (B, H, W), and probabilities (B, H, W) in float32 at least if they are wanted.

    Examples:
        >>> import torch
        >>> from hf_segformer import upsample_argmax
        >>> upsample_argmax(torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]]), (1, 4))
        tensor([[[1, 1, 0, 0]]])
    """
    fast = run_fast("upsample_argmax", None, logits.detach(), size, with_probability)
    return reference_argmax(logits, size, with_probability=with_probability) if fast is NotImplemented else fast


def bind_argmax(_: None, logits: Tensor, size: Sequence[int], with_probability: bool) -> tuple | str:
    """Return the operands of `fused_argmax`."""
    if logits.shape[1] < 2:
        return "there is one logit"
    if not logits.numel():
        return "there are no logits"
    if tuple(size) == logits.shape[-2:]:
        return "logits have the size of the result"
    return logits, size, with_probability


def fused_argmax(logits: Tensor, size: Sequence[int], with_probability: bool) -> Any:
    """Compute `upsample_argmax` band by band."""
    if not logits.sum(dtype=torch.float32).isfinite():  # infinite logits may cancel out between two rows
        return reference_argmax(logits, size, with_probability=with_probability)
    grid = logits.permute(0, 2, 3, 1)  # (B, h, w, K)
    dtype = at_least_float32(grid[0, 0, 0]).dtype
    bands, windows = cut(grid, size, dtype, _ARGMAX_BAND_SIZE)
    labels = torch.empty(len(grid), *size, dtype=torch.int64, device="cpu")
    probabilities = torch.empty(labels.shape, dtype=dtype, device="cpu") if with_probability else None

    def work(items: Iterator[tuple[int, int]]) -> None:
        for index, number in items:
            band = bands[number]
            # With a plane for each class, maxima run along columns.
            rows = grid[index, band.old].to(dtype).transpose(1, 2).contiguous()  # (S, K, w)
            near = _first_maximum(rows, 1)[:, windows.columns]  # (S, V, D)
            first = near[:1, :, :1]
            is_undecided = (near != first).flatten(2).any(2).any(0)
            chosen = torch.arange(len(is_undecided), device="cpu") if with_probability else is_undecided.nonzero()[:, 0]
            found = first.expand(len(band.weights), -1, WINDOW_WIDTH).clone()  # (R, V, Q)
            upsampled = _upsample_windows(rows, band, windows, chosen)  # (R, K, V, Q)
            if probabilities is not None:
                best = (upsampled - upsampled.amax(1, keepdim=True)).exp_().sum(1).reciprocal_()
                probabilities[index, band.new] = best.flatten(1)[:, : size[1]]
            found[:, chosen] = _first_maximum(upsampled, 1)
            labels[index, band.new] = found.flatten(1)[:, : size[1]]

    parallel_for(work, list(itertools.product(range(len(grid)), range(len(bands)))))
    return labels if probabilities is None else (labels, probabilities)


def _first_maximum(tensor: Tensor, dim: int) -> Tensor:
    """Compute `argmax` of real numbers; PyTorch's is slow along any dimension, most of all along inner ones."""
    size = tensor.shape[dim]
    rank = torch.arange(size, 0, -1, dtype=tensor.dtype, device=tensor.device).view(-1, *[1] * (tensor.ndim - 1 - dim))
    is_best = torch.ge(tensor, tensor.amax(dim, keepdim=True), out=torch.empty_like(tensor))  # bool were slower
    return size - is_best.mul_(rank).amax(dim).long()


def _upsample_windows(rows: Tensor, band: Band, windows: Windows, chosen: Tensor) -> Tensor:
    """Upsample the rows (S, K, w) that a band comes from to its chosen windows (R, K, V, Q)."""
    num_classes, width = rows.shape[1:]
    tall = torch.mm(band.weights, rows.flatten(1)).view(-1, width)  # (R * K, w)
    columns, weights = windows.columns[chosen], windows.weights[chosen]
    narrow = tall.index_select(1, columns.flatten()).view(len(tall), *columns.shape)
    wide = torch.bmm(narrow.transpose(0, 1), weights.transpose(1, 2))  # (V, R * K, Q)
    return wide.unflatten(1, (-1, num_classes)).permute(1, 2, 0, 3)


def bind_cross_entropy(
    _: None, logits: Tensor, labels: Tensor, ignore_index: int, weight: Tensor | None, label_smoothing: float
) -> tuple | str:
    """Return the operands of a cross entropy that upsamples by itself."""
    if logits.shape[1] < 2:
        return "there is one logit"  # at full size it is no larger than the labels
    return (logits, labels, ignore_index, weight, label_smoothing) if labels.numel() else "there are no labels"


def bind_bands(
    _: None, logits: Tensor, labels: Tensor, ignore_index: int, weight: Tensor | None, label_smoothing: float
) -> tuple | str:
    """Return the operands of `fused_cross_entropy`."""
    operands = bind_cross_entropy(None, logits, labels, ignore_index, weight, label_smoothing)
    is_small = labels.numel() * logits.shape[1] <= _SMALL_SIZE
    return "logits of this size are small" if is_small and not isinstance(operands, str) else operands


class _CrossEntropy(torch.autograd.Function):
    """The loss of all pixels, computed together with its gradient."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, labels: Tensor, ignore_index: int, weight: Tensor | None, label_smoothing: float
    ) -> Tensor:
        grid = at_least_float32(logits).permute(0, 2, 3, 1)  # (B, h, w, K)
        # Bilinear weights are between 0 and 1 and sum to one: logits that are nowhere above 0 stay so when upsampled,
        # and the softmax needs no maximum at full size.
        grid = (grid - grid.amax(-1, keepdim=True)).contiguous()
        gradient = torch.zeros_like(grid) if ctx.needs_input_grad[0] else None
        counted = labels.masked_fill(labels == ignore_index, grid.shape[-1])
        loss = _sum_cross_entropy(grid, counted, weight, label_smoothing, gradient)
        ctx.dtype = logits.dtype
        # Labels and weights are saved as the reference saves them: changing them before the backward pass is an error.
        ctx.save_for_backward(gradient, labels, weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradient, _, _ = ctx.saved_tensors
        return (gradient * scale).to(ctx.dtype).permute(0, 3, 1, 2), None, None, None, None


fused_cross_entropy = _CrossEntropy.apply


def _sum_cross_entropy(
    grid: Tensor, labels: Tensor, weight: Tensor | None, label_smoothing: float, gradient: Tensor | None
) -> Tensor:
    """Return the loss of a grid (B, h, w, K), nowhere above 0, and add to the gradient (B, h, w, K).

    Ignored pixels have the label K, the number of classes.
    """
    num_classes = grid.shape[-1]
    class_weights = grid.new_ones(num_classes) if weight is None else weight.to(grid)
    counts = torch.bincount(labels.flatten(), minlength=num_classes + 1)[:num_classes]
    number = float((counts * class_weights).sum(dtype=torch.float64)) or 1.0
    # Weight of a pixel by its label, for its own class and for each of all classes; 0 where it is ignored.
    own = F.pad(class_weights * ((1 - label_smoothing) / number), (0, 1))
    each = F.pad(grid.new_full((num_classes,), label_smoothing / num_classes / number), (0, 1))
    bands, windows = cut(grid, labels.shape[-2:], grid.dtype, _BAND_SIZE)
    beyond = windows.weights.shape[:2].numel() - labels.shape[-1]
    losses = grid.new_zeros(len(grid), len(bands))
    upsamplers: list[Upsampler] = []  # those that no thread is using

    def work(items: Iterator[tuple[int, int]]) -> None:
        upsampler = upsamplers.pop() if upsamplers else Upsampler(grid, bands, windows)
        for index, number in items:
            band = bands[number]
            targets = F.pad(labels[index, band.new], (0, beyond), value=num_classes).view(-1, 1)
            pixels = targets, own[targets], each[targets], class_weights
            logits = upsampler.forward(grid[index], band)
            loss = _losses(logits, *pixels)
            if loss is None:
                logits = upsampler.forward(grid[index], band)
                loss = _losses(logits.sub_(logits.amax(1, keepdim=True)), *pixels)
            losses[index, number] = loss
            if gradient is not None:
                upsampler.backward(logits, gradient[index], band)
        upsamplers.append(upsampler)

    for numbers in apart([[band.old] for band in bands]):
        parallel_for(work, list(itertools.product(range(len(grid)), numbers)))
    return losses.sum(dtype=torch.float64).to(grid.dtype)


def _losses(logits: Tensor, targets: Tensor, own: Tensor, each: Tensor, class_weights: Tensor) -> Tensor | None:
    """Return the sum of weighted losses of logits (P, K), which become their gradient; None if a softmax underflows.

    It does where all logits of a pixel are far below 0. Targets and their weights are (P, 1).
    """
    targets = targets.clamp(max=logits.shape[1] - 1)
    likelihood = logits.gather(1, targets)
    is_smoothed = bool(each.any())
    spread = logits @ class_weights[:, None] if is_smoothed else None
    total = logits.exp_().sum(1, keepdim=True)
    if total.min() < 1e-30:
        return None
    log_total = total.log()
    losses = own * (log_total - likelihood)
    if is_smoothed:
        all_weights = class_weights.sum()
        losses += each * (all_weights * log_total - spread)
        logits.mul_((own + each * all_weights) / total).addmm_(each, class_weights[None], alpha=-1)
    else:
        logits.mul_(own / total)
    logits.scatter_add_(1, targets, -own)
    return losses.sum()


def apart(spans: Sequence[Sequence[slice]]) -> list[range]:
    """Group the numbers of bands so that within a group no two bands come from the same row.

    Args:
        spans: each band's rows, in each of the grids that it comes from.
    """
    step = next(
        step
        for step in range(1, len(spans) + 1)
        if all(
            one.stop <= other.start
            for ones, others in zip(spans, spans[step:], strict=False)
            for one, other in zip(ones, others, strict=True)
        )
    )
    return [range(first, len(spans), step) for first in range(step)]


class Upsampler:
    """Upsampling of a grid (B, h, w, K) band by band, and its gradient; each thread has one, for its buffers."""

    def __init__(self, grid: Tensor, bands: Sequence[Band], windows: Windows):
        num_rows = max(band.weights.shape[1] for band in bands)
        num_classes = grid.shape[-1]
        self.columns, self.weights = windows.columns.flatten(), windows.weights
        self.narrow = grid.new_empty(num_rows, len(self.columns), num_classes)
        self.wide = grid.new_empty(num_rows, windows.weights.shape[:2].numel(), num_classes)
        self.band = grid.new_empty(len(bands[0].weights), self.wide[0].numel())

    def forward(self, grid: Tensor, band: Band) -> Tensor:
        """(h, w, K) -> (P, K) of the band's pixels, in a buffer that the next call overwrites."""
        num_rows, num_classes = band.weights.shape[1], grid.shape[-1]
        narrow, wide, upsampled = self.narrow[:num_rows], self.wide[:num_rows], self.band[: len(band.weights)]
        torch.index_select(grid[band.old], 1, self.columns, out=narrow)
        multiply_windows(self.weights, narrow, wide)
        torch.mm(band.weights, wide.view(num_rows, -1), out=upsampled)
        return upsampled.view(-1, num_classes)

    def backward(self, gradient: Tensor, grid: Tensor, band: Band) -> None:
        """Add the contribution of the gradient of the band's pixels (P, K) to that of the grid (h, w, K)."""
        num_rows = band.weights.shape[1]
        narrow, wide = self.narrow[:num_rows], self.wide[:num_rows]
        torch.mm(band.weights.t(), gradient.view(len(band.weights), -1), out=wide.view(num_rows, -1))
        multiply_windows(self.weights.transpose(1, 2), wide, narrow)
        grid[band.old].index_add_(1, self.columns, narrow)


def multiply_windows(weights: Tensor, columns: Tensor, out: Tensor) -> None:
    """Multiply weights (V, n, m) by each row's columns (S, V * m, K), into (S, V * n, K)."""
    num_rows, _, num_classes = columns.shape
    _, num_new, num_old = weights.shape
    weights = weights.expand(num_rows, -1, -1, -1).flatten(0, 1)
    torch.bmm(weights, columns.view(-1, num_old, num_classes), out=out.view(-1, num_new, num_classes))


implement("upsample_cross_entropy", "cpu_bands", bind_bands, fused_cross_entropy)
implement("upsample_argmax", "cpu_bands", bind_argmax, fused_argmax)

__all__ = ["upsample_argmax", "upsample_cross_entropy"]
