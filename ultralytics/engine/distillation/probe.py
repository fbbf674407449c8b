# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""A head for a run's teacher: looked for in earlier runs, or fitted on the training images, and kept with the run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset
from ultralytics.data.distillation.views import RepeatableViews
from ultralytics.engine.distillation.plan import Plan
from ultralytics.engine.distillation.run_files import whole_files
from ultralytics.engine.distillation.task import DistillationTask
from ultralytics.nn.distillation.cache import cache_key
from ultralytics.nn.distillation.probe import STRENGTHS, fit_head
from ultralytics.nn.distillation.probeable import ProbeableTeacher
from ultralytics.nn.distillation.sources.base import without_folders
from ultralytics.utils import RANK, TQDM

__all__ = ("VIEWS", "probe_teachers")

VIEWS = 4  # of each training image, augmented as in training
MOST_ANSWERS = 20_000  # images times views; more teach a linear head little, and the solver long
BATCH = 64  # images at a time
FORMAT = 1  # to be raised when heads come to be fitted in another way


def probe_teachers(
    task: DistillationTask, plan: Plan, views: RepeatableViews, folder: Path, device: torch.device
) -> list[str]:
    """Give each teacher that waits for a head the one for the dataset's classes, and keep it in a run's folder.

    A head that an earlier run beside this one has fitted on the same images of the same teacher is taken from there.

    Args:
        task (DistillationTask): What is special about the run's task.
        plan (Plan): The run's.
        views (RepeatableViews): The training images, in `VIEWS` views.
        folder (Path): Where the run keeps its weights.
        device (torch.device): Where the teacher answers.

    Returns:
        (list[str]): What is notable, in sentences for the log.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If fewer than two classes have images.
    """
    notes = []
    for member in plan.teacher.members:
        if not member.waits_for_head:
            continue
        file = None
        if RANK in {-1, 0}:
            file, note = _find_or_fit(task, plan, member, views, folder, device)
            notes.append(note)
        if RANK != -1:  # the others read what the first has written
            told = [file]
            dist.broadcast_object_list(told, 0)
            file = told[0]
            if RANK != 0:
                member.take_head(file)
                member.become(file)
    return notes


def _find_or_fit(
    task: DistillationTask,
    plan: Plan,
    member: ProbeableTeacher,
    views: RepeatableViews,
    folder: Path,
    device: torch.device,
) -> tuple[Path, str]:
    """Return the file of a teacher's head, which it has from then on, and a sentence about it."""
    _, images = task.identify(views)
    key = cache_key(
        teacher=member.content_hash,
        source=member.source,
        imgsz=member.imgsz or plan.imgsz,
        normalization=member.normalization,
        classes=plan.data["names"],
        views=VIEWS,
        format=FORMAT,
        **images,
    )
    file = folder / f"probe-{key[:16]}.pt"
    shown = f"'{without_folders(member.source)}'"
    earlier = [file, *sorted(folder.parent.parent.glob(f"*/{folder.name}/{file.name}"))]
    for found in filter(Path.exists, earlier):
        try:
            member.take_head(found)
        except (TypeError, ValueError):  # damaged, or of another release: fitted anew
            continue
        if found != file:
            with whole_files(folder, scratch=f".{file.name}.partial") as scratch:
                shutil.copyfile(found, scratch / file.name)
        member.become(file)
        return file, f"The head that was fitted on {shown} before is taken from {found}."
    features, labels, index = _features(member.to(device), views, plan.training.workers, device)
    bar = TQDM(total=len(STRENGTHS), desc="Head of the teacher", unit="fit")
    head = fit_head(features, labels, index, len(plan.data["names"]), lambda: bar.update(1))
    bar.close()
    member.to(torch.device("cpu"))
    member.wear_head(head.weight, head.bias)
    with whole_files(folder, scratch=f".{file.name}.partial") as scratch:
        member.save(scratch / file.name)
    member.become(file)
    count, held_out = len(np.unique(index)), ""
    if head.accuracy is not None:
        held_out = f", naming {head.accuracy:.1%} of those held out correctly"
    return file, (
        f"A linear head for {len(plan.data['names'])} classes was fitted on {features.shape[1]:,} frozen features of "
        f"{shown}, from {len(index) // count} views of {count:,} training images{held_out}. "
        f"The teacher with it is {file}, to be given as 'teacher=' too."
    )


def _features(
    teacher: ProbeableTeacher, views: RepeatableViews, workers: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a teacher's features of the training images, (N, d), their classes and which images they are, (N,)."""
    count = min(len(views), MOST_ANSWERS)
    # Evenly spaced, so of each class its part
    chosen = torch.linspace(0, len(views) - 1, count).round().long().tolist()
    passes = min(max(MOST_ANSWERS // count, 1), views.views)
    loader = DataLoader(
        Subset(views, chosen),
        BATCH,
        num_workers=min(workers, os.cpu_count() or 1),
        generator=torch.Generator(),  # or it would draw from the random stream of plain training
    )
    features, labels = [], []
    bar = TQDM(total=count * passes, desc="Features of the teacher", unit="image")
    for view in range(passes):
        views.epoch.fill_(view)
        for batch in loader:
            features.append(teacher.features(batch["img"].float().to(device)))
            labels.append(batch["cls"])
            bar.update(len(batch["img"]))
    bar.close()
    return torch.cat(features).numpy(), torch.cat(labels).numpy(), np.tile(chosen, passes)
