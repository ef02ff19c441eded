"""`explain_fast_paths`: what ran and why not."""

import copy

import peft
import pytest
import torch
from torch import nn

from hf_segformer import (
    SegFormerForImageClassification,
    SegFormerForSemanticSegmentation,
    cpu_decode_head_segformer,
    set_fast_paths,
    upsampling_segformer,
)
from hf_segformer.dispatch_segformer import explain_fast_paths
from tests.support.tiny import TWO_STAGES

ALL_FAST = {
    "mix_ffn": "cpu_strips",
    "attention": "cpu_strips",
    "decode_head": "cpu_bands",
    "upsample_cross_entropy": "cpu_bands",
    "upsample_argmax": "cpu_bands",
}


@pytest.fixture
def model(tiny_config):
    return SegFormerForSemanticSegmentation(tiny_config(**TWO_STAGES)).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 33, 40)


def explain(model, images):
    with torch.no_grad():
        return explain_fast_paths(model, images)


def test_an_unchanged_model_is_fast_with_and_without_gradient(model, images):
    assert explain(model, images) == explain_fast_paths(model, images) == ALL_FAST


def test_training_with_drop_path(model, images):
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    reason = "drop_path is active, or not the model's own"
    explained = explain_fast_paths(model.train(), images)
    assert explained == {**ALL_FAST, "attention": f"cpu_strips in 1 of 2 calls; reference: {reason}"}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_another_head_has_fewer_operations(tiny_config, images):
    classifier = SegFormerForImageClassification(tiny_config(**TWO_STAGES)).eval()
    assert explain(classifier, images) == {"mix_ffn": "cpu_strips", "attention": "cpu_strips"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora(model, images):
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value", "linear_fuse"])).eval()
    explained = explain(adapted, images)
    assert explained["attention"] == "reference: attention.self.query is a peft.tuners.lora.layer.Linear"
    assert explained["decode_head"] == "reference: linear_fuse is a peft.tuners.lora.layer.Conv2d"
    assert explained["mix_ffn"] == "cpu_strips"


def test_a_hook(model, images):
    model.segformer.encoder.block[1][0].mlp.dense1.register_forward_hook(lambda *_: None)
    model.decode_head.batch_norm.register_forward_hook(lambda *_: None)
    explained = explain(model, images)
    assert explained["mix_ffn"] == "cpu_strips in 1 of 2 calls; reference: mlp.dense1 has hooks"
    assert explained["decode_head"] == "folded"


def test_a_subclass_and_a_replaced_forward(model, images):
    class Subclass(nn.Linear):
        pass

    for stage in model.segformer.encoder.block:
        stage[0].mlp.dense2.__class__ = Subclass
        stage[0].attention.output.forward = stage[0].attention.output.forward
    explained = explain(model, images)
    assert explained["mix_ffn"] == f"reference: mlp.dense2 is a {__name__}.{Subclass.__name__}"
    assert explained["attention"] == "reference: attention.output.forward is replaced"


def test_drop_path_of_another_kind(model, images):
    for stage in model.segformer.encoder.block:
        stage[0].drop_path = nn.Dropout(0.5)
    explained = explain(model, images)
    assert explained["attention"] == "reference: drop_path is active, or not the model's own"
    assert explained["mix_ffn"] == "cpu_strips"


def test_autocast_and_short_floats(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        explained = explain(model, images)
    assert explained == {
        "mix_ffn": "reference: autocast is enabled",
        "attention": "reference: autocast is enabled",
        "decode_head": "folded",
        "upsample_cross_entropy": "cpu_bands",
        "upsample_argmax": "cpu_bands",
    }
    assert explain(model.bfloat16(), images)["mix_ffn"] == "reference: tensors are bfloat16"


def test_eager_attention(model, images):
    model.set_attn_implementation("eager")
    assert explain(model, images)["attention"] == "reference: attention is 'eager', not 'sdpa'"


# PyTorch 2.13 has no batching rule for attention on a CPU, and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet:UserWarning")
def test_export_and_function_transforms(model, images):
    def export(pixel_values):
        return torch.export.export(model, (pixel_values,), strict=False)

    reason = "reference: torch.export records the operations"
    assert explain(export, images) == {"mix_ffn": reason, "attention": reason, "decode_head": "folded"}
    each = torch.func.vmap(lambda image: model(image[None]).logits[0])
    explained = explain(each, images)
    assert explained["mix_ffn"] == "reference: a function transform (torch.func) is active"
    assert explained["decode_head"] == "folded"


def test_a_compiled_model(model, images):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    explained = explain(compiled, images)
    assert (explained["mix_ffn"], explained["attention"]) == ("cpu_strips", "cpu_strips")
    assert explained["decode_head"] == "folded"
    torch.compiler.reset()
    assert explain_fast_paths(compiled, images)["mix_ffn"] == "reference: the mode is compiled training"


def test_switched_off(model, images, monkeypatch):
    monkeypatch.setenv("HF_SEGFORMER_PLAIN", "0")
    set_fast_paths(False)
    explained = explain(model, images)
    assert set(explained) == set(ALL_FAST)
    assert set(explained.values()) == {"reference: fast paths are switched off (set_fast_paths, HF_SEGFORMER_PLAIN)"}


def test_small_images_are_left_to_pytorch(model, images, small_sizes, monkeypatch):
    for module, size in small_sizes.items():
        monkeypatch.setattr(module, "_SMALL_SIZE", size)
    explained = explain(model, images)
    assert explained["decode_head"] == "folded"
    assert explained["upsample_cross_entropy"] == "reference: logits of this size are small"
    assert explained["upsample_argmax"] == "cpu_bands"


def test_what_counts_as_small(model, images, monkeypatch):
    [batch, _, height, width], dim = images.shape, model.config.decoder_hidden_size
    grid = batch * -(-height // 4) * -(-width // 4)
    size = grid * dim
    for limit, training, implementation in (
        *((size, False, "folded"), (size - 1, False, "cpu_bands")),
        *((-(-size // 2), True, "folded"), (size // 2 - 1, True, "cpu_bands")),
    ):
        monkeypatch.setattr(cpu_decode_head_segformer, "_SMALL_SIZE", limit)
        assert explain(model.train(training), images)["decode_head"] == implementation
    size = images[:, 0].numel() * model.config.num_labels
    for limit, implementation in ((size, "reference: logits of this size are small"), (size - 1, "cpu_bands")):
        monkeypatch.setattr(upsampling_segformer, "_SMALL_SIZE", limit)
        assert explain(model, images)["upsample_cross_entropy"] == implementation
