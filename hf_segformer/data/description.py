"""Description of a folder or Hub data set of images with masks: where they are, and what their values mean.

`describe_data` finds the layout, measures a sample, and says by which `[data]` table the data are read. Nothing is
guessed: where two readings fit, it refuses and names the setting that decides. Axes: H W pixels, K classes, L labels:
K, or 2 for a binary task.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image

from ..config import DataConfig
from ..image_io_segformer import DECODE_ERRORS, read_mask
from .class_lists import ClassList, read_class_list
from .decoding import array_dtype, file_name, read_drawn_mask
from .image_measures import (
    NARROW,
    ImageMeasure,
    count_bands,
    find_dtype,
    measure_image,
    range_of_bits,
    used_share,
)
from .known_layouts import Reading
from .label_mapping import build_mapping
from .labeled import CLASS_FILES, Source, open_source
from .layouts import recognize_layout
from .mask_values import Meaning, explain_colors, explain_values
from .reader_protocol import ImageSource
from .readers import read_color_mask, read_whole_mask

_NUM_TRAIN_MASKS, _NUM_EVAL_MASKS, _NUM_IMAGES = 200, 50, 50
_INDEX_MODES = ("", "1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")  # "" is a file that Pillow does not open
_DRAWN = {"polygons": "polygons", "segments": "panoptic", "masks": "instances"}  # keys of labels, kinds of masks
_NO_CHOICES: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class DataDescription:
    """Layout, meaning and measures of a data set.

    Attributes:
        layout: its name, for people.
        tables: keyword arguments of `DataConfig` that read exactly these data; only what differs from the defaults.
        mask_kind: `"indices"`, `"palette"`, `"colors"`, `"binary"`, `"polygons"` or `"panoptic"`.
        names: names of the K classes; one for a binary task.
        names_source: where the names come from: `"classes.json"`, `"label_colors.txt"`, `"features"`, `"data.names"`,
            the layout's own, or `"generic"` for `"class 0"` and so on.
        num_channels: bands of the images as stored: 1 for grey, 3 for colours; an alpha channel is not counted.
        image_dtype: NumPy name of their type.
        value_share: part of the integer type's range that the sampled images use, from 0 to 1; None for floats.
        sizes: (H, W) of the sampled images.
        num_train: number of training images.
        num_eval: number of evaluation images.
        class_shares: for each label (two for a binary task) its share of the valid pixels of the sampled masks.
        class_image_shares: for each label the share of the sampled masks that hold it.
        num_sampled: number of masks that were read.
        notes: what was found and decided, one line each.
    """

    layout: str
    tables: dict[str, Any]
    mask_kind: str
    names: tuple[str, ...]
    names_source: str
    num_channels: int
    image_dtype: str
    value_share: float | None
    sizes: tuple[tuple[int, int], ...]
    num_train: int
    num_eval: int
    class_shares: tuple[float, ...]
    class_image_shares: tuple[float, ...]
    num_sampled: int
    notes: tuple[str, ...]


class _Mask(NamedTuple):
    """Values of one mask with their numbers of pixels; colours as `pack_color` gives them."""

    name: str
    kind: str
    values: np.ndarray
    counts: np.ndarray
    palette: tuple[int, ...] = ()


def describe_data(root: str, choices: Mapping[str, Any] = _NO_CHOICES) -> DataDescription:
    """Find the layout of a data set, and measure a seeded sample of it.

    Up to 200 training masks, 50 evaluation masks and 50 images are read, drawn by `choices["seed"]`, or 0.

    Args:
        root: a folder, or a Hub data set as `owner/name`.
        choices: keys of the table `[data]` that the user has given; they settle what is ambiguous, and win.

    Raises:
        ValueError: if there is no known layout, or two readings fit; the message names the setting for each.
        OSError: if there is no such folder or data set, or a file cannot be read.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from hf_segformer.data.description import describe_data
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in "abcd":
        ...         Image.new("RGB", (9, 6)).save(Path(folder, f"{name}.jpg"))
        ...         mask = Image.new("L", (9, 6))
        ...         mask.paste(255, (0, 0, 3, 6))
        ...         mask.save(Path(folder, f"{name}_mask.png"))
        ...     description = describe_data(folder)
        >>> description.mask_kind, description.tables["label_values"], description.num_train, description.num_eval
        ('binary', [0, 255], 3, 1)
    """
    reading, tables = recognize_layout(root, choices)
    tables, source = _open(tables, choices)
    config = _config(tables)
    train = _read_masks(source.train, _NUM_TRAIN_MASKS, config)
    masks = [*train, *_read_masks(source.evaluation, _NUM_EVAL_MASKS, config)]
    images = _measure_images(source.train, config)
    try:
        kind = _kind_of(masks)
        meaning = _explain(kind, masks, reading, source, tables)
        tables = _names_and_colors(meaning, masks, reading, source) | tables | meaning.tables
        labels = _count_labels(train, DataConfig(**tables), meaning, source)
        channels = len(config.bands) or count_bands(images)
    except ValueError as error:
        raise ValueError(f"{config.root}, read as {reading.layout}: {error}") from error
    dtype = find_dtype(images)
    share = used_share(images, dtype)
    notes = [*_first_notes(reading, root, masks, source, tables), *reading.notes, *meaning.notes]
    if dtype == "uint16" and channels in (1, 3) and share is not None and share < NARROW and not config.value_range:
        tables["value_range"] = range_of_bits(images)
        notes += [f"Images use {share:.1%} of the range of {dtype}: {tables['value_range']} becomes 0 to 255."]
    return DataDescription(
        layout=reading.layout,
        tables=tables,
        mask_kind=meaning.mask_kind if kind == "indices" or meaning.mask_kind == "binary" else kind,
        names=meaning.names,
        names_source=meaning.names_source,
        num_channels=channels,
        image_dtype=dtype,
        value_share=share,
        sizes=tuple((image.height, image.width) for image in images),
        num_train=len(source.train) if isinstance(source.train, Dataset) else config.num_train,
        num_eval=len(source.evaluation),
        class_shares=tuple((labels.sum(axis=0) / max(labels.sum(), 1)).tolist()),
        class_image_shares=tuple((labels > 0).mean(axis=0).tolist()),
        num_sampled=len(masks),
        notes=tuple(notes),
    )


def _open(tables: dict[str, Any], choices: Mapping[str, Any]) -> tuple[dict[str, Any], Source]:
    """Open the data; of few images, a larger share is held out for evaluation, about ten up to 30 %."""
    source = open_source(_config(tables))
    if "eval_share" in tables and "eval_share" not in choices:
        share = round(min(0.3, max(0.1, 10 / (len(source.train) + len(source.evaluation)))), 3)
        if share != tables["eval_share"]:
            tables = tables | {"eval_share": share}
            source = open_source(_config(tables))
    return tables, source


def _config(tables: Mapping[str, Any]) -> DataConfig:
    """Return the configuration while colours of classes may still be unknown, without which none can be ignored."""
    return DataConfig(**{key: value for key, value in tables.items() if key != "ignore_colors"})


def _sample(rows: Any, number: int, seed: int) -> list[dict[str, Any]]:
    """Draw rows of a data set, in their order; of a stream the first ones."""
    if not isinstance(rows, Dataset):
        return list(islice(rows, number))
    drawn = np.random.default_rng(seed).permutation(len(rows))[:number]
    return list(rows.select(np.sort(drawn)))


def _read_masks(rows: Any, number: int, config: DataConfig) -> list[_Mask]:
    dtype = array_dtype(rows.features["label"])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        sampled = _sample(rows, number, config.seed)
        return list(threads.map(lambda row: _read_mask(row["label"], dtype, row.get("page"), config), sampled))


def _read_mask(label: Any, dtype: str | None, page: int | None, config: DataConfig) -> _Mask:
    name = file_name(label) or "a mask"
    if (drawn := read_drawn_mask(label, name, config.ignore_exif)) is not None:
        kind = next(kind for key, kind in _DRAWN.items() if key in label)
        return _Mask(name, kind, *_count_values(drawn))
    if not isinstance(label, str | dict):
        return _Mask(name, "indices", *_count_values(read_mask(np.asarray(label, dtype=dtype), name)))
    source = ImageSource(label, name)
    mode, palette = _peek(source)
    if config.mask_colors or mode not in _INDEX_MODES:
        return _Mask(name, "colors", *_count_values(read_color_mask(source, name, page, config.ignore_exif)))
    values = read_whole_mask(source, name, page, config.ignore_exif)
    return _Mask(name, "palette" if mode == "P" else "indices", *_count_values(values), palette)


def _peek(source: ImageSource) -> tuple[str, tuple[int, ...]]:
    """Return Pillow's mode of a file, without decoding its pixels, and the palette of one with indices."""
    try:
        with Image.open(source.file) as file:
            return file.mode, tuple(file.getpalette("RGB") or ()) if file.mode == "P" else ()
    except DECODE_ERRORS:  # a NumPy array, or a format of other readers
        return "", ()


def _count_values(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a mask and their numbers of pixels."""
    flat = mask.compressed() if isinstance(mask, np.ma.MaskedArray) else mask.ravel()
    if flat.dtype == bool:
        flat = flat.astype(np.uint8)
    if not flat.size:
        return flat, np.zeros(0, np.int64)
    # Runs of equal values, which are far fewer than pixels, instead of a sort of all of them.
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
    values, inverse = np.unique(flat[starts], return_inverse=True)
    lengths = np.diff(np.append(starts, flat.size))
    return values, np.bincount(inverse, lengths, len(values)).astype(np.int64)


def _kind_of(masks: Sequence[_Mask]) -> str:
    """Return the kind of all masks.

    Raises:
        ValueError: if some hold colours and others integers.
    """
    found = {mask.kind: mask.name for mask in masks}
    if "colors" in found and len(found) > 1:
        other = next(name for kind, name in found.items() if kind != "colors")
        raise ValueError(f"{found['colors']} holds colours and {other} integers; expected one kind of masks")
    return "indices" if len(found) > 1 else next(iter(found))


def _explain(kind: str, masks: Sequence[_Mask], reading: Reading, source: Source, tables: Mapping[str, Any]) -> Meaning:
    names, names_source = _find_names(reading, source, tables)
    if kind == "instances":
        return Meaning({}, names or ("foreground",), names_source if names else "generic", "binary")
    if kind == "panoptic":
        return Meaning({}, names, names_source, kind, ("Pixels of no segment (void) are ignored.",) * (len(names) > 1))
    if kind == "polygons":
        meaning = Meaning({}, names, names_source, "polygons")
        background = (
            "and what no polygon covers is ignored"
            if tables.get("reduce_labels")
            else ("and what no polygon covers is background")
        )
        return meaning._replace(notes=(f"Masks are drawn from polygons, {background}.",))
    shares: dict[int, float] = {}
    for mask in masks:
        for value, count in zip(mask.values.tolist(), mask.counts.tolist(), strict=True):
            shares[value] = shares.get(value, 0) + count
    if kind == "colors":
        folder = Path(tables["root"])
        listed = read_class_list(folder) if folder.is_dir() else None
        if listed is None and source.palette and len(source.palette) == len(source.names):
            listed = ClassList("the palette of classes.json", source.names, source.palette, ())
        return explain_colors(shares, listed, names, names_source, tables)
    fixed = dict(tables) | {"ignore_values": [*tables.get("ignore_values", ()), *source.ignore_values]}
    return explain_values(list(shares), names, names_source, fixed)


def _find_names(reading: Reading, source: Source, tables: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Return class names and where they come from: the user, the layout, or the data."""
    if tables.get("names"):
        return tuple(tables["names"]), "data.names"
    if reading.names:
        return reading.names, reading.names_source
    if not source.names:
        return (), ""
    if tables["source"] in ("coco", "panoptic"):
        return source.names, Path(tables["annotation_file"]).name
    folder = Path(tables["root"])
    files = [name for name in CLASS_FILES if (folder / name).is_file()] if folder.is_dir() else []
    return source.names, files[0] if files else "the features" if tables["source"] != "folders" else "the data"


def _names_and_colors(meaning: Meaning, masks: Sequence[_Mask], reading: Reading, source: Source) -> dict[str, Any]:
    """Return names and palette for `DataConfig` where the data set itself does not bring them."""
    tables: dict[str, Any] = {} if source.names == meaning.names else {"names": list(meaning.names)}
    colors = reading.palette or _stored_colors(masks, len(meaning.names))
    if not source.palette and len(colors) == len(meaning.names) > 1 and not meaning.tables:
        tables["palette"] = [list(color) for color in colors]
    return tables


def _stored_colors(masks: Sequence[_Mask], number: int) -> tuple[tuple[int, int, int], ...]:
    """Return the colours of the first classes in the masks' palette, if all are different."""
    palette = masks[0].palette[: 3 * number]
    colors = tuple(zip(palette[::3], palette[1::3], palette[2::3], strict=False))
    return colors if len({*colors}) == len(colors) == number else ()


def _count_labels(masks: Sequence[_Mask], config: DataConfig, meaning: Meaning, source: Source) -> np.ndarray:
    """Count the pixels of each label in each mask, int64 (masks, L)."""
    number = max(len(meaning.names), 2)
    mapping = build_mapping(
        len(meaning.names),
        reduce_labels=config.reduce_labels,
        label_values=config.label_values,
        ignore_values=(*config.ignore_values, *source.ignore_values),
        mask_colors=config.mask_colors,
        ignore_colors=config.ignore_colors,
    )
    rows = np.zeros((len(masks), number), np.int64)
    for row, mask in zip(rows, masks, strict=True):
        labels = mapping.apply(mask.values[None], mask.name)[0]
        is_class = labels != mapping.ignore_index
        row[labels[is_class]] += mask.counts[is_class]
    if not rows.any():
        raise ValueError("all pixels of the sampled masks are ignored: set data.ignore_values or data.label_values")
    return rows


def _measure_images(rows: Any, config: DataConfig) -> list[ImageMeasure]:
    dtype = array_dtype(rows.features["image"])
    sampled = _sample(rows, _NUM_IMAGES, config.seed)
    return [measure_image(row["image"], dtype, row.get("page"), config.ignore_exif) for row in sampled]


def _first_notes(
    reading: Reading, root: str, masks: Sequence[_Mask], source: Source, tables: Mapping[str, Any]
) -> list[str]:
    place = f" in {tables['root']}" if tables["root"] != root else ""
    total = len(source.evaluation) + (len(source.train) if isinstance(source.train, Dataset) else 0)
    notes = [f"Layout: {reading.layout}{place}.", f"{len(masks)} of {total} masks were sampled."]
    if share := tables.get("eval_share"):
        notes.append(
            f"No split to evaluate on: {share:.1%} of the images are held out at random (data.eval_share). Images of "
            "one film, patient or scene belong together: split.group=REGEX."
        )
    if tables["root"] == root or not Path(root, "classes.json").is_file():
        return notes
    return [*notes, f"{root}/classes.json is not read: it belongs into {tables['root']}."]


__all__ = ["DataDescription", "describe_data"]
