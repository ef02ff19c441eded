"""Batch inference by Ray Data: an autoscaled pool of actors, each of which holds the model and predicts shards.

The driver, the process that the user starts, lists the images, fixes the shards and writes their files. Actors send it
the bytes of whole shards, so that only the driver needs the output folder, and a process that dies leaves nothing
behind. The model travels through Ray's object store: all actors have the weights whose digest the folder records.
"""

import gc
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, cast

from transformers.utils import logging as transformers_logging

from ..data.sources import FileSource, InputItem
from ..inference.batch import Job
from ..inference.parquet_writer import ParquetWriter
from ..inference.predictor import SegFormerPredictor, find_device
from ..inference.writers import Writer
from ..progress import Progress
from ..version import __version__
from .options import INSTALL, ClusterOptions
from .shards import Shard, ShardJob, decode_items, encode_items, shard_size
from .storage import StorageSource

logger = transformers_logging.get_logger(__name__)


class RayEngine:
    """Engine of `predict_batch` on a Ray cluster.

    A Ray that is initialised already is used as it is, and left running.

    Args:
        options: see `ClusterOptions`.

    Raises:
        ValueError: if Ray Data is not installed.
    """

    def __init__(self, options: ClusterOptions | None = None):
        require_ray()
        self.options = options or ClusterOptions()

    def shard_size(self, num_images: int, batch_size: int) -> int:
        """See `Engine`."""
        return shard_size(num_images, batch_size)

    def run(self, job: Job, writer: Writer, number: int, pending: Sequence[InputItem]) -> None:
        """See `Engine`.

        Raises:
            ValueError: if the job is none of files to Parquet, the predictor has an engine of its own, the cluster
                lacks what the options ask for, the nodes differ in versions or do not see the images, or a batch does
                not fit into memory.
            OSError: if the cluster cannot be reached, or a shard cannot be written.
        """
        if not isinstance(writer, ParquetWriter) or not isinstance(job.source, FileSource):
            raise ValueError("a cluster predicts files to Parquet; expected a FileSource and Outputs('parquet')")
        if job.predictor.segmenter.network is not job.predictor.segmenter.model:
            raise ValueError("the predictor has an engine of its own; expected one by PyTorch (engine='torch')")
        if job.context.num_processes > 1:
            raise ValueError(f"{job.context.num_processes} processes share this job; expected one, which starts actors")
        shards = writer.pending_shards()
        progress = Progress("predict", number, "images", number - len(pending), job.shows_progress)
        if not shards:
            return
        with _session(self.options), progress, _errors_of_ray():
            work = Work.of(job, writer, self.options)
            for shard, predicted in self._predicted(work, {each: writer.items_of(each) for each in shards}):
                writer.write_shard(shard, *predicted)
                progress.update(len(writer.items_of(shard)))

    def _predicted(self, work: "Work", items: dict[int, list[InputItem]]) -> Iterator[tuple[int, Shard]]:
        """Yield each shard when it is done, once."""
        import ray
        from ray.data import ActorPoolStrategy, from_items

        options = self.options
        rows = [{"shard": shard, "items": encode_items(each)} for shard, each in items.items()]
        least = min(options.actors[0], len(rows))  # of more actors some would have nothing to do
        most = min(options.actors[1] or len(rows), len(rows))
        dataset = from_items(rows, override_num_blocks=len(rows)).map_batches(
            _ShardPredictor,
            batch_size=1,
            compute=ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=1),
            fn_constructor_args=(ray.put(work), _attempts()),
            num_cpus=options.cpus_per_actor,
            num_gpus=options.gpus_per_actor or None,
        )
        for row in dataset.iter_rows():
            if row["error"]:
                raise ValueError(row["error"])
            yield row["shard"], Shard(row["content"], row["num_written"])


@dataclass(frozen=True)
class Work:
    """The work of a job, as every actor gets it from the driver.

    Attributes:
        job: with the model on the CPU.
        options: see `ClusterOptions`.
        versions: of the packages that the results depend on.
        cwd: working folder, below which relative paths are.
        folder: a folder that holds all images; empty for object storage.
    """

    job: ShardJob
    options: ClusterOptions
    versions: dict[str, str]
    cwd: str
    folder: str

    @classmethod
    def of(cls, job: Job, writer: ParquetWriter, options: ClusterOptions) -> "Work":
        """Collect it on the driver."""
        source = cast(FileSource, job.source)
        paths = [] if isinstance(source, StorageSource) else [os.path.abspath(str(item.source)) for item in job.items]
        folder = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
        shard_job = ShardJob(job.predictor, source.without_items(), job.outputs, writer.identity)
        return cls(shard_job, options, _versions(), os.getcwd(), folder)

    def on_this_node(self) -> ShardJob:
        """The job with the model on the device of this actor.

        Raises:
            ValueError: if this node has other versions, does not see the images, or lacks the GPU.
        """
        import torch

        node, versions = socket.gethostname(), _versions()
        for name, expected in self.versions.items():
            if versions[name] != expected:
                raise ValueError(f"node {node} has {name} {versions[name]}; expected {expected}, as the driver has")
        with suppress(OSError):  # another node need not have it, if all paths are absolute
            os.chdir(self.cwd)
        if self.folder and not os.path.isdir(self.folder):
            raise ValueError(
                f"node {node} does not see {self.folder}; expected a folder that all nodes share, or object storage"
            )
        torch.set_num_threads(self.options.cpus_per_actor)
        predictor = self.job.predictor
        if self.options.gpus_per_actor:
            predictor = SegFormerPredictor(predictor.model.to(_gpu(node)), predictor.processor, predictor.options)
        return replace(self.job, predictor=predictor)


class _ShardPredictor:
    """Callable of the actors; it is set up in its first call, whose errors reach the driver as a row."""

    def __init__(self, work: Any, attempts: Any):
        self._work, self._attempts = work, attempts
        self._job: ShardJob | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        [shard], [items] = batch["shard"].tolist(), batch["items"].tolist()
        try:
            predicted, error = self._predict(shard, decode_items(items)), ""
        except (ValueError, OSError) as reason:
            predicted, error = Shard(b"", 0), str(reason) or type(reason).__name__
        return {
            "shard": [shard],
            "content": [predicted.content],
            "num_written": [predicted.num_written],
            "error": [error],
        }

    def _predict(self, shard: int, items: list[InputItem]) -> Shard:
        import ray

        number = ray.get(self._attempts.begin.remote(shard))
        work = ray.get(self._work)
        if number > work.options.retries + 1:
            return work.job.fail(items, f"the process that predicted its shard of {len(items)} died {number - 1} times")
        self._job = self._job or work.on_this_node()
        return self._job.predict(items)


class _Attempts:
    """Counter of how often each shard was begun.

    Ray repeats the task of a dead actor without limit, or with a limit that counts the tasks that were waiting for it,
    too.
    """

    def __init__(self):
        self._begun: Counter[int] = Counter()

    def begin(self, shard: int) -> int:
        """Number of the attempt that begins now, from 1."""
        self._begun[shard] += 1
        return self._begun[shard]


def _attempts() -> Any:
    """A counter that lives on the node of the driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(_Attempts).remote()


@contextmanager
def _session(options: ClusterOptions) -> Iterator[None]:
    """Ray within the block; a cluster that was started for it ends with it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    is_own = not ray.is_initialized()
    if is_own:
        _start(options)
    elif options.address is not None:
        raise ValueError(f"address is {options.address}, but Ray is initialised already; expected no address")
    try:
        _check_resources(options)
        with _settings_of_ray_data(options), _quiet():
            yield
    finally:
        if is_own:
            gc.collect()  # handles of this session's actors, whose numbers those of the next session have again
            ray.shutdown()


@contextmanager
def _settings_of_ray_data(options: ClusterOptions) -> Iterator[None]:
    """Settings that have no argument of their own, within the block."""
    from ray.data import DataContext

    context = DataContext.get_current()
    scaling = context.autoscaling_config
    wanted: list[tuple[Any, str, Any]] = [
        (context, "enable_progress_bars", False),
        (context, "print_on_execution_start", False),
        (context, "max_consecutive_actor_init_deaths", options.retries),
        # With one task at a time an actor's utilization is 1 at most: a shard that kills its process takes no other.
        (scaling, "actor_pool_util_upscaling_threshold", 1.0),
    ]
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in wanted]
    try:
        for holder, name, value in wanted:
            setattr(holder, name, value)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def _start(options: ClusterOptions) -> None:
    """Start Ray on this machine, or connect to a cluster.

    Raises:
        OSError: if that fails.
    """
    if options.address not in (None, "auto"):
        _check_connection(str(options.address))
    import ray

    where = {"address": options.address} if options.address else {"address": "local", "include_dashboard": False}
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of no narrower type where a process of Ray does not start in time
        ray.shutdown()
        place = f"at {options.address} cannot be reached" if options.address else "cannot be started on this machine"
        raise OSError(f"Ray {place}: {_last_line(error)}") from error


def _check_connection(address: str) -> None:
    """Raise OSError where nothing answers; Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=20).close()
    except OSError as error:
        raise OSError(f"Ray at {address} cannot be reached: {error.strerror or error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Ray Data on the console: its errors are raised, and its log has the rest."""
    consoles = [each for each in logging.getLogger("ray.data").handlers if isinstance(each, logging.StreamHandler)]
    levels = [console.level for console in consoles]
    for console in consoles:
        console.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for console, level in zip(consoles, levels, strict=True):
            console.setLevel(level)


def _check_resources(options: ClusterOptions) -> None:
    """Raise ValueError where no node can hold an actor; a cluster at an address may add such a node."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for option, kind in (("gpus_per_actor", "GPU"), ("cpus_per_actor", "CPU")):
        wanted, most = getattr(options, option), max(node.get(kind, 0) for node in nodes)
        if wanted > most and options.address is None:
            raise ValueError(f"{option} is {wanted}; expected at most {most:g}, as this machine has")
        if wanted > most:
            logger.warning(f"No node of the cluster has {wanted:g} {kind}s: prediction waits for one.")


@contextmanager
def _errors_of_ray() -> Iterator[None]:
    """Errors of the cluster in one line; those of the program itself keep their traceback."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError:
        raise
    except RayError as error:
        raise ValueError(f"Ray ended the job: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    """The last line of a message, of which Ray's may be a whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return lines[-1] if lines else type(error).__name__


def _gpu(node: str) -> Any:
    """The GPU that Ray gave to this actor."""
    import torch

    if not torch.accelerator.is_available():
        raise ValueError(f"node {node} has no GPU that PyTorch sees; expected one, or gpus_per_actor 0")
    return find_device()


def _versions() -> dict[str, str]:
    """Versions of the packages that results depend on, without the kind of build."""
    others = {name: version(name).partition("+")[0] for name in ("torch", "transformers")}
    return {"hf_segformer": __version__, **others}


def require_ray() -> None:
    """Raise ValueError if Ray is not installed."""
    if find_spec("ray") is None:
        raise ValueError(f"a cluster needs Ray Data: {INSTALL}")


__all__ = ["RayEngine", "Work", "require_ray"]
