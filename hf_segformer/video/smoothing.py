"""Temporal smoothing of class probabilities.

Axes: K classes, H W sides of a frame.
"""

from torch import Tensor


class Smoother:
    """Exponential moving average of the probabilities of successive frames.

    s(1) = p(1), and s(t) = alpha p(t) + (1 - alpha) s(t - 1), where p(t) are the probabilities of frame t, whatever the
    time between frames. A change reaches 1 - (1 - alpha)^n of its size after n frames.

    Args:
        alpha: weight of the newest frame, above 0 and below 1: lower is smoother, and later.

    Raises:
        ValueError: if it is out of range.

    Examples:
        >>> import torch
        >>> from hf_segformer.video.smoothing import Smoother
        >>> smoother = Smoother(0.25)
        >>> [smoother(torch.full((2, 1, 1), value))[0].item() for value in (0.0, 1.0, 1.0)]
        [0.0, 0.25, 0.4375]
    """

    def __init__(self, alpha: float):
        if not 0 < alpha < 1:
            raise ValueError(f"smoothing is {alpha}; expected a number above 0 and below 1")
        self.alpha = alpha
        self._state: Tensor | None = None

    def __call__(self, probabilities: Tensor) -> Tensor:
        """Return the average up to this frame, float32 (K, H, W), which the next call changes.

        Args:
            probabilities: of the frame, float32 (K, H, W).
        """
        if self._state is None:
            self._state = probabilities.clone()
        else:
            self._state.lerp_(probabilities, self.alpha)
        return self._state


__all__ = ["Smoother"]
