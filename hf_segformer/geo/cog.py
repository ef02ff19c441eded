"""Cloud-optimised GeoTIFFs of labels and percentages, written row by row.

Such a file holds its overviews and tiles in the order in which a viewer asks for them, so that it is read over a
network by a few requests. GDAL writes it from a complete file, which is temporary here. rasterio is an extra and
imported where it is needed.
"""

import errno
import shutil
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging

from ..files import partial_folder
from ..inference.tiling import MaskLayout
from .rasters import BLOCK, in_rows_of_blocks

logger = logging.get_logger(__name__)


class Reference(NamedTuple):
    """Everything that a written file has from the raster it belongs to.

    Attributes:
        height: in pixels.
        width: in pixels.
        crs: coordinate reference system of rasterio, or None.
        transform: from pixels to it.
        points: ground control points and their reference system; with any, crs and transform do not apply.
        rpcs: rational polynomial coefficients, or None.
        tags: of the file.
        overviews: factors of the overviews; none lets GDAL choose.
    """

    height: int
    width: int
    crs: Any
    transform: Any
    points: tuple[Sequence[Any], Any] = ((), None)
    rpcs: Any = None
    tags: Mapping[str, str] = {}
    overviews: Sequence[int] = ()


def part_transform(matrix: Any, top: int, left: int) -> Any:
    """Return the transform of the part of a raster that begins at a row and a column."""
    rows = ((matrix.a, matrix.b, matrix.c), (matrix.d, matrix.e, matrix.f))
    return type(matrix)(*(each for a, b, c in rows for each in (a, b, a * left + b * top + c)))


def write_cog(path: Path, rows: Iterable[tuple[int, np.ndarray]], layout: MaskLayout, reference: Reference) -> None:
    """Write rows, from top to bottom, as one band of a cloud-optimised GeoTIFF.

    Args:
        path: of the file.
        rows: index of the first row and values (rows, W).
        layout: of the values; without names they are numbers, and have no colours.
        reference: of the raster.

    Raises:
        OSError: if the file cannot be written.
    """
    import rasterio

    with (
        partial_folder(path) as folder,
        rasterio.Env(GDAL_PAM_ENABLED="NO"),  # no second file, which would not follow when this one takes its name
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        plain = folder / "plain.tif"
        checksums = []
        with rasterio.open(plain, "w", **_profile(layout, reference)) as out:
            _describe(out, layout, reference)
            for top, strip in in_rows_of_blocks(rows):
                try:
                    out.write(strip, 1, window=_window(reference, top, len(strip)))
                except OSError as error:
                    raise _not_written(path, f"{error.__cause__ or error}") from error
                checksums.append((top, len(strip), zlib.crc32(strip.data)))
        if reference.overviews:
            _build_overviews(plain, path, reference.overviews)
        _copy(plain, path)
        _check(path, checksums, reference)


def _copy(plain: Path, path: Path) -> None:
    import rasterio
    from rasterio.shutil import copy

    options = {"compress": "deflate", "blocksize": BLOCK, "overview_resampling": "nearest", "bigtiff": "if_safer"}
    try:
        with rasterio.open(plain, driver="GTiff") as source:
            copy(source, path, driver="COG", **options)
    except (rasterio.errors.RasterioError, OSError) as error:
        raise _not_written(path, f"{error.__cause__ or error}") from error


def _window(reference: Reference, top: int, num_rows: int) -> Any:
    import rasterio

    return rasterio.windows.Window(0, top, reference.width, num_rows)


def _check(path: Path, checksums: Sequence[tuple[int, int, int]], reference: Reference) -> None:
    """Read the pixels that were written: GDAL closes a file on a full disk without an error (GDAL 3.10)."""
    import rasterio

    try:
        with rasterio.open(path, driver="GTiff") as file:
            crs = file.crs
            is_whole = all(
                zlib.crc32(file.read(1, window=_window(reference, top, num_rows))) == checksum
                for top, num_rows, checksum in checksums
            )
    except OSError:
        is_whole, crs = False, None
    if not is_whole:
        raise _not_written(path, "the written pixels cannot be read again")
    if not reference.points[0] and crs != reference.crs:
        logger.warning(
            f"{path.name} cannot hold the coordinate reference system of the raster; it has "
            f"{crs or 'none'}: set it where the map is used, or warp the raster first"
        )


def _profile(layout: MaskLayout, reference: Reference) -> dict[str, Any]:
    profile = {
        "driver": "GTiff",
        "height": reference.height,
        "width": reference.width,
        "count": 1,
        "dtype": np.dtype(layout.dtype).name,
        "nodata": layout.ignored,
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "compress": "deflate",
        "bigtiff": "if_safer",
    }
    if not reference.points[0]:
        profile |= {"crs": reference.crs, "transform": reference.transform}
    return profile


def _describe(out: Any, layout: MaskLayout, reference: Reference) -> None:
    points, crs = reference.points
    if points:
        out.gcps = points, crs
    if reference.rpcs is not None:
        out.rpcs = reference.rpcs
    out.update_tags(**reference.tags)
    out.update_tags(1, **{f"class_{index}": name for index, name in enumerate(layout.names)})
    if layout.names and np.dtype(layout.dtype).itemsize <= 2:  # GDAL keeps no colours of wider types
        out.write_colormap(1, {index: tuple(color) for index, color in enumerate(layout.colors().tolist())})


def _build_overviews(plain: Path, path: Path, factors: Sequence[int]) -> None:
    """Add levels of smaller size as far as GDAL makes them; they are a convenience, and the pixels are complete."""
    import rasterio

    try:
        with rasterio.open(plain, "r+", driver="GTiff") as out:
            out.build_overviews(factors, rasterio.enums.Resampling.nearest)
    except (rasterio.errors.RasterioError, ValueError) as error:
        logger.warning(f"{path}: overviews {list(factors)} could not be written: {error}")


def _not_written(path: Path, reason: str) -> OSError:
    """Return the error of a failed write; GDAL does not report a full disk by the system's number."""
    free = shutil.disk_usage(path.parent).free >> 20
    return OSError(errno.EIO if free else errno.ENOSPC, f"{reason}, and {free} MiB are free")


__all__ = ["Reference", "part_transform", "write_cog"]
