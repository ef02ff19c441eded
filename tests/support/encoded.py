"""Image files of numbers of bits that Pillow does not write."""

import struct
import zlib

import numpy as np

_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of PNG, by number of bands


def packed(values, bits, order="big"):
    """Rows of bytes that hold values (H, W) of a few bits, the first pixel in the high bits, or in the low ones."""
    rows = (values[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(len(values), -1)
    return np.packbits(rows.astype(np.uint8), axis=1, bitorder=order)


def exif(orientation):
    """EXIF data with an orientation and nothing else."""
    return b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + struct.pack(">HHI", orientation, 0, 0)


def png(array, bits=16, exif_data=b""):
    """A PNG file of 16 bits, (H, W) or (H, W, C), or of 1, 2 or 4 bits, (H, W)."""

    def part(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = array.shape[:2]
    color_type = _COLOR_TYPES[array.shape[2] if array.ndim == 3 else 1]
    lines = array.astype(">u2") if bits == 16 else packed(array, bits)
    parts = (
        part(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)),
        exif_data and part(b"eXIf", exif_data),
        part(b"IDAT", zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))),
        part(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
