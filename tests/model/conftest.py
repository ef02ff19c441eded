"""Fixtures of the model's tests."""

import pytest

from hf_segformer import cpu_decode_head_segformer, upsampling_segformer


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Let fast paths take the small images of tests, too; yield the sizes up to which they leave them to PyTorch."""
    modules = cpu_decode_head_segformer, upsampling_segformer
    sizes = {module: module._SMALL_SIZE for module in modules}
    for module in modules:
        monkeypatch.setattr(module, "_SMALL_SIZE", 0)
    return sizes
