"""Masks of volumes, slice by slice on the grid of their images: label volumes (NIfTI) and DICOM segmentations.

A label volume may hold the voxels in another order or direction than its images, as converters leave them: it is
turned, never resampled. Frames of a segmentation are found by their positions, without any by the images that they
refer to.

Axes: H W sides of a slice, F frames of a segmentation. Grids map column, row and slice, from 0, to mm, to the right, to
the front and upwards.
"""

import os
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..data.reader_protocol import ImageSource, ReadOptions
from ..data.readers import find_reader
from ..files import printable
from .dicom import DicomVolume, read_header
from .frames import frame_tag
from .nifti import NiftiVolume
from .volumes import Volume, decode_errors, quiet

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # of bits, and of segment numbers
_MOST_OFF = 0.1  # of a voxel
_MOST_OPEN = 32
_TAGS = (
    *("SOPClassUID", "SegmentationType", "SegmentSequence", "Rows", "Columns", "NumberOfFrames", "FrameOfReferenceUID"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "BitsAllocated"),
)


def read_labels(
    volume: Volume, source: ImageSource, index: int, classes: Mapping[str, int], outside: int | None
) -> np.ndarray:
    """Read the mask of a slice.

    Args:
        volume: the images.
        source: a label volume, or a DICOM segmentation.
        index: of the slice, from 0.
        classes: value of each class by its name, for segments, whose labels are such names.
        outside: value of pixels in no segment; None if they are ignored.

    Returns:
        integers (H, W), masked where they are ignored.

    Raises:
        ValueError: if the mask is not on the grid of the volume, names another class, or is of another kind.
        OSError: if it cannot be read.
    """
    try:
        mask = _open(str(source.path), os.stat(source.path or "").st_mtime_ns)
        if isinstance(mask, NiftiVolume):
            return mask.oriented(_turn(mask, volume), index)
        return mask.read(volume, index, classes, outside)
    except decode_errors() as error:
        if isinstance(error, OSError | ValueError) and str(error).startswith((source.name, volume.name)):
            raise
        raise OSError(f"{source.name} is cut short, damaged or unusual: {type(error).__name__}") from error


@lru_cache(_MOST_OPEN)
def _open(path: str, stamp: int) -> Any:
    """Open a mask; `stamp` tells a changed file from an earlier one."""
    source = ImageSource(path)
    reader = find_reader(source)[0]
    if reader is NiftiVolume:
        return NiftiVolume(source, ReadOptions(1, is_mask=True))
    if reader is DicomVolume:
        return Segmentation(source)
    raise ValueError(f"{path} is no mask of a volume; expected a NIfTI file or a DICOM segmentation")


def _turn(mask: NiftiVolume, volume: Volume) -> list[tuple[int, bool]]:
    """Return for columns, rows and slices of a volume the axis of a mask (in the same order), and if it is reversed."""
    grids = (volume.grid(), mask.grid())
    if grids[0] is None or grids[1] is None:
        missing = (volume if grids[0] is None else mask).name
        raise ValueError(f"{missing} states no place in space; expected one, or a PNG mask of a single image")
    sizes = [np.array([each.width, each.height, each.num_slices]) for each in (volume, mask)]
    matrix = np.linalg.solve(grids[1], grids[0])
    corners = np.array(np.meshgrid(*zip((0, 0, 0), sizes[0] - 1, strict=True))).reshape(3, -1)
    found = matrix[:3, :3] @ corners + matrix[:3, 3:]
    axes = np.abs(matrix[:3, :3]).argmax(0)
    wanted = np.zeros_like(found)
    reversed_ = [bool(matrix[axis, each] < 0) for each, axis in enumerate(axes)]
    for each, axis in enumerate(axes):
        wanted[axis] = sizes[0][each] - 1 - corners[each] if reversed_[each] else corners[each]
    if sorted(axes) != [0, 1, 2] or (sizes[1][axes] != sizes[0]).any() or np.abs(found - wanted).max() > _MOST_OFF:
        raise ValueError(
            f"{mask.name} is not on the grid of {volume.name} ({'x'.join(map(str, sizes[1]))} and "
            f"{'x'.join(map(str, sizes[0]))} voxels, {np.abs(found - wanted).max():.3g} voxels apart); expected one "
            "grid: resample the mask first, by nearest neighbour"
        )
    return list(zip(axes.tolist(), reversed_, strict=True))


class Segmentation:
    """A DICOM segmentation, of bits or of segment numbers.

    Args:
        source: the file.

    Raises:
        ValueError: if it is none, or lacks what places its frames.
        OSError: if it cannot be read.
    """

    def __init__(self, source: ImageSource):
        self.name, self.file = source.name, source.file
        DicomVolume.require_pydicom(self.name)
        with quiet():
            header = read_header(self.file, self.name, _TAGS)
        kind, uid = str(header.get("SegmentationType", "")), str(header.get("SOPClassUID", ""))
        if uid not in SEGMENTATIONS or kind == "FRACTIONAL":
            what = printable(kind)[:20] or "no segmentation"
            raise ValueError(
                f"{self.name} is DICOM of another kind ({what}); expected a segmentation of bits or segment numbers"
            )
        self.is_binary, self.shape = uid == SEGMENTATIONS[0], (int(header.Rows), int(header.Columns))
        self.frame_of_reference = str(header.get("FrameOfReferenceUID", ""))
        self.labels = {int(item.SegmentNumber): str(item.SegmentLabel) for item in header.get("SegmentSequence") or ()}
        number = int(header.get("NumberOfFrames") or 1)
        self._checked: set[str] = set()
        self.frames = [_PlacedFrame(header, index, self.is_binary) for index in range(number)]

    def read(self, volume: Volume, index: int, classes: Mapping[str, int], outside: int | None) -> np.ndarray:
        """Read the mask of a slice of a volume; see `read_labels`."""
        if not isinstance(volume, DicomVolume):
            raise ValueError(
                f"{self.name} is a DICOM segmentation, but {volume.name} is no DICOM; expected NIfTI masks"
            )
        if self.shape != (volume.height, volume.width):
            raise ValueError(
                f"{self.name} is {self.shape[0]}x{self.shape[1]} (height x width); expected the size of "
                f"{volume.name}, {volume.height}x{volume.width}"
            )
        values = self._values(classes)
        labels, taken = np.full(self.shape, outside or 0, np.int32), np.zeros(self.shape, bool)
        for frame in self._frames_of(volume, index):
            stored = self._pixels(frame.index)
            inside = stored != 0
            if (taken & inside).any():
                raise ValueError(f"{self.name} has segments that overlap in slice {index + 1}; expected one a pixel")
            taken |= inside
            for number in np.unique(stored[inside]).tolist():
                segment = frame.segment if self.is_binary else number
                if segment not in values:
                    raise ValueError(f"{self.name} has pixels of segment {segment}, which it does not describe")
                labels[stored == number] = values[segment]
        return np.ma.MaskedArray(labels, ~taken) if outside is None else labels

    def _values(self, classes: Mapping[str, int]) -> dict[int, int]:
        """Return the value of each segment by its number; number 0 is in no segment."""
        known = {name.casefold(): value for name, value in classes.items()}
        labels = {number: label for number, label in self.labels.items() if number}
        for label in labels.values():
            if label.casefold() not in known:
                raise ValueError(
                    f"{self.name} has a segment {printable(label)!r:.80}; expected classes, "
                    f"{printable(', '.join(classes)):.300}: name them as the segments are (data.names)"
                )
        return {number: known[label.casefold()] for number, label in labels.items()}

    def _frames_of(self, volume: DicomVolume, index: int) -> "list[_PlacedFrame]":
        """Return the frames of a slice."""
        place = volume.place_of(index)
        self._check_frames(volume)
        if place.position is None:
            return [frame for frame in self.frames if (place.uid, place.frame) in frame.sources]
        normal = np.cross(place.orientation[:3], place.orientation[3:])
        tolerance = _MOST_OFF * (volume.spacing[0] or 1.0)
        found = []
        for frame in self.frames:
            if frame.position is None:
                if (place.uid, place.frame) in frame.sources:
                    found.append(frame)
            elif abs(float(normal @ (frame.position - place.position))) <= tolerance:
                found.append(frame)
        return found

    def _check_frames(self, volume: DicomVolume) -> None:
        """Raise ValueError if frames lie outside the slices of a volume, or are turned or of another spacing."""
        if volume.name in self._checked:
            return
        if self.frame_of_reference != volume.frame_of_reference:
            raise ValueError(
                f"{self.name} has another FrameOfReferenceUID than {volume.name}; expected that of its images"
            )
        places = [volume.place_of(index) for index in range(volume.num_slices)]
        known = {(place.uid, place.frame) for place in places}
        for frame in self.frames:
            if frame.position is None or places[0].position is None:
                if not frame.sources & known:
                    raise ValueError(f"{self.name} does not say where in {volume.name} its frame {frame.index + 1} is")
                continue
            distances = np.array([place.position for place in places]) - frame.position
            spacing = np.array([*(places[0].spacing or (1.0, 1.0)), volume.spacing[0] or 1.0])
            row, column = np.array(places[0].orientation[:3]), np.array(places[0].orientation[3:])
            axes = np.stack([column, row, np.cross(row, column)])
            off = np.abs(distances @ axes.T / spacing).max(1).min()
            is_turned = np.abs(np.array(frame.orientation or [2.0]) - places[0].orientation).max() > _MOST_OFF / 100
            is_scaled = not np.allclose(frame.spacing or [0.0], spacing[:2], rtol=_MOST_OFF / 100)
            if off > _MOST_OFF or is_turned or is_scaled:
                raise ValueError(
                    f"{self.name} is not on the grid of {volume.name} (frame {frame.index + 1}); expected one grid: "
                    "resample it first"
                )
        self._checked.add(volume.name)

    def _pixels(self, index: int) -> np.ndarray:
        from pydicom.pixels import pixel_array

        file = self.file if isinstance(self.file, Path) else BytesIO(self.file.getvalue())
        with quiet():
            return pixel_array(file, index=index)


class _PlacedFrame:
    """Segment and place of a frame of a segmentation."""

    def __init__(self, header: Any, index: int, is_binary: bool):
        self.index = index
        number = frame_tag(header, index, "SegmentIdentificationSequence", "ReferencedSegmentNumber")
        self.segment = int(number) if is_binary else 0
        position = frame_tag(header, index, "PlanePositionSequence", "ImagePositionPatient")
        orientation = frame_tag(header, index, "PlaneOrientationSequence", "ImageOrientationPatient")
        spacing = frame_tag(header, index, "PixelMeasuresSequence", "PixelSpacing")
        self.position = None if position is None else np.array(position, float)
        self.orientation = None if orientation is None else [float(each) for each in orientation]
        self.spacing = None if spacing is None else [float(each) for each in spacing]
        images = frame_tag(header, index, "DerivationImageSequence", "SourceImageSequence") or ()
        self.sources = {
            (str(image.ReferencedSOPInstanceUID), number)
            for image in images
            for number in _numbers_of(image.get("ReferencedFrameNumber"))
        }


def _numbers_of(value: Any) -> list[int]:
    """Return frame numbers, from 1; 1 where all frames of an image, or its only one, are meant."""
    if value is None:
        return [1]
    return [int(value)] if isinstance(value, str | int) else [int(each) for each in value]


__all__ = ["SEGMENTATIONS", "Segmentation", "read_labels"]
