"""A few hundred damaged files of the fuzzer, every kind of image cut short, and a check that the fuzzer can fail."""

import random

import numpy as np
import pytest

pytest.importorskip("tifffile")

from PIL import Image
from transformers.utils import logging

from hf_segformer import SegFormerImageProcessor, image_io_segformer
from hf_segformer.conversion.loading import load_segmentation
from tests.support.fuzz_loaders import run_case
from tests.support.samples import write_samples

NUM_CASES = 400


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    logging.disable_progress_bar()
    return write_samples(tmp_path_factory.mktemp("samples"))


@pytest.mark.parametrize("part", range(4))
def test_damaged_files_are_read_or_refused_by_name(part, samples):
    outcomes = {run_case(samples, 11, case) for case in range(part, NUM_CASES, 4)}
    assert outcomes == {"read", "refused"}


def test_every_sample_is_valid(samples):
    processor = SegFormerImageProcessor(do_resize=False)
    for path in samples["images"]:
        if path.name != "floats.tif":  # measurements, which are no colour image
            assert processor(path, return_tensors="np").pixel_values.shape[1] == 3
    for path in samples["masks"]:
        assert image_io_segformer.read_mask(path, "mask").shape == (17, 24)
    for path in (*samples["weights"], *(path.parent for path in samples["folders"])):
        if not path.name.startswith("few"):
            assert load_segmentation(path)[0].config.num_labels == 2


def read(processor, path):
    """Return the pixels and no message, or None and the message."""
    try:
        return processor(path, return_tensors="np").pixel_values, ""
    except (OSError, ValueError) as error:
        return None, str(error)


def test_an_image_cut_anywhere_is_refused_or_complete(samples):
    processor, chance = SegFormerImageProcessor(do_resize=False), random.Random(0)
    for path in samples["images"]:
        if path.name == "floats.tif":
            continue
        whole = path.read_bytes()
        expected = processor(path, return_tensors="np").pixel_values
        num_refused = 0
        for length in [0, 1, 8, len(whole) // 2, *(chance.randrange(len(whole)) for _ in range(12))]:
            path.write_bytes(whole[:length])
            found, message = read(processor, path)
            num_refused += found is None
            assert path.name in message if found is None else np.array_equal(found, expected), f"{path}, {length} bytes"
        path.write_bytes(whole)
        assert num_refused >= 4


def run_all(samples, number):
    for case in range(number):
        run_case(samples, 11, case)


def test_the_fuzzer_finds_faults(samples, monkeypatch):
    """Without the list of errors that Pillow raises the same cases fail."""
    monkeypatch.setattr(image_io_segformer, "DECODE_ERRORS", ())
    with pytest.raises(AssertionError):
        run_all({"images": samples["images"]}, 3000)
    monkeypatch.undo()
    monkeypatch.setattr(Image.Image, "convert", lambda *_: 1 / 0)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_all({"images": samples["images"]}, 300)
