"""Finds labelled pictures: pairs of files in two folders, or a data set that `datasets` reads.

Nothing is decoded here: rows hold `image` and `label` as they are stored, and `reader.RowReader` reads them when they
are asked for. Training and `segformer evaluate` find their pictures by the same functions.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
import yaml
from huggingface_hub import DatasetCard, constants

from ..files import read_json, resolve_inside
from .decoding import LabelMapping, RowReader, array_dtype, class_values

_PICTURE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jp2", ".avif"),
    *(".ppm", ".pgm", ".tga", ".npy"),
)
_MAP_SUFFIXES = (".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".pgm", ".npy")
_NUM_LISTED = 5


def pair_images_and_masks(
    images: Path, labels: Path, image_suffix: str = "", label_suffix: str = ""
) -> datasets.Dataset:
    """Pairs of pictures and label maps that share folder and name, in order of names.

    Args:
        images: folder of the pictures, at any depth.
        labels: folder of the label maps; may be the same.
        image_suffix: how the names of pictures end, `"_leftImg8bit.png"`, or `"_image"` before any known ending; empty
            is any known ending. What comes before it pairs a picture with its label map.
        label_suffix: the same for label maps.

    Returns:
        A data set with the columns `image` and `label`, which hold paths.

    Raises:
        ValueError: if a file has no partner, or two files one name.
        OSError: if there is no such folder.
    """
    suffixes = (_suffixes(image_suffix, _PICTURE_SUFFIXES), _suffixes(label_suffix, _MAP_SUFFIXES))
    pairs = _pairs((images, labels), suffixes)
    return datasets.Dataset.from_dict(
        {"image": [str(image) for image, _ in pairs], "label": [str(label) for _, label in pairs]}
    )


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, at any depth, by name.

    Raises:
        ValueError: if there is none.
        OSError: if there is no such folder.
    """
    found = [path for path in _files(folder) if path.name.lower().endswith(_PICTURE_SUFFIXES)]
    if not found:
        raise _no_pictures(folder, _PICTURE_SUFFIXES)
    return found


def load_splits(
    root: str, subset: str = "", as_folder: bool = False, streaming: bool = False, only: str = "train"
) -> dict[str, Any]:
    """The splits of a data set by name.

    Args:
        root: what `save_to_disk` wrote, a folder that `datasets` reads, or a Hub repository.
        subset: of a data set that has several, its `datasets` configuration.
        as_folder: read a folder as an imagefolder, whatever else is in it.
        streaming: do not fetch the rows before they are used.
        only: name of the split where the data have but one without a name.

    Raises:
        ValueError: if it can not be read; the message begins with `root`.
        OSError: if there is no such folder or repository.
    """
    folder = Path(root)
    _require_names_inside(folder)
    if not as_folder and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        loaded = datasets.load_from_disk(root)
        splits = {only: loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
        return {name: split.to_iterable_dataset() for name, split in splits.items()} if streaming else splits
    if as_folder:
        arguments: dict[str, Any] = {"path": "imagefolder", "data_dir": root}
    else:
        arguments = {"path": root, "name": subset or None}
    try:
        return dict(datasets.load_dataset(**arguments, streaming=streaming))
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise ValueError(f"{root} is not read: {error.__cause__ or error}") from error


def _require_names_inside(folder: Path) -> None:
    """Raise ValueError if a data set's own files name data elsewhere, in a saved state or in a card's `data_files`."""
    if (saved := folder / "dataset_dict.json").is_file():
        for split in read_json(saved).get("splits", ()):
            _require_names_inside(resolve_inside(folder, str(split)))
    if (saved := folder / "state.json").is_file():
        for each in read_json(saved).get("_data_files", ()):
            resolve_inside(folder, str(each.get("filename") if isinstance(each, dict) else each))
    card = folder / "README.md"
    if card.is_file() and card.read_bytes().startswith(b"---"):
        try:
            configs = DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict().get("configs")
        except yaml.YAMLError as error:
            raise ValueError(f"{card} holds metadata that are not YAML") from error
        for config in configs if isinstance(configs, list) else ():
            for name in _strings(config.get("data_files")) + _strings(config.get("data_dir")):
                if "://" in name:
                    raise ValueError(f"{card} names {name}; expected files of the data set itself")
                resolve_inside(folder, name)


def _strings(value: Any) -> list[str]:
    """Collect the file names in a card's `data_files`: a string, or lists and mappings of them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [each for key, each in value.items() if key != "split"]
    return [name for each in value for name in _strings(each)] if isinstance(value, list) else []


def two_columns(dataset: Any, root: str, columns: Sequence[str], settings: Sequence[str]) -> Any:
    """Only the columns `image` and `label`, undecoded.

    Args:
        dataset: of `datasets`, a stream or not.
        root: what messages call it.
        columns: the names that the two have there.
        settings: by which other names are given, for messages.

    Raises:
        ValueError: if there is no such column, or it holds no pictures.
    """
    if dataset.features is None:
        raise ValueError(f"{root} does not tell its columns before it is read: set data.streaming=false")
    kinds = (datasets.Image, datasets.Array2D, datasets.Array3D, datasets.List)
    for name, setting in zip(columns, settings, strict=True):
        if name not in dataset.features:
            raise ValueError(
                f"{root} has no column {name!r}, it has {', '.join(map(repr, dataset.features))}: set {setting}"
            )
        feature = dataset.features[name]
        if not isinstance(feature, kinds) and getattr(feature, "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"column {name!r} of {root} is {type(feature).__name__}, but it must hold pictures, paths or arrays: "
                f"set {setting}"
            )
    dataset = require_own_files(undecoded(dataset.select_columns(list(columns))), root)
    names = dict(zip(columns, ("image", "label"), strict=True))
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def undecoded(dataset: Any) -> Any:
    """Files stay as they are stored: `datasets` would turn a palette's ids into others."""
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def require_own_files(dataset: Any, root: str) -> Any:
    """Return a data set after checking that the files its rows name are its own; a stream is checked as it is read.

    Links are followed, since folders of links to images are common; only the names must stay within.

    Args:
        dataset: of `datasets`, its images undecoded.
        root: folder or Hub name of the data set.

    Raises:
        ValueError: if a row names a file that is neither below the data set's folder nor in the caches of `datasets`
            and the Hub.
    """
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    folders = [os.path.abspath(each) for each in ([root] if os.path.isdir(root) else []) + [*map(str, caches)]]

    def check(row: dict[str, Any]) -> dict[str, Any]:
        for value in row.values():
            is_file = isinstance(value, dict) and value.get("bytes") is None
            path = value.get("path") if is_file else value
            if isinstance(path, str) and not any(Path(os.path.abspath(path)).is_relative_to(each) for each in folders):
                raise ValueError(
                    f"a row of {root} names the file {path}; expected one below {root}: copy or link the images there"
                )
        return row

    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(check, features=dataset.features)
    for name, feature in dataset.features.items():
        values = dataset.data.column(name)
        if isinstance(feature, datasets.Image):
            values = pyarrow.compute.if_else(
                pyarrow.compute.is_null(pyarrow.compute.struct_field(values, "bytes")),
                pyarrow.compute.struct_field(values, "path"),
                None,
            )
        elif getattr(feature, "dtype", None) not in ("string", "large_string"):
            continue
        for path in values.to_pylist():
            check({name: path})
    return dataset


def open_split(root: str, split: str, image_column: str = "image", label_column: str = "label") -> datasets.Dataset:
    """One split of a data set, as `two_columns` gives it; for `segformer evaluate`.

    Raises:
        ValueError: if the data can not be read, or have no such split or columns.
        OSError: if there is no such folder or repository.
    """
    splits = load_splits(root, only=split)
    if split not in splits:
        raise ValueError(f"{root} has no split {split!r}, it has {', '.join(map(repr, splits))}: set --split")
    return two_columns(splits[split], root, (image_column, label_column), ("--image-column", "--label-column"))


def decode_dataset(
    dataset: datasets.Dataset,
    num_channels: int,
    num_labels: int,
    *,
    reduce_labels: bool = False,
    label_values: Sequence[int] = (),
    ignore: Sequence[int] = (),
) -> datasets.Dataset:
    """Rows of files -> rows of pictures and label maps 0..K-1, read when they are asked for.

    Args:
        dataset: with the columns `image` and `label`, undecoded.
        num_channels: bands that the model takes.
        num_labels: classes K of the model; a binary one has the values 0 and 1.
        reduce_labels: whether the maps' classes begin at 1, and 0 does not count (ADE20K).
        label_values: what the maps hold for each class, `(0, 255)` say; by default 0, 1, 2 and so on.
        ignore: values that do not count, beside 255.

    Raises:
        ValueError: if `label_values` has not one value a class.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from hf_segformer.data.pairing import pair_images_and_masks, decode_dataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (9, 6)).save(Path(folder, "a.jpg"))
        ...     Image.new("L", (9, 6), 255).save(Path(folder, "a_mask.png"))
        ...     pairs = pair_images_and_masks(Path(folder), Path(folder), label_suffix="_mask")
        ...     int(decode_dataset(pairs, 3, 1, label_values=(0, 255))[0]["label"].max())
        1
    """
    values = class_values(num_labels, reduce_labels, label_values, "--label-values")
    rule = LabelMapping(values, tuple(sorted({*ignore, *((0,) if reduce_labels and not label_values else ())})))
    dtypes = (array_dtype(dataset.features[column]) for column in ("image", "label"))
    return dataset.with_transform(RowReader(num_channels, rule, *dtypes))


def _suffixes(suffix: str, known: tuple[str, ...]) -> tuple[str, ...]:
    if not suffix:
        return known
    return (suffix.lower(),) if "." in suffix else tuple(suffix.lower() + ending for ending in known)


def _pairs(folders: tuple[Path, Path], suffixes: tuple[tuple[str, ...], tuple[str, ...]]) -> list[tuple[Path, Path]]:
    """Pictures and label maps that share folder and name before the suffix, in order of names."""
    is_one = folders[0].resolve() == folders[1].resolve()
    images = _by_stem(folders[0], suffixes[0], () if not is_one or suffixes[1] == _MAP_SUFFIXES else suffixes[1])
    labels = _by_stem(folders[1], suffixes[1])
    if not images:
        raise _no_pictures(folders[0], suffixes[0])
    alone = sorted(images.keys() ^ labels.keys())
    if alone:
        stem, others = alone[0], _others(alone[1:])
        if stem in images:
            wanted = folders[1] / f"{stem}{suffixes[1][0]}"
            raise ValueError(f"{images[stem]} has no label map {wanted}{others}")
        raise ValueError(f"{labels[stem]} has no picture {folders[0] / stem}{suffixes[0][0]}{others}")
    return [(images[stem], labels[stem]) for stem in sorted(images)]


def _no_pictures(folder: Path, suffixes: Sequence[str]) -> ValueError:
    return ValueError(f"{folder} holds no pictures (files that end in {', '.join(suffixes)})")


def _others(stems: Sequence[str]) -> str:
    """What a message says of further files without a partner."""
    if not stems:
        return ""
    rest = f" and {len(stems) - _NUM_LISTED} more" if len(stems) > _NUM_LISTED else ""
    return f"; nor has {', '.join(stems[:_NUM_LISTED])}{rest} a partner"


def _by_stem(folder: Path, suffixes: tuple[str, ...], passed_over: tuple[str, ...] = ()) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in _files(folder):
        name = path.name.lower()
        ending = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        if ending is None or (passed_over and name.endswith(passed_over)):
            continue
        stem = (path.relative_to(folder).parent / path.name[: -len(ending)]).as_posix()
        if path != files.setdefault(stem, path):
            raise ValueError(f"{files[stem]} and {path.name} have one name: which is meant?")
    return files


def _files(folder: Path) -> Iterator[Path]:
    """What lies in a folder at any depth, by name, but for what is hidden or lies in hidden folders."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    for path in sorted(folder.rglob("*")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path
