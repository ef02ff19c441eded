"""Options of `segformer predict` for rasters with a coordinate reference system."""

import argparse
import os
from pathlib import Path
from typing import Any


def add_map_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("maps", "of rasters with a coordinate reference system")
    group.add_argument("--confidence", action="store_true", help="also write NAME_confidence.tif, in percent")
    group.add_argument("--polygons", choices=["gpkg", "geojson"], help="also write NAME_polygons, with areas")
    group.add_argument(
        "--min-area", type=float, default=0.0, metavar="M2", help="square metres of the smallest polygon (default: 0)"
    )
    group.add_argument(
        "--simplify",
        type=float,
        default=1.0,
        metavar="PIXELS",
        help="tolerance of the polygons; 0 keeps the edges of pixels (default: 1)",
    )
    group.add_argument("--aoi", type=Path, metavar="FILE", help="predict within the polygons of this vector file")
    group.add_argument("--mosaic", action="store_true", help="predict all rasters as one, as mosaic_mask.tif")


def check_map_options(arguments: argparse.Namespace) -> None:
    """Raise ValueError if options do not go together, and choose the format of maps where one is given."""
    given = [f"--{name}" for name in ("confidence", "polygons", "aoi", "mosaic") if getattr(arguments, name)]
    for name, default in (("min_area", 0.0), ("simplify", 1.0)):
        value, option = getattr(arguments, name), "--" + name.replace("_", "-")
        if not 0 <= value < float("inf"):
            raise ValueError(f"{option} is {value}; expected a number of at least 0")
        if value != default and not arguments.polygons:
            raise ValueError(f"{option} is given without --polygons, to which it applies")
    if given and arguments.format != "png":
        raise ValueError(f"{given[0]} is given with --format {arguments.format}; leave --format out")
    if arguments.dataset and given:
        raise ValueError(f"{given[0]} is given with --dataset, whose rows have no coordinates; give files instead")
    if arguments.aoi is not None and not arguments.aoi.is_file():
        raise FileNotFoundError(f"{arguments.aoi} does not exist; expected a vector file with polygons for --aoi")
    if arguments.mosaic and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--mosaic is one raster, which one process predicts; start a single one")
    if given:
        arguments.format = "map"


def map_source(arguments: argparse.Namespace, reading: dict[str, Any]) -> Any:
    """Return the source of the rasters of a map, or None where neither `--aoi` nor `--mosaic` is given."""
    if arguments.aoi is None and not arguments.mosaic:
        return None
    from ..geo.scenes import SceneSource

    scenes = {"aoi": arguments.aoi, "mosaic": arguments.mosaic}
    return SceneSource(arguments.inputs, arguments.output_dir, **scenes, **reading)


def map_outputs(arguments: argparse.Namespace, source: Any) -> dict[str, Any]:
    """Return `Outputs.options` of the format of maps; empty for other formats."""
    if arguments.format != "map":
        return {}
    options = {name: getattr(arguments, name) for name in ("confidence", "polygons", "min_area", "simplify")}
    digests = {"aoi": getattr(source, "aoi_digest", ""), "mosaic": getattr(source, "mosaic_digest", "")}
    return {**options, **digests}


__all__ = ["add_map_options", "check_map_options", "map_outputs", "map_source"]
