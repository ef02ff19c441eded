"""AUC, average precision and thresholds of binary models against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from hf_segformer.evaluation.binary import (
    NUM_BINS,
    auc_error,
    average_precision,
    best_threshold,
    probability_histogram,
    roc_auc,
    threshold_scores,
    threshold_sweep,
)

IGNORE = 255


def sample(seed=0, shape=(37, 53), sharpness=3.0):
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(*shape, generator=generator) < 0.2).long()
    noise = torch.randn(*shape, generator=generator)
    probability = (sharpness * (labels - 0.5 + noise)).sigmoid()
    labels[0, :7] = IGNORE
    return probability, labels


def known(probability, labels):
    kept = labels != IGNORE
    return labels[kept].numpy(), probability[kept].double().numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_bins", [64, NUM_BINS])
def test_figures_are_exact_up_to_the_histograms_resolution(seed, num_bins):
    probability, labels = sample(seed)
    histogram = probability_histogram(probability, labels, IGNORE, num_bins=num_bins)
    truth, scores = known(probability, labels)
    rounded = np.ceil(scores * num_bins)
    assert roc_auc(histogram) == pytest.approx(sklearn_metrics.roc_auc_score(truth, rounded), abs=1e-12)
    assert average_precision(histogram) == pytest.approx(
        sklearn_metrics.average_precision_score(truth, rounded), abs=1e-12
    )
    exact = sklearn_metrics.roc_auc_score(truth, scores)
    assert abs(roc_auc(histogram) - exact) <= auc_error(histogram) + 1e-12


def test_the_default_resolution_is_fine():
    probability, labels = sample(shape=(200, 300))
    histogram = probability_histogram(probability, labels, IGNORE)
    truth, scores = known(probability, labels)
    assert roc_auc(histogram) == pytest.approx(sklearn_metrics.roc_auc_score(truth, scores), abs=1e-5)
    assert average_precision(histogram) == pytest.approx(
        sklearn_metrics.average_precision_score(truth, scores), abs=1e-4
    )


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.75])
def test_scores_at_a_threshold(threshold):
    probability, labels = sample()
    found = threshold_scores(probability_histogram(probability, labels, IGNORE), threshold)
    truth, scores = known(probability, labels)
    positive = scores > threshold
    assert found.dice == pytest.approx(sklearn_metrics.f1_score(truth, positive))
    assert found.iou == pytest.approx(sklearn_metrics.jaccard_score(truth, positive))
    assert found.precision == pytest.approx(sklearn_metrics.precision_score(truth, positive))
    assert found.recall == pytest.approx(sklearn_metrics.recall_score(truth, positive))


def test_one_half_is_background_as_the_model_has_it():
    histogram = probability_histogram(torch.tensor([[0.5, 0.5001]]), torch.tensor([[0, 1]]), IGNORE)
    assert threshold_scores(histogram, 0.5).dice == 1.0


def test_best_threshold_has_the_highest_dice_of_all():
    probability, labels = sample(seed=4, shape=(9, 31))
    histogram = probability_histogram(probability, labels, IGNORE, num_bins=256)
    best = best_threshold(histogram)
    truth, scores = known(probability, labels)
    dice = [sklearn_metrics.f1_score(truth, scores > place / 256) for place in range(256)]
    iou = [sklearn_metrics.jaccard_score(truth, scores > place / 256) for place in range(256)]
    assert best.dice == pytest.approx(max(dice))
    assert best.iou == pytest.approx(max(iou))
    highest = np.flatnonzero(np.isclose(dice, max(dice)))
    assert best.threshold == highest[np.abs(highest - 128).argmin()] / 256


def test_of_equal_thresholds_the_nearest_to_one_half_is_best():
    histogram = probability_histogram(torch.tensor([[0.125, 0.875]]), torch.tensor([[0, 1]]), IGNORE)
    assert best_threshold(histogram).threshold == 0.5


def test_the_sweep_has_the_precision_and_recall_of_each_threshold():
    probability, labels = sample()
    histogram = probability_histogram(probability, labels, IGNORE)
    sweep = threshold_sweep(histogram, 20)
    assert [round(row.threshold, 2) for row in sweep] == [round(step / 20, 2) for step in range(20)]
    truth, scores = known(probability, labels)
    for row in sweep:
        found = scores > row.threshold
        assert row.precision == pytest.approx(sklearn_metrics.precision_score(truth, found))
        assert row.recall == pytest.approx(sklearn_metrics.recall_score(truth, found))
    assert sweep[0].recall == 1.0


def test_histograms_add_up():
    pairs = [sample(seed) for seed in range(3)]
    whole = [torch.cat(side) for side in zip(*pairs, strict=True)]
    assert sum(probability_histogram(*pair, IGNORE) for pair in pairs).equal(probability_histogram(*whole, IGNORE))


def test_one_label_alone_gives_no_area():
    probability, labels = sample()
    histogram = probability_histogram(probability, torch.zeros_like(labels), IGNORE)
    assert math.isnan(roc_auc(histogram))
    assert math.isnan(average_precision(histogram))
    assert best_threshold(histogram) is None


def test_values_out_of_range_are_refused():
    probability, labels = sample()
    with pytest.raises(ValueError, match=r"probability holds a value outside 0\.\.1"):
        probability_histogram(probability.logit(), labels, IGNORE)
    with pytest.raises(ValueError, match=r"labels hold \[2\]; expected 0, 1 and 255"):
        probability_histogram(probability, 2 * labels.clamp(max=1), IGNORE)
    with pytest.raises(ValueError, match="threshold is 1"):
        threshold_scores(probability_histogram(probability, labels, IGNORE), 1)
