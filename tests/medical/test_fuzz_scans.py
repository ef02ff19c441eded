"""Damaged scans: read, or refused by an error that names the file; hundreds in the slow test."""

import random

import pytest

pytest.importorskip("highdicom")
pytest.importorskip("nibabel")
pytest.importorskip("tifffile")  # of the fuzzer's other samples

from transformers.utils import logging

from hf_segformer.medical import volumes
from tests.support.fuzz_loaders import READERS, run_case
from tests.support.scans import write_scans


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    logging.disable_progress_bar()
    return {"scans": write_scans(tmp_path_factory.mktemp("scans"))}


def test_every_sample_is_valid(samples):
    for path in samples["scans"]:
        assert READERS["scans"](path, random.Random(1)).shape[-1] in (24, 17, 3, 44)


def test_some_damaged_scans_are_read_or_refused_by_name(samples):
    assert {run_case(samples, 5, case) for case in range(60)} == {"read", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_many_damaged_scans_are_read_or_refused_by_name(samples, part):
    assert {run_case(samples, 6, case) for case in range(part, 600, 3)} == {"read", "refused"}


def test_the_fuzzer_finds_faults_of_scans(samples, monkeypatch):
    monkeypatch.setattr(volumes, "DECODE_ERRORS", ())
    with pytest.raises(AssertionError):
        all(run_case(samples, 5, case) for case in range(100))
