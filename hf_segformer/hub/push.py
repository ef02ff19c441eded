"""Publishes a folder on the Hub: model, processor, code, card, pictures and measurements, all or nothing."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..files import read_json
from .model_card import PICTURES, card_text, read_model_config, read_weights, weight_files

_MEASURED = ("metrics.json", "training.json", *PICTURES)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Publish a model's folder by one commit.

    Published are the weights, config.json, preprocessor_config.json, the code that they name, the card, and where they
    exist metrics.json, training.json, their pictures and the page's examples; checkpoints, optimiser states and logs
    stay at home. All is checked before anything is made on the Hub, and what was made is taken away again if the commit
    fails.

    Args:
        folder: of `save_pretrained`, model and processor.
        repo_id: `"owner/name"`. If there is none yet it is made; if there is, it gets a new revision.
        private: make the repository a private one; of no effect on one that exists.
        revision: branch to publish on; it is made if there is none.
        token: with the right to write; by default the one that is signed in.

    Returns:
        the commit; a string that is its URL, with `oid` and `repo_url`.

    Raises:
        ValueError: if a file is damaged or another network's, the name is no repository's, or there is another
            network in that repository.
        OSError: if a file is missing, the Hub can not be reached, or it rejects the token or the write.
    """
    folder = Path(folder)
    files = checked_files(folder, repo_id, token)
    api = HfApi(token=token)
    with in_one_line(repo_id):
        known = _known_files(api, repo_id, revision, read_model_config(folder)["model_type"])
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        with _made(api, repo_id, private, revision, exists=known is not None):
            return api.create_commit(
                repo_id,
                [*additions, *(CommitOperationDelete(name) for name in _outdated(known or [], files))],
                commit_message=f"Publish {folder.resolve().name}",
                revision=revision,
            )


def checked_files(folder: Path, repo_id: str, token: str | None = None) -> dict[str, bytes | str]:
    """What a push publishes, after all that can be checked without the Hub.

    Returns:
        names in the repository, and for each its content or the path of its file.

    Raises:
        ValueError: if a file is damaged or another network's, or the name is no repository's.
        OSError: if a file is missing, or nobody is signed in.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repository is {repo_id!r}, but it must be owner/name")
    files = _published_files(folder, repo_id)
    if not (token or get_token()):
        raise OSError("there is no access token for the Hub: sign in by `hf auth login`, or set HF_TOKEN")
    return files


def _published_files(folder: Path, repo_id: str) -> dict[str, bytes | str]:
    """Names in the repository, and for each its content or the path of its file.

    Raises:
        ValueError: if a file is damaged or another network's.
        OSError: if one is missing.
    """
    if not folder.is_dir():
        raise OSError(f"{folder} is no folder: give one that save_pretrained wrote")
    config = read_model_config(folder)
    read_weights(folder)
    if not (folder / "preprocessor_config.json").is_file():
        raise OSError(f"{folder} holds no preprocessor_config.json: call save_pretrained of the image processor, too")
    processor = read_json(folder / "preprocessor_config.json")
    paths = [folder / "config.json", folder / "preprocessor_config.json", *weight_files(folder)]
    paths += [folder / name for name in ("model.safetensors.index.json", *_MEASURED) if (folder / name).is_file()]
    if paths.count(folder / "model.safetensors"):
        paths = [path for path in paths if path.name != "model.safetensors.index.json"]
    paths += _code_files(folder, {**(config.get("auto_map") or {}), **(processor.get("auto_map") or {})})
    from ..app.session import example_pictures

    card = card_text(folder, repo_id=repo_id).encode()
    examples = {path.relative_to(folder).as_posix(): str(path) for path, _ in example_pictures(folder)}
    return {"README.md": card, **{path.name: str(path) for path in sorted(paths)}, **examples}


def _code_files(folder: Path, auto_map: dict[str, str]) -> list[Path]:
    """The modules that the Auto classes are sent to, and those that they import in turn.

    Raises:
        OSError: if one is missing.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    paths: set[Path] = set()
    for name in {reference.split(".")[0] for reference in auto_map.values() if "--" not in reference}:
        path = folder / f"{name}.py"
        if path.is_file():
            paths |= {path, *map(Path, get_relative_import_files(path))}
        else:
            paths.add(path)
    for path in sorted(paths):
        if not path.is_file():
            raise OSError(f"{folder} holds no {path.name}, the code that its config names: save the model again")
    return sorted(paths)


def _known_files(api: HfApi, repo_id: str, revision: str | None, model_type: str) -> list[str] | None:
    """Names of the files that are published already; None if there is no such repository.

    Raises:
        ValueError: if there is another network in it.
    """
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None
    if revision is not None and any(branch.name == revision for branch in api.list_repo_refs(repo_id).branches):
        info = api.model_info(repo_id, revision=revision)
    with TemporaryDirectory() as cache:
        try:
            path = api.hf_hub_download(repo_id, "config.json", revision=info.sha, cache_dir=cache)
        except EntryNotFoundError:
            return [file.rfilename for file in info.siblings or ()]
        other = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
    if other != model_type:
        raise ValueError(
            f"{repo_id} exists and holds a model of type {other!r}, but this one is {model_type!r}: give another name"
        )
    return [file.rfilename for file in info.siblings or ()]


def _outdated(known: list[str], files: dict[str, bytes | str]) -> list[str]:
    """What an earlier model left in the repository and this one would be read with."""
    belongs = [name for name in known if name in _MEASURED or name.startswith("model.safetensors.index")]
    belongs += [name for name in known if name.startswith("model") and name.endswith(".safetensors")]
    belongs += [name for name in known if name.startswith("examples/")]
    return sorted(set(belongs) - files.keys())


@contextmanager
def _made(api: HfApi, repo_id: str, private: bool, revision: str | None, exists: bool) -> Iterator[None]:
    """Make the repository and the branch if there are none, and take away again what was made if the rest fails."""
    branch = revision if revision not in (None, "main") else None
    made_branch = False
    if not exists:
        api.create_repo(repo_id, private=private)
    try:
        if branch and not any(known.name == branch for known in api.list_repo_refs(repo_id).branches):
            api.create_branch(repo_id, branch=branch)
            made_branch = True
        yield
    except BaseException:
        with suppress(Exception):  # the error that led here is the one to tell
            if not exists:
                api.delete_repo(repo_id)
            elif made_branch and branch:
                api.delete_branch(repo_id, branch=branch)
        raise


@contextmanager
def in_one_line(repo_id: str, so_far: str = "nothing was published") -> Iterator[None]:
    """Turns what the Hub's client raises into one sentence.

    Args:
        repo_id: that was to be written.
        so_far: how the sentence begins.

    Raises:
        OSError: says what happened and what to do.
    """
    try:
        yield
    except (HfHubHTTPError, HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
        # The client wraps what breaks while it uploads a file.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if isinstance(cause, HfHubHTTPError):
            raise OSError(f"{so_far}, {_refusal(cause, repo_id)}") from error
        if isinstance(cause, HTTPError | OSError):
            reason = str(cause) or type(cause).__name__
            raise OSError(f"{so_far}, the Hub at {constants.ENDPOINT} can not be reached: {reason}") from error
        raise


def _refusal(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status == 401:
        return "the Hub rejects the access token: sign in anew by `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the access token has no right to write to {repo_id}: check the owner's name and the token's rights"
    if status == 409:
        return f"{repo_id} exists already, or was made at this moment by somebody else"
    return f"the Hub answered {status}, {error.server_message or error.response.reason_phrase}; try again later"


__all__ = ["checked_files", "in_one_line", "push_folder"]
