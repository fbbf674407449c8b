"""What kept answers depend on: every argument counts, but for those that are known to have no effect."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from ultralytics.cfg.distillation import DistillationArgs
from ultralytics.engine.distillation.answers import WITHOUT_EFFECT, answers_key
from ultralytics.engine.distillation.plan import Plan

ANSWER = torch.ones(1, 3), [torch.ones(1, 2, 4, 4)]
OTHER = {  # than the default
    **{"teacher_names": ["a"], "teacher_imgsz": 64, "teacher_mean": 0.5, "teacher_std": 0.5, "teacher_weights": [1.0]},
    **{"teacher_hash": "0" * 64, "teacher_views": 2, "temperature": 2.0, "teacher_output": "sigmoid"},
}


IMAGES = {"images": [("0.png", 1)], "transforms": "crop"}


@pytest.fixture
def plan():
    teacher = SimpleNamespace(
        source="a.pt", members=[SimpleNamespace(names=["x", "y"], source="a.pt", backbone=None)], classes=[0, 1]
    )
    return Plan(DistillationArgs(teacher="a.pt"), (), SimpleNamespace(amp="bf16"), teacher=teacher)


def test_arguments_without_an_effect_are_these():
    """An argument that is new counts, until somebody knows that it need not and says so here and there."""
    assert {f.name for f in fields(DistillationArgs)} - WITHOUT_EFFECT == OTHER.keys()
    assert {f.name for f in fields(DistillationArgs)} >= WITHOUT_EFFECT


@pytest.mark.parametrize("name", OTHER)
def test_every_other_argument_counts(name, plan):
    other = replace(plan, args=replace(plan.args, **{name: OTHER[name]}))
    assert answers_key(other, IMAGES, ANSWER, False) != answers_key(plan, IMAGES, ANSWER, False)


@pytest.mark.parametrize(
    "change",
    [{"distill_alpha": 0.1}, {"feature_method": "cwd", "feature_weight": 3}, {"teacher_overlap": True}],
    ids=str,
)
def test_arguments_without_an_effect_do_not(change, plan):
    other = replace(plan, args=replace(plan.args, **change))
    assert answers_key(other, IMAGES, ANSWER, False) == answers_key(plan, IMAGES, ANSWER, False)


def test_what_else_counts(plan):
    keys = [answers_key(plan, IMAGES, ANSWER, False)]
    keys.append(answers_key(plan, IMAGES, (2 * ANSWER[0], ANSWER[1]), False))
    keys.append(answers_key(plan, IMAGES, (ANSWER[0], [3 * ANSWER[1][0]]), False))
    keys.append(answers_key(plan, IMAGES, ANSWER, True))
    keys.append(answers_key(replace(plan, levels=(("student", "teacher"),)), IMAGES, ANSWER, False))
    known = SimpleNamespace(**{**vars(plan.teacher), "classes": [0]})
    keys.append(answers_key(replace(plan, teacher=known), IMAGES, ANSWER, False))
    keys += [
        answers_key(replace(plan, args=replace(plan.args, **given)), IMAGES, ANSWER, False)
        for given in ({"temperature_end": 2.0}, {"teacher_views": 3})
    ]
    keys += [
        answers_key(plan, {**IMAGES, **other}, ANSWER, False)
        for other in ({"transforms": "flip"}, {"images": [("0.png", 2)]}, {"images": [("1.png", 1)]})
    ]
    assert len(set(keys)) == len(keys)
