"""Altered modules: whatever replaces, watches or reparametrizes a module takes part as in the reference."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from hf_segformer import SegFormerForSemanticSegmentation
from hf_segformer.dispatch_segformer import explain_fast_paths
from tests.support.fast_paths import assert_near, switched
from tests.support.tiny import TWO_STAGES

# Of the first block, which has a reduction, and of the head.
MODULES = [
    "block",
    "block.layer_norm_1",
    "block.attention",
    "block.attention.self",
    "block.attention.self.query",
    "block.attention.self.key",
    "block.attention.self.value",
    "block.attention.self.sr",
    "block.attention.self.layer_norm",
    "block.attention.output",
    "block.attention.output.dense",
    "block.attention.output.dropout",
    "block.drop_path",
    "block.layer_norm_2",
    "block.mlp",
    "block.mlp.dense1",
    "block.mlp.dwconv",
    "block.mlp.dwconv.dwconv",
    "block.mlp.activation",
    "block.mlp.dense2",
    "block.mlp.dropout",
    "head",
    "head.linear_c.0",
    "head.linear_c.1",
    "head.linear_c.1.proj",
    "head.linear_fuse",
    "head.batch_norm",
    "head.dropout",
    "head.classifier",
]


def change_output(value):
    """Change the tensor of an output, which some modules return in a tuple."""
    if isinstance(value, tuple):
        return (change_output(value[0]), *value[1:])
    return 0.7 * value + 0.2 * value.sin()


class Identity(nn.Identity):
    """An identity for modules that take and return more than one value."""

    def forward(self, value, *others):
        if isinstance(value, tuple):  # the head
            return value[0]
        return value


def identity(parent, name, module):
    if name in (
        "linear_fuse",
        "linear_c",
        "self",
        "attention",
        "sr",
        "block",
        "0",
        "1",
        "proj",
        "head",
        "dense1",
        "dense2",
    ):
        return False  # another shape, or a tuple, is expected of them
    setattr(parent, name, nn.Identity() if name not in ("mlp", "dwconv") else Identity())
    return True


def hook(parent, name, module):
    module.register_forward_hook(lambda module, inputs, output: change_output(output))
    return True


def pre_hook(parent, name, module):
    module.register_forward_pre_hook(lambda module, inputs: (change_output(inputs[0]), *inputs[1:]))
    return True


def subclass(parent, name, module):
    kind = type(module)
    forward = {"forward": lambda self, *given, **options: change_output(kind.forward(self, *given, **options))}
    module.__class__ = type(kind.__name__, (kind,), forward)
    return True


def replaced_forward(parent, name, module):
    forward = module.forward
    module.forward = lambda *given, **options: change_output(forward(*given, **options))
    return True


def parametrized(parent, name, module):
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        return False
    parametrizations.weight_norm(module)
    with torch.no_grad():
        module.parametrizations.weight.original0.mul_(1.5)
    return True


def lora(parent, name, module):
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or getattr(module, "groups", 1) > 1:
        return False
    kind = peft.tuners.lora.layer.Linear if isinstance(module, nn.Linear) else peft.tuners.lora.layer.Conv2d
    adapter = kind(module, "default", peft.LoraConfig(r=2, target_modules=[name]), r=2, lora_alpha=4)
    nn.init.normal_(adapter.lora_B["default"].weight)
    setattr(parent, name, adapter)
    return True


ALTERATIONS = [identity, hook, pre_hook, subclass, replaced_forward, parametrized, lora]


def build(tiny_config, **options):
    options = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0, **options}
    model = SegFormerForSemanticSegmentation(tiny_config(**{**TWO_STAGES, **options})).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double()


def locate(model, name):
    """Return parent, attribute and module of a name of `MODULES`."""
    first, _, rest = name.partition(".")
    parent, attribute = (model.segformer.encoder.block[0], "0") if first == "block" else (model, "decode_head")
    module = getattr(parent, attribute)
    for attribute in filter(None, rest.split(".")):
        parent, module = module, getattr(module, attribute)
    return parent, rest.split(".")[-1] or first, module


def outcome(model, images, enabled):
    """Return logits and gradients."""
    model = copy.deepcopy(model)
    torch.manual_seed(3)
    with switched(enabled):
        logits = model(images).logits
        logits.square().sum().backward()
    return logits.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("alter", ALTERATIONS)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("training", [False, True])
def test_an_altered_module_gives_the_references_result(training, name, alter, tiny_config):
    model, images = build(tiny_config).train(training), torch.randn(2, 3, 33, 40, dtype=torch.float64)
    before, _ = outcome(model, images, False)
    if not alter(*locate(model, name)):
        return  # it does not apply to this module
    model.double()
    with switched(True), torch.no_grad():
        inference = copy.deepcopy(model)(images).logits
    found, gradients = outcome(model, images, True)
    expected, expected_gradients = outcome(model, images, False)
    assert_near(found, expected, 1e-9)
    assert_near(inference, expected, 1e-9)
    largest = max(gradient.abs().max() for gradient in expected_gradients if gradient is not None)
    for ours, right in zip(gradients, expected_gradients, strict=True):
        assert (ours is None) == (right is None)
        if right is not None:
            assert (ours - right).abs().max() <= 1e-9 * largest
    has_effect = alter is not identity or name.endswith(("norm_1", "norm_2", "layer_norm", "batch_norm", "mlp"))
    if has_effect and not (alter is parametrized and training and name == "head.linear_fuse"):
        assert (expected - before).abs().max() > 1e-6 * before.abs().max()


# Drop path


class Negated(nn.Module):
    def forward(self, tokens):
        return -tokens


@pytest.mark.parametrize("rate", [0.0, 0.6])
@pytest.mark.parametrize("training", [False, True])
def test_any_module_may_take_the_place_of_drop_path(training, rate, tiny_config):
    model = build(tiny_config, drop_path_rate=rate).train(training)
    images = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    for make in (nn.Identity, Negated, lambda: nn.Dropout(0.5)):
        for stage in model.segformer.encoder.block:
            stage[0].drop_path = make().train(training)
        found, expected = outcome(model, images, True), outcome(model, images, False)
        assert_near(found[0], expected[0], 1e-9)


def test_identity_in_place_of_drop_path_is_fast(tiny_config):
    model, images = build(tiny_config).eval(), torch.randn(1, 3, 33, 40, dtype=torch.float64)
    for stage in model.segformer.encoder.block:
        stage[0].drop_path = nn.Identity()
    explained = explain_fast_paths(model, images)
    assert explained["attention"] == explained["mix_ffn"] == "cpu_strips"
