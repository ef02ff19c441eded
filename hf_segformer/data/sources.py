"""Sources of images for prediction: files, folders, patterns and lists, or the rows of a data set.

Every image has a name under which its results are filed: its path below the given folder, without suffix.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import has_magic, iglob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import IMAGE_SUFFIXES, resolve_inside
from .readers import ImageSource, Kind, count_pages, kind_of, open_image


class InputItem(NamedTuple):
    """One image.

    Attributes:
        name: name under which its results are filed, with / between folders.
        source: the file, or the row's number.
        page: which image of a file with several, from 0; None for a file's only one.
    """

    name: str
    source: str | int
    page: int | None = None


def find_inputs(
    inputs: Sequence[str], out: Path, pages: bool = False, skipped: Counter[str] | None = None
) -> list[InputItem]:
    """Find the images that inputs name, in an order that depends on the inputs alone.

    Args:
        inputs: files; folders, which are searched with all below them for files of image suffixes, but for hidden
            ones; patterns such as `drives/*/left/*.png`, where ** stands for any folders; and @FILE, a text file with
            the path of an image on each line.
        out: folder of the results; files in it are skipped.
        pages: take each image of a file with several as an image of its own, named NAME_p001, NAME_p002, ...
        skipped: counts the files of folders that are no images, by suffix.

    Returns:
        One item an image. Names keep the folders below a folder or below a pattern's fixed part, and those of a list's
        relative paths; a file that was given by itself is filed by its own name.

    Raises:
        OSError: if an input does not exist.
        ValueError: if there is no image, two would be filed under one name or one outside `out`, `out` is a folder of
            images itself, or a list is no text.
    """
    found: dict[str, str] = {}
    for given in inputs:
        number = len(found)
        for folder, path in _files(given, out, skipped if skipped is not None else Counter()):
            name = _name(given, folder, path, out)
            if found.setdefault(name, path) != path:
                raise ValueError(
                    f"{found[name]} and {path} would both be filed as {name}: give their folder, below which names are "
                    "kept, a pattern that fits one of them, or predict them into two folders"
                )
        if len(found) == number and (has_magic(given) or os.path.isdir(given)):
            raise ValueError(
                f"{given} holds no images ({', '.join(IMAGE_SUFFIXES)}), or only ones that were given already or are "
                f"in {out}"
            )
    if not found:
        raise ValueError("no inputs are given; expected files, folders, patterns or @FILE, a list")
    items = [InputItem(*pair) for pair in sorted(found.items())]
    return [page for item in items for page in _pages(item)] if pages else items


def _name(given: str, folder: str, path: str, out: Path) -> str:
    """Return the name of a file's results, which stay below the output folder."""
    name = Path(os.path.relpath(path, folder)).with_suffix("").as_posix()
    if ".." in Path(name).parts:
        raise ValueError(
            f"{given} matches {path}, which would be filed outside {out}; expected a pattern that stays below "
            f"{folder or '.'}: give {os.path.dirname(os.path.realpath(path))} instead"
        )
    resolve_inside(out, name)
    return name


def _pages(item: InputItem) -> list[InputItem]:
    """Return an item for each image of a file; a file that cannot be read stays one, and fails when it is its turn."""
    try:
        number = count_pages(str(item.source))
    except (OSError, ValueError):
        return [item]
    if number == 1:
        return [item]
    return [InputItem(f"{item.name}_p{page + 1:03d}", item.source, page) for page in range(number)]


def _files(given: str, out: Path, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield the folder below which names are kept, and the path, of every image of one input."""
    if given.startswith("@"):
        yield from _listed(Path(given[1:]))
    elif os.path.isdir(given):
        if os.path.realpath(given) == os.path.realpath(out):
            raise ValueError(f"{out} is the folder of the images; expected one of its own for results")
        yield from ((given, path) for path in _walk(given, out, skipped))
    elif has_magic(given) and not os.path.exists(given):
        parts = Path(given).parts
        fixed = next(index for index, part in enumerate(parts) if has_magic(part))
        folder, inside = os.path.join(*parts[:fixed], ""), os.path.join(os.path.realpath(out), "")
        paths = (path for path in iglob(given, recursive=True) if path.lower().endswith(IMAGE_SUFFIXES))
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
            if name[0] != "." and name.lower().endswith(IMAGE_SUFFIXES):
                yield os.path.join(here, name)
            elif name[0] != ".":
                skipped[os.path.splitext(name)[1].lower()] += 1


def _listed(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(
        encoding="utf-8-sig", errors="surrogateescape"
    ) as file:  # Windows marks UTF-8; names may be no UTF-8
        for line in file:
            if "\0" in line:
                raise ValueError(f"{path} is no text file; expected the path of an image on each line")
            if listed := line.strip():
                keeps_folders = not os.path.isabs(listed) and ".." not in Path(listed).parts
                yield "" if keeps_folders else os.path.dirname(listed), listed


class DatasetSource:
    """The images of a data set, one a row, filed under their numbers.

    Args:
        name: a folder (of images, or one that `save_to_disk` wrote) or a data set of the Hub.
        split: of the data set.
        column: of the images.
        ignore_exif: keep images as they are stored, whatever their EXIF orientation.

    Raises:
        OSError: if there is no such data set.
        ValueError: if it cannot be read, or has no such split or column, or no rows.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        column: str = "image",
        *,
        ignore_exif: bool = False,
        bands: tuple[int, ...] | None = None,
    ):
        from .pairing import load_splits, require_own_files, undecoded

        splits = load_splits(name, only=split)
        if split not in splits:
            raise ValueError(f"{name} has no split {split!r}; expected one of {', '.join(splits)}")
        loaded = splits[split]
        if column not in loaded.column_names:
            raise ValueError(f"{name} has no column {column!r}; expected one of {', '.join(loaded.column_names)}")
        if not len(loaded):
            raise ValueError(f"{name} has no rows in {split}")
        self.name, self.bands, self._column, self.ignore_exif = name, bands, column, ignore_exif
        self.skipped: Counter[str] = Counter()
        self._origin = f"column {column}, split {split} of {os.path.abspath(name) if os.path.isdir(name) else name}"
        self._rows = require_own_files(undecoded(loaded.select_columns(column)), name)

    def items(self) -> list[InputItem]:
        """Return one item a row."""
        return [InputItem(f"{index:08d}", index) for index in range(len(self._rows))]

    def read(self, item: InputItem, num_channels: int = 3, **options: Any) -> Any:
        """Return a row's image: a PIL image or an array (C, H, W), masked where it holds no data.

        Args:
            item: the row.
            num_channels: number of channels that the model takes.
            **options: further fields of `ReadOptions`.
        """
        value = self._rows[item.source][self._column]
        if not isinstance(value, str | dict):
            return np.asarray(value) if isinstance(value, list) else value
        source = ImageSource(value, self.describe(item))
        options = {"ignore_exif": self.ignore_exif, "bands": self.bands, **options}
        with open_image(source, num_channels, **options) as reader:
            return reader.image()

    def kind(self, item: InputItem) -> Kind:
        """Return `"image"`: rows are read as a whole."""
        return "image"

    def describe(self, item: InputItem) -> str:
        """Return the name of a row in messages."""
        return f"row {item.source} of {self.name}"

    def origin(self, item: InputItem) -> str:
        """Return the text that tells the row from every other one."""
        return f"row {item.source}, {self._origin}"


class FileSource:
    """The images of `find_inputs`.

    Args:
        inputs: see `find_inputs`.
        out: see `find_inputs`.
        pages: see `find_inputs`.
        ignore_exif: keep images as they are stored, whatever their EXIF orientation.
        bands: numbers, from 1, of the bands that the model takes, in its order; None for all.

    Attributes:
        skipped: number of files of the folders that are no images, by suffix.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        out: Path,
        pages: bool = False,
        *,
        ignore_exif: bool = False,
        bands: tuple[int, ...] | None = None,
    ):
        self.skipped: Counter[str] = Counter()
        self.bands = bands
        self._items, self.ignore_exif = find_inputs(inputs, out, pages, self.skipped), ignore_exif

    def items(self) -> list[InputItem]:
        """Return one item an image."""
        return self._items

    def read(self, item: InputItem, num_channels: int = 3, **options: Any) -> Any:
        """Return an image: a PIL image or an array (C, H, W), masked where it holds no data.

        Args:
            item: the image.
            num_channels: number of channels that the model takes.
            **options: further fields of `ReadOptions`.
        """
        options = {"page": item.page, "ignore_exif": self.ignore_exif, "bands": self.bands, **options}
        with open_image(str(item.source), num_channels, **options) as reader:
            return reader.image()

    def kind(self, item: InputItem) -> Kind:
        """Return the kind of a file: `"raster"` for `inference.large_image`, else `"image"`."""
        return kind_of(str(item.source))

    def describe(self, item: InputItem) -> str:
        """Return the name of an image in messages."""
        return str(item.source) if item.page is None else f"{item.source}, page {item.page + 1}"

    def origin(self, item: InputItem) -> str:
        """Return the text that tells the image from every other one."""
        path = os.path.abspath(str(item.source))
        return path if item.page is None else f"{path}, page {item.page + 1}"


__all__ = ["DatasetSource", "FileSource", "InputItem", "find_inputs"]
