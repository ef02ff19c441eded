"""Areas of pixels and polygons in square metres.

In a projected reference system they are areas of its plane, in its linear unit; in a geographic one they are areas on
the ellipsoid. Pixels of a north-up geographic raster are bounded by parallels and meridians, whose zones have a closed
form (Snyder, Map Projections, 1987, equations 3-12 and 14-16). The edges of polygons are straight in longitude and
latitude, as GeoJSON defines them (RFC 7946, 3.1.1), so that polygons have the area of the pixels within. pyproj and
shapely are extras and imported where they are needed.

Axes: H W sides of the raster.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..files import atomic_write, csv_text, printable
from ..inference.spool import rows_of
from ..inference.tiling import MaskLayout
from .cog import Reference
from .rasters import INSTALL, is_installed
from .vrt import check_grids

logger = logging.get_logger(__name__)

NO_DATA = "(no data)"
_MOST_DISTORTION = 0.01
_HECTARE = 10_000.0


class AreaMeasure:
    """Areas in a raster.

    Args:
        reference: of the raster, with a reference system and a transform.

    Attributes:
        crs: reference system of pyproj.
        height: of the raster, in pixels.
        width: in pixels.
        transform: from pixels to the reference system.
        is_geographic: areas are those on the ellipsoid.
        unit: of the coordinates, in metres or degrees.

    Raises:
        ValueError: if there is no reference system, or no transform to it.
    """

    def __init__(self, reference: Reference, name: str):
        import pyproj

        if reference.points[0]:
            raise ValueError(
                f"{name} has ground control points; expected a transform to its coordinate reference system: warp it "
                f"first (rio warp {Path(name).name} warped.tif --dst-crs EPSG:...)"
            )
        if reference.crs is None:
            raise ValueError(
                f"{name} has no coordinate reference system; expected one: set it (rio edit-info "
                f"{Path(name).name} --crs EPSG:...)"
            )
        check_grids(reference.crs.to_wkt(), name)
        self.crs = horizontal(pyproj.CRS.from_user_input(reference.crs.to_wkt()))
        self.height, self.width = reference.height, reference.width
        self.transform, self.name = reference.transform, name
        self.is_geographic = self.crs.is_geographic
        factor = self.crs.axis_info[0].unit_conversion_factor if self.crs.axis_info else 1.0
        self.unit = float(np.degrees(factor)) if self.is_geographic else factor

    def of_rows(self, top: int, num_rows: int, width: int) -> np.ndarray:
        """Return the areas of the pixels of some rows, of a shape that broadcasts to (num_rows, width)."""
        matrix = self.transform
        if not self.is_geographic:
            return np.full((1, 1), abs(matrix.determinant) * self.unit**2)
        rows = np.arange(top, top + num_rows + 1, dtype=np.float64)[:, None]
        if not (matrix.b or matrix.d):
            latitudes = np.radians(self.unit * (matrix.f + matrix.e * rows))
            zones = _zone(self.crs.ellipsoid, latitudes)
            return np.abs(np.diff(zones, axis=0)) * np.radians(abs(matrix.a) * self.unit)
        columns = np.arange(width) + 0.5
        latitudes = np.radians(self.unit * (matrix.f + matrix.e * (rows[:-1] + 0.5) + matrix.d * columns))
        return _element(self.crs.ellipsoid, latitudes) * abs(matrix.determinant) * np.radians(self.unit) ** 2

    def of_polygons(self, polygons: Sequence[Any]) -> np.ndarray:
        """Return the areas of polygons whose coordinates are those of the reference system."""
        import shapely

        if not self.is_geographic:
            return shapely.area(polygons) * self.unit**2
        rings, owners = shapely.get_rings(shapely.segmentize(list(polygons), 5 / self.unit), return_index=True)
        is_hole = np.append(False, np.diff(owners) == 0)
        areas = self._of_rings(rings)
        return np.bincount(owners, np.where(is_hole, -areas, areas), len(polygons))

    def _of_rings(self, rings: np.ndarray) -> np.ndarray:
        """Return the areas within rings: integrals of the zone over the longitude, of each edge by Simpson's rule."""
        import shapely

        points, indices = shapely.get_coordinates(rings, return_index=True)
        longitudes, latitudes = np.radians(points * self.unit).T
        ends = _zone(self.crs.ellipsoid, latitudes)
        middles = _zone(self.crs.ellipsoid, (latitudes[:-1] + latitudes[1:]) / 2)
        means = (ends[:-1] + 4 * middles + ends[1:]) / 6 - ends[:1]
        edges = np.where(np.diff(indices) == 0, means * np.diff(longitudes), 0)
        return np.abs(np.bincount(indices[1:], edges, len(rings)))

    def distortion(self, height: int, width: int) -> float:
        """Return the area in the plane of a projected system divided by the true one, at the middle of the raster."""
        import pyproj

        if self.is_geographic or not self.crs.is_projected:
            return 1.0
        matrix, column, row = self.transform, width / 2, height / 2
        x, y = (a * column + b * row + c for a, b, c in (matrix[:3], matrix[3:6]))
        back = pyproj.Transformer.from_crs(self.crs, self.crs.geodetic_crs, always_xy=True)
        longitude, latitude = back.transform(x, y)
        scale = pyproj.Proj(self.crs).get_factors(longitude, latitude).areal_scale
        return float(scale) if np.isfinite(scale) else 1.0


def horizontal(crs: Any) -> Any:
    """Return the horizontal part of a reference system of pyproj."""
    if crs.is_bound:
        crs = crs.source_crs
    return crs.sub_crs_list[0] if crs.is_compound else crs


def write_areas(path: Path, labels: np.ndarray, layout: MaskLayout, reference: Reference) -> dict[str, float] | None:
    """Write `NAME_areas.csv` beside a segmentation map `NAME_mask.tif`, or `STEM_areas.csv` beside another one.

    Columns are class, pixels, square_metres and hectares; no data is a line of its own. A file without a reference
    system, or with ground control points alone, has no areas.

    Args:
        path: of the map.
        labels: (H, W).
        layout: of the labels.
        reference: of the raster.

    Returns:
        the square metres of each line, or None.

    Raises:
        OSError: if the file cannot be written.
    """
    if reference.points[0]:
        logger.warning(f"{path}: no areas are written, since the scene has ground control points alone: warp it first")
        return None
    if reference.crs is None:
        return None
    if not is_installed("pyproj"):
        logger.warning(f"{path}: no areas are written, since pyproj is missing: {INSTALL}")
        return None
    measure = AreaMeasure(reference, str(path))
    names = [*layout.names, NO_DATA]
    pixels, metres = np.zeros(len(names), np.int64), np.zeros(len(names))
    for top, rows in rows_of(labels):
        classes = np.minimum(rows, len(layout.names)).astype(np.int64)
        areas = measure.of_rows(top, *rows.shape)
        counts = _counts_by_row(classes, len(names)) if areas.shape[1] == 1 else None
        if counts is None:
            pixels += np.bincount(classes.ravel(), minlength=len(names))
            metres += np.bincount(classes.ravel(), weights=areas.ravel(), minlength=len(names))
        else:
            pixels += counts.sum(0)
            metres += (counts * areas).sum(0)
    scale = measure.distortion(*labels.shape)
    if abs(scale - 1) > _MOST_DISTORTION:
        logger.warning(
            f"{path}: the areas of {measure.crs.name} are {scale:.3f} times the true ones here; warp the scene to an "
            "equal-area system, or to UTM, for areas on the ground"
        )
    target = path.with_name(f"{path.stem.removesuffix('_mask')}_areas.csv")
    lines = [
        (printable(name), count, f"{area:.3f}", f"{area / _HECTARE:.6f}")
        for name, count, area in zip(names, pixels.tolist(), metres.tolist(), strict=True)
    ]
    with atomic_write(target) as partial:
        partial.write_text(csv_text([("class", "pixels", "square_metres", "hectares"), *lines]), encoding="utf-8")
    return dict(zip(names, metres.tolist(), strict=True))


def _counts_by_row(classes: np.ndarray, number: int) -> np.ndarray:
    """Count the pixels of each class in each row, (rows, number)."""
    rows = np.arange(len(classes))[:, None] * number
    return np.bincount((classes + rows).ravel(), minlength=len(classes) * number).reshape(-1, number)


def _zone(ellipsoid: Any, latitudes: np.ndarray) -> np.ndarray:
    """Area from the equator to each latitude for one radian of longitude, in square metres."""
    b, e2 = ellipsoid.semi_minor_metre, _squared_eccentricity(ellipsoid)
    sine = np.sin(latitudes)
    if not e2:
        return b**2 * sine
    e = np.sqrt(e2)
    return b**2 / 2 * (sine / (1 - e2 * sine**2) + np.arctanh(e * sine) / e)


def _element(ellipsoid: Any, latitudes: np.ndarray) -> np.ndarray:
    """Area at a latitude for each radian of longitude and of latitude, in square metres."""
    b, e2 = ellipsoid.semi_minor_metre, _squared_eccentricity(ellipsoid)
    return b**2 * np.cos(latitudes) / (1 - e2 * np.sin(latitudes) ** 2) ** 2


def _squared_eccentricity(ellipsoid: Any) -> float:
    return 1 - (ellipsoid.semi_minor_metre / ellipsoid.semi_major_metre) ** 2


__all__ = ["NO_DATA", "AreaMeasure", "horizontal", "write_areas"]
