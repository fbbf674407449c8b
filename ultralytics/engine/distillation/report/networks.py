# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The networks that a report compares: what they are, what they cost, and which the student is held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.engine.distillation.report.baseline import find_baseline, read_curve, unlike_arguments
from ultralytics.engine.distillation.report.run import FinishedRun
from ultralytics.engine.distillation.task import DistillationTask
from ultralytics.nn.distillation.class_names import read_names
from ultralytics.nn.distillation.sources.base import without_folders
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import YAML
from ultralytics.utils.torch_utils import get_flops, get_num_params

__all__ = ("Network", "class_names", "compared", "describe", "find_networks", "most_changed_first")


@dataclass
class Network:
    """A network as a report sees it.

    Attributes:
        source (str): File or name.
        answer (Callable): Gives what it says of images (B, C, H, W).
        modules (list[nn.Module]): What its parameters are counted in.
        sizes (list[int]): Side of the images that each of these takes.
        classes (Sequence[int]): The dataset's classes that it knows.
        curve (list[float]): Its score per epoch, empty of a teacher.
        unlike (list[str]): Of a plain run, the training arguments in which it differs, besides its teacher.
    """

    source: str
    answer: Callable[[Tensor], Any]
    modules: list[nn.Module]
    sizes: list[int]
    classes: Sequence[int]
    curve: list[float] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)


def class_names(run: FinishedRun) -> list[str]:
    """Return a name of its own for each class, without what stands around settings in an advice."""
    names = [name.replace("`", "'") for name in read_names(run.plan.data["names"])]
    return [name if names.count(name) == 1 else f"{name} ({c})" for c, name in enumerate(names)]


def find_networks(
    task: DistillationTask,
    run: FinishedRun,
    teacher: Network | None,
    answer_of: Callable[[nn.Module], Callable[[Tensor], Any]] = lambda model: model,
) -> dict[str, Network]:
    """Return the student, the teacher if it can be compared, and the baseline if there is one.

    Args:
        task (DistillationTask): The run's task.
        run (FinishedRun): The run.
        teacher (Network, optional): The teacher.
        answer_of (Callable): Gives what answers images for a network in eval mode, by default itself.
    """
    names, imgsz = read_names(run.plan.data["names"]), run.plan.imgsz

    def checkpoint(file: Path, name: str) -> Network:
        model = load_checkpoint(file, device=run.device)[0].float().eval()
        curve = read_curve(file.parents[1], task.score.column)
        return Network(name, answer_of(model), [model], [imgsz], list(range(len(names))), curve)

    networks = {"student": checkpoint(run.best, without_folders(run.plan.training.model))}
    if teacher is not None:
        networks["teacher"] = teacher
    if folder := run.plan.args.baseline or find_baseline(run.folder, names, imgsz, task):
        networks["baseline"] = checkpoint(Path(folder) / "weights" / "best.pt", Path(folder).name)
        own = YAML.load(run.folder / "args.yaml")
        networks["baseline"].unlike = unlike_arguments(own, Path(folder), task)
    return networks


def describe(network: Network, image: Tensor) -> dict[str, Any]:
    """Return what a network is and costs, for one image (1, C, H, W)."""
    return {
        "source": network.source,
        "parameters": sum(map(get_num_params, network.modules)) or None,  # an exported file does not say
        "gflops": sum(map(get_flops, network.modules, network.sizes)) or None,
        "milliseconds": _milliseconds(network.answer, image),
    }


def _milliseconds(answer: Callable[[Tensor], Any], image: Tensor) -> float:
    """Return how long one image takes, the median of ten."""
    times = []
    with torch.no_grad():
        for _ in range(12):
            start = time.perf_counter()
            answer(image)
            if image.device.type == "cuda":
                torch.cuda.synchronize(image.device)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[2:])


def compared(networks: Collection[str]) -> str | None:
    """Return which network the student is compared with: the plain one, or else its teacher."""
    return next((who for who in ("baseline", "teacher") if who in networks), None)


def most_changed_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return rows of classes, those first on which the student differs most from what it is compared with, or is worst.

    Args:
        rows (Sequence[Mapping[str, Any]]): With each network's score.
    """
    other = compared(rows[0]) if rows else None
    return sorted(rows, key=lambda row: -abs(row["student"] - row[other]) if other else row["student"])
