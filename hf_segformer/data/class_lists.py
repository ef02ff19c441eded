"""Lists of classes with colours that data sets bring, for masks that hold colours.

    classes.json       {"names": ["road", ...], "colors": [[128, 64, 128], ...], "ignore_colors": [[0, 0, 0]]}
    label_colors.txt   128 64 128 <tab> road          (CamVid)
    class_dict.csv     name,r,g,b / road,128,64,128

Classes called void, unlabelled or ignore are ignored.
"""

import csv
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..config import check_palette, check_unique
from ..files import printable, read_json

_VOID = frozenset(("void", "unlabelled", "unlabeled", "ignore", "ignored"))
_LINE = re.compile(r"\s*(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\S.*?)\s*")
_LARGEST = 2**20  # bytes


class ClassList(NamedTuple):
    """Names and colours of classes.

    Attributes:
        file: name of the file that they come from.
        names: of the K classes.
        colors: [red, green, blue] of each in the masks; two for a single class, without and with it.
        ignore_colors: colours to ignore.
    """

    file: str
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    ignore_colors: tuple[tuple[int, int, int], ...]


def read_class_list(root: Path) -> ClassList | None:
    """Read the list of classes with colours in a folder; None without one.

    Raises:
        ValueError: if a file does not have its format, or there are two.
        OSError: if it cannot be read.
    """
    found = [(path, read) for name, read in _READERS.items() if (path := root / name).is_file()]
    lists = [(path, content) for path, read in found if (content := read(check_list_size(path))) is not None]
    if len(lists) > 1:
        raise ValueError(f"{lists[0][0]} and {lists[1][0].name} both list colours of classes; expected one: remove one")
    if not lists:
        return None
    path, (names, colors, ignored) = lists[0]
    check_unique(str(path), names)
    check_palette(str(path), colors, 2 if len(names) == 1 else len(names))
    check_palette(str(path), ignored, len(ignored))
    tuples = [tuple((red, green, blue) for red, green, blue in each) for each in (colors, ignored)]
    check_unique(str(path), [*tuples[0], *tuples[1]])
    return ClassList(path.name, tuple(printable(name) for name in names), *tuples)


_Content = tuple[list[str], list[list[int]], list[list[int]]]


def check_list_size(path: Path) -> Path:
    """Return the path of a list of classes; raise ValueError if it is larger than any such list."""
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} has more than {_LARGEST:,} bytes; expected a list of classes")
    return path


def _read_json(path: Path) -> _Content | None:
    content = read_json(path)
    colors = content.get("colors", content.get("palette"))
    if not colors:
        return None
    names: Any = content.get("names")
    ignored = content.get("ignore_colors", [])
    parts = [names, colors, ignored]
    is_valid = all(isinstance(part, list) for part in parts) and all(isinstance(name, str) for name in names)
    if not is_valid or not all(isinstance(color, list) for color in (*colors, *ignored)):
        raise ValueError(
            f'{path} does not list classes; expected {{"names": [...], "colors": [[red, green, blue], ...]}}'
        )
    if len(names) == 1 and len(colors) == 1:  # a palette of one colour is for the display
        return None
    return names, colors, ignored


def _read_text(path: Path) -> _Content:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    matches = [_LINE.fullmatch(line) for line in lines]
    for line, match in zip(lines, matches, strict=True):
        if match is None:
            raise ValueError(f"{path} has the line {line!r:.60}; expected red, green, blue and a name, 128 64 128 road")
    return _divide([(match[4], [int(match[number]) for number in (1, 2, 3)]) for match in matches if match])


def _read_csv(path: Path) -> _Content:
    rows = [row for row in csv.reader(path.read_text(encoding="utf-8", errors="replace").splitlines()) if row]
    try:
        entries = [(row[0].strip(), [int(value) for value in row[1:4]]) for row in rows[1:]]
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected a header, and lines of name,red,green,blue") from error
    return _divide(entries)


def _divide(entries: list[tuple[str, list[int]]]) -> _Content:
    """Separate the classes from those to ignore."""
    counted = [entry for entry in entries if entry[0].lower() not in _VOID]
    ignored = [color for name, color in entries if name.lower() in _VOID]
    return [name for name, _ in counted], [color for _, color in counted], ignored


_READERS = {"classes.json": _read_json, "label_colors.txt": _read_text, "class_dict.csv": _read_csv}

__all__ = ["ClassList", "check_list_size", "read_class_list"]
