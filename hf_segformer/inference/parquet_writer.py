"""The writer of Parquet: shards of a data set, each with the images of one stretch of the input."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..data.sources import InputItem
from ..files import atomic_write, named, partial_path
from ..visualization import Color
from .pipeline import Prepared
from .predictor import Prediction
from .segmenter import unique_names
from .writers import Totals, WriterArguments, check_masks, count_pixels, segmentation_to_png

_ROW_GROUP = 64  # images that a shard holds in memory
_SHARD_SIZE = 1000


class ParquetWriter:
    """`masks-SHARD-of-SHARDS.parquet`, each with the images of one stretch of the input.

    Columns: name, height, width, mask (bytes of a PNG file), pixels (a number for each class), and error, the reason
    why an image has no mask. The metadata of a file are the classes' names, the palette, and the identity of its run.

    Args:
        arguments: see `WriterArguments`.
        rank: not used: a shard belongs to one process as a whole.
    """

    num_threads, takes_rasters, takes_volumes = 1, False, False

    def __init__(self, arguments: WriterArguments, rank: int = 0):
        self.out, self.outputs, predictor = arguments.out, arguments.outputs, arguments.predictor
        self.names, self.palette = unique_names(predictor.names), predictor.palette
        check_masks(self.outputs.masks_as, self.names)
        self.failed: list[dict[str, str]] = []
        self.num_written = 0
        self.identity: dict[str, str] = {}
        size = arguments.shard_size or min(_SHARD_SIZE, -(-len(arguments.items) // arguments.num_processes))
        self.settings = {"shard_size": size}
        self._items, self._index = arguments.items, {item.name: i for i, item in enumerate(arguments.items)}
        self._shard = _Shard()

    def pending(self, rank: int, num_processes: int) -> tuple[int, list[InputItem]]:
        """See `Writer`: each n-th shard is this process's, and finished where its file exists.

        Raises:
            ValueError: if a file is damaged, or of another run.
        """
        mine = range(rank, self._num_shards, num_processes)
        todo = [item for shard in mine if not self._is_finished(shard) for item in self.items_of(shard)]
        return sum(len(self._indices(shard)) for shard in mine), todo

    def pending_shards(self) -> list[int]:
        """Numbers of the shards that are not finished."""
        return [shard for shard in range(self._num_shards) if not self._path(shard).exists()]

    def items_of(self, shard: int) -> list[InputItem]:
        """Items of a shard, in order."""
        return [self._items[index] for index in self._indices(shard)]

    def write_shard(self, shard: int, content: bytes, num_written: int) -> None:
        """Write a shard that another process has filled.

        Args:
            shard: its number.
            content: bytes of the file.
            num_written: number of its images with a prediction.
        """
        with atomic_write(self._path(shard)) as partial:
            partial.write_bytes(content)
        self.num_written += num_written

    def _is_finished(self, shard: int) -> bool:
        import pyarrow.parquet as parquet

        path = self._path(shard)
        if not path.exists():
            return False
        try:
            held = parquet.read_metadata(path).metadata or {}
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it to predict its images again") from error
        if {name: held.get(name.encode(), b"").decode() for name in self.identity} != self.identity:
            raise ValueError(f"{path} is of another run: choose another output folder, or delete the file")
        return True

    def write(self, item: InputItem, prepared: Prepared, prediction: Prediction) -> None:
        """See `Writer`."""
        content = BytesIO()
        segmentation_to_png(prediction.segmentation, self.palette, self.outputs.masks_as).save(content, "PNG")
        height, width = prediction.segmentation.shape
        pixels = count_pixels(prediction.segmentation, len(self.names))
        self._add(item, {"height": height, "width": width, "mask": content.getvalue(), "pixels": pixels})
        self.num_written += 1

    def write_raster(self, item: InputItem, segment: Callable[..., Mapping[str, Any]]) -> None:
        """Refuse a raster, which is larger than a row should be."""
        raise ValueError("a raster cannot be written to Parquet: choose the format png")

    def write_volume(self, item: InputItem, segment: Callable[[Callable[[str], Path]], Mapping[str, Any]]) -> None:
        """Refuse a volume, whose mask is a file of its own kind."""
        raise ValueError("a volume cannot be written to Parquet: choose the format png")

    def fail(self, item: InputItem, message: str) -> None:
        """See `Writer`."""
        self._add(item, {"error": _in_utf8(message)})

    def close(self) -> None:
        """See `Writer`: remove the shard that is incomplete."""
        shard, self._shard = self._shard, _Shard()
        if shard.file is not None:
            try:
                with named(shard.partial):
                    shard.file.close()
            finally:
                shard.partial.unlink(missing_ok=True)

    def finish(self, failed: list[dict[str, str]]) -> Totals:
        """See `Writer`: read the counts of all shards, which hold the failures, too."""
        import pyarrow.parquet as parquet

        number, totals, failures = 0, np.zeros(len(self.names), dtype=np.int64), list(failed)
        for shard in range(self._num_shards):
            with parquet.ParquetFile(self._path(shard)) as file:
                for batch in file.iter_batches(columns=["name", "pixels", "error"]):
                    for row in batch.to_pylist():
                        if row["error"] is None:
                            number, totals = number + 1, totals + row["pixels"]
                        else:
                            failures.append({"name": row["name"], "error": row["error"]})
        return Totals(number, dict(zip(self.names, totals.tolist(), strict=True)), failures)

    @property
    def _num_shards(self) -> int:
        return -(-len(self._items) // self.settings["shard_size"])

    def _indices(self, shard: int) -> range:
        """Indices of a shard's items."""
        size = self.settings["shard_size"]
        return range(shard * size, min((shard + 1) * size, len(self._items)))

    def _path(self, shard: int) -> Path:
        return self.out / f"masks-{shard:05d}-of-{self._num_shards:05d}.parquet"

    def _add(self, item: InputItem, row: dict[str, Any]) -> None:
        """Append the next row; the items of a shard come in order, and the last one completes it."""
        index = self._index[item.name] // self.settings["shard_size"]
        path, shard = self._path(index), self._shard
        with named(path):
            if shard.file is None:
                self._open(path, len(self._indices(index)))
            shard.rows.append({"name": _in_utf8(item.name), **row})
            shard.num_left -= 1
            if len(shard.rows) == _ROW_GROUP or not shard.num_left:
                self._flush()
            if not shard.num_left:
                shard.file.close()
                self._shard = _Shard()
                shard.partial.replace(path)

    def _open(self, path: Path, num_rows: int) -> None:
        import pyarrow.parquet as parquet

        shard = self._shard
        shard.partial, shard.num_left = partial_path(path), num_rows
        shard.file = parquet.ParquetWriter(shard.partial, self._schema(), compression="none")

    def _flush(self) -> None:
        import pyarrow

        self._shard.file.write_table(pyarrow.Table.from_pylist(self._shard.rows, schema=self._schema()))
        self._shard.rows = []

    def _schema(self) -> Any:
        return mask_schema(self.names, self.palette, **self.identity)


def mask_schema(names: Sequence[str], palette: Sequence[Color], **about: str) -> Any:
    """Return the columns of a table of masks, with the classes' names and colours as its metadata.

    Args:
        names: of the classes.
        palette: one colour for each.
        **about: further metadata.
    """
    import pyarrow

    fields = {
        "name": pyarrow.string(),
        "height": pyarrow.int32(),
        "width": pyarrow.int32(),
        "mask": pyarrow.binary(),
        "pixels": pyarrow.list_(pyarrow.int64()),
        "error": pyarrow.string(),
    }
    metadata = {"names": json.dumps(names), "palette": json.dumps(palette), **about}
    return pyarrow.schema(list(fields.items()), metadata=metadata)


@dataclass
class _Shard:
    """The shard that is being written, if `file` is open."""

    file: Any = None
    partial: Path = field(default_factory=Path)
    rows: list[dict[str, Any]] = field(default_factory=list)
    num_left: int = 0


def _in_utf8(text: str) -> str:
    """Text that Parquet can hold: other bytes of a file's name become escapes."""
    return text.encode(errors="backslashreplace").decode()


__all__ = ["ParquetWriter", "mask_schema"]
