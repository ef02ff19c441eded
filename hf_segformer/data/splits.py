"""Division of a training split into images to train on and images held out, without a group on both sides.

Images of one patient, film or scene resemble each other: held out one by one, they measure what a model remembers. So
whole groups are held out. Every choice follows from a seed and from the names of the groups, not from the order of the
files. Axes: I images, G groups.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute

from ..config import SplitConfig
from ..files import atomic_write, printable
from .volume_pairs import is_volume

SPLIT_FILE = "split.csv"
GROUP_COLUMN = "group"

_HEADER = ("image", "page", "side", "group")
_NUM_LISTED = 12


def group_names(names: Iterable[str], pattern: str, setting: str = "the group pattern") -> list[str]:
    r"""Each image's group: the match of a regular expression in its name, or of its first bracket if there is one.

    Args:
        names: of the images.
        pattern: regular expression, such as `^(patient\d+)_`.
        setting: what messages call the pattern.

    Raises:
        ValueError: if the pattern is no regular expression, or is not found in a name.

    Examples:
        >>> from hf_segformer.data.splits import group_names
        >>> group_names(["anna_1.png", "anna_2.png", "ben_1.png"], "^([a-z]+)_")
        ['anna', 'anna', 'ben']
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{setting} is {pattern!r}; expected a regular expression: {error}") from error
    groups, unmatched = [], []
    for name in names:
        match = expression.search(name)
        group = match[1 if expression.groups else 0] if match else None
        if group is None:
            unmatched.append(name)
        groups.append(group or "")
    if unmatched:
        others = f", nor in {len(unmatched) - 1} others" if len(unmatched) > 1 else ""
        raise ValueError(f"{setting} {pattern!r} is not found in the image name {unmatched[0]!r}{others}")
    return groups


def image_paths(dataset: Any, column: str = "image") -> list[str | None]:
    """Paths in a column of a `datasets.Dataset`, without reading files; None where a row has none."""
    rows = dataset.with_format(None).select_columns([column])
    feature = rows.features[column]
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        return list(rows[column])
    if isinstance(feature, datasets.Image):
        undecoded = rows.cast_column(column, datasets.Image(decode=False))
        return list(undecoded.flatten().select_columns([f"{column}.path"])[f"{column}.path"])
    return [None] * len(rows)


def check_disjoint(train: datasets.Dataset, evaluation: datasets.Dataset, is_held_out: bool = False) -> None:
    """Refuse files that are in both splits, by their paths; links are followed.

    Files that a data set holds in itself have no path: `data_checks.check_data` compares their pixels.

    Args:
        train: with the column `image` and, if there are masks, `label`.
        evaluation: the same.
        is_held_out: both are of one split, of which `data.eval_share` holds a part out.

    Raises:
        ValueError: if an image or a mask is in both.
    """
    way_out = "from one, or hold images out by data.eval_share=0.1 in place of data.eval_split"
    for column, kind in (("image", "image"), ("label", "mask")):
        if column not in train.column_names:
            continue
        trained = set(_own_files(train, column))
        both = [file for file in _own_files(evaluation, column) if file in trained]
        if both:
            others = f", and {len(both) - 1} more," if len(both) > 1 else ""
            raise ValueError(
                f"the {kind} {both[0][0]}{others} would be trained on and evaluated on; expected every {kind} in one "
                f"split: remove {'the links to it' if is_held_out else f'it {way_out}'}"
            )


def _own_files(dataset: datasets.Dataset, column: str) -> list[tuple[str, int]]:
    """Return path and page of each row's file; none for a column that holds files or arrays itself."""
    feature, stored = dataset.features[column], dataset.data.column(column)
    if isinstance(feature, datasets.Image):
        if any(pyarrow.compute.struct_field(chunk, "bytes").null_count < len(chunk) for chunk in stored.chunks):
            return []
    elif not (isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")):
        return []
    paths = image_paths(dataset, column)
    pages = dataset["page"] if "page" in dataset.column_names else [0] * len(paths)
    return [(os.path.realpath(path), page) for path, page in zip(paths, pages, strict=True) if path]


def add_groups(dataset: datasets.Dataset, split: SplitConfig, folder: Path, values: Sequence | None) -> Any:
    """Add the column `group`, if the images have groups.

    Args:
        dataset: with the column `image`, undecoded.
        split: its `group`, or that `values` come from `column`.
        folder: the folder that the images' names begin below.
        values: what the data set's own column holds.

    Raises:
        ValueError: if an image has no name, or no group.
    """
    if split.column:
        groups = [None if value is None or value == "" else str(value) for value in values or ()]
        if None in groups:
            raise ValueError(
                f"split.column is {split.column!r}, which is empty in row {groups.index(None)} of {folder}"
            )
    elif split.group:
        paths = image_paths(dataset)
        if None in paths or "" in paths:
            raise ValueError(
                f"split.group is {split.group!r}, but images of {folder} have no file names: set split.column"
            )
        groups = list(group_names((_name_below(folder, path) for path in paths), split.group, "split.group"))
    elif "page" in dataset.column_names and (split.folds or _are_slices(dataset)):  # pages of one file are alike
        groups = [_name_below(folder, path) for path in image_paths(dataset)]
    else:
        return dataset
    return dataset.add_column(GROUP_COLUMN, groups)


def divide(
    dataset: datasets.Dataset, split: SplitConfig, share: float, seed: int, where: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Divide a training split into images to train on and images held out, each in their order.

    Args:
        dataset: the training split, with the column `group` if its images have groups.
        split: named groups or a fold to hold out; without either a share is.
        share: share of the images to hold out, in (0, 1).
        seed: of the choice.
        where: name of the data for messages.

    Raises:
        ValueError: if nothing would be left on one side, or a group is unknown.
    """
    groups = dataset[GROUP_COLUMN] if GROUP_COLUMN in dataset.column_names else _files_of_pages(dataset)
    if split.hold_out:
        is_held_out = _are_named(list(groups or ()), split.hold_out, where)
    elif split.folds:
        is_held_out = assign_folds(len(dataset), split.folds, seed, groups, where) == split.fold
    elif groups is None:
        is_held_out = _draw_images(len(dataset), share, seed, where)
    else:
        is_held_out = _draw_groups(list(groups), share, seed, where)
    return dataset.select(np.flatnonzero(~is_held_out)), dataset.select(np.flatnonzero(is_held_out))


def _files_of_pages(dataset: datasets.Dataset) -> list[str] | None:
    """The file of each page, since pages of one file are alike; None without pages, and where all are of one file."""
    files = image_paths(dataset) if "page" in dataset.column_names else []
    return [str(file) for file in files] if len(set(files)) > 1 else None


def assign_folds(
    num_images: int, num_folds: int, seed: int, groups: Sequence[str] | None = None, where: str = "the data"
) -> np.ndarray:
    """Fold of each image, int64 (I,): every image is in exactly one fold, and every group too.

    The largest group goes first, each to the fold that has the fewest images so far (the greedy rule of Graham 1969:
    the largest fold is at most 4/3 of the least possible); groups of one size, and images without groups, go in an
    order that the seed draws. Classes are not balanced.

    Args:
        num_images: I.
        num_folds: number of folds, at least 2.
        seed: of the order.
        groups: the group of each image; by default every image is its own.
        where: name of the data for messages.

    Raises:
        ValueError: if there are fewer images or groups than folds.

    Examples:
        >>> from hf_segformer.data.splits import assign_folds
        >>> assign_folds(6, 2, seed=0, groups=["a", "a", "a", "b", "b", "c"]).tolist()
        [0, 0, 0, 1, 1, 1]
    """
    names, members = np.unique(np.arange(num_images) if groups is None else list(groups), return_inverse=True)
    if len(names) < num_folds:
        kind = "images" if groups is None else f"groups ({_listed(names)})"
        raise ValueError(f"split.folds is {num_folds}; expected at most the number of {kind} in {where}, {len(names)}")
    sizes = np.bincount(members)
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of, loads = np.empty(len(names), np.int64), np.zeros(num_folds, np.int64)
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        fold_of[group] = loads.argmin()
        loads[fold_of[group]] += sizes[group]
    return fold_of[members]


def format_division(train: datasets.Dataset, evaluation: datasets.Dataset) -> str:
    """Groups of both sides with their numbers of images, in lines; empty without groups."""
    lines = []
    for side, rows in (("train", train), ("evaluation", evaluation)):
        if not isinstance(rows, datasets.Dataset) or GROUP_COLUMN not in rows.column_names:
            return ""
        sizes = Counter(rows.with_format(None)[GROUP_COLUMN]).most_common()
        shown = ", ".join(f"{printable(name)} {size}" for name, size in sizes[:_NUM_LISTED])
        others = f" and {len(sizes) - _NUM_LISTED} more" if len(sizes) > _NUM_LISTED else ""
        noun = "group" if len(sizes) == 1 else "groups"
        lines.append(f"  {side:10}  {len(rows)} images in {len(sizes)} {noun}: {shown}{others}")
    return "\n".join(["Groups of images, with their numbers of images:", *lines])


def count_division(train: datasets.Dataset, evaluation: datasets.Dataset) -> dict[str, dict[str, int]]:
    """Numbers of images, and of groups if there are any, on both sides."""
    counts = {}
    for side, rows in (("train", train), ("evaluation", evaluation)):
        counts[side] = {"images": len(rows)}
        if GROUP_COLUMN in rows.column_names:
            counts[side]["groups"] = len(set(rows.with_format(None)[GROUP_COLUMN]))
    return counts


def write_division(folder: Path, train: datasets.Dataset, evaluation: datasets.Dataset) -> None:
    """Write split.csv, with page, side and group of each image, if the images are files.

    It stays on the machine: `segformer push` leaves it out.

    Raises:
        OSError: if it cannot be written.
    """
    lines = []
    for side, rows in (("train", train), ("evaluation", evaluation)):
        has_groups = GROUP_COLUMN in rows.column_names
        groups = rows.with_format(None)[GROUP_COLUMN] if has_groups else [""] * len(rows)
        for path, page, group in zip(image_paths(rows), _pages(rows), groups, strict=True):
            if path and os.path.exists(path):
                lines.append((os.path.realpath(path), page, side, group))
    if not lines:  # generated images, or those of a data set's own files
        return
    with (
        atomic_write(folder / SPLIT_FILE) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        csv.writer(file).writerows([_HEADER, *lines])


def seen_images(folders: Iterable[Path], dataset: Any) -> list[str]:
    """Images of a data set that a model was trained on, as far as the `split.csv` of its folders tells.

    Args:
        folders: of the model, or of the members of an ensemble.
        dataset: with the column `image`.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is no table of text.
    """
    trained_on: dict[str, set[str]] = {}
    for row in (row for folder in folders for row in _read_division(folder) if row["side"] == "train"):
        trained_on.setdefault(row["image"], set()).add(row["page"])
    if not trained_on or not isinstance(dataset, datasets.Dataset):
        return []
    seen = []
    for path, page in zip(image_paths(dataset), _pages(dataset), strict=True):
        pages = trained_on.get(os.path.realpath(path)) if path else None
        if path and pages and (page in pages or not page or "" in pages):  # without a page the whole file is meant
            seen.append(path)
    return seen


def _pages(dataset: datasets.Dataset) -> list[str]:
    """Return the page of each row's file, from 1, as text; empty for a file's only image."""
    if "page" not in dataset.column_names:
        return [""] * len(dataset)
    return ["" if page is None else str(page + 1) for page in dataset.with_format(None)["page"]]


def held_out_groups(folder: Path) -> list[str]:
    """The groups that a run was evaluated on, by the `split.csv` in its folder; empty without groups or the file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no table of text.
    """
    return sorted({row["group"] for row in _read_division(folder) if row["side"] == "evaluation"} - {""})


def _read_division(folder: Path) -> list[dict[str, str]]:
    path = folder / SPLIT_FILE
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            return [{name: row.get(name) or "" for name in _HEADER} for row in csv.DictReader(file)]
    except csv.Error as error:
        raise ValueError(f"{path} is no table of image, page, side and group ({error}): remove it") from error


def _are_slices(dataset: datasets.Dataset) -> bool:
    """Return True for slices of volumes, which `eval_share` holds out volume by volume, too."""
    first = dataset.with_format(None)[0]["image"] if len(dataset) else None
    return isinstance(first, str) and is_volume(first)


def _name_below(folder: Path, path: str | None) -> str:
    """The path below a folder, with `/` as separator; the file's own name if it is elsewhere."""
    path = path or ""
    if not os.path.exists(path):  # the name of a file that the data set holds itself
        return path
    below = os.path.relpath(path, folder)
    return Path(path).name if below.startswith("..") else Path(below).as_posix()


def _are_named(groups: list[str], wanted: Sequence[str], where: str) -> np.ndarray:
    known = set(groups)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"split.hold_out has {unknown[0]!r}; expected groups of {where}: {_listed(sorted(known))}")
    if known == set(wanted):
        raise ValueError(f"split.hold_out names every group of {where}; expected some to train on")
    return np.isin(groups, list(wanted))


def _draw_images(num_images: int, share: float, seed: int, where: str) -> np.ndarray:
    """Draw single images; the seed and the number of images decide."""
    if num_images < 2:
        raise ValueError(f"{where} has {num_images} image; expected at least two, one to train on and one held out")
    number = max(1, round(num_images * share))
    if number >= num_images:
        raise ValueError(
            f"data.eval_share is {share} of the {num_images} images in {where}; expected a share that leaves some to "
            "train on"
        )
    drawn = np.zeros(num_images, bool)
    drawn[np.random.default_rng(seed).permutation(num_images)[:number]] = True
    return drawn


def _draw_groups(groups: list[str], share: float, seed: int, where: str) -> np.ndarray:
    """Draw whole groups in random order, each if it brings the number of images nearer to the share; at least one."""
    names, members = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{where} has one group, {printable(names[0])}; expected at least two to hold one out")
    sizes, target, total = np.bincount(members), share * len(groups), 0
    drawn = np.zeros(len(names), bool)
    for group in np.random.default_rng(seed).permutation(len(names)):
        is_nearer = abs(total + sizes[group] - target) < abs(total - target)
        if is_nearer and drawn.sum() < len(names) - 1:
            drawn[group] = True
            total += sizes[group]
    if not drawn.any():
        drawn[sizes.argmin()] = True
    return drawn[members]


def _listed(names: Iterable[Any]) -> str:
    shown = [printable(name) for name in names]
    others = f" and {len(shown) - _NUM_LISTED} more" if len(shown) > _NUM_LISTED else ""
    return ", ".join(shown[:_NUM_LISTED]) + others


__all__ = [
    "GROUP_COLUMN",
    "SPLIT_FILE",
    "add_groups",
    "assign_folds",
    "check_disjoint",
    "count_division",
    "divide",
    "format_division",
    "group_names",
    "held_out_groups",
    "image_paths",
    "seen_images",
    "write_division",
]
