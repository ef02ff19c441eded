"""COCO-style annotations: polygons and run lengths in a JSON file, drawn as masks when a row is read.

Format: https://cocodataset.org/#format-data. A pixel belongs to a polygon if its centre is inside by the even-odd
rule, to an annotation if it belongs to any of its polygons, and to the smallest of the annotations that cover it,
crowds last. Value 0 is a pixel without annotation, and value k the k-th category in order of ids.

Axes: H W pixels, N points of a polygon.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..files import printable, resolve_inside
from ..image_io_segformer import check_area

_LARGEST_FILE = 2**30  # bytes; instances_train2017.json has 449 MB
_MOST_CROSSINGS = 50_000_000  # of edges and rows of one polygon
_NUM_SHOWN = 5


def open_coco(path: Path, images: Path) -> tuple[datasets.Dataset, tuple[str, ...]]:
    """Read the images and annotations of a COCO-style file; nothing is drawn yet.

    Args:
        path: the JSON file.
        images: the folder that its file names are relative to.

    Returns:
        a data set with the columns `image`, paths, and `label`, `{"path", "polygons"}` for `draw_polygons`, in order of
        the file's images; and the names of its categories in order of their ids.

    Raises:
        ValueError: if the file is not of this format, an image is missing or listed twice, or a name leads out of the
            folder.
        OSError: if it cannot be read.
    """
    content = read_annotations(path)
    assert content is not None
    numbers = category_numbers(path, content["categories"])
    names = tuple(printable(each["name"]) for each in sorted(content["categories"], key=lambda each: each["id"]))
    drawn: dict[int, list[dict[str, Any]]] = {}
    for each in content["annotations"]:
        place = f"{path}, annotation {each.get('id')}"
        if each.get("category_id") not in numbers:
            raise ValueError(f"{place}: category_id is {each.get('category_id')!r}; expected one of its categories")
        if "segmentation" not in each:
            raise ValueError(f"{place} has no segmentation, only a box perhaps; expected polygons or run lengths")
        entry = {"id": each.get("id"), "value": numbers[each["category_id"]], "segmentation": each["segmentation"]}
        drawn.setdefault(each.get("image_id"), []).append(entry | {"crowd": bool(each.get("iscrowd"))})
    rows: dict[str, list[Any]] = {"image": [], "label": []}
    for each in content["images"]:
        file = resolve_inside(images, str(each.get("file_name")))
        polygons = {name: each.get(name) for name in ("height", "width")} | {"annotations": drawn.pop(each["id"], [])}
        rows["image"].append(str(file))
        rows["label"].append({"path": f"{path}, image {each['id']}", "polygons": json.dumps(polygons)})
    check_files(path, rows["image"])
    if drawn:
        raise ValueError(f"{path} has annotations of image {next(iter(drawn))}, which is not one of its images")
    features = {"image": datasets.Value("string"), "label": {"path": datasets.Value("string")}}
    features["label"]["polygons"] = datasets.Value("large_string")
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features)), names


def read_annotations(path: Path, is_sure: bool = True) -> dict[str, Any] | None:
    """Read a COCO-style JSON file, and check that it has the three lists of objects, two of them with ids.

    Args:
        path: the file.
        is_sure: False returns None for a JSON file of another kind.

    Raises:
        ValueError: if it is not of this format.
        OSError: if it cannot be read.
    """
    size = path.stat().st_size
    if size > _LARGEST_FILE:
        raise ValueError(f"{path} has {size:,} bytes; expected at most {_LARGEST_FILE:,}: divide it by images")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error!s:.200}") from error
    lists = ("images", "annotations", "categories")
    if not is_sure and not (isinstance(content, dict) and all(isinstance(content.get(key), list) for key in lists)):
        return None
    for key in lists:
        values = content.get(key) if isinstance(content, dict) else None
        if not isinstance(values, list) or not all(isinstance(each, dict) for each in values):
            raise ValueError(f"{path} has no list {key!r} of objects; expected the COCO format of instances")
        ids = [each.get("id") for each in values]
        if key != "annotations" and not (all(type(each) is int for each in ids) and len({*ids}) == len(ids)):
            raise ValueError(f"{path}: an id of {key} is missing, no integer, or there twice; expected one for each")
    if not content["images"] or not content["categories"]:
        raise ValueError(f"{path} has no {'categories' if content['images'] else 'images'}; expected some")
    return content


def category_numbers(path: Path, categories: Sequence[dict[str, Any]]) -> dict[int, int]:
    """Return the mask value of each category id: 1 and so on, in order of ids.

    Raises:
        ValueError: if a category has no name, or two have one.
    """
    names = [each.get("name") for each in categories]
    if not all(isinstance(name, str) and name for name in names) or len({*names}) < len(names):
        raise ValueError(f"{path}: a category has no name, or two have the same; expected a name for each")
    return {category: number for number, category in enumerate(sorted(each["id"] for each in categories), 1)}


def check_files(path: Path, files: Sequence[str]) -> None:
    """Raise ValueError if files that a JSON file names are not there, or one is named twice."""
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        rest = f" and {len(missing) - _NUM_SHOWN} more" if len(missing) > _NUM_SHOWN else ""
        raise ValueError(f"{path} names images that are not there: {', '.join(missing[:_NUM_SHOWN])}{rest}")
    file, number = Counter(files).most_common(1)[0]
    if number > 1:
        raise ValueError(
            f"{path} names {file} {number} times; expected each file once: give all its annotations the id of one "
            "entry, and remove the others"
        )


def draw_polygons(polygons: str, name: str) -> np.ndarray:
    """Draw the annotations of one image.

    Args:
        polygons: of a row that `open_coco` gives.
        name: what error messages call the mask.

    Returns:
        integers (H, W): 0, or the number of a category from 1 on.

    Raises:
        ValueError: if an annotation cannot be drawn; the message has `name` and the annotation's id.
    """
    content = json.loads(polygons)
    height, width = content["height"], content["width"]
    if not all(type(side) is int and side > 0 for side in (height, width)):
        raise ValueError(f"{name}: height and width are {height!r} and {width!r}; expected positive integers")
    check_area(height, width, name)
    shapes = []
    for each in content["annotations"]:
        place = f"{name}, annotation {each['id']}"
        segmentation = each["segmentation"]
        if isinstance(segmentation, dict):
            shape: Any = decode_runs(segmentation, height, width, place)
            area = float(shape.sum())
        else:
            shape = _check_polygons(segmentation, height, width, place)
            area = sum(_area(points) for points in shape)
        shapes.append((not each["crowd"], -area, each["value"], shape, place))
    largest = max((shape[2] for shape in shapes), default=0)
    mask = np.zeros((height, width), np.min_scalar_type(largest))
    for _, _, value, shape, place in sorted(shapes, key=lambda shape: shape[:2]):
        for part in [shape] if isinstance(shape, np.ndarray) else shape:
            if isinstance(shape, np.ndarray):
                mask[part] = value
            else:
                _fill(mask, part, value, place)
    return mask


def polygon_mask(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draw one polygon.

    Args:
        points: (N, 2) of x and y in pixels; the centre of the first pixel is (0.5, 0.5).
        height: H.
        width: W.

    Returns:
        bool (H, W), True where the pixel's centre is inside by the even-odd rule.

    Examples:
        >>> import numpy as np
        >>> from hf_segformer.data.polygons import polygon_mask
        >>> polygon_mask(np.array([[1, 0], [3, 0], [3, 2], [1, 2]]), 2, 4).astype(int).tolist()
        [[0, 1, 1, 0], [0, 1, 1, 0]]
    """
    mask = np.zeros((height, width), bool)
    _fill(mask, np.asarray(points, np.float64), True, "the polygon")
    return mask


def _fill(mask: np.ndarray, points: np.ndarray, value: int, place: str) -> None:
    """Set the pixels of a mask (H, W) whose centres are inside of a polygon (N, 2)."""
    left, top = np.floor(points.min(axis=0)).astype(int).clip(0)
    right, bottom = (np.ceil(points.max(axis=0)).astype(int)).clip(max=mask.shape[::-1])
    if left >= right or top >= bottom:
        return
    height, width = bottom - top, right - left
    (x0, y0), (x1, y1) = points.T - [[left], [top]], np.roll(points, -1, axis=0).T - [[left], [top]]
    # Rows whose centres an edge crosses, its upper end included and its lower one not.
    first, last = (np.ceil(end - 0.5).clip(0, height).astype(np.int64) for end in (np.fmin(y0, y1), np.fmax(y0, y1)))
    counts = last - first
    if counts.sum() > _MOST_CROSSINGS:
        raise ValueError(f"{place} has {len(points):,} points that cross {counts.sum():,} rows; expected a polygon")
    edges = np.repeat(np.arange(len(points)), counts)
    rows = np.arange(len(edges)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edges]
    x = x0[edges] + (rows + 0.5 - y0[edges]) * ((x1 - x0)[edges] / (y1 - y0)[edges])
    columns = np.ceil(x - 0.5).clip(0, width).astype(np.int64)  # pixels from here on are right of the edge
    crossings = np.bincount(rows * (width + 1) + columns, minlength=height * (width + 1)).reshape(height, width + 1)
    is_inside = np.cumsum(crossings, axis=1)[:, :width] % 2 == 1
    mask[top:bottom, left:right][is_inside] = value


def _check_polygons(segmentation: Any, height: int, width: int, place: str) -> list[np.ndarray]:
    """Return the polygons (N, 2) of an annotation, whose points are at most one image size outside."""
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"{place}: segmentation is {segmentation!r:.60}; expected polygons or run lengths")
    polygons = []
    for each in segmentation:
        if not isinstance(each, list) or len(each) < 6 or len(each) % 2:
            raise ValueError(f"{place} has the polygon {each!r:.60}; expected x and y of at least three points")
        if not all(type(value) in (int, float) and math.isfinite(value) for value in each):
            raise ValueError(f"{place} has a coordinate that is no finite number; expected pixels")
        points = np.array(each, np.float64).reshape(-1, 2)
        sides = np.array([width, height])
        outside = points[((points < -sides) | (points > 2 * sides)).any(axis=1)]
        if len(outside):
            raise ValueError(f"{place} has the point {outside[0].tolist()}, far outside its image of {width}x{height}")
        polygons.append(points)
    return polygons


def _area(points: np.ndarray) -> float:
    """Area of a polygon (N, 2), by Gauss's formula."""
    (x, y), (next_x, next_y) = points.T, np.roll(points, -1, axis=0).T
    return abs(float((x * next_y - next_x * y).sum())) / 2


def decode_runs(segmentation: dict[str, Any], height: int, width: int, place: str) -> np.ndarray:
    """Decode COCO run lengths: column by column, beginning with pixels that do not belong to the annotation.

    Args:
        segmentation: `size`, [H, W], and `counts`, a list of run lengths or the text of their compressed form.
        height: H of the image.
        width: W of the image.
        place: what error messages call the annotation.

    Returns:
        bool (H, W).

    Raises:
        ValueError: if it is damaged, or of another size than the image.

    Examples:
        >>> from hf_segformer.data.polygons import decode_runs
        >>> decode_runs({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3, "annotation").astype(int).tolist()
        [[0, 1, 0], [1, 0, 0]]
    """
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        size = segmentation.get("size")
        raise ValueError(
            f"{place} has run lengths of size {size!r:.40}; expected that of its image, [{height}, {width}]"
        )
    runs: Any
    try:
        runs = list(_decompress(counts)) if isinstance(counts, str) else counts
        is_valid = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
    except IndexError:
        is_valid = False
    if not is_valid or sum(runs) != height * width:
        raise ValueError(f"{place} has damaged run lengths; expected {height * width} pixels in runs of at least 0")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, np.array(runs, np.int64)).reshape(width, height).T


def _decompress(text: str) -> Iterator[int]:
    """Run lengths of the compressed form.

    Each character carries five bits above its offset of 48, the lowest first, and a sixth that says whether more
    follow; the last one's highest bit is the sign. From the fourth number on, they are differences to the one two
    before.

    Raises:
        IndexError: if the text ends within a number.
    """
    runs: list[int] = []
    position = 0
    while position < len(text):
        value = shift = 0
        has_more = True
        while has_more:
            bits = ord(text[position]) - 48
            value |= (bits & 31) << shift
            has_more = bool(bits & 32)
            position, shift = position + 1, shift + 5
            if shift > 60:
                raise IndexError("a number of more than 60 bits")
        value -= (1 << shift) if bits & 16 else 0
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        yield runs[-1]


__all__ = [
    "category_numbers",
    "check_files",
    "decode_runs",
    "draw_polygons",
    "open_coco",
    "polygon_mask",
    "read_annotations",
]
