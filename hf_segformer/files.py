"""Files that are whole or not there: written under another name beside their own, then renamed."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A path beside the file to write to; it takes the file's place if all went well, and is removed if not.

    The name is always the same, so what a killed process left is overwritten by the next that writes the file.

    Args:
        path: the file; its folder must be there.

    Raises:
        OSError: if it can not be written.

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
    """Adds the file's name to errors of the system: a write that fails does not say which file it was."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def is_full(error: BaseException) -> bool:
    """Whether a disk is full, a quota used up or a file system read-only: what stops a job, not one file."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextmanager
def atomic_directory(destination: str | Path) -> Iterator[Path]:
    """A new folder to write into, whose files become the destination's if all goes well; otherwise nothing is left.

    It is beside the destination and renamed at the end, or within the destination where that exists already: a mount
    point, or the current folder, cannot be replaced.

    Args:
        destination: a folder that does not exist yet, or is empty.

    Raises:
        OSError: if it cannot be written.
    """
    destination = Path(destination)
    exists, name = destination.is_dir(), f".{destination.name}.{os.getpid()}.partial"
    partial = destination / name if exists else destination.with_name(name)
    created = [folder for folder in partial.parents if not folder.exists()]
    partial.mkdir(parents=True)
    try:
        yield partial
        if exists:
            for path in partial.iterdir():
                path.rename(destination / path.name)
            partial.rmdir()
        else:
            partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in created:
            with suppress(OSError):  # another process has put something there meanwhile
                folder.rmdir()
        raise


def check_new_or_empty(destination: Path) -> None:
    """Raise ValueError unless a folder does not exist yet, or is empty."""
    if destination.is_dir() and any(destination.iterdir()):
        raise ValueError(f"{destination} is a folder with files in it; expected a new or an empty folder")
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is a file; expected a new or an empty folder")


def write_json(values: dict[str, Any], path: str | Path) -> None:
    """Write a JSON file whole or not at all: what reads it never finds half of it.

    Args:
        values: without NaN, which JSON does not have.
        path: the file.

    Raises:
        ValueError: if a value is NaN.
        OSError: if the file can not be written.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as partial:
        # A file name's bytes that are no UTF-8 become escapes, of which JSON makes the same name again.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


__all__ = ["atomic_directory", "atomic_write", "check_new_or_empty", "is_full", "named", "write_json"]
