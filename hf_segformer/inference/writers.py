"""Writers of batch inference: PNG files beside overlays and probabilities, or shards of Parquet.

A writer decides which images a process has to predict, so that a job is resumed without repeating finished work, and
writes atomically: a file is complete or absent. Writers of other packages are found through the entry points
`hf_segformer.writers`, by the name of the kind. Axes: K classes, H W sides of the image.
"""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..data.sources import InputItem
from ..files import atomic_write, named, partial_path, resolve_inside
from ..visualization import Color, displayed_as_fed, overlay, with_legend
from .areas import write_areas
from .pipeline import Prepared
from .predictor import Prediction, SegFormerPredictor
from .segmenter import unique_names
from .volumes import black_and_white

RECORD, _AREAS = "predictions.jsonl", "areas.csv"
_MASK, _RASTER_MASK = "mask.png", "mask.tif"
ENTRY_POINTS = "hf_segformer.writers"
# This package's own entry points, known without installed metadata.
_OWN_WRITERS = {"map": "hf_segformer.geo.maps:MapWriter", "video": "hf_segformer.video.writer:VideoWriter"}
_ROW_GROUP = 64  # images that a shard holds in memory
_SHARD_SIZE = 1000


@dataclass(frozen=True)
class Outputs:
    """Outputs of batch inference.

    Args:
        kind: `"png"`, a file for each image; `"parquet"`, shards of many; or the kind of an installed writer.
        overlay: also write overlays of the classes on the images.
        legend: `"right"` or `"below"` adds a legend to overlays.
        clear: names of classes that overlays leave clear, `background` say.
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
        if self.options and self.kind in _WRITERS:
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
    return (*_WRITERS, *_installed())


def open_writer(arguments: WriterArguments, rank: int = 0) -> Writer:
    """The writer of a kind, for one process of a job."""
    kind = arguments.outputs.kind
    if kind in _WRITERS:
        return _WRITERS[kind](arguments, rank)
    module, _, name = _installed()[kind].partition(":")
    return getattr(import_module(module), name)(arguments, rank)


def _installed() -> dict[str, str]:
    """Module and class of the writers of other packages, and of this one's trades, by kind."""
    return {**{point.name: point.value for point in entry_points(group=ENTRY_POINTS)}, **_OWN_WRITERS}


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


def _check_masks(masks_as: str, names: Sequence[str]) -> None:
    if masks_as == "255" and len(names) != 2:
        raise ValueError(f"masks_as is '255' for a model of {len(names)} classes; expected two: choose 'values'")


def count_pixels(segmentation: np.ndarray, num_classes: int) -> list[int]:
    """Number of pixels of each class."""
    return np.bincount(segmentation[segmentation < num_classes], minlength=num_classes).tolist()


class PngWriter:
    """`NAME_mask.png` for each image, and the requested overlay and probabilities beside it; the mask comes last.

    `predictions.jsonl` gets a line for each image, in the order of the names.

    Args:
        arguments: see `WriterArguments`.
        rank: rank of this process, which keeps a record of its own.

    Raises:
        ValueError: if a class to leave clear does not exist.
    """

    num_threads, takes_rasters, takes_volumes = 2, True, True

    def __init__(self, arguments: WriterArguments, rank: int = 0):
        self.out, self.outputs, predictor = arguments.out, arguments.outputs, arguments.predictor
        self.names, self.palette = unique_names(predictor.names), predictor.palette
        _check_masks(self.outputs.masks_as, self.names)
        self.failed: list[dict[str, str]] = []
        self.settings: dict[str, Any] = {}
        self.identity: dict[str, str] = {}
        self.num_written = 0
        self._items, self._origin_of = arguments.items, arguments.origin_of
        self._processor = predictor.processor
        self._clear = [_index_of(name, self.names) for name in self.outputs.clear]
        self._record, self._lock = resolve_inside(self.out, f".{RECORD}.{rank:05d}"), threading.Lock()

    def pending(self, rank: int, num_processes: int) -> tuple[int, list[InputItem]]:
        """See `Writer`: each n-th item is this process's, and finished where its mask and its line in a record exist.

        Raises:
            ValueError: if the mask of another image has the same name.
        """
        mine = self._items[rank::num_processes]
        finished = self._finished({item.name: item for item in mine})
        return len(mine), [item for item in mine if item.name not in finished]

    def _finished(self, wanted: dict[str, InputItem]) -> set[str]:
        found: set[str] = set()
        for line in self._lines():
            name = line["name"]
            if name in wanted and name not in found and self._exists(line):
                if line["source"] != (origin := self._origin_of(wanted[name])):
                    raise ValueError(
                        f"{self.out} holds the prediction of {line['source']} as {name}, which is also the name of "
                        f"{origin}: choose another output folder"
                    )
                found.add(name)
        return found

    def write(self, item: InputItem, prepared: Prepared, prediction: Prediction) -> None:
        """See `Writer`; a name that is too long for the file system fails alone."""
        try:
            self._write(item, prepared, prediction)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # any other error concerns every image
                raise
            self.fail(item, f"{prepared.name}: {error.strerror}")

    def _write(self, item: InputItem, prepared: Prepared, prediction: Prediction) -> None:
        path, segmentation = self._path(item.name), prediction.segmentation
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.outputs.overlay:
            with atomic_write(self._path(item.name, "overlay.png")) as partial:
                self._overlay(prepared, segmentation).save(partial, "PNG")
        if prediction.probabilities is not None:
            # numpy writes by itself where a file is open for writing alone, and then names neither file nor reason.
            with atomic_write(self._path(item.name, "probabilities.npy")) as partial, partial.open("wb+") as file:
                np.save(file, quantize_probabilities(prediction.probabilities, self.outputs.probabilities))
        with atomic_write(path) as partial:
            segmentation_to_png(segmentation, self.palette, self.outputs.masks_as).save(partial, "PNG")
            self._note(item, segmentation.shape, count_pixels(segmentation, len(self.names)))

    def write_raster(self, item: InputItem, segment: Callable[..., Mapping[str, Any]]) -> None:
        """See `Writer`: `NAME_mask.tif`.

        Raises:
            ValueError: if an overlay or probabilities are requested.
        """
        self._refuse_extras("raster", "predict rasters without, into another folder")
        if self.outputs.masks_as == "255":
            raise ValueError("masks_as is '255', which is no data in the mask of a raster; expected 'values'")
        path = self._path(item.name, _RASTER_MASK)
        path.parent.mkdir(parents=True, exist_ok=True)
        summary = segment(path)
        self._note(item, (summary["height"], summary["width"]), list(summary["pixels"].values()))

    def write_volume(self, item: InputItem, segment: Callable[[Callable[[str], Path]], Mapping[str, Any]]) -> None:
        """See `Writer`: `NAME_mask` with the ending of the volume's kind, and `NAME_areas.csv`.

        Raises:
            ValueError: if an overlay or probabilities are requested.
        """
        self._refuse_extras("volume", "predict its slices as separate images (--pages)")
        paths: list[Path] = []

        def path_of(suffix: str) -> Path:
            paths.append(self._path(item.name, f"mask{suffix}"))
            paths[0].parent.mkdir(parents=True, exist_ok=True)
            return paths[0]

        summary = segment(path_of)
        write_areas(self._path(item.name, _AREAS), summary["areas"])
        extras = {"mask": paths[0].name, "slices": summary["slices"], "areas": summary["areas"]}
        self._note(item, (summary["height"], summary["width"]), list(summary["pixels"].values()), **extras)

    def _refuse_extras(self, kind: str, remedy: str) -> None:
        wanted = [name for name in ("overlay", "probabilities") if getattr(self.outputs, name)]
        if wanted:
            options = " and ".join(f"--{name}" for name in wanted)
            raise ValueError(f"{options} cannot be written for a {kind}: {remedy}")

    def fail(self, item: InputItem, message: str) -> None:
        """See `Writer`."""
        self.failed.append({"name": item.name, "error": message})

    def close(self) -> None:
        """See `Writer`; every file was complete or absent at any time."""

    def finish(self, failed: list[dict[str, str]]) -> Totals:
        """See `Writer`: merge the records of all processes to one, sorted by name."""
        lines: dict[str, dict[str, Any]] = {}
        for line in self._lines():
            if line["name"] not in lines and self._exists(line):
                lines[line["name"]] = line
        totals = dict.fromkeys(self.names, 0)
        with atomic_write(self.out / RECORD) as partial, partial.open("wb") as file:
            for name in sorted(lines):
                file.write(_json_line(lines[name]))
                for class_name, count in lines[name]["pixels"].items():
                    totals[class_name] += count
        for path in self.out.glob(f".{RECORD}.*[0-9]"):
            path.unlink()
        return Totals(len(lines), totals, sorted(failed, key=lambda each: each["name"]))

    def _exists(self, line: Mapping[str, Any]) -> bool:
        """Return True if the mask of a line of the record is there; that of a volume is named in it."""
        path = self._path(line["name"])
        masks = (line["mask"],) if "mask" in line else (path.name, path.name.removesuffix(_MASK) + _RASTER_MASK)
        parent = Path(line["name"]).parent
        return any(resolve_inside(self.out, parent / mask).exists() for mask in masks)

    def _path(self, name: str, suffix: str = _MASK) -> Path:
        return resolve_inside(self.out, f"{name}_{suffix}")

    def _overlay(self, prepared: Prepared, segmentation: np.ndarray) -> Image.Image:
        image = displayed_as_fed(prepared.image, self._processor)
        blended = overlay(image, segmentation, self.palette, alpha=0.5, clear=self._clear)
        legend = self.outputs.legend
        return with_legend(blended, segmentation, self.names, self.palette, legend) if legend else blended

    def _note(self, item: InputItem, size: Sequence[int], counts: Sequence[int], **extras: Any) -> None:
        """Append the line of an image; its mask follows, so that a mask that exists has its line.

        Shares are those of the pixels that hold data, as in summary.json.
        """
        height, width = size
        pixels = {name: count for name, count in zip(self.names, counts, strict=True) if count}
        line = {
            "name": item.name,
            "source": self._origin_of(item),
            "height": height,
            "width": width,
            "pixels": pixels,
            "share": shares(pixels),
            **extras,
        }
        with self._lock:
            end = b"" if _ends_with_a_line(self._record) else b"\n"  # a killed process left half a line
            with self._record.open("ab") as file:
                file.write(end + _json_line(line))
            self.num_written += 1

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Lines of all records, without those that a killed process left incomplete."""
        for path in (*sorted(self.out.glob(f".{RECORD}.*[0-9]")), self.out / RECORD):
            if path.exists():
                with path.open("rb") as file:
                    yield from (line for line in map(_parsed, file) if line is not None)


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
        _check_masks(self.outputs.masks_as, self.names)
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
        import pyarrow

        fields = {
            "name": pyarrow.string(),
            "height": pyarrow.int32(),
            "width": pyarrow.int32(),
            "mask": pyarrow.binary(),
            "pixels": pyarrow.list_(pyarrow.int64()),
            "error": pyarrow.string(),
        }
        about = {"names": json.dumps(self.names), "palette": json.dumps(self.palette), **self.identity}
        return pyarrow.schema(list(fields.items()), metadata=about)


@dataclass
class _Shard:
    """The shard that is being written, if `file` is open."""

    file: Any = None
    partial: Path = field(default_factory=Path)
    rows: list[dict[str, Any]] = field(default_factory=list)
    num_left: int = 0


def shares(pixels: Mapping[str, int]) -> dict[str, float]:
    """Share of each class of all the pixels counted."""
    total = max(1, sum(pixels.values()))
    return {name: round(count / total, 6) for name, count in pixels.items()}


def quantize_probabilities(probabilities: np.ndarray, kind: str | None) -> np.ndarray:
    """Probabilities as float16, or as uint8 of 0 to 255."""
    return np.rint(255 * probabilities).astype(np.uint8) if kind == "uint8" else probabilities.astype(np.float16)


def _index_of(name: str, names: Sequence[str]) -> int:
    if name not in names:
        raise ValueError(f"clear has {name!r}; expected names of the model's classes: {', '.join(names)}")
    return names.index(name)


def _json_line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"  # see `write_json`


def _in_utf8(text: str) -> str:
    """Text that Parquet can hold: other bytes of a file's name become escapes."""
    return text.encode(errors="backslashreplace").decode()


def _ends_with_a_line(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"
    except OSError:  # it does not exist, or is empty
        return True


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and {"name", "source", "pixels"} <= set(values) else None


_WRITERS: dict[str, Callable[[WriterArguments, int], Writer]] = {"png": PngWriter, "parquet": ParquetWriter}

__all__ = [
    "Outputs",
    "ParquetWriter",
    "PngWriter",
    "Totals",
    "Writer",
    "WriterArguments",
    "count_pixels",
    "open_writer",
    "quantize_probabilities",
    "segmentation_to_png",
    "shares",
    "writer_kinds",
]
