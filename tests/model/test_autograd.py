"""Function transforms, and changes between forward and backward: fast paths and reference agree."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, upsample_cross_entropy
from tests.support.fast_paths import assert_near, fast, ran, switched
from tests.support.tiny import TWO_STAGES

# PyTorch 2.13 has no batching rule for attention on a CPU, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet:UserWarning")


def build(training):
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(
        SegFormerConfig(**TWO_STAGES, num_labels=4, drop_path_rate=0.0, classifier_dropout_prob=0.0)
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.train(training)


def batch(number=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(number, 3, 33, 40, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, (number, 33, 40), generator=generator)


# Function transforms


def test_vmap_over_images_equals_the_batch():
    model, (images, _) = build(False), batch()
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with switched(True) as calls, torch.no_grad():
        found = vmap(lambda image: functional_call(model, state, (image[None],)).logits[0])(images)
        assert ran(calls) == {"folded"}
        assert_near(found, model(images).logits, 1e-9)


def test_vmap_over_models_equals_each_of_them():
    models, (images, _) = [build(False), build(False)], batch()
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(0.9)
        params, buffers = torch.func.stack_module_state(models)
        found = vmap(lambda *state: functional_call(models[0], state, (images,)).logits)(params, buffers)
        for ours, model in zip(found, models, strict=True):
            assert_near(ours, model(images).logits, 1e-9)


def test_per_sample_gradients_equal_those_of_single_images():
    model, (images, labels) = build(False), batch()
    labels[1, :20] = 255
    buffers = dict(model.named_buffers())

    def loss(parameters, image, label):
        return functional_call(model, (parameters, buffers), (image[None],), {"labels": label[None]}).loss

    found = vmap(grad(loss), in_dims=(None, 0, 0))(dict(model.named_parameters()), images, labels)
    for index in range(len(images)):
        model.zero_grad()
        model(images[index, None], labels=labels[index, None]).loss.backward()
        for name, parameter in model.named_parameters():
            assert (found[name][index] - parameter.grad).abs().max() < 1e-10, name


# Between forward and backward


def differentiate(model, disturb, enabled):
    """Return the gradients after a disturbance between forward and backward, or the error."""
    model, (images, labels) = copy.deepcopy(model), batch()
    with switched(enabled) as calls:
        loss = model(images, labels=labels).loss
        disturb(model)
        try:
            loss.backward()
        except RuntimeError as error:
            assert re.search("modified (by an )?inplace", str(error))  # noqa: PT017
            return "refused"
    assert ran(calls) == ({"cpu_strips", "cpu_bands"} if enabled else set())
    return [parameter.grad for parameter in model.parameters()]


NAMES = [*dict(build(True).named_parameters()), *dict(build(True).named_buffers())]


@pytest.mark.parametrize(
    "name", [name for name in NAMES if not re.search(r"block\.1|embeddings\.1|\.norm\.1|c\.1", name)]
)
@pytest.mark.parametrize("training", [False, True])
def test_a_tensor_changed_in_place_before_backward_is_refused_by_both_or_by_neither(training, name):
    model = build(training)

    def change(model):
        with torch.no_grad():
            model.state_dict(keep_vars=True)[name].add_(1)

    expected = differentiate(model, change, False)
    found = differentiate(model, change, True)
    assert (found == "refused") == (expected == "refused")
    if found != "refused":
        undisturbed = differentiate(model, lambda model: None, True)
        largest = max(gradient.abs().max() for gradient in undisturbed)
        for ours, right, other in zip(found, undisturbed, expected, strict=True):
            assert torch.equal(ours, right)
            assert (ours - other).abs().max() <= 1e-9 * largest


@pytest.mark.parametrize("training", [False, True])
def test_a_later_forward_pass_in_training_mode_is_allowed(training):
    """Mean-teacher training does that; the gradient is that of the first pass."""
    model = build(training)
    found = differentiate(model, lambda model: model.train()(2 * batch()[0]), True)
    undisturbed = differentiate(model, lambda model: None, True)
    for ours, right in zip(found, undisturbed, strict=True):
        assert torch.equal(ours, right)
    assert differentiate(model, lambda model: model.train()(2 * batch()[0]), False) != "refused"


@pytest.mark.parametrize("changed", ["labels", "weight", "logits"])
def test_inputs_of_the_loss_changed_before_backward_are_refused_by_both_or_by_neither(changed):
    outcomes = []
    for enabled in (False, True):
        logits, labels = torch.randn(2, 4, 5, 6, requires_grad=True), torch.randint(0, 4, (2, 20, 24))
        weight = torch.rand(4)
        with switched(enabled):
            loss = upsample_cross_entropy(logits, labels, weight=weight)
            with torch.no_grad():
                {"labels": labels, "weight": weight, "logits": logits}[changed].add_(1)
            try:
                loss.backward()
                outcomes.append("allowed")
            except RuntimeError:
                outcomes.append("refused")
    assert outcomes[0] == outcomes[1]


def test_saved_biases_are_copies_and_the_gradient_is_unchanged_by_their_memory():
    model, (images, labels) = build(True), batch()
    with fast():
        loss = model(images, labels=labels).loss
        for name, parameter in model.named_parameters():
            if name.endswith("dense1.bias"):
                parameter.data.add_(1)
        loss.backward()
    undisturbed = differentiate(build(True), lambda model: None, True)
    for parameter, right in zip(model.parameters(), undisturbed, strict=True):
        assert torch.equal(parameter.grad, right)
