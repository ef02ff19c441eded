"""COCO-style polygons and run lengths, against pycocotools and a slow reference."""

import json
import re
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as reference

from hf_segformer.config import DataConfig
from hf_segformer.data.decoding import RowReader
from hf_segformer.data.label_mapping import LabelMapping
from hf_segformer.data.labeled import open_source
from hf_segformer.data.polygons import decode_runs, draw_polygons, open_coco, polygon_mask
from hf_segformer.training.data import load_data
from tests.support.folders import SIZE, image

# pycocotools 2.0.11 beside NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
HEIGHT, WIDTH = SIZE
SQUARE = [2, 3, 9, 3, 9, 8, 2, 8]


def slow_mask(points, height, width):
    """Even-odd rule, pixel by pixel: edges that a ray to the left of the pixel's centre crosses."""
    mask = np.zeros((height, width), bool)
    for row, column in np.ndindex(height, width):
        x, y = column + 0.5, row + 0.5
        for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
            if (y0 <= y) != (y1 <= y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x:
                mask[row, column] ^= True
    return mask


def distance_to_edges(points, height, width):
    """Distance of each pixel's centre to the nearest edge."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    centres = np.stack([columns, rows], -1)
    nearest = np.full((height, width), np.inf)
    for start, end in zip(points, np.roll(points, -1, axis=0), strict=True):
        along = end - start
        share = ((centres - start) @ along / max(along @ along, 1e-12)).clip(0, 1)
        nearest = np.fmin(nearest, np.linalg.norm(centres - start - share[..., None] * along, axis=-1))
    return nearest


shapes = st.lists(st.tuples(st.floats(-8, 28), st.floats(-6, 18)), min_size=3, max_size=9)


@settings(deadline=timedelta(seconds=5), max_examples=30)
@given(shapes)
def test_a_polygon_is_the_pixels_whose_centres_are_inside(points):
    points = np.array(points)
    ours = polygon_mask(points, HEIGHT, WIDTH)
    assert (ours == slow_mask(points.tolist(), HEIGHT, WIDTH))[distance_to_edges(points, HEIGHT, WIDTH) > 1e-6].all()
    theirs = reference.decode(reference.frPyObjects([points.ravel().tolist()], HEIGHT, WIDTH))[..., 0]
    # pycocotools rounds to a fifth of a pixel, so that only pixels near an edge may differ
    far = distance_to_edges(points, HEIGHT, WIDTH) > 0.5
    assert (ours == theirs.astype(bool))[far].all()


def test_a_polygon_of_whole_pixels_is_that_of_pycocotools():
    theirs = reference.decode(reference.frPyObjects([SQUARE], HEIGHT, WIDTH))[..., 0]
    assert (polygon_mask(np.reshape(SQUARE, (-1, 2)), HEIGHT, WIDTH) == theirs).all()
    assert theirs.sum() == 7 * 5


@settings(deadline=timedelta(seconds=5), max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32))
def test_run_lengths_are_those_of_pycocotools(height, width, share, seed):
    pixels = np.random.default_rng(seed).random((height, width)) < share
    encoded = reference.encode(np.asfortranarray(pixels, np.uint8))
    compressed = {"size": [height, width], "counts": encoded["counts"].decode()}
    assert (decode_runs(compressed, height, width, "it") == pixels).all()
    flat = pixels.T.ravel()
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
    runs = np.diff(np.append(starts, flat.size)).tolist()
    plain = {"size": [height, width], "counts": [0, *runs] if flat[0] else runs}
    assert (decode_runs(plain, height, width, "it") == pixels).all()


def entry(segmentation, value=1, number=7, crowd=False):
    return {"id": number, "value": value, "segmentation": segmentation, "crowd": crowd}


def draw(*entries, height=HEIGHT, width=WIDTH):
    return draw_polygons(json.dumps({"height": height, "width": width, "annotations": entries}), "file, image 5")


def square(left, top, side):
    return [left, top, left + side, top, left + side, top + side, left, top + side]


def test_the_smallest_annotation_is_on_top_and_crowds_are_below():
    runs = {"size": [HEIGHT, WIDTH], "counts": [0, 3 * HEIGHT, HEIGHT * (WIDTH - 3)]}
    mask = draw(
        entry([square(0, 0, 2)], 4), entry([square(1, 1, 8)], 2), entry([square(0, 0, 9)], 1), entry(runs, 3, 8, True)
    )
    slow = np.zeros(SIZE, int)
    slow[:, :3] = 3
    slow[0:9, 0:9] = 1
    slow[1:9, 1:9] = 2
    slow[0:2, 0:2] = 4
    assert (mask == slow).all()


def test_all_polygons_of_an_annotation_are_drawn():
    mask = draw(entry([square(0, 0, 3), square(1, 1, 3)], 300))
    slow = np.zeros(SIZE, int)
    slow[0:3, 0:3] = slow[1:4, 1:4] = 300
    assert (mask == slow).all()
    assert (draw() == 0).all()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 1e9, 1, 5, 5]], r"has the point \[1000000000.0, 1.0\], far outside its image of 20x12"),
        ([[1, 1, -21, 1, 5, 5]], "far outside"),
        ([[1, 1, float("nan"), 1, 5, 5]], "no finite number"),
        ([[1, 1, True, 1, 5, 5]], "no finite number"),
        ([[1, 1, "3", 1, 5, 5]], "no finite number"),
        ([[1, 1, 5, 5]], "x and y of at least three points"),
        ([[1, 1, 5, 5, 3, 4, 2]], "x and y of at least three points"),
        ([], "expected polygons or run lengths"),
        ("abc", "expected polygons or run lengths"),
        ({"size": [4, 5], "counts": [20]}, r"of size \[4, 5\]; expected that of its image, \[12, 20\]"),
        ({"size": [12, 20], "counts": [20]}, "damaged run lengths; expected 240 pixels"),
        ({"size": [12, 20], "counts": [250, -10]}, "damaged run lengths"),
        ({"size": [12, 20], "counts": [240.0]}, "damaged run lengths"),
        ({"size": [12, 20], "counts": "P"}, "damaged run lengths"),
        ({"size": [12, 20], "counts": "P" * 100}, "damaged run lengths"),
        ({"size": [12, 20]}, "damaged run lengths"),
    ],
)
def test_absurd_shapes_are_refused_by_file_and_annotation(segmentation, message):
    with pytest.raises(ValueError, match="^file, image 5, annotation 7.*" + message):
        draw(entry(segmentation))


def test_a_polygon_of_too_many_crossings_is_refused():
    points = np.tile([[0, 0], [5, 20000]], (2500, 1)).ravel().tolist()
    with pytest.raises(ValueError, match=r"annotation 7 has 5,002 points that cross 100,0\d\d,\d+ rows"):
        draw(entry([[*points, 1, 1, 2, 20000]]), height=20000, width=100)


@pytest.mark.parametrize("size", [(0, 5), (True, 5), (5, None), (10**6, 10**6)])
def test_absurd_sizes_are_refused(size):
    with pytest.raises(ValueError, match="file, image 5"):
        draw(height=size[0], width=size[1])


def content(**changes):
    return {
        "images": [{"id": 5, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"id": 7, "image_id": 5, "category_id": 9, "segmentation": [SQUARE], "iscrowd": 0}],
        "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
        **changes,
    }


def write(root, **changes):
    path = root / "a.json"
    path.write_text(json.dumps(content(**changes)))
    return path


def test_rows_are_images_with_polygons_and_names_are_in_order_of_ids(tmp_path):
    image(tmp_path / "images" / "a.jpg")
    rows, names = open_coco(write(tmp_path), tmp_path / "images")
    assert names == ("cat", "dog")
    pixels, labels = RowReader(3, LabelMapping((0, 1, 2))).read(**{key: rows[0][key] for key in ("image", "label")})
    assert pixels.size == (WIDTH, HEIGHT)
    slow = np.zeros(SIZE, int)
    slow[3:8, 2:9] = 2
    assert (labels == slow).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {}}, "no list 'images'"),
        ({"annotations": [3]}, "no list 'annotations' of objects"),
        ({"categories": []}, "has no categories"),
        ({"categories": [{"id": 9, "name": "a"}, {"id": 9, "name": "b"}]}, "an id of categories is missing"),
        ({"categories": [{"id": 9, "name": "a"}, {"id": 3, "name": "a"}]}, "two have the same"),
        ({"categories": [{"id": 8, "name": "a"}]}, "annotation 7: category_id is 9"),
        ({"annotations": [{"id": 7, "image_id": 6, "category_id": 9, "segmentation": []}]}, "annotations of image 6"),
        (
            {"annotations": [{"id": 7, "image_id": 5, "category_id": 9, "bbox": [1, 1, 2, 2]}]},
            "annotation 7 has no segm",
        ),
        ({"images": [{"id": 5, "file_name": "../a.jpg", "height": 12, "width": 20}]}, "leads outside"),
        (
            {"images": [{"id": 5, "file_name": "b.jpg", "height": 12, "width": 20}]},
            "images that are not there: .*b.jpg",
        ),
        (
            {"images": [{"id": n, "file_name": "a.jpg", "height": 12, "width": 20} for n in (5, 6)]},
            "a.jpg 2 times; expected each file once: give all its annotations the id of one entry",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, changes, message):
    image(tmp_path / "images" / "a.jpg")
    if "annotations" not in changes and "images" in changes:
        changes["annotations"] = []
    with pytest.raises(ValueError, match=message):
        open_coco(write(tmp_path, **changes), tmp_path / "images")


def test_files_that_are_no_json_or_too_large_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON"):
        open_coco(path, tmp_path)
    monkeypatch.setattr("hf_segformer.data.polygons._LARGEST_FILE", 1000)
    with pytest.raises(ValueError, match="has 100,000 bytes; expected at most 1,000"):
        open_coco(path, tmp_path)


def test_a_size_that_is_not_the_images_is_named(tmp_path):
    image(tmp_path / "images" / "a.jpg")
    images = [{"id": 5, "file_name": "a.jpg", "height": 13, "width": WIDTH}]
    rows, _ = open_coco(write(tmp_path, images=images), tmp_path / "images")
    with pytest.raises(ValueError, match=re.escape("a.json, image 5 is 13x20 (height x width); expected the size of")):
        RowReader(3, LabelMapping((0, 1, 2))).read(rows[0]["image"], rows[0]["label"])


def test_training_reads_polygons(tmp_path):
    for split in ("train", "val"):
        image(tmp_path / split / "a.jpg")
        (tmp_path / f"{split}.json").write_text(json.dumps(content()))
    keys = {"root": str(tmp_path), "annotation_file": "{split}.json", "image_folder": "{split}"}
    data = load_data(DataConfig("coco", **keys))
    assert data.names == ("background", "cat", "dog")
    assert np.bincount(data.train[0]["label"].ravel()).tolist() == [HEIGHT * WIDTH - 35, 0, 35]
    reduced = load_data(DataConfig("coco", **keys, reduce_labels=True))
    assert reduced.names == ("cat", "dog")
    assert np.unique(reduced.evaluation[0]["label"]).tolist() == [1, 255]


def test_one_category_is_a_binary_task(tmp_path):
    image(tmp_path / "a.jpg")
    image(tmp_path / "b.jpg")
    images = [
        {"id": n, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH} for n, name in ((5, "a"), (6, "b"))
    ]
    write(tmp_path, images=images, categories=[{"id": 9, "name": "dog"}])
    config = DataConfig("coco", str(tmp_path), annotation_file="a.json", image_folder=".", eval_share=0.5)
    data = load_data(config)
    assert data.names == ("dog",)
    assert {*np.unique(data.train[0]["label"])} | {*np.unique(data.evaluation[0]["label"])} == {0, 1}
    with pytest.raises(ValueError, match=r"data.annotation_file is a.json, one file for all splits"):
        open_source(DataConfig("coco", str(tmp_path), annotation_file="a.json"))


def test_splits_with_other_categories_are_refused(tmp_path):
    for split, name in (("train", "cat"), ("val", "cow")):
        image(tmp_path / split / "a.jpg")
        categories = [{"id": 9, "name": "dog"}, {"id": 3, "name": name}]
        (tmp_path / f"{split}.json").write_text(json.dumps(content(categories=categories)))
    config = DataConfig("coco", str(tmp_path), annotation_file="{split}.json", image_folder="{split}")
    with pytest.raises(ValueError, match="'train' and 'val' differ in categories: cat"):
        open_source(config)
