"""The loss of twenty steps, as recorded: a change that moves it changes training.

`python tests/training/test_golden.py` records the file again.
"""

import json
from pathlib import Path

import pytest

from hf_segformer.training.recipe import read_recipe
from hf_segformer.training.run import fine_tune

GOLDEN = Path(__file__).with_name("golden_losses.json")


def losses(folder):
    settings = {
        "model.hidden_sizes": [8, 16, 24, 32],
        "model.num_attention_heads": [1, 2, 3, 4],
        "model.depths": [1, 1, 1, 1],
        "model.decoder_hidden_size": 32,
        "model.drop_path_rate": 0.1,
        "model.classifier_dropout_prob": 0.1,
        "data.image_size": 48,
        "data.num_train": 40,
        "data.num_eval": 2,
        "augmentation.crop_size": 40,
        "augmentation.scale": [0.5, 2.0],
        "augmentation.max_class_share": 0.75,
        "augmentation.distortion": 1.0,
        "augmentation.class_balance": 0.0,
        "loss.dice": 0.5,
        "optimizer.head_lr_multiplier": 10.0,
        "trainer.max_steps": 20,
        "trainer.per_device_train_batch_size": 4,
        "trainer.learning_rate": 3e-4,
        "trainer.warmup_steps": 5,
        "trainer.logging_steps": 1,
        "trainer.eval_strategy": "no",
        "trainer.use_cpu": "true",
        "trainer.output_dir": folder / "run",
    }
    fine_tune(read_recipe("shapes_b0", [f"{name}={value}" for name, value in settings.items()]))
    curve = json.loads((folder / "run" / "training.json").read_text())["curve"]
    return [row["loss"] for row in curve if "loss" in row]


def test_twenty_steps_have_the_recorded_losses(tmp_path):
    expected = json.loads(GOLDEN.read_text())
    assert len(expected) == 20
    # Processors round differently, and Adam amplifies that: 1e-3 is far below the effect of any change of the recipe.
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-3)


if __name__ == "__main__":
    import tempfile

    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        GOLDEN.write_text(json.dumps(losses(Path(name)), indent=1) + "\n")
