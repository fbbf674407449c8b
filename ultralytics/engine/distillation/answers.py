# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Where a run keeps its teacher's answers, and all that they depend on."""

from __future__ import annotations

import errno
import hashlib
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import partial
from typing import Any

import cv2
import numpy as np
import PIL
import torch
import torchvision
import ultralytics
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset
from ultralytics.cfg.distillation.arguments import DENSE_LOSSES
from ultralytics.data.distillation.wrapped import spaced
from ultralytics.engine.distillation.plan import Plan, log
from ultralytics.engine.distillation.task import DistillationTask
from ultralytics.nn.distillation.cache import CachedTeacher, cache_key
from ultralytics.nn.distillation.overlap import Answer
from ultralytics.nn.distillation.teacher import random_images
from ultralytics.utils import LOGGER
from ultralytics.utils.distillation.registry import choose

__all__ = ("answers_key", "fingerprint", "open_cache")

SEEN = 4  # images of a dataset, by which its augmentation is told from others
WITHOUT_EFFECT = {  # on what a teacher says of an image; any other argument counts, so one that is new does
    *("teacher_trusted", "teacher_check", "teacher_cache", "teacher_compile", "teacher_overlap", "baseline"),
    *("distill_alpha", "distill_beta", "distill_schedule", "distill_warmup", "close_distill", "distill_balance"),
    *("self_distill_start", "feature_method", "feature_weight", "attention_weight"),
    *(f"{name}_{what}" for name in DENSE_LOSSES for what in ("distill", "weight")),
    # These have one, which `answers_key` sees: in content, source, classes, levels, or whether logits are compressed
    *("teacher", "teacher_probe", "response_distill", "feature_distill", "attention_distill", "distill_layers"),
    *("response_method", "temperature_end"),
}


def open_cache(
    task: DistillationTask,
    plan: Plan,
    dataset: Dataset,
    batch: int,
    device: torch.device,
    precision: AbstractContextManager,
    amp: bool,
) -> CachedTeacher:
    """Open what keeps the teacher's answers; on disk, in a file named after all that they depend on.

    Args:
        task (DistillationTask): What is special about the run's task.
        plan (Plan): The run's, its teacher on the device and ready to answer.
        dataset (Dataset): The training images, with views that repeat.
        batch (int): Images per batch.
        device (torch.device): Where the teacher answers.
        precision (AbstractContextManager): The precision in which it does.
        amp (bool): Whether that is a mixed one.

    Raises:
        OSError: If the file cannot be written, or the disk has no room for it.
        MemoryError: If the memory has no room.
    """
    args, file = plan.args, None
    images = random_images(1, plan.data["channels"], plan.imgsz, plan.imgsz).to(device)
    if args.teacher_cache == "disk":
        if found := task.identify(plan, dataset):
            folder, parts = found
            parts["views"] = _digest_views(dataset)
            file = plan.cache_folder / f"{folder.name}-{answers_key(plan, parts, plan.teacher(images), amp)}.bin"
        else:
            LOGGER.warning(
                "'teacher_cache=disk' cannot tell the images of this dataset, which are no files, from others: the "
                "answers are kept in memory, for this run alone."
            )
    try:
        if file is not None:
            file.parent.mkdir(exist_ok=True)
        example = images.expand(batch, -1, -1, -1)
        with precision:
            cached = CachedTeacher(
                partial(plan.teacher.ask, head=args.uses_answer),
                example,
                len(dataset),
                args.teacher_views,
                args.temperature,
                file,
                _compresses(plan),
                plan.teacher.interpret if args.uses_answer else lambda output: output,
            )
    except (OSError, MemoryError) as e:
        too_large = isinstance(e, MemoryError) or e.errno == errno.ENOSPC
        mend = "Set a smaller 'teacher_views', 'feature_distill=False attention_distill=False', or leave it out."
        raise type(e)(
            f"'teacher_cache={args.teacher_cache}' cannot keep {args.teacher_views} views of {len(dataset):,} "
            f"images{'' if too_large else f' in {file}'}: {getattr(e, 'strerror', None) or e}. "
            f"{mend if too_large else 'Let it be written to, or delete it.'}"
        ) from e
    log([f"The teacher's cache of {cached.cache.size / 1e6:,.1f} MB is in {file or 'memory'}."])
    if others := [x for x in file.parent.glob("*.bin") if x != file] if file else []:
        log([f"{len(others)} more are there. Delete those that no run needs."])
    return cached


def answers_key(plan: Plan, images: dict[str, Any], answer: Answer, amp: bool) -> str:
    """Return a name for all that a teacher's answers depend on.

    Every distillation argument counts, but for those that are named in `WITHOUT_EFFECT`.

    Args:
        plan (Plan): The run's.
        images (dict[str, Any]): What tells the training images and their views from others.
        answer (Answer): The teacher's, to a fixed image.
        amp (bool): Whether it answers in mixed precision.
    """
    output, features = answer
    arguments = {f.name: getattr(plan.args, f.name) for f in fields(plan.args) if f.name not in WITHOUT_EFFECT}
    return cache_key(
        arguments=arguments,
        # Two networks in Python may have the same weights and say different things
        answer=[fingerprint(x) for x in tree_leaves((output, features))],
        source=[member.backbone or member.source for member in plan.teacher.members],
        classes=[member.names for member in plan.teacher.members] + [plan.teacher.classes],
        levels=[str(level) for level in plan.teacher_levels],
        **images,
        amp=str(plan.training.amp if amp else False),
        compressed=_compresses(plan),
        head=plan.args.uses_answer,
        libraries=[x.__version__ for x in (ultralytics, torchvision, np, cv2, PIL)],  # which draw and make the views
    )


def _digest_views(dataset: Dataset) -> str:
    """Return the SHA-256 of some images as they are seen, as a dataset of a subclass may augment in any way."""
    digest = hashlib.sha256()
    for i in spaced(dataset, SEEN):
        digest.update(dataset[i]["img"].numpy().tobytes())
    return digest.hexdigest()


def fingerprint(x: Tensor) -> list[str]:
    """Return what tells two answers apart, but for rounding: also where their mean is 0."""
    norm = float(x.float().norm())
    mean = float(x.float().mean()) * x.numel() ** 0.5 / max(norm, 1e-12)  # of those scaled to a mean square of 1
    return [f"{norm:.2e}", f"{round(mean, 3) + 0.0}"]


def _compresses(plan: Plan) -> bool:
    """Tell whether the top logits and the mass of the others are all that the losses need, at one temperature."""
    methods: set[Any] = {choice.method.name for choice in choose("response_method", plan.args.response_method)}
    return methods == {"kl"} and plan.args.temperature_end in {None, plan.args.temperature}
