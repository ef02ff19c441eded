"""Rasters by rasterio (GDAL): GeoTIFF above all, whose georeference, tags and overviews go with the labels.

GDAL is given the drivers of the file's content alone: left to itself it opens what a file's content asks for, other
files, addresses in the network and scripts among them. rasterio is an extra and imported where it is needed.

Axes: C bands, h w a tile's sides.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..data.reader_protocol import ImageSource, Kind, ReadOptions, Tile
from ..inference.tiling import MaskLayout
from .areas import write_areas
from .cog import Reference, part_transform, write_cog
from .rasters import (
    HFA_MAGIC,
    INSTALL,
    JPEG_2000_MAGIC,
    JPEG_MAGIC,
    PNG_MAGIC,
    TIFF_MAGIC,
    Raster,
    exif_orientation,
    is_installed,
    mask_no_data,
    raster_kind,
    tiff_orientation,
)
from .styles import write_style
from .vrt import check_sidecars, checked_vrt

_DRIVERS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (TIFF_MAGIC, "GTiff"),
    (JPEG_2000_MAGIC, "JP2OpenJPEG"),
    ((HFA_MAGIC,), "HFA"),
    ((PNG_MAGIC,), "PNG"),
    ((JPEG_MAGIC,), "JPEG"),
)
_DIRECTORY = re.compile(r"GTIFF_DIR:(\d+):")
# No network, no code in virtual rasters, whatever a file asks for.
_SAFE = {"CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none", "GDAL_VRT_ENABLE_PYTHON": "NO", "GDAL_HTTP_MAX_RETRY": "0"}


class Restriction(Protocol):
    """Part of a raster."""

    def is_near(self, tile: Tile) -> bool:
        """Return True if a tile's logits reach into it."""

    def inside(self, tile: Tile) -> np.ndarray:
        """Return which pixels of a tile belong to it, bool (h, w)."""


class GeoRaster(Raster):
    """A raster by rasterio.

    The memory in which GDAL keeps decoded blocks, of this file and of the one to be written, is bounded: by default it
    is a share of the machine's memory.

    Attributes:
        region: area to which the prediction is restricted; None for all of it. Pixels outside are read and seen, but
            are not valid; tiles that are not near it are not read.
        palette: of the only band that is read, (red, green, blue, alpha) by value; None without one.
    """

    region: "Restriction | None" = None

    @classmethod
    def claims(cls, source: ImageSource, by_tiles: bool = False) -> Kind | None:
        """See `data.reader_protocol.Reader.claims`."""
        is_known = any(source.head.startswith(magic) for magic, _ in _DRIVERS)
        return raster_kind(source) or ("raster" if by_tiles and is_known and is_installed("rasterio") else None)

    @classmethod
    def count(cls, source: ImageSource) -> int:
        """See `data.reader_protocol.Reader.count`."""
        with ExitStack() as stack:
            return len(_directories(_open(source, None, stack)))

    def _open(self) -> Any:
        with ExitStack() as stack:
            file = _open(self.source, None, stack)
            directories = _directories(file)
            self.directory = directories[self.choose_page(len(directories))]
            if self.directory != 1:
                file = _open(self.source, self.directory, stack)
            self.stack = stack.pop_all()
        return file

    def _look(self, options: ReadOptions) -> None:
        from rasterio.enums import ColorInterp, MaskFlags

        file, num_channels = self.file, options.num_channels
        self.height, self.width = file.height, file.width
        colors = file.colorinterp
        self.choose_bands(file.count, colors[-1] == ColorInterp.alpha, num_channels, options.bands)
        self.numbers = [band + 1 for band in self.bands]
        first = self.numbers[0]
        self.colors: np.ndarray | None = None
        self.dtype = np.result_type(*(file.dtypes[band] for band in self.bands))
        has_palette = colors[first - 1] == ColorInterp.palette and self.num_bands == 1
        self.palette = self._palette(first, num_channels) if has_palette else None
        if self.palette is not None and num_channels in (0, 3):
            self.colors = _color_table(self.palette)
            self.num_bands, self.dtype = 3, self.colors.dtype
        self.has_mask = any(file.mask_flag_enums[band] == [MaskFlags.per_dataset] for band in self.bands)
        self.nodata = tuple(file.nodatavals[band] for band in self.bands)
        self.may_lack_data = self.alpha is not None or self.has_mask or any(v is not None for v in self.nodata)
        pixel = sum(np.dtype(file.dtypes[band]).itemsize for band in self.bands)
        self.keep_at_hand(max(file.block_shapes), pixel, options.num_rows)

    def _palette(self, band: int, num_channels: int) -> dict[int, tuple[int, ...]] | None:
        """Return the colour table of a band, None where a virtual raster declares a palette without one."""
        try:
            return self.file.colormap(band)
        except ValueError as error:
            if num_channels != 3:
                return None
            raise ValueError(
                f"{self.name} declares a palette but holds no colour table; expected one for 3 channels: add it, or "
                "declare the band as grey"
            ) from error

    def __enter__(self) -> "GeoRaster":
        import rasterio

        self.limit = rasterio.Env(GDAL_CACHEMAX=self.cache, **_SAFE)
        self.limit.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
        self.limit.__exit__(*error)

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        self.stack.close()

    def restrict(self, region: Restriction) -> None:
        """Set `region`."""
        self.region, self.may_lack_data = region, True

    def read(self, tile: Tile) -> tuple[np.ndarray, np.ndarray | None]:
        """See `data.reader_protocol.Reader.read`."""
        if self.region is None:
            return super().read(tile)
        inside = self.region.inside(tile)
        if not self.region.is_near(tile):
            unread = np.zeros((self.num_bands, tile.height, tile.width), self.dtype)
            return np.ma.MaskedArray(unread, mask=True), inside
        pixels, valid = super().read(tile)
        return pixels, inside if valid is None else inside & valid

    def _orientation(self) -> int:
        if self.source.head.startswith(TIFF_MAGIC):
            return tiff_orientation(self.source, self.directory)
        # A file beside it, such as a world file, places the stored pixels.
        has_place = self.file.crs is not None or not self.file.transform.is_identity
        return 1 if has_place else exif_orientation(self.source)

    def _read(self, tile: Tile) -> tuple[np.ndarray, np.ndarray | None]:
        import rasterio

        part = rasterio.windows.Window(tile.left, tile.top, tile.width, tile.height)
        try:
            pixels, valid = self._read_bands(part), None
            if self.alpha is not None:
                valid = self.file.read(self.alpha + 1, window=part) != 0
            elif self.has_mask:
                valid = self.file.read_masks(self.numbers[0], window=part) != 0
        except OSError as error:
            raise self.damaged(tile, error) from error
        pixels, valid = mask_no_data(pixels, self.nodata, valid)
        if self.colors is not None:
            pixels = _colored(pixels, self.colors)
        return pixels, valid

    def _read_bands(self, part: Any) -> np.ndarray:
        if len({self.file.dtypes[band] for band in self.bands}) == 1:
            return self.file.read(self.numbers, window=part)
        # rasterio reads bands of several types only one by one (rasterio 1.4)
        return np.stack([self.file.read(number, window=part) for number in self.numbers])

    def write(self, path: Path, bands: Iterable[tuple[int, np.ndarray]], labels: MaskLayout) -> None:
        """See `Raster.write`."""
        write_cog(path, bands, labels, self.reference())

    def write_beside(self, path: Path, labels: np.ndarray, layout: MaskLayout) -> None:
        """See `Raster.write_beside`: a QGIS style, and where there is a coordinate reference system the areas."""
        write_style(path.with_suffix(".qml"), layout)
        write_areas(path, labels, layout, self.reference())

    def write_part(
        self,
        path: Path,
        tile: Tile,
        pixels: np.ndarray,
        nodata: float | None = None,
        palette: dict[int, tuple[int, ...]] | None = None,
    ) -> None:
        """Write a tile (C, h, w) as a GeoTIFF at its place, with a mask where pixels without data have no value.

        Args:
            path: of the file.
            tile: place in the raster.
            pixels: masked where they hold no data.
            nodata: value for no data; by default the raster's.
            palette: colours of a single band, see `palette`.

        Raises:
            OSError: if it cannot be written.
        """
        import rasterio

        shared = self.nodata[0] if len({repr(value) for value in self.nodata}) == 1 else None  # NaN equals nothing
        nodata = shared if nodata is None else nodata
        count, height, width = pixels.shape
        profile: dict[str, Any] = {"count": count, "height": height, "width": width, "dtype": pixels.dtype.name}
        # GDAL would call the last of four bands of bytes alpha.
        profile |= {"nodata": nodata, "compress": "deflate", "crs": self.reference().crs, "alpha": "unspecified"}
        profile["transform"] = part_transform(self.reference().transform, tile.top, tile.left)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", driver="GTiff", **profile) as out:
            if palette is not None:
                out.write_colormap(1, palette)
            out.write(np.ma.getdata(pixels))
            if nodata is None and np.ma.is_masked(pixels):
                out.write_mask(~np.ma.getmaskarray(pixels).all(axis=0))

    def reference(self) -> Reference:
        """Return the reference of files of the raster's size."""
        file = self.file
        return Reference(
            self.height,
            self.width,
            file.crs,
            file.transform,
            file.gcps,
            file.rpcs,
            file.tags(),
            self._overviews(),
        )

    def _overviews(self) -> list[int]:
        """Return the factors of the file's overviews, unless the file says that they are elsewhere."""
        return [] if self.file.tags(ns="OVERVIEWS") else self.file.overviews(self.numbers[0])


def open_all_bands(path: str | Path, bands: Sequence[int] | None, num_rows: int) -> GeoRaster:
    """Open a raster with these bands (from 1), or with all but one that only says where there is data.

    Raises:
        ValueError: if it is no raster, or bands do not exist.
        OSError: if it cannot be read.
    """
    from rasterio.enums import ColorInterp

    source = ImageSource(path)
    if GeoRaster.claims(source, by_tiles=True) is None:
        raise ValueError(
            f"{source.name} is no raster; expected a GeoTIFF, JPEG 2000, Erdas Imagine or virtual raster: write others "
            "as GeoTIFF first (rio convert)"
        )
    with ExitStack() as stack:
        file = _open(source, None, stack)
        total = file.count - (file.count > 1 and file.colorinterp[-1] == ColorInterp.alpha)
    number = total if bands is None else len(bands)
    return GeoRaster(source, ReadOptions(number, bands=None if bands is None else tuple(bands), num_rows=num_rows))


def _open(source: ImageSource, directory: int | None, stack: ExitStack) -> Any:
    """Open a file, or one directory of a TIFF, by the drivers of its content.

    Raises:
        ValueError: if rasterio is not installed, or the file refers to others outside its folder.
        OSError: if it cannot be opened.
    """
    if not is_installed("rasterio"):
        raise ValueError(f"{source.name} needs rasterio, or tifffile if it is a plain TIFF: {INSTALL}")
    import rasterio

    driver = next((driver for magic, driver in _DRIVERS if source.head.startswith(magic)), None)
    if source.path is None:
        place: Any = stack.enter_context(rasterio.MemoryFile(source.content)).name
    else:
        place = str(source.path.resolve())  # a scheme such as s3:// would be an address
        check_sidecars(source.path)
    if driver is None:
        if source.path is None:
            raise OSError(f"{source.name} is a virtual raster in memory; expected a file")
        place, driver = checked_vrt(source.path), "VRT"
    if directory is not None:
        place = f"GTIFF_DIR:{directory}:{place}"
    with warnings.catch_warnings(), rasterio.Env(**_SAFE):
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        file = rasterio.open(place, driver=driver)
    stack.callback(file.close)
    return file


def _directories(file: Any) -> list[int]:
    """Return the directories, from 1, of a TIFF's pages: masks and overviews have some in between."""
    names = file.subdatasets if file.driver == "GTiff" else []
    found = [_DIRECTORY.match(name) for name in names]  # a file beside it may add any others
    return [int(each[1]) for each in found if each] or [1]


def _colored(pixels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Palette indices (1, h, w) -> red, green and blue (3, h, w), masked where the indices are."""
    bands = np.moveaxis(colors[np.ma.getdata(pixels)[0]], -1, 0)
    if not isinstance(pixels, np.ma.MaskedArray):
        return bands
    return np.ma.MaskedArray(bands, np.broadcast_to(np.ma.getmaskarray(pixels), bands.shape))


def _color_table(colors: dict[int, tuple[int, ...]]) -> np.ndarray:
    table = np.zeros((max(colors) + 1 if max(colors) > 255 else 256, 3), np.uint8)
    for value, color in colors.items():
        table[value] = color[:3]
    return table


__all__ = ["GeoRaster", "Restriction", "open_all_bands"]
