"""Search for folders, or names in one folder, that pair images with masks in any of the usual arrangements.

images/a.jpg, masks/a.png           images/train/a.jpg, masks/train/a.png     train/images/a.jpg, train/masks/a.png
train/a.jpg, trainannot/a.png       train_images/a.jpg, train_masks/a.png     images/train/a.jpg, masks/a.png
a_sat.jpg, a_mask.png               img_1.png, mask_1.png                     a.jpg, a.png
1/image.png, 1/mask.png             1/images/a.png, 1/masks/*.png, of one object each
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..files import IMAGE_SUFFIXES, MASK_SUFFIXES
from .folder_names import Template, composed, is_train, list_images, parse_folder
from .name_parts import NameParts, is_match, match_folders, match_one_folder

_LOSSY = (".jpg", ".jpeg", ".jfif")


class Pairing(NamedTuple):
    """One way to pair images with masks, by the fields of `DataConfig`.

    Attributes:
        image_folder: template of the images' folders below the root.
        mask_folder: the masks'.
        parts: how names of images and masks begin and end.
        splits: names of the splits for which both exist; empty without any.
        instance_masks: an image has several masks, of one object each.
    """

    image_folder: str
    mask_folder: str
    parts: NameParts
    splits: tuple[str, ...]
    instance_masks: bool = False

    def tables(self) -> dict[str, Any]:
        """Return the fields of `DataConfig` that differ from its defaults."""
        folders = {"image_folder": self.image_folder, "mask_folder": self.mask_folder}
        instances = {"instance_masks": True} if self.instance_masks else {}
        return {"source": "folders"} | folders | self.parts.tables() | instances


_Files = dict[Template, dict[str | None, dict[str, list[str]]]]  # template -> split -> folder -> names below it


def find_pairings(root: Path) -> list[Pairing]:
    """Find all ways in which a folder's images pair with masks.

    Raises:
        ValueError: if there are too many files.
        OSError: if the folder cannot be read.
    """
    listed = list_images(root)
    if found := _pair_image_folders(listed):
        return found
    files = _group(listed, 0)
    for mask in [template for template in files if template.is_mask]:
        named = [template for template in files if template.is_image]
        others = [template for template in files if not (template.is_image or template.is_mask)]
        # Folders that are called images go before those without a name for their role.
        found += _pair_all(files, product(named, [mask])) or _pair_all(files, product(others, [mask]))
    found = found or _pair_all(files, [(template, template) for template in files if not template.is_mask])
    if not found:  # folders of single images whose names look like those of roles or splits, such as img_001
        files = _group(listed, 1)
        found = _pair_all(files, [(template, template) for template in files if not template.is_mask])
    return found


def _group(listed: Mapping[str, list[str]], num_names: int) -> _Files:
    """Group names of files by template, split and folder; of a folder's path the last `num_names` parts are names."""
    files: _Files = defaultdict(dict)
    for folder, names in listed.items():
        path = PurePosixPath(folder)
        top = path.parents[num_names - 1] if num_names and len(path.parts) >= num_names else path
        template, split, base = parse_folder(top.as_posix())
        below = path.relative_to(base or ".").as_posix()
        inside = [name if below == "." else f"{below}/{name}" for name in names]
        files[template].setdefault(split, {}).setdefault(base, []).extend(inside)
    return files


def _pair_all(files: _Files, candidates: Iterable[tuple[Template, Template]]) -> list[Pairing]:
    return [pairing for image, mask in candidates for pairing in _pair(image, mask, files[image], files[mask])]


def _pair(image: Template, mask: Template, images: dict, masks: dict) -> Iterator[Pairing]:
    """Yield the ways to pair two templates, which hold in all splits that both have, or that one of them has."""
    splits = [split for split in images if split in masks]
    if not splits and [None] in ([*images], [*masks]):  # one folder for all splits
        splits = [split for split in (*images, *masks) if split is not None]
    found = [_match(_names(images, split), _names(masks, split), image == mask) for split in splits]
    for parts in dict.fromkeys(each for ways in found for each in ways):
        matched = tuple(split for split, ways in zip(splits, found, strict=True) if parts in ways)
        named = tuple(split for split in matched if split is not None)
        if None in matched:
            yield Pairing(image.pattern, mask.pattern, parts, ())
        elif any(map(is_train, named)):
            yield Pairing(image.pattern, mask.pattern, parts, named)


def _names(folders: dict[str | None, dict[str, list[str]]], split: str | None) -> list[str]:
    """Return the names of a split; those of all splits in one folder where there is no other."""
    return [name for names in folders.get(split, folders.get(None, {})).values() for name in names]


def _match(images: list[str], masks: list[str], is_one: bool) -> list[NameParts]:
    """Return the parts of names by which most of them pair; empty if there is none."""
    if is_one:
        files = [(_stem(name), Path(name).suffix.lower()) for name in images]
        return match_one_folder(files, MASK_SUFFIXES) or _match_types(images)
    masks = [name for name in masks if name.lower().endswith(MASK_SUFFIXES)]
    parts = match_folders(*({_stem(name) for name in names} for names in (images, masks)))
    return [] if parts is None else [parts]


def _match_types(names: list[str]) -> list[NameParts]:
    """Pair names of one folder that are equal except for their type; the lossless one is the mask."""
    types: dict[str, set[str]] = defaultdict(set)
    for name in names:
        types[Path(name).suffix.lower()].add(_stem(name))
    pairs = [
        (image, mask) for image, mask in product(sorted(types), sorted(types)) if image != mask and mask not in _LOSSY
    ]
    found = [pair for pair in pairs if is_match(types[pair[0]], types[pair[1]])]
    found = [pair for pair in found if pair[0] in _LOSSY] or found
    return [NameParts(image_suffix=image, mask_suffix=mask) for image, mask in found]


def _pair_image_folders(listed: Mapping[str, list[str]]) -> list[Pairing]:
    """Find images that have a folder each, in which further folders hold the image and its masks."""
    owners: dict[PurePosixPath, tuple[dict[str, int], dict[str, int]]] = defaultdict(lambda: ({}, {}))
    for folder, names in listed.items():
        path = PurePosixPath(folder)
        role, split, _ = parse_folder(path.name)
        is_owned = len(path.parts) > 1 and not split and not parse_folder(path.parent.name)[1]
        if is_owned and (role.is_image or role.is_mask):
            owners[path.parent][role.is_mask][path.name] = len(names)
    ways: dict[tuple[str, str, str], dict[str | None, list[tuple[int, int]]]] = defaultdict(dict)
    for owner, (images, masks) in owners.items():
        top, split = _full_template(owner.parent)
        for image, mask in product(images, masks):
            ways[top, image, mask].setdefault(split, []).append((images[image], masks[mask]))
    found = []
    for (top, image, mask), splits in ways.items():
        named = tuple(split for split in splits if split is not None)
        numbers = [number for each in splits.values() for number in each]
        is_way = len(numbers) > 1 and all(number == 1 for number, _ in numbers)
        if is_way and (None in splits or any(map(is_train, named))):
            has_several = any(number > 1 for _, number in numbers)
            folders = (f"{top}{{image}}/{image}", f"{top}{{image}}/{mask}")
            found.append(Pairing(*folders, NameParts(), () if None in splits else named, has_several))
    return found


def _full_template(folder: PurePosixPath) -> tuple[str, str | None]:
    """Return the template of all of a path, with a `/` at its end, and the split."""
    template, split, base = parse_folder(folder.as_posix())
    parts = [*PurePosixPath(template.pattern).parts, *folder.relative_to(base or ".").parts]
    return "".join(f"{part}/" for part in parts), split


def _stem(name: str) -> str:
    suffix = next(suffix for suffix in (*IMAGE_SUFFIXES, Path(name).suffix) if name.lower().endswith(suffix))
    return composed(name[: -len(suffix)])


__all__ = ["Pairing", "find_pairings"]
