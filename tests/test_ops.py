"""Kernels: the table is empty unless asked; in Triton's interpreter they give what their plain twins give."""

import csv
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from hf_segformer import fast_paths_segformer, ops, set_fast_paths
from hf_segformer.fast_paths_segformer import KERNELS, kernel

ROOT = Path(__file__).resolve().parent.parent
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


def _spoiled():
    from benchmarks import gpu_checks

    before, gpu_checks.upsample_sum = gpu_checks.upsample_sum, lambda maps: maps[0] * 1.0
    try:
        return gpu_checks.check_upsample_sum_relu(F32, "cpu"), gpu_checks.difference(
            torch.full((2,), torch.nan), torch.ones(2)
        )
    finally:
        gpu_checks.upsample_sum = before


def test_the_checks_see_memory_that_was_not_filled(interpreter):
    right, wrong = interpreter(_spoiled)
    assert right < 1e-5
    assert wrong == float("inf")


def _seams():
    """Every seam with kernels and plain; how often the table was asked, and the differences."""
    from torch import nn

    from benchmarks.gpu_checks import difference
    from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, upsample_argmax, upsample_cross_entropy
    from hf_segformer import set_fast_paths as switch
    from hf_segformer.fast_paths_segformer import KERNELS
    from hf_segformer.ops import enable

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
    from hf_segformer.ops.argmax import upsample_argmax
    from hf_segformer.ops.cross_entropy import sum_cross_entropy
    from hf_segformer.ops.decode_head import upsample_sum
    from hf_segformer.ops.depthwise_gelu import depthwise_gelu

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


def test_the_table_is_empty_unless_asked():
    assert KERNELS == {}
    assert not ops.ON_BY_DEFAULT
    assert kernel("upsample_argmax", torch.zeros(1)) is None
    code = "import sys, hf_segformer; print([name for name in sys.modules if name.startswith('hf_segformer.ops.')])"
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


def test_shipped_files_do_not_import_the_package_of_kernels():
    for path in ROOT.glob("hf_segformer/*_segformer.py"):
        assert "import" not in [
            line.split()[0] for line in path.read_text().splitlines() if ".ops" in line and line.split()
        ]
    assert fast_paths_segformer.KERNELS is KERNELS


def test_enabling_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        ops.enable("cpu")
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        ops.enable()
    assert KERNELS == {}


COMPILED = """
import sys, torch
from benchmarks import gpu
gpu.DTYPES = (torch.bfloat16,)
sys.exit(gpu.main(["--compile-only", "--results", sys.argv[1]]))
"""


def test_every_kernel_compiles_without_a_gpu_and_spills_nothing(tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env=environment, capture_output=True)
    with (tmp_path / "gpu_compiled.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["capability"] for row in rows} == {"80", "90"}
    assert len(rows) == 20
    assert {row["kernel"] for row in rows if int(row["stack"])} == set()


def test_the_script_runs_to_its_end_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--results", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["task"] for row in rows} == {"peak", "kernel", "forward", "training", "labels"}
    assert all(row["milliseconds"] for row in rows if row["task"] != "peak")


def test_the_script_says_in_one_line_that_there_is_no_gpu(capsys, monkeypatch):
    from benchmarks import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "gpu: there is no CUDA GPU here; --compile-only needs none\n"
    assert gpu.main(["--device", "cpu"]) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_every_kernel_at_real_sizes_on_a_gpu():
    from benchmarks.gpu import check_all

    assert check_all("cuda", tiny=False) == 0
