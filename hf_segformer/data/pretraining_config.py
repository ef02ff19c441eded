"""Options of pre-training an encoder as plain data classes: images, augmentation and method.

As in config.py nothing heavy is imported, each class checks its values at construction, and its messages name a value
as a recipe does, `table.key`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from ..config import parse_value_range

IMAGE_SOURCES = ("shapes", "imagefolder", "dataset")
METHODS = ("classification", "masked_images")
LARGEST_MAGNITUDE = 10.0  # of RandAugment


@dataclass(frozen=True)
class ImageDataConfig:
    """The source of images, with a class each for classification.

    Args:
        source: `"imagefolder"` is a folder with one for each split, in which sub-folders are the classes, or, with
            `eval_share`, a folder of images at any depth; `"dataset"` is a Hub repository, or a local folder that
            `datasets` reads; `"shapes"` are generated, one shape an image.
        root: the folder, or Hub repository as `owner/name`.
        subset: `datasets` configuration of a data set that has several.
        train_split: name of the split to train on.
        eval_split: name of the split to evaluate on; empty is `validation`, of a folder also `val`.
        eval_share: share of the training split to hold out for evaluation in place of `eval_split`; 0 is none.
        image_column: column of a data set that holds the images.
        label_column: column of a data set that holds the classes.
        streaming: read the training split while it is used, without loading or storing all of it.
        value_range: values of the images that become 0 and 255, see `DataConfig`.
        bands: numbers, from 1, of the bands to read, in the model's order; empty is all.
        image_size: side in pixels of the generated shapes.
        num_train: number of training images; 0 is all (of real ones).
        num_eval: number of evaluation images; 0 is all (of real ones).
        seed: seed of the generated shapes, of the held-out share and of the order of a stream.
        title: name of the data in the run record.
        terms: terms of use of the data, for the run record.

    Raises:
        ValueError: if a value is out of range; the message names it as `data.name`.

    Examples:
        >>> from hf_segformer.data.pretraining_config import ImageDataConfig
        >>> ImageDataConfig(source="shapes", num_train=100, num_eval=10).eval_split_name
        'validation'
    """

    source: str
    root: str = ""
    subset: str = ""
    train_split: str = "train"
    eval_split: str = ""
    eval_share: float = 0.0
    image_column: str = "image"
    label_column: str = "label"
    streaming: bool = False
    value_range: str = ""
    bands: list[int] = field(default_factory=list)
    image_size: int = 64
    num_train: int = 0
    num_eval: int = 0
    seed: int = 0
    title: str = ""
    terms: str = ""

    def __post_init__(self):
        is_generated = self.source == "shapes"
        if self.source not in IMAGE_SOURCES:
            raise ValueError(f"data.source is {self.source!r}; expected one of {', '.join(IMAGE_SOURCES)}")
        if not is_generated and not self.root:
            raise ValueError("data.root is not set: give the folder of the images as data.root=DIR")
        least = {"image_size": 16, "num_train": int(is_generated), "num_eval": int(is_generated), "seed": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"data.{name} is {getattr(self, name)}; expected at least {lowest}")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"data.eval_share is {self.eval_share}; expected a share in [0, 1)")
        if any(band < 1 for band in self.bands):
            raise ValueError(f"data.bands is {self.bands}; expected numbers from 1")
        parse_value_range(self.value_range, "data.value_range")
        self._check_splits(is_generated)

    def _check_splits(self, is_generated: bool) -> None:
        """Refuse settings of splits that contradict each other or have no effect."""
        for name in ("eval_share", "streaming"):
            if is_generated and getattr(self, name):
                raise ValueError(f"data.{name} is set, but shapes are generated: leave it out")
        for name in ("subset", "image_column", "label_column"):
            if self.source == "imagefolder" and getattr(self, name) != getattr(ImageDataConfig, name):
                raise ValueError(
                    f"data.{name} is {getattr(self, name)!r}, which is for data.source=dataset, but data.source is "
                    "imagefolder: leave it out"
                )
        if not is_generated and self.image_size != ImageDataConfig.image_size:
            raise ValueError(
                f"data.image_size is {self.image_size}, the side of generated shapes, but data.source is "
                f"{self.source}: leave it out, or set augmentation.crop_size, the side of what the network sees"
            )
        if self.streaming and self.source != "dataset":
            raise ValueError(f"data.streaming is set for {self.source}, whose files are read one by one: leave it out")
        if self.eval_share and self.streaming:
            raise ValueError("data.eval_share is set, but nothing can be held out of a stream: set data.eval_split")
        if self.eval_share and self.eval_split:
            raise ValueError("data.eval_share and data.eval_split are both set: leave one of them out")
        if not self.eval_share and not is_generated and self.train_split == self.eval_split_name:
            raise ValueError(
                f"data.eval_split is {self.train_split!r}, the training split; expected another split, or a share held "
                "out by data.eval_share=0.1"
            )

    @property
    def eval_split_name(self) -> str:
        """`eval_split`, or its default."""
        return self.eval_split or "validation"

    def check_root(self) -> None:
        """Check that `root` exists, before anything heavy is imported.

        Raises:
            FileNotFoundError: if `root` is neither a folder nor the name of a Hub repository.
        """
        if self.source == "shapes" or Path(self.root).is_dir():
            return
        is_name = self.root.count("/") <= 1 and not self.root.startswith((".", "/", "~"))
        if self.source != "dataset" or not is_name:
            raise FileNotFoundError(f"data.root is {self.root}, which does not exist; expected the folder of the data")


@dataclass(frozen=True)
class ImageAugmentation:
    """Augmentation of pre-training; all but the crop and the flip are off by default.

    Args:
        crop_size: side S in pixels of what the network sees.
        scale: lowest and highest share of the image's area that a crop takes (Szegedy et al. 2015).
        ratio: lowest and highest width over height of the crop, which is then resized to S x S.
        flip: probability of a horizontal flip.
        randaugment: magnitude of RandAugment (Cubuk et al. 2020), above 0 to 10; 0 is none. It needs 8-bit images of
            red, green and blue.
        randaugment_operations: number of its operations for each image.
        erasing: probability that a rectangle becomes noise (Zhong et al. 2020).
        mixup: alpha of the Beta distribution of mixup's share (Zhang et al. 2018); 0 is none.
        cutmix: the same of CutMix (Yun et al. 2019). With both, each batch has one of them, at random.

    Raises:
        ValueError: if a value is out of range; the message names it as `augmentation.name`.
    """

    crop_size: int = 224
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333])
    flip: float = 0.5
    randaugment: float = 0.0
    randaugment_operations: int = 2
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self):
        if self.crop_size < 16:
            raise ValueError(f"augmentation.crop_size is {self.crop_size}; expected at least 16")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"augmentation.scale is {self.scale}; expected [low, high] with 0 < low <= high <= 1")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"augmentation.ratio is {self.ratio}; expected [low, high] with 0 < low <= high")
        for name in ("flip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} is {getattr(self, name)}; expected a number from 0 to 1")
        if not 0 <= self.randaugment <= LARGEST_MAGNITUDE:
            raise ValueError(f"augmentation.randaugment is {self.randaugment}; expected a magnitude from 0 to 10")
        if self.randaugment_operations < 1:
            raise ValueError(
                f"augmentation.randaugment_operations is {self.randaugment_operations}; expected at least 1 "
                "(augmentation.randaugment=0 is none)"
            )
        if not self.randaugment and self.randaugment_operations != ImageAugmentation.randaugment_operations:
            raise ValueError(
                f"augmentation.randaugment_operations is {self.randaugment_operations}, but augmentation.randaugment "
                "is 0, which is none: leave it out, or set augmentation.randaugment=9"
            )
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"augmentation.{name} is {getattr(self, name)}; expected a finite number of at least 0"
                )


@dataclass(frozen=True)
class PretrainingConfig:
    """The task of a pre-training.

    Args:
        method: `"classification"` needs a class for each image; `"masked_images"` (SimMIM, Xie et al. 2022) needs none:
            the network reconstructs masked patches of an image from those that it sees.
        label_smoothing: share of the target that is spread evenly over the classes, for classification.
        mask_ratio: share of the patches that are hidden, rounded up to a whole number of them.
        mask_size: side in pixels of a patch; it divides `augmentation.crop_size`.

    Raises:
        ValueError: if a value is out of range; the message names it as `pretraining.name`.
    """

    method: str = "classification"
    label_smoothing: float = 0.0
    mask_ratio: float = 0.6
    mask_size: int = 32

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"pretraining.method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"pretraining.label_smoothing is {self.label_smoothing}; expected a share in [0, 1)")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"pretraining.mask_ratio is {self.mask_ratio}; expected a share in (0, 1)")
        if self.mask_size < 1:
            raise ValueError(f"pretraining.mask_size is {self.mask_size}; expected at least 1")
        if self.is_masked and self.label_smoothing:
            raise ValueError(
                "pretraining.label_smoothing is set, but masked images have no classes: leave it out, or set "
                "pretraining.method=classification"
            )
        for name in ("mask_ratio", "mask_size"):
            if not self.is_masked and getattr(self, name) != getattr(PretrainingConfig, name):
                raise ValueError(
                    f"pretraining.{name} is set, but pretraining.method is classification, which hides nothing: leave "
                    "it out, or set pretraining.method=masked_images"
                )

    @property
    def is_masked(self) -> bool:
        """Return True if the images need no classes."""
        return self.method == "masked_images"

    def check_with(self, augmentation: ImageAugmentation) -> None:
        """Check that the augmentation suits the method.

        Raises:
            ValueError: if it does not; the message names both settings and the remedy.
        """
        if not self.is_masked:
            return
        for name in ("mixup", "cutmix", "erasing"):
            if getattr(augmentation, name):
                raise ValueError(
                    f"augmentation.{name} is {getattr(augmentation, name)}, which is for classification, but "
                    f"pretraining.method is masked_images: set augmentation.{name}=0"
                )
        if augmentation.crop_size % self.mask_size or augmentation.crop_size == self.mask_size:
            raise ValueError(
                f"augmentation.crop_size is {augmentation.crop_size}; expected a multiple of pretraining.mask_size, "
                f"{self.mask_size}, and more than one patch"
            )
        number = (augmentation.crop_size // self.mask_size) ** 2
        if math.ceil(number * self.mask_ratio) == number:
            highest = math.floor(1000 * (number - 1) / number) / 1000
            raise ValueError(
                f"pretraining.mask_ratio is {self.mask_ratio}, which hides all {number} patches; expected at most "
                f"{highest}, or a smaller pretraining.mask_size"
            )


__all__ = [
    "IMAGE_SOURCES",
    "LARGEST_MAGNITUDE",
    "METHODS",
    "ImageAugmentation",
    "ImageDataConfig",
    "PretrainingConfig",
]
