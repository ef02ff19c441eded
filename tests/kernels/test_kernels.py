"""Kernels: the table is empty unless asked; in Triton's interpreter they give what their plain twins give."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from hf_segformer import dispatch_segformer, set_fast_paths
from hf_segformer import kernels as ops
from hf_segformer.dispatch_segformer import KERNELS, kernel
from hf_segformer.upsampling_segformer import check_labels

ROOT = Path(__file__).resolve().parents[2]
F32, F64 = torch.float32, torch.float64


def check(name, dtype, options):
    """A check's difference and its tolerance, over there."""
    from benchmarks.gpu_checks import CHECKS, tolerance

    return CHECKS[name](dtype, "cpu", **options), tolerance(name, dtype)


CASES = [
    ("upsample_cross_entropy", F64, {"grid": (2, 3, 2, 3), "size": (7, 11), "weighted": True, "label_smoothing": 0.1}),
    ("upsample_cross_entropy", torch.bfloat16, {"grid": (1, 3, 2, 3), "size": (8, 12), "strided": True}),
    ("upsample_cross_entropy", torch.float16, {"grid": (1, 3, 2, 3), "size": (3, 2)}),
    ("upsample_cross_entropy", F32, {"grid": (1, 2, 1, 1), "size": (1, 63)}),
    ("upsample_cross_entropy", F32, {"grid": (1, 2, 1, 100), "size": (1, 1023)}),
    ("upsample_argmax", F64, {"grid": (2, 5, 3, 4), "size": (7, 9), "strided": True}),
    ("upsample_argmax", F32, {"grid": (1, 300, 2, 2), "size": (3, 5)}),
    ("upsample_argmax", torch.bfloat16, {"grid": (1, 3, 4, 3), "size": (2, 3)}),
    ("upsample_argmax", torch.float16, {"grid": (1, 2, 1, 1), "size": (1, 1023)}),
    ("upsample_argmax", F32, {"grid": (1, 2, 1, 63), "size": (1, 63)}),
    ("depthwise_gelu", F64, {"batch": 2, "channels": 5, "size": (4, 9), "strided": True}),
    ("depthwise_gelu", torch.bfloat16, {"batch": 1, "channels": 67, "size": (2, 3)}),
    ("depthwise_gelu", torch.float16, {"batch": 1, "channels": 1, "size": (19, 1)}),
    ("depthwise_gelu", F32, {"batch": 1, "channels": 3, "size": (1, 63)}),
    ("upsample_sum", F64, {"batch": 1, "dim": 3, "sizes": ((5, 7), (3, 4), (2, 2), (1, 1))}),
    ("upsample_sum", torch.bfloat16, {"batch": 1, "dim": 130, "sizes": ((2, 3), (1, 2))}),
    ("upsample_sum", F32, {"batch": 1, "dim": 2, "sizes": ((1, 63), (1, 1))}),
    ("upsample_sum_relu", F64, {"sizes": ((5, 7), (3, 4), (2, 2), (1, 1))}),
    ("upsample_sum_relu", torch.float16, {"sizes": ((4, 63),), "dim": 1}),
]


@pytest.mark.parametrize(("name", "dtype", "options"), CASES)
def test_a_kernel_gives_what_its_plain_twin_gives(interpreter, name, dtype, options):
    found, tolerance = interpreter(check, name, dtype, options)
    assert found <= tolerance


SMALL = {
    "upsample_cross_entropy": {"grid": (1, 3, 2, 3), "size": (8, 12)},
    "upsample_argmax": {"grid": (1, 3, 2, 3), "size": (4, 5)},
    "depthwise_gelu": {"batch": 1, "channels": 3, "size": (2, 3)},
    "upsample_sum": {"batch": 1, "dim": 3, "sizes": ((3, 5), (2, 2))},
    "upsample_sum_relu": {"batch": 1, "dim": 3, "sizes": ((3, 5), (2, 2))},
}


def _leave_elements_out(name):
    """A check, once for each of three elements of all that its kernels write, which is as if nobody wrote it.

    Returns:
        which element, what it held before, and what the check found.
    """
    from benchmarks.gpu_checks import CHECKS
    from hf_segformer.kernels.launch import Launch

    run, written, results = Launch.run, [], []

    def changed_by(launch):
        """Number of each argument that the launch writes to, and what it held before."""
        # Where something is not wanted, what comes out stands in for it: each tensor once.
        tensors = {id(each): (number, each) for number, each in enumerate(launch.arguments) if torch.is_tensor(each)}
        before = [(number, tensor, tensor.clone()) for number, tensor in tensors.values()]
        run(launch)
        for number, new, old in before:
            if not torch.equal(old.nan_to_num(), new.nan_to_num()):
                yield number, old.flatten()

    def list_elements(launch):
        number = len({call for call, *_ in written})
        for argument, old in changed_by(launch):
            written.extend((number, argument, place) for place in sorted({0, len(old) // 2, len(old) - 1}))

    def spoil(launch):
        number = calls.pop()
        for argument, old in changed_by(launch):
            if (number, argument) == (wanted[0], wanted[1]):
                launch.arguments[argument].view(-1)[wanted[2]] = old[wanted[2]]
                held.append(old[wanted[2]].item())

    try:
        Launch.run = list_elements
        assert CHECKS[name](F32, "cpu", **SMALL[name]) < 1e-4
        Launch.run = spoil
        for wanted in written:
            held, calls = [], list(range(99, -1, -1))
            try:
                found = CHECKS[name](F32, "cpu", **SMALL[name])
            except ValueError as error:
                found = str(error)
            results.append((wanted, held, found))
    finally:
        Launch.run = run
    return results


@pytest.mark.parametrize(("name", "num_written"), list(zip(SMALL, (3, 3, 4, 2, 1), strict=True)))
def test_a_check_sees_a_single_element_that_a_kernel_left_out(interpreter, name, num_written):
    results = interpreter(_leave_elements_out, name)
    assert len({(call, argument) for (call, argument, _), *_ in results}) == num_written  # tensors that are written
    for where, [held], found in results:
        assert held != held or held == torch.iinfo(torch.int64).max, f"{where} was not poisoned"
        assert found == "labels differ without probabilities, or are no classes" or found > 0.01, where


def _seams():
    """Every seam with kernels and plain; how often the table was asked, and the differences."""
    from torch import nn

    from benchmarks.gpu_checks import difference
    from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, upsample_argmax, upsample_cross_entropy
    from hf_segformer import set_fast_paths as switch
    from hf_segformer.dispatch_segformer import KERNELS
    from hf_segformer.kernels import enable

    tiny = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
    torch.manual_seed(0)
    config = SegFormerConfig(**tiny, decoder_hidden_size=16, num_labels=3, classifier_dropout_prob=0.0)
    model = SegFormerForSemanticSegmentation(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    logits, labels = torch.randn(1, 3, 3, 4, requires_grad=True), torch.randint(0, 3, (1, 12, 16))
    tokens = torch.randn(1, 6, 8)
    features = [torch.randn(1, side, 4 >> i, 8 >> i) for i, side in enumerate((8, 8, 16))] + [torch.randn(1, 16, 1, 1)]

    def run(mode):
        switch(mode != "plain")
        loss = upsample_cross_entropy(logits, labels)
        [gradient] = torch.autograd.grad(loss, logits)
        mixed = model.segformer.encoder.block[0][0].mlp(tokens, 2, 3)
        with torch.no_grad():
            head = model.decode_head.eval()(features)
        return [loss, gradient, upsample_argmax(logits, (12, 16)), mixed, head]

    plain = run("plain")
    enable("cpu")
    called = []
    for key, function in list(KERNELS.items()):
        KERNELS[key] = lambda *a, _f=function, _n=key[1]: called.append(_n) or _f(*a)
    kernels = run("kernels")
    names, called[:] = sorted(set(called)), []
    run("plain")
    number = len(called)
    enable("cpu")
    whole = torch.compile(
        lambda logits, labels: upsample_cross_entropy(logits, labels),
        fullgraph=True,
        backend="aot_eager",
    )
    switch(True)
    loss = whole(logits, labels)
    [gradient] = torch.autograd.grad(loss, logits)
    compiled = [difference(loss, plain[0]), difference(gradient, plain[1])]
    KERNELS.clear()
    return names, number, [difference(a, b) for a, b in zip(kernels, plain, strict=True)], compiled


def test_the_seams_call_kernels_where_they_are_on_and_plain_mode_wins(interpreter):
    names, calls_in_plain_mode, differences, compiled = interpreter(_seams)
    assert names == ["depthwise_gelu", "upsample_argmax", "upsample_cross_entropy", "upsample_sum_relu"]
    assert calls_in_plain_mode == 0
    assert max(differences) < 1e-5
    assert max(compiled) < 1e-5


def _opchecks():
    from hf_segformer.kernels.argmax import upsample_argmax
    from hf_segformer.kernels.cross_entropy import sum_cross_entropy
    from hf_segformer.kernels.decode_head import upsample_sum
    from hf_segformer.kernels.depthwise_gelu import depthwise_gelu

    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    logits = torch.randn(1, 2, 2, 3, requires_grad=True)
    calls = [
        (upsample_argmax, (logits.detach(), 4, 5, True)),
        (sum_cross_entropy, (logits, torch.ones(1, 4, 5, dtype=torch.long), torch.ones(2), 255, 0.0, True)),
        (depthwise_gelu, (torch.randn(1, 6, 2, requires_grad=True), torch.randn(2, 1, 3, 3), torch.randn(2), 2, 3)),
        (upsample_sum, ([torch.randn(1, 2, 3, 2, requires_grad=True), torch.randn(1, 1, 2, 2)],)),
    ]
    return [torch.library.opcheck(operation, arguments, test_utils=tests) for operation, arguments in calls]


def test_operations_are_registered_as_pytorch_wants_them(interpreter):
    for result in interpreter(_opchecks):
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.slow
def test_the_table_is_empty_unless_asked():
    assert KERNELS == {}
    assert not ops.ON_BY_DEFAULT
    assert kernel("upsample_argmax", torch.zeros(1)) is None
    code = "import sys, hf_segformer; print([name for name in sys.modules if name.startswith('hf_segformer.kernels.')])"
    for value in ("0", "1"):  # without a GPU nothing happens, whatever the environment says
        environment = {**os.environ, "HF_SEGFORMER_KERNELS": value}
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=environment)
        assert result.stdout.strip() == (
            "[]" if not torch.cuda.is_available() or value == "0" else result.stdout.strip()
        )


def test_the_lookup_refuses_what_a_kernel_can_not_take(monkeypatch):
    monkeypatch.setitem(KERNELS, ("cpu", "some"), len)
    tensor = torch.zeros(2)
    assert kernel("some", tensor) is len
    assert kernel("other", tensor) is None
    for other in (torch.zeros(2, device="meta"), torch.zeros(0), torch.zeros(2, dtype=torch.long)):
        assert kernel("some", tensor, other) is None
    with torch.autograd.forward_ad.dual_level():
        assert kernel("some", tensor) is None
    monkeypatch.setenv("HF_SEGFORMER_PLAIN", "0")
    set_fast_paths(False)
    assert kernel("some", tensor) is None


def test_the_lookup_refuses_pictures_that_32_bits_can_not_count(monkeypatch):
    monkeypatch.setitem(KERNELS, ("cpu", "some"), len)
    picture = torch.zeros(1).expand(1, 1 << 16, 1 << 15)
    assert kernel("some", picture) is None
    assert kernel("some", picture[:, 1:].expand(3, -1, -1)) is len  # many of them may be larger together


def test_tensors_of_one_call_must_be_on_one_device():
    pytest.importorskip("triton")
    from hf_segformer.kernels.launch import Launch

    launch = Launch(None, (1,), [torch.zeros(1), 2, torch.zeros(1, device="meta")], {})
    with pytest.raises(ValueError, match="on cpu, meta, but must be on one device"):
        launch.run()


@pytest.fixture
def head(model, monkeypatch):
    """A decode head of 16 bits, features for it, and what its kernel was called with."""
    calls = []
    monkeypatch.setitem(KERNELS, ("cpu", "upsample_sum_relu"), lambda *given: calls.append(given) or given[0][0])
    head = model.decode_head.bfloat16()
    for tensor in (head.batch_norm.weight, head.batch_norm.running_mean, head.batch_norm.running_var):
        tensor.data.uniform_(0.5, 2)
    return head, [torch.randn(1, n, 8 >> i, 8 >> i).bfloat16() for i, n in enumerate((8, 8, 16, 16))], calls


@torch.no_grad()
def test_batch_norm_is_merged_in_32_bits_as_it_would_be_computed(head):
    head, features, calls = head
    head(features)
    [(_, scale, shift)] = calls
    norm = head.batch_norm
    expected = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    torch.testing.assert_close(scale.double(), expected, rtol=1e-6, atol=0)
    expected = (head.fold()[1] - norm.running_mean).double() * expected + norm.bias.double()
    torch.testing.assert_close(shift.double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_dropout_that_was_replaced_is_called_beside_kernels_too(head):
    class AlwaysOn(torch.nn.Module):
        def forward(self, features):
            return features + 1

    head, features, calls = head
    before = head(features)
    head.dropout = AlwaysOn().eval()
    assert (head(features) - before).abs().max() > 0
    assert len(calls) == 1


def test_labels_are_not_looked_at_while_a_cuda_graph_is_captured(monkeypatch):
    class OnGPU(torch.Tensor):
        is_cuda = True

    labels = torch.full((1, 2, 2), 7).as_subclass(OnGPU)
    for is_capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda is_capturing=is_capturing: is_capturing)
        expected = nullcontext() if is_capturing else pytest.raises(ValueError, match="labels hold 7")
        with expected:
            check_labels(labels, (1, 2, 2), 3, 255)


def test_shipped_files_do_not_import_the_package_of_kernels():
    for path in ROOT.glob("hf_segformer/*_segformer.py"):
        assert "import" not in [
            line.split()[0] for line in path.read_text().splitlines() if ".ops" in line and line.split()
        ]
    assert dispatch_segformer.KERNELS is KERNELS


def test_enabling_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        ops.enable("cpu")
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        ops.enable()
    assert KERNELS == {}
