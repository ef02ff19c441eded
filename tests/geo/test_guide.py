"""The commands of docs/guides/maps.md, on a small scene."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from hf_segformer import SegFormerImageProcessor
from tests.geo.test_large_images import lively, scene, write_geotiff
from tests.geo.test_maps import UTM
from tests.geo.test_scenes import part, write_vectors
from tests.support.commands import run

shapely = pytest.importorskip("shapely")
pytest.importorskip("pyogrio")
pytest.importorskip("pyproj")
rasterio = pytest.importorskip("rasterio")

from hf_segformer.geo.vectors import from_pixels  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")]

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "maps.md"
HEIGHT, WIDTH = 300, 400
SMALL = {"MODEL": "model", "512": "32"}  # what a guide says, and a test does


def test_the_commands_of_the_guide_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lively().save_pretrained("model")
    SegFormerImageProcessor().save_pretrained("model")
    pixels = scene(height=HEIGHT, width=WIDTH)
    write_geotiff("scene.tif", pixels, UTM)
    Path("scenes").mkdir()
    part(Path("scenes/a.tif"), pixels, 0, 0, HEIGHT, 250)
    part(Path("scenes/b.tif"), pixels, 0, 250, HEIGHT, 150)
    labels = np.random.default_rng(0).integers(0, 3, (HEIGHT // 20, WIDTH // 20)).astype(np.uint8)
    write_geotiff("labels.tif", labels.repeat(20, 0).repeat(20, 1)[None], UTM)
    fields = [shapely.box(20, 20, 180, 280), shapely.box(200, 30, 390, 250)]
    write_vectors(Path("fields.gpkg"), from_pixels(fields, UTM["transform"]), UTM["crs"], crop=["wheat", "maize"])
    write_vectors(Path("area.gpkg"), from_pixels(fields[:1], UTM["transform"]), UTM["crs"], name=["a"])

    commands = re.findall(r"^segformer (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    assert len(commands) == 7
    for command in commands:
        words = [SMALL.get(word, word) for word in shlex.split(command)]
        if words[0] == "train":
            words += ["trainer.max_steps=1", "augmentation.crop_size=32", "trainer.eval_strategy=no"]
            words += ["trainer.warmup_steps=0", "trainer.per_device_train_batch_size=2"]
        assert run(*words) == 0, command

    for name in ("maps/scene_mask.tif", "maps/scene_mask.qml", "maps/scene_areas.csv", "maps/scene_confidence.tif"):
        assert Path(name).is_file(), name
    assert Path("maps/scene_polygons.gpkg").is_file()
    assert sorted(path.name for path in Path("folder").glob("*.geojson")) == [
        "a_polygons.geojson",
        "b_polygons.geojson",
    ]
    with rasterio.open("part/scene_mask.tif") as file:
        found = file.read(1)
    assert (found[:, 181:] == 255).all()
    assert (found[20:280, 20:180] != 255).all()
    assert Path("joined/mosaic_confidence.tif").is_file()
    assert Path("fields/classes.json").is_file()
