"""What all tests share: no network, one thread, a tiny network."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation
from tests.support.tiny import TINY


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def num_threads():
    """Set the number of threads, and restore it afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def tiny_config():
    """Makes a tiny configuration; keywords replace fields."""
    return lambda **overrides: SegFormerConfig(**{**TINY, "num_labels": 5, **overrides})


@pytest.fixture
def model(tiny_config):
    """A tiny segmentation model."""
    return SegFormerForSemanticSegmentation(tiny_config()).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 40, 72)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def interpreter():
    """Calls functions in a process where Triton was told to interpret before it was imported."""
    pytest.importorskip("triton")
    os.environ["TRITON_INTERPRET"] = "1"  # inherited, and taken back once the process is there
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_interpret)
    pool.submit(os.getpid).result()
    del os.environ["TRITON_INTERPRET"]
    yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result(timeout=200)
    pool.shutdown()
