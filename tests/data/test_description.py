"""Descriptions of data sets: kind, classes and measures of masks and images, and the table that reads them."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_segformer.config import DataConfig
from hf_segformer.data.description import describe_data
from hf_segformer.data.mask_values import explain_colors, explain_values
from hf_segformer.training.data import load_data
from tests.support.folders import SIZE, image, mask, pairs

COLORS = [[128, 64, 128], [0, 0, 142], [70, 70, 70]]


def folders(root, values, mode="L", names="abcd", split=None):
    return pairs(root, "images/{}.jpg", "masks/{}.png", names, values, mode)


def read(description):
    """The labels that a training reads by a description's table, of all images."""
    data = load_data(DataConfig(**description.tables), description.num_channels if description.num_channels > 1 else 3)
    assert data.names == description.names
    return np.unique([row["label"] for rows in (data.train, data.evaluation) for row in rows]).tolist()


@pytest.mark.parametrize(
    ("values", "mode", "kind", "names", "tables", "labels"),
    [
        ((0, 1, 2), "L", "indices", ("class 0", "class 1", "class 2"), {}, [0, 1, 2]),
        ((0, 1, 2, 255), "L", "indices", ("class 0", "class 1", "class 2"), {}, [0, 1, 2, 255]),
        ((0, 1, 3), "L", "indices", ("class 0", "class 1", "class 2", "class 3"), {}, [0, 1, 3]),
        ((1, 2, 3), "L", "indices", ("class 1", "class 2", "class 3"), {"label_values": [1, 2, 3]}, [0, 1, 2]),
        ((0, 50, 100), "L", "indices", ("class 0", "class 50", "class 100"), {"label_values": [0, 50, 100]}, [0, 1, 2]),
        ((0, 1, 2), "P", "palette", ("class 0", "class 1", "class 2"), {}, [0, 1, 2]),
        ((0, 255), "L", "binary", ("foreground",), {"label_values": [0, 255]}, [0, 1]),
        ((0, 1), "L", "binary", ("foreground",), {}, [0, 1]),
        ((0, 1, 255), "L", "binary", ("foreground",), {}, [0, 1, 255]),
        ((0, 7), "P", "binary", ("foreground",), {"label_values": [0, 7]}, [0, 1]),
        (([0] * 3, [255] * 3), "RGB", "binary", ("foreground",), {"mask_colors": [[0] * 3, [255] * 3]}, [0, 1]),
        (
            ([0] * 3, [1] * 3, [2] * 3, [255] * 3),
            "RGB",
            "colors",
            ("class 0", "class 1", "class 2"),
            {},
            [0, 1, 2, 255],
        ),
    ],
)
def test_masks_without_names_are_explained(tmp_path, values, mode, kind, names, tables, labels):
    description = describe_data(str(folders(tmp_path, values, mode)))
    assert (description.mask_kind, description.names, description.names_source) == (kind, names, "generic")
    assert description.tables.items() >= tables.items()
    assert read(description) == labels


def test_measures_are_those_of_the_masks(tmp_path):
    pairs(tmp_path, "train/images/{}.jpg", "train/masks/{}.png", "abc", (0, 1, 2, 255))
    mask(tmp_path / "train" / "masks" / "c.png", (0, 0, 1, 1))
    pairs(tmp_path, "val/images/{}.jpg", "val/masks/{}.png", "d", (0, 2))
    description = describe_data(str(tmp_path))
    quarter = 240 / 4
    counts = np.array([2 * quarter + 120, 2 * quarter + 120, 2 * quarter])
    assert description.class_shares == pytest.approx(counts / counts.sum())
    assert description.class_image_shares == pytest.approx([1, 1, 2 / 3])
    assert (description.num_train, description.num_eval, description.num_sampled) == (3, 1, 4)
    assert description.sizes == (SIZE,) * 3
    assert (description.num_channels, description.image_dtype) == (3, "uint8")
    assert 0.9 < description.value_share <= 1
    assert description.notes[:2] == (
        "Layout: folders {split}/images and {split}/masks.",
        "4 of 4 masks were sampled.",
    )
    tables = {"root": str(tmp_path), "source": "folders", "names": ["class 0", "class 1", "class 2"]}
    assert description.tables == tables | {"image_folder": "{split}/images", "mask_folder": "{split}/masks"}


def test_a_sample_is_drawn_by_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_segformer.data.description._NUM_TRAIN_MASKS", 3)
    pairs(tmp_path, "images/train/{}.jpg", "masks/train/{}.png", "abcdefgh", (0, 1))
    pairs(tmp_path, "images/val/{}.jpg", "masks/val/{}.png", "x", (0, 1))
    mask(tmp_path / "masks" / "train" / "a.png", (0, 0))
    shares = {describe_data(str(tmp_path), {"seed": seed}).class_image_shares[1] for seed in range(6)}
    assert sorted(shares) == pytest.approx([2 / 3, 1])
    assert describe_data(str(tmp_path)) == describe_data(str(tmp_path))
    assert "4 of 9 masks were sampled." in describe_data(str(tmp_path)).notes


def test_few_images_hold_a_larger_share_out(tmp_path):
    description = describe_data(str(folders(tmp_path, (0, 1), names="abcdefghijklmnopqrstuvwxyz")))
    assert description.tables["eval_share"] == 0.3
    assert (description.num_train, description.num_eval) == (18, 8)
    assert describe_data(str(tmp_path), {"eval_share": 0.5}).num_eval == 13


def test_names_beside_the_data_are_used_and_gaps_named(tmp_path):
    folders(tmp_path, (0, 2))
    (tmp_path / "classes.json").write_text('{"names": ["road", "car", "sky"]}')
    description = describe_data(str(tmp_path))
    assert (description.names, description.names_source) == (("road", "car", "sky"), "classes.json")
    assert "names" not in description.tables
    assert "No sampled mask holds 1 (car)." in description.notes
    assert describe_data(str(tmp_path), {"names": ["a", "b", "c"]}).names_source == "data.names"


def test_colors_of_a_list_are_read(tmp_path):
    folders(tmp_path, [*COLORS, [0, 0, 0]], "RGB")
    (tmp_path / "label_colors.txt").write_text("128 64 128\troad\n0 0 142\tcar\n70 70 70\tbuilding\n0 0 0\tVoid\n")
    description = describe_data(str(tmp_path))
    assert (description.mask_kind, description.names) == ("colors", ("road", "car", "building"))
    assert description.names_source == "label_colors.txt"
    assert description.tables["ignore_colors"] == [[0, 0, 0]]
    assert read(description) == [0, 1, 2, 255]
    assert description.class_shares == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("key", ["colors", "palette"])
def test_colors_of_classes_json_are_read(tmp_path, key):
    folders(tmp_path, COLORS, "RGB")
    (tmp_path / "classes.json").write_text(json.dumps({"names": ["road", "car", "building"], key: COLORS}))
    description = describe_data(str(tmp_path))
    assert description.tables["mask_colors"] == COLORS
    assert read(description) == [0, 1, 2]


def test_colors_without_names_are_refused_with_the_file_to_write(tmp_path):
    folders(tmp_path, [COLORS[0], COLORS[0], COLORS[1]], "RGB")
    with pytest.raises(
        ValueError, match=r"2 colours, .*\[128, 64, 128\] \(70 %\), \[0, 0, 142\] \(30 %\). Put classes"
    ):
        describe_data(str(tmp_path))
    with pytest.raises(ValueError, match="with the right names: ") as caught:
        describe_data(str(tmp_path))
    (tmp_path / "classes.json").write_text(str(caught.value).partition("right names: ")[2])
    assert describe_data(str(tmp_path)).tables["mask_colors"] == [COLORS[0], COLORS[1]]


def test_colors_that_a_list_lacks_are_refused_with_the_setting(tmp_path):
    folders(tmp_path, [*COLORS, [9, 9, 9]], "RGB")
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nroad,128,64,128\ncar,0,0,142\nbuilding,70,70,70\n")
    with pytest.raises(ValueError, match=r"class_dict.csv does not list: \[9, 9, 9\] \(25 %\)"):
        describe_data(str(tmp_path))
    description = describe_data(str(tmp_path), {"ignore_colors": [[9, 9, 9]]})
    assert read(description) == [0, 1, 2, 255]


def test_colors_of_a_photo_are_refused():
    shares = {number * 1000 + 1: 1.0 for number in range(50)}
    with pytest.raises(ValueError, match=r"50 colours, .*compression or smoothing"):
        explain_colors(shares, None, (), "", {})


def test_masks_of_two_kinds_are_refused(tmp_path):
    folders(tmp_path, (0, 1))
    mask(tmp_path / "masks" / "b.png", COLORS)
    with pytest.raises(ValueError, match=r"b.png holds colours and .*\.png integers"):
        describe_data(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "names", "message", "choice"),
    [
        ([0, 128, 255], (), "255 may be a class", {"label_values": [0, 128, 255]}),
        ([0, 128, 255], (), "to ignore it", {"label_values": [0, 128]}),
        ([1, 2, 3], ("a", "b", "c"), "If value 1 is 'a', set data.reduce_labels=true", {"reduce_labels": True}),
        ([0, 1, 2, 3], ("a", "b", "c"), r'data.names=\["\?", "a", "b", "c"\]', {"names": list("abcd")}),
        ([0, 1, 2, 3], ("a", "b", "c"), r"data.ignore_values=\[3\]", {"ignore_values": [3]}),
        ([0, 100, 200], ("a", "b", "c"), r"\(0 a, 100 b, 200 c\), set data.label_values=\[0, 100, 200\]", None),
        ([0, 1, 9, 40], ("a", "b", "c"), r"data.ignore_values=\[9, 40\]", {"ignore_values": [9, 40]}),
        ([-1, 0, 1], (), r"data.ignore_values=\[-1\]", {"ignore_values": [-1]}),
        ([0], (), "hold only 0; expected two classes", {"names": ["a", "b"]}),
        ([255], (), "hold only 255; expected", {"label_values": [0, 255]}),
        (range(300), (), "300 values", None),
        (range(256), (), "256 values from 0 to 255, .*: smoothed or compressed edges .* with 0 below 128", None),
        ([0, 1, 2, *range(249, 256)], ("lesion",), "10 values from 0 to 255, .*: smoothed or compressed edges", None),
    ],
)
def test_values_of_two_meanings_are_refused_with_the_setting(values, names, message, choice):
    with pytest.raises(ValueError, match=message):
        explain_values(values, names, "classes.json", {})
    if choice is not None:
        explain_values(values, choice.get("names", names), "classes.json", choice)


def test_many_classes_with_255_for_ignored_pixels_are_no_smoothed_masks():
    assert len(explain_values([*range(211), 255], (), "", {}).names) == 211


def test_values_of_another_data_set_name_the_layout(tmp_path):
    for split in ("train", "val"):
        pairs(tmp_path, f"{split}/{{}}.png", f"{split}annot/{{}}.png", "ab", (0, 11, 12, 13))
    with pytest.raises(ValueError, match=r"read as CamVid: masks hold .*12, 13"):
        describe_data(str(tmp_path))
    assert describe_data(str(tmp_path), {"source": "folders"}).tables["source"] == "folders"


def test_palettes_give_their_colours(tmp_path):
    description = describe_data(str(folders(tmp_path, (0, 1, 2), "P")))
    stored = [[17 * (3 * index + channel) % 256 for channel in range(3)] for index in range(3)]
    assert description.tables["palette"] == stored


@pytest.mark.parametrize(
    ("dtype", "shape", "highest", "channels", "value_range"),
    [
        (np.uint16, (*SIZE,), 4000, 1, "0,4095"),
        (np.uint16, (*SIZE, 3), 300, 3, "0,511"),
        (">u2", (*SIZE, 3), 300, 3, "0,511"),
        (np.uint16, (*SIZE,), 60000, 1, None),
        (np.uint8, (5, *SIZE), 200, 5, None),
        (np.float32, (4, *SIZE), 1, 4, None),
    ],
)
def test_bands_and_ranges_are_measured(tmp_path, dtype, shape, highest, channels, value_range):
    for name in "abcd":
        pixels = np.random.default_rng(0).uniform(0, highest, shape).astype(dtype)
        pixels.flat[0] = 0
        (tmp_path / "images").mkdir(exist_ok=True)
        if pixels.ndim == 2:
            Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
        else:
            np.save(tmp_path / "images" / f"{name}.npy", pixels)
        mask(tmp_path / "masks" / f"{name}.png", (0, 1))
    description = describe_data(str(tmp_path))
    assert (description.num_channels, description.image_dtype) == (channels, np.dtype(dtype).name)
    assert description.tables.get("value_range") == value_range
    assert set(description.sizes) == {SIZE}
    if dtype is np.float32:
        assert description.value_share is None
    else:
        assert description.value_share == pytest.approx(highest / np.iinfo(dtype).max, rel=0.05)
    read(description)


def test_images_of_several_band_counts_are_refused(tmp_path):
    folders(tmp_path, (0, 1))
    (tmp_path / "images" / "b.jpg").unlink()
    np.save(tmp_path / "images" / "b.npy", np.zeros((5, *SIZE), np.uint8))
    with pytest.raises(ValueError, match=r"jpg has 3 bands and .*b.npy 5; expected one number"):
        describe_data(str(tmp_path), {"seed": 2})


def test_grey_images_among_colours_are_colours(tmp_path):
    folders(tmp_path, (0, 1), names="abcdefgh")
    for name in "abcd":
        Image.open(tmp_path / "images" / f"{name}.jpg").convert("L").save(tmp_path / "images" / f"{name}.jpg")
    assert describe_data(str(tmp_path)).num_channels == 3


def test_polygons_are_described(tmp_path):
    square = [0, 0, 10, 0, 10, 12, 0, 12]
    for name in "abcd":
        image(tmp_path / "images" / f"{name}.jpg")
    content = {
        "images": [{"id": n, "file_name": f"{name}.jpg", "height": 12, "width": 20} for n, name in enumerate("abcd")],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "segmentation": [square]} for n in range(4)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    description = describe_data(str(tmp_path))
    assert (description.mask_kind, description.names) == ("polygons", ("background", "cat", "dog"))
    assert description.names_source == "annotations.json"
    assert description.class_shares == pytest.approx([0.5, 0.5, 0])
    assert read(description) == [0, 1]
    reduced = describe_data(str(tmp_path), {"reduce_labels": True})
    assert reduced.names == ("cat", "dog")
    assert reduced.class_shares == pytest.approx([1, 0])


def test_a_list_of_classes_that_is_wrong_is_refused(tmp_path):
    folders(tmp_path, COLORS, "RGB")
    for text, message in (("1 2 road", "has the line '1 2 road'"), ("1 2 3 a\n1 2 3 b", "more than once")):
        (tmp_path / "label_colors.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            describe_data(str(tmp_path))
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nroad,1,2,3\n")
    (tmp_path / "label_colors.txt").write_text("1 2 3 a\n")
    with pytest.raises(ValueError, match="both list colours of classes"):
        describe_data(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "names", "is_ignored"),
    [
        ([0, 1, 255], (), True),
        ([0, 1, 2, 255], (), True),
        ([0, 1, 2, 255], ("a", "b", "c"), True),
        ([0, 1, 2], (), False),
        ([0, 255], (), False),
        ([0, 1, 255], tuple(f"class {number}" for number in range(256)), False),
    ],
)
def test_a_note_says_that_value_255_does_not_count(values, names, is_ignored):
    notes = explain_values(values, names, "classes.json", {}).notes
    assert ("Pixels of mask value 255 are ignored." in notes) is is_ignored
