"""Small DICOM and NIfTI files, with a patient whose name nothing may copy."""

from pathlib import Path

import numpy as np
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

NAME, PATIENT_ID = "SECRETNAME^JANE", "SECRETID42"
OBLIQUE = [0.8, 0.6, 0.0, -0.36, 0.48, 0.8]
_CT, _ENHANCED_CT, _CR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.1"
_ULTRASOUND, RT_STRUCT = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.481.3"
STUDY, FRAME_OF_REFERENCE = generate_uid(), generate_uid()


def dataset(sop_class: str, modality: str, series: str = "", syntax: str = ExplicitVRLittleEndian) -> Dataset:
    """Return a data set with file meta information, patient and study."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = sop_class
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    made.file_meta.TransferSyntaxUID = syntax
    made.PatientName, made.PatientID, made.PatientBirthDate, made.PatientSex = NAME, PATIENT_ID, "19700101", "F"
    made.StudyInstanceUID, made.SeriesInstanceUID = STUDY, series or generate_uid()
    made.StudyDate, made.StudyTime, made.StudyID = "20200102", "101010", "SECRETSTUDY"
    made.AccessionNumber, made.ReferringPhysicianName = "SECRETACC", "SECRETDOC^A"
    made.InstitutionName, made.OperatorsName, made.Manufacturer = "SECRETHOSPITAL", "SECRETOP", "Maker"
    made.ManufacturerModelName, made.DeviceSerialNumber, made.SoftwareVersions = "M", "SECRETSERIAL", "1"
    made.PatientComments = "SECRETCOMMENT"
    made.SeriesNumber, made.Modality = 3, modality
    return made


def set_pixels(made: Dataset, pixels: np.ndarray, bits: int = 0, photometric: str = "MONOCHROME2") -> None:
    """Set pixels (H, W), (F, H, W) or (H, W, 3), and what describes them."""
    is_color = photometric in ("RGB", "YBR_FULL")
    shape = pixels.shape[:2] if is_color else pixels.shape[-2:]
    made.Rows, made.Columns = shape
    made.SamplesPerPixel = 3 if is_color else 1
    if is_color:
        made.PlanarConfiguration = 0
    made.PhotometricInterpretation = photometric
    made.BitsAllocated = pixels.dtype.itemsize * 8
    made.BitsStored = bits or made.BitsAllocated
    made.HighBit, made.PixelRepresentation = made.BitsStored - 1, int(pixels.dtype.kind == "i")
    if pixels.ndim == 3 and not is_color:
        made.NumberOfFrames = len(pixels)
    content = pixels.tobytes()
    made.add_new("PixelData", "OB" if made.BitsAllocated == 8 else "OW", content + b"\0" * (len(content) % 2))


def save(made: Dataset, path: Path) -> Path:
    """Write a file of DICOM part 10."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)
    return path


def ct_volume(slices: int = 4, height: int = 36, width: int = 44) -> np.ndarray:
    """Return Hounsfield units (S, H, W): a ball in air."""
    z, y, x = np.ogrid[:slices, :height, :width]
    inside = (z - slices / 2) ** 2 * 20 + (y - height / 3) ** 2 + (x - width / 2) ** 2 < (height / 3) ** 2
    return np.where(inside, 60 + 3 * x + y, -1000).astype(np.int16)


def ct_series(folder: Path, number: int = 4, **changes) -> list[Path]:
    """Write a CT series whose names are in another order than its positions; return the files by position."""
    series, volume = changes.pop("series", generate_uid()), ct_volume(number)
    row, column = np.array(OBLIQUE[:3]), np.array(OBLIQUE[3:])
    normal, step = np.cross(row, column), changes.pop("step", 2.5)
    paths = []
    for index in range(number):
        made = dataset(_CT, "CT", series)
        made.FrameOfReferenceUID, made.PositionReferenceIndicator = FRAME_OF_REFERENCE, ""
        made.ImageOrientationPatient, made.PixelSpacing, made.SliceThickness = OBLIQUE, [0.75, 0.5], 2.5
        made.ImagePositionPatient = [round(float(each), 6) for each in np.array([10, -20, 30]) + index * step * normal]
        made.InstanceNumber = number - index
        made.RescaleSlope, made.RescaleIntercept = 1, -1024
        made.WindowCenter, made.WindowWidth = [40, 300], [400, 1500]
        set_pixels(made, (volume[index] + 1024).astype(np.uint16), 12)
        for name, value in changes.items():
            setattr(made, name, value)
        paths.append(save(made, folder / f"im{(index * 7 + 3) % number}.dcm"))
    return paths


def enhanced_ct(path: Path, number: int = 3, places: list[float] | None = None) -> Path:
    """Write a multi-frame CT with geometry and transforms in functional groups."""
    made = dataset(_ENHANCED_CT, "CT")
    made.FrameOfReferenceUID, made.PositionReferenceIndicator = FRAME_OF_REFERENCE, ""
    normal = np.cross(OBLIQUE[:3], OBLIQUE[3:])
    shared = Dataset()
    shared.PlaneOrientationSequence = [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = OBLIQUE
    shared.PixelMeasuresSequence = [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = [0.75, 0.5]
    shared.PixelMeasuresSequence[0].SliceThickness = 2.5
    made.SharedFunctionalGroupsSequence, frames = [shared], []
    for index, place in enumerate(places or [2.5 * each for each in range(number)]):
        frame = Dataset()
        frame.FrameContentSequence = [Dataset()]
        frame.FrameContentSequence[0].FrameComments = "SECRETCOMMENT"
        frame.FrameContentSequence[0].DimensionIndexValues = [1, index + 1]
        frame.PlanePositionSequence = [Dataset()]
        frame.PlanePositionSequence[0].ImagePositionPatient = [round(float(each), 6) for each in place * normal]
        frame.PixelValueTransformationSequence = [Dataset()]
        transform = frame.PixelValueTransformationSequence[0]
        transform.RescaleIntercept, transform.RescaleSlope, transform.RescaleType = -1024, 1 + index, "HU"
        frame.FrameVOILUTSequence = [Dataset()]
        frame.FrameVOILUTSequence[0].WindowCenter, frame.FrameVOILUTSequence[0].WindowWidth = 40 + index, 400
        frames.append(frame)
    made.PerFrameFunctionalGroupsSequence = frames
    set_pixels(made, (ct_volume(len(frames)) + 1024).astype(np.uint16), 12)
    return save(made, path)


def xray(path: Path, photometric: str = "MONOCHROME1", **changes) -> Path:
    """Write a radiograph of 10 bits without positions."""
    made = dataset(_CR, "CR")
    pixels = (np.arange(36 * 44).reshape(36, 44) * 37 % 1024).astype(np.uint16)
    set_pixels(made, pixels, 10, photometric)
    made.WindowCenter, made.WindowWidth = 512, 700
    made.ImagerPixelSpacing = [0.1, 0.1]
    for name, value in changes.items():
        setattr(made, name, value)
    return save(made, path)


def ultrasound(path: Path) -> Path:
    """Write an image in colours."""
    made = dataset(_ULTRASOUND, "US")
    pixels = np.random.default_rng(0).integers(0, 256, (36, 44, 3), dtype=np.uint8)
    set_pixels(made, pixels, photometric="RGB")
    return save(made, path)


def rt_struct(path: Path) -> Path:
    """Write a file of DICOM without pixels."""
    return save(dataset(RT_STRUCT, "RTSTRUCT"), path)


def oblique_affine(seed: int = 0) -> np.ndarray:
    """Return a rotated affine with different steps and an offset."""
    chance = np.random.default_rng(seed)
    rotation = np.linalg.qr(chance.normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = rotation * chance.uniform(0.4, 4, 3)
    affine[:3, 3] = chance.uniform(-90, 90, 3)
    return affine


def nifti(path: Path, dtype=np.int16, shape=(44, 36, 4), version: int = 1, **header) -> Path:
    """Write a NIfTI volume with an oblique affine and texts that name a patient."""
    import nibabel

    values = np.arange(np.prod(shape)).reshape(shape) * 7 % 200
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = kind(values.astype(dtype), oblique_affine())
    image.header.set_xyzt_units("mm")
    image.header["descrip"], image.header["aux_file"] = NAME, NAME
    image.header["intent_name"] = b"SECRETID42"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", NAME.encode()))
    for name, value in header.items():
        image.header[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def write_scans(folder: Path) -> list[Path]:
    """Write a small valid file of every kind."""
    [ct] = ct_series(folder / "ct", 1)
    return [
        ct,
        enhanced_ct(folder / "enhanced.dcm"),
        xray(folder / "xray.dcm"),
        ultrasound(folder / "ultrasound.dcm"),
        nifti(folder / "a.nii", shape=(24, 17, 3)),
        nifti(folder / "b.nii.gz", np.float32, shape=(24, 17, 3), cal_min=10, cal_max=90),
        nifti(folder / "c.nii", np.uint8, shape=(24, 17, 3), version=2),
    ]
