# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What a classification run has to show: accuracy by class, confusions, calibration, and images with attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from ultralytics.data.distillation.wrapped import spaced_batches
from ultralytics.engine.distillation.plan import Score
from ultralytics.engine.distillation.report.charts import (
    Example,
    draw_calibration,
    draw_classes,
    draw_examples,
    draw_score,
)
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
from ultralytics.nn.distillation.class_names import read_names
from ultralytics.nn.distillation.taps import FeatureTaps
from ultralytics.utils.distillation.advice import Figures, advise, conclude, paired_error
from ultralytics.utils.distillation.metrics import agreement, calibration, divergence, normalized_entropy

__all__ = ("CHARTS", "TOP1", "report_classification")

TOP1 = Score("top1", "metrics/accuracy_top1", "top-1", "validation top-1 accuracy (%)")
CHARTS = ("accuracy", "classes", "calibration", "examples")
IMAGES = 2000  # of the validation split, evenly spaced
EXAMPLES = 6  # images shown
CLASSES, CONFUSIONS = 20, 10  # rows of the tables


class _Images(NamedTuple):
    """Validation images, and what the networks make of them.

    Attributes:
        index (list[int]): Their places in the dataset, N of them.
        labels (Tensor): Class indices, (N,).
        logits (dict[str, Tensor]): By network, (N, K).
        named (dict[str, Tensor]): The class that each network names, by network, (N,).
    """

    index: list[int]
    labels: Tensor
    logits: dict[str, Tensor]
    named: dict[str, Tensor]


def report_classification(task: DistillationTask, run: FinishedRun) -> ReportPart:
    """Measure the student, its teacher and a plain student on validation images.

    Args:
        task (DistillationTask): The run's task.
        run (FinishedRun): The run.

    Returns:
        (ReportPart): Figures, charts and the page.

    Raises:
        ValueError: If no validation image shows a class that the teacher knows.
    """
    networks = find_networks(task, run, _teacher(run), lambda model: lambda images: model(images)[1])
    images = _ask(run, networks)
    calibrations = {
        who: calibration(images.logits[who], _columns(images.labels, n.classes)) for who, n in networks.items()
    }
    figures = _figures(run, networks, images)
    counts = images.labels.bincount(minlength=len(run.plan.data["names"])).tolist()
    images_of = dict(zip(class_names(run), counts, strict=True))
    classes = most_changed_first([{"name": k, "images": images_of[k], **v} for k, v in figures.classes.items()])
    knows_some = "teacher" in networks and len(networks["teacher"].classes) < len(run.plan.data["names"])
    image = run.dataset[0]["img"][None].to(run.device).float()
    summary = {
        "images": len(images.labels),
        "known_to_teacher_only": knows_some,
        "networks": {who: describe(network, image) for who, network in networks.items()},
        "pull": run.pull,
        "entropy": figures.entropy,
        "verdict": conclude(figures)._asdict(),
        "findings": advise(figures),
        "classes": classes,
        "confusions": _confusions(class_names(run), images),
    }
    for who, row in summary["networks"].items():
        row |= {"top1": figures.score[who], "calibration_error": calibrations[who].error}
    top1 = figures.score["teacher"] if "teacher" in networks and not knows_some else None
    charts = {
        "accuracy": draw_score({who: n.curve for who, n in networks.items() if n.curve}, top1, TOP1.axis),
        "classes": draw_classes(classes[:CLASSES], list(networks), "accuracy (%)"),
        "calibration": draw_calibration(calibrations),
    }
    if "teacher" in networks:
        student = images.logits["student"][:, networks["teacher"].classes]
        apart = divergence(student, images.logits["teacher"])
        summary["agreement"] = agreement(student, images.logits["teacher"])
        summary["divergence"] = apart.mean().item()
        most = apart.topk(min(EXAMPLES, len(apart))).indices.tolist()
        charts["examples"] = draw_examples(
            _examples(run, networks["student"], images, most), [level.stride for level, _ in run.plan.levels]
        )
    shown = {
        "columns": {"top1": "top-1", "calibration_error": "calibration error"},
        "curve": "accuracy",
        "counted": "images",
        "listed": classes[:CLASSES],
        "compared": compared(networks),
    }
    return ReportPart(summary, charts, Path(__file__).with_suffix(".html"), shown)


def _teacher(run: FinishedRun) -> Network | None:
    """Return the teacher, if it knows classes of the dataset."""
    ensemble = run.plan.teacher
    if ensemble.members and not ensemble.classes:
        with suppress(ValueError):  # it may teach by its maps alone, and know other classes
            ensemble.align(read_names(run.plan.data["names"]))
            ensemble.to(run.device)
    if not ensemble.members or not ensemble.classes:
        return None
    sizes = [member.imgsz or run.plan.imgsz for member in ensemble.members]
    modules = [member.model for member in ensemble.members]
    source = ", ".join(member.title for member in ensemble.members)
    return Network(source, lambda images: ensemble(images)[0], modules, sizes, ensemble.classes)


def _ask(run: FinishedRun, networks: Mapping[str, Network]) -> _Images:
    """Ask all networks about validation images of the classes that all of them know."""
    dataset, known = run.dataset, set.intersection(*(set(n.classes) for n in networks.values()))
    kept, labels, logits = [], [], {who: [] for who in networks}
    for index, batch, classes in spaced_batches(dataset, known, IMAGES):
        batch = batch.to(run.device)
        with torch.no_grad():
            for who, network in networks.items():
                logits[who].append(network.answer(batch).float().cpu())
        kept += index
        labels += classes
    if not kept:
        raise ValueError("no validation image shows a class that the teacher knows")
    logits = {who: torch.cat(parts) for who, parts in logits.items()}
    named = {who: torch.tensor(n.classes)[logits[who].argmax(1)] for who, n in networks.items()}
    return _Images(kept, torch.tensor(labels), logits, named)


def _figures(run: FinishedRun, networks: Mapping[str, Network], images: _Images) -> Figures:
    """Return what advice is drawn from."""
    temperature = run.loss.temperature if run.plan.uses_temperature else None
    softened = "teacher" in networks and temperature is not None and images.logits["teacher"].shape[1] > 1
    names, right = class_names(run), {who: answer == images.labels for who, answer in images.named.items()}
    chosen = {names[c]: images.labels == c for c in images.labels.unique().tolist()}

    def error(a: str, b: str, name: str | None) -> float:
        places = slice(None) if name is None else chosen[name]
        return paired_error(right[a][places], right[b][places])

    return Figures(
        TOP1.words,
        len(images.labels),
        {who: x.double().mean().item() for who, x in right.items()},
        {name: {who: x[y].double().mean().item() for who, x in right.items()} for name, y in chosen.items()},
        error,
        networks["student"].curve,
        run.pull,
        normalized_entropy(images.logits["teacher"], temperature) if softened else None,
        temperature,
        run.plan.args.distill_balance is not None,
        unlike=networks["baseline"].unlike if "baseline" in networks else (),
        epochs=run.epochs,
    )


def _columns(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the columns that stand for the labels."""
    return torch.tensor([classes.index(label) for label in labels.tolist()])


def _confusions(names: Sequence[str], images: _Images) -> list[dict[str, Any]]:
    """Return the pairs of classes that the student confuses more, or less, often than what it is compared with."""
    other = compared(images.named)
    if other is None:
        return []
    student, theirs = (
        Counter(zip(images.labels.tolist(), images.named[who].tolist(), strict=True)) for who in ("student", other)
    )
    changes = {pair: student[pair] - theirs[pair] for pair in student | theirs if pair[0] != pair[1]}
    first = sorted((pair for pair in changes if changes[pair]), key=lambda pair: -abs(changes[pair]))[:CONFUSIONS]
    return [
        {
            "label": names[label],
            "named": names[answer],
            "student": student[label, answer],
            "compared": theirs[label, answer],
        }
        for label, answer in first
    ]


def _examples(run: FinishedRun, student: Network, images: _Images, chosen: Sequence[int]) -> list[Example]:
    """Return images with what student and teacher name them, and where each of them looks at every level."""
    names, dataset = run.plan.data["names"], run.dataset
    samples = [dataset[images.index[i]] for i in chosen]
    batch = torch.stack([sample["img"] for sample in samples]).to(run.device).float()
    taps = FeatureTaps(student.modules[0], [level for level, _ in run.plan.levels])
    with torch.no_grad():
        student.answer(batch)
        pairs = list(zip(taps.take(), run.plan.teacher(batch)[1], strict=True))
    taps.remove()
    return [
        Example(
            sample["img"].permute(1, 2, 0).cpu().numpy(),
            names[int(sample["cls"])],
            {who: names[int(images.named[who][i])] for who in ("student", "teacher")},
            [tuple(x[row].float().square().mean(0).cpu().numpy() for x in pair) for pair in pairs],
        )
        for row, (i, sample) in enumerate(zip(chosen, samples, strict=True))
    ]
