"""Roles of folders by their names: the images, the masks and the splits of a data set.

A path such as `train_masks` or `masks/train` becomes a template with `{split}` in place of the split's name, as
`DataConfig.image_folder` and `mask_folder` have it.
"""

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ..config import check_unique
from ..files import IMAGE_SUFFIXES

TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("val", "valid", "validation", "test", "testing", "eval", "evaluation", "dev")
_IMAGES = "image images img imgs input inputs photo photos rgb frame frames tile tiles sat"
_MASKS = (
    "mask masks label labels annot annots annotation annotations ann anns gt gts groundtruth truth seg segs "
    "segmentation segmentations segmentationmaps target targets lbl"
)
IMAGE_WORDS, MASK_WORDS = frozenset(_IMAGES.split()), frozenset(_MASKS.split())
_MOST_FILES, _MOST_LEVELS = 2_000_000, 5
_SPLIT = re.compile(rf"(?P<split>{'|'.join(sorted(TRAIN_SPLITS + EVAL_SPLITS, key=len, reverse=True))})", re.IGNORECASE)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


class Template(NamedTuple):
    """Folders of one role, which differ in the split's name.

    Attributes:
        pattern: below the root, with `{split}` where the name of a split is; `"."` is the root.
        is_image: a word of the path says images.
        is_mask: a word of the path says masks.
    """

    pattern: str
    is_image: bool
    is_mask: bool


def parse_folder(relative: str) -> tuple[Template, str | None, str]:
    """Find role and split in the path of a folder.

    Args:
        relative: the path below the root, with `/`.

    Returns:
        its template, its split or None, and the path up to the last part that says something: files further below
        belong to it.

    Examples:
        >>> from hf_segformer.data.folder_names import parse_folder
        >>> parse_folder("train_masks/film1")
        (Template(pattern='{split}_masks', is_image=False, is_mask=True), 'train', 'train_masks')
        >>> parse_folder("valannot")[0].pattern, parse_folder("images/val")[1]
        ('{split}annot', 'val')
    """
    parts = [] if relative in ("", ".") else relative.split("/")
    pattern, split, words, last = [], None, set[str](), 0
    for number, part in enumerate(parts, 1):
        found, rest = (None, part) if split else _find_split(part)
        split = split or found
        roles = _words(part.replace(found, " ", 1) if found else part) & (IMAGE_WORDS | MASK_WORDS)
        words |= roles
        last = number if found or roles else last
        pattern.append(rest)
    template = "/".join(pattern[:last]) or "."
    is_mask = bool(words & MASK_WORDS)
    return Template(template, bool(words & IMAGE_WORDS) and not is_mask, is_mask), split, "/".join(parts[:last])


def _find_split(part: str) -> tuple[str | None, str]:
    """Return the split that a folder's name has, alone or beside a word of a role, and the name with `{split}`."""
    for match in _SPLIT.finditer(part):
        before, after = part[: match.start()], part[match.end() :]
        is_word = not (before[-1:].isalpha() or after[:1].isalpha())
        beside = {before.lower(), after.lower()} - {""}
        if is_word or beside <= IMAGE_WORDS | MASK_WORDS or after[:1].isupper():
            year = re.match(r"\d*", after)
            end = match.end() + (year.end() if year else 0)
            return part[match.start() : end], f"{before}{{split}}{part[end:]}"
    return None, part


def _words(part: str) -> set[str]:
    words = [word.lower() for word in _WORD.findall(part)]
    return {*words, *("".join(pair) for pair in pairwise(words))}


def is_train(split: str) -> bool:
    """Return True for the name of a training split, such as `train2017`."""
    return split.rstrip("0123456789").lower() in TRAIN_SPLITS


def list_images(root: Path) -> dict[str, list[str]]:
    """List the files below a folder that are images or masks by their names, hidden ones apart.

    Returns:
        for each folder with such files, as a path below `root`, their names in order.

    Raises:
        ValueError: if there are more files than a data set of this kind has.
    """
    found: dict[str, list[str]] = {}
    number = 0
    for here, names in walk_folders(root, _MOST_LEVELS):
        images = sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
        number += len(names)
        if number > _MOST_FILES:
            raise ValueError(f"{root} has more than {_MOST_FILES:,} files; expected the folder of one data set")
        if images:
            found[here.relative_to(root).as_posix()] = images
    return found


def composed(name: str) -> str:
    """Return a name in the Unicode form that other systems than macOS store it in, by which names are compared.

    Examples:
        >>> from hf_segformer.data.folder_names import composed
        >>> composed("u\N{COMBINING DIAERESIS}") == "\N{LATIN SMALL LETTER U WITH DIAERESIS}"
        True
    """
    return unicodedata.normalize("NFC", name)


def choose_listed(path: Path, files: Mapping[str, str | Path], folder: Path, kind: str) -> list[str]:
    """Return the names that a text file lists, one a line, as Pascal VOC has them.

    A line is the name by which images and masks are paired, or a file's name below the folder; other words may follow.

    Args:
        path: the text file.
        files: files of the folder, by their names.
        folder: the folder.
        kind: what messages call a file.

    Raises:
        ValueError: if it lists none, one twice or one that is not there, or is no text.
        OSError: if it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows marks UTF-8
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file; expected the name of an {kind} in each line") from error
    names_of = {composed(Path(file).relative_to(folder).as_posix()): name for name, file in files.items()} | {
        composed(name): name for name in files
    }
    chosen: list[str] = []
    missing: list[str] = []
    for line in (composed(line.strip()) for line in lines if line.strip()):
        first = line.split()[0]
        name = names_of.get(line, names_of.get(first))
        chosen.append(name or first)
        if name is None:
            missing.append(first)
    if missing:
        rest = f" ({len(missing)} such lines)" if len(missing) > 1 else ""
        raise ValueError(f"{path} lists {missing[0]}, which is no {kind} in {folder}{rest}")
    if not chosen:
        raise ValueError(f"{path} names no {kind}; expected one in each line")
    check_unique(str(path), chosen)
    return chosen


def walk_folders(
    root: Path, most_levels: int | None = None, without: Path | None = None
) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and those below it, each with the names of its files, in order and hidden ones apart.

    Links to folders are followed, except to a folder that the path of the link leads through.

    Args:
        root: the folder.
        most_levels: number of levels below it to go down; None for all.
        without: a folder that is left out.

    Raises:
        OSError: if a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    left_out = os.path.realpath(without) if without is not None else None
    chains: dict[str, tuple[str, ...]] = {
        str(root): (os.path.realpath(root),)
    }  # real paths of a folder, and of those that lead to it
    for here, below, names in os.walk(root, onerror=refuse, followlinks=True):
        chain, entered = chains.pop(here), []
        for name in sorted(below) if most_levels is None or len(chain) <= most_levels else ():
            path = os.path.join(here, name)
            real = os.path.realpath(path)
            if not name.startswith(".") and real not in chain and real != left_out:
                chains[path] = (*chain, real)
                entered.append(name)
        below[:] = entered
        yield Path(here), sorted(name for name in names if not name.startswith("."))


__all__ = [
    "EVAL_SPLITS",
    "IMAGE_WORDS",
    "MASK_WORDS",
    "TRAIN_SPLITS",
    "Template",
    "choose_listed",
    "composed",
    "is_train",
    "list_images",
    "parse_folder",
    "walk_folders",
]
