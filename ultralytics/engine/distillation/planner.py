# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Arguments, dataset and teacher become one Plan, or one sentence of refusal, before any file is written."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.cfg.distillation import DistillationArgs
from ultralytics.engine.distillation.plan import DISTILLATION_KEYS, Plan, log
from ultralytics.engine.distillation.report.baseline import check_baseline, unlike_arguments
from ultralytics.engine.distillation.rules import ARGUMENTS, DATASET, NOTABLE, RESUMED, TEACHER, refuse
from ultralytics.engine.distillation.task import DistillationTask
from ultralytics.nn.distillation.class_names import read_names
from ultralytics.nn.distillation.taps import FeatureLevel, find_levels, match_levels
from ultralytics.utils import LOGGER
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.distillation.registry import methods

__all__ = ("make_plan", "moved", "resumed_arguments")


def resumed_arguments(given: Mapping[str, Any], training: Namespace) -> dict[str, Any]:
    """Return the arguments of a run that is resumed: those of its checkpoint, but for what may be given again.

    Raises:
        ValueError: If the checkpoint holds none.
    """
    stored = {k: v for k, v in vars(training).items() if k in DISTILLATION_KEYS}
    if not stored:
        raise ValueError(
            f"'resume={training.resume}' is of a finished run or of one without a teacher, so there is no "
            f"distillation to resume. To go on from its weights, start a new run with 'model=' and 'teacher='."
        )
    if ignored := [k for k, v in given.items() if k not in RESUMED and v != stored.get(k)]:
        LOGGER.warning(f"Resume ignores {ignored}, using checkpoint values. Start a new run to change them.")
    again = {k: v for k, v in given.items() if k in RESUMED and v is not None}
    weights, teacher = Path(training.resume).parent, stored.get("teacher")
    return {**stored, "teacher": moved(teacher, weights), **again}


def moved(teacher: Any, weights: Path) -> Any:
    """Return a teacher, or several, with a head that was fitted in a run, where the run's weights lie now."""
    if isinstance(teacher, list):
        return [moved(x, weights) for x in teacher]
    file = Path(str(teacher))
    own = weights / file.name
    was_there = file.name.startswith("probe-") and file.parent.name == weights.name
    return str(own) if was_there and own.is_file() and not file.exists() else teacher


def make_plan(
    task: DistillationTask,
    arguments: Mapping[str, Any],
    given: Collection[str],
    training: Namespace,
    resumed: bool,
    trainer_module: str,
    read_dataset: Callable[[], dict[str, Any]],
    build_student: Callable[[dict[str, Any]], nn.Module],
) -> Plan:
    """Settle what a run will do.

    Args:
        task (DistillationTask): What is special about the run's task.
        arguments (Mapping[str, Any]): The distillation arguments.
        given (Collection[str]): Which of them the user gave this time.
        training (Namespace): Upstream's training arguments.
        resumed (bool): Whether the run was begun before.
        trainer_module (str): Name of the module of the trainer's class.
        read_dataset (Callable): Gives upstream's description of the dataset.
        build_student (Callable): Gives a student of the architecture that will be trained, for such a description.

    Returns:
        (Plan): The plan.

    Raises:
        TypeError: If an argument has the wrong type, or a teacher is no trained network or not safe to load.
        ValueError: If an argument is out of range, or a teacher does not fit dataset or student.
        FileNotFoundError: If a teacher's or the student's file does not exist.
        ImportError: If a teacher needs a library that is not installed.
        OSError: If `teacher_cache=disk` has nowhere to write.
    """
    args = DistillationArgs(**{**task.defaults, **arguments})
    plan = Plan(args, frozenset(given), training, resumed, task.defaults, trainer_module)
    refuse(plan, (*ARGUMENTS, *task.refusals))
    _check_losses(task, plan)
    if plan.args.teacher_cache and not task.views_repeat:
        raise ValueError(
            f"'teacher_cache={plan.args.teacher_cache}' keeps answers to images that are seen again, and those of the "
            f"task '{task.name}' are augmented in another way each time. Leave it out."
        )
    plan = replace(plan, teacher=task.open_teacher(plan))
    plan = replace(plan, data=read_dataset())
    refuse(plan, DATASET)
    plan, notes = task.fit_data(plan)
    names, channels = read_names(plan.data["names"]), plan.data["channels"]
    student = build_student(plan.data)
    stride = max(int(student.stride.max()), 32)
    plan = replace(plan, imgsz=check_imgsz(training.imgsz, stride=stride, floor=stride, max_dim=1))  # as upstream will
    if plan.args.baseline is not None:
        check_baseline(plan.args.baseline, names, plan.imgsz, task)
        if unlike := unlike_arguments(vars(training), Path(plan.args.baseline), task):
            LOGGER.warning(
                f"'baseline={plan.args.baseline}' was trained with another {', '.join(map(repr, unlike))}: what it "
                f"differs in is not the teacher's work alone."
            )
    refuse(plan, TEACHER)
    if plan.args.teacher_probe:
        task.grow_heads(plan)
    plan.teacher.vet(plan.imgsz, channels, task.some_images(plan))
    plan = replace(plan, args=replace(plan.args, teacher_hash=plan.teacher.content_hash))
    if plan.args.uses_features:
        student_levels = find_levels(student, plan.imgsz, channels)
        levels = plan.teacher.find_levels(plan.imgsz, channels, student_levels)
        plan = _without_features(plan, levels)
    plan, more = task.align(plan, names, student)
    log([*notes, *more])
    if plan.args.uses_features and plan.teaches:
        plan = replace(plan, levels=tuple(match_levels(student_levels, levels, plan.args.layers)))
        task.build_loss(plan)  # refuses methods that these networks do not fit
    for rule in NOTABLE:
        if warning := rule(plan):
            LOGGER.warning(warning)
    return plan


def _check_losses(task: DistillationTask, plan: Plan) -> None:
    """Refuse losses on what the heads of the task do not say.

    Raises:
        ValueError: If one is asked for.
    """
    for name in plan.args.terms:
        if name not in task.terms:
            raise ValueError(
                f"'{name}_distill=True' compares what the heads of the task '{task.name}' do not say. Leave it out."
            )
    for choice in plan.methods["response_method"]:
        if choice.method.of != task.answers_of:
            valid = sorted(methods("response_method", task.answers_of))
            raise ValueError(
                f"'response_method={choice.method.name}' compares classes of {choice.method.of}, and the task "
                f"'{task.name}' has classes of {task.answers_of}. Valid methods are {valid}."
            )


def _without_features(plan: Plan, levels: dict[str, FeatureLevel]) -> Plan:
    """Switch off the losses on feature maps where the teacher has none, or say whose they are.

    Raises:
        ValueError: If they were asked for.
    """
    args, teacher = plan.args, plan.teacher
    if levels:
        if len(teacher.members) > 1:
            ending = "." if args.response_distill else "; the others have no effect without the response loss."
            log([f"Feature and attention losses use the first of the teachers, {teacher.first.source}{ending}"])
        return plan
    asked = [k for k in ("feature_distill", "attention_distill") if k in plan.given and getattr(args, k)]
    no_features = f"'teacher={teacher.first.source}' gives logits only"
    if asked:
        raise ValueError(
            f"{no_features}, but '{asked[0]}=True' needs its feature maps. Set '{asked[0]}=False', or give the "
            f"checkpoint that the file was exported from."
        )
    LOGGER.warning(f"{no_features}: 'feature_distill' and 'attention_distill' are switched off.")
    return replace(plan, args=replace(args, feature_distill=False, attention_distill=False))
