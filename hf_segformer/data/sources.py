"""What there is to label: pictures out of files, folders, patterns and lists, or the rows of a data set.

Every picture gets a name by which its label map is filed: its path below the folder that was given, without suffix.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import has_magic, iglob
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import resolve_inside
from ..geo.rasters import is_raster

SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_RASTERS = (".tif", ".tiff", ".jp2", ".j2k", ".vrt", ".img")


class InputItem(NamedTuple):
    """One picture.

    Attributes:
        name: by which its results are filed, with / between folders.
        source: the file, or the row's number.
    """

    name: str
    source: str | int


def find_pictures(inputs: Sequence[str], out: Path, skipped: Counter[str] | None = None) -> list[InputItem]:
    """All pictures that the inputs name, in an order that depends on them alone.

    Args:
        inputs: files; folders, which are searched with all below them for files of picture suffixes, but for hidden
            ones; patterns such as `drives/*/left/*.png`, where ** stands for any folders; and @FILE, a text file with
            the path of a picture on each line.
        out: folder of the results; what lies in it is passed over.
        skipped: counts the files of folders that are no images, by suffix.

    Returns:
        One item a picture. Names keep the folders below a folder or below a pattern's fixed part, and those of a
        list's relative paths; a file that was given by itself is filed by its own name.

    Raises:
        OSError: if an input does not exist.
        ValueError: if there is no picture, two would be filed under one name, `out` is a folder of pictures itself, or
            a list is no text.
    """
    found: dict[str, str] = {}
    for given in inputs:
        number = len(found)
        for folder, path in _files(given, out, skipped if skipped is not None else Counter()):
            name = Path(os.path.relpath(path, folder)).with_suffix("").as_posix()
            if ".." in Path(name).parts:
                raise ValueError(
                    f"{given} matches {path}, which would be filed outside {out}; expected a pattern that stays below "
                    f"{folder or '.'}: give {os.path.dirname(os.path.realpath(path))} instead"
                )
            resolve_inside(out, name)
            if found.setdefault(name, path) != path:
                raise ValueError(
                    f"{found[name]} and {path} would both be filed as {name}: give their folder, below which names are "
                    "kept, a pattern that fits one of them, or label them into two folders"
                )
        if len(found) == number and (has_magic(given) or os.path.isdir(given)):
            raise ValueError(
                f"{given} holds no pictures ({', '.join(SUFFIXES)}), or only such as were given already or lie in {out}"
            )
    if not found:
        raise ValueError("there is nothing to label: give files, folders, patterns or @FILE, a list")
    return [InputItem(*pair) for pair in sorted(found.items())]


def _files(given: str, out: Path, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    """The folder below which names are kept, and the path, of every picture of one input."""
    if given.startswith("@"):
        yield from _listed(Path(given[1:]))
    elif os.path.isdir(given):
        if os.path.realpath(given) == os.path.realpath(out):
            raise ValueError(f"{out} is the folder of the pictures, but results need one of their own")
        yield from ((given, path) for path in _walk(given, out, skipped))
    elif has_magic(given) and not os.path.exists(given):
        parts = Path(given).parts
        fixed = next(index for index, part in enumerate(parts) if has_magic(part))
        folder, inside = os.path.join(*parts[:fixed], ""), os.path.join(os.path.realpath(out), "")
        paths = (path for path in iglob(given, recursive=True) if path.lower().endswith(SUFFIXES))
        yield from ((folder, path) for path in paths if not os.path.realpath(path).startswith(inside))
    elif os.path.exists(given):
        yield os.path.dirname(given), given
    else:
        raise FileNotFoundError(f"no such file, folder or pattern: {given}")


def _walk(folder: str, out: Path, skipped: Counter[str]) -> Iterator[str]:
    inside = os.path.realpath(out)

    def refuse(error: OSError) -> None:
        raise error

    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [
            name for name in folders if name[0] != "." and os.path.realpath(os.path.join(here, name)) != inside
        ]
        for name in names:
            if name[0] != "." and name.lower().endswith(SUFFIXES):
                yield os.path.join(here, name)
            elif name[0] != ".":
                skipped[os.path.splitext(name)[1].lower()] += 1


def _listed(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(
        encoding="utf-8-sig", errors="surrogateescape"
    ) as file:  # Windows marks UTF-8; names may be no UTF-8
        for line in file:
            if "\0" in line:
                raise ValueError(f"{path} must be a text file with the path of a picture on each line, but it is none")
            if listed := line.strip():
                keeps_folders = not os.path.isabs(listed) and ".." not in Path(listed).parts
                yield "" if keeps_folders else os.path.dirname(listed), listed


class DatasetSource:
    """The pictures of a data set, one a row, filed under their numbers.

    Args:
        name: a folder (of pictures, or one that `save_to_disk` wrote) or a data set of the Hub.
        split: of the data set.
        column: that holds the pictures.

    Raises:
        OSError: if there is no such data set.
        ValueError: if it can not be read, or has no such split or column, or no rows.
    """

    def __init__(self, name: str, split: str = "train", column: str = "image"):
        from .pairing import load_splits, require_own_files, undecoded

        splits = load_splits(name, only=split)
        if split not in splits:
            raise ValueError(f"{name} has no split {split!r}: there are {', '.join(splits)}")
        loaded = splits[split]
        if column not in loaded.column_names:
            raise ValueError(f"{name} has no column {column!r}: there are {', '.join(loaded.column_names)}")
        if not len(loaded):
            raise ValueError(f"{name} has no rows in {split}")
        self.name, self._column = name, column
        self.skipped: Counter[str] = Counter()
        self._origin = f"column {column}, split {split} of {os.path.abspath(name) if os.path.isdir(name) else name}"
        self._rows = require_own_files(undecoded(loaded.select_columns(column)), name)

    def items(self) -> list[InputItem]:
        """One item a row."""
        return [InputItem(f"{index:08d}", index) for index in range(len(self._rows))]

    def read(self, item: InputItem) -> Any:
        """A row's picture, as a predictor takes it."""
        value = self._rows[item.source][self._column]
        if isinstance(value, dict) and "bytes" in value:
            return value["path"] if value["bytes"] is None else BytesIO(value["bytes"])
        return np.asarray(value) if isinstance(value, list) else value

    def is_raster(self, item: InputItem) -> bool:
        """A row is no raster."""
        return False

    def call(self, item: InputItem) -> str:
        """What messages call a row."""
        return f"row {item.source} of {self.name}"

    def origin(self, item: InputItem) -> str:
        """What tells the row from every other one."""
        return f"row {item.source}, {self._origin}"


class FileSource:
    """The pictures of `find_pictures`."""

    def __init__(self, inputs: Sequence[str], out: Path):
        self.skipped: Counter[str] = Counter()
        self._items = find_pictures(inputs, out, self.skipped)

    def items(self) -> list[InputItem]:
        """One item a file."""
        return self._items

    def read(self, item: InputItem) -> Any:
        """A file's path, as a predictor takes it."""
        return item.source

    def is_raster(self, item: InputItem) -> bool:
        """Whether a file is one for `large_images.predict_large_image`."""
        return str(item.source).lower().endswith(_RASTERS) and is_raster(str(item.source))

    def call(self, item: InputItem) -> str:
        """What messages call a file."""
        return str(item.source)

    def origin(self, item: InputItem) -> str:
        """What tells the file from every other one."""
        return os.path.abspath(str(item.source))


__all__ = ["SUFFIXES", "DatasetSource", "FileSource", "InputItem", "find_pictures"]
