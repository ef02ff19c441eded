"""The encoder's fast paths against the reference: values, gradients, and when the reference runs."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_segformer import (
    SegFormerConfig,
    SegFormerModel,
    cpu_encoder_segformer,
    cpu_runtime_segformer,
)
from tests.support.fast_paths import assert_near, count, switched

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}


def encoder(dtype=torch.float32, **fields):
    shape = {"hidden_sizes": [8, 8, 16, 16], "depths": [2, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}
    torch.manual_seed(1)
    model = SegFormerModel(SegFormerConfig(**{**shape, "drop_path_rate": 0.0, **fields})).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they start at zero, where a forgotten one would not be seen
            nn.init.normal_(parameter, std=0.5)
    return model


def features_of(model, images, enabled):
    with switched(enabled):
        return model(images, output_hidden_states=True).hidden_states


def gradients_of(model, images, enabled):
    """Features, and gradients of the images and of every parameter."""
    images = images.clone().requires_grad_()
    torch.manual_seed(0)  # drop path draws the same
    features = features_of(model, images, enabled)
    torch.manual_seed(0)
    total = sum((stage * torch.randn_like(stage)).sum() for stage in features)
    return features, torch.autograd.grad(total, [images, *model.parameters()])


def calls(model, images, enabled=True):
    """Return how many Mix-FFNs and how many attentions ran by a fast path."""
    with switched(enabled) as recorded:
        model(images)
    return count(recorded, "mix_ffn"), count(recorded, "attention")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_onednn_faster", [True, False])
@given(
    batch=st.integers(1, 3),
    height=st.integers(8, 70),
    width=st.integers(8, 70),
    strip_bytes=st.sampled_from([1, 3000, 20000, 1 << 23]),
    score_bytes=st.sampled_from([1, 1000, 1 << 22]),
    few_scores=st.sampled_from([0, 1 << 16]),
    kept_bytes=st.sampled_from([0, 1 << 22]),
)
@settings(max_examples=10, deadline=None)
def test_fast_paths_equal_the_reference_forward_and_backward(
    dtype, is_onednn_faster, batch, height, width, strip_bytes, score_bytes, few_scores, kept_bytes
):
    model, images = encoder(dtype).train(), torch.randn(batch, 3, height, width, dtype=dtype)
    expected_features, expected_gradients = gradients_of(model, images, False)
    limits = {
        "STRIP_BYTES": strip_bytes,
        "SCORE_BYTES": score_bytes,
        "FEW_SCORES": few_scores,
        "KEPT_BYTES": kept_bytes,
        "prefers_onednn": lambda: is_onednn_faster,
    }
    with mock.patch.multiple(cpu_encoder_segformer, **limits):
        fast, gradients = gradients_of(model, images, True)
        with torch.no_grad():
            without_gradient = features_of(model, images, True)
        with torch.inference_mode():
            inference = features_of(model, images, True)
    for found in (fast, without_gradient, inference):
        for stage, expected in zip(found, expected_features, strict=True):
            assert_near(stage, expected, TOLERANCE[dtype])
    scale = max(gradient.abs().max() for gradient in expected_gradients)  # some, such as the key bias's, are zero
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected).abs().max() <= TOLERANCE[dtype] * scale


def test_autocast_that_begins_after_the_forward_pass_changes_nothing():
    model, images = encoder().train(), torch.randn(1, 3, 40, 72)

    def gradients(is_cast):
        total = features_of(model, images, True)[-1].square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            return torch.autograd.grad(total, model.encoder.block[3].parameters())

    for gradient, expected in zip(gradients(True), gradients(False), strict=True):
        assert_near(gradient, expected, 1e-5)


def test_the_switch_chooses():
    model, images = encoder().eval(), torch.randn(1, 3, 40, 72)
    assert calls(model, images, True) == (5, 5)
    assert calls(model, images, False) == (0, 0)


def test_drop_path_draws_as_the_reference_does():
    model, images = encoder(torch.float64, drop_path_rate=0.6).train(), torch.randn(3, 3, 40, 72, dtype=torch.double)
    expected_features, expected_gradients = gradients_of(model, images, False)
    fast, gradients = gradients_of(model, images, True)
    for found, expected in zip((*fast, *gradients), (*expected_features, *expected_gradients), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Doubled(nn.Linear):
    def forward(self, tokens):
        return 2 * super().forward(tokens)


def swap(path, make):
    def change(model):
        parent, _, name = path.rpartition(".")
        parent = model.encoder.block[0][0].get_submodule(parent)
        setattr(parent, name, make(getattr(parent, name)))

    return change


def hook(path):
    # Squares, since a LayerNorm that follows would take a factor out.
    return lambda model: (
        model.encoder.block[0][0].get_submodule(path).register_forward_hook(lambda *parts: parts[2].square())
    )


def parametrize(path):
    def change(model):
        module = nn.utils.parametrizations.weight_norm(model.encoder.block[0][0].get_submodule(path))
        module.parametrizations.weight.original0.data.mul_(2)

    return change


CHANGES = {
    "another kind of dense1": (swap("mlp.dense1", lambda old: Doubled(8, 32)), (4, 5)),
    "another kind of query": (swap("attention.self.query", lambda old: Doubled(8, 8)), (5, 4)),
    "another activation": (swap("mlp.activation", lambda old: nn.ReLU()), (4, 5)),
    "a wider convolution": (swap("mlp.dwconv.dwconv", lambda old: nn.Conv2d(32, 32, 5, padding=2, groups=32)), (4, 5)),
    "mirrored borders": (
        swap("mlp.dwconv.dwconv", lambda old: nn.Conv2d(32, 32, 3, padding=1, groups=32, padding_mode="reflect")),
        (4, 5),
    ),
    "a wrapped convolution": (swap("mlp.dwconv.dwconv", lambda old: nn.Sequential(old, nn.Tanh())), (4, 5)),
    "no bias": (swap("mlp.dense2", lambda old: nn.Linear(32, 8, bias=False)), (4, 5)),
    "a hook on the convolution": (hook("mlp.dwconv.dwconv"), (4, 5)),
    "a hook on the Mix-FFN": (hook("mlp"), (4, 5)),
    "a hook on its norm": (hook("layer_norm_2"), (4, 5)),
    "a hook on the output": (hook("attention.output"), (5, 4)),
    "a hook on the reducing convolution": (hook("attention.self.sr"), (5, 4)),
    "a parametrized key": (parametrize("attention.self.key"), (5, 4)),
    "a parametrized dense2": (parametrize("mlp.dense2"), (4, 5)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_are_called_themselves(change):
    model, images = encoder().eval(), torch.randn(1, 3, 40, 72)
    before = features_of(model, images, True)[0]
    alter, expected = CHANGES[change]
    alter(model)
    assert calls(model, images) == expected
    fast, expected_features = (features_of(model, images, enabled)[0] for enabled in (True, False))
    assert_near(fast, expected_features, 2e-5)
    assert not torch.allclose(fast, before)


def test_unsupported_settings_run_the_reference():
    images = torch.randn(1, 3, 40, 72)
    assert calls(encoder(hidden_dropout_prob=0.1).train(), images) == (0, 0)
    assert calls(encoder(hidden_dropout_prob=0.1).eval(), images) == (5, 5)
    assert calls(encoder(attention_probs_dropout_prob=0.1).train(), images) == (5, 0)
    assert calls(encoder(hidden_act="relu").eval(), images) == (0, 5)
    assert calls(encoder(attn_implementation="eager").eval(), images) == (5, 0)
    assert calls(encoder().bfloat16().eval(), images) == (0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(encoder().eval(), images) == (0, 0)


def test_without_onednn_the_numbers_are_the_same():
    model, images = encoder().eval(), torch.randn(1, 3, 40, 72)
    with torch.no_grad():
        expected = features_of(model, images, True)
        with (
            mock.patch.object(cpu_encoder_segformer, "find_onednn", return_value=None),
            mock.patch.object(cpu_runtime_segformer, "find_onednn", return_value=None),
        ):
            found = features_of(model, images, True)
    for stage, other in zip(found, expected, strict=True):
        assert_near(stage, other, 2e-5)


def test_neither_tokens_nor_earlier_features_are_overwritten():
    model = encoder().eval()
    block, tokens = model.encoder.block[0][0], torch.randn(2, 60, 8)
    before = tokens.clone()
    with torch.no_grad(), switched(True):
        first, _ = block(tokens, 6, 10)
        kept = first.clone()
        block(first, 6, 10)
    torch.testing.assert_close(tokens, before, rtol=0, atol=0)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_a_changed_parameter_counts_at_once():
    model, images = encoder().eval(), torch.randn(1, 3, 40, 72)
    with torch.no_grad():
        before = features_of(model, images, True)[0]
        model.encoder.block[0][0].mlp.dense1.weight.data.mul_(1.5)
        after = features_of(model, images, True)[0]
        assert_near(after, features_of(model, images, False)[0], 2e-5)
    assert not torch.allclose(before, after)


def test_frozen_weights_get_no_gradient_and_tokens_still_do():
    model, images = encoder(torch.float64).train(), torch.randn(1, 3, 40, 72, dtype=torch.double)
    for parameter in model.encoder.block.parameters():
        parameter.requires_grad_(False)
    found = {}
    for enabled in (True, False):
        model.zero_grad()
        features_of(model, images, enabled)[-1].sum().backward()
        found[enabled] = model.encoder.patch_embeddings[0].proj.weight.grad
    torch.testing.assert_close(found[True], found[False], rtol=1e-9, atol=1e-9)
    assert all(parameter.grad is None for parameter in model.encoder.block.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, images = encoder(torch.float64, drop_path_rate=0.3).train(), torch.randn(2, 3, 40, 72, dtype=torch.double)
    _, expected = gradients_of(model, images, False)
    enable = "activation_checkpointing_enable"  # its name from Transformers 5.18 on
    enable = getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")
    enable({"use_reentrant": reentrant})
    images.requires_grad_()
    torch.manual_seed(0)
    features = features_of(model, images, True)
    torch.manual_seed(0)
    sum((stage * torch.randn_like(stage)).sum() for stage in features).backward()
    for parameter, gradient in zip(model.parameters(), expected[1:], strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9)


def test_double_backward_is_refused():
    block, tokens = encoder().train().encoder.block[0][0], torch.randn(1, 60, 8, requires_grad=True)
    with switched(True):
        total = block.add_mix_ffn(tokens, 6, 10).sum()
    with pytest.raises(RuntimeError, match="set_fast_paths"):
        torch.autograd.grad(total, tokens, create_graph=True)


@pytest.mark.parametrize(("batch", "height", "limit", "halo"), [(3, 7, 1, 1), (5, 4, 9, 1), (2, 9, 4, 2), (1, 1, 1, 1)])
def test_strips_cover_every_row_once(batch, height, limit, halo):
    seen = torch.zeros(batch, height)
    for strip in cpu_encoder_segformer.cut(batch, height, 1, limit, halo):
        seen[strip.images, strip.rows] += 1
        assert strip.seen.start == max(strip.rows.start - halo, 0)
        assert strip.seen.stop == min(strip.rows.stop + halo, height)
    assert (seen == 1).all()


@pytest.mark.parametrize(("kept_bytes", "is_kept"), [(0, False), (1 << 22, True)])
def test_training_keeps_hidden_tokens_only_while_they_are_few(kept_bytes, is_kept, monkeypatch):
    monkeypatch.setattr(cpu_encoder_segformer, "KEPT_BYTES", kept_bytes)
    model, images = encoder(depths=[1, 1, 1, 1]).train(), torch.randn(2, 3, 64, 64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.shape) or tensor, lambda each: each
    ):
        features_of(model, images, True)
    hidden = torch.Size([2, 16, 16, 4 * 8])  # of the first stage
    assert saved.count(hidden) == (3 if is_kept else 0)
