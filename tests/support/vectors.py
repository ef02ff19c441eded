"""Small vector files of every kind that is read."""

import json
from pathlib import Path

import numpy as np
import pyogrio
import shapely
from rasterio import Affine, crs

from hf_segformer.geo.cog import Reference

SCENE = Reference(120, 250, crs.CRS.from_epsg(32633), Affine(1, 0, 499_990, 0, -1, 5_000_110))
POLYGONS = [
    shapely.Polygon([(500_000, 5_000_000), (500_090, 5_000_000), (500_080, 5_000_070)]),
    shapely.box(500_100, 5_000_000, 500_200, 5_000_100).difference(shapely.box(500_120, 5_000_020, 500_150, 5_000_050)),
]


def write_all_kinds(folder: Path) -> list[Path]:
    """Write the polygons in UTM as GeoPackage, shapefile and older GeoJSON, with the attribute `crop`."""
    folder.mkdir(parents=True)
    paths = [folder / "a.gpkg", folder / "b.shp"]
    for path, driver in zip(paths, ("GPKG", "ESRI Shapefile"), strict=True):
        wkb, crops = shapely.to_wkb(POLYGONS), np.array(["wheat", "maize"], object)
        pyogrio.raw.write(path, wkb, [crops], ["crop"], driver=driver, geometry_type="Polygon", crs="EPSG:32633")
    features = [
        {"type": "Feature", "properties": {"crop": crop}, "geometry": shapely.geometry.mapping(polygon)}
        for crop, polygon in zip(("wheat", "maize"), POLYGONS, strict=True)
    ]
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}
    for name in ("c.json", "d.geojson"):  # what is edited as JSON, and as bytes
        content = {"type": "FeatureCollection", "crs": crs, "features": features}
        (folder / name).write_text(json.dumps(content))
    return [*paths, folder / "c.json", folder / "d.geojson"]
