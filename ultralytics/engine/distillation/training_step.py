# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""A training step as a network, for what measures a network's memory."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from ultralytics.engine.distillation.criterion import LESSON
from ultralytics.nn.distillation.taps import FeatureTaps
from ultralytics.utils.distillation import DistillationLoss

__all__ = ("TrainingStep",)


class TrainingStep(nn.Module):
    """A training step as a network of images, for AutoBatch, which measures what a network and its gradients take."""

    def __init__(self, student: nn.Module, loss: DistillationLoss, distiller: Any):
        super().__init__()
        self.student, self.loss = student, loss
        self.yaml, self.stride, self.names = student.yaml, student.stride, student.names  # upstream asks for these
        self._distiller = (distiller,)  # in a tuple, so that no copy of it is made with a copy of this

    def __deepcopy__(self, memo: dict) -> TrainingStep:
        """Copy the student and its adapters, which get gradients, but not the teacher."""
        return TrainingStep(*copy.deepcopy((self.student, self.loss), memo), *self._distiller)

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss of a batch."""
        (distiller,) = self._distiller
        plan, student = distiller.plan, self.student
        taps = FeatureTaps(student, plan.student_levels)
        try:
            seen = images.detach()
            answer, predictions = distiller.overlap(partial(distiller.teacher, seen), seen), student(images)
            batch = distiller.task.blank_batch(images, plan)
            batch[LESSON].answer = answer
            criterion = replace(distiller.criterion(student.init_criterion(), taps), loss=self.loss, balance=None)
            return criterion(predictions, batch)[0]
        finally:
            taps.remove()
