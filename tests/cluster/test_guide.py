"""The commands of docs/guides/cluster.md: on a cluster that the command starts, and on one that runs."""

import os
import re
import shlex
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import psutil
import pytest

from hf_segformer import SegFormerImageProcessor
from tests.inference.test_predictor import lively, make_image
from tests.support import object_storage
from tests.support.commands import run

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray warns of what it will change

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "cluster.md"


@pytest.fixture
def no_process_is_left():
    """End what Ray started, even if a command failed, and check that nothing was left to end."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    was_running = ray.is_initialized()
    ray.shutdown()
    _, alive = psutil.wait_procs(
        [process for process in psutil.Process().children(recursive=True) if process.pid not in before], timeout=60
    )
    for process in alive:
        process.kill()
    assert not was_running
    assert not alive


def test_the_commands_of_the_guide_run(tmp_path, monkeypatch, capfd, no_process_is_left):
    monkeypatch.chdir(tmp_path)
    lively().save_pretrained("model")
    SegFormerImageProcessor(do_resize=False).save_pretrained("model")
    Path("images").mkdir()
    objects = {}
    for index in range(6):
        make_image(40, 60, seed=index).save(f"images/{index}.png")
        content = BytesIO()
        make_image(40, 60, seed=index).save(content, "PNG")
        objects[f"drives/{index}.png"] = content.getvalue()
    page = PAGE.read_text()
    commands = re.findall(r"^segformer (.*)$", page.replace("\\\n", " "), flags=re.MULTILINE)
    assert len(commands) == 2
    assert run("predict", "model", "images", "-o", "other", "--engine", "ray", "--ray-address", "127.0.0.1:1") == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error == "segformer: Ray at 127.0.0.1:1 cannot be reached: Connection refused"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 80 << 20})
    try:
        with object_storage.s3(objects) as pattern:
            small = {"MODEL": "model", "s3://BUCKET/drives": pattern.format("drives"), "2:16": "1:2", "0.5": "0"}
            small["HOST:6379"] = cluster.address
            for command in commands:
                words = [small.get(word, word) for word in shlex.split(command)]
                done = subprocess.run([sys.executable, "-m", "hf_segformer", *words], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                assert done.stdout.startswith("6 images predicted in ")
    finally:
        cluster.shutdown()
    [example] = [block for block in re.findall(r"^```py\n(.*?)^```", page, re.M | re.S) if "pyarrow" in block]
    found: dict = {}
    exec(example, found)
    assert found["table"].column("name").to_pylist() == [str(index) for index in range(6)]
    for path in Path("results").iterdir():
        assert b"SECRET" not in path.read_bytes()
    stored = found["parquet"].read_table(sorted(found["glob"]("results/*.parquet")))
    assert stored.column("mask").to_pylist() == found["table"].column("mask").to_pylist()
