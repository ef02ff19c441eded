"""The accumulator: every figure of one pass, the same however the images are shared out."""

import numpy as np
import pytest
import torch

from hf_segformer.evaluation.accumulator import MetricAccumulator, typical_images, worst_images
from hf_segformer.evaluation.binary import probability_histogram
from hf_segformer.evaluation.bootstrap import class_counts
from hf_segformer.evaluation.boundary import boundary_counts
from hf_segformer.evaluation.calibration import calibration_counts
from hf_segformer.evaluation.metrics import confusion_matrix

IGNORE = 255


def images(num_classes, number=5):
    """Probabilities, predictions and labels of images of different sizes."""
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        size = 20 + seed, 31 - seed
        probabilities = (3 * torch.randn(num_classes, *size, generator=generator)).softmax(dim=0)
        prediction = probabilities.argmax(dim=0)
        labels = torch.where(torch.rand(size, generator=generator) < 0.2 * seed, 0, prediction)
        labels[:2] = IGNORE
        yield probabilities, prediction, labels


def accumulated(num_classes, places=range(5), with_probabilities=True):
    accumulator = MetricAccumulator(num_classes, IGNORE)
    for place, (probabilities, prediction, labels) in enumerate(images(num_classes)):
        if place in places:
            probabilities = probabilities if with_probabilities else None
            accumulator.update(probabilities, prediction, labels, name=f"{place}.png", index=place)
    return accumulator


@pytest.mark.parametrize("num_classes", [2, 4])
def test_sums_are_those_of_the_parts(num_classes):
    accumulator, samples = accumulated(num_classes), list(images(num_classes))
    matrices = [confusion_matrix(prediction, labels, num_classes, IGNORE) for _, prediction, labels in samples]
    assert accumulator.matrix.equal(sum(matrices))
    assert accumulator.boundary.equal(sum(boundary_counts(*pair, num_classes, IGNORE) for _, *pair in samples))
    assert accumulator.calibration.equal(
        sum(calibration_counts(probabilities, labels, IGNORE) for probabilities, _, labels in samples)
    )
    np.testing.assert_array_equal(accumulator.counts, class_counts(torch.stack(matrices)))
    assert accumulator.names == [f"{place}.png" for place in range(5)]
    if num_classes == 2:
        assert accumulator.histogram.equal(sum(probability_histogram(p[1], labels, IGNORE) for p, _, labels in samples))
    else:
        assert accumulator.histogram is None


@pytest.mark.parametrize("with_probabilities", [True, False])
def test_processes_together_count_what_one_counts(with_probabilities):
    whole = accumulated(2, with_probabilities=with_probabilities)
    states = [accumulated(2, places, with_probabilities).state() for places in ([1, 4], [], [0, 2, 3])]
    part = accumulated(2, [1, 4], with_probabilities)
    part.combine(states)
    for name, expected in whole.state().items():
        found = part.state()[name]
        if isinstance(expected, torch.Tensor):
            assert found.equal(expected), name
    assert (part.names, part.indices) == (whole.names, whole.indices)
    np.testing.assert_array_equal(part.counts, whole.counts)


def test_a_combined_accumulator_shares_no_memory_with_its_state():
    accumulator = accumulated(2)
    before = accumulator.state()
    accumulator.combine([before])
    accumulator.matrix += 1
    assert (accumulator.matrix != before["matrix"]).all()


def test_a_refused_image_leaves_nothing_behind():
    accumulator = accumulated(4)
    before, (probabilities, prediction, labels) = accumulator.state(), next(images(4))
    for bad in (
        (None, prediction, labels),
        (probabilities[:3], prediction, labels),
        (2 * probabilities, prediction, labels),
        (probabilities, prediction, labels[1:]),
        (probabilities, prediction, labels + 9),
    ):
        with pytest.raises(ValueError, match=r"probabilities|predictions|labels"):
            accumulator.update(*bad)
    assert accumulator.matrix.equal(before["matrix"])
    assert accumulator.names == [f"{place}.png" for place in range(5)]


def test_images_are_named_by_their_place_without_a_name():
    accumulator = MetricAccumulator(4, IGNORE)
    for _, prediction, labels in images(4, 2):
        accumulator.update(None, prediction, labels)
    assert (accumulator.names, accumulator.indices) == (["0", "1"], [0, 1])
    assert MetricAccumulator(4, IGNORE).counts.shape == (0, 3, 4)


def test_worst_and_typical_images():
    iou = np.array([0.9, 0.1, 0.5, np.nan, 0.4, 0.7])
    counts = np.zeros((6, 3, 1), dtype=np.int64)
    for place, score in enumerate(iou):
        if not np.isnan(score):
            counts[place, :, 0] = round(1000 * score), 1000, round(1000 * score)
    assert worst_images(counts, 2) == [1, 4]
    assert worst_images(counts, 99) == [1, 4, 2, 5, 0]
    assert typical_images(counts, 2) == [2, 4]
    assert typical_images(counts, 2, without=[1, 4]) == [2, 5]
    assert worst_images(counts[3:4], 2) == typical_images(counts[3:4], 2) == []
