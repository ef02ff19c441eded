"""Layouts of published data sets, with the names, colours and mask values of their classes."""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import printable
from . import camvid
from .class_lists import check_list_size

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Reading:
    """One way to read a data set.

    Attributes:
        layout: its name, for people.
        tables: fields of `DataConfig`, apart from `root`.
        names: class names that belong to the layout; empty if the data bring them.
        names_source: where these come from.
        palette: colours that belong to the layout.
        notes: what was decided, one line each.
        claimed: folders at the top that belong to this layout and to no other.
    """

    layout: str
    tables: dict[str, Any]
    names: tuple[str, ...] = ()
    names_source: str = ""
    palette: tuple[Color, ...] = ()
    notes: tuple[str, ...] = ()
    claimed: frozenset[str] = field(default_factory=frozenset)


def _voc_palette(number: int) -> tuple[Color, ...]:
    """Colours of Pascal VOC: the bits of a class index, three at a time, are the highest bits of the channels."""
    colors = []
    for index in range(number):
        color = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                color[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        colors.append((color[0], color[1], color[2]))
    return tuple(colors)


_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)
VOC_NAMES = tuple(_VOC.split())
VOC_PALETTE = _voc_palette(len(VOC_NAMES))
# Cityscapes: (value in labelIds, name, colour) of the 19 classes that are evaluated, in the order of trainIds.
_CITYSCAPES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
CITYSCAPES_VALUES = tuple(value for value, _, _ in _CITYSCAPES)
CITYSCAPES_NAMES = tuple(name for _, name, _ in _CITYSCAPES)
CITYSCAPES_PALETTE = tuple(color for _, _, color in _CITYSCAPES)
_CITYSCAPES_IGNORED = [value for value in range(-1, 34) if value not in CITYSCAPES_VALUES]
EVAL_SHARE = 0.1  # held out where there is no split to evaluate on
_ADE_CLASSES = 150


def _has_folders(root: Path, *names: str) -> bool:
    return all((root / name).is_dir() for name in names)


def find_camvid(root: Path) -> Reading | None:
    """Recognize CamVid in the layout of the SegNet tutorial, unless a list of classes beside it names others."""
    if not _has_folders(root, "train", "trainannot", "val", "valannot") or _has_classes(root):
        return None
    notes = ["The folders are those of CamVid: its 11 classes are expected, and value 11 is ignored."]
    notes += ["Images in test/ are left out."] if _has_folders(root, "testannot") else []
    folders = frozenset(f"{split}{end}" for split in ("train", "val", "test") for end in ("", "annot"))
    return Reading("CamVid", {"source": "camvid"}, camvid.NAMES, "CamVid", camvid.PALETTE, tuple(notes), folders)


def find_cityscapes(root: Path) -> Reading | None:
    """Recognize Cityscapes; its trainIds if they are there, else its labelIds, mapped to the 19 classes."""
    if not _has_folders(root, "leftImg8bit/train", "gtFine/train"):
        return None
    has_train_ids = next((root / "gtFine/train").rglob("*_gtFine_labelTrainIds.png"), None) is not None
    suffix = "_gtFine_labelTrainIds.png" if has_train_ids else "_gtFine_labelIds.png"
    tables: dict[str, Any] = {
        "source": "folders",
        "image_folder": "leftImg8bit/{split}",
        "mask_folder": "gtFine/{split}",
    }
    tables |= {"image_suffix": "_leftImg8bit.png", "mask_suffix": suffix}
    notes = [f"Masks are the files {suffix[1:]}: the 19 classes that are evaluated."]
    if not has_train_ids:
        tables |= {"label_values": list(CITYSCAPES_VALUES), "ignore_values": _CITYSCAPES_IGNORED}
        notes += ["Mask values of other classes (unlabeled, ego vehicle, parking and so on) are ignored."]
    if not _has_folders(root, "leftImg8bit/val", "gtFine/val"):
        tables["eval_share"] = EVAL_SHARE
    if _has_folders(root, "gtFine/test"):
        notes += ["Images in test/ are left out: their masks are not published."]
    claimed = frozenset(("leftImg8bit", "gtFine", "gtCoarse"))
    own = (CITYSCAPES_NAMES, "Cityscapes", CITYSCAPES_PALETTE)
    return Reading("Cityscapes", tables, *own, tuple(notes), claimed)


def find_ade20k(root: Path) -> Reading | None:
    """Recognize ADE20K as distributed by MIT for scene parsing (ADEChallengeData2016)."""
    if not _has_folders(root, "images/training", "annotations/training"):
        return None
    has_list = (root / "objectInfo150.txt").is_file()
    if not has_list and root.name != "ADEChallengeData2016":
        return None
    tables: dict[str, Any] = {"source": "folders", "image_folder": "images/{split}"}
    tables |= {"mask_folder": "annotations/{split}", "train_split": "training", "reduce_labels": True}
    has_split = _has_folders(root, "images/validation", "annotations/validation")
    tables |= {"eval_split": "validation"} if has_split else {"eval_share": EVAL_SHARE}
    names = _ade_names(root / "objectInfo150.txt") if has_list else tuple(f"class {n + 1}" for n in range(_ADE_CLASSES))
    source = "objectInfo150.txt" if has_list else "generic"
    notes = ("Mask value 0 is ignored, and classes begin at 1 (data.reduce_labels).",)
    return Reading("ADE20K", tables, names, source, (), notes, frozenset(("images", "annotations")))


def _ade_names(path: Path) -> tuple[str, ...]:
    """Read the first synonym of each class, or all of them where the first one names two classes."""
    rows = list(
        csv.reader(check_list_size(path).read_text(encoding="utf-8", errors="replace").splitlines(), delimiter="\t")
    )
    texts = [row[-1].strip() for row in rows if row and row[0].strip().isdigit()]
    if len(texts) != _ADE_CLASSES:
        raise ValueError(f"{path} lists {len(texts)} classes; expected {_ADE_CLASSES}, each with its number first")
    first = [text.split(",")[0].strip() for text in texts]
    return tuple(printable(one if first.count(one) == 1 else text) for one, text in zip(first, texts, strict=True))


def find_voc(root: Path) -> Reading | None:
    """Recognize Pascal VOC: lists of images in `ImageSets/Segmentation`, and value 255 for ignored pixels."""
    lists = root / "ImageSets" / "Segmentation"
    if not _has_folders(root, "JPEGImages", "SegmentationClass") or not (lists / "train.txt").is_file():
        return None
    tables: dict[str, Any] = {"source": "folders", "image_folder": "JPEGImages", "mask_folder": "SegmentationClass"}
    tables |= {"split_file": "ImageSets/Segmentation/{split}.txt"}
    tables |= {} if (lists / "val.txt").is_file() else {"eval_share": EVAL_SHARE}
    claimed = frozenset(("JPEGImages", "SegmentationClass", "SegmentationObject", "Annotations", "ImageSets"))
    notes = ("Splits are the lists train.txt and val.txt in ImageSets/Segmentation.",)
    if _has_classes(root):
        return Reading("Pascal VOC", tables, notes=notes, claimed=claimed)
    return Reading("Pascal VOC", tables, VOC_NAMES, "Pascal VOC", VOC_PALETTE, notes, claimed)


def _has_classes(root: Path) -> bool:
    return any((root / name).is_file() for name in ("classes.json", "id2label.json"))


FINDERS: tuple[Callable[[Path], Reading | None], ...] = (find_camvid, find_cityscapes, find_ade20k, find_voc)

__all__ = [
    "CITYSCAPES_NAMES",
    "CITYSCAPES_PALETTE",
    "CITYSCAPES_VALUES",
    "EVAL_SHARE",
    "FINDERS",
    "VOC_NAMES",
    "VOC_PALETTE",
    "Reading",
    "find_ade20k",
    "find_camvid",
    "find_cityscapes",
    "find_voc",
]
