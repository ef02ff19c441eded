"""QGIS styles (QML), which QGIS applies to the layer of the same name: the names and colours of the classes."""

from pathlib import Path
from xml.etree import ElementTree

from ..files import atomic_write
from ..inference.tiling import MaskLayout


def write_style(path: Path, layout: MaskLayout) -> None:
    """Write the style of a segmentation map.

    Args:
        path: of the .qml file, which has the map's name.
        layout: of the map.

    Raises:
        OSError: if it cannot be written.
    """
    root = ElementTree.Element("qgis", version="3.28", styleCategories="Symbology")
    pipe = ElementTree.SubElement(root, "pipe")
    renderer = ElementTree.SubElement(
        pipe, "rasterrenderer", type="paletted", band="1", opacity="1", alphaBand="-1", nodataColor=""
    )
    palette = ElementTree.SubElement(renderer, "colorPalette")
    for value, (name, color) in enumerate(zip(layout.names, layout.palette, strict=True)):
        shown = "#{:02x}{:02x}{:02x}".format(*color)
        entry = {"value": str(value), "label": _printable(name), "color": shown, "alpha": "255"}
        ElementTree.SubElement(palette, "paletteEntry", entry)
    ElementTree.indent(root)
    with atomic_write(path) as partial:
        text = ElementTree.tostring(root, encoding="unicode")
        partial.write_text(f"<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n{text}\n", encoding="utf-8")


def _printable(name: str) -> str:
    """Return a name without the characters that XML does not have."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


__all__ = ["write_style"]
