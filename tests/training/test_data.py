"""Data: every source gives the same rows, every fault names its file, and the model's input can be drawn."""

import json
import pickle
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from hf_segformer import SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.config import AugmentationConfig, DataConfig
from hf_segformer.data import camvid, shapes
from hf_segformer.data import decoding as reader
from hf_segformer.data.label_mapping import LabelMapping
from hf_segformer.data.torch_datasets import EvalDataset, TrainDataset, TrainStream
from hf_segformer.training.data import load_data
from hf_segformer.training.data_checks import check_classes, check_data, format_counts, show_batch
from hf_segformer.visualization import overlay

NAMES = ["ground", "water", "tree"]
SIZE = (44, 60)  # height and width


@pytest.fixture(autouse=True)
def _quiet_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def labels_of(index, num_values=3):
    """Labels of a mask of blocks, different for each index; every value occurs."""
    blocks = (np.arange(20).reshape(4, 5) + index) % num_values
    return np.kron(blocks, np.ones((11, 12))).astype(np.uint8)


def image_of(labels):
    """An image whose pixels encode their labels."""
    return Image.fromarray(np.stack([labels * 20 + 10] * 3, axis=-1))


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def paired_folders(root, num_values=3, image_path="images/{}/p{}.png", mask_path="masks/{}/p{}.png"):
    """Two training images and one for evaluation, with masks."""
    for index, split in enumerate(("train", "train", "val")):
        labels = labels_of(index, num_values)
        save(root / image_path.format(split, index), image_of(labels))
        save(root / mask_path.format(split, index), Image.fromarray(labels))
    return root


def folders(root, **fields):
    return load_data(DataConfig("folders", root=str(root), **{"names": NAMES, **fields}))


def assert_rows_fit(rows, reduced=0):
    """Check that the pixels of every image encode its labels."""
    for row in rows:
        values = (np.asarray(row["image"].convert("RGB"))[..., 0].astype(int) - 10) // 20 - reduced
        np.testing.assert_array_equal(row["label"], values)


class TestFolders:
    def test_splits_in_sub_folders(self, tmp_path):
        data = folders(paired_folders(tmp_path))
        assert (len(data.train), len(data.evaluation)) == (2, 1)
        assert data.train.column_names == ["image", "label"]
        assert_rows_fit([*data.train, *data.evaluation])
        assert data.train[1]["label"].dtype == np.uint8

    def test_flat_folders_hold_a_share_out_and_the_seed_decides_which(self, tmp_path):
        for index in range(10):
            save(tmp_path / f"images/p{index}.jpg", image_of(labels_of(index)))
            save(tmp_path / f"masks/p{index}.png", Image.fromarray(labels_of(index)))

        def files(seed):
            data = folders(tmp_path, eval_share=0.3, seed=seed)
            return [
                {data.describe(split, index) for index in range(len(getattr(data, split)))}
                for split in ("train", "evaluation")
            ]

        train, evaluation = files(0)
        assert (len(train), len(evaluation)) == (7, 3)
        assert len({name.split()[0] for name in train | evaluation}) == 10
        assert files(0) == [train, evaluation] != files(1)

    def test_a_share_is_held_out_of_the_training_images_alone(self, tmp_path):
        paired_folders(tmp_path)
        words = (
            "data.eval_share is 0.5, but .* has images/val and masks/val: set data.eval_share=0 to evaluate on them, "
            "or data.image_folder=images/train data.mask_folder=masks/train to divide the training images again"
        )
        with pytest.raises(ValueError, match=words):
            folders(tmp_path, eval_share=0.5)
        for fields in ({"image_folder": "images/train", "mask_folder": "masks/train"}, {}):
            data = folders(tmp_path, eval_share=0.5, **fields)
            assert {Path(data.describe(split, 0).split()[0]).stem for split in ("train", "evaluation")} == {"p0", "p1"}
            for kind in ("images", "masks") if fields else ():
                (tmp_path / kind / "val").rename(tmp_path / kind / "others")

    @pytest.mark.parametrize(
        ("image_path", "mask_path", "fields"),
        [
            (
                "{}/images/p{}.png",
                "{}/masks/p{}.png",
                {"image_folder": "{split}/images", "mask_folder": "{split}/masks"},
            ),
            (
                "left/{}/town/p{}_left.png",
                "fine/{}/town/p{}_ids.png",
                {
                    "image_folder": "left",
                    "mask_folder": "fine",
                    "image_suffix": "_left.png",
                    "mask_suffix": "_ids.png",
                },
            ),
            (
                "{}/p{}.png",
                "{}/p{}_mask.png",
                {
                    "image_folder": "{split}",
                    "mask_folder": "{split}",
                    "image_suffix": ".png",
                    "mask_suffix": "_mask.png",
                },
            ),
        ],
        ids=["split first", "suffixes and sub-folders", "one folder"],
    )
    def test_other_layouts(self, tmp_path, image_path, mask_path, fields):
        paired_folders(tmp_path, image_path=image_path, mask_path=mask_path)
        if "town" in mask_path:
            save(tmp_path / "fine/train/town/p0_color.png", Image.new("RGB", (3, 3)))
        data = folders(tmp_path, **fields)
        assert (len(data.train), len(data.evaluation)) == (2, 1)
        assert_rows_fit([*data.train, *data.evaluation])

    def test_a_selection_is_spread_over_the_split(self, tmp_path):
        for index in range(5):
            save(tmp_path / f"images/train/p{index}.png", image_of(labels_of(index)))
            save(tmp_path / f"masks/train/p{index}.png", Image.fromarray(labels_of(index)))
        save(tmp_path / "images/val/v.png", image_of(labels_of(7)))
        save(tmp_path / "masks/val/v.png", Image.fromarray(labels_of(7)))
        data = folders(tmp_path, num_train=2)
        assert [Path(data.describe("train", index).split()[0]).stem for index in (0, 1)] == ["p0", "p4"]

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (
                lambda root: (root / "masks/train/p1.png").unlink(),
                r"images/train/p1.png has no mask; expected .*masks/train/p1",
            ),
            (
                lambda root: (root / "images/train/p1.png").unlink(),
                r"masks/train/p1.png has no image; expected .*images/train/p1",
            ),
            (
                lambda root: save(root / "images/train/p1.jpg", Image.new("RGB", (3, 3))),
                "p1.jpg and p1.png share one name",
            ),
            (lambda root: (root / "masks").rename(root / "labels"), "there is no folder .*masks/train"),
            (lambda root: (root / "images/val/p2.png").rename(root / "images/val/p2.txt"), "holds no images"),
        ],
    )
    def test_a_file_without_partner_is_named(self, tmp_path, spoil, message):
        spoil(paired_folders(tmp_path))
        with pytest.raises((ValueError, OSError), match=message):
            folders(tmp_path)

    def test_more_images_than_there_are_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match=r"data.num_train is 9; expected at most the images of 'train', 2"):
            folders(paired_folders(tmp_path), num_train=9)

    def test_a_share_that_leaves_nothing_to_train_on_is_an_error(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"data.eval_share is 0.9 of the 2 images .*; expected a share that leaves some"
        ):
            folders(paired_folders(tmp_path), eval_share=0.9, image_folder="images/train", mask_folder="masks/train")


class TestLabels:
    @pytest.mark.parametrize("source", ["folders", "imagefolder"])
    def test_palette_masks_keep_their_ids_whatever_their_colours(self, tmp_path, source):
        lines = []
        for index in range(2):
            mask = Image.fromarray(labels_of(index), "P")
            mask.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 0])
            save(tmp_path / f"images/p{index}.png", image_of(labels_of(index)))
            save(tmp_path / f"masks/p{index}.png", mask)
            lines.append({"image_file_name": f"images/p{index}.png", "label_file_name": f"masks/p{index}.png"})
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        data = load_data(DataConfig(source, root=str(tmp_path), names=NAMES, eval_share=0.5))
        assert_rows_fit([*data.train, *data.evaluation])

    def test_reduced_labels_are_one_less_and_0_is_ignored(self, tmp_path):
        data = folders(paired_folders(tmp_path, num_values=4), reduce_labels=True)
        raw = labels_of(0, 4)
        np.testing.assert_array_equal(data.train[0]["label"], np.where(raw == 0, 255, raw - 1.0))
        assert data.processor.do_reduce_labels is False

    def test_ignored_values_become_255(self, tmp_path):
        data = folders(paired_folders(tmp_path, num_values=5), ignore_values=[3, 4])
        raw = labels_of(0, 5)
        np.testing.assert_array_equal(data.train[0]["label"], np.where(raw > 2, 255, raw))

    def test_label_values_map_any_values_even_255(self):
        rule = LabelMapping((7, 255, 1000), (0,))
        assert rule.apply(np.array([[7, 255, 1000, 0]], dtype=np.uint16), "map").tolist() == [[0, 1, 2, 255]]

    def test_one_class_has_two_labels(self, tmp_path):
        data = folders(paired_folders(tmp_path, num_values=2), names=["water"])
        counts = check_data(data, 1)
        assert counts.shape == (2, 3)
        assert (counts[:, :2] > 0).all()
        assert "not water" in format_counts(counts, data.names)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int32])
    def test_an_unknown_label_is_refused_with_the_expected_ones(self, dtype):
        with pytest.raises(ValueError, match=r"^map holds 3, 77; expected the classes 0 to 2, or 11, 255 for ignored"):
            LabelMapping((0, 1, 2), (11,)).apply(np.array([[0, 77, 3, 11, 255]], dtype=dtype), "map")

    def test_large_and_negative_values_are_unknown_labels(self):
        with pytest.raises(ValueError, match="map holds -1, 256, 65535; expected"):
            LabelMapping((0, 1)).apply(np.array([[-1, 256, 65535, 1]]), "map")

    def test_256_is_not_ignored_with_reduced_labels(self):
        with pytest.raises(ValueError, match="holds 256"):
            LabelMapping((1, 2, 3), (0,)).apply(np.array([[256]]), "map")


class TestClasses:
    def test_classes_json_beside_the_data(self, tmp_path):
        paired_folders(tmp_path)
        palette = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
        (tmp_path / "classes.json").write_text(json.dumps({"names": NAMES, "palette": palette}))
        data = folders(tmp_path, names=[])
        assert data.names == tuple(NAMES)
        assert data.palette == tuple(map(tuple, palette))

    def test_id2label_json_beside_the_data(self, tmp_path):
        paired_folders(tmp_path)
        (tmp_path / "id2label.json").write_text(json.dumps({"2": "tree", "0": "ground", "1": "water"}))
        data = folders(tmp_path, names=[])
        assert data.names == tuple(NAMES)
        assert len(set(data.palette)) == 3

    def test_the_recipe_wins(self, tmp_path):
        paired_folders(tmp_path)
        (tmp_path / "classes.json").write_text(json.dumps({"names": ["a", "b", "c"]}))
        data = folders(tmp_path, palette=[[0, 0, 0], [1, 1, 1], [2, 2, 2]])
        assert (data.names, data.palette[2]) == (tuple(NAMES), (2, 2, 2))

    def test_classes_without_names_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"the classes of .* have no names: set data.names, or put classes.json"):
            folders(paired_folders(tmp_path), names=[])

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("classes.json", "{", "classes.json cannot be read"),
            ("classes.json", '["a"]', "classes.json cannot be read"),
            ("classes.json", '{"names": ["a", "a"]}', "has a more than once"),
            ("classes.json", '{"names": [1]}', r"has names \[1\]"),
            ("classes.json", '{"names": ["a"], "palette": [[1, 2]]}', r"has \[1, 2\]; expected \[red, green, blue\]"),
            (
                "classes.json",
                '{"names": ["a"], "palette": [[1, 2, 3], [4, 5, 6]]}',
                "2 colours; expected one for each of the 1 classes",
            ),
            ("id2label.json", '{"0": "a", "2": "b"}', "id2label.json cannot be read .*'1'"),
        ],
    )
    def test_an_invalid_file_of_classes_is_named(self, tmp_path, file, content, message):
        paired_folders(tmp_path)
        (tmp_path / file).write_text(content)
        with pytest.raises(ValueError, match=message):
            folders(tmp_path, names=[])

    def test_a_checkpoint_with_the_same_classes_or_none_says_nothing(self):
        assert check_classes(NAMES, dict(enumerate(NAMES))) is None
        assert check_classes(NAMES, {str(index): f"LABEL_{index}" for index in range(3)}) is None

    def test_a_checkpoint_with_other_classes_of_the_same_number_is_refused_with_both_lists(self):
        with pytest.raises(ValueError, match=r"by other names: its a, b, c; the data's ground, water, tree\."):
            check_classes(NAMES, {0: "a", 1: "b", 2: "c"})
        with pytest.raises(ValueError, match="in another order"):
            check_classes(NAMES, {0: "water", 1: "ground", 2: "tree"})

    def test_another_number_is_a_fresh_head(self):
        assert "head is for 150 classes, the data have 3" in check_classes(NAMES, {i: f"LABEL_{i}" for i in range(150)})


class TestCamVid:
    def camvid(self, root):
        return paired_folders(root, 12, image_path="{}/f{}.png", mask_path="{}annot/f{}.png")

    @pytest.mark.parametrize("below", ["", "CamVid"])
    def test_index_11_is_ignored_and_all_else_kept_from_the_folder_or_its_parent(self, tmp_path, below):
        self.camvid(tmp_path / below)
        data = load_data(DataConfig("camvid", root=str(tmp_path)))
        assert (data.names, data.palette) == (camvid.NAMES, camvid.PALETTE)
        for index in (0, 1):
            raw = labels_of(index, 12)
            np.testing.assert_array_equal(data.train[index]["label"], np.where(raw == 11, 255, raw))

    def test_images_are_evaluated_at_their_own_scale_or_at_eval_size(self, tmp_path):
        self.camvid(tmp_path)
        for eval_size, shape in ((0, (3, 64, 64)), (88, (3, 96, 128))):
            data = load_data(DataConfig("camvid", root=str(tmp_path), eval_size=eval_size))
            sample = EvalDataset(data.evaluation, data.processor)[0]
            assert sample["pixel_values"].shape == shape
            assert sample["labels"].shape == SIZE

    def test_another_folder_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds neither train/ nor CamVid/train/"):
            load_data(DataConfig("camvid", root=str(tmp_path)))


@pytest.mark.parametrize(
    ("names", "words"),
    [(("tumor",), "background; expected some that show tumor"), (("soil", "road"), "soil; expected other classes")],
)
def test_images_without_any_class_are_told_by_what_they_show(tmp_path, names, words):
    """The label 0 is the background of a binary task, which has no name, and else the first class."""
    paired_folders(tmp_path, num_values=1)
    with pytest.raises(ValueError, match=f"training images show nothing but {words}$"):
        folders(tmp_path, names=names, max_background=0)


def test_shapes_are_what_is_drawn():
    data = load_data(DataConfig("shapes", image_size=32, num_train=2, num_eval=1, seed=3))
    image, labels = shapes.draw_sample(3, "train", 1, 32)
    assert np.array_equal(data.train[1]["image"], image)
    assert np.array_equal(data.train[1]["label"], labels)
    assert data.processor.do_resize is False
    assert data.describe("train", 1) == "train row 1"


def table(number, start=0, **columns):
    """A data set of images and 8-bit masks, with a column more."""
    labels = [labels_of(start + index) for index in range(number)]
    values = {
        "id": list(range(number)),
        "image": [image_of(values) for values in labels],
        "annotation": [Image.fromarray(values) for values in labels],
    }
    features = {"id": datasets.Value("int64"), "image": datasets.Image(), "annotation": datasets.Image()}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


@pytest.fixture
def parquet(tmp_path):
    folder = tmp_path / "parquet"
    folder.mkdir()
    table(6).to_parquet(folder / "train.parquet")
    table(2, 1).to_parquet(folder / "validation.parquet")
    return folder


def dataset(root, **fields):
    return load_data(DataConfig("dataset", root=str(root), **{"names": NAMES, "mask_column": "annotation", **fields}))


class TestDatasets:
    def test_a_folder_of_parquet_files(self, parquet):
        data = dataset(parquet, num_eval=1)
        assert (len(data.train), len(data.evaluation)) == (6, 1)
        assert data.train.column_names == ["image", "label"]
        assert_rows_fit([*data.train, *data.evaluation])

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_folder_of_save_to_disk(self, tmp_path, streaming):
        splits = {"train": table(3), "validation": table(2)}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
        data = dataset(tmp_path / "saved", streaming=streaming)
        assert_rows_fit([*data.train, *data.evaluation])

    def test_one_split_on_disk_holds_a_share_out(self, tmp_path):
        table(4).save_to_disk(tmp_path / "saved")
        data = dataset(tmp_path / "saved", eval_share=0.25)
        assert (len(data.train), len(data.evaluation)) == (3, 1)

    @pytest.mark.slow
    def test_a_stream_gives_the_same_rows_in_an_order_of_seed_and_epoch(self, parquet):
        data = dataset(parquet, streaming=True, seed=1)
        assert data.is_stream
        assert len(data.evaluation) == 2

        def keys():
            return [row["label"].tobytes() + np.asarray(row["image"]).tobytes() for row in data.train]

        first = keys()
        assert sorted(first) == sorted(
            row["label"].tobytes() + np.asarray(row["image"]).tobytes() for row in dataset(parquet).train
        )
        assert keys() == first
        data.train.set_epoch(1)
        assert len(keys()) == 6
        assert_rows_fit([*data.train, *data.evaluation])

    def test_a_stream_has_the_number_asked_for_in_a_pass(self, parquet):
        data = dataset(parquet, streaming=True, num_train=4)
        stream = TrainStream(data.train, AugmentationConfig(crop_size=32), data.processor)
        assert len(list(data.train)) == 4
        assert next(iter(stream))["pixel_values"].shape == (3, 32, 32)

    def test_streams_from_the_hub_name_files_by_address(self, monkeypatch):
        content = BytesIO()
        image_of(labels_of(0)).save(content, "PNG")
        opened = []
        download = lambda path: opened.append(path) or content.getvalue()  # noqa: E731
        monkeypatch.setattr("hf_segformer.data.reader_protocol._download", download)
        read = reader.RowReader(3, LabelMapping((0, 1, 2))).read
        address = "hf://datasets/me/streets@main/p.png"
        image, _ = read({"path": address, "bytes": None}, labels_of(0))
        assert np.array_equal(image, image_of(labels_of(0)))
        with pytest.raises((ValueError, OSError)):
            read({"path": "memory://p.png", "bytes": None}, labels_of(0))
        assert opened == [address]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_imagefolder_with_metadata(self, tmp_path, streaming):
        for split, indices in (("train", (0, 1)), ("validation", (2,))):
            lines = []
            for index in indices:
                save(tmp_path / split / f"p{index}.png", image_of(labels_of(index)))
                save(tmp_path / split / f"m{index}.png", Image.fromarray(labels_of(index)))
                lines.append(json.dumps({"image_file_name": f"p{index}.png", "label_file_name": f"m{index}.png"}))
            (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
        data = load_data(DataConfig("imagefolder", root=str(tmp_path), names=NAMES, streaming=streaming))
        assert_rows_fit([*data.train, *data.evaluation])
        assert len(data.evaluation) == 1
        if not streaming:
            assert data.describe("train", 1) == f"{tmp_path}/train/p1.png (train row 1)"

    def test_masks_of_class_labels_bring_their_names(self, tmp_path):
        feature = datasets.List(datasets.List(datasets.ClassLabel(names=NAMES)))
        rows = {"image": [image_of(labels_of(0))] * 3, "label": [labels_of(0).tolist()] * 3}
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
        data = load_data(DataConfig("dataset", root=str(tmp_path / "saved"), eval_share=0.4))
        assert data.names == tuple(NAMES)
        assert_rows_fit(data.train)

    def test_class_names_are_read_from_the_hub(self, tmp_path, parquet, monkeypatch):
        def download(repository, name, repo_type):
            assert (repository, repo_type) == ("owner/data", "dataset")
            if name == "classes.json":
                raise LocalEntryNotFoundError("not there")
            path = tmp_path / name
            path.write_text(json.dumps(dict(enumerate(NAMES))))
            return str(path)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        loaded = {"train": table(3), "validation": table(1)}
        monkeypatch.setattr(datasets, "load_dataset", lambda path, name, streaming: loaded)
        assert dataset("owner/data", names=[]).names == tuple(NAMES)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"mask_column": "mask"},
                "has no column 'mask'; expected one of 'id', 'image', 'annotation': set data.mask_column",
            ),
            ({"image_column": "id"}, "column 'id' of .* is Value; expected images"),
            ({"eval_split": "test"}, "data.eval_split is 'test'; expected one of .*, 'train', 'validation', or hold"),
            ({"train_split": "all"}, "data.train_split is 'all'; expected one of"),
            (
                {"num_eval": 9, "streaming": True},
                "data.num_eval is 9; expected at most the images of the evaluation stream, 2",
            ),
        ],
    )
    def test_a_missing_column_or_split_is_named_with_the_present_ones(self, parquet, fields, message):
        with pytest.raises(ValueError, match=message):
            dataset(parquet, **fields)

    def test_broken_metadata_is_one_error(self, tmp_path):
        save(tmp_path / "train" / "p.png", Image.new("RGB", (3, 3)))
        (tmp_path / "train" / "metadata.jsonl").write_text("{")
        with pytest.raises(ValueError, match=r"data.root=.* cannot be read"):
            load_data(DataConfig("imagefolder", root=str(tmp_path), names=NAMES))


def four_bands(folder, write):
    """Training images of four bands with masks, written by a function of path and (H, W, 4) array."""
    rng = np.random.default_rng(0)
    for index, split in enumerate(("train", "train", "val")):
        labels = labels_of(index)
        bands = np.stack([labels * 20, labels, 255 - labels, rng.integers(0, 255, SIZE)], axis=-1).astype(np.uint8)
        path = folder / "images" / split / f"p{index}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, bands)
        save(folder / "masks" / split / f"p{index}.png", Image.fromarray(labels))
    return DataConfig("folders", root=str(folder), names=NAMES)


BAND_FILES = {
    "npy of floats": lambda path, bands: np.save(f"{path}.npy", bands.transpose(2, 0, 1) / np.float32(1000)),
    "npy of bytes": lambda path, bands: np.save(f"{path}.npy", bands),
    "TIFF": lambda path, bands: Image.fromarray(bands).save(f"{path}.tif"),
    "PNG": lambda path, bands: Image.fromarray(bands).save(f"{path}.png"),
}


class TestBands:
    @pytest.mark.parametrize("write", BAND_FILES.values(), ids=BAND_FILES)
    def test_four_bands_go_from_files_to_a_loss(self, tmp_path, write, tiny_config):
        data = load_data(four_bands(tmp_path, write), num_channels=4)
        check_data(data, 3)
        train = TrainDataset(data.train, AugmentationConfig(crop_size=32, distortion=0), data.processor)
        samples = [train[0, index] for index in range(2)]
        model = SegFormerForSemanticSegmentation(tiny_config(num_channels=4, num_labels=3))
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        loss = model(**batch).loss
        loss.backward()
        assert loss.isfinite()
        assert EvalDataset(data.evaluation, data.processor)[0]["pixel_values"].shape == (4, 64, 64)

    def test_bands_are_normalised_by_mean_and_deviation_of_the_training_images(self, tmp_path):
        data = load_data(four_bands(tmp_path, BAND_FILES["npy of floats"]), num_channels=4)
        bands = np.concatenate([row["image"].reshape(4, -1) for row in data.train], axis=1).astype(np.float64)
        assert data.processor.image_mean == pytest.approx(bands.mean(1).tolist(), rel=1e-5)
        assert data.processor.image_std == pytest.approx(bands.std(1).tolist(), rel=1e-4)
        assert data.processor.do_rescale is False

    def test_another_number_of_bands_names_the_file(self, tmp_path):
        recipe = four_bands(tmp_path, BAND_FILES["npy of floats"])
        np.save(tmp_path / "images/val/p2.npy", np.zeros((5, *SIZE), dtype=np.float32))
        with pytest.raises(ValueError, match=r"images/val/p2.npy has 5 bands"):
            load_data(recipe, num_channels=4)

    def test_arrays_in_a_data_set_keep_their_type(self, tmp_path):
        rows = {
            "image": [np.full((4, *SIZE), index, dtype=np.uint8) for index in range(3)],
            "label": [labels_of(index) for index in range(3)],
        }
        features = datasets.Features(
            {"image": datasets.Array3D((4, *SIZE), "uint8"), "label": datasets.Array2D(SIZE, "uint8")}
        )
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
        recipe = DataConfig("dataset", root=str(tmp_path / "saved"), names=NAMES, eval_share=0.3)
        row = load_data(recipe, num_channels=4).train[0]
        assert (row["image"].dtype, row["image"].shape) == (np.uint8, (4, *SIZE))


class TestCheck:
    def test_pixels_are_counted_by_class(self, tmp_path):
        data = folders(paired_folders(tmp_path, num_values=4), ignore_values=[3])
        expected = [np.zeros(4, dtype=int), np.zeros(4, dtype=int)]
        for index, row in enumerate((0, 0, 1)):
            expected[row] += np.bincount(labels_of(index, 4).ravel(), minlength=4)
        np.testing.assert_array_equal(check_data(data, 3), expected)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (
                lambda root: (root / "images/train/p1.png").write_bytes(b"no"),
                r"images/train/p1.png: cut off, or not an image",
            ),
            (
                lambda root: (root / "images/train/p1.png").write_bytes(
                    (root / "images/train/p1.png").read_bytes()[:150]
                ),
                r"images/train/p1.png",
            ),
            (
                lambda root: (root / "masks/train/p1.png").write_bytes(
                    (root / "masks/train/p1.png").read_bytes()[:-40]
                ),
                r"masks/train/p1.png",
            ),
            (lambda root: (root / "images/train/p1.png").unlink(), "cannot read .*images/train/p1.png: No such file"),
            (
                lambda root: save(root / "masks/train/p1.png", Image.new("L", (9, 8))),
                r"masks/train/p1.png is 8x9 \(height x width\); expected .* its image .*images/train/p1.png, 44x60",
            ),
            (
                lambda root: save(root / "masks/train/p1.png", Image.new("L", (60, 44), 77)),
                r"masks/train/p1.png holds 77; expected the classes 0 to 2, or 255 for ignored pixels",
            ),
            (
                lambda root: save(root / "masks/train/p1.png", Image.new("RGB", (60, 44))),
                r"masks/train/p1.png is a PIL image of mode RGB",
            ),
        ],
        ids=["not an image", "truncated image", "truncated mask", "missing", "size", "label", "colours"],
    )
    def test_a_fault_names_its_file_and_what_is_wrong(self, tmp_path, spoil, message):
        data = folders(paired_folders(tmp_path))
        spoil(tmp_path)
        with pytest.raises(ValueError, match=f"train row 1.*{message}"):
            check_data(data, 3)

    def test_faults_are_counted_and_the_first_named(self, tmp_path):
        for index in range(9):
            save(tmp_path / f"images/p{index}.png", image_of(labels_of(index)))
            save(tmp_path / f"masks/p{index}.png", Image.fromarray(labels_of(index)))
        data = folders(tmp_path, eval_share=0.2)
        for path in tmp_path.glob("masks/*"):
            path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"^9 images have faults: .*; and 4 more$") as caught:
            check_data(data, 3)
        assert len({word for word in str(caught.value).split() if "/masks/" in word}) == 5

    def test_an_image_in_both_splits_is_reported(self, tmp_path, capsys):
        paired_folders(tmp_path)
        (tmp_path / "images/val/p2.png").write_bytes((tmp_path / "images/train/p0.png").read_bytes())
        check_data(folders(tmp_path), 3)
        printed = capsys.readouterr().out
        assert "WARNING: 1 evaluation image is also in the training data: " in printed
        assert "val/p2.png (evaluation row 0) is the same as" in printed
        assert "train/p0.png (train row 0)" in printed

    def test_nothing_is_reported_for_different_images(self, tmp_path, capsys):
        check_data(folders(paired_folders(tmp_path)), 3)
        assert capsys.readouterr().out == ""

    def test_a_narrow_value_range_is_warned_of_and_applied(self, tmp_path, capsys):
        paired_folders(tmp_path)
        for path in tmp_path.glob("images/*/*"):
            save(path, Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16)[..., 0] * 20))
        check_data(folders(tmp_path), 3)
        printed = capsys.readouterr().out
        assert "WARNING: Images use values from 200 to 1000, 1.2 % of the range 0 to 65535" in printed
        assert 'data.value_range="200,1000"' in printed
        data = folders(tmp_path, value_range="200,1000")
        check_data(data, 3)
        assert "100.0 % of the range 200 to 1000." in capsys.readouterr().out
        assert data.processor.value_range == [200, 1000]
        sample = TrainDataset(data.train, AugmentationConfig(32, distortion=1.0), data.processor)[0, 0]
        show_batch([sample], data.names, data.palette, data.processor, tmp_path / "batch.png")
        assert sample["pixel_values"].max() > 1

    def test_images_that_exif_turns_alone_are_counted(self, tmp_path, capsys):
        paired_folders(tmp_path)
        exif = Image.Exif()
        exif[0x0112] = 3
        with Image.open(tmp_path / "images/train/p0.png") as image:
            image.load()
        image.save(tmp_path / "images/train/p0.png", exif=exif)
        check_data(folders(tmp_path), 3)
        printed = capsys.readouterr().out
        assert "1 image is turned by EXIF, but its mask is not: " in printed
        assert "p0.png" in printed
        assert "data.ignore_exif=true" in printed
        data = folders(tmp_path, ignore_exif=True)
        check_data(data, 3)
        assert capsys.readouterr().out == ""
        assert_rows_fit(data.train)

    def test_statistics_leave_out_no_data(self, tmp_path):
        tifffile = pytest.importorskip("tifffile")
        values = np.random.default_rng(0).random((3, *SIZE, 4)).astype(np.float32) + 1
        expected = values[:, :, 20:].reshape(-1, 4)
        values[:, :, :20] = -9999
        for index, split in enumerate(("train", "train", "val")):
            save(tmp_path / f"masks/{split}/p{index}.png", Image.fromarray(labels_of(index)))
            (tmp_path / f"images/{split}").mkdir(parents=True, exist_ok=True)
            layout = {"photometric": "minisblack", "planarconfig": "contig"}
            tags = [(42113, 2, 0, "-9999", True)]
            tifffile.imwrite(tmp_path / f"images/{split}/p{index}.tif", values[index], extratags=tags, **layout)
        data = load_data(DataConfig("folders", root=str(tmp_path), names=NAMES), num_channels=4)
        train = expected.reshape(3, -1, 4)[:2].reshape(-1, 4)
        np.testing.assert_allclose(data.processor.image_mean, train.mean(0), rtol=1e-5)
        np.testing.assert_allclose(data.processor.image_std, train.std(0), rtol=1e-4)
        assert (data.train[0]["label"][:, :20] == 255).all()
        assert check_data(data, 3)[0, 3] == 2 * 44 * 20

    def test_more_classes_than_a_byte_holds(self, tmp_path):
        paired_folders(tmp_path)
        for path in tmp_path.glob("masks/*/*"):
            save(path, Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) + 254))
        data = folders(tmp_path, names=[f"class {index}" for index in range(300)])
        counts = check_data(data, 300)
        assert counts.shape == (2, 301)
        assert (counts[:, 254:257] > 0).all()
        assert counts[:, -1].tolist() == [0, 0]
        assert data.processor.ignore_index == -100
        assert data.train[0]["label"].max() == 256

    def test_data_without_a_label_are_refused(self, tmp_path):
        paired_folders(tmp_path)
        with pytest.raises(ValueError, match="all pixels of train are ignored"):
            check_data(folders(tmp_path, ignore_values=[0, 1, 2]), 3)

    def test_binary_masks_of_0_and_255_get_the_remedy(self, tmp_path):
        paired_folders(tmp_path, num_values=2)
        for path in tmp_path.glob("masks/*/*"):
            save(path, Image.fromarray(np.asarray(Image.open(path)) * 255))
        with pytest.raises(ValueError, match=r"no pixel is 'water', and .*: set data.label_values=\[0, VALUE\]"):
            check_data(folders(tmp_path, names=["water"]), 1)
        assert (check_data(folders(tmp_path, names=["water"], label_values=[0, 255]), 1)[:, :2] > 0).all()

    def test_a_split_without_the_only_class_may_hold_ignored_pixels(self, tmp_path):
        """Healthy patients are held out, with a margin that was not annotated."""
        paired_folders(tmp_path, num_values=2)
        [mask] = tmp_path.glob("masks/val/*")
        save(mask, Image.fromarray(np.asarray(Image.open(mask)) * 255))
        [(train, lesion, _), (evaluation, none, ignored)] = check_data(folders(tmp_path, names=["lesion"]), 1)
        assert min(train, lesion, evaluation, ignored) > 0
        assert none == 0

    def test_the_first_samples_of_a_stream_are_checked(self, parquet, capsys, monkeypatch):
        monkeypatch.setattr("hf_segformer.training.data_checks._NUM_STREAMED", 2)
        counts = check_data(dataset(parquet, streaming=True), 3)
        assert counts.sum(axis=1).tolist() == [2 * 44 * 60, 2 * 44 * 60]
        assert "only the first 2 samples were checked" in capsys.readouterr().out

    def test_a_fault_in_a_stream_is_an_error(self, parquet):
        with pytest.raises(ValueError, match="holds 2; expected the classes 0, 1"):
            check_data(dataset(parquet, streaming=True, names=["a", "b"], num_eval=1), 2)


def test_rows_can_be_pickled(tmp_path):
    data = folders(paired_folders(tmp_path))
    assert_rows_fit(pickle.loads(pickle.dumps(data.train)))


class TestShowBatch:
    def test_the_figure_shows_the_input(self, tmp_path):
        labels = np.full((40, 60), 255)
        labels[:, :30] = 1
        processor = SegFormerImageProcessor(do_resize=False)
        pixels = processor(Image.new("RGB", (60, 40), (200, 100, 50)), return_tensors="pt").pixel_values[0]
        path = tmp_path / "batch.png"
        samples = [{"pixel_values": pixels, "labels": torch.from_numpy(labels)}]
        palette = [(1, 1, 1), (0, 0, 255), (2, 2, 2)]
        show_batch(samples, NAMES, palette, processor, path)
        with Image.open(path) as image:
            shown = np.asarray(image)
        colors = {tuple(color) for color in shown.reshape(-1, 3).tolist()}
        assert (200, 100, 50) in colors  # as it was before normalisation
        assert (0, 0, 255) in colors  # class 1
        assert overlay(Image.new("RGB", (1, 1), (200, 100, 50)), [[1]], palette).getpixel((0, 0)) in colors
        assert (28, 28, 30) in colors  # ignored

    def test_padding_is_hatched(self, tmp_path):
        labels, pixels = np.full((40, 60), 1), np.ones((3, 40, 60), dtype=np.float32)
        labels[:, 30:], pixels[:, :, 40:] = 255, 0
        processor = SegFormerImageProcessor(do_resize=False)
        shown = []
        for values in (pixels, np.where(pixels == 0, np.float32(1e-3), pixels)):
            show_batch(
                [{"pixel_values": values, "labels": labels}], NAMES, [(1, 1, 1)] * 3, processor, tmp_path / "b.png"
            )
            with Image.open(tmp_path / "b.png") as image:
                shown.append(np.asarray(image).astype(int))
        changed = np.flatnonzero((abs(shown[0] - shown[1]) > 8).any(axis=(0, 2)))
        _, width, _ = shown[0].shape
        assert changed.size
        assert width / 3 < changed.min() < changed.max() < 2 * width / 3  # in the second of three panels alone

    @pytest.mark.parametrize("num_channels", [1, 2, 4])
    def test_other_numbers_of_bands_and_a_single_class(self, tmp_path, num_channels):
        processor = SegFormerImageProcessor(image_mean=[0.0] * num_channels, image_std=[1.0] * num_channels)
        sample = {"pixel_values": torch.randn(num_channels, 32, 48), "labels": torch.ones(32, 48, dtype=torch.long)}
        show_batch([sample], ["water"], [(0, 0, 255)], processor, tmp_path / "batch.png")
        with Image.open(tmp_path / "batch.png") as image:
            assert (0, 0, 255) in {color for _, color in image.getcolors(1 << 20)}


class TestRecipe:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"source": "shape"}, "data.source is 'shape'; expected one of shapes, camvid"),
            ({"source": "folders"}, "data.root is not set"),
            ({"num_train": 0}, "data.num_train is 0; expected at least 1"),
            ({"num_eval": -1}, "data.num_eval is -1"),
            ({"image_size": 8}, "data.image_size is 8"),
            ({"seed": -1}, "data.seed is -1"),
            ({"eval_size": -1}, "data.eval_size is -1"),
            ({"source": "folders", "root": "r", "eval_share": 1.0}, "data.eval_share is 1.0"),
            ({"eval_share": 0.1}, "data.eval_share is set, but shapes"),
            ({"streaming": True}, "data.streaming is set for shapes; expected a source of imagefolder or dataset"),
            (
                {"source": "dataset", "root": "r", "streaming": True, "eval_share": 0.1},
                "nothing can be held out of a stream",
            ),
            ({"source": "folders", "root": "r", "eval_split": "val", "eval_share": 0.1}, "are both set"),
            (
                {"source": "folders", "root": "r", "eval_split": "train"},
                "data.eval_split is 'train', the training split; expected",
            ),
            ({"names": ["a", "b", "a"]}, "data.names has a more than once"),
            ({"value_range": "5"}, "data.value_range is '5'; expected LOW,HIGH"),
            ({"pages": True}, "data.pages is set, but data.source is shapes"),
            ({"palette": [[0, 0, 256]]}, r"data.palette has \[0, 0, 256\]"),
            (
                {"palette": [[0, 0, 0]], "names": ["a", "b"]},
                "data.palette has 1 colours; expected one for each of the 2 classes",
            ),
            ({"reduce_labels": True, "label_values": [0, 255]}, "are both set"),
            ({"label_values": [1, 1]}, "data.label_values has 1 more than once"),
            (
                {"label_values": [0, 255], "ignore_values": [0]},
                r"data.ignore_values has \[0\], which",
            ),
        ],
    )
    def test_wrong_values_are_named(self, fields, message):
        with pytest.raises(ValueError, match=message):
            DataConfig(**{"source": "shapes", "num_train": 1, "num_eval": 1, **fields})

    def test_label_values_are_one_for_each_class(self, tmp_path):
        with pytest.raises(ValueError, match=r"data.label_values has 2 entries; expected 3"):
            folders(paired_folders(tmp_path), label_values=[0, 255])

    @pytest.mark.parametrize(("source", "root"), [("folders", "gone"), ("dataset", "./gone"), ("dataset", "/a/b/c")])
    def test_a_missing_folder_is_named(self, source, root):
        with pytest.raises(FileNotFoundError, match=f"data.root is {root}, which does not exist"):
            DataConfig(source, root=root).check_root()

    def test_a_hub_repository_is_not_taken_for_a_folder(self):
        DataConfig("dataset", root="owner/name").check_root()

    @pytest.mark.slow
    def test_importing_the_options_imports_nothing_heavy(self):
        code = (
            "import runpy, sys; runpy.run_path('hf_segformer/config.py'); "
            "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
