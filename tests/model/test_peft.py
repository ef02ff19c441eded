"""Adapters, quantisation, hooks and the like: whatever replaces or watches a layer takes part in the result."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from hf_segformer import SegFormerForSemanticSegmentation
from tests.support.tiny import assert_same, logits_of

# PEFT 0.21 asks for a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BLOCKS = range(4)
LORA_TARGETS = {
    "query and value, the published recipe": (
        ["query", "value"],
        {f"segformer.encoder.block.{i}.0.attention.self.{name}" for i in BLOCKS for name in ("query", "value")},
    ),
    "the head's projections": (
        r"decode_head\.linear_c\.\d\.proj",
        {f"decode_head.linear_c.{stage}.proj" for stage in BLOCKS},
    ),
    "the fusing convolution": (["linear_fuse"], {"decode_head.linear_fuse"}),
    "the classifier": (["decode_head.classifier"], {"decode_head.classifier"}),
}


def perturb(adapted):
    """LoRA starts as nothing at all, B being zero; this makes it something."""
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)


@pytest.fixture(params=LORA_TARGETS.values(), ids=LORA_TARGETS)
def adapted(request, model):
    target_modules, expected = request.param
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=target_modules)).eval()
    assert set(adapted.base_model.targeted_module_names) == expected
    return adapted


def test_lora_starts_as_the_model_itself_and_then_changes_it(adapted, images):
    with adapted.disable_adapter():
        plain = logits_of(adapted, images)
    assert_same(logits_of(adapted, images), plain)
    perturb(adapted)
    assert (logits_of(adapted, images) - plain).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert_same(logits_of(adapted, images), plain)


def test_gradients_reach_every_adapter_and_nothing_else(adapted, images):
    perturb(adapted)
    adapted(pixel_values=images, labels=torch.randint(0, 5, (2, 40, 72))).loss.backward()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_merged_adapters_give_what_they_gave_beside_the_layers(adapted, images):
    perturb(adapted)
    expected = logits_of(adapted, images)
    merged = adapted.merge_and_unload()
    assert isinstance(merged, SegFormerForSemanticSegmentation)
    assert_same(logits_of(merged, images), expected)


def test_saved_adapters_load_onto_the_same_base(adapted, images, tmp_path):
    base = copy.deepcopy(adapted).unload()
    perturb(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded, images), logits_of(adapted, images), rtol=0, atol=0)


def test_the_published_recipe_trains_and_saves_the_whole_head(model, images, tmp_path):
    """PEFT's SegFormer example: LoRA on query and value, the decode head as a whole in `modules_to_save`."""
    base = copy.deepcopy(model)
    recipe = peft.LoraConfig(
        r=4, lora_alpha=4, target_modules=["query", "value"], lora_dropout=0.1, modules_to_save=["decode_head"]
    )
    adapted = peft.get_peft_model(model, recipe)
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # B is zero at first, so A learns from the second step on
        optimizer.zero_grad()
        adapted(pixel_values=images, labels=torch.randint(0, 5, (2, 40, 72))).loss.backward()
        optimizer.step()
    head = adapted.base_model.model.decode_head
    trained = head.modules_to_save["default"]
    for name, parameter in trained.named_parameters():
        if not (name.startswith("linear_c") and name.endswith("bias")):  # BatchNorm takes any constant away again
            assert not torch.equal(parameter, head.original_module.get_parameter(name)), name
    adapted.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded, images), logits_of(adapted, images), rtol=0, atol=0)


class HalvesTensor(torch.Tensor):
    """A weight in the manner of quantised ones: a tensor subclass that only `F.linear` knows how to use.

    It keeps the weight as whole multiples of a half, scaled, in int8; any other use of it is an error.
    """

    @staticmethod
    def __new__(cls, weight):
        """A shell of the weight's shape without data of its own."""
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.scale = weight.abs().amax(dim=1, keepdim=True) / 8
        self.steps = (weight / self.scale * 2).round().to(torch.int8)

    def dequantize(self):
        return self.steps * 0.5 * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            features, weight, bias = args
            return F.linear(features, weight.dequantize(), bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a quantised weight")


def test_a_quantised_weight_is_used_by_its_own_linear(model, images):
    reference = copy.deepcopy(model)
    for linear, plain in zip(model.decode_head.linear_c, reference.decode_head.linear_c, strict=True):
        quantised = HalvesTensor(linear.proj.weight.detach())
        with torch.no_grad():
            plain.proj.weight.copy_(quantised.dequantize())
        linear.proj.weight = nn.Parameter(quantised, requires_grad=False)
    assert type(model.decode_head.linear_c[0].proj) is nn.Linear
    assert_same(logits_of(model, images), logits_of(reference, images))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.quantize_per_tensor:UserWarning")
def test_dynamically_quantised_linears_stay_near_the_full_model(model, images):
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    expected, found = logits_of(model, images), logits_of(quantised, images)
    assert not torch.equal(found, expected)
    # Eight bits: each layer is off by under 1/100 of its largest value, and errors of a dozen layers add.
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_synchronised_batch_norm_counts_as_batch_norm(model, images):
    model.decode_head.batch_norm.running_mean.normal_()
    model.decode_head.batch_norm.running_var.uniform_(0.5, 2)
    expected = logits_of(model, images)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted.decode_head.batch_norm) is nn.SyncBatchNorm
    torch.testing.assert_close(logits_of(converted, images), expected, rtol=1e-5, atol=1e-6)  # summed otherwise


WATCHED = {
    "linear_c.1": ["linear_c.1.proj.weight", "linear_c.1.proj.bias"],
    "linear_c.1.proj": ["linear_c.1.proj.weight", "linear_c.1.proj.bias"],
    "linear_fuse": ["linear_fuse.weight"],
}


def with_doubled(head, names):
    """A copy of the head in which these parameters are twice what they were."""
    doubled = copy.deepcopy(head)
    with torch.no_grad():
        for name in names:
            doubled.get_parameter(name).mul_(2)
    return doubled


@pytest.mark.parametrize(("name", "parameters"), WATCHED.items(), ids=WATCHED)
def test_a_forward_hook_on_the_head_has_its_say(name, parameters, model, images):
    reference = copy.deepcopy(model)
    reference.decode_head = with_doubled(model.decode_head, parameters)
    handle = model.decode_head.get_submodule(name).register_forward_hook(lambda module, inputs, output: 2 * output)
    assert_same(logits_of(model, images), logits_of(reference, images))
    handle.remove()
    assert (logits_of(model, images) - logits_of(reference, images)).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "parameters"), WATCHED.items(), ids=WATCHED)
def test_a_forward_pre_hook_on_the_head_has_its_say(name, parameters, model, images):
    reference = copy.deepcopy(model)
    weight = [parameter for parameter in parameters if parameter.endswith("weight")]
    reference.decode_head = with_doubled(model.decode_head, weight)
    model.decode_head.get_submodule(name).register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    assert_same(logits_of(model, images), logits_of(reference, images))


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_on_the_head_is_called(kind, name, model, images):
    calls = []
    getattr(model.decode_head.get_submodule(name), kind)(lambda *_: calls.append(1))
    model(images).logits.sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["linear_c.1.proj", "linear_fuse"])
def test_a_parametrised_layer_of_the_head_is_used_as_such(name, model, images):
    reference = copy.deepcopy(model)
    layer = parametrizations.weight_norm(model.decode_head.get_submodule(name))
    assert_same(logits_of(model, images), logits_of(reference, images))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    reference.decode_head = with_doubled(reference.decode_head, [f"{name}.weight"])
    assert_same(logits_of(model, images), logits_of(reference, images))
    model(images).logits.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in layer.parametrizations.weight.parameters())


@pytest.mark.parametrize("name", WATCHED)
def test_a_subclass_in_the_head_is_called_rather_than_read(name, model, images):
    """Layers that quantise or adapt are often built so: a class derived from the plain one, with the same weights."""
    layer = model.decode_head.get_submodule(name)
    expected = copy.deepcopy(model)
    expected.decode_head = with_doubled(model.decode_head, WATCHED[name])
    kind = type(layer)
    layer.__class__ = type("Doubling", (kind,), {"forward": lambda self, features: 2 * kind.forward(self, features)})
    assert_same(logits_of(model, images), logits_of(expected, images))


def through_data(parameters):
    for parameter in parameters:
        parameter.data.mul_(1.5)


def with_other_memory(parameters):
    for parameter in parameters:
        parameter.data = parameter.data * 1.5


def by_a_fused_optimiser(parameters):
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.05, fused=True).step()


@pytest.mark.parametrize("change", [through_data, with_other_memory, by_a_fused_optimiser])
@pytest.mark.parametrize("training", [False, True])
def test_a_changed_parameter_counts_at_once_however_it_was_changed(change, training, model, images, tiny_config):
    model.train(training)
    torch.manual_seed(5)
    before = logits_of(model, images)
    change(model.decode_head.parameters())
    fresh = SegFormerForSemanticSegmentation(tiny_config()).train(training)
    fresh.load_state_dict(model.state_dict())
    torch.manual_seed(5)
    after = logits_of(model, images)
    torch.manual_seed(5)
    torch.testing.assert_close(after, logits_of(fresh, images), rtol=0, atol=0)
    assert (after - before).abs().max() > 1e-3
