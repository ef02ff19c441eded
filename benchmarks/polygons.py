"""Polygons of segmentation maps: memory against the size of the map.

The map is generated, and read from a file as predicted rasters are. The memory is the peak of a fresh process beyond
what it holds after its imports, so that rows of one width show whether it grows with the height. Areas of a class are
patches of 16 pixels, many of which touch, besides a frame around the map: the outline of one region grows with it.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from hf_segformer.benchmarking.timing import QUIET, OtherLoad, Timing

from .large_images import in_a_fresh_process, peak
from .record import Options, Record, Row, main

NUM_CLASSES, PATCH, FRAME = 6, 16, 8


def write_map(path: Path, height: int, width: int) -> None:
    """Write a map of random patches, uint8 (H, W), with a frame, row by row of patches."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for top in range(0, height, PATCH):
            labels = rng.integers(0, NUM_CLASSES, (1, -(-width // PATCH)), np.uint8).repeat(PATCH, 0).repeat(PATCH, 1)
            labels = labels[: min(PATCH, height - top), :width]
            labels[:, :FRAME] = labels[:, -FRAME:] = 0
            if top == 0 or top + PATCH >= height:
                labels[:] = 0
            file.write(labels.tobytes())


def trace(path: Path, height: int, width: int) -> tuple[int, int, float, float | None]:
    """Trace a map: polygons, bytes beyond the imports, seconds, and the share that others used meanwhile."""
    import rasterio.features  # noqa: F401
    import shapely  # noqa: F401

    from hf_segformer.geo.polygons import trace_regions

    labels = np.memmap(path, np.uint8, "r", shape=(height, width))
    before, load, began = peak(), OtherLoad(), time.perf_counter()
    number = sum(1 for _ in trace_regions(labels, 255))
    return number, peak() - before, time.perf_counter() - began, load.share()


def measure(heights: Sequence[int], width: int, options: Options) -> list[Record]:
    """Trace maps of one width and several heights."""
    records = []
    for height in heights:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "map.raw"
            write_map(path, height, width)
            number, num_bytes, seconds, others = in_a_fresh_process(trace, path, height, width)
        timing = Timing((seconds,), 0, None if others is None else others <= QUIET)
        note = f"{number} polygons, {num_bytes / (height * width):.2f} bytes a pixel"
        records.append(Record.of(f"width {width}", f"{height}x{width}", timing, num_bytes, note=note))
    return records


ROWS: dict[str, Row] = {
    "width 1024": partial(measure, (2048, 4096, 8192), 1024),
    "width 8192": partial(measure, (2048, 8192), 8192),
}

if __name__ == "__main__":
    sys.exit(main("polygons", ROWS, __doc__))
