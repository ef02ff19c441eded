"""Options of data, training and inference as plain data classes.

Nothing here imports PyTorch or NumPy, so that a recipe or a command line is checked before anything heavy is loaded.
Each class checks its values at construction; its messages name a value as a recipe does, `table.key`.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

DATA_SOURCES = ("shapes", "camvid", "folders", "coco", "panoptic", "imagefolder", "dataset")
SHAPES_DIFFICULTIES = ("standard", "hard")
LOSS_TERMS = ("cross_entropy", "ohem", "dice", "focal", "lovasz", "tversky")
CLASS_WEIGHT_SCHEMES = ("median_frequency", "log", "inverse_sqrt")
DTYPES = ("float32", "float16", "bfloat16")
MOST_FOLDS = 20
PHOTOMETRIC = ("shadow", "exposure", "temperature", "gamma", "blur", "noise", "jpeg")  # in the order of their effect
TILE_STEP = 32  # pixels of the input for each cell of the last stage's grid

# Largest values of the options of augmentation that are off at 0.
_LARGEST = {
    **dict.fromkeys(("flip", "vertical_flip", "quarter_turns", "distortion", "photometric_probability"), 1),
    **dict.fromkeys(("shadow", "cutmix", "classmix", "class_balance"), 1),
    "rotation": 45,
    "exposure": 4,
    "temperature": 2,
    "gamma": 4,
    "blur": 16,
    "noise": 128,
    "jpeg": 95,
}

_GENERATED, _COCO, _DATASETS = ("shapes",), ("coco", "panoptic"), ("imagefolder", "dataset")


VALUE_SETTINGS = ("label_values", "ignore_values", "reduce_labels")  # of `DataConfig`, for masks of integers


@dataclass(frozen=True)
class DataConfig:
    """The source of images and masks, and the meaning of the masks' labels.

    docs/guides/data.md shows the table `[data]` of a recipe for each source.

    Args:
        source: `"shapes"` are generated, `"camvid"` is the folder of the SegNet tutorial, `"folders"` are images and
            masks in folders of their own, `"coco"` are images with polygons in a JSON file, `"panoptic"` with COCO's
            panoptic masks, `"imagefolder"` is a folder with metadata, and `"dataset"` a Hub repository, or a local
            folder that `datasets` reads.
        root: folder, or Hub repository as `owner/name`.
        subset: `datasets` configuration of a data set that has several.
        train_split: name of the split to train on.
        eval_split: name of the split to evaluate on; empty is `val` for folders and `validation` for the others.
        eval_share: share of the training split to hold out for evaluation in place of `eval_split`; 0 is none.
        image_column: column of a data set that holds the images.
        mask_column: column of a data set that holds the masks.
        streaming: read the training split while it is used, without loading or storing all of it.
        image_folder: for `folders`, `coco` and `panoptic`, below `root`. `{split}` stands for the split's name; without
            it the split is a sub-folder of `folders`. Where there is no such sub-folder, or `eval_share` divides whole
            groups, evaluation images are held out of the whole folder; where only one of the two folders has it, the
            files of the other are taken that have a partner. `{image}` stands for the name of each image's own folder.
        mask_folder: the masks' folder, by the same rules; for `panoptic` that of the PNG files.
        annotation_file: for `coco` and `panoptic`, the JSON file below `root`; `{split}` stands for the split's name.
        split_file: for `folders`, a text file below `root` that names the images of `{split}`, one a line, with or
            without suffix. Image and mask folder then hold all splits, and others than the named images are left out.
        image_suffix: ending of the images' names, such as `"_leftImg8bit.png"`; empty is any known suffix. What is
            between prefix and suffix pairs an image with its mask.
        mask_suffix: ending of the masks' names.
        image_prefix: beginning of the images' names, such as `"img_"`.
        mask_prefix: beginning of the masks' names.
        instance_masks: for folders with `{image}`: all masks of an image show objects of the only class, one each.
        names: class names in order of their labels, after `reduce_labels`; empty if the data bring them.
        palette: one [red, green, blue] a class; empty is the data's own, or generated colours.
        reduce_labels: ignore label 0 and subtract one from all others, as ADE20K needs.
        label_values: mask value of each class, any integers, for example [0, 255]; empty is 0, 1, 2 and so on.
        ignore_values: mask values to ignore, any integers. 255 is ignored, too, unless it is a class.
        mask_colors: [red, green, blue] of each class in masks that hold colours in place of integers; as for
            `label_values`, a binary task has two, without and with its class.
        ignore_colors: colours of the masks to ignore.
        value_range: values of the images that become 0 and 255: "LOW,HIGH", "percentiles:LOW,HIGH" of each image or
            "window:CENTER,WIDTH"; empty takes 8-bit and colour images by their type, other bands in their units.
        bands: numbers, from 1, of the bands to read, in the model's order; empty is all.
        ignore_exif: take images and masks as they are stored, whatever their EXIF orientation.
        pages: of `folders`: each image of a file with several is an image of its own.
        image_size: side in pixels of the generated shapes.
        difficulty: of the generated shapes, `"standard"`, or `"hard"`: thin and hidden ones of low contrast, and darker
            light in evaluation.
        max_background: largest share of training images with nothing but the first class, or nothing at all; further
            ones are left out, drawn by `seed`. Slices of volumes are images. 1 keeps all.
        num_train: number of training images; 0 is all (of real ones).
        num_eval: number of evaluation images; 0 is all (of real ones).
        seed: seed of the generated shapes, of the held-out share and of the order of a stream.
        eval_size: shorter side in pixels to which images are resized for evaluation, in their own ratio; 0 is that
            of the first one.
        title: name of the data in the model card.
        terms: terms of use of the data, for the model card.

    Raises:
        ValueError: if a value is out of range; the message names it as `data.name`.

    Examples:
        >>> from hf_segformer.config import DataConfig
        >>> DataConfig(source="shapes", num_train=100, num_eval=10).image_size
        128
    """

    source: str
    root: str = ""
    subset: str = ""
    train_split: str = "train"
    eval_split: str = ""
    eval_share: float = 0.0
    image_column: str = "image"
    mask_column: str = "label"
    streaming: bool = False
    image_folder: str = "images"
    mask_folder: str = "masks"
    annotation_file: str = ""
    split_file: str = ""
    image_suffix: str = ""
    mask_suffix: str = ""
    image_prefix: str = ""
    mask_prefix: str = ""
    instance_masks: bool = False
    names: list[str] = field(default_factory=list)
    palette: list[list[int]] = field(default_factory=list)
    reduce_labels: bool = False
    label_values: list[int] = field(default_factory=list)
    ignore_values: list[int] = field(default_factory=list)
    mask_colors: list[list[int]] = field(default_factory=list)
    ignore_colors: list[list[int]] = field(default_factory=list)
    value_range: str = ""
    bands: list[int] = field(default_factory=list)
    ignore_exif: bool = False
    pages: bool = False
    image_size: int = 128
    difficulty: str = "standard"
    max_background: float = 1.0
    num_train: int = 0
    num_eval: int = 0
    seed: int = 0
    eval_size: int = 0
    title: str = ""
    terms: str = ""

    def __post_init__(self):
        if self.source not in DATA_SOURCES:
            raise ValueError(f"data.source is {self.source!r}; expected one of {', '.join(DATA_SOURCES)}")
        if self.source not in _GENERATED and not self.root:
            raise ValueError("data.root is not set: give the folder of the images as data.root=DIR")
        if self.difficulty not in SHAPES_DIFFICULTIES:
            known = ", ".join(SHAPES_DIFFICULTIES)
            raise ValueError(f"data.difficulty is {self.difficulty!r}; expected one of {known}")
        if self.difficulty != "standard" and self.source not in _GENERATED:
            raise ValueError(f"data.difficulty is {self.difficulty!r} for {self.source}; expected source = shapes")
        smallest = {"image_size": 16, "num_train": 0, "num_eval": 0, "seed": 0, "eval_size": 0}
        if self.source in _GENERATED:
            smallest |= {"num_train": 1, "num_eval": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; expected at least {least}")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"data.eval_share is {self.eval_share}; expected a share in [0, 1)")
        if not 0 <= self.max_background <= 1:
            raise ValueError(f"data.max_background is {self.max_background}; expected a share in [0, 1]")
        parse_value_range(self.value_range, "data.value_range")
        if any(band < 1 for band in self.bands):
            raise ValueError(f"data.bands is {self.bands}; expected numbers from 1")
        if self.pages and self.source not in ("folders", "camvid"):
            raise ValueError(f"data.pages is set, but data.source is {self.source}; expected folders")
        self._check_files()
        self._check_combinations()
        self._check_labels()
        self._check_colors()

    @property
    def eval_split_name(self) -> str:
        """`eval_split`, or its default for the source."""
        return self.eval_split or ("val" if self.source in ("camvid", "folders", *_COCO) else "validation")

    def check_root(self) -> None:
        """Check that `root` exists, before anything heavy is imported.

        Raises:
            FileNotFoundError: if `root` is neither a folder nor the name of a Hub repository.
        """
        if self.source in _GENERATED or Path(self.root).is_dir():
            return
        is_name = self.root.count("/") <= 1 and not self.root.startswith((".", "/", "~"))
        if self.source != "dataset" or not is_name:
            raise FileNotFoundError(f"data.root is {self.root}, which does not exist; expected the folder of the data")

    def _check_files(self) -> None:
        """Check the files that say what belongs to a split."""
        if self.source in _COCO and not self.annotation_file:
            name = {"coco": "instances", "panoptic": "panoptic"}[self.source]
            raise ValueError(
                "data.annotation_file is not set: give the JSON file of the annotations below data.root, such as "
                f"data.annotation_file=annotations/{name}_{{split}}.json"
            )
        paired = ("split_file", "image_prefix", "mask_prefix", "instance_masks")
        for names, sources in ((("annotation_file",), _COCO), (paired, ("folders",))):
            for name in names:
                if getattr(self, name) and self.source not in sources:
                    expected = " or ".join(sources)
                    raise ValueError(f"data.{name} is set, but data.source is {self.source}; expected {expected}")
        self._check_image_folders()

    def _check_image_folders(self) -> None:
        """Check the settings of images with a folder each."""
        have = ["{image}" in folder for folder in (self.image_folder, self.mask_folder)]
        if self.source != "folders" or not any(have):
            if self.instance_masks:
                raise ValueError(
                    "data.instance_masks is set, but folders do not name each image's own: set data.image_folder and "
                    "data.mask_folder, such as data.mask_folder={image}/masks"
                )
            return
        before = {folder.split("{image}")[0] for folder in (self.image_folder, self.mask_folder)}
        if (
            not all(have)
            or len(before) > 1
            or any("{image}" not in folder.split("/") for folder in (self.image_folder, self.mask_folder))
        ):
            raise ValueError(
                f"data.image_folder is {self.image_folder} and data.mask_folder {self.mask_folder}; expected {{image}} "
                "as a folder of both, below the same folders: {image}/images and {image}/masks"
            )
        for name in ("split_file", "pages"):
            if getattr(self, name):
                raise ValueError(f"data.{name} is set, but data.image_folder has {{image}}: leave one of them out")

    def _check_combinations(self) -> None:
        """Refuse settings that the source would ignore."""
        if self.streaming and self.source not in _DATASETS:
            raise ValueError(f"data.streaming is set for {self.source}; expected a source of {' or '.join(_DATASETS)}")
        if self.eval_share and self.source in _GENERATED:
            raise ValueError("data.eval_share is set, but shapes are generated for evaluation separately: leave it out")
        if self.max_background < 1 and (self.streaming or self.source in _GENERATED):
            kind = "a stream" if self.streaming else self.source
            raise ValueError(f"data.max_background is set for {kind}, whose images are all taken: leave it out")
        if self.eval_share and self.streaming:
            raise ValueError("data.eval_share is set, but nothing can be held out of a stream: set data.eval_split")
        if self.eval_share and self.eval_split:
            raise ValueError("data.eval_share and data.eval_split are both set: leave one of them out")
        if not self.eval_share and self.source not in _GENERATED and self.train_split == self.eval_split_name:
            raise ValueError(
                f"data.eval_split is {self.train_split!r}, the training split; expected another split, or a share held "
                "out by data.eval_share=0.1"
            )

    def _check_labels(self) -> None:
        check_unique("data.names", self.names)
        check_palette("data.palette", self.palette, len(self.names) or len(self.palette))
        if self.reduce_labels and self.label_values:
            raise ValueError("data.reduce_labels and data.label_values are both set: leave one of them out")
        check_unique("data.label_values", self.label_values)
        for name in ("reduce_labels", "label_values", "ignore_values", "mask_colors"):
            if self.instance_masks and getattr(self, name):
                raise ValueError(
                    f"data.{name} and data.instance_masks are both set, but what any mask shows is the only class: "
                    "leave one of them out"
                )
        if self.instance_masks and len(self.names) > 1:
            raise ValueError(f"data.names has {len(self.names)} names; expected one, the class of data.instance_masks")
        if self.source == "panoptic" and self.reduce_labels:
            raise ValueError("data.reduce_labels is set, but void never counts in panoptic masks: leave it out")
        both = sorted(set(self.label_values) & set(self.ignore_values))
        if both:
            raise ValueError(f"data.ignore_values has {both}, which data.label_values has too: a value has one meaning")

    def _check_colors(self) -> None:
        for name in ("mask_colors", "ignore_colors"):
            colors = getattr(self, name)
            check_palette(f"data.{name}", colors, len(colors))
            check_unique(f"data.{name}", [tuple(color) for color in colors])
        if self.ignore_colors and not self.mask_colors:
            raise ValueError("data.ignore_colors is set without data.mask_colors, the colours of the classes: set both")
        both = [color for color in self.ignore_colors if color in self.mask_colors]
        if both:
            raise ValueError(f"data.ignore_colors has {both[0]}, which data.mask_colors has too: it has one meaning")
        for name in VALUE_SETTINGS:
            if self.mask_colors and getattr(self, name):
                raise ValueError(
                    f"data.{name} and data.mask_colors are both set, for masks of integers and of colours: leave one "
                    "of them out (data.ignore_colors leaves colours out)"
                )
        if self.mask_colors and self.source in ("shapes", "camvid", *_COCO):
            raise ValueError(f"data.mask_colors is set, but the masks of {self.source} hold no colours: leave it out")


@dataclass(frozen=True)
class SplitConfig:
    r"""The division of the training split into images to train on and images held out for evaluation.

    Without it, the data's own splits are used, or `data.eval_share` draws single images. Images of one group (a
    patient, a film, a scene) are never on both sides. All choices follow from `data.seed`.

    Args:
        group: regular expression that finds an image's group in its name, the path below the folder of the images: the
            match of its first bracket, or the whole match. For example `^(patient\d+)_`.
        column: in place of `group`, a column of the data set that holds the groups.
        hold_out: groups to hold out, every image of them.
        folds: number of folds to divide the training split into, 2 to 20; 0 is none.
        fold: the fold to hold out, from 0 on.

    Raises:
        ValueError: if a value is out of range; the message names it as `split.name`.

    Examples:
        >>> from hf_segformer.config import SplitConfig
        >>> SplitConfig(group="^([^_]+)_", hold_out=["0001TP"]).holds_out
        True
    """

    group: str = ""
    column: str = ""
    hold_out: list[str] = field(default_factory=list)
    folds: int = 0
    fold: int = 0

    def __post_init__(self):
        try:
            re.compile(self.group)
        except re.error as error:
            raise ValueError(f"split.group is {self.group!r}; expected a regular expression: {error}") from error
        if self.group and self.column:
            raise ValueError("split.group and split.column are both set: leave one of them out")
        check_unique("split.hold_out", self.hold_out)
        if self.hold_out and not self.is_grouped:
            raise ValueError("split.hold_out names groups, but nothing says what they are: set split.group=REGEX")
        if self.hold_out and self.folds:
            raise ValueError("split.hold_out and split.folds are both set: leave one of them out")
        if self.folds and not 2 <= self.folds <= MOST_FOLDS:
            raise ValueError(f"split.folds is {self.folds}; expected 2 to {MOST_FOLDS}, or 0 for no folds")
        if not 0 <= self.fold < max(self.folds, 1):
            expected = f"0 to {self.folds - 1}" if self.folds else "0 without split.folds"
            raise ValueError(f"split.fold is {self.fold}; expected {expected}")

    @property
    def is_grouped(self) -> bool:
        """Return True if images belong to groups."""
        return bool(self.group or self.column)

    @property
    def holds_out(self) -> bool:
        """Return True if the evaluation images are groups or a fold of the training split."""
        return bool(self.hold_out or self.folds)

    def check_with(self, data: DataConfig) -> None:
        """Check that the division suits the data.

        Raises:
            ValueError: if it does not; the message names both settings and the remedy.
        """
        given = next((name for name in ("hold_out", "folds", "group", "column") if getattr(self, name)), None)
        if given is None:
            return
        if data.streaming:
            raise ValueError(f"split.{given} is set, but a stream cannot be divided: set data.streaming=false")
        if self.is_grouped and data.source in _GENERATED:
            raise ValueError(f"split.{given} is set, but {data.source} are generated and have no groups: leave it out")
        if self.column and data.source not in _DATASETS:
            raise ValueError(
                f"split.column is set, but data.source is {data.source}, whose images have no columns: set "
                "split.group=REGEX"
            )
        if self.holds_out and data.eval_share:
            raise ValueError(
                f"split.{given} and data.eval_share are both set, which both choose the evaluation images: set "
                "data.eval_share=0"
            )
        if self.holds_out and data.eval_split:
            raise ValueError(
                f"split.{given} and data.eval_split are both set, which both choose the evaluation images: set "
                "data.eval_split=''"
            )
        if not (self.holds_out or data.eval_share):
            raise ValueError(
                f"split.{given} is set, but no images are held out by groups: set split.hold_out, split.folds or "
                "data.eval_share=0.1"
            )


def check_unique(name: str, values: Sequence) -> None:
    """Raise ValueError if a value occurs twice; `name` is what the message calls the list."""
    twice = sorted(value for value, number in Counter(values).items() if number > 1)
    if twice:
        raise ValueError(f"{name} has {', '.join(map(str, twice))} more than once")


def check_palette(name: str, palette: Sequence[Sequence[int]], length: int) -> None:
    """Raise ValueError unless a palette is empty or holds that many colours.

    Args:
        name: what the message calls the palette.
        palette: [red, green, blue] of each class.
        length: number of classes.
    """
    for color in palette:
        if len(color) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in color):
            raise ValueError(f"{name} has {color}; expected [red, green, blue] of integers from 0 to 255")
    if palette and len(palette) != length:
        raise ValueError(f"{name} has {len(palette)} colours; expected one for each of the {length} classes")


@dataclass(frozen=True)
class AugmentationConfig:
    """Augmentation of training images; the defaults are the paper's for ADE20K.

    docs/guides/augmentation.md shows what each option does. All but those of the paper are off by default.

    Args:
        crop_size: side S of the crop in pixels.
        base_size: shorter and longer side that an image is fitted into before the ratio is applied; empty: its own.
        scale: lowest and highest ratio of the random resize.
        max_class_share: share of the crop's valid pixels that one class may fill; up to ten draws try to keep to it.
        flip: probability of a horizontal flip.
        distortion: strength of the photometric distortion: 1 is the paper's, 0 is none. Above 0 it needs 8-bit images.
        vertical_flip: probability of a vertical flip, for images without an upright, such as those from above.
        quarter_turns: probability of a turn by 90, 180 or 270 degrees, each as likely; 0.75 makes all four alike.
        rotation: largest angle in degrees, up to 45, by which the crop is turned either way.
        photometric_probability: probability, for each of the seven options below by itself, that it changes a sample.
        shadow: largest share of the light that a half-plane or polygon loses.
        exposure: most stops by which the light is raised or lowered; a stop doubles it.
        temperature: most stops by which red is raised and blue lowered, or the reverse, in three-band images.
        gamma: values v of 0..1 become v^e, where e is drawn from 1 / (1 + gamma) to 1 + gamma, log-uniformly.
        blur: largest standard deviation, in pixels, of a Gaussian blur; also for images in units of their own.
        noise: largest standard deviation of Gaussian noise, on the scale of 0 to 255.
        jpeg: lowest quality, from 1, of a JPEG compression; it is drawn from here to 95.
        cutmix: probability that a box of another training sample is pasted into a sample (Yun et al. 2019).
        classmix: probability that half of the classes of another one are (Olsson et al. 2021).
        class_balance: share of the samples that are drawn so that rare classes appear, by `data.sampling.ClassBalance`.
        final_crop_size: side of the crop in the last passes over the images; 0 keeps `crop_size`. The network has no
            position embedding that would fix its size (paper, 3.1).
        final_share: share of the passes that are cropped to `final_crop_size`, rounded up to whole ones.
        custom: the user's own augmentation, `"module:function"`, which is called last. A recipe's file may name one
            only together with `--allow-code`.

    Raises:
        ValueError: if a value is out of range; the message names it as `augmentation.name`.

    Examples:
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
    vertical_flip: float = 0.0
    quarter_turns: float = 0.0
    rotation: float = 0.0
    photometric_probability: float = 0.5
    shadow: float = 0.0
    exposure: float = 0.0
    temperature: float = 0.0
    gamma: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    jpeg: int = 0
    cutmix: float = 0.0
    classmix: float = 0.0
    class_balance: float = 0.0
    final_crop_size: int = 0
    final_share: float = 0.2
    custom: str = ""

    def __post_init__(self):
        if self.crop_size < 16:
            raise ValueError(f"augmentation.crop_size is {self.crop_size}; expected at least 16")
        if self.final_crop_size and self.final_crop_size < 16:
            raise ValueError(f"augmentation.final_crop_size is {self.final_crop_size}; expected 0, or at least 16")
        if not 0 < self.final_share <= 1:
            raise ValueError(f"augmentation.final_share is {self.final_share}; expected a share in (0, 1]")
        if self.base_size and (len(self.base_size) != 2 or not 0 < self.base_size[0] <= self.base_size[1]):
            raise ValueError(
                f"augmentation.base_size is {self.base_size}; expected [shorter, longer] in pixels, or an empty list"
            )
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"augmentation.scale is {self.scale}; expected [low, high] with 0 < low <= high")
        if not 0 < self.max_class_share <= 1:
            raise ValueError(f"augmentation.max_class_share is {self.max_class_share}; expected a share in (0, 1]")
        for name, largest in _LARGEST.items():
            if not 0 <= getattr(self, name) <= largest:
                raise ValueError(f"augmentation.{name} is {getattr(self, name)}; expected a number from 0 to {largest}")
        if self.cutmix + self.classmix > 1:
            raise ValueError(
                f"augmentation.classmix is {self.classmix} and augmentation.cutmix {self.cutmix}; expected "
                "probabilities that sum to at most 1, as a sample is mixed in one way"
            )
        module, colon, name = self.custom.partition(":")
        names = [*module.split("."), *name.split(".")]
        if self.custom and not (colon and all(each.isidentifier() for each in names)):
            raise ValueError(
                f"augmentation.custom is {self.custom!r}; expected module:function, such as my_augmentation:augment"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """Parameter groups and schedule of the paper's recipe, beside learning rate, weight decay and warm-up.

    Args:
        head_lr_multiplier: the head's learning rate as a multiple of the encoder's.
        layer_lr_decay: each block's learning rate as a share of the next one's; 1 is the paper's.
        freeze_encoder: train the head alone.
        freeze_stages: number N of stages whose weights stay as they are, patch embeddings, blocks and LayerNorms of
            stage 1 to N. Their drop path and dropout stay active, as with `freeze_encoder`; the encoder has no running
            statistics.
        power: exponent of the polynomial decay.

    Raises:
        ValueError: if a value is out of range; the message names it as `optimizer.name`.
    """

    head_lr_multiplier: float = 10.0
    layer_lr_decay: float = 1.0
    freeze_encoder: bool = False
    freeze_stages: int = 0
    power: float = 1.0

    def __post_init__(self):
        if self.head_lr_multiplier <= 0:
            raise ValueError(f"optimizer.head_lr_multiplier is {self.head_lr_multiplier}; expected a positive number")
        if not 0 < self.layer_lr_decay <= 1:
            raise ValueError(f"optimizer.layer_lr_decay is {self.layer_lr_decay}; expected a number in (0, 1]")
        if self.freeze_stages < 0:
            raise ValueError(f"optimizer.freeze_stages is {self.freeze_stages}; expected at least 0")
        if self.freeze_stages and self.freeze_encoder:
            raise ValueError("optimizer.freeze_encoder and optimizer.freeze_stages are both set: leave one of them out")
        if self.power <= 0:
            raise ValueError(f"optimizer.power is {self.power}; expected a positive number")


@dataclass(frozen=True)
class LossConfig:
    """Weights and settings of a sum of losses; `LossConfig()` is the model's own cross entropy.

    Logits are upsampled once to the masks' size. Where no pixel is valid, the loss is 0 with zero gradient.

    Args:
        cross_entropy: weight of the cross entropy, the mean over the valid pixels.
        ohem: weight of the cross entropy of hard pixels only (Shrivastava et al. 2016): those whose true class has a
            probability below `ohem_threshold`, and in any case the B * `ohem_min_kept` least probable of the batch;
            the mean over these.
        dice: weight of the soft Dice loss (Milletari et al. 2016): 1 - 2 sum(p t) / (sum(p) + sum(t)) for each class,
            with probabilities p and targets t of all valid pixels of the batch, the mean over the classes that
            its masks hold; with one logit of the foreground alone. Such a denominator is at least 1: no smoothing term
            is added to it.
        focal: weight of the focal loss (Lin et al. 2017), -(1 - p)^gamma log(p), the mean over the valid pixels.
        lovasz: weight of the Lovasz extension of 1 - IoU (Berman et al. 2018) of all valid pixels of the batch: of
            the errors of the probabilities (Lovasz-softmax), the mean over the classes that its masks hold; with one
            logit of its hinge errors (Lovasz hinge), the foreground's, whether or not a mask holds it.
        tversky: weight of the Tversky loss (Salehi et al. 2017), (1 - T)^gamma with
            T = TP / (TP + alpha FP + beta FN) of the sums that Dice is made of, the mean over the same classes. With
            alpha = beta = 0.5 and gamma = 1 it is Dice.
        class_weights: K weights (with one logit two) for the pixels of each class in all terms but Dice, Lovasz and
            Tversky; means are divided by the sum of the pixels' weights, as PyTorch does. The name of a scheme of
            `class_weights` stands for numbers that are still to be computed.
        label_smoothing: share of the target that is spread evenly over the classes in `cross_entropy`.
        focal_gamma: exponent of the focal loss.
        ohem_threshold: probability from which on a pixel is easy.
        ohem_min_kept: least number of pixels to keep for each image.
        tversky_alpha: weight of false positives.
        tversky_beta: weight of false negatives; more of it finds more of a rare class, at the price of precision.
        tversky_gamma: exponent gamma, below 1 for more weight on classes that are nearly right; the focal Tversky loss
            of Abraham and Khan (2019) has 0.75, the inverse of its own gamma.

    Raises:
        ValueError: if a value is out of range; the message names it as `loss.name`.
    """

    cross_entropy: float = 1.0
    ohem: float = 0.0
    dice: float = 0.0
    focal: float = 0.0
    lovasz: float = 0.0
    tversky: float = 0.0
    class_weights: list[float] | str | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 2.0
    ohem_threshold: float = 0.7
    ohem_min_kept: int = 100_000
    tversky_alpha: float = 0.3
    tversky_beta: float = 0.7
    tversky_gamma: float = 1.0

    def __post_init__(self):
        tversky = ("tversky_alpha", "tversky_beta", "tversky_gamma")
        for name in (*LOSS_TERMS, "focal_gamma", "ohem_min_kept", *tversky):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; expected a finite number of at least 0")
        if not any(getattr(self, name) for name in LOSS_TERMS):
            raise ValueError(f"loss has no term: give one of {', '.join(LOSS_TERMS)} a positive weight")
        if not self.tversky_alpha + self.tversky_beta:
            raise ValueError("loss.tversky_alpha and loss.tversky_beta are 0; expected a positive number for one")
        if not self.tversky_gamma:
            raise ValueError("loss.tversky_gamma is 0; expected a positive number: with 0 the loss is constant")
        for name in ("label_smoothing", "ohem_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; expected a number from 0 to 1")
        weights = self.class_weights
        if isinstance(weights, str):
            check_class_weight_scheme(weights)
        elif weights is not None and not (any(weights) and all(0 <= weight < math.inf for weight in weights)):
            raise ValueError(f"loss.class_weights is {weights}; expected finite numbers of at least 0, not all 0")


def check_class_weight_scheme(scheme: str) -> None:
    """Raise ValueError unless `scheme` is one of `CLASS_WEIGHT_SCHEMES`; the message gives the nearest one."""
    if scheme not in CLASS_WEIGHT_SCHEMES:
        near = get_close_matches(scheme, CLASS_WEIGHT_SCHEMES, n=1, cutoff=0)[0]
        raise ValueError(
            f"loss.class_weights is {scheme!r}; expected numbers or one of {', '.join(CLASS_WEIGHT_SCHEMES)}: did you "
            f"mean {near!r}?"
        )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (PEFT) in the encoder and a head trained whole; the adapters are merged at the end.

    Args:
        rank: rank of the adapters; 0 trains all weights instead.
        alpha: numerator of their scale, alpha / rank.
        dropout: dropout on their input.
        target_modules: names of the layers that get one.

    Raises:
        ValueError: if a value is out of range; the message names it as `lora.name`.
    """

    rank: int = 0
    alpha: int = 16
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["query", "value"])

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank}; expected at least 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; expected a probability in [0, 1)")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty: name the layers that get an adapter")


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average of the weights; a run evaluates, saves and publishes the average.

    Averaged are the weights that are trained and BatchNorm's running statistics, once per optimizer step.

    Args:
        decay: share of the average that a step keeps, such as 0.999, which averages over about the last thousand steps;
            0 is no average.
        warmup: keep min(decay, (1 + t) / (10 + t)) after step t, counted from 0, so that the average forgets the first
            weights within a few steps.

    Raises:
        ValueError: if the decay is out of range; the message names it as `ema.decay`.
    """

    decay: float = 0.0
    warmup: bool = True

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}; expected a number in [0, 1), such as 0.999")


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """End of a training whose evaluations have stopped getting better; the best weights are restored.

    Args:
        patience: number of evaluations in a row without a better `trainer.metric_for_best_model` after which the
            training ends; 0 trains to the end.
        min_delta: least difference to the best value, in the metric's own units, that counts as better.

    Raises:
        ValueError: if a value is out of range; the message names it as `early_stopping.name`.
    """

    patience: int = 0
    min_delta: float = 0.0

    def __post_init__(self):
        if self.patience < 0:
            raise ValueError(f"early_stopping.patience is {self.patience}; expected at least 0")
        if not 0 <= self.min_delta < math.inf:
            raise ValueError(f"early_stopping.min_delta is {self.min_delta}; expected a finite number of at least 0")
        if self.min_delta and not self.patience:
            raise ValueError("early_stopping.min_delta is set, but early_stopping.patience is 0: set it, too")


@dataclass(frozen=True)
class DistillationConfig:
    """Knowledge distillation: the predictions of a trained model as a second target beside the masks.

    Args:
        teacher: folder or Hub repository of a segmentation model with the same classes; empty is none.
        weight: weight of the distillation loss, which is added to that of `[loss]`.
        temperature: divisor T of both models' logits. Above 1 it shows more of what the teacher holds for possible
            beside its first choice.

    Raises:
        ValueError: if a value is out of range; the message names it as `distill.name`.
    """

    teacher: str = ""
    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        for name in ("weight", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"distill.{name} is {getattr(self, name)}; expected a positive number")
            if getattr(self, name) != 1 and not self.teacher:
                raise ValueError(f"distill.{name} is set, but distill.teacher is not: name a model, or leave both out")


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
        dtype: dtype of the network, one of `DTYPES`. None is the weights' own, but float32 on a CPU, where
            half precision is slow.
        batch_size: most images, or tiles, that the network sees at once.

    Raises:
        ValueError: if a value is out of range; the message names it as `evaluation.name`.

    Examples:
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


def parse_value_range(text: str, setting: str = "value_range") -> "list[float] | dict[str, list[float] | float] | None":
    """Parse a value range as recipes and command lines spell it, to the form that the image processor takes.

    Args:
        text: `"LOW,HIGH"`, `"percentiles:LOW,HIGH"` or `"window:CENTER,WIDTH"`; empty is None.
        setting: what the error message calls it.

    Raises:
        ValueError: if it is none of these, or the range is empty.

    Examples:
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
    "DATA_SOURCES",
    "DTYPES",
    "LOSS_TERMS",
    "MOST_FOLDS",
    "PHOTOMETRIC",
    "SHAPES_DIFFICULTIES",
    "TILE_STEP",
    "VALUE_SETTINGS",
    "AugmentationConfig",
    "DataConfig",
    "DistillationConfig",
    "EarlyStoppingConfig",
    "EmaConfig",
    "InferenceOptions",
    "LoraConfig",
    "LossConfig",
    "OptimizerConfig",
    "SplitConfig",
    "check_class_weight_scheme",
    "check_palette",
    "check_unique",
    "parse_value_range",
]
