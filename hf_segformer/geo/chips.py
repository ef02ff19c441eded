"""Training chips of a scene: images and masks of one size with georeference, split by blocks of the scene.

Neighbouring pixels look alike, so that chips that are split at random let a model be evaluated on what it has seen.
Here the scene is cut into blocks of several chips, each block belongs to one split, and a chip that meets blocks of
both is left out. rasterio, shapely and pyproj are extras and imported where they are needed.

Axes: C bands, h w a chip's sides.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.reader_protocol import Tile
from ..files import atomic_directory, check_new_or_empty, printable, write_json
from ..progress import Progress
from ..visualization import palette_for
from .chip_labels import LabelSource, open_labels
from .geotiff import GeoRaster, open_all_bands

SPLITS = ("train", "val")
_DRAWS = 64  # of the blocks for validation, of which the one with the most typical classes is taken


@dataclass(frozen=True)
class ChipOptions:
    """Options of `cut_chips`.

    Args:
        size: side of a chip in pixels.
        stride: pixels from one chip to the next; 0 is `size`.
        block: side of a block in chips.
        val_share: share of the blocks for validation.
        max_no_data: largest share of pixels without data or label.
        max_background: largest share of the chips of a split that hold nothing but the first class.
        attribute: of a vector file, whose values are the classes.
        classes: names of the classes in order; by default those of the file.
        ignore_outside: pixels outside all polygons are ignored, instead of being background.
        bands: numbers, from 1, of the bands to keep; None for all.
        seed: of the split, and of the choice among chips of background.

    Raises:
        ValueError: if a value is out of range.
    """

    size: int = 512
    stride: int = 0
    block: int = 4
    val_share: float = 0.2
    max_no_data: float = 0.2
    max_background: float = 1.0
    attribute: str | None = None
    classes: tuple[str, ...] = ()
    ignore_outside: bool = False
    bands: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self):
        for name, least in (("size", 32), ("stride", 0), ("block", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        for name in ("max_no_data", "max_background"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share from 0 to 1")
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share is {self.val_share}; expected a share above 0 and below 1")
        if self.ignore_outside and self.max_background < 1:
            raise ValueError("max_background is given with ignore_outside, which leaves no background; leave one out")


class Chip(NamedTuple):
    """A chip, and what it holds.

    Attributes:
        tile: place in the scene.
        blocks: that it meets.
        pixels: number of pixels of each class.
        no_data: share of pixels without data or label.
    """

    tile: Tile
    blocks: frozenset[tuple[int, int]]
    pixels: np.ndarray
    no_data: float

    @property
    def is_background(self) -> bool:
        """True if no pixel is of another class than the first one."""
        return not self.pixels[1:].any()


def cut_chips(
    scene: str | Path, labels: str | Path, out: str | Path, options: ChipOptions | None = None, progress: bool = True
) -> dict[str, Any]:
    """Cut a scene and its labels into training chips, which a recipe reads as `data.source=folders`.

    Args:
        scene: a raster with a reference system.
        labels: a raster of integers on the same grid, or a vector file with polygons.
        out: a new or empty folder: `images/train`, `masks/train`, `images/val`, `masks/val`, classes.json and
            chips.json.
        options: see `ChipOptions`.
        progress: show progress in chips.

    Returns:
        the contents of chips.json: of each split the chips and the pixels by class, and how many chips were left out.

    Raises:
        ValueError: if scene and labels do not fit, or no chips remain for a split.
        OSError: if a file cannot be read or written.
    """
    options, out = options or ChipOptions(), Path(out)
    check_new_or_empty(out)
    with open_all_bands(scene, options.bands, options.size) as raster:
        if min(raster.height, raster.width) < options.size:
            raise ValueError(
                f"{raster.name} has {raster.height}x{raster.width} pixels; expected at least one chip of "
                f"{options.size}x{options.size}: choose a smaller --size"
            )
        with open_labels(Path(labels), raster, options.attribute, options.classes, options.ignore_outside) as source:
            chips, left_out = _measure(raster, source, options, progress)
            splits = _split(chips, options, left_out)
            with atomic_directory(out) as folder:
                _write(raster, source, splits, folder, progress)
                report = _report(splits, source.names, left_out, options)
                write_json({"names": source.names, "palette": palette_for(source.names)}, folder / "classes.json")
                write_json(report, folder / "chips.json")
    return report


def chip_places(height: int, width: int, options: ChipOptions) -> Iterator[Chip]:
    """Yield the chips of a scene without their contents; the last ones of a side end at the scene's border."""
    size, stride, side = options.size, options.stride or options.size, options.size * options.block

    def starts(length: int) -> list[int]:
        regular = list(range(0, length - size + 1, stride))
        return regular if regular[-1] == length - size else [*regular, length - size]

    for top, left in product(starts(height), starts(width)):
        rows, columns = (range(first // side, (first + size - 1) // side + 1) for first in (top, left))
        yield Chip(Tile(top, left, size, size), frozenset(product(rows, columns)), np.zeros(0, np.int64), 0.0)


def _read(raster: GeoRaster, source: LabelSource, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """Return a chip (C, h, w) and its labels (h, w), which are ignored where the scene holds no data."""
    pixels, valid = raster.read(tile)
    labels = source.read(tile)
    if valid is not None:
        labels[~valid] = source.ignored
    return pixels, labels


def _measure(
    raster: GeoRaster, source: LabelSource, options: ChipOptions, progress: bool
) -> tuple[list[Chip], Counter[str]]:
    """Return the chips with enough data, and the number of those left out."""
    kept, left_out = [], Counter[str]()
    places = list(chip_places(raster.height, raster.width, options))
    with Progress("look at chips", len(places), "chips", is_shown=progress) as bar:
        for place in places:
            _, labels = _read(raster, source, place.tile)
            counts = np.bincount(labels[labels != source.ignored], minlength=len(source.names))
            chip = place._replace(pixels=counts, no_data=1 - float(counts.sum()) / labels.size)
            if chip.no_data > options.max_no_data or not counts.any():
                left_out["no data"] += 1
            else:
                kept.append(chip)
            bar.update()
    return kept, left_out


def _split(chips: Sequence[Chip], options: ChipOptions, left_out: Counter[str]) -> dict[str, list[Chip]]:
    """Divide chips by blocks, and leave out those between splits and superfluous ones of background."""
    blocks = sorted({block for chip in chips for block in chip.blocks})
    if len(blocks) < 2:
        raise ValueError(
            f"{len(chips)} chips are in {len(blocks)} block of {options.block}x{options.block} chips; expected at "
            "least 2 blocks to split: choose a smaller --block or --size, or a larger --max-no-data"
        )
    random = np.random.default_rng(options.seed)
    number = min(max(round(options.val_share * len(blocks)), 1), len(blocks) - 1)
    draws = [{blocks[i] for i in random.permutation(len(blocks))[:number]} for _ in range(_DRAWS)]
    divided = [_divide(chips, validation) for validation in draws]
    best = min(divided, key=_imbalance)
    if not all(best.values()):
        raise ValueError(
            f"the blocks leave no chips for {' or '.join(name for name in SPLITS if not best[name])}; expected some "
            "in each split: choose a smaller --block, or no --stride"
        )
    left_out["between splits"] += len(chips) - sum(map(len, best.values()))
    for name, members in best.items():
        best[name] = _without_background(members, options.max_background, random)
        left_out["background"] += len(members) - len(best[name])
    return best


def _divide(chips: Sequence[Chip], validation: set[tuple[int, int]]) -> dict[str, list[Chip]]:
    return {
        "train": [chip for chip in chips if not chip.blocks & validation],
        "val": [chip for chip in chips if chip.blocks <= validation],
    }


def _imbalance(splits: dict[str, list[Chip]]) -> float:
    """Distance of the splits' class shares; 2 where one is empty."""
    if not all(splits.values()):
        return 2.0
    train, validation = (np.sum([chip.pixels for chip in splits[name]], axis=0) for name in SPLITS)
    return float(np.abs(train / train.sum() - validation / validation.sum()).sum())


def _without_background(chips: list[Chip], most: float, random: np.random.Generator) -> list[Chip]:
    """Leave out chips of background at random until their share is at most `most`."""
    empty = [index for index, chip in enumerate(chips) if chip.is_background]
    others = len(chips) - len(empty)
    allowed = len(empty) if most == 1 else int(most / (1 - most) * others + 1e-9)
    dropped = set(random.permutation(empty)[allowed:].tolist())
    return [chip for index, chip in enumerate(chips) if index not in dropped]


def _write(raster: GeoRaster, source: LabelSource, splits: dict[str, list[Chip]], folder: Path, progress: bool) -> None:
    stem = printable(Path(raster.name).stem)
    with Progress("write chips", sum(map(len, splits.values())), "chips", is_shown=progress) as bar:
        for split, chips in splits.items():
            for kind in ("images", "masks"):
                (folder / kind / split).mkdir(parents=True)
            for chip in chips:
                pixels, labels = _read(raster, source, chip.tile)
                name = f"{stem}_r{chip.tile.top:06d}_c{chip.tile.left:06d}.tif"
                raster.write_part(folder / "images" / split / name, chip.tile, pixels, palette=raster.palette)
                raster.write_part(folder / "masks" / split / name, chip.tile, labels[None], source.ignored)
                bar.update()


def _report(
    splits: dict[str, list[Chip]], names: Sequence[str], left_out: Counter[str], options: ChipOptions
) -> dict[str, Any]:
    report: dict[str, Any] = {"size": options.size, "seed": options.seed, "left_out": dict(sorted(left_out.items()))}
    for split, chips in splits.items():
        pixels = np.sum([chip.pixels for chip in chips], axis=0)
        shares = (pixels / pixels.sum()).round(6).tolist()
        classes = [
            {"name": name, "pixels": count, "share": share, "chips": int(sum(chip.pixels[index] > 0 for chip in chips))}
            for index, (name, count, share) in enumerate(zip(names, pixels.tolist(), shares, strict=True))
        ]
        background = sum(chip.is_background for chip in chips)
        report[split] = {"chips": len(chips), "background_chips": background, "classes": classes}
    return report


__all__ = ["SPLITS", "Chip", "ChipOptions", "chip_places", "cut_chips"]
