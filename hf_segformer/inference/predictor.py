"""Labels for pictures: a predictor that reads ahead, batches pictures of one prepared size, and keeps their order.

Reading and resizing pictures takes as long as a small network, so threads do it while the network is at work on the
pictures before. Logits are never blown up to the pictures' sizes: labels are taken by `upsample_argmax`.

Axes: C bands, K classes, H W the upright picture's sides.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from ..config import InferenceOptions
from ..conversion.convert import load_segmentation
from ..data.readers import has_data, read_whole_image
from ..image_io_segformer import DECODE_ERRORS, read_image
from ..image_processing_segformer import SegFormerImageProcessor
from ..visualization import Color, default_palette
from .segmenter import class_names, is_out_of_memory, label_maps, labels_and_scores, prepare_views

_BACKGROUND_COLOR = (214, 209, 196)
_BATCH_PIXELS = 1 << 23  # of prepared pictures: larger ones go alone


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model sees in a picture.

    Attributes:
        labels: (H, W) classes, of the smallest unsigned type that holds them.
        scores: float32 (K, H, W), the probability of each class, if they were asked for.
    """

    labels: np.ndarray
    scores: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Prepared:
    """A picture on its way to the network.

    Attributes:
        views: float32 (1, C, H', W') at each scale.
        size: height and width of the picture.
        name: what error messages call it.
        picture: as it was read: an upright Pillow picture, or an array (C, H, W) of bands; None if it is not wanted.
        valid: where it holds data, bool (H, W); None everywhere.
    """

    views: list[Tensor]
    size: tuple[int, int]
    name: str
    picture: Any
    valid: np.ndarray | None = None


class SegFormerPredictor:
    """Labels pictures, each at its own size.

    Args:
        model: a segmentation model; it is used where it is and as it is.
        processor: prepares pictures.
        options: mirrored, at several scales or by windows; by default whole and once.
        batch_size: pictures of the same prepared size that the network sees at once. With windows it is one.

    Attributes:
        names: of the classes; a model with one label has two, background and its own.
        palette: one (red, green, blue) a name: the `palette` of the model's config, or `visualize.default_palette`.

    Raises:
        ValueError: if the batch size is not at least 1, or the config's palette does not fit its classes.

    Example:
        >>> from PIL import Image
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
        >>> from hf_segformer import SegFormerPredictor
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig(depths=[1, 1, 1, 1], num_labels=5)).eval()
        >>> predictor = SegFormerPredictor(model, SegFormerImageProcessor(size=64))
        >>> picture = Image.new("RGB", (90, 60))
        >>> predictor(picture).labels.shape
        (60, 90)
        >>> [prediction.scores.shape for prediction in predictor([picture, picture], with_scores=True)]
        [(5, 60, 90), (5, 60, 90)]
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: SegFormerImageProcessor,
        options: InferenceOptions | None = None,
        *,
        batch_size: int = 8,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but it must be at least 1")
        self.model, self.processor = model, processor
        self.options = options or InferenceOptions()
        self.batch_size = 1 if self.options.window else batch_size
        self.names = class_names(model.config)
        self.palette = _palette(model.config, len(self.names))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        options: InferenceOptions | None = None,
        batch_size: int = 8,
    ) -> "SegFormerPredictor":
        """The predictor of a checkpoint.

        Args:
            source: a folder, a file of weights or a Hub repository, of any code base that `convert_checkpoint` reads.
            device: of PyTorch; by default the accelerator if there is one, else the CPU.
            dtype: of the network's numbers; float32 by default.
            options: see the class.
            batch_size: see the class.

        Raises:
            OSError: if there is no such path or repository, or a file can not be opened.
            ValueError: if it holds no segmentation model, is damaged, or the device is not there.
        """
        model, processor = load_segmentation(source)
        return cls(model.to(find_device(device), dtype), processor, options, batch_size=batch_size)

    def __call__(self, images: Any, *, with_scores: bool = False) -> "Prediction | Iterator[Prediction]":
        """Label one picture, or many.

        Args:
            images: a path (of a picture, or of an array in a .npy file), Pillow picture, (H, W), (H, W, C) or
                (C, H, W) array or tensor; or an iterable of such, which may be endless.
            with_scores: whether to give the probabilities, too. They take K times the memory of a float picture.

        Returns:
            One `Prediction`; or of an iterable an iterator that predicts as it is asked, in order, and has read some
            pictures ahead by then. Where a picture can not be read, that is raised at its place, and `next` goes on
            with the one after it.

        Raises:
            ValueError: if a picture does not fit the model; the message names its file, or its place in the iterable.
            OSError: if a file can not be opened, or is cut short.
        """
        is_array = isinstance(images, np.ndarray | Tensor)
        if isinstance(images, str | os.PathLike | Image.Image) or (is_array and images.ndim < 4):
            return self.predict([self.prepare(images)], with_scores=with_scores)[0]
        if not isinstance(images, Iterable):
            raise ValueError(f"images is a {type(images).__name__}, but it must be a picture or an iterable of such")
        tasks = (
            partial(self.prepare, image, f"picture {index}", keep_picture=False) for index, image in enumerate(images)
        )
        return Predictions(self, tasks, with_scores=with_scores)

    def prepare(self, image: Any, name: str = "the picture", *, keep_picture: bool = True) -> Prepared:
        """Read a picture and make it ready for the network; it needs no accelerator and may run in any thread.

        Args:
            image: see `__call__`.
            name: what an error message calls it where it is no file.
            keep_picture: whether to hand the picture on; many that are read ahead may be large.

        Raises:
            ValueError: if it can not be read, or has other bands than the model takes.
            OSError: if a file can not be opened, or is cut short.
        """
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else name
        try:
            num_channels, any_range = len(self.processor.image_mean), self.processor.value_range is not None
            is_file = isinstance(image, str | os.PathLike | BytesIO)
            picture = (
                read_whole_image(image, num_channels, name, any_range=any_range)
                if is_file
                else read_image(image, num_channels, None, name, any_range)
            )
            data_format = "channels_first" if isinstance(picture, np.ndarray) else None
            views = prepare_views(self.processor, picture, self.options, data_format)
        except OSError as error:
            raise OSError(told(error, name)) from error
        except DECODE_ERRORS as error:
            raise ValueError(told(error, name)) from error
        size = picture.shape[-2:] if isinstance(picture, np.ndarray) else (picture.height, picture.width)
        return Prepared(views, size, name, picture if keep_picture else None, has_data(picture))

    def predict(self, batch: list[Prepared], *, with_scores: bool = False) -> list[Prediction]:
        """Predict pictures of the same prepared size at once.

        Raises:
            ValueError: if their prepared sizes differ, or are too small for the network, or there is not enough memory
                for one picture.
            MemoryError: if there is not enough memory for several at once.
        """
        if len({_shapes(prepared) for prepared in batch}) > 1:
            raise ValueError("the pictures of a batch must have one prepared size; the predictor's call sorts them")
        views = [torch.cat(scale) for scale in zip(*(prepared.views for prepared in batch), strict=True)]
        sizes = [prepared.size for prepared in batch]
        arguments = self.model, self.processor, views, sizes, self.options
        try:
            if with_scores:
                pairs = labels_and_scores(*arguments)
                found = [Prediction(self._integers(labels), scores.float().cpu().numpy()) for labels, scores in pairs]
            else:
                found = [Prediction(self._integers(labels)) for labels in label_maps(*arguments)]
            for prepared, prediction in zip(batch, found, strict=True):
                if prepared.valid is not None:  # no data: the highest value of the type, 255
                    prediction.labels[~prepared.valid] = np.iinfo(prediction.labels.dtype).max
            return found
        except ValueError as error:
            raise ValueError(f"{batch[0].name}: {error}") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            height, width = views[0].shape[-2:]
            if len(batch) == 1:
                raise ValueError(
                    f"{batch[0].name}: there is not enough memory for {height}x{width} pixels at once: slide a window"
                ) from error
            raise MemoryError(
                f"there is not enough memory for {len(batch)} pictures of {height}x{width} at once: give a smaller "
                "batch size"
            ) from error

    def _integers(self, labels: Tensor) -> np.ndarray:
        return labels.cpu().numpy().astype(np.min_scalar_type(len(self.names)))  # and one value for no data


class Predictions(Iterator[Prediction]):
    """Predictions in the order of their pictures, made as they are asked for.

    Twice as many pictures as a batch holds are prepared ahead. The first of them is predicted together with the next
    ones of its prepared size, wherever they are among those ahead; so which pictures share a batch, and with it the
    rounding, depends on their order alone.

    Args:
        predictor: that predicts.
        tasks: each gives a `Prepared` picture, in a thread, or raises ValueError or OSError.
        with_scores: see the predictor's call.
        keep: called with each prepared picture and its prediction; what it gives is iterated over instead.
    """

    def __init__(
        self,
        predictor: SegFormerPredictor,
        tasks: Iterable[Callable[[], Prepared]],
        *,
        with_scores: bool = False,
        keep: Callable[[Prepared, Prediction], Any] | None = None,
    ):
        self._predictor, self._tasks, self._with_scores = predictor, iter(tasks), with_scores
        self._keep = keep or (lambda prepared, prediction: prediction)
        self._ahead: deque[_Place] = deque()
        self._pool = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2)), "segformer-reads-ahead")

    def __next__(self) -> Any:
        """The next prediction, or its picture's error."""
        self._read_ahead()
        if not self._ahead:
            self._pool.shutdown()
            raise StopIteration
        if self._ahead[0].outcome is None:
            self._predict_first()
        outcome = self._ahead.popleft().outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _read_ahead(self) -> None:
        while len(self._ahead) < 2 * self._predictor.batch_size:
            try:
                task = next(self._tasks)
            except StopIteration:
                return
            except Exception as error:  # the iterable's own: at its place, and the iterable is at its end
                self._ahead.append(_Place(outcome=error))
                return
            self._ahead.append(_Place(self._pool.submit(task)))

    def _predict_first(self) -> None:
        batch = self._first_batch()
        if not batch:
            return
        prepared = [place.prepared() for place in batch]
        try:
            predictions = self._predictor.predict(prepared, with_scores=self._with_scores)
        except ValueError as error:  # of the first; the others find theirs when it is their turn
            batch[0].outcome, batch[0].future = error, None
            return
        for place, picture, prediction in zip(batch, prepared, predictions, strict=True):
            place.outcome, place.future = self._keep(picture, prediction), None

    def _first_batch(self) -> "list[_Place]":
        """The first place and others of its prepared size, as many as a batch holds; none if it can not be read."""
        first, *others = islice(self._ahead, None)
        if first.prepared() is None:
            return []
        shapes, batch = _shapes(first.prepared()), [first]
        num_pixels = sum(shape[-1] * shape[-2] for shape in shapes)
        most = min(self._predictor.batch_size, max(1, _BATCH_PIXELS // num_pixels))
        for place in others:
            if len(batch) == most:
                break
            if place.outcome is None and place.prepared() is not None and _shapes(place.prepared()) == shapes:
                batch.append(place)
        return batch


@dataclass(eq=False)
class _Place:
    """A picture's place in the order: it is being prepared until there is an outcome, a prediction or an error."""

    future: Future | None = None
    outcome: Any = None

    def prepared(self) -> Any:
        """Waits for the picture; None where it can not be read, which then is the outcome."""
        try:
            return self.future.result() if self.future else None
        except (ValueError, OSError) as error:
            self.outcome, self.future = error, None
            return None


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name, or by default the accelerator if there is one, else the CPU.

    Several processes of one machine share its accelerators out, unless the name has a number: `cuda`, not `cuda:1`.

    Raises:
        ValueError: if PyTorch knows no such device, or it is not there.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        device = "cpu" if accelerator is None else accelerator.type
    if accelerator is not None and str(device) == accelerator.type:
        device = f"{device}:{int(os.environ.get('LOCAL_RANK', '0')) % torch.accelerator.device_count()}"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device is {str(device)!r}, which is not there: {reason}") from error
    return found


def preferred_half_dtype(device: torch.device) -> torch.dtype:
    """The 16-bit type that a device computes well in: float16, which keeps more digits, or on a CPU bfloat16."""
    return torch.bfloat16 if device.type == "cpu" else torch.float16


def _palette(config: Any, num_classes: int) -> list[Color]:
    """The colours that the config brings, or the default ones; background has its own."""
    given = getattr(config, "palette", None)
    if given is None:
        return [_BACKGROUND_COLOR, *default_palette(1)] if config.num_labels == 1 else default_palette(num_classes)
    lists = isinstance(given, list | tuple) and all(isinstance(color, list | tuple) for color in given)
    colors = [tuple(color) for color in given] if lists else []
    fits = all(len(color) == 3 and all(type(each) is int and 0 <= each <= 255 for each in color) for color in colors)
    if not fits or len(colors) not in (config.num_labels, num_classes):
        raise ValueError(
            f"the config's palette is {given!s:.60}, but it must list (red, green, blue) of 0 to 255 for each of "
            f"{num_classes} classes"
        )
    return colors if len(colors) == num_classes else [_BACKGROUND_COLOR, *colors]


def told(error: BaseException, name: str) -> str:
    """What an error says, with the picture's name before it if it does not begin so."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return reason if reason.startswith(name) else f"{name}: {reason}"


def _shapes(prepared: Prepared) -> tuple[torch.Size, ...]:
    return tuple(view.shape for view in prepared.views)


__all__ = ["Prediction", "Predictions", "Prepared", "SegFormerPredictor", "find_device", "preferred_half_dtype", "told"]
