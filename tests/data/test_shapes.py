"""The generated data set: the same everywhere it is asked for, and decided by outlines alone."""

import numpy as np
import pytest

from hf_segformer.data.shapes import NAMES, PALETTE, _Scene, draw_sample, shapes_dataset
from hf_segformer.files import IGNORE_INDEX

SIZE = 48


def arrays(*arguments):
    return [np.asarray(picture) for picture in draw_sample(*arguments)]


@pytest.fixture(scope="module")
def many():
    samples = [arrays(0, "train", index, SIZE) for index in range(150)]
    return [np.stack(side) for side in zip(*samples, strict=True)]


def test_a_picture_depends_on_seed_split_and_index_alone():
    first = arrays(3, "validation", 7, SIZE)
    arrays(3, "train", 1, SIZE)
    np.random.seed(5)
    for one, other in zip(first, arrays(3, "validation", 7, SIZE), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("other", [(4, "train", 7), (3, "validation", 7), (3, "train", 8)])
def test_another_seed_split_or_index_is_another_picture(other):
    picture, _ = arrays(3, "train", 7, SIZE)
    assert (picture != arrays(*other, SIZE)[0]).mean() > 0.5


def test_every_class_and_ignored_pixels_occur_and_nothing_else(many):
    _, labels = many
    shares = {value: (labels == value).mean() for value in np.unique(labels)}
    assert set(shares) == {*range(len(NAMES)), IGNORE_INDEX}
    assert all(shares[label] > 0.01 for label in range(len(NAMES)))
    assert 0.002 < shares[IGNORE_INDEX] < 0.1


def test_shapes_hide_one_another_but_never_more_than_a_fifth_of_one():
    shares = []
    for seed in range(40):
        scene = _Scene(np.random.default_rng(seed), SIZE)
        scene.add_shape(1)
        alone = scene.owners == 1
        scene.add_shape(2)
        shares.append((alone & (scene.owners == 2)).sum() / alone.sum())
    assert max(shares) <= 0.2
    assert np.mean(np.array(shares) > 0.02) > 0.2


def test_colours_do_not_give_the_class_of_a_shape_away(many):
    """The best guess from a pixel's colour, learnt on some pictures, is no better on others than no look at all."""
    pictures, labels = many
    bins, is_shape = (pictures // 64).astype(int) @ [16, 4, 1], (labels > 0) & (labels != IGNORE_INDEX)
    learnt, tested = np.split(np.arange(len(labels)), [2 * len(labels) // 3])
    counts = np.zeros((64, len(NAMES)), dtype=int)
    np.add.at(counts, (bins[learnt][is_shape[learnt]], labels[learnt][is_shape[learnt]]), 1)
    truth = labels[tested][is_shape[tested]]
    guess = counts.argmax(axis=1)[bins[tested][is_shape[tested]]]
    assert (guess == truth).mean() < (truth == counts.sum(axis=0).argmax()).mean() + 0.05


@pytest.mark.parametrize("size", [16, 33, 100])
def test_any_size_can_be_drawn(size):
    picture, labels = draw_sample(0, "train", 0, size)
    assert (picture.mode, picture.size, labels.mode, labels.size) == ("RGB", (size, size), "L", (size, size))


def test_the_data_set_holds_these_very_pictures():
    dataset = shapes_dataset("validation", 3, SIZE, seed=2)
    assert dataset.column_names == ["image", "label"]
    for index, row in enumerate(dataset):
        for column, expected in zip(("image", "label"), arrays(2, "validation", index, SIZE), strict=True):
            np.testing.assert_array_equal(np.asarray(row[column]), expected)


def test_names_and_colours_belong_together():
    assert len(set(NAMES)) == len(set(PALETTE)) == len(NAMES) >= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "test", 0, SIZE), "unknown split 'test': known are train, validation"),
        ((0, "train", -1, SIZE), "index -1"),
        ((0, "train", 0, 15), "size is 15"),
    ],
)
def test_what_can_not_be_drawn_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_sample(*arguments)
