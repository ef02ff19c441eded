"""COCO's panoptic format: PNG files whose colours number segments, and a JSON file with the segments' classes.

Format: https://cocodataset.org/#format-data, section 4. A pixel's segment has the number red + 256 green + 65536 blue,
and 0 is void: pixels without annotation, which are ignored. Mask values are the categories in order of ids, 0 and so
on, and -1 void; of a single category 1, and 0 void: a binary task.

Axes: H W pixels.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..files import printable, resolve_inside
from .polygons import category_numbers, check_files, read_annotations
from .readers import read_color_mask

VOID = -1


def open_panoptic(path: Path, images: Path, masks: Path) -> tuple[datasets.Dataset, tuple[str, ...]]:
    """Read a panoptic JSON file; no image is read yet.

    Args:
        path: the JSON file.
        images: the folder that names of images are relative to.
        masks: the folder of the PNG files.

    Returns:
        a data set with the columns `image`, paths, and `label`, `{"path", "segments"}` for `read_segments`, in order of
        the file's images; and the names of its categories in order of their ids.

    Raises:
        ValueError: if the file is not of this format, an image has no mask, a file is missing, or a name leads out of
            its folder.
        OSError: if it cannot be read.
    """
    content = read_annotations(path)
    assert content is not None
    numbers = category_numbers(path, content["categories"])
    names = tuple(printable(each["name"]) for each in sorted(content["categories"], key=lambda each: each["id"]))
    offset = 0 if len(names) == 1 else 1
    values = {category: number - offset for category, number in numbers.items()}
    annotations = _annotations_by_image(path, content["annotations"])
    rows: dict[str, list[Any]] = {"image": [], "label": []}
    for each in content["images"]:
        if each["id"] not in annotations:
            raise ValueError(f"{path} has no annotation of image {each['id']}, {each.get('file_name')}; expected one")
        annotation = annotations.pop(each["id"])
        segments = _values_of_segments(annotation.get("segments_info"), values, f"{path}, image {each['id']}")
        segments["0"] = VOID if offset else 0
        rows["image"].append(str(resolve_inside(images, str(each.get("file_name")))))
        mask = str(resolve_inside(masks, str(annotation.get("file_name"))))
        rows["label"].append({"path": mask, "segments": json.dumps(segments)})
    check_files(path, [*rows["image"], *(label["path"] for label in rows["label"])])
    if annotations:
        raise ValueError(f"{path} has an annotation of image {next(iter(annotations))}, which is not one of its images")
    features = {"image": datasets.Value("string"), "label": {"path": datasets.Value("string")}}
    features["label"]["segments"] = datasets.Value("large_string")
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features)), names


def is_panoptic(content: Mapping[str, Any]) -> bool:
    """Return True if the content of a COCO-style file lists segments of PNG files in place of polygons."""
    return any("segments_info" in each for each in content["annotations"][:1])


def _annotations_by_image(path: Path, annotations: Sequence[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for each in annotations:
        if found.setdefault(each.get("image_id"), each) is not each:
            raise ValueError(
                f"{path} has two annotations of image {each.get('image_id')}; expected one, with all segments"
            )
    return found


def _values_of_segments(segments: Any, values: Mapping[int, int], place: str) -> dict[str, int]:
    """Return the mask value of each segment."""
    if not isinstance(segments, list) or not all(isinstance(each, dict) for each in segments):
        raise ValueError(f"{place} has no list segments_info of objects; expected the panoptic format of COCO")
    found: dict[str, int] = {}
    for each in segments:
        number, category = each.get("id"), each.get("category_id")
        if type(number) is not int or not 0 < number < 2**24 or str(number) in found:
            raise ValueError(
                f"{place} has the segment {number!r:.40}; expected a number from 1 to 2**24 - 1, each once"
            )
        if type(category) is not int or category not in values:
            raise ValueError(
                f"{place}, segment {number}: category_id is {category!r:.40}; expected one of its categories"
            )
        found[str(number)] = values[category]
    return found


def read_segments(label: Mapping[str, Any], name: str, ignore_exif: bool = False) -> np.ndarray:
    """Read the mask of one image.

    Args:
        label: of a row that `open_panoptic` gives.
        name: what error messages call the mask.
        ignore_exif: as it is stored, whatever its EXIF orientation.

    Returns:
        int32 (H, W), the values of classes, and of void.

    Raises:
        ValueError: if it has no colours, or a segment that the JSON file does not list.
        OSError: if it cannot be read.
    """
    colors = np.asarray(read_color_mask(label["path"], name, ignore_exif=ignore_exif))
    numbers = colors >> 16 | colors & 0xFF00 | (colors & 0xFF) << 16  # blue is highest in segments, red in colours
    values = {int(number): value for number, value in json.loads(label["segments"]).items()}
    known = np.array(sorted(values), np.int32)
    places = np.searchsorted(known, numbers).clip(max=len(known) - 1)
    strange = numbers[known[places] != numbers]
    if strange.size:
        raise ValueError(
            f"{name} has the segment {int(strange[0])}, which its JSON file does not list in segments_info"
        )
    return np.array([values[int(number)] for number in known], np.int32)[places]


__all__ = ["VOID", "is_panoptic", "open_panoptic", "read_segments"]
