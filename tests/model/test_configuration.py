"""The configuration: published fields, and values that cannot make a network are refused by name."""

import json

import pytest
import torch
from transformers import AutoConfig, SegformerConfig, SegformerForImageClassification

from hf_segformer import SegFormerConfig, SegFormerForImageClassification, SegFormerForSemanticSegmentation
from hf_segformer.conversion.convert import convert_checkpoint
from tests.support.tiny import TINY


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": [2, 2]}, r"depths is \[2, 2\], 2 entries; expected num_encoder_blocks, 4"),
        ({"num_encoder_blocks": 5}, "num_encoder_blocks is 5; expected 1 to 4"),
        ({"num_attention_heads": [3, 2, 5, 8]}, "32 channels do not divide by 3 heads"),
        ({"sr_ratios": [8, 0, 2, 1]}, r"sr_ratios is \[8, 0, 2, 1\]; expected at least 1 in every entry"),
        ({"patch_sizes": [7, 3, 2, 3]}, r"patch_sizes is \[7, 3, 2, 3\]; expected odd numbers"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate is 1.5; expected a value in \[0, 1\)"),
        ({"classifier_dropout_prob": -0.1}, "classifier_dropout_prob is -0.1"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0; expected a value above 0"),
        ({"num_labels": -3}, "num_labels is -3; expected a whole number, at least 1"),
        ({"num_labels": "3"}, "num_labels is '3'; expected a whole number"),
        ({"id2label": {0: "sky", 2: "road"}}, r"id2label has the keys \[0, 2\]; expected 0 to 1"),
        ({"num_channels": 0}, "num_channels is 0; expected at least 1"),
        ({"out_features": ["stage9"]}, "stage9"),
        ({"hidden_act": "gleu"}, "hidden_act is 'gleu'; expected an activation's name: did you mean 'gelu'"),
    ],
)
def test_impossible_values_are_refused_with_field_and_value(overrides, message):
    with pytest.raises(ValueError, match=message):
        SegFormerConfig(**overrides)


def test_a_field_set_after_construction_is_checked_when_the_model_is_built(tiny_config):
    from hf_segformer import SegFormerModel

    config = tiny_config()
    config.sr_ratios = [8, 4]
    with pytest.raises(ValueError, match="sr_ratios"):
        SegFormerModel(config)


def test_the_nearest_name_is_given_for_a_misspelt_variant_or_field():
    with pytest.raises(ValueError, match="unknown variant 'b6': known are b0, b1, b2, b3, b4, b5"):
        SegFormerConfig.from_variant("b6")
    with pytest.raises(ValueError, match="unknown variant 'B0': did you mean 'b0'"):
        SegFormerConfig.from_variant("B0")
    with pytest.raises(ValueError, match="unknown field 'drop_path' of SegFormerConfig: did you mean 'drop_path_rate'"):
        SegFormerConfig.from_variant("b0", drop_path=0.0)


def test_overrides_of_a_variant_reach_the_configuration():
    config = SegFormerConfig.from_variant("b3", num_labels=7, num_channels=4, out_indices=[0, 2])
    assert (config.depths, config.num_labels, config.num_channels) == ([3, 4, 18, 3], 7, 4)
    assert config.out_features == ["stage1", "stage3"]


def test_a_changed_configuration_leaves_the_variant_as_it_was():
    SegFormerConfig.from_variant("b0").depths[0] = 7
    assert SegFormerConfig.from_variant("b0").depths == [2, 2, 2, 2]


def test_the_fields_are_those_of_transformers_with_the_same_defaults():
    stock, ours = SegformerConfig().to_dict(), SegFormerConfig().to_dict()
    same = set(stock) - {"model_type", "transformers_version"}
    assert {name: stock[name] for name in same} == {name: ours[name] for name in same}


def test_a_file_may_hold_unknown_keys(tmp_path):
    values = {**SegFormerConfig().to_dict(), "image_size": 224, "downsampling_rates": [1, 4, 8, 16]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert AutoConfig.from_pretrained(tmp_path).image_size == 224


def test_save_and_load_keep_every_field_and_name_the_code_of_every_auto_class(tiny_config, tmp_path):
    config = tiny_config(layer_norm_eps=1e-5, id2label={0: "sky", 1: "road"}, out_features=["stage2"])
    config.save_pretrained(tmp_path)
    loaded = SegFormerConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForSemanticSegmentation",
        "AutoModelForImageClassification",
        "AutoBackbone",
    }
    assert (tmp_path / "configuration_segformer.py").exists()


def test_another_networks_config_is_refused_and_transformers_own_is_not(tmp_path, recwarn):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="model_type 'vit'; expected 'hf_segformer' or 'segformer'"):
        SegFormerConfig.from_pretrained(tmp_path)
    SegformerConfig(num_labels=3, depths=[1, 1, 1, 1]).save_pretrained(tmp_path)
    config = SegFormerConfig.from_pretrained(tmp_path)
    assert (config.num_labels, config.depths, config.layer_norm_eps) == (3, [1, 1, 1, 1], 1e-6)
    assert config.to_dict()["model_type"] == "hf_segformer"


def test_a_classifier_of_transformers_with_many_classes_is_loaded(tmp_path):
    stock = SegformerForImageClassification(SegformerConfig(**TINY, num_labels=300))
    stock.save_pretrained(tmp_path)
    # Every version of Transformers is read as the one that writes 255 for any number of classes.
    values = json.loads((tmp_path / "config.json").read_text()) | {"semantic_loss_ignore_index": 255}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for model in (SegFormerForImageClassification.from_pretrained(tmp_path), convert_checkpoint(tmp_path)):
        assert (model.config.num_labels, model.config.semantic_loss_ignore_index) == (300, -100)
        assert torch.equal(model.classifier.weight, stock.classifier.weight)
    assert convert_checkpoint(tmp_path, encoder_only=True).config.semantic_loss_ignore_index == -100
    assert SegFormerConfig.from_pretrained(tmp_path, num_labels=19).semantic_loss_ignore_index == 255


@pytest.mark.parametrize(
    ("saved", "keywords", "expected"),
    [
        ({"num_labels": 1000}, {"num_labels": 19}, 255),
        ({"num_labels": 1000}, {"id2label": ["road", "sky"]}, 255),
        ({"num_labels": 1000}, {}, -100),
        ({"num_labels": 19}, {"num_labels": 300}, -100),
        ({"num_labels": 19, "semantic_loss_ignore_index": -100}, {"num_labels": 7}, -100),  # a choice
        ({"num_labels": 300, "semantic_loss_ignore_index": 65535}, {"num_labels": 7}, 65535),
        ({"num_labels": 1000}, {"num_labels": 19, "semantic_loss_ignore_index": -100}, -100),
    ],
)
def test_a_default_ignore_index_follows_the_number_of_labels(tmp_path, saved, keywords, expected):
    SegFormerConfig(**saved).save_pretrained(tmp_path)
    assert SegFormerConfig.from_pretrained(tmp_path, **keywords).semantic_loss_ignore_index == expected


def test_an_ignore_index_of_a_file_that_is_a_class_is_refused(tmp_path):
    values = {**SegFormerConfig(num_labels=19).to_dict(), "semantic_loss_ignore_index": 7}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="semantic_loss_ignore_index is 7, one of the classes 0 to 18"):
        SegFormerConfig.from_pretrained(tmp_path)


def test_a_segmentation_model_from_a_classifier_ignores_what_the_processor_writes(tmp_path):
    SegFormerForImageClassification(SegFormerConfig(**TINY, num_labels=300)).save_pretrained(tmp_path)
    model = SegFormerForSemanticSegmentation.from_pretrained(tmp_path, num_labels=3)
    labels = torch.tensor([0, 2, 255]).repeat(1, 32, 15)[..., :44]
    assert torch.isfinite(model(torch.zeros(1, 3, 32, 44), labels=labels).loss)


def test_id2label_may_be_a_list_and_brings_its_label2id():
    config = SegFormerConfig(id2label=["road", "sky", "car"])
    assert config.id2label == {0: "road", 1: "sky", 2: "car"}
    assert config.label2id == {"road": 0, "sky": 1, "car": 2}
    assert SegFormerConfig(id2label={0: "road", 1: "sky"}).label2id == {"road": 0, "sky": 1}
    config.id2label = ["a", "b"]
    assert (config.id2label, config.num_labels) == ({0: "a", 1: "b"}, 2)


@pytest.mark.parametrize("load", [SegFormerConfig.from_pretrained, AutoConfig.from_pretrained])
def test_a_file_may_not_choose_code(tmp_path, load, monkeypatch):
    warned = []
    monkeypatch.setattr("hf_segformer.configuration_segformer.logger.warning", warned.append)
    SegFormerConfig().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        (tmp_path / "config.json").write_text(json.dumps({**values, name: "someone/kernels"}))
        warned.clear()
        config = load(tmp_path)
        assert config._attn_implementation is None
        assert config._experts_implementation is None
        assert "'someone/kernels' in a config file; dropped" in warned[0]
    assert load(tmp_path, attn_implementation="eager")._attn_implementation == "eager"


def test_fields_that_no_segformer_reads_are_dropped_with_one_warning(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr("hf_segformer.configuration_segformer.logger.warning", warned.append)
    SegFormerConfig(dtype="float16").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    foreign = {"use_kernels": True, "sub_configs": {}, "quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(values | foreign | {"downsampling_rates": [1, 4, 8, 16]}))
    config = SegFormerConfig.from_pretrained(tmp_path)
    assert config.dtype == torch.float16
    assert not hasattr(config, "use_kernels")
    assert not hasattr(config, "quantization_config")
    assert len(warned) == 1
    assert all(name in warned[0] for name in foreign)
    assert "downsampling_rates" not in warned[0]


def test_fields_of_a_subclass_are_read(tmp_path):
    class OtherConfig(SegFormerConfig):
        own: int = 3

    OtherConfig(own=4).save_pretrained(tmp_path)
    assert OtherConfig.from_pretrained(tmp_path).own == 4
