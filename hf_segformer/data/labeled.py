"""Data sources: each becomes two data sets of undecoded rows, with the class names that it brings."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..config import DataConfig, SplitConfig, check_palette, check_unique
from ..files import resolve_inside
from ..visualization import Color
from . import camvid, shapes, shapes_hard
from .class_lists import check_list_size
from .pairing import load_splits, pair_images_and_masks, pair_in_image_folders, two_columns, undecoded
from .panoptic import VOID, open_panoptic
from .polygons import open_coco
from .splits import add_groups, check_disjoint, divide

CLASS_FILES = ("classes.json", "id2label.json")
_SETTINGS = ("data.image_column", "data.mask_column")
SHUFFLE_BUFFER = 1000  # rows among which a stream's next one is drawn

_Classes = tuple[tuple[str, ...], tuple[Color, ...]]


@dataclass(frozen=True)
class Source:
    """Rows with columns `image` and `label`, both undecoded.

    Args:
        train: a `datasets.Dataset`, or a shuffled `IterableDataset`.
        evaluation: a `datasets.Dataset`.
        names: class names that the data bring; may be empty.
        palette: colours that the data bring; may be empty.
        ignore_values: mask values that stand for no class.
        pool: the images of all folds, if the evaluation images are one of them.
    """

    train: Any
    evaluation: datasets.Dataset
    names: tuple[str, ...] = ()
    palette: tuple[Color, ...] = ()
    ignore_values: tuple[int, ...] = ()
    pool: datasets.Dataset | None = None


def open_source(config: DataConfig, split: SplitConfig | None = None) -> Source:
    """Find a recipe's images and masks; none is read yet, and only shapes are generated.

    Args:
        config: the table `[data]`.
        split: the table `[split]`; images that have groups get a column `group`.

    Raises:
        ValueError: if files, columns or splits do not fit; the message says what there is.
        OSError: if a folder is missing or cannot be read.
    """
    split = split or SplitConfig()
    config.check_root()
    split.check_with(config)
    if config.source == "shapes":
        return _draw_shapes(config, split)
    if config.source == "camvid":
        folder = camvid.find_camvid(Path(config.root), config.train_split)
        train, evaluation = _open_folders(config, split, folder, camvid.IMAGE_FOLDER, camvid.MASK_FOLDER)
        classes: _Classes = (camvid.NAMES, camvid.PALETTE)
    elif config.source == "folders":
        train, evaluation = _open_folders(config, split, Path(config.root), config.image_folder, config.mask_folder)
        classes = read_classes(config.root)
    elif config.source in ("coco", "panoptic"):
        train, evaluation, names = _open_coco(config, split)
        classes = (names, ())
    else:
        train, evaluation = _open_dataset(config, split)
        classes = read_classes(config.root)
        if not classes[0]:
            classes = (_feature_names((train if evaluation is None else evaluation).features["label"]), ())
    pool = train if split.folds else None
    if evaluation is not None and not config.streaming:
        check_disjoint(train, evaluation)
    if evaluation is None:
        train, evaluation = divide(train, split, config.eval_share, config.seed, config.root)
    if not config.streaming:
        train = spread_rows(train, config.num_train, "num_train", config.train_split)
        evaluation = spread_rows(evaluation, config.num_eval, "num_eval", evaluation_name(config, split))
    ignore = (camvid.UNLABELLED,) if config.source == "camvid" and not config.label_values else ()
    ignore = (VOID,) if config.source == "panoptic" and len(classes[0]) > 1 else ignore
    return Source(train, evaluation, *classes, ignore, pool)


def evaluation_name(config: DataConfig, split: SplitConfig | None = None) -> str:
    """Name the evaluation images of a recipe: their split, or what is held out of the training split."""
    split = split or SplitConfig()
    if split.folds:
        return f"fold {split.fold} of {split.folds} of {config.train_split}"
    if split.hold_out:
        return f"{', '.join(split.hold_out)} of {config.train_split}"
    if config.eval_share:
        return f"{100 * config.eval_share:g} % of {config.train_split}"
    return config.eval_split_name


def read_classes(root: str) -> _Classes:
    """Read names and colours from `classes.json` or `id2label.json` beside the data; both are empty without one.

    Args:
        root: a folder, or a Hub repository of data.

    Raises:
        ValueError: if the file does not have its format.
        OSError: if the Hub cannot be reached.
    """
    for name in CLASS_FILES:
        path = Path(root) / name if Path(root).is_dir() else _hub_file(root, name)
        if path is None or not path.is_file():
            continue
        check_list_size(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if name == "classes.json":
                names, palette = content["names"], content.get("palette", [])
            else:
                names, palette = [content[str(index)] for index in range(len(content))], []
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}: {error}); expected classes.json as "
                '{"names": [...], "palette": [[red, green, blue], ...]} or id2label.json as {"0": name, "1": name, ...}'
            ) from error
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} has names {names}; expected a text for each class")
        check_unique(str(path), names)
        check_palette(str(path), palette, len(names))
        return tuple(names), tuple((red, green, blue) for red, green, blue in palette)
    return (), ()


def _hub_file(repository: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except EntryNotFoundError:  # without a network too, if it was never fetched
        return None


def _draw_shapes(config: DataConfig, split: SplitConfig) -> Source:
    variant = shapes_hard if config.difficulty == "hard" else shapes
    train, evaluation = (
        undecoded(shapes.shapes_dataset(name, number, config.image_size, config.seed, variant.draw_sample))
        for name, number in zip(shapes.SPLITS, (config.num_train, config.num_eval), strict=True)
    )
    pool = train if split.folds else None
    if pool is not None:
        train, evaluation = divide(pool, split, 0, config.seed, "the generated shapes")
    return Source(train, evaluation, variant.NAMES, variant.PALETTE, pool=pool)


def _open_folders(
    config: DataConfig, split: SplitConfig, root: Path, image_folder: str, mask_folder: str
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Training and evaluation images; None where those are still to be held out of the first."""
    templates = (image_folder, mask_folder)
    if config.eval_share and not split.group and config.train_split != config.eval_split_name:
        _check_no_own_split(config, root, templates)
    if config.eval_share or split.holds_out:
        return _read_folders(config, split, root, templates, config.train_split, True), None
    names = (config.train_split, config.eval_split_name)
    train, evaluation = (_read_folders(config, split, root, templates, name, False) for name in names)
    return train, evaluation


def _check_no_own_split(config: DataConfig, root: Path, templates: tuple[str, str]) -> None:
    """Refuse to hold a share of the images out where the folders have a split for evaluation."""
    train, evaluation = (
        [f"{folder}/{name}" for folder in templates] for name in (config.train_split, config.eval_split_name)
    )
    if all((root / folder).is_dir() for folder in (*train, *evaluation)):
        raise ValueError(
            f"data.eval_share is {config.eval_share}, but {root} has {' and '.join(evaluation)}: set data.eval_share=0 "
            f"to evaluate on them, or data.image_folder={train[0]} data.mask_folder={train[1]} to divide the training "
            "images again"
        )


def _read_folders(
    config: DataConfig, split: SplitConfig, root: Path, templates: tuple[str, str], name: str, held_out: bool
) -> datasets.Dataset:
    """Images and masks of one split; with groups, where some of them are still to be held out."""
    named = [template.replace("{split}", name) for template in templates]
    keys = ("image_suffix", "mask_suffix", "image_prefix", "mask_prefix")
    parts: dict[str, Any] = {key: getattr(config, key) for key in keys}
    if "{image}" in templates[0]:
        top = root / named[0].partition("{image}")[0]
        rows = pair_in_image_folders(root, named[0], named[1], **parts, instance_masks=config.instance_masks)
        return add_groups(rows, split, top, None) if held_out else rows
    folders, shared = [root / each for each in named], ""
    listed = resolve_inside(root, config.split_file.replace("{split}", name)) if config.split_file else None
    if listed is None:
        # Groups keep what belongs together on one side, so that a share of all splits may be drawn again.
        divides_all = bool(held_out and config.eval_share and split.group)
        is_below = not held_out or (not divides_all and all((folder / name).is_dir() for folder in folders))
        have_split = ["{split}" in template for template in templates]
        below = [folder if has else folder / name for folder, has in zip(folders, have_split, strict=True)]
        if sum(have_split) == 1 and (held_out or not all(folder.is_dir() for folder in below)):
            shared = ("images", "masks")[have_split.index(False)]
        elif is_below:
            folders = below
    rows = pair_images_and_masks(folders[0], folders[1], **parts, pages=config.pages, listed=listed, shared=shared)
    return add_groups(rows, split if held_out else SplitConfig(), folders[0], None)


def _open_coco(
    config: DataConfig, split: SplitConfig
) -> tuple[datasets.Dataset, datasets.Dataset | None, tuple[str, ...]]:
    """Training and evaluation images, the latter None where they are still to be held out; and the class names."""
    held_out, root = bool(config.eval_share or split.holds_out), Path(config.root)
    if not held_out and "{split}" not in config.annotation_file:
        raise ValueError(
            f"data.annotation_file is {config.annotation_file}, one file for all splits; expected {{split}} in its "
            "name, or images held out by data.eval_share=0.1"
        )

    def read(name: str) -> tuple[datasets.Dataset, tuple[str, ...]]:
        path = resolve_inside(root, config.annotation_file.replace("{split}", name))
        folder = root / config.image_folder.replace("{split}", name)
        if config.source == "panoptic":
            rows, categories = open_panoptic(path, folder, root / config.mask_folder.replace("{split}", name))
        else:
            rows, categories = open_coco(path, folder)
        return add_groups(rows, split, folder, None) if held_out else rows, categories

    train, categories = read(config.train_split)
    evaluation = None
    if not held_out:
        evaluation, others = read(config.eval_split_name)
        if others != categories:
            odd = sorted({*others} ^ {*categories}) or ["another order"]
            raise ValueError(f"{config.train_split!r} and {config.eval_split_name!r} differ in categories: {odd[0]}")
    if config.reduce_labels or config.source == "panoptic" or len(categories) == 1:
        return train, evaluation, categories
    background = "background" if "background" not in categories else "not annotated"
    return train, evaluation, (background, *categories)


def _open_dataset(config: DataConfig, split: SplitConfig) -> tuple[Any, datasets.Dataset | None]:
    """Training and evaluation rows; None where those are still to be held out of the first."""
    splits = _load_splits(config)
    held_out = bool(config.eval_share or split.holds_out)
    names = [config.train_split] if held_out else [config.train_split, config.eval_split_name]
    for name, key in zip(names, ("train_split", "eval_split"), strict=False):
        if name not in splits:
            way_out = ", or hold images out by data.eval_share=0.1" if key == "eval_split" else ""
            raise ValueError(
                f"data.{key} is {name!r}; expected one of {config.root}, {', '.join(map(repr, splits))}{way_out}"
            )
    train, *evaluation = (
        two_columns(splits[name], config.root, (config.image_column, config.mask_column), _SETTINGS) for name in names
    )
    if held_out:
        return add_groups(train, split, Path(config.root), _group_column(splits[config.train_split], split)), None
    if not config.streaming:
        return train, evaluation[0]
    train = train.take(config.num_train) if config.num_train else train
    return train.shuffle(seed=config.seed, buffer_size=SHUFFLE_BUFFER), collect_stream(evaluation[0], config.num_eval)


def _group_column(dataset: datasets.Dataset, split: SplitConfig) -> list | None:
    """The values of the column that holds the groups, names in place of class indices; None without one."""
    if not split.column:
        return None
    if split.column not in dataset.column_names:
        raise ValueError(f"split.column is {split.column!r}; expected one of {', '.join(map(repr, dataset.features))}")
    feature, values = dataset.features[split.column], dataset.select_columns([split.column])[split.column]
    if isinstance(feature, datasets.ClassLabel):
        return [None if value is None else feature.int2str(value) for value in values]
    return list(values)


def _load_splits(config: DataConfig) -> dict[str, Any]:
    as_folder = config.source == "imagefolder"
    try:
        return load_splits(config.root, config.subset, as_folder, config.streaming, config.train_split)
    except ValueError as error:
        raise ValueError(f"data.root={error}") from error


def _feature_names(feature: Any) -> tuple[str, ...]:
    while hasattr(feature, "feature"):
        feature = feature.feature
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()


def spread_rows(dataset: datasets.Dataset, number: int, key: str, split: str) -> datasets.Dataset:
    """Select `number` rows, spread evenly; 0 is all.

    Args:
        dataset: the rows of a split.
        number: how many.
        key: of `[data]`, which an error names.
        split: the split's name, for errors.

    Raises:
        ValueError: if there are fewer rows, or none.
    """
    if number > len(dataset):
        raise ValueError(f"data.{key} is {number}; expected at most the images of {split!r}, {len(dataset)}")
    if not len(dataset):
        raise ValueError(f"{split!r} has no images")
    return dataset.select(np.linspace(0, len(dataset) - 1, number).round().astype(int)) if number else dataset


def collect_stream(stream: Any, number: int) -> datasets.Dataset:
    """Keep the rows of an evaluation stream in memory, encoded as they are stored: they are read many times."""
    rows: Sequence = list(stream.take(number) if number else stream)
    if len(rows) < max(number, 1):
        raise ValueError(
            f"data.num_eval is {number}; expected at most the images of the evaluation stream, {len(rows)}"
        )
    return datasets.Dataset.from_list(rows, features=stream.features)


__all__ = [
    "CLASS_FILES",
    "SHUFFLE_BUFFER",
    "Source",
    "collect_stream",
    "evaluation_name",
    "open_source",
    "read_classes",
    "spread_rows",
]
