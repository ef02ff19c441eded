"""Several rasters of one grid as a single one.

The rasters have one coordinate reference system, one pixel size, and whole pixels between their corners: nothing is
resampled. Where they overlap, the first one that holds data counts.

Axes: C bands, h w a tile's sides.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..data.reader_protocol import ImageSource, ReadOptions, Tile
from .cog import Reference, part_transform
from .geotiff import GeoRaster

_MOST_OPEN = 32  # files at once
_MOST_SHIFT = 0.01  # pixels between grids that count as one
_REMEDY = "warp them to one grid first (rio warp --dst-crs EPSG:... --res SIZE --target-aligned-pixels)"


class _Scene(NamedTuple):
    source: ImageSource
    top: int
    left: int
    height: int
    width: int


class MosaicRaster(GeoRaster):
    """A raster of several; see `Raster`, and `join`."""

    sources: Sequence[ImageSource] = ()

    @classmethod
    def join(cls, paths: Sequence[str], num_channels: int = 3, **options: Any) -> "MosaicRaster":
        """Open rasters as one.

        Args:
            paths: of the rasters, the uppermost first.
            num_channels: see `ReadOptions`.
            **options: further fields of `ReadOptions`.

        Raises:
            ValueError: if they differ in reference system, pixel size, grid, bands or type, or one is no raster.
            OSError: if one cannot be read.
        """
        if options.get("bands") is not None:
            options["bands"] = tuple(options["bands"])
        mosaic = cls.__new__(cls)
        mosaic.sources = [ImageSource(path) for path in paths]
        for source in mosaic.sources:
            if GeoRaster.claims(source, by_tiles=True) is None:
                raise ValueError(_no_scene(source.name))
        mosaic.__init__(mosaic.sources[0], ReadOptions(num_channels, **options))  # type: ignore[misc]
        try:
            mosaic._arrange()
        except BaseException:
            mosaic.close()
            raise
        mosaic.name, mosaic.path, mosaic.kind = f"mosaic of {len(paths)} rasters", None, "raster"
        return mosaic

    def _arrange(self) -> None:
        """Place all rasters in the mosaic, whose size and reference become its own."""
        self._opened: OrderedDict[int, GeoRaster] = OrderedDict()
        first: Reference = GeoRaster.reference(self)
        places = [self._place(source, first) for source in self.sources]
        top, left = min(place.top for place in places), min(place.left for place in places)
        self.scenes = [place._replace(top=place.top - top, left=place.left - left) for place in places]
        self.height = max(scene.top + scene.height for scene in self.scenes)
        self.width = max(scene.left + scene.width for scene in self.scenes)
        self.may_lack_data = True
        moved = part_transform(first.transform, top, left)
        self._reference = Reference(self.height, self.width, first.crs, moved)

    def _has_scenes(self) -> bool:
        """Return True if one of the rasters has a reference system, so that those without one are something else."""
        for source in self.sources:
            with GeoRaster(source, self.options) as raster:
                if raster.reference().crs is not None:
                    return True
        return False

    def _place(self, source: ImageSource, first: Reference) -> _Scene:
        """Return where a raster is relative to the first one, after a check that they fit together."""
        with GeoRaster(source, self.options) as raster:
            own = raster.reference()
            if own.crs is None and raster.kind == "image" and self._has_scenes():
                raise ValueError(_no_scene(raster.name))
            for name, value, expected in (
                ("coordinate reference system", own.crs, first.crs),
                ("number of bands", raster.num_bands, self.num_bands),
                ("type", raster.dtype, self.dtype),
            ):
                if value != expected:
                    remedy = _REMEDY if "system" in name else "choose bands by --bands, or convert them to one type"
                    raise ValueError(
                        f"{raster.name} has the {name} {value or 'none'}; expected {expected or 'none'}, that of "
                        f"{self.source.name}: {remedy}"
                    )
        if own.crs is None or own.points[0] or first.points[0]:
            raise ValueError(f"{raster.name} has no transform to a reference system; expected one: {_REMEDY}")
        ours, theirs = first.transform, own.transform
        linear = np.array([[ours.a, ours.b], [ours.d, ours.e]])
        others = np.array([[theirs.a, theirs.b], [theirs.d, theirs.e]])
        left, top = np.linalg.solve(linear, [theirs.c - ours.c, theirs.f - ours.f])
        drift = np.abs(np.linalg.solve(linear, others) - np.eye(2)).max() * max(raster.height, raster.width)
        if drift > _MOST_SHIFT or max(abs(left - round(left)), abs(top - round(top))) > _MOST_SHIFT:
            raise ValueError(
                f"{raster.name} is not on the grid of {self.source.name} (pixel size {abs(theirs.a):g} and "
                f"{abs(ours.a):g}, {abs(left):.2f} columns and {abs(top):.2f} rows away); expected whole pixels: "
                f"{_REMEDY}"
            )
        return _Scene(source, round(top), round(left), raster.height, raster.width)

    def reference(self) -> Reference:
        """Return the reference of the mosaic."""
        return self._reference

    def _orientation(self) -> int:
        return 1

    def _read(self, tile: Tile) -> tuple[np.ndarray, np.ndarray | None]:
        pixels = np.zeros((self.num_bands, tile.height, tile.width), self.dtype)
        masked, missing = np.ones(pixels.shape, bool), np.ones((tile.height, tile.width), bool)
        for index, scene in enumerate(self.scenes):
            top, left = max(tile.top, scene.top), max(tile.left, scene.left)
            bottom = min(tile.top + tile.height, scene.top + scene.height)
            right = min(tile.left + tile.width, scene.left + scene.width)
            here = slice(top - tile.top, bottom - tile.top), slice(left - tile.left, right - tile.left)
            if top >= bottom or left >= right or not missing[here].any():
                continue
            part = Tile(top - scene.top, left - scene.left, bottom - top, right - left)
            found, valid = self._scene(index).read(part)
            taken = missing[here] if valid is None else missing[here] & valid
            pixels[:, *here][:, taken] = np.ma.getdata(found)[:, taken]
            masked[:, *here][:, taken] = np.ma.getmaskarray(found)[:, taken]
            missing[here] &= ~taken
        if not masked.any():
            return pixels, None
        return np.ma.MaskedArray(pixels, masked), ~missing

    def _scene(self, index: int) -> GeoRaster:
        """Return an open raster; the one that was read longest ago is closed for it."""
        if index not in self._opened:
            if len(self._opened) >= _MOST_OPEN:
                self._opened.popitem(last=False)[1].close()
            self._opened[index] = GeoRaster(self.scenes[index].source, self.options)
        self._opened.move_to_end(index)
        return self._opened[index]

    def close(self) -> None:
        """Close all files."""
        for raster in self._opened.values():
            raster.close()
        self._opened.clear()
        super().close()


def _no_scene(name: str) -> str:
    """Return the message about a file that belongs to no mosaic, such as a preview beside the scenes."""
    return (
        f"{name} is no raster with a coordinate reference system; expected scenes alone for a mosaic: move it "
        "elsewhere, or give a pattern that fits the scenes, such as scenes/*.tif"
    )


__all__ = ["MosaicRaster"]
