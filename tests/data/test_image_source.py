"""Images for pre-training: folders, data sets and streams, with classes and without."""

import re
import shutil
from pathlib import Path

import datasets
import pytest
from PIL import Image

from hf_segformer.data.image_source import open_images
from hf_segformer.data.pretraining_config import ImageDataConfig
from hf_segformer.data.shapes import NAMES, draw_single
from tests.support.classes import CLASSES, image_classes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return image_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def config(root, **values):
    return ImageDataConfig("imagefolder", root=str(root), **values)


def dataset(root, **values):
    return ImageDataConfig("dataset", root=str(root), **values)


def test_folders_are_classes(root):
    images = open_images(config(root), is_labeled=True)
    assert images.names == CLASSES
    assert (len(images.train), len(images.evaluation)) == (12, 12)
    for row in images.train:
        assert set(row) == {"image", "label"}
        assert CLASSES[row["label"]] == Path(row["image"]).parent.name
    assert not images.is_stream


def test_without_classes_only_images_are_kept(root, tmp_path):
    images = open_images(config(root), is_labeled=False)
    assert images.train.column_names == ["image"]
    assert images.names == ()
    flat = tmp_path / "flat"
    flat.mkdir()
    for index in range(4):
        Image.new("RGB", (20, 20)).save(flat / f"{index}.png")
    images = open_images(config(flat, eval_share=0.25), is_labeled=False)
    assert (len(images.train), len(images.evaluation)) == (3, 1)
    with pytest.raises(ValueError, match=r"flat/\d\.png is in no class; .*set pretraining\.method=masked_images"):
        open_images(config(flat, eval_share=0.25), is_labeled=True)


def test_splits_that_are_not_used_are_known(root):
    assert open_images(config(root), is_labeled=True).unused == ()
    assert open_images(config(root, eval_share=0.5), is_labeled=True).unused == ("val",)
    assert open_images(dataset(root, eval_share=0.5), is_labeled=True).unused == ("validation",)


def test_words_in_file_names_are_no_splits(tmp_path):
    names = ("a", "b", "my_train_c", "test_d")  # of which `datasets` would drop the first two
    for name in names:
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.png")
    images = open_images(config(tmp_path, eval_share=0.25), is_labeled=False)
    found = [Path(row["image"]).stem for rows in (images.train, images.evaluation) for row in rows]
    assert sorted(found) == sorted(names)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_folder_without_a_split_is_refused(root, tmp_path, missing):
    copy = shutil.copytree(root, tmp_path / "copy")
    shutil.rmtree(copy / missing)
    with pytest.raises(ValueError, match=rf"has no folder {missing}.*data\.eval_share=0\.1"):
        open_images(config(copy), is_labeled=True)
    if missing == "val":  # other names are taken, too
        (copy / "train").rename(copy / "validation")
        shutil.copytree(copy / "validation", copy / "train")
        assert len(open_images(config(copy), is_labeled=True).evaluation) == 12


def test_a_class_of_evaluation_alone_is_named(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / "val" / "red").rename(copy / "val" / "pink")
    with pytest.raises(ValueError, match=r"the class 'pink' of .* none to train on: add some, or remove its folder"):
        open_images(config(copy), is_labeled=True)
    assert len(open_images(config(copy), is_labeled=False).evaluation) == 12


def test_a_class_whose_only_image_is_held_out_is_named(tmp_path):
    for name in ("many/0.png", "many/1.png", "many/2.png", "one/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    refused = 0
    for seed in range(8):
        half = config(tmp_path, eval_share=0.5, seed=seed)
        if "one" in [Path(row["image"]).parent.name for row in open_images(half, is_labeled=False).evaluation]:
            refused += 1
            with pytest.raises(ValueError, match=r"the class 'one' of .*: add images of it, or set another data\.seed"):
                open_images(half, is_labeled=True)
        else:
            assert open_images(half, is_labeled=True).names == ("many", "one")
    assert 0 < refused < 8


def test_one_image_outside_of_the_classes_is_named(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    for split in ("train", "val"):
        loose = copy / split / "loose.png"
        Image.new("RGB", (20, 20)).save(loose)
        assert len(open_images(config(copy), is_labeled=False).train) == 12 + (split == "train")
        with pytest.raises(ValueError, match=rf"{split}/loose\.png is in no class; expected a sub-folder"):
            open_images(config(copy), is_labeled=True)
        loose.unlink()


@pytest.mark.parametrize("name", ["metadata.jsonl", "train/metadata.csv", "val/red/metadata.parquet"])
@pytest.mark.parametrize("is_labeled", [True, False])
def test_metadata_that_would_not_be_read_are_refused(root, tmp_path, name, is_labeled):
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / name).write_text("")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is not read .*set data\.source=dataset, or remove"):
        open_images(config(copy), is_labeled=is_labeled)


@pytest.mark.parametrize("values", [{"train_split": "val"}, {"train_split": "."}, {"eval_split": "train/red"}])
def test_a_folder_in_both_splits_is_refused(root, values):
    with pytest.raises(ValueError, match=r"would be trained on, from .*neither in the other: .*data\.eval_share=0\.1"):
        open_images(config(root, **values), is_labeled=False)


def test_links_from_one_split_to_the_other_are_refused(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    shutil.rmtree(copy / "val" / "red")
    (copy / "val" / "red").symlink_to("../train/red")
    with pytest.raises(ValueError, match=r"the image .*train/red/red0\.png, and 3 more, would be trained on and eval"):
        open_images(config(copy), is_labeled=True)
    shutil.rmtree(copy / "val")
    (copy / "val").symlink_to("train")
    with pytest.raises(ValueError, match="expected two folders, neither in the other"):
        open_images(config(copy), is_labeled=True)
    with pytest.raises(ValueError, match="expected every image in one split: remove the links to it"):
        open_images(config(copy, train_split=".", eval_share=0.5), is_labeled=False)


def test_a_share_is_held_out_and_numbers_are_spread_over_the_classes(root):
    images = open_images(config(root, eval_share=0.5, num_train=3, num_eval=2), is_labeled=True)
    paths = [set(rows["image"]) for rows in (images.train, images.evaluation)]
    assert not paths[0] & paths[1]
    spread = open_images(config(root, num_train=3), is_labeled=True)
    assert {row["label"] for row in spread.train} == {0, 1, 2}


def test_a_stream_is_shuffled_and_its_evaluation_is_kept(root):
    images = open_images(dataset(root, streaming=True, num_eval=2), is_labeled=True)
    assert images.is_stream
    assert images.names == CLASSES
    labels = [row["label"] for row in images.train]
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    assert labels != sorted(labels)
    assert len(images.evaluation) == 2


def test_columns_of_other_names_are_taken(root, tmp_path):
    rows = open_images(dataset(root), is_labeled=True).train.rename_columns({"image": "photo", "label": "kind"})
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(str(tmp_path / "saved"))
    saved = ImageDataConfig(
        "dataset", root=str(tmp_path / "saved"), image_column="photo", label_column="kind", num_eval=2
    )
    images = open_images(saved, is_labeled=True)
    assert images.train.column_names == ["image", "label"]
    assert images.names == CLASSES


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_split": "training"}, r"data\.train_split is 'training'; expected one of .*'train', 'validation'"),
        ({"eval_split": "test"}, r"data\.eval_split is 'test'; .*or hold images out by data\.eval_share=0\.1"),
        ({"image_column": "photo"}, r"data\.image_column is 'photo', which is not there .*one of 'image', 'label'"),
        ({"image_column": "label"}, r"data\.image_column is 'label', which holds ClassLabel"),
        ({"label_column": "kind"}, r"data\.label_column is 'kind', missing"),
        ({"num_train": 13}, r"data\.num_train is 13; expected at most the images of 'train', 12"),
    ],
)
def test_what_does_not_fit_is_named(root, values, message):
    with pytest.raises(ValueError, match=message):
        open_images(dataset(root, **values), is_labeled=True)


def test_one_class_is_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["only"])})
    rows = datasets.Dataset.from_list([{"image": {"path": None, "bytes": b""}, "label": 0}] * 2, features=features)
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="has 1 class; expected at least 2"):
        open_images(ImageDataConfig("dataset", root=str(tmp_path / "saved")), is_labeled=True)


def test_numbers_without_names_are_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_list([{"image": {"path": None, "bytes": b""}, "label": 0}] * 2, features=features)
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=re.escape("which holds int64") + ".*class_encode_column"):
        open_images(ImageDataConfig("dataset", root=str(tmp_path)), is_labeled=True)


class TestSingleShapes:
    def test_every_class_occurs_and_a_sample_is_a_function_of_its_index(self):
        images = open_images(ImageDataConfig("shapes", image_size=32, num_train=60, num_eval=2), is_labeled=True)
        assert images.names == NAMES[1:]
        assert set(images.train["label"]) == set(range(6))
        again = open_images(ImageDataConfig("shapes", image_size=32, num_train=6, num_eval=2), is_labeled=True)
        assert again.train[5] == images.train[5]

    def test_the_shape_is_on_the_image(self):
        image, label = draw_single(0, "train", 3, 64)
        assert image.size == (64, 64)
        assert 0 <= label < 6
        labels = [draw_single(0, "train", index, 64)[1] for index in range(30)]
        assert labels == [draw_single(0, "train", index, 64)[1] for index in range(30)]
        other, _ = draw_single(1, "train", 3, 64)
        assert image.tobytes() != other.tobytes()
