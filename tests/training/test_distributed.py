"""Two processes against one: the same weights, the same evaluation, and runs that go on after a signal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainingArguments

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.config import AugmentationConfig
from hf_segformer.data.torch_datasets import EvalDataset, TrainDataset, collate
from hf_segformer.evaluation.metrics import SegmentationMetrics, predict_labels
from hf_segformer.training.resume import newest_whole_checkpoint
from hf_segformer.training.trainer import SegFormerTrainer
from tests.support.tiny import TINY

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "PYTHONPATH": str(ROOT),
}
NAMES = ("road", "car", "boat")


def rows(number):
    """Pictures without a pixel that does not count, so that every batch has equally many that do."""
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "image": Image.fromarray(torch.randint(256, (40, 56, 3), generator=generator, dtype=torch.uint8).numpy()),
            "label": Image.fromarray(torch.randint(3, (40, 56), generator=generator, dtype=torch.uint8).numpy()),
        }
        for _ in range(number)
    ]


def tiny_trainer(folder, chance, **arguments):
    """A Trainer of 6 steps, 3 to the epoch with 4 pictures a step; without chance BatchNorm only scales."""
    torch.manual_seed(0)
    rates = dict.fromkeys(("drop_path_rate", "classifier_dropout_prob"), 0.3 if chance else 0.0)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=3, **rates))
    if not chance:
        norm = model.decode_head.batch_norm.eval()
        norm.train = lambda mode=True: norm
    processor = SegFormerImageProcessor(do_resize=False)
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "batch_eval_metrics": True,
    }
    augmentation = AugmentationConfig(crop_size=32, scale=[1.0, 1.2], max_class_share=1.0)
    return SegFormerTrainer(
        model,
        TrainingArguments(str(folder), **{**settings, **arguments}),
        data_collator=collate,
        train_dataset=TrainDataset(rows(12), augmentation, processor, seed=0),
        eval_dataset=EvalDataset(rows(5), processor),
        compute_metrics=SegmentationMetrics(NAMES),
        preprocess_logits_for_metrics=predict_labels,
    )


# Two processes train on equal samples, evaluate, train with chance to the end, and again until they are killed.
SHARED = """
import json, os, signal, sys
from pathlib import Path
from tests.training.test_distributed import tiny_trainer
from tests.training.test_resume import Sender

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
    command = [*LAUNCH, str(script), str(folder), *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def assert_same_weights(folder, expected, tolerance):
    found, expected = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(
            found[name], weights, rtol=0, atol=tolerance, msg=lambda text, name=name: name + text
        )


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two processes left, which were both killed at the end."""
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


def test_two_processes_equal_one(alone, shared):
    assert_same_weights(shared / "shared", alone, 1e-5)


def test_two_processes_evaluate_exactly_as_one(shared):
    """Five pictures in batches of 2: the last round is filled up, which must not count."""
    trainer = tiny_trainer(shared / "one", False)
    trainer.model = trainer.model_wrapped = SegFormerForSemanticSegmentation.from_pretrained(shared / "shared")
    expected = trainer.evaluate()
    found = json.loads((shared / "numbers.json").read_text())
    names = {name for name in expected if "iou" in name or "accuracy" in name}
    assert len(names) == 9
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}


@pytest.mark.skipif(
    transformers.__version__.startswith("5.17."),
    reason="Transformers 5.17 can not read an optimiser again in several CPU processes: it asks PyTorch for cpu:0",
)
def test_two_processes_that_were_killed_go_on_to_the_same_weights(shared):
    assert (shared / "killed" / "checkpoint-4" / "rng_state_1.pth").is_file()
    run = launched(shared, "resume")
    assert run.returncode == 0, run.stderr
    assert_same_weights(shared / "killed", shared / "whole", 1e-6)


def test_a_checkpoint_that_lacks_a_process_is_passed_over(shared, tmp_path, monkeypatch):
    for step in (4, 5):
        shutil.copytree(shared / "whole" / "checkpoint-4", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-5" / "rng_state_1.pth").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def program(folder, *arguments):
    from tests.training.test_resume import SETTINGS

    arguments = ["trainer.max_steps=400", "trainer.save_steps=1000", "trainer.eval_strategy=no", *arguments]
    return ["-m", "training.finetune", *SETTINGS, *arguments, f"trainer.output_dir={folder}"]


def test_ctrl_c_to_torchrun_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    folder, told = tmp_path / "run", tmp_path / "told.txt"
    with told.open("w") as file:
        run = subprocess.Popen([*LAUNCH, *program(folder)], cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)
        while " 10/400" not in told.read_text() and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        assert run.wait() != 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert newest_whole_checkpoint(folder).parent == folder, told.read_text()
    assert "Stopped. Go on from" in told.read_text()


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_reads_the_configuration(name):
    config = load_config_from_file(str(ROOT / "configuration" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == 2
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert "SegFormerLayer" in {type(module).__name__ for module in tiny_model().modules()}


def tiny_model():
    return SegFormerForSemanticSegmentation(SegFormerConfig(**TINY))


def test_accelerate_launch_runs_the_program_in_two_processes(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configuration/accelerate/ddp.yaml"]
    command = [*launch, *program(tmp_path / "run", "trainer.max_steps=2")]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "run" / "training.json").read_text())["processes"] == 2
