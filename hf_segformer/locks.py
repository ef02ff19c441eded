"""Lock of an output folder: one job writes there at a time, and a lock that a dead process left is recognised."""

import getpass
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .files import is_process_alive

LOCK = ".segformer.lock"
_HEARTBEAT, _STALE = 30.0, 600.0  # seconds between signs of life, and without one until a lock of another host is stale


@contextmanager
def locked_folder(folder: str | Path, job: str) -> Iterator[None]:
    """Hold the lock of a folder, which must exist, for the duration of the block.

    A lock is stale if its process is no longer alive, or if it is one of another host that gave no sign of life for ten
    minutes; a stale lock is taken over.

    Args:
        folder: the output folder.
        job: what holds the lock, for the message to others, such as "batch inference".

    Raises:
        ValueError: if another process holds it; the message names its owner and host.
        OSError: if the lock cannot be written.

    Examples:
        >>> import tempfile
        >>> from hf_segformer.locks import locked_folder
        >>> with tempfile.TemporaryDirectory() as folder, locked_folder(folder, "a test"):
        ...     try:
        ...         with locked_folder(folder, "another"):
        ...             pass
        ...     except ValueError as error:
        ...         print("is in use by a test of process" in str(error))
        True
    """
    path, owner = Path(folder) / LOCK, _owner(job)
    _acquire(path, owner)
    stop = threading.Event()
    beat = threading.Thread(target=_keep_alive, args=(path, owner, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        if _read(path) == owner:
            path.unlink(missing_ok=True)


def _owner(job: str) -> dict[str, Any]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a process in a container may have no name
        user = str(os.getuid()) if hasattr(os, "getuid") else "somebody"
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    pid = os.getpid()
    return {"job": job, "user": user, "host": socket.gethostname(), "pid": pid, "born": _born(pid), "began": began}


def _acquire(path: Path, owner: dict[str, Any]) -> None:
    for _ in range(10):
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump(owner, file)
            return
        except FileExistsError:
            held = _read(path)
            if not _is_stale(path, held):
                raise ValueError(_refusal(path.parent, held)) from None
            _take_away(path)
    raise ValueError(_refusal(path.parent, _read(path)))


def _take_away(path: Path) -> None:
    """Remove a stale lock, unless another process has put its own in its place since it was read."""
    taken = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.stale")
    with suppress(FileNotFoundError, FileExistsError):
        path.rename(taken)  # of several processes one succeeds
        if not _is_stale(taken, _read(taken)):
            taken.rename(path)
    taken.unlink(missing_ok=True)


def _refusal(folder: Path, held: dict[str, Any]) -> str:
    if not held:
        return f"{folder} is in use: {folder / LOCK} was just written; wait for the other job or delete that file"
    return (
        f"{folder} is in use by {held.get('job')} of process {held.get('pid')} of {held.get('user')} on "
        f"{held.get('host')}, since {held.get('began')}: wait for it, or choose another output folder"
    )


def _read(path: Path) -> dict[str, Any]:
    """Owner of a lock; empty where it is gone or not yet written."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _is_stale(path: Path, held: dict[str, Any]) -> bool:
    if held.get("host") == socket.gethostname() and isinstance(held.get("pid"), int):
        return not is_process_alive(held["pid"]) or held.get("born") != _born(held["pid"])
    try:
        return time.time() - path.stat().st_mtime > _STALE
    except FileNotFoundError:
        return True


def _born(pid: int) -> str | None:
    """Start time of a process in ticks, which a later process of the same number does not share; None if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _keep_alive(path: Path, owner: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(_HEARTBEAT):
        with suppress(OSError):
            if _read(path) == owner:
                os.utime(path)


__all__ = ["LOCK", "locked_folder"]
