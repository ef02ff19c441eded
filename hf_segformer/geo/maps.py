"""The writer of maps: of each raster its segmentation map, and on request confidence and polygons.

It is the writer of PNG files otherwise, and found by the entry point `hf_segformer.writers` under the name `map`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..data.sources import InputItem
from ..files import atomic_write, resolve_inside
from ..inference.large_image import SegmentedRaster
from ..inference.pipeline import Prepared
from ..inference.png_writer import PngWriter
from ..inference.predictor import Prediction
from ..inference.spool import rows_of
from ..inference.tiling import MaskLayout
from ..inference.writers import WriterArguments
from .antimeridian import wgs84_transformer
from .areas import AreaMeasure
from .geotiff import GeoRaster
from .polygons import trace_regions
from .vectors import FORMATS, Feature, from_pixels, require, write_features

logger = logging.get_logger(__name__)

CONFIDENCE = MaskLayout(np.uint8, 255, (), ())
_OPTIONS = "--confidence, --polygons and --aoi"  # of the command; without them other images are predicted too


@dataclass(frozen=True)
class MapOptions:
    """Options of `Outputs.options` for the kind `map`.

    Args:
        confidence: write `NAME_confidence.tif`, the probability of each pixel's class in percent, 255 for no data.
        polygons: write `NAME_polygons` as `gpkg` or `geojson`.
        min_area: square metres of the smallest polygon.
        simplify: tolerance in pixels; see `polygons.trace_regions`.
        aoi: digest of the area to which the prediction was restricted, for the record.
        mosaic: scenes that were joined, for the record.

    Raises:
        ValueError: if a value is out of range, or has no effect.
    """

    confidence: bool = False
    polygons: str | None = None
    min_area: float = 0.0
    simplify: float = 1.0
    aoi: str = ""
    mosaic: str = ""

    def __post_init__(self):
        if self.polygons not in (None, *FORMATS):
            raise ValueError(f"polygons is {self.polygons!r}; expected one of {', '.join(FORMATS)}")
        for name in ("min_area", "simplify"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number of at least 0")
        if self.min_area and not self.polygons:
            raise ValueError(f"min_area is {self.min_area}; expected 0 without polygons")


class MapWriter(PngWriter):
    """`NAME_mask.tif` of each raster, with the files that `MapOptions` ask for; see `PngWriter`.

    Args:
        arguments: see `WriterArguments`.
        rank: see `PngWriter`.

    Raises:
        ValueError: if an option is unknown or wrong, or a package is missing.
    """

    def __init__(self, arguments: WriterArguments, rank: int = 0):
        super().__init__(arguments, rank)
        known = {each.name for each in fields(MapOptions)}
        unknown = sorted(set(self.outputs.options) - known)
        if unknown:
            raise ValueError(f"options have {unknown[0]!r}; expected some of {', '.join(sorted(known))}")
        self.options = MapOptions(**self.outputs.options)
        if self.options.polygons:
            require("polygons", "rasterio", "shapely", "pyproj", *(["pyogrio"] * (self.options.polygons == "gpkg")))

    def write(self, item: InputItem, prepared: Prepared, prediction: Prediction) -> None:
        """See `Writer`: an image has no map."""
        self.fail(item, f"{prepared.name} is no raster; expected one for a map: leave out {_OPTIONS}")

    def write_raster(self, item: InputItem, segment: Callable[..., Mapping[str, Any]]) -> None:
        """See `Writer`; the map comes last."""
        super().write_raster(item, partial(segment, output=RasterFiles(self.options, self.out, item.name)))

    def write_volume(self, item: InputItem, segment: Callable[[Callable[[str], Path]], Mapping[str, Any]]) -> None:
        """See `Writer`: a volume has no map."""
        raise ValueError(f"it is a volume; expected a raster for a map: leave out {_OPTIONS}")


class RasterFiles:
    """The files of one raster beside its map; see `large_image.RasterOutput`.

    Args:
        options: which ones.
        folder: in which they are written.
        name: of the raster.
    """

    def __init__(self, options: MapOptions, folder: Path, name: str):
        self.options, self.folder, self.name = options, folder, name
        self.needs_confidence = options.confidence or options.polygons is not None

    def check(self, raster: Any) -> None:
        """Raise ValueError if polygons are wanted of a raster without a reference system that they can have."""
        if not self.options.polygons:
            return
        measure = self._measure(raster)
        if self.options.polygons == "geojson":
            try:
                wgs84_transformer(measure.crs)
            except ValueError as error:
                raise ValueError(f"{raster.name} has no GeoJSON: {error}; choose --polygons gpkg") from error

    def write(self, found: SegmentedRaster) -> None:
        """Write the files."""
        if self.options.confidence and found.confidence is not None:
            with atomic_write(self._path("confidence.tif")) as partial_file:
                found.raster.write(partial_file, rows_of(found.confidence), CONFIDENCE)
        if self.options.polygons:
            measure, kind = self._measure(found.raster), self.options.polygons
            write_features(self._path(f"polygons.{kind}"), self._features(found, measure), measure.crs, kind)

    def _path(self, ending: str) -> Path:
        return resolve_inside(self.folder, f"{self.name}_{ending}")

    def _measure(self, raster: Any) -> AreaMeasure:
        if not isinstance(raster, GeoRaster):
            raise ValueError(
                f"{raster.name} has no georeference; expected one for polygons: leave them out, or set it "
                "(rio edit-info)"
            )
        return AreaMeasure(raster.reference(), raster.name)

    def _features(self, found: SegmentedRaster, measure: AreaMeasure) -> Iterator[Feature]:
        """Yield the polygons of at least the minimum area; their areas are those of what is written."""
        layout, num_omitted, omitted = found.layout, 0, 0.0
        for region in trace_regions(found.labels, layout.ignored, found.confidence, self.options.simplify):
            [polygon] = from_pixels([region.polygon], measure.transform)
            [area] = measure.of_polygons([polygon]).tolist()
            if area < self.options.min_area:
                num_omitted, omitted = num_omitted + 1, omitted + area
                continue
            confidence = None if region.confidence is None else region.confidence / 100
            yield Feature(polygon, region.label, layout.names[region.label], area, confidence)
        if num_omitted:
            logger.warning(
                f"{self.name}: {num_omitted} polygons below {self.options.min_area:g} square metres are left out, "
                f"{omitted:.1f} square metres together"
            )


__all__ = ["CONFIDENCE", "MapOptions", "MapWriter", "RasterFiles"]
