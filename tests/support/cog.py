"""Validator of cloud-optimised GeoTIFFs, by tifffile and the bytes alone: independent of the GDAL that writes them.

The rules are those of GDAL's validate_cloud_optimized_geotiff.py: all directories come before all pixels, in the order
of the image and its overviews from large to small, each tiled; an image of more than 512 pixels has overviews; and the
pixels of small overviews come before those of large ones.
"""

from pathlib import Path

import tifffile


def cog_errors(path: Path) -> list[str]:
    """Return what is wrong with a file."""
    errors = []
    with tifffile.TiffFile(path) as file:
        pages = [page.aspage() for page in file.pages]
        sizes = [(page.imagelength, page.imagewidth) for page in pages]
        if sizes != sorted(sizes, reverse=True):
            errors.append(f"directories are in the order of {sizes}")
        if max(sizes[0]) > 512 and len(pages) < 2:
            errors.append("there are no overviews")
        if not all(page.is_tiled for page in pages):
            errors.append("an image is not tiled")
        if any(page.subfiletype != (0 if index == 0 else 1) for index, page in enumerate(pages)):
            errors.append("an overview is not marked as a reduced image")
        directories = [page.offset for page in pages]
        if directories != sorted(directories) or directories[0] > 8 + 16 + 512:
            errors.append(f"directories are at {directories}")
        pixels = [min(offset for offset in page.dataoffsets if offset) for page in pages if any(page.dataoffsets)]
        if pixels and max(directories) > min(pixels):
            errors.append("pixels come before a directory")
        if pixels != sorted(pixels, reverse=True):
            errors.append("pixels of large overviews come before those of small ones")
    return errors
