"""Fast path of the decode head on a CPU (paper section 3.2, equation 4): a band of rows at a time.

The folded head (see `folding_segformer`) upsamples each stage's projection and adds them up. A band of the sum fits
into a core's cache, where it is normalized, cut off at 0 and classified before the next one is computed.

In training the sum is kept, as BatchNorm needs all of it, and what follows from it is computed twice, once in the
forward and once in the backward pass.

Axes: B images, D width of the head, K classes, h w the first stage's grid, h' w' a lower stage's and C' its channels,
R rows of a band, S those of a lower stage that they come from.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu_runtime_segformer import linear, multiply_over_rows, once_differentiable, parallel_for
from .dispatch_segformer import altered, implement, needs_gradient
from .folding_segformer import fold, unfoldable
from .upsampling_segformer import WINDOW_WIDTH, Band, Windows, apart, cut_into_bands, multiply_windows

_BAND_HEIGHT = 16  # with less, lower stages are multiplied too often; with more, a band leaves the cache
_BAND_SIZE = 1 << 21  # floats of the sum at most
_SMALL_SIZE = 1 << 20  # floats of the sum up to which PyTorch's own operations are faster; in training twice as many


class Plan(NamedTuple):
    """Bands of rows, and for each lower stage the bands and windows that upsample it."""

    rows: list[slice]
    bands: list[tuple[Band, ...]]
    weights: list[Tensor]  # of a band: (R, S of all lower stages)
    windows: list[Windows]
    beyond: int  # columns by which windows reach beyond the first stage's

    @classmethod
    def of(cls, maps: Sequence[Tensor], dim: int) -> "Plan":
        """Plan for each stage's (B, h, w, C) and a sum of D channels."""
        [(height, width), *lower] = [each.shape[1:3] for each in maps]
        dtype, band_height = maps[0].dtype, min(max(_BAND_SIZE // (width * dim), 1), _BAND_HEIGHT)
        rows = [slice(start, min(start + band_height, height)) for start in range(0, height, band_height)]
        by_stage = [cut_into_bands(old_height, height, band_height, dtype) for old_height, _ in lower]
        bands = [tuple(stage[number] for stage in by_stage) for number in range(len(rows))]
        weights = [
            torch.cat([band.weights for band in each], dim=1) if each else maps[0].new_empty(0) for each in bands
        ]
        return cls(rows, bands, weights, [Windows.of(old, width, dtype) for _, old in lower], -width % WINDOW_WIDTH)


class Join:
    """Sum of an image's stages, band by band, and its gradient; each thread has one, for its buffers.

    Args:
        plan: of the bands.
        matrices: (D, C) of each stage.
        bias: (D,).
        width: w.
    """

    def __init__(self, plan: Plan, matrices: Sequence[Tensor], bias: Tensor, width: int):
        dim, self.plan, self.matrices, self.bias = len(bias), plan, matrices, bias
        num_rows = [max(bands[stage].weights.shape[1] for bands in plan.bands) for stage in range(len(matrices) - 1)]
        self.narrow = [
            bias.new_empty(rows, windows.columns.numel(), dim)
            for rows, windows in zip(num_rows, plan.windows, strict=True)
        ]
        self.wide = bias.new_empty(sum(num_rows), width + plan.beyond, dim)
        self.band = bias.new_empty(plan.rows[0].stop, (width + plan.beyond) * dim)

    def _stages(self, number: int) -> Iterator[tuple[int, slice, Band, Tensor, Windows]]:
        """Yield each lower stage's number, rows in `wide`, band, buffer and windows."""
        bands = self.plan.bands[number]
        stops = list(accumulate(band.weights.shape[1] for band in bands))
        for stage, (band, stop) in enumerate(zip(bands, stops, strict=True)):
            num_rows = band.weights.shape[1]
            yield stage + 1, slice(stop - num_rows, stop), band, self.narrow[stage][:num_rows], self.plan.windows[stage]

    def forward(self, maps: Sequence[Tensor], number: int) -> Tensor:
        """Each stage's (h', w', C') -> (R, w, D)."""
        rows, weights = self.plan.rows[number], self.plan.weights[number]
        num_rows, width, channels = maps[0][rows].shape
        first = maps[0][rows].reshape(-1, channels)
        for stage, here, band, narrow, windows in self._stages(number):
            lower = linear(maps[stage][band.old], self.matrices[stage])  # (S, w', D)
            torch.index_select(lower, 1, windows.columns.flatten(), out=narrow)
            multiply_windows(windows.weights, narrow, self.wide[here])
        upsampled = None
        if len(maps) > 1:
            wide = self.wide[: weights.shape[1]].flatten(1)
            upsampled = torch.mm(weights, wide, out=self.band[:num_rows]).view(num_rows, -1, len(self.bias))
            upsampled = upsampled[:, :width].reshape(len(first), -1)
        return linear(first, self.matrices[0], self.bias, upsampled).view(num_rows, width, -1)

    def backward(
        self,
        gradient: Tensor,
        maps: Sequence[Tensor],
        number: int,
        map_gradients: Sequence[Tensor],
        matrix_gradients: Sequence[Tensor],
    ) -> None:
        """Add the contribution of a band's gradient (R, w, D) to the gradient of each stage and each matrix."""
        rows, weights = self.plan.rows[number], self.plan.weights[number]
        first, flat = maps[0][rows].flatten(0, 1), gradient.flatten(0, 1)
        map_gradients[0][rows].flatten(0, 1).add_(linear(flat, self.matrices[0].t()))
        matrix_gradients[0].add_(multiply_over_rows(flat, first))
        if len(maps) > 1:
            gradient = F.pad(gradient, (0, 0, 0, self.plan.beyond)) if self.plan.beyond else gradient
            torch.mm(weights.t(), gradient.flatten(1), out=self.wide[: weights.shape[1]].flatten(1))
        for stage, here, band, narrow, windows in self._stages(number):
            multiply_windows(windows.weights.transpose(1, 2), self.wide[here], narrow)
            source = maps[stage][band.old]
            lower = narrow.new_zeros(*source.shape[:2], narrow.shape[-1]).index_add_(
                1, windows.columns.flatten(), narrow
            )
            lower = lower.flatten(0, 1)
            map_gradients[stage][band.old].flatten(0, 1).add_(linear(lower, self.matrices[stage].t()))
            matrix_gradients[stage].add_(multiply_over_rows(lower, source.flatten(0, 1)))


def _as_maps(features: Sequence[Tensor]) -> list[Tensor]:
    """Each stage's (B, C, H, W) -> (B, H, W, C), a view where it is channels-last."""
    return [stage.permute(0, 2, 3, 1).contiguous() for stage in features]


def bind_decode_head(head: nn.Module, features: Sequence[Tensor]) -> tuple | str:
    """Return the operands of `fused_decode_head`."""
    norm, classifier = head.batch_norm, head.classifier
    reason = (
        unfoldable(head)
        or altered("batch_norm", norm, nn.BatchNorm2d, bias=True)
        or altered("classifier", classifier, nn.Conv2d, bias=True)
        or altered("dropout", head.dropout, nn.Dropout2d)
    )
    if reason:
        return reason
    if norm.running_mean is None or (norm.training and not norm.track_running_stats):
        return "batch_norm has no running statistics, or keeps them as they are in training"
    if norm.training and features[0][:, 0].numel() < 2:
        return "batch_norm has one value for each channel"
    if classifier.kernel_size != (1, 1):
        return "classifier is not a 1x1 convolution"
    size = len(features[0]) * features[0].shape[2:].numel() * norm.num_features
    if size <= (2 * _SMALL_SIZE if head.training else _SMALL_SIZE):
        return "the sum of the stages is small"
    return head, features, tuple(head.parameters())


def fused_decode_head(head: nn.Module, features: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Run the head band by band: (B, C, H, W) of each stage -> logits (B, K, h, w)."""
    wants_gradient = needs_gradient(*features, *parameters)
    is_training = wants_gradient or head.batch_norm.training or head.dropout.training
    return (decode_training if is_training else decode)(head, features, *fold(head))


def decode(head: nn.Module, features: Sequence[Tensor], matrices: Sequence[Tensor], bias: Tensor) -> Tensor:
    """Run the head at inference, with BatchNorm merged into the fold: (B, C, H, W) of each stage -> (B, K, h, w).

    Args:
        head: the decode head.
        features: each stage's (B, C, H, W).
        matrices: (D, C) of each stage, from `fold`.
        bias: (D,) from there.
    """
    maps, norm, classifier = _as_maps(features), head.batch_norm, head.classifier
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    matrices = [scale[:, None] * matrix for matrix in matrices]
    bias = (bias - norm.running_mean) * scale + norm.bias
    plan, weight = Plan.of(maps, len(bias)), classifier.weight.flatten(1)
    logits = maps[0].new_empty(*maps[0].shape[:3], len(weight))

    # Without Python threads: PyTorch's own still spin after the encoder, and would keep a core for milliseconds.
    join = Join(plan, matrices, bias, logits.shape[2])
    for index, number in product(range(len(logits)), range(len(plan.rows))):
        fused = join.forward([each[index] for each in maps], number).flatten(0, 1)
        out = logits[index, plan.rows[number]].flatten(0, 1)
        out.copy_(linear(fused.clamp_(min=0), weight, classifier.bias))
    return logits.permute(0, 3, 1, 2)


def decode_training(head: nn.Module, features: Sequence[Tensor], matrices: Sequence[Tensor], bias: Tensor) -> Tensor:
    """Run the head with gradients or a batch's statistics; arguments and result as for `decode`.

    Updates BatchNorm's running statistics if it is in training mode.
    """
    norm, classifier = head.batch_norm, head.classifier
    # Dropout of whole channels is a factor for each image's channels, and may come before ReLU, too.
    kept = head.dropout(features[0].new_ones(len(features[0]), len(bias), 1, 1)).flatten(1)
    logits, mean, variance = _Decode.apply(
        norm.training,
        norm.eps,
        norm.running_mean,
        norm.running_var,
        kept,
        norm.weight,
        norm.bias,
        classifier.weight.flatten(1),
        classifier.bias,
        bias,
        *_as_maps(features),
        *matrices,
    )
    if norm.training:
        _update(norm, mean, variance, logits[..., 0].numel())
    return logits.permute(0, 3, 1, 2)


@torch.no_grad()
def _update(norm: nn.Module, mean: Tensor, variance: Tensor, number: int) -> None:
    """Update BatchNorm's running statistics after a batch of so many pixels.

    Through `.data`, as PyTorch's own BatchNorm does: a later forward pass in training mode does not invalidate graphs
    that saved the statistics.
    """
    norm.num_batches_tracked += 1
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.data.lerp_(mean, momentum)
    norm.running_var.data.lerp_(variance * (number / (number - 1)), momentum)


class _Decode(torch.autograd.Function):
    """Maps (B, h, w, C) of each stage -> logits (B, h, w, K), and mean and variance of the sum's channels."""

    @staticmethod
    def forward(
        ctx,
        is_training: bool,
        eps: float,
        running_mean: Tensor,
        running_var: Tensor,
        kept: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        classifier_bias: Tensor,
        bias: Tensor,
        *maps_and_matrices: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_stages = len(maps_and_matrices) // 2
        maps, matrices = maps_and_matrices[:num_stages], maps_and_matrices[num_stages:]
        plan = Plan.of(maps, len(bias))
        fused = bias.new_empty(*maps[0].shape[:3], len(bias))
        items = list(product(range(len(fused)), range(len(plan.rows))))
        means, squares = bias.new_empty(2, len(items), len(bias))

        def add_up(numbers: Iterator[int]) -> None:
            join, deviation = Join(plan, matrices, bias, fused.shape[2]), torch.empty_like(fused[0, plan.rows[0]])
            for item in numbers:
                index, number = items[item]
                here = fused[index, plan.rows[number]]
                here.copy_(join.forward([each[index] for each in maps], number))
                if is_training:
                    torch.mean(here, dim=(0, 1), out=means[item])
                    square = torch.sub(here, means[item], out=deviation[: len(here)]).square_()
                    torch.sum(square, dim=(0, 1), out=squares[item])

        parallel_for(add_up, range(len(items)))
        if is_training:
            counts = torch.tensor(
                [fused[index, plan.rows[number], :, 0].numel() for index, number in items], device="cpu"
            )
            mean, variance = _combine(means, squares, counts)
        else:
            mean, variance = running_mean.clone(), running_var.clone()
        inverse = (variance + eps).rsqrt()
        logits = bias.new_empty(*fused.shape[:3], len(weight))

        def classify(items: Iterator[tuple[int, int]]) -> None:
            activation = _Activation(fused, plan, mean, inverse, norm_weight, norm_bias, kept)
            for index, number in items:
                out = logits[index, plan.rows[number]].flatten(0, 1)
                out.copy_(linear(activation.forward(index, number), weight, classifier_bias))

        parallel_for(classify, items)
        ctx.plan, ctx.is_training = plan, is_training
        # The running statistics are saved as the reference saves them: changing them in place before the backward pass
        # is an error. The bias is a copy, as the reference does not save it.
        ctx.save_for_backward(
            running_mean,
            running_var,
            *(fused, mean, inverse, kept, norm_weight, norm_bias.clone(), weight, bias),
            *maps_and_matrices,
        )
        ctx.mark_non_differentiable(mean, variance)
        return logits, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        _, _, *saved = ctx.saved_tensors
        fused, mean, inverse, kept, norm_weight, norm_bias, weight, bias, *maps_and_matrices = saved
        num_stages, plan = len(maps_and_matrices) // 2, ctx.plan
        maps, matrices = maps_and_matrices[:num_stages], maps_and_matrices[num_stages:]
        gradient, number_of_pixels = gradient.contiguous(), fused[..., 0].numel()
        settings = fused, plan, mean, inverse, norm_weight, norm_bias, kept
        # Bands are assigned to groups beforehand: the order of summation must not depend on the threads.
        items = list(product(range(len(fused)), range(len(plan.rows))))
        num_groups = min(torch.get_num_threads(), len(items))
        weight_gradients = weight.new_zeros(num_groups, *weight.shape)
        norm_gradients = bias.new_zeros(num_groups, 2, len(bias))

        def classifier_backward(groups: Iterator[int]) -> None:
            activation = _Activation(*settings)
            for group in groups:
                for index, number in items[group::num_groups]:
                    logits_gradient = gradient[index, plan.rows[number]].flatten(0, 1)
                    active = activation.forward(index, number)
                    weight_gradients[group].add_(multiply_over_rows(logits_gradient, active))
                    normed = activation.backward(logits_gradient, weight, index, active)
                    norm_gradients[group, 0] += normed.sum(0)
                    deviation = torch.sub(fused[index, plan.rows[number]].flatten(0, 1), mean, out=active)
                    norm_gradients[group, 1] += deviation.mul_(normed).sum(0)

        parallel_for(classifier_backward, range(num_groups))
        norm_bias_gradient, norm_weight_gradient = norm_gradients.sum(0)
        norm_weight_gradient = norm_weight_gradient * inverse
        scale = norm_weight * inverse
        if not ctx.is_training:
            slope = constant = torch.zeros_like(scale)
            bias_gradient = scale * norm_bias_gradient
        else:
            slope = -scale * inverse * norm_weight_gradient / number_of_pixels
            constant = -scale * norm_bias_gradient / number_of_pixels - slope * mean
            bias_gradient = torch.zeros_like(bias)  # subtracting the mean removes the bias
        map_gradients = [torch.zeros_like(each) for each in maps]
        matrix_gradients = [each.new_zeros(num_groups, *each.shape) for each in matrices]

        def join_backward(groups: Iterator[list[tuple[int, int, int]]]) -> None:
            activation, join = _Activation(*settings), Join(plan, matrices, bias, fused.shape[2])
            for each in groups:
                for group, index, number in each:
                    rows = plan.rows[number]
                    active = activation.forward(index, number)
                    normed = activation.backward(gradient[index, rows].flatten(0, 1), weight, index, active)
                    here = fused[index, rows]
                    summed = torch.addcmul(constant, here.flatten(0, 1), slope, out=active).addcmul_(normed, scale)
                    join.backward(
                        summed.view(here.shape),
                        [each[index] for each in maps],
                        number,
                        [each[index] for each in map_gradients],
                        [each[group] for each in matrix_gradients],
                    )

        # Neighbouring bands read the same rows of lower stages: they run one after the other.
        for numbers in apart([[band.old for band in bands] for bands in plan.bands]):
            items = list(product(range(len(fused)), numbers))
            groups = [[(group, *item) for item in items[group::num_groups]] for group in range(num_groups)]
            parallel_for(join_backward, groups)
        return (
            *(None, None, None, None, None),
            norm_weight_gradient,
            norm_bias_gradient,
            weight_gradients.sum(0),
            gradient.sum((0, 1, 2)),
            bias_gradient,
            *map_gradients,
            *(each.sum(0) for each in matrix_gradients),
        )


def _combine(means: Tensor, squares: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Combine means and sums of squared deviations (n, D) of n sets into mean and variance (D,) of all values."""
    shares = counts[:, None].double() / counts.sum()
    mean = (means * shares).sum(0)
    variance = (squares.double() / counts.sum() + shares * (means - mean) ** 2).sum(0)
    return mean.to(means.dtype), variance.to(means.dtype)


class _Activation:
    """BatchNorm, dropout and ReLU of a band, and their gradient; each thread has one, for its buffer."""

    def __init__(
        self,
        fused: Tensor,
        plan: Plan,
        mean: Tensor,
        inverse: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        kept: Tensor,
    ):
        self.fused, self.plan, self.kept = fused, plan, kept
        self.scale = norm_weight * inverse
        self.shift = norm_bias - mean * self.scale
        self.memory = fused.new_empty(fused[0, plan.rows[0]].flatten(0, 1).shape)

    def forward(self, index: int, number: int) -> Tensor:
        """Return (P, D), in a buffer that the next call overwrites."""
        fused = self.fused[index, self.plan.rows[number]].flatten(0, 1)
        scale, shift = self.scale * self.kept[index], self.shift * self.kept[index]
        return torch.addcmul(shift, fused, scale, out=self.memory[: len(fused)]).clamp_(min=0)

    def backward(self, logits_gradient: Tensor, weight: Tensor, index: int, active: Tensor) -> Tensor:
        """Return the gradient (P, D) after BatchNorm from that of the logits (P, K), in memory of its own."""
        normed = linear(logits_gradient, (weight * self.kept[index]).t())
        return torch.ops.aten.threshold_backward(normed, active, 0, grad_input=normed)


implement("decode_head", "cpu_bands", bind_decode_head, fused_decode_head)

__all__ = ["fused_decode_head"]
