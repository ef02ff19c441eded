"""Damaged videos: read, or refused by an error that names the file; hundreds in the slow test."""

import random

import pytest

pytest.importorskip("av")
pytest.importorskip("tifffile")  # of the fuzzer's other samples

from transformers.utils import logging

from hf_segformer.video import reader
from tests.support.fuzz_loaders import READERS, run_case
from tests.support.videos import write_videos


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    logging.disable_progress_bar()
    return {"videos": write_videos(tmp_path_factory.mktemp("videos"))}


def test_every_sample_is_valid(samples):
    for path in samples["videos"]:
        assert READERS["videos"](path, random.Random(1)).shape == (4, 24, 32, 3)


def test_some_damaged_videos_are_read_or_refused_by_name(samples):
    assert {run_case(samples, 5, case) for case in range(60)} == {"read", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_many_damaged_videos_are_read_or_refused_by_name(samples, part):
    assert {run_case(samples, 6, case) for case in range(part, 900, 3)} == {"read", "refused"}


def test_the_fuzzer_finds_faults_of_videos(samples, monkeypatch):
    monkeypatch.setattr(reader, "missing_bytes", lambda file: 0)
    with pytest.raises(AssertionError, match="cut short, was read as if it were whole"):
        all(run_case(samples, 5, case) for case in range(200))
