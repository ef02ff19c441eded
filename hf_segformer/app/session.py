"""Results that the page of `segformer app` displays and offers for download, independent of the browser.

An image goes through the network once. Classes and opacity are then changed on the segmentation map that is kept. A
large image is displayed by a smaller copy; downloads have its full size.

Axes: H W sides of the image.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..configuration_segformer import VARIANTS
from ..data.image_file import NUMPY_MAGIC
from ..data.reader_protocol import ImageSource
from ..data.readers import image_size
from ..image_io_segformer import DECODE_ERRORS
from ..inference.predictor import SegFormerPredictor
from ..inference.writers import count_pixels, segmentation_to_png
from ..visualization import Color, displayed_as_fed, overlay

# Of an upload, and of the image as the network sees it: a strip that is one pixel high is enlarged until its shorter
# side fits the processor. Both are checked before a pixel is decoded.
MAX_IMAGE_PIXELS, MAX_PIXELS = 8192 * 8192, 4096 * 4096
_SHOWN_SIDE = 1280
_TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True, eq=False)
class Result:
    """An image with its segmentation map, and the time that they took.

    The page keeps one for each visitor, so that the map of full size is kept as the file to download, a hundredth of
    it.

    Attributes:
        stem: name of the upload without its suffix, for the names of downloads.
        size: (H, W) of the image.
        mask_file: a PNG file whose values are classes, with the colours of the page; 16-bit grey for more than 255.
        shown: the displayed image, at most 1280 pixels a side.
        shown_segmentation: classes of its pixels.
        pixels: number of pixels of each class that occurs, by class, the most frequent first.
        seconds_preparing: time to read and resize the image.
        seconds_predicting: time of the network, and of the map of its logits.
    """

    stem: str
    size: tuple[int, int]
    mask_file: bytes
    shown: Image.Image
    shown_segmentation: np.ndarray
    pixels: dict[int, int]
    seconds_preparing: float
    seconds_predicting: float

    @property
    def segmentation(self) -> np.ndarray:
        """(H, W) classes."""
        return np.asarray(Image.open(BytesIO(self.mask_file), formats=("PNG",)))


def predict_upload(predictor: SegFormerPredictor, path: str | Path) -> Result:
    """Read an upload and predict its segmentation map.

    Raises:
        ValueError: if it cannot be read, does not fit the model or is too large; the message names the file alone, not
            the folder in which a server keeps it.
        OSError: if it is truncated; the message as above.
    """
    path = Path(path)
    try:
        started = time.perf_counter()
        _check_size(predictor, path)
        prepared = predictor.prepare(path)
        ready = time.perf_counter()
        [prediction] = predictor.predict([prepared])
        done = time.perf_counter()
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split()).replace(str(path), path.name)
        raise type(error)(message) from error
    image = _reduced(displayed_as_fed(prepared.image, predictor.processor))
    counts = count_pixels(prediction.segmentation, len(predictor.names))
    frequent = sorted((index for index, count in enumerate(counts) if count), key=lambda index: -counts[index])
    mask_file = BytesIO()
    segmentation_to_png(prediction.segmentation, predictor.palette).save(mask_file, "PNG")
    return Result(
        stem=path.stem,
        size=prepared.size,
        mask_file=mask_file.getvalue(),
        shown=image,
        shown_segmentation=_nearest(prediction.segmentation, image.height, image.width),
        pixels={index: counts[index] for index in frequent},
        seconds_preparing=ready - started,
        seconds_predicting=done - ready,
    )


def _check_size(predictor: SegFormerPredictor, path: Path) -> None:
    """Check the size of an upload, and the one it is prepared to, by its header: neither decodes nor resizes it.

    Raises:
        ValueError: if one of them is too large.
    """
    size = _size_in_header(path)
    if size is None:  # it is no image, and reading it says so
        return
    height, width = size
    if height * width > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{path.name} is {height}x{width} (height x width); expected at most {MAX_IMAGE_PIXELS:,} pixels: cut it "
            "into pieces, or use segformer predict"
        )
    prepared_sizes = predictor.segmenter.prepared_sizes
    # EXIF behind the pixels may turn the image.
    for new_height, new_width in (*prepared_sizes(height, width), *prepared_sizes(width, height)):
        if new_height * new_width > MAX_PIXELS:
            raise ValueError(
                f"{path.name} would be {new_height}x{new_width} (height x width) for the network; expected at most "
                f"{MAX_PIXELS:,} pixels on this page: cut it into pieces, or use segformer predict"
            )


def _size_in_header(path: Path) -> tuple[int, int] | None:
    """(H, W) of an upload by its content, without decoding it; None where it cannot be opened."""
    try:
        source = ImageSource(path)
        if not source.head.startswith(NUMPY_MAGIC):
            return image_size(source)
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    except (*DECODE_ERRORS, Warning) as error:
        if isinstance(error, ValueError) and isinstance(error.__cause__, Image.DecompressionBombError):
            raise
        return None
    axes = [axis for count in (3, 1) for axis in (0, 2) if len(shape) == 3 and shape[axis] == count]
    sides = [side for axis, side in enumerate(shape) if axis not in axes[:1]]
    return (sides[0], sides[1]) if len(sides) == 2 else None


def draw(result: Result, chosen: Collection[int], palette: Sequence[Color], opacity: float) -> Image.Image:
    """Blend the colours of the chosen classes into the displayed image.

    Args:
        result: from `predict_upload`.
        chosen: classes to display.
        palette: one colour for each class.
        opacity: 0 shows the image alone, 1 the colours alone.
    """
    hidden = set(range(len(palette))) - set(chosen)
    return overlay(result.shown, result.shown_segmentation, palette, alpha=opacity, clear=hidden)


def write_overlay(
    result: Result, chosen: Collection[int], palette: Sequence[Color], opacity: float, folder: Path
) -> Path:
    """Write the image of `draw` as `NAME_overlay.jpg`, with sharp borders between the classes."""
    path = folder / f"{result.stem}_overlay.jpg"
    draw(result, chosen, palette, opacity).save(path, quality=92, subsampling=0)
    return path


def write_mask(result: Result, folder: Path) -> Path:
    """Write the segmentation map as `NAME_mask.png`."""
    path = folder / f"{result.stem}_mask.png"
    path.write_bytes(result.mask_file)
    return path


def write_selection(result: Result, chosen: Collection[int], folder: Path) -> Path:
    """Write `NAME_selection.png`: white where one of the chosen classes is, black elsewhere."""
    path = folder / f"{result.stem}_selection.png"
    Image.fromarray(np.isin(result.segmentation, list(chosen)).astype(np.uint8) * 255).save(path)
    return path


def timing(result: Result, device: torch.device) -> str:
    """Size of the image and duration of the prediction, in a line.

    Examples:
        >>> import numpy as np, torch
        >>> from PIL import Image
        >>> from hf_segformer.app.session import Result, timing
        >>> segmentation, image = np.zeros((60, 90), np.uint8), Image.new("RGB", (90, 60))
        >>> timing(Result("a", (60, 90), b"", image, segmentation, {0: 5400}, 0.0117, 1.234), torch.device("cpu"))
        '90 × 60 pixels · prepared in 12 ms · predicted in 1.23 s on cpu'
    """
    height, width = result.size
    prepared, predicted = (_duration(each) for each in (result.seconds_preparing, result.seconds_predicting))
    return f"{width} {_TIMES} {height} pixels · prepared in {prepared} · predicted in {predicted} on {device.type}"


def summary(predictor: SegFormerPredictor) -> str:
    """Description of the model in a line: variant, classes, parameters, input size, dtype and device."""
    config, model = predictor.model.config, predictor.model
    shapes = {name: (shape["hidden_sizes"], shape["depths"]) for name, shape in VARIANTS.items()}
    own = (list(config.hidden_sizes), list(config.depths))
    variant = next((f" {name.upper()}" for name, shape in shapes.items() if shape == own), "")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    parts = [f"SegFormer{variant}", f"{len(predictor.names)} classes", f"{parameters:,} parameters"]
    return " · ".join([*parts, _input_size(predictor.processor), f"{dtype} on {model.device.type}"])


def _reduced(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    return image


def _nearest(segmentation: np.ndarray, height: int, width: int) -> np.ndarray:
    """The segmentation map at another size, without new classes."""
    rows = ((np.arange(height) + 0.5) * segmentation.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * segmentation.shape[1] / width).astype(int)
    return segmentation[rows[:, None], columns]


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _input_size(processor) -> str:
    if not processor.do_resize:
        return "images at their own size"
    sides = processor.size
    if "shortest_edge" in sides:
        return f"shorter side {sides['shortest_edge']} pixels"
    kept = "within " if processor.keep_ratio else ""
    return f"{kept}{sides['width']} {_TIMES} {sides['height']} pixels"


__all__ = [
    "MAX_IMAGE_PIXELS",
    "MAX_PIXELS",
    "Result",
    "draw",
    "predict_upload",
    "summary",
    "timing",
    "write_mask",
    "write_overlay",
    "write_selection",
]
