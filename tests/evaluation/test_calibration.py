"""Calibration on sets whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fakit.evaluation import brier_score, expected_calibration_error, negative_log_likelihood, reliability


def logits_of(confidence: float, classes: int = 2) -> list[float]:
    """Logits whose class 0 has probability `confidence`."""
    return [math.log(confidence), *[math.log((1 - confidence) / (classes - 1))] * (classes - 1)]


def test_ece_of_a_constructed_set():
    # 10 examples at confidence 0.9, 7 right; 5 at confidence 0.6, 3 right: gaps 0.2 and 0.0.
    logits = torch.tensor([logits_of(0.9)] * 10 + [logits_of(0.6)] * 5, dtype=torch.float64)
    labels = torch.tensor([0] * 7 + [1] * 3 + [0] * 3 + [1] * 2)
    assert expected_calibration_error(logits, labels) == pytest.approx(10 / 15 * 0.2, abs=1e-12)
    diagram = reliability(logits, labels)
    assert diagram.ece == expected_calibration_error(logits, labels)
    assert diagram.edges.shape == (16,) and diagram.count.shape == (15,)
    filled = np.flatnonzero(diagram.count)
    assert diagram.count[filled].tolist() == [5, 10]
    np.testing.assert_allclose(diagram.confidence[filled], [0.6, 0.9])
    np.testing.assert_allclose(diagram.accuracy[filled], [0.6, 0.7])
    assert np.isnan(np.delete(diagram.confidence, filled)).all()


def test_ece_against_a_loop_over_the_bins():
    logits, labels = torch.randn(400, 5, dtype=torch.float64) * 2, torch.randint(0, 5, (400,))
    confidence, predicted = logits.softmax(-1).max(-1)
    total = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            right = (predicted == labels)[inside].double().mean()
            total += inside.double().mean() * (right - confidence[inside].mean()).abs()
    assert expected_calibration_error(logits, labels) == pytest.approx(float(total), abs=1e-12)


def test_a_bin_is_closed_above_and_certainty_is_in_the_last():
    logits = torch.tensor([logits_of(0.5), [1000.0, 0.0]], dtype=torch.float64)
    count = reliability(logits, torch.tensor([0, 0]), bins=2).count
    assert count.tolist() == [1, 1]


def test_one_bin_is_the_gap_of_the_means():
    logits, labels = torch.randn(50, 3, dtype=torch.float64), torch.randint(0, 3, (50,))
    confidence, predicted = logits.softmax(-1).max(-1)
    gap = (confidence.mean() - (predicted == labels).double().mean()).abs()
    assert expected_calibration_error(logits, labels, bins=1) == pytest.approx(float(gap), abs=1e-12)


def test_nll_and_brier_by_hand():
    logits = torch.tensor([logits_of(0.8), logits_of(0.6)], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    assert negative_log_likelihood(logits, labels) == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert brier_score(logits, labels) == pytest.approx(((0.2**2) * 2 + (0.6**2) * 2) / 2)


def test_extremes():
    sure = torch.tensor([[200.0, 0.0]])
    assert brier_score(sure, torch.tensor([0])) == pytest.approx(0.0, abs=1e-12)
    assert brier_score(sure, torch.tensor([1])) == pytest.approx(2.0)
    assert negative_log_likelihood(sure, torch.tensor([1])) == pytest.approx(200.0)
    assert expected_calibration_error(sure, torch.tensor([1])) == pytest.approx(1.0)


@pytest.mark.parametrize("measure", [reliability, expected_calibration_error, negative_log_likelihood, brier_score])
def test_errors(measure):
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(3,\)"):
        measure(torch.zeros(4, 2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="empty"):
        measure(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"-100 to 1.*2 classes"):
        measure(torch.zeros(2, 2), torch.tensor([-100, 1]))


def test_bins_must_be_positive():
    with pytest.raises(ValueError, match="bins=0"):
        reliability(torch.zeros(1, 2), torch.tensor([0]), bins=0)
