"""DICOM images: single files, series of files, and multi-frame files; see DICOM PS3.3.

Pixels are in the units of the modality transform (Hounsfield for CT), or 8-bit as the file's window shows them; dark
means low, also where MONOCHROME1 says otherwise. Slices, of a series and of a multi-frame file alike, are ordered by
their positions along the normal of the planes. Only the tags of `_TAGS` are read, none of which names a person.
"""

import math
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.reader_protocol import ImageSource, Kind
from ..files import printable
from ..image_io_segformer import DECODE_ERRORS
from ..inference.tiling import MaskLayout
from .frames import Frame, decode, in_units, rescale, to_rgb, windowed
from .volumes import Volume, quiet

_MAGIC, _MAGIC_PLACE = b"DICM", 128
_DEFLATED = "1.2.840.10008.1.2.1.99"
_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "Modality"),
    *("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "NumberOfFrames", "Rows", "Columns"),
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *("VOILUTSequence", "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor"),
    *("BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableData", "PlanarConfiguration", "LossyImageCompression"),
    *("LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)
# What `keep_identity` adds.
IDENTITY_TAGS = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName"),
)
_COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
_GREYS = ("MONOCHROME1", "MONOCHROME2")
_SAME = 1e-3  # of directions
_EQUAL_STEPS = 0.02  # of the distance of slices


class Place(NamedTuple):
    """Place of a slice: the file that holds it, and its position; None where the file does not say.

    Attributes:
        uid: SOPInstanceUID of its file.
        frame: number in the file, from 1.
        position: of its first pixel in mm, to the left, to the back and upwards.
        orientation: of its rows and columns.
        spacing: of its rows and columns in mm.
    """

    uid: str
    frame: int
    position: Any = None
    orientation: Any = None
    spacing: Sequence[float] | None = None


class DicomVolume(Volume):
    """Reader of DICOM images, single, multi-frame or the files of a series; see `Volume`."""

    suffixes = (".dcm", ".dicom", ".ima")
    takes_values, keeps_identity, quotes_fields = False, True, True
    mask_suffix = ".dcm"

    @classmethod
    def claims(cls, source: ImageSource, by_tiles: bool = False) -> Kind | None:
        """See `data.reader_protocol.Reader.claims`."""
        is_dicom = source.head[_MAGIC_PLACE:].startswith(_MAGIC)
        return "volume" if is_dicom or source.suffix in cls.suffixes else None

    @classmethod
    def gather(cls, paths: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
        """Join the files of each series, and drop those without pixels; see `data.readers.gather`.

        The only series of several files in a folder is named by the folder, others `series_NUMBER`, or by their UID
        where a number is missing or not the only one.
        """
        try:
            cls.require_pydicom("")
        except ValueError:  # the error of reading says so, once for the folder
            return ({"": tuple(paths)} if len(paths) > 1 else {}), []
        series: dict[str, list[str]] = {}
        numbers: dict[str, str] = {}
        dropped = []
        for path in paths:
            try:
                header = read_header(Path(path), path, ("SeriesInstanceUID", "SeriesNumber", "Rows", "NumberOfFrames"))
                uid, number = str(header.get("SeriesInstanceUID", "")), str(header.get("SeriesNumber", ""))
                if "Rows" not in header:
                    dropped.append(path)
                elif uid and not _is_multi_frame(header):
                    series.setdefault(uid, []).append(path)
                    numbers[uid] = number if number.isdigit() else ""
            except DECODE_ERRORS:  # the error of reading says so
                continue
        several = {uid: tuple(files) for uid, files in series.items() if len(files) > 1}
        if len(several) == 1:
            return {"": next(iter(several.values()))}, dropped
        used = [numbers[uid] for uid in several]
        own = {uid: numbers[uid] if numbers[uid] and used.count(numbers[uid]) == 1 else uid for uid in several}
        return {f"series_{own[uid]}": files for uid, files in several.items()}, dropped

    @staticmethod
    def require_pydicom(name: str) -> None:
        """Raise ValueError if pydicom is not installed."""
        DicomVolume.require(_Named(name), "pydicom", "DICOM")  # type: ignore[arg-type]

    def _open(self) -> None:
        self.require("pydicom", "DICOM")
        files: list[Any] = [Path(file) for file in self.source.files] or [self.source.file]
        headers = [(file, read_header(file, self._name_of(file), _TAGS)) for file in files]
        first = headers[0][1]
        for file, header in headers:
            self._check_image(self._name_of(file), header)
            if len(headers) > 1:
                self._check_same(self._name_of(file), header, first)
        self.height, self.width = int(first.Rows), int(first.Columns)
        self._is_color = str(first.PhotometricInterpretation) in _COLORS
        self.num_bands = 3 if self._is_color else 1
        if self.options.axis is not None:
            raise ValueError(f"{self.name} is a DICOM image, which is cut into its own slices; leave --axis out")
        number = int(first.get("NumberOfFrames") or 1) if len(headers) == 1 else len(headers)
        self.num_slices = number
        self.check_size()
        if len(headers) == 1:
            file, header = headers[0]
            is_several = number > 1
            self._frames = [Frame(file, header, index, index if is_several else None) for index in range(number)]
        else:
            self._frames = [Frame(file, header, 0, None) for file, header in headers]
        self._place()
        self.dtype = self._dtype()

    def _name_of(self, file: Any) -> str:
        return self.name if not self.source.files or isinstance(file, BytesIO) else str(file)

    def _check_image(self, name: str, header: Any) -> None:
        from pydicom.pixels import get_decoder

        what = printable(getattr(header.get("SOPClassUID"), "name", "of no stated kind"))
        if "Rows" not in header or "Columns" not in header or not header.get("PhotometricInterpretation"):
            raise ValueError(f"{name} holds no pixels ({what}); expected an image")
        colors = str(header.PhotometricInterpretation)
        if colors not in _GREYS + _COLORS or header.BitsAllocated not in (8, 16, 32):
            raise ValueError(
                f"{name} has {printable(header.BitsAllocated):.20} bits a pixel and colours {colors[:20]!r} ({what}); "
                "expected grey or RGB of 8, 16 or 32 bits"
            )
        if colors in _COLORS and colors != "PALETTE COLOR" and header.BitsAllocated != 8:
            raise ValueError(f"{name} has colours of {header.BitsAllocated} bits; expected 8")
        syntax = header.file_meta.TransferSyntaxUID
        try:
            can_decode = get_decoder(syntax).is_available
        except NotImplementedError:
            can_decode = False
        if not can_decode:
            raise ValueError(
                f"{name} is compressed as {syntax.name}, which no installed decoder reads; expected another transfer "
                "syntax: decompress it first, for instance by gdcmconv --raw"
            )

    @staticmethod
    def _check_same(name: str, header: Any, first: Any) -> None:
        """Refuse files of one series that do not make up one volume."""
        if _is_multi_frame(header):
            raise ValueError(f"{name} holds several frames in a series of several files; expected one: give it alone")
        names = ("SeriesInstanceUID", "Rows", "Columns", "PhotometricInterpretation", "FrameOfReferenceUID")
        for tag in names:
            if header.get(tag) != first.get(tag):
                raise ValueError(
                    f"{name} has {tag} {printable(header.get(tag)):.80}; expected {printable(first.get(tag)):.80}, "
                    "that of the series: give the files of one volume as a folder of their own"
                )

    def _place(self) -> None:
        """Read positions and spacing, order the slices, and check that those of a volume are at equal distances."""
        for frame in self._frames:
            frame.position = _numbers(frame.tag("PlanePositionSequence", "ImagePositionPatient"), 3)
            frame.orientation = _numbers(frame.tag("PlaneOrientationSequence", "ImageOrientationPatient"), 6)
            spacing = _numbers(frame.tag("PixelMeasuresSequence", "PixelSpacing"), 2)
            frame.spacing = spacing if spacing and min(spacing) > 0 else None
        self._is_placed = all(frame.position and frame.orientation for frame in self._frames)
        if self._is_placed:
            self._order()
        first = self._frames[0]
        row, column = first.spacing or (None, None)
        self.spacing = (None, row, column)
        if self.num_slices == 1 or self.options.page is not None:  # slices as images need not make up a volume
            return
        if self._is_placed and first.spacing:
            self.spacing = (self._step(), row, column)
        elif len(self.source.files) > 1:
            missing = "PixelSpacing" if self._is_placed else "ImagePositionPatient or ImageOrientationPatient"
            raise ValueError(
                f"{self.name} is in a series of {self.num_slices} files of which some have no {missing}; expected it "
                "in all of them: give the files one by one, or predict them as separate images (--pages)"
            )

    @property
    def frame_of_reference(self) -> str:
        """The UID of the space that positions are in; empty without one."""
        return str(self._frames[0].header.get("FrameOfReferenceUID", ""))

    def place_of(self, index: int) -> Place:
        """Return the place of a slice, from 0."""
        frame = self._frames[index]
        uid, number = str(frame.header.get("SOPInstanceUID", "")), (frame.number_in_file or 0) + 1
        if not self._is_placed:
            return Place(uid, number)
        return Place(uid, number, np.array(frame.position), np.array(frame.orientation), frame.spacing)

    def grid(self) -> np.ndarray | None:
        """See `Volume.grid`."""
        first, last = self.place_of(0), self.place_of(self.num_slices - 1)
        if first.position is None or last.position is None or first.spacing is None:
            return None
        row, column = first.orientation[:3], first.orientation[3:]
        number = self.num_slices - 1
        step = (last.position - first.position) / number if number else np.cross(row, column)
        steps = [row * first.spacing[1], column * first.spacing[0], step, first.position]
        return np.vstack([np.diag([-1, -1, 1]) @ np.stack(steps, 1), [0, 0, 0, 1]])

    def _order(self) -> None:
        """Order the slices by their positions along the normal of the first one."""
        orientation = np.array(self._frames[0].orientation)
        normal = np.cross(orientation[:3], orientation[3:])
        for frame in self._frames:
            frame.along = float(normal @ np.array(frame.position))
        self._frames.sort(key=lambda frame: frame.along)

    def _step(self) -> float:
        """Check that ordered slices make up a volume; return the distance of all of them."""
        frames, first = self._frames, np.array(self._frames[0].orientation)
        normal, spacing = np.cross(first[:3], first[3:]), np.array(frames[0].spacing)
        if abs(np.linalg.norm(normal) - 1) > _SAME:
            raise ValueError(f"{self.name} has ImageOrientationPatient {first.tolist()}; expected two unit vectors")
        for frame in frames:
            if np.abs(np.array(frame.orientation) - first).max() > _SAME:
                raise ValueError(f"{self.name}: its slices are not parallel; expected one ImageOrientationPatient")
            if frame.spacing is None or not np.allclose(frame.spacing, spacing, rtol=_SAME):
                raise ValueError(f"{self.name}: PixelSpacing is missing or differs between slices; expected one")
        steps = np.diff([frame.along for frame in frames])
        if steps.min() < 1e-6:
            raise ValueError(
                f"{self.name}: several slices are at one position; expected one volume: give the files of each phase "
                "or echo as a folder of their own, or predict them as separate images (--pages)"
            )
        if steps.max() - steps.min() > _EQUAL_STEPS * steps.max():
            raise ValueError(
                f"{self.name}: its slices are {steps.min():.4g} to {steps.max():.4g} mm apart; expected equal "
                "distances, a slice may be missing: complete the series, or predict them as separate images (--pages)"
            )
        return float(steps.mean())

    def _dtype(self) -> np.dtype:
        if self._is_color or self.options.window:
            return np.dtype(np.uint8)
        return np.dtype(np.uint8 if all(map(self._is_byte, self._frames)) else np.float32)

    @staticmethod
    def _is_byte(frame: Frame) -> bool:
        header = frame.header
        is_plain = (header.BitsAllocated, header.BitsStored, header.PixelRepresentation) == (8, 8, 0)
        return is_plain and rescale(frame) == (1, 0) and not header.get("ModalityLUTSequence")

    def _slice(self, index: int) -> np.ndarray:
        frame = self._frames[index]
        pixels = decode(frame)
        expected = (self.height, self.width)
        if pixels.shape[:2] != expected or pixels.ndim != (3 if self._is_color and pixels.ndim == 3 else 2):
            raise OSError(f"{self.name} holds {pixels.shape} pixels; expected {expected}, as in its header")
        if self._is_color:
            return to_rgb(pixels, frame.header)
        values, ends = in_units(pixels, frame)
        is_inverse = str(frame.header.PhotometricInterpretation) == "MONOCHROME1"
        if self.options.window:
            shown = windowed(values, frame, self.name)
            return 255 - shown if is_inverse else shown
        if is_inverse:
            values = ends[0] + ends[1] - values
        return values.astype(self.dtype)

    def write(
        self, path: Path, slices: Iterable[np.ndarray], layout: MaskLayout, *, keep_identity: bool = False
    ) -> None:
        """Write a DICOM segmentation with the geometry and references of this volume; see `medical.segmentation`.

        Args:
            path: the file.
            slices: labels (H, W), in order.
            layout: of the labels.
            keep_identity: copy the tags of `IDENTITY_TAGS`, which stay empty otherwise.

        Raises:
            ValueError: if the standard has no segmentation of such an image.
            OSError: if it cannot be written.
        """
        from .segmentation import write_segmentation

        self.require("highdicom", "DICOM")
        sources = self._guard("", self._sources, (*_TAGS, *(IDENTITY_TAGS if keep_identity else ())))
        masks = [np.asarray(segmentation, layout.dtype) for segmentation in slices]
        # Of a multi-frame file in the order of its frames; the sources of a series are in the order of the slices.
        stored = np.argsort([frame.index for frame in self._frames], kind="stable")
        labels = np.stack([masks[index] for index in stored])
        self._guard("", write_segmentation, path, labels, sources, layout, IDENTITY_TAGS)

    def _sources(self, tags: Sequence[str]) -> list[Any]:
        """Return the images that a segmentation refers to, or raise ValueError."""
        from .segmentation import SourceImage

        if self.num_slices > 1 and not (self._is_placed and self._frames[0].header.get("FrameOfReferenceUID")):
            raise ValueError(
                f"{self.name} holds {self.num_slices} frames without positions in space, which a DICOM segmentation "
                "cannot refer to; expected positions: read them as separate images (--pages), to PNG files"
            )
        if self._is_placed and not self._frames[0].spacing:
            raise ValueError(f"{self.name} has no PixelSpacing; expected it beside ImagePositionPatient")
        is_one_file = self._frames[0].number_in_file is not None
        is_known = all(frame.tag("PixelMeasuresSequence", "SliceThickness") for frame in self._frames)
        if self._is_placed and not is_known and (self.num_slices == 1 or is_one_file):
            raise ValueError(f"{self.name} has no SliceThickness; expected it beside ImagePositionPatient")
        thickness = self.spacing[0] if self._is_placed and not is_known else None
        frames = self._frames[:1] if is_one_file else self._frames
        return [SourceImage(read_header(frame.file, self.name, tags), thickness) for frame in frames]


class _Named:
    """A name to report a missing package by."""

    def __init__(self, name: str):
        self.name = name


def read_header(file: Any, name: str, tags: Sequence[str]) -> Any:
    """Read tags of a DICOM file, without its pixels.

    Args:
        file: a path or a stream.
        name: what error messages call it.
        tags: keywords of the tags; others are skipped.

    Raises:
        ValueError: if it is no DICOM file, or a packed one whose size cannot be known before.
    """
    from pydicom import dcmread
    from pydicom.errors import BytesLengthException, InvalidDicomError
    from pydicom.filereader import read_preamble

    with quiet(), file.open("rb") if isinstance(file, Path) else BytesIO(file.getvalue()) as stream:
        try:
            read_preamble(stream, force=False)
            header = _meta(stream)
        except (InvalidDicomError, BytesLengthException, EOFError) as error:
            raise ValueError(f"{name} is no DICOM file, or cut short in its first bytes") from error
        if str(header.get("TransferSyntaxUID", "")) == _DEFLATED:
            raise ValueError(f"{name} is deflated as a whole; expected another transfer syntax: convert it first")
        if "TransferSyntaxUID" not in header:
            raise ValueError(f"{name} is a DICOM file that states no transfer syntax; expected one in its first tags")
        stream.seek(0)
        return dcmread(stream, stop_before_pixels=True, specific_tags=list(tags))


def _meta(stream: Any) -> Any:
    from pydicom.filereader import _read_file_meta_info

    return _read_file_meta_info(stream)


def _is_multi_frame(header: Any) -> bool:
    return int(header.get("NumberOfFrames") or 1) > 1


def _numbers(value: Any, count: int) -> list[float] | None:
    """Return a tag's numbers, None where it is missing or has others."""
    if value is None or isinstance(value, str | float | int) or len(value) != count:
        return None
    numbers = [float(each) for each in value]
    return numbers if all(map(math.isfinite, numbers)) else None


__all__ = ["IDENTITY_TAGS", "DicomVolume", "Place", "read_header"]
