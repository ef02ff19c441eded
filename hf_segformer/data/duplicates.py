"""Search for images that are nearly the same on both sides of a split, such as neighbouring frames of one film.

The difference hash of an image has a bit for each of 8 x 8 places of its grey thumbnail (9 columns), set where it is
brighter than its left neighbour: shifts of exposure, compression and scaling leave nearly all bits. Two images whose
hashes differ in at most 4 of the 64 bits count as nearly the same. Axes: C bands, H W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

_ROWS, _COLUMNS = 8, 9
_MOST_BITS = 4  # that differ
_LEAST_SET = 4  # bits that are set, and that are not: gradients and empty images are all alike
_BLOCK = 2**22  # pairs at once
_MOST_PAIRS = 2 * 10**9


class NearDuplicates(NamedTuple):
    """Pairs of nearly equal images.

    Attributes:
        num_evaluation: evaluation images that are nearly the same as a training image.
        num_pairs: pairs of an evaluation and a training image.
        pairs: indices of the first ones, (evaluation, training), the nearest training image of each.
        num_compared: evaluation images that were compared; those without structure and those beyond a bound are not.
    """

    num_evaluation: int
    num_pairs: int
    pairs: tuple[tuple[int, int], ...]
    num_compared: int


def difference_hash(image: Image.Image | np.ndarray) -> int | None:
    """Return the 64 bits of an image's difference hash; None for one without structure.

    Args:
        image: a PIL image, or bands (C, H, W), masked or not.

    Examples:
        >>> import numpy as np
        >>> from hf_segformer.data.duplicates import difference_hash
        >>> image = np.random.default_rng(0).uniform(0, 100, (3, 40, 60))
        >>> difference_hash(image) == difference_hash(2 * image + 5)
        True
    """
    if isinstance(image, Image.Image):
        grey = image.convert("L") if image.mode not in ("L", "I", "F", "I;16") else image
        pixels = np.asarray(grey, np.float32)
    else:
        pixels = np.asarray(np.ma.filled(np.ma.asarray(image, np.float32), 0).mean(axis=0), np.float32)
    if not np.isfinite(pixels).all():
        return None
    thumbnail = np.asarray(Image.fromarray(pixels).resize((_COLUMNS, _ROWS), Image.Resampling.BOX))
    bits = (thumbnail[:, 1:] > thumbnail[:, :-1]).ravel()
    if not _LEAST_SET <= bits.sum() <= bits.size - _LEAST_SET:
        return None
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def find_near_duplicates(
    train: Sequence[int | None], evaluation: Sequence[int | None], num_shown: int = 5
) -> NearDuplicates:
    """Find the evaluation images that are nearly the same as a training image.

    Args:
        train: hash of each training image.
        evaluation: hash of each evaluation image.
        num_shown: number of pairs to return.

    Examples:
        >>> from hf_segformer.data.duplicates import find_near_duplicates
        >>> find_near_duplicates([0b1111_0000, 2**60 - 1], [0b1111_0001, None]).pairs
        ((0, 0),)
    """
    known = [index for index, each in enumerate(train) if each is not None]
    asked = [index for index, each in enumerate(evaluation) if each is not None]
    asked = asked[: max(1, _MOST_PAIRS // max(1, len(known)))]
    hashes = np.array([train[index] for index in known], np.uint64)
    wanted = np.array([evaluation[index] for index in asked], np.uint64)
    num_evaluation = num_pairs = 0
    pairs: list[tuple[int, int]] = []
    step = max(1, _BLOCK // max(1, len(known)))
    for start in range(0, len(asked) if known else 0, step):
        distances = np.bitwise_count(wanted[start : start + step, None] ^ hashes[None])
        near = distances <= _MOST_BITS
        found = near.any(axis=1)
        num_evaluation, num_pairs = num_evaluation + int(found.sum()), num_pairs + int(near.sum())
        for row in np.flatnonzero(found)[: num_shown - len(pairs)]:
            pairs.append((asked[start + row], known[int(distances[row].argmin())]))
    return NearDuplicates(num_evaluation, num_pairs, tuple(pairs), len(asked))


__all__ = ["NearDuplicates", "difference_hash", "find_near_duplicates"]
