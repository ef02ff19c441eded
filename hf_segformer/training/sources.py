"""Where pictures come from: each source becomes two data sets of undecoded rows, and what is known of its classes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from ..data import camvid, shapes
from ..data.pairing import load_splits, pair_images_and_masks, two_columns, undecoded
from ..visualization import Color
from .data_recipe import DataRecipe, check_palette, check_unique

_CLASS_FILES = ("classes.json", "id2label.json")
_SETTINGS = ("data.image_column", "data.label_column")
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
        undecoded(shapes.shapes_dataset(split, number, recipe.image_size, recipe.seed))
        for split, number in zip(shapes.SPLITS, (recipe.num_train, recipe.num_eval), strict=True)
    )
    return Source(train, evaluation, shapes.NAMES, shapes.PALETTE)


def _open_folders(
    recipe: DataRecipe, root: Path, image_folder: str, mask_folder: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    def read(split: str) -> datasets.Dataset:
        folders = []
        for folder in (image_folder, mask_folder):
            is_whole = "{split}" in folder or recipe.eval_share
            folders.append(root / folder.replace("{split}", split) / ("" if is_whole else split))
        return pair_images_and_masks(folders[0], folders[1], recipe.image_suffix, recipe.mask_suffix, recipe.pages)

    if recipe.eval_share:
        return _hold_out(read(recipe.train_split), recipe)
    return read(recipe.train_split), read(recipe.eval_split_name)


def _open_dataset(recipe: DataRecipe) -> tuple[Any, datasets.Dataset]:
    splits = _load_splits(recipe)
    names = [recipe.train_split] if recipe.eval_share else [recipe.train_split, recipe.eval_split_name]
    for name, key in zip(names, ("train_split", "eval_split"), strict=False):
        if name not in splits:
            way_out = ", or hold pictures out by data.eval_share=0.1" if key == "eval_split" else ""
            raise ValueError(
                f"{recipe.root} has no split {name!r}, it has {', '.join(map(repr, splits))}: set data.{key}{way_out}"
            )
    train, *evaluation = (
        two_columns(splits[name], recipe.root, (recipe.image_column, recipe.label_column), _SETTINGS) for name in names
    )
    if recipe.eval_share:
        return _hold_out(train, recipe)
    if not recipe.streaming:
        return train, evaluation[0]
    train = train.take(recipe.num_train) if recipe.num_train else train
    return train.shuffle(seed=recipe.seed, buffer_size=_SHUFFLE_BUFFER), _collect(evaluation[0], recipe.num_eval)


def _load_splits(recipe: DataRecipe) -> dict[str, Any]:
    as_folder = recipe.source == "imagefolder"
    try:
        return load_splits(recipe.root, recipe.subset, as_folder, recipe.streaming, recipe.train_split)
    except ValueError as error:
        raise ValueError(f"data.root={error}") from error


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
