"""Images with a folder each, as in the Data Science Bowl 2018: the union of masks of single objects is their mask."""

import numpy as np
import pytest
from PIL import Image

from hf_segformer.config import DataConfig
from hf_segformer.data.decoding import read_instances
from hf_segformer.data.description import describe_data
from hf_segformer.data.labeled import open_source
from hf_segformer.data.pairing import pair_in_image_folders
from hf_segformer.training.data import load_data
from tests.support.folders import SIZE, image, mask

OBJECTS = {"n1": [(0, 3), (5, 8)], "n2": [(2, 6)], "n3": [(0, 2), (1, 4), (9, 12)], "n4": [(4, 5)]}  # rows from, to


def store(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def bowl(root, top="stage1_train", value=255):
    """Nuclei as bands of rows, each in a file of its own."""
    for number, (name, objects) in enumerate(OBJECTS.items()):
        image(root / top / name / "images" / f"{name}.png", number)
        for index, (first, last) in enumerate(objects):
            drawn = np.zeros(SIZE, np.uint8)
            drawn[first:last] = value
            store(root / top / name / "masks" / f"{index:x}f3.png", drawn)
    image(root / "stage1_test" / "t1" / "images" / "t1.png")
    return root


def unions():
    found = {}
    for name, objects in OBJECTS.items():
        found[name] = np.zeros(SIZE, np.uint8)
        for first, last in objects:
            found[name][first:last] = 1
    return found


@pytest.mark.parametrize(("top", "value"), [("stage1_train", 255), ("nuclei/raw", 1)])
def test_the_bowl_is_a_binary_task(tmp_path, top, value):
    description = describe_data(str(bowl(tmp_path, top, value)))
    assert (description.mask_kind, description.names) == ("binary", ("foreground",))
    assert description.tables["instance_masks"]
    folder = f"{top.replace('train', '{split}')}/{{image}}/masks"
    assert description.tables["mask_folder"] == folder
    total = np.mean(list(unions().values()))
    data = load_data(DataConfig(**description.tables), 3)
    rows = [(split, index) for split in ("train", "evaluation") for index in range(len(getattr(data, split)))]
    found = {data.describe(*each).split("/")[-3]: getattr(data, each[0])[each[1]]["label"] for each in rows}
    assert found.keys() == OBJECTS.keys()
    for name, union in unions().items():
        np.testing.assert_array_equal(found[name], union)
    train = [
        found[name].mean() for name in found if name in {data.describe("train", i).split("/")[-3] for i in range(3)}
    ]
    assert description.class_shares[1] == pytest.approx(np.mean(train))
    assert 0 < total < 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: image(root / "n1/images/x.png"), "n1/images holds 2 images; expected one"),
        (lambda root: (root / "n2/masks/0f3.png").unlink(), "n2.png has no mask; expected one in .*n2/masks"),
        (lambda root: (root / "n5").mkdir(), "n5/images holds 0 images"),
    ],
)
def test_each_folder_has_one_image_and_its_masks(tmp_path, spoil, message):
    root = bowl(tmp_path) / "stage1_train"
    spoil(root)
    with pytest.raises(ValueError, match=message):
        pair_in_image_folders(root, "{image}/images", "{image}/masks", instance_masks=True)


def test_several_masks_need_a_setting(tmp_path):
    root = bowl(tmp_path)
    tables = {"image_folder": "stage1_{split}/{image}/images", "mask_folder": "stage1_{split}/{image}/masks"}
    with pytest.raises(ValueError, match=r"holds 2 masks; expected one, or data\.instance_masks=true"):
        open_source(DataConfig("folders", str(root), eval_share=0.3, **tables))


def test_masks_beside_their_image_are_told_by_their_names(tmp_path):
    for number, name in enumerate("ab"):
        image(tmp_path / name / "image.png", number)
        for index in range(number + 1):
            mask(tmp_path / name / f"mask_{index}.png", (0, 1) if index else (1, 0))
    rows = pair_in_image_folders(
        tmp_path, "{image}", "{image}", image_suffix="image", mask_prefix="mask_", instance_masks=True
    )
    assert [len(row["label"]["masks"]) for row in rows] == [1, 2]
    assert read_instances(rows[0]["label"]["masks"]).mean() == 0.5
    assert read_instances(rows[1]["label"]["masks"]).all()


def test_an_instance_has_one_value_and_the_size_of_the_others(tmp_path):
    files = [str(mask(tmp_path / "a.png", (0, 4))), str(mask(tmp_path / "b.png", (7, 0)))]
    assert read_instances(files).all()
    with pytest.raises(ValueError, match=r"c\.png holds 1, 2 and so on beside 0; expected one object"):
        read_instances([*files, str(mask(tmp_path / "c.png", (0, 1, 2)))])
    store(tmp_path / "d.png", np.zeros((3, 4), np.uint8))
    with pytest.raises(ValueError, match=r"d\.png is 3x4 \(height x width\); expected 12x20, as .*a\.png"):
        read_instances([*files, str(tmp_path / "d.png")])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instance_masks": True}, "data.instance_masks is set, but folders do not name each image's own"),
        ({"image_folder": "{image}/images"}, "expected {image} as a folder of both"),
        ({"image_folder": "a/{image}", "mask_folder": "b/{image}"}, "below the same folders"),
        ({"image_folder": "x{image}", "mask_folder": "x{image}/masks"}, "expected {image} as a folder of both"),
        ({"image_folder": "{image}", "mask_folder": "{image}", "pages": True}, "data.pages is set"),
        (
            {"image_folder": "{image}", "mask_folder": "{image}", "instance_masks": True, "label_values": [0, 255]},
            "data.label_values and data.instance_masks are both set",
        ),
        (
            {"image_folder": "{image}", "mask_folder": "{image}", "instance_masks": True, "names": ["a", "b"]},
            "data.names has 2 names; expected one",
        ),
        ({"source": "camvid", "mask_prefix": "m"}, "data.mask_prefix is set, but data.source is camvid"),
    ],
)
def test_settings_that_do_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"source": "folders", "root": "x", **fields})
