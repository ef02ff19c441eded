"""torch.compile, torch.export and 16-bit floats: one graph of a fresh model, with the values of eager mode."""

import shutil

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from hf_segformer import (
    SegFormerBackbone,
    SegFormerForImageClassification,
    SegFormerForSemanticSegmentation,
    SegFormerModel,
)
from hf_segformer.dispatch_segformer import NAMESPACE
from tests.support.fast_paths import ran, switched
from tests.support.tiny import TWO_STAGES


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch.compiler.reset()


def fresh(config, kind=SegFormerForSemanticSegmentation):
    torch.manual_seed(0)
    return kind(config).eval()


def assert_same(first, second):
    """Assert equality in float32, up to the order of sums: compilers fuse operations and split products differently."""
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        (SegFormerModel, "last_hidden_state"),
        (SegFormerBackbone, "feature_maps"),
        (SegFormerForImageClassification, "logits"),
        (SegFormerForSemanticSegmentation, "logits"),
    ],
)
def test_a_fresh_model_compiles_to_one_graph(kind, output, tiny_config):
    config = tiny_config(out_features=["stage2", "stage4"])
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found = torch.compile(fresh(config, kind), fullgraph=True, backend="aot_eager")(images)[output]
        assert_same(found, fresh(config, kind)(images)[output])


def test_a_compiled_model_returns_attention_maps(tiny_config):
    images = torch.randn(2, 3, 64, 96)
    model = fresh(tiny_config())
    with torch.no_grad():
        expected = model(images, output_attentions=True).attentions
        found = torch.compile(model, fullgraph=True, backend="eager")(images, output_attentions=True).attentions
    for found_maps, expected_maps in zip(found, expected, strict=True):
        assert_same(found_maps, expected_maps)


INDUCTOR = pytest.param(
    "inductor",
    TWO_STAGES,
    marks=[
        pytest.mark.skipif(
            not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
        ),
        # PyTorch 2.13's own, when inductor is imported.
        pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    ],
)


@pytest.mark.parametrize(("backend", "fields"), [("eager", {}), INDUCTOR], ids=["eager", "inductor"])
@pytest.mark.slow
def test_one_compilation_serves_images_of_any_size(backend, fields, tiny_config):
    """Tracing runs on all four stages; inductor, which takes long, on two.

    Two are enough for what inductor cannot do: a convolution of a channels-last view of symbolic size.
    """
    config = tiny_config(**fields)
    model, reference = fresh(config), fresh(config)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for shape in ((2, 3, 64, 96), (3, 3, 100, 72)):
            images = torch.randn(shape)
            with torch.compiler.set_stance("default" if shape[0] == 2 else "fail_on_recompile"):
                found = compiled(images).logits
            assert_same(found, reference(images).logits)


@pytest.mark.slow
def test_a_compiled_training_step_has_eager_gradients(tiny_config):
    """With labels: reading their values would break the graph. Drop path and Dropout2d draw as in eager mode."""
    config = tiny_config(drop_path_rate=0.3)
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(0, 5, (2, 64, 96), dtype=torch.uint8)
    labels[:, :10] = 255
    losses, gradients = [], []
    for compiled in (False, True):
        model = fresh(config).train()
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        torch.manual_seed(1)
        loss = step(images, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_same(losses[1], losses[0])
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.slow
def test_an_exported_model_takes_any_batch_and_size(strict, tiny_config):
    model = fresh(tiny_config())
    sizes = {0: Dim("batch"), 2: Dim("height", min=64), 3: Dim("width", min=64)}
    exported = export(
        model, (torch.randn(2, 3, 64, 96),), dynamic_shapes={"pixel_values": sizes}, strict=strict
    ).module()
    for shape in ((3, 3, 100, 130), (1, 3, 161, 64)):
        images = torch.randn(shape)
        with torch.no_grad():
            assert_same(exported(images)["logits"], model(images).logits)


# The folded head

WIDTH = 12  # four times this is a number of channels that nothing but the reference's concatenation has


def exported_graph(model, images):
    return export(model, (images,), strict=False).graph


def compiled_graph(model, images):
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return module.forward

    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=keep)(images)
    assert len(graphs) == 1
    return graphs[0]


def widest(graph):
    """Return the number of elements of the largest tensor in the graph that has 4 * WIDTH channels."""
    values = [node.meta.get("val", node.meta.get("example_value")) for node in graph.nodes]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    assert len(shapes) > 100
    return max(shape.numel() for shape in shapes if 4 * WIDTH in shape)


class OtherLinear(nn.Linear):
    """A linear layer of a class that the head does not know."""


@pytest.mark.parametrize("graph_of", [exported_graph, compiled_graph])
def test_the_head_stays_folded_when_compiled_and_exported(graph_of, tiny_config):
    """Only the fusing weight itself has the channels of all stages, never a feature map.

    With a layer in the head that cannot be folded there is such a map, which shows that one would be found.
    """
    images = torch.randn(2, 3, 64, 96)
    model = fresh(tiny_config(decoder_hidden_size=WIDTH))
    assert widest(graph_of(model, images)) == model.decode_head.linear_fuse.weight.numel()
    model.decode_head.linear_c[1].proj.__class__ = OtherLinear
    torch.compiler.reset()
    assert widest(graph_of(model, images)) == 2 * 4 * WIDTH * 16 * 24


# Short floats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_is_close_to_float32(dtype, tiny_config):
    """Some thirty layers round one after the other, but LayerNorms keep errors from growing: measured 1.4 steps."""
    config = tiny_config()
    images, labels = torch.randn(2, 3, 40, 72), torch.randint(0, 5, (2, 40, 72))
    with torch.no_grad():
        expected = fresh(config)(images, labels=labels)
        found = fresh(config).to(dtype)(images, labels=labels)
    assert found.logits.dtype == dtype
    assert found.loss.dtype == torch.float32
    step = torch.finfo(dtype).eps
    assert (found.logits.float() - expected.logits).abs().max() < 4 * step * expected.logits.abs().max()
    assert (found.loss - expected.loss).abs() < 4 * step * expected.loss


def test_mixed_precision_trains_with_a_full_precision_loss(tiny_config):
    config = tiny_config(classifier_dropout_prob=0.0, drop_path_rate=0.0)
    images, labels = torch.randn(2, 3, 40, 72), torch.randint(0, 5, (2, 40, 72))
    full, mixed = fresh(config).train(), fresh(config).train()
    expected = full(images, labels=labels).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = mixed(images, labels=labels)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.loss.dtype == torch.float32
    assert (outputs.loss - expected).abs() < 4 * torch.finfo(torch.bfloat16).eps * expected
    expected.backward()
    outputs.loss.backward()
    for (name, parameter), reference in zip(mixed.named_parameters(), full.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
        if name == "decode_head.linear_fuse.weight":  # few layers from the loss, so little error has gathered
            error = (parameter.grad - reference.grad).norm() / reference.grad.norm()
            assert error < 8 * torch.finfo(torch.bfloat16).eps


def test_folding_costs_mixed_precision_no_accuracy(tiny_config):
    """The weights are multiplied in full precision; done in bfloat16 too, the error would be a seventh larger."""
    errors = {True: 0.0, False: 0.0}  # by the fold, and by the reference
    for _ in range(4):
        head = SegFormerForSemanticSegmentation(tiny_config(decoder_hidden_size=64)).eval().decode_head
        features = tuple(torch.randn(2, size, 10 >> i, 18 >> i) for i, size in enumerate((8, 8, 16, 16)))
        head.batch_norm = nn.Identity()
        head.classifier = nn.Identity()
        with torch.no_grad():
            with switched(False):
                expected = head(features)
            for enabled in errors:
                with torch.autocast("cpu", dtype=torch.bfloat16), switched(enabled) as calls:
                    found = head(features)
                assert ran(calls) == ({"folded"} if enabled else set())
                errors[enabled] += (found.float() - expected).abs().mean()
    assert errors[True] < 1.05 * errors[False]


def graphs_of(model, images):
    """Return the names of the functions that each graph traced for these images calls."""
    graphs = []

    def keep(graph, _inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    torch.compile(model, fullgraph=True, backend=keep)(images)
    return graphs


@pytest.mark.slow
def test_a_compiled_network_of_which_only_a_reduction_learns_has_its_gradient(tiny_config):
    images, reduction = torch.randn(1, 3, 64, 96), "encoder.block.0.0.attention.self.sr.weight"

    def gradient_of(compile_it):
        model = fresh(tiny_config(), SegFormerModel).requires_grad_(False)
        learning = model.get_parameter(reduction).requires_grad_()
        network = torch.compile(model, fullgraph=True, backend="aot_eager") if compile_it else model
        return torch.autograd.grad(network(images).last_hidden_state.square().sum(), learning)[0]

    torch.testing.assert_close(gradient_of(True), gradient_of(False), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_network_calls_the_fast_encoder_where_allowed(tiny_config):
    model, images = fresh(tiny_config(), SegFormerModel), torch.randn(1, 3, 64, 96)
    num_blocks = sum(model.config.depths)

    def count(graphs):
        [targets] = graphs
        return tuple(sum(f"{NAMESPACE}.{name}" in target for target in targets) for name in ("mix_ffn", "attention"))

    with torch.inference_mode():
        assert count(graphs_of(model, images)) == (num_blocks, num_blocks)
        torch.compiler.reset()
        with switched(False):
            assert count(graphs_of(model, images)) == (0, 0)
        torch.compiler.reset()
        with torch.autocast("cpu", torch.bfloat16):
            assert count(graphs_of(model, images)) == (0, 0)
    torch.compiler.reset()
    assert count(graphs_of(model, images)) == (0, 0)  # a gradient may be wanted
    with torch.no_grad():
        program = export(model, (images,), strict=False)
    assert not [node for node in program.graph.nodes if NAMESPACE in str(node.target)]
