"""Mean IoU: exact over batches, with absent classes, ignored pixels and predictions out of range."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hf_segformer.evaluation.mean_iou import MeanIoU
from hf_segformer.evaluation.metrics import confusion_matrix, scores

K, IGNORE = 4, 255

shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=7)
labels_of = st.sampled_from([*range(K), IGNORE])
predictions_of = st.sampled_from([-1, *range(K), K, 200, IGNORE])


@st.composite
def maps(draw):
    shape = draw(shapes)
    predictions = draw(hnp.arrays(np.int64, shape, elements=predictions_of))
    return predictions, draw(hnp.arrays(np.int64, shape, elements=labels_of))


def naive_scores(predictions, labels):
    """Reference: one class at a time, by the definition, with pixels as sets."""
    counted = labels != IGNORE
    ious, accuracies = [], []
    for category in range(K):
        true, predicted = counted & (labels == category), counted & (predictions == category)
        union, area = (true | predicted).sum(), true.sum()
        ious.append((true & predicted).sum() / union if union else math.nan)
        accuracies.append((true & predicted).sum() / area if area else math.nan)
    right = (counted & (predictions == labels)).sum() / counted.sum() if counted.any() else math.nan
    return ious, accuracies, right


@given(maps())
def test_scores_equal_the_definition(sample):
    predictions, labels = sample
    ious, accuracies, right = naive_scores(predictions, labels)
    result = MeanIoU(K).compute(predictions=predictions, references=labels)
    np.testing.assert_allclose(result["per_category_iou"], ious)
    np.testing.assert_allclose(result["per_category_accuracy"], accuracies)
    np.testing.assert_allclose(result["overall_accuracy"], right)
    known = [iou for iou in ious if not math.isnan(iou)]
    np.testing.assert_allclose(result["mean_iou"], np.mean(known) if known else math.nan)


@given(st.lists(maps(), min_size=1, max_size=5))
def test_batches_add_up_to_the_whole(samples):
    metric = MeanIoU(K)
    for predictions, labels in samples:
        metric.add_batch(predictions=predictions, references=labels)
    whole = [np.concatenate([values.ravel() for values in side]) for side in zip(*samples, strict=True)]
    np.testing.assert_equal(metric.compute(), MeanIoU(K).compute(predictions=whole[0], references=whole[1]))


def test_predictions_out_of_range_are_wrong():
    matrix = confusion_matrix([0, 0, 0, 9, -1], [0, 0, 0, 0, 1], num_labels=2)
    assert matrix.tolist() == [[3, 0, 1], [0, 0, 1]]
    assert scores(matrix)["per_category_iou"] == [0.75, 0.0]


def test_ignored_pixels_count_neither_as_true_nor_as_predicted():
    result = MeanIoU(2).compute(predictions=[0, 1, 1], references=[0, 1, IGNORE])
    assert result["per_category_iou"] == [1.0, 1.0]


def test_absent_class_is_nan_and_left_out_of_the_mean():
    result = MeanIoU(3).compute(predictions=[0, 1], references=[0, 1])
    assert math.isnan(result["per_category_iou"][2])
    assert result["mean_iou"] == 1.0


def test_compute_resets_the_metric():
    metric = MeanIoU(2)
    metric.add(prediction=[[0, 1]], reference=[[1, 0]])
    assert metric.compute()["mean_iou"] == 0.0
    assert metric.compute(predictions=[0, 1], references=[0, 1])["mean_iou"] == 1.0
    with pytest.raises(ValueError, match="no predictions were added"):
        metric.compute()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool])
def test_any_integer_type_counts_the_same(dtype):
    predictions, labels = torch.tensor([[0, 1, 1]], dtype=dtype), torch.tensor([[0, 1, 0]], dtype=dtype)
    expected = [[1, 1, 0], [0, 1, 0]]
    assert confusion_matrix(predictions, labels, 2).tolist() == expected
    assert confusion_matrix(predictions.numpy(), labels.numpy(), 2).tolist() == expected


def test_read_only_arrays_are_accepted():
    labels = np.array([[0, 1, 1]])
    labels.flags.writeable = False
    assert confusion_matrix(labels, labels, 2).trace() == 3


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 1], [0, 1, 1], r"predictions have shape \(2,\); expected that of the labels, \(3,\)"),
        ([0, 1], [0, 7], r"labels hold \[7\]; expected 0 to 1, or 255 for ignored pixels"),
        ([0, 1], [0, -1], r"labels hold \[-1\]"),
        ([0.0, 1.0], [0, 1], "predictions hold torch.float64; expected integers"),
        ([0, 1], torch.tensor([0.0, 1.0]), "labels hold torch.float32"),
    ],
)
def test_invalid_predictions_and_labels_are_refused(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(predictions, labels, num_labels=2)


def test_a_metric_without_classes_is_refused():
    with pytest.raises(ValueError, match="num_labels is 0"):
        MeanIoU(0)


def test_the_package_imports_neither_evaluate_nor_datasets():
    code = "import sys, hf_segformer; assert not {'evaluate', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
