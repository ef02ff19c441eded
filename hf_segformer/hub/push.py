"""Publication of a model's folder on the Hub: model, processor, code, card, images and metrics, all or nothing.

Every file is named by the folder itself, so its name goes through `resolve_inside`: a link or a name that leads out of
the folder is refused, and never published.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..configuration_segformer import foreign_fields
from ..conversion.ensembles import ENSEMBLE_FILE, is_ensemble, member_folders, read_member_names
from ..files import read_json, resolve_inside
from .endpoint import HANDLER_FILES, handler_files, is_own
from .ensemble_card import RECORDS, ensemble_card_text
from .examples import find_example_images
from .model_card import IMAGES, card_text, edited_card, is_edited_text
from .model_folder import model_kind, read_model_config, read_weights, weight_files

logger = logging.get_logger(__name__)

_CARD = "README.md"
_MEASURED = ("metrics.json", "training.json", *IMAGES)
_OF_RUNS = re.compile(r"(fold|seed)_[0-9]+/")  # members of an ensemble that `segformer train` has written


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    with_handler: bool = True,
) -> CommitInfo:
    """Publish the folder of a model, or of an ensemble, in one commit.

    Published are the weights, config.json, preprocessor_config.json, the code that they name, the card, and if present
    metrics.json, training.json, their images and the page's example images; training checkpoints, optimizer states and
    logs are not. By handler.py, with its requirements.txt, a segmentation model answers as an Inference Endpoint. Of an
    ensemble its members are published, each in a folder of its own without a card or handler, and ensemble.json, the
    scores of all runs and one card. Everything is checked before anything is created on the Hub, and what was created
    is deleted again if the commit fails. A card that was edited on the Hub is kept, unless the folder has one that was.

    Args:
        folder: of `save_pretrained`, model and processor.
        repo_id: `"owner/name"`; created if it does not exist, or else given a new revision.
        private: create the repository as a private one; no effect on one that exists.
        revision: branch to publish on; created if it does not exist.
        token: with the right to write; by default the one that is signed in.
        with_handler: publish `handler.py` for a segmentation model, and delete that of an earlier one for any other
            model or an ensemble; False leaves one that is published as it is.

    Returns:
        the commit; a string that is its URL, with `oid` and `repo_url`.

    Raises:
        ValueError: if a file is damaged, another network's or a link out of the folder, the name is no repository's,
            or that repository holds another network, or a handler.py of its own.
        OSError: if a file is missing, the Hub cannot be reached, or it rejects the token or the write.
    """
    folder = Path(folder)
    files = checked_files(folder, repo_id, token)
    if with_handler and not is_ensemble(folder) and model_kind(folder) == "segmentation":
        files |= handler_files()
    api = HfApi(token=token)
    with one_line_errors(repo_id):
        model_type = read_model_config(member_folders(folder)[0])["model_type"]
        replaced = HANDLER_FILES if with_handler else ()
        known, has_edited_card = _known_files(api, repo_id, revision, model_type, replaced)
        if has_edited_card and not edited_card(folder):
            files.pop(_CARD)
            logger.warning(f"{_CARD} of {repo_id} was edited there and is kept; delete it there to publish a new one")
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        with _created(api, repo_id, private, revision, exists=known is not None):
            return api.create_commit(
                repo_id,
                [*additions, *(CommitOperationDelete(name) for name in _outdated(known or [], files, replaced))],
                commit_message=f"Publish {folder.resolve().name}",
                revision=revision,
            )


def checked_files(folder: Path, repo_id: str, token: str | None = None) -> dict[str, bytes | str]:
    """Collect the files of a push, after all checks that need no Hub.

    Returns:
        names in the repository, and for each its content or the path of its file.

    Raises:
        ValueError: if a file is damaged, another network's or a link out of the folder, or the name is no repository's.
        OSError: if a file is missing, or nobody is signed in.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repository is {repo_id!r}; expected owner/name")
    files = _published_files(folder, repo_id)
    if not (token or get_token()):
        raise OSError("there is no access token for the Hub: sign in by `hf auth login`, or set HF_TOKEN")
    return files


def _published_files(folder: Path, repo_id: str) -> dict[str, bytes | str]:
    """Map names in the repository to contents or to paths of files."""
    if not folder.is_dir():
        raise OSError(f"{folder} is not a folder; expected one that save_pretrained wrote")
    if not is_ensemble(folder):
        card = card_text(folder, repo_id=repo_id).encode()
        return {_CARD: card, **{name: str(resolve_inside(folder, name)) for name in sorted(_model_files(folder))}}
    members = zip(read_member_names(folder), member_folders(folder), strict=True)
    names = {f"{member}/{name}" for member, path in members for name in _model_files(path)}
    names |= {name for name in (*RECORDS, *_MEASURED) if (folder / name).is_file()} | {ENSEMBLE_FILE}
    card = ensemble_card_text(folder, repo_id=repo_id).encode()
    return {_CARD: card, **{name: str(resolve_inside(folder, name)) for name in sorted(names)}}


def _model_files(folder: Path) -> set[str]:
    """Name the files of a model that are published, without its card."""
    config = read_model_config(folder)
    read_weights(folder)
    if not (folder / "preprocessor_config.json").is_file():
        raise OSError(f"{folder} holds no preprocessor_config.json: call save_pretrained of the image processor, too")
    processor = read_json(resolve_inside(folder, "preprocessor_config.json"))
    weights = [path.name for path in weight_files(folder)]
    optional = [*_MEASURED, *(["model.safetensors.index.json"] if "model.safetensors" not in weights else [])]
    names = {"config.json", "preprocessor_config.json", *weights, *_code_files(folder, config, processor)}
    names |= {name for name in optional if (folder / name).is_file()}
    return names | {path.relative_to(folder).as_posix() for path, _ in find_example_images(folder)}


def _code_files(folder: Path, *configs: dict[str, Any]) -> set[str]:
    """Name the modules that the Auto classes are sent to, and those that they import in turn.

    Raises:
        ValueError: if a module is not a file of the folder itself.
        OSError: if one is missing.
    """
    from transformers.dynamic_module_utils import get_relative_imports

    waiting: dict[str, str] = {}  # names of files, and what named them
    for config in configs:
        # Of an image processor's file, the fields that describe the processing are not listed anywhere.
        pipelines = {name: value for name, value in config.items() if name == "custom_pipelines"}
        for name, value in (foreign_fields(config) if "model_type" in config else pipelines).items():
            if value is not None:
                raise ValueError(f"{folder}: {name} is {value!s:.40}, which may choose code; remove it from the file")
        auto_map = config.get("auto_map") or {}
        if not isinstance(auto_map, dict) or not all(isinstance(each, str) for each in auto_map.values()):
            raise ValueError(
                f"{folder}: auto_map is {auto_map!s:.40}; expected the module and class of each Auto class"
            )
        if borrowed := next((each for each in auto_map.values() if "--" in each), None):
            raise ValueError(
                f"{folder}: auto_map names the code of another repository, {borrowed}, which may change under your "
                "users: save the model again (save_pretrained copies the code)"
            )
        for each in auto_map.values():
            if not re.fullmatch(r"\w+\.\w+", each):
                raise ValueError(f"{folder}: auto_map names {each!r:.80}; expected the module and class, module.Class")
            waiting[f"{each.split('.')[0]}.py"] = f"auto_map names {each}"
    names: set[str] = set()
    while waiting:
        name, origin = waiting.popitem()
        if Path(name).name != name:
            raise ValueError(f"{folder} names the code {name!r}; expected a module in the folder itself")
        path = resolve_inside(folder, name)
        if not path.is_file():
            raise OSError(f"{folder} holds no {name}, but {origin}: save the model again")
        names.add(name)
        for module in get_relative_imports(path):
            if f"{module}.py" not in names:
                waiting[f"{module}.py"] = f"{name} imports it"
    return names


def _known_files(
    api: HfApi, repo_id: str, revision: str | None, model_type: str, replaced: Sequence[str]
) -> tuple[list[str] | None, bool]:
    """Look at what is published already.

    Returns:
        names of the files, None if there is no such repository; and True if it has a card that somebody edited.

    Raises:
        ValueError: if it holds another network, or a file to be replaced that somebody else wrote.
    """
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None, False
    if revision is not None and any(branch.name == revision for branch in api.list_repo_refs(repo_id).branches):
        info = api.model_info(repo_id, revision=revision)
    names = [file.rfilename for file in info.siblings or ()]
    with TemporaryDirectory() as cache:

        def read(name: str) -> str:
            path = api.hf_hub_download(repo_id, name, revision=info.sha, cache_dir=cache)
            return Path(path).read_text(encoding="utf-8", errors="replace")

        try:
            other = json.loads(read("config.json")).get("model_type")
        except EntryNotFoundError:
            other = model_type
        if other != model_type:
            raise ValueError(
                f"{repo_id} exists and holds a model of type {other!r}; expected {model_type!r}: give another name"
            )
        for name in replaced:
            if name in names and not is_own(read(name)):
                raise ValueError(
                    f"{repo_id} holds a {name} of its own, which a push would replace; give --without-handler "
                    "(with_handler=False) to keep it, or delete it there"
                )
        return names, _CARD in names and is_edited_text(read(_CARD))


def _outdated(known: list[str], files: dict[str, bytes | str], handler: Sequence[str]) -> list[str]:
    """Name the published files of an earlier model that would be taken for this one's."""
    outdated = [name for name in known if name in _MEASURED or name.startswith("model.safetensors.index")]
    outdated += [name for name in known if name.startswith("model") and name.endswith(".safetensors")]
    outdated += [name for name in known if name.startswith("examples/") or _OF_RUNS.match(name)]
    outdated += [name for name in known if name in (ENSEMBLE_FILE, *RECORDS)]
    outdated += [name for name in known if name in handler]
    if ENSEMBLE_FILE in files:  # a single model's would be taken for the whole
        outdated += [name for name in known if name in ("config.json", "preprocessor_config.json")]
    return sorted(set(outdated) - files.keys())


@contextmanager
def _created(api: HfApi, repo_id: str, private: bool, revision: str | None, exists: bool) -> Iterator[None]:
    """Create the repository and the branch where they do not exist, and delete them again if the block fails."""
    branch = revision if revision not in (None, "main") else None
    created_branch = False
    if not exists:
        api.create_repo(repo_id, private=private)
    try:
        if branch and not any(known.name == branch for known in api.list_repo_refs(repo_id).branches):
            api.create_branch(repo_id, branch=branch)
            created_branch = True
        yield
    except BaseException:
        with suppress(Exception):  # the error that led here is the one to report
            if not exists:
                api.delete_repo(repo_id)
            elif created_branch and branch:
                api.delete_branch(repo_id, branch=branch)
        raise


@contextmanager
def one_line_errors(repo_id: str, so_far: str = "nothing was published") -> Iterator[None]:
    """Turn errors of the Hub's client into an OSError of one sentence, with the remedy.

    Args:
        repo_id: the repository to be written.
        so_far: beginning of the sentence.
    """
    try:
        yield
    except (HfHubHTTPError, HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
        # The client wraps errors that occur while it uploads a file.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if isinstance(cause, HfHubHTTPError):
            raise OSError(f"{so_far}, {_refusal(cause, repo_id)}") from error
        if isinstance(cause, HTTPError | OSError):
            reason = str(cause) or type(cause).__name__
            raise OSError(f"{so_far}, the Hub at {constants.ENDPOINT} cannot be reached: {reason}") from error
        raise


def _refusal(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status == 401:
        return "the Hub rejects the access token: sign in again by `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the access token has no right to write to {repo_id}: check the owner's name and the token's rights"
    if status == 409:
        return f"{repo_id} exists already, or was created at this moment by somebody else"
    return f"the Hub answered {status}, {error.server_message or error.response.reason_phrase}; try again later"


__all__ = ["checked_files", "one_line_errors", "push_folder"]
