"""Writers of batch inference: their protocol, how one is found, and what they share.

A writer decides which images a process has to predict, so that a job is resumed without repeating finished work, and
writes atomically: a file is complete or absent. Writers of other packages are found through the entry points
`hf_segformer.writers`, by the name of the kind. Axes: K classes, H W sides of the image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..data.sources import InputItem
from ..visualization import Color
from .pipeline import Prepared
from .predictor import Prediction, SegFormerPredictor
from .volumes import black_and_white

ENTRY_POINTS = "hf_segformer.writers"
# This package's own, known without installed metadata.
_OWN_WRITERS = {
    "png": "hf_segformer.inference.png_writer:PngWriter",
    "parquet": "hf_segformer.inference.parquet_writer:ParquetWriter",
    "map": "hf_segformer.geo.maps:MapWriter",
    "video": "hf_segformer.video.writer:VideoWriter",
}


@dataclass(frozen=True)
class Outputs:
    """Outputs of batch inference.

    Args:
        kind: `"png"`, a file for each image; `"parquet"`, shards of many; or the kind of an installed writer.
        overlay: also write overlays of the classes on the images.
        legend: `"right"` or `"below"` adds a legend to overlays.
        clear: names of classes that overlays leave clear, such as `background`.
        probabilities: `"uint8"` or `"float16"` also writes the probabilities of all classes.
        options: options of an installed writer, which JSON can hold.
        masks_as: `"palette"`, an image with the classes as values and their colours as a palette; `"values"`, the
            classes as grey values; or `"255"`, 255 for the second of two classes and 0 elsewhere.
        keep_identity: copy from volumes what identifies a person, which is left out otherwise.

    Raises:
        ValueError: if a value is not one of these, or does not go with the others.
    """

    kind: str = "png"
    overlay: bool = False
    legend: str | None = None
    clear: tuple[str, ...] = ()
    probabilities: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    masks_as: str = "palette"
    keep_identity: bool = False

    def __post_init__(self):
        known = {
            "kind": writer_kinds(),
            "legend": (None, "right", "below"),
            "probabilities": (None, "uint8", "float16"),
            "masks_as": ("palette", "values", "255"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, values))}")
        if self.kind == "parquet" and (self.overlay or self.probabilities):
            raise ValueError("kind is 'parquet'; expected 'png' for overlays and probabilities")
        if self.options and self.kind in ("png", "parquet"):
            raise ValueError(f"options are {dict(self.options)}; expected none for the kind {self.kind!r}")
        for name in ("legend", "clear"):
            if getattr(self, name) and not self.overlay:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected an overlay to apply it to: set overlay")


class Totals(NamedTuple):
    """Sum of a finished job.

    Attributes:
        num_images: images with a prediction.
        pixels: number of pixels of each class.
        failed: name and error of each image without one.
    """

    num_images: int
    pixels: dict[str, int]
    failed: list[dict[str, str]]


class Writer(Protocol):
    """Destination of one process's share of a job.

    A writer may also have `takes_videos`, True, and `write_video(item, open_video, progress)`, of which `open_video`
    opens the reader of a video.

    `write`, `write_raster` and `fail` are called once for each item that `pending` returns: in the order of the items
    where `num_threads` is 1, else in any order and from several threads.

    Attributes:
        num_threads: threads that may write at once.
        takes_rasters: True if `write_raster` is implemented.
        takes_volumes: True if `write_volume` is implemented.
        settings: further settings that results depend on; see `predict_batch`.
        identity: digests of the weights and of the whole run, set before anything is written.
        num_written: items with results from this process.
    """

    num_threads: int
    takes_rasters: bool
    takes_volumes: bool
    settings: dict[str, Any]
    identity: dict[str, str]
    num_written: int

    def pending(self, rank: int, num_processes: int) -> tuple[int, list[InputItem]]:
        """Number of items of a process, and those of them that are not finished, in order."""

    def write(self, item: InputItem, prepared: Prepared, prediction: Prediction) -> None:
        """Write the results of an image."""

    def write_raster(self, item: InputItem, segment: Callable[..., Mapping[str, Any]]) -> None:
        """Write the results of a raster.

        Args:
            item: the raster.
            segment: takes a path, writes the segmentation map there and returns its `height`, `width` and `pixels` by
                class; its keyword `output` is that of `segment_raster`.
        """

    def write_volume(self, item: InputItem, segment: Callable[[Callable[[str], Path]], Mapping[str, Any]]) -> None:
        """Write the results of a volume.

        Args:
            item: the volume.
            segment: takes a function from an ending to a path, writes the mask there and returns what
                `volumes.segment_volume` does.
        """

    def fail(self, item: InputItem, message: str) -> None:
        """Record why an item has no results."""

    def close(self) -> None:
        """Discard what is incomplete; called when the process is done or stopped."""

    def finish(self, failed: list[dict[str, str]]) -> Totals:
        """Sum up the results of all processes; called in one process, when all are done.

        Args:
            failed: failures of the writers of all processes, as their `failed` lists them.
        """

    @property
    def failed(self) -> list[dict[str, str]]:
        """Failures that are not in files, with `name` and `error`."""


class WriterArguments(NamedTuple):
    """Arguments of every writer.

    Attributes:
        out: output folder.
        predictor: predictor, for its names, colours and processor.
        outputs: requested outputs.
        items: all items of the job, in order.
        origin_of: returns the source of an item, by which it differs from every other one.
        num_processes: processes that share the job.
        shard_size: most images in a shard; None leaves it to the writer.
    """

    out: Path
    predictor: SegFormerPredictor
    outputs: Outputs
    items: Sequence[InputItem]
    origin_of: Callable[[InputItem], str]
    num_processes: int
    shard_size: int | None = None


def writer_kinds() -> tuple[str, ...]:
    """Kinds of `Outputs`, with those of installed packages."""
    return tuple(_installed())


def open_writer(arguments: WriterArguments, rank: int = 0) -> Writer:
    """The writer of a kind, for one process of a job."""
    module, _, name = _installed()[arguments.outputs.kind].partition(":")
    return getattr(import_module(module), name)(arguments, rank)


def _installed() -> dict[str, str]:
    """Module and class of every writer, by kind; those of other packages come last and replace none."""
    others = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    return _OWN_WRITERS | others | _OWN_WRITERS


def segmentation_to_png(segmentation: np.ndarray, palette: Sequence[Color], masks_as: str = "palette") -> Image.Image:
    """Image whose pixel values are the classes (H, W): with a palette, or 16-bit grey for more than 255 classes.

    The palette has all 256 values: Pillow stores fewer bits for a shorter one, and 255 must survive.

    Args:
        segmentation: classes.
        palette: one (red, green, blue) for each class.
        masks_as: see `Outputs`; without a palette the values are grey.
    """
    if masks_as == "255":
        return Image.fromarray(black_and_white(segmentation))
    if segmentation.dtype.itemsize > 2 or segmentation.max(initial=0) > 65535:
        raise ValueError(f"the segmentation map is {segmentation.dtype}; expected at most 65,535 classes in a PNG")
    if len(palette) > 255:
        return Image.fromarray(segmentation.astype(np.uint16))
    image = Image.fromarray(segmentation.astype(np.uint8))
    if masks_as == "values":
        return image
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[: len(palette)] = palette
    image.putpalette(colors.tobytes())
    return image


def check_masks(masks_as: str, names: Sequence[str]) -> None:
    """Refuse masks in black and white for a model of other than two classes.

    Raises:
        ValueError: names the remedy.
    """
    if masks_as == "255" and len(names) != 2:
        raise ValueError(f"masks_as is '255' for a model of {len(names)} classes; expected two: choose 'values'")


def count_pixels(segmentation: np.ndarray, num_classes: int) -> list[int]:
    """Number of pixels of each class."""
    return np.bincount(segmentation[segmentation < num_classes], minlength=num_classes).tolist()


def shares(pixels: Mapping[str, int]) -> dict[str, float]:
    """Share of each class of all the pixels counted."""
    total = max(1, sum(pixels.values()))
    return {name: round(count / total, 6) for name, count in pixels.items()}


def quantize_probabilities(probabilities: np.ndarray, kind: str | None) -> np.ndarray:
    """Probabilities as float16, or as uint8 of 0 to 255."""
    return np.rint(255 * probabilities).astype(np.uint8) if kind == "uint8" else probabilities.astype(np.float16)


__all__ = [
    "Outputs",
    "Totals",
    "Writer",
    "WriterArguments",
    "check_masks",
    "count_pixels",
    "open_writer",
    "quantize_probabilities",
    "segmentation_to_png",
    "shares",
    "writer_kinds",
]
