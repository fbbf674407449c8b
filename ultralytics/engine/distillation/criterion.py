# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What a distilled step computes: upstream's own loss of the student plus the losses from the teacher, weighted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from ultralytics.nn.distillation.overlap import Answer
from ultralytics.nn.distillation.taps import FeatureTaps
from ultralytics.utils.distillation import DistillationLoss, GradientBalance
from ultralytics.utils.distillation.weighting import OWN, weigh

__all__ = ("LESSON", "DistillationCriterion", "Lesson", "StudentCriterion")

LESSON = "distillation"  # the key under which a batch carries its Lesson


@dataclass
class Lesson:
    """What a batch carries for distillation.

    Attributes:
        targets (dict[str, Tensor]): Entries of the batch as the student's own criterion is to see them.
        known (Tensor | None): Indices of the images that show a class that the teacher knows, if it does not know all.
        unknown (Tensor | None): Indices of the objects of classes that the teacher does not know, if it does not know
            all.
        answer (Callable | None): Gives the teacher's answer, as often as it is called; None where it is silent, and
            after it was taken.
    """

    targets: dict[str, Tensor] = field(default_factory=dict)
    known: Tensor | None = None
    unknown: Tensor | None = None
    answer: Callable[[], Answer] | None = None

    def take(self) -> Answer:
        """Return the teacher's answer, and let go of it: its maps are not to live through the backward pass."""
        answer, self.answer = self.answer, None
        return answer()


@dataclass
class StudentCriterion:
    """A plain callable around upstream's criterion: the student's own loss times beta.

    Attributes:
        own (Any): Upstream's criterion. Its loss may be a scalar, or a vector of parts that upstream sums.
        beta (float): Weight of the student's own loss.
    """

    own: Any
    beta: float

    def __call__(self, predictions: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted total and the detached items, the student's own among them."""
        total, items = self.total(predictions, batch)
        # An infinite loss can have a finite gradient; NaN makes the step's guard see it
        return total * torch.where(total.detach().isfinite(), 1.0, torch.nan), items

    def total(self, predictions: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted total as it is, and the items."""
        own, items = self.own_loss(predictions, batch)
        return self.beta * own, items

    def own_loss(self, predictions: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what upstream's criterion makes of a batch."""
        return self.own(predictions, {**batch, **batch[LESSON].targets})

    def update(self) -> None:
        """End an epoch, as upstream's criteria of end-to-end heads have to."""
        if hasattr(self.own, "update"):
            self.own.update()


@dataclass
class DistillationCriterion(StudentCriterion):
    """The student's criterion with a teacher, see `weighting.weigh` for the total.

    Attributes:
        alpha (float): Weight of the losses from the teacher, in force now.
        taps (FeatureTaps): What reads the student's maps.
        loss (DistillationLoss): The losses from the teacher.
        compare (Callable): Gives them by name for the loss, the student's predictions and maps, the teacher's answer,
            and the batch.
        scale (Callable): Gives what they are multiplied by for a batch: its size where upstream's own loss is.
        labelled (bool): Whether the labels mean anything.
        shared (Callable): Gives the tensors of the student's predictions that all losses come from, the first first.
        balance (GradientBalance | None): Measures their factors, 1 without.
        static (bool): Whether every step has to have a gradient for the same weights, as DDP with `static_graph` asks.
    """

    alpha: float
    taps: FeatureTaps
    loss: DistillationLoss
    compare: Callable[[DistillationLoss, Any, list[Tensor], Answer, dict[str, Any]], dict[str, Tensor]]
    scale: Callable[[dict[str, Any]], int]
    labelled: bool = True
    shared: Callable[[Any], list[Tensor]] = tree_leaves
    balance: GradientBalance | None = None
    static: bool = False

    def total(self, predictions: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted total as it is, and the items."""
        own, items = self.own_loss(predictions, batch)
        if not self.labelled:
            own, items = torch.zeros_like(own), {k: torch.zeros_like(v) for k, v in items.items()}
        features = self.taps.take()
        lesson = batch[LESSON]
        if lesson.answer is None:  # silent; a teacher that is still to begin leaves training plain, in the full weight
            weight = 1.0 if self.alpha else self.beta
            if self.static:
                own = own + 0 * sum(parameter.sum() for parameter in self.loss.parameters())
            return weight * own, {**items, **dict.fromkeys(self.loss.weights, own.new_zeros(()))}
        losses = self.compare(self.loss, predictions, features, lesson.take(), batch)
        items = {**items, **{name: loss.detach() for name, loss in losses.items()}}
        scale = self.scale(batch)
        terms = {OWN: own.sum(), **(losses if scale == 1 else {k: scale * loss for k, loss in losses.items()})}
        factors = None
        if self.balance is not None:
            # The first that all losses come from; below a frozen map none of them teaches anything
            places = [*features, *self.shared(predictions)]
            shared = next((x for x in places if x.requires_grad), places[-1])
            factors = self.balance(terms if self.beta else {k: terms[k] for k in losses}, shared)
        first, *others = weigh(terms, self.loss.weights, self.alpha, self.beta, factors).values()
        return sum(others, first), items
