"""Files that are whole or not there: written under another name beside their own, then renamed."""

import errno
import hashlib
import itertools
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_LONGEST_NAME = 255  # bytes, on most file systems
_numbers = itertools.count()


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A path beside the file to write to; it takes the file's place if all went well, and is removed if not.

    The name is another one in every process and at every call, so that two writers of one file never mix their bytes.

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
    partial = partial_path(path)
    try:
        with named(path):
            yield partial
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """A path beside a file for writing it, unique to the process and the call; its folder is the same."""
    writer = f"{_host()}-{os.getpid()}-{next(_numbers)}"
    name = f".{path.name}.{writer}.partial"
    if len(os.fsencode(name)) > _LONGEST_NAME >= len(os.fsencode(path.name)):
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.{writer}.partial"
    return path.with_name(name)


def remove_stale_partials(folder: str | Path) -> None:
    """Remove the files below a folder that killed processes of this host left incomplete."""
    for path in Path(folder).rglob(".*.partial"):
        host, pid = ([*path.name.split(".")[-2].split("-"), "", ""])[:2]
        if host == _host() and pid.isdigit() and not is_process_alive(int(pid)):
            path.unlink(missing_ok=True)


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


@cache
def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


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


__all__ = [
    "atomic_write",
    "is_full",
    "is_process_alive",
    "named",
    "partial_path",
    "remove_stale_partials",
    "write_json",
]
