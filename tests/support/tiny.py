"""Tiny networks, a tiny training run, and comparisons that many tests share."""

from pathlib import Path

import torch

TINY = {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}

# Encoder, with a head of 150 classes, of 19 classes, and the ImageNet classifier (facts of the original code).
PARAMETERS = {
    "b0": (3_319_392, 3_752_694, 3_719_027, 3_576_392),
    "b1": (13_151_424, 13_715_798, 13_682_131, 13_664_424),
    "b2": (24_196_288, 27_461_974, 27_361_235, 24_709_288),
    "b3": (44_072_128, 47_337_814, 47_237_075, 44_585_128),
    "b4": (60_842_688, 64_108_374, 64_007_635, 61_355_688),
    "b5": (81_443_008, 84_708_694, 84_607_955, 81_956_008),
}


def logits_of(model, images):
    with torch.no_grad():
        return model(images).logits


def assert_same(first, second):
    """Assert float32 equality up to the order of sums: two forms of the head round differently."""
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


# A training run that takes about a second: 24 images of 32x32, 6 steps of 4 to the epoch.
TINY_RUN = [
    *(f"model.{key}={value}" for key, value in TINY.items()),
    "model.drop_path_rate=0.2",
    "data.image_size=32",
    "augmentation.crop_size=32",
    "data.num_train=24",
    "data.num_eval=6",
    "trainer.max_steps=8",
    "trainer.save_steps=4",
    "trainer.per_device_train_batch_size=4",
    "trainer.per_device_eval_batch_size=4",
    "trainer.warmup_steps=1",
    "trainer.logging_steps=1",
    "trainer.dataloader_num_workers=0",
    "trainer.dataloader_persistent_workers=false",
    "trainer.eval_strategy=no",
    "trainer.use_cpu=true",
]


def train_tiny_run(folder, *overrides):
    """Train on generated shapes as `TINY_RUN` and the overrides say; returns the folder."""
    from training.finetune import main

    recipe = Path(__file__).parents[2] / "configuration" / "shapes_b0.toml"
    assert not main([str(recipe), *TINY_RUN, f"trainer.output_dir={folder}", *overrides])
    return folder
