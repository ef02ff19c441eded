"""Matrix products by oneDNN against PyTorch's own: values, gradients, and where each of them computes."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from hf_segformer import cpu_runtime_segformer
from hf_segformer.cpu_runtime_segformer import find_onednn, linear, multiply_over_rows
from tests.support.twins import assert_near

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
SHAPES = [(1, 1, 1), (7, 5, 3), (64, 3, 130), (33, 150, 16)]  # rows, columns, outputs


def samples(rows, columns, outputs, dtype):
    torch.manual_seed(0)
    shapes = (rows, columns), (outputs, columns), (outputs,), (rows, outputs)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.fixture(params=["oneDNN", "without"])
def library(request):
    """Where products are computed."""
    if request.param == "oneDNN":
        yield
    else:
        with mock.patch.object(cpu_runtime_segformer, "find_onednn", return_value=None):
            yield


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("library")
def test_a_product_with_what_is_added(shape, dtype):
    tokens, weight, bias, added = samples(*shape, dtype)
    before = added.clone()
    for given_bias in (None, bias):
        expected = F.linear(tokens, weight, given_bias)
        assert_near(linear(tokens, weight, given_bias), expected, TOLERANCE[dtype])
        assert_near(linear(tokens, weight, given_bias, added), expected + added, TOLERANCE[dtype])
    assert_near(linear(tokens[None, :, None], weight)[0, :, 0], tokens @ weight.t(), TOLERANCE[dtype])
    torch.testing.assert_close(added, before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("library")
def test_a_product_over_rows(shape, dtype):
    tokens, _, _, added = samples(*shape, dtype)
    for left, right in ((tokens, added), (added, tokens)):
        assert_near(multiply_over_rows(left, right), left.t() @ right, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("wanted", [(True, True, True, True), (True, False, False, False), (False, True, False, True)])
@pytest.mark.usefixtures("library")
def test_gradients(dtype, wanted):
    arguments = samples(12, 5, 8, dtype)
    for tensor, is_wanted in zip(arguments, wanted, strict=True):
        tensor.requires_grad_(is_wanted)
    leaves = [tensor for tensor in arguments if tensor.requires_grad]
    tokens, weight, bias, added = arguments
    factor = torch.randn(12, 8, dtype=dtype)
    expected = torch.autograd.grad(((F.linear(tokens, weight, bias) + added) * factor).sum(), leaves)
    found = torch.autograd.grad((linear(*arguments) * factor).sum(), leaves)
    for gradient, other in zip(found, expected, strict=True):
        assert_near(gradient, other, TOLERANCE[dtype])


def test_a_second_derivative_is_refused():
    tokens, weight, bias, _ = samples(4, 3, 2, torch.float32)
    product = linear(tokens.requires_grad_(), weight, bias)
    with pytest.raises(RuntimeError, match="set_fast_paths"):
        torch.autograd.grad(product.square().sum(), tokens, create_graph=True)


def test_onednn_takes_float32_without_a_gradient():
    tokens = torch.randn(2, 3)
    assert (find_onednn("_linear_pointwise", tokens) is not None) == torch.backends.mkldnn.is_available()
    assert find_onednn("_linear_pointwise", tokens.double()) is None
    assert find_onednn("_linear_pointwise", tokens.requires_grad_()) is None
    assert find_onednn("_linear_pointwise", torch.empty(2, 3, device="meta")) is None
    assert find_onednn("no_such_operation", tokens.detach()) is None
    with mock.patch.object(torch.backends, "mkldnn", mock.Mock(enabled=False)):
        assert find_onednn("_linear_pointwise", tokens.detach()) is None
