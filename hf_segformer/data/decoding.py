"""Decoding of rows: stored images and masks to pixels and labels, when they are asked for.

Axes: C bands, H W pixels, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..files import BACKGROUND
from ..image_io_segformer import exif_orientation, read_image, read_mask
from .label_mapping import LabelMapping
from .panoptic import read_segments
from .polygons import draw_polygons
from .reader_protocol import ImageSource, choose_bands, has_data
from .readers import read_color_mask, read_whole_image, read_whole_mask
from .volume_pairs import is_volume, read_slice


@dataclass(frozen=True)
class RowReader:
    """Transform for rows whose columns `image` and `label` are paths, encoded files or arrays; for `with_transform`.

    A mask may also be `{"polygons": ...}`, as `polygons.open_coco` gives them, `{"segments": ...}` of
    `panoptic.open_panoptic`, or `{"masks": ...}` of `pairing.pair_in_image_folders`.

    Args:
        num_channels: bands C of an image.
        mapping: from mask values to labels.
        image_dtype: of images that are stored as arrays.
        label_dtype: of masks that are stored as arrays.
        ignore_exif: keep images and masks as they are stored, whatever their EXIF orientation.
        any_range: accept integers of any range, since a value range is applied later.
        bands: numbers, from 1, of the bands to read, in the model's order; None for all.
        names: of the classes, for masks of volumes whose segments have names.
    """

    num_channels: int
    mapping: LabelMapping
    image_dtype: str | None = None
    label_dtype: str | None = None
    ignore_exif: bool = False
    any_range: bool = False
    bands: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Decode columns of rows: images as `read_whole_image` gives them, and labels (H, W).

        A column `page`, if there is one, says which image of a file with several is meant.

        Raises:
            ValueError: if image and mask do not fit; names their files.
            OSError: if a file cannot be read.
        """
        pages = batch.get("page") or [None] * len(batch["image"])
        rows = zip(batch["image"], batch["label"], pages, strict=True)
        pairs = [self.read(image, label, page) for image, label, page in rows]
        return {"image": [image for image, _ in pairs], "label": [label for _, label in pairs]}

    def read(self, image: Any, label: Any, page: int | None = None) -> tuple[Image.Image | np.ndarray, np.ndarray]:
        """Decode one image and its labels, which are ignored where the image holds no data in any band."""
        image_name, label_name = file_name(image) or "the image", file_name(label) or "the mask"
        pixels: Image.Image | np.ndarray
        if page is not None and isinstance(image, str) and is_volume(image):
            pixels, values = self._slice(image, label, page)
        else:
            pixels, values = self._image(image, image_name, page), self._mask(label, label_name, page)
        size = (pixels.height, pixels.width) if isinstance(pixels, Image.Image) else pixels.shape[1:]
        if values.shape != tuple(size):
            raise ValueError(
                f"{label_name} is {values.shape[0]}x{values.shape[1]} (height x width); expected the size of its image "
                f"{image_name}, {size[0]}x{size[1]}{self._exif_hint(image, values.shape, tuple(size))}"
            )
        labels, valid = self.mapping.apply(values, label_name), has_data(pixels)
        return pixels, labels if valid is None else np.where(
            valid, labels, labels.dtype.type(self.mapping.ignore_index)
        )

    def _slice(self, image: str, label: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Read a slice of a volume, and of its mask."""
        if self.mapping.are_colors:
            raise ValueError(f"{label} is the mask of a volume, which holds no colours: leave out mask_colors")
        values = self.mapping.values
        classes = dict(zip(self.names, values[1:] if len(self.names) == 1 else values, strict=False))
        own = next((value for name, value in classes.items() if name.casefold() == BACKGROUND), None)
        outside = values[0] if len(self.names) == 1 else own
        options = {"any_range": self.any_range, "bands": self.bands}
        return read_slice(image, label, index, self.num_channels, classes, outside, **options)

    def _image(self, image: Any, name: str, page: int | None) -> Image.Image | np.ndarray:
        if not _is_file(image, name):
            array = np.asarray(image, dtype=self.image_dtype)
            array = array if self.bands is None else choose_bands(array, self.bands, name)
            return read_image(array, self.num_channels, None, name, self.any_range)
        options = {"page": page, "ignore_exif": self.ignore_exif, "any_range": self.any_range, "bands": self.bands}
        return read_whole_image(image, self.num_channels, name, **options)

    def _mask(self, label: Any, name: str, page: int | None) -> np.ndarray:
        if (drawn := read_drawn_mask(label, name, self.ignore_exif)) is not None:
            return drawn
        if _is_file(label, name):
            read = read_color_mask if self.mapping.are_colors else read_whole_mask
            return read(label, name, page, self.ignore_exif)
        if self.mapping.are_colors:
            raise ValueError(f"{name} is stored as numbers, not as an image; expected colours: leave out mask_colors")
        return read_mask(np.asarray(label, dtype=self.label_dtype), name)

    def _exif_hint(self, image: Any, mask_size: tuple[int, ...], size: tuple[int, ...]) -> str:
        if self.ignore_exif or mask_size != size[::-1] or not isinstance(image, str | dict):
            return ""
        if exif_orientation(ImageSource(image).file) == 1:
            return ""
        return ". EXIF turns the image but not the mask: take both as stored (--as-stored, or data.ignore_exif=true)"


def read_drawn_mask(label: Any, name: str, ignore_exif: bool = False) -> np.ndarray | None:
    """Read a mask that a data set keeps as polygons, as segments, or as several masks; None for one of another kind.

    Args:
        label: of a row.
        name: what error messages call the mask.
        ignore_exif: see `RowReader`.

    Returns:
        integers (H, W).
    """
    if not isinstance(label, dict):
        return None
    if "polygons" in label:
        return draw_polygons(label["polygons"], name)
    if "segments" in label:
        return read_segments(label, name, ignore_exif)
    return read_instances(label["masks"], ignore_exif) if "masks" in label else None


def read_instances(masks: Sequence[str], ignore_exif: bool = False) -> np.ndarray:
    """Read masks of one object each, and return their union, uint8 (H, W): 1 where any of them is not 0.

    Args:
        masks: the files.
        ignore_exif: see `RowReader`.

    Raises:
        ValueError: if one holds several values beside 0, or is of another size than the first.
        OSError: if one cannot be read.
    """
    union = np.zeros((0, 0), bool)
    for number, file in enumerate(masks):
        mask = read_whole_mask(file, ignore_exif=ignore_exif)
        is_object = np.ma.filled(mask, 0) != 0
        union = union if number else np.zeros_like(is_object)
        if is_object.shape != union.shape:
            sizes = ["x".join(map(str, each.shape)) for each in (is_object, union)]
            raise ValueError(f"{file} is {sizes[0]} (height x width); expected {sizes[1]}, as {masks[0]}")
        values = np.unique(np.ma.getdata(mask)[is_object])
        if len(values) > 1:
            raise ValueError(
                f"{file} holds {values[0]}, {values[1]} and so on beside 0; expected one object, since "
                "data.instance_masks is set"
            )
        union |= is_object
    return union.astype(np.uint8)


def _is_file(value: Any, name: str) -> bool:
    """Return True for a path or an encoded file, False for an array."""
    if value is None:
        raise ValueError(f"{name} is missing: the row holds nothing there")
    return isinstance(value, str | dict)


def file_name(source: Any) -> str | None:
    """Return the file that a row's value comes from, None where it does not say."""
    return source.get("path") if isinstance(source, dict) else source if isinstance(source, str) else None


def array_dtype(feature: Any) -> str | None:
    """Return the dtype of a column that holds arrays or nested lists."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return getattr(feature, "dtype", None)


__all__ = ["RowReader", "array_dtype", "file_name", "read_drawn_mask", "read_instances"]
