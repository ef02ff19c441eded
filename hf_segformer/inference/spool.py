"""Strips of a raster's segmentation on disk, from which a killed run continues and its files are written.

A strip is appended before the state that counts it, and the state is replaced atomically: whenever a process is killed,
the folder holds a valid prefix of the image. Axes: H W sides of the image, K classes, w columns of the logits' grid.
"""

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import atomic_write
from .tiling import Seam

_STATE = "state.npz"
_ROWS = 512  # rows that `rows_of` yields at once


class Spool:
    """Planes (H, W) of which the first rows are written.

    Args:
        folder: of the files, created; one of an earlier run with the same `key` is continued, any other one emptied.
        destination: the file that the rows are for, which errors name.
        key: what the planes depend on, as JSON.
        width: W.
        dtypes: dtype of each plane.

    Attributes:
        num_rows: rows that are complete.
        seam: what continues after them.
        valid: where pixels after them hold data, bool (rows, W), as far as it is known.

    Raises:
        OSError: if the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        destination: Path,
        key: Mapping[str, Any],
        width: int,
        dtypes: Sequence[type[np.generic]],
    ):
        self.folder, self.destination, self.width, self._dtypes = folder, destination, width, dtypes
        self._key = json.dumps(key, sort_keys=True)
        self.num_rows, self.seam, self.valid = 0, Seam(), np.ones((0, width), bool)
        with _errors_of(destination):
            folder.mkdir(exist_ok=True)
            if not self._resume():
                shutil.rmtree(folder)
                folder.mkdir()
            for path, dtype in self._planes():
                with path.open("ab") as file:
                    file.truncate(self.num_rows * width * np.dtype(dtype).itemsize)

    def append(self, planes: Sequence[np.ndarray], seam: Seam, valid: np.ndarray) -> None:
        """Append rows to every plane, and record the state after them."""
        num_rows = self.num_rows + len(planes[0])
        state: dict[str, Any] = {"key": self._key, "num_rows": num_rows, "row": seam.row, "valid": valid}
        with _errors_of(self.destination):
            for (path, _), rows in zip(self._planes(), planes, strict=True):
                with path.open("ab") as file:
                    file.write(np.ascontiguousarray(rows).data)
            with atomic_write(self.folder / _STATE) as partial, partial.open("wb+") as file:
                np.savez(file, logits=seam.logits.cpu().numpy(), **state)
        self.num_rows = num_rows

    def plane(self, index: int) -> np.ndarray:
        """Return a plane (num_rows, W), which stays on disk."""
        path, dtype = self._planes()[index]
        return np.memmap(path, dtype, "r", shape=(self.num_rows, self.width))

    def _planes(self) -> list[tuple[Path, type[np.generic]]]:
        return [(self.folder / f"{index}.raw", dtype) for index, dtype in enumerate(self._dtypes)]

    def _resume(self) -> bool:
        """Read the state; False where there is none of the same key, or one whose planes are shorter than it says."""
        try:
            with np.load(self.folder / _STATE, allow_pickle=False) as state:
                if str(state["key"]) != self._key:
                    return False
                num_rows, valid = int(state["num_rows"]), state["valid"]
                seam = Seam(int(state["row"]), torch.from_numpy(state["logits"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False
        sizes = [num_rows * self.width * np.dtype(dtype).itemsize for dtype in self._dtypes]
        if not all(
            path.is_file() and path.stat().st_size >= size
            for (path, _), size in zip(self._planes(), sizes, strict=True)
        ):
            return False
        self.num_rows, self.seam, self.valid = num_rows, seam, valid
        return True


@contextmanager
def _errors_of(destination: Path) -> Iterator[None]:
    """Name the file that the rows are for in system errors."""
    try:
        yield
    except OSError as error:
        error.filename = str(destination)
        raise


def rows_of(plane: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row's index and the rows of a plane (H, W) in strips, from top to bottom."""
    for top in range(0, len(plane), _ROWS):
        yield top, np.asarray(plane[top : top + _ROWS])


__all__ = ["Spool", "rows_of"]
