"""Check of an index of shards before Transformers loads them: each is a file beside the index, and nothing else."""

import json
import os
import re
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

# A snapshot of the Hub's cache, whose files may be links to the blobs of its repository or of the cache.
_SNAPSHOT = re.compile(r"(?P<repository>(?P<cache>.*)/(models|datasets|spaces)--[^/]+)/snapshots/[^/]+(/.*)?")
_BLOB = re.compile(r"/blobs/([0-9a-f]{2}/)?[0-9a-f]{40,64}")


def check_shards(source: Any, *, subfolder: str = "", variant: str | None = None, **options: Any) -> None:
    """Refuse an index, in a folder or in the Hub's cache, that names shards elsewhere; nothing is downloaded.

    Args:
        source: argument of `from_pretrained`: a folder or the name of a repository; anything else has no index.
        subfolder: argument of `from_pretrained`.
        variant: argument of `from_pretrained`.
        **options: other arguments of `from_pretrained`, of which `revision` and `cache_dir` count.

    Raises:
        ValueError: names the index and the shard.
    """
    if source is None or os.path.isfile(source):
        return
    if os.path.isdir(source):
        indices = sorted(Path(source, subfolder or "").glob("*.index*.json"))
    else:
        ending = f".index.{variant}.json" if variant else ".index.json"
        prefix = f"{subfolder}/" if subfolder else ""
        names = [f"{prefix}{weights}{ending}" for weights in ("model.safetensors", "pytorch_model.bin")]
        places = {"cache_dir": options.get("cache_dir"), "revision": options.get("revision")}
        try:
            cached = [try_to_load_from_cache(str(source), name, **places) for name in names]
        except HFValidationError:  # Transformers says that there is no such folder
            return
        indices = [Path(each) for each in cached if isinstance(each, str)]
    for index in indices:
        _check_index(index)


def _check_index(index: Path) -> None:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # it is no index that Transformers could read
    for name in sorted(map(str, shards)):
        if name in ("", "..") or Path(name).name != name or PureWindowsPath(name).name != name:
            raise ValueError(f"{index} names {name}; expected a file beside it")
        target, folder = os.path.realpath(index.parent / name), os.path.realpath(index.parent)
        if not Path(target).is_relative_to(folder) and not _is_blob(Path(folder).as_posix(), Path(target).as_posix()):
            raise ValueError(f"{index} names {name}, which is a link to {target}, outside the folder")


def _is_blob(folder: str, target: str) -> bool:
    snapshot = _SNAPSHOT.fullmatch(folder)
    roots = (snapshot["repository"], snapshot["cache"]) if snapshot else ()
    return any(target.startswith(root) and _BLOB.fullmatch(target[len(root) :]) for root in roots)


__all__ = ["check_shards"]
