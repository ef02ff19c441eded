"""Images with masks in folders and data sets, and `segformer evaluate` on them."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer import SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.config import InferenceOptions
from hf_segformer.data.paired_folders import find_pairings
from hf_segformer.data.pairing import decode_dataset, find_images, open_split, pair_images_and_masks
from hf_segformer.evaluation.evaluate import evaluate
from hf_segformer.inference.segmenter import predict
from tests.support.commands import assert_one_line, run

HEIGHT, WIDTH = 40, 56


@pytest.fixture
def labelled(tmp_path):
    """Three images of different kinds with masks of five classes."""
    random = np.random.default_rng(0)
    for name in ("images/a.jpg", "images/b.png", "images/deep/c.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(tmp_path / name)
    for name in ("labels/a_labels.png", "labels/b_labels.tif", "labels/deep/c_labels.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 5, (HEIGHT, WIDTH), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def folder(tiny_config, tmp_path):
    SegFormerForSemanticSegmentation(tiny_config()).save_pretrained(tmp_path / "model")
    SegFormerImageProcessor(size=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def pairs_of(root, **suffixes):
    return pair_images_and_masks(root / "images", root / "labels", **{"mask_suffix": "_labels", **suffixes})


def judge(folder, root, *options):
    pairs = ("--images", root / "images", "--masks", root / "labels", "--mask-suffix", "_labels")
    return run("evaluate", folder, *pairs, "--device", "cpu", *options)


def test_a_suffix_without_an_ending_stands_before_any_known_one(labelled):
    names = [row["label"].rsplit("/", 1)[1] for row in pairs_of(labelled)]
    assert names == ["a_labels.png", "b_labels.tif", "c_labels.png"]


def test_hidden_files_are_no_images(labelled):
    for name in ("images/.ipynb_checkpoints/a-checkpoint.jpg", "images/._b.png", "images/notes.pdf"):
        (labelled / name).parent.mkdir(exist_ok=True)
        (labelled / name).write_bytes(b"")
    assert len(pairs_of(labelled)) == 3
    assert [path.name for path in find_images(labelled / "images")] == ["a.jpg", "b.png", "c.webp"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ("images/{}.png", "masks/mask_{}.png"),
            "Names of masks begin with 'mask_': set data.mask_prefix=mask_, or --mask-prefix mask_",
        ),
        (
            ("images/rgb-{}.png", "masks/{}.png"),
            "Names of images begin with 'rgb-': set data.image_prefix=rgb-, or --image-prefix rgb-",
        ),
        (
            ("images/img_{}.png", "masks/gt_{}.png"),
            "Names of images begin with 'img_' and names of masks begin with 'gt_': set data.image_prefix=img_ "
            "data.mask_prefix=gt_, or --image-prefix img_ --mask-prefix gt_",
        ),
        (("images/{}.png", "masks/{}m.png"), "Names of masks end in 'm': set data.mask_suffix=m, or --mask-suffix m"),
        (("images/{}S.png", "masks/{}s.png"), "Names of masks and images differ in upper and lower case: rename them"),
        (("images/a{}.png", "masks/b{}0.png"), "nor has"),
    ],
)
def test_what_names_differ_by_is_said(tmp_path, names, words):
    for index in range(3):
        for mode, name in zip(("RGB", "L"), names, strict=True):
            path = tmp_path / name.format(index)
            path.parent.mkdir(exist_ok=True)
            Image.new(mode, (8, 6)).save(path)
    with pytest.raises(ValueError, match="has no ") as raised:
        pair_images_and_masks(tmp_path / "images", tmp_path / "masks")
    assert words in str(raised.value)


def test_names_pair_in_any_unicode_form(tmp_path):
    """macOS stores accents apart from their letters, and other systems do not."""
    for mode, folder, name in (
        ("RGB", "images", "u\N{COMBINING DIAERESIS}.png"),
        ("L", "masks", "\N{LATIN SMALL LETTER U WITH DIAERESIS}.png"),
    ):
        (tmp_path / folder).mkdir()
        Image.new(mode, (8, 6)).save(tmp_path / folder / name)
    pairs = pair_images_and_masks(tmp_path / "images", tmp_path / "masks")
    assert [Path(pairs[0][column]).parent.name for column in ("image", "label")] == ["images", "masks"]
    assert find_pairings(tmp_path)[0].mask_folder == "masks"
    (tmp_path / "list.txt").write_text("u\N{COMBINING DIAERESIS}\n", encoding="utf-8")
    assert len(pair_images_and_masks(tmp_path / "images", tmp_path / "masks", listed=tmp_path / "list.txt")) == 1


def test_files_without_a_partner_are_listed_in_one_line(labelled):
    for name in ("a_labels.png", "b_labels.tif", "deep/c_labels.png"):
        (labelled / "labels" / name).rename(labelled / name.split("/")[-1])
    with pytest.raises(
        ValueError, match=r"images/a\.jpg has no mask; expected .*a_labels\.png; nor has b, deep/c a partner$"
    ):
        pairs_of(labelled)


def test_evaluate_prints_and_writes_what_the_loop_counts(folder, labelled, capsys):
    out = labelled / "out"
    assert judge(folder, labelled, "--output-dir", out, "--flip", "--title", "Streets") == 0
    table = capsys.readouterr().out
    assert "LABEL_4" in table
    found = json.loads((out / "metrics.json").read_text())
    model = SegFormerForSemanticSegmentation.from_pretrained(folder)
    rows = decode_dataset(pairs_of(labelled), 3, 5)
    options = InferenceOptions(flip=True)
    expected = evaluate(model, SegFormerImageProcessor.from_pretrained(folder), rows, options, progress=False)
    assert expected.format_table() in table
    assert found["mean_iou"] == pytest.approx(expected.metrics["mean_iou"], abs=0)
    assert found["dataset"] == {"title": "Streets", "split": "", "images": 3}
    assert found["method"]["flip"] is True
    with Image.open(out / "confusion.png") as confusion:
        assert confusion.width > 100


def test_a_data_set_gives_what_its_folders_give(folder, labelled, capsys):
    pairs = pairs_of(labelled)
    encoded = {
        "photo": [{"bytes": Path(path).read_bytes(), "path": None} for path in pairs["image"]],
        "mask": [{"bytes": Path(path).read_bytes(), "path": None} for path in pairs["label"]],
    }
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image()})
    data = datasets.Dataset.from_dict(encoded, features=features)
    datasets.DatasetDict({"test": data}).save_to_disk(labelled / "data")
    assert judge(folder, labelled) == 0
    of_folders = capsys.readouterr().out
    columns = ("--image-column", "photo", "--mask-column", "mask")
    assert run("evaluate", folder, "--dataset", labelled / "data", "--split", "test", *columns, "--device", "cpu") == 0
    assert capsys.readouterr().out == of_folders
    with pytest.raises(ValueError, match=r"no split 'validation'; expected one of 'test': set --split"):
        open_split(str(labelled / "data"), "validation")
    with pytest.raises(ValueError, match=r"no column 'image'; expected one of 'photo', 'mask': set --image-column"):
        open_split(str(labelled / "data"), "test")


def test_a_binary_model_is_judged_on_two_values(tiny_config, labelled, capsys):
    SegFormerForSemanticSegmentation(tiny_config(num_labels=1)).save_pretrained(labelled / "binary")
    for row in pairs_of(labelled):
        Image.fromarray((np.asarray(Image.open(row["label"])) > 2).astype(np.uint8) * 255).save(row["label"])
    assert judge(labelled / "binary", labelled) == 0
    warning = "no mask has a pixel of 'LABEL_0'; if 255 stands for it, add --label-values 0 255"
    assert warning in capsys.readouterr().err
    assert judge(labelled / "binary", labelled, "--label-values", 0, 255) == 0
    captured = capsys.readouterr()
    assert warning not in captured.err
    table = captured.out
    assert "background" in table
    shares = [float(line.split()[-1]) for line in table.splitlines()[1:3]]
    assert sum(shares) == pytest.approx(100)
    assert shares[1] == pytest.approx(40, abs=5)


def test_reduce_labels_maps_classes_from_one(tiny_config, folder, labelled):
    rows = decode_dataset(pairs_of(labelled), 3, 4, reduce_labels=True)
    stored = np.asarray(Image.open(labelled / "labels/a_labels.png"))
    assert np.array_equal(rows[0]["label"], np.where(stored == 0, 255, stored - 1))


def spoil(path, content):
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: spoil(root / "images/b.png", b""), ["b.png"]),
        (lambda root: spoil(root / "images/b.png", b"a text"), ["b.png", "not an image in one of the formats"]),
        (lambda root: spoil(root / "images/b.png", (root / "images/b.png").read_bytes()[:2000]), ["b.png"]),
        (lambda root: spoil(root / "labels/b_labels.tif", b"II*\0"), ["b_labels.tif"]),
        (
            lambda root: Image.new("L", (9, 7)).save(root / "labels/b_labels.tif"),
            ["b_labels.tif is 7x9", "b.png, 40x56"],
        ),
        (
            lambda root: Image.new("L", (90, 70)).save(root / "labels/b_labels.tif"),
            ["b_labels.tif is 70x90", "b.png, 40x56"],
        ),
        (
            lambda root: Image.new("L", (WIDTH, HEIGHT), 77).save(root / "labels/b_labels.tif"),
            ["b_labels.tif holds 77; expected the classes 0 to 4"],
        ),
        (
            lambda root: Image.new("RGB", (WIDTH, HEIGHT)).save(root / "labels/b_labels.tif"),
            ["b_labels.tif", "convert colours to labels first"],
        ),
    ],
)
def test_a_faulty_pair_is_one_line_with_its_file(damage, words, folder, labelled, capsys):
    damage(labelled)
    assert judge(folder, labelled) == 1
    assert_one_line(capsys.readouterr().err.splitlines()[-1].lstrip("\r") + "\n", *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "tpu"], ["device is 'tpu'"]),
        (["--label-values", 0, 1], ["--label-values has 2 entries; expected 5"]),
    ],
)
def test_wrong_options_are_one_line(options, words, folder, labelled, capsys):
    assert judge(folder, labelled, *options) == 1
    assert_one_line(capsys.readouterr().err, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sliding-window", 3], ["--sliding-window is 3"]),
        (["--scales", -1], ["--scales is [-1.0]"]),
        (["--dataset", "a/b"], ["either --images DIR and --masks DIR, or --dataset NAME"]),
        (["--output-dir", "/dev/null/results"], ["/dev/null/results"]),
    ],
)
def test_wrong_usage_exits_with_2(options, words, folder, labelled, capsys):
    assert judge(folder, labelled, *options) == 2
    assert_one_line(capsys.readouterr().err, *words)


def test_a_full_disk_is_one_line_and_leaves_earlier_results(folder, labelled, capsys, monkeypatch):
    out = labelled / "out"
    assert judge(folder, labelled, "--output-dir", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def half_written(write, half, file):
        def method(path, content, *arguments, **keywords):
            if file not in path.name:
                return write(path, content, *arguments, **keywords)
            write(path, half)
            raise OSError(28, "No space left on device", str(path))

        return method

    steps = (("write_text", "half", "metrics.json"), ("write_bytes", b"half", "confusion.png"))
    for method, half, file in steps:
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, half_written(getattr(Path, method), half, file))
            capsys.readouterr()
            assert judge(folder, labelled, "--output-dir", out, "--flip") == 1
        assert_one_line(capsys.readouterr().err.splitlines()[-1].lstrip("\r") + "\n", "No space left", file)
        assert (out / file).read_bytes() == before[file]
    assert {path.name for path in out.iterdir()} == before.keys()


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (3, 5)])
@pytest.mark.parametrize("keywords", [{"size": 64}, {"size": {"shortest_edge": 32}, "keep_ratio": True}])
def test_images_of_any_shape_get_a_segmentation_map_of_their_size(tiny_config, keywords, size):
    if "keep_ratio" in keywords and max(size) > 100:
        keywords = {**keywords, "size": {"shortest_edge": 32, "longest_edge": 256}, "size_divisor": 32}
    model, processor = SegFormerForSemanticSegmentation(tiny_config()), SegFormerImageProcessor(**keywords)
    image = Image.new("RGB", size[::-1], (200, 30, 60))
    inputs = processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    [labels] = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
    assert labels.shape == size
    assert labels.unique().numel() >= 1
    assert predict(model, processor, image, size).equal(labels)


@pytest.mark.parametrize(
    ("spoiled", "content", "words"),
    [
        ("model.safetensors", None, ["model must hold one file of weights", "holds none"]),
        ("model.safetensors", 2000, ["model.safetensors is cut short"]),
        ("model.safetensors", b"", ["model.safetensors is empty"]),
        ("model.safetensors", b"<html>", ["model.safetensors is a web page"]),
        ("config.json", b'{"model_type": "bert", "hidden_size": 8}', ["bert"]),
        ("config.json", b'{"model_type": ', ["config.json is not JSON"]),
        ("config.json", b"[]", ["config.json holds a list"]),
        ("preprocessor_config.json", b"{", ["model"]),
        ("preprocessor_config.json", b'{"image_mean": "grey"}', ["image_mean"]),
        (
            "preprocessor_config.json",
            b'{"image_mean": [0.5], "image_std": [0.5]}',
            ["has 1 entries", "expected one a channel, 3"],
        ),
    ],
)
def test_a_bad_model_folder_is_one_line(spoiled, content, words, folder, labelled, capsys):
    file = folder / spoiled
    whole = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(whole[:content] if isinstance(content, int) else content)
    assert judge(folder, labelled) == 1
    assert_one_line(capsys.readouterr().err, *words)


def test_debug_shows_where_an_error_comes_from(folder, labelled, capsys):
    assert judge(folder, labelled, "--sliding-window", 3, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_one_folder_without_affixes_is_refused(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("L", (4, 4)).save(tmp_path / name)
    with pytest.raises(ValueError, match="is the folder of images and of masks; expected one for each, or how"):
        pair_images_and_masks(tmp_path, tmp_path / ".")
