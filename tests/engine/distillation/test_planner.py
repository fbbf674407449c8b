"""The Plan of a run: made once, of what is read once, and not to be changed."""

import sys
from collections import Counter
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from ultralytics.cfg.distillation import DistillationArgs
from ultralytics.engine.distillation import planner
from ultralytics.engine.distillation.distiller import Distiller
from ultralytics.engine.distillation.plan import Plan
from ultralytics.engine.distillation.rules import ARGUMENTS, NOTABLE, refuse
from ultralytics.engine.distillation.undistilled import Undistilled
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.distillation.teacher import Teacher
from ultralytics.nn.tasks import ClassificationModel
from ultralytics.utils import YAML
from ultralytics.utils.distillation import registry


def test_a_plan_is_frozen(overrides):
    trainer = DistillationClassificationTrainer(overrides=overrides)
    with pytest.raises(FrozenInstanceError):
        trainer.plan.teacher = None
    with pytest.raises(FrozenInstanceError):
        trainer.plan.args.temperature = 2


@pytest.mark.parametrize(("given", "students", "maps"), [({}, 1, 2), ({"teacher": "self"}, 1, 1)], ids=str)
def test_what_a_plan_is_made_of_is_read_once(given, students, maps, overrides, monkeypatch):
    """The dataset, a student's architecture, the maps of each network and the teacher; training asks for none again."""
    calls = Counter()

    def count(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.update([name]) or real(*args, **kwargs))

    count(ClassificationTrainer, "get_dataset")
    count(ClassificationTrainer, "get_model")
    count(planner, "find_levels")
    monkeypatch.setattr("ultralytics.nn.distillation.teacher.find_levels", planner.find_levels)
    count(Teacher, "__init__")
    trainer = DistillationClassificationTrainer(overrides={**overrides, "plots": False, **given})
    planned = dict(calls)
    assert planned["get_dataset"] == 1
    assert planned["get_model"] == students
    assert planned["find_levels"] == maps
    assert planned.get("__init__", 0) == ("teacher" not in given)
    trainer.train()
    assert calls["get_dataset"] == 1
    assert calls["get_model"] == students + 1  # the student itself
    assert calls["find_levels"] == maps


def test_attributes_are_there_from_the_start(overrides):
    """Training adds none of ours but what upstream adds in plain training."""
    ours = DistillationClassificationTrainer(overrides={**overrides, "fraction": 0.2})
    own = {k: v for k, v in overrides.items() if k != "teacher"}
    theirs = ClassificationTrainer(overrides={**own, "fraction": 0.2, "project": overrides["project"] + "-plain"})
    begun = set(dir(ours))
    for trainer in (ours, theirs):
        trainer.train()
    assert set(vars(ours)) - begun - set(vars(theirs)) == set()


@pytest.mark.parametrize(("alpha", "kind"), [(0, Undistilled), (0.7, Distiller)])
def test_there_is_no_distiller_without_weight(alpha, kind, overrides):
    trainer = DistillationClassificationTrainer(overrides={**overrides, "distill_alpha": alpha, "fraction": 0.2})
    assert type(trainer.distiller) is Undistilled  # until the student is there
    trainer.train()
    assert type(trainer.distiller) is kind
    assert (trainer.distillation_loss is None) == (alpha == 0)


def test_the_arguments_in_force_are_recorded(overrides):
    trainer = DistillationClassificationTrainer(overrides={**overrides, "temperature": 3})
    recorded = {f.name: getattr(trainer.args, f.name) for f in fields(DistillationArgs)}
    assert recorded == {f.name: getattr(trainer.plan.args, f.name) for f in fields(DistillationArgs)}
    assert YAML.load(trainer.save_dir / "args.yaml").items() >= recorded.items()
    assert recorded["teacher"] == trainer.plan.teacher.source
    assert recorded["teacher_hash"] == trainer.plan.teacher.content_hash


WITHOUT_MAPS = {"feature_distill": False, "attention_distill": False}


@pytest.mark.parametrize("given", [{}, WITHOUT_MAPS, {"distill_alpha": 0}], ids=str)
@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("nowhere.yaml", FileNotFoundError, "nowhere.yaml"),
        ("nowhere.pt", FileNotFoundError, "'model=nowhere.pt' does not exist. Give a student, e.g. 'model=yolo11l-cls"),
        ("student.onnx", ValueError, "neither a '.pt' checkpoint nor the '.yaml' description.*model=yolo11l-cls.yaml"),
    ],
)
def test_a_student_that_cannot_be_built_is_refused_before_any_file(model, error, words, given, overrides):
    """Whatever is compared."""
    with pytest.raises(error, match=words):
        DistillationClassificationTrainer(overrides={**overrides, **given, "model": model})
    assert not Path(overrides["project"]).exists()


def test_a_student_that_is_a_link_to_nothing_is_refused(overrides, tmp_path):
    link = tmp_path / "student.pt"
    link.symlink_to("gone.pt")
    with pytest.raises(FileNotFoundError, match=f"'model={link}' is a link that leads nowhere. Give a student"):
        DistillationClassificationTrainer(overrides={**overrides, "model": str(link)})
    assert not Path(overrides["project"]).exists()


class Yolov5(torch.nn.Module):
    """As YOLOv5's files name it."""

    __module__ = "models.common"


def test_a_student_whose_task_upstream_does_not_guess_is_told_too(overrides):
    with pytest.raises(ValueError, match=r"'model=rtdetr-l.yaml' is of the task 'detect', and this trainer is for"):
        DistillationClassificationTrainer(overrides={**overrides, "model": "rtdetr-l.yaml"})
    assert not Path(overrides["project"]).exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: torch.nn.Linear(2, 2).state_dict(), "it holds weights alone"),
        (lambda: {"state_dict": {"weight": torch.ones(2)}}, "it holds weights alone"),
        (lambda: torch.nn.Linear(2, 2), "or another library's network"),
        (lambda: {"model": Yolov5()}, "it is of YOLOv5"),
        (lambda: ClassificationModel("yolo11n-cls.yaml", verbose=False), "or one that 'YOLO.save' did not write"),
        (b"PK torn", "no network can be read from it"),
        (b"", "no network can be read from it, as it is empty"),
        (b"<html>", "it holds a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it holds a pointer of Git LFS"),
        (b"\x08\x08\x12\x07pytorch", "it holds an ONNX model"),
    ],
)
def test_foreign_checkpoints_as_students_are_told_apart(content, words, overrides, tmp_path, monkeypatch):
    file = tmp_path / "student.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        module = ModuleType("models.common")
        module.Yolov5 = Yolov5
        for name in ("models", "models.common"):
            monkeypatch.setitem(sys.modules, name, module)
        torch.save(content(), file)
        for name in ("models", "models.common"):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=rf"'model={file}' cannot be trained: .*{words}.*e.g. 'model=yolo11l-cls") as e:
        DistillationClassificationTrainer(overrides={**overrides, "model": str(file)})
    assert "\n" not in str(e.value)
    assert not Path(overrides["project"]).exists()


def test_images_are_as_large_as_upstream_rounds_them(overrides):
    """To the student's largest stride, which may be more than 32."""

    class Coarse(DistillationClassificationTrainer):
        def _build_student(self, data):
            student = super()._build_student(data)
            student.stride = torch.tensor([8.0, 64.0])
            return student

    assert DistillationClassificationTrainer(overrides={**overrides, "imgsz": 40}).plan.imgsz == 64
    assert Coarse(overrides={**overrides, "imgsz": 96, "name": "coarse"}).plan.imgsz == 128


def plan(**given):
    """Return a plan as far as arguments alone make it."""
    training = {"task": "detect", "data": "a.yaml", "epochs": 10, "quantize": None, "compile": False, "device": "cpu"}
    training |= {"pretrained": True}
    training, defaults = {**training, **given.pop("training", {})}, given.pop("defaults", {})
    module = given.pop("module", DistillationClassificationTrainer.__module__)
    resumed = given.pop("resumed", False)
    args = DistillationArgs(teacher=given.pop("teacher", "a.pt"), **{**defaults, **given})
    return Plan(args, set(given), SimpleNamespace(**training), resumed, defaults, module)


@pytest.fixture
def registered(monkeypatch):
    """A method that this module registers."""
    monkeypatch.setitem(registry._METHODS, "feature_method", dict(registry._METHODS["feature_method"]))
    return registry.feature_method("registered here")(lambda student, teacher: (student - teacher).square().mean())


def test_what_goes_together_is_not_refused():
    refuse(plan(), ARGUMENTS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"training": {"data": None}},
            "No dataset given. Set 'data' to one of the task 'detect', e.g. 'data=coco8.yaml'",
        ),
        ({"training": {"data": ""}}, "No dataset given"),
        ({"close_distill": 10}, "silent in all of 'epochs=10'"),
        ({"teacher": "self", "self_distill_start": 6, "close_distill": 4}, "silent in all"),
        ({"teacher_output": "logits"}, "'teacher_output=logits' is for classifiers of others"),
        ({"teacher": "self", "teacher_output": "0", "training": {"task": "classify"}}, "is for classifiers of others"),
        ({"response_method": {"kl": 0}}, "'response_method=.*leaves no method"),
        ({"feature_method": {"mse": 0}}, "'feature_method=.*leaves no method"),
        ({"training": {"quantize": 8}}, "would quantize the adapters"),
        ({"distill_balance": "auto", "training": {"compile": True}}, "Give one of them"),
        ({"teacher_cache": "ram", "training": {"device": "0,1"}}, "in every process"),
        ({"teacher": SimpleNamespace(state_dict=None), "training": {"device": "0,1"}}, "starts a process per device"),
        (
            {"training": {"device": "0,1"}, "feature_method": "registered here"},
            "which 'feature_method=registered here'",
        ),
        (
            {"training": {"compile": "reduce-overhead"}, "teacher_compile": "reduce-overhead", "teacher_overlap": True},
            "at the same time, which share their memory",
        ),
        ({"training": {"pretrained": "nowhere.pt"}}, r"'pretrained=nowhere\.pt' does not exist"),
    ],
)
def test_each_rule_refuses(given, words, registered):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        refuse(plan(**given), ARGUMENTS)


@pytest.mark.parametrize(
    "given",
    [
        {"self_distill_start": 9, "close_distill": 9},  # without effect on another teacher than `self`
        {"response_method": {"kl": 0}, "response_distill": False},
        {"feature_method": {"mse": 0}, "feature_distill": False},
        {"training": {"quantize": 8}, "distill_alpha": 0},
        {"training": {"quantize": 8}, "feature_method": "rkd"},
        {"training": {"compile": True}},
        {"teacher_cache": "disk", "training": {"device": "0,1"}},
        {"training": {"device": "0,1"}},
        {"training": {"device": "0,1"}, "feature_method": "registered here", "module": "my_trainers"},
        {"feature_method": "registered here"},
        {"training": {"compile": "reduce-overhead"}, "teacher_compile": "reduce-overhead"},
        {"training": {"compile": "reduce-overhead"}, "teacher_compile": True, "teacher_overlap": True},
        *({"training": {"pretrained": x}} for x in (True, False, "yolo11n-cls.pt", __file__)),
        {"training": {"pretrained": "nowhere.pt"}, "resumed": True},  # its own checkpoint has the weights
    ],
)
def test_each_rule_lets_pass(given, registered):
    refuse(plan(**given), ARGUMENTS)


def test_no_process_knows_what_a_program_has_registered(registered, monkeypatch):
    """Also if the trainer's class is of the program itself; processes that run the program do know."""
    monkeypatch.setattr(registered, "__module__", "__main__")
    given = {"training": {"device": "0,1"}, "feature_method": "registered here", "module": "__main__"}
    with pytest.raises(ValueError, match="registered in '__main__', is not known"):
        refuse(plan(**given), ARGUMENTS)
    monkeypatch.setattr("ultralytics.engine.distillation.rules.RANK", 0)
    refuse(plan(**given), ARGUMENTS)


def test_the_first_error_is_raised():
    errors = [None, KeyError("first"), ValueError("second")]
    with pytest.raises(KeyError, match="first"):
        refuse(None, [lambda plan, error=error: error for error in errors])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"distill_alpha": 0}, "has no effect on this run"),
        ({"response_method": "nkd", "temperature": 3}, "'temperature=3' has no effect"),
        ({"feature_weight": 5, "feature_distill": False}, "'feature_weight=5' has no effect, as 'feature_distill'"),
        ({"attention_weight": 5, "attention_distill": False}, "'attention_weight=5' has no effect"),
        (
            {"box_weight": 5, "mask_weight": 2},
            "'box_weight=5' has no effect, as 'box_distill' is False here. 'mask_weight",
        ),
        ({"feature_weight": 5}, None),
        ({"response_method": "nkd", "temperature": 4.0}, None),  # as a run's own arguments come back
        ({"attention_weight": 1.0, "attention_distill": False}, "'attention_weight=1.0' has no effect"),
        ({"attention_weight": 1.0, "attention_distill": False, "defaults": {"attention_weight": 1.0}}, None),
        ({"feature_weight": 0, "feature_distill": False}, None),
        ({"follows": True}, "holds the student to what it knows"),
        ({"follows": True, "distill_alpha": 0.3, "distill_beta": 1}, None),
        ({"temperature": 3}, None),
        ({"response_method": "nkd"}, None),
        ({}, None),
    ],
)
def test_what_is_worth_a_warning(given, words):
    teacher = SimpleNamespace(follows_student=given.pop("follows", False))
    made = plan(**given)
    object.__setattr__(made, "teacher", teacher)
    said = [warning for rule in NOTABLE if (warning := rule(made))]
    assert len(said) == (words is not None)
    assert words is None or words in said[0]


def test_callers_arguments_are_left_alone(overrides):
    before = dict(overrides)
    DistillationClassificationTrainer(overrides=overrides)
    assert overrides == before
    assert Path(overrides["project"]).exists()
