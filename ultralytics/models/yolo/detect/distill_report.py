# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What a run of a detector, or of what is built on one, has to show: precision by class, and images with objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from ultralytics.data.distillation.wrapped import spaced
from ultralytics.engine.distillation.report.charts import Scene, Seen, draw_classes, draw_scenes, draw_score
from ultralytics.engine.distillation.report.networks import (
    Network,
    class_names,
    compared,
    describe,
    find_networks,
    most_changed_first,
)
from ultralytics.engine.distillation.report.run import FinishedRun, ReportPart
from ultralytics.engine.distillation.task import DistillationTask
from ultralytics.models.yolo.detect.distill_validation import Found, Validation, sure, validate
from ultralytics.utils.distillation.advice import Figures, advise, conclude, jackknife_error
from ultralytics.utils.ops import xywhr2xyxyxyxy, xyxy2xywh

__all__ = ("CHARTS", "report_detection")

CHARTS = ("precision", "classes", "examples")
IMAGES = 1000  # of the validation split, evenly spaced
GROUPS = 20  # of them, each left out once
EXAMPLES = 6  # images shown
CLASSES = 20  # rows of the table


def report_detection(
    task: DistillationTask,
    run: FinishedRun,
    teacher: Callable[[Tensor], Any] | None,
    validation: Callable[[Callable[[Tensor], Any], bool], Validation],
) -> ReportPart:
    """Measure the student, its teacher and a plain student on validation images.

    Args:
        task (DistillationTask): The run's task.
        run (FinishedRun): The run.
        teacher (Callable, optional): Gives the teacher's answer as upstream's validators take it, if that can be.
        validation (Callable): Begins the validation of what gives such answers, from an end-to-end head or not.

    Returns:
        (ReportPart): Figures, charts and the page.

    Raises:
        ValueError: If no validation image shows an object of a class that the teacher knows.
    """
    plan, names = run.plan, class_names(run)
    networks = find_networks(task, run, teacher and _teacher(run, teacher))
    classes = networks["teacher"].classes if "teacher" in networks else range(len(names))

    def begin() -> dict[str, Validation]:
        return {who: validation(n.answer, getattr(n.answer, "end2end", False)) for who, n in networks.items()}

    validations = begin()
    indices, other = spaced(run.dataset, IMAGES), compared(networks)
    apart, both, either = [], 0, 0
    for _, _, found in validate(validations, run.dataset, indices, plan.training.batch):
        for own, theirs in zip(found["student"], found[other] if other else (), strict=bool(other)):
            pair = sure(own, classes), sure(theirs, classes)
            shared, total = validations["student"].shared(*pair), sum(len(x["cls"]) for x in pair)
            apart.append(total - 2 * shared)
            both, either = both + 2 * shared, either + total

    figures = _figures(run, networks, validations, classes, names, len(indices), task.score.words)
    objects = dict(zip(names, validations["student"].count(len(names)), strict=True))
    rows = most_changed_first([{"name": k, "objects": objects[k], **v} for k, v in figures.classes.items()])
    image = run.dataset[0]["img"][None].to(run.device).float() / 255
    summary = {
        "images": len(indices),
        "known_to_teacher_only": len(classes) < len(names),
        "networks": {who: describe(network, image) for who, network in networks.items()},
        "compared": other,
        "agreement": both / either if either else None,
        "pull": run.pull,
        "verdict": conclude(figures)._asdict(),
        "findings": advise(figures),
        "classes": rows,
    }
    for who, row in summary["networks"].items():
        at_50 = [value for _, value in validations[who].precision(classes).values()]
        row |= {"map": figures.score[who], "map50": float(np.mean(at_50))}
    known_all = "teacher" in networks and len(classes) == len(names)
    charts = {
        "precision": draw_score(
            {who: n.curve for who, n in networks.items() if n.curve},
            figures.score["teacher"] if known_all else None,
            task.score.axis,
        ),
        "classes": draw_classes(rows[:CLASSES], list(networks), f"{task.score.words} (%)"),
    }
    most = np.argsort(-np.array(apart), kind="stable")[:EXAMPLES] if other else range(min(EXAMPLES, len(indices)))
    charts["examples"] = draw_scenes(_scenes(run, begin(), [indices[i] for i in most], names))
    shown = {
        "columns": {"map": task.score.words, "map50": task.score.words.replace("50-95", "50")},
        "curve": "precision",
        "counted": "objects",
        "listed": rows[:CLASSES],
        "compared": other,
    }
    return ReportPart(summary, charts, Path(__file__).with_suffix(".html"), shown)


def _teacher(run: FinishedRun, answer: Callable[[Tensor], Any]) -> Network:
    """Return the teacher."""
    teacher = run.plan.teacher
    return Network(teacher.first.title, answer, [teacher.first.model], [run.plan.imgsz], teacher.classes)


def _figures(
    run: FinishedRun,
    networks: Mapping[str, Network],
    validations: Mapping[str, Validation],
    classes: Sequence[int],
    names: Sequence[str],
    images: int,
    words: str,
) -> Figures:
    """Return what advice is drawn from; what chance could give by leaving each group of images out once."""
    whole = {who: _precision(v, classes) for who, v in validations.items()}
    if not whole["student"]:
        raise ValueError("no validation image shows an object of a class that the teacher knows")
    groups = [[i for i in range(images) if i % GROUPS != g] for g in range(min(GROUPS, images))]
    if len(groups) < 2 or len(networks) < 2:
        groups = []
    without = {who: [_precision(v, classes, group) for group in groups] for who, v in validations.items()}
    numbers = {names[c]: c for c in whole["student"]}

    def score(precision: Mapping[int, float], name: str | None) -> float:
        if name is None:
            return float(np.mean(list(precision.values()))) if precision else np.nan
        return precision.get(numbers[name], np.nan)

    def error(a: str, b: str, name: str | None) -> float:
        parts = [score(x, name) - score(y, name) for x, y in zip(without[a], without[b], strict=True)]
        return 0.0 if np.isnan(parts).any() else jackknife_error(parts)  # its few objects may all be in one group

    return Figures(
        words,
        images,
        {who: score(precision, None) for who, precision in whole.items()},
        {name: {who: precision[c] for who, precision in whole.items()} for name, c in numbers.items()},
        error,
        networks["student"].curve,
        run.pull,
        balanced=run.plan.args.distill_balance is not None,
        unlike=networks["baseline"].unlike if "baseline" in networks else (),
        epochs=run.epochs,
    )


def _precision(validation: Validation, classes: Sequence[int], images: Sequence[int] | None = None) -> dict[int, float]:
    """Return average precision by class, mean over overlaps."""
    return {c: mean for c, (mean, _) in validation.precision(classes, images).items()}


def _scenes(
    run: FinishedRun, validations: Mapping[str, Validation], chosen: Sequence[int], names: Sequence[str]
) -> list[Scene]:
    """Return images with their labels and what each network is sure of."""
    scenes = []
    for _, (sample,), found in validate(validations, run.dataset, chosen, 1):
        student = validations["student"]
        labels = student.labels(student.validator.preprocess(run.dataset.collate_fn([sample])))
        image = sample["img"]
        if len(image) not in {1, 3}:  # of more channels than can be shown
            image = image.float().mean(0, keepdim=True)
        seen = {"label": labels, **{who: sure(x[0]) for who, x in found.items()}}
        scenes.append(
            Scene(
                image.permute(1, 2, 0).numpy() / 255,
                {who: _seen(x, names) for who, x in seen.items()},
            )
        )
    return scenes


def _seen(found: Found, names: Sequence[str]) -> list[Seen]:
    """Return objects as charts draw them."""
    rows = {k: v.detach().float().cpu() for k, v in found.items() if isinstance(v, Tensor)}
    boxes = rows["bboxes"]
    if boxes.shape[1] == 4:
        boxes = np.concatenate([xyxy2xywh(boxes), np.zeros((len(boxes), 1))], 1)
    outlines = xywhr2xyxyxyxy(np.asarray(boxes)) if len(boxes) else []
    return [
        Seen(
            names[int(rows["cls"][i])],
            float(rows["conf"][i]) if "conf" in rows else None,
            np.asarray(outline),
            rows["masks"][i].numpy() > 0.5 if "masks" in rows else None,
            rows["keypoints"][i].numpy() if "keypoints" in rows else None,
        )
        for i, outline in enumerate(outlines)
    ]
