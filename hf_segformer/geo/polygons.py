"""Polygons of a segmentation map of any size, simplified together, so that neighbours keep their common border.

The map is cut into blocks. In each, GDAL traces the regions of equal labels, whose polygons then get a vertex wherever
any of them turns or three of them meet: they are a valid coverage, also across blocks. A coverage is simplified by
removing vertices of common borders from all polygons at once (Visvalingam and Whyatt, 1993, as in GEOS); those on the
edges of a block stay. Regions that continue in the next block are therefore joined exactly: nothing is lost or
covered twice. Memory holds one block, and the parts of the regions that reach the row of blocks in work. shapely and
rasterio are extras and imported where they are needed.

Axes: H W sides of the map, h w those of a block. Coordinates are pixels, x to the right and y downwards.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

BLOCK = 1024
_OUTSIDE = -1


class Region(NamedTuple):
    """A connected region of equal labels.

    Attributes:
        polygon: shapely's, with holes.
        label: of its pixels.
        num_pixels: number of its pixels before simplification.
        confidence: mean of their confidence; None without any.
    """

    polygon: Any
    label: int
    num_pixels: int
    confidence: float | None


def trace_regions(
    labels: np.ndarray,
    ignored: int,
    confidence: np.ndarray | None = None,
    tolerance: float = 1.0,
    block_size: int = BLOCK,
) -> Iterator[Region]:
    """Yield the regions of a segmentation map, connected by edges, as soon as they are complete.

    Args:
        labels: integers (H, W), in memory or not.
        ignored: the label that yields no regions.
        confidence: (H, W), or None.
        tolerance: of the simplification in pixels, the square root of the area of triangles that may be cut off; 0
            keeps the edges of pixels.
        block_size: side of a block.
    """
    height, width = labels.shape
    groups = _Groups()
    above = np.zeros(0, np.int64)  # regions along the lower edge of the row of blocks above
    for top in range(0, height, block_size):
        below = np.zeros(width, np.int64)
        beside = np.zeros(0, np.int64)
        for left in range(0, width, block_size):
            block = _padded(labels, top, left, block_size)
            ids, parts = _trace_block(block, tolerance)
            here = slice(top, top + ids.shape[0]), slice(left, left + ids.shape[1])
            ids = groups.add(parts, ids, ignored, (top, left), None if confidence is None else confidence[here])
            if top:
                groups.join(above[here[1]], ids[0], block[0, 1:-1] == block[1, 1:-1])
            if left:
                groups.join(beside, ids[:, 0], block[1:-1, 0] == block[1:-1, 1])
            below[here[1]], beside = ids[-1], ids[:, -1]
        yield from groups.take_all_but(below)
        above = below
    yield from groups.take_all_but(np.zeros(0, np.int64))


def _padded(labels: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    """Return a block with the pixels around it, int32 (h + 2, w + 2); those outside the map are -1."""
    height, width = labels.shape
    h, w = min(size, height - top), min(size, width - left)
    padded = np.full((h + 2, w + 2), _OUTSIDE, np.int32)
    first, start = max(top - 1, 0), max(left - 1, 0)
    part = labels[first : top + h + 1, start : left + w + 1]
    y, x = first - (top - 1), start - (left - 1)
    padded[y : y + part.shape[0], x : x + part.shape[1]] = part
    return padded


def _trace_block(padded: np.ndarray, tolerance: float) -> tuple[np.ndarray, list[tuple[Any, int]]]:
    """Return the region of each pixel, from 0, int32 (h, w), and each region's polygon and label."""
    import shapely
    from rasterio.features import rasterize, shapes

    block = np.ascontiguousarray(padded[1:-1, 1:-1])
    traced = [(shapely.geometry.shape(each), int(label)) for each, label in shapes(block, connectivity=4)]
    polygons = np.array([polygon for polygon, _ in traced], dtype=object)
    ids = rasterize(((polygon, i) for i, polygon in enumerate(polygons)), block.shape, fill=-1, dtype="int32")
    polygons = _with_vertices(polygons, _corners(padded))
    if tolerance:
        polygons = shapely.coverage_simplify(polygons, tolerance, simplify_boundary=False)
    return ids, [(polygon, label) for polygon, (_, label) in zip(polygons, traced, strict=True)]


def _corners(padded: np.ndarray) -> np.ndarray:
    """Return where a border that passes the corner of four pixels has a vertex, bool (h + 1, w + 1)."""
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    corners = ~(((a == b) & (c == d)) | ((a == c) & (b == d)))
    for edge in (0, -1):  # of the block, along which both blocks turn at every border that crosses it
        corners[edge] |= (a != b)[edge] | (c != d)[edge]
        corners[:, edge] |= (a != c)[:, edge] | (b != d)[:, edge]
    corners[:: corners.shape[0] - 1, :: corners.shape[1] - 1] = True
    return corners


def _with_vertices(polygons: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Give polygons whose edges are those of pixels a vertex at these corners, and nowhere else."""
    import shapely

    rings, owners = shapely.get_rings(shapely.segmentize(polygons, 1.0), return_index=True)
    points, indices = shapely.get_coordinates(rings, return_index=True)
    is_last = np.append(np.diff(indices) > 0, True)  # the first one again
    x, y = points.round().astype(np.int64).T
    kept = corners[y, x] & ~is_last
    rings = shapely.linearrings(points[kept], indices=indices[kept])
    return shapely.polygons(rings, indices=owners)


class _Part(NamedTuple):
    polygon: Any
    num_pixels: int
    confidence: float


class _Groups:
    """Parts of regions, joined as far as the map is traced."""

    def __init__(self):
        self.parts: dict[int, list[_Part]] = {}
        self.labels: dict[int, int] = {}
        self.parents: dict[int, int] = {}
        self.next = 1  # 0 stands for no region

    def add(
        self,
        traced: list[tuple[Any, int]],
        ids: np.ndarray,
        ignored: int,
        place: tuple[int, int],
        confidence: np.ndarray | None,
    ) -> np.ndarray:
        """Add the regions of a block; return the number of each pixel's region, int64 (h, w)."""
        import shapely

        counts = np.bincount(ids.ravel(), minlength=len(traced)).tolist()
        sums = [0.0] * len(traced)
        if confidence is not None:
            sums = np.bincount(ids.ravel(), weights=confidence.ravel(), minlength=len(traced)).tolist()
        moved = shapely.transform([polygon for polygon, _ in traced], lambda points: points + place[::-1])
        numbers = np.zeros(len(traced), np.int64)
        for index, (_, label) in enumerate(traced):
            if label != ignored:
                number, self.next = self.next, self.next + 1
                numbers[index], self.labels[number] = number, label
                self.parts[number] = [_Part(moved[index], counts[index], sums[index])]
        self._has_confidence = confidence is not None
        return numbers[ids]

    def join(self, first: np.ndarray, second: np.ndarray, is_equal: np.ndarray) -> None:
        """Join the regions of pixels that are side by side where their labels are equal."""
        pairs = np.stack([first, second], 1)[is_equal & (first > 0)]
        for one, other in np.unique(pairs, axis=0).tolist():
            one, other = sorted((self._find(one), self._find(other)), key=lambda root: len(self.parts[root]))
            if one != other:
                self.parts[other] += self.parts.pop(one)
                self.parents[one] = other

    def take_all_but(self, numbers: np.ndarray) -> Iterator[Region]:
        """Remove and yield the regions that none of these numbers belongs to."""
        import shapely

        kept = {int(number): self._find(int(number)) for number in np.unique(numbers[numbers > 0])}
        roots = set(kept.values())
        for root in [root for root in self.parts if root not in roots]:
            parts, label = self.parts.pop(root), self.labels[root]
            polygon = parts[0].polygon
            if len(parts) > 1:
                polygon = shapely.coverage_union_all([part.polygon for part in parts])
            num_pixels = sum(part.num_pixels for part in parts)
            mean = sum(part.confidence for part in parts) / num_pixels if self._has_confidence else None
            yield Region(polygon, label, num_pixels, mean)
        self.parents = {number: root for number, root in kept.items() if number != root}
        self.labels = {root: self.labels[root] for root in roots}

    def _find(self, number: int) -> int:
        root = number
        while root in self.parents:
            root = self.parents[root]
        while number != root:
            self.parents[number], number = root, self.parents[number]
        return root


__all__ = ["BLOCK", "Region", "trace_regions"]
