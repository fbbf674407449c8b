"""What a step computes, with stand-ins for the networks: totals against the rule written out by hand."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from ultralytics.engine.distillation.criterion import LESSON, DistillationCriterion, Lesson, StudentCriterion
from ultralytics.utils.distillation import GradientBalance


class Own:
    """Stands for upstream's criterion: the mean of the predictions, or a vector of two parts."""

    def __init__(self, parts=1):
        self.parts = parts
        self.updates = 0
        self.seen = []

    def __call__(self, predictions, batch):
        self.seen.append(batch["cls"])
        loss = predictions.mean() if self.parts == 1 else torch.stack([predictions.mean(), predictions.sum()])
        return loss, {"loss": loss.detach().sum()}

    def update(self):
        self.updates += 1


class Silent:
    """Stands for upstream's criteria that count nothing."""

    def __call__(self, predictions, batch):
        return predictions.mean(), {"loss": predictions.mean().detach()}


class Taps:
    """Stands for what reads the student's maps."""

    def __init__(self, maps):
        self.maps = maps

    def take(self):
        return self.maps


class Losses(nn.Module):
    """Stands for the losses, of which only the weights count here."""

    weights = {"response_loss": 2.0, "feature_loss": 10.0}  # noqa: RUF012


def compare(loss, predictions, features, answer, batch):
    logits, _ = answer
    return {"response_loss": (predictions - logits).square().mean(), "feature_loss": features[0].mean()}


@pytest.fixture
def predictions():
    return torch.tensor([[1.0, 3.0]], requires_grad=True)


@pytest.fixture
def maps(predictions):
    return [3 * predictions]


def criterion(maps, own=None, **given):
    settings = {"alpha": 0.5, "beta": 0.25, "scale": lambda batch: 1, **given}
    return DistillationCriterion(own=own or Own(), taps=Taps(maps), loss=Losses(), compare=compare, **settings)


def batch(answer=True, **targets):
    known = (torch.zeros(1, 2), [])
    return {"cls": torch.tensor([0]), LESSON: Lesson(targets, answer=(lambda: known) if answer else None)}


@pytest.mark.parametrize("static", [False, True])
def test_of_a_silent_teacher_the_adapters_get_a_gradient_where_each_step_has_to_have_one(static, predictions, maps):
    made = criterion(maps, static=static)
    made.loss.adapter = nn.Conv2d(2, 2, 1)
    total, _ = made(predictions, batch(answer=False))
    assert total.item() == pytest.approx(OWN)
    total.backward()
    found = [parameter.grad for parameter in made.loss.parameters()]
    assert all(g is not None and not g.any() for g in found) if static else found == [None, None]


OWN, RESPONSE, FEATURE = 2.0, 5.0, 6.0  # of the predictions 1 and 3


def test_the_students_own_alone(predictions):
    total, items = StudentCriterion(Own(), 0.25)(predictions, batch(answer=False))
    assert (total.item(), items["loss"].item()) == (0.25 * OWN, OWN)


def test_all_together(predictions, maps):
    total, items = criterion(maps)(predictions, batch())
    assert total.item() == pytest.approx(0.25 * OWN + 0.5 * (2 * RESPONSE + 10 * FEATURE))
    assert {k: v.item() for k, v in items.items()} == {"loss": OWN, "response_loss": RESPONSE, "feature_loss": FEATURE}
    assert not any(v.requires_grad for v in items.values())


@pytest.mark.parametrize(("alpha", "weight"), [(0.5, 1.0), (0.0, 0.25)])
def test_a_silent_teacher(alpha, weight, predictions, maps):
    """One that is still to begin leaves training plain; one that has ended leaves the label its weight."""
    total, items = criterion(maps, alpha=alpha)(predictions, batch(answer=False))
    assert total.item() == weight * OWN
    assert (items["response_loss"], items["feature_loss"]) == (0, 0)


@pytest.mark.parametrize("answer", [True, False])
def test_without_labels_only_the_teacher_counts(answer, predictions, maps):
    total, items = criterion(maps, labelled=False)(predictions, batch(answer))
    assert total.item() == pytest.approx(answer * 0.5 * (2 * RESPONSE + 10 * FEATURE))
    assert items["loss"] == 0


def test_a_vector_of_parts_times_the_batch_size(predictions, maps):
    """As upstream's dense criteria give it: the teacher's losses count once, not once for each part."""
    own = Own(parts=2)
    total, items = criterion(maps, own, scale=lambda batch: 8)(predictions, batch())
    assert total.item() == pytest.approx(0.25 * (2.0 + 4.0) + 8 * 0.5 * (2 * RESPONSE + 10 * FEATURE))
    assert items["response_loss"] == RESPONSE
    total, items = criterion(maps, own)(predictions, batch(answer=False))
    assert total.tolist() == [2.0, 4.0]
    assert items["response_loss"].shape == ()


def test_the_own_criterion_sees_its_own_targets(predictions, maps):
    own, shares = Own(), torch.tensor([[0.3, 0.7]])
    for given in (StudentCriterion(own, 1.0), criterion(maps, own)):
        given(predictions, batch(cls=shares))
    assert [x is shares for x in own.seen] == [True, True]


@pytest.mark.parametrize("make", [lambda maps, own: StudentCriterion(own, 1.0), criterion], ids=["plain", "distilled"])
def test_epochs_are_counted(make, maps):
    own = Own()
    made = make(maps, own)
    made.update()
    made.update()
    assert own.updates == 2
    make(maps, Silent()).update()  # which has nothing to count


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_seen_in_the_gradient(bad, predictions, maps):
    """An infinite loss may have a finite gradient, which would be stepped."""
    maps = [maps[0] + bad]
    total, _ = criterion(maps)(predictions, batch())
    total.backward()
    assert predictions.grad.isnan().all()


@pytest.mark.parametrize(("beta", "measured"), [(0.25, {"loss", *Losses.weights}), (0.0, {*Losses.weights})])
def test_the_balance_scales_the_losses(beta, measured, predictions, maps):
    seen = {}

    def balance(losses, shared):
        seen.update(losses=set(losses), shared=shared)
        return dict.fromkeys(losses, 1.0) | {"feature_loss": 0.5}

    total, _ = criterion(maps, beta=beta, balance=balance)(predictions, batch())
    assert total.item() == pytest.approx(beta * OWN + 0.5 * (2 * RESPONSE + 10 * 0.5 * FEATURE))
    assert seen["losses"] == measured
    assert seen["shared"] is maps[0]


def test_losses_meet_in_the_predictions_where_the_maps_are_frozen(predictions):
    shared = []
    balance = partial(lambda losses, where: shared.append(where) or {})
    criterion([torch.ones(1, 2)], balance=balance)({"scores": predictions}["scores"], batch())
    assert shared[0] is predictions


def test_a_measured_balance(predictions, maps):
    balance = GradientBalance()
    criterion(maps, balance=balance)(predictions, batch())
    assert balance.norms.keys() == {"loss", *Losses.weights}
