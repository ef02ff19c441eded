"""Images with masks: pairs of files in two folders, or a data set that `datasets` reads.

Nothing is decoded here: rows hold `image` and `label` as they are stored, and `decoding.RowReader` decodes them when
they are asked for. Training and `segformer evaluate` find their data by the same functions.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.compute
import yaml
from huggingface_hub import DatasetCard, constants

from ..files import IMAGE_SUFFIXES, MASK_SUFFIXES, read_json, resolve_inside
from .decoding import RowReader, array_dtype
from .folder_names import choose_listed, composed, walk_folders
from .label_mapping import build_mapping
from .name_parts import explain_difference
from .reader_protocol import is_hub_file
from .readers import count_pages, note_on_videos
from .volume_pairs import pair_volumes

_NUM_LISTED, _NUM_TRIED = 5, 50


def pair_images_and_masks(
    images: Path,
    masks: Path,
    image_suffix: str = "",
    mask_suffix: str = "",
    pages: bool = False,
    listed: Path | None = None,
    *,
    image_prefix: str = "",
    mask_prefix: str = "",
    shared: str = "",
) -> datasets.Dataset:
    """Pair images and masks that share folder and name, in order of names; of volumes each slice.

    Args:
        images: folder of the images, at any depth.
        masks: folder of the masks; may be the same.
        image_suffix: how the names of images end, `"_leftImg8bit.png"`, or `"_image"` before any known ending; empty
            is any known ending. The part between prefix and suffix pairs an image with its mask.
        mask_suffix: the same for masks.
        pages: take each image of a file with several as an image of its own, beside the mask file's image of the same
            number.
        listed: a text file with the names of the images to take, see `folder_names.choose_listed`; by default all.
        image_prefix: how the names of images begin, without their folders.
        mask_prefix: the same for masks.
        shared: `"images"` or `"masks"` for a folder that holds files of other splits too, those without a partner.

    Returns:
        A data set with the columns `image` and `label`, which hold paths, and with `pages`, and of volumes (see
        `volume_pairs.pair_volumes`), a column `page`.

    Raises:
        ValueError: if a file has no partner, two files share one name, numbers of pages differ, or a listed image is
            not there.
        OSError: if there is no such folder.
    """
    has_affixes = bool(image_prefix or image_suffix or mask_prefix or mask_suffix)
    if images.is_dir() and not has_affixes and os.path.realpath(images) == os.path.realpath(masks):
        raise ValueError(
            f"{images} is the folder of images and of masks; expected one for each, or how their names differ: set "
            "data.mask_suffix=_mask, or --mask-suffix _mask"
        )
    affixes = ((image_prefix, image_suffix), (mask_prefix, mask_suffix))
    volumes = pair_volumes(images, masks, *affixes, listed, shared)
    if volumes is not None:
        if pages:
            raise ValueError(
                f"pages are asked for, but {images} holds volumes, of which each slice is taken: leave it out"
            )
        return datasets.Dataset.from_dict(volumes)
    patterns = (
        NamePattern(image_prefix, image_suffix, IMAGE_SUFFIXES),
        NamePattern(mask_prefix, mask_suffix, MASK_SUFFIXES),
    )
    pairs = _pairs((images, masks), patterns, listed, shared)
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
    names: Sequence[str] = (),
) -> datasets.Dataset:
    """Decode images and masks of a data set when its rows are asked for.

    Args:
        dataset: with the columns `image` and `label`, undecoded.
        num_channels: bands that the model takes.
        num_labels: classes K of the model; a binary one has the labels 0 and 1.
        reduce_labels: classes begin at 1 in the masks, and 0 is ignored (ADE20K).
        label_values: the mask value of each class, `(0, 255)` for example; by default 0, 1, 2 and so on.
        ignore: mask values to ignore, beside 255.
        mask_colors: [red, green, blue] of each class in masks of colours.
        ignore_colors: colours to ignore.
        ignore_index: label of ignored pixels, the model's `semantic_loss_ignore_index`; by default that of a
            new model with as many classes.
        ignore_exif: keep images as they are stored, whatever their EXIF orientation.
        any_range: accept integers of any range, for a processor with a `value_range`.
        bands: numbers, from 1, of the bands that the model takes, in its order; None for all.
        names: of the classes, for masks of volumes whose segments have names.

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
            names=tuple(names),
        )
    )


class NamePattern(NamedTuple):
    """Beginning and ending of the names of images, or of masks.

    Attributes:
        prefix: beginning, without folders.
        suffix: ending, with its type or before any known one.
        types: known endings.
    """

    prefix: str
    suffix: str
    types: tuple[str, ...]

    @property
    def endings(self) -> tuple[str, ...]:
        """All endings of names, in lower case."""
        if not self.suffix:
            return self.types
        suffix = self.suffix.lower()
        return (suffix,) if "." in suffix else tuple(suffix + ending for ending in self.types)

    def stem(self, name: str) -> str | None:
        """Return what is between prefix and suffix; None for another name."""
        name = composed(name)
        ending = next((ending for ending in self.endings if name.lower().endswith(ending)), None)
        if ending is None or not name.startswith(self.prefix) or len(name) < len(self.prefix) + len(ending):
            return None
        return name[len(self.prefix) : -len(ending)]

    def name_of(self, stem: str) -> str:
        """Return the first of the names that a file may have."""
        folder, slash, name = stem.rpartition("/")
        return f"{folder}{slash}{self.prefix}{name}{self.endings[0]}"


def _pairs(
    folders: tuple[Path, Path],
    names: tuple[NamePattern, NamePattern],
    listed: Path | None = None,
    shared: str = "",
) -> list[tuple[Path, Path]]:
    """Images and masks that share folder and name between prefix and suffix, in order of names, all or the listed."""
    is_one = folders[0].resolve() == folders[1].resolve()
    images = _by_stem(folders[0], names[0], names[1] if is_one and (names[1].prefix or names[1].suffix) else None)
    if not is_one and folders[1].is_relative_to(folders[0]):  # images beside the folder of their masks
        images = {stem: path for stem, path in images.items() if not path.is_relative_to(folders[1])}
    masks = _by_stem(folders[1], names[1])
    if not images:
        raise _no_images(folders[0], names[0].endings)
    if listed is not None:
        chosen = choose_listed(listed, images, folders[0], "image")
        images, masks = ({name: files[name] for name in chosen if name in files} for files in (images, masks))
    if shared:
        own = masks if shared == "images" else images
        images, masks = ({stem: path for stem, path in files.items() if stem in own} for files in (images, masks))
    alone = sorted(images.keys() ^ masks.keys())
    if alone:
        stem, others = alone[0], _others(alone[1:]) + _hint(images, masks, folders, names)
        if stem in images:
            wanted = folders[1] / names[1].name_of(stem)
            raise ValueError(f"{images[stem]} has no mask; expected {wanted}{others}")
        raise ValueError(f"{masks[stem]} has no image; expected {folders[0] / names[0].name_of(stem)}{others}")
    return [(images[stem], masks[stem]) for stem in sorted(images)]


def pair_in_image_folders(
    root: Path,
    image_folder: str,
    mask_folder: str,
    image_suffix: str = "",
    mask_suffix: str = "",
    *,
    image_prefix: str = "",
    mask_prefix: str = "",
    instance_masks: bool = False,
) -> datasets.Dataset:
    """Pair images that have a folder each with the masks there, as in the Data Science Bowl 2018.

    Args:
        root: folder that the next two are below.
        image_folder: where an image is, with `{image}` for the name of its own folder, such as `{image}/images`.
        mask_folder: the same for its masks.
        image_suffix: see `pair_images_and_masks`.
        mask_suffix: the same for masks.
        image_prefix: how the names of images begin.
        mask_prefix: the same for masks.
        instance_masks: an image has any number of masks, of one object each; their union is the only class.

    Returns:
        A data set with the columns `image`, paths, and `label`: paths, or with `instance_masks` `{"path", "masks"}` for
        `decoding.RowReader`.

    Raises:
        ValueError: if a folder does not have one image, or has no mask, or several that are no instances.
        OSError: if there is no such folder.
    """
    images = NamePattern(image_prefix, image_suffix, IMAGE_SUFFIXES)
    masks = NamePattern(mask_prefix, mask_suffix, MASK_SUFFIXES)
    top = root / image_folder.partition("{image}")[0]
    if not top.is_dir():
        raise FileNotFoundError(f"there is no folder {top}")
    rows: dict[str, list[Any]] = {"image": [], "label": []}
    for own in sorted(path.name for path in top.iterdir() if path.is_dir() and not path.name.startswith(".")):
        folders = [root / folder.replace("{image}", own) for folder in (image_folder, mask_folder)]
        is_one = folders[0] == folders[1]
        image = [path for path in _files_in(folders[0], images) if not (is_one and masks.stem(path.name) is not None)]
        found = _files_in(folders[1], masks)
        if len(image) != 1:
            raise ValueError(f"{folders[0]} holds {len(image)} images; expected one, in a folder of its own")
        if not found:
            raise ValueError(f"{image[0]} has no mask; expected one in {folders[1]}")
        if len(found) > 1 and not instance_masks:
            raise ValueError(
                f"{folders[1]} holds {len(found)} masks; expected one, or data.instance_masks=true if each shows one "
                "object of the same class"
            )
        rows["image"].append(str(image[0]))
        rows["label"].append(
            {"path": str(found[0]), "masks": [str(path) for path in found]} if instance_masks else str(found[0])
        )
    if not rows["image"]:
        raise ValueError(f"{top} holds no folders; expected one for each image")
    return datasets.Dataset.from_dict(rows)


def _files_in(folder: Path, names: NamePattern) -> list[Path]:
    """Return the files of a folder itself whose names fit, by name; none if there is no such folder."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if not path.name.startswith(".") and names.stem(path.name) is not None]


def _hint(
    images: Mapping[str, Path],
    masks: Mapping[str, Path],
    folders: tuple[Path, Path],
    names: tuple[NamePattern, NamePattern],
) -> str:
    """Return the remedy where every image lacks a partner for one reason, as far as it can be seen."""
    if folders[0].resolve() == folders[1].resolve() and images.keys() & masks.keys():
        return ". Move what is neither an image nor its mask to another folder"
    if images.keys() & masks.keys():
        return ""
    is_plain = not any(each.prefix or each.suffix for each in names)
    if masks and is_plain and (difference := explain_difference(images, masks)):
        return f". {difference}"
    lossy = [path for path in _files(folders[1]) if path.suffix.lower() in (".jpg", ".jpeg", ".jfif")]
    if lossy and folders[0].resolve() != folders[1].resolve():
        return f". {lossy[0]} is a JPEG file, whose compression changes labels: store masks as PNG or TIFF"
    return ""


def _no_images(folder: Path, suffixes: Sequence[str]) -> ValueError:
    note = note_on_videos(_files(folder))
    return ValueError(f"{folder} holds no images; expected files that end in {', '.join(suffixes)}{note}")


def _others(stems: Sequence[str]) -> str:
    """Return the part of a message about further files without a partner."""
    if not stems:
        return ""
    rest = f" and {len(stems) - _NUM_LISTED} more" if len(stems) > _NUM_LISTED else ""
    return f"; nor has {', '.join(stems[:_NUM_LISTED])}{rest} a partner"


def _by_stem(folder: Path, names: NamePattern, skipped: NamePattern | None = None) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in _files(folder):
        own = names.stem(path.name)
        if own is None or (skipped is not None and skipped.stem(path.name) is not None):
            continue
        stem = composed((path.relative_to(folder).parent / own).as_posix())
        if path != files.setdefault(stem, path):
            raise ValueError(f"{files[stem]} and {path.name} share one name; expected one of them")
    return files


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder at any depth, by name, except hidden ones and those in hidden folders."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    yield from sorted(here / name for here, names in walk_folders(folder) for name in names)


__all__ = [
    "decode_dataset",
    "find_images",
    "load_splits",
    "open_split",
    "pair_images_and_masks",
    "pair_in_image_folders",
    "two_columns",
    "undecoded",
]
