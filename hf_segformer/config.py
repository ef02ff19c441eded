"""Options of training and inference as plain data classes.

Nothing here imports PyTorch, so that a recipe or a command line is checked before anything heavy is loaded.
"""

import math
from dataclasses import dataclass, field
from difflib import get_close_matches

LOSS_TERMS = ("cross_entropy", "ohem", "dice", "focal")
CLASS_WEIGHT_SCHEMES = ("median_frequency", "log", "inverse_sqrt")


@dataclass(frozen=True)
class AugmentationConfig:
    """How training pictures are varied; the defaults are the paper's for ADE20K.

    Args:
        crop_size: side S of the crop in pixels.
        base_size: shorter and longer side that a picture is fitted into before the ratio is applied; empty: its own.
        scale: lowest and highest ratio.
        max_class_share: share of the crop's counted pixels that one class may fill; up to ten draws try to keep to it.
        flip: probability of mirroring left and right.
        distortion: strength of the photometric distortion: 1 is the paper's, 0 is none. Above 0 it needs 8-bit images.

    Raises:
        ValueError: if a value is out of range; the message names it as `augmentation.name`.

    Example:
        >>> from hf_segformer.config import AugmentationConfig
        >>> AugmentationConfig(crop_size=1024).scale
        [0.5, 2.0]
    """

    crop_size: int = 512
    base_size: list[int] = field(default_factory=list)
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    max_class_share: float = 0.75
    flip: float = 0.5
    distortion: float = 1.0

    def __post_init__(self):
        if self.crop_size < 16:
            raise ValueError(f"augmentation.crop_size is {self.crop_size}, but it must be at least 16")
        if self.base_size and (len(self.base_size) != 2 or not 0 < self.base_size[0] <= self.base_size[1]):
            raise ValueError(
                f"augmentation.base_size is {self.base_size}, but it must be [shorter, longer] in pixels, or empty"
            )
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"augmentation.scale is {self.scale}, but it must be [low, high] with 0 < low <= high")
        if not 0 < self.max_class_share <= 1:
            raise ValueError(f"augmentation.max_class_share is {self.max_class_share}, but it must lie in (0, 1]")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"augmentation.flip is {self.flip}, but it is a probability: between 0 and 1")
        if not 0 <= self.distortion <= 1:
            raise ValueError(f"augmentation.distortion is {self.distortion}, but it must lie between 0 and 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """What the paper's recipe asks of the optimiser beside learning rate, weight decay and warm-up.

    Args:
        head_lr_multiplier: the head's learning rate as a multiple of the encoder's.
        layer_lr_decay: each block's learning rate as a share of the next one's; 1 is the paper's.
        freeze_encoder: train the head alone.
        power: of the polynomial decay.

    Raises:
        ValueError: if a value is out of range; the message names it as `optimizer.name`.
    """

    head_lr_multiplier: float = 10.0
    layer_lr_decay: float = 1.0
    freeze_encoder: bool = False
    power: float = 1.0

    def __post_init__(self):
        if self.head_lr_multiplier <= 0:
            raise ValueError(f"optimizer.head_lr_multiplier is {self.head_lr_multiplier}, but it must be positive")
        if not 0 < self.layer_lr_decay <= 1:
            raise ValueError(f"optimizer.layer_lr_decay is {self.layer_lr_decay}, but it must lie in (0, 1]")
        if self.power <= 0:
            raise ValueError(f"optimizer.power is {self.power}, but it must be positive")


@dataclass(frozen=True)
class LossConfig:
    """A weighted sum of losses of the logits, upsampled once to the label maps' size.

    Where no pixel counts, the loss is 0 with zero gradient. `LossConfig()` is the model's own cross entropy.

    Args:
        cross_entropy: weight of the cross entropy, the mean over the pixels that count.
        ohem: weight of the cross entropy of hard pixels only (Shrivastava et al. 2016): those whose right class has a
            probability below `ohem_threshold`, and in any case the B * `ohem_min_kept` least probable of the batch;
            the mean over these.
        dice: weight of the soft Dice loss (Milletari et al. 2016): 1 - 2 sum(p t) / (sum(p) + sum(t)) for each class,
            with probabilities p and targets t of all pixels of the batch that count, the mean over the classes that
            its label maps hold; with one logit of the foreground alone. Such a denominator is at least 1: nothing is
            added to it.
        focal: weight of the focal loss (Lin et al. 2017), -(1 - p)^gamma log(p), the mean over the pixels that count.
        class_weights: K weights (with one logit two) for the pixels of each class in all terms but Dice; means are
            divided by the sum of the pixels' weights, as PyTorch does. The name of a scheme of `class_weights` stands
            for numbers that are still to be computed.
        label_smoothing: share of the target that is spread evenly over the classes in `cross_entropy`.
        focal_gamma: exponent of the focal loss.
        ohem_threshold: probability from which on a pixel is easy.
        ohem_min_kept: pixels a picture.

    Raises:
        ValueError: if a value is out of range; the message names it as `loss.name`.
    """

    cross_entropy: float = 1.0
    ohem: float = 0.0
    dice: float = 0.0
    focal: float = 0.0
    class_weights: list[float] | str | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 2.0
    ohem_threshold: float = 0.7
    ohem_min_kept: int = 100_000

    def __post_init__(self):
        for name in (*LOSS_TERMS, "focal_gamma", "ohem_min_kept"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"loss.{name} is {getattr(self, name)}, but it must be at least 0 and finite")
        if not any(getattr(self, name) for name in LOSS_TERMS):
            raise ValueError(f"loss has no term: give one of {', '.join(LOSS_TERMS)} a positive weight")
        for name in ("label_smoothing", "ohem_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"loss.{name} is {getattr(self, name)}, but it must lie between 0 and 1")
        weights = self.class_weights
        if isinstance(weights, str):
            check_class_weight_scheme(weights)
        elif weights is not None and not (any(weights) and all(0 <= weight < math.inf for weight in weights)):
            raise ValueError(f"loss.class_weights is {weights}, but it must be finite numbers from 0 up, not all 0")


def check_class_weight_scheme(scheme: str) -> None:
    """Raise ValueError unless `scheme` is one of `CLASS_WEIGHT_SCHEMES`; the message gives the nearest one."""
    if scheme not in CLASS_WEIGHT_SCHEMES:
        near = get_close_matches(scheme, CLASS_WEIGHT_SCHEMES, n=1, cutoff=0)[0]
        raise ValueError(f"unknown loss.class_weights {scheme!r}, did you mean {near!r}?")


@dataclass(frozen=True)
class InferenceOptions:
    """How a prediction is made.

    Args:
        window: side in pixels of a window that slides over the resized picture; 0 sees pictures whole.
        stride: step of the window in pixels; 0 is three quarters of it in multiples of 32. Without a window it means
            nothing.
        flip: predict the mirrored picture too, and average the probabilities.
        scales: sizes to predict at, as multiples of the image processor's; the probabilities are averaged.

    Raises:
        ValueError: if a value is out of range; the message names it as `evaluation.name`.

    Example:
        The paper's evaluation on Cityscapes.

        >>> from hf_segformer.config import InferenceOptions
        >>> InferenceOptions(window=1024).step
        768
    """

    window: int = 0
    stride: int = 0
    flip: bool = False
    scales: list[float] = field(default_factory=lambda: [1.0])

    def __post_init__(self):
        if self.window and self.window < 32:
            raise ValueError(f"evaluation.window is {self.window}, but it must be at least 32, or 0 for whole pictures")
        if self.stride < 0:
            raise ValueError(
                f"evaluation.stride is {self.stride}, but it must be at least 1, or 0 to follow the window"
            )
        if 0 < self.window < self.stride:
            raise ValueError(
                f"evaluation.stride is {self.stride}, but a window of {self.window} would leave gaps: it must be at "
                f"most {self.window}"
            )
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"evaluation.scales is {self.scales}, but it must list numbers above 0")

    @property
    def step(self) -> int:
        """The window's step in pixels: `stride`, or what 0 stands for; 0 without a window."""
        if not self.window:
            return 0
        return self.stride or max(32, self.window * 3 // 4 // 32 * 32)


def parse_value_range(text: str, setting: str = "value_range") -> "list[float] | dict[str, list[float] | float] | None":
    """Parse a value range as recipes and command lines spell it, to the form that the image processor takes.

    Args:
        text: `"LOW,HIGH"`, `"percentiles:LOW,HIGH"` or `"window:CENTER,WIDTH"`; empty is None.
        setting: what the error message calls it.

    Raises:
        ValueError: if it is none of these, or the range is empty.

    Example:
        >>> from hf_segformer.config import parse_value_range
        >>> parse_value_range("0,4095"), parse_value_range("window:40,400")
        ([0.0, 4095.0], {'center': 40.0, 'width': 400.0})
    """
    if not text:
        return None
    kind, colon, rest = text.strip().rpartition(":")
    try:
        first, second = (float(number) for number in rest.replace(",", " ").split())
    except ValueError:
        first = second = math.nan
    low, high = (0, second) if kind == "window" else (first, second)
    in_range = low >= 0 and high <= 100 if kind == "percentiles" else math.isfinite(first) and math.isfinite(second)
    if kind not in ("", "percentiles", "window") or (colon and not kind) or not (low < high and in_range):
        raise ValueError(
            f"{setting} is {text!r}; expected LOW,HIGH or percentiles:LOW,HIGH with LOW below HIGH, or "
            "window:CENTER,WIDTH with a width above 0"
        )
    if kind == "window":
        return {"center": first, "width": second}
    return {"percentiles": [first, second]} if kind else [first, second]


__all__ = [
    "CLASS_WEIGHT_SCHEMES",
    "AugmentationConfig",
    "InferenceOptions",
    "LossConfig",
    "OptimizerConfig",
    "check_class_weight_scheme",
    "parse_value_range",
]
