"""Cross entropy and argmax at full size: the fast paths against the reference, and the reference against PyTorch."""

import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.config import InferenceOptions
from hf_segformer.inference.segmenter import predict
from hf_segformer.training.losses import SegmentationLoss
from hf_segformer.upsampling_segformer import (
    reference_argmax,
    reference_cross_entropy,
    upsample_argmax,
    upsample_cross_entropy,
)
from tests.support.fast_paths import assert_near, fast, recorded, reference, switched, value_and_gradient
from tests.support.tiny import TINY

# Of one operation after another in float32, each off by half a step (6e-8), with sums over a few thousand pixels;
# measured over hypothesis' examples: at most 2e-6.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
LAYOUTS = {
    "contiguous": lambda logits: logits.contiguous(),
    "channels last": lambda logits: logits.contiguous(memory_format=torch.channels_last),
    "strided": lambda logits: torch.stack([logits, -logits], dim=-1)[..., 0],
    "a part": lambda logits: F.pad(logits, (1, 2, 2, 1, 1, 0))[:, 1:, 2:-1, 1:-2],
    "turned": lambda logits: logits.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda logits: logits[:, :, :1, :1].expand_as(logits),
}
SIDES = st.one_of(st.integers(1, 9), st.sampled_from([16, 33]))
NEW_SIDES = st.one_of(st.integers(1, 12), st.sampled_from([31, 32, 33, 64, 65, 100]))
examples = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def batches(draw, dtypes=(torch.float64, torch.float32)):
    """Draw logits and labels: any ratio of sizes, any layout, with or without ignored pixels."""
    batch, classes = draw(st.integers(1, 3)), draw(st.sampled_from([2, 2, 3, 5, 19]))
    grid = draw(SIDES), draw(SIDES)
    size = draw(st.one_of(st.just(grid), st.just((4 * grid[0], 4 * grid[1])), st.tuples(NEW_SIDES, NEW_SIDES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    spread = draw(st.sampled_from([0.1, 1.0, 8.0]))
    logits = spread * torch.randn(batch, classes, *grid, dtype=torch.float64, generator=generator)
    logits = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](logits.to(draw(st.sampled_from(dtypes))))
    labels = torch.randint(classes, (batch, *size), generator=generator)
    ignore_index = draw(st.sampled_from([255, -100, 0]))
    ignored = torch.rand(labels.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.97]))
    return logits, labels.masked_fill(ignored, ignore_index), ignore_index


@st.composite
def options_of(draw, classes):
    """Draw keywords of the loss: class weights, with zeros among them, and smoothing."""
    options = {"label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]))}
    weights = draw(st.one_of(st.none(), st.lists(st.sampled_from([0.0, 0.3, 1.0, 7.0]), min_size=1, max_size=classes)))
    if weights is not None:
        weights = (weights * classes)[:classes]
        options["weight"] = torch.tensor(weights) if any(weights) else None
    return options


def batch(num_classes=5, dtype=torch.float32, size=(13, 21)):
    """Return logits (2, K, 4, 6) and labels, some of them ignored."""
    labels = torch.randint(max(num_classes, 2), (2, *size))
    labels[0, :3, 4:] = 255
    return 3 * torch.randn(2, num_classes, 4, 6, dtype=dtype), labels


def both(logits, labels, scale=1.0, **options):
    """Return loss and gradient of the reference and of the fast path."""
    with reference():
        expected = value_and_gradient(lambda given: upsample_cross_entropy(given, labels, **options), logits, scale)
    with fast():
        found = value_and_gradient(lambda given: upsample_cross_entropy(given, labels, **options), logits, scale)
    return expected, found


def assert_equals_reference(logits, labels, tolerance, **options):
    # In float64: PyTorch's gradient of interpolation in float32 adds up thousands of pixels one by one. From a single
    # logit to 200x200 it is 3e-5 off, the fast path 3e-7.
    expected, _ = both(logits.double(), labels, **options)
    _, found = both(logits, labels, **options)
    for right, ours in zip(expected, found, strict=True):
        # Where all labels are right the loss is nearly 0, and so is every gradient: then what counts is the terms.
        floor = tolerance * 1e-2
        assert ours.dtype == logits.dtype
        assert ours.shape == right.shape
        assert (ours - right).abs().max() <= tolerance * right.abs().max() + floor
    return expected, found


# The reference is PyTorch's


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("num_classes", [1, 2, 5])
def test_the_reference_loss_equals_pytorch(num_classes, label_smoothing, weighted):
    logits, labels = batch(num_classes, torch.float64)
    weight = torch.linspace(0.5, 2, max(num_classes, 2)).double() if weighted else None
    options = {"weight": weight, "label_smoothing": label_smoothing}

    def by_definition(logits):
        full = F.interpolate(logits, size=(13, 21), mode="bilinear", align_corners=False)
        if num_classes == 1:
            full = torch.cat([torch.zeros_like(full), full], dim=1)
        return F.cross_entropy(full, labels, ignore_index=255, **options)

    expected = value_and_gradient(by_definition, logits)
    for function in (reference_cross_entropy, upsample_cross_entropy):
        found = value_and_gradient(lambda given, function=function: function(given, labels, **options), logits)
        for ours, right in zip(found, expected, strict=True):
            assert_near(ours, right, 1e-9)


def test_one_logit_is_the_binary_cross_entropy():
    logits, labels = batch(1, torch.float64)
    full = F.interpolate(logits, size=(13, 21), mode="bilinear", align_corners=False)[:, 0]
    counted = labels != 255
    expected = F.binary_cross_entropy_with_logits(full[counted], labels[counted].double())
    assert_near(upsample_cross_entropy(logits, labels), expected, 1e-9)


# The fast loss equals the reference


@examples
@given(data=st.data(), given_batch=batches())
def test_the_fast_loss_and_gradient_equal_the_reference(data, given_batch):
    logits, labels, ignore_index = given_batch
    options = data.draw(options_of(logits.shape[1]))
    assert_equals_reference(logits, labels, TOLERANCE[logits.dtype], ignore_index=ignore_index, **options)


@examples
@given(given_batch=batches([torch.bfloat16, torch.float16]))
def test_16_bit_logits_have_the_loss_of_float32_and_its_gradient_rounded_once(given_batch):
    logits, labels, ignore_index = given_batch
    (expected, wanted), (found, gradient) = both(logits, labels, ignore_index=ignore_index)
    assert found.dtype == torch.float32
    assert (found - expected).abs() <= 1e-5 * expected + 1e-7
    assert gradient.dtype == logits.dtype
    step = torch.finfo(logits.dtype)
    # One step apart where float32's error decides which way to round; below the normal range steps are even.
    assert (gradient.double() - wanted.double()).abs().le(1.01 * step.eps * wanted.double().abs() + 2e-7).all()


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_may_be_of_any_integer_type(kind):
    logits, labels = batch(dtype=torch.float64)
    (expected, wanted), _ = both(logits, labels)
    ignore_index = 100 if kind == torch.int8 else 255
    given = labels.masked_fill(labels == 255, ignore_index).to(kind)
    for found, gradient in both(logits, given, ignore_index=ignore_index):
        assert_near(found, expected, 1e-9)
        assert_near(gradient, wanted, 1e-9)


def test_labels_may_be_strided():
    logits, labels = batch(dtype=torch.float64)
    for strided in (labels.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([labels, labels], -1)[..., 1]):
        assert not strided.is_contiguous()
        assert_near(both(logits, strided)[1][1], both(logits, labels)[0][1], 1e-9)


def test_many_classes_and_a_size_of_several_bands_and_windows():
    logits = 4 * torch.randn(2, 150, 40, 48, dtype=torch.float64)
    labels = torch.randint(150, (2, 160, 190))
    labels[1, 20:90] = 255
    assert_equals_reference(logits, labels, 1e-9)
    assert_equals_reference(logits.float(), labels, 1e-5, label_smoothing=0.1, weight=torch.rand(150))


@pytest.mark.parametrize("num_classes", [1, 2, 5])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_where_no_pixel_counts_the_loss_is_zero_without_gradient(num_classes, label_smoothing):
    logits = torch.randn(2, num_classes, 4, 6)
    labels = torch.full((2, 13, 21), 255)
    for enabled in (False, True):
        with switched(enabled):
            loss, gradient = value_and_gradient(
                lambda given: upsample_cross_entropy(given, labels, label_smoothing=label_smoothing), logits
            )
        assert loss.item() == 0
        assert not gradient.any()


def test_classes_without_weight_do_not_count_either():
    logits, labels = torch.randn(2, 3, 4, 6), torch.ones(2, 13, 21, dtype=torch.long)
    for loss, gradient in both(logits, labels, weight=torch.tensor([1.0, 0.0, 2.0])):
        assert loss.item() == 0
        assert not gradient.any()


def test_an_image_without_labels_gets_no_gradient():
    logits, labels = batch(dtype=torch.float64)
    labels[1] = 255
    (_, _), (loss, gradient) = assert_equals_reference(logits, labels, 1e-9)
    assert not gradient[1].any()
    alone = both(logits[:1], labels[:1])[1]
    assert_near(loss, alone[0], 1e-12)
    assert_near(gradient[:1], alone[1], 1e-12)


@pytest.mark.parametrize("shape", [(0, 13, 21), (2, 0, 21), (2, 13, 0)])
def test_an_empty_batch_has_a_loss_of_zero(shape):
    logits = torch.randn(shape[0], 3, 4, 6, requires_grad=True)
    labels = torch.zeros(shape, dtype=torch.long)
    if 0 in shape[1:]:
        with pytest.raises((ValueError, RuntimeError)):
            upsample_cross_entropy(logits, labels)
        return
    loss = upsample_cross_entropy(logits, labels)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e4, 1e8, 1e30])
def test_huge_logits_overflow_nowhere(dtype, size):
    """Neighbours that are sure of different classes: halfway, all logits are far below the maximum of both."""
    logits = torch.zeros(1, 4, 3, 4, dtype=dtype)
    winners = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0], [2, 2, 0, 1]])
    logits.scatter_(1, winners[None, None], size)
    labels = torch.randint(4, (1, 11, 17))
    (loss, _), _ = assert_equals_reference(logits, labels, 1e-5)
    assert loss > size / 10


def test_the_largest_logits_of_float16_overflow_nowhere():
    logits = torch.tensor([6e4, -6e4]).repeat(12).view(1, 4, 2, 3).half()
    labels = torch.randint(4, (1, 7, 9))
    for loss, gradient in both(logits, labels):
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_give_a_non_finite_loss(value):
    logits, labels = batch()
    logits[1, 2, 1, 3] = value
    for enabled in (False, True):
        with switched(enabled):
            assert not upsample_cross_entropy(logits, labels).isfinite()


# How losses are used


@pytest.mark.parametrize("scale", [128.0, -0.5, 0.0])
def test_gradients_scale_with_the_incoming_gradient(scale):
    logits, labels = batch(dtype=torch.float64)
    (_, expected), (_, found) = both(logits, labels, scale)
    assert_near(found, expected, 1e-9)
    torch.testing.assert_close(found, scale * both(logits, labels)[1][1], rtol=1e-12, atol=0)


def test_a_loss_may_be_used_twice_and_computed_twice():
    logits, labels = batch(dtype=torch.float64)
    _, (value, gradient) = both(logits, labels)
    with fast():
        given = logits.clone().requires_grad_()
        loss = upsample_cross_entropy(given, labels)
        (loss + loss**2).backward(retain_graph=True)
        torch.testing.assert_close(given.grad, (1 + 2 * value) * gradient, rtol=1e-12, atol=1e-15)
        loss.backward()
        torch.testing.assert_close(given.grad, (2 + 2 * value) * gradient, rtol=1e-12, atol=1e-15)
        given.grad = None
        (upsample_cross_entropy(given, labels) + upsample_cross_entropy(2 * given, labels)).backward()
    with reference():
        expected = logits.clone().requires_grad_()
        (upsample_cross_entropy(expected, labels) + upsample_cross_entropy(2 * expected, labels)).backward()
    assert_near(given.grad, expected.grad, 1e-9)


def test_inputs_are_not_modified():
    logits, labels = batch()
    weight = torch.rand(5)
    copies = logits.clone(), labels.clone(), weight.clone()
    with fast():
        value_and_gradient(lambda given: upsample_cross_entropy(given, labels, weight=weight), logits)
        upsample_argmax(logits, (13, 21), with_probability=True)
    assert all(map(torch.equal, (logits, labels, weight), copies))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_without_gradients_there_is_a_loss_without_history(guard):
    logits, labels = batch(dtype=torch.float64)
    expected = both(logits, labels)[0][0]
    with fast(), guard():
        found = upsample_cross_entropy(logits, labels)
        if guard is not torch.enable_grad:
            assert torch.equal(upsample_cross_entropy(logits.clone().requires_grad_(), labels), found)
    assert not found.requires_grad
    assert_near(found.clone(), expected, 1e-9)


def test_autocast_changes_nothing():
    logits, labels = batch()
    with fast():
        expected = value_and_gradient(lambda given: upsample_cross_entropy(given, labels), logits)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = value_and_gradient(lambda given: upsample_cross_entropy(given, labels), logits)
            labelled = upsample_argmax(logits, (13, 21), with_probability=True)
        again = upsample_argmax(logits, (13, 21), with_probability=True)
    for ours, right in zip((*found, *labelled), (*expected, *again), strict=True):
        assert ours.dtype == right.dtype
        assert torch.equal(ours, right)


def test_a_second_derivative_is_refused_rather_than_wrong():
    """If the gradient counted as a constant, the penalty would be missing from the result."""
    logits, labels = batch(dtype=torch.float64)
    logits.requires_grad_()

    def with_penalty():
        loss = upsample_cross_entropy(logits, labels)
        [gradient] = torch.autograd.grad(loss, logits, create_graph=True)
        (loss + gradient.square().sum()).backward()

    with fast(), pytest.raises(RuntimeError, match=r"set_fast_paths\(False\)"):
        with_penalty()
    logits.grad = None
    with reference():
        with_penalty()
    assert (logits.grad - both(logits, labels)[0][1]).abs().max() > 1e-9


def test_backward_hooks_and_retained_gradients_see_the_gradient():
    logits, labels = batch(dtype=torch.float64)
    expected, seen = both(logits, labels)[0][1], []
    with fast():
        given = (2 * logits.clone().requires_grad_()) / 2
        given.retain_grad()
        given.register_hook(seen.append)
        upsample_cross_entropy(given, labels).backward()
    assert_near(given.grad, expected, 1e-9)
    assert_near(seen[0], expected, 1e-9)


WRONG = {
    "a class too many": (lambda labels: labels.masked_fill(labels == 4, 5), "hold 5; expected classes 0 to 4, or 255"),
    "a negative one": (lambda labels: labels.masked_fill(labels == 4, -100), "hold -100"),
    "no integers": (lambda labels: labels.float(), "torch.float32.*integers"),
    "a channel": (lambda labels: labels[:, None], r"\(2, 1, 13, 21\)"),
    "another batch": (lambda labels: labels[:1], r"\(1, 13, 21\)"),
}


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_wrong_labels_are_refused(spoil, message, enabled):
    logits, labels = batch()
    with switched(enabled), pytest.raises(ValueError, match=message):
        upsample_cross_entropy(logits, spoil(labels))


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize(("num_classes", "number"), [(5, 4), (5, 6), (1, 1)])
def test_weights_must_be_as_many_as_classes(num_classes, number, enabled):
    logits, labels = batch(num_classes)
    with (
        switched(enabled),
        pytest.raises(
            ValueError, match=rf"weight has shape \({number},\); expected one for each of {max(num_classes, 2)} classes"
        ),
    ):
        upsample_cross_entropy(logits, labels, weight=torch.ones(number))


# Where the fast path could be wrong, the reference runs


class Loss(torch.nn.Module):
    def forward(self, logits, labels):
        return upsample_cross_entropy(logits, labels), upsample_argmax(logits, (13, 21))


def expected_of(logits, labels):
    with reference():
        return Loss()(logits, labels)


def compiled(logits, labels):
    torch.compiler.reset()
    return torch.compile(Loss(), fullgraph=True, backend="aot_eager")(logits, labels)


def exported(logits, labels):
    return torch.export.export(Loss(), (logits, labels)).module()(logits, labels)


def traced(logits, labels):
    with warnings.catch_warnings():  # PyTorch 2.13 says that tracing is deprecated, and that labels were looked at
        warnings.simplefilter("ignore")
        return torch.jit.trace(Loss(), (logits, labels), check_trace=False)(logits, labels)


def counted(logits, labels):
    with FlopCounterMode(display=False):
        return Loss()(logits, labels)


@pytest.mark.parametrize("record", [compiled, exported, traced, counted])
def test_recorders_see_the_reference(record):
    logits, labels = batch()
    expected = expected_of(logits, labels)
    with recorded():
        loss, labels = record(logits, labels)
    assert_near(loss, expected[0], 1e-6)
    assert torch.equal(labels, expected[1])


def test_a_compiled_loss_has_the_gradient():
    logits, labels = batch(dtype=torch.float64)
    expected = both(logits, labels)[0][1]
    torch.compiler.reset()
    function = torch.compile(upsample_cross_entropy, fullgraph=True, backend="aot_eager")
    with switched(True):
        assert_near(value_and_gradient(lambda given: function(given, labels), logits)[1], expected, 1e-9)


# PyTorch 2.13's own, when forward derivatives are first asked for.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_function_transforms_take_the_reference():
    logits, labels = batch(dtype=torch.float64)
    (value, gradient), _ = both(logits, labels)
    direction = torch.randn_like(logits)
    with recorded():
        found, loss = torch.func.grad_and_value(lambda given: upsample_cross_entropy(given, labels))(logits)
        assert_near(found, gradient, 1e-9)
        assert_near(loss, value, 1e-9)
        _, change = torch.func.jvp(lambda given: upsample_cross_entropy(given, labels), (logits,), (direction,))
        assert_near(change, (gradient * direction).sum(), 1e-9)
        with forward_ad.dual_level():
            dual = upsample_cross_entropy(forward_ad.make_dual(logits, direction), labels)
            assert_near(forward_ad.unpack_dual(dual).tangent, (gradient * direction).sum(), 1e-9)
        mapped = torch.func.vmap(lambda given: upsample_argmax(given[None], (13, 21))[0])(logits)
    with reference():
        assert torch.equal(mapped, upsample_argmax(logits, (13, 21)))


class Named(torch.Tensor):
    """A subclass without behaviour of its own; others dequantize, unpad or count."""


def test_tensor_subclasses_take_the_reference():
    logits, labels = batch()
    expected = expected_of(logits, labels)
    with recorded():
        loss, found = Loss()(logits.as_subclass(Named), labels)
    assert torch.equal(loss.as_subclass(torch.Tensor), expected[0])
    assert torch.equal(found.as_subclass(torch.Tensor), expected[1])


# Argmax


def mapped_fast(logits, size):
    """Return a context in which only the fast path may run, unless there is nothing to upsample."""
    return switched(True) if logits.shape[-2:] == size else fast()


@examples
@given(given_batch=batches([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
@example(given_batch=(torch.zeros(1, 3, 4, 5), torch.zeros(1, 9, 10), 255))  # nothing but ties
def test_the_fast_argmax_equals_the_reference(given_batch):
    logits, size = given_batch[0], given_batch[1].shape[1:]
    with reference():
        expected, probability = upsample_argmax(logits, size, with_probability=True)
        assert torch.equal(upsample_argmax(logits, size), expected)
    with mapped_fast(logits, size):
        found, found_probability = upsample_argmax(logits, size, with_probability=True)
        alone = upsample_argmax(logits, size)
    full = F.interpolate(logits.to(probability.dtype), size=tuple(size), mode="bilinear", align_corners=False)
    best = full.topk(2, dim=1).values
    rounding = 8 * torch.finfo(probability.dtype).eps * full.abs().max()
    is_clear = best[:, 0] - best[:, 1] > rounding
    for labels in (found, alone):
        assert labels.dtype == torch.int64
        assert labels.shape == expected.shape
        assert torch.equal(labels[is_clear], expected[is_clear])
        chosen = full.gather(1, labels[:, None])[:, 0]
        assert (best[:, 0] - chosen <= rounding).all()
    # Positions on the grid are rounded, by PyTorch too, whose own probabilities lie up to 3e-5 off those of float64.
    positions = torch.finfo(probability.dtype).eps * max(logits.shape[-2:]) * full.abs().max().item()
    assert_near(found_probability, probability, TOLERANCE[probability.dtype] + positions)
    assert_near(probability, full.softmax(1).amax(1), 1e-12 if probability.dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("with_probability", [False, True])
@pytest.mark.parametrize("size", [(4, 6), (16, 24), (13, 21), (2, 3), (1, 1)])
def test_of_equal_logits_the_first_class_wins(size, with_probability):
    """Integers and halves are exact here, so that ties stay ties."""
    logits = torch.randint(0, 2, (2, 4, 4, 6)).double()
    logits[:, 3], logits[:, 2] = logits[:, 1], logits[:, 0]  # each best class has its double
    with mapped_fast(logits, size):
        found = upsample_argmax(logits, size, with_probability=with_probability)
    labels = found[0] if with_probability else found
    assert labels.max() < 2
    if size in ((4, 6), (16, 24)):  # weights in eighths
        with reference():
            assert torch.equal(labels, upsample_argmax(logits, size))


@pytest.mark.parametrize("size", [(4, 6), (13, 21), (1, 1)])
def test_one_logit_gives_ones_where_it_is_above_zero(size):
    logits = torch.randn(2, 1, 4, 6)
    full = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[:, 0]
    for enabled in (False, True):
        with switched(enabled):
            labels, probability = upsample_argmax(logits, size, with_probability=True)
            assert torch.equal(upsample_argmax(logits, size), labels)
        assert torch.equal(labels, (full > 0).long())
        assert_near(probability, torch.maximum(full.sigmoid(), (-full).sigmoid()), 1e-6)
    assert not upsample_argmax(torch.zeros(1, 1, 2, 3), (4, 6)).any()


def test_argmax_over_several_bands_and_windows():
    logits = 4 * torch.randn(2, 150, 40, 48, dtype=torch.float64)
    with reference():
        expected = upsample_argmax(logits, (160, 190), with_probability=True)
    with fast():
        found = upsample_argmax(logits, (160, 190), with_probability=True)
        assert torch.equal(upsample_argmax(logits, (160, 190)), expected[0])
    assert torch.equal(found[0], expected[0])
    assert_near(found[1], expected[1], 1e-9)


def test_argmax_of_smooth_regions():
    """Windows in which one class wins everywhere are not computed; the sample has both kinds of windows."""
    logits = torch.randn(1, 6, 3, 4, dtype=torch.float64)
    logits = F.interpolate(logits, size=(60, 80), mode="bicubic")
    with reference():
        expected = upsample_argmax(logits, (240, 320))
    with fast():
        assert torch.equal(upsample_argmax(logits, (240, 320)), expected)
    assert len(expected.unique()) > 2


def test_argmax_has_no_history():
    logits = torch.randn(1, 3, 4, 6, requires_grad=True)
    with fast():
        labels, probability = upsample_argmax(2 * logits, (9, 9), with_probability=True)
        with torch.inference_mode():
            assert torch.equal(upsample_argmax(logits, (9, 9)), labels)
    assert not labels.requires_grad
    assert labels.max() < 3
    assert probability.min() >= 1 / 3


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinite_logits_give_the_references_classes(value):
    logits = torch.randn(2, 3, 4, 6)
    logits[1, 2, 1] = value
    with reference():
        expected = upsample_argmax(logits, (13, 21))
    with switched(True):
        assert torch.equal(upsample_argmax(logits, (13, 21)), expected)


def test_argmax_of_an_empty_batch():
    for enabled in (False, True):
        with switched(enabled):
            assert upsample_argmax(torch.randn(0, 3, 4, 6), (13, 21)).shape == (0, 13, 21)


# What uses them


@pytest.mark.parametrize("num_labels", [1, 5])
@pytest.mark.parametrize("threshold", [None, 0.45])
def test_the_processor_gives_the_same_segmentation_maps(num_labels, threshold):
    logits = 2 * torch.randn(2, num_labels, 10, 18)
    processor = SegFormerImageProcessor()
    found = []
    for enabled in (False, True):
        with switched(enabled):
            found.append(
                processor.post_process_semantic_segmentation({"logits": logits}, [(40, 72), (33, 51)], threshold)
            )
    for ours, right in zip(*found, strict=True):
        assert ours.dtype == right.dtype
        assert torch.equal(ours, right)


@pytest.mark.parametrize("num_labels", [1, 5])
@pytest.mark.parametrize("options", [{}, {"flip": True}, {"sliding_window": 32, "stride": 16}, {"scales": [0.75, 1.0]}])
def test_predictions_are_the_same(num_labels, options):
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=num_labels)).double()
    processor = SegFormerImageProcessor(size={"shortest_edge": 48}, keep_ratio=True, size_divisor=16)
    image = Image.effect_noise((75, 52), 90).convert("RGB")
    found = []
    for enabled in (False, True):
        with switched(enabled):
            found.append(predict(model, processor, image, (52, 75), InferenceOptions(**options)))
    # A pixel whose two best logits differ by less than float32 tells may fall either way.
    assert (found[0] != found[1]).float().mean() <= 0.001


@pytest.mark.parametrize("num_classes", [1, 2, 5])
@pytest.mark.parametrize(
    "loss",
    [
        SegmentationLoss(),
        SegmentationLoss(label_smoothing=0.1),
        SegmentationLoss(dice=0.5, ohem=1, ohem_min_kept=20),
    ],
    ids=["the default", "smoothed", "a sum"],
)
def test_losses_are_the_same(loss, num_classes):
    logits, labels = batch(num_classes, torch.float64)
    found = []
    for enabled in (False, True):
        with switched(enabled):
            found.append(value_and_gradient(lambda given: loss(given, labels, 255), logits))
    for ours, right in zip(found[1], found[0], strict=True):
        assert_near(ours, right, 1e-9)


def test_losses_and_processors_take_the_fast_path():
    logits, labels = batch()
    with fast():
        value_and_gradient(lambda given: SegmentationLoss(label_smoothing=0.1)(given, labels), logits)
        SegFormerImageProcessor().post_process_semantic_segmentation({"logits": logits}, [(13, 21)] * 2)


# Threads and memory


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(num_threads):
    logits, labels = torch.randn(2, 30, 33, 48, dtype=torch.float64), torch.randint(30, (2, 132, 192))
    expected = both(logits, labels)[0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        for ours, right in zip(both(logits, labels)[1], expected, strict=True):
            assert_near(ours, right, 1e-9)
        with fast():
            labels = upsample_argmax(logits, (132, 192))
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(labels, reference_argmax(logits, (132, 192)))


def test_several_callers_at_once_do_not_disturb_each_other():
    logits, labels = torch.randn(4, 5, 12, 10, dtype=torch.float64), torch.randint(5, (4, 50, 41))
    expected = [both(logits[i : i + 1], labels[i : i + 1])[0] for i in range(4)]
    found = {}
    before = torch.get_num_threads()

    def call(index):
        for _ in range(5):
            found[index] = value_and_gradient(
                lambda given: upsample_cross_entropy(given, labels[index, None]), logits[index, None].clone()
            )

    try:
        torch.set_num_threads(2)
        with fast():
            callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for index, right in enumerate(expected):
        for ours, value in zip(found[index], right, strict=True):
            assert_near(ours, value, 1e-9)


def test_gradients_are_the_same_each_time():
    """Threads add in no fixed order; what they add must not overlap."""
    logits, labels = torch.randn(1, 40, 30, 32), torch.randint(40, (1, 120, 128))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with fast():
            runs = [value_and_gradient(lambda given: upsample_cross_entropy(given, labels), logits) for _ in range(6)]
    finally:
        torch.set_num_threads(before)
    for run in runs:
        assert torch.equal(run[0], runs[0][0])
        assert torch.equal(run[1], runs[0][1])


MEMORY = """
import pathlib, torch
from hf_segformer.dispatch_segformer import set_fast_paths
from hf_segformer.upsampling_segformer import upsample_argmax, upsample_cross_entropy

def peak():
    [line] = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return int(line.split()[1]) * 1024

torch.set_num_threads(2)
logits = torch.randn(1, 64, 256, 256).requires_grad_()
labels = torch.randint(64, (1, 1024, 1024), dtype=torch.uint8)
upsample_cross_entropy(logits[:, :, :8, :8], labels[:, :16, :16]).backward()  # what PyTorch needs to begin with
peaks = [peak()]
for enabled in (True, False):  # from small to large, since a peak never falls
    set_fast_paths(enabled)
    upsample_argmax(logits, (1024, 1024))
    peaks.append(peak())
    logits.grad = None
    upsample_cross_entropy(logits, labels).backward()
    peaks.append(peak())
print(*peaks)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own peak of memory")
@pytest.mark.slow
def test_logits_at_full_size_are_never_held():
    """64 classes at 1024 x 1024 take 256 MiB, logits and gradient here 16 each, labels as int64 8."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    start, argmax, loss, _, reference_loss = (int(value) / 2**20 for value in done.stdout.split())
    assert argmax - start < 96, "MiB of the segmentation map"
    assert loss - start < 128, "MiB of the loss"
    assert reference_loss - start > 400, "MiB of the reference loss: the measure itself must be able to tell"
