"""Predictor for images in memory and on disk: it reads ahead, batches images of one prepared size, keeps their order.

Axes: C channels, K classes, H W sides of the upright image.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from ..config import InferenceOptions
from ..data.reader_protocol import has_data
from ..data.readers import read_whole_image
from ..image_io_segformer import DECODE_ERRORS, read_image
from ..image_processing_segformer import SegFormerImageProcessor
from ..visualization import BACKGROUND_COLOR, Color, default_palette, palette_for
from .engines import TORCH
from .ensemble import load_model_or_ensemble
from .pipeline import Prepared, ReadAhead, segment_batch
from .segmenter import Segmenter


@dataclass(frozen=True, eq=False)
class Prediction:
    """Prediction of a model for one image.

    Attributes:
        segmentation: (H, W) classes, of the smallest unsigned type that holds them.
        probabilities: float32 (K, H, W), or None if they were not requested.
    """

    segmentation: np.ndarray
    probabilities: np.ndarray | None = None


class SegFormerPredictor:
    """Segmentation maps of images, each at its own size.

    Args:
        model: a segmentation model; it stays on its device and is not changed.
        processor: prepares images.
        options: test-time augmentation, sliding window, dtype and batch size; see `InferenceOptions`.
        engine: what computes the network: `torch`, `compiled`, `onnxruntime`, `openvino`, or that of another package.
            It is compared with PyTorch when it is loaded; results differ by rounding.

    Attributes:
        names: names of the classes; a model with one label has two, background and its own.
        palette: one (red, green, blue) for each name: the `palette` of the model's configuration, else
            `visualization.palette_for` the names.
        segmenter: the `Segmenter` that computes.

    Raises:
        ValueError: if the model cannot compute in the dtype or by the engine, or the palette of its configuration
            does not fit its classes.

    Examples:
        >>> from PIL import Image
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
        >>> from hf_segformer import SegFormerPredictor
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig(depths=[1, 1, 1, 1], num_labels=5)).eval()
        >>> predictor = SegFormerPredictor(model, SegFormerImageProcessor(size=64))
        >>> image = Image.new("RGB", (90, 60))
        >>> predictor(image).segmentation.shape
        (60, 90)
        >>> [prediction.probabilities.shape for prediction in predictor([image, image], with_probabilities=True)]
        [(5, 60, 90), (5, 60, 90)]
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: SegFormerImageProcessor,
        options: InferenceOptions | None = None,
        *,
        engine: str = TORCH,
    ):
        self.segmenter = Segmenter(model, processor, options, engine)
        self.model, self.processor = self.segmenter.model, processor
        self.names, self.options = self.segmenter.names, self.segmenter.options
        self.palette = palette_of(model.config, self.names)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device | None = None,
        options: InferenceOptions | None = None,
        engine: str = TORCH,
    ) -> "SegFormerPredictor":
        """Load the predictor of a checkpoint.

        Args:
            source: a folder, a file of weights or a Hub repository, of any code base that `convert_checkpoint` reads;
                or those of an ensemble, whose members' probabilities are averaged.
            device: PyTorch device; by default the accelerator if there is one, else the CPU.
            options: see the class; without `dtype` the network computes in float32.
            engine: see the class.

        Raises:
            OSError: if there is no such path or repository, or a file cannot be opened.
            ValueError: if it holds no segmentation model or is damaged, or the device does not exist.
        """
        model, processor = load_model_or_ensemble(source)
        dtype = getattr(torch, options.dtype) if options is not None and options.dtype else None
        return cls(model.to(find_device(device), dtype), processor, options, engine=engine)

    def __call__(self, images: Any, *, with_probabilities: bool = False) -> "Prediction | Iterator[Prediction]":
        """Predict one image, or many.

        Args:
            images: a path (of an image, or of an array in a .npy file), Pillow image, (H, W), (H, W, C) or (C, H, W)
                array or tensor; or an iterable of such, which may be endless.
            with_probabilities: also return the probabilities. They take K times the memory of an image in float32.

        Returns:
            One `Prediction`; for an iterable an iterator that predicts on demand, in order, and reads some images
            ahead. An image that cannot be read raises its error in its turn, and `next` continues with the one after
            it.

        Raises:
            ValueError: if an image does not fit the model; the message names its file or its place in the iterable.
            OSError: if a file cannot be opened or is truncated.
        """
        is_array = isinstance(images, np.ndarray | Tensor)
        if isinstance(images, str | os.PathLike | Image.Image) or (is_array and images.ndim < 4):
            return self.predict([self.prepare(images)], with_probabilities=with_probabilities)[0]
        if not isinstance(images, Iterable):
            raise ValueError(f"images is a {type(images).__name__}; expected an image or an iterable of images")
        tasks = (partial(self.prepare, image, f"image {index}", keep_image=False) for index, image in enumerate(images))
        return ReadAhead(
            tasks,
            lambda batch: self.predict(batch, with_probabilities=with_probabilities),
            self.segmenter.batch_size,
        )

    def prepare(self, image: Any, name: str = "the image", *, keep_image: bool = True) -> Prepared:
        """Read an image and prepare it for the network; it needs no accelerator and may run in any thread.

        Args:
            image: see `__call__`.
            name: name in error messages, for an image that is no file.
            keep_image: keep the image as it was read; the images that are read ahead may be large.

        Raises:
            ValueError: if it cannot be decoded, or does not have the model's channels.
            OSError: if a file cannot be opened or is truncated.
        """
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else name
        try:
            num_channels, any_range = len(self.processor.image_mean), self.processor.value_range is not None
            if isinstance(image, str | os.PathLike | BytesIO):
                pixels = read_whole_image(image, num_channels, name, any_range=any_range)
            else:
                pixels = read_image(image, num_channels, None, name, any_range)
            data_format = "channels_first" if isinstance(pixels, np.ndarray) else None
            views = self.segmenter.preprocess(pixels, data_format)
        except OSError as error:
            raise OSError(format_error(error, name)) from error
        except DECODE_ERRORS as error:
            raise ValueError(format_error(error, name)) from error
        size = pixels.shape[-2:] if isinstance(pixels, np.ndarray) else (pixels.height, pixels.width)
        return Prepared(views, size, name, pixels if keep_image else None, valid=has_data(pixels))

    def predict(self, batch: list[Prepared], *, with_probabilities: bool = False) -> list[Prediction]:
        """Predict images of one prepared size at once.

        Raises:
            ValueError: if their prepared sizes differ or are too small for the network, or if one image does not fit
                into memory.
            MemoryError: if several images at once do not fit into memory.
        """
        dtype = np.min_scalar_type(len(self.names))  # of the classes, and of one value for no data
        predictions = []
        segmented = segment_batch(self.segmenter, batch, with_probabilities=with_probabilities)
        for prepared, (classes, probabilities) in zip(batch, segmented, strict=True):
            segmentation = classes.cpu().numpy().astype(dtype)
            if prepared.valid is not None:
                segmentation[~prepared.valid] = np.iinfo(dtype).max
            scores = None if probabilities is None else probabilities.float().cpu().numpy()
            predictions.append(Prediction(segmentation, scores))
        return predictions


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name, or by default the accelerator if there is one, else the CPU.

    Several processes on one machine share its accelerators, unless the name has a number: `cuda`, not `cuda:1`.

    Raises:
        ValueError: if PyTorch knows no such device, or it does not exist.
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
        raise ValueError(f"device is {str(device)!r}, which does not exist here: {reason}") from error
    return found


def format_error(error: BaseException, name: str) -> str:
    """Message of an error, with the name of the image in front unless it begins with that already."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return reason if reason.startswith((name, f"cannot read {name}")) else f"{name}: {reason}"


def palette_of(config: Any, names: tuple[str, ...]) -> list[Color]:
    """Colours of the configuration, or default ones; the background of a binary model has a colour of its own.

    Raises:
        ValueError: if the palette of the configuration does not fit the names.
    """
    given = getattr(config, "palette", None)
    if given is None:
        return [BACKGROUND_COLOR, *default_palette(1)] if config.num_labels == 1 else palette_for(names)
    lists = isinstance(given, list | tuple) and all(isinstance(color, list | tuple) for color in given)
    colors = [tuple(color) for color in given] if lists else []
    fits = all(len(color) == 3 and all(type(each) is int and 0 <= each <= 255 for each in color) for color in colors)
    if not fits or len(colors) not in (config.num_labels, len(names)):
        raise ValueError(
            f"the palette of the model's configuration is {given!s:.60}; expected (red, green, blue) of 0 to 255 for "
            f"each of {len(names)} classes"
        )
    return colors if len(colors) == len(names) else [BACKGROUND_COLOR, *colors]


__all__ = ["Prediction", "SegFormerPredictor", "find_device", "format_error", "palette_of"]
