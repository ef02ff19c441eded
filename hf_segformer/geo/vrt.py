"""Checks of files that make GDAL open other files: virtual rasters, and the files beside a raster.

A virtual raster is read only if every source is a raster file inside its own folder. It is not handed to GDAL as it is
stored: GDAL's XML parser is laxer than any other, so that a file may mean one thing here and another one there. Only
known elements are accepted, and GDAL is given the document that was checked, serialized again.
"""

import html
import mmap
import os
import re
from pathlib import Path
from xml.etree import ElementTree

from .rasters import HFA_MAGIC, JPEG_2000_MAGIC, TIFF_MAGIC

_MOST_BYTES = 16 << 20
_REFERENCE = re.compile(r"overview_file|<vrt|/vsi", re.IGNORECASE)
_DECLARATION = re.compile(r"<\?xml [\w\s=.'\"-]*\?>")
_TEXTS = {"MDI", "Description", "Category", "F"}  # elements whose texts GDAL keeps and never opens
# What makes PROJ open a file of grid shifts; `@null` is none.
_GRID_FILE = re.compile(r"nadgrids=(?!@null\b)|PROJ4_GRIDS|PARAMETERFILE", re.IGNORECASE)
# Nodes of an Erdas file by which its pixels, or those of its overviews, are those of another file.
_ELSEWHERE = (b"ExternalRasterDMS\0", b"DependentFile\0")
_SOURCES = {"SimpleSource", "ComplexSource"}
_ELEMENTS = {
    *("VRTDataset", "SRS", "GeoTransform", "GCPList", "GCP", "Metadata", "MDI", "VRTRasterBand", "ColorInterp"),
    *("ColorTable", "Entry", "NoDataValue", "HideNoDataValue", "Description", "UnitType", "Offset", "Scale"),
    *("CategoryNames", "Category", "MaskBand", "SourceFilename", "SourceBand", "SourceProperties", "SrcRect"),
    *("DstRect", "NODATA", "UseMaskBand", "ScaleOffset", "ScaleRatio", "LUT", "ColorTableComponent", "BlockXSize"),
    *("BlockYSize", "Exponent", "SrcMin", "SrcMax", "DstMin", "DstMax", "Resampling"),
    *_SOURCES,
}


def checked_vrt(path: Path) -> str:
    """Return the document of a virtual raster whose sources are raster files inside its folder.

    Args:
        path: of the .vrt file.

    Raises:
        ValueError: if it has other sources, or elements that are not read here; the message names the first.
        OSError: if it cannot be read, or is no such document.
    """
    content = path.read_bytes()[: _MOST_BYTES + 1]
    if len(content) > _MOST_BYTES or b"<!" in content.replace(b"<!--", b""):
        raise ValueError(
            f"{path} is larger than {_MOST_BYTES >> 20} MiB or declares a document type; expected a plain VRT"
        )
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise OSError(f"{path} is no virtual raster that can be read: {error}") from error
    for element in root.iter():
        _check_element(element, path)
    return ElementTree.tostring(root, encoding="unicode")


def _check_element(element: ElementTree.Element, path: Path) -> None:
    tag = element.tag
    if tag == "SRS":
        check_grids(element.text or "", str(path))
    if tag not in _ELEMENTS:
        raise ValueError(f"{path} has an element {tag}; expected sources alone: write it as a GeoTIFF (rio convert)")
    subclass = element.get("subClass")
    if subclass not in (None, "VRTSourcedRasterBand"):
        raise ValueError(f"{path} is a {subclass}; expected sources alone: write it as a GeoTIFF (rio convert)")
    if tag == "Metadata" and element.get("domain"):
        for child in list(element):
            element.remove(child)
        element.attrib.pop("domain")
    if tag == "SourceFilename":
        element.text = str(_source(element, path))
        element.attrib = {"relativeToVRT": "0"}


def _source(element: ElementTree.Element, path: Path) -> Path:
    name, folder = element.text or "", path.parent.resolve()
    is_relative = element.get("relativeToVRT", "0").strip() == "1"
    source = (folder / name if is_relative else Path(name)).resolve() if name and "\0" not in name else folder
    if not (is_relative or Path(name).is_absolute()) or not source.is_relative_to(folder) or not source.is_file():
        raise ValueError(f"{path} has a source {name!r}; expected files inside its own folder, {folder}")
    with source.open("rb") as file:
        if not file.read(16).startswith((*TIFF_MAGIC, *JPEG_2000_MAGIC, HFA_MAGIC)):
            raise ValueError(f"{path} has a source {name!r}; expected a TIFF, JPEG 2000 or Erdas file")
    check_sidecars(source)
    return source


def check_sidecars(path: Path) -> None:
    """Refuse files beside a raster that GDAL would open with it and that are something else than they are called.

    Args:
        path: of the raster. `NAME.ovr` and `NAME.msk` must be TIFF files, `NAME.aux` an Erdas file, and `NAME.aux.xml`
            may not refer to other files or addresses; namespaces and texts that GDAL keeps may be addresses.

    Raises:
        ValueError: names the file.
    """
    _check_erdas(path)
    names = {f"{name}{ending}" for name in (path.name, path.stem) for ending in (".ovr", ".msk", ".aux", ".aux.xml")}
    names |= {f"{name}{ending}" for name in names for ending in (".ovr", ".msk", ".aux.xml")}
    names = {name.lower() for name in names}  # GDAL finds files beside a raster in any case
    beside = (each for each in sorted(os.listdir(path.parent)) if each.lower() in names and each != path.name)
    for sidecar in (path.with_name(name) for name in beside):
        if sidecar.is_file():
            _check_sidecar(sidecar, path)


def check_grids(definition: str, name: str) -> None:
    """Refuse a reference system whose definition names files, which PROJ would open.

    Args:
        definition: as WKT, or of PROJ.
        name: of what has it.

    Raises:
        ValueError: if it names a file.
    """
    if _GRID_FILE.search(definition):
        raise ValueError(
            f"{name} has a reference system that names a file of grid shifts, which is not opened; expected one "
            "without, such as an EPSG code: set it in QGIS, or for a raster by rio edit-info --crs EPSG:..."
        )


def _check_erdas(path: Path) -> None:
    """Refuse an Erdas file whose pixels are in another one."""
    with path.open("rb") as file:
        if not file.read(16).startswith(HFA_MAGIC):
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if any(content.find(node) >= 0 for node in _ELSEWHERE):
                raise ValueError(
                    f"{path} says that its pixels are in another file; expected an Erdas file of its own: write it as "
                    "a GeoTIFF (rio convert)"
                )


def _check_sidecar(sidecar: Path, path: Path) -> None:
    ending = sidecar.suffix.lower()
    with sidecar.open("rb") as file:
        content = file.read(_MOST_BYTES + 1 if ending == ".xml" else 16)
    if ending == ".xml":
        text = html.unescape(content.decode("latin-1"))  # escaped letters are letters for GDAL
        check_grids(text, str(sidecar))
        if len(content) > _MOST_BYTES or _REFERENCE.search(text) or not _has_safe_addresses(content):
            raise ValueError(
                f"{path}: {sidecar.name} refers to other files; expected none: remove it, or what it refers to"
            )
    elif not content.startswith((HFA_MAGIC,) if ending == ".aux" else TIFF_MAGIC):
        raise ValueError(f"{path}: {sidecar.name} is not the raster that its name says: remove it")


def _has_safe_addresses(content: bytes) -> bool:
    """Return True if the addresses in an .aux.xml, if any, are namespaces and texts that GDAL does not open.

    Only a document that every parser reads alike is looked into: well-formed, without comments and instructions.
    """
    document = content.removeprefix(b"\xef\xbb\xbf").decode("latin-1")
    if "://" not in html.unescape(document):
        return True
    body = _DECLARATION.sub("", document, count=1)
    if "<!" in body or "<?" in body:
        return False
    try:
        root = ElementTree.fromstring(body)
    except (ElementTree.ParseError, ValueError):
        return False
    for element in root.iter():
        opened = [*element.attrib.values(), element.tail or "", "" if element.tag in _TEXTS else element.text or ""]
        if any("://" in text for text in opened):
            return False
    return True


__all__ = ["check_grids", "check_sidecars", "checked_vrt"]
