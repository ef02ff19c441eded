"""Sources of images for prediction: files, folders, patterns and lists, or the rows of a data set.

Every image has a name under which its results are filed: its path below the given folder, without suffix.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from glob import has_magic, iglob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import resolve_inside
from .folder_names import walk_folders
from .reader_protocol import ImageSource, Kind, Reader
from .readers import count_pages, gather, image_suffixes, is_listed, kind_of, open_image, without_suffix


class InputItem(NamedTuple):
    """One image.

    Attributes:
        name: name under which its results are filed, with / between folders.
        source: the file, or the row's number.
        page: which image of a file with several, from 0; None for a file's only one.
        files: all files of an image that is stored in several, of which `source` is one.
    """

    name: str
    source: str | int
    page: int | None = None
    files: tuple[str, ...] = ()


def find_inputs(
    inputs: Sequence[str],
    out: Path,
    pages: bool = False,
    skipped: Counter[str] | None = None,
    axis: int | None = None,
    joined: bool = False,
) -> list[InputItem]:
    """Find the images that inputs name, in an order that depends on the inputs alone.

    Args:
        inputs: files; folders, which are searched with all below them, links to folders too, for files of image
            suffixes, except hidden ones; patterns such as `drives/*/left/*.png`, where ** stands for any folders; and
            @FILE, a text file with the path of an image on each line.
        out: folder of the results; files in it are skipped.
        pages: take each image of a file with several as an image of its own, named NAME_p001, NAME_p002, ...
        skipped: counts the files of folders that are not images, by suffix.
        axis: see `ReadOptions`.
        joined: the images become one result, so that several may have one name.

    Returns:
        One item an image; the files of a folder that make up one image are one item, see `readers.gather`. Names keep
        the folders below a folder or below a pattern's fixed part, and those of a list's relative paths; a file that
        was given by itself is filed by its own name.

    Raises:
        OSError: if an input does not exist.
        ValueError: if there is no image, two would be filed under one name or one outside `out`, `out` is a folder of
            images itself, or a list is no text.
    """
    found: dict[str, InputItem] = {}
    for given in inputs:
        number = len(found)
        for item in _items_of(given, out, skipped if skipped is not None else Counter()):
            key = os.path.realpath(str(item.source)) if joined else item.name
            other = found.setdefault(key, item)
            if other != item and not joined:
                raise ValueError(
                    f"{other.source} and {item.source} would both be filed as {item.name}: "
                    f"{_remedy(str(other.source), str(item.source))}"
                )
        if len(found) == number and (has_magic(given) or os.path.isdir(given)):
            raise ValueError(
                f"{given} holds no images ({', '.join(image_suffixes())}), or only ones that were given already or are "
                f"in {out}"
            )
    if not found:
        raise ValueError("no inputs are given; expected files, folders, patterns or @FILE, a list")
    items = sorted(found.values())
    return _expanded(items, axis) if pages else items


def _remedy(first: str, second: str) -> str:
    """Return what to do about two files of one name."""
    folder = os.path.dirname(first)
    if folder != os.path.dirname(second):
        return (
            "give their folder, below which names are kept, a pattern that fits one of them, or predict them into two "
            "folders"
        )
    patterns = (os.path.join(folder, f"*{path[len(without_suffix(path)) :]}") for path in (first, second))
    return f"rename one of them, or predict {' and '.join(patterns)} into two folders"


def _items_of(given: str, out: Path, skipped: Counter[str]) -> Iterator[InputItem]:
    """Yield the images of one input; only a folder's files may make up one image together."""
    files = list(_files(given, out, skipped))
    groups: dict[str, tuple[str, tuple[str, ...]]] = {}
    if os.path.isdir(given) and not given.startswith("@"):
        groups, dropped = _groups(given, [path for _, path in files])
        skipped.update(os.path.splitext(path)[1].lower() for path in dropped)
        taken = dropped.union(*(members for _, members in groups.values()))
        files = [(folder, path) for folder, path in files if path not in taken or path in groups]
    for folder, path in files:
        name, members = groups.get(path, (without_suffix(path), ()))
        yield InputItem(_name(given, folder, name, out), path, None, members)


def _groups(given: str, paths: Sequence[str]) -> tuple[dict[str, tuple[str, tuple[str, ...]]], set[str]]:
    """Return the name and the files of each image of several by its first file, and the files that are not images."""
    folders: dict[str, list[str]] = {}
    for path in sorted(paths):
        folders.setdefault(os.path.dirname(path), []).append(path)
    groups: dict[str, tuple[str, tuple[str, ...]]] = {}
    dropped: set[str] = set()
    for here, inside in folders.items():
        found, others = gather(inside)
        dropped.update(others)
        # The only image of the given folder itself has the folder's name.
        own = os.path.basename(os.path.realpath(given)) if os.path.samefile(here, given) else ""
        for label, members in found.items():
            groups[members[0]] = (os.path.join(here, label or own), members)
    return groups, dropped


def _expanded(items: Sequence[InputItem], axis: int | None) -> list[InputItem]:
    """Return an item for each image of the files.

    Raises:
        ValueError: if a page would be filed under the name of another image.
    """
    expanded: dict[str, InputItem] = {}
    for page in (page for item in items for page in _pages(item, axis)):
        other = expanded.setdefault(page.name, page)
        if other is not page:
            raise ValueError(
                f"{' and '.join(_described(each) for each in (other, page))} would both be filed as {page.name}: "
                "rename one of the files, or predict them into two folders"
            )
    return list(expanded.values())


def _described(item: InputItem) -> str:
    others = f" and {len(item.files) - 1} more files" if len(item.files) > 1 else ""
    return f"{item.source}{others}" if item.page is None else f"{item.source}{others}, page {item.page + 1}"


def _name(given: str, folder: str, path: str, out: Path) -> str:
    """Return the name of a file's results, which stay below the output folder."""
    name = Path(os.path.relpath(path, folder)).as_posix()
    if ".." in Path(name).parts:
        raise ValueError(
            f"{given} matches {path}, which would be filed outside {out}; expected a pattern that stays below "
            f"{folder or '.'}: give {os.path.dirname(os.path.realpath(path))} instead"
        )
    resolve_inside(out, name)
    return name


def _pages(item: InputItem, axis: int | None) -> list[InputItem]:
    """Return an item for each image of a file; a file that cannot be read stays one, and fails when it is its turn."""
    try:
        number = count_pages(ImageSource(str(item.source), files=item.files), axis)
    except (OSError, ValueError):
        return [item]
    if number == 1:  # of a volume the only slice, which is an image then
        return [item._replace(page=0) if kind_of(str(item.source)) == "volume" else item]
    return [InputItem(f"{item.name}_p{page + 1:03d}", item.source, page, item.files) for page in range(number)]


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
        paths = (path for path in iglob(given, recursive=True) if is_listed(path))
        yield from ((folder, path) for path in paths if not os.path.realpath(path).startswith(inside))
    elif os.path.exists(given):
        yield os.path.dirname(given), given
    else:
        raise FileNotFoundError(f"no such file, folder or pattern: {given}")


def _walk(folder: str, out: Path, skipped: Counter[str]) -> Iterator[str]:
    for here, names in walk_folders(Path(folder), without=out):
        for path in (os.path.join(here, name) for name in names):
            if is_listed(path):
                yield path
            else:
                skipped[os.path.splitext(path)[1].lower()] += 1


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
        bands: see `FileSource`.
        window: see `FileSource`.

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
        window: bool = False,
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
        self.axis, self.window = None, window
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
        options = {"ignore_exif": self.ignore_exif, "bands": self.bands, "window": self.window, **options}
        with open_image(source, num_channels, **options) as reader:
            return reader.image()

    def kind(self, item: InputItem) -> Kind:
        """Return `"image"`: rows are read as a whole."""
        return "image"

    def describe(self, item: InputItem) -> str:
        """Return the name of a row in messages."""
        return f"row {item.source} of {self.name}"

    def origin(self, item: InputItem) -> str:
        """Return a unique identifier of the row."""
        return f"row {item.source}, {self._origin}"


class FileSource:
    """The images of `find_inputs`.

    Args:
        inputs: see `find_inputs`.
        out: see `find_inputs`.
        pages: see `find_inputs`.
        ignore_exif: keep images as they are stored, whatever their EXIF orientation.
        bands: numbers, from 1, of the bands that the model takes, in its order; None for all.
        axis: axis, from 0, that volumes are cut along; None for the one of their format.
        window: read 8-bit grey values by the window that files state for display.
        joined: see `find_inputs`.

    Attributes:
        skipped: number of files of the folders that are not images, by suffix.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        out: Path,
        pages: bool = False,
        *,
        ignore_exif: bool = False,
        bands: tuple[int, ...] | None = None,
        axis: int | None = None,
        window: bool = False,
        joined: bool = False,
    ):
        self.skipped: Counter[str] = Counter()
        self.bands, self.ignore_exif, self.axis, self.window = bands, ignore_exif, axis, window
        self._items = find_inputs(inputs, out, pages, self.skipped, axis, joined)

    def items(self) -> list[InputItem]:
        """Return one item an image."""
        return self._items

    def without_items(self) -> "FileSource":
        """Return a copy that reads as this one and lists nothing: small enough to be sent to other processes."""
        copied = copy(self)
        copied._items = []
        return copied

    def read(self, item: InputItem, num_channels: int = 3, **options: Any) -> Any:
        """Return an image: a PIL image or an array (C, H, W), masked where it holds no data.

        Args:
            item: the image.
            num_channels: number of channels that the model takes.
            **options: further fields of `ReadOptions`.
        """
        with self.open(item, num_channels, **options) as reader:
            return reader.image()

    def open(self, item: InputItem, num_channels: int = 3, **options: Any) -> Reader:
        """Open an image by its reader; arguments are those of `read`."""
        options = {"page": item.page, "ignore_exif": self.ignore_exif, "bands": self.bands, **options}
        return open_image(self._source(item), num_channels, axis=self.axis, window=self.window, **options)

    def kind(self, item: InputItem) -> Kind:
        """Return the kind of a file; a slice of a volume is an `"image"`."""
        kind = kind_of(str(item.source))
        return "image" if kind == "volume" and item.page is not None else kind

    def _source(self, item: InputItem) -> ImageSource:
        return ImageSource(str(item.source), files=item.files)

    def describe(self, item: InputItem) -> str:
        """Return the name of an image in messages."""
        return _described(item)

    def origin(self, item: InputItem) -> str:
        """Return a unique identifier of the image, for one of several files with a digest of their names."""
        origin = os.path.abspath(str(item.source))
        if len(item.files) > 1:
            names = "\n".join(os.path.basename(path) for path in item.files).encode(errors="surrogateescape")
            origin += f" and {len(item.files) - 1} more files (names {hashlib.sha256(names).hexdigest()[:8]})"
        return origin if item.page is None else f"{origin}, page {item.page + 1}"


__all__ = ["DatasetSource", "FileSource", "InputItem", "find_inputs"]
