"""How label maps are filed: as PNG files beside overlays and probabilities, or as rows of Parquet shards.

Everything is written whole or not at all. Axes: K classes, H W the picture's sides.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.sources import InputItem
from ..files import atomic_write, named
from ..visualization import Color, overlay, shown, with_legend
from .predictor import Prediction, Prepared, SegFormerPredictor
from .segmenter import distinct

RECORD = "pictures.jsonl"
_RASTER_LABELS = "labels.tif"
_ROW_GROUP = 64  # pictures: what a shard holds in memory


def segmentation_to_png(labels: np.ndarray, palette: Sequence[Color]) -> Image.Image:
    """A label map (H, W) as a picture whose values are the classes: with a palette, or 16-bit grey for more than 256.

    The palette names all 256 values, since Pillow stores fewer bits for a shorter one, and 255 must survive.
    """
    if labels.dtype.itemsize > 2 or labels.max(initial=0) > 65535:
        raise ValueError(f"labels are {labels.dtype}, but a PNG holds 16 bits; expected at most 65,535 classes")
    if len(palette) > 255:
        return Image.fromarray(labels.astype(np.uint16))
    picture = Image.fromarray(labels.astype(np.uint8))
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[: len(palette)] = palette
    picture.putpalette(colors.tobytes())
    return picture


def counted(labels: np.ndarray, num_classes: int) -> list[int]:
    """Pixels of each class."""
    return np.bincount(labels[labels < num_classes], minlength=num_classes).tolist()


class PngWriter:
    """`<name>_labels.png` and what was asked for beside it; the label map is written last.

    Args:
        out: folder.
        predictor: whose names and colours are used.
        with_overlay: whether to write `<name>_overlay.png`.
        legend: `"right"` or `"below"`, or None for an overlay of the picture's own size.
        probabilities: `"uint8"` (0 to 255) or `"float16"` writes `<name>_probabilities.npy`, (K, H, W).
        rank: of this process, which has a record of its own.
    """

    def __init__(
        self,
        out: Path,
        predictor: SegFormerPredictor,
        with_overlay: bool = False,
        legend: str | None = None,
        probabilities: str | None = None,
        rank: int = 0,
    ):
        self.out, self.names, self.palette = out, distinct(predictor.names), predictor.palette
        self.with_overlay, self.legend, self.probabilities = with_overlay, legend, probabilities
        self._record, self._lock = out / f".{RECORD}.{rank:05d}", threading.Lock()

    def done(self, items: Iterable[InputItem], origin_of: Callable[[InputItem], str]) -> set[str]:
        """Names of those whose label maps are there, with their lines in the records.

        Args:
            items: pictures.
            origin_of: tells where one comes from.

        Raises:
            ValueError: if a label map is there that is another picture's.
        """
        wanted, found = {item.name: item for item in items}, set()
        for line in self._lines():
            name = line["name"]
            if name in wanted and name not in found and self._is_there(name):
                if line["source"] != (origin := origin_of(wanted[name])):
                    raise ValueError(
                        f"{self.out} holds the labels of {line['source']} as {name}, as which {origin} would be filed, "
                        "too: give another folder"
                    )
                found.add(name)
        return found

    def write(self, name: str, origin: str, prepared: Prepared, prediction: Prediction) -> None:
        """All files of one picture, and its line in the record."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.with_overlay:
            with atomic_write(self._path(name, "overlay.png")) as partial:
                self._overlay(prepared, prediction.labels).save(partial, "PNG")
        if prediction.scores is not None:
            # A file for writing alone numpy writes by itself, and says neither name nor reason where it can not.
            with atomic_write(self._path(name, "probabilities.npy")) as partial, partial.open("wb+") as file:
                np.save(file, as_type(prediction.scores, self.probabilities))
        with atomic_write(path) as partial:
            segmentation_to_png(prediction.labels, self.palette).save(partial, "PNG")
            self._note(name, origin, prediction.labels.shape, counted(prediction.labels, len(self.names)))

    def write_raster(self, name: str, origin: str, label: Callable[[Path], dict[str, Any]]) -> None:
        """`<name>_labels.tif`, by a function that writes it and tells `height`, `width` and `pixels` by class."""
        path = self._path(name, _RASTER_LABELS)
        path.parent.mkdir(parents=True, exist_ok=True)
        told = label(path)
        self._note(name, origin, (told["height"], told["width"]), list(told["pixels"].values()))

    def _is_there(self, name: str) -> bool:
        return self._path(name).exists() or self._path(name, _RASTER_LABELS).exists()

    def _path(self, name: str, kind: str = "labels.png") -> Path:
        return self.out / f"{name}_{kind}"

    def _overlay(self, prepared: Prepared, labels: np.ndarray) -> Image.Image:
        laid = overlay(shown(prepared.picture), labels, self.palette, alpha=0.5)
        return with_legend(laid, labels, self.names, self.palette, self.legend) if self.legend else laid

    def _note(self, name: str, origin: str, size: Sequence[int], counts: Sequence[int]) -> None:
        """Append the picture's line; the label map follows, so a picture that is there has its line."""
        height, width = size
        pixels = {name: count for name, count in zip(self.names, counts, strict=True) if count}
        share = {name: round(count / (height * width), 6) for name, count in pixels.items()}
        line = {"name": name, "source": origin, "height": height, "width": width, "pixels": pixels, "share": share}
        with self._lock:
            end = b"" if _ends_with_a_line(self._record) else b"\n"  # a killed process left half a line
            with self._record.open("ab") as file:
                file.write(end + _json_line(line))

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The lines of all records, but for those that a killed process left incomplete."""
        for path in (*sorted(self.out.glob(f".{RECORD}.*[0-9]")), self.out / RECORD):
            if path.exists():
                with path.open("rb") as file:
                    yield from (line for line in map(_parsed, file) if line is not None)

    def finish(self) -> tuple[int, dict[str, int], list[dict[str, str]]]:
        """Gather the records of all processes in one, and sum them up: called once, when all are at rest.

        Returns:
            The number of pictures, the pixels of each class, and failures, which no record holds.
        """
        seen: set[str] = set()
        totals = dict.fromkeys(self.names, 0)
        with atomic_write(self.out / RECORD) as partial, partial.open("wb") as file:
            for line in self._lines():
                if line["name"] not in seen and self._is_there(line["name"]):
                    seen.add(line["name"])
                    file.write(_json_line(line))
                    for name, count in line["pixels"].items():
                        totals[name] += count
        for path in self.out.glob(f".{RECORD}.*[0-9]"):
            path.unlink()
        return len(seen), totals, []


class ParquetWriter:
    """`labels-<shard>-of-<shards>.parquet`, each with the pictures of one stretch of the input.

    Columns: name, height, width, labels (a PNG file's bytes), pixels (a number for each class), and error, which says
    why a picture has no labels.

    Args:
        out: folder.
        predictor: whose names and colours are used.
        names: of all pictures, in order.
        shard_size: pictures in a shard.
    """

    def __init__(self, out: Path, predictor: SegFormerPredictor, names: Sequence[str], shard_size: int):
        self.out, self.names, self.palette = out, distinct(predictor.names), predictor.palette
        self._all, self.shard_size = names, shard_size
        self.num_shards = -(-len(names) // shard_size)
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None
        self._left = 0

    def shards(self, rank: int, num_processes: int) -> list[int]:
        """The shards of one process."""
        return list(range(rank, self.num_shards, num_processes))

    def indices(self, shard: int) -> range:
        """Places of a shard's pictures in the input."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self._all)))

    def is_done(self, shard: int) -> bool:
        """Whether the shard is there, whole."""
        return self._path(shard).exists()

    def add(self, index: int, prediction: Prediction | None, error: str | None = None) -> None:
        """The next picture; pictures of a shard come in order, and the last one completes it."""
        import pyarrow.parquet as parquet

        shard = index // self.shard_size
        with named(self._path(shard)):
            if self._writer is None:
                self._partial, self._left = self._path(shard, partial=True), len(self.indices(shard))
                self._writer = parquet.ParquetWriter(self._partial, self._schema(), compression="none")
            self._rows.append(self._row(self._all[index], prediction, error))
            self._left -= 1
            if len(self._rows) == _ROW_GROUP or not self._left:
                self._flush()
            if not self._left:
                self._writer.close()
                self._writer = None
                self._partial.replace(self._path(shard))

    def close(self) -> None:
        """Take back the shard that is not complete."""
        if self._writer is not None:
            try:
                with named(self._partial):
                    self._writer.close()
            finally:
                self._writer = None
                self._partial.unlink(missing_ok=True)

    def finish(self) -> tuple[int, dict[str, int], list[dict[str, str]]]:
        """Sum up all shards: called once, when all processes are at rest.

        Returns:
            The number of pictures, the pixels of each class, and names and errors of pictures without labels.
        """
        import pyarrow.parquet as parquet

        number, totals, failed = 0, np.zeros(len(self.names), dtype=np.int64), []
        for shard in range(self.num_shards):
            with parquet.ParquetFile(self._path(shard)) as file:
                for batch in file.iter_batches(columns=["name", "pixels", "error"]):
                    for row in batch.to_pylist():
                        if row["error"] is None:
                            number, totals = number + 1, totals + row["pixels"]
                        else:
                            failed.append({"name": row["name"], "error": row["error"]})
        return number, dict(zip(self.names, totals.tolist(), strict=True)), failed

    def _path(self, shard: int, partial: bool = False) -> Path:
        name = f"labels-{shard:05d}-of-{self.num_shards:05d}.parquet"
        return self.out / (f".{name}.partial" if partial else name)

    def _schema(self) -> Any:
        import pyarrow

        fields = {
            "name": pyarrow.string(),
            "height": pyarrow.int32(),
            "width": pyarrow.int32(),
            "labels": pyarrow.binary(),
            "pixels": pyarrow.list_(pyarrow.int64()),
            "error": pyarrow.string(),
        }
        about = {"names": json.dumps(self.names), "palette": json.dumps(self.palette)}
        return pyarrow.schema(list(fields.items()), metadata=about)

    def _row(self, name: str, prediction: Prediction | None, error: str | None) -> dict[str, Any]:
        if prediction is None:
            return {"name": _in_utf8(name), "error": _in_utf8(error)}
        content = BytesIO()
        segmentation_to_png(prediction.labels, self.palette).save(content, "PNG")
        height, width = prediction.labels.shape
        pixels = counted(prediction.labels, len(self.names))
        sizes = {"height": height, "width": width}
        return {"name": _in_utf8(name), **sizes, "labels": content.getvalue(), "pixels": pixels}

    def _flush(self) -> None:
        import pyarrow

        self._writer.write_table(pyarrow.Table.from_pylist(self._rows, schema=self._schema()))
        self._rows = []


def as_type(scores: np.ndarray, kind: str | None) -> np.ndarray:
    """Probabilities as float16, or as uint8 of 0 to 255."""
    return np.rint(255 * scores).astype(np.uint8) if kind == "uint8" else scores.astype(np.float16)


def _json_line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"  # see `write_json`


def _in_utf8(text: str | None) -> str | None:
    """Text that Parquet can hold: other bytes of a file's name become escapes."""
    return text and text.encode(errors="backslashreplace").decode()


def _ends_with_a_line(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"
    except OSError:  # there is none, or it is empty
        return True


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and {"name", "source", "pixels"} <= set(values) else None


__all__ = ["ParquetWriter", "PngWriter", "counted", "segmentation_to_png"]
