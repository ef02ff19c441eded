"""The job of labelling many pictures: shared out over processes, resumed where it stopped, summed up at the end.

What is finished is never done again: every file is written whole or not at all, and the results' folder says by which
model and options it was made, so that two runs are never mixed. A picture that can not be read stops nothing.
"""

import errno
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..conversion.checkpoints import read_json
from ..data.sources import DatasetSource, FileSource, InputItem
from ..files import is_full, write_json
from .predictor import Prediction, Predictions, Prepared, SegFormerPredictor, told
from .writers import ParquetWriter, PngWriter

SETTINGS = "settings.json"
SUMMARY = "summary.json"
_SHARD_SIZE = 1000
_NUM_WRITERS = 2
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


@dataclass(frozen=True)
class Outputs:
    """What is written.

    Args:
        kind: `"png"`, a file a picture, or `"parquet"`, shards of many.
        with_overlay: whether to lay classes over pictures, too.
        legend: `"right"` or `"below"` adds a legend to overlays.
        probabilities: `"uint8"` or `"float16"` writes those of all classes.

    Raises:
        ValueError: if a value is none of these, or does not go with the others.
    """

    kind: str = "png"
    with_overlay: bool = False
    legend: str | None = None
    probabilities: str | None = None

    def __post_init__(self):
        known = {"kind": ("png", "parquet"), "legend": (None, "right", "below")}
        known["probabilities"] = (None, "uint8", "float16")
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but it must be one of {values}")
        if self.kind == "parquet" and (self.with_overlay or self.probabilities):
            raise ValueError("Parquet shards hold label maps alone: overlays and probabilities go with png")
        if self.legend and not self.with_overlay:
            raise ValueError(f"legend is {self.legend!r}, but only an overlay has a legend")


@dataclass(frozen=True)
class Report:
    """What came of a job, for all processes together.

    Attributes:
        num_pictures: with label maps in the folder.
        pixels: of each class in them.
        failed: name and error of each picture that could not be labelled.
        num_before: pictures that were finished by earlier runs.
    """

    num_pictures: int
    pixels: dict[str, int]
    failed: list[dict[str, str]]
    num_before: int

    def to_json(self) -> dict[str, Any]:
        """All that summary.json says."""
        total = max(1, sum(self.pixels.values()))
        classes = [
            {"name": name, "pixels": count, "share": round(count / total, 6)} for name, count in self.pixels.items()
        ]
        return {"pictures": self.num_pictures, "classes": classes, "failed": self.failed}

    def told(self, most: int = 20) -> str:
        """The pictures that failed, in a line."""
        listed = "; ".join(each["error"] for each in self.failed[:most])
        others = f"; and {len(self.failed) - most} others, see {SUMMARY}" if len(self.failed) > most else ""
        noun = "picture" if len(self.failed) == 1 else "pictures"
        return f"{len(self.failed)} {noun} could not be labelled: {listed}{others}"


class DistributedContext:
    """Those that share a job, as torchrun and `accelerate launch` start them; one where nobody started more.

    They meet over the CPU and wait for each other as long as it takes.
    """

    def __init__(self):
        self.rank, self.number = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._is_own = self.number > 1 and not torch.distributed.is_initialized()
        if self._is_own:
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in every process; all wait for each other."""
        if self.number == 1:
            return [value]
        values: list[Any] = [None] * self.number
        torch.distributed.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Leave the others."""
        if self._is_own:
            torch.distributed.destroy_process_group()


def predict_batch(
    predictor: SegFormerPredictor,
    pictures: FileSource | DatasetSource,
    out: str | Path,
    outputs: Outputs | None = None,
    *,
    progress: bool = True,
) -> Report:
    """Label pictures into a folder, or go on where an earlier run stopped.

    Under torchrun or `accelerate launch` every process takes its share of the pictures: each n-th, or each n-th shard.
    All need to see the same pictures and the same folder. The number of processes may change between runs.

    Args:
        predictor: labels them.
        pictures: what there is to label.
        out: the folder; it is made if need be.
        outputs: what is written; label maps as PNG files by default.
        progress: whether to show a bar, of the first process's share.

    Returns:
        the `Report`, the same in every process. The folder then holds `summary.json` with the same numbers, and with
        PNG files `pictures.jsonl` with a line for each picture.

    Raises:
        ValueError: if the folder holds the results of another model or of other options, or processes see different
            pictures.
        OSError: if a result can not be written; what was finished stays.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
        >>> from hf_segformer import SegFormerPredictor
        >>> from hf_segformer.data.sources import FileSource
        >>> from hf_segformer.inference.batch import predict_batch
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig(depths=[1, 1, 1, 1], num_labels=5)).eval()
        >>> predictor = SegFormerPredictor(model, SegFormerImageProcessor(size=64))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (90, 60)).save(f"{folder}/street.png")
        ...     source = FileSource([folder], f"{folder}/out")
        ...     report = predict_batch(predictor, source, f"{folder}/out", progress=False)
        >>> sum(report.pixels.values())
        5400
    """
    out, outputs, processes = Path(out), outputs or Outputs(), DistributedContext()
    try:
        names = [item.name for item in pictures.items()]
        if len(set(processes.gather(_digest(names)))) > 1:
            raise ValueError("the processes see different pictures, but they need to share one list of them")
        settings = _settings(predictor, outputs, pictures, processes.number)
        if processes.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            settings = _check_settings(out / SETTINGS, settings)
        settings = processes.gather(settings)[0]
        if not (out / SETTINGS).exists():
            raise ValueError(f"{out} is another folder for process {processes.rank}: all processes must share it")
        job = _Job(predictor, pictures, out, outputs, processes, progress and processes.rank == 0)
        run = partial(_label_shards, shard_size=settings["shard_size"]) if outputs.kind == "parquet" else _label_files
        folder, failed, num_new = run(job)
        of_all = processes.gather((failed, num_new))
        report = None
        if processes.rank == 0:
            number, pixels, filed = folder.finish()
            failures = filed or [each for failed, _ in of_all for each in failed]
            report = Report(number, pixels, failures, number - sum(num_new for _, num_new in of_all))
            write_json(report.to_json(), out / SUMMARY)
        return processes.gather(report)[0]
    except MemoryError as error:
        raise ValueError(str(error) or "there is not enough memory") from error
    finally:
        processes.close()


@dataclass(frozen=True)
class _Job:
    """What one process has to do, and with what."""

    predictor: SegFormerPredictor
    pictures: FileSource | DatasetSource
    out: Path
    outputs: Outputs
    processes: DistributedContext
    shows_bar: bool


class _RasterError(ValueError):
    """A picture that is to be labelled by windows."""


def _label_files(job: _Job) -> tuple[PngWriter, list[dict[str, str]], int]:
    """What it wrote to, what failed, and how many pictures it labelled."""
    pictures, outputs, processes = job.pictures, job.outputs, job.processes
    mine = pictures.items()[processes.rank :: processes.number]
    extras = outputs.with_overlay, outputs.legend, outputs.probabilities
    folder = PngWriter(job.out, job.predictor, *extras, rank=processes.rank)
    done = folder.done(mine, pictures.origin)
    processes.gather(None)  # nobody writes while another still reads what is there
    todo = [item for item in mine if item.name not in done]
    rasters: list[InputItem] = []
    failed: list[dict[str, str]] = []

    def write(item: InputItem, prepared: Prepared, prediction: Prediction) -> None:
        try:
            folder.write(item.name, pictures.origin(item), prepared, prediction)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # all else concerns every picture
                raise
            failed.append(_failure(job, item, error))

    with _Bar(len(mine), len(done), job.shows_bar) as bar:
        with _Writers() as writers:
            for item, outcome in _predict(job, todo):
                if isinstance(outcome, _RasterError):
                    rasters.append(item)
                    continue
                if isinstance(outcome, Exception):
                    failed.append(_failure(job, item, outcome))
                else:
                    writers.submit(write, item, *outcome)
                bar.update()
        for item in rasters:
            try:
                _label_raster(job, folder, item)
            except (ValueError, OSError) as error:
                if is_full(error):
                    raise
                failed.append(_failure(job, item, error))
            bar.update()
    return folder, failed, len(todo) - len(failed)


def _failure(job: _Job, item: InputItem, error: Exception) -> dict[str, str]:
    return {"name": item.name, "error": told(error, job.pictures.describe(item))}


def _label_raster(job: _Job, folder: PngWriter, item: InputItem) -> None:
    """One large image, by windows: those of the options, or `Tiling`'s own."""
    from .large_image import predict_large_image
    from .tiling import Tiling

    predictor, options = job.predictor, job.predictor.options
    try:
        tiling = Tiling(options.window, options.window - options.step) if options.window else Tiling()
    except ValueError as error:
        raise ValueError(f"a window of {options.window} in steps of {options.step} does not do: {error}") from error
    label = partial(
        predict_large_image,
        predictor.model,
        predictor.processor,
        str(item.source),
        tiling=tiling,
        options=replace(options, window=0, stride=0),
        palette=predictor.palette,
        progress=job.shows_bar and sys.stderr.isatty(),  # by windows: the job's own bar stands still meanwhile
    )
    folder.write_raster(item.name, job.pictures.origin(item), label)


def _label_shards(job: _Job, shard_size: int) -> tuple[ParquetWriter, list[dict[str, str]], int]:
    """The same; shards hold their failures themselves."""
    items = job.pictures.items()
    folder = ParquetWriter(job.out, job.predictor, [item.name for item in items], shard_size)
    mine = folder.shards(job.processes.rank, job.processes.number)
    todo = [index for shard in mine if not folder.is_done(shard) for index in folder.indices(shard)]
    number = sum(len(folder.indices(shard)) for shard in mine)
    num_new = 0
    try:
        with _Bar(number, number - len(todo), job.shows_bar) as bar:
            found = _predict(job, [items[index] for index in todo])
            for index, (item, outcome) in zip(todo, found, strict=True):
                if isinstance(outcome, Exception):
                    folder.add(index, None, _failure(job, item, outcome)["error"])
                else:
                    folder.add(index, outcome[1])
                    num_new += 1
                bar.update()
    finally:
        folder.close()
    return folder, [], num_new


def _predict(job: _Job, items: Sequence[InputItem]) -> Iterator[tuple[InputItem, Any]]:
    """Each item with its prepared picture and prediction, or with what is wrong with it."""
    predictor, pictures, outputs = job.predictor, job.pictures, job.outputs

    def prepare(item: InputItem) -> Prepared:
        if pictures.kind(item) == "raster":
            raise _RasterError(
                f"{pictures.describe(item)} is a raster or damaged, and goes into no Parquet shard: take png"
            )
        processor = predictor.processor
        image = pictures.read(item, len(processor.image_mean), any_range=processor.value_range is not None)
        return predictor.prepare(image, pictures.describe(item), keep_picture=outputs.with_overlay)

    tasks = (partial(prepare, item) for item in items)
    with_scores = outputs.probabilities is not None
    predictions = Predictions(predictor, tasks, with_scores=with_scores, keep=lambda *both: both)
    for item in items:
        try:
            yield item, next(predictions)
        except (ValueError, OSError) as error:
            yield item, error


class _Writers:
    """Threads that write while the network is at work; the first failure is raised at the next picture."""

    def __enter__(self) -> "_Writers":
        self._pool, self._pending = ThreadPoolExecutor(_NUM_WRITERS, "segformer-writes"), deque[Future]()
        return self

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        self._pending.append(self._pool.submit(work, *arguments))
        while self._pending and (self._pending[0].done() or len(self._pending) > 4 * _NUM_WRITERS):
            self._pending.popleft().result()

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()


class _Bar(tqdm):
    """Images per second, and how long it will take; rarely where nobody watches."""

    def __init__(self, total: int, initial: int, is_shown: bool):
        interval = 0.5 if sys.stderr.isatty() else 30
        super().__init__(
            desc="labelling",
            total=total,
            initial=initial,
            unit=" images",
            bar_format=_BAR,
            mininterval=interval,
            maxinterval=2 * interval,
            disable=not is_shown,
        )


def _settings(
    predictor: SegFormerPredictor, outputs: Outputs, pictures: FileSource | DatasetSource, num_processes: int
) -> dict[str, Any]:
    """What results depend on, and with Parquet what belongs in which shard."""
    processor = {
        name: value
        for name, value in predictor.processor.to_dict().items()
        if isinstance(value, int | float | list | dict)
    }
    settings = {
        "dtype": str(predictor.model.dtype).removeprefix("torch."),
        "weights": _digest_of_weights(predictor.model),
        "classes": list(predictor.names),
        "palette": [list(color) for color in predictor.palette],
        "processor": {**processor, "size": dict(predictor.processor.size)},
        **asdict(predictor.options),
        "stride": predictor.options.step,
        **asdict(outputs),
    }
    if outputs.kind == "parquet":
        items = pictures.items()
        settings["pictures"] = _digest([pictures.origin(item) for item in items])
        settings["shard_size"] = min(_SHARD_SIZE, -(-len(items) // num_processes))
    return settings


def _check_settings(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Note what makes the results of a folder, or raise where something else made those that are there."""
    if not path.exists():
        if any(any(path.parent.glob(name)) for name in ("**/*_labels.png", "**/*_labels.tif", "labels-*.parquet")):
            raise ValueError(
                f"{path.parent} holds label maps, but no {SETTINGS} that says what made them: give another"
            )
        write_json(settings, path)
        return settings
    held = read_json(path)
    settings = {**settings, **{name: held[name] for name in ("shard_size",) if name in held and name in settings}}
    for name in dict.fromkeys((*settings, *held)):
        if held.get(name) != settings.get(name):
            if name in ("weights", "pictures"):
                reason = f"was made with other {name}"
            else:
                option = name.removeprefix("with_")
                reason = f"was made with {option} {held.get(name)!s:.80}, which now is {settings.get(name)!s:.80}"
            raise ValueError(f"{path.parent} {reason}: give another folder, or the same as before to go on there")
    return settings


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode(errors="surrogateescape")).hexdigest()[:16]


def _digest_of_weights(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


__all__ = ["DistributedContext", "Outputs", "Report", "predict_batch"]
