"""Publication of a model's page as a Hugging Face Space: `segformer push --with-space`.

A Space brings its own copy of this package, so that it runs the author's version whether or not that can be installed
from anywhere, and pins the packages it needs to the versions that are installed here.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, SpaceInfo
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from packaging.requirements import Requirement

from ..conversion.ensembles import is_ensemble
from .model_folder import model_kind
from .push import checked_files, one_line_errors, push_folder

_PACKAGE = "hf_segformer"
_DISTRIBUTION = "hf-segformer"
_MARK = "made by `segformer push --with-space`"
_APP = '''"""The page of {repo_id}, {mark}."""

from hf_segformer.app.server import serve

serve("{repo_id}", revision="{oid}", host="0.0.0.0", port=7860)
'''
_README = """---
title: "{title}"
sdk: gradio
sdk_version: "{gradio}"
python_version: "{python}"
app_file: app.py
models:
- {repo_id}
license: apache-2.0
short_description: Drop an image, see its classes
---

The page of [{repo_id}](https://huggingface.co/{repo_id}), {mark}. It shows revision `{oid}`.
"""


def push_folder_with_space(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    with_handler: bool = True,
) -> tuple[CommitInfo, CommitInfo, bool]:
    """Publish a model's folder, and a Space of the same name that shows exactly this revision.

    Both are checked before anything is created. They are different repositories, so the Hub cannot take both in one
    step: where the second fails, the model stays, the Space is as it was, and the error says so.

    Args:
        folder: see `push.push_folder`.
        repo_id: `"owner/name"` of both; a Space that exists gets a new revision.
        private: create both as private. A new Space of a model that is private already is private in any case.
        revision: branch of the model's repository.
        token: with the right to write; by default the one that is signed in.
        with_handler: see `push_folder`.

    Returns:
        The model's commit, the Space's commit, and True if the Space needs a secret HF_TOKEN to read the model, which
        is private or gated.

    Raises:
        ValueError: see `push_folder`; or the model is not one for segmentation, or a Space of that name holds something
            else.
        OSError: see `push_folder`; or a package that the Space needs is not installed here.
    """
    checked_files(Path(folder), repo_id, token)
    if not is_ensemble(Path(folder)) and (kind := model_kind(Path(folder))) != "segmentation":
        raise ValueError(
            f"{folder} holds a model of the kind {kind}; expected segmentation for a Space: leave out --with-space"
        )
    space_files(repo_id, "")
    api = HfApi(token=token)
    with one_line_errors(repo_id):
        _known_space(api, repo_id)
    commit = push_folder(folder, repo_id, private=private, revision=revision, token=token, with_handler=with_handler)
    with one_line_errors(repo_id, f"{repo_id} is published as {commit.commit_url}, but its page is not"):
        model = api.model_info(repo_id)
        page = _push_space(api, repo_id, commit.oid, private=bool(private or model.private))
    return commit, page, bool(model.private or model.gated)


def space_files(repo_id: str, oid: str) -> dict[str, bytes]:
    """Collect the files of a Space by name: its card, the program, its requirements and this package's modules.

    Args:
        repo_id: of the model.
        oid: of the model's commit.

    Raises:
        OSError: if a package that the Space needs is not installed here.
    """
    values = {"repo_id": repo_id, "oid": oid, "mark": _MARK, "title": repo_id.split("/")[-1]}
    values |= {"gradio": _version("gradio", "app"), "python": "{}.{}".format(*sys.version_info)}
    package = Path(__file__).parents[1]
    modules = {f"{_PACKAGE}/{path.relative_to(package).as_posix()}": path for path in sorted(package.rglob("*.py"))}
    return {
        "README.md": _README.format(**values).encode(),
        "app.py": _APP.format(**values).encode(),
        "requirements.txt": "".join(f"{line}\n" for line in _requirements()).encode(),
        **{name: path.read_bytes() for name, path in modules.items()},
    }


def _requirements() -> list[str]:
    """List this package's requirements at the versions that are installed; Gradio comes with the Space."""
    try:
        needed = [Requirement(line) for line in requires(_DISTRIBUTION) or ()]
    except PackageNotFoundError as error:
        raise OSError(f"{_DISTRIBUTION} is not installed, so its requirements are unknown: pip install .") from error
    names = [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [f"{name}=={_version(name)}" for name in names]


def _version(name: str, extra: str | None = None) -> str:
    try:
        return version(name).split("+")[0]  # without the local part, such as +cpu, which not everybody can install
    except PackageNotFoundError as error:
        wanted = f"'{_DISTRIBUTION}[{extra}]'" if extra else name
        raise OSError(f"the Space needs {name}, which is not installed here: pip install {wanted}") from error


def _known_space(api: HfApi, repo_id: str) -> SpaceInfo | None:
    """Return the Space of that name, or None.

    Raises:
        ValueError: if it holds another program.
    """
    try:
        info = api.space_info(repo_id)
    except RepositoryNotFoundError:
        return None
    with TemporaryDirectory() as cache:
        try:
            path = api.hf_hub_download(repo_id, "app.py", repo_type="space", revision=info.sha, cache_dir=cache)
        except EntryNotFoundError:
            is_ours = {file.rfilename for file in info.siblings or ()} <= {".gitattributes", "README.md"}
        else:
            is_ours = _MARK in Path(path).read_text(encoding="utf-8", errors="replace")
    if not is_ours:
        raise ValueError(f"there is a Space {repo_id} with another program in it: give another name, or delete it")
    return info


def _push_space(api: HfApi, repo_id: str, oid: str, private: bool) -> CommitInfo:
    files, known = space_files(repo_id, oid), _known_space(api, repo_id)
    before = {file.rfilename for file in (known.siblings or ())} if known else set()
    outdated = sorted(name for name in before - files.keys() if name.startswith(f"{_PACKAGE}/"))
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    with _created(api, repo_id, private, exists=known is not None):
        return api.create_commit(
            repo_id,
            [*operations, *(CommitOperationDelete(name) for name in outdated)],
            commit_message=f"Show {repo_id} at {oid[:12]}",
            repo_type="space",
        )


@contextmanager
def _created(api: HfApi, repo_id: str, private: bool, exists: bool) -> Iterator[None]:
    """Create the Space if it does not exist, and delete it again if the block fails."""
    if not exists:
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private)
    try:
        yield
    except BaseException:
        if not exists:
            with suppress(Exception):  # the error that led here is the one to report
                api.delete_repo(repo_id, repo_type="space")
        raise


__all__ = ["push_folder_with_space", "space_files"]
