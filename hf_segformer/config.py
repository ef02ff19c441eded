"""Options of training and inference as plain data classes.

Nothing here imports PyTorch, so that a recipe or a command line is checked before anything heavy is loaded.
"""

import math
from dataclasses import dataclass, field
from difflib import get_close_matches

LOSS_TERMS = ("cross_entropy", "ohem", "dice", "focal")
CLASS_WEIGHT_SCHEMES = ("median_frequency", "log", "inverse_sqrt")
DTYPES = ("float32", "float16", "bfloat16")
TILE_STEP = 32  # pixels of the input for each cell of the last stage's grid


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
    """Options of inference: the same for the predictor, evaluation, batch inference and large images.

    Args:
        tile_size: side in pixels of the tiles into which a raster is cut, best the size of the training crops or more.
            A raster that is smaller is one tile.
        tile_overlap: least overlap of neighbouring tiles in pixels. Tiles are spread evenly, so they may share more.
        sliding_window: side in pixels of the paper's sliding window over the resized image; 0 sees images whole.
        stride: step of the sliding window in pixels; 0 is three quarters of the window in multiples of 32.
        flip: average the probabilities with those of the mirrored image.
        scales: sizes to predict at, as multiples of the image processor's; the probabilities are averaged.
        dtype: number type of the network, one of `DTYPES`. None is the weights' own, but float32 on a CPU, where
            half precision is slow.
        batch_size: most images, or tiles, that the network sees at once.

    Raises:
        ValueError: if a value is out of range; the message names it as `evaluation.name`.

    Example:
        The paper's evaluation on Cityscapes.

        >>> from hf_segformer.config import InferenceOptions
        >>> InferenceOptions(sliding_window=1024).effective_stride
        768
    """

    tile_size: int = 1024
    tile_overlap: int = 128
    sliding_window: int = 0
    stride: int = 0
    flip: bool = False
    scales: list[float] = field(default_factory=lambda: [1.0])
    dtype: str | None = None
    batch_size: int = 8

    def __post_init__(self):
        self._check_tiles()
        if self.sliding_window and self.sliding_window < TILE_STEP:
            raise ValueError(
                f"evaluation.sliding_window is {self.sliding_window}; expected at least {TILE_STEP}, or 0 for whole "
                "images"
            )
        if self.stride < 0:
            raise ValueError(f"evaluation.stride is {self.stride}; expected at least 1, or 0 to follow the window")
        if self.stride and not self.sliding_window:
            raise ValueError(
                f"evaluation.stride is {self.stride}; expected 0 without a sliding window: set "
                "evaluation.sliding_window, too"
            )
        if self.stride > self.sliding_window:
            raise ValueError(f"evaluation.stride is {self.stride}; expected at most the window, {self.sliding_window}")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"evaluation.scales is {self.scales}; expected a list of numbers above 0")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"evaluation.dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.batch_size < 1:
            raise ValueError(f"evaluation.batch_size is {self.batch_size}; expected at least 1")

    def _check_tiles(self) -> None:
        """Check that all tiles begin on one grid of `TILE_STEP` pixels."""
        size, overlap = self.tile_size, self.tile_overlap
        if not isinstance(size, int) or size < 2 * TILE_STEP or size % TILE_STEP:
            raise ValueError(
                f"evaluation.tile_size is {size}; expected a multiple of {TILE_STEP} pixels, {2 * TILE_STEP} or more"
            )
        if not isinstance(overlap, int) or overlap % TILE_STEP or not 0 <= overlap <= size - TILE_STEP:
            raise ValueError(
                f"evaluation.tile_overlap is {overlap}; expected a multiple of {TILE_STEP} pixels from 0 to "
                f"{size - TILE_STEP}, for tiles of {size}"
            )

    @property
    def effective_stride(self) -> int:
        """Step of the sliding window in pixels: `stride`, or the value that 0 stands for; 0 without a window."""
        if not self.sliding_window:
            return 0
        return self.stride or max(TILE_STEP, self.sliding_window * 3 // 4 // TILE_STEP * TILE_STEP)


__all__ = [
    "CLASS_WEIGHT_SCHEMES",
    "DTYPES",
    "TILE_STEP",
    "AugmentationConfig",
    "InferenceOptions",
    "LossConfig",
    "OptimizerConfig",
    "check_class_weight_scheme",
]
