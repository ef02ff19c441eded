"""Resumable batch inference over files and data sets, shared by several processes.

Every file is written atomically, so that finished work is never repeated, and the output folder records by which model
and options it was made, so that two runs never mix. An image that cannot be read does not stop the job.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from ..conversion.loading import digest_of_weights
from ..data.sources import DatasetSource, FileSource, InputItem
from ..files import differences, is_full, printable, read_json, remove_stale_partials, write_json
from ..locks import locked_folder
from ..progress import Progress
from .distributed import DistributedContext
from .large_image import SPOOLS, segment_raster
from .pipeline import Prepared, ReadAhead
from .predictor import Prediction, SegFormerPredictor, format_error
from .volumes import VolumeReader, segment_volume
from .writers import Outputs, Totals, Writer, WriterArguments, open_writer, shares

SETTINGS = "settings.json"
SUMMARY = "summary.json"
_MOST_NAMED = 3  # settings that differ, in a message
_RESULTS = ("**/*_mask.*", "masks-*.parquet")


@dataclass(frozen=True)
class Report:
    """Result of a job, for all processes together.

    Attributes:
        num_images: images with a prediction in the folder.
        pixels: number of their pixels by class.
        failed: name and error of each image without a prediction.
        num_resumed: images that earlier runs had finished.
        skipped: number of files that are not images, by suffix.
    """

    num_images: int
    pixels: dict[str, int]
    failed: list[dict[str, str]]
    num_resumed: int
    skipped: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Contents of summary.json; shares are those of the pixels that hold data."""
        share = shares(self.pixels)
        classes = [{"name": name, "pixels": count, "share": share[name]} for name, count in self.pixels.items()]
        return {"images": self.num_images, "classes": classes, "failed": self.failed, "skipped": self.skipped}

    def format_failures(self, most: int = 20) -> str:
        """The images that failed, in a line."""
        listed = "; ".join(each["error"] for each in self.failed[:most])
        others = f"; and {len(self.failed) - most} others, see {SUMMARY}" if len(self.failed) > most else ""
        noun = "image" if len(self.failed) == 1 else "images"
        return f"{len(self.failed)} {noun} could not be predicted: {listed}{others}"

    def format_skipped(self) -> str:
        """The files that were skipped, in a line; empty if there were none."""
        if not self.skipped:
            return ""
        number = sum(self.skipped.values())
        kinds = ", ".join(
            f"{count} {printable(suffix) or 'without suffix'}" for suffix, count in sorted(self.skipped.items())
        )
        return f"{'1 file skipped, not an image' if number == 1 else f'{number} files skipped, not images'}: {kinds}"


def predict_batch(
    predictor: SegFormerPredictor,
    source: FileSource | DatasetSource,
    out: str | Path,
    outputs: Outputs | None = None,
    *,
    progress: bool = True,
    engine: "Engine | None" = None,
) -> Report:
    """Predict images into a folder, or resume where an earlier run stopped.

    Under torchrun or `accelerate launch` each process takes a share of the images: each n-th, or each n-th shard. All
    must see the same images and the same folder. The number of processes may change between runs.

    Args:
        predictor: predictor of the images; rasters are cut by its `tile_size` and `tile_overlap`.
        source: images of the job.
        out: output folder, which is created.
        outputs: requested outputs; by default masks as PNG files.
        progress: show the progress of the first process.
        engine: predicts the images elsewhere, such as on a cluster; by default this process does.

    Returns:
        The `Report`, the same in every process. The folder then holds `summary.json` with the same numbers, and with
        PNG files `predictions.jsonl` with a line for each image.

    Raises:
        ValueError: if the folder is in use, or holds the results of another model or of other options, if processes see
            different images, or if a batch does not fit into memory.
        OSError: if a result cannot be written; finished work stays.

    Examples:
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
    out, outputs, context = Path(out), outputs or Outputs(), DistributedContext()
    try:
        items = source.items()
        if len(set(context.gather(_digest([item.name for item in items])))) > 1:
            raise ValueError("the processes see different images; expected one list of them")
        if context.is_main:
            out.mkdir(parents=True, exist_ok=True)
        context.gather(None)
        # The first process holds the lock for all; one that fails to get it ends the others, as any process does.
        with locked_folder(out, "batch inference") if context.is_main else nullcontext():
            job = Job(predictor, source, items, out, outputs, context, progress and context.is_main)
            return _predict_batch(job, engine)
    except MemoryError as error:
        raise ValueError(str(error) or "there is not enough memory") from error
    finally:
        context.close()


class Job(NamedTuple):
    """Arguments of one process's share of a job.

    Attributes:
        predictor: see `predict_batch`.
        source: see `predict_batch`.
        items: all images of the job, in order.
        out: output folder.
        outputs: requested outputs.
        context: the processes of the job.
        shows_progress: True in the process that shows it.
        remedy: what to do about an image that is a raster, a volume or the like where these are not predicted.
    """

    predictor: SegFormerPredictor
    source: FileSource | DatasetSource
    items: Sequence[InputItem]
    out: Path
    outputs: Outputs
    context: DistributedContext
    shows_progress: bool
    remedy: str = "choose --format png"

    def failure(self, item: InputItem, error: Exception) -> str:
        """Message of an item's error."""
        return format_error(error, self.source.describe(item))


class Engine(Protocol):
    """Prediction of a job's images other than in this process, such as on a cluster."""

    def shard_size(self, num_images: int, batch_size: int) -> int:
        """Number of images in a shard of a new folder.

        Args:
            num_images: number of images of the job.
            batch_size: most images in a batch of the network.
        """

    def run(self, job: Job, writer: Writer, number: int, pending: Sequence[InputItem]) -> None:
        """Predict and write the pending items.

        Args:
            job: the job.
            writer: takes the results.
            number: number of the job's items.
            pending: those of them that are not finished, in order.
        """


def _predict_batch(job: Job, engine: Engine | None) -> Report:
    """Predict this process's share, wait for the others, and sum up."""
    context, out = job.context, job.out
    arguments = WriterArguments(out, job.predictor, job.outputs, job.items, job.source.origin, context.num_processes)
    if engine is not None:
        arguments = arguments._replace(shard_size=engine.shard_size(len(job.items), job.predictor.segmenter.batch_size))
    writer = open_writer(arguments, context.rank)
    settings = _settings(job, writer)
    if context.is_main:
        remove_stale_partials(out)
        settings = _check_settings(out / SETTINGS, settings)
    settings = context.gather(settings)[0]
    if not (out / SETTINGS).exists():
        raise ValueError(f"{out} is another folder for process {context.rank}; expected one that all processes share")
    writer.settings = {name: settings[name] for name in writer.settings}
    writer.identity = _identity(out / SETTINGS)
    number, pending = writer.pending(context.rank, context.num_processes)
    context.gather(None)  # no process writes while another still reads the results of earlier runs
    try:
        (engine.run if engine is not None else predict_items)(job, writer, number, pending)
    finally:
        writer.close()
    of_all = context.gather((writer.failed, writer.num_written))
    report = None
    if context.is_main:
        totals: Totals = writer.finish([each for failed, _ in of_all for each in failed])
        num_resumed = totals.num_images - sum(num_written for _, num_written in of_all)
        report = Report(*totals, num_resumed, dict(job.source.skipped))
        write_json(report.to_json(), out / SUMMARY)
    return context.gather(report)[0]


def predict_items(job: Job, writer: Writer, number: int, pending: Sequence[InputItem]) -> None:
    """Predict and write the pending items in this process, rasters, volumes and videos last; see `Engine.run`."""
    large: list[tuple[InputItem, Callable[[], None]]] = []
    progress = Progress("predict", number, "images", number - len(pending), job.shows_progress)
    with progress, _WriterThreads(writer.num_threads) as threads:
        for item, outcome in _outcomes(job, writer, pending):
            if outcome in _LARGE:
                write = getattr(writer, f"write_{outcome}")
                shown = {"progress": job.shows_progress} if outcome == "video" else {}
                large.append((item, partial(write, item, partial(_LARGE[outcome], job, item), **shown)))
                progress.skip()
                continue
            if isinstance(outcome, Exception):
                threads.submit(writer.fail, item, job.failure(item, outcome))
            else:
                threads.submit(writer.write, item, *outcome)
            progress.update()
    for item, predict in large:
        try:
            predict()
        except (ValueError, OSError) as error:
            if is_full(error):
                raise
            writer.fail(item, job.failure(item, error))


def _segment_raster(job: Job, item: InputItem, path: Path, **extras: Any) -> dict[str, Any]:
    segmenter, source = job.predictor.segmenter, job.source
    if not isinstance(source, FileSource):
        raise ValueError(f"{source.describe(item)} is no file; expected one for a raster")
    num_channels, num_rows = len(segmenter.processor.image_mean), segmenter.options.tile_size
    with source.open(item, num_channels, num_rows=num_rows) as raster:
        return segment_raster(
            segmenter,
            raster,
            path,
            palette=job.predictor.palette,
            progress=job.shows_progress,
            resumable=True,
            **extras,
        )


def _segment_volume(job: Job, item: InputItem, path_of: Callable[[str], Path]) -> dict[str, Any]:
    predictor, source, outputs = job.predictor, job.source, job.outputs
    if not isinstance(source, FileSource):
        raise ValueError(f"{source.describe(item)} is no file; expected one for a volume")
    processor = predictor.processor
    with source.open(item, len(processor.image_mean), any_range=processor.value_range is not None) as opened:
        volume = cast(VolumeReader, opened)
        return segment_volume(
            predictor,
            volume,
            path_of(volume.mask_suffix),
            masks_as=outputs.masks_as,
            keep_identity=outputs.keep_identity,
            progress=job.shows_progress,
        )


def _open_video(job: Job, item: InputItem) -> Any:
    if not hasattr(job.source, "open"):
        raise ValueError(f"{job.source.describe(item)} is no file; expected one for a video")
    return job.source.open(item, len(job.predictor.processor.image_mean))


# Of each kind that is no image, what its writer calls.
_LARGE: dict[Any, Callable[..., Any]] = {"raster": _segment_raster, "volume": _segment_volume, "video": _open_video}


def _outcomes(job: Job, writer: Writer, items: Sequence[InputItem]) -> Iterator[tuple[InputItem, Any]]:
    """Each item with its (prepared image, prediction), with its kind if it is no image, or with its error."""
    predictor, source, outputs = job.predictor, job.source, job.outputs
    processor = predictor.processor

    def prepare(item: InputItem) -> Any:
        kind = source.kind(item)
        if kind != "image":
            if getattr(writer, f"takes_{kind}s", False):
                return kind
            remedy = "predict videos without images, or give their names an ending such as .mp4"
            raise ValueError(
                f"{source.describe(item)} is a {kind} or damaged; expected an image for --format {outputs.kind}, "
                f"{remedy if kind == 'video' else job.remedy}"
            )
        image = source.read(item, len(processor.image_mean), any_range=processor.value_range is not None)
        return predictor.prepare(image, source.describe(item), keep_image=outputs.overlay)

    def segment(batch: list[Prepared]) -> list[tuple[Prepared, Prediction]]:
        predictions = predictor.predict(batch, with_probabilities=outputs.probabilities is not None)
        return list(zip(batch, predictions, strict=True))

    results = ReadAhead((partial(prepare, item) for item in items), segment, predictor.segmenter.batch_size)
    for item in items:
        try:
            yield item, next(results)
        except (ValueError, OSError) as error:
            yield item, error


class _WriterThreads:
    """Threads that write while the network computes; the first error is raised at one of the next images."""

    def __init__(self, number: int):
        self._number = number

    def __enter__(self) -> "_WriterThreads":
        self._pool, self._pending = ThreadPoolExecutor(self._number, "segformer-writes"), deque[Future]()
        return self

    def submit(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Call `work` in a thread."""
        self._pending.append(self._pool.submit(work, *arguments))
        while self._pending and (self._pending[0].done() or len(self._pending) > 4 * self._number):
            self._pending.popleft().result()

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()


def _settings(job: Job, writer: Writer) -> dict[str, Any]:
    """Settings that results depend on."""
    predictor, options = job.predictor, job.predictor.options
    processor = {
        name: value
        for name, value in predictor.processor.to_dict().items()
        if isinstance(value, int | float | list | dict)
    }
    settings = {
        **asdict(options),
        "dtype": str(predictor.model.dtype).removeprefix("torch."),
        "stride": options.effective_stride,
        "weights": digest_of_weights(predictor.model),
        "classes": list(predictor.names),
        "palette": [list(color) for color in predictor.palette],
        "bands": list(job.source.bands or ()),
        "axis": job.source.axis,
        "window": job.source.window,
        "ignore_exif": job.source.ignore_exif,
        "processor": {**processor, "size": dict(predictor.processor.size)},
        **asdict(job.outputs),
        "clear": list(job.outputs.clear),
        **writer.settings,
    }
    del settings["batch_size"]  # results do not depend on it, except for rounding
    if writer.settings:  # of a writer that divides the items by their places
        settings["images"] = _digest([job.source.origin(item) for item in job.items])
    return settings


def _check_settings(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Record the settings of a folder, or raise if its results were made with others."""
    if not path.exists():
        if any(any(path.parent.glob(pattern)) for pattern in _RESULTS):
            raise ValueError(
                f"{path.parent} holds masks without the {SETTINGS} that records how they were made: choose another "
                "output folder"
            )
        for folder in path.parent.glob(SPOOLS):  # rows of unknown settings, if not those of a job below
            if not any((above / SETTINGS).exists() for above in folder.parents if above.is_relative_to(path.parent)):
                shutil.rmtree(folder)
        write_json(settings, path)
        return settings
    held = read_json(path)
    settings = {**settings, **{name: held[name] for name in ("shard_size",) if name in held and name in settings}}
    for name in dict.fromkeys((*settings, *held)):
        if held.get(name) != settings.get(name):
            if name in ("weights", "images"):
                reason = f"was made with other {name}"
            else:
                changes = islice(differences(name, held.get(name), settings.get(name)), _MOST_NAMED)
                texts = [f"{each} {before}, which now is {now}" for each, before, now in changes]
                reason = f"was made with {' and '.join(texts)}"
            raise ValueError(f"{path.parent} {reason}: choose another output folder, or the same {name} to resume")
    return settings


def _identity(path: Path) -> dict[str, str]:
    """Identity of the run of a folder: digests of its weights, and of all its settings."""
    settings = read_json(path)
    return {"weights": settings["weights"], "run": _digest([json.dumps(settings, sort_keys=True)])}


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode(errors="surrogateescape")).hexdigest()[:16]


__all__ = ["Engine", "Job", "Report", "predict_batch", "predict_items"]
