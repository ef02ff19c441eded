"""Masks of few bits, and TIFF masks in which 0 is white: labels are the stored values, as of palettes and rasters."""

import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from hf_segformer import SegFormerImageProcessor
from hf_segformer.data.readers import read_whole_image, read_whole_mask
from hf_segformer.image_io_segformer import read_mask
from tests.support.encoded import exif, packed, png

WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1


def labels(bits):
    """(5, 7), every value of that many bits that there is room for."""
    return (np.arange(35).reshape(5, 7) * 7 % 2**bits).astype(np.uint8)


def tiff(values, bits, photometric, fill_order=1, orientation=1):
    data = packed(values, bits, "big" if fill_order == 1 else "little").tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 266: fill_order, 273: 0}
    tags |= {274: orientation, 277: 1, 278: height, 279: len(data)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the pixels begin
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


FILES = {
    "png-1": (1, png(labels(1), 1)),
    "png-2": (2, png(labels(2), 2)),
    "png-4": (4, png(labels(4), 4)),
    **{
        f"tiff-{bits}-{photometric}-{order}": (bits, tiff(labels(bits), bits, photometric, order))
        for bits in (1, 2, 4, 8)
        for photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO)
        for order in ((1, 2) if bits < 8 else (1,))  # Pillow does not read inverted bytes in the other order
    },
}


@pytest.mark.parametrize(("bits", "content"), FILES.values(), ids=FILES)
def test_labels_are_the_stored_values(bits, content, tmp_path):
    (tmp_path / "mask").write_bytes(content)
    np.testing.assert_array_equal(read_whole_mask(tmp_path / "mask"), labels(bits))
    np.testing.assert_array_equal(read_whole_mask({"bytes": content, "path": "mask"}), labels(bits))
    processor = SegFormerImageProcessor(do_resize=False)
    for source in (BytesIO(content), Image.open(BytesIO(content))):
        batch = processor(np.zeros((5, 7, 3), np.uint8), source)
        np.testing.assert_array_equal(batch["labels"][0], labels(bits))


@pytest.mark.parametrize("content", [png(labels(4), 4, exif(6)), tiff(labels(4), 4, WHITE_IS_ZERO, orientation=6)])
def test_exif_turns_labels_of_few_bits(content):
    for source in (BytesIO(content), Image.open(BytesIO(content))):
        np.testing.assert_array_equal(read_mask(source, "the mask"), np.rot90(labels(4), -1))
    np.testing.assert_array_equal(read_whole_mask(content, ignore_exif=True), labels(4))


def test_images_are_read_as_they_are_displayed():
    for content, expected in (
        (png(labels(4), 4), labels(4) * 17),
        (tiff(labels(2), 2, WHITE_IS_ZERO), 255 - labels(2) * 85),
        (tiff(labels(8), 8, WHITE_IS_ZERO), 255 - labels(8)),
    ):
        np.testing.assert_array_equal(read_whole_image(content, 1), expected)


def test_a_pbm_mask_of_pillow_keeps_its_labels(tmp_path):
    Image.fromarray(labels(1).astype(bool)).save(tmp_path / "mask.pbm")
    np.testing.assert_array_equal(read_whole_mask(tmp_path / "mask.pbm"), labels(1))
