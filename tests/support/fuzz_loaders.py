"""Fuzzer of everything that reads files: damaged files are read whole, or refused by an error that names them.

python -m tests.support.fuzz_loaders --number 10000 --seed 0

A case is a valid small file (images, masks, rasters, vectors, scans, videos, weights, JSON) and one to three mutations
of it, all drawn from the seed and the case's number. Expected: it is read, or a ValueError or OSError names it. A
failure is any other exception, a warning that is not Pillow's own, a hang, memory without bounds, and pixels of a file
that was cut short, unless all of them were there. Each failure is printed with the command that repeats it.
"""

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from transformers.utils import logging

from hf_segformer import SegFormerImageProcessor
from hf_segformer.conversion.checkpoints import read_checkpoint, read_config
from hf_segformer.conversion.convert import convert_checkpoint
from hf_segformer.conversion.loading import load_segmentation
from hf_segformer.data.decoding import RowReader
from hf_segformer.data.label_mapping import LabelMapping
from hf_segformer.data.reader_protocol import Tile
from hf_segformer.data.readers import kind_of, open_image, open_raster
from hf_segformer.image_io_segformer import read_mask
from hf_segformer.inference.tiling import MaskLayout
from tests.support.damage import mutate
from tests.support.samples import write_samples

_SECONDS = 20
_MEMORY = 3 << 30  # bytes beyond what the process holds at its start


class Hang(BaseException):
    """Raised where a loader takes too long; no loader's `except` may catch it."""


def _read_image(path: Path, chance: random.Random) -> np.ndarray:
    num_channels = chance.choice((1, 3))
    means = {"image_mean": [0.5] * num_channels, "image_std": [0.5] * num_channels}
    return np.asarray(SegFormerImageProcessor(do_resize=False, **means)(path).pixel_values[0])


def _read_mask(path: Path, chance: random.Random) -> np.ndarray:
    return read_mask(path, "mask")


def _read_row(path: Path, chance: random.Random) -> np.ndarray:
    whole = path.parent.with_name("rows") / "labels.png"
    if path.parent.name == "rows_labels":
        return RowReader(3, LabelMapping(tuple(range(5)))).read(str(whole.with_name("image.png")), str(path))[1]
    return np.asarray(RowReader(chance.choice((1, 3, 5)), LabelMapping(tuple(range(5)))).read(str(path), str(whole))[0])


def _read_raster(path: Path, chance: random.Random) -> np.ndarray:
    kind_of(path)
    with open_raster(path, 3) as raster:
        pixels, valid = raster.read(Tile(0, 0, min(raster.height, 64), min(raster.width, 64)))
    return pixels if valid is None else np.where(valid, pixels, 0)


def _read_weights(path: Path, chance: random.Random) -> None:
    chance.choice((read_checkpoint, convert_checkpoint, load_segmentation))(path)


def _read_folder(path: Path, chance: random.Random) -> None:
    loaders: list[Callable] = [load_segmentation]
    if path.name == "config.json":
        loaders += [read_config]
    if path.name == "preprocessor_config.json":
        loaders += [SegFormerImageProcessor.from_pretrained]
    chance.choice(loaders)(path.parent)


def _read_scan(path: Path, chance: random.Random) -> np.ndarray:
    axis, window = chance.choice((None, 0, 1)), chance.random() < 0.3
    with open_image(path, any_range=True, axis=axis if ".nii" in path.name else None, window=window) as volume:
        if volume.kind != "volume":
            return np.asarray(volume.image())
        found = np.stack([np.ma.filled(volume.slice(index), 0) for index in range(min(volume.num_slices, 16))])
        layout = MaskLayout(np.uint8, 255, [(0, 0, 0)] * 2, ["background", "lesion"])
        if volume.num_slices <= 16:
            labels = np.ones(found[:, 0].shape, np.uint8)
            with tempfile.TemporaryDirectory() as folder:
                volume.write(Path(folder) / path.name, iter(labels), layout)
    return found


def _read_vectors(path: Path, chance: random.Random) -> None:
    from hf_segformer.geo.areas import AreaMeasure
    from hf_segformer.geo.scenes import Region
    from hf_segformer.geo.vectors import read_polygons
    from tests.support.vectors import SCENE

    if chance.random() < 0.5:
        read_polygons(path, AreaMeasure(SCENE, "scene.tif"), chance.choice((None, "crop")))
        return
    height, width = SCENE.height, SCENE.width  # of a scene whose area of interest the file is
    tile = Tile(0, 0, height, width)
    raster: Any = SimpleNamespace(name="scene.tif", height=height, width=width, reference=lambda: SCENE)
    region = Region.read(path, raster)
    assert region.is_near(tile) >= region.inside(tile).any()


def _read_video(path: Path, chance: random.Random) -> np.ndarray:
    from hf_segformer.video.reader import Frame

    with open_image(path, ignore_exif=chance.random() < 0.5) as video:
        if video.kind != "video":
            return np.asarray(video.image())
        return np.stack([np.asarray(event.image) for event in video.events() if isinstance(event, Frame)])


READERS = {
    "videos": _read_video,
    "vectors": _read_vectors,
    "scans": _read_scan,
    "images": _read_image,
    "masks": _read_mask,
    "rows": _read_row,
    "rasters": _read_raster,
    "weights": _read_weights,
    "folders": _read_folder,
}


def run_case(samples: dict[str, list[Path]], seed: int, case: int) -> str:
    """Damage one file, read it, put it back.

    Args:
        samples: files by the name of their reader.
        seed: of the whole run.
        case: number of the case.

    Returns:
        "read" or "refused".

    Raises:
        AssertionError: if something else came of it.
    """
    chance = random.Random(f"{seed} {case}")
    kind = chance.choice(sorted(samples))
    path = chance.choice(samples[kind])
    whole = path.read_bytes()
    reader_seed = chance.random()
    damaged, is_cut = mutate(whole, path.name, chance)
    try:
        path.write_bytes(damaged)
        found = _outcome(READERS[kind], path, reader_seed)
        path.write_bytes(whole)
        if is_cut and found is not None and isinstance(found, np.ndarray):
            expected = READERS[kind](path, random.Random(reader_seed))
            assert np.array_equal(found, expected), f"{path.name}, cut short, was read as if it were whole"
    finally:
        path.write_bytes(whole)
    return "refused" if found is None else "read"


def _outcome(reader: Callable, path: Path, reader_seed: float) -> object:
    """Return what was read, None if it was refused as expected."""
    with warnings.catch_warnings(record=True) as caught, _watchdog():
        warnings.simplefilter("always")
        try:
            found = reader(path, random.Random(reader_seed))
            result = "read" if found is None else found
        except (ValueError, OSError) as error:
            message = " ".join(str(error).split())
            assert path.name in message or str(path.parent) in message, f"{path.name} is not named: {message}"
            assert "SECRET" not in message, f"{path.name} gets a message that names a patient: {message}"
            assert len(message) < 2000, f"{path.name} gets a message of {len(message)} characters"
            result = None
        except Exception as error:
            raise AssertionError(f"{path.name}: {type(error).__name__}: {error}") from error
    strange = [warning for warning in caught if "PIL" not in Path(warning.filename).parts]
    assert not strange, f"{path.name}: warns {strange[0].category.__name__}: {strange[0].message}"
    return result


@contextmanager
def _watchdog() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    except Hang as error:
        raise AssertionError(f"no answer within {_SECONDS} seconds") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _limit_memory() -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY, held + _MEMORY))


def main() -> int:
    """Run the cases, and tell what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=10_000, help="how many damaged files (default: 10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone, with where an error comes from")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    counts: Counter = Counter()
    cases = range(arguments.number) if arguments.case is None else [arguments.case]
    with tempfile.TemporaryDirectory() as folder:
        samples = write_samples(Path(folder))
        if find_spec("highdicom") and find_spec("nibabel"):
            from tests.support.scans import write_scans

            samples["scans"] = write_scans(Path(folder) / "scans")
        if all(map(find_spec, ("pyogrio", "pyproj", "rasterio", "shapely"))):
            from tests.support.vectors import write_all_kinds

            samples["vectors"] = write_all_kinds(Path(folder) / "vectors")
        if find_spec("av"):
            from tests.support.videos import write_videos

            samples["videos"] = write_videos(Path(folder) / "videos")
        _limit_memory()
        for case in cases:
            try:
                counts[run_case(samples, arguments.seed, case)] += 1
            except AssertionError as error:
                counts["wrong"] += 1
                if arguments.case is not None:
                    traceback.print_exc()
                again = f"python -m tests.support.fuzz_loaders --seed {arguments.seed} --case {case}"
                print(f"{' '.join(str(error).split())[:300]}\n    {again}", flush=True)
    print(json.dumps({"seed": arguments.seed, "files": len(cases), **counts}))
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
