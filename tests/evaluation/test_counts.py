"""Scores of a Trainer: the same as those of an evaluation, and as scikit-learn's and torchmetrics'."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from transformers import EvalPrediction

from hf_segformer.evaluation.accumulator import MetricAccumulator
from hf_segformer.evaluation.bootstrap import class_counts, class_scores
from hf_segformer.evaluation.metrics import (
    COUNTED_SCORES,
    OVERALL_SCORES,
    SegmentationMetrics,
    confusion_matrix,
    count_batch,
    counted_scores,
    named_scores,
    zero_counts,
)
from hf_segformer.evaluation.summary import summarize
from hf_segformer.inference.segmenter import Confidence
from hf_segformer.upsampling_segformer import upsample

K, IGNORE = 4, 255
NAMES = list("abcd")


def batch(seed=0, number=3, num_logits=K, size=(37, 53)):
    """Logits (B, K, h, w), and labels (B, H, W) that are often those of the best class."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(number, num_logits, 5, 7, generator=generator)
    best = upsample(logits, size).argmax(dim=1) if num_logits > 1 else (upsample(logits, size)[:, 0] > 0).long()
    noise = torch.rand(best.shape, generator=generator)
    labels = torch.where(noise < 0.3, torch.randint(max(num_logits, 2), best.shape, generator=generator), best)
    labels[:, :3, :9] = IGNORE
    return logits, labels


def accumulated(logits, labels, as_confidence=False):
    """The accumulator of an evaluation, fed by PyTorch's own operations."""
    accumulator = MetricAccumulator(max(2, logits.shape[1]), IGNORE)
    for each, mask in zip(logits, labels, strict=True):
        [sized] = upsample(each[None], mask.shape)
        probabilities = sized.softmax(dim=0) if len(sized) > 1 else torch.cat([(-sized).sigmoid(), sized.sigmoid()])
        prediction = probabilities.argmax(dim=0)
        confidence = Confidence(prediction, probabilities.amax(dim=0))
        accumulator.update(confidence if as_confidence else probabilities, prediction, mask)
    return accumulator


@pytest.mark.parametrize("num_logits", [1, 2, K])
def test_scores_are_those_of_an_evaluation(num_logits):
    logits, labels = batch(num_logits=num_logits)
    names = NAMES[: max(2, num_logits)]
    found = counted_scores(count_batch(logits, labels, len(names), IGNORE).sum(dim=0), names)
    accumulator = accumulated(logits, labels)
    summary = summarize(accumulator, names, num_resamples=10)
    assert found.keys() >= set(COUNTED_SCORES)
    for name in COUNTED_SCORES:
        assert found[name] == pytest.approx(summary[name], abs=1e-6), name
    for row in summary["classes"]:
        assert found[f"iou_{row['name']}"] == pytest.approx(row["iou"])
    assert accumulator.named_scores(names) == pytest.approx(found, abs=1e-6)


def test_confidence_is_all_that_calibration_needs():
    logits, labels = batch()
    whole, part = accumulated(logits, labels), accumulated(logits, labels, as_confidence=True)
    assert whole.calibration.equal(part.calibration)
    with pytest.raises(ValueError, match="two classes need their probabilities"):
        accumulated(*batch(num_logits=2), as_confidence=True)


@pytest.mark.parametrize("seed", range(3))
def test_overall_and_class_scores_are_those_of_scikit_learn(seed):
    logits, labels = batch(seed)
    prediction = upsample(logits, labels.shape[1:]).argmax(dim=1)
    kept = labels != IGNORE
    truth, found = labels[kept].numpy(), prediction[kept].numpy()
    matrix = confusion_matrix(prediction, labels, K, IGNORE)
    np.testing.assert_array_equal(matrix[:, :K], sklearn_metrics.confusion_matrix(truth, found, labels=range(K)))
    scores = class_scores(class_counts(matrix.numpy()))
    for name, theirs in (
        ("iou", sklearn_metrics.jaccard_score),
        ("dice", sklearn_metrics.f1_score),
        ("precision", sklearn_metrics.precision_score),
        ("recall", sklearn_metrics.recall_score),
    ):
        np.testing.assert_allclose(scores[name], theirs(truth, found, average=None))
        np.testing.assert_allclose(scores[f"mean_{name}"], theirs(truth, found, average="macro"))
    named = named_scores(matrix, NAMES)
    assert named["mean_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(truth, found))
    assert named["overall_accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, found))
    assert named["mean_dice"] == pytest.approx(sklearn_metrics.f1_score(truth, found, average="macro"))
    assert named["precision"] == pytest.approx(sklearn_metrics.precision_score(truth, found, average="macro"))


def test_overall_and_class_scores_are_those_of_torchmetrics():
    theirs = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = batch()
    prediction = upsample(logits, labels.shape[1:]).argmax(dim=1)
    scores = class_scores(class_counts(confusion_matrix(prediction, labels, K, IGNORE).numpy()))
    options = {"num_classes": K, "average": "none", "ignore_index": IGNORE}
    for name, function in (
        ("iou", theirs.multiclass_jaccard_index),
        ("dice", theirs.multiclass_f1_score),
        ("precision", theirs.multiclass_precision),
        ("recall", theirs.multiclass_recall),
    ):
        np.testing.assert_allclose(scores[name], function(prediction, labels, **options), rtol=1e-5)


def test_a_trainers_batches_add_up_whatever_the_sizes():
    parts = [batch(0), batch(1, number=2, size=(20, 61))]
    metrics = SegmentationMetrics(NAMES)
    for place, (logits, labels) in enumerate(parts):
        counts = metrics.preprocess_logits(logits, labels)
        assert labels.shape == (len(logits), 1)  # what a Trainer gathers
        found = metrics(EvalPrediction(counts, labels), compute_result=place == 1)
    expected = sum(count_batch(*batch(*each), K, IGNORE).sum(dim=0) for each in ((0,), (1, 2, K, (20, 61))))
    assert found == counted_scores(expected, NAMES)
    assert metrics.counts is None


def test_class_ids_alone_give_the_scores_of_the_matrix():
    labels = torch.tensor([[[0, 1], [2, 3]]])
    found = SegmentationMetrics(NAMES)(EvalPrediction(labels.numpy(), labels.numpy()))
    assert found.keys() == {*OVERALL_SCORES, *(f"{kind}_{name}" for kind in ("iou", "accuracy") for name in NAMES)}


def test_a_process_without_images_counts_none():
    logits, labels = batch()
    none = count_batch(logits[:0], labels[:0], K, IGNORE)
    assert none.shape == (0, *zero_counts(1, K)[0].shape)
    assert not zero_counts(2, K).any()
