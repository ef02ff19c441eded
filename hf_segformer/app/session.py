"""What the page of `segformer app` shows and hands out, worked out without a browser.

A picture goes through the network once. What the page then lets one change (classes, opacity) is drawn from the label
map that is kept; shown is a smaller copy where the picture is large, handed out are files of its own size.

Axes: H W the picture's sides.
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
from ..inference.predictor import SegFormerPredictor
from ..inference.writers import counted, segmentation_to_png
from ..visualization import Color, overlay, shown

# Of the picture as the network sees it: a strip one pixel wide is scaled until its short side fits the processor.
MAX_PIXELS = 4096 * 4096
_SHOWN_SIDE = 1280
_HIDDEN = -1
_TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True, eq=False)
class Result:
    """A picture with its label map, and how long it took.

    A page keeps one for each visitor, so the label map of the picture's own size is kept as the file that is handed
    out, a hundredth of it.

    Attributes:
        stem: the upload's name without its ending, for the names of files.
        size: (H, W) of the picture.
        label_file: a PNG file whose values are classes, colours those of the page; 16-bit grey for more than 256.
        shown: the picture, at most 1280 pixels a side.
        shown_labels: the labels of its pixels.
        pixels: of each class that occurs, by class, the most frequent first.
        seconds_preparing: to read the picture and resize it.
        seconds_predicting: in the network, and to make the label map of its logits.
    """

    stem: str
    size: tuple[int, int]
    label_file: bytes
    shown: Image.Image
    shown_labels: np.ndarray
    pixels: dict[int, int]
    seconds_preparing: float
    seconds_predicting: float

    @property
    def labels(self) -> np.ndarray:
        """(H, W) classes."""
        return np.asarray(Image.open(BytesIO(self.label_file)))


def predict_upload(predictor: SegFormerPredictor, path: str | Path) -> Result:
    """Read a picture and label it.

    Raises:
        ValueError: if it can not be read, does not fit the model or is too large; the message names the file alone,
            not the folder that a server keeps it in.
        OSError: likewise, if it is cut short.
    """
    path = Path(path)
    try:
        started = time.perf_counter()
        prepared = predictor.prepare(path)
        height, width = prepared.views[0].shape[-2:]
        if height * width > MAX_PIXELS:
            raise ValueError(
                f"{path.name} would be {height}x{width} (height x width) for the network, more than the "
                f"{MAX_PIXELS:,} pixels that this page takes: cut it into pieces, or use segformer predict"
            )
        ready = time.perf_counter()
        [prediction] = predictor.predict([prepared])
        done = time.perf_counter()
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split()).replace(str(path), path.name)
        raise type(error)(message) from error
    picture = _reduced(shown(prepared.picture))
    counts = counted(prediction.labels, len(predictor.names))
    frequent = sorted((index for index, count in enumerate(counts) if count), key=lambda index: -counts[index])
    label_file = BytesIO()
    segmentation_to_png(prediction.labels, predictor.palette).save(label_file, "PNG")
    return Result(
        stem=path.stem,
        size=prepared.size,
        label_file=label_file.getvalue(),
        shown=picture,
        shown_labels=_nearest(prediction.labels, picture.height, picture.width),
        pixels={index: counts[index] for index in frequent},
        seconds_preparing=ready - started,
        seconds_predicting=done - ready,
    )


def draw(result: Result, chosen: Collection[int], palette: Sequence[Color], opacity: float) -> Image.Image:
    """The picture with the chosen classes laid over it.

    Args:
        result: of `predict_upload`.
        chosen: classes to show.
        palette: one colour a class.
        opacity: 0 shows the picture alone, 1 the colours alone.
    """
    labels = np.where(np.isin(result.shown_labels, list(chosen)), result.shown_labels.astype(np.int64), _HIDDEN)
    return overlay(result.shown, labels, palette, alpha=opacity)


def write_overlay(
    result: Result, chosen: Collection[int], palette: Sequence[Color], opacity: float, folder: Path
) -> Path:
    """`<name>_overlay.jpg`: what `draw` gives, with the borders of the classes kept sharp."""
    path = folder / f"{result.stem}_overlay.jpg"
    draw(result, chosen, palette, opacity).save(path, quality=92, subsampling=0)
    return path


def write_labels(result: Result, folder: Path) -> Path:
    """`<name>_labels.png`, the label map's file."""
    path = folder / f"{result.stem}_labels.png"
    path.write_bytes(result.label_file)
    return path


def write_mask(result: Result, chosen: Collection[int], folder: Path) -> Path:
    """`<name>_mask.png`: white where one of the chosen classes is, black elsewhere."""
    path = folder / f"{result.stem}_mask.png"
    Image.fromarray(np.isin(result.labels, list(chosen)).astype(np.uint8) * 255).save(path)
    return path


def timing(result: Result, device: torch.device) -> str:
    """How long it took, in a line, and of what.

    Example:
        >>> import numpy as np, torch
        >>> from PIL import Image
        >>> from hf_segformer.app.session import Result, timing
        >>> labels, picture = np.zeros((60, 90), np.uint8), Image.new("RGB", (90, 60))
        >>> timing(Result("a", (60, 90), b"", picture, labels, {0: 5400}, 0.0117, 1.234), torch.device("cpu"))
        '90 × 60 pixels · prepared in 12 ms · labelled in 1.23 s on cpu'
    """
    height, width = result.size
    prepared, labelled = (_duration(each) for each in (result.seconds_preparing, result.seconds_predicting))
    return f"{width} {_TIMES} {height} pixels · prepared in {prepared} · labelled in {labelled} on {device.type}"


def summary(predictor: SegFormerPredictor) -> str:
    """What the model is, in a line: size, classes, parameters, what the network sees, number type and device."""
    config, model = predictor.model.config, predictor.model
    shapes = {name: (shape["hidden_sizes"], shape["depths"]) for name, shape in VARIANTS.items()}
    own = (list(config.hidden_sizes), list(config.depths))
    variant = next((f" {name.upper()}" for name, shape in shapes.items() if shape == own), "")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    parts = [f"SegFormer{variant}", f"{len(predictor.names)} classes", f"{parameters:,} parameters"]
    return " · ".join([*parts, _input_size(predictor.processor), f"{dtype} on {model.device.type}"])


def _reduced(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGB")
    picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    return picture


def _nearest(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The label map at another size, without classes that are not there."""
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(int)
    return labels[rows[:, None], columns]


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _input_size(processor) -> str:
    if not processor.do_resize:
        return "pictures at their own size"
    sides = processor.size
    if "shortest_edge" in sides:
        return f"shorter side {sides['shortest_edge']} pixels"
    kept = "within " if processor.keep_ratio else ""
    return f"{kept}{sides['width']} {_TIMES} {sides['height']} pixels"


__all__ = [
    "MAX_PIXELS",
    "Result",
    "draw",
    "predict_upload",
    "summary",
    "timing",
    "write_labels",
    "write_mask",
    "write_overlay",
]
