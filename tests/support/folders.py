"""Folders of images and masks in any layout, a few pixels each."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (12, 20)  # height and width


def image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


def mask(path: Path, values=(0, 1, 2), mode: str = "L") -> Path:
    """A mask that holds each value in stripes of equal width; colours are triples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.array(values, np.uint8)[np.arange(SIZE[1]) * len(values) // SIZE[1]]
    stored = Image.fromarray(np.broadcast_to(stripes, (SIZE[0], *stripes.shape)).copy())
    if mode == "P":
        stored.putpalette([17 * number % 256 for number in range(768)])
    stored.save(path)
    return path


def pairs(root: Path, images: str, masks: str, names="ab", values=(0, 1, 2), mode: str = "L") -> Path:
    """Images and masks by patterns with `{}` for the name, such as `train/images/{}.jpg`."""
    for number, name in enumerate(names):
        image(root / images.format(name), number)
        mask(root / masks.format(name), values, mode)
    return root


__all__ = ["SIZE", "image", "mask", "pairs"]
