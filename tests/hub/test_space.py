"""`segformer push --with-space`: a model and its page as a Space, on a Hub of the loop-back interface."""

import importlib.util
import subprocess
import sys
from importlib.metadata import version

import pytest
from huggingface_hub import RepoCard

from tests.support.hub import SEGMENTATION, WITH_SPACE, assert_refused, run_command
from tests.support.hub_server import Blob, Repository
from tests.support.remote_code import Client, save

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")


@pytest.fixture
def folder(author, tmp_path):
    author(save, SEGMENTATION, str(tmp_path / "trained"))
    return str(tmp_path / "trained")


def space_of(hub, repo_id):
    return hub.repositories[f"spaces/{repo_id}"]


def test_the_page_is_published_beside_the_model_and_shows_just_that_revision(hub, author, folder):
    status, out, err = author(run_command, folder, "me/streets", WITH_SPACE)
    assert (status, err) == (0, "")
    oid = hub.repositories["me/streets"].branches["main"]
    assert f"the Space is {hub.url}/spaces/me/streets" in out
    files = {name: blob.content.decode() for name, blob in space_of(hub, "me/streets").files().items()}
    assert f'serve("me/streets", revision="{oid}", host="0.0.0.0", port=7860)' in files["app.py"]
    card = RepoCard(files["README.md"]).data.to_dict()
    assert (card["sdk"], card["sdk_version"], card["app_file"]) == ("gradio", version("gradio"), "app.py")
    assert (card["models"], card["license"]) == (["me/streets"], "apache-2.0")
    assert card["python_version"] == "{}.{}".format(*sys.version_info)
    needed = files["requirements.txt"].splitlines()
    assert f"transformers=={version('transformers')}" in needed
    assert f"torch=={version('torch').split('+')[0]}" in needed
    assert not [line for line in needed if line.startswith(("gradio", "hf-segformer", "pytest"))]


@pytest.mark.slow
def test_the_space_runs_by_its_own_copy_of_the_package(hub, author, folder, tmp_path):
    """The Space's program runs here, without serving."""
    author(run_command, folder, "me/runs", WITH_SPACE)
    space = tmp_path / "space"
    for name, blob in space_of(hub, "me/runs").files().items():
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        (space / name).write_bytes(blob.content)
    code = (
        "import runpy, hf_segformer, hf_segformer.app.server as app\n"
        "print(hf_segformer.__file__)\n"
        "assert app.launch and app._wait_for_signal\n"
        "app.launch = lambda blocks, host, port: f'{host}:{port}'\n"
        "app._wait_for_signal = print\n"
        "runpy.run_path('app.py')\n"
    )
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=space, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0].startswith(str(space))
    assert "me/runs is at 0.0.0.0:7860" in ran.stdout


def test_a_second_push_is_a_new_revision_without_modules_that_are_gone(hub, author, folder):
    author(run_command, folder, "me/again", WITH_SPACE)
    space = space_of(hub, "me/again")
    space.commit("main", {**space.files(), "hf_segformer/old.py": Blob(b""), "notes.txt": Blob(b"mine")})
    author(run_command, folder, "me/again", WITH_SPACE)
    files = space_of(hub, "me/again").files()
    assert "hf_segformer/old.py" not in files
    assert "notes.txt" in files
    assert hub.repositories["me/again"].branches["main"] in files["app.py"].content.decode()


def test_a_private_model_has_a_private_page_and_a_word_on_its_secret(hub, author, folder):
    status, out, _ = author(run_command, folder, "me/secret", WITH_SPACE, "--private")
    assert status == 0
    assert "secret HF_TOKEN" in out
    assert space_of(hub, "me/secret").private
    assert "hf_me" not in "".join(
        blob.content.decode(errors="replace") for blob in space_of(hub, "me/secret").files().values()
    )


def test_a_model_that_is_private_or_gated_already_decides_for_its_page(hub, author, folder):
    for name in ("mine", "gated", "open"):
        author(run_command, folder, f"me/{name}")
    hub.repositories["me/mine"].private = hub.repositories["me/gated"].gated = True
    for name, private, needs_token in (("mine", True, True), ("gated", False, True), ("open", False, False)):
        status, out, _ = author(run_command, folder, f"me/{name}", WITH_SPACE)
        assert status == 0
        assert space_of(hub, f"me/{name}").private == private
        assert ("secret HF_TOKEN" in out) == needs_token


def test_names_that_yaml_takes_for_numbers_are_names(hub, author, folder):
    author(run_command, folder, "me/1.0", WITH_SPACE)
    assert RepoCard(space_of(hub, "me/1.0").files()["README.md"].content.decode()).data.to_dict()["title"] == "1.0"


def test_a_space_with_another_program_is_left_alone_and_nothing_published(hub, author, folder):
    hub.repositories["spaces/me/other"] = Repository("spaces/me/other")
    space_of(hub, "me/other").commit("main", {"app.py": Blob(b"print('mine')")})
    before = dict(space_of(hub, "me/other").branches)
    assert_refused(author, folder, "me/other", "Space me/other with another program", options=(WITH_SPACE,))
    assert space_of(hub, "me/other").branches == before
    assert "me/other" not in hub.repositories


def test_a_space_that_is_still_empty_is_filled(hub, author, folder):
    hub.repositories["spaces/me/empty"] = Repository("spaces/me/empty")
    assert author(run_command, folder, "me/empty", WITH_SPACE)[0] == 0
    assert "app.py" in space_of(hub, "me/empty").files()


@pytest.mark.parametrize("step", ["commit", "preupload"])
def test_a_failed_space_is_deleted_and_reported(step, hub, author, folder):
    repo_id = f"me/no-{step}"
    hub.fail(f"POST /api/spaces/.*/{step}/", 503, times=30)
    assert_refused(
        author, folder, repo_id, f"{repo_id} is published as", "its page is not", "503", options=(WITH_SPACE,)
    )
    assert hub.serve_all() < 30
    assert f"spaces/{repo_id}" not in hub.repositories
    assert "model.safetensors" in hub.repositories[repo_id].files()
    assert author(run_command, folder, repo_id, WITH_SPACE)[0] == 0
    assert "app.py" in space_of(hub, repo_id).files()


def test_a_page_that_was_there_stays_when_its_next_revision_fails(hub, author, folder):
    author(run_command, folder, "me/stays", WITH_SPACE)
    before = dict(space_of(hub, "me/stays").branches)
    hub.fail("POST /api/spaces/.*/commit/", 500, times=30)
    assert_refused(author, folder, "me/stays", "its page is not", options=(WITH_SPACE,))
    hub.serve_all()
    assert space_of(hub, "me/stays").branches == before


def test_a_failed_model_push_leaves_no_space(hub, author, folder):
    hub.fail("POST /api/models/.*/commit/", 503, times=30)
    assert_refused(author, folder, "me/nothing", "nothing was published", options=(WITH_SPACE,))
    assert hub.serve_all() < 30
    assert not {"me/nothing", "spaces/me/nothing"} & hub.repositories.keys()


def fetch(repo_id, revision=None):
    """Download the files of a repository's page; returns their names, or the error."""
    from hf_segformer.app.server import _fetched

    try:
        folder = _fetched(repo_id, revision)
    except OSError as error:
        return str(error)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_page_fetches_model_card_and_images_but_no_checkpoints(hub, author, folder):
    author(run_command, folder, "me/fetched")
    hub.repositories["me/fetched"].commit(
        "main",
        {
            **hub.repositories["me/fetched"].files(),
            "checkpoint-5/model.safetensors": Blob(b"large", is_lfs=True),
            "checkpoint-5/config.json": Blob(b"{}"),
            "assets/street.jpg": Blob(b"an image"),
            "examples/corner.png": Blob(b"an image"),
        },
    )
    images = ["assets/street.jpg", "examples/corner.png"]
    wanted = ["README.md", *images, "config.json", "model.safetensors", "preprocessor_config.json"]
    for revision in (None, hub.repositories["me/fetched"].branches["main"]):
        assert author(fetch, "me/fetched", revision) == sorted(wanted)


@pytest.mark.slow
def test_a_model_that_may_not_be_read_is_named_with_the_remedy(hub, author, folder, tmp_path):
    author(run_command, folder, "me/hidden", "--private")
    user = Client(tmp_path / "user", hub.url, has_plugin=True)
    try:
        message = user(fetch, "me/hidden", hub.repositories["me/hidden"].branches["main"])
    finally:
        user.close()
    assert "no accessible model me/hidden" in message
    assert "HF_TOKEN" in message
