"""Pipeline that prediction and evaluation share: images are loaded ahead in threads and segmented in batches.

Reading and resizing images takes as long as a small network, so threads do it while the network computes. Results come
in the order of the images. Logits are never upsampled to the size of an image: `upsample_argmax` takes the best class.

Axes: C channels, H W sides of the image, H' W' sides of the prepared image.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .segmenter import Segmenter, is_out_of_memory

BATCH_PIXELS = 1 << 23  # of prepared images in a batch; a larger image is a batch by itself


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image that is ready for the network.

    Attributes:
        views: float32 (1, C, H', W') at each scale.
        size: height and width of the segmentation map.
        name: name of the image in error messages.
        image: the image as it was read, an upright Pillow image or an array (C, H, W); None if it is not needed.
        labels: (H, W) labels to compare with, if there are any.
        group: only images of one group share a batch.
        index: position in the data set.
        valid: pixels that hold data, bool (H, W); None for all of them.
    """

    views: list[Tensor]
    size: tuple[int, int]
    name: str
    image: Any = None
    labels: np.ndarray | None = None
    group: int = 0
    index: int = 0
    valid: np.ndarray | None = None

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Shape of each view."""
        return tuple(view.shape for view in self.views)


def segment_batch(
    segmenter: Segmenter, batch: list[Prepared], *, with_probabilities: bool = False, with_confidence: bool = False
) -> Iterator[tuple[Tensor, Any]]:
    """Segmentation map, int64 (H, W), of each image of a batch, with what is asked for besides.

    That is probabilities, float32 (K, H, W), or the `Confidence`, or None. The network sees the batch at once; the rest
    is computed one image at a time.

    Raises:
        ValueError: if the prepared sizes differ or are too small for the network, or if one image does not fit into
            memory.
        MemoryError: if several images at once do not fit into memory.
    """
    if len({prepared.shapes for prepared in batch}) > 1:
        raise ValueError("the images of a batch have different prepared sizes; expected one size")
    views = [torch.cat(scale) for scale in zip(*(prepared.views for prepared in batch), strict=True)]
    sizes = [prepared.size for prepared in batch]
    with _named_errors(batch):
        if with_probabilities:
            yield from segmenter.predict_probabilities(views, sizes)
        elif with_confidence:
            yield from segmenter.predict_confidences(views, sizes)
        else:
            yield from ((classes, None) for classes in segmenter.predict(views, sizes))


@contextmanager
def _named_errors(batch: list[Prepared]) -> Iterator[None]:
    """Name the image, or the number of images, in errors of the network."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{batch[0].name}: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        height, width = batch[0].views[0].shape[-2:]
        if len(batch) == 1:
            raise ValueError(
                f"{batch[0].name}: {height}x{width} pixels at once do not fit into memory: set sliding_window"
            ) from error
        raise MemoryError(
            f"{len(batch)} images of {height}x{width} at once do not fit into memory: set a smaller batch size"
        ) from error


class ReadAhead(Iterator[Any]):
    """Results in the order of their tasks, computed on demand.

    Twice as many images as fit into a batch are prepared ahead. The first of them is segmented together with the next
    ones of its group and prepared size among those ahead. Batches, and with them the rounding, thus depend on the order
    of the images alone.

    Args:
        tasks: each runs in a thread and returns a `Prepared` image or raises ValueError or OSError. Any other object
            that it returns is a result.
        segment: returns the result of each image of a batch, or raises the ValueError of its first image.
        batch_size: most images in a batch.
    """

    def __init__(
        self,
        tasks: Iterable[Callable[[], Any]],
        segment: Callable[[list[Prepared]], Iterable[Any]],
        batch_size: int,
    ):
        self._tasks, self._segment, self._batch_size = iter(tasks), segment, batch_size
        self._ahead: deque[_Slot] = deque()
        self._pool = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2)), "segformer-reads-ahead")

    def __next__(self) -> Any:
        """Return the next result, or raise the error of its task."""
        self._read_ahead()
        if not self._ahead:
            self._pool.shutdown()
            raise StopIteration
        first = self._ahead[0]
        if not first.is_done:
            self._segment_first()
        self._ahead.popleft()
        if first.error is not None:
            raise first.error
        return first.result

    def close(self) -> None:
        """Cancel what was read ahead, and wait for the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _read_ahead(self) -> None:
        while len(self._ahead) < 2 * self._batch_size:
            try:
                task = next(self._tasks)
            except StopIteration:
                return
            except Exception as error:  # of the iterable itself, which has ended: raised after the images before it
                self._ahead.append(_Slot(is_done=True, error=error))
                return
            self._ahead.append(_Slot(self._pool.submit(task)))

    def _segment_first(self) -> None:
        batch = self._first_batch()
        if not batch:
            return
        prepared = [found for slot in batch if (found := slot.prepared()) is not None]
        try:
            results = self._segment(prepared)
        except ValueError as error:  # of the first image; the others are tried again in their turn
            batch[0].finish(error=error)
            return
        for slot, result in zip(batch, results, strict=True):
            slot.finish(result)

    def _first_batch(self) -> "list[_Slot]":
        """The first slot and later ones of its group and shape, as many as fit into a batch; none if it is done."""
        first, *others = islice(self._ahead, None)
        if (wanted := first.prepared()) is None:
            return []
        batch, num_pixels = [first], sum(shape[-1] * shape[-2] for shape in wanted.shapes)
        most = min(self._batch_size, max(1, BATCH_PIXELS // num_pixels))
        for slot in others:
            if len(batch) == most:
                break
            found = None if slot.is_done else slot.prepared()
            if found is not None and (found.group, found.shapes) == (wanted.group, wanted.shapes):
                batch.append(slot)
        return batch


@dataclass(eq=False)
class _Slot:
    """Place of an image in the order; it is pending until it has a result or an error."""

    future: Future | None = None
    is_done: bool = False
    result: Any = None
    error: BaseException | None = None

    def prepared(self) -> Prepared | None:
        """Wait for the prepared image; None if the task ended without one, which finishes the slot."""
        try:
            value = self.future.result() if self.future else None
        except (ValueError, OSError) as error:
            self.finish(error=error)
            return None
        if not isinstance(value, Prepared):
            self.finish(value)
            return None
        return value

    def finish(self, result: Any = None, error: BaseException | None = None) -> None:
        """Set the outcome, and release the prepared image."""
        self.future, self.is_done, self.result, self.error = None, True, result, error


__all__ = ["BATCH_PIXELS", "Prepared", "ReadAhead", "segment_batch"]
