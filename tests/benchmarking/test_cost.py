"""Cost of a model as `segformer info` prints it, against the paper, real models and PyTorch's own count."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hf_segformer import (
    SegFormerConfig,
    SegFormerForImageClassification,
    SegFormerForSemanticSegmentation,
    SegFormerModel,
)
from hf_segformer.benchmarking.cost import decode_head_cost, format_info, load_config, model_info
from tests.support.tiny import PARAMETERS

VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5")
# Paper, Table 1: ADE20K, 512x512, B5 640x640.
GIGA_MULTIPLY_ADDS = {"b0": 8.4, "b1": 15.9, "b2": 62.4, "b3": 79.0, "b4": 95.7, "b5": 183.3}


def tiny_config(**overrides):
    narrow = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 2, 4]}
    return SegFormerConfig(**{**narrow, "decoder_hidden_size": 12, "num_labels": 5, **overrides})


def counted(model, height, width, module=None):
    """Multiply-adds of one image, and those of one module, as torch counts them."""
    model.eval().set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, model.config.num_channels, height, width))
    flops = counter.get_flop_counts()
    return sum(flops[f"{type(model).__name__}{module or ''}"].values()) // 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_the_papers(variant):
    encoder, ade, cityscapes, imagenet = PARAMETERS[variant]
    config = SegFormerConfig.from_variant(variant, num_labels=150)
    rows = model_info(config, 512, 512)
    assert sum(row.num_parameters for row in rows) == ade
    assert sum(row.num_parameters for row in rows[:4]) == encoder
    config.num_labels = 19
    assert sum(row.num_parameters for row in model_info(config, 512, 512)) == cityscapes
    config.num_labels, config.architectures = 1000, ["SegFormerForImageClassification"]
    assert sum(row.num_parameters for row in model_info(config, 512, 512)) == imagenet
    config.architectures = ["SegFormerModel"]
    assert sum(row.num_parameters for row in model_info(config, 512, 512)) == encoder


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_the_real_models_stage_by_stage(variant):
    config = SegFormerConfig.from_variant(variant, num_labels=150)
    with torch.device("meta"):
        model = SegFormerForSemanticSegmentation(config)
    encoder, rows = model.segformer.encoder, model_info(config, 64, 96)

    def size(*modules):
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    for stage in range(4):
        modules = encoder.patch_embeddings[stage], encoder.block[stage], encoder.layer_norm[stage]
        assert rows[stage].num_parameters == size(*modules)
    assert rows[4].num_parameters == size(model.decode_head)


@pytest.mark.parametrize("variant", VARIANTS)
def test_multiply_adds_with_an_unfolded_head_are_the_papers(variant):
    side = 640 if variant == "b5" else 512
    config = SegFormerConfig.from_variant(variant, num_labels=150)
    stages = model_info(config, side, side)[:4]
    total = sum(row.num_multiply_adds for row in stages) + decode_head_cost(config, stages, folded=False)
    assert total / 1e9 == pytest.approx(GIGA_MULTIPLY_ADDS[variant], rel=3e-3)


@given(height=st.integers(8, 90), width=st.integers(8, 90))
@settings(max_examples=12, deadline=None)
def test_multiply_adds_equal_torchs_count_at_any_size(height, width):
    config = tiny_config()
    rows = model_info(config, height, width)
    assert sum(row.num_multiply_adds for row in rows) == counted(
        SegFormerForSemanticSegmentation(config), height, width
    )
    assert sum(row.num_multiply_adds for row in rows[:-1]) == counted(SegFormerModel(config), height, width)


def test_the_unfolded_head_equals_torchs_count():
    config = tiny_config()
    model = SegFormerForSemanticSegmentation(config)
    model.decode_head.linear_fuse.register_forward_hook(lambda *_: None)  # what is hooked is called, not folded
    stages = model_info(config, 64, 96)[:-1]
    assert decode_head_cost(config, stages, folded=False) == counted(model, 64, 96, ".decode_head")


def test_custom_architectures_are_counted_too():
    config = tiny_config(
        num_channels=5, sr_ratios=[1, 3, 2, 1], mlp_ratios=[2, 4, 1, 3], patch_sizes=[5, 3, 1, 7], strides=[3, 2, 1, 2]
    )
    rows = model_info(config, 64, 96)
    model = SegFormerForSemanticSegmentation(config)
    assert sum(row.num_multiply_adds for row in rows) == counted(model, 64, 96)
    assert sum(row.num_parameters for row in rows) == model.num_parameters()


def test_a_classifier_counts_its_linear_layer():
    config = tiny_config(architectures=["SegFormerForImageClassification"])
    rows = model_info(config, 64, 96)
    assert rows[-1].name == "classifier"
    assert sum(row.num_multiply_adds for row in rows) == counted(SegFormerForImageClassification(config), 64, 96)


def test_rows_of_b2_at_128_pixels():
    first, second, third, last, head = model_info(SegFormerConfig.from_variant("b2"), 128, 128)
    assert (first.grid, first.num_tokens, first.num_channels) == ((32, 32), 1024, 64)
    assert (first.reduction, first.num_reduced_tokens) == (8, 16)
    assert (second.num_reduced_tokens, third.num_reduced_tokens) == (16, 16)
    assert (last.reduction, last.num_tokens, last.num_reduced_tokens) == (1, 16, 16)
    assert (head.name, head.grid, head.num_channels) == ("decode head", (32, 32), 768)


def test_a_grid_below_its_reduction_keeps_one_token():
    rows = model_info(SegFormerConfig.from_variant("b0"), 8, 40)
    assert [row.grid for row in rows[:4]] == [(2, 10), (1, 5), (1, 3), (1, 2)]
    assert [row.num_reduced_tokens for row in rows[:4]] == [1, 1, 1, 2]


@pytest.mark.parametrize("size", [(7, 64), (64, 7), (0, 0), (-8, 64)])
def test_sides_below_8_pixels_are_refused(size):
    with pytest.raises(ValueError, match=f"the image is {size[0]}x{size[1]}; expected sides of at least 8"):
        model_info(SegFormerConfig.from_variant("b0"), *size)


def test_the_table_shows_every_number_and_what_the_fold_saves():
    config = SegFormerConfig.from_variant("b1", num_labels=150)
    title, header, *rows, note = format_info(config, 128, 128).splitlines()
    assert title == "128x128 pixels, 3 channels, 150 labels"
    assert len({len(row) for row in [header, *rows]}) == 1
    cells = [row.split("  ") for row in rows]
    cells = [[cell.strip() for cell in row if cell] for row in cells]
    assert cells[0][:9] == ["stage1", "32x32", "1024", "64", "1", "8", "16", "1024x16", "639,488"]
    assert [row[0] for row in cells] == ["stage1", "stage2", "stage3", "stage4", "decode head", "total"]
    assert cells[-1] == ["total", "13,715,798", "669.2 M", "100.0%"]
    assert sum(float(row[-1].rstrip("%")) for row in cells[:-1]) == pytest.approx(100, abs=0.3)
    assert note == ("The decode head is folded. As in the paper it would take 340.3 M, and the whole model 870.5 M.")


def test_an_encoder_has_no_labels_and_no_note_on_folding():
    title, *lines = format_info(tiny_config(architectures=["SegFormerModel"]), 64, 96).splitlines()
    assert title == "64x96 pixels, 3 channels, no head"
    assert lines[-1].startswith("total")


def test_configurations_come_from_variants_files_folders_and_checkpoints(tmp_path):
    assert list(load_config("b3").depths) == [3, 4, 18, 3]
    assert load_config("b0", num_labels=1000).num_labels == 1000
    model = SegFormerForImageClassification(tiny_config())
    model.save_pretrained(tmp_path / "folder")
    torch.save(SegFormerModel(tiny_config(hidden_sizes=[4, 8, 20, 32])).state_dict(), tmp_path / "encoder.pth")
    for source in (tmp_path / "folder", tmp_path / "folder" / "config.json"):
        assert model_info(load_config(str(source)), 64, 96)[-1].name == "classifier"
    config = load_config(str(tmp_path / "encoder.pth"))
    assert (list(config.hidden_sizes), config.architectures) == ([4, 8, 20, 32], ["SegFormerModel"])


@pytest.mark.parametrize("source", ["b6", "bo", "config.json", "missing/folder/here", "./b0"])
def test_an_unknown_source_is_named(source):
    with pytest.raises(ValueError, match=r"is no file, folder, Hub repository or variant: (did you mean|known are)"):
        load_config(source)


def test_a_config_of_another_network_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert'"):
        load_config(str(tmp_path / "config.json"))
