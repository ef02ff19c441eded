"""Prefixes and suffixes of the names of images and masks, beside the part that pairs them.

A stem is a name without its type, as a path below its folder: `film1/img_001`. Prefixes and suffixes are of the file's
own name; a suffix may be all of it, where every image has a folder of its own: `001/image`, `001/mask`.
"""

import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator
from itertools import islice, product
from typing import NamedTuple

from .folder_names import IMAGE_WORDS, MASK_WORDS

_LEAST_MATCHED = 0.5  # share of the smaller side that has partners; the others are named when the data are opened
_NUM_TRIED = 50
_LAST_WORDS = re.compile(r"[_\-. ]+([A-Za-z0-9]+)")  # a separator and the word after it
_FIRST_WORDS = re.compile(r"[^\W\d_]+[_\-. ]*|\d+[_\-. ]+")  # letters, or digits and a separator


class NameParts(NamedTuple):
    """Beginnings and endings of names, as the fields of `DataConfig`."""

    image_prefix: str = ""
    image_suffix: str = ""
    mask_prefix: str = ""
    mask_suffix: str = ""

    def tables(self) -> dict[str, str]:
        """Return those that are not empty."""
        return {name: value for name, value in self._asdict().items() if value}


def strip(stem: str, prefix: str, suffix: str) -> str | None:
    """Return what is between prefix and suffix, with the folder; None if the name does not have them.

    Examples:
        >>> from hf_segformer.data.name_parts import strip
        >>> strip("film1/mask_07", "mask_", ""), strip("07/image", "", "image"), strip("07", "mask_", "")
        ('film1/07', '07', None)
    """
    folder, slash, name = stem.rpartition("/")
    if len(name) < len(prefix) + len(suffix) or not (name.startswith(prefix) and name.endswith(suffix)):
        return None
    rest = name[len(prefix) : len(name) - len(suffix)]
    return f"{folder}{slash}{rest}" if rest else folder or None


def match_folders(images: Collection[str], masks: Collection[str]) -> NameParts | None:
    """Pair the stems of two folders: equal, or with a beginning or an ending that all of a folder share.

    Examples:
        >>> from hf_segformer.data.name_parts import match_folders
        >>> match_folders(["img_1", "img_2"], ["mask_1", "mask_2"])
        NameParts(image_prefix='img_', image_suffix='', mask_prefix='mask_', mask_suffix='')
    """
    starts = [("", *common_beginnings(stems)) for stems in (images, masks)]
    ends = [("", *common_endings(stems)) for stems in (images, masks)]
    for image_start, mask_start in product(*starts):
        for image_end, mask_end in product(*ends):
            found = NameParts(image_start, image_end, mask_start, mask_end)
            if is_match(_strip_all(images, found[:2]), _strip_all(masks, found[2:])):
                return found
    return None


def explain_difference(images: Collection[str], masks: Collection[str]) -> str:
    """Say by which settings stems of two folders would pair, none of which does; empty where nothing is seen.

    Examples:
        >>> from hf_segformer.data.name_parts import explain_difference
        >>> explain_difference(["1", "2"], ["mask_1", "mask_2"])
        "Names of masks begin with 'mask_': set data.mask_prefix=mask_, or --mask-prefix mask_"
    """
    if parts := match_folders(images, masks) or _match_endings(images, masks):
        said, keys, options = [], [], []
        for name, value in parts.tables().items():
            side, end = name.split("_")
            said.append(f"names of {side}s {'begin with' if end == 'prefix' else 'end in'} {value!r}")
            keys.append(f"data.{name}={quoted(value)}")
            options.append(f"--{name.replace('_', '-')} {quoted(value)}")
        text = " and ".join(said)
        return f"{text[:1].upper()}{text[1:]}: set {' '.join(keys)}, or {' '.join(options)}"
    if not {stem.casefold() for stem in images}.isdisjoint(stem.casefold() for stem in masks):
        return "Names of masks and images differ in upper and lower case: rename them"
    return ""


def quoted(value: str) -> str:
    """Return a text as a value on a command line, where it needs quotes."""
    return (
        value if value and re.fullmatch(r"[\w\-./{}]+", value) else shlex.quote(json.dumps(value, ensure_ascii=False))
    )


def _match_endings(images: Collection[str], masks: Collection[str]) -> NameParts | None:
    """Pair stems by the shortest ending that all of one side have more, whether it begins with a separator or not."""
    for stems, longer in ((images, masks), (masks, images)):
        endings = [
            {name[len(stem) :] for name in longer if name.startswith(stem)} for stem in islice(stems, _NUM_TRIED)
        ]
        shared = set.intersection(*endings) - {""} if endings else set()
        if ending := min(shared, key=len, default=""):
            return NameParts(mask_suffix=ending) if longer is masks else NameParts(image_suffix=ending)
    return None


def match_one_folder(files: Collection[tuple[str, str]], mask_types: Collection[str]) -> list[NameParts]:
    """Pair files of one folder by words for masks at an end of their names, one entry for each word that pairs.

    Args:
        files: stem and type, such as `.jpg`, of each.
        mask_types: types that masks may have.

    Examples:
        >>> from hf_segformer.data.name_parts import match_one_folder
        >>> match_one_folder([("1", ".jpg"), ("1_mask", ".png"), ("2", ".jpg"), ("2_mask", ".png")], [".png"])
        [NameParts(image_prefix='', image_suffix='', mask_prefix='', mask_suffix='_mask')]
    """
    masks = [stem for stem, kind in files if kind in mask_types]
    plain = [stem for stem, _ in files if not any(suffix for _, suffix in _parts_by_words(stem, MASK_WORDS))]
    parts = sorted({part for stem in masks for part in _parts_by_words(stem, MASK_WORDS)})
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for part in parts:
        bases = _strip_all(masks, part)
        others = [stem for stem in plain if strip(stem, *part) is None]
        for own in dict.fromkeys((("", ""), *_common_parts(others), *_word_parts(others))):
            if is_match(_strip_all(others, own), bases):
                found[part] = own
                break
    of_masks = {*found, *(part for part in parts if part[1])}
    types = {kind for stem, kind in files if all(strip(stem, *part) is None for part in of_masks)}
    result = []
    for (prefix, suffix), own in found.items():
        # Where other words are about, the type keeps their files from being taken for images.
        is_alone = any(own) or len(of_masks) == 1 or len(types) != 1
        result.append(NameParts(own[0], own[1] if is_alone else next(iter(types)), prefix, suffix))
    return result


def common_beginnings(stems: Collection[str]) -> list[str]:
    """Return the beginnings, up to the end of a word, that the names of all stems share, the shortest first.

    Examples:
        >>> from hf_segformer.data.name_parts import common_beginnings
        >>> common_beginnings(["gt_img_01", "film/gt_img_02"]), common_beginnings(["mask1", "mask2"])
        (['gt_', 'gt_img_'], ['mask'])
    """
    names = [stem.rpartition("/")[2] for stem in stems]
    if len(names) < 2:
        return []
    first, last = min(names), max(names)
    length = next((at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    shared, found, end = first[:length], list[str](), 0
    while match := _FIRST_WORDS.match(shared, end):
        end = match.end()
        if all(len(name) > end and not (name[end - 1].isalpha() and name[end].isalpha()) for name in names):
            found.append(shared[:end])
    return found


def common_endings(stems: Collection[str]) -> list[str]:
    """Return the longest ending, from a separator on or all of the name, that all stems share; empty without one."""
    if len(stems) < 2:
        return []
    first, *others = stems
    name = first.rpartition("/")[2]
    starts = [match.start() for match in _LAST_WORDS.finditer(name) if match.start() > 0]
    endings = [*([f"/{name}"] if name != first else ()), *(name[start:] for start in starts)]
    return [each.lstrip("/") for each in endings if all(stem.endswith(each) for stem in others)][:1]


def _common_parts(stems: Collection[str]) -> Iterator[tuple[str, str]]:
    yield from (("", ending) for ending in common_endings(stems))
    yield from ((beginning, "") for beginning in common_beginnings(stems))


def _word_parts(stems: Iterable[str]) -> list[tuple[str, str]]:
    return sorted({part for stem in stems for part in _parts_by_words(stem, IMAGE_WORDS)})


def _parts_by_words(stem: str, roles: frozenset[str]) -> set[tuple[str, str]]:
    """Return (prefix, suffix) of a name by words of a role: the first, the last, and all of it in its own folder."""
    folder, _, name = stem.rpartition("/")
    last = [match for match in _LAST_WORDS.finditer(name) if match[1].lower() in roles and match.start() > 0]
    parts = {("", name[last[-1].start() :])} if last else set()
    first = re.match(r"([A-Za-z]+)[_\-. ]*", name)
    if first and first[1].lower() in roles:
        parts |= {(first[0], "")} if first.end() < len(name) else set()
        parts |= {("", name)} if folder else set()
    return parts


def _strip_all(stems: Iterable[str], part: tuple[str, ...]) -> set[str]:
    return {each for stem in stems if (each := strip(stem, *part)) is not None} if any(part) else set(stems)


def is_match(images: set[str], masks: set[str]) -> bool:
    """Return True if at least half of the smaller set is in the other one."""
    least = min(len(images), len(masks))
    return least > 0 and len(images & masks) >= max(1, _LEAST_MATCHED * least)


__all__ = [
    "NameParts",
    "common_beginnings",
    "common_endings",
    "explain_difference",
    "is_match",
    "match_folders",
    "match_one_folder",
    "quoted",
    "strip",
]
