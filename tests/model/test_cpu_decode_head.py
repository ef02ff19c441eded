"""The decode head's fast paths, in inference and in training, against the switch off."""

import copy
import pickle

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation
from hf_segformer.modeling_segformer import SegFormerDecodeHead
from tests.support.fast_paths import assert_near, fast, reference, switched
from tests.support.tiny import TINY

WIDTHS = TINY["hidden_sizes"]
# Float32: some thousand products and sums, each off by half a step; a ReLU's input within that of 0 may fall on
# either side of it. Measured: at most 3e-6 of the largest value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
HALVING = [(10, 18), (5, 9), (3, 5), (2, 3)]
GRIDS = {
    "halving": HALVING,
    "rows of one": [(1, 33), (1, 17), (1, 9), (1, 5)],
    "one pixel": [(1, 1)] * 4,
    "the same size": [(7, 6)] * 4,
    "not halving": [(11, 13), (10, 2), (3, 12), (1, 7)],
    "growing": [(4, 5), (8, 10), (3, 11), (9, 2)],
    "several blocks": [(67, 41), (34, 21), (17, 11), (9, 6)],
}


@pytest.fixture
def head():
    return make_head()


def make_head(dtype=torch.float64, dropout=0.0, momentum=0.1, **options):
    """Return a head with random statistics in training mode; options are those of BatchNorm."""
    head = SegFormerDecodeHead(SegFormerConfig(**TINY, num_labels=5, classifier_dropout_prob=dropout))
    head.batch_norm = nn.BatchNorm2d(TINY["decoder_hidden_size"], momentum=momentum, **options)
    with torch.no_grad():
        for name, tensor in (*head.batch_norm.named_parameters(), *head.batch_norm.named_buffers()):
            if name == "running_var":
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.normal_(1 if name == "weight" else 0)
    return head.to(dtype)


def features_of(batch=2, grids=HALVING, dtype=torch.float64, layout=torch.channels_last):
    return [
        torch.randn(batch, width, *grid, dtype=dtype).contiguous(memory_format=layout)
        for width, grid in zip(WIDTHS, grids, strict=True)
    ]


def run(head, features, call=None, buffers=True):
    """Return logits, gradients and buffers of a copy of the head; `call` runs it in another way."""
    head = copy.deepcopy(head)
    given = [feature.clone().requires_grad_() for feature in features]
    logits = call(head, tuple(given)) if call else head(tuple(given))
    found = {"logits": logits.detach()}
    logits.backward(torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits))
    found |= {f"stage {index}": feature.grad for index, feature in enumerate(given)}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in head.named_parameters()}
    if buffers:
        found |= {name: buffer.clone() for name, buffer in head.named_buffers()}
    return found


def assert_equals_reference(head, features, tolerance=1e-9, chosen=fast, **options):
    """Compare forward, gradients and buffers with the reference; `chosen` is the context of the other run."""
    torch.manual_seed(3)
    with reference():
        expected = run(head, features, **options)
    torch.manual_seed(3)
    with chosen():
        found = run(head, features, **options)
    assert found.keys() == expected.keys()
    largest = max(
        (value.abs().max().item() for name, value in expected.items() if "gradient" in name and value is not None),
        default=0.0,
    )
    normalises = head.batch_norm.training or head.batch_norm.running_mean is None
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
            continue
        assert found[name].dtype == value.dtype, name
        # BatchNorm takes away any constant: a bias before it has no gradient but rounding, and so has a stage that is
        # the same everywhere once it is upsampled.
        nothing = "linear_c" in name and name.endswith("bias") and normalises
        own, least = value.double().abs().max().item(), 1e-6 * largest if normalises else 0.0
        scale = largest if nothing else max(own, least)
        assert value.isfinite().all(), name
        assert (found[name].double() - value.double()).abs().max() <= tolerance * scale, name
    return expected, found


def either():
    return switched(True)


# Training


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_training_equals_the_reference(grids, batch, dtype):
    if batch == 1 and grids[0] == (1, 1):
        for enabled in (False, True):
            with switched(enabled), pytest.raises(ValueError, match="more than 1 value per channel"):
                make_head(dtype)(tuple(features_of(batch, grids, dtype)))
        return
    # Of few values a variance is small, and what is divided by it is rounding's.
    tolerance = TOLERANCE[dtype] * (50 if batch * grids[0][0] * grids[0][1] < 8 else 1)
    assert_equals_reference(make_head(dtype), features_of(batch, grids, dtype), tolerance)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    grids=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=4, max_size=4),
    batch=st.integers(1, 3),
    training=st.booleans(),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_any_grids_and_layouts_give_the_same(grids, batch, training, layout):
    if training and batch * grids[0][0] * grids[0][1] < 4:
        return
    assert_equals_reference(make_head().train(training), features_of(batch, grids, layout=layout), 1e-8, chosen=either)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum": 0.7},
        {"eps": 0.3},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [False, True])
def test_any_batch_norm_gives_the_same(training, options):
    head = make_head(**options).train(training)
    expected, found = assert_equals_reference(head, features_of(), chosen=either)
    if training and options.get("track_running_stats", True):
        assert found["batch_norm.num_batches_tracked"] == 1
        assert not torch.equal(found["batch_norm.running_mean"], head.batch_norm.running_mean)
        assert torch.equal(found["batch_norm.num_batches_tracked"], expected["batch_norm.num_batches_tracked"])


@pytest.mark.parametrize("training", [False, True])
def test_statistics_that_are_no_longer_tracked_stay(training):
    head = make_head().train(training)
    head.batch_norm.track_running_stats = False
    _, found = assert_equals_reference(head, features_of(), chosen=either)
    for name, buffer in head.batch_norm.named_buffers():
        assert torch.equal(found[f"batch_norm.{name}"], buffer)


def test_statistics_of_several_batches_equal_the_reference(head):
    heads = copy.deepcopy(head), head
    batches = [features_of(batch) for batch in (2, 1, 3)]
    for chosen, each in zip((reference, fast), heads, strict=True):
        with chosen():
            for features in batches:
                each(tuple(features)).sum().backward()
    for (name, ours), right in zip(heads[1].named_buffers(), heads[0].buffers(), strict=True):
        assert ours.dtype == right.dtype
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12, msg=name)
    assert head.batch_norm.num_batches_tracked == 3


def test_a_mean_far_from_zero_does_not_spoil_the_variance():
    """Subtracting the squared sum from the sum of squares would lose it."""
    head, features = make_head(torch.float32), features_of(dtype=torch.float32)
    with torch.no_grad():
        for linear in head.linear_c:
            linear.proj.bias.fill_(3e3)
    with switched(False):
        expected = copy.deepcopy(head).double()(tuple(feature.double() for feature in features)).float()
        reference_error = (copy.deepcopy(head)(tuple(features)) - expected).abs().max()
    with switched(True):
        error = (head(tuple(features)) - expected).abs().max()
    assert error <= 4 * reference_error + 1e-5


@pytest.mark.parametrize("affine", [False, True])
def test_frozen_statistics_stay_and_gradients_are_right(affine):
    head = make_head(affine=affine)
    head.batch_norm.eval()
    _, found = assert_equals_reference(head, features_of(), chosen=either)
    for name, buffer in head.batch_norm.named_buffers():
        assert torch.equal(found[f"batch_norm.{name}"], buffer)


FROZEN = {
    "the projections": ["linear_c"],
    "a projection's weight": ["linear_c.1.proj.weight"],
    "the fusing convolution": ["linear_fuse"],
    "BatchNorm": ["batch_norm"],
    "BatchNorm's bias": ["batch_norm.bias"],
    "the classifier": ["classifier"],
    "all but the classifier's bias": ["linear_c", "linear_fuse", "batch_norm", "classifier.weight"],
    "all": [""],
}


@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("training", [False, True])
def test_frozen_parameters_get_no_gradient(training, names):
    head = make_head().train(training)
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(names)))
    _, found = assert_equals_reference(head, features_of(), chosen=either)
    for name, parameter in head.named_parameters():
        assert (found[f"gradient of {name}"] is None) == (not parameter.requires_grad), name


@pytest.mark.parametrize("wanting", [[], [0], [3], [1, 2]])
@pytest.mark.parametrize("training", [False, True])
def test_features_without_gradient_get_none(training, wanting):
    """A frozen encoder gives none, a partly frozen one some."""

    def call(head, features):
        return head(tuple(each if index in wanting else each.detach() for index, each in enumerate(features)))

    _, found = assert_equals_reference(make_head().train(training), features_of(), chosen=either, call=call)
    for index in range(4):
        assert (found[f"stage {index}"] is not None) == (index in wanting)


def test_gradients_accumulate():
    def twice(head, features):
        head(features).square().sum().backward()
        return head(features)

    assert_equals_reference(make_head(), features_of(), call=twice)


@pytest.mark.parametrize("training", [False, True])
def test_one_batch_may_be_back_propagated_twice(training):
    def call(head, features):
        logits = head(features)
        logits.square().sum().backward(retain_graph=True)
        return logits

    assert_equals_reference(make_head().train(training), features_of(), chosen=either, call=call)


def test_gradients_may_be_asked_of_some_tensors_only(head):
    features = features_of()

    def of(head):
        given = tuple(feature.clone().requires_grad_() for feature in features)
        wanted = [given[1], head.classifier.weight, head.linear_c[3].proj.weight]
        return torch.autograd.grad(head(given).sin().sum(), wanted)

    with reference():
        expected = of(copy.deepcopy(head))
    with fast():
        found = of(copy.deepcopy(head))
    for ours, right in zip(found, expected, strict=True):
        assert_near(ours, right, 1e-9)


def test_a_parameter_changed_between_forward_and_backward_is_an_error(head):
    for enabled in (False, True):
        with switched(enabled):
            logits = copy.deepcopy(head)
            loss = logits(tuple(features_of())).square().sum()
            with torch.no_grad():
                logits.classifier.weight.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_a_second_derivative_of_the_head_is_right_or_refused(head):
    features = features_of()

    def penalty(head):
        given = tuple(feature.clone().requires_grad_() for feature in features)
        logits = head(given)
        [gradient] = torch.autograd.grad(logits.square().sum(), given[0], create_graph=True)
        (logits.sum() + gradient.square().sum()).backward()
        return head.classifier.weight.grad

    with reference():
        expected = penalty(copy.deepcopy(head))
    with switched(True):
        try:
            found = penalty(copy.deepcopy(head))
        except RuntimeError as error:
            assert "set_fast_paths" in str(error) or "twice" in str(error)  # noqa: PT017
        else:
            assert_near(found, expected, 1e-9)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_do_not_add_to_the_same_rows_at_once(num_threads):
    """Neighbouring bands come from the same rows of lower stages, whose gradients they share."""
    head, features = make_head(), features_of(1, [(260, 40), (9, 20), (3, 10), (2, 5)])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        _, first = assert_equals_reference(head, features)
        with fast():
            for _ in range(4):
                again = run(head, features)
                assert all(torch.equal(again[name], value) for name, value in first.items())
    finally:
        torch.set_num_threads(before)


# Dropout


def test_dropout_drops_whole_channels_of_an_image():
    """The classifier's gradient shows its input: a dropped channel gives none."""
    head, features = make_head(dropout=0.5), features_of()
    with switched(True):
        for _ in range(3):
            head.classifier.weight.grad = None
            head(tuple(feature[:1] for feature in features)).sum().backward()
            gone = head.classifier.weight.grad.abs().sum((0, 2, 3)) == 0
            assert 0 < gone.sum() < len(gone)


def test_dropout_draws_the_mask_of_the_reference():
    assert_equals_reference(make_head(dropout=0.3), features_of(3))


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_nothing_or_everything_may_be_dropped(dropout):
    head = make_head()
    head.dropout.p = dropout
    _, found = assert_equals_reference(head, features_of(), chosen=either)
    assert found["gradient of classifier.weight"].any() == (dropout == 0)


def test_dropout_alone_in_evaluation_mode_is_none():
    head = make_head(dropout=0.5)
    head.dropout.eval()
    assert_equals_reference(head, features_of())


# Inference


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_inference_equals_the_reference(grids, dtype, guard):
    head = make_head(dtype).eval()
    for batch in (1, 3):
        for layout in (torch.contiguous_format, torch.channels_last):
            features = tuple(features_of(batch, grids, dtype, layout))
            with guard():
                with reference():
                    expected = head(features)
                with fast():
                    found = head(features)
            assert_near(found, expected, TOLERANCE[dtype])


def test_an_empty_batch_gives_no_logits(head):
    features = tuple(feature[:0] for feature in features_of())
    for enabled in (False, True):
        with switched(enabled), torch.no_grad():
            assert head.eval()(features).shape == (0, 5, 10, 18)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_16_bit_types_are_as_accurate_as_the_reference(training, dtype):
    head, features = make_head(torch.float32).train(training), features_of(dtype=torch.float32)
    with reference():
        expected = run(head, features)
        usual = run(copy.deepcopy(head).to(dtype), [feature.to(dtype) for feature in features])
    with switched(True):
        found = run(copy.deepcopy(head).to(dtype), [feature.to(dtype) for feature in features])
    assert_as_near(found, usual, expected)


@pytest.mark.parametrize("training", [False, True])
def test_autocast_is_as_accurate_as_the_reference(training):
    head, features = make_head(torch.float32).train(training), features_of(dtype=torch.float32)

    def mixed(head, features):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return head(features)

    with reference():
        expected = run(head, features)
        usual = run(head, features, call=mixed)
    with switched(True):
        found = run(head, features, call=mixed)
    assert_as_near(found, usual, expected)


def assert_as_near(found, usual, expected):
    """Assert that logits, some gradients and statistics are no further from the expected ones than usual.

    In a gradient a single ReLU that falls to the other side of 0 is worth a hundredth.
    """
    names = ["logits", "stage 0", "stage 2", "batch_norm.running_mean", "batch_norm.running_var"]
    for name in (*names, "gradient of linear_fuse.weight", "gradient of classifier.weight"):
        assert found[name].dtype == usual[name].dtype, name
        flips = 0.0 if name == "logits" else 0.02 * expected[name].norm()
        error, usual_error = ((each[name].float() - expected[name]).norm() for each in (found, usual))
        assert error <= 1.5 * usual_error + flips, name


# Changed layers


def doubling(layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)


def halving(layer):
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))


def weight_normed(layer):
    if hasattr(layer, "weight"):
        parametrizations.weight_norm(layer)
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(2)


def replaced_forward(layer):
    forward = layer.forward
    layer.forward = lambda features: 3 * forward(features)


def subclassed(layer):
    kind = type(layer)
    layer.__class__ = type("Bending", (kind,), {"forward": lambda self, given: kind.forward(self, given).sin()})


LAYERS = ["linear_c.0", "linear_c.2.proj", "linear_fuse", "batch_norm", "dropout", "classifier"]


@pytest.mark.parametrize("change", [doubling, halving, replaced_forward, subclassed, weight_normed])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [False, True])
def test_a_changed_layer_is_called(training, name, change):
    """Fast paths and reference agree, and the change has an effect."""
    if change is weight_normed and name in ("linear_c.0", "dropout", "batch_norm"):
        return
    features, unchanged = tuple(features_of()), make_head().train(training)
    head = copy.deepcopy(unchanged)
    change(head.get_submodule(name))
    logits = []
    for enabled in (False, True):
        with switched(enabled):
            torch.manual_seed(1)
            logits.append(copy_of_call(head, features))
    assert_near(logits[1], logits[0], 1e-9)
    with switched(False):
        before = copy_of_call(unchanged, features)
    is_factor = change is not subclassed and (name, change) != ("batch_norm", doubling)
    if not (training and is_factor and name in ("linear_fuse", "batch_norm")):  # BatchNorm takes a factor away
        assert (logits[0] - before).abs().max() > 1e-3


def copy_of_call(head, features):
    """Return the logits, and restore the statistics."""
    state = {name: buffer.clone() for name, buffer in head.named_buffers()}
    logits = head(features).detach()
    for name, buffer in head.named_buffers():
        buffer.data.copy_(state[name])
    return logits


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_is_called(kind, name, head):
    calls = []
    getattr(head.get_submodule(name), kind)(lambda *_: calls.append(1))
    with switched(True):
        head(tuple(feature.requires_grad_() for feature in features_of())).sum().backward()
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("targets", [r".*linear_c\.\d\.proj", ["linear_fuse"], ["classifier"]], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_lora_takes_part(training, targets, tiny_config):
    model = SegFormerForSemanticSegmentation(tiny_config(classifier_dropout_prob=0.0, drop_path_rate=0.0)).double()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets)).double().train(training)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    head = adapted.base_model.model.decode_head
    _, found = assert_equals_reference(head, features_of(), chosen=either)
    adapters = [name for name in found if name.startswith("gradient") and "lora" in name]
    assert adapters
    assert all(found[name].abs().max() > 0 for name in adapters)


def test_synchronized_batch_norm_takes_the_fold(head):
    for training in (False, True):
        # It cannot synchronise on a CPU, but alone it need not.
        assert_equals_reference(
            nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(head)).train(training), features_of(), chosen=either
        )


def through_data(parameter):
    parameter.data.mul_(1.5)


def with_other_memory(parameter):
    parameter.data = parameter.data * 1.5


def in_place(parameter):
    with torch.no_grad():
        parameter.mul_(1.5)


@pytest.mark.parametrize("change", [through_data, with_other_memory, in_place])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_cached_between_calls(training, change, head):
    features = tuple(features_of())
    head.train(training)
    with torch.set_grad_enabled(training):
        for name, tensor in (*head.named_parameters(), *head.named_buffers()):
            if not tensor.is_floating_point() or (training and "running" in name):
                continue
            with fast():
                before = copy_of_call(head, features)
                change(tensor)
                found = copy_of_call(head, features)
            with reference():
                expected = copy_of_call(head, features)
            assert_near(found, expected, 1e-9)
            if not (training and name.endswith("proj.bias")):
                assert not torch.equal(found, before), name


@pytest.mark.parametrize("training", [False, True])
def test_a_head_is_copied_and_pickled_after_a_call(training, head):
    features = tuple(features_of())
    with fast():
        head.train(training)(features).sum().backward()
        expected = copy_of_call(head, features)
        for again in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
            assert torch.equal(copy_of_call(again, features), expected)
    assert set(vars(head)) == set(vars(make_head()))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_the_head_gives_the_same_gradients(use_reentrant):
    """The forward runs again in the backward, and PyTorch checks that it saves the same tensors."""

    def call(head, features):
        return checkpoint(lambda *given: head(given), *features, use_reentrant=use_reentrant)

    # Statistics may be updated twice: how much of the forward runs again is PyTorch's affair.
    assert_equals_reference(make_head(dropout=0.3), features_of(), call=call, buffers=False)


@pytest.mark.parametrize("training", [False, True])
def test_inputs_are_not_modified(training, head):
    features = features_of()
    copies = [feature.clone() for feature in features]
    parameters = copy.deepcopy(dict(head.named_parameters()))
    with fast():
        logits = head.train(training)(tuple(features))
        kept = logits.detach().clone()
        head(tuple(2 * feature for feature in features))
        logits.sum().backward()
    assert torch.equal(logits, kept)
    assert all(map(torch.equal, features, copies))
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in head.named_parameters())


@pytest.mark.parametrize("training", [False, True])
def test_a_hook_for_all_modules_sees_batch_norm_and_classifier(training):
    features, head, seen = tuple(features_of()), make_head().train(training), []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with switched(True):
            head(features)
    finally:
        hook.remove()
    assert {head.batch_norm, head.classifier} <= set(seen)
