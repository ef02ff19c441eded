"""Labels images that do not fit into memory: file in, file out, window by window.

Nothing is resized: an image is labelled at its own resolution, so the processor's `do_resize` and `size` do not count,
and the model should have been trained on crops of that resolution. All else the processor does to a window is what it
does to a picture.

Axes: C bands, K classes, h w a window's sides.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from ..config import InferenceOptions
from ..data.readers import Tile, open_raster
from ..files import atomic_write
from ..geo.rasters import LabelFile, Raster
from ..image_processing_segformer import SegFormerImageProcessor, range_limits
from ..visualization import Color, default_palette
from .segmenter import class_names, distinct, inference_mode_of, is_out_of_memory
from .tiling import CELL, Tiling, label_bands


def predict_large_image(
    model: PreTrainedModel,
    processor: SegFormerImageProcessor,
    source: str | Path,
    destination: str | Path,
    *,
    tiling: Tiling | None = None,
    options: InferenceOptions | None = None,
    half: bool = False,
    batch_size: int = 1,
    bands: Sequence[int] | None = None,
    palette: Sequence[Color] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Label an image of any size in bounded memory.

    A GeoTIFF, or whatever else rasterio opens, becomes a GeoTIFF with the same reference, ground control points, tags
    and overviews; a plain TIFF becomes a plain TIFF. Both hold one band, uint8 (uint16 with more than 255 classes),
    in tiles, with a colour for every class. Where all bands hold the value for no data, or the image's mask or alpha
    says so, the label is 255 (65535). The file is there whole or not at all.

    Args:
        model: a segmentation model.
        processor: its processor, whose sizes do not count here.
        source: the image.
        destination: the file to write; one that is there is replaced in the end.
        tiling: how the image is cut into windows; by default 1024 pixels with 128 of overlap.
        options: of these `flip` and `scales`, for each window; its probabilities are averaged on the logits' grid.
        half: compute in half precision (autocast: bfloat16 on a CPU, float16 elsewhere).
        batch_size: windows to predict at once, for GPUs.
        bands: numbers from 1 on of the bands that the model takes, in its order; by default all.
        palette: one (red, green, blue) a class.
        progress: whether to show a bar.

    Returns:
        `source`, `destination`, `height`, `width`, `windows`, `tile`, `overlap`, `pixels` (a count for each class, by
        its name), `no_data` (count of pixels) and `seconds`.

    Raises:
        ValueError: if image and model do not fit, or an option is out of range; the message says what would be right.
        OSError: if a file can not be read or written.

    Example:
        ```python
        model, processor = load_segmentation("outputs/shapes_b0")
        predict_large_image(model, processor, "scene.tif", "labels.tif", tiling=Tiling(tile=512, overlap=128))
        ```
    """
    began, source, destination = time.perf_counter(), Path(source), Path(destination)
    tiling, options = tiling or Tiling(), options or InferenceOptions()
    _check_options(options, batch_size, processor)
    names = distinct(class_names(model.config))
    dtype = next(each for each in (np.uint8, np.uint16, np.uint32) if len(names) <= np.iinfo(each).max)
    ignored = int(np.iinfo(dtype).max)
    labels = LabelFile(dtype, ignored, palette or default_palette(len(names)), names)
    counts = np.zeros(len(names), np.int64)
    num_channels = len(processor.image_mean)
    with (
        _whole_labels(source, destination) as partial,
        open_raster(source, num_channels, bands=bands, num_rows=tiling.tile) as raster,
        inference_mode_of(model),
        tqdm(
            total=tiling.num_windows(raster.height, raster.width),
            desc=f"labelling {source.name}",
            unit="window",
            leave=False,
            disable=not progress,
        ) as bar,
    ):
        if not isinstance(raster, Raster):
            raise ValueError(f"{source} is no raster; expected a TIFF, JPEG 2000, PNG or JPEG file that rasterio reads")
        windows = _Windows(model, processor, raster, options, half, bar.update)
        found = label_bands(raster.height, raster.width, tiling, windows.logits, batch_size, dtype)
        raster.write(partial, _counted(found, windows, ignored, counts), labels)
        size = raster.height, raster.width
    return {
        "source": str(source),
        "destination": str(destination),
        "height": size[0],
        "width": size[1],
        "windows": tiling.num_windows(*size),
        "tile": tiling.tile,
        "overlap": tiling.overlap,
        "pixels": dict(zip(names, counts.tolist(), strict=True)),
        "no_data": size[0] * size[1] - int(counts.sum()),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _check_options(options: InferenceOptions, batch_size: int, processor: SegFormerImageProcessor) -> None:
    if processor.value_range is not None and range_limits(processor.value_range) is None:
        raise ValueError(
            f"value_range is {processor.value_range}, a range of each image, which the tiles of a raster would each "
            "have for themselves; expected a fixed one: value_range=[low, high]"
        )
    if options.window or options.stride:
        raise ValueError(
            f"evaluation.window is {options.window} and evaluation.stride {options.stride}, but the windows of large "
            "images are those of the tiling (tile and overlap)"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but it must be 1 at least")


@contextmanager
def _whole_labels(source: Path, destination: Path) -> Iterator[Path]:
    """A file to write to, which takes the destination's name only if all went well."""
    if destination.is_dir():
        raise ValueError(f"{destination} is a folder, but it must be the name of a file to write")
    if destination.exists() and source.exists() and destination.samefile(source):
        raise ValueError(f"{destination} is the image itself, which labels would replace: take another name")
    with atomic_write(destination) as partial:
        partial.touch()  # where nothing can be written, it is known before the work
        yield partial


class _Windows:
    """Predicts windows of a raster, and remembers where they hold data until the labels are written."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: SegFormerImageProcessor,
        raster: Raster,
        options: InferenceOptions,
        half: bool,
        when_done: Callable[[int], Any],
    ):
        self.model, self.processor, self.raster, self.options = model, processor, raster, options
        self.half, self.when_done = half, when_done
        self.valid = _Rows(raster.width) if raster.may_lack_data else None

    def logits(self, windows: Sequence[Tile]) -> Tensor:
        """Logits (B, K, h, w) of windows of one size, on the grid of a quarter of their sides."""
        grid = [-(-side // CELL) for side in windows[0][2:]]
        images, is_empty = [], True
        for window in windows:
            pixels, valid = self.raster.read(window)
            if self.valid is not None:
                self.valid.put(window, valid)
            is_empty = is_empty and valid is not None and not valid.any()
            images.append(pixels)
        if is_empty:
            result = torch.zeros(len(windows), self.model.config.num_labels, *grid, device=self.model.device)
        else:
            result = self._predict(images, grid, windows)
        self.when_done(len(windows))
        return result

    def _predict(self, images: Sequence[np.ndarray], grid: Sequence[int], windows: Sequence[Tile]) -> Tensor:
        try:
            views = [logits for scale in self.options.scales for logits in self._views(images, scale)]
        except (ValueError, MemoryError, RuntimeError) as error:
            if not isinstance(error, ValueError) and not is_out_of_memory(error):
                raise
            first, last = windows[0], windows[-1]
            raise ValueError(
                f"{self.raster.name}, rows {first.top} to {first.top + first.height} and columns {first.left} to "
                f"{last.left + last.width}: {error}"
            ) from error
        if len(views) == 1:
            return views[0]
        sized = [F.interpolate(view, size=list(grid), mode="bilinear", align_corners=False) for view in views]
        # The logarithm of mean probabilities, up to a constant. Of a probability that is rounded to 0 or 1 the logit
        # were infinite, and upsampled next to others it is NaN, which wins.
        if sized[0].shape[1] == 1:
            logits = torch.stack(sized)
            return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)
        return torch.stack([view.log_softmax(dim=1) for view in sized]).logsumexp(0)

    def _views(self, images: Sequence[np.ndarray], scale: float) -> Iterator[Tensor]:
        """Logits (B, K, ., .) of windows at a scale, and of their mirror images, turned back."""
        pixels = self._prepared(images, scale)
        yield self._run(pixels)
        if self.options.flip:
            yield self._run(pixels.flip(-1)).flip(-1)

    def _prepared(self, images: Sequence[np.ndarray], scale: float) -> Tensor:
        height, width = images[0].shape[1:]
        size = {"height": max(1, round(height * scale)), "width": max(1, round(width * scale))}
        prepared = self.processor(
            list(images),
            do_resize=scale != 1,
            size=size,
            keep_ratio=False,
            size_divisor=None,
            input_data_format="channels_first",
            return_tensors="pt",
        )
        return prepared.pixel_values.to(self.model.device, self.model.dtype)

    def _run(self, pixels: Tensor) -> Tensor:
        device = self.model.device.type
        dtype = torch.bfloat16 if device == "cpu" else torch.float16
        with torch.autocast(device, dtype, enabled=self.half):
            return self.model(pixels).logits.float()


class _Rows:
    """Where rows not yet written hold data; those of the windows at work and a few before."""

    def __init__(self, width: int):
        self.first = 0
        self.valid = np.ones((0, width), bool)

    def put(self, window: Tile, valid: np.ndarray | None) -> None:
        """Remember a window; rows that come for the first time begin as all valid."""
        end = window.top + window.height - self.first
        if end > len(self.valid):
            more = np.ones((end - len(self.valid), self.valid.shape[1]), bool)
            self.valid = np.concatenate([self.valid, more])
        if valid is not None:
            self.valid[window.top - self.first : end, window.left : window.left + window.width] = valid

    def take(self, num_rows: int) -> np.ndarray:
        """The first rows that are remembered, which are then forgotten."""
        taken, self.valid = self.valid[:num_rows], self.valid[num_rows:].copy()
        self.first += num_rows
        return taken


def _counted(
    bands: Iterator[tuple[int, np.ndarray]], windows: _Windows, ignored: int, counts: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Labels with those of pixels without data ignored; the others are counted."""
    for top, labels in bands:
        if windows.valid is not None:
            labels[~windows.valid.take(len(labels))] = ignored
        counts += np.bincount(labels[labels < len(counts)], minlength=len(counts))
        yield top, labels


__all__ = ["predict_large_image"]
