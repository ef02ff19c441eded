"""`python -m benchmarks.gpu`: compilation, a run in the interpreter, crashes, hangs and resuming."""

import argparse
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, machine

ROOT = Path(__file__).resolve().parents[2]

COMPILED = """
import sys, torch
from benchmarks import gpu, record
gpu.DTYPES = (torch.bfloat16,)
sys.exit(gpu.main(["--compile-only", "--results", sys.argv[1]]))
"""


@pytest.mark.slow
def test_every_kernel_compiles_without_a_gpu_and_spills_nothing(tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", COMPILED, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env=environment, capture_output=True)
    with (tmp_path / "gpu_compiled.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["capability"] for row in rows} == {"80", "90"}
    assert len(rows) == 20
    assert {row["kernel"] for row in rows if int(row["stack"])} == set()


def test_kernels_compile_where_sides_are_one():
    """Triton makes each argument that is 1 a constant, which its interpreter does not."""
    pytest.importorskip("triton")
    from hf_segformer.kernels import argmax, cross_entropy, decode_head, depthwise_gelu

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, labels, weight = empty(1, 2, 1, 1), empty(1, 1, 63, dtype=torch.int64), empty(2)
    tokens, kernel, bias = empty(1, 19, 1), empty(1, 1, 3, 3), empty(1)
    maps = [empty(1, 1, 63, 1), empty(1, 1, 1, 1)]
    for launch in (
        argmax.plan(logits, labels, empty(1, 1, 63)),
        cross_entropy.plan(logits, labels, weight, 1, 0.1, True)[0],
        depthwise_gelu.plan(tokens, kernel, bias, tokens, 19, 1),
        depthwise_gelu.plan_gradient(tokens, tokens, kernel, bias, tokens, 1, 19)[0],
        decode_head.plan(maps, bias, bias, maps[0]),
        decode_head.plan_gradient(*maps),
    ):
        assert launch.compile(90).registers > 0


@pytest.mark.slow
def test_the_script_runs_to_its_end_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--results", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["task"] for row in rows} == {"peak", "check", "kernel", "forward", "training", "labels"}
    for row in rows:
        assert row["is_right"] == "True" if row["task"] == "check" else row["milliseconds"], row
    *_, forward, training = result.stdout.strip().splitlines()
    assert forward.startswith("forward b0 32x64 1: ")
    assert training.startswith("training b0 32x64 1: ")
    assert training.count("x") == 3  # of the size, of plain, of kernels


def test_a_missing_gpu_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "gpu: there is no CUDA GPU here; --compile-only needs none\n"
    assert gpu.main(["--device", "cpu"]) == 1


def test_rows_are_written_without_git_and_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._commit() == "not known"
    assert gpu._driver() == "not known"


KEYS = [gpu.Key("kernel", "", "", 8, name) for name in ("first", "crashes", "hangs", "faults", "last")]


def _work_badly(connection, keys, settings, wrong):
    for key in keys:
        connection.send(key)
        if key.candidate == "crashes":
            os._exit(3)
        if key.candidate == "hangs":
            time.sleep(60)
        connection.send({"milliseconds": 1.0 + len(keys)})
        if key.candidate == "faults":
            return


@pytest.fixture
def measure_badly(monkeypatch, tmp_path):
    """Run the script's loop with a measuring process that crashes and hangs; return the rows."""
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu, "_work", _work_badly)

    def measure(keys, minutes=5.0, patience=1):
        # Only the row that hangs runs out of patience, however slow the machine is.
        monkeypatch.setattr(gpu, "_patience", lambda key: patience if key.candidate == "hangs" else 200)
        arguments = argparse.Namespace(device="cpu", tiny=True, rounds=1, minutes=minutes)
        return gpu.run(keys, arguments, tmp_path / "gpu.csv")

    return measure


@pytest.mark.slow
def test_crashes_and_hangs_leave_a_row_and_the_rest_is_measured(measure_badly):
    rows = measure_badly(KEYS)
    assert [row.key for row in rows] == KEYS
    assert [row.note for row in rows] == ["", "the process died, status 3", "took more than 1 s", "", ""]
    # The number of rows that were left when the process began: a new one after each that failed.
    assert [row.milliseconds for row in rows] == [6.0, None, None, 3.0, 2.0]
    assert [row.has_failed for row in rows] == [False, True, True, False, False]


@pytest.mark.slow
def test_a_second_call_resumes_the_first_one(measure_badly, tmp_path):
    first = gpu.Row(*KEYS[0], milliseconds=1.5, is_right=False, note="a, b", **gpu.identity("cpu"))
    path = tmp_path / "gpu.csv"
    gpu.write_rows(path, [first])
    rows = measure_badly([KEYS[0], KEYS[4]])
    assert rows[0] == first
    assert [row.key for row in rows] == [KEYS[0], KEYS[4]]
    assert measure_badly([KEYS[2], KEYS[0], KEYS[4]], minutes=0.05, patience=99) == rows  # no time for what hangs
    assert gpu.read_rows(path, gpu.identity("cpu")) == rows
    assert gpu.read_rows(path, {**gpu.identity("cpu"), "commit": "another, of files that are not code"}) == rows
    assert gpu.read_rows(path, {**gpu.identity("cpu"), "code": "another"}) == []


def _measure_what_fails():
    from benchmarks import gpu_timing
    from hf_segformer.dispatch_segformer import TABLE

    def fail(*_):
        raise TypeError("a compiler's own error")

    gpu_timing.KERNEL_CALLS["fails"] = ({"upsample_sum"}, fail)
    key, settings = gpu.Key("kernel", "", "", 1, "fails"), ("cpu", True, 1)
    failed = gpu_timing.measure(key, *settings, {"upsample_argmax"})
    not_timed = gpu_timing.measure(key, *settings, {"upsample_sum"})
    note = gpu_timing._switch("kernels", "cpu", {"upsample_argmax"})
    names = sorted(row.name for rows in TABLE.values() for row in rows if row.name.startswith("triton") and row.run)
    gpu_timing.disable()
    return failed, not_timed, note, names


def test_a_kernel_that_fails_or_is_wrong_is_left_out(interpreter):
    failed, not_timed, note, names = interpreter(_measure_what_fails)
    assert failed == {"note": "TypeError: a compiler's own error"}
    assert not_timed == {"note": "not timed: upsample_sum is wrong"}
    assert note == "without upsample_argmax"
    assert names == [
        *("triton_cross_entropy", "triton_depthwise_gelu"),
        *("triton_upsample_sum", "triton_upsample_sum_relu"),
    ]


def test_tolerances_allow_for_the_rounding_of_outputs(monkeypatch):
    """At a size of the GPU's checks the gradients of a mean are below the smallest float16."""
    pytest.importorskip("triton")
    from benchmarks import gpu_checks
    from hf_segformer.upsampling_segformer import reference_cross_entropy

    monkeypatch.setattr(
        gpu_checks, "upsample_cross_entropy", lambda logits, labels, *_: reference_cross_entropy(logits, labels)
    )
    found = gpu_checks.check_cross_entropy(torch.float16, "cpu", grid=(2, 3, 128, 128), size=(512, 512))
    assert found < gpu_checks.tolerance("upsample_cross_entropy", torch.float16)


def test_everything_is_planned_once_and_goals_come_first():
    keys = gpu.plan_checks(tiny=False) + gpu.plan_times(tiny=False, device="cuda")
    assert len(set(keys)) == len(keys)
    places = {key[1:4] for key in keys if key.task == "training"}
    assert places == {
        (variant, size, batch)
        for variant in ("b0", "b2", "b5")
        for size, batch in (("512x512", 1), ("512x512", 8), ("512x512", 32), ("1024x1024", 1), ("1024x1024", 8))
    }
    assert {key.variant for key in keys if key.size == "1024x2048" and key.task == "forward"} == {"b0", "b2", "b5"}
    names = [key.candidate for key in keys if key.task == "forward" and key[1:4] == ("b0", "512x512", 8)]
    assert sorted(names) == sorted(gpu.CANDIDATES)
    tasks = list(dict.fromkeys(key.task for key in keys))
    assert tasks == ["check", "peak", "kernel", "labels", "forward", "training"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_every_kernel_at_real_sizes_on_a_gpu(tmp_path):
    assert gpu.main(["--check", "--results", str(tmp_path)]) == 0
