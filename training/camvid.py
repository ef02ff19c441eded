"""CamVid: road scenes in the layout of the SegNet tutorial, read from a folder.

    train/NAME.png       picture, .png, .jpg or .webp
    trainannot/NAME.png  its label map, 8-bit, one class index a pixel
    val/, valannot/      the same for evaluation

Index 11 is what nobody labelled; it becomes 255 and does not count.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
PALETTE = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
IGNORE_INDEX = 255
SPLITS = {"train": "train", "validation": "val"}

_UNLABELLED = 11
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def camvid_dataset(root: str | Path, split: str, num_samples: int = 0):
    """Read a split as a `datasets.Dataset`; every file is opened once here, so that a broken one is named at once.

    Args:
        root: the folder that holds `train/`, or one that holds it as `CamVid/train/`.
        split: `"train"` or `"validation"`.
        num_samples: how many, spread evenly over the split; 0 is all.

    Returns:
        data set with the columns `image` (read when used) and `label` (8-bit grey, in memory).

    Raises:
        ValueError: names the file that has no partner, another size than its partner or strange labels.
        OSError: names the folder or file that is missing or can not be read.
    """
    import datasets
    from tqdm.auto import tqdm

    pairs = _pairs(_folder(Path(root)), SPLITS[split])
    if num_samples > len(pairs):
        raise ValueError(f"{num_samples} pictures are asked for, but {root} has {len(pairs)} in {SPLITS[split]}/")
    chosen = np.linspace(0, len(pairs) - 1, num_samples or len(pairs)).round().astype(int)
    columns: dict[str, list] = {"image": [], "label": []}
    for image, mask in tqdm([pairs[index] for index in chosen], desc=f"reading pictures, {split}", leave=False):
        columns["image"].append(str(image))
        columns["label"].append({"bytes": _read_mask(mask, _read_size(image)), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    return datasets.Dataset.from_dict(columns, features=features)


def _folder(root: Path) -> Path:
    for folder in (root, root / "CamVid"):
        if (folder / SPLITS["train"]).is_dir():
            return folder
    raise FileNotFoundError(
        f"{root} holds neither train/ nor CamVid/train/: data.root must name the folder of the data"
    )


def _pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """Pictures and label maps that share the name before the suffix, in order of names."""
    images, masks = (_by_stem(folder / name) for name in (split, f"{split}annot"))
    for stem in sorted(images.keys() ^ masks.keys()):
        if stem in images:
            raise ValueError(f"{images[stem]} has no label map {folder / f'{split}annot' / stem}.png")
        raise ValueError(f"{masks[stem]} has no picture {folder / split / stem}.*")
    if not images:
        raise ValueError(f"{folder / split} holds no pictures ({', '.join(_SUFFIXES)})")
    return [(images[stem], masks[stem]) for stem in sorted(images)]


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _SUFFIXES and path != files.setdefault(path.stem, path):
            raise ValueError(f"{files[path.stem]} and {path.name} have one name: which is meant?")
    return files


def _open(path: Path) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
    except OSError as error:
        raise OSError(f"can not read {path}: {error}") from error
    return picture


def _read_size(path: Path) -> tuple[int, int]:
    with _open(path) as picture:
        return picture.size


def _read_mask(path: Path, size: tuple[int, int]) -> bytes:
    """The label map as PNG with 255 for what is not labelled."""
    with _open(path) as picture:
        if picture.size != size:
            raise ValueError(f"{path} is {picture.size} wide and high, but its picture is {size}")
        if picture.mode not in ("L", "P"):
            raise ValueError(
                f"{path} is a picture of mode {picture.mode}, but a label map is 8-bit grey (L) or palette (P)"
            )
        labels = np.asarray(picture)
    strange = np.setdiff1d(labels, [*range(len(NAMES)), _UNLABELLED, IGNORE_INDEX])
    if strange.size:
        raise ValueError(f"{path} holds labels {strange.tolist()}, but CamVid has 0 to {_UNLABELLED}")
    buffer = BytesIO()
    Image.fromarray(np.where(labels == _UNLABELLED, IGNORE_INDEX, labels).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
