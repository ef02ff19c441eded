"""Boundary IoU and boundary F1, counted so that images add up.

IoU hardly notices the outline of a large object: its interior outweighs it. Boundary IoU (Cheng et al. 2021, "Boundary
IoU: Improving Object-Centric Image Segmentation Evaluation", arXiv 2103.16562) compares only the pixels within a
distance d of each mask's outline; boundary F1 (Csurka et al. 2013, "What is a good evaluation measure for semantic
segmentation?") asks which share of an outline has a counterpart within a tolerance.

Both are needed for every class, yet masks of classes do not overlap, so one pass over the segmentation map serves all
classes: a pixel is within d of its own class's outline where the square window around it is not uniform. An integral
image answers this in constant time for any d.

Ignored pixels are taken out of the prediction as well as out of the labels. For boundary IoU the edge of an ignored
region is then an outline in both, as the image's border is in the paper. For boundary F1 neither is an outline: nothing
is delineated there, and a match would flatter the model.

Axes: K classes, H W the mask's sides, N boundary pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DILATION_RATIO = 0.02
TOLERANCE = 3

_NO_CLASS = -1  # ignored pixels, and what is outside the image
_WRONG = -2  # a prediction that is no class


class BoundaryCounts(NamedTuple):
    """Rows of the counts that `boundary_counts` returns, each of K numbers of pixels.

    Attributes:
        intersection: pixels of the class near its outline in labels and prediction alike.
        true_band: pixels of the class near its outline in the labels.
        predicted_band: pixels of the class near its outline in the prediction.
        true_outline: pixels on the class's outline in the labels.
        found: those of them with a predicted outline of the class within the tolerance.
        predicted_outline: pixels on the class's outline in the prediction.
        correct: those of them with a true outline of the class within the tolerance.
    """

    intersection: Tensor
    true_band: Tensor
    predicted_band: Tensor
    true_outline: Tensor
    found: Tensor
    predicted_outline: Tensor
    correct: Tensor


def boundary_counts(
    prediction: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    *,
    dilation_ratio: float = DILATION_RATIO,
    tolerance: int = TOLERANCE,
) -> Tensor:
    """Count the boundary pixels of one image, by class; counts of images add up.

    Args:
        prediction: (H, W) class ids; ids outside 0..K-1 are no class, and wrong.
        labels: (H, W) true class ids on the same device.
        num_classes: number of classes K.
        ignore_index: label of ignored pixels.
        dilation_ratio: distance d of boundary IoU as a share of the image's diagonal; at least one pixel.
        tolerance: distance of boundary F1 in pixels, Euclidean.

    Returns:
        int64 tensor (7, K) in the order of `BoundaryCounts`.

    Raises:
        ValueError: if the shapes differ or are not (H, W), or a distance is out of range.

    Examples:
        >>> import torch
        >>> from hf_segformer.evaluation.boundary import boundary_counts, boundary_scores
        >>> labels = torch.zeros(40, 60, dtype=torch.int64)
        >>> labels[10:30, 10:30] = 1
        >>> boundary_scores(boundary_counts(labels, labels, num_classes=2, ignore_index=255))["boundary_iou"]
        [1.0, 1.0]
    """
    if prediction.shape != labels.shape or labels.ndim != 2:
        raise ValueError(
            f"prediction is {tuple(prediction.shape)} and labels are {tuple(labels.shape)}; expected (H, W) of one size"
        )
    _check_distances(dilation_ratio, tolerance)
    counted = labels != ignore_index
    is_class = (prediction >= 0) & (prediction < num_classes)
    truth = torch.where(counted, labels.int(), _NO_CLASS)
    found = torch.where(counted, torch.where(is_class, prediction.int(), _WRONG), _NO_CLASS)
    height, width = labels.shape
    radius = band_radius(height, width, dilation_ratio)
    in_true_band, in_predicted_band = _is_near_edge(truth, radius), _is_near_edge(found, radius)
    both = truth[in_true_band & in_predicted_band & (truth == found)]
    bands, outlines = (truth[in_true_band], found[in_predicted_band]), (_outline(truth), _outline(found))
    parts = (both, *bands, *_matches(*outlines, tolerance), *_matches(*outlines[::-1], tolerance))
    return torch.stack([torch.bincount(part[part >= 0], minlength=num_classes) for part in parts])


def boundary_scores(counts: Tensor) -> dict[str, list[float]]:
    """Boundary IoU and boundary F1 by class.

    Args:
        counts: (7, K) of `boundary_counts`, of one image or added up over many.

    Returns:
        lists of K floats: `boundary_iou`, `boundary_precision`, `boundary_recall` and `boundary_f1`. A class without an
        outline in labels and prediction is NaN; one with an outline in only one of them has IoU and F1 0.
    """
    rows = BoundaryCounts(*counts.double().cpu())
    union = rows.true_band + rows.predicted_band - rows.intersection
    precision, recall = rows.correct / rows.predicted_outline, rows.found / rows.true_outline
    f1 = 2 * precision.nan_to_num() * recall.nan_to_num() / (precision.nan_to_num() + recall.nan_to_num())
    missed = (rows.predicted_outline + rows.true_outline > 0) & f1.isnan()
    values = (rows.intersection / union, precision, recall, f1.masked_fill(missed, 0.0))
    names = ("boundary_iou", "boundary_precision", "boundary_recall", "boundary_f1")
    return {name: value.tolist() for name, value in zip(names, values, strict=True)}


def band_radius(height: int, width: int, dilation_ratio: float = DILATION_RATIO) -> int:
    """Distance d in pixels of boundary IoU: a share of the image's diagonal, rounded, at least 1.

    Examples:
        >>> from hf_segformer.evaluation.boundary import band_radius
        >>> band_radius(480, 640)
        16
    """
    return max(1, round(dilation_ratio * (height**2 + width**2) ** 0.5))


def _check_distances(dilation_ratio: float, tolerance: int) -> None:
    if not 0 < dilation_ratio < 1:
        raise ValueError(f"dilation_ratio is {dilation_ratio}; expected a share of the diagonal between 0 and 1")
    if not isinstance(tolerance, int) or tolerance < 0:
        raise ValueError(f"tolerance is {tolerance!r}; expected a whole number of pixels, 0 or more")


def _is_near_edge(classes: Tensor, radius: int) -> Tensor:
    """(H, W) class ids -> (H, W), True where the square of side 2 * radius + 1 holds another class or leaves the image.

    This is the paper's mask minus its erosion by `radius` steps of 3x3 squares, for all classes at once. The square is
    uniform exactly if each block of 2x2 pixels in it is.
    """
    padded, size = F.pad(classes, (radius,) * 4, value=_NO_CLASS), 2 * radius
    corner = padded[:-1, :-1]
    is_mixed = (corner != padded[1:, :-1]) | (corner != padded[:-1, 1:]) | (corner != padded[1:, 1:])
    dtype = torch.int32 if is_mixed.numel() < 2**31 else torch.int64
    integral = F.pad(is_mixed.cumsum(0, dtype=dtype).cumsum(1, dtype=dtype), (1, 0, 1, 0))
    lower, upper = integral[size:], integral[:-size]
    return lower[:, size:] - lower[:, :-size] - upper[:, size:] + upper[:, :-size] > 0


def _outline(classes: Tensor) -> Tensor:
    """(H, W) class ids -> (H, W): the id where a neighbour of the eight is of another class, elsewhere -1."""
    padded = F.pad(classes, (1, 1, 1, 1), value=_NO_CLASS)
    height, width = classes.shape
    differs = torch.zeros_like(classes, dtype=torch.bool)
    for down in range(3):
        for right in range(3):
            neighbour = padded[down : down + height, right : right + width]
            differs |= (neighbour != classes) & (neighbour != _NO_CLASS)
    return torch.where(differs, classes, _NO_CLASS)


def _matches(outline: Tensor, other: Tensor, tolerance: int) -> tuple[Tensor, Tensor]:
    """Classes (N,) of an outline's pixels, and of those with a pixel of the same class in the other outline nearby."""
    row, column = (outline >= 0).nonzero(as_tuple=True)
    classes = outline[row, column]
    padded = F.pad(other, (tolerance,) * 4, value=_NO_CLASS)
    near = torch.zeros_like(classes, dtype=torch.bool)
    for down in range(2 * tolerance + 1):
        for right in range(2 * tolerance + 1):
            if (down - tolerance) ** 2 + (right - tolerance) ** 2 <= tolerance**2:
                near |= padded[row + down, column + right] == classes
    return classes, classes[near]


__all__ = [
    "DILATION_RATIO",
    "TOLERANCE",
    "BoundaryCounts",
    "band_radius",
    "boundary_counts",
    "boundary_scores",
]
