"""Prediction of large jobs: arithmetic of the tables, stages that are measured, and the page from its files."""

import pytest
from PIL import Image

from benchmarks import scale
from benchmarks.record import RESULTS
from hf_segformer import SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.files import read_json

FOUND = {
    "images": {
        "milliseconds": dict(zip(scale.STAGES, (1.0, 2.0, 30.0, 3.0), strict=True)),
        "image_bytes": 90_000,
        "mask_bytes": 10_000,
    },
    "raster": {"seconds_per_megapixel": 0.72, "bytes_per_megapixel": 1_000_000, "mebibytes": 800},
    "two_processes": {"images_per_second": 50.0, "predicted": 55.56},
    "quiet": True,
    "date": "2026-01-01",
    "processor": "P",
    "instructions": "AVX2",
    "cores": 2,
    "commit": "c",
}


def test_hours_are_divided_evenly():
    assert scale.hours(7200, 1, 2) == 1
    assert scale.hours(7200, 4, 2) == 0.25


def test_the_tables_are_products_of_the_rates():
    page = scale.render([FOUND])
    # 36 ms an image: 36,000 core-seconds, 10 core-hours; 10,000 megapixels: 7,200 core-seconds, 2 core-hours.
    # On one machine of two cores 5 hours for 100 GB, and 1 hour for 10 GB.
    assert "| 1 | 5.0 | 5.6 | 1.0 | 2.8 |" in page
    assert "| 4 | 1.2 | 22.2 | 0.2 | 11.1 |" in page
    assert "10 core-hours for the images and 2 for the raster" in page
    assert "50.0 images/s measured, 55.6 predicted: 0.90 of it. Commit c" in page
    assert "(machine disturbed)" in scale.render([{**FOUND, "quiet": False}])


def test_every_stage_of_an_image_is_timed(tmp_path, model):
    predictor = SegFormerPredictor(model.eval(), SegFormerImageProcessor(size=64))
    Image.new("RGB", (90, 60)).save(tmp_path / "image.jpg")
    found = scale.measure_stages(predictor, [str(tmp_path / "image.jpg")], tmp_path)
    assert list(found["milliseconds"]) == list(scale.STAGES)
    assert found["milliseconds"]["network and labels"] > 0
    assert found["image_bytes"] == (tmp_path / "image.jpg").stat().st_size
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.size == (90, 60)


def test_the_page_is_written_from_the_files():
    files = sorted(RESULTS.glob("*/scale.json"))
    if not files:
        pytest.skip("no processor was measured yet")
    assert scale.PAGE.read_text() == scale.render([read_json(path) for path in files])
