"""Class-balanced sampling: images and crops that hold a class drawn by the inverse square root of its frequency.

N images, K classes.
"""

from typing import Any, NamedTuple

import numpy as np


class SampleKey(NamedTuple):
    """Key of a sample that is drawn for one of its classes.

    Attributes:
        epoch: number of the pass over the data.
        image: its number.
        position: place of the sample within the epoch. The same image at two places is augmented in two ways.
        focus: class that the crop holds.
    """

    epoch: int
    image: int
    position: int
    focus: int


class ClassBalance:
    """Rare Class Sampling (Hoyer et al. 2022, DAFormer, section 3.2), for a share of the samples of an epoch.

    Such a sample is of a class c, drawn with probability P(c) proportional to 1 / sqrt(f_c), where f_c is the class's
    share of all valid pixels; of an image that holds c, each as likely; and its crop holds a pixel of c, each as
    likely, at a random place of the crop. Classes without a pixel are not drawn. The paper's P(c) is a softmax of
    (1 - f_c) / T; the square root, as in the repeat factors of Gupta et al. 2019 (LVIS), has no temperature to set.

    Args:
        counts: (N, K) pixels of each class in each training image; ignored pixels are left out.
        share: of the samples, from 0 to 1.

    Raises:
        ValueError: if no pixel is valid.

    Examples:
        >>> import numpy as np
        >>> from hf_segformer.data.sampling import ClassBalance
        >>> balance = ClassBalance(np.array([[75, 0], [15, 10]]), share=1.0)
        >>> [round(float(probability), 3) for probability in balance.probabilities]  # of 90 % and 10 % of the pixels
        [0.25, 0.75]
        >>> {key.image for key in balance.draw(0, [0, 1] * 9, np.random.default_rng(0)) if key.focus == 1}
        {1}
    """

    def __init__(self, counts: np.ndarray, share: float):
        pixels = np.asarray(counts, dtype=np.float64).sum(axis=0)
        if not pixels.any():
            raise ValueError("no pixel of the training images is valid; expected one to balance classes by")
        self.share = share
        weights = np.where(pixels > 0, 1 / np.sqrt(np.maximum(pixels, 1)), 0.0)
        self.probabilities = weights / weights.sum()
        self._images = [np.flatnonzero(column) for column in np.asarray(counts).T]

    def draw(self, epoch: int, order: Any, rng: np.random.Generator) -> list[tuple[int, int] | SampleKey]:
        """Replace about `share` of the samples of an epoch by ones that are drawn for a class.

        Args:
            epoch: number of the pass over the data.
            order: indices of the images.
            rng: the only source of randomness.

        Returns:
            keys of the samples: (epoch, index), or `SampleKey`.
        """
        is_drawn = rng.random(len(order)) < self.share
        classes = rng.choice(len(self.probabilities), len(order), p=self.probabilities)
        places = rng.random(len(order))
        keys: list[tuple[int, int] | SampleKey] = []
        for position, (index, focus, place) in enumerate(zip(order, classes, places, strict=True)):
            if is_drawn[position]:
                images = self._images[focus]
                keys.append(SampleKey(epoch, int(images[int(place * len(images))]), position, int(focus)))
            else:
                keys.append((epoch, int(index)))
        return keys


__all__ = ["ClassBalance", "SampleKey"]
