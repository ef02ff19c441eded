"""Segmentation of volumes: slice by slice, written as one mask of the same kind and geometry.

A slice is an image like any other, and the slices of a volume share batches. Axes: C bands, H W sides of a slice.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..data.reader_protocol import Reader
from ..files import atomic_write
from ..progress import Progress
from .areas import Areas, Spacing
from .pipeline import Prepared, ReadAhead
from .predictor import Prediction, SegFormerPredictor
from .segmenter import unique_names
from .tiling import MaskLayout


class VolumeReader(Reader, Protocol):
    """A reader of volumes, which also writes the mask of one.

    Attributes:
        num_slices: number of slices.
        spacing: distance of slices, rows and columns in mm; see `areas`.
        mask_suffix: ending of the mask's name.
        takes_values: True if a mask of this kind holds values, False for one of named segments.
    """

    num_slices: int
    spacing: Spacing
    mask_suffix: str
    takes_values: bool

    def slice(self, index: int) -> np.ndarray:
        """Read a slice (C, H, W), from 0, masked where it holds no data; called from several threads."""

    def write(
        self, path: Path, slices: Iterable[np.ndarray], layout: MaskLayout, *, keep_identity: bool = False
    ) -> None:
        """Write a mask with the geometry of this volume.

        Args:
            path: the file.
            slices: labels (H, W), in order.
            layout: of the labels.
            keep_identity: copy what identifies a person, which is left out otherwise.

        Raises:
            ValueError: if there is no mask of such a volume.
            OSError: if it cannot be written.
        """


def segment_volume(
    predictor: SegFormerPredictor,
    volume: VolumeReader,
    destination: Path,
    *,
    masks_as: str = "palette",
    keep_identity: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Segment a volume into one file, atomically.

    Args:
        predictor: of the slices.
        volume: the open volume.
        destination: the file to write, with the ending `volume.mask_suffix`.
        masks_as: see `writers.Outputs`.
        keep_identity: see `VolumeReader.write`.
        progress: show progress in slices.

    Returns:
        `height` and `width` of a slice, `slices` (their number), `pixels` (number of pixels by class name) and `areas`
        (rows of `areas.Area`, as lists).

    Raises:
        ValueError: if model and volume do not fit, or masks of this kind hold no values.
        OSError: if a file cannot be read or written.
    """
    names = unique_names(predictor.names)
    if masks_as != "palette" and not volume.takes_values:
        raise ValueError(
            f"{volume.name}: a mask of this kind holds segments, not values; expected no --masks-as {masks_as}: leave "
            "it out, or write each slice as a PNG file (--pages)"
        )
    dtype = np.dtype(np.min_scalar_type(len(names)))
    layout = MaskLayout(dtype.type, int(np.iinfo(dtype).max), predictor.palette, names)
    areas, counts = Areas(names, volume.spacing), np.zeros(len(names), np.int64)

    def measured(segmentations: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for segmentation in segmentations:
            areas.add(segmentation)
            counts[:] += np.bincount(segmentation[segmentation < len(names)], minlength=len(names))
            yield black_and_white(segmentation) if masks_as == "255" else segmentation
            bar.update()

    with Progress(f"predict {Path(volume.name).name}", volume.num_slices, "slices", is_shown=progress) as bar:
        slices = _segmentations(predictor, volume)
        try:
            with atomic_write(destination) as partial_file:
                partial_file.touch()  # fails before the work where nothing can be written
                volume.write(partial_file, measured(slices), layout, keep_identity=keep_identity)
        finally:
            slices.close()
    return {
        "height": volume.height,
        "width": volume.width,
        "slices": volume.num_slices,
        "pixels": dict(zip(names, counts.tolist(), strict=True)),
        "areas": [list(area) for area in areas.rows()],
    }


def _segmentations(predictor: SegFormerPredictor, volume: VolumeReader) -> Generator[np.ndarray, None, None]:
    """Yield the segmentation map (H, W) of each slice, read ahead in threads."""

    def prepare(index: int) -> Prepared:
        return predictor.prepare(volume.slice(index), f"{volume.name}, slice {index + 1}", keep_image=False)

    def segment(batch: list[Prepared]) -> Sequence[Prediction]:
        return predictor.predict(batch)

    tasks = (partial(prepare, index) for index in range(volume.num_slices))
    results = ReadAhead(tasks, segment, predictor.segmenter.batch_size)
    try:
        for _ in range(volume.num_slices):
            yield next(results).segmentation
    finally:
        results.close()


def black_and_white(segmentation: np.ndarray) -> np.ndarray:
    """Return 255 where a segmentation map of two classes is the second one, and 0 elsewhere, as uint8."""
    return np.where(segmentation == 1, 255, 0).astype(np.uint8)


__all__ = ["VolumeReader", "black_and_white", "segment_volume"]
