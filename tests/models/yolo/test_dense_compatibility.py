"""The manual's table of upstream's training features for detectors and what is built on them, row by row."""

import re

import pytest
import torch
from helpers import MANUALS, compatibility_table, compile_by_tracing, train
from ultralytics.cfg.distillation import parse_arguments
from ultralytics.models.distillation import TRAINERS
from ultralytics.utils import torch_utils
from ultralytics.utils.torch_utils import unwrap_model


class Watched:
    """A run, with the batches that its student was given and the images that its teacher was asked about."""

    def __init__(self, settings, task):
        self.batches, self.asked = [], []
        self.trainer = train(settings, TRAINERS[task], on_train_start=self.watch)

    def watch(self, trainer):
        prepare = trainer.preprocess_batch
        self.begun = {k: v.clone() for k, v in unwrap_model(trainer.model).state_dict().items()}
        trainer.preprocess_batch = lambda batch: self.batches.append(prepare(batch)) or self.batches[-1]
        trainer.teacher.first.model.register_forward_pre_hook(lambda _, given: self.asked.append(given[0]))

    @property
    def ended(self):
        return unwrap_model(self.trainer.model).state_dict()

    @property
    def images(self):
        return [batch["img"] for batch in self.batches]

    @property
    def classes(self):
        return {c for batch in self.batches for c in batch["cls"].flatten().int().tolist()}


def augments(run, without):
    """Tell whether the images are others than without the augmentation, and all else is the same."""
    return not torch.equal(run.images[0], without().images[0])


WORKS = {
    "multi_scale=0.5": lambda run, _: len({x.shape for x in run.images}) > 1,
    "rect=True": lambda run, _: run.trainer.train_loader.dataset.rect,
    "single_cls=True": lambda run, _: run.classes == {0} and set(run.trainer.distiller.weights) == {"attention_loss"},
    "single_cls=True classes=[2]": lambda run, _: run.classes == {0} == {*run.trainer.plan.data["names"]},
    "classes=[0,1]": lambda run, _: run.classes == {0, 1} == set(run.trainer.plan.teacher.classes),
    "freeze=3": lambda run, _: (
        [torch.equal(run.begun[k], run.ended[k]) for k in (f"model.{i}.conv.weight" for i in (0, 1, 3))]
        == [True, True, False]
    ),
    "cache=ram": lambda run, _: run.trainer.train_loader.dataset.ims[0] is not None,
    "mixup=1.0 cutmix=0.5": augments,
    "copy_paste=1.0": augments,
    "overlap_mask=False mask_ratio=2": lambda run, _: all(
        x["masks"].shape == (len(x["cls"]), 32, 32) for x in run.batches
    ),
    "quantize=8": lambda run, _: torch_utils.is_qat(run.trainer.model),
    "compile=True": lambda run, _: hasattr(run.trainer.model, "_orig_mod"),
}
REFUSED = {
    "freeze=24": "'freeze=24' froze the entire model",  # by upstream
    "quantize=8 feature_distill=True": "'quantize=8' would quantize the adapters",
    "teacher_cache=ram": "Set 'mosaic=0.0'",
}
ELSEWHERE = ("batch=-1", "close_mosaic=1", "device=0,1", "resume=True", "teacher=self")
TASKS = {"copy_paste=1.0": "segment", "overlap_mask=False mask_ratio=2": "segment"}
SLOW = {"compile=True", "quantize=8"}


@pytest.mark.parametrize("row", [pytest.param(r, marks=pytest.mark.slow) if r in SLOW else r for r in WORKS])
def test_works(row, settings_of, monkeypatch):
    """Both networks see the same images, and all losses teach that can."""
    if "quantize" in row:
        pytest.importorskip("modelopt")
    if "compile" in row:
        compile_by_tracing(monkeypatch)
    task = TASKS.get(row, "detect")
    settings = settings_of(task, fraction=1.0 if "multi_scale" in row else 0.34, close_mosaic=0)
    run = Watched({**settings, **parse_arguments(row.split())}, task)
    assert WORKS[row](run, lambda: Watched({**settings, "name": "without"}, task))
    assert len(run.asked) == len(run.batches) > 0
    assert all(torch.equal(a, b) for a, b in zip(run.asked, run.images, strict=True))
    losses = run.trainer.loss_items
    assert all(x.isfinite() for x in losses.values())
    assert all(losses[name] > 0 for name in run.trainer.distiller.weights)


@pytest.mark.parametrize("row", REFUSED)
def test_is_refused(row, settings_of):
    with pytest.raises((ValueError, RuntimeError), match=re.escape(REFUSED[row])):
        train({**settings_of("detect", fraction=0.34), **parse_arguments(row.split())}, TRAINERS["detect"])


@pytest.mark.parametrize("manual", MANUALS)
def test_the_manual_lists_these(manual):
    """Each row of its table is one of the above, and says as much."""
    assert compatibility_table(manual, "compatibility of detectors") == {
        **dict.fromkeys([*WORKS, *ELSEWHERE], "works"),
        **dict.fromkeys(REFUSED, "refused"),
    }
