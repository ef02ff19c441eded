"""Runtime of the CPU's fast paths: products by oneDNN against PyTorch's own, types, threads, memory."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from hf_segformer import SegFormerForSemanticSegmentation, cpu_runtime_segformer
from hf_segformer.cpu_runtime_segformer import find_onednn, linear, multiply_over_rows, parallel_for, prefers_onednn
from tests.support.fast_paths import assert_near

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
SHAPES = [(1, 1, 1), (7, 5, 3), (64, 3, 130), (33, 150, 16)]  # rows, columns, outputs


def samples(rows, columns, outputs, dtype):
    torch.manual_seed(0)
    shapes = (rows, columns), (outputs, columns), (outputs,), (rows, outputs)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.fixture(params=["oneDNN", "without"])
def library(request):
    """Compute products by oneDNN, or without it."""
    if request.param == "oneDNN":
        yield
    else:
        with mock.patch.object(cpu_runtime_segformer, "find_onednn", return_value=None):
            yield


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("library")
def test_a_product_with_bias_and_addend(shape, dtype):
    tokens, weight, bias, added = samples(*shape, dtype)
    before = added.clone()
    for given_bias in (None, bias):
        expected = F.linear(tokens, weight, given_bias)
        assert_near(linear(tokens, weight, given_bias), expected, TOLERANCE[dtype])
        assert_near(linear(tokens, weight, given_bias, added), expected + added, TOLERANCE[dtype])
    assert_near(linear(tokens[None, :, None], weight)[0, :, 0], tokens @ weight.t(), TOLERANCE[dtype])
    torch.testing.assert_close(added, before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_onednn_faster", [True, False])
@pytest.mark.usefixtures("library")
def test_a_product_over_rows(shape, dtype, is_onednn_faster, monkeypatch):
    monkeypatch.setattr(cpu_runtime_segformer, "prefers_onednn", lambda: is_onednn_faster)
    tokens, _, _, added = samples(*shape, dtype)
    for left, right in ((tokens, added), (added, tokens)):
        assert_near(multiply_over_rows(left, right), left.t() @ right, TOLERANCE[dtype])


CPUINFO = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 17\n\nprocessor\t: 1\n"


@pytest.mark.parametrize(
    ("vendor", "family", "instructions", "expected"),
    [
        ("AuthenticAMD", 26, "AVX512", True),
        ("AuthenticAMD", 26, "AVX2", False),
        ("AuthenticAMD", 25, "AVX512", False),
        ("GenuineIntel", 26, "AVX512", False),
    ],
)
def test_onednn_is_preferred_on_zen_5(vendor, family, instructions, expected, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(vendor, family))
    monkeypatch.delenv("HF_SEGFORMER_PRODUCTS", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(cpu_runtime_segformer, "_CPUINFO", tmp_path / "cpuinfo")
    assert prefers_onednn.__wrapped__() is expected
    (tmp_path / "cpuinfo").unlink()
    assert prefers_onednn.__wrapped__() is False
    for value in ("onednn", "mkl"):
        monkeypatch.setenv("HF_SEGFORMER_PRODUCTS", value)
        assert prefers_onednn.__wrapped__() is (value == "onednn")
    monkeypatch.setenv("HF_SEGFORMER_PRODUCTS", "blas")
    with pytest.raises(ValueError, match="HF_SEGFORMER_PRODUCTS is 'blas'; expected 'onednn' or 'mkl'"):
        prefers_onednn.__wrapped__()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("wanted", [(True, True, True, True), (True, False, False, False), (False, True, False, True)])
@pytest.mark.usefixtures("library")
def test_gradients(dtype, wanted):
    arguments = samples(12, 5, 8, dtype)
    for tensor, is_wanted in zip(arguments, wanted, strict=True):
        tensor.requires_grad_(is_wanted)
    leaves = [tensor for tensor in arguments if tensor.requires_grad]
    tokens, weight, bias, added = arguments
    factor = torch.randn(12, 8, dtype=dtype)
    expected = torch.autograd.grad(((F.linear(tokens, weight, bias) + added) * factor).sum(), leaves)
    found = torch.autograd.grad((linear(*arguments) * factor).sum(), leaves)
    for gradient, other in zip(found, expected, strict=True):
        assert_near(gradient, other, TOLERANCE[dtype])


def test_a_second_derivative_is_refused():
    tokens, weight, bias, _ = samples(4, 3, 2, torch.float32)
    product = linear(tokens.requires_grad_(), weight, bias)
    with pytest.raises(RuntimeError, match="set_fast_paths"):
        torch.autograd.grad(product.square().sum(), tokens, create_graph=True)


def test_onednn_takes_float32_without_a_gradient():
    tokens = torch.randn(2, 3)
    assert (find_onednn("_linear_pointwise", tokens) is not None) == torch.backends.mkldnn.is_available()
    assert find_onednn("_linear_pointwise", tokens.double()) is None
    assert find_onednn("_linear_pointwise", tokens.requires_grad_()) is None
    assert find_onednn("_linear_pointwise", torch.empty(2, 3, device="meta")) is None
    assert find_onednn("no_such_operation", tokens.detach()) is None
    with mock.patch.object(torch.backends, "mkldnn", mock.Mock(enabled=False)):
        assert find_onednn("_linear_pointwise", tokens.detach()) is None


# Threads


def test_work_is_shared_out_and_threads_are_put_back(num_threads):
    for number in (1, 2, 4):
        num_threads(number)
        done, inside, workers = [], set(), set()

        def work(items, done=done, inside=inside, workers=workers):
            workers.add(threading.get_ident())
            for item in items:
                inside.add(torch.get_num_threads())
                done.append((item, torch.is_grad_enabled()))

        parallel_for(work, list(range(50)))
        assert sorted(done) == [(item, False) for item in range(50)]
        assert inside == {1}
        assert len(workers) <= number
        assert torch.get_num_threads() == number
        assert torch.is_grad_enabled()


def default_threads():
    """The number that a new thread gets."""
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_calls_that_overlap_leave_every_thread_its_number(num_threads):
    """A thread that is born while others share work would begin, and end, with the one core of a worker."""
    num_threads(2)
    has_begun, may_end, seen = threading.Event(), threading.Event(), []

    def first(items):
        for _ in items:
            has_begun.set()
            may_end.wait(10)

    def second():
        parallel_for(lambda items: [may_end.set() for _ in items], range(2))
        early.join()
        seen.append(torch.get_num_threads())

    early = threading.Thread(target=parallel_for, args=(first, range(2)))
    early.start()
    assert has_begun.wait(10)
    late = threading.Thread(target=second)
    late.start()
    late.join(20)
    assert seen == [2]
    assert default_threads() == torch.get_num_threads() == 2


def test_ctrl_c_while_waiting_stops_the_others_and_puts_threads_back(num_threads):
    num_threads(2)
    caller, done, is_working = threading.get_ident(), [], threading.Event()

    def work(items):
        if threading.get_ident() == caller:
            is_working.wait(10)
            return
        for item in items:
            done.append(item)
            is_working.set()
            time.sleep(0.3)

    def press():
        is_working.wait(10)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        parallel_for(work, range(1000))
    assert done == [0]
    assert default_threads() == torch.get_num_threads() == 2


def test_a_thread_that_cannot_start_raises_and_restores_the_number_of_threads(num_threads, monkeypatch):
    num_threads(2)

    class NoneLeft(threading.Thread):
        def start(self):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(cpu_runtime_segformer, "Thread", NoneLeft)
    with pytest.raises(RuntimeError, match="can't start"):
        parallel_for(list, range(4))
    monkeypatch.undo()
    assert default_threads() == torch.get_num_threads() == 2


def test_an_empty_list_of_items_is_allowed():
    parallel_for(lambda items: list(items), [])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_error_in_a_thread_reaches_the_caller(number, num_threads):
    num_threads(number)
    done = []

    def work(items):
        for item in items:
            if item == 3:
                raise KeyError("number three")
            done.append(item)

    with pytest.raises(KeyError, match="number three"):
        parallel_for(work, list(range(1000)))
    assert torch.get_num_threads() == number
    assert torch.is_grad_enabled()
    assert len(done) < 1000 - 1
    parallel_for(lambda items: done.extend(items), ["again"])
    assert done[-1] == "again"


def test_modes_of_the_caller_hold_in_every_thread(num_threads):
    num_threads(3)
    logits, found = torch.randn(2, 3), []

    def work(items):
        for _ in items:
            found.append((torch.is_inference_mode_enabled(), (logits @ logits.T).dtype))

    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        parallel_for(work, list(range(40)))
    # Autocast is a thread's own: what is computed must not depend on which thread does it.
    assert set(found) == {(True, torch.float32)}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_on_a_cpu_warns_once_with_the_remedy(dtype, tiny_config, monkeypatch):
    supported = {torch.float16: "_is_mkldnn_fp16_supported", torch.bfloat16: "_is_mkldnn_bf16_supported"}[dtype]
    monkeypatch.setattr(torch.ops.mkldnn, supported, lambda: False)
    cpu_runtime_segformer.logger.warning_once.__func__.cache_clear()
    model = SegFormerForSemanticSegmentation(tiny_config()).eval().requires_grad_(False)
    images = torch.randn(1, 3, 32, 64)
    with torch.no_grad(), mock.patch.object(cpu_runtime_segformer.logger, "warning") as warning:
        model(images)
        assert not warning.call_count
        expected = model.to(dtype)(images.to(dtype)).logits
        model(images.to(dtype))
        [[message]] = [call.args for call in warning.call_args_list]
        assert message.startswith(f"the weights are {str(dtype)[6:]}, which is several times slower than float32")
        assert message.endswith("load the model with dtype=torch.float32, or call model.float()")
        cpu_runtime_segformer.logger.warning_once.__func__.cache_clear()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images.to(dtype)).logits
        torch.testing.assert_close(compiled, expected)
        traced = torch.jit.trace(lambda pixels: model(pixels).logits, images.to(dtype), check_trace=False)
        torch.testing.assert_close(traced(images.to(dtype)), expected)
        torch.export.export(model, (images.to(dtype),), strict=True)
        assert warning.call_count == 1  # none while something records the operations
        monkeypatch.setattr(torch.ops.mkldnn, supported, lambda: True)
        model(images.to(dtype))
        assert warning.call_count == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_a_network_keeps_its_memory_between_calls():
    program = """
import resource
import torch
from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(images)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(2)
model, images = SegFormerForSemanticSegmentation(SegFormerConfig(num_labels=150)).eval(), torch.randn(1, 3, 512, 512)
with torch.inference_mode():
    print(sorted(faults() for _ in range(9))[4])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert int(found.stdout) < 500  # pages; some 8,000 where each layer's memory is fetched again
