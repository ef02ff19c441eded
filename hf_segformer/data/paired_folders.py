"""Search for folders, or names in one folder, that pair images with masks in any of the usual arrangements.

images/a.jpg, masks/a.png           images/train/a.jpg, masks/train/a.png     train/images/a.jpg, train/masks/a.png
train/a.jpg, trainannot/a.png       train_images/a.jpg, train_masks/a.png     a_sat.jpg, a_mask.png
a.jpg, a.png
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..files import IMAGE_SUFFIXES, MASK_SUFFIXES
from .folder_names import MASK_WORDS, Template, is_train, list_images, parse_folder

_LEAST_MATCHED = 0.5  # share of the smaller side that has partners; the others are named when the data are opened
_LOSSY = (".jpg", ".jpeg", ".jfif")
# A separator, or a change of case, and the words after it.
_LAST_WORDS = re.compile(r"[_\-. ]+([A-Za-z0-9]+)")


class Pairing(NamedTuple):
    """One way to pair images with masks, by the fields of `DataConfig`.

    Attributes:
        image_folder: template of the images' folders below the root.
        mask_folder: the masks'.
        image_suffix: how the names of images end.
        mask_suffix: how the names of masks end.
        splits: names of the splits for which both exist; empty without any.
    """

    image_folder: str
    mask_folder: str
    image_suffix: str
    mask_suffix: str
    splits: tuple[str, ...]

    def tables(self) -> dict[str, Any]:
        """Return the fields of `DataConfig` that differ from its defaults."""
        folders = {"image_folder": self.image_folder, "mask_folder": self.mask_folder}
        suffixes = {"image_suffix": self.image_suffix, "mask_suffix": self.mask_suffix}
        return {"source": "folders"} | folders | {name: value for name, value in suffixes.items() if value}


_Files = dict[Template, dict[str | None, dict[str, list[str]]]]  # template -> split -> folder -> names below it


def find_pairings(root: Path) -> list[Pairing]:
    """Find all ways in which a folder's images pair with masks.

    Raises:
        ValueError: if there are too many files.
        OSError: if the folder cannot be read.
    """
    files: _Files = defaultdict(dict)
    for folder, names in list_images(root).items():
        template, split, base = parse_folder(folder)
        below = Path(folder).relative_to(base or ".").as_posix()
        inside = [name if below == "." else f"{below}/{name}" for name in names]
        files[template].setdefault(split, {}).setdefault(base, []).extend(inside)
    masks = [template for template in files if template.is_mask]
    found: list[Pairing] = []
    for mask in masks:
        named = [template for template in files if template.is_image]
        others = [template for template in files if not (template.is_image or template.is_mask)]
        # Folders that are called images go before those without a name for their role.
        found += _pair_all(files, product(named, [mask])) or _pair_all(files, product(others, [mask]))
    if not found:
        found = _pair_all(files, [(template, template) for template in files if not template.is_mask])
    return found


def _pair_all(files: _Files, candidates: Iterable[tuple[Template, Template]]) -> list[Pairing]:
    return [pairing for image, mask in candidates for pairing in _pair(image, mask, files[image], files[mask])]


def _pair(image: Template, mask: Template, images: dict, masks: dict) -> Iterator[Pairing]:
    """Yield the ways to pair two templates, which hold in all splits that both have."""
    splits = [split for split in images if split in masks]
    endings = [_match(_names(images[split]), _names(masks[split]), image == mask) for split in splits]
    for pair in dict.fromkeys(each for found in endings for each in found):
        matched = tuple(split for split, found in zip(splits, endings, strict=True) if pair in found)
        named = tuple(split for split in matched if split is not None)
        if None in matched:
            yield Pairing(image.pattern, mask.pattern, *pair, ())
        elif any(map(is_train, named)):
            yield Pairing(image.pattern, mask.pattern, *pair, named)


def _names(folders: dict[str, list[str]]) -> list[str]:
    return [name for names in folders.values() for name in names]


def _match(images: list[str], masks: list[str], is_one: bool) -> list[tuple[str, str]]:
    """Return the (image suffix, mask suffix) by which most of the names pair; empty if there is none."""
    masks = [name for name in masks if name.lower().endswith(MASK_SUFFIXES)]
    found = _match_words(images, masks) if is_one else _match_folders(images, masks)
    return found or (_match_types(images) if is_one else [])


def _match_folders(images: list[str], masks: list[str]) -> list[tuple[str, str]]:
    """Pair the names of two folders: equal, or with one ending that all names of a folder share."""
    stems, mask_stems = _stems(images), _stems(masks)
    for ends in product(("", _common_ending(stems)), ("", _common_ending(mask_stems))):
        if _is_match(_without(stems, ends[0]), _without(mask_stems, ends[1])):
            return [ends]
    return []


def _match_words(images: list[str], masks: list[str]) -> list[tuple[str, str]]:
    """Pair names of one folder by the ending of the masks, such as `_mask`, one entry for each that pairs."""
    endings = {stem: _mask_ending(stem) for stem in _stems(masks)}
    plain = [name for name in images if not _mask_ending(_stem(name))]
    shared, types = _common_ending(_stems(plain)), {Path(name).suffix.lower() for name in plain}
    found = []
    for ending in sorted({*endings.values()} - {""}):
        bases = {stem[: -len(ending)] for stem, own in endings.items() if own == ending}
        for own in dict.fromkeys(("", shared)):
            if _is_match(_without(_stems(plain), own), bases):
                # Where other endings are about, the type keeps their files from being taken for images.
                is_alone = own or len({*endings.values()} - {""}) == 1 or len(types) > 1
                found.append((own if is_alone else next(iter(types)), ending))
                break
    return found


def _match_types(names: list[str]) -> list[tuple[str, str]]:
    """Pair names of one folder that are equal except for their type; the lossless one is the mask."""
    types: dict[str, set[str]] = defaultdict(set)
    for name in names:
        types[Path(name).suffix.lower()].add(_stem(name))
    pairs = [
        (image, mask) for image, mask in product(sorted(types), sorted(types)) if image != mask and mask not in _LOSSY
    ]
    found = [pair for pair in pairs if _is_match(types[pair[0]], types[pair[1]])]
    return [pair for pair in found if pair[0] in _LOSSY] or found


def _stem(name: str) -> str:
    suffix = next(suffix for suffix in (*IMAGE_SUFFIXES, Path(name).suffix) if name.lower().endswith(suffix))
    return name[: -len(suffix)]


def _stems(names: Iterable[str]) -> set[str]:
    return {_stem(name) for name in names}


def _without(stems: set[str], ending: str) -> set[str]:
    return {stem[: -len(ending)] for stem in stems if stem.endswith(ending)} if ending else stems


def _common_ending(stems: set[str]) -> str:
    """Return the longest ending, from a separator on, that all stems share; empty for a single stem."""
    if len(stems) < 2:
        return ""
    first, *others = stems
    starts = [match.start() for match in _LAST_WORDS.finditer(first) if match.start() > 0]
    return next((first[start:] for start in starts if all(stem.endswith(first[start:]) for stem in others)), "")


def _mask_ending(stem: str) -> str:
    """Return the part of a stem from its last word for masks on, with the separator; empty without one."""
    found = [match for match in _LAST_WORDS.finditer(stem) if match[1].lower() in MASK_WORDS and match.start() > 0]
    return stem[found[-1].start() :] if found else ""


def _is_match(images: set[str], masks: set[str]) -> bool:
    least = min(len(images), len(masks))
    return least > 0 and len(images & masks) >= max(1, _LEAST_MATCHED * least)


__all__ = ["Pairing", "find_pairings"]
