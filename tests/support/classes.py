"""Folders of small images in classes, and tiny runs of `segformer pretrain` on them."""

import numpy as np
from PIL import Image

from hf_segformer.cli.main import main

CLASSES = ("blue", "green", "red")
NETWORK = [
    "model.hidden_sizes=[8, 8, 16, 16]",
    "model.depths=[1, 1, 1, 1]",
    "model.num_attention_heads=[1, 1, 2, 2]",
    "model.decoder_hidden_size=16",
    "model.drop_path_rate=0.2",
    "data.image_size=32",
    "data.num_train=24",
    "data.num_eval=6",
    "augmentation.crop_size=32",
    "trainer.per_device_train_batch_size=4",
    "trainer.warmup_steps=1",
    "trainer.logging_steps=1",
    "trainer.eval_strategy=no",
    "trainer.use_cpu=true",
]
# All random parts of a classification at once.
NOISY = [
    "augmentation.randaugment=9",
    "augmentation.erasing=0.5",
    "augmentation.mixup=0.8",
    "augmentation.cutmix=1.0",
    "ema.decay=0.9",
]
# Masked images, 4 x 4 patches.
MASKED = ["pretraining.method=masked_images", "pretraining.label_smoothing=0", "pretraining.mask_size=8"]


def image_classes(root, number=4, splits=("train", "val"), size=(40, 36)):
    """Write noisy images of one colour into a folder for each split and class."""
    rng = np.random.default_rng(0)
    for split in splits:
        for channel, name in enumerate(reversed(CLASSES)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / f"{name}{index}.png")
    return root


def pretrain(folder, *arguments, recipe="single_shapes_b0", settings=NETWORK):
    """Run `segformer pretrain` in this process; returns its exit status."""
    overrides = [each for each in arguments if "=" in each and not each.startswith("-")]
    options = [each for each in arguments if each not in overrides]
    try:
        return main(["pretrain", recipe, *settings, f"trainer.output_dir={folder}", *overrides, *options])
    except SystemExit as exit:
        return exit.code
