"""The output folder of a run: one run at a time writes to it, and its checkpoints are known as its own.

The folder is locked while its run trains. The file `.run.json` in it holds the run's identity, which every checkpoint
has too.
"""

from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..conversion.ensembles import ENSEMBLE_FILE
from ..files import with_suffix_added, write_json
from ..locks import LOCK, locked_folder
from .recipe_writer import RECIPE_FILE
from .resume import list_checkpoints, read_json_or_empty, read_run_id

_IDENTITY = ".run.json"

_held: dict[Path, "RunFolder"] = {}  # by this process


class RunFolder:
    """A context in which this process owns a run's output folder.

    Within the context of a folder, another one for it takes part in the same run.

    Args:
        folder: `output_dir`; it is created, and removed again if nothing is written to it.
        is_owner: take the lock; with several processes the main one alone does.

    Attributes:
        id: identity of the run; None in a process that is not the owner.

    Raises:
        ValueError: on entering, if another run owns the folder; the message names its owner and host.
    """

    def __init__(self, folder: str | Path, is_owner: bool = True):
        self.folder, self.is_owner = Path(folder), is_owner
        self.id: str | None = None
        self._stack = ExitStack()
        self._key: Path | None = None

    def __enter__(self) -> "RunFolder":
        if not self.is_owner:
            return self
        if outer := _held.get(self.folder.resolve()):
            self.id = outer.id
            return self
        self._acquire()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._key is not None:
            _held.pop(self._key)
            self._key = None
            self._stack.close()
            if self._is_new and self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _acquire(self) -> None:
        self._is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(locked_folder(self.folder, "a training"))
        self.id = read_json_or_empty(self.folder / _IDENTITY).get("id")
        self._key = self.folder.resolve()
        _held[self._key] = self

    def check_checkpoint(self, checkpoint: Path) -> None:
        """Check that a checkpoint is of the folder's run, and take over its identity where the folder has none.

        Raises:
            ValueError: if it is another run's.
        """
        found = read_run_id(checkpoint)
        if self._key is None or found is None:
            return
        if self.id is None:
            ids = {read_run_id(path) for path in list_checkpoints(self.folder)}
            self.id = found if ids <= {found, None} else "unknown"
        if found != self.id:
            raise ValueError(
                f"{checkpoint} is another run's; expected one of the run that {self.folder} belongs to: move it to a "
                "folder of its own and resume there"
            )

    def keep_identity(self) -> None:
        """Write the run's identity, a new one where it has none, to the folder."""
        if not self.is_owner:
            return
        owner = _held[self.folder.resolve()]
        owner.id = self.id = owner.id or uuid4().hex
        write_json({"id": self.id}, self.folder / _IDENTITY)

    def check_free(self, overwrite: bool) -> None:
        """Check that a new run may take the folder's place.

        Raises:
            ValueError: if the folder holds a finished run and `overwrite` is not set, something else than a run, or a
                run and is the working folder, which cannot be moved.
        """
        if not self._content():
            return
        is_finished = any((self.folder / name).is_file() for name in ("config.json", ENSEMBLE_FILE))
        if not is_finished and not (list_checkpoints(self.folder) or _has_runs(self.folder)):
            raise ValueError(f"{self.folder} holds files, but no earlier run; expected another trainer.output_dir")
        if Path.cwd().is_relative_to(self.folder.resolve()):
            raise ValueError(
                f"{self.folder} holds an earlier run and is the working folder, or contains it, and cannot be moved; "
                "expected another trainer.output_dir, or --resume"
            )
        if is_finished and not overwrite:
            raise ValueError(
                f"{self.folder} holds a finished run; expected another trainer.output_dir, or --overwrite, which moves "
                f"that run to {_free_name(self.folder)}"
            )

    def archive_previous_run(self) -> Path | None:
        """Rename the folder of an earlier run, so that runs never mix and none is lost, and own a new one.

        Returns:
            the earlier run's new folder; None if there was none.
        """
        archive = _free_name(self.folder) if self._content() else None
        if archive is not None:
            self.folder.rename(archive)
            (archive / LOCK).unlink()
            self.__exit__()
            self._acquire()
        self.id = None
        return archive

    def _content(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.name not in (LOCK, _IDENTITY, RECIPE_FILE)]


def _has_runs(folder: Path) -> bool:
    """Return True for the folder of repeated runs: those of its sub-folders that began have an identity."""
    return any((path / _IDENTITY).is_file() for path in folder.iterdir() if path.is_dir())


def _free_name(folder: Path) -> Path:
    return next(name for number in count(1) if not (name := with_suffix_added(folder, f".{number}")).exists())


__all__ = ["RunFolder"]
