"""Atomic writes, and the names of files that are read as images and masks."""

import csv
import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any

_LONGEST_NAME = 255  # bytes, on most file systems
_numbers = itertools.count()
# The mask value of ignored pixels, by the convention of ADE20K and Cityscapes, unless a class has it.
IGNORE_INDEX = 255
# The class of what is in no other one, by its name: without areas, segments and polygons of its own.
BACKGROUND = "background"

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

    The name is another one in every process and at every call, so that two writers of one file never mix their bytes.

    Args:
        path: the file; its folder must be there.

    Raises:
        OSError: if it cannot be written.

    Examples:
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


def with_suffix_added(folder: Path, suffix: str) -> Path:
    """Return the path beside a folder that has its name and a suffix; `.` and `..` are named by what they stand for.

    Examples:
        >>> from hf_segformer.files import with_suffix_added
        >>> with_suffix_added(Path("outputs/run.a"), ".1").as_posix()
        'outputs/run.a.1'
    """
    named = folder.resolve() if folder.name in ("", "..") else folder
    return named.with_name(f"{named.name}{suffix}")


def toml_value(value: Any) -> str:
    """Return a text, number, truth value, list or inline table of these as TOML, on one line.

    JSON is TOML for these types, except for inline tables, the character DEL, and floats such as NaN.

    Examples:
        >>> from hf_segformer.files import toml_value
        >>> print(toml_value({"min_lr_rate": 0.01}))
        { "min_lr_rate" = 0.01 }
    """
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{toml_value(key)} = {toml_value(each)}' for key, each in value.items())} }}"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A new folder beside a file for what is needed to write it, removed at the end.

    Raises:
        OSError: if it cannot be made.
    """
    folder = partial_path(path)
    with named(path):
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale_partials(folder: str | Path) -> None:
    """Remove the files and folders below a folder that killed processes of this host left incomplete."""
    for path in list(Path(folder).rglob(".*.partial")):
        host, pid = ([*path.name.split(".")[-2].split("-"), "", ""])[:2]
        if host != _host() or not pid.isdigit() or is_process_alive(int(pid)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
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
    exists = destination.is_dir()
    partial = partial_path(destination / "folder" if exists else destination)
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


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ValueError: if it holds anything else.
        OSError: if it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected a JSON object")
    return values


# A file of the Hub's cache: CACHE/models--OWNER--NAME/snapshots/COMMIT/FILE -> CACHE/models--OWNER--NAME/blobs/HASH,
# which may itself be a link to CACHE/blobs/HA/HASH.
_SNAPSHOT = re.compile(r"(?P<cache>.*)/(?P<repository>(models|datasets|spaces)--[^/]+)/snapshots/[^/]+(/|\Z)")
_BLOB = r"(/{repository})?/blobs/([0-9a-f]{{2}}/)?[0-9a-f]{{40,64}}"


def resolve_inside(folder: str | Path, name: str | Path) -> Path:
    """Resolve an untrusted relative path inside a folder.

    Every name that comes from a file, an archive, a data set or a pattern goes through here before it is opened,
    written or published. Symbolic links are followed, wherever they stand on the way, and may not leave the folder;
    links of the Hugging Face cache from a snapshot to its own blobs may.

    Args:
        folder: the folder that the name belongs to; may itself be a link, since the user chose it.
        name: relative path; the file need not exist.

    Returns:
        `folder / name`, links not resolved.

    Raises:
        ValueError: if the name is empty or absolute, goes up by `..` (with the separators of Windows, too, wherever the
            file may be taken), or leads outside through a link.

    Examples:
        >>> from hf_segformer.files import resolve_inside
        >>> resolve_inside("model", "examples/a.png").as_posix()
        'model/examples/a.png'
        >>> resolve_inside("model", "../secret.png")
        Traceback (most recent call last):
        ...
        ValueError: '../secret.png' leads outside model; expected a relative path within it
    """
    folder, text = Path(folder), os.fspath(name)
    path = Path(text)
    windows = PureWindowsPath(text)
    leads_up = ".." in path.parts or ".." in windows.parts
    if not path.parts or path.anchor or windows.root or leads_up or "\0" in text:
        raise ValueError(f"{text!r} leads outside {folder}; expected a relative path within it")
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / path))
    if not target.is_relative_to(root) and not _is_cached_blob(root, target):
        raise ValueError(f"{text!r} in {folder} is a link to {target}, outside the folder; replace it with a copy")
    return folder / path


def _is_cached_blob(root: Path, target: Path) -> bool:
    """Return True if both are real paths of one Hub cache: a snapshot, and a blob that its links may point to."""
    snapshot = _SNAPSHOT.match(root.as_posix())
    if snapshot is None or not target.is_relative_to(snapshot["cache"]):
        return False
    blob = _BLOB.format(repository=re.escape(snapshot["repository"]))
    return re.fullmatch(re.escape(snapshot["cache"]) + blob, target.as_posix()) is not None


def printable(name: object) -> str:
    r"""Escape line breaks and control characters in an untrusted name.

    Examples:
        >>> from hf_segformer.files import printable
        >>> print(printable("a\n\x1b[31mred"))
        a\n\x1b[31mred
    """
    escaped = (sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in str(name))
    return "".join(escaped)


def differences(name: str, one: Any, other: Any) -> Iterator[tuple[str, str, str]]:
    """Yield where two values of a setting differ, with the texts of both, cut short: of tables, each key that differs.

    Lists are gone through where their texts do not show the difference.

    Examples:
        >>> from hf_segformer.files import differences
        >>> list(differences("size", {"height": 512, "width": 512}, {"height": 512, "width": 1024}))
        [('size.width', '512', '1024')]
    """
    texts = (f"{one!s:.80}", f"{other!s:.80}")
    if one == other:
        return
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys((*one, *other)):
            yield from differences(f"{name}.{key}", one.get(key), other.get(key))
    elif isinstance(one, list) and isinstance(other, list) and texts[0] == texts[1]:
        for place, items in enumerate(itertools.zip_longest(one, other)):
            yield from differences(f"{name}[{place}]", *items)
    else:
        yield name, *texts


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV; None is an empty cell, and text that a spreadsheet would compute begins with an apostrophe."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_csv_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return f"'{printable(value)}" if value.lstrip().startswith(("=", "+", "-", "@")) else printable(value)


__all__ = [
    "BACKGROUND",
    "IGNORE_INDEX",
    "IMAGE_SUFFIXES",
    "MASK_SUFFIXES",
    "atomic_directory",
    "atomic_write",
    "check_new_or_empty",
    "check_writable",
    "csv_text",
    "differences",
    "is_full",
    "is_process_alive",
    "named",
    "partial_folder",
    "partial_path",
    "printable",
    "read_json",
    "remove_stale_partials",
    "resolve_inside",
    "toml_value",
    "with_suffix_added",
    "write_json",
]
