"""Weights that live elsewhere, attention that is done elsewhere: the same numbers, by Transformers' own switches."""

import logging

import accelerate
import pytest
import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from hf_segformer import SegFormerForSemanticSegmentation, SegFormerModel
from tests.support.tiny import assert_same, logits_of

ENCODER_PARTS = ("patch_embeddings", "block", "layer_norm")
PLACES = {
    "all in memory": {"": "cpu"},
    "automatic": "auto",
    "encoder on disk": {"segformer": "disk", "decode_head": "cpu"},
    "head on disk": {"segformer": "cpu", "decode_head": "disk"},
    "one stage of the head on disk": {
        "segformer": "cpu",
        **{f"decode_head.linear_c.{stage}": "disk" if stage == 2 else "cpu" for stage in range(4)},
        **{f"decode_head.{name}": "cpu" for name in ("linear_fuse", "batch_norm", "dropout", "classifier")},
    },
    "a stage here, a stage there": {
        **{
            f"segformer.encoder.{part}.{stage}": "disk" if stage % 2 else "cpu"
            for part in ENCODER_PARTS
            for stage in range(4)
        },
        "decode_head": "cpu",
    },
}


@pytest.mark.parametrize("device_map", PLACES.values(), ids=PLACES)
def test_a_device_map_changes_where_weights_are_and_no_number(device_map, model, images, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = SegFormerForSemanticSegmentation.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
    assert any(parameter.is_meta for parameter in loaded.parameters()) is on_disk
    assert_same(logits_of(loaded, images), logits_of(model, images))


@pytest.mark.parametrize("part", ["", "segformer", "decode_head", "decode_head.linear_c", "decode_head.linear_fuse"])
def test_a_part_offloaded_by_accelerate_gives_the_same_numbers(part, model, images, tmp_path):
    expected = logits_of(model, images)
    module = model.get_submodule(part)
    accelerate.disk_offload(module, offload_dir=tmp_path, execution_device="cpu")
    assert all(parameter.is_meta for parameter in module.parameters())
    assert_same(logits_of(model, images), expected)


def test_an_automatic_map_for_little_memory_splits_no_block_and_no_head(model, images, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = SegFormerForSemanticSegmentation.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path / "offload"
    ).eval()
    assert {"cpu", "disk"} == set(loaded.hf_device_map.values())
    units = [*(stage[0] for stage in loaded.segformer.encoder.block), loaded.decode_head]
    for unit in units:
        assert len({parameter.is_meta for parameter in unit.parameters()}) == 1
    assert_same(logits_of(loaded, images), logits_of(model, images))


def test_offloading_to_memory_gives_the_same_numbers(model, images):
    expected = logits_of(model, images)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert_same(logits_of(model, images), expected)


# Attention

GRIDS = [(10, 18), (5, 9), (3, 5), (2, 3)]  # of a 40x72 image
REDUCED = [1 * 2, 1 * 2, 1 * 2, 2 * 3]  # by 8, 4, 2 and not at all
HEADS = [1, 1, 2, 2]
WIDTHS = [8, 8, 16, 16]


@pytest.fixture
def calls():
    """Every call to the attention function registered as "recorded", which does what eager attention does."""
    calls = []

    def recorded(module, query, key, value, attention_mask, *, scaling, dropout, **kwargs):
        calls.append((module, query, key, value, attention_mask, scaling, dropout, kwargs))
        maps = torch.softmax(query @ key.transpose(2, 3) * scaling, dim=-1)
        return (maps @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("recorded", recorded)
    yield calls
    del AttentionInterface._global_mapping["recorded"]


def test_every_block_asks_the_registered_attention_with_what_it_needs(tiny_config, images, calls):
    config = tiny_config(attention_probs_dropout_prob=0.25, attn_implementation="recorded")
    model = SegFormerForSemanticSegmentation(config).eval()
    logits_of(model, images)
    blocks = [stage[0].attention.self for stage in model.segformer.encoder.block]
    assert [call[0] for call in calls] == blocks
    for stage, (module, query, key, value, mask, scaling, dropout, kwargs) in enumerate(calls):
        head_dim = WIDTHS[stage] // HEADS[stage]
        height, width = GRIDS[stage]
        assert query.shape == (2, HEADS[stage], height * width, head_dim)
        assert key.shape == value.shape == (2, HEADS[stage], REDUCED[stage], head_dim)
        assert mask is None
        assert scaling == head_dim**-0.5
        assert dropout == 0
        assert not kwargs.get("is_causal", module.is_causal)


@pytest.mark.parametrize("place", [AttentionInterface._global_mapping, ALL_ATTENTION_FUNCTIONS._local_mapping])
def test_another_function_registered_as_sdpa_is_called(place, model, images, calls, monkeypatch):
    expected = logits_of(model, images)
    monkeypatch.setitem(place, "sdpa", AttentionInterface._global_mapping["recorded"])
    assert_same(logits_of(model, images), expected)
    assert len(calls) == 4


def test_attention_dropout_is_passed_on_in_training_alone(tiny_config, images, calls):
    config = tiny_config(attention_probs_dropout_prob=0.25, attn_implementation="recorded")
    SegFormerForSemanticSegmentation(config).train()(images)
    assert [call[6] for call in calls] == [0.25] * 4


def test_the_registered_attention_can_be_chosen_at_loading_and_later(model, images, calls, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = SegFormerForSemanticSegmentation.from_pretrained(tmp_path, attn_implementation="recorded").eval()
    assert_same(logits_of(loaded, images), logits_of(model, images))
    assert len(calls) == 4
    loaded.set_attn_implementation("eager")
    logits_of(loaded, images)
    assert len(calls) == 4
    loaded.set_attn_implementation("recorded")
    logits_of(loaded, images)
    assert len(calls) == 8


def test_unknown_attention_is_refused_by_name(tiny_config):
    with pytest.raises(ValueError, match="no_such_attention"):
        SegFormerModel._from_config(tiny_config(), attn_implementation="no_such_attention")


def test_eager_and_sdpa_attention_agree_forward_and_backward(model, images):
    found = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = model(images).logits
        logits.square().mean().backward()
        found[implementation] = [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
    for eager, sdpa in zip(found["eager"], found["sdpa"], strict=True):
        assert_same(sdpa, eager)


def test_sdpa_is_the_default_and_flash_and_flex_are_declared(model):
    assert model.config._attn_implementation == "sdpa"
    for flag in ("sdpa", "flash_attn", "flex_attn", "attention_backend"):
        assert getattr(type(model), f"_supports_{flag}") is True


def test_attention_maps_are_true_ones_under_sdpa_and_warn_once(model, images, caplog):
    transformers_logging.warning_once.cache_clear()
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        maps = model(images, output_attentions=True).attentions
        again = model(images, output_attentions=True)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "sdpa" in warnings[0]
    assert "eager" in warnings[0]
    assert_same(again.logits, logits_of(model, images))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(images, output_attentions=True).attentions
    assert len(maps) == len(eager) == 4
    for stage, (found, expected) in enumerate(zip(maps, eager, strict=True)):
        height, width = GRIDS[stage]
        assert found.shape == (2, HEADS[stage], height * width, REDUCED[stage])
        assert_same(found.sum(dim=-1), torch.ones(found.shape[:-1]))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(caplog.records) == 1


def test_asking_for_maps_leaves_the_attention_as_it_was(tiny_config, images, calls):
    model = SegFormerForSemanticSegmentation(tiny_config(attn_implementation="recorded")).eval()
    model(images, output_attentions=True)
    assert not calls
    model(images)
    assert len(calls) == 4
