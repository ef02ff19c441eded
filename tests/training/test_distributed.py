"""Two processes against one: equal weights, equal metrics, and runs that resume after a signal."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation
from hf_segformer.training.evaluation import evaluate_recipe
from hf_segformer.training.recipe import read_recipe
from hf_segformer.training.resume import newest_whole_checkpoint
from tests.support.distributed import tiny_trainer, unequal_rows
from tests.support.tiny import TINY
from tests.support.training import (
    ENVIRONMENT,
    LAUNCH,
    LONG,
    ROOT,
    assert_same_weights,
    launch,
    paired_folders,
    train_command,
)

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")

# Two processes train on equal samples, evaluate, train with chance to the end, and again until they are killed.
SHARED = """
import json, os, signal, sys
from pathlib import Path
import torch
from hf_segformer.config import EmaConfig
from tests.support.distributed import tiny_trainer
from tests.support.training import Sender

folder = Path(sys.argv[1])
half = {"per_device_train_batch_size": 2}
if sys.argv[2:] == ["resume"]:
    trainer = tiny_trainer(folder / "killed", True, **half)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
else:
    trainer = tiny_trainer(folder / "shared", False, **half, save_strategy="no")
    trainer.train()
    trainer.save_model()
    numbers = trainer.evaluate()
    if trainer.is_world_process_zero():
        (folder / "numbers.json").write_text(json.dumps(numbers))
    averaged = {"ema": EmaConfig(decay=0.5)}  # BatchNorm of each process sees images of its own
    trainer = tiny_trainer(folder / "averaged", True, options=averaged, **half, save_steps=6)
    trainer.train()
    trainer.save_model()
    torch.save(trainer.model.state_dict(), folder / f"averaged{trainer.args.process_index}.pt")
    trainer = tiny_trainer(folder / "whole", True, **half)
    trainer.train()
    trainer.save_model()
    trainer = tiny_trainer(folder / "killed", True, **half)
    trainer.add_callback(Sender(lambda: os.kill(os.getpid(), signal.SIGKILL), 5))
    trainer.train()
"""


def launched(folder, *arguments):
    script = folder / "shared.py"
    script.write_text(SHARED)
    return launch(str(script), str(folder), *arguments)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder of two processes that were both killed at the end."""
    folder = tmp_path_factory.mktemp("shared")
    run = launched(folder)
    assert run.returncode == 1, run.stderr
    assert "Signal 9 (SIGKILL)" in run.stderr, run.stderr
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with batches of 4."""
    folder = tmp_path_factory.mktemp("alone")
    trainer = tiny_trainer(folder, False, save_strategy="no")
    before = {name: weights.clone() for name, weights in trainer.model.state_dict().items()}
    trainer.train()
    trainer.save_model()
    after = trainer.model.state_dict()
    assert sum(bool((before[name] - after[name]).abs().max() > 1e-3) for name in before) > len(before) / 2
    return folder


def test_accumulation_equals_one_large_batch(alone, tmp_path):
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    trainer = tiny_trainer(tmp_path, False, **arguments)
    trainer.train()
    trainer.save_model()
    assert_same_weights(tmp_path, alone, 1e-5)


@pytest.mark.slow
def test_two_processes_equal_one(alone, shared):
    assert_same_weights(shared / "shared", alone, 1e-5)


@pytest.mark.slow
def test_two_processes_end_with_one_average(shared):
    """BatchNorm's statistics, which are no gradient's, included."""
    first, second = (torch.load(shared / f"averaged{rank}.pt", weights_only=True) for rank in range(2))
    saved = load_file(shared / "averaged" / "model.safetensors")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.equal(tensor, saved[name]), name
    live = torch.load(shared / "averaged" / "checkpoint-6" / "training_weights.pt", weights_only=True)["weights"]
    assert not torch.equal(first["decode_head.batch_norm.running_mean"], live["decode_head.batch_norm.running_mean"])


@pytest.mark.slow
def test_two_processes_evaluate_exactly_as_one(shared):
    """Five images in batches of 2: the last round is filled up, which must not count."""
    trainer = tiny_trainer(shared / "one", False)
    trainer.model = trainer.model_wrapped = SegFormerForSemanticSegmentation.from_pretrained(shared / "shared")
    expected = trainer.evaluate()
    found = json.loads((shared / "numbers.json").read_text())
    names = {name for name in expected if "iou" in name or "accuracy" in name}
    assert len(names) == 10
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}


# Two processes evaluate and predict images of unequal size, then run a recipe on such images.
UNEQUAL = """
import json, sys
from pathlib import Path
import torch
from hf_segformer.training.evaluation import evaluate_recipe
from hf_segformer.training.recipe import read_recipe
from tests.support.distributed import tiny_trainer, unequal_rows
from tests.support.training import train

folder = Path(sys.argv[1])
trainer = tiny_trainer(folder / "unequal", False, unequal_rows(), per_device_eval_batch_size=1, eval_strategy="epoch")
trainer.train()
trainer.save_model()
numbers = trainer.evaluate()
output = trainer.predict(trainer.eval_dataset)
if trainer.is_world_process_zero():
    (folder / "numbers.json").write_text(json.dumps(numbers))
    torch.save([torch.from_numpy(each) for each in output.predictions], folder / "predictions.pt")
if code := train(folder / "recipe", *sys.argv[2:]):
    sys.exit(code)
data = [each for each in sys.argv[2:] if not each.startswith("trainer.")]
evaluate_recipe(str(folder / "recipe"), read_recipe("shapes_b0", data), folder / "again")
"""


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """The folder of a run of two processes on images of unequal size, and the overrides of its recipe's data."""
    folder = tmp_path_factory.mktemp("unequal")
    sizes = ((60, 44), (44, 60), (80, 33), (52, 52), (39, 71))
    data = [*paired_folders(folder / "data", sizes), 'data.names=["a", "b", "c"]', "evaluation.flip=true"]
    (folder / "unequal.py").write_text(UNEQUAL)
    settings = ("trainer.max_steps=2", "trainer.eval_strategy=steps", "trainer.eval_steps=1")
    run = launch(str(folder / "unequal.py"), str(folder), *data, *settings)
    assert run.returncode == 0, run.stderr
    return folder, data


@pytest.mark.slow
def test_two_processes_evaluate_images_of_unequal_size_exactly_as_one(unequal):
    folder, _ = unequal
    trainer = tiny_trainer(folder / "one", False, unequal_rows(), per_device_eval_batch_size=1)
    trainer.model = trainer.model_wrapped = SegFormerForSemanticSegmentation.from_pretrained(folder / "unequal")
    expected = trainer.evaluate()
    found = json.loads((folder / "numbers.json").read_text())
    names = {name for name in expected if "iou" in name or "accuracy" in name}
    assert len(names) == 10
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
    predictions = torch.load(folder / "predictions.pt", weights_only=True)
    assert [tuple(each.shape) for each in predictions] == [row["label"].size[::-1] for row in unequal_rows()]
    for first, second in zip(predictions, trainer.predict(trainer.eval_dataset).predictions, strict=True):
        assert torch.equal(first, torch.from_numpy(second))


def test_two_processes_run_a_recipe_on_images_of_unequal_size(unequal, tmp_path):
    """Metrics during the training are those of the card, and those of one process, to the digit."""
    folder, data = unequal
    metrics = json.loads((folder / "recipe" / "metrics.json").read_text())
    curve = json.loads((folder / "recipe" / "training.json").read_text())["curve"]
    assert [row["eval_mean_iou"] for row in curve if "eval_mean_iou" in row][-1] == metrics["mean_iou"]
    alone = evaluate_recipe(str(folder / "recipe"), read_recipe("shapes_b0", data), tmp_path)
    assert alone.num_images == 5
    again = json.loads((folder / "again" / "metrics.json").read_text())
    assert json.loads((tmp_path / "metrics.json").read_text())["classes"] == again["classes"]


@pytest.mark.skipif(
    transformers.__version__.startswith("5.17."),
    reason="Transformers 5.17 cannot read an optimizer again in several CPU processes: it asks PyTorch for cpu:0",
)
@pytest.mark.slow
def test_two_killed_processes_resume_to_the_same_weights(shared):
    assert (shared / "killed" / "checkpoint-4" / "rng_state_1.pth").is_file()
    run = launched(shared, "resume")
    assert run.returncode == 0, run.stderr
    assert_same_weights(shared / "killed", shared / "whole", 1e-6)


@pytest.mark.slow
def test_a_checkpoint_that_lacks_a_process_is_skipped(shared, tmp_path, monkeypatch):
    for step in (4, 5):
        shutil.copytree(shared / "whole" / "checkpoint-4", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-5" / "rng_state_1.pth").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def program(folder, *arguments):
    arguments = ["trainer.max_steps=400", "trainer.save_steps=1000", "trainer.eval_strategy=no", *arguments]
    return ["-m", "hf_segformer", *train_command(folder, *arguments, settings=LONG)]


@pytest.mark.slow
def test_ctrl_c_to_torchrun_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    folder, output = tmp_path / "run", tmp_path / "output.txt"
    with output.open("w") as file:
        run = subprocess.Popen(
            [*LAUNCH, *program(folder, "trainer.save_steps=10")], cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file
        )
        while not (folder / "checkpoint-10" / "trainer_state.json").is_file() and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        assert run.wait() != 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    newest = newest_whole_checkpoint(folder)
    assert int(newest.name.partition("-")[2]) > 10, output.read_text()
    assert f"Stopped. Resume from {newest}" in output.read_text()


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_reads_the_configuration(name):
    config = load_config_from_file(str(ROOT / "configuration" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == 2
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert "SegFormerLayer" in {type(module).__name__ for module in tiny_model().modules()}


def tiny_model():
    return SegFormerForSemanticSegmentation(SegFormerConfig(**TINY))


@pytest.mark.slow
def test_accelerate_launch_runs_the_program_in_two_processes(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configuration/accelerate/ddp.yaml"]
    command = [*launch, *program(tmp_path / "run", "trainer.max_steps=2")]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "run" / "training.json").read_text())["processes"] == 2
