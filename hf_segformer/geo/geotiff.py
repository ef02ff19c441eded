"""Rasters by rasterio (GDAL): GeoTIFF above all, whose georeference, tags and overviews go with the labels.

rasterio is an extra and imported where it is needed. Axes: C bands, h w a window's sides.
"""

import errno
import shutil
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..inference.tiling import Tile as Window
from .rasters import BLOCK, LabelFile, Raster, holds_data, in_rows_of_blocks


class GeoRaster(Raster):
    """A raster by rasterio.

    What GDAL keeps of decoded blocks, of this file and of that to be written, is bounded: by default it is a share of
    the machine's memory.
    """

    def _open(self) -> Any:
        import rasterio

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            return rasterio.open(self.path)

    def _look(self, num_channels: int, bands: Sequence[int] | None, num_rows: int) -> None:
        from rasterio.enums import ColorInterp, MaskFlags

        file = self.file
        self.height, self.width = file.height, file.width
        colors = file.colorinterp
        self.choose_bands(file.count, colors[-1] == ColorInterp.alpha, num_channels, bands)
        self.numbers = [band + 1 for band in self.bands]
        first = self.numbers[0]
        self.colors: np.ndarray | None = None
        if colors[first - 1] == ColorInterp.palette and self.num_bands == 1 and num_channels == 3:
            self.colors = _color_table(file.colormap(first))
        self.has_mask = any(file.mask_flag_enums[band] == [MaskFlags.per_dataset] for band in self.bands)
        self.nodata = [file.nodatavals[band] for band in self.bands]
        has_nodata = all(value is not None for value in self.nodata)
        self.may_lack_data = self.alpha is not None or self.has_mask or has_nodata
        pixel = sum(np.dtype(file.dtypes[band]).itemsize for band in self.bands)
        self.keep_at_hand(max(file.block_shapes), pixel, num_rows)

    def __enter__(self) -> "Raster":
        import rasterio

        self.limit = rasterio.Env(GDAL_CACHEMAX=self.cache)
        self.limit.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()
        self.limit.__exit__(*error)

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Raster.read`."""
        import rasterio

        part = rasterio.windows.Window(window.left, window.top, window.width, window.height)
        try:
            pixels = self.file.read(self.numbers, window=part)
            if self.alpha is not None:
                valid = self.file.read(self.alpha + 1, window=part) != 0
            elif self.has_mask:
                valid = self.file.read_masks(self.numbers[0], window=part) != 0
            else:
                valid = holds_data(pixels, self.nodata)
        except OSError as error:
            raise self.damaged(window, error) from error
        if self.colors is not None:
            pixels = np.moveaxis(self.colors[pixels[0]], -1, 0)
        return pixels, valid

    def write(self, path: Path, bands: Iterable[tuple[int, np.ndarray]], labels: LabelFile) -> None:
        """See `Raster.write`."""
        import rasterio

        factors, checksums = self.file.overviews(self.numbers[0]), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path, "w", **self._profile(labels)) as out:
                self._describe(out, labels)
                for top, rows in in_rows_of_blocks(bands):
                    try:
                        out.write(rows, 1, window=self._rows(top, len(rows)))
                    except OSError as error:
                        raise _not_written(path, f"{error.__cause__ or error}") from error
                    checksums.append((top, len(rows), zlib.crc32(rows.data)))
            if factors:
                with rasterio.open(path, "r+") as out:
                    out.build_overviews(factors, rasterio.enums.Resampling.nearest)
            self._check(path, factors, checksums)

    def _rows(self, top: int, num_rows: int) -> Any:
        import rasterio

        return rasterio.windows.Window(0, top, self.width, num_rows)

    def _check(self, path: Path, factors: list[int], checksums: Sequence[tuple[int, int, int]]) -> None:
        """Read what was written: GDAL closes a file on a full disk without an error (GDAL 3.10)."""
        import rasterio

        try:
            with rasterio.open(path) as file:
                is_whole = file.overviews(1) == factors and all(
                    zlib.crc32(file.read(1, window=self._rows(top, num_rows))) == checksum
                    for top, num_rows, checksum in checksums
                )
        except OSError:
            is_whole = False
        if not is_whole:
            raise _not_written(path, "what was written can not be read again")

    def _profile(self, labels: LabelFile) -> dict[str, Any]:
        profile = {
            "driver": "GTiff",
            "height": self.height,
            "width": self.width,
            "count": 1,
            "dtype": np.dtype(labels.dtype).name,
            "nodata": labels.ignored,
            "tiled": True,
            "blockxsize": BLOCK,
            "blockysize": BLOCK,
            "compress": "deflate",
            "bigtiff": "if_safer",
        }
        if not self.file.gcps[0]:
            profile |= {"crs": self.file.crs, "transform": self.file.transform}
        return profile

    def _describe(self, out: Any, labels: LabelFile) -> None:
        points, reference = self.file.gcps
        if points:
            out.gcps = points, reference
        if self.file.rpcs is not None:
            out.rpcs = self.file.rpcs
        out.update_tags(**self.file.tags())
        out.update_tags(1, **{f"class_{index}": name for index, name in enumerate(labels.names)})
        out.write_colormap(1, {index: tuple(color) for index, color in enumerate(labels.colors().tolist())})


def _not_written(path: Path, reason: str) -> OSError:
    """GDAL does not tell a full disk by the system's number."""
    free = shutil.disk_usage(path.parent).free >> 20
    return OSError(errno.EIO if free else errno.ENOSPC, f"{reason}, and {free} MiB are free")


def _color_table(colors: dict[int, tuple[int, ...]]) -> np.ndarray:
    table = np.zeros((max(colors) + 1 if max(colors) > 255 else 256, 3), np.uint8)
    for value, color in colors.items():
        table[value] = color[:3]
    return table


__all__ = ["GeoRaster"]
