"""Frames of DICOM files: stored pixels, and the transforms to units and to grey values (PS3.3 C.7.6.16, C.11)."""

import math
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..files import printable
from .volumes import to_bytes


@dataclass
class Frame:
    """A slice: where its pixels are, and where it is in space."""

    file: Any
    header: Any
    index: int
    number_in_file: int | None
    position: list[float] | None = None
    orientation: list[float] | None = None
    spacing: list[float] | None = None
    along: float = 0.0

    def tag(self, group: str, name: str) -> Any:
        """Return a tag of this frame; see `frame_tag`."""
        return frame_tag(self.header, self.index, group, name)


def frame_tag(header: Any, index: int, group: str, name: str) -> Any:
    """Return a tag of a frame: its own, that of all frames of the file, or the file's.

    Args:
        header: of the file.
        index: of the frame, from 0.
        group: the functional group that the tag is in.
        name: of the tag.
    """
    for sequence, place in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        groups = header.get(sequence)
        macro = groups[place].get(group) if groups and place < len(groups) else None
        value = macro[0].get(name) if macro else None
        if value is not None:
            return value
    return header.get(name)


def in_units(pixels: np.ndarray, frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Apply the modality transform to stored values (H, W), and to the ends of their range (2,)."""
    from pydicom.pixels import apply_modality_lut

    header = frame.header
    bits, is_signed = int(header.BitsStored), int(header.PixelRepresentation)
    ends = np.array([-(1 << bits - 1), (1 << bits - 1) - 1] if is_signed else [0, (1 << bits) - 1], np.int64)
    if header.get("ModalityLUTSequence"):
        return (apply_modality_lut(each, header).astype(np.float64) for each in (pixels, ends))  # type: ignore[return-value]
    slope, intercept = rescale(frame)
    return pixels.astype(np.float64) * slope + intercept, ends.astype(np.float64) * slope + intercept


def rescale(frame: Frame) -> tuple[float, float]:
    """Slope and intercept of the modality transform."""
    slope = frame.tag("PixelValueTransformationSequence", "RescaleSlope")
    intercept = frame.tag("PixelValueTransformationSequence", "RescaleIntercept")
    return (1.0 if slope is None else float(slope)), (0.0 if intercept is None else float(intercept))


def decode(frame: Frame) -> np.ndarray:
    """Decode the stored pixels (H, W) or (H, W, 3) of a frame."""
    from pydicom.pixels import pixel_array

    file = frame.file if isinstance(frame.file, Path) else BytesIO(frame.file.getvalue())
    return pixel_array(file, index=frame.number_in_file or 0)


def to_rgb(pixels: np.ndarray, header: Any) -> np.ndarray:
    """Return colours (3, H, W) as uint8."""
    from pydicom.pixels import apply_color_lut

    if header.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, header)
        if pixels.dtype == np.uint16:
            pixels = pixels >> 8
    return np.moveaxis(pixels.astype(np.uint8), -1, 0)


def windowed(values: np.ndarray, frame: Frame, name: str) -> np.ndarray:
    """Apply the first window of a frame, or its VOI table, to 0..255 (PS3.3 C.11.2)."""
    center = _first(frame.tag("FrameVOILUTSequence", "WindowCenter"))
    width = _first(frame.tag("FrameVOILUTSequence", "WindowWidth"))
    tables = frame.header.get("VOILUTSequence")
    if center is None or width is None:
        if tables:
            return _by_table(values, tables[0])
        raise ValueError(f"{name} states no window; expected its numbers: --value-range window:CENTER,WIDTH")
    function = str(frame.tag("FrameVOILUTSequence", "VOILUTFunction") or "LINEAR")
    if function == "SIGMOID" and width > 0:
        return np.rint(255 / (1 + np.exp(-4 * (values - center) / width))).astype(np.uint8)
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if function not in ("LINEAR", "LINEAR_EXACT") or width < 0 or (width == 0 and function != "LINEAR"):
        raise ValueError(
            f"{name} states a window of function {printable(function[:16])} and width {width:g}; expected a width "
            "above 0"
        )
    if width == 0:  # a step
        return np.where(values > center, 255, 0).astype(np.uint8)
    return to_bytes(values, center - width / 2, center + width / 2)


def _first(value: Any) -> float | None:
    """Return the first of one or several numbers."""
    if value is None or value == "":
        return None
    number = float(value if isinstance(value, str | float | int) else value[0])
    return number if math.isfinite(number) else None


def _by_table(values: np.ndarray, table: Any) -> np.ndarray:
    """Look values up in a VOI table, scaled to 0..255."""
    size, first, bits = (int(each) for each in table.LUTDescriptor)
    data = table.LUTData
    data = (
        np.frombuffer(data, "<u2" if len(data) == 2 * (size or 1 << 16) else "u1") if isinstance(data, bytes) else data
    )
    entries = np.asarray(data, np.float64)
    found = entries[np.clip(np.rint(values).astype(np.int64) - first, 0, len(entries) - 1)]
    return to_bytes(found, 0, (1 << bits) - 1)


__all__ = ["Frame", "decode", "frame_tag", "in_units", "rescale", "to_rgb", "windowed"]
