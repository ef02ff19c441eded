"""NIfTI volumes: read slice by slice along any axis, written as label volumes of the same geometry.

Voxels keep their order: nothing is reoriented. A slice's rows follow the later of the two other axes and its columns
the earlier one, in which neighbours are stored next to each other. The header decides how many bytes are read, also
from a compressed file, which is unpacked into a temporary file. Format: https://nifti.nimh.nih.gov/nifti-1.
"""

import gzip
import shutil
import struct
import tempfile
import threading
import zlib
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..data.reader_protocol import ImageSource, Kind
from ..image_io_segformer import DECODE_ERRORS
from ..inference.areas import Spacing
from ..inference.tiling import MaskLayout
from .volumes import Volume, to_bytes

_GZIP, _BEST_RATIO = b"\x1f\x8b", 1032  # deflate makes no more bytes of one
_SIZES = {348: (344, (b"n+1\0", b"ni1\0")), 540: (4, (b"n+2\0", b"ni2\0"))}  # of a header: where its magic is
_DATA_TYPES = (2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280)  # integers and floats of up to 64 bits
_TO_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # by xyzt_units; unknown units are mm by convention
_GEOMETRY = (
    *("dim_info", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
_LABEL_INTENT = 1002
_MOST_BEHIND = 1 << 20  # bytes behind the voxels


class NiftiVolume(Volume):
    """Reader of NIfTI-1 and NIfTI-2 in one file, `.nii` or `.nii.gz`; see `Volume`."""

    suffixes = (".nii", ".nii.gz")
    takes_values = True

    @classmethod
    def claims(cls, source: ImageSource, by_tiles: bool = False) -> Kind | None:
        """See `data.reader_protocol.Reader.claims`."""
        is_named = source.name.lower().endswith(cls.suffixes)
        return "volume" if is_named or _header_size(_start_of(source.head)) else None

    def _open(self) -> None:
        self.require("nibabel", "NIfTI")
        from nibabel.nifti1 import Nifti1Header
        from nibabel.nifti2 import Nifti2Header

        self._is_packed, start = self.source.head.startswith(_GZIP), _start_of(self.source.head)
        size = _header_size(start)
        if not size:
            raise ValueError(f"{self.name} is no NIfTI file, or cut short: its header begins otherwise")
        place, magics = _SIZES[size]
        if start[place : place + 4] == magics[1]:
            raise ValueError(f"{self.name} is the header of a pair of files; expected one file: convert it to .nii.gz")
        self.header = (Nifti1Header if size == 348 else Nifti2Header)(start[:size], check=False)
        self._check_header()
        self._scale = self._slope_and_intercept()
        self._lock = threading.Lock()
        self._voxels: np.ndarray | None = None
        # Axes of slices, rows and columns.
        axis = 2 if self.options.axis is None else self.options.axis
        if axis > 2:
            raise ValueError(f"{self.name} has 3 axes; expected an axis from 1 to 3 (--axis)")
        column, row = (each for each in range(3) if each != axis)
        self._axes = (axis, row, column)
        self.num_slices, self.height, self.width = (self._shape[each] for each in self._axes)
        self.check_size()
        self.num_bands, self.spacing = 1, self._spacing()
        self.dtype = self._dtype if self._scale == (1, 0) else np.dtype(np.float32)
        self.may_lack_data = self.dtype.kind == "f"

    def _check_header(self) -> None:
        number = int(self.header["dim"][0])
        shape = [int(side) for side in self.header["dim"][1 : 1 + number]] if 0 < number <= 7 else [0]
        if min(shape) < 1:
            raise ValueError(f"{self.name} has dimensions {shape} in its header; expected 1 to 7 of at least 1")
        self._stored_shape = tuple(shape)
        while len(shape) > 3 and shape[-1] == 1:
            shape.pop()
        if len(shape) > 3:
            volumes = int(np.prod(shape[3:], dtype=object))
            raise ValueError(
                f"{self.name} holds {volumes} volumes ({'x'.join(map(str, shape))}); expected one: split it first, for "
                "instance by nib-split or fslsplit"
            )
        self._shape = tuple([*shape, 1, 1][:3])
        if int(self.header["datatype"]) not in _DATA_TYPES:
            raise ValueError(
                f"{self.name} has data type {int(self.header['datatype'])}; expected integers or floats of up to 64 "
                "bits: convert colours and complex numbers first"
            )
        self._dtype = self.header.get_data_dtype().newbyteorder("=")
        codes = [int(self.header[name]) for name in ("qform_code", "sform_code")]
        if not all(0 <= code <= 5 for code in codes):
            raise ValueError(f"{self.name} has qform_code and sform_code {codes}; expected 0 to 5")
        offset = float(self.header["vox_offset"])
        least = int(self.header["sizeof_hdr"])
        if not (least <= offset < 1 << 30 and offset == int(offset)):
            raise ValueError(f"{self.name} has its voxels at byte {offset:g}; expected at least {least}")
        self._offset = int(offset)

    def _slope_and_intercept(self) -> tuple[float, float]:
        slope, intercept = self.header.get_slope_inter()
        return (1, 0) if slope is None else (float(slope), float(intercept or 0))

    def _spacing(self) -> Spacing:
        """Lengths of the steps along the axes of slices, rows and columns; None where steps are not at right angles."""
        steps = self._affine[:3, :3]
        lengths = np.linalg.norm(steps, axis=0)
        angles = steps.T @ steps / np.outer(lengths, lengths)
        if not (np.isfinite(lengths).all() and (lengths > 0).all() and (abs(angles - np.eye(3)) < 1e-3).all()):
            return None, None, None
        slice_step, row, column = (float(lengths[each]) for each in self._axes)
        return slice_step, row, column

    def grid(self) -> np.ndarray | None:
        """See `Volume.grid`."""
        affine, (slice_axis, row, column) = self._affine, self._axes
        if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
            return None
        return affine[:, [column, row, slice_axis, 3]]

    @property
    def _affine(self) -> np.ndarray:
        """The matrix (4, 4) from stored axes to mm; NaN for units that are no lengths."""
        affine = np.array(self.header.get_best_affine(), np.float64)
        affine[:3] *= _TO_MM.get(int(self.header["xyzt_units"]) & 7, np.nan)
        return affine

    def oriented(self, turns: Sequence[tuple[int, bool]], index: int) -> np.ndarray:
        """Read a slice of labels (H, W) on another grid of the same voxels.

        Args:
            turns: for columns, rows and slices of that grid the axis of this one, in this order, and if it is reversed.
            index: of the slice there.
        """
        slice_axis, row, column = self._axes
        own = self._guard("", self._stored).transpose(column, row, slice_axis)
        turned = own.transpose([axis for axis, _ in turns])[tuple(np.s_[:: -1 if back else 1] for _, back in turns)]
        return self._guard(f", slice {index + 1}", self._labels, np.ascontiguousarray(turned[:, :, index].T))

    def _stored(self) -> np.ndarray:
        with self._lock:
            if self._voxels is None:
                self._voxels = self._map()
            return self._voxels

    def _slice(self, index: int) -> np.ndarray:
        stored = self._stored().transpose(self._axes)[index]
        pixels = np.ascontiguousarray(stored.astype(self._dtype))
        if self.options.is_mask:
            return self._labels(pixels)
        if self._scale != (1, 0):
            slope, intercept = self._scale
            pixels = (pixels.astype(np.float64) * slope + intercept).astype(np.float32)
        if self.options.window:
            low, high = self._window()
            return to_bytes(np.nan_to_num(pixels, nan=low), low, high)
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            return np.ma.masked_invalid(pixels)
        return pixels

    def _labels(self, pixels: np.ndarray) -> np.ndarray:
        slope, intercept = self._scale
        labels = pixels.astype(np.float64) * slope + intercept
        if not (labels == np.trunc(labels)).all() or abs(labels).max(initial=0) >= 1 << 31:
            raise ValueError(f"{self.name} holds values that are no whole numbers; expected a mask of labels")
        return labels.astype(np.int32)

    def _window(self) -> tuple[float, float]:
        low, high = float(self.header["cal_min"]), float(self.header["cal_max"])
        if not (np.isfinite([low, high]).all() and low < high):
            raise ValueError(
                f"{self.name} states no window (cal_min {low:g}, cal_max {high:g}); expected its numbers: "
                "--value-range LOW,HIGH"
            )
        return low, high

    def _map(self) -> np.ndarray:
        """Return the stored voxels, mapped from the file or, of a packed one, from a temporary file."""
        dtype, file, needed = self.header.get_data_dtype(), self.source.file, self._num_bytes
        if self._is_packed:
            with tempfile.TemporaryFile() as unpacked:  # the map keeps it when it is closed
                self._unpack(file, unpacked)
                return np.memmap(unpacked, dtype, "r", self._offset, self._shape, order="F")
        held = file.getbuffer().nbytes if isinstance(file, BytesIO) else file.stat().st_size
        if held < needed:
            raise OSError(f"{self.name} is cut short: it holds {held} of {needed} bytes")
        if isinstance(file, BytesIO):
            flat = np.frombuffer(file.getbuffer(), dtype, int(np.prod(self._shape)), self._offset)
            return flat.reshape(self._shape, order="F")
        return np.memmap(file, dtype, "r", self._offset, self._shape, order="F")

    @property
    def _num_bytes(self) -> int:
        """Bytes of the unpacked file up to the last voxel, from the header."""
        return self._offset + int(np.prod(self._shape, dtype=object)) * self._dtype.itemsize

    def _unpack(self, packed: Any, unpacked: Any) -> None:
        """Unpack the bytes that the header promises, and no more."""
        size = packed.getbuffer().nbytes if isinstance(packed, BytesIO) else packed.stat().st_size
        left = needed = self._num_bytes
        if needed > size * _BEST_RATIO:
            raise OSError(f"{self.name} is cut short: {size} packed bytes cannot hold the {needed} of its header")
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if needed > free:
            raise OSError(f"{self.name} needs {needed} bytes in {tempfile.gettempdir()}, where {free} are free")
        with gzip.open(packed) as file:
            while left:
                part = file.read(min(left, 1 << 20))
                if not part:
                    raise OSError(f"{self.name} is cut short: {left} of {needed} bytes are missing")
                unpacked.write(part)
                left -= len(part)
            behind = 0
            while part := file.read(1 << 16):  # up to the end, where the checksum is
                behind += len(part)
                if behind > _MOST_BEHIND:
                    raise OSError(f"{self.name} has data after its voxels; expected {needed} bytes, as in its header")
        unpacked.flush()

    @property
    def mask_suffix(self) -> str:
        """Ending of the label volume."""
        return ".nii" if self.name.lower().endswith(".nii") else ".nii.gz"

    def write(
        self, path: Path, slices: Iterable[np.ndarray], layout: MaskLayout, *, keep_identity: bool = False
    ) -> None:
        """Write a label volume with the geometry of this one, without its texts and extensions.

        Args:
            path: the file; packed if `mask_suffix` says so.
            slices: labels (H, W), in order.
            layout: of the labels.
            keep_identity: not used: no text is copied, so that none can name a person.

        Raises:
            OSError: if it cannot be written.
        """
        from nibabel.fileholders import FileHolder
        from nibabel.nifti1 import Nifti1Image
        from nibabel.nifti2 import Nifti2Image

        labels = np.zeros(self._shape, layout.dtype, order="F")
        by_slice = labels.transpose(self._axes)
        for index, segmentation in enumerate(slices):
            by_slice[index] = segmentation
        header = type(self.header)()
        for field in _GEOMETRY:
            header[field] = self.header[field]
        header["intent_code"] = _LABEL_INTENT
        header.set_data_dtype(layout.dtype)
        kind = Nifti1Image if header["sizeof_hdr"] == 348 else Nifti2Image
        image = kind(labels.reshape(self._stored_shape, order="F"), None, header)
        with path.open("wb") as plain:
            if self.mask_suffix == ".nii":
                image.to_file_map({"image": FileHolder(fileobj=plain)})
                return
            with gzip.GzipFile("", "wb", 6, plain, mtime=0) as packed:
                image.to_file_map({"image": FileHolder(fileobj=packed)})


def _start_of(head: bytes) -> bytes:
    """Return the first bytes of a file, unpacked."""
    if not head.startswith(_GZIP):
        return head
    try:
        return zlib.decompressobj(31).decompress(head, 1024)
    except DECODE_ERRORS:
        return b""


def _header_size(start: bytes) -> int:
    """Return the size of the header that a file begins with, 0 for other files."""
    for order in "<>":
        size = struct.unpack(f"{order}i", start[:4])[0] if len(start) >= 4 else 0
        if size in _SIZES and len(start) >= size:
            place, magics = _SIZES[size]
            return size if start[place : place + 4] in magics else 0
    return 0


__all__ = ["NiftiVolume"]
