"""COCO's panoptic format against the formula of its page, segment by segment."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_segformer.config import DataConfig
from hf_segformer.data.description import describe_data
from hf_segformer.data.layouts import recognize_layout
from hf_segformer.data.panoptic import open_panoptic, read_segments
from hf_segformer.training.data import load_data
from tests.support.folders import SIZE, image

CATEGORIES = {7: "sky", 3: "road", 200: "car"}  # in order of ids: road, sky, car
SEGMENTS = {1: 7, 256: 3, 70_000: 200, 16_777_215: 3}  # number -> category id
EXPECTED = {0: -1, 1: 1, 256: 0, 70_000: 2, 16_777_215: 0}


def numbers_of(seed):
    known = np.array([0, *SEGMENTS])
    return known[np.random.default_rng(seed).integers(0, len(known), SIZE)]


def store(path, numbers):
    """R + 256 G + 256^2 B, as https://cocodataset.org/#format-data says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = np.stack([numbers % 256, numbers // 256 % 256, numbers // 256**2], axis=-1)
    Image.fromarray(rgb.astype(np.uint8)).save(path)


def panoptic(root, split, names, categories=CATEGORIES, folder="annotations/panoptic_{}2017"):
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": number, "name": name, "isthing": 1} for number, name in categories.items()]
    for number, name in enumerate(names):
        image(root / f"{split}2017" / f"{name}.jpg", number)
        store(root / folder.format(split) / f"{name}.png", numbers_of(ord(name)))
        content["images"].append({"id": number, "file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]})
        infos = [{"id": each, "category_id": category, "iscrowd": 0} for each, category in SEGMENTS.items()]
        annotation = {"image_id": number, "file_name": f"{name}.png", "segments_info": infos}
        content["annotations"].insert(0, annotation)  # in another order than the images
    path = root / "annotations" / f"panoptic_{split}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path, content


def test_segments_become_classes_and_void_does_not_count(tmp_path):
    for split, names in (("train", "ab"), ("val", "c")):
        panoptic(tmp_path, split, names)
    description = describe_data(str(tmp_path))
    assert (description.mask_kind, description.names) == ("panoptic", ("road", "sky", "car"))
    assert description.tables == {
        "root": str(tmp_path),
        "source": "panoptic",
        "annotation_file": "annotations/panoptic_{split}.json",
        "image_folder": "{split}",
        "mask_folder": "annotations/panoptic_{split}",
        "train_split": "train2017",
        "eval_split": "val2017",
    }
    data = load_data(DataConfig(**description.tables), 3)
    assert data.names == ("road", "sky", "car")
    for row, name in zip([*data.train, *data.evaluation], "abc", strict=True):
        wanted = np.vectorize(EXPECTED.get)(numbers_of(ord(name)))
        np.testing.assert_array_equal(row["label"], np.where(wanted == -1, 255, wanted))
    counts = np.bincount(np.concatenate([row["label"].ravel() for row in data.train]), minlength=256)
    np.testing.assert_allclose(description.class_shares, counts[:3] / counts[:3].sum())


def test_one_category_is_a_binary_task(tmp_path):
    path, content = panoptic(tmp_path, "train", "ab", {3: "road"})
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["category_id"] = 3
    path.write_text(json.dumps(content))
    description = describe_data(str(tmp_path))
    data = load_data(DataConfig(**description.tables), 3)
    assert data.names == ("road",)
    row, name = data.train[0], data.describe("train", 0).split(".jpg")[0][-1]
    np.testing.assert_array_equal(row["label"], numbers_of(ord(name)) > 0)


def test_panoptic_masks_beside_polygons_are_refused_with_both_settings(tmp_path):
    path, content = panoptic(tmp_path, "train", "ab")
    polygons = {
        **content,
        "annotations": [{"id": 1, "image_id": 0, "category_id": 3, "segmentation": [[0, 0, 4, 0, 4, 4]]}],
    }
    (path.parent / "instances_train2017.json").write_text(json.dumps(polygons))
    with pytest.raises(ValueError, match=r"can be read in 2 ways.*set data\.source=coco.*set data\.source=panoptic"):
        recognize_layout(str(tmp_path), {})
    for source in ("coco", "panoptic"):
        assert recognize_layout(str(tmp_path), {"source": source})[1]["source"] == source


def test_masks_that_were_not_unpacked_are_named(tmp_path):
    panoptic(tmp_path, "train", "ab", folder="elsewhere/{}")
    with pytest.raises(
        ValueError, match=r"names panoptic masks such as b\.png; expected them in .*panoptic_train2017, or"
    ):
        recognize_layout(str(tmp_path), {})


def test_an_unlisted_segment_is_named(tmp_path):
    store(tmp_path / "a.png", np.array([[0, 5], [5, 77_777]]))
    label = {"path": str(tmp_path / "a.png"), "segments": json.dumps({"0": -1, "5": 4})}
    with pytest.raises(ValueError, match=r"a\.png has the segment 77777, which its JSON file does not list"):
        read_segments(label, "a.png")
    label["segments"] = json.dumps({"0": -1, "5": 4, "77777": 2})
    np.testing.assert_array_equal(read_segments(label, "a.png"), [[-1, 4], [4, 2]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c["annotations"].pop(), "has no annotation of image 0, a.jpg; expected one"),
        (lambda c: c["annotations"].append(c["annotations"][0]), "has two annotations of image 1"),
        (lambda c: c["images"].pop(), "has an annotation of image 1, which is not one of its images"),
        (lambda c: c["annotations"][0].pop("segments_info"), "has no list segments_info of objects"),
        (
            lambda c: c["annotations"][0]["segments_info"][0].update(id=2**24),
            "has the segment 16777216; expected a number",
        ),
        (
            lambda c: c["annotations"][0]["segments_info"][0].update(id=256),
            "has the segment 256; expected .* each once",
        ),
        (lambda c: c["annotations"][0]["segments_info"][0].update(category_id=9), "segment 1: category_id is 9"),
        (lambda c: c["annotations"][0].update(file_name="x.png"), "names images that are not there: .*x.png"),
        (lambda c: c["annotations"][0].update(file_name="../a.png"), "leads outside"),
        (lambda c: c["images"][0].update(file_name="b.jpg"), "b.jpg 2 times; expected each file once"),
        (
            lambda c: c["annotations"][0].update(file_name=c["annotations"][1]["file_name"]),
            ".png 2 times; expected each file once",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, spoil, message):
    path, content = panoptic(tmp_path, "train", "ab")
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        open_panoptic(path, tmp_path / "train2017", path.with_suffix(""))


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"annotation_file=annotations/panoptic_\{split\}\.json"):
        DataConfig("panoptic", "x")
    with pytest.raises(ValueError, match="void never counts"):
        DataConfig("panoptic", "x", annotation_file="x.json", reduce_labels=True)
