"""Shares and temperatures by epoch, and factors by gradient, against their closed forms."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from ultralytics.utils.distillation import GradientBalance, scheduled_share, scheduled_temperature


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"warmup": 3}, [0.25, 0.5, 0.75, 1]),
        ({"close": 2}, [1, 1, 0, 0]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * x)) / 2 for x in (0, 0.25, 0.5, 0.75)]),
        ({"schedule": "linear", "close": 2, "warmup": 1}, [0.5, 0.5, 0, 0]),
        ({"close": 9}, [0, 0, 0, 0]),
    ],
)
def test_shares(settings, expected):
    assert [scheduled_share(epoch, 4, **settings) for epoch in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("last", "schedule", "expected"),
    [
        (None, "linear", [4, 4, 4]),
        (2, "constant", [4, 3, 2]),
        (8, "linear", [4, 6, 8]),
        (2, "cosine", [4, 3, 2]),
    ],
)
def test_temperatures(last, schedule, expected):
    assert [scheduled_temperature(e, 3, 4, last, schedule) for e in range(3)] == pytest.approx(expected)
    assert scheduled_temperature(0, 1, 4, last, schedule) == 4


def test_an_epoch_after_the_last_is_the_last():
    """Upstream shortens a training of limited `time` to what fits, which may be less than it has begun."""
    assert scheduled_share(3, 2) == 1
    assert scheduled_share(3, 2, "linear") == scheduled_share(3, 4, "linear") == 0.25
    assert scheduled_share(3, 2, close=1) == 0
    assert scheduled_temperature(3, 2, 4, 2, "linear") == scheduled_temperature(3, 1, 4, 2, "linear") == 2


def test_balance_measures_smooths_and_waits():
    x = torch.ones(4, requires_grad=True)

    def losses(size):
        return {"label": x.sum(), "other": size * x.sum(), "none": 0 * x.sum()}

    balance = GradientBalance(every=2, momentum=0.5)
    assert {k: v.item() for k, v in balance(losses(4), x).items()} == {"label": 1, "other": 0.25, "none": 0}
    assert balance(losses(8), x)["other"] == 0.25  # not measured
    assert balance(losses(8), x)["other"].item() == pytest.approx(1 / 6)  # the mean of 4 and 8
    assert balance(losses(math.nan), x)["other"].item() == pytest.approx(1 / 6)
    kept = balance.state_dict()
    resumed = GradientBalance(every=2, momentum=0.5)
    resumed.load_state_dict(kept)
    assert resumed(losses(2), x)["other"].item() == pytest.approx(1 / 4)
    assert x.grad is None


def test_factors_are_computed_once_in_a_step():
    class Counting(TorchDispatchMode):
        operators = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.operators += operator.overloadpacket is torch.ops.aten.where
            return operator(*args, **(kwargs or {}))

    x, balance = torch.ones(4, requires_grad=True), GradientBalance()
    losses = {name: x.sum() for name in ("label", "response", "feature", "attention")}
    balance(losses, x)
    with Counting() as counting:
        balance(losses, x)
    assert counting.operators == 2 * len(losses)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_balance_begins_with_a_loss_that_says_nothing(bad):
    """What was measured first is where the smoothing begins, once there is something to measure."""
    x = torch.ones(4, requires_grad=True)
    balance = GradientBalance(every=1)
    factors = balance({"label": x.sum(), "other": bad * x.sum()}, x)
    assert {k: v.item() for k, v in factors.items()} == {"label": 1, "other": 0}
    assert balance({"label": x.sum(), "other": 4 * x.sum()}, x)["other"] == 0.25
    balance = GradientBalance(every=1)
    assert balance({"label": bad * x.sum(), "other": 4 * x.sum()}, x)["other"] == 1
    assert balance({"label": x.sum(), "other": 4 * x.sum()}, x)["other"] == 0.25


def test_balance_of_losses_that_do_not_see_what_is_shared():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    factors = GradientBalance()({"label": x.sum(), "other": y.sum()}, x)
    assert {k: v.item() for k, v in factors.items()} == {"label": 1, "other": 0}
