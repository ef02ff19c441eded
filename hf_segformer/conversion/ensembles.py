"""Folders of several models whose probabilities are averaged: the file that names their members.

    ensemble.json        {"members": ["fold_0", "fold_1"]}
    fold_0/, fold_1/     ordinary folders of models

The names come from a file, so they are plain relative ones and lead nowhere but into the folder.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ..files import read_json, resolve_inside, write_json

ENSEMBLE_FILE = "ensemble.json"
MOST_MEMBERS = 100

# A pattern for a download would take other signs for wild cards.
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", re.ASCII)


def is_ensemble(path: str | Path) -> bool:
    """Return True if a path is a folder that names the members of an ensemble."""
    return (Path(path) / ENSEMBLE_FILE).is_file()


def read_member_names(folder: str | Path) -> list[str]:
    """Names of an ensemble's 2 to 100 members, relative to its folder.

    Raises:
        ValueError: if the file does not have its format, or a name leads elsewhere.
        OSError: if it cannot be read.
    """
    path = resolve_inside(folder, ENSEMBLE_FILE)
    names = read_json(path).get("members")
    if not isinstance(names, list) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        raise ValueError(f'{path} has members {names!s:.80}; expected folders below it, ["fold_0", "fold_1", ...]')
    if not 2 <= len(names) <= MOST_MEMBERS or len(set(names)) < len(names):
        raise ValueError(f"{path} has {len(names)} members; expected 2 to {MOST_MEMBERS} different ones")
    for name in names:
        resolve_inside(folder, name)
    return names


def member_folders(path: str | Path) -> list[Path]:
    """Folders of an ensemble's members; of a single model the path itself.

    Raises:
        ValueError: see `read_member_names`.
        OSError: if a member is missing.

    Examples:
        >>> from hf_segformer.conversion.ensembles import member_folders
        >>> [path.as_posix() for path in member_folders("outputs/single_model")]
        ['outputs/single_model']
    """
    path = Path(path)
    if not is_ensemble(path):
        return [path]
    folders = [resolve_inside(path, name) for name in read_member_names(path)]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{path / ENSEMBLE_FILE} names {folder.name}, but {path} holds no such folder")
    return folders


def write_ensemble(folder: str | Path, names: Sequence[str]) -> None:
    """Write the file that makes a folder an ensemble of the models in folders below it.

    Args:
        folder: it exists.
        names: of the members, relative to the folder.

    Raises:
        OSError: if it cannot be written.
    """
    write_json({"members": list(names)}, Path(folder) / ENSEMBLE_FILE)


__all__ = [
    "ENSEMBLE_FILE",
    "MOST_MEMBERS",
    "is_ensemble",
    "member_folders",
    "read_member_names",
    "write_ensemble",
]
