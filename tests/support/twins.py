"""Running something fast and plain, and making sure that it ran so."""

import os
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from hf_segformer.dispatch_segformer import set_fast_paths

_UPSAMPLING, _HEAD, _MODEL = (
    f"hf_segformer.{name}" for name in ("upsampling_segformer", "cpu_decode_head_segformer", "modeling_segformer")
)
# What must not be called while fast, and while plain; while compiling neither, but for the fold.
PLAIN = (
    *(f"{_UPSAMPLING}.reference_{name}" for name in ("cross_entropy", "argmax")),
    *(f"{_MODEL}.SegFormerDecodeHead.fuse_{name}" for name in ("plain", "folded")),
)
FAST = (
    *(f"{module}.parallel_for" for module in (_UPSAMPLING, _HEAD)),
    *(f"{_MODEL}.{name}" for name in ("decode", "decode_training", "attend", "mix")),
)


def _refuse(name):
    def refused(*_, **__):
        raise AssertionError(f"{name} was called")

    return refused


@contextmanager
def switched(enabled, never=()):
    """Fast paths on or off; to call a function that `never` names is an error."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        set_fast_paths(enabled)
        for name in never:
            stack.enter_context(mock.patch(name, _refuse(name)))
        yield


def fast():
    """Fast paths, and nothing but them."""
    return switched(True, PLAIN)


def plain():
    """Plain twins, and nothing but them."""
    return switched(False, [*FAST, f"{_MODEL}.SegFormerDecodeHead.fuse_folded"])


def value_and_gradient(function, tensor, scale=1.0):
    """`function` of a tensor, and the gradient of its sum, times `scale`, with respect to that tensor."""
    tensor = tensor.detach().requires_grad_()
    value = function(tensor)
    (value.sum() * scale).backward()
    return value.detach(), tensor.grad


def assert_near(found, expected, tolerance):
    """Equal in shape and type, and in value but for `tolerance` times the largest value."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert expected.isfinite().all()
    if expected.numel():
        difference = (found.double() - expected.double()).abs().max()
        assert difference <= tolerance * expected.double().abs().max().clamp(min=torch.finfo(torch.double).tiny)
