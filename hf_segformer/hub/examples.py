"""Example images of a model: those that its card names, or those in its `examples/` folder."""

import re
from pathlib import Path

import yaml
from huggingface_hub import RepoCard
from transformers.utils import logging

from ..files import resolve_inside

logger = logging.get_logger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
_HUB_FILE = re.compile(r"^https://huggingface\.co/[^/]+/[^/]+/resolve/[^/]+/")


def find_example_images(folder: Path, *, skip_outside: bool = False) -> list[tuple[Path, str]]:
    """Find the images that a model's card names under `widget`, or else those in `examples/`, with their titles.

    An entry's `src` is a path beside the card, or the Hub address of a file that is there; other addresses are skipped,
    since a local page fetches nothing.

    Args:
        folder: of the model.
        skip_outside: skip images that lead out of the folder, with a warning, where a page is shown; publishing
            refuses them.

    Raises:
        ValueError: if an image leads out of the folder, by its name or as a link.
    """
    names = _widgets(folder)
    if not any((folder / name).is_file() for name, _ in names) and (folder / "examples").is_dir():
        names = [(f"examples/{path.name}", path.stem) for path in sorted((folder / "examples").iterdir())]
    images = []
    for name, title in names:
        if not name.lower().endswith(SUFFIXES):
            continue
        try:
            path = resolve_inside(folder, name)
        except ValueError as error:
            if not skip_outside:
                raise
            logger.warning(f"an example image is not shown: {error}")
            continue
        if path.is_file():
            images.append((path, title))
    return images


def _widgets(folder: Path) -> list[tuple[str, str]]:
    """Read `src` and title of each image in a card's front matter."""
    if not (folder / "README.md").is_file():
        return []
    try:
        card = RepoCard.load(resolve_inside(folder, "README.md"), ignore_metadata_errors=True)
        entries = card.data.to_dict().get("widget")
    except (ValueError, OSError, yaml.YAMLError):  # a broken card is no reason not to show the model
        return []
    pairs = [
        (_HUB_FILE.sub("", entry["src"]), entry.get("example_title"))
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("src"), str)
    ]
    return [(name, str(title or Path(name).stem)) for name, title in pairs if "://" not in name]


__all__ = ["find_example_images"]
