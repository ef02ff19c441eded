"""Example images: those that the card names, those in their folder, and none from anywhere else."""

import pytest
from PIL import Image

from hf_segformer.hub.examples import find_example_images


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "photos" / "photo.png")
    return tmp_path / "photos" / "photo.png"


def write_card(folder, front_matter):
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n# Mine\n")


def test_examples_are_the_images_that_the_card_names(photo):
    folder = photo.parent
    (folder / "outside.png").write_bytes(photo.read_bytes())
    (folder / "model").mkdir()
    (folder / "model" / "one.png").write_bytes(photo.read_bytes())
    write_card(
        folder / "model",
        "widget:\n"
        "- src: https://huggingface.co/me/streets/resolve/main/one.png\n  example_title: A street\n"
        "- src: https://example.org/foreign.png\n"
        "- src: missing.png\n"
        "- text: no image",
    )
    assert find_example_images(folder / "model") == [(folder / "model" / "one.png", "A street")]


def test_examples_without_a_widget_are_those_in_the_examples_folder(photo):
    folder = photo.parent
    assert find_example_images(folder) == []
    (folder / "examples").mkdir()
    for name in ("b.png", "a.jpg", "notes.txt"):
        (folder / "examples" / name).write_bytes(photo.read_bytes())
    assert [title for _, title in find_example_images(folder)] == ["a", "b"]


def test_a_broken_card_has_no_examples(tmp_path):
    write_card(tmp_path, "widget: [unclosed")
    assert find_example_images(tmp_path) == []


@pytest.mark.parametrize("src", ["../outside.png", "/etc/outside.png", "linked.png", "up/outside.png"])
def test_a_widget_that_leads_outside_is_refused_and_not_shown(src, photo, caplog):
    folder = photo.parent / "model"
    folder.mkdir()
    (photo.parent / "outside.png").write_bytes(photo.read_bytes())
    (folder / "linked.png").symlink_to("../outside.png")
    (folder / "up").symlink_to("..")
    write_card(folder, f"widget:\n- src: {src}")
    with pytest.raises(ValueError, match="outside"):
        find_example_images(folder)
    assert find_example_images(folder, skip_outside=True) == []
    assert "is not shown" in caplog.text


def test_an_examples_folder_that_is_or_holds_a_link_is_refused_and_not_shown(photo):
    folder = photo.parent / "model"
    (folder / "examples").mkdir(parents=True)
    (folder / "examples" / "key.png").symlink_to("/etc/hostname")
    (folder / "examples" / "own.png").write_bytes(photo.read_bytes())
    with pytest.raises(ValueError, match=r"key\.png.* is a link"):
        find_example_images(folder)
    assert [title for _, title in find_example_images(folder, skip_outside=True)] == ["own"]
    (photo.parent / "second").mkdir()
    (photo.parent / "second" / "examples").symlink_to(photo.parent)
    with pytest.raises(ValueError, match="is a link"):
        find_example_images(photo.parent / "second")
    assert find_example_images(photo.parent / "second", skip_outside=True) == []
