"""Checks of the data before a training: faults, class shares, and a figure of the model's input.

Axes: C bands, H W pixels, K classes, L labels that occur: K, or 2 for a single class.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from ..data.duplicates import difference_hash, find_near_duplicates
from ..data.image_measures import NARROW
from ..image_processing_segformer import SegFormerImageProcessor
from ..progress import Progress
from ..visualization import Color, colorize, figure, overlay
from .data import Data

SPLITS = ("train", "evaluation")

_NUM_STREAMED = 1000
_NUM_SHOWN, _MAX_FAULTS = 5, 50


def check_data(
    data: Data, num_classes: int, quiet: bool = False, image_counts: list[np.ndarray] | None = None
) -> np.ndarray:
    """Read every image and mask once, and count the pixels of each class.

    Of a stream only the first 1,000 samples are read. An evaluation image with the pixels of a training image, or
    nearly the same, is reported, not refused, since empty tiles are equal too; `splits.check_disjoint` has refused one
    file in both splits before.

    Args:
        data: what `load_data` gives.
        num_classes: number of classes K.
        quiet: print neither progress nor remarks, as in all processes but the main one.
        image_counts: a list to which the counts of each training image (L + 1) are appended, in order.

    Returns:
        int64 (2, L + 1): rows are training and evaluation, columns the labels, the last one ignored pixels.

    Raises:
        ValueError: if something is wrong; the message names the first files and what is wrong with each.

    Examples:
        >>> from hf_segformer.config import DataConfig
        >>> from hf_segformer.training.data import load_data
        >>> from hf_segformer.training.data_checks import check_data
        >>> data = load_data(DataConfig("shapes", image_size=32, num_train=4, num_eval=2))
        >>> check_data(data, num_classes=7).sum(axis=1).tolist()
        [4096, 2048]
    """
    num_labels = max(num_classes, 2)
    counts = np.zeros((2, num_labels + 1), dtype=np.int64)
    faults: list[str] = []
    seen: dict[bytes, str] = {}
    duplicates, turned = [], []
    hashes: dict[str, list[tuple[str, int | None]]] = {split: [] for split in SPLITS}
    ranges: list[tuple[float, float, float, float]] = []
    for row, split in enumerate(SPLITS):
        for place, found in _results(data, split, num_labels, quiet):
            if isinstance(found, str):
                faults.append(f"{place}: {found}")
                if len(faults) == _MAX_FAULTS:
                    break
                continue
            pixels, digest, hashed, used, is_turned = found
            ranges += [used] if used else []
            turned += [place] if is_turned else []
            counts[row] += pixels
            if split == "train":
                seen[digest] = place
                if image_counts is not None:
                    image_counts.append(pixels)
            elif digest in seen:
                duplicates.append(f"{place} is the same as {seen[digest]}")
                continue
            hashes[split].append((place, hashed))
    if faults:
        raise ValueError(_summary(faults))
    if data.is_stream and not quiet:
        print(f"Of the stream only the first {_NUM_STREAMED:,} samples were checked and counted.")
    if duplicates and not quiet:
        number = "1 evaluation image is" if len(duplicates) == 1 else f"{len(duplicates)} evaluation images are"
        rest = f"; and {len(duplicates) - _NUM_SHOWN} more" if len(duplicates) > _NUM_SHOWN else ""
        print(
            f"WARNING: {number} also in the training data: {'; '.join(duplicates[:_NUM_SHOWN])}{rest}. Metrics will be "
            "too high: remove them from one split."
        )
    if not quiet and (near := describe_near_duplicates(hashes["train"], hashes["evaluation"])):
        print(near)
    if turned and not quiet:
        number = "1 image is" if len(turned) == 1 else f"{len(turned)} images are"
        masks = "its mask is" if len(turned) == 1 else "their masks are"
        print(
            f"{number} turned by EXIF, but {masks} not: {turned[0]}. Where masks were drawn on the stored pixels, set "
            "data.ignore_exif=true."
        )
    if ranges and not quiet:
        print(describe_range(ranges))
    _check_counts(counts, data.names)
    return counts


def describe_range(ranges: Sequence[tuple[float, float, float, float]]) -> str:
    """Describe which part of the value range images use, with a warning where it is below a quarter.

    Args:
        ranges: what `SegFormerImageProcessor.used_range` gives for each.

    Examples:
        >>> from hf_segformer.training.data_checks import describe_range
        >>> print(describe_range([(12, 240, 0, 255)]))
        Images use values from 12 to 240, 89.4 % of the range 0 to 255.
    """
    low, high = min(each[0] for each in ranges), max(each[1] for each in ranges)
    first, last = ranges[0][2:]
    share = max(0.0, min(high, last) - max(low, first)) / (last - first)
    text = f"Images use values from {low:g} to {high:g}, {100 * share:.1f} % of the range {first:g} to {last:g}"
    if share >= NARROW:
        return f"{text}."
    return (
        f"WARNING: {text} that the network is fed: it hardly sees differences. Set data.value_range, for example "
        f'data.value_range="{low:g},{high:g}".'
    )


def describe_near_duplicates(
    train: Sequence[tuple[str, int | None]], evaluation: Sequence[tuple[str, int | None]]
) -> str:
    """Warn of evaluation images that are nearly the same as training images; empty where there are none.

    Args:
        train: name and `difference_hash` of each image.
        evaluation: the same.

    Examples:
        >>> from hf_segformer.training.data_checks import describe_near_duplicates
        >>> describe_near_duplicates([("film1/7.png", 2**30 - 1)], [("film1/8.png", 2**29 - 1)])[:70]
        'WARNING: 1 evaluation image is nearly the same as a training image (1 '
    """
    found = find_near_duplicates([each for _, each in train], [each for _, each in evaluation])
    if not found.pairs:
        return ""
    images = "image is" if found.num_evaluation == 1 else "images are"
    pairs = "; ".join(f"{evaluation[one][0]} and {train[other][0]}" for one, other in found.pairs)
    return (
        f"WARNING: {found.num_evaluation} evaluation {images} nearly the same as a training image ({found.num_pairs} "
        f"{'pair' if found.num_pairs == 1 else 'pairs'}): {pairs}. Metrics will be too high. Keep images of one film, "
        "patient or scene on one side: set split.group=REGEX, with data.eval_share=0.1 in place of data.eval_split."
    )


# Pixels of each label and ignored ones, a checksum, the difference hash, the used part of the value range, and turned
# by EXIF alone.
_Found = tuple[np.ndarray, bytes, int | None, tuple[float, float, float, float] | None, bool]


def _count(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Count the pixels of each label, and last the ignored ones."""
    counts = np.bincount(labels[(labels >= 0) & (labels < num_labels)], minlength=num_labels)
    return np.append(counts, labels.size - counts.sum())


def _results(data: Data, split: str, num_labels: int, quiet: bool) -> Iterator[tuple[str, _Found | str]]:
    """For each image its name, and what was found in it or its fault."""

    def examine(row: dict[str, Any], is_turned: bool = False) -> _Found:
        counts = _count(row["label"], num_labels)
        pixels = np.ascontiguousarray(np.ma.getdata(np.asanyarray(row["image"])))
        digest = blake2b(pixels.data, digest_size=16, key=repr(pixels.shape).encode())
        data.processor.apply_range(row["image"])  # refuses what training would refuse
        hashed = difference_hash(row["image"])
        return counts, digest.digest(), hashed, data.processor.used_range(row["image"]), is_turned

    def read(index: int) -> _Found | str:
        try:
            return examine(rows[index], data.is_turned_alone(split, index))
        except (ValueError, OSError) as error:
            return str(error)

    rows = getattr(data, split)
    number = len(rows) if isinstance(rows, Dataset) else _NUM_STREAMED
    with Progress(f"check {split}", number, "images", is_shown=not quiet) as bar:
        if not isinstance(rows, Dataset):
            place = split
            try:
                for index, row in enumerate(islice(rows, number)):
                    place = data.describe(split, index)
                    yield place, examine(row)
                    bar.update()
            except (ValueError, OSError) as error:  # ends a stream
                yield f"{split}, after {place}", str(error)
            return
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            try:
                for index, found in enumerate(threads.map(read, range(number))):
                    yield data.describe(split, index), found
                    bar.update()
            finally:
                threads.shutdown(cancel_futures=True)


def _summary(faults: Sequence[str]) -> str:
    if len(faults) == 1:
        return faults[0]
    number = f"{len(faults)} or more" if len(faults) == _MAX_FAULTS else str(len(faults))
    rest = f"; and {len(faults) - _NUM_SHOWN} more" if len(faults) > _NUM_SHOWN else ""
    return f"{number} images have faults: {'; '.join(faults[:_NUM_SHOWN])}{rest}"


def _check_counts(counts: np.ndarray, names: Sequence[str]) -> None:
    """Raise ValueError if no pixel is valid in training or in evaluation, or all of one class of two are ignored."""
    for split, labels in zip(SPLITS, counts[:, :-1], strict=True):
        if not labels.any():
            raise ValueError(f"all pixels of {split} are ignored: check data.ignore_values and data.label_values")
    *labels, ignored = counts.sum(axis=0).tolist()
    if len(labels) == 2 and ignored and not labels[1]:
        raise ValueError(
            f"no pixel is {names[-1]!r}, and {ignored / (labels[0] + ignored):.1%} are ignored: set "
            f"data.label_values=[0, VALUE], with the mask value of {names[-1]!r}, mostly 255 or 1"
        )


def format_counts(counts: np.ndarray, names: Sequence[str]) -> str:
    """Format shares of pixels by class, in percent, as a table; a class that never occurs has a dash.

    Args:
        counts: what `check_data` gives.
        names: names of the K classes.

    Examples:
        >>> import numpy as np
        >>> from hf_segformer.training.data_checks import format_counts
        >>> print(format_counts(np.array([[90, 0, 10], [50, 50, 0]]), ["road", "car"]))
                      train  evaluation
          road      100.000      50.000
          car             -      50.000
          ignored    10.000           -
        Class shares are of the valid pixels, the ignored share is of all pixels.
    """
    shown = (f"not {names[0]}", names[0]) if len(names) == 1 else names
    valid, total = counts[:, :-1].sum(axis=1), counts.sum(axis=1)
    shares = (
        100 * counts / np.maximum(np.where(np.arange(counts.shape[1]) < len(shown), valid[:, None], total[:, None]), 1)
    )
    width = max(len(name) for name in (*shown, "ignored"))
    lines = [f"  {'':{width}}  {'train':>8}  {'evaluation':>10}"]
    for name, *values in zip((*shown, "ignored"), *shares, strict=True):
        train, evaluation = (f"{value:.3f}" if value else "-" for value in values)
        lines.append(f"  {name:{width}}  {train:>8}  {evaluation:>10}")
    return "\n".join([*lines, "Class shares are of the valid pixels, the ignored share is of all pixels."])


def check_classes(names: Sequence[str], checkpoint_id2label: Mapping[Any, str]) -> str | None:
    """Compare the data's classes with those of a checkpoint whose head would be kept.

    Args:
        names: class names of the data.
        checkpoint_id2label: `id2label` of the checkpoint's config; Transformers' own `LABEL_0` are no names.

    Returns:
        a remark to print, or None.

    Raises:
        ValueError: if there are as many classes with other names or in another order: the head that would be kept has
            other meanings.

    Examples:
        >>> from hf_segformer.training.data_checks import check_classes
        >>> check_classes(["road", "car"], {0: "road", 1: "car", 2: "sky"})
        "the checkpoint's head is for 3 classes, the data have 2: its head is replaced"
    """
    # Published ADE20K checkpoints have names that end in a blank.
    own = [name.strip() for _, name in sorted((int(index), name) for index, name in checkpoint_id2label.items())]
    if own == [*names] or (len(own) == len(names) and own == [f"LABEL_{index}" for index in range(len(own))]):
        return None
    if len(own) != len(names):
        return f"the checkpoint's head is for {len(own)} classes, the data have {len(names)}: its head is replaced"
    kind = "in another order" if sorted(own) == sorted(names) else "by other names"
    raise ValueError(
        f"the checkpoint has as many classes as the data, but {kind}: its {', '.join(own)}; the data's "
        f"{', '.join(names)}. If they mean the same, set data.names to the checkpoint's; else start from a "
        "checkpoint without a head (segformer convert --encoder-only)"
    )


def show_batch(
    samples: Iterable[Mapping[str, Any]],
    names: Sequence[str],
    palette: Sequence[Color],
    processor: SegFormerImageProcessor,
    path: str | Path,
) -> None:
    """Write a PNG of the model's input: each image, its mask laid over it, and the mask alone; padding is hatched.

    Args:
        samples: `pixel_values` (C, H, W) and `labels` (H, W) of each, as `TrainDataset` gives them.
        names: names of the K classes.
        palette: one colour a class.
        processor: the images were normalised by it.
        path: the PNG file.

    Raises:
        OSError: if it cannot be written.
    """
    names, palette = list(names), list(palette)
    if len(names) == 1:
        names, palette = [f"not {names[0]}", *names], [(214, 209, 196), *palette]
    rows, captions = [], []
    for sample in samples:
        labels, pixels = np.asarray(sample["labels"]), np.asarray(sample["pixel_values"])
        image = _denormalized(pixels, processor)
        padding = (labels == processor.ignore_index) & (pixels == 0).all(axis=0)
        rows.append([image, overlay(image, labels, palette, padding=padding), colorize(labels, palette)])
        captions.append(_caption(labels, names))
    figure(rows, ("image", "mask over it", "mask"), names, palette, captions).save(path, "PNG")


def _denormalized(pixels: np.ndarray, processor: SegFormerImageProcessor) -> Image.Image:
    """Undo the normalisation; of other than three bands the first three, or the first, are shown with a stretch."""
    if processor.do_normalize:
        mean, std = (np.asarray(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    if len(pixels) == 3 or processor.value_range is not None:
        pixels = pixels / processor.rescale_factor if processor.do_rescale else pixels
        pixels = pixels[: 3 if len(pixels) >= 3 else 1]
    else:
        pixels = pixels[: 3 if len(pixels) > 3 else 1]
        low, high = np.percentile(pixels, (1, 99), axis=(1, 2), keepdims=True)
        pixels = 255 * (pixels - low) / np.maximum(high - low, 1e-6)
    pixels = np.broadcast_to(pixels, (3, *pixels.shape[1:]))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def _caption(labels: np.ndarray, names: Sequence[str]) -> str:
    """Size and largest classes of an image."""
    *shares, ignored = _count(labels, len(names)) / labels.size
    order = [int(label) for label in np.argsort(-np.array(shares), kind="stable")[:4] if shares[label] >= 0.005]
    parts = [f"{names[label]} {shares[label]:.0%}" for label in order]
    parts += [f"ignored {ignored:.0%}"] if ignored >= 0.005 else []
    return f"{labels.shape[0]}x{labels.shape[1]}: {', '.join(parts)}"


__all__ = ["check_classes", "check_data", "describe_near_duplicates", "describe_range", "format_counts", "show_batch"]
