"""Time for a million images and for a raster of 100,000 x 100,000 pixels, predicted from measured rates: docs/scale.md.

One process a core with one thread, as the page explains. The stages of an image are timed one by one, and a raster by
the megapixel; a run of two processes on a folder shows how far the prediction is from what happens. About five minutes
on a quiet machine. `--page` writes the page alone, from all processors' files.
"""

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.benchmarking.timing import QUIET, OtherLoad
from hf_segformer.config import InferenceOptions
from hf_segformer.files import read_json, write_json
from hf_segformer.image_io_segformer import read_image

from .large_images import TILE, in_a_fresh_process, predict_file, write_image
from .machine import ROOT, machine
from .predict import folder_of
from .record import RESULTS, file_of
from .report import table

PAGE = ROOT / "docs" / "scale.md"
NUM_IMAGES, RASTER_SIDE, NUM_CLASSES = 100, 4096, 19
MACHINES = (1, 4, 16, 64)
MILLION, SCENE = 1_000_000, 100_000  # images; side of a raster in pixels
STAGES = ("reading", "preparing", "network and labels", "writing")


def build_model(folder: Path) -> SegFormerPredictor:
    """Save an untrained B0 with its processor, and return its predictor; batches have one image."""
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(num_labels=NUM_CLASSES)).eval()
    processor = SegFormerImageProcessor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return SegFormerPredictor(model, processor, InferenceOptions(batch_size=1))


def measure_stages(predictor: SegFormerPredictor, paths: Sequence[str], out: Path) -> dict[str, Any]:
    """Return milliseconds of each stage of an image, medians in this thread, and bytes of an image and of its mask."""
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    mask = out / "mask.png"
    for path in [paths[0], paths[0], *paths]:  # the first two warm up
        clock = [time.perf_counter()]
        with Image.open(path) as image:
            pixels = read_image(image, 3, None, path, False)
        clock.append(time.perf_counter())
        prepared = predictor.prepare(pixels)
        clock.append(time.perf_counter())
        [prediction] = predictor.predict([prepared])
        clock.append(time.perf_counter())
        Image.fromarray(prediction.segmentation).save(mask)
        clock.append(time.perf_counter())
        for stage, (began, ended) in zip(STAGES, pairwise(clock), strict=True):
            seconds[stage].append(ended - began)
    return {
        "milliseconds": {stage: round(1000 * statistics.median(values[2:]), 2) for stage, values in seconds.items()},
        "image_bytes": round(statistics.mean(Path(path).stat().st_size for path in paths)),
        "mask_bytes": mask.stat().st_size,
    }


def measure_raster(side: int, folder: Path) -> dict[str, Any]:
    """Return seconds a megapixel of `predict_large_image` in one thread, and bytes a megapixel of its input."""
    source = folder / "image.tif"
    write_image(source, side, side)
    options = InferenceOptions(tile_size=TILE, tile_overlap=128)
    seconds, peak, _ = in_a_fresh_process(predict_file, source, folder / "labels.tif", options, 1)
    megapixels = side**2 / 1e6
    return {
        "seconds_per_megapixel": round(seconds / megapixels, 4),
        "bytes_per_megapixel": round(source.stat().st_size / megapixels),
        "mebibytes": round(peak / 2**20),
    }


def measure_two_processes(model: Path, paths: Sequence[str], folder: Path) -> float:
    """Return images a second of two processes that share a folder; what both need to start is not counted.

    Raises:
        CalledProcessError: if a run fails.
    """
    took = []
    for copies in (1, 3):
        source = folder / f"images_{copies}"
        source.mkdir()
        for index, path in enumerate([*paths] * copies):
            (source / f"{index:05d}.jpg").hardlink_to(path)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hf_segformer"]
        command += ["predict", str(model), str(source), "--output-dir", str(folder / f"masks_{copies}")]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        took.append(time.perf_counter() - began)
    return 2 * len(paths) / (took[1] - took[0])


def measure(num_images: int = NUM_IMAGES, raster_side: int = RASTER_SIDE) -> dict[str, Any]:
    """Measure the rates, and the run of two processes that checks them."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        predictor, paths, load = build_model(folder / "model"), folder_of("same", num_images), OtherLoad()
        images = measure_stages(predictor, paths, folder)
        others = load.share()  # from here on, processes of its own compute
        raster = measure_raster(raster_side, folder)
        rate = measure_two_processes(folder / "model", paths, folder)
    expected = 2 * 1000 / sum(images["milliseconds"].values())
    return {
        "images": images,
        "raster": raster,
        "two_processes": {"images_per_second": round(rate, 2), "predicted": round(expected, 2)},
        "quiet": None if others is None else others <= QUIET,
        "date": datetime.date.today().isoformat(),
        **machine(),
    }


def hours(seconds: float, machines: int, cores: int) -> float:
    """Return the hours that work of so many seconds of one core takes, divided evenly."""
    return seconds / 3600 / (machines * cores)


def render(found: Sequence[dict[str, Any]]) -> str:
    """Return the page, with a section for each processor."""
    return _PAGE.format(
        stages=table(
            ("one image, one thread, ms", *(title_of(each) for each in found)),
            [(stage, *(f"{each['images']['milliseconds'][stage]:.1f}" for each in found)) for stage in STAGES],
        ),
        check="\n".join(_check(each) for each in found),
        sections="\n\n".join(f"## {title_of(each)}\n\n{_section(each)}" for each in found),
    )


def title_of(found: dict[str, Any]) -> str:
    """Return the processor's name."""
    return f"{found['processor']}, {found['instructions']}, {found['cores']} cores"


def _check(found: dict[str, Any]) -> str:
    check = found["two_processes"]
    ratio = check["images_per_second"] / check["predicted"]
    disturbed = " (machine disturbed)" if found["quiet"] is False else ""
    return (
        f"- {title_of(found)}: {check['images_per_second']:.1f} images/s measured, {check['predicted']:.1f} predicted: "
        f"{ratio:.2f} of it{disturbed}. Commit {found['commit']}, {found['date']}."
    )


def _section(found: dict[str, Any]) -> str:
    images, raster, cores = found["images"], found["raster"], found["cores"]
    each_image = sum(images["milliseconds"].values()) / 1000
    megapixels = SCENE**2 / 1e6
    work = {"images": MILLION * each_image, "raster": megapixels * raster["seconds_per_megapixel"]}
    moved = {
        "images": MILLION * (images["image_bytes"] + images["mask_bytes"]),
        "raster": megapixels * raster["bytes_per_megapixel"],
    }
    lines = []
    for machines in MACHINES:
        cells = [str(machines)]
        for kind, seconds in work.items():
            duration = hours(seconds, machines, cores)
            cells += [
                f"{duration:,.1f}" if duration >= 0.1 else f"{duration:.2f}",
                f"{moved[kind] / duration / 3600 / 1e6:,.1f}",
            ]
        lines.append(cells)
    titles = ("machines", "1 M images, hours", "MB/s in and out", "raster, hours", "MB/s in")
    return "\n\n".join(
        (
            table(titles, lines),
            f"Whatever the number of machines: {work['images'] / 3600:,.0f} core-hours for the images and "
            f"{work['raster'] / 3600:,.0f} for the raster. Multiply by what a core-hour costs you: at 0.05, "
            f"{0.05 * work['images'] / 3600:,.2f} and {0.05 * work['raster'] / 3600:,.2f}. A process holds "
            f"{raster['mebibytes']:,} MiB at its peak on a raster.",
        )
    )


_PAGE = """# Large jobs: time and cost

`python -m benchmarks.scale` measures the rates and writes this page; no number is written by hand.

What a million images of 480x640, or one raster of 100,000 x 100,000 pixels (tiles of 1,024, overlap 128), take on 1 to
64 machines: a B0 of 19 classes in float32, masks as PNG files, one process a core with one thread each. An image's time
is the sum of its stages: one thread does one after the other.

{stages}

## Check

Two processes of `segformer predict` under torchrun share a folder, on the same machine. What they need to start is not
counted, and not in the tables below either.

{check}

The sum leaves out that both processes list the folder and record what is finished, and that the cores share caches and
memory.

{sections}

## What the tables assume

- **Images are shared evenly**, with [torchrun](guides/predict.md#many-processes) or [Ray](guides/cluster.md). The last
  process sets the end.
- **A raster is cut into parts first**, one for each process, for example virtual rasters by `gdal_translate -srcwin`,
  since one process predicts one raster. Let them overlap by at least the tiles' overlap.
- **Storage keeps up**: the columns of MB/s say what it must deliver.
- **Another size or variant**: [`segformer bench`](reference/cli.md) times a network on your machine. Network time
  grows with the prepared size, reading and writing with the image's.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on this processor, and write the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--page", action="store_true", help="write the page alone")
    arguments = parser.parse_args(argv)
    if not arguments.page:
        path = file_of(RESULTS, "scale", "cpu").with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(measure(), path)
    found = [read_json(path) for path in sorted(RESULTS.glob("*/scale.json"))]
    if not found:
        print("scale: there are no measurements; leave out --page", file=sys.stderr)
        return 1
    PAGE.write_text(render(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
