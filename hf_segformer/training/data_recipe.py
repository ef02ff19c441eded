"""The table `[data]` of a recipe; importing it costs nothing, so that a wrong value is told within a second."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from ..config import parse_value_range

SOURCES = ("shapes", "camvid", "folders", "imagefolder", "dataset")

_SHAPES, _DATASETS = ("shapes",), ("imagefolder", "dataset")


@dataclass(frozen=True)
class DataRecipe:
    """Where pictures and label maps come from, and what the labels mean; docs/data.md shows a table for each source.

    Args:
        source: `"shapes"` are generated, `"camvid"` is the folder of the SegNet tutorial, `"folders"` are pictures and
            label maps in folders of their own, `"imagefolder"` is a folder with metadata, and `"dataset"` a Hub
            repository, or a local folder that `datasets` reads.
        root: folder, or Hub repository as `owner/name`.
        subset: of a data set that has several, its `datasets` configuration.
        train_split: name of the split to train on.
        eval_split: name of the split to evaluate on; empty is `val` for folders and `validation` for the others.
        eval_share: share of the training split that is held out for evaluation in place of `eval_split`; 0 is none.
        image_column: of a data set.
        label_column: of a data set.
        streaming: read the training split while it is used, without loading or storing all of it.
        image_folder: of `folders`, below `root`. `{split}` stands for the split's name; without it the split is a
            folder inside, unless evaluation is held out by `eval_share`.
        mask_folder: the same for label maps.
        image_suffix: how the names of pictures end, `"_leftImg8bit.png"` say; empty is any known ending. What comes
            before it pairs a picture with its label map.
        mask_suffix: the same for label maps.
        names: of the classes, in order of their labels, after `reduce_labels`; empty if the data bring them.
        palette: one [red, green, blue] a class; empty is the data's own, or colours that are told apart.
        reduce_labels: label 0 is ignored and all others are one less, as ADE20K needs it.
        label_values: the mask value of each class, any integers, for example [0, 255]; empty is 0, 1, 2 and so on.
        ignore: mask values that do not count, any integers. 255 never does, unless it is a class.
        value_range: values of the images that become 0 and 255: "LOW,HIGH", "percentiles:LOW,HIGH" of each image or
            "window:CENTER,WIDTH"; empty takes 8-bit and colour images by their type, other bands in their units.
        ignore_exif: take images and masks as they are stored, whatever their EXIF orientation.
        pages: of `folders`: each image of a file with several is an image of its own.
        image_size: side in pixels at which shapes are drawn.
        num_train: number of training pictures; 0 is all there are (of real ones).
        num_eval: the same for evaluation.
        seed: of the generated shapes, of what is held out, and of the order of a stream.
        eval_size: shorter side in pixels to which pictures are resized for evaluation, in their own ratio; 0 is that
            of the first one.
        title: name of the data in the model card.
        terms: under which the data may be used, for the model card.

    Raises:
        ValueError: if a value is out of range; the message names it as `data.name`.

    Example:
        >>> from hf_segformer.training.data_recipe import DataRecipe
        >>> DataRecipe(source="shapes", num_train=100, num_eval=10).image_size
        128
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
    image_folder: str = "images"
    mask_folder: str = "masks"
    image_suffix: str = ""
    mask_suffix: str = ""
    names: list[str] = field(default_factory=list)
    palette: list[list[int]] = field(default_factory=list)
    reduce_labels: bool = False
    label_values: list[int] = field(default_factory=list)
    ignore: list[int] = field(default_factory=list)
    value_range: str = ""
    ignore_exif: bool = False
    pages: bool = False
    image_size: int = 128
    num_train: int = 0
    num_eval: int = 0
    seed: int = 0
    eval_size: int = 0
    title: str = ""
    terms: str = ""

    def __post_init__(self):
        if self.source not in SOURCES:
            near = get_close_matches(self.source, SOURCES, n=1, cutoff=0)[0]
            raise ValueError(f"unknown data.source {self.source!r}, did you mean {near!r}?")
        if self.source not in _SHAPES and not self.root:
            raise ValueError("data.root is not set: give the folder of the pictures as data.root=DIR")
        smallest = {"image_size": 16, "num_train": 0, "num_eval": 0, "seed": 0, "eval_size": 0}
        if self.source in _SHAPES:
            smallest |= {"num_train": 1, "num_eval": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}, but it must be at least {least}")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"data.eval_share is {self.eval_share}, but it must lie in [0, 1)")
        parse_value_range(self.value_range, "data.value_range")
        if self.pages and self.source not in ("folders", "camvid"):
            raise ValueError(f"data.pages is set, but data.source is {self.source}; expected folders")
        self._check_combinations()
        self._check_labels()

    @property
    def eval_split_name(self) -> str:
        """`eval_split`, or what it stands for when it is empty."""
        return self.eval_split or ("val" if self.source in ("camvid", "folders") else "validation")

    def check_root(self) -> None:
        """Tell a missing folder before anything heavy is imported.

        Raises:
            FileNotFoundError: if `root` is neither a folder nor the name of a Hub repository.
        """
        if self.source in _SHAPES or Path(self.root).is_dir():
            return
        is_name = self.root.count("/") <= 1 and not self.root.startswith((".", "/", "~"))
        if self.source != "dataset" or not is_name:
            raise FileNotFoundError(f"there is no folder {self.root}: data.root must name the folder of the data")

    def _check_combinations(self) -> None:
        """Settings that the source could only pass over in silence are errors."""
        if self.streaming and self.source not in _DATASETS:
            raise ValueError(f"data.streaming is for {' and '.join(_DATASETS)}, but data.source is {self.source}")
        if self.eval_share and self.source == "shapes":
            raise ValueError("data.eval_share is set, but shapes are drawn for evaluation on their own: leave it out")
        if self.eval_share and self.streaming:
            raise ValueError("data.eval_share is set, but of a stream nothing can be held out: set data.eval_split")
        if self.eval_share and self.eval_split:
            raise ValueError("data.eval_share and data.eval_split are both set, but one of them says what is held out")
        if not self.eval_share and self.source != "shapes" and self.train_split == self.eval_split_name:
            raise ValueError(
                f"data.eval_split is {self.train_split!r}, the split that is trained on: set data.eval_share to hold "
                "pictures out"
            )

    def _check_labels(self) -> None:
        check_unique("data.names", self.names)
        check_palette("data.palette", self.palette, len(self.names) or len(self.palette))
        if self.reduce_labels and self.label_values:
            raise ValueError("data.reduce_labels and data.label_values are both set, but one says which label is which")
        check_unique("data.label_values", self.label_values)
        both = sorted(set(self.label_values) & set(self.ignore))
        if both:
            raise ValueError(f"data.ignore has {both}, which data.label_values has too: a value has one meaning")


def check_unique(where: str, values: Sequence) -> None:
    """Raise a ValueError if a value occurs twice."""
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"{where} has {', '.join(map(str, twice))} more than once")


def check_palette(where: str, palette: Sequence[Sequence[int]], length: int) -> None:
    """Raise a ValueError unless a palette is empty or holds that many colours.

    Args:
        where: what the message calls it.
        palette: [red, green, blue] of each class.
        length: how many.
    """
    for color in palette:
        if len(color) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in color):
            raise ValueError(f"{where} has {color}, but a colour is [red, green, blue] of whole numbers from 0 to 255")
    if palette and len(palette) != length:
        raise ValueError(f"{where} has {len(palette)} colours for {length} classes: give one for each")
