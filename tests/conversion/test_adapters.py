"""PEFT adapter folders: merged as PEFT merges them, and every other kind refused with the way out."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor, SegFormerModel
from hf_segformer.conversion.loading import load_segmentation

peft = pytest.importorskip("peft")
pytestmark = [  # in PEFT
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape"),  # of a bias, which has one axis
]
NARROW = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}


@pytest.fixture
def base(tmp_path):
    """A base model's folder with its processor."""
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**NARROW, decoder_hidden_size=12, num_labels=4)).eval()
    model.save_pretrained(tmp_path / "base")
    SegFormerImageProcessor(size=48).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapt(base, folder, **options):
    """Save an adapter whose every tensor differs from its initial value; return the model with it merged."""
    torch.manual_seed(1)
    model = SegFormerForSemanticSegmentation.from_pretrained(base)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    for name, tensor in model.state_dict().items():
        if ("lora_" in name or "modules_to_save" in name) and tensor.is_floating_point():
            tensor.uniform_(0.1, 0.3)
    model.save_pretrained(folder)
    return model.merge_and_unload()


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"modules_to_save": ["decode_head"]},
        {"target_modules": ["query", "dense1", "dense2", "linear_fuse", "sr"]},
        {"lora_bias": True},
        {"bias": "lora_only"},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
@torch.no_grad()
def test_an_adapter_is_merged_as_peft_does(options, base, tmp_path):
    expected = adapt(base, tmp_path / "adapter", **options)
    model, processor = load_segmentation(tmp_path / "adapter")
    pixels = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(model(pixels).logits, expected(pixels).logits, rtol=0, atol=1e-5)
    assert processor.size == {"height": 48, "width": 48}


def test_missing_running_statistics_are_warned_of(base, tmp_path, caplog):
    adapt(base, tmp_path / "adapter")
    load_segmentation(tmp_path / "adapter")
    assert "no running statistics of the head's BatchNorm" in caplog.text
    caplog.clear()
    adapt(base, tmp_path / "whole", modules_to_save=["decode_head"])
    load_segmentation(tmp_path / "whole")
    assert "running statistics" not in caplog.text


def test_an_adapter_brings_the_head_that_its_base_lacks(base, tmp_path):
    expected = adapt(base, tmp_path / "adapter", modules_to_save=["decode_head"])
    encoder_config = SegFormerConfig(**NARROW, decoder_hidden_size=12, num_labels=300)  # of a classifier
    SegFormerModel(encoder_config).save_pretrained(tmp_path / "encoder")
    encoder = {k.removeprefix("segformer."): v for k, v in load_file(base / "model.safetensors").items()}
    encoder = {k: v for k, v in encoder.items() if not k.startswith("decode_head.")}
    save_file(encoder, tmp_path / "encoder" / "model.safetensors", metadata={"format": "pt"})
    edit(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "encoder"))
    model, _ = load_segmentation(tmp_path / "adapter")
    assert (model.config.num_labels, model.config.semantic_loss_ignore_index) == (4, 255)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_a_head_without_its_running_statistics_is_refused(base, tmp_path):
    weights = {k: v for k, v in load_file(base / "model.safetensors").items() if "running_" not in k}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"running statistics of the head's BatchNorm were not saved"):
        load_segmentation(base)


@pytest.mark.parametrize("name", ["owner/name", "no/such/folder", None, "../gone", ["a"]])
def test_a_base_that_is_not_here_is_named(name, base, tmp_path):
    adapt(base, tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path=name)
    with pytest.raises(ValueError, match=r"adapter is a PEFT adapter of .*base_model_name_or_path"):
        load_segmentation(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"use_dora": True}, "use_dora is set"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"rank_pattern": {"query": 2}}, "rank_pattern is set"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config is set"),
        ({"r": 3}, "the rank of .* is 4; expected r of adapter_config.json, 3"),
        ({"r": None}, "r is None; expected a number above 0"),
    ],
)
def test_other_adapters_are_refused_with_the_way_out(values, words, base, tmp_path):
    adapt(base, tmp_path / "adapter")
    edit(tmp_path / "adapter", **values)
    with pytest.raises(ValueError, match=words):
        load_segmentation(tmp_path / "adapter")


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    adapt(base, tmp_path / "adapter")
    narrow = SegFormerConfig(**NARROW | {"hidden_sizes": [4, 8, 16, 16]}, decoder_hidden_size=12)
    SegFormerForSemanticSegmentation(narrow).save_pretrained(tmp_path / "other")
    edit(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"is adapted as \(8, 8\); expected its base's \(4, 4\)"):
        load_segmentation(tmp_path / "adapter")


def test_an_adapter_of_itself_does_not_loop(base, tmp_path):
    adapt(base, tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="adapter of another adapter"):
        load_segmentation(tmp_path / "adapter")
    shutil.rmtree(base)
