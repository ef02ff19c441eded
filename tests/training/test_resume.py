"""Runs that end early, by a signal, a full disk or a NaN, and their resume."""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation

from hf_segformer.cli.main import main
from hf_segformer.training.callbacks import StopAfterStep
from hf_segformer.training.resume import find_defect, list_checkpoints, newest_whole_checkpoint
from tests.support.training import LONG, ROOT, assert_same_weights, train, train_command, with_sender

# A machine with one core is warned of two workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")

WORKERS = {
    "no workers": [],
    "two workers": ["trainer.dataloader_num_workers=2"],
    "persistent workers": ["trainer.dataloader_num_workers=2", "trainer.dataloader_persistent_workers=true"],
}


# The command in a process group of its own, which gets a signal within a step: "13 SIGKILL" in the one after 13.
SIGNALLED = """
import os, signal, sys
from hf_segformer.cli.main import main
from tests.support.training import with_sender
step, name = sys.argv[1].split()
with with_sender(lambda: os.killpg(0, getattr(signal, name)), int(step)):
    sys.exit(main(sys.argv[2:]))
"""


def program(folder, *arguments):
    return train(folder, *arguments, settings=LONG)


def signalled(signal_at, folder, *arguments):
    """Run the command in another process and send it a signal; returns its exit status and output."""
    command = [sys.executable, "-c", SIGNALLED, signal_at, *train_command(folder, *arguments, settings=LONG)]
    path = str(ROOT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, start_new_session=True)
    return run.returncode, run.stdout + run.stderr


def resume_command(output, folder, step):
    """Arguments of the command that the program gives for resuming."""
    [line] = [line for line in output.splitlines() if line.startswith("Stopped.")]
    start, _, command = line.partition(" with: ")
    assert start == f"Stopped. Resume from {folder}/checkpoint-{step}"
    name, *arguments = shlex.split(command)
    assert name == "segformer"
    return arguments


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert program(folder) == 0
    return folder


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(uninterrupted, tmp_path, workers):
    folder, early = tmp_path / "run", tmp_path / "early"
    code, output = signalled("13 SIGKILL", folder, *WORKERS[workers])
    assert code == -signal.SIGKILL, output
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-12", "checkpoint-8", "checkpoint-4"]
    shutil.copytree(folder / "checkpoint-4", early / "checkpoint-4")
    # Between two epochs; and in the middle of the first, so that workers live on into the next.
    for place in (folder, early):
        assert program(place, *WORKERS[workers], "--resume") == 0
        assert_same_weights(place, uninterrupted)


@pytest.mark.slow
def test_ctrl_c_ends_after_the_step_and_prints_the_command_to_resume(uninterrupted, tmp_path):
    # A terminal sends it to the whole group, to workers, too.
    folder = tmp_path / "run"
    code, output = signalled("9 SIGINT", folder, *WORKERS["persistent workers"])
    assert code == 130, output
    assert output.count("Stopping after this step") == 1
    assert newest_whole_checkpoint(folder) == folder / "checkpoint-10"
    command = resume_command(output, folder, 10)
    assert main(command) == 0
    assert_same_weights(folder, uninterrupted)


def test_sigterm_ends_after_the_step(uninterrupted, tmp_path, capsys):
    folder = tmp_path / "run"
    with with_sender(lambda: os.kill(os.getpid(), signal.SIGTERM), 9):
        assert program(folder) == 130
    command = resume_command(capsys.readouterr().err, folder, 10)
    assert main(command) == 0
    assert_same_weights(folder, uninterrupted)


def press_ctrl_c_twice():
    # To this thread, and one after the other is heard: Python counts two that are pending as one.
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        time.sleep(0.01)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once(tmp_path, capsys):
    folder = tmp_path / "run"
    with with_sender(press_ctrl_c_twice, 5):
        assert program(folder) == 130
    resume_command(capsys.readouterr().err, folder, 4)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_training_that_begins_again_restores_the_handlers_of_before(tmp_path):
    """With trainer.auto_find_batch_size it begins again after it ran out of memory, without an end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stop = StopAfterStep(SimpleNamespace(accelerator=None))
    for _ in range(2):
        stop.on_train_begin(None, None, None)
        assert signal.getsignal(signal.SIGINT) == stop._request_stop
    stop.on_train_end(None, None, None)
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_checkpoint_cut_off_anywhere_is_skipped(uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted / "checkpoint-4", tmp_path / "checkpoint-4")
    whole = uninterrupted / "checkpoint-8"
    files = sorted(whole.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert files[-1].name == "trainer_state.json"
    for number, last in enumerate(files):
        for share in (0, 0.5, 0.99):
            cut = tmp_path / "checkpoint-8"
            shutil.rmtree(cut, ignore_errors=True)
            cut.mkdir()
            for file in files[: number + 1]:
                shutil.copy(file, cut)
            (cut / last.name).write_bytes(last.read_bytes()[: int(last.stat().st_size * share)])
            assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4", (last.name, share)
            assert "checkpoint-8, which is broken" in capsys.readouterr().out


def test_a_missing_file_of_a_checkpoint_is_a_defect(uninterrupted, tmp_path):
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        cut = Path(shutil.copytree(uninterrupted / "checkpoint-8", tmp_path / name))
        assert find_defect(cut) is None
        (cut / name).unlink()
        assert "missing" in find_defect(cut), name


def test_a_diverging_run_stops_in_one_line_and_its_checkpoint_is_finite(tmp_path, capsys):
    folder = tmp_path / "run"
    assert program(folder, "trainer.learning_rate=1e15", "trainer.max_grad_norm=0", "trainer.save_steps=1") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("segformer: the loss of step ")
    assert "infinite or NaN" in error
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    checkpoint = newest_whole_checkpoint(folder)
    assert all(weights.isfinite().all() for weights in load_file(checkpoint / "model.safetensors").values())


def test_a_full_disk_is_one_line_and_the_run_resumes_when_there_is_room(uninterrupted, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted / "checkpoint-4", folder / "checkpoint-4")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    weights, state = ((folder / "checkpoint-4" / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    assert weights < state
    for limit in (weights // 2, (weights + state) // 2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # Python ignores the signal: writing fails
        try:
            code = program(folder, "--resume")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        error = capsys.readouterr().err.splitlines()[-1]
        assert code == 1
        assert error.startswith(f"segformer: {folder} cannot be written to, its disk is full")
        assert newest_whole_checkpoint(folder) == folder / "checkpoint-4"
    assert program(folder, "--resume") == 0
    assert_same_weights(folder, uninterrupted)


def test_the_best_checkpoint_is_restored_with_every_tensor(tmp_path):
    arguments = [
        "trainer.load_best_model_at_end=true",
        "trainer.metric_for_best_model=mean_iou",
        "trainer.greater_is_better=false",  # the first, so that it is not the last
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=4",
        "trainer.max_steps=12",
    ]
    folder = tmp_path / "run"
    assert program(folder, *arguments) == 0
    state = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())
    best = min((row for row in state["log_history"] if "eval_mean_iou" in row), key=lambda row: row["eval_mean_iou"])
    assert best["step"] < 12
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{best['step']}"
    assert_same_weights(folder, folder / f"checkpoint-{best['step']}")


# PEFT asks by the name that Transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.slow
def test_adapters_resume_and_end_in_a_model_that_needs_no_peft(uninterrupted, tmp_path):
    pytest.importorskip("peft")
    arguments = [f"model.checkpoint={uninterrupted}", "lora.rank=2", "lora.dropout=0.3", "trainer.max_steps=8"]
    assert program(tmp_path / "whole", *arguments) == 0
    with with_sender(press_ctrl_c_twice, 5):
        assert program(tmp_path / "run", *arguments) == 130
    for _ in range(2):  # the second time there is nothing left to train
        assert program(tmp_path / "run", *arguments, "--resume") == 0
        assert_same_weights(tmp_path / "run", tmp_path / "whole")
    _, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(info.values())
