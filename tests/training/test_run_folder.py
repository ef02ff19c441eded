"""The output folder of a run: one owner at a time, checkpoints of one run, no run replaced without --overwrite."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_segformer.files import with_suffix_added
from hf_segformer.locks import LOCK
from hf_segformer.training.run_folder import RunFolder
from tests.support.training import ENVIRONMENT, ROOT, error_of, train

# A process that owns a folder until its standard input ends.
OWNER = """
import sys
from hf_segformer.training.run_folder import RunFolder
with RunFolder(sys.argv[1]):
    print("owned", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path):
    """A live process that owns the folder `run`."""
    command = [sys.executable, "-c", OWNER, str(tmp_path / "run")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Two runs of two steps that differ in their seed alone."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        arguments = (f"trainer.seed={seed}", "trainer.max_steps=2", "trainer.save_steps=1")
        assert train(folder / f"run{seed}", *arguments) == 0
    return folder


def test_a_second_training_is_refused_with_owner_and_host_and_changes_nothing(owner, tmp_path, capsys):
    import platform

    folder = tmp_path / "run"
    before = sorted(folder.iterdir())
    for arguments in ((), ("--resume",), ("--overwrite",)):
        error = error_of(capsys, folder, *arguments)
        assert f"{folder} is in use by a training of process {owner.pid}" in error
        assert platform.node() in error
    assert sorted(folder.iterdir()) == before
    assert not folder.with_name("run.1").exists()


def test_a_killed_owner_leaves_no_lock(owner, tmp_path):
    owner.kill()
    owner.wait()
    assert (tmp_path / "run" / LOCK).is_file()
    with RunFolder(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_trainer_of_a_notebook_is_refused_too(owner, model, tmp_path):
    from transformers import TrainingArguments

    from hf_segformer.training.trainer import SegFormerTrainer

    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = SegFormerTrainer(model, arguments, train_dataset=[{}])
    with pytest.raises(ValueError, match="is in use by a training"):
        trainer.train()


def test_an_unused_folder_is_not_left_behind(tmp_path):
    with RunFolder(tmp_path / "a"), RunFolder(tmp_path / "a") as inner:
        assert inner.folder.is_dir()
    assert not (tmp_path / "a").exists()


def test_all_checkpoints_have_the_identity_of_their_folder(two_runs):
    identities = set()
    for folder in (two_runs / "run1", two_runs / "run2"):
        own = json.loads((folder / ".run.json").read_text())["id"]
        identities.add(own)
        for checkpoint in folder.glob("checkpoint-*"):
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            assert state["stateful_callbacks"]["SegFormerTrainer"]["attributes"]["run_id"] == own
    assert len(identities) == 2


def test_resume_refuses_a_checkpoint_of_another_run(two_runs, tmp_path, capsys):
    folder = Path(shutil.copytree(two_runs / "run1", tmp_path / "run"))
    shutil.rmtree(folder / "checkpoint-2")
    shutil.copytree(two_runs / "run2" / "checkpoint-2", folder / "checkpoint-2")
    error = error_of(capsys, folder, "trainer.max_steps=3", "--resume")
    assert f"{folder}/checkpoint-2 is another run's" in error
    shutil.rmtree(folder / "checkpoint-2")
    assert train(folder, "trainer.max_steps=3", "--resume") == 0


def test_resume_refuses_a_mixture_of_runs(two_runs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(two_runs / "run1" / "checkpoint-1", folder / "checkpoint-1")
    shutil.copytree(two_runs / "run2" / "checkpoint-2", folder / "checkpoint-2")
    assert "is another run's" in error_of(capsys, folder, "trainer.max_steps=3", "--resume")


def test_a_copied_checkpoint_brings_its_identity(two_runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two_runs / "run1" / "checkpoint-1", folder / "checkpoint-1")
    assert train(folder, "trainer.max_steps=2", "--resume") == 0
    own = json.loads((two_runs / "run1" / ".run.json").read_text())
    assert json.loads((folder / ".run.json").read_text()) == own


def test_a_new_run_has_a_new_identity(two_runs, tmp_path):
    folder = Path(shutil.copytree(two_runs / "run1", tmp_path / "run"))
    assert train(folder, "trainer.max_steps=1", "--overwrite") == 0
    old, new = (json.loads((path / ".run.json").read_text()) for path in (tmp_path / "run.1", folder))
    assert old != new


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").touch()
    assert "holds files, but no earlier run" in error_of(capsys, tmp_path, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_may_have_the_working_folder_which_is_never_moved(tmp_path, monkeypatch):
    (tmp_path / "run" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "below")
    for place in (".", "..", tmp_path / "run"):
        with RunFolder(place) as run:
            if place == ".":
                run.check_free(overwrite=False)
                assert run.archive_previous_run() is None
                run.keep_identity()
            else:
                with pytest.raises(ValueError, match=r"holds an earlier run and is the working folder, or contains it"):
                    run.check_free(overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert with_suffix_added(Path(), ".toml") == tmp_path / "run" / "below.toml"
    assert with_suffix_added(Path(".."), ".1") == tmp_path / "run.1"
