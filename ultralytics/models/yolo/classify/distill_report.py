# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What a classification run has to show: accuracy by class, confusions, calibration, and images with attention."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from ultralytics.data.distillation.wrapped import spaced_batches
from ultralytics.engine.distillation.plan import Score
from ultralytics.engine.distillation.report.baseline import find_baseline, read_curve
from ultralytics.engine.distillation.report.charts import (
    Example,
    draw_calibration,
    draw_classes,
    draw_examples,
    draw_score,
)
from ultralytics.engine.distillation.report.run import FinishedRun, ReportPart
from ultralytics.engine.distillation.task import DistillationTask
from ultralytics.nn.distillation.class_names import read_names
from ultralytics.nn.distillation.sources.base import without_folders
from ultralytics.nn.distillation.taps import FeatureTaps
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils.distillation.advice import Figures, advise
from ultralytics.utils.distillation.metrics import agreement, calibration, divergence, normalized_entropy
from ultralytics.utils.torch_utils import get_flops, get_num_params

__all__ = ("CHARTS", "TOP1", "report_classification")

TOP1 = Score("top1", "metrics/accuracy_top1", "top-1", "validation top-1 accuracy (%)")
CHARTS = ("accuracy", "classes", "calibration", "examples")
IMAGES = 2000  # of the validation split, evenly spaced
EXAMPLES = 6  # images shown
CLASSES, CONFUSIONS = 20, 10  # rows of the tables


@dataclass
class _Network:
    """A network as the report sees it.

    Attributes:
        source (str): File or name.
        answer (Callable): Gives logits of shape (B, K) for (B, C, H, W) images.
        modules (list[torch.nn.Module]): What its parameters are counted in.
        sizes (list[int]): Side of the images that each of these takes.
        classes (list[int]): The dataset's classes that the columns stand for.
        curve (list[float]): Top-1 accuracy per epoch, empty of a teacher.
    """

    source: str
    answer: Callable[[Tensor], Tensor]
    modules: list[torch.nn.Module]
    sizes: list[int]
    classes: list[int]
    curve: list[float] = field(default_factory=list)


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
    networks = _networks(task, run)
    images = _ask(run, networks)
    calibrations = {
        who: calibration(images.logits[who], _columns(images.labels, n.classes)) for who, n in networks.items()
    }
    figures = _figures(run, networks, images)
    classes = _per_class(figures)
    knows_some = "teacher" in networks and len(networks["teacher"].classes) < len(run.plan.data["names"])
    summary = {
        "images": len(images.labels),
        "known_to_teacher_only": knows_some,
        "networks": {who: _describe(network, run) for who, network in networks.items()},
        "pull": run.pull,
        "entropy": figures.entropy,
        "findings": advise(figures),
        "classes": classes,
        "confusions": _confusions(figures, images.named),
    }
    for who, row in summary["networks"].items():
        row |= {"top1": figures.top1(who), "calibration_error": calibrations[who].error}
    top1 = figures.top1("teacher") if "teacher" in networks and not knows_some else None
    charts = {
        "accuracy": draw_score({who: n.curve for who, n in networks.items() if n.curve}, top1, TOP1.axis),
        "classes": draw_classes(classes[:CLASSES], list(networks)),
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
    return ReportPart(
        summary,
        charts,
        Path(__file__).with_suffix(".html"),
        {"listed": classes[:CLASSES], "compared": _compared(networks)},
    )


def _networks(task: DistillationTask, run: FinishedRun) -> dict[str, _Network]:
    """Return the student, the teacher if it knows classes of the dataset, and the baseline if there is one."""
    everything, imgsz = list(range(len(run.plan.data["names"]))), run.plan.imgsz

    def checkpoint(file: Path, name: str) -> _Network:
        model = load_checkpoint(file, device=run.device)[0].float().eval()
        curve = read_curve(file.parents[1], TOP1.column)
        return _Network(name, lambda images: model(images)[1], [model], [imgsz], everything, curve)

    networks = {"student": checkpoint(run.best, without_folders(run.plan.training.model))}
    ensemble = run.plan.teacher
    if ensemble.members and not ensemble.classes:
        with suppress(ValueError):  # it may teach by its maps alone, and know other classes
            ensemble.align(read_names(run.plan.data["names"]))
            ensemble.to(run.device)
    if ensemble.members and ensemble.classes:
        sizes = [member.imgsz or imgsz for member in ensemble.members]
        modules = [member.model for member in ensemble.members]
        source = ", ".join(member.title for member in ensemble.members)
        networks["teacher"] = _Network(source, lambda images: ensemble(images)[0], modules, sizes, ensemble.classes)
    names = read_names(run.plan.data["names"])
    if folder := run.plan.args.baseline or find_baseline(run.folder, names, imgsz, task):
        networks["baseline"] = checkpoint(Path(folder) / "weights" / "best.pt", Path(folder).name)
    return networks


def _ask(run: FinishedRun, networks: dict[str, _Network]) -> _Images:
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


def _figures(
    run: FinishedRun,
    networks: dict[str, _Network],
    images: _Images,
) -> Figures:
    """Return what advice is drawn from."""
    temperature = run.loss.temperature if run.plan.uses_temperature else None
    softened = "teacher" in networks and temperature is not None and images.logits["teacher"].shape[1] > 1
    return Figures(
        images.labels,
        [name.replace("`", "'") for name in read_names(run.plan.data["names"])],
        {who: answer == images.labels for who, answer in images.named.items()},
        networks["student"].curve,
        run.pull,
        normalized_entropy(images.logits["teacher"], temperature) if softened else None,
        temperature,
        run.plan.args.distill_balance is not None,
    )


def _describe(network: _Network, run: FinishedRun) -> dict[str, Any]:
    """Return what a network is and costs."""
    image = run.dataset[0]["img"][None].to(run.device).float()
    return {
        "source": network.source,
        "parameters": sum(map(get_num_params, network.modules)) or None,  # an exported file does not say
        "gflops": sum(map(get_flops, network.modules, network.sizes)) or None,
        "milliseconds": _milliseconds(network.answer, image),
    }


def _columns(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the columns that stand for the labels."""
    return torch.tensor([classes.index(label) for label in labels.tolist()])


def _milliseconds(answer: Callable[[Tensor], Tensor], image: Tensor) -> float:
    """Return how long one image takes, the median of ten."""
    times = []
    with torch.no_grad():
        for _ in range(12):
            start = time.perf_counter()
            answer(image).sum().item()  # waits for the device
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[2:])


def _compared(networks: Iterable[str]) -> str | None:
    """Return which network the student is compared with: the plain one, or else its teacher."""
    return next((who for who in ("baseline", "teacher") if who in networks), None)


def _per_class(figures: Figures) -> list[dict[str, Any]]:
    """Return each network's accuracy on each class, those first on which the student differs most, or is worst."""
    rows, other = [], _compared(figures.right)
    for c in figures.labels.unique().tolist():
        chosen = figures.labels == c
        accuracy = {who: right[chosen].double().mean().item() for who, right in figures.right.items()}
        rows.append({"name": figures.names[c], "images": int(chosen.sum()), **accuracy})
    return sorted(rows, key=lambda row: -abs(row["student"] - row[other]) if other else row["student"])


def _confusions(figures: Figures, named: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return the pairs of classes that the student confuses more, or less, often than what it is compared with."""
    other = _compared(named)
    if other is None:
        return []
    student, compared = (
        Counter(zip(figures.labels.tolist(), named[who].tolist(), strict=True)) for who in ("student", other)
    )
    changes = {pair: student[pair] - compared[pair] for pair in student | compared if pair[0] != pair[1]}
    first = sorted((pair for pair in changes if changes[pair]), key=lambda pair: -abs(changes[pair]))[:CONFUSIONS]
    return [
        {
            "label": figures.names[label],
            "named": figures.names[answer],
            "student": student[label, answer],
            "compared": compared[label, answer],
        }
        for label, answer in first
    ]


def _examples(run: FinishedRun, student: _Network, images: _Images, chosen: Sequence[int]) -> list[Example]:
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
