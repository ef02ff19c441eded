"""Fixtures of all tests: no network, one thread, a tiny network, and one trained run per session."""

import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Threads that PyTorch and oneDNN start in this process and its children would compete with the other test processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from hf_segformer import (
    SegFormerConfig,
    SegFormerForSemanticSegmentation,
    cpu_decode_head_segformer,
    upsampling_segformer,
)
from tests.support.tiny import TINY


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def small_sizes(monkeypatch):
    """Let fast paths take the small images of a test, too; return the sizes up to which they leave them to PyTorch.

    Not for runs that are compared with those of other processes or fixtures, which do not see the change.
    """
    modules = cpu_decode_head_segformer, upsampling_segformer
    sizes = {module: module._SMALL_SIZE for module in modules}
    for module in modules:
        monkeypatch.setattr(module, "_SMALL_SIZE", 0)
    return sizes


@pytest.fixture
def num_threads():
    """Set the number of threads, and restore it afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def tiny_config():
    """Make a tiny configuration; keywords replace fields."""
    return lambda **overrides: SegFormerConfig(**{**TINY, "num_labels": 5, **overrides})


@pytest.fixture
def model(tiny_config):
    """A tiny segmentation model."""
    return SegFormerForSemanticSegmentation(tiny_config()).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 40, 72)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """The folder of a finished run on generated shapes, trained once per session: read only, see `trained_run_copy`.

    8 steps, 6 to the epoch, with checkpoints at 4 and 8, on 24 images of 32x32, and 6 for evaluation.
    """
    from tests.support.training import train

    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train(folder, "trainer.max_steps=8", "trainer.save_steps=4") == 0
    return folder


@pytest.fixture
def trained_run_copy(trained_run, tmp_path):
    """A copy of `trained_run` that the test may change."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def interpreter():
    """Call functions in a process in which Triton interprets kernels: it reads TRITON_INTERPRET when imported."""
    pytest.importorskip("triton")
    os.environ["TRITON_INTERPRET"] = "1"  # for the process to inherit; removed once it runs
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_interpret)
    pool.submit(os.getpid).result()
    del os.environ["TRITON_INTERPRET"]
    yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result(timeout=200)
    pool.shutdown()
