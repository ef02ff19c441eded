"""The writer of PNG files, one for each image, with overlays and probabilities beside them."""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.sources import InputItem
from ..files import atomic_write, resolve_inside
from ..visualization import displayed_as_fed, overlay, with_legend
from .areas import write_areas
from .pipeline import Prepared
from .predictor import Prediction
from .segmenter import unique_names
from .writers import (
    Totals,
    WriterArguments,
    check_masks,
    count_pixels,
    quantize_probabilities,
    segmentation_to_png,
    shares,
)

RECORD, _AREAS = "predictions.jsonl", "areas.csv"
_MASK, _RASTER_MASK = "mask.png", "mask.tif"


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
        check_masks(self.outputs.masks_as, self.names)
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
            ValueError: if the mask of another image, or of other files of one, has the same name.
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
                        f"{self.out} holds the prediction of {line['source']} as {name}, which now is {origin}: choose "
                        f"another output folder, or delete {name}_mask.* there to predict it again"
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


def _index_of(name: str, names: Sequence[str]) -> int:
    if name not in names:
        raise ValueError(f"clear has {name!r}; expected names of the model's classes: {', '.join(names)}")
    return names.index(name)


def _json_line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"  # see `write_json`


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


__all__ = ["RECORD", "PngWriter"]
