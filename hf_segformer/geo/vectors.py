"""Vector files: polygons of a segmentation map written, and polygons of areas and labels read.

GeoJSON is read and written here, in WGS 84 (RFC 7946). GeoPackage and shapefiles go through GDAL (pyogrio), after a
check of their content: left to itself GDAL opens whatever a file's content asks for. Edges are straight in the
reference system of their file, and get vertices where they are bent in that of the scene. shapely, pyproj and pyogrio
are extras and imported where they are needed.
"""

import json
import re
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import partial_folder, printable
from .antimeridian import DECIMALS, WGS_84, to_wgs84
from .areas import AreaMeasure, horizontal
from .rasters import INSTALL, is_installed
from .vrt import check_grids

FORMATS = ("gpkg", "geojson")
_BATCH = 10_000
_MOST_BENT = 0.01  # pixels of the scene between an edge and its points
_MOST_SPLITS = 24  # halves an edge that often at most
_CRS_NAME = re.compile(r"(urn:ogc:def:crs:(?P<authority>EPSG|OGC):[\d.]*:|EPSG:)(?P<code>\w+)")
_SHAPEFILE_MAGIC = b"\0\0\x27\x0a"
_WRONG_CONTENT = (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)
_KINDS = {".gpkg": "GeoPackage", ".shp": "shapefile"}
_SQLITE_MAGIC, _GEOPACKAGE_IDS = b"SQLite format 3\0", (b"GPKG", b"GP10", b"GP11")
# What a GeoPackage is made of: only the index of its geometries is virtual.
_OWN_TABLE = re.compile(
    r'CREATE\s+((TABLE|VIEW|(UNIQUE\s+)?INDEX|TRIGGER)\b|VIRTUAL\s+TABLE\s+("[^"]*"|\w+)\s+USING\s+rtree\s*\()',
    re.IGNORECASE,
)


class Feature(NamedTuple):
    """A polygon to be written, with coordinates in the raster's reference system.

    Attributes:
        polygon: shapely's.
        label: class.
        name: of the class.
        area: in square metres.
        confidence: mean probability of the class, 0 to 1; None if it was not computed.
    """

    polygon: Any
    label: int
    name: str
    area: float
    confidence: float | None


def require(purpose: str, *packages: str) -> None:
    """Raise ValueError if a package of the extra is not installed."""
    missing = [name for name in packages if not is_installed(name)]
    if missing:
        raise ValueError(f"{purpose} needs {' and '.join(missing)}: {INSTALL}")


def write_features(path: Path, features: Iterable[Feature], crs: Any, kind: str) -> int:
    """Write polygons one batch after another.

    Args:
        path: of the file, which takes its place once it is complete.
        features: of the file.
        crs: pyproj's, of the coordinates.
        kind: one of `FORMATS`.

    Returns:
        number of features.

    Raises:
        ValueError: if they cannot be written in this format.
        OSError: if the file cannot be written.
    """
    write = _write_geojson if kind == "geojson" else _write_geopackage
    with partial_folder(path) as folder:
        partial = folder / path.name
        number = write(partial, features, crs)
        partial.replace(path)
    return number


def _write_geopackage(path: Path, features: Iterable[Feature], crs: Any) -> int:
    import pyogrio
    import shapely

    number, batches = 0, _in_batches(features)
    while (batch := next(batches, [])) or not number:
        columns = {
            "class_id": np.array([each.label for each in batch], np.int32),
            "class": np.array([printable(each.name) for each in batch], object),
            "area_m2": np.array([each.area for each in batch], np.float64),
            "confidence": np.array([np.nan if each.confidence is None else each.confidence for each in batch]),
        }
        try:
            pyogrio.raw.write(
                path,
                shapely.to_wkb([each.polygon for each in batch]) if batch else np.array([], object),
                list(columns.values()),
                list(columns),
                layer=path.stem,
                driver="GPKG",
                geometry_type="Polygon",
                crs=crs.to_wkt(),
                append=number > 0,
            )
        except pyogrio.errors.DataSourceError as error:
            raise OSError(f"{path.name} cannot be written: {error}") from error
        number += len(batch)
        if not batch:
            break
    return number


def _write_geojson(path: Path, features: Iterable[Feature], crs: Any) -> int:
    number = 0
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for batch in _in_batches(features):
            try:
                polygons = to_wgs84([each.polygon for each in batch], crs)
            except ValueError as error:
                raise ValueError(f"{path.name} cannot be written: {error}; choose --polygons gpkg") from error
            for feature, polygon in zip(batch, polygons, strict=True):
                file.write(("," if number else "") + "\n" + json.dumps(_as_json(feature, polygon), ensure_ascii=False))
                number += 1
        file.write("\n]}\n")
    return number


def _as_json(feature: Feature, polygon: Any) -> dict[str, Any]:
    parts = [
        [np.asarray(ring.coords)[:, :2].round(DECIMALS).tolist() for ring in (part.exterior, *part.interiors)]
        for part in getattr(polygon, "geoms", [polygon])
    ]
    return {
        "type": "Feature",
        "properties": {
            "class_id": feature.label,
            "class": printable(feature.name),
            "area_m2": round(feature.area, 3),
            "confidence": None if feature.confidence is None else round(feature.confidence, 4),
        },
        "geometry": {
            "type": polygon.geom_type,
            "coordinates": parts if polygon.geom_type == "MultiPolygon" else parts[0],
        },
    }


def _in_batches(features: Iterable[Feature]) -> Iterator[list[Feature]]:
    iterator = iter(features)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


class Polygons(NamedTuple):
    """Polygons of a file.

    Attributes:
        name: of the file.
        polygons: shapely's, each with one or several parts.
        values: of the attribute, one a polygon; empty without one.
    """

    name: str
    polygons: np.ndarray
    values: list[Any]


def read_polygons(path: Path, scene: AreaMeasure, attribute: str | None = None) -> Polygons:
    """Read the polygons of a GeoPackage, GeoJSON file or shapefile.

    Args:
        path: of the file.
        scene: to whose reference system they are transformed; within it their edges are exact to a part of a pixel.
        attribute: whose values are read.

    Raises:
        ValueError: if the file has no reference system, no polygons, several layers, or no such attribute.
        OSError: if it cannot be read.
    """
    import pyproj
    import shapely

    name = str(path)
    with path.open("rb") as file:
        head = file.read(100)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        geometries, values, own = _read_geojson(path, attribute)
    elif _is_geopackage(head) or head.startswith(_SHAPEFILE_MAGIC):
        _check_content(path, head)
        geometries, values, own = _read_by_gdal(path, attribute)
    else:
        raise ValueError(f"{name} is no GeoPackage, GeoJSON file or shapefile; expected one with polygons")
    if own is None:
        raise ValueError(
            f"{name} has no coordinate reference system; expected one: set it, for instance in QGIS or by ogr2ogr "
            "-a_srs EPSG:..."
        )
    check_grids(own.to_wkt(), name)
    is_polygon = np.isin(shapely.get_type_id(geometries), (3, 6)) & ~shapely.is_empty(geometries)
    if not is_polygon.any():
        raise ValueError(f"{name} holds no polygons; expected at least one")
    if not is_polygon.all():
        raise ValueError(f"{name} holds {(~is_polygon).sum()} geometries that are no polygons; expected polygons alone")
    try:
        with np.errstate(all="ignore"):
            geometries = _placed(geometries, own, scene)
    except (shapely.errors.ShapelyError, pyproj.exceptions.ProjError) as error:
        raise ValueError(f"{name} has coordinates that cannot be used: {error!s:.300}") from error
    bounds = shapely.bounds(geometries)[~shapely.is_empty(geometries)]
    if not len(bounds) or not np.isfinite(bounds).all():
        raise ValueError(f"{name} has places that {scene.crs.name} does not; expected polygons near the scene")
    return Polygons(name, geometries, values)


def _placed(geometries: np.ndarray, own: Any, scene: AreaMeasure) -> np.ndarray:
    """Return valid geometries in the reference system of a scene."""
    import pyproj
    import shapely

    invalid = ~shapely.is_valid(geometries)
    geometries[invalid] = shapely.make_valid(geometries[invalid], method="structure", keep_collapsed=False)
    if horizontal(own) == scene.crs:
        return geometries
    transformer = pyproj.Transformer.from_crs(own, scene.crs, always_xy=True)
    parts, wholes = shapely.get_parts(geometries, return_index=True)
    is_filled = ~shapely.is_empty(parts)
    rings, owners = shapely.get_rings(parts[is_filled], return_index=True)
    points, indices = shapely.get_coordinates(rings, return_index=True)
    points, indices = _bent(points, indices, transformer, scene)
    polygons = shapely.polygons(shapely.linearrings(points, indices=indices), indices=owners)
    return shapely.multipolygons(polygons, indices=wholes[is_filled], out=geometries.copy())


def _bent(
    points: np.ndarray, indices: np.ndarray, transformer: Any, scene: AreaMeasure
) -> tuple[np.ndarray, np.ndarray]:
    """Transform the points of rings, and halve edges until they are straight in the pixels of a scene.

    An edge is halved in the same way from both sides. One that passes the scene farther away than it is long only has
    to be on the right side of it.
    """
    placed = _placement(transformer)
    found = placed(points)
    is_open = np.append(np.diff(indices) == 0, False)  # of the edge that begins at each point
    for _ in range(_MOST_SPLITS):
        first = np.flatnonzero(is_open)
        edges, ends = (np.stack([each[first], each[first + 1]]) for each in (points, found))
        is_open[first] = is_bent = _are_bent(edges, ends, placed, scene)
        if not is_bent.any():
            break
        places, halves = first[is_bent] + 1, edges.mean(0)[is_bent]
        indices, is_open = np.insert(indices, places, indices[places]), np.insert(is_open, places, True)
        points, found = np.insert(points, places, halves, 0), np.insert(found, places, placed(halves), 0)
    return found, indices


def _are_bent(
    edges: np.ndarray, ends: np.ndarray, placed: Callable[[np.ndarray], np.ndarray], scene: AreaMeasure
) -> np.ndarray:
    """Return which edges (2, N, 2), whose ends are transformed, are bent in the pixels of a scene and near it.

    They are measured at their quarters: one that bends to both sides alike is straight at its middle.
    """
    to_pixels, middle = _Affine(~scene.transform), np.array([scene.width, scene.height]) / 2
    pixels = np.stack([to_pixels(each) for each in ends])
    halves, half_pixels = edges.mean(0), pixels.mean(0)
    away = [to_pixels(placed((edges[i] + halves) / 2)) - (pixels[i] + half_pixels) / 2 for i in (0, 1)]
    bends, lengths = np.maximum(*(np.hypot(*each.T) for each in away)), np.hypot(*(pixels[1] - pixels[0]).T)
    is_near = (np.abs(half_pixels - middle) <= middle + (lengths + bends)[:, None]).all(1)
    return is_near & (bends > _MOST_BENT)


def _placement(transformer: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return the transformation of points (N, 2) to points (N, 2)."""
    return lambda points: np.stack(transformer.transform(points[:, 0], points[:, 1]), 1)


def _is_geopackage(head: bytes) -> bool:
    return head.startswith(_SQLITE_MAGIC) and head[68:72] in _GEOPACKAGE_IDS


def _check_content(path: Path, head: bytes) -> None:
    """Refuse names by which GDAL would choose another driver, and tables that are stored in other files."""
    ending = ".gpkg" if _is_geopackage(head) else ".shp"
    if path.suffix.lower() != ending:
        raise ValueError(f"{path} is a {_KINDS[ending]} of another name; expected one that ends in {ending}: rename it")
    if ending == ".shp":
        return
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            tables = database.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise OSError(f"{path} cannot be read: {error}") from error
    for table, made in tables:
        if not _OWN_TABLE.match(str(made)):
            raise ValueError(
                f"{path} has a table {printable(str(table)):.80} that is virtual; expected tables of its own"
            )


def _read_by_gdal(path: Path, attribute: str | None) -> tuple[np.ndarray, list[Any], Any]:
    import pyogrio
    import pyproj
    import shapely

    require(str(path), "pyogrio")
    place = path.resolve()  # a scheme such as s3:// would be an address
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of columns and geometries that are not read
            layers = [name for name, kind in pyogrio.list_layers(place) if kind is not None]
            if len(layers) != 1:
                raise ValueError(f"{path} has {len(layers)} layers with geometries; expected one{_listed(layers)}")
            known = pyogrio.read_info(place, layer=layers[0])["fields"]
            _check_attribute(path, attribute, known)
            columns = [] if attribute is None else [attribute]
            about, _, wkb, fields = pyogrio.raw.read(place, layer=layers[0], columns=columns, force_2d=True)
            geometries = shapely.from_wkb(wkb)
        crs = pyproj.CRS.from_user_input(about["crs"]) if about["crs"] else None
        return geometries, fields[0].tolist() if attribute is not None else [], crs
    except (
        pyogrio.errors.DataSourceError,
        pyogrio.errors.DataLayerError,
        pyproj.exceptions.ProjError,
        shapely.errors.ShapelyError,
        UnicodeDecodeError,
    ) as error:
        raise OSError(f"{path} cannot be read: {' '.join(str(error).split()):.300}") from error


def _listed(names: Sequence[str]) -> str:
    return f": {printable(', '.join(map(str, names))):.300}" if names else ""


def _read_geojson(path: Path, attribute: str | None) -> tuple[np.ndarray, list[Any], Any]:
    import pyproj
    import shapely

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        features = content["features"] if content["type"] == "FeatureCollection" else [content]
        if attribute is not None:
            _check_attribute(path, attribute, dict.fromkeys(key for each in features for key in each["properties"]))
        values = [] if attribute is None else [each["properties"].get(attribute) for each in features]
        with np.errstate(all="ignore"):
            shapes = [shapely.geometry.shape(each.get("geometry", each)) for each in features]
        crs = _stated_crs(path, content.get("crs"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no GeoJSON: {error}") from error
    except (*_WRONG_CONTENT, shapely.errors.ShapelyError, pyproj.exceptions.ProjError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} is no GeoJSON with polygons ({type(error).__name__}: {error!s:.300})") from error
    return shapely.force_2d(np.array(shapes, object)), values, crs


def _stated_crs(path: Path, stated: Any) -> Any:
    """Return the reference system of a GeoJSON file: WGS 84, unless an older file names another one by its code."""
    import pyproj

    if stated is None:
        return pyproj.CRS.from_user_input(WGS_84)
    found = _CRS_NAME.fullmatch(str(stated["properties"]["name"]))  # never a path, which PROJ would read
    if not found:
        raise ValueError(f"{path} has the reference system {stated!s:.80}; expected an EPSG code, or none for WGS 84")
    return pyproj.CRS.from_user_input(f"{found['authority'] or 'EPSG'}:{found['code']}")


def _check_attribute(path: Path, attribute: str | None, known: Iterable[str]) -> None:
    names = [str(name) for name in known]
    if attribute is not None and attribute not in names:
        raise ValueError(f"{path} has no attribute {attribute!r}; expected one of {printable(', '.join(names))}")


def to_pixels(polygons: Sequence[Any] | np.ndarray, transform: Any) -> np.ndarray:
    """Return polygons in the pixel coordinates of a raster.

    Args:
        polygons: shapely's, in the raster's reference system.
        transform: the raster's, from pixels to it.
    """
    import shapely

    return shapely.transform(np.asarray(polygons, object), _Affine(~transform))


def from_pixels(polygons: Sequence[Any] | np.ndarray, transform: Any) -> np.ndarray:
    """Return polygons in pixel coordinates in the raster's reference system."""
    import shapely

    return shapely.transform(np.asarray(polygons, object), _Affine(transform))


class _Affine:
    """Points (N, 2) -> points (N, 2)."""

    def __init__(self, matrix: Any):
        self.linear = np.array([[matrix.a, matrix.d], [matrix.b, matrix.e]])
        self.offset = np.array([matrix.c, matrix.f])

    def __call__(self, points: np.ndarray) -> np.ndarray:
        return points @ self.linear + self.offset


__all__ = ["FORMATS", "Feature", "Polygons", "from_pixels", "read_polygons", "require", "to_pixels", "write_features"]
