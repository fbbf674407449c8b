"""The machinery of a run knows no task: a detector that learns feature maps is a small object and a class of two lines.

Upstream's dense criteria give a vector times the batch size, their end-to-end heads count epochs in `update()`, and
their trainers bring datasets, batches and checkpoints of their own; all of it works as in plain training.
"""

from pathlib import Path

import pytest
import torch
from helpers import Stopped, rows, stop_after, train
from ultralytics.engine.distillation.criterion import LESSON, DistillationCriterion, Lesson, StudentCriterion
from ultralytics.engine.distillation.plan import Score
from ultralytics.engine.distillation.task import DistillationTask
from ultralytics.engine.distillation.trainer import DistillationTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.distillation.sources import Expected
from ultralytics.nn.distillation.teacher import Teacher
from ultralytics.nn.tasks import DetectionModel, load_checkpoint
from ultralytics.utils import YAML
from ultralytics.utils.loss import E2ELoss


class Detector(Teacher):
    """A trained detector, frozen."""

    expected = Expected("detect", DetectionModel, "yolo11l.pt")

    def read(self, output):
        return output[0]

    def check_answer(self, answer, count):
        if not answer.isfinite().all():
            raise ValueError(f"'teacher={self.source}' gives NaN or infinite boxes.")


class FeatureTask(DistillationTask):
    """A detector learns feature maps alone."""

    name = "detect"
    plain_trainer = DetectionTrainer
    teacher_class = Detector
    network_class = DetectionModel
    score = Score("map", "metrics/mAP50-95(B)", "mAP50-95", "validation mAP50-95 (%)")

    def compare(self, plan, loss, predictions, features, answer, batch):
        return loss.losses(features[0], answer[0], features, answer[1])

    def scale(self, batch):
        return len(batch["img"])

    def blank_batch(self, images, plan):
        nothing = {"cls": images.new_zeros(0, 1), "bboxes": images.new_zeros(0, 4), "batch_idx": images.new_zeros(0)}
        return {"img": images, **nothing, LESSON: Lesson()}


class FeatureDetectionTrainer(DistillationTrainer, DetectionTrainer):
    """Joins the three."""

    task = FeatureTask()


@pytest.fixture
def settings(settings_of):
    return settings_of("detect", response_distill=False, fraction=0.34)


def test_a_detector_learns_the_necks_maps(settings):
    """Its head's inputs at every stride; the teacher's losses count times the batch size, as its own does."""
    seen = []

    def on_end(trainer):
        items = {k: v.item() for k, v in trainer.loss_items.items()}
        taught = sum(w * items[k] for k, w in trainer.distiller.weights.items())
        own = sum(items[k] for k in ("box_loss", "cls_loss", "dfl_loss"))
        seen.append((trainer.loss.item(), pytest.approx(8 * (0.3 * own + 0.7 * taught), rel=1e-4)))

    settings |= {"epochs": 2, "fraction": 1.0}
    trainer = train(settings, FeatureDetectionTrainer, on_train_batch_end=on_end)
    assert [student.name for student in trainer.plan.student_levels] == ["model.16", "model.19", "model.22"]
    assert len(seen) == 6
    assert all(total == expected for total, expected in seen)
    table = rows(trainer)
    assert all(float(row[f"train/{name}"]) > 0 for row in table for name in ("feature_loss", "attention_loss"))
    assert float(table[1]["train/feature_loss"]) < float(table[0]["train/feature_loss"])
    assert "metrics/mAP50-95(B)" in table[0]
    student = load_checkpoint(trainer.best)[0]
    assert type(student) is DetectionModel
    assert "distill_adapters" not in student._modules


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0, 0.7])
def test_an_end_to_end_heads_criterion_counts_on_after_a_resume(alpha, settings):
    """As upstream's does: the share of its first branch falls with every epoch."""
    counts = []

    def note(trainer):
        own = trainer.model.criterion.own
        assert isinstance(own, E2ELoss)
        counts.append((trainer.epoch, own.updates, own.o2m))

    settings = {**settings, "model": "yolo26n.yaml", "epochs": 3, "distill_alpha": alpha, "distill_beta": 1}
    whole = train(settings, FeatureDetectionTrainer, on_train_epoch_start=note)
    expected, counts[:] = list(counts), []
    with pytest.raises(Stopped):
        train({**settings, "name": "stopped"}, FeatureDetectionTrainer, on_fit_epoch_end=stop_after(0))
    last = whole.save_dir.parent / "stopped" / "weights" / "last.pt"
    train({"resume": str(last)}, FeatureDetectionTrainer, on_train_epoch_start=note)
    assert [epoch for epoch, *_ in expected] == [updates for _, updates, _ in expected] == [0, 1, 2]
    assert len({share for *_, share in expected}) == 3
    assert counts == expected[1:]


def test_an_end_to_end_heads_criterion_counts_on_after_recovery_from_nan(settings):
    """Upstream loads the last checkpoint into the network; its criterion stays the one that has counted."""
    criteria, poisoned = [], []

    class Poisoned(FeatureDetectionTrainer):
        def validate(self):
            result = super().validate()
            if self.epoch == 1 and not poisoned:
                poisoned.append(True)
                self.loss = self.loss * float("nan")
            return result

    def note(trainer):
        criteria.append((trainer.epoch, trainer.model.criterion.own, trainer.model.criterion.own.updates))

    settings = {**settings, "model": "yolo26n.yaml", "epochs": 3}
    train(settings, Poisoned, on_train_epoch_start=note)
    assert [(epoch, updates) for epoch, _, updates in criteria] == [(0, 0), (1, 1), (1, 2), (2, 3)]
    assert len({id(own) for _, own, _ in criteria}) == 1


@pytest.mark.parametrize(("alpha", "kind"), [(0, StudentCriterion), (0.7, DistillationCriterion)])
def test_what_takes_the_criterions_place(alpha, kind, settings):
    criteria = []
    train(
        {**settings, "distill_alpha": alpha},
        FeatureDetectionTrainer,
        on_train_start=lambda t: criteria.append(type(t.model.criterion)),
    )
    assert criteria == [kind]


@pytest.mark.slow
def test_what_else_upstreams_detectors_do(settings, tmp_path, undrawn):
    """Several folders, plots, sizes that vary, a checkpoint for each epoch: the files are those of plain training."""
    splits = YAML.load(settings["data"])
    YAML.save(tmp_path / "both.yaml", {**splits, "train": ["images/train", "images/val"]})
    more = {
        "data": str(tmp_path / "both.yaml"),
        "plots": True,
        "multi_scale": 0.25,
        "save_period": 1,
    }
    ours = train({**settings, **more}, FeatureDetectionTrainer)
    plain = {k: v for k, v in settings.items() if k not in {"teacher", "response_distill"}}
    theirs = train({**plain, "project": str(tmp_path / "plain"), **more}, DetectionTrainer)
    assert len(ours.train_loader.dataset) == round(0.34 * 32)
    assert {f.name for f in ours.save_dir.rglob("*")} == {f.name for f in theirs.save_dir.rglob("*")}
    for name in ("best.pt", "last.pt"):
        a, b = (torch.load(t.wdir / name, weights_only=False) for t in (ours, theirs))
        assert a["train_args"].keys() == b["train_args"].keys()
        assert vars(a["model"]).keys() == vars(b["model"]).keys()
        assert dict(a["model"].args).keys() == dict(b["model"].args).keys()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"response_distill": True}, "compared by its feature maps alone in this task. Set 'response_distill=False'"),
        ({"teacher_cache": "ram"}, "'teacher_cache=ram' keeps answers to images that are seen again"),
        ({"teacher_cache": "disk"}, "'teacher_cache=disk' keeps answers to images that are seen again"),
    ],
)
def test_what_the_task_does_not_do_is_refused_before_any_file(given, words, settings):
    with pytest.raises(ValueError, match=words):
        FeatureDetectionTrainer(overrides={**settings, **given})
    assert not Path(settings["project"]).exists()
