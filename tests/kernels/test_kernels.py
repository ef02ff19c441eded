"""Kernels: off unless requested; in Triton's interpreter they equal their reference."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from hf_segformer.dispatch_segformer import TABLE, record_fast_paths, run_fast
from hf_segformer.kernels import switch
from hf_segformer.upsampling_segformer import check_labels

ROOT = Path(__file__).resolve().parents[2]
F32, F64 = torch.float32, torch.float64


def check(name, dtype, options):
    """Return the difference that a check finds, and its tolerance; runs in the interpreter's process."""
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
def test_a_kernel_equals_its_reference(interpreter, name, dtype, options):
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
    """Run a check once for each of three elements of every tensor that its kernels write, with that element unwritten.

    Returns:
        The element, its value before the launch, and the result of the check, for each run.
    """
    from benchmarks.gpu_checks import CHECKS
    from hf_segformer.kernels.launch import Launch

    run, written, results = Launch.run, [], []

    def changed_by(launch):
        """Yield the index of each argument that the launch writes to, and its values before."""
        # The output replaces an argument that is not used, so a tensor may occur twice.
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
def test_checks_detect_a_single_unwritten_element(interpreter, name, num_written):
    results = interpreter(_leave_elements_out, name)
    assert len({(call, argument) for (call, argument, _), *_ in results}) == num_written  # tensors that are written
    for where, [held], found in results:
        assert held != held or held == torch.iinfo(torch.int64).max, f"{where} was not poisoned"
        assert found == "labels differ without probabilities, or are no classes" or found > 0.01, where


def _seams():
    """Return which implementations ran with and without kernels, and the differences from the reference."""
    from torch import nn

    from benchmarks.gpu_checks import difference
    from hf_segformer import (
        SegFormerConfig,
        SegFormerForSemanticSegmentation,
        set_fast_paths,
        upsample_argmax,
        upsample_cross_entropy,
    )
    from hf_segformer.dispatch_segformer import record_fast_paths
    from hf_segformer.kernels.switch import disable, enable

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
        set_fast_paths(mode != "reference")
        with record_fast_paths() as calls:
            loss = upsample_cross_entropy(logits, labels)
            [gradient] = torch.autograd.grad(loss, logits)
            mixed = model.segformer.encoder.block[0][0].add_mix_ffn(tokens, 2, 3)
            with torch.no_grad():
                head = model.decode_head.eval()(features)
            classes = upsample_argmax(logits, (12, 16))
        return sorted({name for _, name, _ in calls}), [loss, gradient, classes, mixed, head]

    _, reference = run("reference")
    enable("cpu")
    names, found = run("kernels")
    names_when_off, _ = run("reference")
    whole = torch.compile(
        lambda logits, labels: upsample_cross_entropy(logits, labels),
        fullgraph=True,
        backend="aot_eager",
    )
    set_fast_paths(True)
    loss = whole(logits, labels)
    [gradient] = torch.autograd.grad(loss, logits)
    compiled = [difference(loss, reference[0]), difference(gradient, reference[1])]
    disable()
    return names, names_when_off, [difference(a, b) for a, b in zip(found, reference, strict=True)], compiled


def test_the_table_runs_kernels_where_they_are_on(interpreter):
    names, names_when_off, differences, compiled = interpreter(_seams)
    assert names == ["triton_argmax", "triton_cross_entropy", "triton_depthwise_gelu", "triton_upsample_sum_relu"]
    assert names_when_off == [""]
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


def test_operations_pass_opcheck(interpreter):
    for result in interpreter(_opchecks):
        assert set(result.values()) == {"SUCCESS"}


def rows_of_kernels():
    return [row for rows in TABLE.values() for row in rows if row.name.startswith("triton")]


@pytest.mark.slow
def test_kernels_are_off_unless_requested():
    assert len(rows_of_kernels()) == len(switch.ROWS) == 5
    assert all(row.bind is row.run is None and row.device == "cuda" for row in rows_of_kernels())
    assert not switch.ON_BY_DEFAULT
    prefix = "hf_segformer.kernels."
    code = f"import sys, hf_segformer; print([name for name in sys.modules if name.startswith({prefix!r})])"
    for value in ("0", "1"):  # without a GPU nothing happens, whatever the environment says
        environment = {**os.environ, "HF_SEGFORMER_KERNELS": value}
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=environment)
        assert result.stdout.strip() == (
            "['hf_segformer.kernels.switch']"
            if not torch.cuda.is_available() or value == "0"
            else result.stdout.strip()
        )


def _refusals():
    """Return the reasons why argmax by a kernel refuses some tensors, and the implementation for others."""
    from hf_segformer import set_fast_paths
    from hf_segformer.kernels.switch import disable, enable

    def outcome(tensor, size=(3, 3)):
        with record_fast_paths() as calls:
            run_fast("upsample_argmax", None, tensor, size, False)
        return calls[0][1:]

    set_fast_paths(True)
    enable("cpu", without=["upsample_cross_entropy"])
    logits = torch.zeros(1, 2, 2, 2)
    found = [outcome(logits), outcome(logits[:0]), outcome(torch.zeros(1, 1, 2, 2))]
    image = torch.zeros(1).expand(1, 2, 1 << 15, 1 << 15)
    found.append(outcome(image, image.shape[-2:]))
    with torch.autograd.forward_ad.dual_level():
        found.append(outcome(logits))
    set_fast_paths(False)
    found.append(outcome(logits))
    set_fast_paths(True)
    with record_fast_paths() as calls:
        labels = torch.zeros(1, 1500, 1500, dtype=torch.long)  # not a small image
        run_fast("upsample_cross_entropy", None, torch.zeros(1, 2, 375, 375), labels, 255, None, 0.0)
    disable()
    return found, calls


def test_kernels_refuse_tensors_that_they_cannot_take(interpreter):
    found, loss = interpreter(_refusals)
    assert found == [
        ("triton_argmax", ""),
        ("", "a tensor is empty"),
        ("", "there is one logit"),
        ("", "an image has more elements than 32 bits can count"),
        ("", "forward-mode differentiation is active"),
        ("", "fast paths are switched off (set_fast_paths, HF_SEGFORMER_PLAIN)"),
    ]
    assert loss == [("upsample_cross_entropy", "cpu_bands", "")]


def test_tensors_of_one_call_must_be_on_one_device():
    pytest.importorskip("triton")
    from hf_segformer.kernels.launch import Launch

    launch = Launch(None, (1,), [torch.zeros(1), 2, torch.zeros(1, device="meta")], {})
    with pytest.raises(ValueError, match="on cpu, meta; expected one device"):
        launch.run()


def _merged_batch_norm():
    """Return scale and shift that a head of 16 bits passes to its kernel, those of float64, and a changed head."""
    from unittest import mock

    from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation
    from hf_segformer.folding_segformer import fold
    from hf_segformer.kernels import implementations
    from hf_segformer.kernels.switch import disable, enable
    from tests.support.tiny import TINY

    class AlwaysOn(torch.nn.Module):
        def forward(self, features):
            return features + 1

    torch.manual_seed(0)
    head = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=5)).eval().decode_head.bfloat16()
    norm, calls = head.batch_norm, []
    for tensor in (norm.weight, norm.running_mean, norm.running_var):
        tensor.data.uniform_(0.5, 2)
    features = tuple(torch.randn(1, n, 8 >> i, 8 >> i).bfloat16() for i, n in enumerate((8, 8, 16, 16)))
    keep = mock.patch.object(
        implementations, "upsample_sum_relu", lambda maps, *factors: calls.append(factors) or maps[0]
    )
    enable("cpu")
    with torch.no_grad(), keep, record_fast_paths() as names:
        head(features)
        head.dropout = AlwaysOn().eval()
        head(features)
    disable()
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = (fold(head)[1] - norm.running_mean).double() * factor + norm.bias.double()
    return calls[0], (factor.detach(), shift.detach()), [name for _, name, _ in names]


def test_batch_norm_is_merged_in_float32_unless_a_module_was_replaced(interpreter):
    (scale, shift), (expected_scale, expected_shift), names = interpreter(_merged_batch_norm)
    torch.testing.assert_close(scale.double(), expected_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(shift.double(), expected_shift, rtol=1e-5, atol=1e-6)
    assert names == ["triton_upsample_sum_relu", "triton_upsample_sum"]


def test_label_values_are_not_checked_while_a_cuda_graph_is_captured(monkeypatch):
    class OnGPU(torch.Tensor):
        is_cuda = True

    labels = torch.full((1, 2, 2), 7).as_subclass(OnGPU)
    for is_capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda is_capturing=is_capturing: is_capturing)
        expected = nullcontext() if is_capturing else pytest.raises(ValueError, match="labels hold 7")
        with expected:
            check_labels(labels, (1, 2, 2), 3, 255)


def test_shipped_files_do_not_import_kernels():
    for path in ROOT.glob("hf_segformer/*_segformer.py"):
        assert not re.search(r"^\s*(from|import)\b.*kernels", path.read_text(), re.MULTILINE), path


def test_enabling_names_what_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        switch.enable("cpu")
    monkeypatch.setattr(switch, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        switch.enable()
    assert all(row.bind is None for row in rows_of_kernels())
