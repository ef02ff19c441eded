"""Names of the images of a data set, for tables and messages."""

import os
from typing import Any

import datasets

from ..data.readers import without_suffix
from ..data.splits import image_paths


def image_names(dataset: Any) -> list[str]:
    """Name the images of a data set by their files, below the folder that they share; without files by number.

    Pages of a file with several are NAME_p001, NAME_p002 and so on, as `segformer predict --pages` names them.

    Args:
        dataset: with a length; of a `datasets.Dataset` the columns `image` and `page` are looked at.
    """
    paths = [path for path in image_paths(dataset) if path] if isinstance(dataset, datasets.Dataset) else []
    if not paths or len(paths) < len(dataset):
        return [str(index) for index in range(len(dataset))]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [os.path.relpath(path, folder) if folder else path for path in paths]
    if "page" not in dataset.column_names:
        return names
    pages = dataset.with_format(None).select_columns(["page"])["page"]
    return [_of_page(name, page) for name, page in zip(names, pages, strict=True)]


def _of_page(name: str, page: int) -> str:
    stem = without_suffix(name)
    return f"{stem}_p{page + 1:03d}{name[len(stem) :]}"


__all__ = ["image_names"]
