# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What a distilled step computes: upstream's own loss of the student plus the losses from the teacher, weighted."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from ultralytics.nn.taps import FeatureTaps
from ultralytics.utils.distillation import DistillationLoss, GradientBalance

if TYPE_CHECKING:
    from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer

__all__ = ("DistillationCriterion", "TrainingStep")


@dataclass
class DistillationCriterion:
    """The student's criterion, a plain callable: `beta * own + alpha * sum_k weight_k * factor_k * loss_k`.

    Where a batch has no `teacher`, a function that gives its answer of logits (B, K) and feature maps, the teacher is
    silent: there the student's own loss stands alone, as in plain training while `alpha` waits for the teacher, else
    still times `beta`.

    Attributes:
        student_criterion (Callable): Upstream's own.
        taps (FeatureTaps): What reads the student's maps.
        loss (DistillationLoss | None): The losses from the teacher; None without.
        alpha (float): Weight of these, in force now.
        beta (float): Weight of the student's own.
        classes (Tensor | None): Indices of the K classes that the teacher knows, if it does not know all; batches then
            say in `known` which images show one of them.
        labelled (bool): Whether the labels mean anything.
        balance (GradientBalance | None): Measures the factors, 1 without.
    """

    student_criterion: Any
    taps: FeatureTaps
    loss: DistillationLoss | None
    alpha: float
    beta: float
    classes: Tensor | None
    labelled: bool = True
    balance: GradientBalance | None = None

    def __call__(self, predictions: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted total and the detached items, the student's own among them."""
        total, items = self._sum(predictions, batch)
        # An infinite loss can have a finite gradient; NaN makes the step's guard see it
        return total * torch.where(total.detach().isfinite(), 1.0, torch.nan), items

    def _sum(self, predictions: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted total as it is, and the items."""
        labels = batch["cls"]
        student_loss, items = self.student_criterion(predictions, {**batch, "cls": batch.get("mixed_cls", labels)})
        if not self.labelled:
            student_loss, items = torch.zeros_like(student_loss), {k: torch.zeros_like(v) for k, v in items.items()}
        if self.loss is None:
            return self.beta * student_loss, items
        student_features = self.taps.take()
        if "teacher" not in batch:  # it is silent; before it has begun to teach, training is plain
            weight = 1.0 if self.alpha else self.beta
            return weight * student_loss, {**items, **dict.fromkeys(self.loss.weights, torch.zeros_like(student_loss))}
        # The last that all losses come from; below a frozen map none of them teaches anything
        shared = next((x for x in student_features if x.requires_grad), predictions)
        teacher_logits, teacher_features = batch["teacher"]()
        if self.classes is not None:
            known = batch["known"]
            predictions, teacher_logits = predictions[known][:, self.classes], teacher_logits[known]
            labels = torch.searchsorted(self.classes, labels[known])
        losses = self.loss.losses(predictions, teacher_logits, student_features, teacher_features, labels)
        total, factors = self.beta * student_loss, {}
        if self.balance is not None:
            factors = self.balance({"loss": student_loss, **losses} if self.beta else losses, shared)
        for name, loss in losses.items():
            total = total + self.alpha * self.loss.weights[name] * factors.get(name, 1.0) * loss
        return total, {**items, **{name: loss.detach() for name, loss in losses.items()}}


class TrainingStep(torch.nn.Module):
    """A training step as a network of images, for AutoBatch, which measures what a network and its gradients take."""

    def __init__(self, student: torch.nn.Module, loss: DistillationLoss, trainer: DistillationClassificationTrainer):
        super().__init__()
        self.student, self.yaml = student, student.yaml
        self.loss, self._trainer = loss, trainer

    def __deepcopy__(self, memo: dict) -> TrainingStep:
        """Copy the student and its adapters, which get gradients, but neither the teacher nor the trainer."""
        return TrainingStep(*copy.deepcopy((self.student, self.loss), memo), self._trainer)

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss of a batch."""
        trainer, student = self._trainer, self.student
        trainer._place_teacher()
        taps = FeatureTaps(student, [level for level, _ in trainer.levels])
        try:
            seen = images.detach()
            answer, predictions = trainer._beside(partial(trainer.teacher, seen), seen), student(images)
            every = torch.arange(len(images), device=images.device)
            criterion = replace(trainer._criterion(student, taps), loss=self.loss, balance=None)
            return criterion(predictions, {"cls": 0 * every, "known": every, "teacher": answer})[0]
        finally:
            taps.remove()
