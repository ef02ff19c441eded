"""Reads checkpoints as they lie on disks and on the Hub: files and folders of weights, whoever wrote them.

Nothing here runs code that a file brings along: pickles are read with `weights_only=True`, always. Whatever is wrong
with a file is said in one line that names it, because "invalid load key" helps nobody whose download was a web page.
"""

import json
import pickle
import re
import struct
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..configuration_segformer import SegFormerConfig

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_FOLDER_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Keys under which training programs keep the state dict, and what wrappers put before every key of it.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.", "_orig_mod.")
# All that torch.load was seen to raise when files were cut at every byte and their bytes changed.
_DAMAGE = (
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
# What strange values in a configuration were seen to raise in Transformers.
_WRONG_VALUES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError)


@dataclass(frozen=True)
class Checkpoint:
    """What was found: where, the weights by their own names, and what is known besides.

    Attributes:
        path: file or folder, for messages.
        weights: tensors by name, without the prefixes that wrappers add.
        config: read from the folder's config.json; None where shapes must tell.
        classes: names of the classes that the training program left in the file; may be empty.
    """

    path: Path
    weights: dict[str, torch.Tensor]
    config: SegFormerConfig | None = None
    classes: list[str] = field(default_factory=list)


def is_repository(source: str) -> bool:
    """Whether a source is to be looked for on the Hub: `owner/name` that is not, and is not meant as, a path here."""
    path = Path(source)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    return named and path.suffix not in SUFFIXES and not path.exists() and not path.parent.is_dir()


def locate(source: str) -> Path:
    """The local path of a source: itself, or the download of a Hub repository.

    Raises:
        OSError: if there is neither such a path nor such a repository.
        ValueError: if the source is a web address.
    """
    if "://" in source:
        raise ValueError(f"{source} is a web address, but a path or a Hub repository's name, owner/name, is wanted")
    if not is_repository(source):
        return Path(source)
    top_level = {"repo_id": source, "ignore_patterns": "*/*"}  # a Trainer's checkpoints lie below
    try:
        folder = Path(snapshot_download(**top_level, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(**top_level, allow_patterns=[f"*{suffix}" for suffix in SUFFIXES])
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {source}, and on the Hub no repository of that name that you may read"
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {source}, and the Hub, which may have a repository of that name, can not be reached"
        ) from error
    return folder


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file or a folder of weights.

    A file stands for itself; a folder brings the config.json that lies in it.

    Args:
        path: a .safetensors file, a pickle (.pth, .pt, .bin, .ckpt) or a folder with either, sharded or not.

    Raises:
        OSError: if the path does not exist or can not be opened.
        ValueError: if the file is empty, cut, no checkpoint at all, needs code to be read, or holds no state dict.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    path = Path(path)
    if path.is_file():
        return _read_file(path)
    weights_file = _find_weights(path)
    if weights_file.suffix == ".json":
        weights = _read_shards(weights_file)
        return Checkpoint(path, weights, config=folder_config(path))
    checkpoint = _read_file(weights_file)
    return Checkpoint(path, checkpoint.weights, folder_config(path), checkpoint.classes)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        ValueError: if it holds anything else.
        OSError: if it can not be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, but it must be a JSON object")
    return values


def folder_config(folder: Path) -> SegFormerConfig | None:
    """The configuration in a folder; None without a config.json, or where it is not in Transformers' form.

    Raises:
        ValueError: as `read_config`.
    """
    path = folder / "config.json"
    return read_config(path) if path.exists() and "model_type" in read_json(path) else None


def read_config(source: str | Path) -> SegFormerConfig:
    """The configuration in a config.json, a folder with one, or a Hub repository.

    Raises:
        OSError: if there is no such file, or it can not be read.
        ValueError: if it belongs to another network or holds impossible values.
    """
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    if path.is_file():
        read_json(path)  # what Transformers says of a file that is none fills a page, or names no file
    try:
        return SegFormerConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise type(error)(_with_source(source, error)) from error
    except (StrictDataclassError, *_WRONG_VALUES) as error:  # no ValueError, though it says that a value is wrong
        raise ValueError(_with_source(source, error)) from error


def _with_source(source: str | Path, error: Exception) -> str:
    text = f"{error!s:.1000}"  # a long value is repeated in it
    return text if str(source) in text else f"{source}: {text}"


def _find_weights(folder: Path) -> Path:
    """The one file of weights in a folder, or the index of its shards."""
    for name in _FOLDER_WEIGHTS:
        if (folder / name).exists():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{folder} must hold one file of weights ({', '.join(SUFFIXES)}), but it holds {listed}")
    return found[0]


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} must hold a weight_map with the file of each tensor, but it is {names!s:.40}")
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index} names {shard}, but shards lie beside it")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index} names {shard}, but {index.parent} holds no such file")
        weights |= _read_file(index.parent / shard).weights
    return weights


def _read_file(path: Path) -> Checkpoint:
    """One file, opened by what it is rather than by trial and error."""
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
    # A zip archive or a bare pickle: nothing else was ever written by torch.save.
    if not start.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path} is no checkpoint: neither torch.save nor safetensors wrote it")
    content = _read_pickle(path)
    weights = _state_dict(path, content)
    return Checkpoint(path, weights, classes=_class_names(content))


def _read_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols it may not know; what it can not read it says by an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ValueError(f"{path} is cut short or damaged: no pickle of tensors") from error
        raise ValueError(
            f"{path} needs the code of {code[1]} to be read, and a pickle's code is never run here: "
            "where you trust the file, save its state dict alone with torch.save"
        ) from error
    except _DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is cut short, damaged or no file of torch.save: {reason}") from error


def _state_dict(path: Path, content: object) -> dict[str, torch.Tensor]:
    """The tensors by name, out of whatever a training program wrapped around them."""
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold a state dict, but it holds {type(content).__name__} {content!s:.40}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} must hold tensors by name, but {key!r} is {type(value).__name__}")
    weights = dict(content)
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _class_names(content: object) -> list[str]:
    """Names of the classes as mmcv (`meta.CLASSES`) and mmengine (`meta.dataset_meta.classes`) keep them."""
    meta = content.get("meta") if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        return []
    dataset = meta.get("dataset_meta")
    classes = meta.get("CLASSES") or (dataset.get("classes") if isinstance(dataset, dict) else None)
    return [str(name) for name in classes] if isinstance(classes, (list, tuple)) else []
