"""Untrusted names: `resolve_inside` keeps each of them within its folder."""

import os

import pytest

from hf_segformer.files import resolve_inside


@pytest.fixture
def tree(tmp_path):
    """A model folder beside a secret file."""
    (tmp_path / "model" / "examples").mkdir(parents=True)
    (tmp_path / "model" / "a.png").write_bytes(b"a")
    (tmp_path / "secret").write_bytes(b"key")
    return tmp_path


@pytest.mark.parametrize("name", ["a.png", "examples/new.png", "./a.png", "..a.png", "examples/..png"])
def test_names_within_the_folder_are_kept(tree, name):
    assert resolve_inside(tree / "model", name) == tree / "model" / name


@pytest.mark.parametrize("name", ["", ".", "..", "../secret", "examples/../../secret", "examples/../a.png", "a\0.png"])
def test_names_that_go_up_are_refused(tree, name):
    with pytest.raises(ValueError, match="leads outside"):
        resolve_inside(tree / "model", name)


def test_absolute_names_are_refused(tree):
    for name in (str(tree / "secret"), str(tree / "model" / "a.png")):
        with pytest.raises(ValueError, match="leads outside"):
            resolve_inside(tree / "model", name)


@pytest.mark.parametrize(
    "name", [r"..\secret", r"examples\..\..\secret", r"\secret", r"C:\secret", r"\\host\share\secret", "C:/secret"]
)
def test_names_that_go_up_on_windows_are_refused_everywhere(tree, name):
    with pytest.raises(ValueError, match="leads outside"):
        resolve_inside(tree / "model", name)


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "../model2/a", "../../missing"])
def test_links_to_other_places_are_refused(tree, target):
    (tree / "model" / "link.png").symlink_to(target)
    with pytest.raises(ValueError, match="is a link to"):
        resolve_inside(tree / "model", "link.png")


def test_links_of_folders_and_chains_of_links_are_followed(tree):
    (tree / "model" / "up").symlink_to("..")
    (tree / "model" / "first").symlink_to("second")
    (tree / "model" / "second").symlink_to("../secret")
    for name in ("up/secret", "first"):
        with pytest.raises(ValueError, match="is a link to"):
            resolve_inside(tree / "model", name)


def test_links_within_the_folder_and_a_linked_folder_are_allowed(tree):
    (tree / "model" / "same.png").symlink_to("a.png")
    (tree / "alias").symlink_to("model")
    assert resolve_inside(tree / "alias", "same.png").read_bytes() == b"a"


def test_a_folder_whose_name_begins_alike_is_another(tree):
    (tree / "model-private").mkdir()
    (tree / "model" / "link").symlink_to("../model-private")
    with pytest.raises(ValueError, match="is a link to"):
        resolve_inside(tree / "model", "link")


@pytest.fixture
def snapshot(tmp_path):
    """A snapshot folder of the Hub's cache, with its blob folders."""
    folder = tmp_path / "hub" / "models--me--model" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (tmp_path / "hub" / "models--me--model" / "blobs").mkdir()
    (tmp_path / "hub" / "models--me--model" / "blobs" / ("a" * 64)).write_bytes(b"blob")
    (tmp_path / "hub" / "blobs" / "bb").mkdir(parents=True)
    (tmp_path / "hub" / "blobs" / "bb" / ("b" * 64)).write_bytes(b"shared")
    return folder


def test_the_hub_caches_own_links_are_allowed(snapshot):
    (snapshot / "a.png").symlink_to(f"../../blobs/{'a' * 64}")
    (snapshot.parents[1] / "blobs" / ("c" * 40)).symlink_to(f"../../blobs/bb/{'b' * 64}")
    (snapshot / "b.png").symlink_to(f"../../blobs/{'c' * 40}")
    assert resolve_inside(snapshot, "a.png").read_bytes() == b"blob"
    assert resolve_inside(snapshot, "b.png").read_bytes() == b"shared"


@pytest.mark.parametrize(
    "target", ["../../../secret", "../../blobs/../secret", "../../../models--you--private/blobs/" + "d" * 64]
)
def test_other_links_in_the_hub_cache_are_refused(snapshot, target):
    (snapshot / "a.png").symlink_to(target)
    with pytest.raises(ValueError, match="is a link to"):
        resolve_inside(snapshot, "a.png")


def test_a_blob_folder_that_is_itself_a_link_is_refused(snapshot):
    secrets = snapshot.parents[3] / "secrets"
    secrets.mkdir()
    (secrets / ("e" * 64)).write_bytes(b"key")
    blobs = snapshot.parents[1] / "blobs"
    os.rename(blobs, snapshot.parents[1] / "old")
    blobs.symlink_to(secrets)
    (snapshot / "a.png").symlink_to(f"../../blobs/{'e' * 64}")
    with pytest.raises(ValueError, match="is a link to"):
        resolve_inside(snapshot, "a.png")
