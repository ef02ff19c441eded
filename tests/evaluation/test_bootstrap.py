"""Bootstrap intervals and paired tests against loops over the same draws."""

import math

import numpy as np
import pytest

from hf_segformer.evaluation import bootstrap
from hf_segformer.evaluation.bootstrap import (
    bootstrap_intervals,
    class_counts,
    class_scores,
    holm,
    paired_bootstrap,
)

K, IMAGES = 4, 12


def matrices(seed=0, accuracy=0.7, num_images=IMAGES):
    """Confusion matrices (I, K, K + 1) of a model with about that accuracy; the last class is rare."""
    generator = np.random.default_rng(seed)
    result = np.zeros((num_images, K, K + 1), dtype=np.int64)
    for matrix in result:
        for true, pixels in enumerate(generator.integers(0, [900, 500, 300, 2], size=K)):
            shares = np.full(K + 1, (1 - accuracy) / K)
            shares[true] = accuracy
            matrix[true] = generator.multinomial(pixels, shares)
    return result


def slow_scores(matrix):
    """Scores of one confusion matrix, class by class."""
    scores = {name: [] for name in ("iou", "dice", "precision", "recall")}
    for category in range(K):
        correct, true, predicted = matrix[category, category], matrix[category].sum(), matrix[:, category].sum()
        scores["iou"].append(correct / (true + predicted - correct) if true + predicted else math.nan)
        scores["dice"].append(2 * correct / (true + predicted) if true + predicted else math.nan)
        scores["precision"].append(correct / predicted if predicted else 0.0 if true else math.nan)
        scores["recall"].append(correct / true if true else math.nan)
    means = {f"mean_{name}": np.nanmean(values) for name, values in scores.items()}
    return {**scores, **means, "overall_accuracy": np.trace(matrix[:, :K]) / matrix.sum()}


def slow_resamples(whole, num_resamples, seed, num_units):
    """Scores of each resample, matrices of the drawn units added up one by one; `whole` maps a unit to its matrix."""
    generator, results = np.random.default_rng(seed), []
    for _ in range(num_resamples):
        drawn = generator.integers(num_units, size=num_units)
        results.append(slow_scores(sum(whole[unit] for unit in drawn)))
    return results


def assert_intervals(found, resamples, value):
    for name, interval in found.items():
        values = np.array([resample[name] for resample in resamples])
        np.testing.assert_allclose(interval.value, value[name])
        np.testing.assert_allclose(interval.low, np.nanquantile(values, 0.05, axis=0))
        np.testing.assert_allclose(interval.high, np.nanquantile(values, 0.95, axis=0))


def test_scores_are_those_of_the_definition():
    for matrix in matrices():
        found = class_scores(class_counts(matrix))
        for name, expected in slow_scores(matrix).items():
            np.testing.assert_allclose(found[name], expected)


def test_a_class_never_predicted_has_precision_zero():
    scores = class_scores(class_counts([[[4, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]][0]))
    np.testing.assert_array_equal(scores["precision"], [4 / 6, 0.0, np.nan])
    assert scores["mean_precision"] == pytest.approx(1 / 3)


def test_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    matrix = matrices()[0][:3, :3]
    true, predicted = (np.repeat(side.ravel(), matrix.ravel()) for side in np.indices(matrix.shape))
    found = class_scores(class_counts(np.pad(matrix, ((0, 0), (0, 1)))))
    precision, recall, dice, _ = metrics.precision_recall_fscore_support(true, predicted)
    for name, expected in (("precision", precision), ("recall", recall), ("dice", dice)):
        np.testing.assert_allclose(found[name], expected)
    np.testing.assert_allclose(found["iou"], metrics.jaccard_score(true, predicted, average=None))
    assert found["overall_accuracy"] == pytest.approx(metrics.accuracy_score(true, predicted))


@pytest.mark.parametrize("chunk", [1, 50, 2**22])
def test_intervals_equal_those_of_a_loop(monkeypatch, chunk):
    monkeypatch.setattr(bootstrap, "_CHUNK", chunk)
    whole = matrices()
    found = bootstrap_intervals(class_counts(whole), num_resamples=60, level=0.9, seed=3)
    assert_intervals(found, slow_resamples(whole, 60, 3, IMAGES), slow_scores(whole.sum(axis=0)))


def test_groups_are_drawn_as_wholes():
    whole, names = matrices(), ["b", "a", "b", "c", "c", "c", "a", "d", "d", "e", "e", "b"]
    order = list(dict.fromkeys(names))
    by_group = np.stack([sum(whole[i] for i in range(IMAGES) if names[i] == name) for name in order])
    found = bootstrap_intervals(class_counts(whole), groups=names, num_resamples=50, level=0.9, seed=1)
    assert_intervals(found, slow_resamples(by_group, 50, 1, len(order)), slow_scores(whole.sum(axis=0)))


def test_the_seed_decides():
    counts = class_counts(matrices())
    first, again, other = (bootstrap_intervals(counts, num_resamples=50, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_equal(first, again)
    assert first["mean_iou"].low != other["mean_iou"].low


def test_paired_tests_equal_those_of_a_loop():
    pair = matrices(0, 0.7), matrices(1, 0.72)
    found = paired_bootstrap(*map(class_counts, pair), num_resamples=80, level=0.9, seed=5)
    resamples = [slow_resamples(whole, 80, 5, IMAGES) for whole in pair]
    overall = [slow_scores(whole.sum(axis=0)) for whole in pair]
    for name, test in found.items():
        values = np.array(
            [np.subtract(second[name], first[name]) for first, second in zip(*resamples, strict=True)]
        ).reshape(80, -1)
        p_values = []
        for column in values.T:
            known = column[~np.isnan(column)]
            tail = min((known <= 0).sum(), (known >= 0).sum())
            p_values.append(min(1.0, 2 * (tail + 1) / (len(known) + 1)))
        np.testing.assert_allclose(np.ravel(test.p_value), p_values)
        np.testing.assert_allclose(test.difference, np.subtract(overall[1][name], overall[0][name]))
        np.testing.assert_allclose(np.ravel(test.low), np.nanquantile(values, 0.05, axis=0))


def test_a_better_model_is_found_better_and_the_same_one_is_not():
    weak, strong = class_counts(matrices(0, 0.5, 40)), class_counts(matrices(1, 0.8, 40))
    test = paired_bootstrap(weak, strong, num_resamples=2000)["iou"]
    assert (test.corrected[:3] < 0.01).all()
    assert (test.difference[:3] > 0).all()
    same = paired_bootstrap(weak, weak, num_resamples=200)
    assert (same["iou"].p_value == 1).all()
    assert same["mean_iou"].p_value == 1


def test_false_findings_are_as_rare_as_promised():
    """Models that are equally good: about 5 % of p-values are below 0.05, far from none and from many."""
    below = 0
    for seed in range(60):
        pair = (class_counts(matrices(10 + 2 * seed + model, 0.7, 30)) for model in (0, 1))
        below += paired_bootstrap(*pair, num_resamples=300)["overall_accuracy"].p_value < 0.05
    assert 0 <= below <= 10  # of 60; more than 10 has a chance of 0.1 % at 5 %


def test_an_absent_class_has_no_p_value():
    whole = matrices()
    whole[:, 3], whole[:, :, 3] = 0, 0
    test = paired_bootstrap(class_counts(whole), class_counts(whole), num_resamples=20)["iou"]
    assert math.isnan(test.p_value[3])
    assert math.isnan(test.corrected[3])
    assert not np.isnan(test.corrected[:3]).any()


def test_holm_is_that_of_the_definition():
    values = np.array([0.02, 0.9, 0.001, np.nan, 0.04, 0.02])
    expected, largest = np.full(6, np.nan), 0.0
    known = sorted((value, place) for place, value in enumerate(values) if not math.isnan(value))
    for rank, (value, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        expected[place] = largest
    np.testing.assert_allclose(holm(values), expected)


def test_counts_of_large_sums_are_exact():
    counts = np.full((3, 3, K), 2**40 + 1)
    weights = next(bootstrap._weights(3, 5, 0))
    sums = weights @ counts.reshape(3, -1).astype(np.float64)
    assert (sums == 3 * (2**40 + 1)).all()


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        (np.ones((1, 3, K)), {}, "there are 1 images to draw from; expected at least 2"),
        (np.ones((3, 3, K)), {"groups": ["a", "a", "a"]}, "there are 1 groups"),
        (np.ones((3, 3, K)), {"groups": ["a"]}, "groups name 1 images; expected one name for each of 3"),
        (np.ones((3, 3, K)), {"num_resamples": 0}, "num_resamples is 0"),
        (np.ones((3, 3, K)), {"level": 95}, "level is 95; expected a coverage between 0 and 1"),
    ],
)
def test_bad_options_are_refused(counts, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals(counts, **options)


def test_models_of_different_images_are_refused():
    with pytest.raises(ValueError, match=r"counts are \(3, 3, 4\) and \(4, 3, 4\)"):
        paired_bootstrap(np.ones((3, 3, K)), np.ones((4, 3, K)))
    with pytest.raises(ValueError, match=r"matrices are \(4, 4\); expected"):
        class_counts(np.ones((4, 4)))
