"""Masks of a video's frames in one Parquet file: a row for each frame."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..inference.parquet_writer import mask_schema
from ..inference.writers import segmentation_to_png
from ..visualization import Color

_ROW_GROUP = 64  # frames in memory


class FrameTable:
    """Parquet with the columns of `ParquetWriter`, and `frame`, from 1, and `time_s`.

    Args:
        path: the file.
        name: of the video; rows are named NAME_f000001 and so on.
        names: of the classes.
        palette: one colour for each.
        masks_as: see `writers.Outputs`.

    Raises:
        OSError: if it cannot be written.
    """

    def __init__(self, path: Path, name: str, names: Sequence[str], palette: Sequence[Color], masks_as: str):
        import pyarrow.parquet as parquet

        self._schema = _schema(names, palette)
        self._file = parquet.ParquetWriter(path, self._schema, compression="none")
        self._name, self._palette, self._masks_as = name, palette, masks_as
        self._rows: list[dict[str, Any]] = []

    def add(self, number: int, seconds: float, segmentation: np.ndarray, counts: Sequence[int]) -> None:
        """Append a frame.

        Args:
            number: of the frame, from 1.
            seconds: its time.
            segmentation: its classes (H, W).
            counts: number of pixels of each class.
        """
        content = BytesIO()
        segmentation_to_png(segmentation, self._palette, self._masks_as).save(content, "PNG")
        height, width = segmentation.shape
        self._rows.append(
            {
                "name": f"{self._name}_f{number:06d}",
                "height": height,
                "width": width,
                "mask": content.getvalue(),
                "pixels": list(counts),
                "frame": number,
                "time_s": seconds,
            }
        )
        if len(self._rows) == _ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """End the file."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        import pyarrow

        self._file.write_table(pyarrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []


def _schema(names: Sequence[str], palette: Sequence[Color]) -> Any:
    """Add two columns to `mask_schema`; a frame that cannot be decoded has no row, so that none has an error."""
    import pyarrow

    schema = mask_schema(names, palette)
    return schema.append(pyarrow.field("frame", pyarrow.int64())).append(pyarrow.field("time_s", pyarrow.float64()))


__all__ = ["FrameTable"]
