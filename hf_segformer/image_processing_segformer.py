"""From pictures and label maps to tensors, and from logits back to label maps.

The defaults are those of Transformers' own SegFormer processor (its PIL backend) and give the same pixels: squash to
512x512, scale by 1/255, normalise by ImageNet's mean and standard deviation. `keep_ratio` and `size_divisor` prepare
images as the paper evaluated (section 4.1). A three-channel processor reads pictures of any mode; with another number
of means, bands are measurements and are taken as they are.

Axes: B images, C bands, H height, W width, K classes. Sizes are (height, width).
"""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from .configuration_segformer import closest
from .image_io_segformer import check_area, flatten, read_image, read_mask
from .upsampling_segformer import upsample, upsample_argmax

logger = logging.get_logger(__name__)

# The label of pixels that do not count, in ADE20K's convention and in Transformers' losses.
IGNORE_INDEX = 255

_SIZE_KEYS = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"})
_FLAGS = ("do_resize", "keep_ratio", "do_rescale", "do_normalize", "do_reduce_labels")

# What Transformers writes into a processor's file beside its keywords.
_SERVICE_KEYS = {
    "auto_map",
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
    "video_processor_type",
}
# Where and how `from_pretrained` loads, as Transformers and its Auto classes pass it on.
_LOADING_KEYS = {
    "_commit_hash",
    "_from_auto",
    "backend",
    "cache_dir",
    "code_revision",
    "force_download",
    "image_processor_filename",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
    "use_fast",
}
# Transformers' keywords for what is not done here, with the values that do not ask for it.
_NOT_OFFERED: dict[str, tuple] = {
    "do_center_crop": (None, False),
    "do_pad": (None, False),
    "data_format": (None, "channels_first"),
    "default_to_square": (None, True),
    "input_data_format": (None,),
    "return_tensors": (None,),
}


class SegFormerImageProcessorKwargs(TypedDict, total=False):
    """The keywords of `SegFormerImageProcessor`, which each call may override."""

    do_resize: bool
    size: int | Sequence[int] | Mapping[str, int]
    resample: int
    keep_ratio: bool
    size_divisor: int | None
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Sequence[float]
    image_std: Sequence[float]
    do_reduce_labels: bool


def _is_unit(pixels: Image.Image | np.ndarray) -> bool:
    """Whether these are the floats of a picture in [0, 1]."""
    if isinstance(pixels, Image.Image) or pixels.dtype.kind != "f" or len(pixels) != 3:
        return False
    return bool(pixels.min() >= 0 and pixels.max() <= 1)


def _resize(pixels: Image.Image | np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """A PIL image or (C, h, w) array -> (C, height, width), by PIL's filter, each band for itself."""
    if isinstance(pixels, Image.Image):
        return _bands(pixels.resize((width, height), resample))
    if _is_unit(pixels):
        # Through bytes and back, as Transformers does.
        as_bytes = (pixels * np.float64(255)).astype(np.float32).astype(np.uint8)
        return (_resize(as_bytes, height, width, resample) * (1 / 255)).astype(np.float32)
    bands = (Image.fromarray(band if band.dtype == np.uint8 else band.astype(np.float32)) for band in pixels)
    return np.stack([np.asarray(band.resize((width, height), resample)) for band in bands])


def _bands(pixels: Image.Image | np.ndarray) -> np.ndarray:
    """A PIL image or (C, H, W) array -> (C, H, W), a view."""
    if isinstance(pixels, np.ndarray):
        return pixels
    array = np.asarray(pixels)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _nearest(length: int, target: int) -> np.ndarray:
    """Which of `length` pixels in a line PIL's nearest-neighbour filter takes for each of `target`."""
    line = Image.fromarray(np.arange(length, dtype=np.int32)[None])
    return np.asarray(line.resize((target, 1), Image.Resampling.NEAREST))[0]


def _label_map(logits: torch.Tensor, size: Sequence[int] | None, threshold: float | None) -> torch.Tensor:
    """Logits (K, h, w) of one image -> labels (H, W)."""
    logits = logits[None].float()
    size = logits.shape[-2:] if size is None else size
    if threshold is None:
        return upsample_argmax(logits, size)[0]
    if logits.shape[1] == 1:
        return (upsample(logits, size)[0, 0].sigmoid() > threshold).long()
    labels, probabilities = upsample_argmax(logits, size, with_probability=True)
    return labels.masked_fill(probabilities < threshold, IGNORE_INDEX)[0]


def _is_whole(value: Any) -> bool:
    """Whether this is a whole number above 0, of Python's type or NumPy's."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _parse_size(size: Any) -> dict[str, int]:
    """An int, (height, width) or a dict -> a dict with one of the known sets of keys."""
    if isinstance(size, Integral):
        sides = {"height": size, "width": size}
    elif isinstance(size, list | tuple) and len(size) == 2:
        sides = {"height": size[0], "width": size[1]}
    else:
        sides = dict(size) if isinstance(size, Mapping | SizeDict) else {}
    if set(sides) not in _SIZE_KEYS or not all(_is_whole(side) for side in sides.values()):
        raise ValueError(
            f"size is {size!r}, but it must be an int, (height, width) or a dict with height and width, "
            "shortest_edge, or shortest_edge and longest_edge; all whole numbers above 0"
        )
    return {name: int(side) for name, side in sides.items()}


def _parse_channels(values: Any, name: str) -> list[float]:
    """One number a channel."""
    listed = isinstance(values, list | tuple | np.ndarray) and len(values) > 0
    if not listed or not all(isinstance(value, Real) and math.isfinite(value) for value in values):
        raise ValueError(f"{name} is {values!r}, but it must list one finite number for each channel")
    return [float(value) for value in values]


def _parse_target_sizes(target_sizes: Any, num_images: int) -> list[list[int]]:
    """Pairs of whole numbers, one an image."""
    message = (
        f"target_sizes is {target_sizes}, but {num_images} images need {num_images} pairs (height, width) of whole "
        "numbers above 0"
    )
    try:
        table = np.asarray(target_sizes)
    except ValueError as error:  # rows of different lengths
        raise ValueError(message) from error
    if table.shape != (num_images, 2) or table.dtype.kind not in "iu" or table.min() < 1:
        raise ValueError(message)
    return table.tolist()


class SegFormerImageProcessor(BaseImageProcessor):
    """Prepares images and segmentation maps for SegFormer, and reads label maps from its logits.

    The defaults repeat Transformers' `SegformerImageProcessorPil` pixel for pixel, and its files are read as they
    are. The number of channels is the number of means.

    - **Pictures** (three means): PIL images of any mode, grey, palette, RGB, CMYK, 16-bit; alpha is dropped. Arrays
      and tensors are (H, W), or have one or three bands. 8 bits are taken as they are, bool is black and white,
      uint16 is divided by 257 whatever its values, floats of whole numbers in 0 to 255 are bytes, floats within
      [0, 1] are resized as bytes and stay in [0, 1] (give `do_rescale=False` with those). PIL's mode I, as which
      Pillow opens 16-bit PGM files, is uint16 where a value exceeds 255, else bytes.
    - **Bands** (any other number N of means): (H, W, N) or (N, H, W), each band resized for itself, in its own units.
    - **Layout** of an array: the axis, first or last, that has as many entries as there are means; the first if both
      have. `input_data_format` ("channels_first" or "channels_last") settles it.
    - EXIF orientation is applied to images and to maps, each by its own tag. What is passed in is never changed.

    Args:
        do_resize: whether to resize.
        size: `{"height": h, "width": w}` squashes to that size; an int is both sides. `{"shortest_edge": s}` makes
            the shorter side s, the longer follows; with `"longest_edge": l` that is at most l, the shorter follows.
        resample: PIL's filter for images; maps always take the nearest label.
        keep_ratio: height and width become a frame into which the image is scaled, up or down. Sides are then rounded
            to the nearest whole number, which is the rule of the paper's code; without it `shortest_edge` follows
            Transformers' rule, which drops the fraction.
        size_divisor: both sides are then rounded up to multiples of it. There is one resize in all.
        do_rescale: whether to multiply by `rescale_factor`.
        rescale_factor: that factor.
        do_normalize: whether to subtract `image_mean` and divide by `image_std`.
        image_mean: one mean a channel, after rescaling.
        image_std: one standard deviation a channel.
        do_reduce_labels: whether label 0 becomes 255, which is ignored, and all others go down by one (ADE20K).
        **others: Transformers' further keywords, as far as they ask for nothing that is not done here.

    Raises:
        ValueError: if a keyword is unknown or its value impossible; the message names both.

    Example:
        The paper's evaluation on ADE20K: the shorter side 512, sides in multiples of 32.

        >>> import numpy as np
        >>> from hf_segformer import SegFormerImageProcessor
        >>> processor = SegFormerImageProcessor(
        ...     size={"shortest_edge": 512, "longest_edge": 2048}, keep_ratio=True, size_divisor=32
        ... )
        >>> image = np.zeros((300, 400, 3), dtype=np.uint8)
        >>> tuple(processor(image, return_tensors="pt").pixel_values.shape)
        (1, 3, 512, 704)
    """

    valid_kwargs = SegFormerImageProcessorKwargs
    _auto_class: str | None = "AutoImageProcessor"

    def __init__(
        self,
        do_resize: bool = True,
        size: int | Sequence[int] | Mapping[str, int] = 512,
        resample: int = Image.Resampling.BILINEAR,
        keep_ratio: bool = False,
        size_divisor: int | None = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: Sequence[float] = tuple(IMAGENET_DEFAULT_MEAN),
        image_std: Sequence[float] = tuple(IMAGENET_DEFAULT_STD),
        do_reduce_labels: bool = False,
        **others: Any,
    ):
        super().__init__()
        self._refuse(others)
        self.do_resize = do_resize
        self.size: Any = size
        self.resample = resample
        self.keep_ratio = keep_ratio
        self.size_divisor = size_divisor
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean: Any = image_mean
        self.image_std: Any = image_std
        self.do_reduce_labels = do_reduce_labels
        self._settle()

    @classmethod
    def _refuse(cls, others: dict[str, Any]) -> None:
        own = {*cls.valid_kwargs.__annotations__, "segmentation_maps", "return_tensors", "input_data_format"}
        for keyword, value in others.items():
            if keyword not in ImagesKwargs.__annotations__ and keyword not in _SERVICE_KEYS:
                raise ValueError(f"unknown keyword {keyword!r} of SegFormerImageProcessor: {closest(keyword, own)}")
            if value not in _NOT_OFFERED.get(keyword, (value,)):
                raise ValueError(f"{keyword} is {value!r}, which SegFormerImageProcessor does not offer")

    def _settle(self) -> None:
        """Bring every keyword to its own form, or raise."""
        self.size = _parse_size(self.size)
        self.image_mean = _parse_channels(self.image_mean, "image_mean")
        self.image_std = _parse_channels(self.image_std, "image_std")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, but it must be True or False")
        if self.resample not in list(Image.Resampling):
            filters = ", ".join(f"{filter.value} ({filter.name})" for filter in Image.Resampling)
            raise ValueError(f"resample is {self.resample!r}, but PIL's filters are {filters}")
        if self.size_divisor is not None:
            if not _is_whole(self.size_divisor):
                raise ValueError(
                    f"size_divisor is {self.size_divisor!r}, but it must be a whole number above 0, or None"
                )
            self.size_divisor = int(self.size_divisor)
        if not (isinstance(self.rescale_factor, int | float) and 0 < self.rescale_factor < float("inf")):
            raise ValueError(f"rescale_factor is {self.rescale_factor!r}, but it must be a number above 0")
        if len(self.image_mean) != len(self.image_std):
            raise ValueError(
                f"image_mean has {len(self.image_mean)} entries and image_std {len(self.image_std)}, but both need one "
                "for each channel"
            )
        if not min(self.image_std) > 0:
            raise ValueError(f"image_std is {self.image_std}, but every entry must be above 0")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """Read the processor of a folder, a file or a Hub repository.

        Keywords of the class override what the file says. A misspelt one is an error, unless `return_unused_kwargs`
        asks for it back.

        Raises:
            ValueError: if a keyword is unknown or its value impossible.
            OSError: if there is no such file.
        """
        # A pipeline gives its image processor the model's keywords, too.
        if "_from_pipeline" not in kwargs and not kwargs.get("return_unused_kwargs"):
            known = {*cls.valid_kwargs.__annotations__, *_LOADING_KEYS, "return_unused_kwargs"}
            cls._refuse({keyword: value for keyword, value in kwargs.items() if keyword not in known})
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{pretrained_model_name_or_path}: {error}") from error

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any):
        """Read a preprocessor_config.json of any age.

        What the file holds beside this class's keywords is passed over, as everywhere in Transformers. null is False,
        or the default of a keyword that is no flag. `reduce_labels`, as the first files spell `do_reduce_labels`,
        counts where the new name is absent.
        """
        values = {"do_reduce_labels": image_processor_dict.get("reduce_labels"), **image_processor_dict}
        for name in _FLAGS:
            if name in values:
                values[name] = values[name] or False
        own = cls.valid_kwargs.__annotations__
        return super().from_dict({k: v for k, v in values.items() if k in own and v is not None}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The keywords, as written to preprocessor_config.json."""
        # A pipeline looks for a video processor, too. Unless the file names one it guesses at one in the shipped code
        # and asks the user whether to run that, plugin or not (transformers 5.17 to 5.23).
        return {**super().to_dict(), "video_processor_type": "none"}

    def preprocess(
        self,
        images: Any,
        segmentation_maps: Any = None,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        **overrides: Unpack[SegFormerImageProcessorKwargs],
    ) -> BatchFeature:
        """Images, and their segmentation maps, -> what the model takes.

        Args:
            images: a path, PIL image, array or tensor, or a list of them, or a (B, ., ., .) array.
            segmentation_maps: one a image, of its size: paths, PIL images of modes 1, L, P, I or I;16, or (H, W)
                arrays or tensors of any integer type.
            return_tensors: `"pt"` or `"np"` to stack the batch; None gives lists of arrays.
            input_data_format: `"channels_first"` or `"channels_last"`, where an array's shape does not tell.
            **overrides: any keyword of the class, for this call. None leaves a keyword as it is, but switches
                `size_divisor` off.

        Returns:
            `pixel_values`, float32 (B, C, H, W), and with maps `labels`, int64 (B, H, W).

        Raises:
            ValueError: if an input can not be read as said above; the message names which one and why.
            OSError: if a file can not be opened.
        """
        own = self.valid_kwargs.__annotations__
        self._refuse({keyword: value for keyword, value in overrides.items() if keyword not in own})
        processor = copy.copy(self)
        for keyword, value in overrides.items():
            if keyword in own and (value is not None or keyword == "size_divisor"):
                setattr(processor, keyword, value)
        processor._settle()
        return processor._prepare(images, segmentation_maps, return_tensors, input_data_format)

    def _prepare(
        self, images: Any, segmentation_maps: Any, return_tensors: str | None, input_data_format: str | None
    ) -> BatchFeature:
        """What `preprocess` promises, by the processor's own keywords."""
        images = flatten(images)
        maps = self._pair(images, segmentation_maps)
        data: dict[str, list[np.ndarray]] = {"pixel_values": []}
        if segmentation_maps is not None:
            data["labels"] = []
        for index, (image, mask) in enumerate(zip(images, maps, strict=True)):
            pixels = read_image(image, len(self.image_mean), input_data_format, f"image {index}")
            old_size = (pixels.height, pixels.width) if isinstance(pixels, Image.Image) else pixels.shape[1:]
            new_size = self._target_size(*old_size)
            check_area(*new_size, f"image {index}, resized,")
            if segmentation_maps is not None:
                data["labels"].append(self._process_mask(mask, old_size, new_size, index))
            data["pixel_values"].append(self._process_image(pixels, new_size))
        sizes = sorted({pixels.shape[1:] for pixels in data["pixel_values"]})
        if return_tensors is not None and len(sizes) > 1:
            raise ValueError(
                f"the images end in different sizes, {', '.join(f'{height}x{width}' for height, width in sizes)}, and "
                "can not be stacked: resize to one height and width (do_resize, no keep_ratio), or give one at a time"
            )
        return BatchFeature(data, tensor_type=return_tensors)

    def _pair(self, images: list, segmentation_maps: Any) -> list:
        """One map, or None, for each image."""
        if not images:
            raise ValueError("no images are given")
        if segmentation_maps is None:
            return [None] * len(images)
        if getattr(segmentation_maps, "ndim", 0) == 3 and len(segmentation_maps) == len(images):
            return list(segmentation_maps)
        maps = flatten(segmentation_maps)
        if len(maps) != len(images):
            raise ValueError(f"{len(maps)} segmentation maps are given for {len(images)} images")
        return maps

    def _target_size(self, height: int, width: int) -> tuple[int, int]:
        """The size after resizing; with `keep_ratio` as in the paper's code (`Resize`, then `AlignResize`)."""
        if not self.do_resize:
            return height, width
        sides = self.size
        if self.keep_ratio:
            if "height" in sides:
                scale = min(sides["height"] / height, sides["width"] / width)
            else:
                longest = sides.get("longest_edge", float("inf"))
                scale = min(sides["shortest_edge"] / min(height, width), longest / max(height, width))
            target = (int(height * scale + 0.5), int(width * scale + 0.5))
        elif "height" in sides:
            target = (sides["height"], sides["width"])
        else:
            target = get_size_with_aspect_ratio((height, width), sides["shortest_edge"], sides.get("longest_edge"))
        divisor = self.size_divisor or 1
        new_height, new_width = (-(-max(side, 1) // divisor) * divisor for side in target)
        return new_height, new_width

    def _process_image(self, pixels: Image.Image | np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """A PIL image or (C, h, w) array -> float32 (C, H, W)."""
        if self.do_rescale and _is_unit(pixels):
            logger.warning_once(
                "A float picture within [0, 1] is multiplied by rescale_factor once more, as in Transformers: "
                "give do_rescale=False for pictures that are scaled already."
            )
        bands = _resize(pixels, *size, self.resample) if self.do_resize else _bands(pixels)
        result = np.empty(bands.shape, dtype=np.float32)
        for channel, band in enumerate(bands):
            if band.dtype == np.uint8:
                # A byte has 256 values: scale those and look the pixels up.
                table = self._scale(np.arange(256), channel)
                np.take(table, band, out=result[channel], mode="clip")
            else:
                result[channel] = self._scale(band, channel)
        return result

    def _scale(self, band: np.ndarray, channel: int) -> np.ndarray:
        """Rescale and normalise; in Transformers' order of rounding, so that pixels are equal bit for bit."""
        if self.do_rescale:
            band = band * np.float64(self.rescale_factor)
        band = band.astype(np.float32)
        if self.do_normalize:
            band = (band - np.float32(self.image_mean[channel])) / np.float32(self.image_std[channel])
        return band

    def _process_mask(self, source: Any, old_size: Sequence[int], new_size: Sequence[int], index: int) -> np.ndarray:
        """A label map of the image's size -> int64 (H, W)."""
        mask = read_mask(source, f"segmentation map {index}")
        if mask.shape != tuple(old_size):
            raise ValueError(
                f"segmentation map {index} is {mask.shape[0]}x{mask.shape[1]} (height x width), but image {index} is "
                f"{old_size[0]}x{old_size[1]}"
            )
        if self.do_resize:
            rows, columns = (_nearest(old, new) for old, new in zip(old_size, new_size, strict=True))
            mask = mask[rows[:, None], columns]
        mask = mask.astype(np.int64)
        if self.do_reduce_labels:
            mask = np.where((mask == 0) | (mask == IGNORE_INDEX), IGNORE_INDEX, mask - 1)
        return mask

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Any = None, threshold: float | None = None
    ) -> list[torch.Tensor]:
        """Logits -> one label map for each image.

        Logits are resized (bilinear, align_corners=False) image by image, before the best class is taken, so that
        borders are as sharp as the target. One class is binary: label 1 where the sigmoid is above `threshold`.

        Args:
            outputs: the model's output, or a mapping, with `logits` (B, K, h, w).
            target_sizes: (height, width) of each image, as a list or a (B, 2) tensor; None keeps the logits' size.
            threshold: probability from 0 to 1. For one class the default is 0.5; for more, pixels whose best class
                has a lower softmax probability become 255.

        Returns:
            B tensors, int64 (H, W).

        Raises:
            ValueError: if `outputs` has no logits, `target_sizes` does not fit them or `threshold` is no probability.
        """
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 4:
            raise ValueError(
                f"outputs is a {type(outputs).__name__}, but it must be the model's output or a mapping with `logits`, "
                "a tensor (B, K, h, w)"
            )
        if logits.shape[1] == 1 and isinstance(outputs, Mapping) and "target_size" in outputs:  # only a pipeline's
            raise ValueError(
                "the model has 1 label, whose segmentation map holds 0 (background) and 1; a pipeline needs a name for "
                "both in id2label: use SegFormerPredictor, or this method on the model's own output"
            )
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}, but it must lie in [0, 1]")
        sizes = [None] * len(logits) if target_sizes is None else _parse_target_sizes(target_sizes, len(logits))
        return [_label_map(image, size, threshold) for image, size in zip(logits, sizes, strict=True)]


__all__ = ["SegFormerImageProcessor"]
