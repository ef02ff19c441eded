"""Contexts that run fast paths or the reference and assert which of them ran, and comparisons."""

import os
from contextlib import contextmanager
from unittest import mock

import torch

from hf_segformer.dispatch_segformer import record_fast_paths, set_fast_paths

EXPECTED = "drop_path is active", "attention maps are asked for"


@contextmanager
def switched(enabled):
    """Switch fast paths on or off and yield the recorded calls."""
    with mock.patch.dict(os.environ), record_fast_paths() as calls:
        set_fast_paths(enabled)
        yield calls


@contextmanager
def fast():
    """Switch fast paths on; no operation may use the reference or the fold, except for an expected reason."""
    with switched(True) as calls:
        yield calls
    assert calls, "no operation was called"
    slow = [call for call in calls if call[1] in ("", "folded") and not call[2].startswith(EXPECTED)]
    assert not slow, slow


@contextmanager
def reference():
    """Switch fast paths off; no implementation may run but the reference."""
    with switched(False) as calls:
        yield calls
    assert calls, "no operation was called"
    assert not ran(calls)


@contextmanager
def recorded():
    """Switch fast paths on where something records the operations: only the reference and the fold may run."""
    with switched(True) as calls:
        yield calls
    assert calls, "no operation was called"
    assert ran(calls) <= {"folded"}, calls


def ran(calls):
    """Return the names of the implementations that ran."""
    return {name for _, name, _ in calls if name}


def count(calls, op):
    """Return how many calls of an operation an implementation ran."""
    return sum(bool(name) for called, name, _ in calls if called == op)


def value_and_gradient(function, tensor, scale=1.0):
    """Return `function` of a tensor, and the gradient of its sum, times `scale`, with respect to that tensor."""
    tensor = tensor.detach().requires_grad_()
    value = function(tensor)
    (value.sum() * scale).backward()
    return value.detach(), tensor.grad


def assert_near(found, expected, tolerance):
    """Assert equal shape and type, and values equal up to `tolerance` times the largest value."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert expected.isfinite().all()
    if expected.numel():
        difference = (found.double() - expected.double()).abs().max()
        assert difference <= tolerance * expected.double().abs().max().clamp(min=torch.finfo(torch.double).tiny)
