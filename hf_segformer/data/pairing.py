"""Images with masks: pairs of files in two folders, or a data set that `datasets` reads.

Nothing is decoded here: rows hold `image` and `label` as they are stored, and `decoding.RowReader` decodes them when
they are asked for. Training and `segformer evaluate` find their data by the same functions.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow.compute
import yaml
from huggingface_hub import DatasetCard, constants

from ..config import check_unique
from ..files import IMAGE_SUFFIXES, MASK_SUFFIXES, read_json, resolve_inside
from .decoding import RowReader, array_dtype
from .label_mapping import build_mapping
from .readers import count_pages, is_hub_file

_NUM_LISTED, _NUM_TRIED = 5, 50


def pair_images_and_masks(
    images: Path,
    masks: Path,
    image_suffix: str = "",
    mask_suffix: str = "",
    pages: bool = False,
    listed: Path | None = None,
) -> datasets.Dataset:
    """Pair images and masks that share folder and name, in order of names.

    Args:
        images: folder of the images, at any depth.
        masks: folder of the masks; may be the same.
        image_suffix: how the names of images end, `"_leftImg8bit.png"`, or `"_image"` before any known ending; empty
            is any known ending. The part before it pairs an image with its mask.
        mask_suffix: the same for masks.
        pages: take each image of a file with several as an image of its own, beside the mask file's image of the same
            number.
        listed: a text file with the names of the images to take, one a line and without suffix, as Pascal VOC has it;
            by default all.

    Returns:
        A data set with the columns `image` and `label`, which hold paths, and with `pages` a column `page`.

    Raises:
        ValueError: if a file has no partner, two files share one name, numbers of pages differ, or a listed image is
            not there.
        OSError: if there is no such folder.
    """
    suffixes = (_suffixes(image_suffix, IMAGE_SUFFIXES), _suffixes(mask_suffix, MASK_SUFFIXES))
    pairs = _pairs((images, masks), suffixes, mask_suffix, None if listed is None else read_split_file(listed))
    columns: dict[str, list] = {"image": [str(image) for image, _ in pairs], "label": [str(mask) for _, mask in pairs]}
    if pages:
        rows = [(*pair, page) for pair in zip(*columns.values(), strict=True) for page in range(_num_pages(*pair))]
        columns = dict(zip(("image", "label", "page"), map(list, zip(*rows, strict=True)), strict=True))
    return datasets.Dataset.from_dict(columns)


def _num_pages(image: str, mask: str) -> int:
    numbers = [count_pages(image), count_pages(mask)]
    if numbers[0] != numbers[1]:
        raise ValueError(f"{image} holds {numbers[0]} images and {mask} {numbers[1]}; expected as many masks as images")
    return numbers[0]


def read_split_file(path: Path) -> list[str]:
    """Read the names of a split's images, one a line; a line of several words has the name first.

    Raises:
        ValueError: if it holds none, one twice, or anything but text.
        OSError: if it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file; expected the name of an image in each line") from error
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path} names no image; expected one in each line")
    check_unique(str(path), names)
    return names


def find_images(folder: Path) -> list[Path]:
    """Return the images of a folder, at any depth, by name.

    Raises:
        ValueError: if there is none.
        OSError: if there is no such folder.
    """
    found = [path for path in _files(folder) if path.name.lower().endswith(IMAGE_SUFFIXES)]
    if not found:
        raise _no_images(folder, IMAGE_SUFFIXES)
    return found


def load_splits(
    root: str, subset: str = "", as_folder: bool = False, streaming: bool = False, only: str = "train"
) -> dict[str, Any]:
    """Load the splits of a data set by name.

    Args:
        root: a folder that `save_to_disk` wrote or that `datasets` reads, or a Hub repository.
        subset: the `datasets` configuration of a data set that has several.
        as_folder: read a folder as an imagefolder, whatever else is in it.
        streaming: do not fetch the rows before they are used.
        only: name of the split where the data have a single one without a name.

    Raises:
        ValueError: if it cannot be read; the message begins with `root`.
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
        raise ValueError(f"{root} cannot be read: {error.__cause__ or error}") from error


def _require_names_inside(folder: Path) -> None:
    """Raise ValueError if a data set's own files name data elsewhere, in a saved state or in a card's `data_files`."""
    if (saved := folder / "dataset_dict.json").is_file():
        for split in _list_in(saved, "splits"):
            _require_names_inside(resolve_inside(folder, str(split)))
    if (saved := folder / "state.json").is_file():
        for each in _list_in(saved, "_data_files"):
            resolve_inside(folder, str(each.get("filename") if isinstance(each, dict) else each))
    card = folder / "README.md"
    if card.is_file() and card.read_bytes().startswith(b"---"):
        try:
            configs = DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict().get("configs")
        except yaml.YAMLError as error:
            raise ValueError(f"{card} holds metadata that are not YAML") from error
        for config in configs if isinstance(configs, list) else ():
            if not isinstance(config, dict):
                raise ValueError(f"{card} has {config!r:.40} in configs; expected a mapping")
            for name in _strings(config.get("data_files")) + _strings(config.get("data_dir")):
                if "://" in name:
                    raise ValueError(f"{card} names {name}; expected files of the data set itself")
                resolve_inside(folder, name)


def _list_in(path: Path, key: str) -> list[Any]:
    values = read_json(path).get(key) or []
    if not isinstance(values, list):
        raise ValueError(f"{path} has {key} {values!r:.40}; expected a list")
    return values


def _strings(value: Any) -> list[str]:
    """Collect the file names in a card's `data_files`: a string, or lists and mappings of them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [each for key, each in value.items() if key != "split"]
    return [name for each in value for name in _strings(each)] if isinstance(value, list) else []


def two_columns(dataset: Any, root: str, columns: Sequence[str], settings: Sequence[str]) -> Any:
    """Keep the columns of images and masks alone, as `image` and `label`, undecoded.

    Args:
        dataset: of `datasets`, a stream or not.
        root: what messages call it.
        columns: the names of the two columns.
        settings: the settings that choose them, for messages.

    Raises:
        ValueError: if there is no such column, or it holds no images.
    """
    if dataset.features is None:
        raise ValueError(f"{root} does not declare its columns, which a stream needs: set data.streaming=false")
    kinds = (datasets.Image, datasets.Array2D, datasets.Array3D, datasets.List)
    for name, setting in zip(columns, settings, strict=True):
        if name not in dataset.features:
            raise ValueError(
                f"{root} has no column {name!r}; expected one of {', '.join(map(repr, dataset.features))}: "
                f"set {setting}"
            )
        feature = dataset.features[name]
        if not isinstance(feature, kinds) and getattr(feature, "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"column {name!r} of {root} is {type(feature).__name__}; expected images, paths or arrays: "
                f"set {setting}"
            )
    dataset = require_own_files(undecoded(dataset.select_columns(list(columns))), root)
    names = dict(zip(columns, ("image", "label"), strict=True))
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def undecoded(dataset: Any) -> Any:
    """Keep files as they are stored: `datasets` would turn a palette's labels into others."""
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
            if isinstance(path, str) and "://" in path:
                if not os.path.isdir(root) and is_hub_file(path, root):  # a stream of the data set itself
                    continue
                raise ValueError(f"a row of {root} names {path}; expected files of the data set itself")
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


def open_split(root: str, split: str, image_column: str = "image", mask_column: str = "label") -> datasets.Dataset:
    """Load one split of a data set, as `two_columns` gives it; for `segformer evaluate`.

    Raises:
        ValueError: if the data cannot be read, or have no such split or columns.
        OSError: if there is no such folder or repository.
    """
    splits = load_splits(root, only=split)
    if split not in splits:
        raise ValueError(f"{root} has no split {split!r}; expected one of {', '.join(map(repr, splits))}: set --split")
    return two_columns(splits[split], root, (image_column, mask_column), ("--image-column", "--mask-column"))


def decode_dataset(
    dataset: datasets.Dataset,
    num_channels: int,
    num_labels: int,
    *,
    reduce_labels: bool = False,
    label_values: Sequence[int] = (),
    ignore: Sequence[int] = (),
    mask_colors: Sequence[Sequence[int]] = (),
    ignore_colors: Sequence[Sequence[int]] = (),
    ignore_index: int | None = None,
    ignore_exif: bool = False,
    any_range: bool = False,
    bands: Sequence[int] | None = None,
) -> datasets.Dataset:
    """Decode images and masks of a data set when its rows are asked for.

    Args:
        dataset: with the columns `image` and `label`, undecoded.
        num_channels: bands that the model takes.
        num_labels: classes K of the model; a binary one has the labels 0 and 1.
        reduce_labels: classes begin at 1 in the masks, and 0 does not count (ADE20K).
        label_values: the mask value of each class, `(0, 255)` for example; by default 0, 1, 2 and so on.
        ignore: mask values that do not count, beside 255.
        mask_colors: [red, green, blue] of each class in masks of colours.
        ignore_colors: colours that do not count.
        ignore_index: label of pixels that do not count, the model's `semantic_loss_ignore_index`; by default that of a
            new model with as many classes.
        ignore_exif: keep images as they are stored, whatever their EXIF orientation.
        any_range: accept integers of any range, for a processor with a `value_range`.
        bands: numbers, from 1, of the bands that the model takes, in its order; None for all.

    Raises:
        ValueError: if `label_values` or `mask_colors` do not have one a class.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from hf_segformer.data.pairing import pair_images_and_masks, decode_dataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (9, 6)).save(Path(folder, "a.jpg"))
        ...     Image.new("L", (9, 6), 255).save(Path(folder, "a_mask.png"))
        ...     pairs = pair_images_and_masks(Path(folder), Path(folder), mask_suffix="_mask")
        ...     int(decode_dataset(pairs, 3, 1, label_values=(0, 255))[0]["label"].max())
        1
    """
    mapping = build_mapping(
        num_labels,
        reduce_labels=reduce_labels,
        label_values=label_values,
        ignore_values=ignore,
        mask_colors=mask_colors,
        ignore_colors=ignore_colors,
        ignore_index=ignore_index,
        setting="--{}",
    )
    image_dtype, label_dtype = (array_dtype(dataset.features[column]) for column in ("image", "label"))
    return dataset.with_transform(
        RowReader(
            num_channels,
            mapping,
            image_dtype,
            label_dtype,
            ignore_exif,
            any_range,
            bands=None if bands is None else tuple(bands),
        )
    )


def _suffixes(suffix: str, known: tuple[str, ...]) -> tuple[str, ...]:
    if not suffix:
        return known
    return (suffix.lower(),) if "." in suffix else tuple(suffix.lower() + ending for ending in known)


def _pairs(
    folders: tuple[Path, Path],
    suffixes: tuple[tuple[str, ...], tuple[str, ...]],
    mask_suffix: str,
    listed: Sequence[str] | None = None,
) -> list[tuple[Path, Path]]:
    """Images and masks that share folder and name before the suffix, in order of names, all or the listed ones."""
    is_one = folders[0].resolve() == folders[1].resolve()
    images = _by_stem(folders[0], suffixes[0], suffixes[1] if is_one and mask_suffix else ())
    if not is_one and folders[1].is_relative_to(folders[0]):  # images beside the folder of their masks
        images = {stem: path for stem, path in images.items() if not path.is_relative_to(folders[1])}
    masks = _by_stem(folders[1], suffixes[1])
    if not images:
        raise _no_images(folders[0], suffixes[0])
    if listed is not None:
        missing = [name for name in listed if name not in images]
        if missing:
            raise ValueError(f"{folders[0] / missing[0]} is listed, but there is no such image{_others(missing[1:])}")
        images, masks = ({name: files[name] for name in listed if name in files} for files in (images, masks))
    alone = sorted(images.keys() ^ masks.keys())
    if alone:
        stem, others = alone[0], _others(alone[1:]) + _hint(images, masks, folders, mask_suffix)
        if stem in images:
            wanted = folders[1] / f"{stem}{suffixes[1][0]}"
            raise ValueError(f"{images[stem]} has no mask; expected {wanted}{others}")
        raise ValueError(f"{masks[stem]} has no image; expected {folders[0] / stem}{suffixes[0][0]}{others}")
    return [(images[stem], masks[stem]) for stem in sorted(images)]


def _hint(images: Mapping[str, Path], masks: Mapping[str, Path], folders: tuple[Path, Path], mask_suffix: str) -> str:
    """Return the remedy where every image lacks a partner for one reason, as far as it can be seen."""
    if images.keys() & masks.keys():
        return ""
    if masks and not mask_suffix:
        if ending := _shared_ending(images, masks):
            return f". Names of masks have {ending!r} more than those of their images: set mask_suffix={ending!r}"
        if ending := _shared_ending(masks, images):
            return f". Names of images have {ending!r} more than those of their masks: set image_suffix={ending!r}"
    if masks and (difference := _shared_difference(images, masks)):
        return f". {difference}: rename them"
    lossy = [path for path in _files(folders[1]) if path.suffix.lower() in (".jpg", ".jpeg", ".jfif")]
    if lossy and folders[0].resolve() != folders[1].resolve():
        return f". {lossy[0]} is a JPEG file, whose compression changes labels: store masks as PNG or TIFF"
    return ""


def _shared_ending(stems: Mapping[str, Path], longer: Mapping[str, Path]) -> str:
    """Return the shortest ending that makes longer names of all stems (the first fifty), empty without one."""
    endings = [{name[len(stem) :] for name in longer if name.startswith(stem)} for stem in islice(stems, _NUM_TRIED)]
    shared = set.intersection(*endings) - {""} if endings else set()
    return min(shared, key=len, default="")


def _shared_difference(images: Mapping[str, Path], masks: Mapping[str, Path]) -> str:
    """Say how names of masks differ from those of their images, if by letter case or by what they begin with."""
    if not {stem.casefold() for stem in images}.isdisjoint(stem.casefold() for stem in masks):
        return "Names of masks and images differ in upper and lower case"
    names = {"images": images, "masks": masks}
    for longer, shorter in (("masks", "images"), ("images", "masks")):
        stems = [PurePosixPath(stem).name for stem in islice(names[shorter], _NUM_TRIED)]
        candidates = {PurePosixPath(stem).name for stem in names[longer]}
        found = [{name[: -len(stem)] for name in candidates if name.endswith(stem)} for stem in stems]
        if shared := set.intersection(*found) - {""}:
            return f"Names of {longer} begin with {min(shared, key=len)!r}, those of {shorter} do not"
    return ""


def _no_images(folder: Path, suffixes: Sequence[str]) -> ValueError:
    return ValueError(f"{folder} holds no images; expected files that end in {', '.join(suffixes)}")


def _others(stems: Sequence[str]) -> str:
    """Return the part of a message about further files without a partner."""
    if not stems:
        return ""
    rest = f" and {len(stems) - _NUM_LISTED} more" if len(stems) > _NUM_LISTED else ""
    return f"; nor has {', '.join(stems[:_NUM_LISTED])}{rest} a partner"


def _by_stem(folder: Path, suffixes: tuple[str, ...], skipped: tuple[str, ...] = ()) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in _files(folder):
        name = path.name.lower()
        ending = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        if ending is None or (skipped and name.endswith(skipped)):
            continue
        stem = (path.relative_to(folder).parent / path.name[: -len(ending)]).as_posix()
        if path != files.setdefault(stem, path):
            raise ValueError(f"{files[stem]} and {path.name} share one name; expected one of them")
    return files


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder at any depth, by name, except hidden ones and those in hidden folders."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    for path in sorted(folder.rglob("*")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


__all__ = [
    "decode_dataset",
    "find_images",
    "load_splits",
    "open_split",
    "pair_images_and_masks",
    "read_split_file",
    "two_columns",
    "undecoded",
]
