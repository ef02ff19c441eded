"""Metrics and predictions of an evaluation in several processes, without gathering images of unequal size.

Each process counts its own images; the counts are summed at the end. Axes: B images, K classes,
h w sides of the logits, H W sides of the masks.
"""

from itertools import zip_longest
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..evaluation.metrics import SegmentationMetrics, count_batch, counted_scores, zero_counts
from ..upsampling_segformer import upsample_argmax

_Maps = list[list[np.ndarray]]  # for each batch the segmentation maps or masks of its images


class Collector:
    """The results of one pass over an evaluation data set.

    A loader fills the last round of several processes up with images from the start; those are not counted.

    Args:
        accelerator: of the Trainer.
        metrics: class names and ignore index, to count predictions where there are labels.
        keeps_maps: keep segmentation maps and masks for `gather_maps`.
    """

    def __init__(self, accelerator: Accelerator, metrics: SegmentationMetrics | None, keeps_maps: bool = False):
        self.accelerator, self.keeps_maps = accelerator, keeps_maps
        self.classes = metrics
        self.has_labels = False
        self.counts = zero_counts(1, len(metrics.names) if metrics else 0)[0].to(accelerator.device)
        self.predictions: _Maps = []
        self.masks: _Maps = []

    def add(self, logits: Tensor, labels: Tensor | None, size: tuple[int, int]) -> None:
        """Count a batch.

        Args:
            logits: (B, K, h, w).
            labels: (B, H, W), or None.
            size: (H, W) of the segmentation maps where there are no labels.
        """
        number = self._number_of_own(len(logits))
        if labels is not None:
            self.has_labels = True
            if self.classes is not None:
                names, ignore_index = self.classes.names, self.classes.ignore_index
                self.counts += count_batch(logits[:number], labels[:number], len(names), ignore_index).sum(dim=0)
        if self.keeps_maps:
            maps = upsample_argmax(logits[:number], size if labels is None else labels.shape[-2:])
            self.predictions.append(list(maps.cpu().numpy()))
            self.masks.append([] if labels is None else list(labels[:number].cpu().numpy()))

    def _number_of_own(self, number: int) -> int:
        """The first images of this process's batch that no other batch has."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0 or not self.accelerator.even_batches:
            return number
        return min(max(state.remainder - self.accelerator.process_index * number, 0), number)

    def metrics(self) -> dict[str, float]:
        """Sum the counts of all processes and return the metrics; empty where there were no labels."""
        if self.classes is None or not self.has_labels:
            return {}
        return counted_scores(self.accelerator.reduce(self.counts, "sum"), self.classes.names)

    def gather_maps(self) -> tuple[Any, Any]:
        """Return segmentation maps and masks in the data set's order, each one array if all sizes are equal."""
        if not self.keeps_maps:
            return None, None
        predictions, masks = (_in_order(gather_object([maps])) for maps in (self.predictions, self.masks))
        return predictions, masks if self.has_labels else None


def _in_order(processes: list[_Maps]) -> np.ndarray | list[np.ndarray]:
    """Batches are dealt out to the processes in turn."""
    rounds = zip_longest(*processes, fillvalue=[])
    maps = [each for batches in rounds for batch in batches for each in batch]
    return np.stack(maps) if len({each.shape for each in maps}) == 1 else maps


__all__ = ["Collector"]
