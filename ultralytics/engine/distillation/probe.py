# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""A head for a run's teacher: looked for in earlier runs, or fitted on the training images, and kept with the run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset
from ultralytics.data.distillation.views import RepeatableViews
from ultralytics.engine.distillation.answers import fingerprint
from ultralytics.engine.distillation.plan import Plan
from ultralytics.engine.distillation.run_files import whole_files
from ultralytics.engine.distillation.task import DistillationTask
from ultralytics.nn.distillation.cache import cache_key
from ultralytics.nn.distillation.probe import FOLDS, STRENGTHS, fit_head
from ultralytics.nn.distillation.probeable import ProbeableTeacher
from ultralytics.nn.distillation.sources import hash_file
from ultralytics.nn.distillation.sources.probed import Head, read_head
from ultralytics.nn.distillation.teacher import random_images
from ultralytics.utils import RANK, TQDM

__all__ = ("VIEWS", "probe_teachers")

VIEWS = 4  # of each training image, augmented as in training
MOST_ANSWERS = 20_000  # images times views; more teach a linear head little, and the solver long
BATCH = 16  # images at a time: on a CPU, maps of more cost the system as long as the network
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
        ValueError: If the run is resumed, and its head is not there.
    """
    notes = []
    for member in plan.teacher.members:
        if not member.waits_for_head:
            continue
        told: list[Any] = [None]
        if RANK in {-1, 0}:
            file, note = _find_or_fit(task, plan, member, views, folder, device)
            notes.append(note)
            told = [(file, hash_file(str(file)), Head(member.layer, *map(torch.clone, member.linear.parameters())))]
        if RANK != -1:  # the first of several processes tells the others
            dist.broadcast_object_list(told, 0)
        file, content_hash, head = told[0]
        member.wear_head(head)
        member.become(file, content_hash)
    return notes


def _find_or_fit(
    task: DistillationTask,
    plan: Plan,
    member: ProbeableTeacher,
    views: RepeatableViews,
    folder: Path,
    device: torch.device,
) -> tuple[Path, str]:
    """Give a teacher its head, and return the file of both and a sentence about it."""
    _, images = task.identify(plan, views)
    classes = len(plan.data["names"])
    example = random_images(2, plan.data["channels"], plan.imgsz, plan.imgsz)
    key = cache_key(
        teacher=member.content_hash,
        # Two networks in Python may have the same weights and say different things
        features=[member.layer, *fingerprint(member.features(example))],
        imgsz=member.imgsz or plan.imgsz,
        classes=plan.data["names"],  # also of those without images
        normalization=member.normalization,
        views=VIEWS,
        format=FORMAT,
        **images,
    )
    file = folder / f"probe-{key[:16]}.pt"
    if plan.resumed:  # its own alone: another's may be of another teacher
        beside = [Path(plan.training.resume).parent / file.name]
    else:
        places = (folder.parents[1], folder.parents[2])
        beside = [found for place in places for found in sorted(place.glob(f"*/{folder.name}/{file.name}"))]
    for found in filter(Path.exists, [file, *beside]):
        try:
            member.wear_head(read_head(str(found), member.trusted))
            if found != file:
                with whole_files(folder, scratch=f".{file.name}.partial") as scratch:
                    shutil.copyfile(found, scratch / file.name)
        except (OSError, TypeError, ValueError):  # another user's, or damaged: fitted anew
            continue
        return file, f"The head that was fitted on '{member.title}' before is taken from {found}."
    if plan.resumed:
        raise ValueError(
            f"The head of 'teacher={member.source}' is not in '{folder}', or the training images or the teacher are "
            f"others than when the run began. Put the file back, or start a new run."
        )
    features, labels, index = _features(member.to(device), views, plan.training.workers, device)
    bar = TQDM(total=len(STRENGTHS), desc="Head of the teacher", unit="fit")
    head = fit_head(features, labels, index, classes, lambda: bar.update(1))
    bar.close()
    member.to(torch.device("cpu"))
    member.wear_head(Head(member.layer, head.weight, head.bias))
    with whole_files(folder, scratch=f".{file.name}.partial") as scratch:
        member.save(scratch / file.name)
    count, found = len(np.unique(index)), len(np.unique(labels))
    held_out = f", naming {head.accuracy:.1%} of those held out correctly" if head.accuracy is not None else ""
    without = f" {classes - found} classes have no images, and it never names them." if found < classes else ""
    return file, (
        f"A linear head for {classes} classes was fitted on {features.shape[1]:,} frozen features of '{member.title}', "
        f"from {len(index) // count} views of {count:,} training images{held_out}.{without} The teacher with it is "
        f"{file}, to be given as 'teacher=' too."
    )


def _features(
    teacher: ProbeableTeacher, views: RepeatableViews, workers: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a teacher's features of the training images, (N, d), their classes and which images they are, (N,)."""
    chosen = _spread(np.array([label for _, label, *_ in views.samples]))
    passes = min(max(MOST_ANSWERS // len(chosen), 1), views.views)
    loader = DataLoader(Subset(views, chosen), BATCH, num_workers=min(workers, os.cpu_count() or 1))
    features, labels = [], []
    bar = TQDM(total=len(chosen) * passes, desc="Features of the teacher", unit="image")
    for view in range(passes):
        views.epoch.fill_(view)
        for batch in loader:
            features.append(teacher.features(batch["img"].float().to(device)))
            labels.append(batch["cls"])
            bar.update(len(batch["img"]))
    bar.close()
    return torch.cat(features).numpy(), torch.cat(labels).numpy(), np.tile(chosen, passes)


def _spread(labels: np.ndarray) -> list[int]:
    """Return indices of `MOST_ANSWERS` images: of each class its part, evenly spaced, and of small ones a few."""
    share = min(MOST_ANSWERS / len(labels), 1.0)
    chosen = []
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        count = min(len(members), max(FOLDS, round(share * len(members))))
        chosen += members[np.linspace(0, len(members) - 1, count).round().astype(int)].tolist()
    return sorted(chosen)
