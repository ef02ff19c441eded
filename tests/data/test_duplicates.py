"""Near duplicates: the same scene in another light, size or compression, and nothing else."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from hf_segformer.config import DataConfig
from hf_segformer.data.duplicates import difference_hash, find_near_duplicates
from hf_segformer.data.shapes import shapes_dataset
from hf_segformer.training.data import load_data
from hf_segformer.training.data_checks import check_data

HEIGHT, WIDTH = 72, 96


def scene(seed):
    """A smooth random image, as scenes are: low frequencies with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 200, (7, 9, 3), np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
    return Image.fromarray((np.asarray(coarse) + rng.normal(0, 3, (HEIGHT, WIDTH, 3))).clip(0, 255).astype(np.uint8))


def encoded(image, quality):
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def distance(one, other):
    return (difference_hash(one) ^ difference_hash(other)).bit_count()


def test_the_hash_is_that_of_block_means():
    for seed in range(5):
        image = scene(seed).crop((0, 0, 90, HEIGHT))
        grey = np.asarray(image.convert("L"), float).reshape(8, 9, 9, 10).mean(axis=(1, 3))
        steps = np.diff(grey, axis=1).ravel()
        ours = np.array([int(bit) for bit in f"{difference_hash(image):064b}"])
        assert (ours == (steps > 0))[abs(steps) > 1e-3].all()


@pytest.mark.parametrize(
    "change",
    [
        lambda image: encoded(image, 40),
        lambda image: image.point(lambda value: min(255, value * 1.2 + 10)),
        lambda image: image.point(lambda value: value * 0.6),
        lambda image: image.resize((WIDTH // 2, HEIGHT // 2)),
        lambda image: encoded(image.point(lambda value: value * 0.8), 60),
    ],
)
def test_light_compression_and_size_leave_the_hash(change):
    for seed in range(10):
        assert distance(scene(seed), change(scene(seed))) <= 4


def test_other_scenes_are_far():
    hashes = [difference_hash(scene(seed)) for seed in range(60)]
    assert find_near_duplicates(hashes[:40], hashes[40:]).pairs == ()
    rows = [shapes_dataset(split, 40, 64, 0) for split in ("train", "validation")]
    hashes = [[difference_hash(row["image"]) for row in each] for each in rows]
    assert find_near_duplicates(*hashes).pairs == ()


@pytest.mark.parametrize("values", [np.zeros((3, 40, 50)), np.broadcast_to(np.arange(50.0), (1, 40, 50))])
def test_images_without_structure_are_not_compared(values):
    assert difference_hash(values) is None
    assert difference_hash(np.full((2, 40, 50), np.nan)) is None


def test_pairs_are_those_of_a_slow_search(monkeypatch):
    rng = np.random.default_rng(0)
    train = [int(value) for value in rng.integers(0, 2**63, 300)]
    evaluation = [
        value ^ int(sum(1 << int(bit) for bit in rng.choice(64, size, replace=False)))
        for value, size in zip(train[:40], [*range(8)] * 5, strict=True)
    ]
    train[7] = evaluation[3] = None
    slow = [
        (e, t)
        for e, one in enumerate(evaluation)
        for t, two in enumerate(train)
        if one is not None and two is not None and (one ^ two).bit_count() <= 4
    ]
    for block in (1, 2**22):
        monkeypatch.setattr("hf_segformer.data.duplicates._BLOCK", block)
        found = find_near_duplicates(train, evaluation, num_shown=100)
        assert found.pairs == tuple(slow)
        assert (found.num_pairs, found.num_evaluation, found.num_compared) == (len(slow), len(slow), 39)
        assert find_near_duplicates(train, evaluation).pairs == tuple(slow[:5])


def folders(root, same):
    for split, seeds in (("train", range(4)), ("val", range(10, 14))):
        for seed in seeds:
            for kind in ("images", "masks"):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
            scene(seed).save(root / "images" / split / f"{seed}.png")
            Image.new("L", (WIDTH, HEIGHT), seed % 2).save(root / "masks" / split / f"{seed}.png")
    if same:
        encoded(scene(2).point(lambda value: value * 0.9), 60).save(root / "images" / "val" / "12.png")
    return DataConfig("folders", str(root), names=["a", "b"])


def test_the_data_check_warns_of_near_duplicates(tmp_path, capsys):
    check_data(load_data(folders(tmp_path / "a", True)), 2)
    said = capsys.readouterr().out
    assert "WARNING: 1 evaluation image is nearly the same as a training image (1 pair)" in said
    assert "val/12.png (evaluation row 2) and " in said
    assert "train/2.png (train row 2). Metrics will be too high." in said
    assert "split.group=REGEX" in said
    check_data(load_data(folders(tmp_path / "b", False)), 2)
    assert "nearly" not in capsys.readouterr().out
