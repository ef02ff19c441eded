"""DICOM segmentations (PS3.3 A.51): one binary segment for each class, in the frame of reference of the images.

What is copied from the images is built from a list of tags: references, geometry, and where asked for the identity of
patient and study. Everything else, so each text that may hold a name, stays behind.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import printable
from ..inference.areas import foreground
from ..inference.tiling import MaskLayout
from ..version import __version__

_REFERENCES = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "NumberOfFrames", "Rows"),
    *("Columns", "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)
_GEOMETRY = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "FrameContentSequence")
_MAKER, _LONGEST = "hf_segformer", 64  # characters of a label
_SCHEME = "99HFSEGFORMER"


class SourceImage:
    """The header of an image that a segmentation refers to.

    Args:
        header: a pydicom data set.
        thickness: SliceThickness in mm, in place of the header's; None keeps it.
    """

    def __init__(self, header: Any, thickness: float | None = None):
        self.header, self.thickness = header, thickness

    def references(self, identity: Sequence[str]) -> Any:
        """Return a data set with references, geometry and identity alone; identity that is not there is empty."""
        from pydicom import Dataset

        source = Dataset()
        source.file_meta = self.header.file_meta
        for name in _REFERENCES:
            if name in self.header:
                setattr(source, name, self.header[name].value)
        if self.thickness is not None:
            source.SliceThickness = self.thickness
        for name in identity:
            setattr(source, name, self.header.get(name) or "")
        for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
            if name in self.header:
                setattr(source, name, [_geometry(groups) for groups in self.header[name].value])
        return source


def _geometry(groups: Any) -> Any:
    """Return the functional groups that place a frame, without texts and comments."""
    from pydicom import Dataset

    kept = Dataset()
    for name in _GEOMETRY:
        if name in groups:
            item = Dataset()
            for element in groups[name].value[0]:
                if element.VR in ("DS", "FD", "US", "UL", "IS"):
                    item.add(element)
            setattr(kept, name, [item])
    return kept


def write_segmentation(
    path: Path, labels: np.ndarray, sources: Sequence[SourceImage], layout: MaskLayout, identity: Sequence[str]
) -> None:
    """Write a segmentation of a series, or of one file with one or several frames.

    Args:
        path: the file.
        labels: classes (S, H, W), in the order of the sources or their frames.
        sources: the images.
        layout: names and colours of the classes; the one called background is no segment.
        identity: tags that are copied where the headers have them, and empty where not.

    Raises:
        ValueError: if all classes are background.
        OSError: if it cannot be written.
    """
    import highdicom
    from pydicom.uid import ExplicitVRLittleEndian

    classes = foreground(layout.names)
    if not classes:
        raise ValueError("all classes are called background; expected one for a segment")
    numbers = np.zeros(max(layout.ignored, *classes) + 1, np.uint16 if len(classes) > 255 else np.uint8)
    numbers[list(classes)] = np.arange(1, len(classes) + 1)
    segmentation = highdicom.seg.Segmentation(
        source_images=[source.references(identity) for source in sources],
        pixel_array=numbers[labels],
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _describe(number, name, layout.palette[index]) for number, (index, name) in enumerate(classes.items(), 1)
        ],
        series_instance_uid=highdicom.UID(),
        series_number=1,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer=_MAKER,
        manufacturer_model_name="SegFormer",
        software_versions=__version__,
        device_serial_number="1",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_label="SEGMENTATION",
        series_description=f"Segmentation by {_MAKER}",
        specific_character_set="ISO_IR 192",
    )
    segmentation.save_as(path)


def _describe(number: int, name: str, color: Sequence[int]) -> Any:
    """Describe a segment by its class; its codes say nothing of anatomy, which the name alone may."""
    import highdicom
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    label = printable(name).replace("\\", "/")[:_LONGEST].strip() or f"class {number}"
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
        segmented_property_type=Code(f"CLASS{number:05d}", _SCHEME, label),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="SegFormer", version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
        display_color=highdicom.color.CIELabColor.from_rgb(*color),
    )


__all__ = ["SourceImage", "write_segmentation"]
