"""Recognition of layouts: each way that data are laid out is found, and two ways are refused with both settings."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Image

from hf_segformer.config import DataConfig
from hf_segformer.data.labeled import open_source
from hf_segformer.data.layouts import recognize_layout
from hf_segformer.data.splits import check_disjoint
from tests.support.folders import image, mask, pairs

TRAIN, VAL = "ab", "cd"


def read(root, choices=None):
    """Names of the training and evaluation images and masks that the recognized tables read."""
    _, tables = recognize_layout(str(root), choices or {})
    source = open_source(DataConfig(**tables))
    return [
        {
            (Path(row["image"]).relative_to(root).as_posix(), Path(row["label"]).relative_to(root).as_posix())
            for row in rows
        }
        for rows in (source.train, source.evaluation)
    ]


def expected(images, masks, names):
    return {(images.format(name), masks.format(name)) for name in names}


SPLIT_LAYOUTS = [
    ("images/{split}/{{}}.jpg", "masks/{split}/{{}}.png"),
    ("Images/{split}/{{}}.jpg", "Annotations/{split}/{{}}.png"),
    ("{split}/images/{{}}.jpg", "{split}/masks/{{}}.png"),
    ("{split}/image/{{}}.png", "{split}/label/{{}}.tif"),
    ("{split}/{{}}.jpg", "{split}_masks/{{}}.png"),
    ("{split}/{{}}.png", "{split}annot/{{}}.png"),
    ("{split}_images/{{}}.jpg", "{split}_labels/{{}}_L.png"),
    ("{split}/{{}}_sat.jpg", "{split}/{{}}_mask.png"),
    ("{split}/{{}}.jpg", "{split}/{{}}.png"),
    ("imgs/{split}/film1/{{}}.png", "gt/{split}/film1/{{}}.png"),
    ("data/leftImg8bit/{split}/x/{{}}_leftImg8bit.png", "data/groundTruth/{split}/x/{{}}_gt.png"),
    ("{split}/{{}}.jpg", "{split}/masks/{{}}.png"),
    ("images/{split}/{{}}.jpg", "masks/mask_{{}}.png"),
    ("images/{{}}.jpg", "masks/{split}/{{}}.png"),
    ("{split}/images/img_{{}}.jpg", "labels/gt_{{}}.png"),
    ("{split}/{{}}/image.png", "{split}/{{}}/mask.png"),
    ("data/stage1_{split}/{{0}}/images/{{0}}.png", "data/stage1_{split}/{{0}}/masks/{{0}}.png"),
]


@pytest.mark.parametrize(("images", "masks"), SPLIT_LAYOUTS)
@pytest.mark.parametrize("splits", [("train", "val"), ("training", "validation"), ("train", "test")])
def test_paired_folders_with_splits_are_found(tmp_path, images, masks, splits):
    (tmp_path / "readme.md").touch()
    for split, names in zip(splits, (TRAIN, VAL), strict=True):
        pairs(tmp_path, images.format(split=split), masks.format(split=split), names)
    found = read(tmp_path)
    for split, names, rows in zip(splits, (TRAIN, VAL), found, strict=True):
        assert rows == expected(images.format(split=split), masks.format(split=split), names)


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images/{}.jpg", "masks/{}.png"),
        ("images/{}.jpg", "masks/{}_mask.png"),
        ("image/x/{}.jpg", "label/x/{}.png"),
        ("{}.jpg", "{}.png"),
        ("{}.jpg", "{}_mask.png"),
        ("{}_image.png", "{}_seg.png"),
        ("{}.jpg", "masks/{}.png"),
        ("rgb/{}.tif", "gts/{}.png"),
        ("images/{}.jpg", "masks/mask_{}.png"),
        ("images/img_{}.jpg", "masks/label_{}.png"),
        ("images/film1/img_{}.jpg", "masks/film1/{}_gt.png"),
        ("{}.png", "mask_{}.png"),
        ("img_{}.png", "gt_{}.png"),
        ("image1{}.png", "mask1{}.png"),
        ("{}/image.png", "{}/mask.png"),
        ("img_{}/img.jpg", "img_{}/label.png"),
        ("scans/{}/images/scan.png", "scans/{}/masks/seg.png"),
        ("images/{}/image.png", "masks/{}.png"),
    ],
)
def test_folders_without_splits_hold_images_out(tmp_path, images, masks):
    pairs(tmp_path, images, masks, "abcdefghij")
    train, evaluation = read(tmp_path)
    assert train | evaluation == expected(images, masks, "abcdefghij")
    assert len(evaluation) == 1
    _reading, tables = recognize_layout(str(tmp_path), {})
    assert tables["eval_share"] == 0.1
    assert recognize_layout(str(tmp_path), {"eval_share": 0.5})[1]["eval_share"] == 0.5


def test_masks_of_training_alone_are_enough(tmp_path):
    pairs(tmp_path, "train/images/{}.jpg", "train/masks/{}.png", "abcd")
    image(tmp_path / "test" / "images" / "z.jpg")
    train, evaluation = read(tmp_path)
    assert {name for name, _ in train | evaluation} == {f"train/images/{name}.jpg" for name in "abcd"}


def test_camvid_is_found_within_a_folder(tmp_path):
    for split in ("train", "val", "test"):
        pairs(tmp_path, f"CamVid/{split}/{{}}.png", f"CamVid/{split}annot/{{}}.png")
    (tmp_path / "README.md").touch()
    reading, tables = recognize_layout(str(tmp_path), {})
    assert reading.layout == "CamVid"
    assert tables == {"root": str(tmp_path / "CamVid"), "source": "camvid"}
    assert "test/" in " ".join(reading.notes)
    _, tables = recognize_layout(str(tmp_path), {"source": "folders", "eval_split": "val"})
    assert (tables["image_folder"], tables["mask_folder"]) == ("{split}", "{split}annot")


def test_camvid_with_classes_of_its_own_is_a_pair_of_folders(tmp_path):
    for split in ("train", "val"):
        pairs(tmp_path, f"{split}/{{}}.png", f"{split}annot/{{}}.png")
    (tmp_path / "classes.json").write_text('{"names": ["a", "b", "c"]}')
    assert recognize_layout(str(tmp_path), {})[1]["source"] == "folders"


@pytest.mark.parametrize("kind", ["labelTrainIds", "labelIds"])
def test_cityscapes_takes_train_ids_before_label_ids(tmp_path, kind):
    for split in ("train", "val", "test"):
        image(tmp_path / f"leftImg8bit/{split}/aachen/aachen_0_leftImg8bit.png")
        for name in {"labelIds", "instanceIds", "color", kind}:
            mask(tmp_path / f"gtFine/{split}/aachen/aachen_0_gtFine_{name}.png")
    reading, tables = recognize_layout(str(tmp_path), {})
    assert reading.layout == "Cityscapes"
    assert tables["mask_suffix"] == f"_gtFine_{kind}.png"
    train, evaluation = read(tmp_path)
    assert {label for _, label in train} == {f"gtFine/train/aachen/aachen_0_gtFine_{kind}.png"}
    assert len(evaluation) == 1
    if kind == "labelIds":
        # https://github.com/mcordts/cityscapesScripts, helpers/labels.py: trainId -> id
        ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
        assert tables["label_values"] == ids
        assert sorted(tables["label_values"] + tables["ignore_values"]) == list(range(-1, 34))


def test_ade20k_reduces_labels_and_reads_its_names(tmp_path):
    for split, names in (("training", "ab"), ("validation", "c")):
        pairs(tmp_path / "ADEChallengeData2016", f"images/{split}/{{}}.jpg", f"annotations/{split}/{{}}.png", names)
    head = "Idx\tRatio\tTrain\tVal\tName"
    texts = ["wall", "screen, crt", "screen, door", *(f"thing {number}, thingy" for number in range(147))]
    lines = [f"{number}\t0.1\t1\t1\t{text}" for number, text in enumerate(texts, 1)]
    (tmp_path / "ADEChallengeData2016" / "objectInfo150.txt").write_text("\n".join([head, *lines]))
    reading, tables = recognize_layout(str(tmp_path), {})
    assert tables["reduce_labels"]
    assert (tables["train_split"], tables["eval_split"]) == ("training", "validation")
    assert reading.names[:4] == ("wall", "screen, crt", "screen, door", "thing 0")
    assert [len(rows) for rows in read(tmp_path)] == [2, 1]


def voc(root):
    for name in "abcd":
        image(root / f"JPEGImages/{name}.jpg")
        mask(root / f"SegmentationObject/{name}.png")
    image(root / "JPEGImages/other.jpg")
    for name in "abc":
        mask(root / f"SegmentationClass/{name}.png", (0, 1, 20, 255), "P")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, names in (("train", "ab"), ("val", "c"), ("trainval", "abc")):
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def test_voc_reads_the_images_of_its_lists(tmp_path):
    voc(tmp_path / "VOCdevkit" / "VOC2012")
    reading, _tables = recognize_layout(str(tmp_path), {})
    assert reading.layout == "Pascal VOC"
    assert len(reading.names) == 21
    # http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html, appendix: the colour map
    assert reading.palette[:6] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128))
    assert reading.palette[20] == (0, 64, 128)
    train, evaluation = read(tmp_path)
    assert {Path(name).stem for name, _ in train} == {"a", "b"}
    assert {Path(name).stem for name, _ in evaluation} == {"c"}


def annotations(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    square = [2, 2, 9, 2, 9, 9, 2, 9]
    content = {
        "images": [{"id": n, "file_name": f"{name}.jpg", "height": 12, "width": 20} for n, name in enumerate(names)],
        "annotations": [{"id": 7, "image_id": 0, "category_id": 3, "segmentation": [square], "area": 49, "iscrowd": 0}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
    }
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "images", "tables"),
    [
        ("annotations/instances_{}2017.json", "{}2017", {"image_folder": "{split}"}),
        ("annotations/instances_{}2017.json", "images/{}2017", {"image_folder": "images/{split}"}),
        (
            "{}/_annotations.coco.json",
            "{}",
            {"image_folder": "{split}", "annotation_file": "{split}/_annotations.coco.json"},
        ),
        ("{}.json", "images", {"image_folder": "images", "annotation_file": "{split}.json"}),
    ],
)
def test_coco_annotations_are_found(tmp_path, file, images, tables):
    for split, names in (("train", "ab"), ("val", "c")):
        annotations(tmp_path / file.format(split), names)
        for name in names:
            image(tmp_path / images.format(split) / f"{name}.jpg")
    (tmp_path / "package.json").write_text("[]")
    _, found = recognize_layout(str(tmp_path), {})
    assert found["source"] == "coco"
    assert found.items() >= tables.items()
    source = open_source(DataConfig(**found))
    assert (len(source.train), len(source.evaluation)) == (2, 1)
    assert source.names == ("background", "cat", "dog")


def test_one_coco_file_holds_images_out(tmp_path):
    annotations(tmp_path / "annotations.json", "abc")
    for name in "abc":
        image(tmp_path / "images" / f"{name}.jpg")
    _, tables = recognize_layout(str(tmp_path), {})
    assert tables["eval_share"] == 0.1
    source = open_source(DataConfig(**tables))
    assert (len(source.train), len(source.evaluation)) == (2, 1)


def test_imagefolder_with_metadata_is_found(tmp_path):
    for split, name in (("train", "a"), ("validation", "b")):
        pairs(tmp_path, f"{split}/{{}}.jpg", f"{split}/{{}}.png", name)
        row = {"image_file_name": f"{name}.jpg", "label_file_name": f"{name}.png"}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(row))
    _reading, tables = recognize_layout(str(tmp_path), {})
    assert tables == {"root": str(tmp_path), "source": "imagefolder"}
    assert len(open_source(DataConfig(**tables)).train) == 1


def rows(root, columns=("image", "annotation"), number=2):
    files = pairs(root / "files", "{}.jpg", "{}.png", "abcdef"[:number])
    values = {columns[0]: sorted(map(str, files.glob("*.jpg"))), columns[1]: sorted(map(str, files.glob("*.png")))}
    dataset = Dataset.from_dict(values)
    for column in columns:
        dataset = dataset.cast_column(column, Image())
    return dataset


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_data_sets_are_found(tmp_path, kind):
    root = tmp_path / "data"
    if kind == "saved":
        DatasetDict({"train": rows(tmp_path), "validation": rows(tmp_path)}).save_to_disk(str(root))
    else:
        for split in ("train", "validation"):
            rows(tmp_path).to_parquet(str(root / f"{split}-00000-of-00001.parquet"))
    _reading, tables = recognize_layout(str(root), {})
    assert tables == {"root": str(root), "source": "dataset", "mask_column": "annotation"}


def settle(root, number):
    """Follow each setting that the message offers, and return what it leads to."""
    with pytest.raises(ValueError, match=f"can be read in {number} ways") as caught:
        recognize_layout(str(root), {})
    offers = re.findall(r": set ((?:data\.\w+=\S+?)(?: data\.\w+=\S+?)*)(?:; or|$)", str(caught.value))
    assert len(offers) == number, str(caught.value)
    found = []
    for offer in offers:
        choices = dict(each.removeprefix("data.").split("=") for each in offer.split())
        found.append(recognize_layout(str(root), choices)[1])
    return found


def test_two_mask_folders_are_refused_with_both_settings(tmp_path):
    pairs(tmp_path, "images/{}.jpg", "masks/{}.png")
    pairs(tmp_path, "images/{}.jpg", "labels/{}.png")
    assert [tables["mask_folder"] for tables in settle(tmp_path, 2)] == ["labels", "masks"]


def test_two_mask_suffixes_are_refused_with_both_settings(tmp_path):
    pairs(tmp_path, "{}.jpg", "{}_mask.png")
    pairs(tmp_path, "{}.jpg", "{}_label.png")
    for tables in settle(tmp_path, 2):
        source = open_source(DataConfig(**tables))
        ending = tables["mask_suffix"]
        assert {Path(row["label"]).name for row in [*source.train, *source.evaluation]} == {
            f"a{ending}.png",
            f"b{ending}.png",
        }


def test_two_splits_to_evaluate_on_are_refused_with_both_settings(tmp_path):
    for split in ("train", "val", "test"):
        pairs(tmp_path, f"images/{split}/{{}}.jpg", f"masks/{split}/{{}}.png", split[:2])
    found = settle(tmp_path, 2)
    assert {DataConfig(**tables).eval_split_name for tables in found} == {"val", "test"}


def test_voc_beside_paired_folders_is_refused_with_both_settings(tmp_path):
    voc(tmp_path)
    pairs(tmp_path, "images/{}.jpg", "masks/{}.png", "xy")
    assert {tables["mask_folder"] for tables in settle(tmp_path, 2)} == {"SegmentationClass", "masks"}


def test_polygons_beside_masks_are_refused_with_both_settings(tmp_path):
    pairs(tmp_path, "images/{}.jpg", "masks/{}.png")
    annotations(tmp_path / "annotations" / "instances.json", "ab")
    assert {tables["source"] for tables in settle(tmp_path, 2)} == {"coco", "folders"}


def test_two_columns_of_masks_are_refused_with_both_settings(tmp_path):
    both = rows(tmp_path).add_column("mask", [None, None])
    both = both.cast_column("mask", Image())
    root = tmp_path / "data"
    DatasetDict({"train": both}).save_to_disk(str(root))
    assert {tables["mask_column"] for tables in settle(root, 2)} == {"annotation", "mask"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no images; expected files that end in .png"),
        (
            ["images/a.jpg", "other/b.png"],
            r"no masks were found .*images/ \(1\), other/ \(1\); expected images/ and masks/",
        ),
        (["images/a.jpg", "masks/a.jpg"], "holds masks as JPEG, whose compression changes labels"),
    ],
)
def test_what_is_no_data_set_is_refused(tmp_path, files, message):
    for file in files:
        image(tmp_path / file)
    with pytest.raises(ValueError, match=message):
        recognize_layout(str(tmp_path), {})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        recognize_layout(str(tmp_path / "none"), {})


def test_settings_of_the_user_describe_what_is_not_recognized(tmp_path):
    pairs(tmp_path, "north/{}.jpg", "south/{}.png")
    choices = {"image_folder": "north", "mask_folder": "south", "eval_share": 0.5}
    assert read(tmp_path, choices)[0] < expected("north/{}.jpg", "south/{}.png", "ab")


@pytest.mark.parametrize(
    ("images", "masks", "wanted"),
    [
        ("images/{}.jpg", "masks/mask_{}.png", {"mask_prefix": "mask_"}),
        ("img_{}.png", "gt_{}.png", {"image_prefix": "img_", "mask_prefix": "gt_"}),
        ("x/{}/image.png", "x/{}/mask.png", {"image_folder": ".", "image_suffix": "image", "mask_suffix": "mask"}),
        ("{}/images/a.png", "{}/masks/b.png", {"image_folder": "{image}/images", "mask_folder": "{image}/masks"}),
    ],
)
def test_what_names_begin_with_becomes_a_setting(tmp_path, images, masks, wanted):
    pairs(tmp_path, images, masks, "abcd")
    _, tables = recognize_layout(str(tmp_path), {})
    assert tables.items() >= wanted.items()
    assert not tables.keys() & {"instance_masks", "split_file"}


def test_two_mask_prefixes_are_refused_with_both_settings(tmp_path):
    pairs(tmp_path, "{}.jpg", "mask_{}.png")
    pairs(tmp_path, "{}.jpg", "label_{}.png")
    for tables in settle(tmp_path, 2):
        source = open_source(DataConfig(**tables))
        names = {Path(row["label"]).name for row in [*source.train, *source.evaluation]}
        assert names == {f"{tables['mask_prefix']}{name}.png" for name in "ab"}


def test_masks_of_all_splits_beside_masks_of_each_are_refused_with_both_settings(tmp_path):
    for split, names in (("train", "ab"), ("val", "cd")):
        pairs(tmp_path, f"{split}/images/{{}}.jpg", f"{split}/masks/{{}}.png", names)
        pairs(tmp_path, f"{split}/images/{{}}.jpg", "labels/{}.png", names)
    assert {tables["mask_folder"] for tables in settle(tmp_path, 2)} == {"{split}/masks", "labels"}


def test_a_folder_of_all_splits_may_hold_more(tmp_path):
    """Masks of a test split, or images that nobody labelled, belong to neither side."""
    for split, names in (("train", "ab"), ("val", "cd")):
        pairs(tmp_path, f"images/{split}/{{}}.jpg", "masks/{}.png", names)
    mask(tmp_path / "masks" / "z.png")
    assert read(tmp_path) == [
        expected(f"images/{split}/{{}}.jpg", "masks/{}.png", names) for split, names in (("train", "ab"), ("val", "cd"))
    ]
    (tmp_path / "masks" / "c.png").unlink()
    with pytest.raises(ValueError, match=r"images/val/c\.jpg has no mask; expected .*masks/c\.png"):
        read(tmp_path)


def test_a_mask_of_two_splits_is_refused(tmp_path):
    for split in ("train", "val"):
        pairs(tmp_path, f"images/{split}/{{}}.jpg", "masks/{}.png")
    with pytest.raises(ValueError, match=r"the mask .*masks/a\.png, and 1 more, would be trained on and evaluated on"):
        read(tmp_path)


def test_an_image_of_two_splits_is_refused(tmp_path):
    voc(tmp_path)
    lists = tmp_path / "ImageSets" / "Segmentation"
    (lists / "val.txt").write_text("b\nc\n")
    with pytest.raises(ValueError, match=r"the image .*b\.jpg would be trained on .* data\.eval_share=0\.1"):
        read(tmp_path)
    (lists / "val.txt").write_text("c\n")
    assert len(read(tmp_path)[1]) == 1


def test_a_link_to_a_training_image_is_refused(tmp_path):
    pairs(tmp_path, "images/train/{}.jpg", "masks/train/{}.png")
    pairs(tmp_path, "images/val/{}.jpg", "masks/val/{}.png", "c")
    (tmp_path / "images/val/d.jpg").symlink_to(tmp_path / "images/train/a.jpg")
    mask(tmp_path / "masks/val/d.png")
    with pytest.raises(ValueError, match=r"the image .*train/a\.jpg would be trained on"):
        read(tmp_path)


def test_pages_of_a_file_are_images_of_their_own(tmp_path):
    """The pages of one stack may be on both sides."""
    pages = Dataset.from_dict({"image": ["a.tif"] * 2, "label": ["b.tif"] * 2, "page": [0, 1]})
    check_disjoint(pages.select([0]), pages.select([1]))
    with pytest.raises(ValueError, match="the image"):
        check_disjoint(pages, pages.select([1]))
