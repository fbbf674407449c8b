"""The machinery of a run knows no task: a detector that learns feature maps is a small object and a class of two lines.

Upstream's dense criteria give a vector times the batch size, their end-to-end heads count epochs in `update()`, and
their trainers bring datasets, batches and checkpoints of their own; all of it works as in plain training.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Stopped, rows, same, stop_after, train, weights
from PIL import Image
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

from distill_train_example import load_digit_images

DETECTION = {"imgsz": 64, "batch": 8, "nbs": 8, "epochs": 2, "optimizer": "AdamW", "plots": False, "device": "cpu"}


class Detector(Teacher):
    """A trained detector, frozen."""

    expected = Expected("detect", DetectionModel, "yolo11l.pt")

    def read(self, output):
        return output[0]

    def check_answer(self, answer):
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


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Images with two digits each, with boxes around them, as upstream's detectors take them."""
    folder = tmp_path_factory.mktemp("scenes")
    images, labels, names = load_digit_images()
    draw = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            scene, lines = draw.integers(0, 60, (64, 64), dtype=np.uint8), []
            for x in (0, 32):
                n, y = draw.integers(len(images)), draw.integers(0, 33)
                scene[y : y + 32, x : x + 32] = images[n]
                lines.append(f"{labels[n]} {(x + 16) / 64} {(y + 16) / 64} 0.5 0.5")
            Image.fromarray(scene).convert("RGB").save(folder / "images" / split / f"{i}.png")
            (folder / "labels" / split / f"{i}.txt").write_text("\n".join(lines))
    file = folder / "scenes.yaml"
    YAML.save(
        file, {"path": str(folder), "train": "images/train", "val": "images/val", "names": dict(enumerate(names))}
    )
    return file


@pytest.fixture(scope="module")
def detector(scenes, tmp_path_factory):
    """The best.pt of a yolo11s trained on the scenes."""
    project = str(tmp_path_factory.mktemp("detector"))
    overrides = {**DETECTION, "model": "yolo11s.yaml", "data": str(scenes), "epochs": 1, "project": project}
    return train(overrides, DetectionTrainer).best


@pytest.fixture
def settings(scenes, detector, tmp_path):
    return {
        **DETECTION,
        "model": "yolo11n.yaml",
        "data": str(scenes),
        "teacher": str(detector),
        "response_distill": False,
        "project": str(tmp_path / "runs"),
    }


def without_teacher(settings, tmp_path):
    own = {"teacher", "response_distill"}
    return {**{k: v for k, v in settings.items() if k not in own}, "project": str(tmp_path / "plain")}


@pytest.mark.oldest
def test_a_detector_learns_the_necks_maps(settings):
    """Its head's inputs at every stride; the teacher's losses count times the batch size, as its own does."""
    seen = []

    def on_end(trainer):
        items = {k: v.item() for k, v in trainer.loss_items.items()}
        taught = sum(w * items[k] for k, w in trainer.distiller.weights.items())
        own = sum(items[k] for k in ("box_loss", "cls_loss", "dfl_loss"))
        seen.append((trainer.loss.item(), pytest.approx(8 * (0.3 * own + 0.7 * taught), rel=1e-4)))

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


@pytest.mark.oldest
@pytest.mark.parametrize("model", ["yolo11n.yaml", "yolo26n.yaml"])
def test_without_weight_the_run_is_bit_identical_to_plain(model, settings, tmp_path):
    settings = {**settings, "model": model, "epochs": 3}
    ours = train({**settings, "distill_alpha": 0, "distill_beta": 1}, FeatureDetectionTrainer)
    theirs = train(without_teacher(settings, tmp_path), DetectionTrainer)
    assert same(weights(ours.last), weights(theirs.last))
    assert [{**row, "time": 0} for row in rows(ours)] == [{**row, "time": 0} for row in rows(theirs)]


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0, 0.7])
def test_an_end_to_end_heads_criterion_counts_on_after_a_resume(alpha, settings):
    """As upstream's does: the share of its first branch falls with every epoch."""
    counts = []

    def note(trainer):
        own = trainer.model.criterion.own
        assert isinstance(own, E2ELoss)
        counts.append((trainer.epoch, own.updates, own.o2m))

    settings = {**settings, "model": "yolo26n.yaml", "epochs": 4, "distill_alpha": alpha, "distill_beta": 1}
    whole = train(settings, FeatureDetectionTrainer, on_train_epoch_start=note)
    expected, counts[:] = list(counts), []
    with pytest.raises(Stopped):
        train({**settings, "name": "stopped"}, FeatureDetectionTrainer, on_fit_epoch_end=stop_after(1))
    last = whole.save_dir.parent / "stopped" / "weights" / "last.pt"
    train({"resume": str(last)}, FeatureDetectionTrainer, on_train_epoch_start=note)
    assert [epoch for epoch, *_ in expected] == [updates for _, updates, _ in expected] == [0, 1, 2, 3]
    assert len({share for *_, share in expected}) == 4
    assert counts == expected[2:]


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
    settings = {**settings, "epochs": 1, "distill_alpha": alpha}
    train(settings, FeatureDetectionTrainer, on_train_start=lambda t: criteria.append(type(t.model.criterion)))
    assert criteria == [kind]


def test_automatic_batch_sizes_count_the_teacher(settings, monkeypatch):
    totals = []

    def check_train_batch_size(model, imgsz, **kwargs):
        assert int(model.stride.max()) == 32  # upstream asks for these where it stands in for many boxes
        assert len(model.names) == 10
        totals.append(model.train()(torch.rand(2, 3, imgsz, imgsz)).detach())
        return 8

    monkeypatch.setattr("ultralytics.engine.trainer.check_train_batch_size", check_train_batch_size)
    trainer = train({**settings, "batch": -1, "epochs": 1}, FeatureDetectionTrainer)
    assert trainer.batch_size == 8
    assert totals[0].isfinite().all()


@pytest.mark.slow
def test_what_else_upstreams_detectors_do(settings, scenes, tmp_path):
    """Several folders, plots, sizes that vary, a checkpoint for each epoch: the files are those of plain training."""
    splits = YAML.load(scenes)
    YAML.save(tmp_path / "both.yaml", {**splits, "train": ["images/train", "images/val"]})
    more = {"data": str(tmp_path / "both.yaml"), "plots": True, "multi_scale": 0.25, "save_period": 1}
    ours = train({**settings, **more}, FeatureDetectionTrainer)
    theirs = train({**without_teacher(settings, tmp_path), **more}, DetectionTrainer)
    assert len(ours.train_loader.dataset) == 32
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


def test_a_teacher_of_another_task_is_refused(settings, teacher):
    with pytest.raises(TypeError, match="is a classify model, but the teacher must be a detection model"):
        FeatureDetectionTrainer(overrides={**settings, "teacher": str(teacher)})
