"""Images of object storage, from a loop-back server: the same images and names as those of a folder."""

import pickle
from io import BytesIO

import numpy as np
import pytest

from hf_segformer.cluster.storage import StorageSource
from hf_segformer.data.sources import FileSource
from tests.inference.test_predictor import make_image
from tests.support import object_storage


@pytest.fixture
def objects():
    found = {
        "noon/notes.txt": b"no image",
        "day/notes.txt": b"no image",
        "day/.hidden.png": b"",
        "night/0.png": b"cut off",
    }
    for name in ("0.png", "1.png", "below it/0.png"):
        content = BytesIO()
        make_image(40, 60, seed=len(found)).save(content, "PNG")
        found[f"day/{name}"] = content.getvalue()
    return found


@pytest.fixture(params=["s3", "file"])
def storage(request, objects, tmp_path):
    """A pattern of addresses, formatted with a path."""
    if request.param == "file":
        for key, content in objects.items():
            (tmp_path / "bucket" / key).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "bucket" / key).write_bytes(content)
        yield (tmp_path / "bucket").as_uri() + "/{}"
        return
    with object_storage.s3(objects) as pattern:
        yield pattern


def test_folders_of_storage_are_those_of_a_disk(storage, objects, tmp_path):
    for key, content in objects.items():
        (tmp_path / "disk" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "disk" / key).write_bytes(content)
    local = FileSource([str(tmp_path / "disk" / "day")], tmp_path / "out")
    source = pickle.loads(pickle.dumps(StorageSource([storage.format("day")])))
    assert [item.name for item in source.items()] == [item.name for item in local.items()] == ["0", "1", "below it/0"]
    assert source.skipped == local.skipped == {".txt": 1}
    for item, expected in zip(source.items(), local.items(), strict=True):
        assert source.kind(item) == "image"
        assert np.array_equal(np.asarray(source.read(item)), np.asarray(local.read(expected)))
        assert np.array_equal(np.asarray(source.read(item)), np.asarray(local.read(expected)))  # fetched again
        assert source.describe(item) == source.origin(item) == str(item.source)
        assert item.source.endswith(f"/day/{item.name}.png")
        assert "SECRET" not in item.source


def test_a_single_object_has_its_own_name(storage):
    source = StorageSource([storage.format("day/below%20it/0.png"), storage.format("day/1.png")])
    assert [item.name for item in source.items()] == ["0", "1"]
    assert source.items()[0].source.endswith("/day/below it/0.png")


def test_bad_images_and_missing_objects_are_named(storage, objects):
    source = StorageSource([storage.format("night")])
    [item] = source.items()
    with pytest.raises(OSError, match=r"/night/0.png: .*not an image") as error:
        source.read(item)
    assert "SECRET" not in str(error.value)
    gone = item._replace(source=item.source.replace("0.png", "1.png"))
    with pytest.raises(OSError, match=r"^cannot read \S+/night/1.png: ") as missing:
        source.kind(gone)
    assert "SECRET" not in str(missing.value)


@pytest.mark.parametrize("path", ["evening", "day/2.png"])
def test_what_does_not_exist_is_named(storage, path):
    with pytest.raises(FileNotFoundError, match=rf"^no such object or folder: \S+/{path}$") as error:
        StorageSource([storage.format(path)])
    assert "SECRET" not in str(error.value)


def test_two_objects_of_one_name_are_refused(storage):
    with pytest.raises(ValueError, match=r"/day/0.png and \S+/night/0.png would both be filed as 0: give their common"):
        StorageSource([storage.format("day"), storage.format("night")])
    assert len(StorageSource([storage.format("day"), storage.format("day/0.png")]).items()) == 3


def test_two_objects_of_one_name_in_one_folder_are_to_be_renamed(tmp_path):
    for name in ("0.png", "0.jpg"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="would both be filed as 0: rename one of them"):
        StorageSource([tmp_path.as_uri()])


def test_videos_of_storage_are_skipped_and_counted(storage_with_video):
    source = StorageSource([storage_with_video.format("day")])
    assert [item.name for item in source.items()] == ["0"]
    assert source.skipped == {".mp4": 1}
    with pytest.raises(ValueError, match=r"/day/film.MP4 is a video; expected images: predict it from a disk"):
        StorageSource([storage_with_video.format("day/film.MP4")])


@pytest.fixture
def storage_with_video(tmp_path):
    (tmp_path / "day").mkdir()
    make_image(8, 8).save(tmp_path / "day" / "0.png")
    (tmp_path / "day" / "film.MP4").write_bytes(b"")
    return tmp_path.as_uri() + "/{}"


def test_a_bucket_has_one_file_system(objects):
    with object_storage.s3(objects) as pattern:
        day, night = pattern.format("day"), pattern.format("night/0.png")
        with pytest.raises(
            ValueError, match=r"night/0.png has other keys or options than another address of s3://drives;"
        ):
            StorageSource([day, night.replace("SECRET", "OTHER")])
        assert len(StorageSource([day, pattern.format("day/1.png")]).items()) == 3


def test_a_folder_without_images_is_refused(storage, objects):
    with pytest.raises(ValueError, match=r"/noon holds no images \(.png, "):
        StorageSource([storage.format("day"), storage.format("noon")])


def test_an_address_that_cannot_be_parsed_keeps_its_keys():
    with pytest.raises(ValueError, match=r"^s3://bucket/a b cannot be parsed; expected s3://BUCKET/PATH") as error:
        StorageSource(["s3://KEY:SECRET@bucket/a b"])
    assert "SECRET" not in str(error.value)
    assert error.value.__cause__ is None
    with pytest.raises(ValueError, match="ftp://host/a is no address of object storage"):
        StorageSource(["ftp://host/a"])


def test_a_server_that_is_gone_is_one_line():
    with object_storage.s3({}) as pattern:
        address = pattern.format("day")
    with pytest.raises(OSError, match=r"^s3://drives/day cannot be listed: ") as error:
        StorageSource([address])
    assert "\n" not in str(error.value)
    assert "SECRET" not in str(error.value)
