"""Recognition of a data set's layout: where images, masks and splits are.

Each finder names the ways in which it can read a folder. One is taken; of several, the user chooses by a setting that
the message names.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets

from ..config import DataConfig
from ..files import IMAGE_SUFFIXES, resolve_inside
from .folder_names import IMAGE_WORDS, MASK_WORDS, is_train, list_images, parse_folder
from .known_layouts import EVAL_SHARE, FINDERS, Reading
from .name_parts import quoted
from .paired_folders import Pairing, find_pairings
from .pairing import load_splits
from .panoptic import is_panoptic
from .polygons import read_annotations
from .readers import note_on_videos

# Settings that say where data are, in the order in which they are offered to choose between two readings.
_PLACES = (
    *("source", "mask_folder", "image_folder", "mask_suffix", "mask_prefix", "image_suffix", "image_prefix"),
    *("mask_column", "image_column", "annotation_file", "split_file", "eval_split", "train_split"),
)
_DEFAULTS = {name: DataConfig.__dataclass_fields__[name].default for name in _PLACES}
_NUM_SHOWN, _MOST_LEVELS = 4, 3
_ANNOTATION_FILES = re.compile(r"instances(_.*)?|_annotations\.coco|.*[._-]coco|coco|annotations", re.IGNORECASE)
_COCO_FOLDERS = ("images/{split}", "{split}/images", "{split}", "images", ".")
_DATA_SUFFIXES = (*IMAGE_SUFFIXES, ".json", ".jsonl", ".csv", ".parquet", ".arrow", "label_colors.txt")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def recognize_layout(root: str, choices: Mapping[str, Any]) -> tuple[Reading, dict[str, Any]]:
    """Find the one way to read a data set.

    Args:
        root: a folder, or a Hub data set as `owner/name`.
        choices: keys of the table `[data]` that the user has given.

    Returns:
        the reading, and the fields of `DataConfig`, `root` and `choices` among them.

    Raises:
        ValueError: if there is none, or several; the message names the settings that choose.
        OSError: if there is no such folder or data set.
    """
    if not Path(root).is_dir():
        DataConfig("dataset", root).check_root()
        readings = _find_columns(root, "dataset", choices)
    else:
        folder = _descend(Path(root))
        root, readings = str(folder), _find_all(folder, choices)
    readings = [reading for reading in readings if _agrees(reading, choices)] or _given(choices)
    readings = list({repr(_merge(reading, choices)): reading for reading in readings}.values())
    if not readings:
        raise ValueError(_nothing_found(Path(root)))
    if len(readings) > 1:
        raise ValueError(_several_found(root, readings))
    return readings[0], {"root": root} | _merge(readings[0], choices)


def _descend(root: Path) -> Path:
    """Go down while a folder holds one folder, whose name says nothing, and no data: so archives are unpacked."""
    for _ in range(_MOST_LEVELS):
        entries = [path for path in root.iterdir() if not path.name.startswith(".")]
        folders = [path for path in entries if path.is_dir()]
        has_data = any(path.name.lower().endswith(_DATA_SUFFIXES) for path in entries)
        if len(folders) != 1 or has_data or parse_folder(folders[0].name)[2]:
            break
        root = resolve_inside(root, folders[0].name)
    return root


def _find_all(root: Path, choices: Mapping[str, Any]) -> list[Reading]:
    """Find all readings of a folder; pairs of folders that belong to a known layout are no reading of their own."""
    if _is_saved(root):
        return _find_columns(str(root), "dataset", choices)
    if any(next(root.glob(f"{depth}{name}"), None) for name in _METADATA for depth in ("", "*/")):
        return _find_columns(str(root), "imagefolder", choices)
    known = [reading for find in FINDERS if (reading := find(root)) is not None]
    known = [reading for reading in (*known, *_find_coco(root)) if _agrees(reading, choices)]
    claimed = frozenset[str]().union(*(reading.claimed for reading in known))
    pairings = [pairing for pairing in find_pairings(root) if _top(pairing.mask_folder) not in claimed]
    readings = known + [reading for pairing in pairings for reading in _readings_of(pairing)]
    if any(next(root.glob(pattern), None) for pattern in ("*.parquet", "data/*.parquet", "*/*.parquet")):
        readings += _find_columns(str(root), "dataset", choices)
    return readings


def _top(template: str) -> str:
    return template.replace("{split}", "train").split("/")[0]


def _is_saved(root: Path) -> bool:
    return any((root / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _readings_of(pairing: Pairing) -> Iterator[Reading]:
    """Yield a reading for each split that may be the one to evaluate on."""
    tables, parts = pairing.tables(), pairing.parts
    layout = f"folders {pairing.image_folder} and {pairing.mask_folder}"
    if pairing.image_folder == pairing.mask_folder:
        layout = f"one folder, {pairing.image_folder}"
    for word, image, mask in (("begin with", *parts[::2]), ("end in", *parts[1::2])):
        if image or mask:
            layout += f", names {word} {image or 'anything'} and {mask or 'anything'}"
    notes: tuple[str, ...] = ()
    have_split = ["{split}" in folder for folder in (pairing.image_folder, pairing.mask_folder)]
    if sum(have_split) == 1:
        kind, folder = ("masks", pairing.mask_folder) if have_split[0] else ("images", pairing.image_folder)
        notes = (f"{folder}/ holds the {kind} of all splits: those without a partner are left out.",)
    if pairing.instance_masks:
        notes = ("An image has several masks, of one object each: their union is the class (data.instance_masks).",)
    for splits in _choose_splits(pairing.splits, "val"):
        yield Reading(layout, tables | splits, notes=notes)


def _choose_splits(names: Sequence[str], default: str) -> list[dict[str, Any]]:
    """Return the settings of the splits: one entry for each name that may be the split to evaluate on."""
    train = next((name for name in names if is_train(name)), None)
    if train is None:
        return [{"eval_share": EVAL_SHARE}]
    own: dict[str, Any] = {} if train == "train" else {"train_split": train}
    others = [name for name in names if name != train]
    chosen = [own | ({} if name == default else {"eval_split": name}) for name in others]
    return chosen or [own | {"eval_share": EVAL_SHARE}]


def _find_coco(root: Path) -> Iterator[Reading]:
    """Yield readings of COCO-style JSON files, one for each template of their names."""
    templates: dict[str, list[str | None]] = {}
    for pattern in ("*.json", "annotations/*.json", "*/_annotations.coco.json"):
        for path in sorted(root.glob(pattern)):
            relative = path.relative_to(root).as_posix()
            template, split = _parse_file(relative)
            if _ANNOTATION_FILES.fullmatch(path.stem) or split:
                templates.setdefault(template, []).append(split)
    for template, splits in templates.items():
        named = [split for split in splits if split]
        if named and not any(map(is_train, named)):
            continue
        first = next((split for split in named if is_train(split)), "")
        path = resolve_inside(root, template.replace("{split}", first))
        content = read_annotations(path, is_sure=False)
        folder = next((each for each in _COCO_FOLDERS if content and _has_files(root, each, first, content)), None)
        if content is None or folder is None:
            continue
        tables = {"source": "coco", "annotation_file": template, "image_folder": folder}
        layout, claimed = f"COCO-style annotations in {template}", {_top(template), "annotations"}
        if is_panoptic(content):
            masks = _find_panoptic_masks(root, template, first, content)
            tables |= {"source": "panoptic", "mask_folder": masks}
            layout, claimed = f"COCO's panoptic masks by {template}", claimed | {_top(masks)}
        for chosen in _choose_splits(named, "val"):
            yield Reading(layout, tables | chosen, claimed=frozenset(claimed - {"images"}))


def _find_panoptic_masks(root: Path, template: str, split: str, content: Mapping[str, Any]) -> str:
    """Return the folder of the PNG files of a panoptic JSON file: of its name, or masks.

    Raises:
        ValueError: if they are in none.
    """
    own = template.removesuffix(".json")
    for folder in (own, "masks/{split}", "masks"):
        if _has_files(root, folder, split, content, "annotations"):
            return folder
    raise ValueError(
        f"{root / template.replace('{split}', split)} names panoptic masks such as "
        f"{content['annotations'][0].get('file_name')}; expected them in {root / own.replace('{split}', split)}, or "
        "data.source=panoptic with data.mask_folder, data.image_folder and data.annotation_file"
    )


def _parse_file(relative: str) -> tuple[str, str | None]:
    """Return the template and the split of a JSON file's path."""
    folder, _, name = relative.rpartition("/")
    stem = name.removesuffix(".json")
    by_file, split, _ = parse_folder(stem)
    if split:
        pattern = by_file.pattern
        return (f"{folder}/{pattern}.json" if folder else f"{pattern}.json"), split
    by_folder, split, base = parse_folder(folder)
    return (f"{by_folder.pattern}/{name}", split) if split and base == folder else (relative, None)


def _has_files(root: Path, folder: str, split: str, content: Mapping[str, Any], files: str = "images") -> bool:
    if "{split}" in folder and not split:
        return False
    names = [str(each.get("file_name")) for each in content[files][:_NUM_SHOWN]]
    place = root / folder.replace("{split}", split)
    return place.is_dir() and all(resolve_inside(place, name).is_file() for name in names)


def _find_columns(root: str, source: str, choices: Mapping[str, Any]) -> list[Reading]:
    """Find the columns of images and masks in a data set, and its splits."""
    splits = load_splits(root, choices.get("subset", ""), source == "imagefolder", bool(choices.get("streaming")))
    features = next(iter(splits.values())).features or {}
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    chosen = {key: choices[key] for key in ("image_column", "mask_column") if key in choices}
    pairs = _choose_columns(images, chosen)
    if not pairs:
        raise ValueError(
            f"{root} has no two columns of images and masks among {', '.join(map(repr, features))}: set "
            "data.image_column and data.mask_column"
        )
    kinds = {"imagefolder": "imagefolder with metadata", "dataset": "data set"}
    readings = []
    for image, mask in pairs:
        columns = {"image_column": image, "mask_column": mask}
        tables = {"source": source} | {name: value for name, value in columns.items() if value != _DEFAULTS[name]}
        layout = f"{kinds[source]}, columns {image} and {mask}"
        readings += [Reading(layout, tables | chosen) for chosen in _choose_splits(list(splits), "validation")]
    return readings


def _choose_columns(images: list[str], chosen: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the pairs of columns that may hold images and masks: those that are called so, or all there are."""
    masks = [name for name in images if _has_word(name, MASK_WORDS)]
    plain = [name for name in images if _has_word(name, IMAGE_WORDS) and name not in masks]
    image = [chosen["image_column"]] if "image_column" in chosen else plain
    mask = [chosen["mask_column"]] if "mask_column" in chosen else masks
    image = image or [name for name in images if name not in mask]
    mask = mask or [name for name in images if name not in image]
    return [(one, other) for one in image for other in mask if one != other]


def _has_word(name: str, words: frozenset[str]) -> bool:
    return bool(words & {*re.split(r"[^a-z]+", name.lower())})


def _agrees(reading: Reading, choices: Mapping[str, Any]) -> bool:
    return all(_place(reading.tables, key) in (choices[key], None) for key in _PLACES if key in choices)


def _place(tables: Mapping[str, Any], key: str) -> Any:
    """Return a setting of a reading, or its default; None for a split to evaluate on where there is none."""
    if key == "eval_split" and not tables.get(key):
        default = "validation" if tables["source"] in ("dataset", "imagefolder") else "val"
        return None if tables.get("eval_share") else default
    return tables.get(key, _DEFAULTS[key])


def _given(choices: Mapping[str, Any]) -> list[Reading]:
    """Return the reading that the user's own settings describe, if they do."""
    if not (choices.get("source") or {"mask_folder", "mask_suffix", "mask_prefix"} & choices.keys()):
        return []
    return [Reading("as given", {"source": "folders"} | {key: choices[key] for key in _PLACES if key in choices})]


def _merge(reading: Reading, choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reading's settings with those of the user, of which one may take the place of another."""
    tables = reading.tables | dict(choices)
    if choices.get("eval_share"):
        tables.pop("eval_split", None)
    elif choices.get("eval_split"):
        tables.pop("eval_share", None)
    if choices.get("mask_colors") or choices.get("label_values"):
        for key in {"label_values", "ignore_values", "reduce_labels"} - choices.keys():
            tables.pop(key, None)
    return tables


def _several_found(root: str, readings: Sequence[Reading]) -> str:
    shown = "; or ".join(
        f"{reading.layout}: set {' '.join(_settle(reading, readings))}" for reading in readings[:_NUM_SHOWN]
    )
    rest = f"; and {len(readings) - _NUM_SHOWN} more" if len(readings) > _NUM_SHOWN else ""
    return f"{root} can be read in {len(readings)} ways. Choose one: {shown}{rest}"


def _settle(reading: Reading, readings: Sequence[Reading]) -> list[str]:
    """Return the fewest settings that only this reading has."""
    values = [{key: _place(each.tables, key) for key in _PLACES} for each in readings]
    own = values[readings.index(reading)]
    for keys in (keys for number in range(1, 4) for keys in combinations(_PLACES, number)):
        same = [each for each in values if all(each[key] in (own[key], None) for key in keys)]
        if len(same) == 1 and None not in (own[key] for key in keys):
            return [f"data.{key}={quoted(own[key])}" for key in keys]
    raise AssertionError("readings differ in a setting")


def _nothing_found(root: Path) -> str:
    """Say what a folder holds, and what was expected."""
    images = list_images(root)
    if not images:
        note = note_on_videos(path for path in sorted(root.rglob("*")) if path.is_file())
        return f"{root} holds no images; expected files that end in {', '.join(IMAGE_SUFFIXES)}{note}"
    lossy = [folder for folder, names in images.items() if parse_folder(folder)[0].is_mask and _are_lossy(names)]
    if lossy:
        return f"{root / lossy[0]} holds masks as JPEG, whose compression changes labels: store them as PNG or TIFF"
    found = ", ".join(f"{folder}/ ({len(names)})" for folder, names in list(images.items())[:_NUM_SHOWN])
    rest = f" and {len(images) - _NUM_SHOWN} more folders" if len(images) > _NUM_SHOWN else ""
    return (
        f"no masks were found for the images in {root}: {found}{rest}; expected images/ and masks/ with equal names: "
        "set data.image_folder and data.mask_folder for others"
    )


def _are_lossy(names: Sequence[str]) -> bool:
    return all(name.lower().endswith((".jpg", ".jpeg", ".jfif")) for name in names)


__all__ = ["recognize_layout"]
