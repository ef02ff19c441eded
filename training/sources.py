"""Where pictures come from: each source becomes two data sets of undecoded rows, and what is known of its classes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from hf_segformer.visualize import Color

from . import camvid, shapes
from .data_recipe import DataRecipe, check_palette, check_unique

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".npy")
_MASK_SUFFIXES = (".png", ".webp", ".bmp", ".tif", ".tiff", ".npy")
_CLASS_FILES = ("classes.json", "id2label.json")
_SHUFFLE_BUFFER = 1000

_Classes = tuple[tuple[str, ...], tuple[Color, ...]]


@dataclass(frozen=True)
class Source:
    """Rows with columns `image` and `label`, both undecoded.

    Args:
        train: a `datasets.Dataset`, or a shuffled `IterableDataset`.
        evaluation: a `datasets.Dataset`.
        names: of the classes, as the data know them; may be empty.
        palette: the same for colours.
        ignore: values of the label maps that stand for no class.
    """

    train: Any
    evaluation: datasets.Dataset
    names: tuple[str, ...] = ()
    palette: tuple[Color, ...] = ()
    ignore: tuple[int, ...] = ()


def open_source(recipe: DataRecipe) -> Source:
    """Find a recipe's pictures; none is read yet, but for shapes, which are drawn.

    Raises:
        ValueError: if files, columns or splits do not fit; the message says what there is.
        OSError: if a folder is missing or can not be read.
    """
    recipe.check_root()
    if recipe.source == "shapes":
        return _draw_shapes(recipe)
    if recipe.source == "camvid":
        folder = camvid.find_camvid(Path(recipe.root), recipe.train_split)
        train, evaluation = _open_folders(recipe, folder, camvid.IMAGE_FOLDER, camvid.MASK_FOLDER)
        classes: _Classes = (camvid.NAMES, camvid.PALETTE)
    elif recipe.source == "folders":
        train, evaluation = _open_folders(recipe, Path(recipe.root), recipe.image_folder, recipe.mask_folder)
        classes = read_classes(recipe.root)
    else:
        train, evaluation = _open_dataset(recipe)
        classes = read_classes(recipe.root)
        if not classes[0]:
            classes = (_feature_names(evaluation.features["label"]), ())
    if not recipe.streaming:
        train = _spread(train, recipe.num_train, "num_train", recipe.train_split)
        evaluation = _spread(evaluation, recipe.num_eval, "num_eval", recipe.eval_split_name)
    ignore = (camvid.UNLABELLED,) if recipe.source == "camvid" and not recipe.label_values else ()
    return Source(train, evaluation, *classes, ignore)


def read_classes(root: str) -> _Classes:
    """Names and colours from `classes.json` or `id2label.json` beside the data; both are empty without such a file.

    Args:
        root: a folder, or a Hub repository of data.

    Raises:
        ValueError: if the file is not as it must be.
        OSError: if the Hub can not be reached.
    """
    for name in _CLASS_FILES:
        path = Path(root) / name if Path(root).is_dir() else _hub_file(root, name)
        if path is None or not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if name == "classes.json":
                names, palette = content["names"], content.get("palette", [])
            else:
                names, palette = [content[str(index)] for index in range(len(content))], []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not read ({type(error).__name__}: {error}): classes.json is "
                '{"names": [...], "palette": [[red, green, blue], ...]}, id2label.json {"0": name, "1": name, ...}'
            ) from error
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} has names {names}, but each class needs a text")
        check_unique(str(path), names)
        check_palette(str(path), palette, len(names))
        return tuple(names), tuple((red, green, blue) for red, green, blue in palette)
    return (), ()


def _hub_file(repository: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except EntryNotFoundError:  # without a network also: what was never fetched
        return None


def _draw_shapes(recipe: DataRecipe) -> Source:
    train, evaluation = (
        _undecoded(shapes.shapes_dataset(split, number, recipe.image_size, recipe.seed))
        for split, number in zip(shapes.SPLITS, (recipe.num_train, recipe.num_eval), strict=True)
    )
    return Source(train, evaluation, shapes.NAMES, shapes.PALETTE)


def _open_folders(
    recipe: DataRecipe, root: Path, image_folder: str, mask_folder: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    suffixes = (_suffixes(recipe.image_suffix, _IMAGE_SUFFIXES), _suffixes(recipe.mask_suffix, _MASK_SUFFIXES))

    def read(split: str) -> datasets.Dataset:
        folders = []
        for folder in (image_folder, mask_folder):
            is_whole = "{split}" in folder or recipe.eval_share
            folders.append(root / folder.replace("{split}", split) / ("" if is_whole else split))
        pairs = _pairs((folders[0], folders[1]), suffixes)
        return datasets.Dataset.from_dict(
            {"image": [str(image) for image, _ in pairs], "label": [str(mask) for _, mask in pairs]}
        )

    if recipe.eval_share:
        return _hold_out(read(recipe.train_split), recipe)
    return read(recipe.train_split), read(recipe.eval_split_name)


def _suffixes(suffix: str, known: tuple[str, ...]) -> tuple[str, ...]:
    return (suffix.lower(),) if suffix else known


def _pairs(folders: tuple[Path, Path], suffixes: tuple[tuple[str, ...], tuple[str, ...]]) -> list[tuple[Path, Path]]:
    """Pictures and label maps that share folder and name before the suffix, in order of names."""
    is_one = folders[0].resolve() == folders[1].resolve()
    images = _by_stem(folders[0], suffixes[0], () if not is_one or suffixes[1] == _MASK_SUFFIXES else suffixes[1])
    masks = _by_stem(folders[1], suffixes[1])
    if not images:
        raise ValueError(f"{folders[0]} holds no pictures (files that end in {', '.join(suffixes[0])})")
    alone = sorted(images.keys() ^ masks.keys())
    if alone:
        stem, others = alone[0], f"; so it is with {len(alone) - 1} more files" if len(alone) > 1 else ""
        if stem in images:
            wanted = folders[1] / f"{stem}{suffixes[1][0]}"
            raise ValueError(f"{images[stem]} has no label map {wanted}{others}")
        raise ValueError(f"{masks[stem]} has no picture {folders[0] / stem}{suffixes[0][0]}{others}")
    return [(images[stem], masks[stem]) for stem in sorted(images)]


def _by_stem(folder: Path, suffixes: tuple[str, ...], passed_over: tuple[str, ...] = ()) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.name.lower()
        ending = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        if ending is None or name.startswith(".") or (passed_over and name.endswith(passed_over)):
            continue
        stem = (path.relative_to(folder).parent / path.name[: -len(ending)]).as_posix()
        if path != files.setdefault(stem, path):
            raise ValueError(f"{files[stem]} and {path.name} have one name: which is meant?")
    return files


def _open_dataset(recipe: DataRecipe) -> tuple[Any, datasets.Dataset]:
    splits = _load_splits(recipe)
    names = [recipe.train_split] if recipe.eval_share else [recipe.train_split, recipe.eval_split_name]
    for name, key in zip(names, ("train_split", "eval_split"), strict=False):
        if name not in splits:
            way_out = ", or hold pictures out by data.eval_share=0.1" if key == "eval_split" else ""
            raise ValueError(
                f"{recipe.root} has no split {name!r}, it has {', '.join(map(repr, splits))}: set data.{key}{way_out}"
            )
    train, *evaluation = (_two_columns(splits[name], recipe) for name in names)
    if recipe.eval_share:
        return _hold_out(train, recipe)
    if not recipe.streaming:
        return train, evaluation[0]
    train = train.take(recipe.num_train) if recipe.num_train else train
    return train.shuffle(seed=recipe.seed, buffer_size=_SHUFFLE_BUFFER), _collect(evaluation[0], recipe.num_eval)


def _load_splits(recipe: DataRecipe) -> dict[str, Any]:
    folder = Path(recipe.root)
    if recipe.source == "dataset" and ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()):
        loaded = datasets.load_from_disk(recipe.root)
        splits = {recipe.train_split: loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
        if recipe.streaming:
            splits = {name: split.to_iterable_dataset() for name, split in splits.items()}
        return splits
    if recipe.source == "imagefolder":
        arguments: dict[str, Any] = {"path": "imagefolder", "data_dir": recipe.root}
    else:
        arguments = {"path": recipe.root, "name": recipe.subset or None}
    try:
        return dict(datasets.load_dataset(**arguments, streaming=recipe.streaming))
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise ValueError(f"data.root={recipe.root} is not read: {error.__cause__ or error}") from error


def _two_columns(dataset: Any, recipe: DataRecipe) -> Any:
    """Only the columns `image` and `label`, undecoded."""
    if dataset.features is None:
        raise ValueError(f"{recipe.root} does not tell its columns before it is read: set data.streaming=false")
    kinds = (datasets.Image, datasets.Array2D, datasets.Array3D, datasets.List)
    for key in ("image_column", "label_column"):
        name = getattr(recipe, key)
        if name not in dataset.features:
            raise ValueError(
                f"{recipe.root} has no column {name!r}, it has {', '.join(map(repr, dataset.features))}: set data.{key}"
            )
        feature = dataset.features[name]
        if not isinstance(feature, kinds) and getattr(feature, "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"column {name!r} of {recipe.root} is {type(feature).__name__}, but it must hold pictures, paths or "
                f"arrays: set data.{key}"
            )
    columns = {recipe.image_column: "image", recipe.label_column: "label"}
    dataset = _undecoded(dataset.select_columns(list(columns)))
    return dataset.rename_columns({old: new for old, new in columns.items() if old != new})


def _undecoded(dataset: Any) -> Any:
    """Files stay as they are stored: `datasets` would turn a palette's ids into others."""
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _feature_names(feature: Any) -> tuple[str, ...]:
    while hasattr(feature, "feature"):
        feature = feature.feature
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()


def _hold_out(dataset: datasets.Dataset, recipe: DataRecipe) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Two parts of a data set, each in its order; which row is held out depends on the seed and their number."""
    number = max(1, round(len(dataset) * recipe.eval_share))
    if number >= len(dataset):
        raise ValueError(
            f"data.eval_share={recipe.eval_share} of the {len(dataset)} pictures in {recipe.root} leaves none to train "
            "on"
        )
    order = np.random.default_rng(recipe.seed).permutation(len(dataset))
    return dataset.select(np.sort(order[number:])), dataset.select(np.sort(order[:number]))


def _spread(dataset: datasets.Dataset, number: int, key: str, split: str) -> datasets.Dataset:
    """As many rows as asked for, spread evenly; 0 is all."""
    if number > len(dataset):
        raise ValueError(f"data.{key} is {number}, but {split!r} has {len(dataset)} pictures")
    if not len(dataset):
        raise ValueError(f"{split!r} has no pictures")
    return dataset.select(np.linspace(0, len(dataset) - 1, number).round().astype(int)) if number else dataset


def _collect(stream: Any, number: int) -> datasets.Dataset:
    """The rows of a stream for evaluation, which is repeated, in memory as they are stored."""
    rows: Sequence = list(tqdm(stream.take(number) if number else stream, desc="fetching evaluation", leave=False))
    if len(rows) < max(number, 1):
        raise ValueError(f"data.num_eval is {number}, but the stream for evaluation has {len(rows)} pictures")
    return datasets.Dataset.from_list(rows, features=stream.features)
