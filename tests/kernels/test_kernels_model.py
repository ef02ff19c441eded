"""Whole models with kernels, in Triton's interpreter: eager, compiled, exported and under autocast."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, set_fast_paths
from hf_segformer.dispatch_segformer import record_fast_paths
from hf_segformer.upsampling_segformer import reference_cross_entropy, upsample_cross_entropy

pytestmark = pytest.mark.slow

TINY = {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1] * 4,
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    "classifier_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "num_labels": 3,
}
IN_TRAINING = {"triton_depthwise_gelu", "triton_cross_entropy", "triton_upsample_sum"}
AT_INFERENCE = {"triton_depthwise_gelu", "triton_upsample_sum_relu"}


@contextmanager
def kernels():
    """Switch kernels on; yield the recorded calls of the dispatch table."""
    from hf_segformer.kernels.switch import disable, enable

    set_fast_paths(True)
    enable("cpu")
    try:
        with record_fast_paths() as calls:
            yield calls
    finally:
        disable()


def kernels_of(calls):
    """Return the names of the kernels that ran, and forget them."""
    names = {name for _, name, _ in calls if name.startswith("triton")}
    calls.clear()
    return names


@contextmanager
def reference():
    """Switch fast paths off."""
    set_fast_paths(False)
    yield
    set_fast_paths(True)


def build_model(**fields):
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**{**TINY, **fields}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    nn.init.normal_(model.decode_head.batch_norm.running_mean)
    nn.init.uniform_(model.decode_head.batch_norm.running_var, 0.5, 2)
    return model


def infer(model, images, call=None):
    """Return the logits, of the model or its compiled form."""
    model.eval()
    with torch.no_grad():
        return (model if call is None else call)(images).logits


def train(model, images, labels, call=None):
    """Return the loss and the gradient of each parameter, of the model or its compiled form."""
    model.train().zero_grad()
    loss = (model if call is None else call)(images, labels=labels).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


def batch():
    images, labels = torch.randn(2, 3, 32, 64), torch.randint(0, 3, (2, 32, 64))
    labels[:, :5] = 255
    return images, labels


def assert_same(found, expected):
    """Assert equality in float32, up to the order of sums."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _compile():
    images, labels = batch()
    with reference():
        logits, gradients = infer(build_model(), images), train(build_model(), images, labels)
    with kernels() as calls:
        model = build_model()
        whole = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(infer(model, images, whole), logits)
        assert kernels_of(calls) == AT_INFERENCE
        assert_same(train(model, images, labels, whole), gradients)
        assert kernels_of(calls) == IN_TRAINING


def test_a_compiled_model_is_one_graph_and_equals_the_reference(interpreter):
    interpreter(_compile)


def _compile_loss_for_any_size():
    from hf_segformer.kernels.switch import disable, enable

    graphs = []

    def look(graph, _):
        graphs.append(str(graph.graph))
        return graph

    def loss_and_gradient(function, size):
        torch.manual_seed(0)
        logits, labels = torch.randn(1, 3, *size, requires_grad=True), torch.randint(0, 3, (1, *(4 * n for n in size)))
        loss = function(logits, labels)
        return loss.detach(), *torch.autograd.grad(loss, logits)

    whole = torch.compile(
        lambda logits, labels: upsample_cross_entropy(logits, labels), fullgraph=True, dynamic=True, backend=look
    )
    set_fast_paths(True)
    enable("cpu")  # without a record, which compiled code would be guarded by
    try:
        for size in ((6, 7), (5, 4), (4, 4)):
            assert_same(loss_and_gradient(whole, size), loss_and_gradient(reference_cross_entropy, size))
    finally:
        disable()
    [graph] = graphs
    assert "hf_segformer.upsample_cross_entropy" in graph


def test_one_compilation_of_the_loss_serves_any_size(interpreter):
    interpreter(_compile_loss_for_any_size)


def _export():
    images, _ = batch()
    with reference():
        logits = infer(build_model(), images)
    with kernels() as calls:
        for strict in (False, True):
            program = torch.export.export(build_model().eval(), (images,), strict=strict)
            assert not kernels_of(calls)
            assert "hf_segformer" not in str(program.graph)
            assert_same(program.module()(images).logits, logits)
        assert_same(infer(build_model(), images), logits)
        assert kernels_of(calls) == AT_INFERENCE


def test_an_export_falls_back_on_the_reference(interpreter):
    interpreter(_export)


def _autocast():
    images, labels = batch()

    def both():
        gradients = train(build_model(), images, labels)
        return infer(build_model(), images), torch.cat([gradient.flatten() for gradient in gradients.values()])

    with reference():
        exact = both()
    with torch.autocast("cpu", torch.bfloat16):
        with reference():
            rounded = both()
        with kernels() as calls:
            found = both()
    assert kernels_of(calls) == IN_TRAINING | AT_INFERENCE
    return [
        [((a - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)]
        for results in (found, rounded)
    ]


def test_autocast_with_kernels_is_as_exact_as_without(interpreter):
    """Relative errors against float32, of the logits, and of loss and gradients together."""
    for with_kernels, without in zip(*interpreter(_autocast), strict=True):
        assert 0 < with_kernels < 1.5 * without


WITHOUT_PACKAGE = """
import json, sys
sys.modules["hf_segformer"] = None
import torch
from transformers import AutoModelForSemanticSegmentation
model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1], trust_remote_code=True)
[dispatch] = [module for name, module in sys.modules.items() if name.endswith(".dispatch_segformer")]
assert dispatch.__name__.startswith("transformers_modules"), dispatch
assert all(row.run is None for rows in dispatch.TABLE.values() for row in rows if row.name.startswith("triton"))
assert not any("kernels" in name and "segformer" in name for name in sys.modules), "kernels"
model, images = model.eval(), torch.load(sys.argv[2])
with torch.no_grad():
    print(json.dumps(dispatch.explain_fast_paths(model, images)))
torch.save(model(images).logits.detach(), sys.argv[2])
"""


def test_a_checkpoints_copy_has_a_table_of_its_own_without_kernels(tmp_path):
    model, (images, _) = build_model(), batch()
    model.save_pretrained(tmp_path / "model")
    torch.save(images, tmp_path / "tensor.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_SEGFORMER_KERNELS": "1"}
    command = [sys.executable, "-c", WITHOUT_PACKAGE, "model", "tensor.pt"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    explained = json.loads(result.stdout.splitlines()[-1])
    assert explained == {
        "mix_ffn": "cpu_strips",
        "attention": "cpu_strips",
        "decode_head": "folded",  # the images are small
        "upsample_cross_entropy": "reference: logits of this size are small",
        "upsample_argmax": "cpu_bands",
    }
    assert_same(torch.load(tmp_path / "tensor.pt"), infer(model, images))
