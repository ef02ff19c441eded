"""Labels of a scene by tiles: from a raster on its grid, or drawn from the polygons of a vector file.

Axes: h w a tile's sides.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..data.reader_protocol import ImageSource, ReadOptions, Tile
from ..files import BACKGROUND
from .areas import AreaMeasure
from .geotiff import GeoRaster
from .rasters import raster_kind
from .vectors import Polygons, from_pixels, read_polygons, require, to_pixels

_MOST_SHIFT = 0.01  # pixels between grids that count as one


class LabelSource(Protocol):
    """Labels of a scene.

    Attributes:
        names: of the classes.
        ignored: label of ignored pixels.
    """

    names: list[str]
    ignored: int

    def read(self, tile: Tile) -> np.ndarray:
        """Return the labels of a tile, uint8 or uint16 (h, w), which may be changed."""

    def __enter__(self) -> "LabelSource": ...

    def __exit__(self, *error: Any) -> None: ...


def open_labels(
    path: Path, scene: GeoRaster, attribute: str | None, classes: Sequence[str], ignore_outside: bool
) -> LabelSource:
    """Open the labels of a scene.

    Args:
        path: of a raster, or of a vector file.
        scene: that they belong to.
        attribute: of the polygons, whose values are the classes; without one all are of one class.
        classes: names in order; by default those of the file.
        ignore_outside: ignore pixels outside all polygons.

    Raises:
        ValueError: if they do not fit the scene.
        OSError: if the file cannot be read.
    """
    twice = [name for name in classes if list(classes).count(name) > 1]
    if twice:
        raise ValueError(f"--classes has {twice[0]!r} twice; expected different names")
    source = ImageSource(path)
    if raster_kind(source) is None:
        return DrawnLabels(path, scene, attribute, classes, ignore_outside)
    if attribute is not None or ignore_outside:
        option = "--attribute" if attribute is not None else "--ignore-outside"
        raise ValueError(f"{option} is given, but {path} is a raster; expected a vector file for it, or leave it out")
    return RasterLabels(source, scene, classes)


def _label_type(names: Sequence[str]) -> type[np.integer]:
    return np.uint8 if len(names) <= 255 else np.uint16


class RasterLabels:
    """Labels from a raster on the grid of the scene; see `LabelSource`.

    Names are `classes`, or those that the raster's tags name `class_0`, `class_1`, ..., as predicted maps do.
    """

    def __init__(self, source: ImageSource, scene: GeoRaster, classes: Sequence[str]):
        self.raster = GeoRaster(source, ReadOptions(1, is_mask=True, num_rows=scene.options.num_rows))
        try:
            self._check_grid(scene)
            tags = self.raster.file.tags(1)
            tagged = [tags[f"class_{index}"] for index in range(len(tags)) if f"class_{index}" in tags]
            self.names = list(classes or tagged)
            if not self.names:
                raise ValueError(f"{source.name} does not name its classes; expected their names by --classes")
        except BaseException:
            self.raster.close()
            raise
        self.ignored = int(np.iinfo(_label_type(self.names)).max)

    def _check_grid(self, scene: GeoRaster) -> None:
        import shapely

        raster, ours, theirs = self.raster, scene.reference(), self.raster.reference()
        if raster.dtype.kind not in "iu":
            raise ValueError(f"{raster.name} has the type {raster.dtype}; expected integers, the labels")
        corners = shapely.MultiPoint([(0, 0), (scene.width, 0), (0, scene.height)])
        [placed] = to_pixels(from_pixels([corners], theirs.transform), ours.transform)
        distance = np.abs(shapely.get_coordinates(placed) - shapely.get_coordinates(corners)).max()
        is_equal = (raster.height, raster.width) == (scene.height, scene.width) and distance <= _MOST_SHIFT
        if not is_equal or (ours.crs and theirs.crs and ours.crs != theirs.crs):
            raise ValueError(
                f"{raster.name} is not on the grid of {scene.name} ({raster.height}x{raster.width} pixels, "
                f"{theirs.crs or 'no reference system'}; expected {scene.height}x{scene.width}, {ours.crs}): warp it "
                f"first (rio warp {Path(raster.name).name} warped.tif --like {Path(scene.name).name})"
            )

    def read(self, tile: Tile) -> np.ndarray:
        """See `LabelSource.read`."""
        pixels, _ = self.raster.read(tile)
        stored, missing = np.ma.getdata(pixels)[0], np.ma.getmaskarray(pixels)[0]
        known = stored[~missing]
        if known.size and not 0 <= known.min() <= known.max() < len(self.names):
            wrong = int(known.max() if known.max() >= len(self.names) else known.min())
            raise ValueError(
                f"{self.raster.name} holds the value {wrong} near row {tile.top} and column {tile.left}; expected 0 to "
                f"{len(self.names) - 1}, a class each, or no data: name more by --classes, or declare no data "
                f"(rio edit-info {Path(self.raster.name).name} --nodata {wrong})"
            )
        labels = np.full(stored.shape, self.ignored, _label_type(self.names))
        labels[~missing] = known
        return labels

    def __enter__(self) -> "RasterLabels":
        self.raster.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.raster.__exit__(*error)


class DrawnLabels:
    """Labels drawn from polygons: a pixel has the class of the last polygon that its centre is in; see `LabelSource`.

    The first class is the background, unless pixels outside all polygons are ignored; polygons may be of it, too. The
    others are the values of the attribute in their order.
    """

    def __init__(
        self, path: Path, scene: GeoRaster, attribute: str | None, classes: Sequence[str], ignore_outside: bool
    ):
        import shapely

        require(str(path), "shapely", "pyproj")
        measure = AreaMeasure(scene.reference(), scene.name)
        found = read_polygons(path, measure, attribute)
        polygons = to_pixels(found.polygons, measure.transform)
        if not shapely.intersects(polygons, shapely.box(0, 0, scene.width, scene.height)).any():
            raise ValueError(f"{path} does not meet {scene.name}; expected polygons within the scene")
        first = [] if ignore_outside else [BACKGROUND]
        values = _class_values(found, attribute)
        own = [name for name in classes if name not in first] or _in_order(values)
        self.names = [*first, *(name for name in own if name not in first)]
        unknown = sorted(set(map(str, values)) - set(self.names))
        if unknown:
            raise ValueError(
                f"{path} has the value {unknown[0]!r} in {attribute}; expected one of {', '.join(own)}, the --classes"
            )
        if self.names == first:
            raise ValueError(
                f"{path} has polygons of the class {BACKGROUND} alone; expected another one, or --ignore-outside"
            )
        self.ignored = int(np.iinfo(_label_type(self.names)).max)
        self.outside = self.ignored if ignore_outside else 0
        self._labels = [self.names.index(str(value)) for value in values]
        self._tree = shapely.STRtree(polygons)

    def read(self, tile: Tile) -> np.ndarray:
        """See `LabelSource.read`."""
        import rasterio
        import shapely
        from rasterio.features import rasterize

        top, left, height, width = tile
        labels = np.full((height, width), self.outside, _label_type(self.names))
        inside = np.sort(self._tree.query(shapely.box(left, top, left + width, top + height), predicate="intersects"))
        if len(inside):
            drawn = [(self._tree.geometries[index], self._labels[index]) for index in inside]
            rasterize(drawn, out=labels, transform=rasterio.Affine.translation(left, top))
        return labels

    def __enter__(self) -> "DrawnLabels":
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def _class_values(found: Polygons, attribute: str | None) -> list[Any]:
    """Return the class of each polygon: the attribute's value, or for all the name of the file.

    Raises:
        ValueError: if a value is missing, or none that names a class.
    """
    if attribute is None:
        return [Path(found.name).stem] * len(found.polygons)
    for index, value in enumerate(found.values):
        if isinstance(value, float) and value.is_integer():
            found.values[index] = int(value)
        elif not isinstance(value, str | int) or value == "":
            raise ValueError(
                f"{found.name} has the value {value!r} in {attribute}, polygon {index + 1}; expected a text or a whole "
                "number, the class"
            )
    return found.values


def _in_order(values: Sequence[Any]) -> list[str]:
    """Return the different values, numbers before texts, each in its order."""
    return [str(value) for value in sorted(set(values), key=lambda value: (isinstance(value, str), value))]


__all__ = ["DrawnLabels", "LabelSource", "RasterLabels", "open_labels"]
