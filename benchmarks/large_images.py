"""Images larger than memory: time and memory against size, and the agreement of tiled and whole prediction.

The memory is the peak of a whole fresh process, interpreter, PyTorch and weights included, since that is what must fit
a machine. The images are generated, written tile by tile and deleted; what a network makes of them does not matter
there. Agreement is measured with the network trained on CamVid, on a street drawn from segmentation maps.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.benchmarking.timing import QUIET, OtherLoad, Timing
from hf_segformer.config import InferenceOptions
from hf_segformer.inference.tiling import blend, count_tiles, segment_block
from hf_segformer.upsampling_segformer import upsample_argmax
from hf_segformer.visualization import colorize, figure

from .machine import ROOT
from .record import Options, Record, Row, main

TILE, NUM_CLASSES = 1024, 6
_TRAINED = ROOT / "docs" / "results" / "camvid_b0"
_SEAMS, _STREET = (ROOT / "docs" / "images" / name for name in ("seams.png", "street.png"))
_SMALL_TILE = 384  # pixels, near the 360 of the frames that the network was trained on
_PANEL, _BUILDING = (16, 44, 336, 284), 1  # the first map in predicted.png; a class
# CamVid's colour of a class, and what such things look like.
_LOOKS = {
    (128, 128, 128): (205, 215, 230),
    (128, 0, 0): (150, 135, 120),
    (192, 192, 128): (80, 80, 80),
    (128, 64, 128): (75, 75, 80),
    (60, 40, 222): (155, 150, 148),
    (128, 128, 0): (55, 75, 40),
    (192, 128, 128): (190, 60, 50),
    (64, 64, 128): (85, 75, 62),
    (64, 0, 128): (70, 15, 60),
    (64, 64, 0): (50, 45, 45),
    (0, 128, 192): (30, 35, 50),
}


# --- Size -------------------------------------------------------------------------------------------------------------


def write_image(path: Path, height: int, width: int) -> None:
    """A GeoTIFF of random patches, three bands of 8 bits, in compressed tiles; written a row of tiles at a time."""
    import rasterio

    rng = np.random.default_rng(0)
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "crs": "EPSG:32633", "photometric": "rgb"}
    profile |= {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "lzw", "bigtiff": "if_safer"}
    place = rasterio.Affine(0.1, 0, 500_000, 0, -0.1, 5_000_000)
    limit = rasterio.Env(GDAL_CACHEMAX=64 << 20)
    with limit, rasterio.open(path, "w", height=height, width=width, transform=place, **profile) as file:
        for top in range(0, height, 512):
            patches = rng.integers(0, 256, (3, 32, width // 16 + 1), np.uint8)
            rows = patches.repeat(16, 1).repeat(16, 2)[:, : min(512, height - top), :width]
            file.write(rows, window=rasterio.windows.Window(0, top, width, rows.shape[1]))


def write_part(path: Path, source: Path, height: int, width: int) -> None:
    """The first rows of an image as one of its own: GDAL's virtual raster, which holds no pixels."""
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><SimpleSource><SourceFilename>{source}</SourceFilename>'
        f"<SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
        for band in (1, 2, 3)
    )
    path.write_text(f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">{bands}</VRTDataset>')


def predict_file(
    source: Path, destination: Path, options: InferenceOptions, num_threads: int
) -> tuple[float, int, float | None]:
    """Predict a file by an untrained B0: seconds, peak of this process in bytes, share that others used meanwhile."""
    from hf_segformer.inference.large_image import predict_large_image

    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(num_labels=NUM_CLASSES)).eval()
    load, began = OtherLoad(), time.perf_counter()
    predict_large_image(model, SegFormerImageProcessor(), source, destination, options, progress=False)
    return time.perf_counter() - began, peak(), load.share()


def peak() -> int:
    """Bytes that this process has held at most (Linux)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the function's result from a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_size(side: int, overlap: int, part: int, halves: Sequence[bool], options: Options) -> list[Record]:
    """Predict a generated image of side x side, or its first `part` rows; in float32, or in half precision."""
    if options.device != "cpu":
        raise ValueError(f"device is {options.device}, but what is measured here is the memory of a process on a CPU")
    tiling, height = InferenceOptions(tile_size=TILE, tile_overlap=overlap), part or side
    row = f"{side}x{height}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "image.tif"
        write_image(source, side, side)
        if part:
            write_part(folder / "part.vrt", source, part, side)
            source = folder / "part.vrt"
        arguments = source, folder / "labels.tif", tiling, torch.get_num_threads()
        found = [in_a_fresh_process(predict_file, *arguments, half) for half in halves]
    records = []
    for half, (seconds, num_bytes, others) in zip(halves, found, strict=True):
        timing = Timing((seconds,), 0, None if others is None else others <= QUIET)
        note = f"{count_tiles(height, side, tiling)} windows, {seconds * 1e6 / (height * side):.2f} s a megapixel"
        candidate = f"tile {TILE}, overlap {overlap}{', bfloat16' if half else ''}"
        records.append(Record.of(row, candidate, timing, num_bytes, note=note))
    return records


# --- Agreement --------------------------------------------------------------------------------------------------------


def street() -> Image.Image:
    """Draw a street of 1920x704 pixels: a segmentation map and its mirror image in natural colours with texture."""
    with Image.open(_TRAINED / "predicted.png") as image:
        half = np.asarray(image.convert("RGB").crop(_PANEL).resize((960, 720), Image.Resampling.NEAREST), np.int16)
    known, looks = np.array(list(_LOOKS), np.int16), np.array(list(_LOOKS.values()), np.float32)
    classes = np.abs(half[:704, :, None] - known).sum(-1).argmin(-1)
    classes = np.concatenate([classes, classes[:, ::-1]], 1)
    row, column = np.indices(classes.shape)
    pixels = looks[classes]
    pixels[(classes == _BUILDING) & (row % 70 < 36) & (column % 60 < 24)] = 85, 85, 88  # windows
    shaded = torch.from_numpy(pixels).permute(2, 0, 1)
    generator = torch.Generator().manual_seed(0)
    for cell, strength in ((2, 5.0), (16, 6.0)):
        noise = torch.randn(1, 1, shaded.shape[1] // cell, shaded.shape[2] // cell, generator=generator)
        shaded = shaded + strength * F.interpolate(noise, size=shaded.shape[1:], mode="bilinear")[0]
    return Image.fromarray(shaded.clamp(0, 255).byte().permute(1, 2, 0).numpy())


def trained() -> tuple[SegFormerForSemanticSegmentation, Tensor]:
    """The network trained on CamVid in float32, and the street as it takes it, (1, 3, H, W)."""
    model = SegFormerForSemanticSegmentation.from_pretrained(_TRAINED, dtype=torch.float32).eval()
    processor = SegFormerImageProcessor.from_pretrained(_TRAINED)
    return model, processor(street(), do_resize=False, return_tensors="pt").pixel_values


def tiled(model: SegFormerForSemanticSegmentation, pixels: Tensor, tiling: InferenceOptions) -> tuple[Tensor, Tensor]:
    """Blended logits (K, h, w) and labels (H, W) of an image in memory, its sides multiples of 32."""
    height, width = pixels.shape[-2:]
    logits = pixels.new_empty(model.config.num_labels, height // 4, width // 4)
    labels = torch.empty(height, width, dtype=torch.int64)

    def logits_of(windows: Sequence[Any]) -> Tensor:
        return torch.cat([model(pixels[..., t : t + h, left : left + w]).logits for t, left, h, w in windows])

    for block in blend(height, width, tiling, logits_of):
        rows, columns, (above, beside) = block.rows, block.columns, block.before
        inner = block.logits[:, above:, beside:][:, : len(rows), : len(columns)]
        logits[:, rows.start : rows.stop, columns.start : columns.stop] = inner
        labels[4 * rows.start : 4 * rows.stop, 4 * columns.start : 4 * columns.stop] = segment_block(block)
    return logits, labels


def draw_seams(model: SegFormerForSemanticSegmentation, pixels: Tensor) -> None:
    """Draw docs/images: street.png, half of the street, and seams.png, it predicted whole and in tiles."""
    half = street().crop((0, 0, 960, 704)).resize((720, 528), Image.Resampling.BOX)
    half.save(_STREET, optimize=True)
    colors = list(_LOOKS)
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    overlaps = (0, _SMALL_TILE // 2)
    maps = [upsample_argmax(model(pixels).logits, pixels.shape[-2:])[0]]
    maps += [
        tiled(model, pixels, InferenceOptions(tile_size=_SMALL_TILE, tile_overlap=overlap))[1] for overlap in overlaps
    ]
    titles = ["image", "predicted whole", *(f"tiles of {_SMALL_TILE}, overlap {overlap}" for overlap in overlaps)]
    images = [street(), *(colorize(labels.numpy(), colors) for labels in maps)]
    crops = [image.crop((0, 0, 1280, 704)) for image in images]
    figure([crops], titles, names, colors, panel_height=220).save(_SEAMS, optimize=True)


def measure_agreement(options: Options) -> list[Record]:
    """Compare tiled with whole prediction by overlap; the difference is the share of pixels of another class."""
    with torch.inference_mode():
        model, pixels = trained()
        draw_seams(model, pixels)
        whole = model(pixels).logits[0]
        labels = upsample_argmax(whole[None], pixels.shape[-2:])[0]
        records = []
        for overlap in (0, 64, 128, 192, 256):
            load, began = OtherLoad(), time.perf_counter()
            found, found_labels = tiled(model, pixels, InferenceOptions(tile_size=_SMALL_TILE, tile_overlap=overlap))
            timing, others = time.perf_counter() - began, load.share()
            differs = (found - whole).abs().amax(0)
            note = (
                f"logits differ by {differs.median():.2f} in the median and {differs.max():.1f} at most, of "
                f"{whole.abs().max():.1f}"
            )
            share = (found_labels != labels).float().mean().item()
            quiet = None if others is None else others <= QUIET
            name = f"tile {_SMALL_TILE}, overlap {overlap}"
            records.append(Record.of("agreement", name, Timing((timing,), 0, quiet), difference=share, note=note))
    return records


ROWS: dict[str, Row] = {
    "2000x2000": partial(measure_size, 2000, 0, 0, (False, True)),
    "10000x10000": partial(measure_size, 10_000, 0, 0, (False,)),
    "30000x2000": partial(measure_size, 30_000, 128, 2000, (False,)),
    "30000x30000": partial(measure_size, 30_000, 0, 0, (False,)),
    "agreement": measure_agreement,
}

if __name__ == "__main__":
    sys.exit(main("large_images", ROWS, __doc__))
