# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""All that a run does before its first epoch, and a few steps of it, to be thrown away: what it would be, and cost."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import torch
from ultralytics.cfg import get_save_dir
from ultralytics.engine.distillation.run_files import check_writable
from ultralytics.engine.distillation.trainer import DistillationTrainer
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER, IterableSimpleNamespace

__all__ = ("check", "silenced", "thrown_away")

STEPS = 10


class _Enough(Exception):
    """Raised in a training of which enough was seen."""


def check(trainer_class: type[DistillationTrainer], settings: dict[str, Any]) -> dict[str, float]:
    """Say what a run would match, refuse and warn of, how good its teacher is, and what a step of it takes.

    The run begins in a temporary folder, without loggers, and ends after a few steps. Nothing of it is left, not even a
    head that `teacher_probe` has fitted, but Ultralytics' own cache of a dataset's labels. With `teacher_cache` the
    steps measured are those in which the teacher is asked, and with several devices those of the first.

    Args:
        trainer_class (type[DistillationTrainer]): The task's trainer.
        settings (dict[str, Any]): Training and distillation arguments.

    Returns:
        (dict[str, float]): batch, images; step, seconds, the loading of its images included; memory, GB of the process
            or, on CUDA, of the GPU; batches and epochs; and training, hours of all of them, without validation.

    Raises:
        OSError: If the run's folder could not be written to.
        ValueError: If a run is to be resumed, which was checked when it began.
        Exception: What the run itself would be refused with.
    """
    if settings.get("resume"):
        raise ValueError("'resume=' goes on with a run that was checked when it began. Leave it out.")
    places = {k: settings.get(k) for k in ("project", "name", "save_dir")} | {"task": trainer_class.task.name}
    check_writable(get_save_dir(IterableSimpleNamespace(**places, mode="train", exist_ok=True)))
    brief = {**settings, "val": False, "plots": False, "self_distill_start": 0}
    if settings.get("cache") == "disk":  # which would write every image again
        brief["cache"] = False
    if settings.get("teacher_cache") or "," in str(settings.get("device")):
        with thrown_away(trainer_class, settings) as whole:  # refuses what is wrong with it as it is given
            brief["teacher_cache"] = None
            if whole.world_size > 1:
                brief |= {"device": whole.args.device.split(",")[0], "batch": whole.batch_size // whole.world_size}
        LOGGER.info("The steps below are taken on one device, and the teacher is asked in each of them.")
    with thrown_away(_timed(trainer_class), brief) as trainer:
        with suppress(_Enough):
            trainer.train()
        return _told(trainer)


def _told(trainer: Any) -> dict[str, float]:
    """Return what was measured, and log it."""
    epochs, batches = trainer.epochs, len(trainer.train_loader)
    step, memory = statistics.median(trainer.steps[1:] or trainer.steps), max(trainer.memory) / 2**30
    hours = step * batches * epochs / 3600
    where = "GPU memory" if trainer.device.type == "cuda" else "memory, the process's"
    LOGGER.info(
        f"A step of {trainer.batch_size} images takes {step:.3g} s, the loading of its images included, and "
        f"{memory:.2f} GB of {where}. {epochs} epochs of {batches} steps take about {_duration(hours)}, validation not "
        f"counted."
    )
    measured = {"batch": trainer.batch_size, "step": step, "memory": memory, "batches": batches, "epochs": epochs}
    return {**measured, "training": hours}


def _duration(hours: float) -> str:
    """Return a duration in words."""
    return f"{hours:.1f} hours" if hours >= 1 else f"{max(1, round(60 * hours))} min"


@contextmanager
def thrown_away(trainer_class: type[BaseTrainer], settings: dict[str, Any]) -> Iterator[BaseTrainer]:
    """Yield the trainer of a run of which no logger learns, in a folder that is there as long as it is looked at.

    Args:
        trainer_class (type[BaseTrainer]): Its class.
        settings (dict[str, Any]): The run's arguments; where it would lie has no effect.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        place = {"project": elsewhere, "name": "run", "save_dir": None, "exist_ok": True}
        yield silenced(trainer_class)(overrides={**settings, **place})


def silenced(trainer_class: type[BaseTrainer]) -> type[BaseTrainer]:
    """Return a trainer of whose run no logger and no callback learns."""

    class Silenced(trainer_class):
        def run_callbacks(self, event: str) -> None:
            self.callbacks = defaultdict(list)  # upstream has added its loggers by now
            super().run_callbacks(event)

    Silenced.__module__ = trainer_class.__module__  # which says what another process could import
    return Silenced


def _timed(trainer_class: type[BaseTrainer]) -> type[BaseTrainer]:
    """Return a trainer that measures its steps, and raises `_Enough` after them."""

    class Timed(trainer_class):
        def run_callbacks(self, event: str) -> None:
            super().run_callbacks(event)
            if event == "on_train_start":
                self.steps, self.memory = [], []
            elif event == "on_train_epoch_start":
                self._since = time.perf_counter()
            elif event == "on_train_batch_end":
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                    used = torch.cuda.max_memory_reserved(self.device)
                else:
                    used = psutil.Process().memory_info().rss
                now = time.perf_counter()
                self.steps.append(now - self._since)
                self.memory.append(used)
                self._since = now
            if event == "on_train_epoch_end" or (event == "on_train_batch_end" and len(self.steps) == STEPS):
                raise _Enough

    Timed.__module__ = trainer_class.__module__
    return Timed
