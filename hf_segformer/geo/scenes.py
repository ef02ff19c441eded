"""Scenes of a prediction: restricted to an area of interest, or several joined to a mosaic.

Axes: h w a tile's sides.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.reader_protocol import Kind, Reader, Tile
from ..data.sources import FileSource, InputItem
from .areas import AreaMeasure
from .geotiff import GeoRaster
from .mosaic import MosaicRaster
from .vectors import read_polygons, require, to_pixels

_NEAR = 8  # pixels beside a tile that its logits reach: two cells of their grid


class SceneSource(FileSource):
    """The rasters of `FileSource`, within an area or as one mosaic.

    Args:
        inputs: see `FileSource`.
        out: see `FileSource`.
        pages: see `FileSource`.
        aoi: file with the polygons of the area; pixels whose centres are outside become no data.
        mosaic: join all rasters to one.
        **reading: further arguments of `FileSource`.

    Attributes:
        aoi_digest: of the file's content; empty without one.
        mosaic_digest: of the names and times of the joined rasters; empty without.

    Raises:
        ValueError: see `FileSource`; or if a package is missing.
        OSError: see `FileSource`; or if the file of the area cannot be read.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        out: Path,
        pages: bool = False,
        *,
        aoi: Path | None = None,
        mosaic: bool = False,
        **reading: Any,
    ):
        require("an area of interest or a mosaic", "rasterio", "shapely", "pyproj")
        super().__init__(inputs, out, pages, joined=mosaic, **reading)
        self._aoi, self._is_mosaic = aoi, mosaic
        self.aoi_digest = hashlib.sha256(aoi.read_bytes()).hexdigest()[:16] if aoi else ""
        self.mosaic_digest = ""
        if mosaic:
            paths = [str(item.source) for item in self._items]
            stamps = [f"{os.path.abspath(path)} {os.stat(path).st_mtime_ns}" for path in paths]
            self.mosaic_digest = hashlib.sha256("\n".join(stamps).encode(errors="surrogateescape")).hexdigest()[:16]
            self._items = [InputItem("mosaic", paths[0], None, tuple(paths))]

    def open(self, item: InputItem, num_channels: int = 3, **options: Any) -> Reader:
        """Open a scene; see `FileSource.open`."""
        raster: Any
        if not self._is_mosaic:
            raster = super().open(item, num_channels, **options)
        else:
            reading = {"ignore_exif": self.ignore_exif, "bands": self.bands, **options}
            raster = MosaicRaster.join(item.files, num_channels, **reading)
        if self._aoi is not None:
            if not isinstance(raster, GeoRaster):
                raise ValueError(f"{raster.name} has no georeference; expected one for an area of interest")
            raster.restrict(Region.read(self._aoi, raster))
        return raster

    def kind(self, item: InputItem) -> Kind:
        """Return the kind of a scene; see `FileSource.kind`."""
        kind = "raster" if self._is_mosaic else super().kind(item)
        if kind != "raster":
            raise ValueError(f"{self.describe(item)} is no raster; expected one for an area of interest")
        return kind

    def origin(self, item: InputItem) -> str:
        """Return a unique identifier of the scene."""
        return f"mosaic {self.mosaic_digest}" if self._is_mosaic else super().origin(item)


class Region:
    """Polygons in the pixel coordinates of a raster.

    Args:
        polygons: shapely's.
    """

    def __init__(self, polygons: np.ndarray):
        import shapely

        self._tree = shapely.STRtree(polygons)

    @classmethod
    def read(cls, path: Path, raster: GeoRaster) -> "Region":
        """Read the polygons of a file for a raster.

        Raises:
            ValueError: if they do not meet the raster, or cannot be read.
        """
        import shapely

        reference = raster.reference()
        measure = AreaMeasure(reference, raster.name)
        polygons = to_pixels(read_polygons(path, measure).polygons, measure.transform)
        if not shapely.intersects(polygons, shapely.box(0, 0, raster.width, raster.height)).any():
            west, north, east, south = shapely.total_bounds(polygons).round().tolist()
            raise ValueError(
                f"{path} does not meet {raster.name}: its polygons are within columns {west:.0f} to {east:.0f} and "
                f"rows {north:.0f} to {south:.0f} of a scene of {raster.width} columns and {raster.height} rows; "
                "expected an area within the scene"
            )
        return cls(polygons)

    def is_near(self, tile: Tile) -> bool:
        """Return True if a tile's logits reach into the polygons."""
        import shapely

        top, left, height, width = tile
        box = shapely.box(left - _NEAR, top - _NEAR, left + width + _NEAR, top + height + _NEAR)
        return len(self._tree.query(box, predicate="intersects")) > 0

    def inside(self, tile: Tile) -> np.ndarray:
        """Return where the centres of a tile's pixels are within a polygon, bool (h, w)."""
        import rasterio
        import shapely
        from rasterio.features import rasterize

        top, left, height, width = tile
        found = self._tree.query(shapely.box(left, top, left + width, top + height), predicate="intersects")
        if not len(found):
            return np.zeros((height, width), bool)
        moved = rasterio.Affine.translation(left, top)
        return rasterize(list(self._tree.geometries[found]), (height, width), transform=moved, dtype="uint8") == 1


__all__ = ["Region", "SceneSource"]
