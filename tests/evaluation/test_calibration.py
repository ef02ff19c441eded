"""Expected calibration error against loops and torchmetrics."""

import math

import numpy as np
import pytest
import torch

from hf_segformer.evaluation.calibration import (
    calibration_counts,
    calibration_error,
    calibration_errors,
    reliability_diagram,
)

K, IGNORE = 5, 255


def sample(seed=0, height=23, width=31):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (2 * torch.randn(K, height, width, generator=generator)).softmax(dim=0)
    labels = torch.where(
        torch.rand(height, width, generator=generator) < 0.6,
        probabilities.argmax(dim=0),
        torch.randint(K, (height, width), generator=generator),
    )
    labels[:3, :5] = IGNORE
    return probabilities, labels


def slow_error(probabilities, labels, num_bins, category=None):
    """Guo et al., equation 3, pixel by pixel."""
    bins = [[] for _ in range(num_bins)]
    for row, column in np.ndindex(*labels.shape):
        winner = int(probabilities[:, row, column].argmax())
        if labels[row, column] == IGNORE or category not in (None, winner):
            continue
        confidence = float(probabilities[winner, row, column])
        place = next(place for place in range(num_bins) if confidence <= np.float32((place + 1) / num_bins) + 1e-12)
        bins[place].append((confidence, winner == labels[row, column]))
    total = sum(map(len, bins))
    if not total:
        return math.nan
    gaps = [abs(np.mean([each[0] for each in one]) - np.mean([each[1] for each in one])) for one in bins if one]
    return sum(len(one) / total * gap for one, gap in zip([one for one in bins if one], gaps, strict=True))


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_error_is_that_of_the_definition(num_bins):
    probabilities, labels = sample()
    counts = calibration_counts(probabilities, labels, IGNORE, num_bins=num_bins)
    expected = slow_error(probabilities.numpy(), labels.numpy(), num_bins)
    assert calibration_error(counts) == pytest.approx(expected, abs=1e-6)
    by_class = [slow_error(probabilities.numpy(), labels.numpy(), num_bins, category) for category in range(K)]
    assert calibration_errors(counts) == pytest.approx(by_class, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_error_is_that_of_torchmetrics(seed):
    classification = pytest.importorskip("torchmetrics.classification")
    probabilities, labels = sample(seed)
    metric = classification.MulticlassCalibrationError(K, n_bins=15, norm="l1", ignore_index=IGNORE)
    expected = metric(probabilities[None], labels[None]).item()
    counts = calibration_counts(probabilities, labels, IGNORE)
    assert calibration_error(counts) == pytest.approx(expected, abs=1e-6)


def test_counts_add_up_exactly_in_any_order():
    parts = [calibration_counts(*sample(seed), IGNORE) for seed in range(4)]
    probabilities, labels = (torch.cat(side, dim=-1) for side in zip(*map(sample, range(4)), strict=True))
    assert sum(parts).equal(calibration_counts(probabilities, labels, IGNORE))


def test_diagram_of_known_confidences():
    probabilities = torch.tensor([[[0.9, 0.9, 0.6, 1.0]], [[0.1, 0.1, 0.4, 0.0]]])
    labels = torch.tensor([[0, 1, 0, IGNORE]])
    diagram = reliability_diagram(calibration_counts(probabilities, labels, IGNORE, num_bins=10))
    assert diagram.count.tolist() == [0] * 5 + [1, 0, 0, 2, 0]
    assert diagram.confidence[8].item() == pytest.approx(0.9)
    assert (diagram.accuracy[5].item(), diagram.accuracy[8].item()) == (1.0, 0.5)
    assert diagram.confidence[0].isnan()


def test_a_certain_and_right_model_is_calibrated():
    labels = torch.randint(K, (9, 11))
    probabilities = torch.nn.functional.one_hot(labels, K).permute(2, 0, 1).float()
    assert calibration_error(calibration_counts(probabilities, labels, IGNORE)) == 0.0


def test_nothing_is_known_without_pixels():
    probabilities, labels = sample()
    counts = calibration_counts(probabilities, torch.full_like(labels, IGNORE), IGNORE)
    assert math.isnan(calibration_error(counts))


def test_logits_and_wrong_shapes_are_refused():
    probabilities, labels = sample()
    with pytest.raises(ValueError, match=r"probabilities hold a value outside 0\.\.1"):
        calibration_counts(5 * probabilities, labels, IGNORE)
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        calibration_counts(probabilities * math.nan, labels, IGNORE)
    with pytest.raises(ValueError, match=r"probabilities are \(5, 23, 31\); expected"):
        calibration_counts(probabilities, labels[1:], IGNORE)
