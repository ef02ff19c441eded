"""Masks whose colours are the classes: their reading, the mapping to labels, settings, training and evaluation."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from hf_segformer import SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.cli.main import main
from hf_segformer.config import DataConfig
from hf_segformer.data.decoding import RowReader
from hf_segformer.data.label_mapping import build_mapping, pack_color, unpack_color
from hf_segformer.data.mask_values import explain_colors
from hf_segformer.data.readers import read_color_mask
from hf_segformer.training.data import load_data
from hf_segformer.training.folder_run import plan_data
from hf_segformer.training.plan import Budget
from tests.support.folders import SIZE, mask, pairs

COLORS = [[128, 64, 128], [0, 0, 142], [70, 70, 70]]
VOID = [0, 0, 0]


def pixels(seed=0):
    colors = np.array([*COLORS, VOID], np.uint8)
    return colors[np.random.default_rng(seed).integers(0, 4, SIZE)]


def slow(colors):
    return [[65536 * int(r) + 256 * int(g) + int(b) for r, g, b in row] for row in colors]


def test_a_colour_is_one_integer():
    assert [unpack_color(pack_color(color)) for color in (*COLORS, [255, 255, 255])] == [*COLORS, [255, 255, 255]]


@pytest.mark.parametrize("kind", ["RGB.png", "RGBA.png", "P.png", "RGB.bmp", "tiff.tif", "last.npy", "first.npy"])
def test_colours_are_read_from_any_format(tmp_path, kind):
    path, stored = tmp_path / kind, pixels()
    image = Image.fromarray(stored)
    if kind == "tiff.tif":
        tifffile.imwrite(path, stored, photometric="rgb", tile=(16, 16))
    elif kind.endswith(".npy"):
        np.save(path, stored if kind == "last.npy" else np.moveaxis(stored, -1, 0))
    elif kind == "P.png":
        image.quantize(8, dither=Image.Dither.NONE).save(path)
    else:
        image.convert(kind.partition(".")[0]).save(path)
    assert read_color_mask(path).tolist() == slow(stored)


def test_grey_is_a_colour(tmp_path):
    Image.fromarray(np.full(SIZE, 7, np.uint8)).save(tmp_path / "a.png")
    assert (read_color_mask(tmp_path / "a.png") == pack_color([7, 7, 7])).all()


@pytest.mark.parametrize(
    ("name", "stored", "message"),
    [
        ("a.jpg", pixels(), "JPEG file, whose compression changes colours"),
        ("a.png", np.zeros(SIZE, np.uint16), "has no 8-bit colours"),
    ],
)
def test_what_has_no_exact_colours_is_refused(tmp_path, name, stored, message):
    Image.fromarray(stored).save(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_color_mask(tmp_path / name)


def test_colours_are_mapped_to_labels_and_others_are_named(tmp_path):
    mapping = build_mapping(3, mask_colors=COLORS, ignore_colors=[VOID])
    stored = pixels(1)
    lookup = {tuple(color): label for label, color in enumerate(COLORS)} | {tuple(VOID): 255}
    Image.fromarray(stored).save(tmp_path / "a.png")
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "a.jpg")
    _, labels = RowReader(3, mapping).read(str(tmp_path / "a.jpg"), str(tmp_path / "a.png"))
    assert labels.tolist() == [[lookup[tuple(color)] for color in row] for row in stored.tolist()]
    # blue 255 is the integer that is ignored in masks of integers
    for color in ([0, 0, 255], [1, 2, 3]):
        mask(tmp_path / "a.png", (VOID, color))
        with pytest.raises(
            ValueError, match=r"a.png holds \[\d, \d, \d+\]; expected the classes \[128, 64, 128\], .*colors"
        ):
            RowReader(3, mapping).read(str(tmp_path / "a.jpg"), str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_colors": [[0, 0, 256]]}, r"data.mask_colors has \[0, 0, 256\]"),
        ({"mask_colors": [[0, 0]]}, r"data.mask_colors has \[0, 0\]"),
        ({"mask_colors": [VOID, VOID]}, r"data.mask_colors has \(0, 0, 0\) more than once"),
        ({"ignore_colors": [VOID]}, "data.ignore_colors is set without data.mask_colors"),
        ({"mask_colors": COLORS, "ignore_colors": COLORS[:1]}, "which data.mask_colors has too"),
        ({"mask_colors": COLORS, "label_values": [1, 2, 3]}, "data.label_values and data.mask_colors are both set"),
        ({"mask_colors": COLORS, "ignore_values": [1]}, "data.ignore_values and data.mask_colors are both set"),
        ({"mask_colors": COLORS, "reduce_labels": True}, "data.reduce_labels and data.mask_colors are both set"),
        ({"mask_colors": COLORS, "source": "camvid"}, "the masks of camvid hold no colours"),
        ({"source": "coco"}, "data.annotation_file is not set"),
        ({"annotation_file": "a.json"}, "data.annotation_file is set, but data.source is folders"),
        ({"source": "dataset", "split_file": "a.txt"}, "data.split_file is set, but data.source is dataset"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**({"source": "folders", "root": "x"} | values))


def test_there_is_a_colour_for_each_class(tmp_path):
    pairs(tmp_path, "images/{}.jpg", "masks/{}.png", "ab", COLORS)
    config = DataConfig("folders", str(tmp_path), eval_share=0.5, names=["a", "b"], mask_colors=COLORS)
    with pytest.raises(ValueError, match=r"data.mask_colors has 3 entries; expected 2"):
        load_data(config)


def test_training_and_evaluation_read_colours(tmp_path, tiny_config, capsys):
    pairs(tmp_path, "images/{}.jpg", "masks/{}.png", "abcd", [*COLORS, VOID])
    names = ["road", "car", "wall"]
    colors = {"mask_colors": COLORS, "ignore_colors": [VOID]}
    data = load_data(DataConfig("folders", str(tmp_path), eval_share=0.5, names=names, **colors))
    assert data.palette == tuple(map(tuple, COLORS))
    assert np.bincount(data.train[0]["label"].ravel(), minlength=256)[[0, 1, 2, 255]].tolist() == [60] * 4

    model = SegFormerForSemanticSegmentation(tiny_config(num_labels=3, id2label=dict(enumerate(names)))).eval()
    model.save_pretrained(tmp_path / "model")
    processor = SegFormerImageProcessor(do_resize=False)
    processor.save_pretrained(tmp_path / "model")
    integers = tmp_path / "integers"
    pairs(integers, "images/{}.jpg", "masks/{}.png", "abcd", (0, 1, 2, 255))
    command = ["evaluate", str(tmp_path / "model"), "--device", "cpu", "--images", str(tmp_path / "images"), "--masks"]
    given = [f"--{key.replace('_', '-')}" for key in colors]
    texts = [[",".join(map(str, color)) for color in each] for each in colors.values()]
    main([*command, str(tmp_path / "masks"), given[0], *texts[0], given[1], *texts[1]])
    by_colors = capsys.readouterr().out
    main([*command, str(integers / "masks")])
    assert by_colors == capsys.readouterr().out
    assert "road" in by_colors


@pytest.mark.parametrize(
    ("given", "colors", "ignored"),
    [
        ({"reduce_labels": True}, (1, 2, 3), (0,)),
        ({"ignore_values": [3]}, (0, 1, 2), (3,)),
        ({"label_values": [1, 2, 3]}, (1, 2, 3), (0,)),
    ],
)
def test_remedies_for_values_hold_for_grey_that_is_stored_as_colours(tmp_path, given, colors, ignored):
    shares = {pack_color([value] * 3): 0.25 for value in range(4)}
    with pytest.raises(ValueError, match=r"set data.reduce_labels=true .* set data.ignore_values=\[3\]"):
        explain_colors(shares, None, ("a", "b", "c"), "classes.json", {})
    meaning = explain_colors(shares, None, ("a", "b", "c"), "classes.json", given)
    assert meaning.tables["mask_colors"] == [[value] * 3 for value in colors]
    assert meaning.tables["ignore_colors"] == [[value] * 3 for value in ignored]
    DataConfig("folders", str(tmp_path), **(given | meaning.tables))  # they do not contradict each other


def test_a_plan_says_in_colours_what_was_given_in_values(tmp_path):
    for index in range(4):
        for folder, values in (("images", index), ("masks", np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 4)):
            (tmp_path / folder).mkdir(exist_ok=True)
            grey = np.broadcast_to(np.asarray(values, np.uint8), SIZE)
            Image.fromarray(np.stack([grey] * 3, axis=-1)).save(tmp_path / folder / f"{index}.png")
    plan = plan_data(str(tmp_path), Budget(steps=2), ['data.names=["a", "b", "c"]', "data.reduce_labels=true"])
    data = plan.to_recipe("run").data
    assert (data.reduce_labels, data.mask_colors, data.ignore_colors) == (False, [[1] * 3, [2] * 3, [3] * 3], [[0] * 3])
