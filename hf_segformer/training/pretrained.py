"""Weights that a run may start from, and the licence that comes with them."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, metadata_load

from ..configuration_segformer import VARIANTS, SegFormerConfig
from ..files import printable
from .building import locate_checkpoint
from .plan import Pretrained

_LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "LICENCE.md", "LICENCE.txt")


def inspect_pretrained(source: str) -> Pretrained:
    """Read size, channels and licence of a checkpoint; a Hub repository is downloaded.

    Args:
        source: folder with config.json and weights, or Hub repository.

    Raises:
        OSError: if there is none, or the Hub cannot be reached.
        ValueError: if its configuration is not a SegFormer's.
    """
    path = locate_checkpoint(source)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"--init is {source}, which holds no config.json; expected a model's folder: `segformer convert {source} "
            "NEW` makes one of a file of weights"
        )
    config = SegFormerConfig.from_pretrained(path)
    return Pretrained(source, config.num_channels, _size(config), find_licence(source, path))


def find_licence(source: str, path: Path) -> str:
    """Return the licence that a model card states, or the first line of a licence file beside it.

    Args:
        source: as the user named it.
        path: its local folder.
    """
    card = path / "README.md" if Path(source).exists() else _hub_card(source)
    metadata = _metadata(card) if card is not None and card.is_file() else {}
    stated = [metadata.get(name) for name in ("license", "license_name", "license_link")]
    if any(stated):
        return printable(", ".join(str(each) for each in stated if each))
    for name in _LICENCE_FILES:
        if (path / name).is_file():
            lines = (path / name).read_text(encoding="utf-8", errors="replace").split("\n")
            first = next((line.strip() for line in lines if line.strip()), "")
            return printable(f"{name} in {path}: {first[:80]}")
    return "not stated"


def _metadata(card: Path) -> dict[str, Any]:
    """Front matter of a card; empty where it has none that can be read."""
    try:
        return metadata_load(card) or {}
    except Exception:  # YAML's own classes, and ValueError for another kind of value
        return {}


def _hub_card(repository: str) -> Path | None:
    try:
        return Path(hf_hub_download(repository, "README.md"))
    except OSError:  # it has none, or it was never downloaded
        return None


def _size(config: SegFormerConfig) -> str:
    for name, values in VARIANTS.items():
        if all(getattr(config, field) == value for field, value in values.items() if field != "decoder_hidden_size"):
            return f"SegFormer {name.upper()}"
    return f"SegFormer of depths {config.depths} and sizes {config.hidden_sizes}"


__all__ = ["find_licence", "inspect_pretrained"]
