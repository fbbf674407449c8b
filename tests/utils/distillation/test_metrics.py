"""What answers are worth, against loops, SciPy and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from scipy.special import softmax as probabilities
from ultralytics.utils.distillation.metrics import agreement, calibration, divergence, normalized_entropy


def test_calibration_error_as_in_the_paper():
    logits, labels = 3 * torch.randn(500, 7), torch.randint(7, (500,))
    p = probabilities(logits.double().numpy(), axis=1)
    error = 0.0
    for low in range(15):  # Guo et al. 2017, eq. 2 and 3
        chosen = [i for i in range(500) if low / 15 < p[i].max() <= (low + 1) / 15]
        if chosen:
            accuracy = np.mean([p[i].argmax() == labels[i].item() for i in chosen])
            confidence = np.mean([p[i].max() for i in chosen])
            error += len(chosen) / 500 * abs(accuracy - confidence)
    measured = calibration(logits, labels)
    assert measured.error == pytest.approx(error)
    assert measured.count.sum() == 500
    assert torch.isnan(measured.accuracy).tolist() == (measured.count == 0).tolist()


def test_calibration_at_its_ends():
    sure = torch.tensor([[1e4, 0.0], [1e4, 0.0]])
    assert calibration(sure, torch.tensor([0, 0])).error == 0
    assert calibration(sure, torch.tensor([1, 1])).error == 1
    assert calibration(torch.zeros(4, 1), torch.zeros(4).long()).error == 0


def test_divergence_and_agreement():
    s, t = torch.randn(20, 5), torch.randn(20, 5)
    p, q = (probabilities(x.double().numpy(), axis=1) for x in (t, s))
    np.testing.assert_allclose(divergence(s, t), rel_entr(p, q).sum(1))
    assert divergence(s, s).abs().max() < 1e-12
    assert agreement(s, t) == np.mean(p.argmax(1) == q.argmax(1))


def test_entropy():
    assert normalized_entropy(torch.zeros(3, 8)) == pytest.approx(1)
    assert normalized_entropy(torch.tensor([[1e4, 0.0]])) == pytest.approx(0)
    assert normalized_entropy(torch.zeros(3, 1)) == 0
    p = probabilities(np.array([1.0, 3.0, 0.5]) / 4)
    expected = -(p * np.log(p)).sum() / math.log(3)
    assert normalized_entropy(torch.tensor([[1.0, 3.0, 0.5]]), 4) == pytest.approx(expected, rel=1e-6)
