"""Damaged vector files: read, or refused by an error that names the file; hundreds in the slow test."""

import random

import pytest

pytest.importorskip("pyogrio")
pytest.importorskip("rasterio")  # of the scene of an area of interest
pytest.importorskip("pyproj")
pytest.importorskip("tifffile")  # of the fuzzer's other samples
shapely = pytest.importorskip("shapely")

from hf_segformer.geo import vectors  # noqa: E402
from hf_segformer.geo.areas import AreaMeasure  # noqa: E402
from tests.support.fuzz_loaders import READERS, run_case  # noqa: E402
from tests.support.vectors import POLYGONS, SCENE, write_all_kinds  # noqa: E402


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return {"vectors": write_all_kinds(tmp_path_factory.mktemp("vectors") / "all")}


def test_every_sample_is_valid(samples):
    for path in samples["vectors"]:
        READERS["vectors"](path, random.Random(1))
        found = vectors.read_polygons(path, AreaMeasure(SCENE, "scene.tif"), "crop")
        assert found.values == ["wheat", "maize"]
        assert shapely.equals(found.polygons, POLYGONS).all()


def test_some_damaged_vector_files_are_read_or_refused_by_name(samples):
    assert {run_case(samples, 7, case) for case in range(60)} == {"read", "refused"}


@pytest.mark.slow
def test_many_damaged_vector_files_are_read_or_refused_by_name(samples):
    assert {run_case(samples, 8, case) for case in range(600)} == {"read", "refused"}


def test_the_fuzzer_finds_faults_of_vector_files(samples, monkeypatch):
    monkeypatch.setattr(vectors, "_WRONG_CONTENT", ())
    with pytest.raises(AssertionError):
        all(run_case(samples, 7, case) for case in range(100))
