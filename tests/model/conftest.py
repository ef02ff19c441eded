"""Fixtures of the model's tests."""

import pytest


@pytest.fixture(autouse=True)
def _fast_on_small_images(small_sizes):
    """Fast paths are what most of these tests are about."""
