"""Segmentation losses and weighted sums of them; set one by `model.loss_function = SegmentationLoss(...)`.

Axes: B images, K classes, h w sides of the logits, H W sides of the masks. One logit is two classes, background at log
odds 0 and foreground, so that every term below is binary too.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import LossConfig, check_class_weight_scheme
from ..configuration_segformer import default_ignore_index
from ..upsampling_segformer import at_least_float32, check_labels, upsample, upsample_cross_entropy


class SegmentationLoss(LossConfig):
    """Weighted sum of segmentation losses on logits that are upsampled once to the masks' size.

    Arguments and errors are those of `LossConfig`. Where no pixel is valid, the loss is 0 with zero gradient.

    Examples:
        >>> import torch
        >>> from hf_segformer.training.losses import SegmentationLoss
        >>> loss = SegmentationLoss(cross_entropy=1.0, dice=0.5)
        >>> round(loss(torch.zeros(2, 4, 8, 12), torch.zeros(2, 32, 48, dtype=torch.long)).item(), 4)
        1.6863
    """

    def __call__(self, logits: Tensor, labels: Tensor, ignore_index: int | None = None) -> Tensor:
        """Compute the loss of a batch, at least in float32.

        Args:
            logits: (B, K, h, w).
            labels: (B, H, W), 0..K-1 (0 and 1 where K is 1) or `ignore_index`.
            ignore_index: label of ignored pixels, by default that of a model with as many classes.

        Raises:
            ValueError: if labels do not fit, or class weights are still a scheme or not one for each class.
        """
        num_classes = max(logits.shape[1], 2)
        ignore_index = default_ignore_index(num_classes) if ignore_index is None else ignore_index
        if not (self.ohem or self.dice or self.focal or self.lovasz or self.tversky):
            weight = None
            if self.class_weights is not None:
                weight = self._class_weights(num_classes, at_least_float32(logits[:0]))
            return self.cross_entropy * upsample_cross_entropy(
                logits, labels, ignore_index=ignore_index, weight=weight, label_smoothing=self.label_smoothing
            )
        labels = check_labels(labels, (len(logits), "height", "width"), num_classes, ignore_index)
        logits = upsample(at_least_float32(logits), labels.shape[-2:])
        is_binary = logits.shape[1] == 1
        if is_binary:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        log_probabilities = F.log_softmax(logits, dim=1)
        class_weights = self._class_weights(num_classes, logits)
        counted = labels != ignore_index
        targets = labels.where(counted, 0)
        log_likelihood = log_probabilities.gather(1, targets[:, None])[:, 0]  # (B, H, W), of the true class
        weights = class_weights[targets] * counted
        total = logits.new_zeros(())
        if self.cross_entropy:
            losses = -log_likelihood
            if self.label_smoothing:
                # As in PyTorch, the part that is spread has the weights of all classes, not that of the true one.
                spread = -(log_probabilities * class_weights[:, None, None]).sum(1) / num_classes * counted
                losses = (1 - self.label_smoothing) * losses * weights + self.label_smoothing * spread
            else:
                losses = losses * weights
            total = total + self.cross_entropy * _divide(losses.sum(), weights.sum())
        if self.ohem:
            kept = weights * self._is_hard(log_likelihood, counted)
            total = total + self.ohem * _divide((-log_likelihood * kept).sum(), kept.sum())
        if self.focal:
            # A power below 1 has an infinite slope at 0.
            wrong = (-torch.expm1(log_likelihood)).clamp(min=1e-12)
            losses = -(wrong**self.focal_gamma) * log_likelihood * weights
            total = total + self.focal * _divide(losses.sum(), weights.sum())
        if self.dice or self.tversky:
            overlap, predicted, true = _overlaps(log_probabilities, log_likelihood, targets, counted)
            is_present = true > 0
            if is_binary:
                overlap, predicted, true, is_present = overlap[1:], predicted[1:], true[1:], is_present[1:]
            if self.dice:
                losses = 1 - 2 * _divide(overlap, predicted + true)
                total = total + self.dice * _divide((losses * is_present).sum(), is_present.sum())
            if self.tversky:
                losses = self._tversky_losses(overlap, predicted, true)
                total = total + self.tversky * _divide((losses * is_present).sum(), is_present.sum())
        if self.lovasz and is_binary:
            total = total + self.lovasz * _lovasz_hinge(logits[:, 1], targets, counted)
        elif self.lovasz:
            total = total + self.lovasz * _lovasz_softmax(log_probabilities, targets, counted)
        return total

    def _tversky_losses(self, overlap: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        """(K,) losses from sums over the pixels; a class that no pixel has gets 1."""
        errors = self.tversky_alpha * (predicted - overlap) + self.tversky_beta * (true - overlap)
        losses = 1 - _divide(overlap, overlap + errors)
        # A power below 1 has an infinite slope at 0.
        return losses if self.tversky_gamma == 1 else losses.clamp(min=1e-12) ** self.tversky_gamma

    def _class_weights(self, num_classes: int, logits: Tensor) -> Tensor:
        if self.class_weights is None:
            return logits.new_ones(num_classes)
        if isinstance(self.class_weights, str):
            raise ValueError(
                f"loss.class_weights is {self.class_weights!r}; expected numbers, which "
                "hf_segformer.training.losses.class_weights(pixel_counts, scheme) computes"
            )
        if len(self.class_weights) != num_classes:
            raise ValueError(
                f"loss.class_weights has {len(self.class_weights)} numbers; expected {num_classes}, one for each class"
            )
        return logits.new_tensor(self.class_weights)

    @torch.no_grad()
    def _is_hard(self, log_likelihood: Tensor, counted: Tensor) -> Tensor:
        likelihood = log_likelihood.exp().where(counted, 1)
        is_hard = likelihood < self.ohem_threshold
        num_kept = min(self.ohem_min_kept * len(likelihood), likelihood.numel())
        if num_kept:
            is_hard |= likelihood <= likelihood.flatten().kthvalue(num_kept).values
        return is_hard


def _divide(total: Tensor, number: Tensor) -> Tensor:
    return total / number.where(number > 0, 1)


def _overlaps(
    log_probabilities: Tensor, log_likelihood: Tensor, targets: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum p t, p and t over all valid pixels, for probabilities p and targets t of each class, (K,) each."""
    num_images, num_classes, height, _ = log_probabilities.shape
    # Sums of a row first: one running sum of millions of float32 loses its small terms.
    rows = log_likelihood.new_zeros(num_images, height, num_classes)
    overlap = rows.scatter_add(2, targets, log_likelihood.exp() * counted).sum((0, 1))
    true = rows.scatter_add(2, targets, counted.to(rows.dtype)).sum((0, 1))
    predicted = (log_probabilities.exp() * counted[:, None]).sum((0, 2, 3))
    return overlap, predicted, true


def _lovasz_softmax(log_probabilities: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Mean over the classes of the labels; classes are sorted one by one, so that memory grows with those alone."""
    num_classes = log_probabilities.shape[1]
    total, number = log_probabilities[:0].sum(), 0  # 0 with zero gradient
    for index in range(num_classes):
        is_class = (targets == index) & counted
        is_present = is_class.any()
        if torch.compiler.is_compiling() or is_present:
            probabilities = log_probabilities[:, index].exp()
            errors = torch.where(is_class, 1 - probabilities, probabilities)
            total = total + _lovasz(errors, is_class, counted) * is_present
            number = number + is_present
    return _divide(total, torch.as_tensor(number, device=total.device))


def _lovasz_hinge(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    margins = 1 - torch.where(targets == 1, logits, -logits)
    return _lovasz(margins.clamp(min=0), (targets == 1) & counted, counted)


def _lovasz(errors: Tensor, is_true: Tensor, counted: Tensor) -> Tensor:
    """Lovasz extension of 1 - IoU of a set of pixels at errors (B, H, W) of at least 0 (Berman et al. 2018, eq. 9).

    It is linear between the orders of the errors: its gradient is what IoU loses with each pixel in that order.
    """
    with torch.no_grad():
        # The last ones are ignored.
        order = errors.where(counted, -1).flatten().sort(descending=True).indices
        true, wrong = is_true.flatten()[order], (counted & ~is_true).flatten()[order]
        # Sums of integers, which lose no small term.
        intersection = (true.sum() - true.cumsum(0)).to(errors.dtype)
        union = (true.sum() + wrong.cumsum(0)).to(errors.dtype)
        # A true pixel takes 1 / union; a wrong one intersection (1 / (union - 1) - 1 / union).
        losses = torch.where(true, 1.0, intersection / (union - 1).clamp(min=1)) / union.clamp(min=1)
        is_first = torch.arange(len(losses), device=losses.device) == 0
        losses = losses.where((true.sum() > 0) | ~is_first, 1.0)  # without a true pixel IoU falls from 1 to 0 at once
        weights = torch.empty_like(losses).scatter_(0, order, losses).view_as(errors) * counted
    return (errors * weights).sum((1, 2)).sum()


def class_weights(counts: Sequence[float], scheme: str) -> list[float]:
    """Compute weights that lift rare classes, scaled so that the mean over all pixels is 1.

    Args:
        counts: number of pixels of each class.
        scheme: `"median_frequency"` (Eigen and Fergus 2015: the median class's share of the pixels by a class's own,
            here of all images, not only of those that hold the class), `"log"` (Paszke et al. 2016:
            1 / ln(1.02 + share)) or `"inverse_sqrt"` (1 / sqrt(share)). A class without a pixel gets
            0: there is nothing to lift, and by any of these it would weigh most.

    Raises:
        ValueError: if the scheme is unknown, or there is no pixel.

    Examples:
        >>> from hf_segformer.training.losses import class_weights
        >>> [round(weight, 3) for weight in class_weights([900, 100], "inverse_sqrt")]
        [0.833, 2.5]
    """
    check_class_weight_scheme(scheme)
    total = float(sum(counts))
    if not total > 0:
        raise ValueError("all pixel counts are 0; expected a pixel of at least one class to compute class weights from")
    shares = [float(count) / total for count in counts]
    if scheme == "median_frequency":
        weights = [
            1 / share if share else 0.0 for share in shares
        ]  # the median is a common factor, removed by the scaling
    elif scheme == "log":
        weights = [1 / math.log(1.02 + share) if share else 0.0 for share in shares]
    else:
        weights = [share**-0.5 if share else 0.0 for share in shares]
    mean = sum(share * weight for share, weight in zip(shares, weights, strict=True))
    return [weight / mean for weight in weights]


__all__ = ["SegmentationLoss", "class_weights"]
