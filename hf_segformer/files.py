"""Files that are whole or not there: written under another name beside their own, then renamed."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
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
    from tempfile import TemporaryDirectory
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


def is_process_alive(pid: int) -> bool:
    """Return True if a process of this number runs on this host."""
    if os.name == "nt":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def check_writable(folder: Path, setting: str) -> None:
    """Check that files can be written to a folder, or to where it will be created; nothing is left there.

    Args:
        folder: need not exist.
        setting: the option or key that names another folder.

    Raises:
        OSError: if they cannot.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written to ({nearest}: {error.strerror}); expected another folder by {setting}"
        ) from error


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


__all__ = ["atomic_write", "check_writable", "is_full", "is_process_alive", "named", "write_json"]
