"""Checkpoint files and folders, of any code base, local or on the Hub.

No code that a file brings along is run: pickles are read with `weights_only=True`, always, and a config.json is reduced
to the fields that describe the network. Every error names the file and what is wrong with it in one line, because
"invalid load key" helps nobody whose download is a web page.
"""

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..configuration_segformer import SegFormerConfig, network_fields
from ..files import read_json, resolve_inside
from .ensembles import ENSEMBLE_FILE, is_ensemble, member_folders, read_member_names

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
ADAPTER_CONFIG = "adapter_config.json"
_FOLDER_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Keys under which training programs keep the state dict, and prefixes that wrappers add to every key of it.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.", "_orig_mod.")
_MOST_UNPACKED = 4  # times the size of the file, more than weights can be compressed
# Everything that torch.load raised when files were cut at every byte and their bytes changed.
_UNREADABLE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)
# Everything that Transformers raised on strange values in a configuration.
_WRONG_VALUES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError)
# Of `architectures` in a config.json only the names of SegFormer's classes are read.
_ARCHITECTURE = re.compile(r"Seg[Ff]ormer(Model|Backbone|ForSemanticSegmentation|ForImageClassification)")


@dataclass(frozen=True)
class Checkpoint:
    """Weights and what is known about them.

    Attributes:
        path: file or folder, for messages.
        weights: tensors by their own names, without the prefixes that wrappers add.
        config: the folder's config.json; None where it must be inferred from shapes.
        classes: class names that the training program stored in the file; may be empty.
    """

    path: Path
    weights: dict[str, torch.Tensor]
    config: SegFormerConfig | None = None
    classes: list[str] = field(default_factory=list)


def is_repository(source: str) -> bool:
    """Return True if a source names a Hub repository: `owner/name` that neither is nor looks like a local path."""
    path = Path(source)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    return named and path.suffix not in SUFFIXES and not path.exists() and not path.parent.is_dir()


def locate(source: str | Path) -> Path:
    """Return the local path of a source, downloading it if it is a Hub repository.

    Raises:
        OSError: if there is neither such a path nor such a repository.
        ValueError: if the source is a web address.
    """
    source = str(source)
    if "://" in source:
        raise ValueError(f"{source} is a web address; expected a path or the name of a Hub repository, owner/name")
    if not is_repository(source):
        return Path(source)
    top_level = {"repo_id": source, "ignore_patterns": "*/*"}  # a Trainer's checkpoints are in folders below
    try:
        folder = Path(snapshot_download(**top_level, allow_patterns=["*.json", "*.safetensors"]))
        if is_ensemble(folder):
            fetch_members(source, folder)
        elif not any(folder.glob("*.safetensors")):
            snapshot_download(**top_level, allow_patterns=[f"*{suffix}" for suffix in SUFFIXES])
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {source}, and no repository of that name on the Hub that you may read"
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {source}, and the Hub, which may have a repository of that name, cannot be reached: "
            "give a local folder, or try again with a network connection"
        ) from error
    return folder


def fetch_members(repository: str, folder: Path) -> None:
    """Download the members of an ensemble.

    Args:
        repository: on the Hub.
        folder: its snapshot, of which the files at the top are there; it is named by its commit.

    Raises:
        ValueError: if its ensemble.json does not name folders below it.
    """
    patterns = [f"{name}/{end}" for name in read_member_names(folder) for end in ("*.json", "*.safetensors")]
    snapshot_download(repository, revision=folder.name, allow_patterns=patterns)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file or a folder of weights.

    Args:
        path: a .safetensors file, a pickle (.pth, .pt, .bin, .ckpt) or a folder with either, sharded or not. A folder
            brings its config.json along, a file does not.

    Raises:
        OSError: if the path does not exist or cannot be opened.
        ValueError: if the file is empty, cut short, no checkpoint, needs code to be read, or holds no state dict.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    path = Path(path)
    if path.is_file():
        return read_weights_file(path)
    if is_ensemble(path):
        first = member_folders(path)[0]
        raise ValueError(f"{path} is an ensemble ({ENSEMBLE_FILE}); expected a single model, such as {first}")
    weights_file = _find_weights(path)
    if weights_file.suffix == ".json":
        weights = _read_shards(weights_file)
        return Checkpoint(path, weights, config=folder_config(path))
    checkpoint = read_weights_file(weights_file)
    return Checkpoint(path, checkpoint.weights, folder_config(path), checkpoint.classes)


def folder_config(folder: Path) -> SegFormerConfig | None:
    """Read a folder's configuration; None without a config.json, or where it is not in Transformers' form.

    Raises:
        ValueError: as `read_config`.
    """
    path = folder / "config.json"
    return read_config(path) if path.exists() and "model_type" in read_json(path) else None


def read_config(source: str | Path) -> SegFormerConfig:
    """Read the configuration in a config.json, a folder with one, or a Hub repository.

    Only fields that describe the network are kept; those that choose code or a dtype are dropped.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it belongs to another network or holds impossible values.
    """
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    if path.is_file():
        read_json(path)  # Transformers' own message for a damaged file fills a page, or names no file
    known = network_fields()
    try:
        values, _ = SegFormerConfig.get_config_dict(source)
        config = SegFormerConfig.from_dict({name: value for name, value in values.items() if name in known})
        config.architectures = _known_architectures(values.get("architectures"))
        return config
    except (OSError, ValueError) as error:
        raise type(error)(_with_source(source, error)) from error
    except (StrictDataclassError, *_WRONG_VALUES) as error:  # no ValueErrors, though they are about a value
        raise ValueError(_with_source(source, error)) from error


def read_shards_of(index: Path) -> list[Path]:
    """Return the files that an index of shards names, each of them beside it.

    Raises:
        ValueError: if the index holds no weight_map, or names a file elsewhere.
        OSError: if the index cannot be read, or a file is missing.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} must hold a weight_map with the file of each tensor, but it is {names!s:.40}")
    paths = []
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names {name}; expected a file beside it")
        paths.append(resolve_inside(index.parent, name))
        if not paths[-1].is_file():
            raise FileNotFoundError(f"{index} names {name}, but {index.parent} holds no such file")
    return paths


def _known_architectures(names: Any) -> list[str] | None:
    """Return the classes of SegFormer that `architectures` of a file names; None if it names none."""
    listed = names if isinstance(names, list) else []
    return [name for name in listed if isinstance(name, str) and _ARCHITECTURE.fullmatch(name)] or None


def _with_source(source: str | Path, error: Exception) -> str:
    text = f"{error!s:.1000}"  # it repeats a long value
    return text if str(source) in text else f"{source}: {text}"


def _find_weights(folder: Path) -> Path:
    """Find the one file of weights in a folder, or the index of its shards."""
    for name in _FOLDER_WEIGHTS:
        if (folder / name).exists():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{folder} must hold one file of weights ({', '.join(SUFFIXES)}), but it holds {listed}")
    return found[0]


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for path in read_shards_of(index):
        weights |= read_weights_file(path).weights
    return weights


def read_weights_file(path: Path) -> Checkpoint:
    """Read one file of weights, by its content rather than by trial and error.

    Raises:
        OSError: if it cannot be opened.
        ValueError: as `read_checkpoint`.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path} is empty (0 bytes): the download or the copy failed")
    if start.lstrip().startswith(b"<"):
        raise ValueError(f"{path} is a web page or XML, not weights: download the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not weights: run `git lfs pull`")
    if path.suffix == ".safetensors":
        try:
            return Checkpoint(path, load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is cut short or no safetensors file: {error}") from error
    # torch.save writes a zip archive or a bare pickle, nothing else.
    if not start.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path} is no checkpoint: expected a file of torch.save or safetensors")
    _check_unpacked_size(path)
    content = _read_pickle(path)
    weights = _state_dict(path, content)
    return Checkpoint(path, weights, classes=_class_names(content))


def _check_unpacked_size(path: Path) -> None:
    """Raise ValueError for an archive that unpacks to far more than its size; torch.save compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            num_bytes = sum(each.file_size for each in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):  # a bare pickle, or damaged, which is said later
        return
    if num_bytes > _MOST_UNPACKED * path.stat().st_size:
        raise ValueError(
            f"{path} unpacks from {path.stat().st_size:,} to {num_bytes:,} bytes; expected at most "
            f"{_MOST_UNPACKED} times its size, as torch.save writes it"
        )


def _is_stored_whole(tensor: torch.Tensor) -> bool:
    """Return True for a dense tensor on the CPU with as many stored values as it has elements."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _read_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unknown protocols; a file that cannot be read raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ValueError(f"{path} is cut short or damaged: no pickle of tensors") from error
        raise ValueError(
            f"{path} needs the code of {code[1]} to be read, and a pickle's code is never run here: "
            "if you trust the file, save its state dict alone with torch.save"
        ) from error
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is cut short, damaged or no file of torch.save: {reason}") from error


def _state_dict(path: Path, content: object) -> dict[str, torch.Tensor]:
    """Unwrap the state dict from whatever a training program put around it."""
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold a state dict, but it holds {type(content).__name__} {content!s:.40}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} must hold tensors by name, but {key!r} is {type(value).__name__}")
        if not _is_stored_whole(value):
            raise ValueError(
                f"{path} holds fewer values than {key!r} {tuple(value.shape)} has; expected dense tensors, stored whole"
            )
    weights = dict(content)
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _class_names(content: object) -> list[str]:
    """Return the class names where mmcv (`meta.CLASSES`) and mmengine (`meta.dataset_meta.classes`) store them."""
    meta: Any = content.get("meta") if isinstance(content, Mapping) else None
    if not isinstance(meta, dict):
        return []
    dataset = meta.get("dataset_meta")
    classes = meta.get("CLASSES") or (dataset.get("classes") if isinstance(dataset, dict) else None)
    return [str(name) for name in classes] if isinstance(classes, (list, tuple)) else []


__all__ = [
    "ADAPTER_CONFIG",
    "SUFFIXES",
    "Checkpoint",
    "fetch_members",
    "folder_config",
    "is_repository",
    "locate",
    "read_checkpoint",
    "read_config",
    "read_shards_of",
    "read_weights_file",
]
