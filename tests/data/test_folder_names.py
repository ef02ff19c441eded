"""The walk through the folder of a data set: what is below, by name, with links to folders and without circles."""

import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from hf_segformer.data.folder_names import list_images, walk_folders
from hf_segformer.data.pairing import find_images, pair_images_and_masks
from hf_segformer.data.sources import find_inputs


@pytest.fixture
def tree(tmp_path):
    """Images in `data`, below it and in a folder elsewhere that `data/linked` leads to, and circles of links."""
    for name in ("data/b.png", "data/a/c.png", "data/a/.hidden.png", "data/.hidden/d.png", "away/deep/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 6)).save(tmp_path / name)
    (tmp_path / "data" / "linked").symlink_to("../away")
    (tmp_path / "data" / "a" / "up").symlink_to("..")
    (tmp_path / "away" / "deep" / "back").symlink_to("../../data/a")
    return tmp_path / "data"


def test_links_are_followed_once_and_circles_end(tree):
    found = {here.relative_to(tree).as_posix(): names for here, names in walk_folders(tree)}
    assert found == {
        ".": ["b.png"],
        "a": ["c.png"],
        "linked": [],
        "linked/deep": ["e.png"],
        "linked/deep/back": ["c.png"],  # another path to the same folder, and no circle
    }
    assert list(found) == sorted(found)
    assert [here for here, _ in walk_folders(tree, 1)] == [tree, tree / "a", tree / "linked"]
    assert list_images(tree) == {folder: names for folder, names in found.items() if names}


def test_two_links_to_one_folder_are_both_followed(tmp_path):
    (tmp_path / "own").mkdir()
    Image.new("L", (8, 6)).save(tmp_path / "own" / "a.png")
    (tmp_path / "data").mkdir()
    for name in ("first", "second"):
        (tmp_path / "data" / name).symlink_to("../own")
    assert [path.parent.name for path in find_images(tmp_path / "data")] == ["first", "second"]


def test_images_are_found_in_the_order_of_their_paths(tree):
    (tree / "a-b").mkdir()
    Image.new("L", (8, 6)).save(tree / "a-b" / "f.png")
    names = ["a/c.png", "a-b/f.png", "b.png", "linked/deep/back/c.png", "linked/deep/e.png"]
    assert find_images(tree) == sorted(tree / name for name in names) == [tree / name for name in names]


def test_images_of_a_linked_folder_are_paired(tmp_path, monkeypatch):
    for name in ("images/own/x.png", "away/images/y.png", "masks/own/x.png", "away/masks/y.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("L", (8, 6)).save(tmp_path / name)
    for kind in ("images", "masks"):
        (tmp_path / kind / "linked").symlink_to(f"../away/{kind}")
    monkeypatch.chdir(tmp_path)
    rows = pair_images_and_masks(Path("images"), Path("masks"))
    assert list(rows["image"]) == ["images/linked/y.png", "images/own/x.png"]
    assert list(rows["label"]) == ["masks/linked/y.png", "masks/own/x.png"]


def test_prediction_finds_what_training_finds(tree, tmp_path):
    skipped = Counter()
    (tree / "notes.txt").write_text("")
    (tree / "out").mkdir()
    Image.new("L", (8, 6)).save(tree / "out" / "result.png")
    (tree / "away_out").symlink_to("out")
    found = find_inputs([str(tree)], tree / "out", skipped=skipped)
    assert [item.name for item in found] == ["a/c", "b", "linked/deep/back/c", "linked/deep/e"]
    assert skipped == {".txt": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_named(tree):
    (tree / "a").chmod(0)
    with pytest.raises(OSError, match="data/a"):
        list_images(tree)
    (tree / "a").chmod(0o700)


class TestSplitLists:
    @pytest.fixture
    def folders(self, tmp_path):
        for folder, suffix in (("images", ".jpg"), ("masks", ".png")):
            (tmp_path / folder / "drive").mkdir(parents=True)
            for name in ("a", "b", "im 0", "im 1", "drive/c"):
                Image.new("L", (8, 6)).save(tmp_path / folder / f"{name}{suffix}")
        return tmp_path

    @pytest.mark.parametrize(
        ("content", "names"),
        [
            (b"a\nb\n", ["a", "b"]),
            (b"\xef\xbb\xbfa\r\nb\r\n\r\n", ["a", "b"]),  # as Windows writes it
            (b"a.jpg\ndrive/c.jpg\n", ["a", "drive/c"]),
            (b"a 1\nb -1\n", ["a", "b"]),
            (b"im 0\nim 1\n", ["im 0", "im 1"]),
        ],
    )
    def test_a_line_is_a_name_or_a_file(self, folders, content, names):
        (folders / "train.txt").write_bytes(content)
        pairs = pair_images_and_masks(folders / "images", folders / "masks", listed=folders / "train.txt")
        assert pairs["image"] == [str(folders / "images" / f"{name}.jpg") for name in names]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"a\nx\ny.jpg\n", r"train.txt lists x, which is no image in .*images \(2 such lines\)"),
            (b"a\nimages/a.jpg\n", r"train.txt lists images/a.jpg, which is no image in .*images$"),
            (b"a\na.jpg\n", "train.txt has a more than once"),
            (b"\n", "train.txt names no image; expected one in each line"),
            (b"\xff\xfe", "train.txt is not a text file"),
        ],
    )
    def test_what_is_not_there_is_named(self, folders, content, message):
        (folders / "train.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            pair_images_and_masks(folders / "images", folders / "masks", listed=folders / "train.txt")
