"""Images for pre-training: two data sets of undecoded rows, with a class each where the method needs one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from ..config import SplitConfig
from .labeled import SHUFFLE_BUFFER, collect_stream, spread_rows
from .pairing import find_images, load_splits, require_own_files, undecoded
from .pretraining_config import ImageDataConfig
from .shapes import SPLITS, single_shapes_dataset
from .splits import check_disjoint, divide

_EVALUATION_FOLDERS = ("val", "validation")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class Images:
    """Rows with the columns `image`, as it is stored, and `label`, if they have classes.

    Args:
        train: a `datasets.Dataset`, or a shuffled `IterableDataset`.
        evaluation: a `datasets.Dataset`.
        names: of the classes, in order of their labels; empty for images without.
        unused: names of the data's other splits, or folders beside those of the splits.
    """

    train: Any
    evaluation: datasets.Dataset
    names: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def is_stream(self) -> bool:
        """Return True if `train` has neither length nor indices."""
        return not isinstance(self.train, datasets.Dataset)


def open_images(config: ImageDataConfig, is_labeled: bool) -> Images:
    """Find the images of a recipe; none is read yet, and only shapes are generated.

    Args:
        config: the table `[data]`.
        is_labeled: read the classes; without, all columns but the images are left out.

    Raises:
        ValueError: if columns or splits do not fit; the message says what there is.
        OSError: if a folder is missing or cannot be read.

    Examples:
        >>> from hf_segformer.data.image_source import open_images
        >>> from hf_segformer.data.pretraining_config import ImageDataConfig
        >>> open_images(ImageDataConfig("shapes", image_size=32, num_train=4, num_eval=2), is_labeled=True).names[:2]
        ('disc', 'triangle')
    """
    config.check_root()
    train, evaluation, unused = _open_splits(config, is_labeled)
    columns = ["image", "label"] if is_labeled else ["image"]
    names = _class_names(train, evaluation, config) if is_labeled else ()
    return Images(train.select_columns(columns), evaluation.select_columns(columns), names, unused)


def _open_splits(config: ImageDataConfig, is_labeled: bool) -> tuple[Any, datasets.Dataset, tuple[str, ...]]:
    """Training and evaluation rows with the columns `image` and, where there is one, `label`; and unused splits."""
    if config.source == "shapes":
        train, evaluation = (
            undecoded(single_shapes_dataset(name, number, config.image_size, config.seed))
            for name, number in zip(SPLITS, (config.num_train, config.num_eval), strict=True)
        )
        return train, evaluation, ()
    if config.source == "imagefolder":
        return _open_folder(config, is_labeled)
    splits = _load_splits(config)
    unused = tuple(sorted(set(splits) - {config.train_split, "" if config.eval_share else config.eval_split_name}))
    train = _renamed(splits[config.train_split], config)
    if config.eval_share:
        train, evaluation = divide(train, SplitConfig(), config.eval_share, config.seed, config.root)
    else:
        evaluation = _renamed(splits[config.eval_split_name], config)
    if config.streaming:
        train = train.take(config.num_train) if config.num_train else train
        train = train.shuffle(seed=config.seed, buffer_size=SHUFFLE_BUFFER)
        return train, collect_stream(evaluation, config.num_eval), unused
    _check_images_apart(train, evaluation, config)
    train = spread_rows(train, config.num_train, "num_train", config.train_split)
    return train, spread_rows(evaluation, config.num_eval, "num_eval", config.eval_split_name), unused


def _open_folder(
    config: ImageDataConfig, is_labeled: bool
) -> tuple[datasets.Dataset, datasets.Dataset, tuple[str, ...]]:
    """Images below the folders of the splits, each of the class that the first folder below its split names.

    `datasets` would sort files into splits by words in their names, and drop the others.
    """
    root = Path(config.root)
    folder = root / config.train_split
    if config.eval_share:
        folder = folder if folder.is_dir() else root
        used = [folder]
        rows = _rows_below(folder)
        train, evaluation = divide(rows, SplitConfig(), config.eval_share, config.seed, config.root)
    else:
        used = [folder, _evaluation_folder(root, config)]
        _check_folders_apart(*used)
        train, evaluation = map(_rows_below, used)
    _check_no_metadata([root, *used])
    _check_images_apart(train, evaluation, config)
    unused = () if folder == root else tuple(sorted(each.name for each in root.iterdir() if each.is_dir()))
    if is_labeled:
        train, evaluation = _with_classes(train, evaluation, config)
    train = spread_rows(train, config.num_train, "num_train", config.train_split)
    evaluation = spread_rows(evaluation, config.num_eval, "num_eval", used[-1].name)
    return train, evaluation, tuple(name for name in unused if root / name not in used)


def _check_no_metadata(folders: list[Path]) -> None:
    """Refuse files that tell `datasets` what an imagefolder holds: masks beside the images, for example."""
    patterns = [f"{depth}{name}" for name in _METADATA for depth in ("", "*/")]
    found = [path for folder in folders for pattern in patterns for path in folder.glob(pattern)]
    if found:
        raise ValueError(
            f"{found[0]} is not read by a pre-training's data.source=imagefolder, which takes all images, of the "
            "classes that their folders name: set data.source=dataset, or remove the file"
        )


def _check_folders_apart(train: Path, evaluation: Path) -> None:
    """Refuse folders of which one is the other or in it, by their real paths."""
    real = [folder.resolve() for folder in (train, evaluation)]
    if real[0].is_relative_to(real[1]) or real[1].is_relative_to(real[0]):
        raise ValueError(
            f"images of {evaluation} would be trained on, from {train}, and evaluated on; expected two folders, "
            "neither in the other: set data.train_split and data.eval_split, or hold images out by data.eval_share=0.1"
        )


def _check_images_apart(train: datasets.Dataset, evaluation: datasets.Dataset, config: ImageDataConfig) -> None:
    """Refuse image files that are in both splits, by their real paths."""
    images = [rows.select_columns(["image"]) for rows in (train, evaluation)]
    check_disjoint(images[0], images[1], bool(config.eval_share))


def _with_classes(
    train: datasets.Dataset, evaluation: datasets.Dataset, config: ImageDataConfig
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Number the classes of the column `label`, in order of their names."""
    for rows in (train, evaluation):
        if "" in (labels := rows["label"][:]):
            raise ValueError(
                f"{rows['image'][labels.index('')]} is in no class; expected a sub-folder for each class, the same in "
                "each split. For images without classes set pretraining.method=masked_images"
            )
    names = set(train["label"])
    if alone := sorted(set(evaluation["label"]) - names):
        way_out = (
            "add images of it, or set another data.seed" if config.eval_share else "add some, or remove its folder"
        )
        raise ValueError(
            f"the class {alone[0]!r} of {config.root} has images to evaluate on and none to train on: {way_out}"
        )
    feature = datasets.ClassLabel(names=sorted(names))
    return train.cast_column("label", feature), evaluation.cast_column("label", feature)


def _evaluation_folder(root: Path, config: ImageDataConfig) -> Path:
    """The folder of evaluation images: `data.eval_split`, else `val` or `validation`."""
    wanted = [config.eval_split] if config.eval_split else list(_EVALUATION_FOLDERS)
    found = [root / name for name in wanted if (root / name).is_dir()]
    if not found or not (root / config.train_split).is_dir():
        missing = config.train_split if found else " or ".join(wanted)
        held_out = "or hold images out of all by data.eval_share=0.1"
        raise ValueError(f"{root} has no folder {missing}; expected one for each split, {held_out}")
    return found[0]


def _rows_below(folder: Path) -> datasets.Dataset:
    """Paths of the images below a folder, and the first folder of each below it, empty for those in the folder."""
    paths = find_images(folder)
    labels = [parts[0] if len(parts := path.relative_to(folder).parts) > 1 else "" for path in paths]
    return datasets.Dataset.from_dict({"image": [str(path) for path in paths], "label": labels})


def _load_splits(config: ImageDataConfig) -> dict[str, Any]:
    try:
        splits = load_splits(config.root, config.subset, False, config.streaming, config.train_split)
    except ValueError as error:
        raise ValueError(f"data.root={error}") from error
    wanted = {"train_split": config.train_split}
    if not config.eval_share:
        wanted["eval_split"] = config.eval_split_name
    for key, name in wanted.items():
        if name not in splits:
            way_out = ", or hold images out by data.eval_share=0.1" if key == "eval_split" else ""
            raise ValueError(
                f"data.{key} is {name!r}; expected one of {config.root}, {', '.join(map(repr, splits))}{way_out}"
            )
    return splits


def _renamed(dataset: Any, config: ImageDataConfig) -> Any:
    """Keep the columns of images and classes alone, the files of the data set itself, and do not decode them."""
    if dataset.features is None:
        raise ValueError(f"{config.root} does not declare its columns, which a stream needs: set data.streaming=false")
    feature = dataset.features.get(config.image_column)
    if not isinstance(feature, datasets.Image) and getattr(feature, "dtype", None) not in ("string", "large_string"):
        found = f"which holds {type(feature).__name__}" if feature else "which is not there"
        known = ", ".join(map(repr, dataset.features))
        raise ValueError(
            f"data.image_column is {config.image_column!r}, {found} in {config.root}; expected a column of images or "
            f"paths, one of {known}"
        )
    columns = {config.image_column: "image"}
    if config.label_column in dataset.features:
        columns[config.label_column] = "label"
    dataset = require_own_files(undecoded(dataset.select_columns(list(columns))), config.root)
    return dataset.rename_columns({old: new for old, new in columns.items() if old != new})


def _class_names(train: Any, evaluation: datasets.Dataset, config: ImageDataConfig) -> tuple[str, ...]:
    """The names of the classes, the same for training and evaluation."""
    found = []
    for rows in (train, evaluation):
        feature = rows.features.get("label")
        if not isinstance(feature, datasets.ClassLabel):
            holds = f"which holds {getattr(feature, 'dtype', None) or type(feature).__name__}" if feature else "missing"
            raise ValueError(
                f"data.label_column is {config.label_column!r}, {holds} in {config.root}; expected a column of classes "
                f"(ClassLabel), which dataset.class_encode_column({config.label_column!r}) makes. For images without "
                "classes set pretraining.method=masked_images"
            )
        found.append(tuple(feature.names))
    if found[0] != found[1]:
        odd = sorted({*found[0]} ^ {*found[1]}) or ["another order"]
        raise ValueError(f"training and evaluation images of {config.root} differ in classes: {odd[0]}")
    if len(found[0]) < 2:
        raise ValueError(f"{config.root} has {len(found[0])} class; expected at least 2 to tell apart")
    return found[0]


__all__ = ["Images", "open_images"]
