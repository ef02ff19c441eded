"""Atomic writes, and the names of files that are read as images and masks."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The mask value of pixels that do not count, by the convention of ADE20K and Cityscapes, unless a class has it.
IGNORE_INDEX = 255

# Endings of the files that a folder is searched for; the kind of a file follows from its content. A virtual raster
# (.vrt) is a view of other files, and taken where it is named itself.
MASK_SUFFIXES = (".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".pgm", ".npy", ".img")
IMAGE_SUFFIXES = (
    *MASK_SUFFIXES,
    *(".jpg", ".jpeg", ".jfif", ".jp2", ".j2k", ".avif", ".ppm", ".tga"),
)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to, which replaces the file if all went well, and is removed if not.

    The name is always the same, so that the next process that writes the file overwrites the leftovers of a killed one.

    Args:
        path: the file; its folder must be there.

    Raises:
        OSError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from hf_segformer.files import atomic_write
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(Path(folder) / "a.txt") as partial:
        ...         _ = partial.write_text("all of it")
        ...     print((Path(folder) / "a.txt").read_text())
        all of it
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with named(path):
            yield partial
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Add the name of the file to system errors: a write that fails does not say which file it was."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def is_full(error: BaseException) -> bool:
    """Return True for a full disk, an exhausted quota or a read-only file system: they stop a job, not one file."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def write_json(values: dict[str, Any], path: str | Path) -> None:
    """Write a JSON file atomically.

    Args:
        values: without NaN, which JSON does not have.
        path: the file.

    Raises:
        ValueError: if a value is NaN.
        OSError: if the file cannot be written.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as partial:
        # A file name's bytes that are no UTF-8 become escapes, of which JSON makes the same name again.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


__all__ = ["IGNORE_INDEX", "IMAGE_SUFFIXES", "MASK_SUFFIXES", "atomic_write", "is_full", "named", "write_json"]
