"""Batches whose loss is not finite: they leave no trace, are counted by their cause, and too many stop the run."""

import copy
import math
from functools import partial

import pytest
import torch
from helpers import DISTILLATION_LOSSES, rows, same, train, weights
from torch.utils.hooks import RemovableHandle
from ultralytics.engine.distillation import guarded
from ultralytics.engine.distillation.criterion import LESSON
from ultralytics.engine.distillation.guarded import MOST_SKIPPED
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.utils import LOGGER


def spoil_activations(trainer):
    """As float16 overflows: BatchNorm's statistics behind it become NaN too."""
    return trainer.model.model[3].register_forward_hook(lambda module, args, output: output * math.nan)


def spoil_teacher(trainer):
    return trainer.teacher.first.model.model[4].register_forward_hook(lambda module, args, output: output * math.inf)


def spoil_response(trainer):
    trainer.distillation_loss.temperature = 1e-45
    return partial(setattr, trainer.distillation_loss, "temperature", 4.0)


def spoil_features(trainer):
    """An infinite loss whose gradient is finite."""
    loss = trainer.distillation_loss
    adapt = loss._adapt
    loss._adapt = lambda *args: adapt(*args) + 1e20
    return partial(delattr, loss, "_adapt")


def spoil_attention(trainer):
    """Finite maps whose squares are not; the feature loss is off."""
    ask = type(trainer.teacher).__call__

    class Loud(type(trainer.teacher)):
        def __call__(self, *args, **kwargs):
            logits, features = ask(self, *args, **kwargs)
            return logits, [x * 1e25 for x in features]

    trainer.teacher.__class__ = Loud
    return partial(setattr, trainer.teacher, "__class__", Loud.__base__)


def spoil_gradient(trainer):
    return trainer.model.model[3].conv.weight.register_hook(lambda gradient: gradient * math.inf)


SPOILED = {
    "loss": spoil_activations,
    "teacher": spoil_teacher,
    "response_loss": spoil_response,
    "feature_loss": spoil_features,
    "attention_loss": spoil_attention,
    "gradient": spoil_gradient,
}


def settings_for(cause):
    return {"feature_distill": False, "response_distill": False} if cause == "attention_loss" else {}


def train_spoiled(overrides, cause, is_bad, after_bad=lambda trainer, before: None):
    """Train with spoiled batches; `after_bad` gets the trainer and copies of its state before each."""
    seen = {"batch": -1}

    def on_start(trainer):
        seen["batch"] += 1
        if is_bad(seen["batch"]):
            state = trainer.model.state_dict(), trainer.optimizer.state_dict()["state"]
            seen.update(before=copy.deepcopy(state), mend=SPOILED[cause](trainer))

    def on_end(trainer):
        if mend := seen.pop("mend", None):
            mend.remove() if isinstance(mend, RemovableHandle) else mend()
            after_bad(trainer, seen["before"])

    return train({**overrides, **settings_for(cause)}, on_train_batch_start=on_start, on_train_batch_end=on_end)


@pytest.mark.parametrize("cause", SPOILED)
def test_a_bad_batch_leaves_no_trace(cause, overrides):
    """Weights, BatchNorm statistics and optimizer are those before it, the EMA is finite, and training goes on."""
    compared = []

    def compare(trainer, before):
        model, optimizer = before
        now = trainer.model.state_dict()
        spared = {k: v for k, v in now.items() if "num_batches_tracked" not in k}  # counts, but has no effect
        assert same(spared, {k: model[k] for k in spared})
        for i, values in trainer.optimizer.state_dict()["state"].items():
            assert same(values, optimizer[i])
        assert all(v.isfinite().all() for v in trainer.ema.ema.state_dict().values())
        assert trainer.loss.isfinite()
        assert trainer.scaler.get_scale() == 1
        assert all(v.isfinite() for v in trainer.tloss.values())
        compared.append(copy.deepcopy(now))

    trainer = train_spoiled({**overrides, "nbs": 32}, cause, lambda batch: batch == 2, compare)
    assert dict(trainer.skipped) == {cause: 1}
    assert not same(trainer.model.state_dict(), {k: compared[0][k] for k in trainer.model.state_dict()})
    (row,) = rows(trainer)
    assert all(math.isfinite(float(v)) for v in row.values())
    assert all(v.isfinite().all() for v in weights(trainer.best).values())


def test_the_first_batch_may_be_bad_and_the_means_are_those_of_the_others(overrides):
    means = []
    trainer = train_spoiled(
        {**overrides, "epochs": 2},
        "teacher",
        lambda batch: batch in {0, 7},
        lambda trainer, before: means.append(trainer.tloss),
    )
    assert dict(trainer.skipped) == {"teacher": 2}
    assert not means[0]["response_loss"].isfinite()  # nothing else to show yet
    for row in rows(trainer):
        assert all(0.01 < float(row[f"train/{name}"]) < 10 for name in DISTILLATION_LOSSES)


def test_a_bad_batch_does_not_spoil_those_that_wait_for_the_same_step(overrides):
    """With accumulated gradients, the step after it is made of the good batches that follow."""
    gradients = []
    trainer = train_spoiled(
        {**overrides, "batch": 16, "warmup_epochs": 0},  # 13 batches, a step every 4
        "teacher",
        lambda batch: batch == 1,
        lambda trainer, before: gradients.extend(p.grad for p in trainer.model.parameters()),
    )
    assert all(g is None or not g.any() for g in gradients)
    assert dict(trainer.skipped) == {"teacher": 1}
    steps = {float(s["step"]) for s in trainer.optimizer.state_dict()["state"].values()}
    assert steps == {3.0}


def test_where_steps_cannot_be_skipped_upstream_recovers_in_its_own_way(overrides, monkeypatch):
    """As on a device whose gradients PyTorch's scaler cannot look at: the run goes on from what upstream has saved."""

    def unscale(guard, optimizer):
        raise NotImplementedError("'aten::_amp_foreach_non_finite_check_and_unscale_' is not implemented here")

    monkeypatch.setattr(guarded._StepGuard, "unscale_", unscale)
    said = []
    monkeypatch.setattr(LOGGER, "warning", lambda message, *args: said.append(str(message)))
    settings = {**overrides, "epochs": 3, "nbs": 32, "fraction": 0.3}
    trainer = train_spoiled(settings, "gradient", lambda batch: batch == 2)  # the second epoch's first of two
    assert not trainer.scaler.is_enabled()
    assert not trainer.skipped
    assert sum("recovering from last.pt" in line for line in said) == 1
    assert [row["epoch"] for row in rows(trainer)] == ["1", "2", "3"]
    assert all(math.isfinite(float(v)) for row in rows(trainer) for v in row.values())
    assert all(v.isfinite().all() for v in weights(trainer.best).values())


@pytest.mark.parametrize("cause", SPOILED)
def test_a_run_that_cannot_go_on_stops_and_names_the_cause(cause, overrides):
    named = {"loss": "student's own loss", "teacher": "teacher=", "gradient": "gradient"}
    with pytest.raises(RuntimeError, match=rf"{MOST_SKIPPED + 1} of {MOST_SKIPPED + 1} batches.*NaN or infinite") as e:
        train_spoiled({**overrides, "batch": 8, "nbs": 8, "epochs": 2}, cause, lambda batch: True)
    assert named.get(cause, cause.replace("_", " ")) in str(e.value)


def test_upstreams_scaler_that_skips_every_step_stops_the_run(overrides):
    """In float16 it skips steps by itself, and would go on to the end without having learned anything."""

    class HalfPrecision(DistillationClassificationTrainer):
        def _setup_train(self):
            super()._setup_train()
            self.scaler = torch.amp.GradScaler("cpu")

    settings = {**overrides, "batch": 8, "nbs": 8, "warmup_epochs": 0.0, "epochs": 3}
    with pytest.raises(RuntimeError, match=r"steps had to be skipped.*the gradient is NaN or infinite"):
        train(settings, HalfPrecision, on_train_start=spoil_gradient)
    assert train({**settings, "epochs": 1}, HalfPrecision).scaler.get_scale() == 65536


def test_one_bad_batch_in_ten_is_borne(overrides):
    trainer = train_spoiled({**overrides, "batch": 4, "epochs": 3}, "teacher", lambda batch: batch % 10 == 9)
    assert dict(trainer.skipped) == {"teacher": 15}


def test_skipped_batches_are_logged(overrides, monkeypatch):
    said = []
    monkeypatch.setattr(LOGGER, "warning", lambda message, *args: said.append(str(message)))
    train_spoiled(overrides, "teacher", lambda batch: batch in {1, 3})
    assert [line for line in said if "Skipping a batch" in line and overrides["teacher"] in line]
    assert [line for line in said if line.startswith("2 batches of this epoch were skipped")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_trains(dtype, overrides):
    """Under the CPU's autocast, as upstream switches AMP on for CUDA only."""
    seen = set()

    class HalfPrecision(DistillationClassificationTrainer):
        def _setup_train(self):
            super()._setup_train()
            self.amp = True

        def preprocess_batch(self, batch):
            batch = super().preprocess_batch(batch)
            seen.add(batch[LESSON].answer()[1][0].dtype)
            return batch

    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", dtype)
    try:
        trainer = train(overrides, HalfPrecision)
    finally:
        torch.set_autocast_dtype("cpu", before)
    assert seen == {dtype}
    assert not trainer.skipped
    assert all(0.01 < float(rows(trainer)[0][f"train/{name}"]) < 10 for name in DISTILLATION_LOSSES)
