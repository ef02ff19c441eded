"""Generated data set: deterministic samples whose classes only the outlines identify."""

import numpy as np
import pytest

from hf_segformer.data import shapes_hard
from hf_segformer.data.shapes import NAMES, PALETTE, Scene, draw_sample, shapes_dataset
from hf_segformer.files import IGNORE_INDEX

SIZE = 48


def arrays(*arguments):
    return [np.asarray(side) for side in draw_sample(*arguments)]


@pytest.fixture(scope="module")
def samples():
    drawn = [arrays(0, "train", index, SIZE) for index in range(150)]
    return [np.stack(side) for side in zip(*drawn, strict=True)]


def test_a_sample_depends_on_seed_split_and_index_alone():
    first = arrays(3, "validation", 7, SIZE)
    arrays(3, "train", 1, SIZE)
    np.random.seed(5)
    for one, other in zip(first, arrays(3, "validation", 7, SIZE), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("other", [(4, "train", 7), (3, "validation", 7), (3, "train", 8)])
def test_another_seed_split_or_index_gives_another_image(other):
    image, _ = arrays(3, "train", 7, SIZE)
    assert (image != arrays(*other, SIZE)[0]).mean() > 0.5


def test_every_class_and_ignored_pixels_occur_and_nothing_else(samples):
    _, labels = samples
    shares = {value: (labels == value).mean() for value in np.unique(labels)}
    assert set(shares) == {*range(len(NAMES)), IGNORE_INDEX}
    assert all(shares[label] > 0.01 for label in range(len(NAMES)))
    assert 0.002 < shares[IGNORE_INDEX] < 0.1


def test_shapes_occlude_at_most_a_fifth_of_one_another():
    shares = []
    for seed in range(40):
        scene = Scene(np.random.default_rng(seed), SIZE)
        scene.add_shape(1)
        alone = scene.owners == 1
        scene.add_shape(2)
        shares.append((alone & (scene.owners == 2)).sum() / alone.sum())
    assert max(shares) <= 0.2
    assert np.mean(np.array(shares) > 0.02) > 0.2


def test_colours_do_not_predict_the_class_of_a_shape(samples):
    """A classifier of pixel colours is no better on new images than the most frequent class."""
    images, labels = samples
    bins, is_shape = (images // 64).astype(int) @ [16, 4, 1], (labels > 0) & (labels != IGNORE_INDEX)
    train, test = np.split(np.arange(len(labels)), [2 * len(labels) // 3])
    counts = np.zeros((64, len(NAMES)), dtype=int)
    np.add.at(counts, (bins[train][is_shape[train]], labels[train][is_shape[train]]), 1)
    truth = labels[test][is_shape[test]]
    guess = counts.argmax(axis=1)[bins[test][is_shape[test]]]
    assert (guess == truth).mean() < (truth == counts.sum(axis=0).argmax()).mean() + 0.05


@pytest.mark.parametrize("size", [16, 33, 100])
def test_any_size_can_be_drawn(size):
    image, labels = draw_sample(0, "train", 0, size)
    assert (image.mode, image.size, labels.mode, labels.size) == ("RGB", (size, size), "L", (size, size))


def test_the_data_set_holds_the_samples_of_draw_sample():
    dataset = shapes_dataset("validation", 3, SIZE, seed=2)
    assert dataset.column_names == ["image", "label"]
    for index, row in enumerate(dataset):
        for column, expected in zip(("image", "label"), arrays(2, "validation", index, SIZE), strict=True):
            np.testing.assert_array_equal(np.asarray(row[column]), expected)


def test_there_is_one_distinct_colour_a_class():
    assert len(set(NAMES)) == len(set(PALETTE)) == len(NAMES) >= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "test", 0, SIZE), "unknown split 'test'; expected train, validation"),
        ((0, "train", -1, SIZE), "index -1"),
        ((0, "train", 0, 15), "size is 15"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_sample(*arguments)


# --- The harder variant -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hard_samples():
    drawn = {
        split: [[np.asarray(side) for side in shapes_hard.draw_sample(0, split, index, 64)] for index in range(60)]
        for split in ("train", "validation")
    }
    return {split: [np.stack(side) for side in zip(*pairs, strict=True)] for split, pairs in drawn.items()}


def test_a_hard_sample_depends_on_seed_split_and_index_alone():
    first = [np.asarray(side) for side in shapes_hard.draw_sample(3, "train", 7, SIZE)]
    np.random.seed(5)
    for one, other in zip(first, shapes_hard.draw_sample(3, "train", 7, SIZE), strict=True):
        np.testing.assert_array_equal(one, np.asarray(other))
    assert (first[0] != arrays(3, "train", 7, SIZE)[0]).mean() > 0.5


def test_hard_shapes_have_every_class_and_thin_ones_are_rare(hard_samples):
    _, labels = hard_samples["train"]
    shares = {value: (labels == value).mean() for value in np.unique(labels)}
    assert set(shares) == {*range(len(shapes_hard.NAMES)), IGNORE_INDEX}
    assert len(shapes_hard.NAMES) == len(set(shapes_hard.PALETTE)) == 10
    assert all(shares[label] < 0.015 for label in (7, 8, 9))
    assert all(shares[label] > 0.01 for label in range(1, 7))


def test_hard_shapes_stand_out_less_than_the_standard_ones(samples, hard_samples):
    def contrast(images, labels):
        """Mean distance of a shape's colour from that of its image's ground, in shares of the ground's brightness."""
        found = []
        for image, mask in zip(images / 255, labels, strict=True):
            ground = image[mask == 0].mean(axis=0)
            found += [
                np.linalg.norm(image[mask == label].mean(axis=0) - ground) / ground.mean()
                for label in range(1, 7)
                if (mask == label).any()
            ]
        return np.mean(found)

    assert contrast(*hard_samples["train"]) < 0.75 * contrast(*samples)


def test_evaluation_is_darker_and_so_is_no_training_image(hard_samples):
    means = {split: images.mean(axis=(1, 2, 3)) for split, (images, _) in hard_samples.items()}
    assert np.median(means["validation"]) < 0.7 * np.median(means["train"])


def test_an_unknown_difficulty_is_refused():
    from hf_segformer.config import DataConfig

    with pytest.raises(ValueError, match=r"data.difficulty is 'harder'; expected one of standard, hard"):
        DataConfig("shapes", num_train=1, num_eval=1, difficulty="harder")
    with pytest.raises(ValueError, match=r"data.difficulty is 'hard' for folders; expected source = shapes"):
        DataConfig("folders", root="x", difficulty="hard")


def test_the_hard_data_set_has_the_samples_of_draw_sample():
    dataset = shapes_dataset("validation", 2, SIZE, seed=2, draw=shapes_hard.draw_sample)
    for index, row in enumerate(dataset):
        expected = shapes_hard.draw_sample(2, "validation", index, SIZE)
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(expected[0]))
