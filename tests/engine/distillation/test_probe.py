"""Heads that a run fits its teacher: real trainings whose teacher knew other classes."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import teachers
import torch
from helpers import Stopped, rows, same, stop_after, train, weights, write_digits
from PIL import Image
from torch import nn
from ultralytics import YOLO
from ultralytics.data.distillation.wrapped import WrappedDataset
from ultralytics.engine.distillation import probe
from ultralytics.engine.distillation.answers import fingerprint
from ultralytics.engine.distillation.planner import resumed_arguments
from ultralytics.engine.distillation.run_files import locked
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.utils import LOGGER, YAML

CLASSES = [f"digit {c}" for c in range(10)]


@pytest.fixture(autouse=True)
def _briefly(monkeypatch):
    """One view of each image, and two strengths, are enough to tell what is done from what is not."""
    monkeypatch.setattr(probe, "MOST_ANSWERS", 200)
    monkeypatch.setattr("ultralytics.nn.distillation.probe.STRENGTHS", (1e-3, 1e-2))


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """The digits under names that the teacher does not know."""
    return write_digits(tmp_path_factory.mktemp("data") / "others", names=CLASSES)


@pytest.fixture
def settings(overrides, others):
    return {**overrides, "data": str(others), "teacher_probe": True, "epochs": 2}


@pytest.fixture
def said(monkeypatch):
    """What is logged, warnings with a mark."""
    lines = []
    monkeypatch.setattr(LOGGER, "info", lambda text: lines.append(str(text)))
    monkeypatch.setattr(LOGGER, "warning", lambda text: lines.append(f"WARNING {text}"))
    return lines


@pytest.fixture
def fits(monkeypatch):
    """How often a head is fitted."""
    calls = []
    fit = probe.fit_head
    monkeypatch.setattr(probe, "fit_head", lambda *args: calls.append(args) or fit(*args))
    return calls


def head_of(folder):
    (file,) = Path(folder).glob("weights/probe-*.pt")
    return file


def test_without_it_the_refusal_names_it_first(settings):
    with pytest.raises(
        ValueError, match=r"knows 0 of .* 10 classes.*\. Run the same command with 'teacher_probe=True'"
    ):
        DistillationClassificationTrainer(overrides={**settings, "teacher_probe": False})
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    with pytest.raises(ValueError, match=r"which classes it knows\. Run the same command with 'teacher_probe=True'"):
        DistillationClassificationTrainer(overrides={**settings, "teacher_probe": False, "teacher": network})


def test_a_run_fits_a_head_and_is_the_run_with_the_fitted_teacher(
    settings, fits, said, tmp_path, monkeypatch, drawn_by_us
):
    """The teacher is whole in the run folder, and what is fitted before training leaves its random stream alone."""
    monkeypatch.setattr(probe, "MOST_ANSWERS", 1000)
    run = train({**settings, "plots": True})
    assert "best.pt + fitted head" in (run.save_dir / "distillation.html").read_text()
    (features, labels, index, classes, _), *more = fits
    assert not more
    assert features.shape == (200 * probe.VIEWS, 1280)  # all images, in the views that training would draw
    assert (sorted(set(labels)), sorted(set(index)), classes) == (list(range(10)), list(range(200)), 10)
    assert not (features[:200] == features[200:400]).all(1).any()
    file = head_of(run.save_dir)
    assert run.args.teacher == str(file)
    recorded = YAML.load(run.save_dir / "args.yaml")
    assert (recorded["teacher"], recorded["teacher_hash"]) == (str(file), run.plan.teacher.content_hash)
    assert recorded["teacher_probe"] is True
    (fitted,) = [line for line in said if "frozen features" in line]
    assert "10 classes" in fitted
    assert "4 views of 200 training images" in fitted
    (judged,) = [line for line in said if "50 validation images" in line]
    assert str(file) in judged
    assert run.plan.teacher.members[0].names == CLASSES
    measured = 100 * YOLO(file).val(data=settings["data"], imgsz=32, plots=False, project=str(tmp_path)).top1
    assert f"{measured:.1f}%" in judged
    assert measured > 40

    by_itself = {k: v for k, v in settings.items() if k != "teacher_probe"} | {"teacher": str(file)}
    again = train({**by_itself, "project": str(tmp_path / "again")})
    assert same(weights(again.last), weights(run.last))
    assert [row["train/response_loss"] for row in rows(again)] == [row["train/response_loss"] for row in rows(run)]
    assert len(fits) == 1


@pytest.mark.oldest
def test_the_student_is_the_same_whether_a_head_is_fitted_or_found(settings, teacher, fits, tmp_path):
    """Whatever opening and building networks of a library draw."""
    settings |= {"teacher": teachers.timm_safetensors(tmp_path, teacher), "epochs": 1, "fraction": 0.3}
    first, second = train(settings), train(settings)
    assert len(fits) == 1
    assert same(weights(first.last), weights(second.last))


def test_a_killed_run_is_resumed_bit_for_bit_and_its_head_is_fitted_once(settings, fits, teacher, tmp_path):
    settings |= {"teacher": teachers.timm_safetensors(tmp_path, teacher)}
    whole = train({**settings, "project": str(tmp_path / "whole")})
    with pytest.raises(Stopped):
        train(settings, on_fit_epoch_end=stop_after(0))
    (last,) = Path(settings["project"]).glob("*/weights/last.pt")
    resumed = train({"resume": str(last)})
    assert len(fits) == 2
    assert same(weights(resumed.last), weights(whole.last))
    assert resumed.args.teacher == str(head_of(resumed.save_dir))


def test_a_run_that_was_moved_or_is_given_its_teacher_again_goes_on(settings, fits, teacher, tmp_path):
    """With the head that lies beside its last.pt; and not with another teacher."""
    whole = train({**settings, "project": str(tmp_path / "whole"), "fraction": 0.3})
    with pytest.raises(Stopped):
        train({**settings, "fraction": 0.3}, on_fit_epoch_end=stop_after(0))
    (last,) = Path(settings["project"]).glob("*/weights/last.pt")
    moved = Path(shutil.copytree(last.parents[1], tmp_path / "far" / "away" / "moved")) / "weights" / "last.pt"
    again = train({"resume": str(last), "teacher": str(teacher)})
    assert same(weights(again.last), weights(whole.last))
    shutil.rmtree(last.parents[1])
    assert DistillationClassificationTrainer(overrides={"resume": str(moved)}).args.teacher == str(
        head_of(moved.parents[1])
    )
    assert len(fits) == 2
    other = tmp_path / "other.pt"
    network = torch.load(teacher, weights_only=False)
    network["model"].model[0].conv.weight.data *= 1.5
    torch.save(network, other)
    DistillationClassificationTrainer(overrides={**settings, "teacher": str(other), "fraction": 0.3}).fit_heads()
    with pytest.raises(ValueError, match="the training images or the teacher are others"):  # though a head lies beside
        train({"resume": str(moved), "teacher": str(other)})
    assert same(weights(train({"resume": str(moved), "teacher": str(teacher)}).last), weights(whole.last))


def test_only_what_a_run_fitted_itself_is_looked_for_beside_its_weights(tmp_path):
    """Not the student's own checkpoint, whatever its teacher was called."""
    for name in ("best.pt", "probe-1.pt"):
        (tmp_path / name).touch()
    training = SimpleNamespace(resume=str(tmp_path / "last.pt"), teacher_probe=True)
    old = tmp_path / "old" / tmp_path.name
    for teacher, found in (
        (str(old / "probe-1.pt"), str(tmp_path / "probe-1.pt")),
        (str(old / "probe-2.pt"), str(old / "probe-2.pt")),
        (str(old / "best.pt"), str(old / "best.pt")),
        (f"timm:resnet18@{old / 'best.pt'}", f"timm:resnet18@{old / 'best.pt'}"),
    ):
        training.teacher = teacher
        assert resumed_arguments({}, training)["teacher"] == found


def test_two_that_fit_heads_in_one_folder_are_kept_apart(settings):
    first = DistillationClassificationTrainer(overrides=settings)
    with locked(first.save_dir), pytest.raises(RuntimeError, match="Another run"):
        first.probe()


def test_a_resumed_run_fits_nothing(settings, fits):
    """Without its head there is another teacher."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, 4))
    settings |= {"teacher": network, "feature_distill": False, "attention_distill": False, "fraction": 0.3}
    with pytest.raises(Stopped):
        train(settings, on_fit_epoch_end=stop_after(0))
    (last,) = Path(settings["project"]).glob("*/weights/last.pt")
    head_of(last.parents[1]).unlink()
    with pytest.raises(ValueError, match=r"head of 'teacher=module:Sequential' is not in.*Put the file back"):
        train({"resume": str(last), "teacher": network})
    assert len(fits) == 1


def test_networks_of_the_same_weights_get_a_head_each(settings, fits):
    class Pooled(nn.Module):
        def __init__(self, pool):
            super().__init__()
            self.convolution, self.pool = nn.Conv2d(3, 8, 8, 8), pool

        def forward(self, x):
            return self.pool(self.convolution(x).flatten(2))

    torch.manual_seed(0)
    mean, largest = Pooled(lambda x: x.mean(2)), Pooled(lambda x: x.amax(2))
    largest.load_state_dict(mean.state_dict())
    settings |= {"feature_distill": False, "attention_distill": False}
    for network in (mean, largest):
        DistillationClassificationTrainer(overrides={**settings, "teacher": network}).fit_heads()
    assert len(fits) == 2


def test_the_key_is_the_same_whatever_rounds():
    """Also of features that end in a normalization, whose mean is nothing but rounding."""
    x = torch.nn.functional.layer_norm(torch.rand(2, 64), (64,))
    assert fingerprint(x) == fingerprint(x + 1e-8) == fingerprint(x - 1e-8)
    assert fingerprint(x) != fingerprint(x + 0.1)
    assert fingerprint(torch.zeros(3)) == fingerprint(-torch.zeros(3))


def another_image(data):
    file = next(data.glob("train/digit 3/*"))
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)


@pytest.mark.parametrize(
    ("change", "fitted"),
    [
        ({}, False),
        ({"epochs": 2, "temperature": 2.0}, False),
        ({"imgsz": 64}, True),
        ({"auto_augment": "augmix"}, True),
        ({"teacher_mean": 0.5}, True),
        ({"teacher_imgsz": 64}, True),
        ({"fraction": 0.5}, True),
        (another_image, True),
        (lambda data: next(data.glob("train/digit 3/*")).unlink(), True),
        (lambda data: [x.rename(x.with_name("digit 3b")) for x in data.glob("*/digit 3")], True),
        (lambda data: (data / "train" / "zebra").rename(data / "train" / "cow"), True),
    ],
    ids=[
        *("same", "of no matter", "another size", "other views", "another mean", "the teacher's size", "fewer images"),
        *("another image", "an image less", "another class", "another class without images"),
    ],
)
def test_a_later_run_takes_it_from_an_earlier_one(change, fitted, settings, fits, said, tmp_path):
    """On the same images of the same teacher."""
    settings["data"] = str(shutil.copytree(settings["data"], tmp_path / "own"))
    (tmp_path / "own" / "train" / "zebra").mkdir()
    first = DistillationClassificationTrainer(overrides=settings)
    first.fit_heads()
    if callable(change):
        change(tmp_path / "own")
        change = {}
    second = DistillationClassificationTrainer(overrides={**settings, **change})
    second.fit_heads()
    assert len(fits) == 1 + fitted
    assert any(f"is taken from {head_of(first.save_dir)}" in line for line in said) == (not fitted)
    assert second.args.teacher == str(head_of(second.save_dir)) != first.args.teacher
    a, b = (x.plan.teacher.members[0] for x in (first, second))
    images = torch.rand(2, 3, 32, 32)
    assert (a.names == b.names and torch.equal(a(images)[0], b(images)[0])) == (not fitted)


def test_a_damaged_head_is_fitted_anew(settings, fits):
    first = DistillationClassificationTrainer(overrides=settings)
    first.fit_heads()
    file = head_of(first.save_dir)
    file.write_bytes(file.read_bytes()[:-2000])
    second = DistillationClassificationTrainer(overrides=settings)
    second.fit_heads()
    assert len(fits) == 2
    assert head_of(second.save_dir).exists()


def test_a_fitted_teacher_keeps_its_head_for_its_classes_and_gets_another_for_others(settings, fits, said, digits):
    first = DistillationClassificationTrainer(overrides=settings)
    file = first.probe()
    same_classes = DistillationClassificationTrainer(overrides={**settings, "teacher": file})
    same_classes.fit_heads()
    assert (len(fits), same_classes.args.teacher) == (1, file)
    assert any("has a head for these classes already" in line for line in said)
    other_classes = DistillationClassificationTrainer(overrides={**settings, "teacher": file, "data": str(digits)})
    other_classes.fit_heads()
    assert len(fits) == 2
    assert other_classes.plan.teacher.members[0].names == [str(c) for c in range(10)]


def test_a_network_in_python_is_given_again_on_resume(settings, fits, tmp_path):
    """The head comes from the run's folder."""

    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            norm = nn.BatchNorm2d(16)
            self.layers = nn.Sequential(nn.Conv2d(3, 16, 8, 8), norm, nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())

        def forward(self, x):
            return self.layers(x)

    torch.manual_seed(0)
    network = teachers.seen(Convolutions())
    settings |= {"teacher": network, "attention_distill": False}
    whole = train({**settings, "project": str(tmp_path / "whole")})
    with pytest.raises(Stopped):
        train(settings, on_fit_epoch_end=stop_after(0))
    (last,) = Path(settings["project"]).glob("*/weights/last.pt")
    with pytest.raises(TypeError, match="Give the network itself"):
        DistillationClassificationTrainer(overrides={"resume": str(last)})
    resumed = train({"resume": str(last), "teacher": network})
    assert len(fits) == 2
    assert same(weights(resumed.last), weights(whole.last))


def test_several_teachers_get_a_head_each(settings, teacher, fits, tmp_path):
    settings |= {"teacher": [str(teacher), teachers.timm_safetensors(tmp_path, teacher)], "epochs": 1}
    run = train(settings)
    assert len(fits) == 2
    assert run.args.teacher == [member.source for member in run.plan.teacher.members]
    assert sorted(map(str, run.wdir.glob("probe-*.pt"))) == sorted(run.args.teacher)


def test_only_a_part_of_many_images_is_looked_at(settings, fits, monkeypatch):
    """Of every class its part, and in fewer views."""
    monkeypatch.setattr(probe, "MOST_ANSWERS", 100)
    DistillationClassificationTrainer(overrides=settings).fit_heads()
    _, labels, index, *_ = fits[0]
    assert len(index) == len(set(index)) == 100
    assert [list(labels).count(c) for c in range(10)] == [10] * 10


def test_small_classes_are_not_left_out(monkeypatch):
    monkeypatch.setattr(probe, "MOST_ANSWERS", 30)
    labels = np.array([0] * 500 + [1] * 2 + [2] * 498)
    assert np.bincount(labels[probe._spread(labels)]).tolist() == [15, 2, 15]


def test_without_a_teacher_nothing_is_fitted(settings, fits):
    run = train({**settings, "distill_alpha": 0, "distill_beta": 1, "epochs": 1})
    assert not fits
    assert not list(run.wdir.glob("probe-*"))


def emptied(folder):
    """Return a dataset of two classes, one of them without training images."""
    data = write_digits(folder / "two", names=["a", "b"])
    for file in (data / "train" / "b").iterdir():
        file.unlink()
    (data / "train" / "b" / ".DS_Store").touch()
    return data


class Answers(nn.Module):
    """A network whose answer is no tensor."""

    def forward(self, x):
        return {"boxes": x}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda folder, teacher: {"teacher": teachers.onnx(folder, teacher)}, ValueError, "exported file"),
        (
            lambda folder, teacher: {"data": str(write_digits(folder / "one", names=["all"]))},
            ValueError,
            "fewer than two",
        ),
        (lambda folder, teacher: {"data": str(emptied(folder))}, ValueError, "fewer than two"),
        (lambda folder, teacher: {"teacher": "self"}, ValueError, "'teacher=self' knows the student's classes"),
        (lambda folder, teacher: {"teacher_names": CLASSES}, ValueError, "'teacher_names' has no effect"),
        (lambda folder, teacher: {"teacher_probe": 3}, TypeError, "'teacher_probe=3'"),
        (lambda folder, teacher: {"teacher": Answers()}, ValueError, "no features"),
    ],
    ids=["exported", "one class", "one with images", "self", "names", "number", "a dict"],
)
def test_refusals_come_before_any_file(change, error, words, settings, teacher, tmp_path):
    settings |= change(tmp_path, teacher)
    with pytest.raises(error, match=words):
        DistillationClassificationTrainer(overrides=settings)
    assert not Path(settings["project"]).exists()


def test_the_training_images_are_read_as_training_reads_them(settings, monkeypatch):
    """Through the wrapper that names images which cannot be read."""
    trainer = DistillationClassificationTrainer(overrides=settings)
    seen = []
    monkeypatch.setattr(
        "ultralytics.engine.distillation.trainer.probe_teachers",
        lambda task, plan, views, folder, device: seen.append(views) or [],
    )
    trainer.fit_heads()
    assert isinstance(seen[0].dataset, WrappedDataset)
