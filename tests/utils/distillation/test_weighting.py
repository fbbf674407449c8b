"""How losses are weighed, against the rule written out."""

import numpy as np
import pytest
import torch
from ultralytics.utils.distillation import DistillationLoss
from ultralytics.utils.distillation.weighting import OWN, weigh

WEIGHTS = {"response_loss": 1.0, "feature_loss": 50.0}


def test_the_rule():
    losses = {OWN: 2.0, "response_loss": 3.0, "feature_loss": 5.0}
    weighed = weigh(losses, WEIGHTS, alpha=0.7, beta=0.3, factors={"feature_loss": 0.25})
    assert list(weighed) == list(losses)
    assert weighed == pytest.approx({OWN: 0.3 * 2, "response_loss": 0.7 * 3, "feature_loss": 0.7 * 50 * 0.25 * 5})


def test_every_loss_that_is_not_the_teachers_is_the_students():
    weighed = weigh({"box_loss": 2.0, "cls_loss": 4.0, "response_loss": 1.0}, WEIGHTS, alpha=0.5, beta=0.25)
    assert weighed == {"box_loss": 0.5, "cls_loss": 1.0, "response_loss": 0.5}


def test_by_itself_a_loss_has_its_weight():
    assert weigh({OWN: 2.0, "feature_loss": 3.0}, WEIGHTS) == {OWN: 2.0, "feature_loss": 150.0}


def test_epochs_at_once():
    """As a report weighs them, with the weight and the factors that were in force in each."""
    alpha, factors = np.array([0.5, 0.25]), {"response_loss": np.array([2.0, 4.0])}
    weighed = weigh({"response_loss": np.array([1.0, 3.0])}, WEIGHTS, alpha, factors=factors)
    assert weighed["response_loss"].tolist() == [1.0, 3.0]


def test_the_losses_own_total_is_weighed_by_it():
    loss = DistillationLoss([3], [4], feature_weight=2.0, attention_weight=5.0)
    total, items = loss(torch.rand(2, 5), torch.rand(2, 5), [torch.rand(2, 3, 4, 4)], [torch.rand(2, 4, 4, 4)])
    assert loss.weights == {"response_loss": 0.1, "feature_loss": 2.0, "attention_loss": 5.0}
    assert total.item() == pytest.approx(sum(loss.weights[k] * v.item() for k, v in items.items()), rel=1e-6)
