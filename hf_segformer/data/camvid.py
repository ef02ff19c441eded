"""CamVid: road scenes in the layout of the SegNet tutorial.

    train/NAME.png       image
    trainannot/NAME.png  its mask, 8-bit, one class index a pixel
    val/, valannot/      images and masks for evaluation

Index 11 marks unlabeled pixels, which are ignored.
"""

from pathlib import Path

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
UNLABELLED = 11
IMAGE_FOLDER, MASK_FOLDER = "{split}", "{split}annot"


def find_camvid(root: Path, split: str) -> Path:
    """Return the folder that holds the split: `root`, or its `CamVid/`.

    Raises:
        FileNotFoundError: if neither does.
    """
    for folder in (root, root / "CamVid"):
        if (folder / split).is_dir():
            return folder
    raise FileNotFoundError(
        f"{root} holds neither {split}/ nor CamVid/{split}/; expected the folder of the data as data.root"
    )


__all__ = ["IMAGE_FOLDER", "MASK_FOLDER", "NAMES", "PALETTE", "UNLABELLED", "find_camvid"]
