"""Tiny training runs that several test files share."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

import hf_segformer.training.run
from hf_segformer.cli.main import main

ROOT = Path(__file__).parents[2]
NETWORK = [
    "model.hidden_sizes=[8, 8, 16, 16]",
    "model.depths=[1, 1, 1, 1]",
    "model.num_attention_heads=[1, 1, 2, 2]",
    "model.decoder_hidden_size=16",
    "data.image_size=32",
    "data.num_train=24",
    "augmentation.crop_size=32",
    "augmentation.class_balance=0",
    "trainer.per_device_train_batch_size=4",
    "trainer.warmup_steps=1",
    "trainer.logging_steps=1",
    "trainer.use_cpu=true",
]
# 6 steps an epoch, evaluated at the end only.
SMALL = [
    *NETWORK,
    "model.drop_path_rate=0.2",
    "data.num_eval=6",
    "trainer.dataloader_num_workers=0",
    "trainer.dataloader_persistent_workers=false",
    "trainer.eval_strategy=no",
]
# Three epochs of 6 steps, the last one short; checkpoints within the first two and after the second.
LONG = [
    *NETWORK,
    "model.drop_path_rate=0.3",
    "model.classifier_dropout_prob=0.3",
    "data.num_eval=3",
    "trainer.max_steps=14",
    "trainer.save_steps=4",
    "trainer.save_total_limit=9",
    "trainer.eval_steps=3",
]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}


def train_command(folder, *arguments, recipe="shapes_b0", settings=SMALL):
    """Arguments of the command `segformer`, overrides before options."""
    overrides = [each for each in arguments if "=" in each and not each.startswith("-")]
    options = [each for each in arguments if each not in overrides]
    return ["train", recipe, *settings, f"trainer.output_dir={folder}", *overrides, *options]


def train(folder, *arguments, **options):
    """Run `segformer train` in this process; returns its exit status."""
    try:
        return main(train_command(folder, *arguments, **options))
    except SystemExit as exit:
        return exit.code


def error_of(capsys, folder, *arguments, **options):
    """The line on stderr that a run fails with."""
    assert train(folder, *arguments, **options) in (1, 2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("segformer: ")
    return error


def launch(*arguments):
    """Run a program in two processes of torchrun."""
    return subprocess.run([*LAUNCH, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


class Sender(TrainerCallback):
    """Calls a function within a step, before the weights change."""

    def __init__(self, send, step):
        self.send, self.step = send, step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.send()


@contextmanager
def with_sender(send, step):
    """Give the Trainer of recipes a `Sender`."""

    def build_trainer(*values):
        trainer = original(*values)
        trainer.add_callback(Sender(send, step))
        return trainer

    original = hf_segformer.training.run.build_trainer
    with mock.patch.object(hf_segformer.training.run, "build_trainer", build_trainer):
        yield


def assert_same_weights(folder, expected, tolerance=1e-6):
    found, expected = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(
            found[name], weights, rtol=0, atol=tolerance, msg=lambda text, name=name: name + text
        )


def paired_folders(root, sizes, num_values=3):
    """Images and masks of the given (width, height) in folders of their own, for training and evaluation alike."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for index, (width, height) in enumerate(sizes):
            for kind in ("images", "masks"):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
            mask = rng.integers(0, num_values, (height, width), dtype=np.uint8)
            noise = rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
            image = Image.fromarray(mask[..., None] * 60 + noise)
            image.save(root / "images" / split / f"{split}{index}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{split}{index}.png")
    return ("data.source=folders", f"data.root={root}", "data.num_train=0", "data.num_eval=0", "data.eval_size=32")
