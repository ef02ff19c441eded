"""Runs that end early, by a signal, a full disk or a NaN, and what becomes of them when they go on."""

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
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation, TrainerCallback

import hf_segformer.training.run
from hf_segformer.training.resume import find_defect, list_checkpoints, newest_whole_checkpoint
from training.finetune import main

# A machine with one core is warned of two workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")

ROOT = Path(__file__).parents[2]

# Three epochs of 6 steps, the last one short; checkpoints amid the first two and after the second.
SETTINGS = [
    str(ROOT / "configuration" / "shapes_b0.toml"),
    "model.hidden_sizes=[8, 8, 16, 16]",
    "model.depths=[1, 1, 1, 1]",
    "model.num_attention_heads=[1, 1, 2, 2]",
    "model.decoder_hidden_size=16",
    "model.drop_path_rate=0.3",
    "model.classifier_dropout_prob=0.3",
    "data.image_size=32",
    "data.num_train=24",
    "data.num_eval=3",
    "augmentation.crop_size=32",
    "trainer.max_steps=14",
    "trainer.save_steps=4",
    "trainer.save_total_limit=9",
    "trainer.eval_steps=3",
    "trainer.logging_steps=1",
    "trainer.per_device_train_batch_size=4",
    "trainer.warmup_steps=1",
    "trainer.use_cpu=true",
]
WORKERS = {
    "no workers": [],
    "two workers": ["trainer.dataloader_num_workers=2"],
    "persistent workers": ["trainer.dataloader_num_workers=2", "trainer.dataloader_persistent_workers=true"],
}


# The program in a process group of its own, which gets a signal amid a step: "13 SIGKILL" is in the one after 13.
SIGNALLED = """
import os, signal, sys
from tests.training.test_resume import Sender, main, with_sender
step, name = sys.argv[1].split()
with with_sender(lambda: os.killpg(0, getattr(signal, name)), int(step)):
    sys.exit(main(sys.argv[2:]))
"""


class Sender(TrainerCallback):
    """Acts amid a step, before the weights change."""

    def __init__(self, send, step):
        self.send, self.step = send, step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.send()


@contextmanager
def with_sender(send, step):
    """The program's Trainer with a `Sender`."""

    def build_trainer(*values):
        trainer = original(*values)
        trainer.add_callback(Sender(send, step))
        return trainer

    original = hf_segformer.training.run.build_trainer
    with mock.patch.object(hf_segformer.training.run, "build_trainer", build_trainer):
        yield


def program(folder, *arguments):
    return main([*SETTINGS, f"trainer.output_dir={folder}", *arguments])


def signalled(signal_at, folder, *arguments):
    """Run the program elsewhere, and send it a signal; gives its exit code and what it told."""
    command = [sys.executable, "-c", SIGNALLED, signal_at, *SETTINGS, f"trainer.output_dir={folder}", *arguments]
    path = str(ROOT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, start_new_session=True)
    return run.returncode, run.stdout + run.stderr


def go_on(told, folder, step):
    """The command that the program says to go on with."""
    [line] = [line for line in told.splitlines() if line.startswith("Stopped.")]
    start, _, command = line.partition(" with: ")
    assert start == f"Stopped. Go on from {folder}/checkpoint-{step}"
    return shlex.split(command)


def assert_same_weights(folder, expected):
    found, expected = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=0, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert program(folder) == 0
    return folder


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.slow
def test_killed_and_resumed_a_run_ends_with_the_weights_of_an_uninterrupted_one(uninterrupted, tmp_path, workers):
    folder, early = tmp_path / "run", tmp_path / "early"
    code, told = signalled("13 SIGKILL", folder, *WORKERS[workers])
    assert code == -signal.SIGKILL, told
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-12", "checkpoint-8", "checkpoint-4"]
    shutil.copytree(folder / "checkpoint-4", early / "checkpoint-4")
    # Between two epochs; and amid the first, so that workers live on into the next.
    for place in (folder, early):
        assert program(place, *WORKERS[workers], "--resume") == 0
        assert_same_weights(place, uninterrupted)


@pytest.mark.slow
def test_ctrl_c_ends_after_the_step_and_the_command_it_tells_goes_on(uninterrupted, tmp_path):
    # A terminal sends it to the whole group, to workers, too.
    folder = tmp_path / "run"
    code, told = signalled("9 SIGINT", folder, *WORKERS["persistent workers"])
    assert code == 130, told
    assert told.count("Stopping after this step") == 1
    assert newest_whole_checkpoint(folder) == folder / "checkpoint-10"
    command = go_on(told, folder, 10)
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert_same_weights(folder, uninterrupted)


def test_a_schedulers_sigterm_does_the_same(uninterrupted, tmp_path, capsys):
    folder = tmp_path / "run"
    with with_sender(lambda: os.kill(os.getpid(), signal.SIGTERM), 9):
        assert program(folder) == 130
    command = go_on(capsys.readouterr().err, folder, 10)
    assert main(command[command.index("training.finetune") + 1 :]) == 0
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
    go_on(capsys.readouterr().err, folder, 4)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_checkpoint_cut_anywhere_while_it_was_written_is_passed_over(uninterrupted, tmp_path, capsys):
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


def test_every_file_that_a_resumed_run_needs_is_missed(uninterrupted, tmp_path):
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        cut = Path(shutil.copytree(uninterrupted / "checkpoint-8", tmp_path / name))
        assert find_defect(cut) is None
        (cut / name).unlink()
        assert "missing" in find_defect(cut), name


def test_a_run_that_diverges_stops_in_one_sentence_and_its_checkpoint_is_finite(tmp_path, capsys):
    folder = tmp_path / "run"
    assert program(folder, "trainer.learning_rate=1e15", "trainer.max_grad_norm=0", "trainer.save_steps=1") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the loss of step ")
    assert "infinite or NaN" in error
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    checkpoint = newest_whole_checkpoint(folder)
    assert all(weights.isfinite().all() for weights in load_file(checkpoint / "model.safetensors").values())


def test_a_full_disk_is_told_in_one_sentence_and_the_run_goes_on_when_there_is_room(uninterrupted, tmp_path, capsys):
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
        assert error.startswith(f"error: {folder} can not be written to, its disk is full")
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
def test_adapters_go_on_too_and_end_in_a_model_that_needs_no_peft(uninterrupted, tmp_path):
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
