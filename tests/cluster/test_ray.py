"""A local Ray cluster of two workers: equal bits with one process, killed workers, lost nodes, bad images."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyarrow import parquet

from hf_segformer import SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.cluster.options import ClusterOptions
from hf_segformer.cluster.shards import ShardJob
from hf_segformer.config import InferenceOptions
from hf_segformer.data.sources import FileSource
from hf_segformer.inference.batch import predict_batch
from hf_segformer.inference.writers import Outputs
from tests.inference.test_predictor import lively, make_image

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from hf_segformer.cluster.engine import RayEngine  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray warns of what it will change

MEMORY = 80 << 20  # of each node's object store, whose least is 75 MiB
BAD, NUMBER, BATCH = "cut.png", 47, 2


@pytest.fixture(scope="module")
def cluster():
    """A node of one CPU, with the head of the cluster and the driver."""
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": MEMORY})
    try:
        started.connect()
        yield started
    finally:
        ray.shutdown()
        started.shutdown()


@pytest.fixture
def node(cluster):
    """A second node of one CPU, which ends with the test."""
    added = cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    yield added
    if added in cluster.worker_nodes:
        cluster.remove_node(added)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of two sizes, and one that is none."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(NUMBER):
        make_image(*[(40, 60), (50, 36)][index % 3 % 2], seed=index).save(folder / f"{index:03d}.png")
    (folder / BAD).write_text("no image")
    return folder


class WatchedSource(FileSource):
    """Reads slowly, leaves a file for each process that reads, and kills the one that reads the image `deadly`.

    Reading begins when `least` processes do, so that none has done all the work before another one has started.
    """

    pause, deadly, trace, least = 0.0, "", "", 0

    def read(self, item, num_channels=3, **options):
        if self.trace:
            Path(self.trace, str(os.getpid())).touch()
            while len(os.listdir(self.trace)) < self.least:
                time.sleep(0.05)
        time.sleep(self.pause)
        if item.name == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(item, num_channels, **options)


def predictor():
    return SegFormerPredictor(lively(), SegFormerImageProcessor(do_resize=False), InferenceOptions(batch_size=BATCH))


def predict(images, out, options=None, **behaviour):
    source = WatchedSource([str(images)], out)
    vars(source).update(behaviour)
    engine = RayEngine(options or ClusterOptions(actors=(2, 2)))
    return predict_batch(predictor(), source, out, Outputs("parquet"), progress=False, engine=engine)


def shards(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("masks-*.parquet"))}


def rows(out):
    return [row for path in sorted(out.glob("masks-*.parquet")) for row in parquet.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def expected(images):
    """The shards of one process, which is this one and knows no Ray."""
    source = FileSource([str(images)], images / "out")
    items = source.items()
    starts = range(0, len(items), BATCH)

    def predicted(out):
        about = parquet.read_metadata(next(out.glob("masks-*"))).metadata
        identity = {name: about[name.encode()].decode() for name in ("weights", "run")}
        job = ShardJob(predictor(), source, Outputs("parquet"), identity)
        return [job.predict(items[start : start + BATCH]).content for start in starts]

    return predicted


def assert_complete(images, out, report, expected, failed=("cut",)):
    names = sorted(path.stem for path in images.glob("*.png"))
    found = rows(out)
    assert [row["name"] for row in found] == names
    assert [row["name"] for row in found if row["error"] is not None] == list(failed)
    assert (report.num_images, [each["name"] for each in report.failed]) == (len(names) - len(failed), list(failed))
    assert list(shards(out).values()) == expected(out)
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".parquet") == ["settings.json", "summary.json"]


@pytest.fixture
def trace(tmp_path):
    """A folder with a file for each process that has read an image, named by its number."""
    folder = tmp_path / "trace"
    folder.mkdir()
    return folder


@contextmanager
def killing_meanwhile(out, kill):
    """Call a function in the middle of the block: as soon as some shards are there."""
    seen: list[int] = []
    is_done = threading.Event()

    def watch():
        while not is_done.wait(0.02):
            if (number := len(list(out.glob("masks-*")))) >= 3:
                seen.append(number)
                kill()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()
    assert seen, "nothing was killed"
    assert seen[0] < NUMBER // BATCH - 3, "it was killed when hardly anything was left to do"


def test_a_node_that_is_lost_changes_nothing(cluster, node, images, tmp_path, trace, expected):
    out = tmp_path / "out"
    with killing_meanwhile(out, lambda: cluster.remove_node(node, allow_graceful=False)):
        report = predict(images, out, pause=0.2, trace=str(trace), least=2)  # nodes have one CPU: one process on each
    assert [each["NodeID"] for each in ray.nodes() if each["Alive"]] == [cluster.head_node.node_id]
    assert_complete(images, out, report, expected)


def test_workers_that_die_change_nothing_and_a_run_is_resumed(node, images, tmp_path, trace, expected, monkeypatch):
    out, killed = tmp_path / "out", []

    def kill():
        killed.append(max(trace.iterdir(), key=lambda path: path.stat().st_mtime_ns).name)  # it reads an image now
        os.kill(int(killed[0]), signal.SIGKILL)

    with killing_meanwhile(out, kill):
        options = ClusterOptions(actors=(1, 2), retries=1)  # which scales to two, else reading would not begin
        report = predict(images, out, options, pause=0.2, trace=str(trace), least=2, deadly="040")
    assert len(list(trace.iterdir())) >= 4, "two died, and others took their place"
    errors = {each["name"]: each["error"] for each in report.failed}
    assert sorted(errors) == ["040", "041", "cut"]
    assert errors["041"] == f"{images / '041.png'}: the process that predicted its shard of 2 died 2 times"
    assert len(rows(out)) == NUMBER + 1

    sorted(out.glob("masks-*"))[20].unlink()  # the shard of the deadly image, as the guide says
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("masks-*")}
    report = predict(images, out, deadly="000")  # an image which is there, and so not read again
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert report.num_resumed == NUMBER - BATCH
    assert_complete(images, out, report, expected)

    monkeypatch.setattr("hf_segformer.cluster.engine._session", None)  # nothing is started where all is done
    assert predict(images, out).num_resumed == NUMBER


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus_per_actor": 0.5}, "gpus_per_actor is 0.5; expected at most 0, as this machine has"),
        ({"cpus_per_actor": 2}, "cpus_per_actor is 2; expected at most 1, as this machine has"),
        ({"address": "auto"}, "address is auto, but Ray is initialised already"),
    ],
)
def test_what_the_cluster_lacks_is_named(cluster, images, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        predict(images, tmp_path / "out", ClusterOptions(**options))
