"""A user's own augmentation by its dotted path: a function, or an albumentations pipeline as it is.

Axes: C bands, H W pixels of the crop.
"""

import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor


class CustomAugmentation:
    """A callable of the user's, called as `function(image=..., mask=...)` on every crop.

    It gets arrays: the image (H, W, C), uint8 or float32, on the scale of 0 to 255 or in units of its own, and the mask
    (H, W) of the narrowest type of uint8, int16 and int32, with the ignored label. It returns both, as a tuple or in a
    dictionary, as albumentations does; their size may change.

    For the time of a call the global generators of `random`, NumPy and PyTorch are seeded from the sample's own, and a
    callable with `set_random_seed`, as an albumentations pipeline, is seeded by it: what it draws from any of these
    depends on the sample alone.

    Importing the module runs its code. Construct this from a path that the user gave, never from one in a file.

    Args:
        path: `module:function`; the module is installed, or in the current folder.

    Raises:
        ValueError: if there is no such module or function.
    """

    def __init__(self, path: str):
        self.path = path
        self.function = _load(path)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        """Pickle as the path, for workers that are spawned."""
        return type(self), (self.path,)

    def __call__(self, image: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Augment an image (C, H, W) and labels (H, W).

        Returns:
            both, in the types they had.

        Raises:
            ValueError: if the result has the wrong form; the message says which.
        """
        seed = int(torch.randint(2**31, (), generator=generator))
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        mask = _narrow(labels.numpy())
        with _seeded(seed):
            if hasattr(self.function, "set_random_seed"):
                self.function.set_random_seed(seed)
            result = self.function(image=pixels.copy(), mask=mask.copy())
        found_image, found_mask = self._unpack(result)
        self._check(found_image, found_mask, pixels)
        turned = np.ascontiguousarray(found_image.reshape(*found_mask.shape, -1).transpose(2, 0, 1))
        return torch.from_numpy(turned), torch.from_numpy(found_mask.astype(np.int64)).to(labels.dtype)

    def _unpack(self, result: Any) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(result, dict) and {"image", "mask"} <= result.keys():
            return result["image"], result["mask"]
        if isinstance(result, tuple) and len(result) == 2:
            return result
        raise ValueError(
            f"augmentation.custom {self.path} returned {type(result).__name__}; expected the pair (image, mask), or a "
            'dictionary with "image" and "mask"'
        )

    def _check(self, image: Any, mask: Any, given: np.ndarray) -> None:
        for name, value in (("image", image), ("mask", mask)):
            if not isinstance(value, np.ndarray):
                raise ValueError(
                    f"augmentation.custom {self.path} returned a {type(value).__name__} as {name}; expected an array: "
                    "tensors and normalised values are made later"
                )
        if image.dtype != given.dtype:
            raise ValueError(
                f"augmentation.custom {self.path} returned an image of {image.dtype}; expected {given.dtype}, as it "
                "was given: normalising is left to the processor"
            )
        if mask.ndim != 2 or not np.issubdtype(mask.dtype, np.integer) or not mask.size:
            raise ValueError(
                f"augmentation.custom {self.path} returned a mask of {mask.dtype} {mask.shape}; expected integers "
                "(H, W)"
            )
        channels = given.shape[2]
        if image.shape != (*mask.shape, channels) and not (channels == 1 and image.shape == mask.shape):
            raise ValueError(
                f"augmentation.custom {self.path} returned an image {image.shape} for a mask {mask.shape}; expected "
                f"(H, W, {channels}) and (H, W)"
            )


def _load(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a file there hides no installed module
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"augmentation.custom is {path!r}, but there is no module {error.name}; expected one that is installed or "
            f"is in {os.getcwd()}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"augmentation.custom is {path!r}, but {module} has no {name}; expected a callable in it")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"augmentation.custom is {path!r}, a {type(found).__name__}; expected a callable")
    return found


def _narrow(labels: np.ndarray) -> np.ndarray:
    """The labels in the narrowest of the types that OpenCV can resample, where they fit."""
    low, high = labels.min(), labels.max()
    for kind in (np.uint8, np.int16):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return labels.astype(kind)
    return labels.astype(np.int32)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators for the block, and restore them after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # on the CPU alone: torch.manual_seed would seed every device
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


__all__ = ["CustomAugmentation"]
