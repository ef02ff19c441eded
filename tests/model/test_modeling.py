"""The network: parity with Transformers, details of the original code, every size and type of input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForImageClassification,
)

from hf_segformer import (
    SegFormerBackbone,
    SegFormerConfig,
    SegFormerForImageClassification,
    SegFormerForSemanticSegmentation,
    SegFormerModel,
)
from hf_segformer.dispatch_segformer import explain_fast_paths
from hf_segformer.folding_segformer import folded_decode_head
from hf_segformer.modeling_segformer import SegFormerDropPath, features_to_tokens, tokens_to_features
from hf_segformer.upsampling_segformer import upsample_cross_entropy
from tests.support.fast_paths import switched
from tests.support.stock import close, stock_names, stock_pair
from tests.support.tiny import PARAMETERS, TINY, assert_same

ODD_SIZES = [(64, 96), (65, 97), (33, 130), (71, 40)]


@pytest.mark.parametrize("size", ODD_SIZES)
def test_logits_and_hidden_states_equal_transformers_from_the_same_folder(tmp_path, size):
    stock, ours = stock_pair(tmp_path)
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = stock.eval()(pixel_values, output_hidden_states=True)
        outputs = ours.eval()(pixel_values, output_hidden_states=True)
    close(outputs.logits, expected.logits)
    for features, stock_features in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        close(features, stock_features)


def test_loss_and_every_gradient_equal_transformers_in_training(tmp_path):
    stock, ours = stock_pair(tmp_path)
    stock, ours = stock.double().train(), ours.double().train()
    pixel_values, labels = torch.randn(2, 3, 66, 97).double(), torch.randint(0, 5, (2, 66, 97))
    labels[:, :9] = 255
    expected, loss = stock(pixel_values, labels=labels).loss, ours(pixel_values, labels=labels).loss
    close(loss, expected, 1e-9)
    expected.backward()
    loss.backward()
    stock.save_pretrained(tmp_path / "names")  # Transformers renames on disk only: read the order from there
    gradients = dict(ours.named_parameters())
    for parameter, name in stock_names(stock):
        wide = parameter.grad.abs().max().clamp(min=1e-8)  # a key's bias has no gradient but rounding
        assert (gradients[name].grad - parameter.grad).abs().max() <= 1e-9 * wide + 1e-12, name
    assert torch.allclose(ours.decode_head.batch_norm.running_var, stock.decode_head.batch_norm.running_var)


def test_classifier_equals_transformers_with_and_without_reshaping_the_last_stage(tmp_path):
    for reshape in (True, False):
        stock, ours = stock_pair(
            tmp_path / str(reshape),
            SegformerForImageClassification,
            SegFormerForImageClassification,
            reshape_last_stage=reshape,
        )
        pixel_values, labels = torch.randn(2, 3, 65, 97), torch.tensor([1, 4])
        outputs = ours.eval()(pixel_values, labels=labels)
        expected = stock.eval()(pixel_values)
        close(outputs.logits, expected.logits)
        close(outputs.loss, F.cross_entropy(expected.logits, labels))


def test_pytorch_bin_files_are_read(tmp_path):
    _, ours = stock_pair(tmp_path)
    torch.save(ours.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    loaded = SegFormerForSemanticSegmentation.from_pretrained(tmp_path)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_layer_norms_use_the_originals_two_epsilons():
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY))
    wide = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm) and module.eps == 1e-5}
    fine = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm) and module.eps == 1e-6}
    assert all("patch_embeddings" in name or "attention.self" in name for name in wide)
    assert len(wide) == 4 + 3
    assert len(fine) == 4 * 2 + 4


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameter_counts_are_the_originals(variant):
    with torch.device("meta"):
        models = (
            SegFormerModel(SegFormerConfig.from_variant(variant)),
            SegFormerForSemanticSegmentation(SegFormerConfig.from_variant(variant, num_labels=150)),
            SegFormerForSemanticSegmentation(SegFormerConfig.from_variant(variant, num_labels=19)),
            SegFormerForImageClassification(SegFormerConfig.from_variant(variant, num_labels=1000)),
        )
    counts = tuple(sum(parameter.numel() for parameter in model.parameters()) for model in models)
    assert counts == PARAMETERS[variant]


def test_initialisation_is_the_originals():
    model = SegFormerForSemanticSegmentation(SegFormerConfig.from_variant("b0", num_labels=150)).requires_grad_(False)
    block = model.segformer.encoder.block[3][1]
    assert block.attention.self.query.weight.std() == pytest.approx(0.02, rel=0.02)
    assert block.attention.self.query.weight.abs().max() < 2  # truncated at 2, far out for this std
    assert block.attention.self.query.bias.abs().max() == 0
    # Convolutions: variance 2 / fan_out, fan_out = kernel area times outputs over groups.
    assert block.mlp.dwconv.dwconv.weight.std() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    reduction = model.segformer.encoder.block[2][0].attention.self.sr
    assert reduction.weight.std() == pytest.approx((2 / (4 * 160)) ** 0.5, rel=0.02)
    head = model.decode_head
    assert head.linear_fuse.weight.std() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    for module, fan_in in ((head.linear_c[3].proj, 256), (head.classifier, 256)):
        bound = fan_in**-0.5
        assert module.weight.abs().max() == pytest.approx(bound, rel=0.02)
        assert module.weight.std() == pytest.approx(bound / 3**0.5, rel=0.03)
        assert 0 < module.bias.abs().max() <= bound
    assert torch.equal(head.batch_norm.running_var, torch.ones(256))


def test_loading_initializes_only_missing_weights(tiny_config, tmp_path):
    encoder = SegFormerModel(tiny_config())
    for parameter in encoder.parameters():
        nn.init.normal_(parameter)
    encoder.save_pretrained(tmp_path)
    model, info = SegFormerForSemanticSegmentation.from_pretrained(tmp_path, num_labels=7, output_loading_info=True)
    assert all(name.startswith("decode_head.") for name in info["missing_keys"])
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.segformer.state_dict()[name], tensor), name
    assert 0 < model.decode_head.classifier.weight.abs().max() <= 0.25  # PyTorch's default for 16 inputs


def test_a_head_of_another_size_raises_or_is_reinitialized_on_request(tiny_config, tmp_path):
    SegFormerForSemanticSegmentation(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        SegFormerForSemanticSegmentation.from_pretrained(tmp_path, num_labels=9)
    model = SegFormerForSemanticSegmentation.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    assert model(torch.zeros(1, 3, 32, 40)).logits.shape == (1, 9, 8, 10)


def test_drop_path_grows_linearly_over_all_blocks_and_drops_whole_samples():
    encoder = SegFormerModel(SegFormerConfig(**{**TINY, "depths": [2, 1, 1, 1]}, drop_path_rate=0.2)).encoder
    drops = [block.drop_path.probability for stage in encoder.block for block in stage]
    assert drops == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    dropped = SegFormerDropPath(0.25)(torch.ones(4000, 3, 2))
    kept = dropped[:, 0, 0] > 0
    assert torch.equal(dropped, kept[:, None, None] * torch.ones(4000, 3, 2) / 0.75)
    assert kept.float().mean() == pytest.approx(0.75, abs=0.03)


def test_head_dropout_drops_whole_channels(tiny_config):
    assert type(SegFormerForSemanticSegmentation(tiny_config()).decode_head.dropout) is nn.Dropout2d


def test_the_papers_example():
    """Paper section 3.1: 64 channels, K=7 S=4 P=3, reduction 8 at 128x128; the last stage attends in full."""
    model = SegFormerModel(SegFormerConfig.from_variant("b1")).eval()
    encoder = model.encoder
    tokens, height, width = encoder.patch_embeddings[0](torch.zeros(2, 3, 128, 128))
    assert (tokens.shape, height, width) == ((2, 1024, 64), 32, 32)
    attention = encoder.block[0][0].attention.self
    reduced = attention.reduce(tokens, height, width)
    assert attention.key(reduced).shape == attention.value(reduced).shape == (2, 16, 64)
    outputs = model(torch.zeros(2, 3, 128, 128), output_attentions=True)
    assert outputs.attentions[0].shape == (2, 1, 1024, 16)
    assert outputs.attentions[-1].shape == (2, 8, 16, 16)


def test_tokens_and_features_share_memory(tiny_config):
    tokens = torch.randn(2, 6 * 5, 8)
    features = tokens_to_features(tokens, 6, 5)
    assert features.shape == (2, 8, 6, 5)
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert features.data_ptr() == tokens.data_ptr() == features_to_tokens(features).data_ptr()
    stages = SegFormerModel(tiny_config()).eval()(torch.randn(2, 3, 64, 96), output_hidden_states=True).hidden_states
    assert all(stage.is_contiguous(memory_format=torch.channels_last) for stage in stages)


@pytest.mark.parametrize("size", [(8, 8), (8, 41), (13, 9), (29, 28), (31, 65)])
def test_any_side_from_8_pixels_up_gives_logits_at_a_quarter_rounded_up(tiny_config, size):
    model = SegFormerForSemanticSegmentation(tiny_config())
    outputs = model(torch.randn(2, 3, *size), labels=torch.randint(0, 5, (2, *size)))
    assert outputs.logits.shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))
    outputs.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_a_grid_below_the_reduction_is_padded_with_zeros_right_and_bottom(tiny_config):
    attention = SegFormerModel(tiny_config()).encoder.block[0][0].attention.self
    tokens = torch.randn(1, 3 * 10, 8)  # a 3x10 grid under a reduction of 8
    padded = F.pad(tokens.view(1, 3, 10, 8), (0, 0, 0, 0, 0, 5)).flatten(1, 2)
    assert torch.equal(attention.reduce(tokens, 3, 10), attention.reduce(padded, 8, 10))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_one_to_four_stages(stages):
    fields = {name: values[:stages] if isinstance(values, list) else values for name, values in TINY.items()}
    per_stage = {
        "sr_ratios": [8, 4, 2, 1],
        "patch_sizes": [7, 3, 3, 3],
        "strides": [4, 2, 2, 2],
        "mlp_ratios": [4] * 4,
    }
    fields.update({name: values[:stages] for name, values in per_stage.items()}, num_encoder_blocks=stages)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**fields, num_labels=3)).eval()
    outputs = model(torch.randn(1, 3, 40, 56), output_hidden_states=True)
    assert outputs.logits.shape == (1, 3, 10, 14)
    assert len(outputs.hidden_states) == stages


def test_any_number_of_channels(tiny_config):
    model = SegFormerForSemanticSegmentation(tiny_config(num_channels=6))
    assert model(torch.randn(1, 6, 40, 56)).logits.shape == (1, 5, 10, 14)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.zeros(1, 4, 32, 40), r"\(1, 4, 32, 40\); expected \(batch, 3, height, width\)"),
        (torch.zeros(3, 32, 40), r"\(3, 32, 40\); expected"),
        (
            torch.zeros(1, 3, 32, 40, dtype=torch.uint8),
            "of type torch.uint8; expected a tensor of normalized floats",
        ),
        ([[[0.0]]], "of type list; expected a tensor"),
    ],
)
def test_pixel_values_of_another_shape_or_type_are_refused(tiny_config, pixel_values, message):
    with pytest.raises(ValueError, match=message):
        SegFormerForSemanticSegmentation(tiny_config())(pixel_values)


def test_the_folded_head_equals_the_reference_forward_and_backward(tiny_config):
    head = SegFormerForSemanticSegmentation(tiny_config(classifier_dropout_prob=0.0)).decode_head.double().train()
    features = [torch.randn(2, c, h, w).double() for c, h, w in ((8, 17, 25), (8, 9, 13), (16, 5, 7), (16, 3, 4))]
    results = []
    for run in (lambda inputs: folded_decode_head(head, inputs), lambda inputs: head(tuple(inputs))):
        inputs = [stage.clone().requires_grad_() for stage in features]
        with switched(False):
            output = run(inputs)
        gradients = torch.autograd.grad(output.square().sum(), [*inputs, *head.parameters()])
        results.append((output, *gradients))
    largest = max(gradient.abs().max() for gradient in results[1])
    for folded, expected in zip(*results, strict=True):  # a bias before BatchNorm has no gradient but rounding
        assert (folded - expected).abs().max() <= 1e-12 * largest


@pytest.mark.parametrize("is_subtracted", [True, False])
def test_biases_that_batch_norm_subtracts_have_no_gradient_in_the_folded_head(tiny_config, is_subtracted):
    head = SegFormerForSemanticSegmentation(tiny_config(classifier_dropout_prob=0.0)).decode_head.train()
    head.batch_norm.train(is_subtracted)  # running statistics do not subtract the bias
    output = folded_decode_head(head, [torch.randn(2, c, 9, 13) for c in (8, 8, 16, 16)])
    output.square().sum().backward()
    for linear in head.linear_c:
        assert (linear.proj.bias.grad.abs().max() == 0) == is_subtracted


def test_a_hooked_layer_of_the_head_takes_the_reference(tiny_config):
    model = SegFormerForSemanticSegmentation(tiny_config()).eval()
    pixel_values = torch.randn(1, 3, 40, 56)
    first = model(pixel_values).logits
    assert explain_fast_paths(model, pixel_values)["decode_head"] == "cpu_bands"
    hook = model.decode_head.linear_c[2].proj.register_forward_hook(lambda *_: None)
    close(model(pixel_values).logits, first)
    assert explain_fast_paths(model, pixel_values)["decode_head"] == "reference: linear_c.2.proj has hooks"
    hook.remove()
    assert explain_fast_paths(model, pixel_values)["decode_head"] == "cpu_bands"


@pytest.mark.parametrize("name", ["linear_c.0", "linear_c.0.proj", "linear_fuse"])
def test_a_hook_anywhere_in_the_head_is_called(tiny_config, name):
    model = SegFormerForSemanticSegmentation(tiny_config()).eval()
    pixel_values = torch.randn(1, 3, 40, 56)
    before = model(pixel_values).logits
    model.decode_head.get_submodule(name).register_forward_hook(lambda module, inputs, output: output * 0)
    assert not torch.equal(model(pixel_values).logits, before)


def test_a_head_with_merged_batch_norm_or_without_biases(tmp_path):
    _, model = stock_pair(tmp_path)
    model.eval().requires_grad_(False)
    head, pixel_values = model.decode_head, torch.randn(1, 3, 40, 56)
    before = model(pixel_values).logits
    head.linear_fuse = nn.utils.fuse_conv_bn_eval(head.linear_fuse, head.batch_norm)
    head.batch_norm = nn.Identity()
    close(model(pixel_values).logits, before)
    head.linear_c[0].proj = nn.Linear(8, 16, bias=False)
    assert model(pixel_values).logits.isfinite().all()


def test_a_meta_model_infers_shapes():
    with torch.device("meta"):
        model = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=5))
        assert model(torch.zeros(1, 3, 40, 56)).logits.shape == (1, 5, 10, 14)


def test_a_subclass_may_have_layers_and_a_head_of_its_own(tiny_config):
    class Mine(SegFormerForSemanticSegmentation):
        def __init__(self, config):
            super().__init__(config)
            self.decode_head = nn.Sequential(nn.Conv2d(8, 3, 1, bias=False), nn.LayerNorm(4, elementwise_affine=False))
            self.extra = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.BatchNorm2d(4, affine=False)])
            self.post_init()

    assert Mine(tiny_config()).extra[0].weight.abs().max() < 0.2


def test_transformers_own_configuration_is_refused():
    with pytest.raises(ValueError, match="config is a SegformerConfig; SegFormerModel expects a SegFormerConfig"):
        SegFormerModel(SegformerConfig())


def test_output_attentions_and_hidden_states_follow_the_configuration_too(tiny_config):
    config = tiny_config(attn_implementation="eager")
    config.output_attentions = config.output_hidden_states = True
    outputs = SegFormerForSemanticSegmentation(config).eval()(torch.randn(1, 3, 40, 56))
    assert len(outputs.attentions) == len(outputs.hidden_states) == 4
    assert len(SegFormerForSemanticSegmentation(config)(torch.randn(1, 3, 40, 56), return_dict=False)) == 3


def test_last_stage_as_tokens(tiny_config):
    model = SegFormerModel(tiny_config(reshape_last_stage=False)).eval()
    pixel_values = torch.randn(2, 3, 65, 97)
    outputs = model(pixel_values, output_hidden_states=True)
    assert outputs.last_hidden_state.shape == (2, 3 * 4, 16)
    segmenter = SegFormerForSemanticSegmentation(tiny_config(reshape_last_stage=False))
    assert segmenter(pixel_values).logits.shape == (2, 5, 17, 25)


def test_backbone_gives_the_named_stages_of_any_checkpoint(tiny_config, tmp_path):
    model = SegFormerForSemanticSegmentation(tiny_config()).eval()
    model.save_pretrained(tmp_path)
    backbone = SegFormerBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage4"]).eval()
    pixel_values = torch.randn(1, 3, 40, 56)
    stages = model(pixel_values, output_hidden_states=True).hidden_states
    maps = backbone(pixel_values).feature_maps
    assert_same(maps[0], stages[0])
    assert_same(maps[1], stages[3])
    assert (backbone.channels, backbone.stage_names) == ([8, 16], ["stage1", "stage2", "stage3", "stage4"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_a_classifier_and_its_subclasses_take_labels_of_any_integer_type(tiny_config, dtype):
    class Pets(SegFormerForImageClassification):
        pass

    model = Pets(tiny_config()).eval()
    outputs = model(torch.randn(3, 3, 40, 56), labels=torch.tensor([0, 4, 2], dtype=dtype))
    close(outputs.loss, F.cross_entropy(outputs.logits, torch.tensor([0, 4, 2])))
    with pytest.raises(ValueError, match="labels hold 5; expected classes 0 to 4"):
        model(torch.randn(1, 3, 40, 56), labels=torch.tensor([5], dtype=dtype))
    with pytest.raises(ValueError, match=r"shape \(2,\); expected \(1\)"):
        model(torch.randn(1, 3, 40, 56), labels=torch.tensor([1, 1], dtype=dtype))


# The loss


def test_loss_is_the_mean_over_pixels_that_count():
    logits, labels = torch.randn(2, 5, 9, 13), torch.randint(0, 5, (2, 33, 50))
    labels[0, :20] = 255
    upsampled = F.interpolate(logits, size=(33, 50), mode="bilinear", align_corners=False)
    close(upsample_cross_entropy(logits, labels), F.cross_entropy(upsampled, labels, ignore_index=255), 1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.int64])
def test_labels_of_any_integer_type(dtype):
    logits, labels = torch.randn(2, 5, 9, 13), torch.randint(0, 5, (2, 9, 13))
    assert upsample_cross_entropy(logits, labels.to(dtype)) == upsample_cross_entropy(logits, labels)


def test_binary_loss_counts_valid_pixels_only():
    logits, labels = torch.randn(2, 1, 9, 13), torch.randint(0, 2, (2, 9, 13))
    labels[:, :5] = 255
    expected = F.binary_cross_entropy_with_logits(logits[:, 0, 5:], labels[:, 5:].float())
    close(upsample_cross_entropy(logits, labels), expected, 1e-6)


@pytest.mark.parametrize("num_labels", [1, 5])
def test_a_batch_without_a_valid_pixel_gives_zero_loss_and_zero_gradient(tiny_config, num_labels):
    model = SegFormerForSemanticSegmentation(tiny_config(num_labels=num_labels))
    loss = model(torch.randn(2, 3, 40, 56), labels=torch.full((2, 40, 56), 255)).loss
    loss.backward()
    assert loss == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("num_labels", "labels", "message"),
    [
        (5, torch.full((2, 40, 56), 7), "labels hold 7; expected classes 0 to 4, or 255"),
        (5, torch.full((2, 40, 56), -1), "labels hold -1"),
        (1, torch.full((2, 40, 56), 2), "labels hold 2; expected classes 0 to 1, or 255"),
        (5, torch.zeros(2, 40, 56), "of type torch.float32; expected a tensor of int"),
        (5, torch.zeros(2, 3, 40, 56, dtype=torch.long), r"shape \(2, 3, 40, 56\); expected \(2, height, width\)"),
        (5, torch.zeros(1, 40, 56, dtype=torch.long), r"shape \(1, 40, 56\); expected \(2, height, width\)"),
    ],
)
def test_wrong_labels_are_refused(tiny_config, num_labels, labels, message):
    model = SegFormerForSemanticSegmentation(tiny_config(num_labels=num_labels))
    with pytest.raises(ValueError, match=message):
        model(torch.randn(2, 3, 40, 56), labels=labels)


def test_half_precision_loss_is_summed_in_float32():
    logits, labels = torch.zeros(1, 5, 300, 300, dtype=torch.float16), torch.zeros(1, 300, 300, dtype=torch.long)
    assert upsample_cross_entropy(logits, labels).item() == pytest.approx(
        1.6094379, rel=1e-6
    )  # ln 5; the sum is 144,849


def test_a_saved_checkpoint_has_the_names_of_the_model_and_of_published_files(tiny_config, tmp_path):
    from safetensors import safe_open

    model = SegFormerForSemanticSegmentation(tiny_config())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert "segformer.encoder.block.0.0.attention.self.sr.weight" in file.keys()  # noqa: SIM118 (not a dict)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(loaded) is SegFormerForSemanticSegmentation
