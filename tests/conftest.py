"""What all tests share: no network, one thread, a tiny network."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation

TINY = {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}

# Encoder, with a head of 150 classes, of 19 classes, and the ImageNet classifier (facts of the original code).
PARAMETERS = {
    "b0": (3_319_392, 3_752_694, 3_719_027, 3_576_392),
    "b1": (13_151_424, 13_715_798, 13_682_131, 13_664_424),
    "b2": (24_196_288, 27_461_974, 27_361_235, 24_709_288),
    "b3": (44_072_128, 47_337_814, 47_237_075, 44_585_128),
    "b4": (60_842_688, 64_108_374, 64_007_635, 61_355_688),
    "b5": (81_443_008, 84_708_694, 84_607_955, 81_956_008),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


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


def logits_of(model, images):
    with torch.no_grad():
        return model(images).logits


def assert_same(first, second):
    """Float32 equality but for the order of sums: two forms of the head round differently."""
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
