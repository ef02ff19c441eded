"""Run records leave out places on the machine, and names of its folders."""

import pytest

from hf_segformer.training.run_record import without_private


@pytest.mark.parametrize("key", ["model.checkpoint", "distill.teacher"])
def test_models_of_the_machine_are_left_out_and_those_of_the_hub_kept(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "client-x").mkdir()
    (tmp_path / "owner" / "here").mkdir(parents=True)
    table, _, name = key.partition(".")
    for source in ("client-x", "./client-x", str(tmp_path / "client-x"), "moved-away", "owner/here", "C:\\models\\x"):
        assert without_private({table: {name: source}}) == {}, source
    assert without_private({table: {name: "owner/there"}}) == {table: {name: "owner/there"}}


def test_other_values_without_a_path_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b0").mkdir()  # no reason to drop the name of a variant
    tables = {"model": {"variant": "b0"}, "data": {"mask_folder": "masks", "root": "secret"}, "trainer": {"seed": 1}}
    assert without_private(tables) == {
        "model": {"variant": "b0"},
        "data": {"mask_folder": "masks"},
        "trainer": {"seed": 1},
    }


@pytest.mark.parametrize("key", ["image_folder", "mask_folder", "split_file", "annotation_file"])
def test_folders_that_may_name_a_person_are_left_out(key, tmp_path, monkeypatch):
    """They lie below `data.root`, so that `owner/name` is a folder there, and no repository."""
    monkeypatch.chdir(tmp_path)
    for value in ("anna_schmidt/ct", "anna_schmidt", "anna_schmidt/images", "images/anna_schmidt", "/home/anna/images"):
        assert without_private({"data": {key: value}}) == {}, value
    for value in ("images/train", "JPEGImages", "valannot", "{split}_masks", "masks", "."):
        assert without_private({"data": {key: value}}) == {"data": {key: value}}, value
