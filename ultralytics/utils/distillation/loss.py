# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The losses of one distillation together, with the adapters that some of them need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from ultralytics.utils.distillation.features import LEAST, pair_maps, standardize
from ultralytics.utils.distillation.logits import full_precision
from ultralytics.utils.distillation.registry import Choice, choose
from ultralytics.utils.distillation.weighting import weigh

__all__ = ("DistillationLoss",)

RIDGE = 0.01  # of the mean square of a student's channels, in fitting adapters to very many positions
MOST_ROWS = 4096  # positions of a batch that are fitted


@dataclass(frozen=True)
class _FeatureTerm:
    """A feature loss: which levels it compares, and through which of the adapters."""

    choice: Choice
    levels: range
    adapters: range  # empty if it has none


class DistillationLoss(nn.Module):
    """The weighted sum of response and feature losses, with the adapters that the latter need.

    A loss that is off or has weight 0 is not computed and has no adapters.

    Attributes:
        feature_scale (float): What the feature methods' own weights are multiplied by.
        weights (dict[str, float]): The weight of each loss by the name of its item: `response_loss`, `feature_loss` and
            `attention_loss`, or for several of one kind `response_dkd_loss`, `feature_rkd_loss`.
        temperature (float): Softening temperature of the response losses; may be changed between batches.
        adapters (nn.ModuleList): Modules of PyTorch's own, trained with the student: for the default feature loss one
            `nn.Conv2d(student channels, teacher channels, 1)` per level.
    """

    feature_scale: ClassVar[float] = 1.0

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        temperature: float = 4.0,
        feature_distill: bool = True,
        attention_distill: bool = True,
        feature_weight: float | None = None,
        attention_weight: float | None = None,
        response_distill: bool = True,
        response_method: str | Mapping[str, Any] = "kl",
        feature_method: str | Mapping[str, Any] = "mse",
        balanced: bool = False,
        classify: Callable[[Tensor], Tensor] | None = None,
    ):
        """Initialize the loss for one pair of networks.

        Args:
            student_channels (Sequence[int]): Channels of the student's map at each level.
            teacher_channels (Sequence[int]): Channels of the teacher's map at each level.
            temperature (float): Softening temperature of the response losses, > 0.
            feature_distill (bool): Compute the feature losses.
            attention_distill (bool): Compute the attention loss too.
            feature_weight (float, optional): Weight of the feature losses, >= 0; None for each method's own.
            attention_weight (float, optional): Weight of the attention loss, >= 0; None for its own, 10.
            response_distill (bool): Compute the response losses.
            response_method (str | Mapping): Which, see `registry.choose`.
            feature_method (str | Mapping): Which, see `registry.choose`.
            balanced (bool): Whether losses will be balanced by their gradients, so that methods have no weight of their
                own.
            classify (Callable, optional): The teacher's head, from the last level's map to logits.

        Raises:
            TypeError: If a method's hyper-parameter has the wrong type.
            ValueError: If the channel lists differ in length, a method is not known, or one needs a head and has none.
        """
        super().__init__()
        if len(student_channels) != len(teacher_channels):
            raise ValueError(
                f"student_channels and teacher_channels must name the same levels, but got {list(student_channels)} "
                f"and {list(teacher_channels)}."
            )
        self.temperature = temperature
        self._classify = (classify,)  # in a tuple, as a module would become a child
        self.weights: dict[str, float] = {}
        self._responses: dict[str, Choice] = {}
        for name, choice in self._named("response", response_method if response_distill else {}):
            self.weights[name] = choice.share * (1.0 if balanced else choice.method.weight)
            self._responses[name] = choice
        self._features: dict[str, _FeatureTerm] = {}
        self.adapters = nn.ModuleList()
        levels = list(zip(student_channels, teacher_channels, strict=True))
        chosen = self._named("feature", feature_method if feature_distill else {})
        weights = [feature_weight] * len(chosen)
        if attention_distill:
            chosen += [("attention_loss", choose("feature_method", "attention")[0])]
            weights += [attention_weight]
        for (name, choice), given in zip(chosen, weights, strict=True):
            own = 1.0 if balanced else choice.method.weight * self.feature_scale
            if weight := choice.share * (own if given is None else given):
                self.weights[name] = weight
                self._features[name] = self._build(choice, levels)

    @staticmethod
    def _named(kind: str, value: str | Mapping[str, Any]) -> list[tuple[str, Choice]]:
        """Return the methods that were chosen by the names of their items."""
        choices = choose(f"{kind}_method", value) if value else []
        return [(f"{kind}_loss" if len(choices) == 1 else f"{kind}_{c.method.name}_loss", c) for c in choices]

    def _build(self, choice: Choice, channels: list[tuple[int, int]]) -> _FeatureTerm:
        """Return a feature loss, whose adapters are added to those that are there."""
        method = choice.method
        if "classify" in method.context and self._classify[0] is None:
            raise ValueError(
                f"'feature_method={method.name}' needs the head of an Ultralytics classifier whose last feature map is "
                f"the head's input. Give such a teacher, or another method."
            )
        levels = range(len(channels))[-1:] if method.last else range(len(channels))
        first = len(self.adapters)
        if method.adapter is not None:
            self.adapters.extend(method.adapter(*channels[level]) for level in levels)
        return _FeatureTerm(choice, levels, range(first, len(self.adapters)))

    def temperature_of(self, name: str) -> float | None:
        """Return the temperature that a loss, by the name of its item, softens logits with; None if it does not."""
        return self._responses[name].temperature(self.temperature) if name in self._responses else None

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_features: Sequence[Tensor] = (),
        teacher_features: Sequence[Tensor] = (),
        labels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the enabled losses in full precision, whatever autocast is in force.

        Args:
            student_logits (Tensor): Student logits of shape (B, C).
            teacher_logits (Tensor): Teacher logits of shape (B, C).
            student_features (Sequence[Tensor]): One (B, c_l, h, w) map per level; unused without a feature-based loss.
            teacher_features (Sequence[Tensor]): One (B, c'_l, h', w') map per level.
            labels (Tensor, optional): Class indices of shape (B,) and int64; for the methods that need them.

        Returns:
            total (Tensor): Scalar, the weighted sum.
            items (dict[str, Tensor]): The detached unweighted scalars, keyed like `weights`.

        Raises:
            ValueError: If shapes disagree between student, teacher and the channels given at construction.
        """
        losses = self.losses(student_logits, teacher_logits, student_features, teacher_features, labels)
        return self._sum(losses, student_logits.new_zeros(()))

    def _sum(self, losses: dict[str, Tensor], zero: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of losses, zero where there are none, and them detached."""
        total = sum(weigh(losses, self.weights).values(), zero)
        return total, {name: loss.detach() for name, loss in losses.items()}

    def losses(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_features: Sequence[Tensor] = (),
        teacher_features: Sequence[Tensor] = (),
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute what `forward` does, unweighted and with its graph."""
        with torch.autocast(student_logits.device.type, enabled=False):
            losses = {}
            if self._responses:
                if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
                    raise ValueError(
                        f"Response losses need student and teacher logits of one shape (B, C), but got "
                        f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
                    )
                student, teacher = full_precision(student_logits), full_precision(teacher_logits.detach())
                known = {"labels": labels, "temperature": self.temperature}
                if labels is None and any(choice.needs_labels for choice in self._responses.values()):
                    raise ValueError("The response methods that were chosen need labels, but got none.")
                for name, choice in self._responses.items():
                    # Without images or other classes there is nothing to say
                    empty = len(student) == 0 or student.shape[1] < 2
                    losses[name] = student.sum() * 0 if empty else choice(student, teacher, **known)
            return {**losses, **self.feature_losses(student_features, teacher_features)}

    def feature_losses(
        self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Compute the losses between feature maps, unweighted and with their graph; autocast is to be off.

        Args:
            student_features (Sequence[Tensor]): One (B, c_l, h, w) map per level; unused without a feature-based loss.
            teacher_features (Sequence[Tensor]): One (B, c'_l, h', w') map per level.
        """
        if not self._features:
            return {}
        pairs = pair_maps(student_features, teacher_features)
        return {name: self._feature_loss(term, pairs) for name, term in self._features.items()}

    def _feature_loss(self, term: _FeatureTerm, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return a feature loss, averaged over its levels."""
        method, values = term.choice.method, []
        for i, level in enumerate(term.levels):
            student, teacher = pairs[level]
            if method.standardize:
                teacher = standardize(teacher)
                if teacher[:, 0].numel() < LEAST:
                    values.append(student.sum() * 0)
                    continue
            known: dict[str, Any] = {"classify": self._classify[0], "fresh": False}
            if term.adapters:
                adapter = self.adapters[term.adapters[i]]
                if "adapter" in method.context:
                    known["adapter"] = adapter
                else:
                    student = self._adapt(adapter, student)
                    known["fresh"] = isinstance(adapter, nn.Conv2d)
            values.append(term.choice(student, teacher, **known))
        return torch.stack(values).mean()

    @torch.no_grad()
    def fit_adapters(self, batches: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
        """Fit the convolutions that bring student maps to the teacher's to what these say already, by ridge regression.

        One that is random asks for maps that have nothing to do with those that a trained student has, and would spoil
        them before it has learned better. Other modules stay as they are.

        Args:
            batches (Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]): Maps of student and teacher as in `losses`.
        """
        sums: dict[int, Tensor] = {}
        chosen = [
            (term.choice.method, level, place)
            for term in self._features.values()
            if "adapter" not in term.choice.method.context
            for level, place in zip(term.levels, term.adapters, strict=False)
            if isinstance(self.adapters[place], nn.Conv2d)
        ]
        for student_features, teacher_features in batches if chosen else ():
            pairs = pair_maps(
                [full_precision(x) for x in student_features], [full_precision(x) for x in teacher_features]
            )
            for method, level, place in chosen:
                student, teacher = pairs[level]
                if method.standardize:
                    teacher = standardize(teacher)
                rows = torch.cat([torch.ones_like(student[:, :1]), student, teacher], 1).movedim(1, -1).flatten(0, -2)
                rows = rows[:: max(1, len(rows) // MOST_ROWS)].cpu().double()
                known = rows[:, : student.shape[1] + 1]
                sums[place] = sums.get(place, 0) + known.T @ rows
        for place, products in sums.items():
            adapter = self.adapters[place]
            size = adapter.in_channels + 1
            products, targets = products[:, :size], products[:, size:]
            share = RIDGE + adapter.in_channels / products[0, 0]  # the fewer positions, the less they say
            ridge = share * products.diagonal()[1:].mean() * torch.eye(size, dtype=products.dtype)
            ridge[0, 0] = 0  # the bias is free
            solved = torch.linalg.lstsq(products + ridge, targets).solution
            adapter.bias.copy_(solved[0])
            adapter.weight.copy_(solved[1:].T[:, :, None, None])

    def _adapt(self, adapter: nn.Module, x: Tensor) -> Tensor:
        """Bring a student map to the teacher's channels."""
        if isinstance(adapter, nn.Conv2d) and x.shape[1] != adapter.in_channels:
            raise ValueError(
                f"The adapters were built for student channels "
                f"{[a.in_channels for a in self.adapters if isinstance(a, nn.Conv2d)]}, but a student map has shape "
                f"{tuple(x.shape)}."
            )
        return adapter(x)
