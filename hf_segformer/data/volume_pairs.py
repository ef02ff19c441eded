"""Volumes with masks, for training and evaluation: pairs of files or folders, read slice by slice.

A volume is a file of several slices, or a folder of files that make up one (a DICOM series). Slices are read at random,
so that volumes stay open, a few dozen in each process. Axes: C bands, H W sides of a slice.
"""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np

from ..files import IMAGE_SUFFIXES, MASK_SUFFIXES
from .folder_names import choose_listed, composed, walk_folders
from .reader_protocol import ImageSource, ReadOptions
from .readers import find_reader, gather, is_listed, kind_of, read_whole_mask, suffixes_of, without_suffix

_MOST_OPEN = 32
_NUM_LISTED = 5


def pair_volumes(
    images: Path,
    masks: Path,
    image_affix: tuple[str, str] = ("", ""),
    mask_affix: tuple[str, str] = ("", ""),
    listed: Path | None = None,
    shared: str = "",
) -> dict[str, list[Any]] | None:
    """Pair volumes with masks that share folder and name, or the folder alone, and list their slices.

    Args:
        images: folder of the volumes, at any depth; a series has a folder of its own.
        masks: folder of the masks; may be the same.
        image_affix: how the names of volumes begin and end: with `"_ct.nii.gz"`, or `"_ct"` before any known ending.
        mask_affix: the same for masks.
        listed: see `pairing.pair_images_and_masks`.
        shared: see `pairing.pair_images_and_masks`.

    Returns:
        columns `image`, `label` (paths) and `page` (the slice, from 0), in the order of the names; None if there are no
        volumes.

    Raises:
        ValueError: if no name fits, a volume has no mask or a mask no volume, or there are images beside volumes.
        OSError: if a file cannot be read.
    """
    if not _holds_volumes(images):
        return None
    is_one = images.resolve() == masks.resolve()
    volumes = _by_name(images, image_affix, mask_affix if is_one else ("", ""), IMAGE_SUFFIXES)
    others = [path for path in volumes.values() if not is_volume(path)]
    if others:
        raise ValueError(
            f"{images} holds volumes, and images such as {others[0]}; expected one kind: give each a folder of its own"
        )
    found = _by_name(masks, mask_affix, image_affix if is_one and any(mask_affix) else ("", ""), MASK_SUFFIXES, False)
    if listed is not None:
        chosen = choose_listed(listed, volumes, images, "volume")
        volumes, found = ({name: files[name] for name in chosen if name in files} for files in (volumes, found))
    if not volumes:
        raise ValueError(
            f"{images} holds no volumes whose names {_said(image_affix, mask_affix)}; expected some, each with a part "
            "of its own, in its name or that of its folder, which pairs it with its mask"
        )
    columns: dict[str, list[Any]] = {"image": [], "label": [], "page": []}
    for volume, mask in _matched(volumes, found, (images, masks), (image_affix, mask_affix), shared):
        number = _num_slices(volume)
        columns["image"] += [volume] * number
        columns["label"] += [mask] * number
        columns["page"] += range(number)
    return columns


def is_volume(path: str) -> bool:
    """Return True for a file of slices, and for the folder of a series."""
    return os.path.isdir(path) or kind_of(path) == "volume"


def read_slice(
    volume: str,
    mask: str,
    index: int,
    num_channels: int,
    classes: Mapping[str, int],
    outside: int | None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Read a slice of a volume, and of its mask.

    Args:
        volume: a path of `pair_volumes`.
        mask: the same.
        index: of the slice, from 0.
        num_channels: that the model takes.
        classes: value of each class by its name, for masks whose classes have names.
        outside: value of pixels in none of them; None if they are ignored.
        **options: further fields of `ReadOptions`.

    Returns:
        pixels (C, H, W), masked where they hold no data, and integers (H, W).

    Raises:
        ValueError: if the mask is not on the grid of the volume, or names other classes.
        OSError: if a file cannot be read.
    """
    opened = _open(volume, _stamp(volume), num_channels, **options)
    pixels = opened.slice(index)
    source = ImageSource(mask)
    if find_reader(source)[1] == "volume":
        return pixels, resolve_name(opened.mask_reader)(opened, source, index, classes, outside)
    if opened.num_slices > 1:
        raise ValueError(f"{mask} is one image, but {volume} holds {opened.num_slices} slices; expected a volume")
    return pixels, read_whole_mask(source)


def _stamp(path: str) -> int:
    return os.stat(path).st_mtime_ns


@lru_cache(_MOST_OPEN)
def _open(path: str, stamp: int, num_channels: int, **options: Any) -> Any:
    """Open a volume; `stamp` tells a changed file from an earlier one."""
    files: tuple[str, ...] = ()
    if os.path.isdir(path):
        files = next(iter(_gathered(path, os.listdir(path))[0].values()))
    source = ImageSource(files[0] if files else path, path, files)
    return find_reader(source)[0](source, ReadOptions(num_channels, **options))


def _num_slices(path: str) -> int:
    return _open(path, _stamp(path), 3, any_range=True).num_slices


def _gathered(folder: str, names: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    paths = [os.path.join(folder, name) for name in sorted(names) if not name.startswith(".")]
    return gather([path for path in paths if os.path.isfile(path) and is_listed(path)])


def _holds_volumes(folder: Path) -> bool:
    """Return True if any file below a folder is of a volume; ordinary images are not opened."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    for _, names in walk_folders(folder):
        if any(name.lower().endswith(_volume_suffixes()) for name in names):
            return True
    return any(
        is_listed(path) and kind_of(path) == "volume"
        for here, names in walk_folders(folder)
        for path in (os.path.join(here, name) for name in names)
        if not os.path.splitext(path)[1].strip(".0123456789")
    )


def _volume_suffixes() -> tuple[str, ...]:
    return suffixes_of("volume")


def _by_name(
    folder: Path, affix: tuple[str, str], skipped: tuple[str, str], known: tuple[str, ...], joins: bool = True
) -> dict[str, str]:
    """Return volumes and files of known endings by their names below a folder, without prefix and suffix.

    With `joins` the files of a series are one volume, its folder.
    """
    found: dict[str, str] = {}
    for path_here, names in walk_folders(folder):
        here = str(path_here)
        groups, dropped = _gathered(here, names) if joins else ({}, [])
        if len(groups) > 1 or (groups and path_here == folder):
            raise ValueError(
                f"{here} holds the files of {len(groups)} series; expected a folder for each series, below {folder}"
            )
        if groups:
            found[composed(path_here.relative_to(folder).as_posix())] = here
        taken = {*dropped, *(path for files in groups.values() for path in files)}
        for path in (os.path.join(here, name) for name in names):
            is_known = path.lower().endswith(known) or (is_listed(path) and kind_of(path) == "volume")
            own = _without(os.path.basename(path), affix) if is_known and path not in taken else None
            if own is None or (any(skipped) and _without(os.path.basename(path), skipped) is not None):
                continue
            name = composed((path_here.relative_to(folder) / own).as_posix())
            if name == ".":  # nothing is left of the name, and there is no folder to take its place
                continue
            if found.setdefault(name, path) != path:
                raise ValueError(f"{found[name]} and {path} share one name; expected one of them")
    return found


def _without(name: str, affix: tuple[str, str]) -> str | None:
    """Return what is between prefix and suffix of a name, empty if they are all of it; None for another name."""
    prefix, suffix = affix
    stem = name if "." in suffix else without_suffix(name)
    if not (stem.startswith(prefix) and stem.lower().endswith(suffix.lower()) and len(stem) >= len(prefix + suffix)):
        return None
    return stem[len(prefix) : len(stem) - len(suffix)]


def _said(image_affix: tuple[str, str], mask_affix: tuple[str, str]) -> str:
    """Say which names volumes have, in a message about a folder without any."""
    if not any(image_affix):
        return f"differ from those of masks, {mask_affix[0]}*{mask_affix[1]}"
    prefix, suffix = image_affix
    parts = [f"begin with {prefix!r}"] * bool(prefix) + [f"end in {suffix!r}"] * bool(suffix)
    return " and ".join(parts)


def _matched(
    volumes: dict[str, str],
    masks: dict[str, str],
    folders: tuple[Path, Path],
    affixes: tuple[tuple[str, str], tuple[str, str]],
    shared: str,
) -> list[tuple[str, str]]:
    """Return volumes with their masks, by name, or where no name fits by the folder that holds one of each."""
    expected = _name_expected
    if not volumes.keys() & masks.keys():
        by_folder = [_by_folder(files, folder) for files, folder in zip((volumes, masks), folders, strict=True)]
        if by_folder[0].keys() & by_folder[1].keys():
            volumes, masks = by_folder
            expected = _folder_expected
    if shared:
        own = masks if shared == "images" else volumes
        volumes, masks = ({name: path for name, path in files.items() if name in own} for files in (volumes, masks))
    alone = sorted(volumes.keys() ^ masks.keys())
    if alone:
        rest = f" and {len(alone) - 1 - _NUM_LISTED} more" if len(alone) > _NUM_LISTED + 1 else ""
        others = f"; nor has {', '.join(alone[1 : _NUM_LISTED + 1])}{rest} a partner" if len(alone) > 1 else ""
        side = 0 if alone[0] in volumes else 1
        path, kind = (volumes, masks)[side][alone[0]], ("mask", "volume")[side]
        wanted = expected(alone[0], path, folders[side], folders[1 - side], affixes[1 - side])
        raise ValueError(f"{path} has no {kind}; expected {wanted}{others}")
    return [(volumes[name], masks[name]) for name in sorted(volumes)]


def _name_expected(name: str, path: str, folder: Path, other: Path, affix: tuple[str, str]) -> str:
    """Return the path that the partner of a file in one folder would have in the other one."""
    prefix, suffix = affix
    ending = "" if "." in suffix else ".nii.gz"
    if _is_named_by_folder(name, path, folder) and any(affix):
        return str(other / name / f"{prefix}{suffix}{ending}")
    parent, slash, own = name.rpartition("/")
    return str(other / f"{parent}{slash}{prefix}{own}{suffix}{ending}")


def _folder_expected(name: str, path: str, folder: Path, other: Path, affix: tuple[str, str]) -> str:
    return f"one in {other / name}"


def _is_named_by_folder(name: str, path: str, folder: Path) -> bool:
    """Return True for a file of which prefix and suffix are the whole name."""
    return Path(path).parent == folder / name


def _by_folder(files: dict[str, str], folder: Path) -> dict[str, str]:
    """Return files by the folders below the given one that hold one of them, and series by their own."""
    found: dict[str, list[str]] = {}
    for name, path in files.items():
        is_folder = os.path.isdir(path) or _is_named_by_folder(name, path, folder)
        own = name if is_folder else Path(name).parent.as_posix()
        if own != ".":
            found.setdefault(own, []).append(path)
    return {name: paths[0] for name, paths in found.items() if len(paths) == 1}


__all__ = ["is_volume", "pair_volumes", "read_slice"]
