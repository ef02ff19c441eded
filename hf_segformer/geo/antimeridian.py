"""Polygons in WGS 84 for GeoJSON: cut at the antimeridian, exteriors counterclockwise (RFC 7946, 3.1.6 and 3.1.9).

Edges that are straight in a projection are bent in degrees, most of all near the poles; they get vertices in between.
Longitudes then go on beyond 180 degrees along a ring, so that one that comes back 360 degrees away encloses a pole and
is closed along it. What lies outside -180 to 180 is cut off and moved. shapely and pyproj are extras and imported where
they are needed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

WGS_84 = "OGC:CRS84"
DECIMALS = 9  # of degrees: a tenth of a millimetre
_MOST_BENT = 1e-3  # of an edge, by its length
_MOST_SPLITS = 12  # halves an edge that often at most


def to_wgs84(polygons: Sequence[Any], crs: Any) -> list[Any]:
    """Return polygons in longitude and latitude, within -180 to 180 and -90 to 90 degrees.

    Args:
        polygons: shapely's, in the reference system.
        crs: pyproj's.

    Returns:
        for each a polygon, or several where the antimeridian cuts it.

    Raises:
        ValueError: if a polygon has places that WGS 84 does not, or encloses both poles, or if the reference system has
            no places on the Earth.
    """
    import shapely

    transformer = wgs84_transformer(crs)
    oriented = shapely.orient_polygons(list(polygons), exterior_cw=_is_mirrored(crs))
    rings, owners = shapely.get_rings(oriented, return_index=True)
    found = _Rings(rings, crs, transformer)
    first = np.flatnonzero(np.diff(owners, prepend=-1)).tolist()  # the exteriors
    if (found.signed_areas()[first] < 0).any():
        raise ValueError("a polygon encloses both poles")
    inside = found.are_inside()
    parts = []
    for start, end in zip(first, [*first[1:], len(rings)], strict=True):
        exterior, *holes = found.split(start, end)
        if inside[start:end].all():
            parts.append(shapely.Polygon(exterior, holes))
            continue
        whole = shapely.difference(_wrapped(exterior), shapely.union_all([_wrapped(hole[::-1]) for hole in holes]))
        parts.append(_polygonal(whole))
    if shapely.is_empty(parts).any():
        raise ValueError("a polygon leaves WGS 84")
    return list(shapely.orient_polygons(parts))


def wgs84_transformer(crs: Any) -> Any:
    """Return pyproj's transformer from a reference system to longitude and latitude.

    Raises:
        ValueError: if there is none: the system is local, or that of another celestial body.
    """
    import pyproj

    try:
        return pyproj.Transformer.from_crs(crs, WGS_84, always_xy=True)
    except pyproj.exceptions.ProjError as error:
        raise ValueError(f"the reference system {crs.name} has no longitudes and latitudes on the Earth") from error


class _Rings:
    """Closed rings in degrees, whose longitudes go on along each of them.

    Attributes:
        degrees: longitudes and latitudes (N, 2) of all rings.
        starts: index of the first point of each ring.
    """

    def __init__(self, rings: np.ndarray, crs: Any, transformer: Any):
        import shapely

        points, indices = shapely.get_coordinates(rings, return_index=True)
        degrees = _transformed(points, transformer)
        if crs.is_geographic:  # edges are straight already, however wide
            unit = np.degrees(crs.axis_info[0].unit_conversion_factor)
            degrees[:, 0] += 360 * np.round((points[:, 0] * unit - degrees[:, 0]) / 360)
        else:
            points, indices, degrees = _bent(points, indices, degrees, transformer)
            steps = np.diff(degrees[:, 0], prepend=degrees[:1, 0])
            turns = np.cumsum(-360 * np.round(steps / 360))
            degrees[:, 0] += turns - turns[np.flatnonzero(np.diff(indices, prepend=-1))][indices]
        self.degrees, self.starts = degrees, np.flatnonzero(np.diff(indices, prepend=-1))

    def signed_areas(self) -> np.ndarray:
        """Return the areas in square degrees, positive for counterclockwise rings; of those around a pole as well."""
        (x, y), (next_x, next_y) = self.degrees.T, np.roll(self.degrees, -1, 0).T
        edges = (x * next_y - next_x * y) / 2
        last = np.append(self.starts[1:], len(x)) - 1
        edges[last] = 0
        ends_x, start_x = x[last], x[self.starts]
        poles = np.sign(ends_x - start_x) * 90 * (np.abs(ends_x - start_x) > 180)
        # From the end up to the pole, back along it and down to the start.
        closing = (ends_x * poles - ends_x * y[last]) + (ends_x * poles - start_x * poles)
        closing += start_x * y[self.starts] - start_x * poles
        return np.add.reduceat(edges, self.starts) + closing / 2

    def are_inside(self) -> np.ndarray:
        """Return which rings stay within -180 to 180 and -90 to 90 degrees."""
        outside = (np.abs(self.degrees) > np.array([180, 90]) + 10.0**-DECIMALS).any(1)
        last = np.append(self.starts[1:], len(self.degrees)) - 1
        is_open = np.abs(self.degrees[last, 0] - self.degrees[self.starts, 0]) > 180
        return ~(np.logical_or.reduceat(outside, self.starts) | is_open)

    def split(self, first: int, last: int) -> list[np.ndarray]:
        """Return the points (n, 2) of some rings."""
        ends = np.append(self.starts[1:], len(self.degrees))
        return [self.degrees[self.starts[i] : ends[i]] for i in range(first, last)]


def _is_mirrored(crs: Any) -> bool:
    """Return True if the axes are those of a mirrored map, such as south and west of S-JTSK (Krovak)."""
    east = {"east": 1, "west": -1}
    north = {"north": 1, "south": -1}
    first, second = (axis.direction for axis in crs.axis_info[:2])
    if first in north and second in east:  # pyproj swaps north and east alone
        return (first, second) != ("north", "east") and north[first] * east[second] > 0
    return first in east and second in north and east[first] * north[second] < 0


def _transformed(points: np.ndarray, transformer: Any) -> np.ndarray:
    degrees = np.stack(transformer.transform(points[:, 0], points[:, 1]), 1)
    if not np.isfinite(degrees).all():
        raise ValueError("a polygon leaves WGS 84")
    return degrees


def _bent(
    points: np.ndarray, indices: np.ndarray, degrees: np.ndarray, transformer: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Halve edges until they are nearly straight in degrees; an edge is halved in the same way from both sides."""
    for _ in range(_MOST_SPLITS):
        at = np.flatnonzero(np.diff(indices) == 0)  # edges, not the steps from ring to ring
        middles = ((points[:-1] + points[1:]) / 2)[at]
        exact = _transformed(middles, transformer)
        scale = np.stack([np.cos(np.radians(exact[:, 1])), np.ones(len(exact))], 1)
        edges, bends = np.diff(degrees, axis=0)[at], exact - degrees[:-1][at]
        for each in (edges, bends):
            each[:, 0] -= 360 * np.round(each[:, 0] / 360)
        is_bent = np.hypot(*((bends - edges / 2) * scale).T) > _MOST_BENT * np.hypot(*(edges * scale).T)
        if not is_bent.any():
            break
        places = at[is_bent]
        points = np.insert(points, places + 1, middles[is_bent], 0)
        degrees = np.insert(degrees, places + 1, exact[is_bent], 0)
        indices = np.insert(indices, places + 1, indices[places])
    return points, indices, degrees


def _closed(ring: np.ndarray) -> np.ndarray:
    """Close a ring that ends 360 degrees from its start along a pole: eastwards it went around the north pole."""
    turn = ring[-1, 0] - ring[0, 0]
    if abs(turn) < 180:
        return ring
    pole = 90.0 * np.sign(turn)
    return np.concatenate([ring, [[ring[-1, 0], pole], [ring[0, 0], pole]], ring[:1]])


def _wrapped(ring: np.ndarray) -> Any:
    """Return what a counterclockwise ring encloses, cut at the antimeridian and moved to -180 to 180 degrees."""
    import shapely

    grid = 10.0**-DECIMALS
    whole = shapely.make_valid(shapely.Polygon(_closed(ring)))
    west, _, east, _ = whole.bounds
    parts = []
    for turn in range(round(np.floor((west + 180) / 360)), round(np.floor((east + 180) / 360)) + 1):
        middle = 360 * turn
        part = shapely.intersection(whole, shapely.box(middle - 180, -90, middle + 180, 90))
        parts.append(shapely.transform(_polygonal(part), lambda points, middle=middle: points - [middle, 0]))
    return shapely.union_all(parts, grid_size=grid)


def _polygonal(geometry: Any) -> Any:
    """Return the polygons of a geometry, without the lines and points where parts touch."""
    import shapely

    parts = shapely.get_parts(shapely.get_parts(geometry))
    return shapely.union_all(parts[shapely.get_type_id(parts) == 3])


__all__ = ["DECIMALS", "WGS_84", "to_wgs84", "wgs84_transformer"]
