# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""A run in which the teacher has no weight, and with it all that a trainer asks of a teacher's side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset
from ultralytics.engine.distillation.criterion import Lesson, StudentCriterion
from ultralytics.engine.distillation.plan import Plan
from ultralytics.engine.distillation.task import DistillationTask
from ultralytics.nn.distillation.cache import CachedTeacher
from ultralytics.utils.distillation import DistillationLoss

__all__ = ("Undistilled",)


class Undistilled:
    """A run in which the teacher has no weight: the student's own loss times beta. What a trainer asks of a Distiller.

    Attributes:
        plan (Plan): The run's.
        loss (DistillationLoss | None): The losses from the teacher.
        weights (Mapping[str, float]): The weight of each of them.
        cached (CachedTeacher | None): What keeps the teacher's answers.
    """

    loss: DistillationLoss | None = None
    cached: CachedTeacher | None = None
    weights: Mapping[str, float] = MappingProxyType({})

    def __init__(self, task: DistillationTask, plan: Plan):
        """Begin without a student."""
        self.task, self.plan = task, plan
        self._own: Any = None  # upstream's criterion, while the student has none

    def describe(self, student: nn.Module) -> None:
        """Log what is to be trained with what."""

    def fit_adapters(self, student: nn.Module, average: nn.Module, batches: Iterable[Tensor]) -> None:
        """Do nothing, as there are none."""

    def adapt(self, student: nn.Module, stored: nn.Module | None) -> None:
        """Give the student what it trains for the losses alone, as it was when the run was stopped."""

    def release(self, *networks: nn.Module) -> None:
        """Take from networks what they were given for the losses."""

    def attach(self, student: nn.Module, average: nn.Module) -> None:
        """Give the student its criterion.

        Args:
            student (nn.Module): Upstream's ordinary network.
            average (nn.Module): Its average of weights, the EMA.
        """
        self.detach(student)
        if self._own is None:
            self._own = student.init_criterion()
        student.criterion = self._criterion(student, average)

    def detach(self, student: nn.Module) -> None:
        """Make the student bare: nothing that a copy or a checkpoint should not carry, but what it trains.

        Upstream's own criterion is kept, as it counts epochs; so is one that upstream has put in its place.
        """
        criterion = getattr(student, "criterion", None)
        if criterion is not None:
            self._own = getattr(criterion, "own", criterion)
        student.criterion = None

    def _criterion(self, student: nn.Module, average: nn.Module) -> StudentCriterion:
        """Return a criterion around upstream's own."""
        return StudentCriterion(self._own, self.plan.args.distill_beta)

    def begin_training(self, dataset: Dataset, batch: int, precision: AbstractContextManager, amp: bool) -> None:
        """Prepare for training in a precision, and open what a run keeps, see `answers.open_cache`."""

    def begin_epoch(self, student: nn.Module, epoch: int, epochs: int, batch: int) -> None:
        """Put an epoch's weight and temperature in force.

        Args:
            student (nn.Module): The student.
            epoch (int): Epoch, counted from 0.
            epochs (int): Epochs of the training.
            batch (int): Images per batch.
        """

    def ask(self, lesson: Lesson, batch: dict[str, Any]) -> Lesson:
        """Let a batch carry the teacher's answer, which is asked for now."""
        return lesson

    def cause(self, name: str) -> bool:
        """Tell whether it was the teacher's answer that made a loss NaN or infinite."""
        return False

    def clear(self) -> None:
        """Let go of a step that failed, its graph and its answer."""

    def metrics(self) -> dict[str, float]:
        """Return what was in force in the epoch, for its row of results.csv."""
        return {}

    def judge(self, dataset: Dataset, batch: int, student: nn.Module | None) -> None:
        """Measure the teacher on validation images, and a student that has been trained before, and log it."""

    def step(self, student: nn.Module) -> nn.Module:
        """Return a training step as a network of images, to measure what it takes in memory."""
        return student

    def end(self, average: nn.Module, epoch: int, epochs: int, state: Mapping[str, Any] | None) -> None:
        """Be as the run ended, also where only its end is left."""

    def measure_pull(self, student: nn.Module, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
        """Return the share of each weighted loss in the gradient where all of them meet, over some batches."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
