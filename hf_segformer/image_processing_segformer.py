"""Image processor: images and masks to tensors, logits to segmentation maps.

The defaults are those of Transformers' own SegFormer processor (its PIL backend) and give the same pixels: squash to
512x512, scale by 1/255, normalize by ImageNet's mean and standard deviation. `keep_ratio` and `size_divisor` prepare
images as the paper evaluated (section 4.1). A processor with three means reads images of any mode as RGB; with another
number of means, bands are measurements in units of their own.

Axes: B images, C bands, H height, W width, K classes. Sizes are (height, width).
"""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from .configuration_segformer import closest
from .image_io_segformer import check_area, flatten, image_name, read_image, read_mask
from .upsampling_segformer import upsample, upsample_argmax

try:  # since transformers 5.22
    from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
except ImportError:
    SemanticSegmentationPostProcessorOutput = BatchFeature

logger = logging.get_logger(__name__)

_SIZE_KEYS = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"})
_FLAGS = ("do_resize", "keep_ratio", "do_rescale", "do_normalize", "do_reduce_labels", "do_convert_rgb")
# Prepared images have at most so many pixels, or as many as the image itself: a strip of 349x1 pixels, resized to a
# shorter side of 512, would take gigabytes.
_MAX_ENLARGED = 1 << 25
_NARROW = 0.25  # share of 16 bits below which the range that an image uses is worth a warning
_AUTO_MAP = {"AutoImageProcessor": "image_processing_segformer.SegFormerImageProcessor"}

# Keys that Transformers writes into a processor's file beside its keywords.
_SERVICE_KEYS = {
    "auto_map",
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
    "video_processor_type",
}
# Keywords of `from_pretrained` that say where and how to load, as Transformers and its Auto classes pass them on.
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
# Transformers' keywords for steps that this processor does not have, with the values that do not ask for them.
_NOT_OFFERED: dict[str, tuple] = {
    "do_center_crop": (None, False),
    "do_pad": (None, False),
    "data_format": (None, "channels_first"),
    "default_to_square": (None, True),
    "input_data_format": (None,),
    "return_tensors": (None,),
}
_INSTEAD = {"default_to_square": "give the shorter side as size={'shortest_edge': 512}"}


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
    image_mean: float | Sequence[float]
    image_std: float | Sequence[float]
    do_reduce_labels: bool
    reduce_labels: bool
    do_convert_rgb: bool
    value_range: Sequence[float] | Mapping[str, Sequence[float] | float] | None
    ignore_index: int
    binary_threshold: float


class DecodedImage(NamedTuple):
    """A decoded image whose value range has been applied.

    Attributes:
        pixels: a PIL image of mode RGB or L, or an array (C, H, W).
        is_unit: holds floats of a colour image within [0, 1].
        is_byte_scaled: holds values on the scale of 0 to 255.
        has_no_data: where no band holds data, bool (H, W); None where there is data everywhere.
    """

    pixels: Image.Image | np.ndarray
    is_unit: bool
    is_byte_scaled: bool
    has_no_data: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return _size_of(self.pixels)

    @property
    def bands(self) -> np.ndarray:
        """The pixels as an array (C, H, W)."""
        return _bands(self.pixels)


def _is_unit(pixels: Image.Image | np.ndarray) -> bool:
    """Return True for the floats of a colour image within [0, 1]."""
    if isinstance(pixels, Image.Image) or pixels.dtype.kind != "f" or len(pixels) != 3:
        return False
    return bool(pixels.min() >= 0 and pixels.max() <= 1)


def _resize(pixels: Image.Image | np.ndarray, height: int, width: int, resample: int, is_unit: bool) -> np.ndarray:
    """A PIL image or (C, h, w) array -> (C, height, width), by PIL's filter, band by band."""
    if isinstance(pixels, Image.Image):
        return _bands(pixels.resize((width, height), resample))
    if is_unit:
        # Through bytes and back, as Transformers does.
        as_bytes = (pixels * np.float64(255)).astype(np.float32).astype(np.uint8)
        return (_resize(as_bytes, height, width, resample, False) * (1 / 255)).astype(np.float32)
    bands = (Image.fromarray(band if band.dtype == np.uint8 else band.astype(np.float32)) for band in pixels)
    return np.stack([np.asarray(band.resize((width, height), resample)) for band in bands])


def _bands(pixels: Image.Image | np.ndarray) -> np.ndarray:
    """A PIL image or (C, H, W) array -> (C, H, W), a view."""
    if isinstance(pixels, np.ndarray):
        return pixels
    array = np.asarray(pixels)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _stretch(bands: np.ndarray, value_range: Any) -> np.ndarray:
    """(C, H, W) -> float32 from 0 to 255, clipped, masked where the bands are."""
    values = bands.astype(np.float32)
    if isinstance(value_range, Mapping) and "percentiles" in value_range:
        # One range for the channels of a colour image keeps its colours; bands have units of their own.
        parts = [values] if len(values) == 3 else list(values)
        limits = [_percentiles(part, value_range["percentiles"]) for part in parts]
        low, high = (np.array(each, np.float32)[:, None, None] for each in zip(*limits, strict=True))
    else:
        low, high = (np.array(each, np.float32) for each in range_limits(value_range) or (0, 1))
    # In this order multiples of 257 become whole numbers exactly.
    return ((values - low) * 255 / np.maximum(high - low, np.finfo(np.float32).tiny)).clip(0, 255)


def _percentiles(values: np.ndarray, percentiles: Sequence[float]) -> tuple[float, float]:
    """Return two percentiles of the pixels that hold data; (0, 1) if there are none."""
    known = values.compressed() if isinstance(values, np.ma.MaskedArray) else values
    if not known.size:
        return 0.0, 1.0
    low, high = np.percentile(known, percentiles)
    return float(low), float(high)


def range_limits(value_range: Any) -> tuple[float, float] | None:
    """Return the lowest and highest value of a fixed range or a window, None for others."""
    if isinstance(value_range, Mapping):
        if "center" not in value_range:
            return None
        center, width = value_range["center"], value_range["width"]
        return center - width / 2, center + width / 2
    return None if value_range is None else (value_range[0], value_range[1])


def _parse_range(value: Any) -> Any:
    """Bring a `value_range` to the form that preprocessor_config.json holds, or raise."""

    def numbers(values: Any, count: int) -> list[float]:
        listed = list(values) if isinstance(values, list | tuple | np.ndarray) else []
        if len(listed) != count or not all(isinstance(each, Real) and math.isfinite(each) for each in listed):
            raise error
        return [each if isinstance(each, int) else float(each) for each in listed]

    error = ValueError(
        f"value_range is {value!r}; expected [low, high], {{'percentiles': [low, high]}} or "
        "{'center': number, 'width': number}, with low below high and a width above 0"
    )
    if value is None:
        return None
    if not isinstance(value, Mapping):
        low, high = numbers(value, 2)
        result: Any = [low, high]
    elif set(value) == {"percentiles"}:
        low, high = numbers(value["percentiles"], 2)
        result = {"percentiles": [low, high]}
        if not 0 <= low < high <= 100:
            raise error
    elif set(value) == {"center", "width"}:
        center, width = numbers([value["center"], value["width"]], 2)
        low, high = 0, width
        result = {"center": center, "width": width}
    else:
        raise error
    if not low < high:
        raise error
    return result


def _nearest(length: int, target: int) -> np.ndarray:
    """Return which of `length` pixels in a line PIL's nearest-neighbour filter takes for each of `target`."""
    line = Image.fromarray(np.arange(length, dtype=np.int32)[None])
    return np.asarray(line.resize((target, 1), Image.Resampling.NEAREST))[0]


def _is_whole(value: Any) -> bool:
    """Return True for an integer above 0, of Python's type or NumPy's."""
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
            f"size is {size!r}; expected an int, (height, width) or a dict with height and width, "
            "shortest_edge, or shortest_edge and longest_edge; all integers above 0"
        )
    return {name: int(side) for name, side in sides.items()}


def _parse_channels(values: Any, name: str) -> list[float]:
    """Return a list with one number for each channel, or raise; one number stands for three equal ones."""
    if isinstance(values, Real) and not isinstance(values, bool):
        values = [values] * 3
    listed = isinstance(values, list | tuple | np.ndarray) and len(values) > 0
    if not listed or not all(isinstance(value, Real) and math.isfinite(value) for value in values):
        raise ValueError(f"{name} is {values!r}; expected a list with one finite number for each channel")
    return [float(value) for value in values]


def _parse_target_sizes(target_sizes: Any, num_images: int) -> list[list[int]]:
    """Return a pair of integers for each image, or raise."""
    message = (
        f"target_sizes is {target_sizes}; expected {num_images} pairs (height, width) of integers above 0, one an image"
    )
    try:
        table = np.asarray(target_sizes)
    except ValueError as error:  # rows of different lengths
        raise ValueError(message) from error
    if table.shape != (num_images, 2) or table.dtype.kind not in "iu" or table.min() < 1:
        raise ValueError(message)
    return table.tolist()


class SegFormerImageProcessor(BaseImageProcessor):
    """Image processor of SegFormer: images and masks to tensors, logits to segmentation maps.

    The defaults repeat Transformers' `SegformerImageProcessorPil` pixel for pixel, and its files load unchanged. The
    number of channels is the number of means.

    - **Colour images** (three means): PIL images of any mode, grey, palette, RGB, CMYK, 16-bit; alpha is dropped.
      Arrays and tensors are (H, W), or have one or three bands. uint8 is used directly, bool is black and white,
      uint16 is scaled from 0..65535 to 0..255 in floating point, floats of whole numbers in 0 to 255 are bytes, floats
      within [0, 1] are resized as bytes and stay in [0, 1] (give `do_rescale=False` with those). PIL's mode I, as
      which Pillow opens 16-bit PGM files, is uint16 where a value exceeds 255, else bytes.
      A PIL image of a file of 16-bit colours keeps all bits if it is not decoded yet; decoded, it has 8.
    - **Bands** (any other number N of means): (H, W, N) or (N, H, W), resized band by band, in units of their own.
    - **Value range**: with `value_range` images of any type are scaled from that range to 0..255, in floating point.
    - **No data**: masked pixels of a `numpy.ma.MaskedArray` take the mean of their band; undeclared NaN is refused.
    - **Layout** of an array: the axis, first or last, that has as many entries as there are means; the first if both
      have. `input_data_format` ("channels_first" or "channels_last") settles it.
    - EXIF orientation is applied to images and to masks, each by its own tag. Inputs are never modified.

    Args:
        do_resize: resize images and masks.
        size: `{"height": h, "width": w}` squashes to that size; an int is both sides. `{"shortest_edge": s}` makes
            the shorter side s, the longer follows; with `"longest_edge": l` that is at most l, the shorter follows.
        resample: PIL's filter for images; masks always take the nearest label.
        keep_ratio: height and width become a frame into which the image is scaled, up or down. Sides are then rounded
            to the nearest whole number, which is the rule of the paper's code; without it `shortest_edge` follows
            Transformers' rule, which drops the fraction.
        size_divisor: both sides are then rounded up to multiples of it. The image is resized once.
        do_rescale: multiply by `rescale_factor`.
        rescale_factor: that factor.
        do_normalize: subtract `image_mean` and divide by `image_std`.
        image_mean: one mean a channel, after rescaling; a number is that of all three.
        image_std: one standard deviation a channel; a number is that of all three.
        do_reduce_labels: label 0 becomes `ignore_index`, and all others go down by one (ADE20K); `reduce_labels`, as
            older versions of Transformers spell it, is the same.
        do_convert_rgb: with three means, turn grey, palette, CMYK and alpha images into RGB; False refuses them.
        value_range: values that become 0 and 255, clipped beyond: `[low, high]`, `{"percentiles": [low, high]}` of each
            image (of all channels of a colour image, of each band of others), or `{"center": c, "width": w}`, the
            window of medical images; None takes uint8 and colour images by their type, other bands in their units.
        ignore_index: label of ignored pixels; where it is a class of the logits, -100.
        binary_threshold: probability above which a pixel is foreground, for a model with one label; above 0, below 1.
        **others: Transformers' further keywords, as far as they do not ask for steps that this processor lacks.

    Raises:
        ValueError: if a keyword is unknown or its value impossible; the message names both.

    Examples:
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
        image_mean: float | Sequence[float] = tuple(IMAGENET_DEFAULT_MEAN),
        image_std: float | Sequence[float] = tuple(IMAGENET_DEFAULT_STD),
        do_reduce_labels: bool = False,
        do_convert_rgb: bool = True,
        value_range: Sequence[float] | Mapping[str, Any] | None = None,
        ignore_index: int = 255,
        binary_threshold: float = 0.5,
        reduce_labels: bool | None = None,
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
        self.do_reduce_labels = do_reduce_labels if reduce_labels is None else reduce_labels
        self.do_convert_rgb = do_convert_rgb
        self.value_range: Any = value_range
        self.ignore_index = ignore_index
        self.binary_threshold = binary_threshold
        self._settle()

    @property
    def binary_logit(self) -> float:
        """Logit of `binary_threshold`: a binary model's pixels above it are foreground."""
        return math.log(self.binary_threshold / (1 - self.binary_threshold))

    @property
    def reduce_labels(self) -> bool:
        """`do_reduce_labels`, by the name that older versions of Transformers use."""
        return self.do_reduce_labels

    @reduce_labels.setter
    def reduce_labels(self, value: bool) -> None:
        self.do_reduce_labels = value

    @classmethod
    def _refuse(cls, others: dict[str, Any]) -> None:
        own = {*cls.valid_kwargs.__annotations__, "segmentation_maps", "return_tensors", "input_data_format"}
        for keyword, value in others.items():
            if keyword not in ImagesKwargs.__annotations__ and keyword not in _SERVICE_KEYS:
                raise ValueError(f"unknown keyword {keyword!r} of SegFormerImageProcessor: {closest(keyword, own)}")
            if value not in _NOT_OFFERED.get(keyword, (value,)):
                remedy = _INSTEAD.get(keyword, "leave it out")
                raise ValueError(f"{keyword} is {value!r}; SegFormerImageProcessor has no such step: {remedy}")

    def _settle(self) -> None:
        """Bring every keyword to its canonical form, or raise."""
        self.size = _parse_size(self.size)
        self.image_mean = _parse_channels(self.image_mean, "image_mean")
        self.image_std = _parse_channels(self.image_std, "image_std")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected True or False")
        if self.resample not in list(Image.Resampling):
            filters = ", ".join(f"{filter.value} ({filter.name})" for filter in Image.Resampling)
            raise ValueError(f"resample is {self.resample!r}; expected one of PIL's filters, {filters}")
        self.resample = int(self.resample)
        self.value_range = _parse_range(self.value_range)
        if not isinstance(self.ignore_index, Integral) or isinstance(self.ignore_index, bool):
            raise ValueError(f"ignore_index is {self.ignore_index!r}; expected an integer")
        self.ignore_index = int(self.ignore_index)
        if not (isinstance(self.binary_threshold, Real) and 0 < self.binary_threshold < 1):
            raise ValueError(f"binary_threshold is {self.binary_threshold!r}; expected a number above 0 and below 1")
        self.binary_threshold = float(self.binary_threshold)
        if self.size_divisor is not None:
            if not _is_whole(self.size_divisor):
                raise ValueError(f"size_divisor is {self.size_divisor!r}; expected an integer above 0, or None")
            self.size_divisor = int(self.size_divisor)
        if not (isinstance(self.rescale_factor, int | float) and 0 < self.rescale_factor < float("inf")):
            raise ValueError(f"rescale_factor is {self.rescale_factor!r}; expected a number above 0")
        if len(self.image_mean) != len(self.image_std):
            raise ValueError(
                f"image_mean has {len(self.image_mean)} entries and image_std {len(self.image_std)}; expected one for "
                "each channel in both"
            )
        if not min(self.image_std) > 0:
            raise ValueError(f"image_std is {self.image_std}; expected values above 0")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """Load the processor of a folder, a file or a Hub repository.

        Keywords of the class override the file. A misspelt one is an error, unless `return_unused_kwargs` asks for it
        back.

        Raises:
            ValueError: if a keyword is unknown or its value impossible.
            OSError: if there is no such file.
        """
        # A pipeline passes the model's keywords to its image processor, too.
        if "_from_pipeline" not in kwargs and not kwargs.get("return_unused_kwargs"):
            known = {*cls.valid_kwargs.__annotations__, *_LOADING_KEYS, "return_unused_kwargs"}
            cls._refuse({keyword: value for keyword, value in kwargs.items() if keyword not in known})
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{pretrained_model_name_or_path}: {error}") from error

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any):
        """Build a processor from the content of a preprocessor_config.json of any age.

        Keys that are not keywords of this class are skipped, as everywhere in Transformers. null is False, or the
        default of a keyword that is no flag; 0 and 1 are flags, too. `reduce_labels`, as the first files spell
        `do_reduce_labels`, counts where the new name is absent. With `default_to_square` false a number as size is the
        shorter side.
        """
        values = {"do_reduce_labels": image_processor_dict.get("reduce_labels"), **image_processor_dict}
        values.pop("reduce_labels", None)
        for name in _FLAGS:
            if name in values and values[name] in ((0, 1) if name == "do_convert_rgb" else (None, 0, 1)):
                values[name] = bool(values[name])
        if values.get("default_to_square") is False and isinstance(values.get("size"), int):
            values["size"] = {"shortest_edge": values["size"]}
        own = cls.valid_kwargs.__annotations__
        return super().from_dict({k: v for k, v in values.items() if k in own and v is not None}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the keywords, as written to preprocessor_config.json."""
        # A pipeline looks for a video processor, too. Unless the file names one it guesses at one in the shipped code
        # and asks the user for permission to run it, plugin or not (transformers 5.17 to 5.23).
        values = {**super().to_dict(), "video_processor_type": "none"}
        if self._auto_class is not None:
            values["auto_map"] = {**_AUTO_MAP, **values.get("auto_map", {})}
        return values

    def preprocess(
        self,
        images: Any,
        segmentation_maps: Any = None,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        **overrides: Unpack[SegFormerImageProcessorKwargs],
    ) -> BatchFeature:
        """Prepare images, and their masks, for the model.

        Args:
            images: a path, PIL image, array or tensor, or a list of them, or a (B, ., ., .) array.
            segmentation_maps: masks, one an image and of its size: paths, PIL images of modes 1, L, P, I or I;16, or
                (H, W) arrays or tensors of any integer type.
            return_tensors: `"pt"` or `"np"` to stack the batch; None gives lists of arrays.
            input_data_format: `"channels_first"` or `"channels_last"`, where an array's shape does not tell.
            **overrides: any keyword of the class, for this call. None leaves a keyword as it is, but switches
                `size_divisor` off.

        Returns:
            `pixel_values`, float32 (B, C, H, W), and with masks `labels`, int64 (B, H, W), `ignore_index` where a mask
            or every band of an image is masked.

        Raises:
            ValueError: if an input does not fit; the message names which one and why.
            OSError: if a file cannot be opened.
        """
        own = self.valid_kwargs.__annotations__
        self._refuse({keyword: value for keyword, value in overrides.items() if keyword not in own})
        processor = copy.copy(self)
        for keyword, value in overrides.items():
            if keyword in ("image_mean", "image_std") and isinstance(value, Real) and not isinstance(value, bool):
                value = [value] * len(self.image_mean)
            if keyword in own and (value is not None or keyword == "size_divisor"):
                setattr(processor, keyword, value)
        processor._settle()
        return processor._prepare(images, segmentation_maps, return_tensors, input_data_format)

    def _prepare(
        self, images: Any, segmentation_maps: Any, return_tensors: str | None, input_data_format: str | None
    ) -> BatchFeature:
        """Run `preprocess` by the processor's own keywords."""
        images = flatten(images)
        masks = self._pair(images, segmentation_maps)
        data: dict[str, list[np.ndarray]] = {"pixel_values": []}
        if segmentation_maps is not None:
            data["labels"] = []
        for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
            decoded = self.decode(image, f"image {index}", input_data_format)
            new_size = self._target_size(*decoded.size)
            if segmentation_maps is not None:
                data["labels"].append(self._process_mask(mask, decoded, new_size, index))
            data["pixel_values"].append(self._process_image(decoded, new_size))
        sizes = sorted({pixels.shape[1:] for pixels in data["pixel_values"]})
        if return_tensors is not None and len(sizes) > 1:
            raise ValueError(
                f"the images have different sizes after resizing, "
                f"{', '.join(f'{height}x{width}' for height, width in sizes)}, and cannot be stacked: resize to one "
                "height and width (do_resize, no keep_ratio), or give one at a time (batch_size=1)"
            )
        return BatchFeature(data, tensor_type=return_tensors)

    def decode(
        self,
        source: Any,
        name: str = "the image",
        data_format: str | None = None,
        *,
        is_resized: bool = True,
        **options: Any,
    ) -> DecodedImage:
        """Decode one image and apply the value range; pixels without data take the mean of their band.

        Args:
            source: see `preprocess`.
            name: name of the image in error messages.
            data_format: `"channels_first"` or `"channels_last"`, where an array's shape does not tell.
            is_resized: the image will be resized, so that its prepared size is checked, too.
            **options: of `image_io_segformer.open_image_file`.

        Returns:
            the decoded image.

        Raises:
            ValueError: if it does not fit the processor, or its prepared size would take gigabytes.
            OSError: if a file cannot be opened.
        """
        name = image_name(source, name)

        def check_size(height: int, width: int) -> None:
            size = self._target_size(height, width) if is_resized else (height, width)
            check_area(*size, f"{name}, resized,")
            if size[0] * size[1] > max(_MAX_ENLARGED, height * width):
                raise ValueError(
                    f"{name} is {height}x{width} (height x width) and would be resized to {size[0]}x{size[1]}; "
                    f"expected at most {_MAX_ENLARGED} pixels: set size with a longest_edge, or crop the image"
                )

        pixels, is_unit, is_byte_scaled = self._read(source, name, data_format, {"check_size": check_size, **options})
        check_size(*_size_of(pixels))
        has_no_data = None
        if isinstance(pixels, np.ma.MaskedArray) and np.ma.is_masked(pixels):
            has_no_data = np.asarray(np.ma.getmaskarray(pixels).all(axis=0))
        return DecodedImage(self._fill(pixels), is_unit, is_byte_scaled, has_no_data)

    def _read(
        self, source: Any, name: str, data_format: str | None, options: dict[str, Any]
    ) -> tuple[Image.Image | np.ndarray, bool, bool]:
        """Read an image and apply the value range; see `DecodedImage`, but pixels without data stay masked."""
        num_channels, any_range = len(self.image_mean), self.value_range is not None
        pixels = read_image(source, num_channels, data_format, name, any_range, self.do_convert_rgb, **options)
        is_unit = _is_unit(pixels) and not any_range
        is_16_bit = num_channels == 3 and isinstance(pixels, np.ndarray) and pixels.dtype == np.uint16
        if is_16_bit and not any_range:
            _warn_of_narrow_range(_bands(pixels))
        if any_range or is_16_bit:
            pixels = _stretch(_bands(pixels), self.value_range if any_range else (0, 65535))
            return pixels, False, True
        return pixels, is_unit, isinstance(pixels, Image.Image) or pixels.dtype == np.uint8

    def apply_range(self, source: Any, name: str = "the image", data_format: str | None = None) -> np.ndarray:
        """Read one image and apply the value range.

        Args:
            source: see `preprocess`.
            name: name of the image in error messages.
            data_format: `"channels_first"` or `"channels_last"`, where an array's shape does not tell.

        Returns:
            (C, H, W), masked where it holds no data.
        """
        return _bands(self._read(source, name, data_format, {})[0])

    def used_range(self, source: Any) -> tuple[float, float, float, float] | None:
        """Measure which part of the value range an image uses, to find ranges that are far too wide.

        Args:
            source: see `preprocess`.

        Returns:
            lowest and highest value of the image, and those that become 0 and 255; None where all bytes are kept, the
            range follows the image (percentiles), bands are in units of their own, or the image holds no data.
        """
        num_channels = len(self.image_mean)
        pixels = _bands(read_image(source, num_channels, None, "the image", self.value_range is not None))
        limits = range_limits(self.value_range)
        if self.value_range is None and num_channels == 3 and pixels.dtype == np.uint16:
            limits = (0, 65535)
        known = pixels.compressed() if isinstance(pixels, np.ma.MaskedArray) else pixels
        if limits is None or not known.size:
            return None
        return float(known.min()), float(known.max()), float(limits[0]), float(limits[1])

    def _fill(self, pixels: Image.Image | np.ndarray) -> Image.Image | np.ndarray:
        """Give masked pixels the mean of their band, which is what crops are padded with in training."""
        if not isinstance(pixels, np.ma.MaskedArray):
            return pixels
        masked, filled = np.ma.getmaskarray(pixels), pixels.data.copy()
        for channel, band in enumerate(filled):
            value = self.image_mean[channel] if self.do_normalize else 0.0
            value = value / self.rescale_factor if self.do_rescale else value
            if band.dtype.kind in "iu":
                limits = np.iinfo(band.dtype)
                value = min(max(round(value), limits.min), limits.max)
            band[masked[channel]] = value
        return filled

    def _pair(self, images: list, segmentation_maps: Any) -> list:
        """Return one mask, or None, for each image."""
        if not images:
            raise ValueError("no images are given")
        if segmentation_maps is None:
            return [None] * len(images)
        if getattr(segmentation_maps, "ndim", 0) == 3 and len(segmentation_maps) == len(images):
            return list(segmentation_maps)
        masks = flatten(segmentation_maps)
        if len(masks) != len(images):
            raise ValueError(f"{len(masks)} masks are given for {len(images)} images; expected one an image")
        return masks

    def _target_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size after resizing; with `keep_ratio` as in the paper's code (`Resize`, then `AlignResize`)."""
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

    def _process_image(self, image: DecodedImage, size: tuple[int, int]) -> np.ndarray:
        """A decoded image of any size -> float32 (C, H, W)."""
        if self.do_rescale and image.is_unit:
            logger.warning_once(
                "A float image within [0, 1] is multiplied by rescale_factor once more, as in Transformers: "
                "give do_rescale=False for images that are scaled already."
            )
        return self.scale(_resize(image.pixels, *size, self.resample, image.is_unit) if self.do_resize else image.bands)

    def scale(self, bands: np.ndarray) -> np.ndarray:
        """Rescale and normalize decoded bands.

        Args:
            bands: (C, H, W), uint8 or floats, as `decode` gives them.

        Returns:
            float32 (C, H, W).
        """
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
        """Rescale and normalize in Transformers' order of rounding, so that pixels are bit-equal."""
        if self.do_rescale:
            band = band * np.float64(self.rescale_factor)
        band = band.astype(np.float32)
        if self.do_normalize:
            band = (band - np.float32(self.image_mean[channel])) / np.float32(self.image_std[channel])
        return band

    def _process_mask(self, source: Any, image: DecodedImage, new_size: Sequence[int], index: int) -> np.ndarray:
        """A mask of the image's size -> int64 (H, W), ignored where it or the image holds no data."""
        mask, old_size = read_mask(source, f"mask {index}"), image.size
        if mask.shape != tuple(old_size):
            raise ValueError(
                f"mask {index} is {mask.shape[0]}x{mask.shape[1]} (height x width); expected the size of image "
                f"{index}, {old_size[0]}x{old_size[1]}"
            )
        is_ignored = np.ma.getmaskarray(mask) if isinstance(mask, np.ma.MaskedArray) else None
        if image.has_no_data is not None:
            is_ignored = image.has_no_data if is_ignored is None else is_ignored | image.has_no_data
        mask = np.ma.getdata(mask)
        if self.do_resize:
            rows, columns = (_nearest(old, new) for old, new in zip(old_size, new_size, strict=True))
            mask = mask[rows[:, None], columns]
            is_ignored = None if is_ignored is None else is_ignored[rows[:, None], columns]
        mask = mask.astype(np.int64)
        if self.do_reduce_labels:
            mask = np.where((mask == 0) | (mask == self.ignore_index), self.ignore_index, mask - 1)
        return mask if is_ignored is None else np.where(is_ignored, self.ignore_index, mask)

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Any = None,
        threshold: float | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Any]:
        """Turn logits into one segmentation map for each image.

        Logits are resized (bilinear, align_corners=False) image by image, before the best class is taken, so that
        borders are as sharp as the target. One class is binary: label 1 where the sigmoid is above `threshold`.

        Args:
            outputs: the model's output, or a mapping, with `logits` (B, K, h, w).
            target_sizes: (height, width) of each image, upright by its EXIF orientation, as a list or a (B, 2) tensor;
                None keeps the logits' size.
            threshold: probability from 0 to 1. For one class the default is `binary_threshold`; for more, pixels whose
                best class has a lower softmax probability become `ignore_index`, or -100 where that is a class.
            return_segmentation_scores: return the resized logits beside each segmentation map, as Transformers does.

        Returns:
            B tensors, int64 (H, W); with `return_segmentation_scores` B mappings with `segmentation` and
            `segmentation_scores`, floats (K, H, W).

        Raises:
            ValueError: if `outputs` has no logits, `target_sizes` does not fit them or `threshold` is no probability.
        """
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 4:
            raise ValueError(
                f"outputs is a {type(outputs).__name__}; expected the model's output or a mapping with `logits`, a "
                "tensor (B, K, h, w)"
            )
        if logits.shape[1] == 1 and isinstance(outputs, Mapping) and "target_size" in outputs:  # only a pipeline's
            raise ValueError(
                "the model has 1 label, whose segmentation map holds 0 (background) and 1; a pipeline needs a name for "
                "both in id2label: use SegFormerPredictor, or this method on the model's own output"
            )
        if isinstance(threshold, bool | np.bool_):  # as in Transformers, whose third argument is another one
            raise ValueError(
                f"threshold is {threshold}; expected a probability from 0 to 1: give "
                f"return_segmentation_scores={threshold} by its name"
            )
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; expected a value in [0, 1]")
        if threshold is None and logits.shape[1] == 1 and self.binary_threshold != 0.5:
            threshold = self.binary_threshold
        sizes = [None] * len(logits) if target_sizes is None else _parse_target_sizes(target_sizes, len(logits))
        ignore_index = self.ignore_index
        if 0 <= ignore_index < max(logits.shape[1], 2):
            ignore_index = -100
        maps = [_segment(image, size, threshold, ignore_index) for image, size in zip(logits, sizes, strict=True)]
        if not return_segmentation_scores:
            return maps
        scores = [
            image if size is None else upsample(image[None].float(), size)[0]
            for image, size in zip(logits, sizes, strict=True)
        ]
        return [
            SemanticSegmentationPostProcessorOutput(data={"segmentation": segmentation, "segmentation_scores": score})
            for segmentation, score in zip(maps, scores, strict=True)
        ]


def _segment(
    logits: torch.Tensor, size: Sequence[int] | None, threshold: float | None, ignore_index: int
) -> torch.Tensor:
    """Logits (K, h, w) of one image -> labels (H, W)."""
    logits = logits[None].float()
    size = logits.shape[-2:] if size is None else size
    if threshold is None:
        return upsample_argmax(logits, size)[0]
    if logits.shape[1] == 1:
        return (upsample(logits, size)[0, 0].sigmoid() > threshold).long()
    labels, probabilities = upsample_argmax(logits, size, with_probability=True)
    return labels.masked_fill(probabilities < threshold, ignore_index)[0]


def _size_of(pixels: Image.Image | np.ndarray) -> tuple[int, int]:
    """Return height and width of a PIL image or an array (C, H, W)."""
    if isinstance(pixels, Image.Image):
        return pixels.height, pixels.width
    return pixels.shape[1], pixels.shape[2]


def _warn_of_narrow_range(pixels: np.ndarray) -> None:
    low, high = (float(each) for each in (pixels.min(), pixels.max()))
    if 0 < high - low < _NARROW * 65535:
        logger.warning_once(
            f"A uint16 image has values from {low:.0f} to {high:.0f}, {(high - low) / 65535:.1%} of the range 0 to "
            "65535 that is scaled to 0 to 255, so the network hardly sees differences: set value_range, for example "
            f"value_range=[{low:.0f}, {high:.0f}] (--value-range {low:.0f},{high:.0f}). Where values are bytes, give "
            'image.astype("uint8").'
        )


__all__ = ["DecodedImage", "SegFormerImageProcessor", "range_limits"]
