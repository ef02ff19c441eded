"""Weights of other code bases: names, numbers, refusals.

The code bases' names are written down here a second time, module by module, independent of the package's tables.
"""

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from hf_segformer import (
    SegFormerBackbone,
    SegFormerConfig,
    SegFormerForImageClassification,
    SegFormerForSemanticSegmentation,
    SegFormerModel,
)
from hf_segformer.conversion.convert import convert_checkpoint, inflate
from hf_segformer.conversion.loading import image_processor_for, load_segmentation
from hf_segformer.conversion.to_transformers import to_transformers
from hf_segformer.image_processing_segformer import SegFormerImageProcessor

VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5")
NUM_LABELS = 5


def tiny_config(variant="b0", **overrides):
    """A variant's structure at an eighth of its widths."""
    narrow = {"hidden_sizes": [4, 8, 20, 32] if variant == "b0" else [8, 16, 40, 64], "decoder_hidden_size": 12}
    return SegFormerConfig.from_variant(variant, **{"num_labels": NUM_LABELS, **narrow, **overrides})


def filled(model_class=SegFormerForSemanticSegmentation, config=None):
    """A model in which every tensor, BatchNorm's statistics included, has values of its own."""
    torch.manual_seed(0)
    model = model_class(config or tiny_config()).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_(0, 0.3 if tensor.ndim > 1 else 0.1)
    return model


def images(num_channels=3):
    return torch.randn(2, num_channels, 64, 96, generator=torch.Generator().manual_seed(1))


class Names(dict):
    """A state dict that is filled module by module."""

    def put(self, name, *modules):
        """The modules' tensors under one name, stacked if there are several."""
        for key, tensor in modules[0].state_dict().items():
            tensors = [tensor, *(module.state_dict()[key] for module in modules[1:])]
            self[f"{name}{key}"] = torch.cat(tensors) if modules[1:] else tensor.clone()


def paper_encoder(encoder, prefix=""):
    """The encoder as the paper's code saves it: keys and values fused."""
    names = Names()
    for stage in range(len(encoder.block)):
        names.put(f"{prefix}patch_embed{stage + 1}.proj.", encoder.patch_embeddings[stage].proj)
        names.put(f"{prefix}patch_embed{stage + 1}.norm.", encoder.patch_embeddings[stage].layer_norm)
        for index, block in enumerate(encoder.block[stage]):
            name, attention = f"{prefix}block{stage + 1}.{index}", block.attention.self
            names.put(f"{name}.norm1.", block.layer_norm_1)
            names.put(f"{name}.attn.q.", attention.query)
            names.put(f"{name}.attn.kv.", attention.key, attention.value)
            names.put(f"{name}.attn.proj.", block.attention.output.dense)
            if attention.sr_ratio > 1:
                names.put(f"{name}.attn.sr.", attention.sr)
                names.put(f"{name}.attn.norm.", attention.layer_norm)
            names.put(f"{name}.norm2.", block.layer_norm_2)
            names.put(f"{name}.mlp.fc1.", block.mlp.dense1)
            names.put(f"{name}.mlp.dwconv.dwconv.", block.mlp.dwconv.dwconv)
            names.put(f"{name}.mlp.fc2.", block.mlp.dense2)
        names.put(f"{prefix}norm{stage + 1}.", encoder.layer_norm[stage])
    return names


def paper_segmenter(model):
    """The whole network as the paper's code saves it."""
    names, head = paper_encoder(model.segformer.encoder, "backbone."), model.decode_head
    for stage, linear in enumerate(head.linear_c):
        names.put(f"decode_head.linear_c{stage + 1}.proj.", linear.proj)
    names.put("decode_head.linear_fuse.conv.", head.linear_fuse)
    names.put("decode_head.linear_fuse.bn.", head.batch_norm)
    names.put("decode_head.linear_pred.", head.classifier)
    names["decode_head.conv_seg.weight"] = torch.zeros(NUM_LABELS, 12, 1, 1)
    names["decode_head.conv_seg.bias"] = torch.zeros(NUM_LABELS)
    return names


def models_pytorch_segmenter(model):
    """The whole network as segmentation_models_pytorch saves it."""
    names, head = paper_encoder(model.segformer.encoder, "encoder."), model.decode_head
    for place, linear in enumerate(reversed(head.linear_c)):
        names.put(f"decoder.mlp_stage.{place}.linear.", linear.proj)
    names.put("decoder.fuse_stage.0.", head.linear_fuse)
    names.put("decoder.fuse_stage.1.", head.batch_norm)
    names.put("segmentation_head.0.", head.classifier)
    return names


def mmsegmentation_encoder(encoder, prefix=""):
    """The encoder as mmsegmentation saves it: query, key and value stacked, linear layers as 1x1 convolutions."""
    names = Names()
    for stage in range(len(encoder.block)):
        names.put(f"{prefix}layers.{stage}.0.projection.", encoder.patch_embeddings[stage].proj)
        names.put(f"{prefix}layers.{stage}.0.norm.", encoder.patch_embeddings[stage].layer_norm)
        for index, block in enumerate(encoder.block[stage]):
            name, attention = f"{prefix}layers.{stage}.1.{index}", block.attention.self
            names.put(f"{name}.norm1.", block.layer_norm_1)
            names.put(f"{name}.attn.attn.in_proj_", attention.query, attention.key, attention.value)
            names.put(f"{name}.attn.attn.out_proj.", block.attention.output.dense)
            if attention.sr_ratio > 1:
                names.put(f"{name}.attn.sr.", attention.sr)
                names.put(f"{name}.attn.norm.", attention.layer_norm)
            names.put(f"{name}.norm2.", block.layer_norm_2)
            names.put(f"{name}.ffn.layers.0.", block.mlp.dense1)
            names.put(f"{name}.ffn.layers.1.", block.mlp.dwconv.dwconv)
            names.put(f"{name}.ffn.layers.4.", block.mlp.dense2)
            for layer in (0, 4):
                names[f"{name}.ffn.layers.{layer}.weight"] = names[f"{name}.ffn.layers.{layer}.weight"][
                    :, :, None, None
                ]
        names.put(f"{prefix}layers.{stage}.2.", encoder.layer_norm[stage])
    return names


def paper_features(weights, pixels, depths, heads=(1, 2, 5, 8), prefix="backbone."):
    """The paper's encoder, from its own names: every stage's features."""

    def parts(name):
        return weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"]

    def norm(tokens, name, eps):
        return F.layer_norm(tokens, tokens.shape[-1:], *parts(name), eps)

    def grid(tokens, height, width):
        return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)

    stages = []
    for stage, depth in enumerate(depths, start=1):
        stride, padding = (4, 3) if stage == 1 else (2, 1)
        pixels = F.conv2d(pixels, *parts(f"patch_embed{stage}.proj"), stride=stride, padding=padding)
        batch, channels, height, width = pixels.shape
        tokens = norm(pixels.flatten(2).transpose(1, 2), f"patch_embed{stage}.norm", 1e-5)
        for index in range(depth):
            block, num = f"block{stage}.{index}", heads[stage - 1]
            source = normed = norm(tokens, f"{block}.norm1", 1e-6)
            if f"{prefix}{block}.attn.sr.weight" in weights:
                kernel, bias = parts(f"{block}.attn.sr")
                source = F.conv2d(grid(normed, height, width), kernel, bias, stride=kernel.shape[-1])
                source = norm(source.flatten(2).transpose(1, 2), f"{block}.attn.norm", 1e-5)
            query = F.linear(normed, *parts(f"{block}.attn.q")).reshape(batch, -1, num, channels // num)
            fused = F.linear(source, *parts(f"{block}.attn.kv")).reshape(batch, -1, 2, num, channels // num)
            key, value = fused[:, :, 0], fused[:, :, 1]
            maps = torch.einsum("bnhc,bmhc->bhnm", query, key) / (channels // num) ** 0.5
            context = torch.einsum("bhnm,bmhc->bnhc", maps.softmax(-1), value).reshape(batch, -1, channels)
            tokens = tokens + F.linear(context, *parts(f"{block}.attn.proj"))
            hidden = grid(F.linear(norm(tokens, f"{block}.norm2", 1e-6), *parts(f"{block}.mlp.fc1")), height, width)
            hidden = F.conv2d(hidden, *parts(f"{block}.mlp.dwconv.dwconv"), padding=1, groups=hidden.shape[1])
            tokens = tokens + F.linear(F.gelu(hidden.flatten(2).transpose(1, 2)), *parts(f"{block}.mlp.fc2"))
        pixels = grid(norm(tokens, f"norm{stage}", 1e-6), height, width)
        stages.append(pixels)
    return stages


def fused_logits(stages, linears, fuse, batch_norm, classifier):
    """An all-MLP head: linear layers for stages 4, 3, 2, 1, concatenated in that order, fused, classified."""
    size = stages[0].shape[-2:]
    projected = [
        F.interpolate(F.conv2d(stage, weight[:, :, None, None], bias), size, mode="bilinear", align_corners=False)
        for stage, (weight, bias) in zip(reversed(stages), linears, strict=True)
    ]
    fused = F.conv2d(torch.cat(projected, dim=1), fuse)
    fused = F.batch_norm(fused, *batch_norm)
    return F.conv2d(F.relu(fused), *classifier)


def batch_norm_of(weights, name):
    return [weights[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]


def saved(folder, content, name="weights.pth"):
    torch.save(dict(content), folder / name)
    return folder / name


def assert_same_weights(model, source):
    """Equal names, values and number of tensors."""
    expected = source.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == expected[name].dtype


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_papers_segmentation_checkpoint_of_every_variant_comes_back_tensor_by_tensor(variant, tmp_path):
    source = filled(config=tiny_config(variant))
    path = saved(tmp_path, {"state_dict": dict(paper_segmenter(source)), "meta": {"epoch": 3}, "optimizer": {}})
    model = convert_checkpoint(path)
    assert type(model) is SegFormerForSemanticSegmentation
    assert not model.training
    assert_same_weights(model, source)
    found = {"architectures": ["SegFormerForSemanticSegmentation"], "dtype": "float32"}
    assert model.config.to_dict() == tiny_config(variant).to_dict() | found


@pytest.mark.parametrize("variant", VARIANTS)
def test_mmsegmentations_encoder_of_every_variant_comes_back_tensor_by_tensor(variant, tmp_path):
    source = filled(SegFormerModel, tiny_config(variant))
    model = convert_checkpoint(saved(tmp_path, mmsegmentation_encoder(source.encoder)))
    assert type(model) is SegFormerModel
    assert list(model.config.depths) == list(source.config.depths)
    assert_same_weights(model, source)


@pytest.mark.parametrize("variant", ["b0", "b2"])
def test_segmentation_models_pytorch_of_every_variant_comes_back_tensor_by_tensor(variant, tmp_path):
    source = filled(config=tiny_config(variant))
    model = convert_checkpoint(saved(tmp_path, models_pytorch_segmenter(source)))
    assert type(model) is SegFormerForSemanticSegmentation
    assert_same_weights(model, source)


@torch.no_grad()
def test_logits_are_those_of_the_papers_network(tmp_path):
    source = filled(config=tiny_config(depths=[2, 1, 2, 1]))
    weights = paper_segmenter(source)
    stages = paper_features(weights, images(), source.config.depths)
    linears = [
        (weights[f"decode_head.linear_c{stage}.proj.weight"], weights[f"decode_head.linear_c{stage}.proj.bias"])
        for stage in (4, 3, 2, 1)
    ]
    expected = fused_logits(
        stages,
        linears,
        weights["decode_head.linear_fuse.conv.weight"],
        batch_norm_of(weights, "decode_head.linear_fuse.bn"),
        (weights["decode_head.linear_pred.weight"], weights["decode_head.linear_pred.bias"]),
    )
    logits = convert_checkpoint(saved(tmp_path, weights))(images()).logits
    assert logits.shape == (2, NUM_LABELS, 16, 24)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_logits_are_those_of_segmentation_models_pytorch_before_its_last_upsampling(tmp_path):
    source = filled(config=tiny_config(depths=[1, 1, 1, 1], num_labels=1))
    weights = models_pytorch_segmenter(source)
    expected = fused_logits(
        paper_features(weights, images(), source.config.depths, prefix="encoder."),
        [
            (weights[f"decoder.mlp_stage.{place}.linear.weight"], weights[f"decoder.mlp_stage.{place}.linear.bias"])
            for place in range(4)
        ],
        weights["decoder.fuse_stage.0.weight"],
        batch_norm_of(weights, "decoder.fuse_stage.1"),
        (weights["segmentation_head.0.weight"], weights["segmentation_head.0.bias"]),
    )
    logits = convert_checkpoint(saved(tmp_path, weights))(images()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_mmsegmentations_stacked_attention_is_taken_apart_as_torch_reads_it(tmp_path):
    weights = mmsegmentation_encoder(filled(SegFormerModel).encoder)
    stacked = torch.nn.MultiheadAttention(32, num_heads=8, batch_first=True)
    name = "layers.3.1.1.attn.attn."
    stacked.load_state_dict({key.removeprefix(name): weights[key] for key in weights if key.startswith(name)})
    attention = convert_checkpoint(saved(tmp_path, weights)).encoder.block[3][1].attention
    tokens = torch.randn(2, 6, 32)
    expected = stacked(tokens, tokens, tokens)[0]
    torch.testing.assert_close(attention(tokens, 2, 3)[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_papers_imagenet_encoder_becomes_a_classifier(tmp_path):
    source = filled(SegFormerForImageClassification)
    names = paper_encoder(source.segformer.encoder)
    names.put("head.", source.classifier)
    model = convert_checkpoint(saved(tmp_path, names))
    assert type(model) is SegFormerForImageClassification
    assert_same_weights(model, source)
    last = paper_features(names, images(), model.config.depths, prefix="")[-1]
    expected = F.linear(last.flatten(2).mean(2), names["head.weight"], names["head.bias"])
    torch.testing.assert_close(model(images()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "backbone.", "encoder."])
def test_a_bare_encoder_of_the_papers_code_becomes_the_model_without_head(prefix, tmp_path):
    source = filled(SegFormerModel)
    model = convert_checkpoint(saved(tmp_path, paper_encoder(source.encoder, prefix)))
    assert type(model) is SegFormerModel
    assert_same_weights(model, source)


def test_half_precision_weights_come_as_float32(tmp_path):
    source = filled()
    halves = {key: value.half() if value.is_floating_point() else value for key, value in source.state_dict().items()}
    model = convert_checkpoint(saved(tmp_path, halves))
    assert model.dtype == torch.float32
    assert_same_weights(model, source.half().float())


@pytest.mark.parametrize(
    "model_class", [SegFormerForSemanticSegmentation, SegFormerForImageClassification, SegFormerModel]
)
def test_our_own_folder_comes_back_with_its_config(model_class, tmp_path):
    config = tiny_config(
        num_attention_heads=[2, 2, 4, 4], patch_sizes=[5, 3, 3, 3], layer_norm_eps=1e-5, drop_path_rate=0.3
    )
    source = filled(model_class, config)
    source.save_pretrained(tmp_path)
    model = convert_checkpoint(tmp_path)
    assert type(model) is model_class
    assert_same_weights(model, source)
    assert list(model.config.num_attention_heads) == [2, 2, 4, 4]
    assert (model.config.layer_norm_eps, model.config.drop_path_rate) == (1e-5, 0.3)


TRANSFORMERS = {
    SegFormerForSemanticSegmentation: transformers.SegformerForSemanticSegmentation,
    SegFormerForImageClassification: transformers.SegformerForImageClassification,
    SegFormerModel: transformers.SegformerModel,
}


def transformers_model(model_class, **overrides):
    """Transformers' own model, small, with weights and statistics of its own."""
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        hidden_sizes=[4, 8, 20, 32], decoder_hidden_size=12, num_labels=NUM_LABELS, layer_norm_eps=1e-5, **overrides
    )
    model = TRANSFORMERS[model_class](config).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.05, 0.4)
    return model


@pytest.mark.parametrize("form", ["folder", "shards", "published names", "names in memory"])
@pytest.mark.parametrize("model_class", TRANSFORMERS)
@torch.no_grad()
def test_transformers_own_checkpoints_give_its_outputs(model_class, form, tmp_path):
    theirs = transformers_model(model_class)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if form == "shards" else "5GB")
    if form == "shards":
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    elif form == "published names":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    elif form == "names in memory":
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    model = convert_checkpoint(tmp_path)
    assert type(model) is model_class
    torch.testing.assert_close(model(images())[0], theirs(images())[0], rtol=1e-4, atol=1e-5)


def test_a_state_dict_of_transformers_model_alone_is_read_by_its_shapes(tmp_path):
    theirs = transformers_model(SegFormerForSemanticSegmentation)
    model = convert_checkpoint(saved(tmp_path, theirs.state_dict()))
    assert (model.config.num_labels, list(model.config.sr_ratios)) == (NUM_LABELS, [8, 4, 2, 1])


def test_reductions_widths_channels_and_ratios_are_inferred_from_shapes(tmp_path):
    config = tiny_config(sr_ratios=[4, 1, 2, 2], mlp_ratios=[2, 4, 8, 1], num_channels=6, decoder_hidden_size=10)
    model = convert_checkpoint(saved(tmp_path, paper_segmenter(filled(config=config))))
    assert model.config.sr_ratios == [4, 1, 2, 2]
    assert model.config.mlp_ratios == [2, 4, 8, 1]
    assert (model.config.num_channels, model.config.decoder_hidden_size) == (6, 10)


@pytest.mark.parametrize(
    "meta", [{"CLASSES": list("abcde"), "PALETTE": [[0, 0, 0]]}, {"dataset_meta": {"classes": tuple("abcde")}}]
)
def test_names_of_classes_in_the_file_become_labels(meta, tmp_path):
    path = saved(tmp_path, {"state_dict": dict(paper_segmenter(filled())), "meta": meta})
    config = convert_checkpoint(path).config
    assert config.id2label == dict(enumerate("abcde"))
    assert config.label2id["c"] == 2


def test_names_of_classes_that_do_not_fit_the_head_are_not_used(tmp_path):
    path = saved(tmp_path, {"state_dict": dict(paper_segmenter(filled())), "meta": {"CLASSES": ["road", "sky"]}})
    assert convert_checkpoint(path).config.id2label[0] == "LABEL_0"


# The first convolution for another number of bands


@given(bands=st.integers(1, 5), num_channels=st.integers(1, 9))
def test_inflated_filters_keep_the_response_to_equal_channels(bands, num_channels):
    generator = torch.Generator().manual_seed(bands)
    weight = torch.randn(6, bands, 7, 7, generator=generator)
    grey = torch.randn(1, 1, 21, 30, generator=generator)
    inflated = inflate(weight, num_channels)
    assert inflated.shape == (6, num_channels, 7, 7)
    before = F.conv2d(grey.expand(-1, bands, -1, -1), weight)
    after = F.conv2d(grey.expand(-1, num_channels, -1, -1), inflated)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_inflated_filters_keep_their_colours():
    red, green, blue = weight = torch.randn(3, 1, 7, 7)
    four = inflate(weight.transpose(0, 1), 4)[0]
    assert torch.equal(four, torch.stack([red[0] / 2, green[0], blue[0], red[0] / 2]))
    assert torch.equal(inflate(weight.transpose(0, 1), 3)[0], weight[:, 0])


@pytest.mark.parametrize("num_channels", [1, 2, 4])
def test_num_channels_changes_the_first_convolution_alone(num_channels, tmp_path):
    source = filled()
    model = convert_checkpoint(saved(tmp_path, paper_segmenter(source)), num_channels=num_channels)
    assert model.config.num_channels == num_channels
    assert model(images(num_channels)).logits.shape == (2, NUM_LABELS, 16, 24)
    first = "segformer.encoder.patch_embeddings.0.proj.weight"
    for name, tensor in source.state_dict().items():
        assert name == first or torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("num_channels", [0, "4", 4.0, True])
def test_an_invalid_number_of_channels_is_refused(num_channels, tmp_path):
    with pytest.raises(ValueError, match=f"num_channels is {num_channels!r}; expected a whole number"):
        convert_checkpoint(tmp_path, num_channels=num_channels)


# Refusals


def with_mmsegmentations_head(model):
    names = mmsegmentation_encoder(model.segformer.encoder, "backbone.")
    names["decode_head.convs.0.conv.weight"] = torch.zeros(12, 4, 1, 1)
    names["decode_head.fusion_conv.conv.weight"] = torch.zeros(12, 48, 1, 1)
    names["decode_head.conv_seg.weight"] = torch.zeros(NUM_LABELS, 12, 1, 1)
    return names


def test_mmsegmentations_head_is_refused_with_the_reason_and_the_way_out(tmp_path):
    path = saved(tmp_path, with_mmsegmentations_head(filled()))
    with pytest.raises(
        ValueError, match=r"weights\.pth holds mmsegmentation's decode head.*BatchNorm and ReLU.*encoder_only"
    ):
        convert_checkpoint(path)


def test_the_encoder_of_another_networks_checkpoint_is_had_on_its_own(tmp_path):
    source = filled()
    unet = paper_encoder(source.segformer.encoder, "encoder.")
    unet["decoder.blocks.0.conv1.0.weight"] = torch.zeros(3, 3)
    unet["segmentation_head.0.weight"] = torch.zeros(1, 16, 3, 3)
    with pytest.raises(ValueError, match=r"no place for, 2 in all: decoder\.blocks\.0.*encoder_only=True"):
        convert_checkpoint(saved(tmp_path, unet))
    for weights in (with_mmsegmentations_head(source), unet, paper_segmenter(source), source.state_dict()):
        model = convert_checkpoint(saved(tmp_path, weights), encoder_only=True)
        assert type(model) is SegFormerModel
        assert_same_weights(model, source.segformer)


@pytest.mark.parametrize(
    "lost",
    [
        "backbone.patch_embed1.proj.weight",
        "backbone.block1.0.norm1.weight",
        "backbone.block2.0.attn.kv.bias",
        "backbone.block3.1.attn.sr.weight",
        "backbone.block3.0.attn.norm.bias",
        "backbone.norm4.weight",
        "decode_head.linear_c1.proj.weight",
        "decode_head.linear_fuse.bn.running_var",
        "decode_head.linear_pred.bias",
    ],
)
def test_a_missing_key_is_named(lost, tmp_path):
    weights = paper_segmenter(filled())
    del weights[lost]
    with pytest.raises(ValueError, match=rf"weights\.pth misses 1 in all: {lost}($|; the running statistics)"):
        convert_checkpoint(saved(tmp_path, weights))


@pytest.mark.parametrize("name", ["backbone.block5.0.norm1.weight", "backbone.block1.0.norm3.weight", "queue"])
def test_a_key_left_over_is_named(name, tmp_path):
    weights = paper_segmenter(filled()) | {name: torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=name):
        convert_checkpoint(saved(tmp_path, weights))


def test_a_gap_in_a_stages_blocks_is_named_before_millions_of_names_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_segformer.conversion.name_tables._pairs", lambda *_: pytest.fail("names are made"))
    source = filled()
    for weights, high, low in (
        (source.state_dict(), "segformer.encoder.block.0.99999", "segformer.encoder.block.0.2"),
        (paper_segmenter(source), "backbone.block2.99999", "backbone.block2.2"),
    ):
        path = saved(tmp_path, dict(weights) | {f"{high}.norm1.weight": torch.zeros(4)})
        with pytest.raises(ValueError, match=rf"weights\.pth holds {re.escape(high)}, but no {re.escape(low)};"):
            convert_checkpoint(path)


def test_many_missing_keys_are_counted_and_ten_of_them_named(tmp_path):
    weights = {key: tensor for key, tensor in paper_segmenter(filled()).items() if "block3.1" not in key}
    weights["backbone.block3.1.norm1.weight"] = torch.zeros(20)
    with pytest.raises(ValueError, match=r"misses 19 in all: ") as caught:
        convert_checkpoint(saved(tmp_path, weights))
    assert str(caught.value).count("backbone.") == 10
    assert str(caught.value).endswith(", ...")


def test_tensors_of_wrong_shape_are_named_with_both_shapes(tmp_path):
    weights = paper_segmenter(filled())
    weights["backbone.block1.0.attn.proj.weight"] = torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"block\.0\.0\.attention\.output\.dense\.weight \(4, 5\) instead of \(4, 4\)"):
        convert_checkpoint(saved(tmp_path, weights))
    weights = paper_segmenter(filled())
    weights["backbone.block1.0.attn.kv.weight"] = torch.zeros(7, 4)
    with pytest.raises(ValueError, match=r"block1\.0\.attn\.kv\.weight is \(7, 4\), but it must hold 2 equal parts"):
        convert_checkpoint(saved(tmp_path, weights))


def test_a_config_that_does_not_fit_its_weights_is_refused(tmp_path):
    filled().save_pretrained(tmp_path)
    tiny_config(depths=[2, 2, 3, 2]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"misses 22 in all: segformer\.encoder\.block\.2\.2\."):
        convert_checkpoint(tmp_path)
    tiny_config(num_labels=7).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"decode_head\.classifier\.weight \(5, 12, 1, 1\) instead of \(7, 12, 1, 1\)"):
        convert_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"hidden_sizes": [4, 8, 16, 32], "num_attention_heads": [1, 2, 4, 8]}, r"hidden_sizes \[4, 8, 16, 32\]"),
        ({"patch_sizes": [3, 3, 3, 3]}, r"patch_sizes \[3, 3, 3, 3\]"),
    ],
)
def test_properties_that_shapes_cannot_show_are_not_guessed(overrides, reason, tmp_path):
    source = filled(config=tiny_config(**overrides))
    with pytest.raises(ValueError, match=reason + r".*convert a folder with a config\.json"):
        convert_checkpoint(saved(tmp_path, source.state_dict()))
    source.save_pretrained(tmp_path / "folder")
    assert_same_weights(convert_checkpoint(tmp_path / "folder"), source)


def test_a_broken_mlp_ratio_is_named(tmp_path):
    weights = paper_segmenter(filled())
    weights["backbone.block1.0.mlp.fc1.weight"] = torch.zeros(6, 4)
    with pytest.raises(ValueError, match=r"mlp_ratios \[1\.5, 4\.0, 4\.0, 4\.0\]"):
        convert_checkpoint(saved(tmp_path, weights))


def test_a_state_dict_of_another_network_is_refused(tmp_path):
    weights = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)).state_dict()
    with pytest.raises(ValueError, match=r"weights\.pth is not SegFormer's.*4 in all: 0\.bias, 0\.weight"):
        convert_checkpoint(saved(tmp_path, weights))


def test_a_folder_of_another_network_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    saved(tmp_path, filled().state_dict(), "pytorch_model.bin")
    with pytest.raises(ValueError, match="'bert'"):
        convert_checkpoint(tmp_path)


def test_a_config_of_wrong_types_is_refused(tmp_path):
    filled().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"depths": "many"}))
    with pytest.raises(ValueError, match="depths"):
        convert_checkpoint(tmp_path)


# Back to Transformers' own model


@pytest.mark.parametrize("model_class", TRANSFORMERS)
@torch.no_grad()
def test_transformers_own_model_loads_the_folder_and_gives_equal_outputs(model_class, tmp_path):
    model = filled(model_class, tiny_config(layer_norm_eps=1e-5, id2label=dict(enumerate("abcde"))))
    difference = to_transformers(model, tmp_path, SegFormerImageProcessor(size=64))
    theirs, report = TRANSFORMERS[model_class].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    expected, found = model(images())[0], theirs.eval()(images())[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    assert difference < 2e-5
    assert type(transformers.AutoModel.from_pretrained(tmp_path)).__name__ == "SegformerModel"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("segformer", [TRANSFORMERS[model_class].__name__])
    assert config["id2label"]["4"] == "e"
    assert not {"auto_map", "out_features", "out_indices"} & config.keys()
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "SegformerImageProcessor"
    assert processor["size"] == {"height": 64, "width": 64}
    assert not {"auto_map", "keep_ratio", "size_divisor"} & processor.keys()


def test_the_difference_that_the_epsilons_make_is_measured(tmp_path):
    model = filled(config=tiny_config(layer_norm_eps=1e-2))
    assert to_transformers(model, tmp_path) > 1e-3
    assert not (tmp_path / "preprocessor_config.json").exists()


def test_a_folder_goes_to_transformers_and_back_unchanged(tmp_path):
    model = filled().train()
    to_transformers(model, tmp_path)
    assert model.training
    assert_same_weights(convert_checkpoint(tmp_path), model)


def test_a_model_that_keeps_tokens_still_goes_to_transformers(tmp_path):
    model = filled(config=tiny_config(reshape_last_stage=False, layer_norm_eps=1e-5))
    assert to_transformers(model, tmp_path) < 2e-5


def test_options_that_transformers_processor_lacks_are_warned_of(tmp_path, caplog):
    options = {"keep_ratio": True, "size_divisor": 32, "value_range": [0, 100], "ignore_index": -100}
    processor = SegFormerImageProcessor(size=64, **options)
    to_transformers(filled(), tmp_path, processor)
    assert "keep_ratio is True and size_divisor 32" in caplog.text
    assert "value_range is [0, 100], which Transformers' own processor does not have" in caplog.text
    assert "ignore_index is -100, which Transformers' own processor does not have" in caplog.text
    assert "keep_ratio" not in (tmp_path / "preprocessor_config.json").read_text()


def test_a_model_with_one_label_is_warned_of(tmp_path, caplog):
    to_transformers(filled(config=tiny_config(num_labels=2)), tmp_path / "two", SegFormerImageProcessor())
    to_transformers(filled(SegFormerModel, tiny_config(num_labels=1)), tmp_path / "encoder")
    assert "1 label" not in caplog.text
    model = filled(config=tiny_config(num_labels=1))
    to_transformers(model, tmp_path / "one", SegFormerImageProcessor(binary_threshold=0.25))
    assert "the model has 1 label, and Transformers' own post_process_semantic_segmentation" in caplog.text
    assert "compare the sigmoid of the logits with 0.25" in caplog.text
    [segmentation] = SegformerImageProcessorPil().post_process_semantic_segmentation(model(images()[:1]))
    assert not segmentation.any()


def test_a_class_that_transformers_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no counterpart of SegFormerBackbone"):
        to_transformers(SegFormerBackbone(tiny_config()), tmp_path)


# The image processor that goes along


def test_a_folders_processor_goes_along_and_a_file_gets_the_default(tmp_path):
    SegFormerImageProcessor(size=96, do_reduce_labels=True).save_pretrained(tmp_path)
    processor = image_processor_for(tmp_path, 3)
    assert (processor.size, processor.do_reduce_labels) == ({"height": 96, "width": 96}, True)
    shutil.rmtree(tmp_path)
    assert image_processor_for(tmp_path / "mit_b0.pth", 3).to_dict() == SegFormerImageProcessor().to_dict()


def test_statistics_are_dealt_out_to_channels_like_filters(tmp_path):
    assert image_processor_for(tmp_path, 4).image_mean == [0.485, 0.456, 0.406, 0.485]
    assert image_processor_for(tmp_path, 1).image_std == pytest.approx([0.226])


def test_a_segmentation_model_is_loaded_with_the_processor_of_its_folder(tmp_path):
    model = SegFormerForSemanticSegmentation(tiny_config()).eval()
    model.save_pretrained(tmp_path)
    SegFormerImageProcessor(size=64).save_pretrained(tmp_path)
    loaded, processor = load_segmentation(tmp_path)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert processor.size == {"height": 64, "width": 64}


def test_a_bare_file_gets_the_default_processor_with_a_mean_for_each_band(tmp_path):
    model = SegFormerForSemanticSegmentation(tiny_config(num_channels=4))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    _, processor = load_segmentation(str(tmp_path / "weights.pth"))
    assert len(processor.image_mean) == 4


def test_other_models_and_processors_of_other_channels_are_refused(tmp_path):
    SegFormerModel(tiny_config()).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="encoder holds a SegFormerModel; expected a segmentation model"):
        load_segmentation(tmp_path / "encoder")
    SegFormerForSemanticSegmentation(tiny_config(num_channels=4)).save_pretrained(tmp_path)
    SegFormerImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json has 3 entries .* channel, 4"):
        load_segmentation(tmp_path)
