# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Knowledge-distillation losses between a student and a frozen teacher classifier, in pure PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = (
    "DistillationLoss",
    "attention_loss",
    "average_logits",
    "compress_logits",
    "feature_loss",
    "response_loss",
    "restore_logits",
)


def response_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Return the temperature-softened KL divergence from the student's to the teacher's class distribution.

    `temperature**2 * mean_b KL(softmax(teacher_b / temperature) || softmax(student_b / temperature))`. The factor
    keeps the size of the gradient independent of the temperature. No images give 0.

    Args:
        student_logits (Tensor): Student logits of shape (B, C), any floating dtype.
        teacher_logits (Tensor): Teacher logits of shape (B, C), any floating dtype; receives no gradient.
        temperature (float): Softening temperature, > 0.

    Returns:
        (Tensor): Scalar in nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: If the logits are not two (B, C) tensors of the same shape.

    References:
        Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", eq. 4 and section 2.1.
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"response_loss needs student and teacher logits of one shape (B, C), but got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    student = F.log_softmax(_full_precision(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(_full_precision(teacher_logits.detach()) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / max(len(student), 1) * temperature**2


def average_logits(logits: Sequence[Tensor], weights: Sequence[float], temperature: float = 4.0) -> Tensor:
    """Return logits whose softened probabilities are the weighted mean of those of several classifiers.

    `temperature * log sum_k weights_k softmax(logits_k / temperature)`; a single classifier's are returned as they are.

    Args:
        logits (Sequence[Tensor]): One (B, C) tensor per classifier, any floating dtype.
        weights (Sequence[float]): One share per classifier, > 0, that sum to 1.
        temperature (float): Softening temperature, > 0.

    Returns:
        (Tensor): Logits of shape (B, C), float32 (float64 for float64 logits) if there are several.

    References:
        Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 1: the soft targets of
        an ensemble are the mean of its members' distributions.
    """
    if len(logits) == 1:
        return logits[0]
    weighted = [
        F.log_softmax(_full_precision(x) / temperature, dim=1) + math.log(weight)
        for x, weight in zip(logits, weights, strict=True)
    ]
    return torch.stack(weighted).logsumexp(0) * temperature


def compress_logits(logits: Tensor, top: int, temperature: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest logits of each image, and one logit that stands for each of the others.

    The others share their softened mass equally: `temperature * (logsumexp(others / temperature) - log(C - top))`, so
    at this temperature the probabilities of the largest, and the sum of the others', are what they were.

    Args:
        logits (Tensor): Logits of shape (B, C), any floating dtype.
        top (int): How many to keep, 0 < top < C.
        temperature (float): Softening temperature, > 0.

    Returns:
        values (Tensor): The largest logits, (B, top), float32 (float64 for float64 logits).
        indices (Tensor): Their classes, (B, top), int64.
        rest (Tensor): The logit of each other class, (B, 1).
    """
    logits = _full_precision(logits)
    values, indices = logits.topk(top, 1)
    others = (logits / temperature).scatter(1, indices, -torch.inf)
    rest = temperature * (others.logsumexp(1, keepdim=True) - math.log(logits.shape[1] - top))
    return values, indices, rest


def restore_logits(values: Tensor, indices: Tensor, rest: Tensor, classes: int) -> Tensor:
    """Return the logits of shape (B, classes) that `compress_logits` stands for."""
    return rest.expand(-1, classes).scatter(1, indices, values)


def feature_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Return the mean squared error between feature maps, averaged over levels.

    FitNets sums the squares; the mean makes a weight mean the same at every width, image and batch size.

    Args:
        student_features (Sequence[Tensor]): One (B, C_l, h, w) map per level, already brought to the teacher's C_l.
        teacher_features (Sequence[Tensor]): One (B, C_l, h', w') map per level; receive no gradient. Where the sizes
            differ, the larger map is average-pooled to the smaller.

    Returns:
        (Tensor): Scalar, float32 (float64 for float64 maps).

    Raises:
        ValueError: If the lists are empty or differ in length, or a pair differs in batch or channels.

    References:
        Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", eq. 3 (mean instead of sum).
    """
    pairs = _pair_maps(student_features, teacher_features)
    for student, teacher in pairs:
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"feature_loss needs equal channels, but got a student map of shape {tuple(student.shape)} and a "
                f"teacher map of shape {tuple(teacher.shape)}."
            )
    return torch.stack([F.mse_loss(student, teacher) for student, teacher in pairs]).mean()


def attention_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Return the squared distance between normalised spatial attention maps, averaged over images and levels.

    `mean_l mean_b || Q(student_l)_b - Q(teacher_l)_b ||^2`, where `Q(F)` is the channel mean of `F^2` as a vector of
    unit L2 norm. Each image and level contributes a value in [0, 2].

    Known discrepancy: eq. 2 of the paper has the norm itself, the authors' code its square averaged over positions.
    This is the square summed over positions, h*w times the authors' code, so that a weight means the same at every
    image size.

    Args:
        student_features (Sequence[Tensor]): One (B, c_l, h, w) map per level.
        teacher_features (Sequence[Tensor]): One (B, c'_l, h', w') map per level; receive no gradient. Channels may
            differ. Where the sizes differ, the larger map is average-pooled to the smaller.

    Returns:
        (Tensor): Scalar, float32 (float64 for float64 maps).

    Raises:
        ValueError: If the lists are empty or differ in length, or a pair differs in batch size.

    References:
        Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", eq. 2, and the authors' code.
    """
    pairs = _pair_maps(student_features, teacher_features)
    return torch.stack(
        [(_attention(student) - _attention(teacher)).square().sum(1).mean() for student, teacher in pairs]
    ).mean()


class DistillationLoss(nn.Module):
    """The weighted sum of the response, feature and attention losses, with the 1x1 adapters that the second needs.

    A loss that is off or has weight 0 is not computed, and without the feature loss there are no adapters.

    Attributes:
        adapters (nn.ModuleList): One `nn.Conv2d(student channels, teacher channels, 1)` per level, trained with the
            student.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        temperature: float = 4.0,
        feature_distill: bool = True,
        attention_distill: bool = True,
        feature_weight: float = 50.0,
        attention_weight: float = 10.0,
        response_distill: bool = True,
    ):
        """Initialize the loss for one pair of networks.

        Args:
            student_channels (Sequence[int]): Channels of the student's map at each level.
            teacher_channels (Sequence[int]): Channels of the teacher's map at each level.
            temperature (float): Softening temperature of the response loss, > 0.
            feature_distill (bool): Compute the feature loss.
            attention_distill (bool): Compute the attention loss.
            feature_weight (float): Weight of the feature loss, >= 0.
            attention_weight (float): Weight of the attention loss, >= 0.
            response_distill (bool): Compute the response loss.

        Raises:
            ValueError: If the channel lists differ in length.
        """
        super().__init__()
        if len(student_channels) != len(teacher_channels):
            raise ValueError(
                f"student_channels and teacher_channels must name the same levels, but got {list(student_channels)} "
                f"and {list(teacher_channels)}."
            )
        self.temperature = temperature
        self.weights = {
            "response_loss": float(response_distill),
            "feature_loss": feature_weight * feature_distill,
            "attention_loss": attention_weight * attention_distill,
        }
        self.weights = {name: weight for name, weight in self.weights.items() if weight}
        self.adapters = nn.ModuleList(
            nn.Conv2d(student, teacher, 1)
            for student, teacher in zip(student_channels, teacher_channels, strict=True)
            if "feature_loss" in self.weights
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_features: Sequence[Tensor] = (),
        teacher_features: Sequence[Tensor] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the enabled losses in full precision, whatever autocast is in force.

        Args:
            student_logits (Tensor): Student logits of shape (B, C).
            teacher_logits (Tensor): Teacher logits of shape (B, C).
            student_features (Sequence[Tensor]): One (B, c_l, h, w) map per level; unused without a feature-based loss.
            teacher_features (Sequence[Tensor]): One (B, c'_l, h', w') map per level.

        Returns:
            total (Tensor): Scalar, the weighted sum.
            items (dict[str, Tensor]): The detached unweighted scalars, keyed `response_loss`, `feature_loss` and
                `attention_loss`, the enabled ones only.

        Raises:
            ValueError: If shapes disagree between student, teacher and the channels given at construction.
        """
        with torch.autocast(student_logits.device.type, enabled=False):
            losses = {}
            if "response_loss" in self.weights:
                losses["response_loss"] = response_loss(student_logits, teacher_logits, self.temperature)
            if {"feature_loss", "attention_loss"} & self.weights.keys():
                pairs = _pair_maps(student_features, teacher_features)
                student, teacher = [s for s, _ in pairs], [t for _, t in pairs]
            if "feature_loss" in self.weights:
                losses["feature_loss"] = feature_loss(self._adapt(student), teacher)
            if "attention_loss" in self.weights:
                losses["attention_loss"] = attention_loss(student, teacher)
            total = sum((self.weights[name] * loss for name, loss in losses.items()), student_logits.new_zeros(()))
        return total, {name: loss.detach() for name, loss in losses.items()}

    def _adapt(self, maps: list[Tensor]) -> list[Tensor]:
        """Bring student maps to the teacher's channels."""
        if [x.shape[1] for x in maps] != [adapter.in_channels for adapter in self.adapters]:
            raise ValueError(
                f"The adapters were built for student channels {[a.in_channels for a in self.adapters]}, but the "
                f"student maps have shapes {[tuple(x.shape) for x in maps]}."
            )
        return [_convolve(adapter, x) for adapter, x in zip(self.adapters, maps, strict=True)]


def _convolve(adapter: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution as one matrix product over all positions, the faster way there and back on a CPU."""
    batch, _, height, width = x.shape
    columns = torch.addmm(adapter.bias[:, None], adapter.weight.flatten(1), x.transpose(0, 1).flatten(1))
    return columns.unflatten(1, (batch, height, width)).transpose(0, 1)


def _full_precision(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _pair_maps(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return (student, detached teacher) maps per level, in full precision and of one spatial size."""
    if not student_features or len(student_features) != len(teacher_features):
        raise ValueError(
            f"Student and teacher need one feature map each per level, but got shapes "
            f"{[tuple(x.shape) for x in student_features]} and {[tuple(x.shape) for x in teacher_features]}."
        )
    pairs = []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        if student.ndim != 4 or teacher.ndim != 4 or student.shape[0] != teacher.shape[0]:
            raise ValueError(
                f"Feature maps must have shape (B, C, h, w) with one B, but got a student map of shape "
                f"{tuple(student.shape)} and a teacher map of shape {tuple(teacher.shape)}."
            )
        size = tuple(map(min, student.shape[2:], teacher.shape[2:]))
        pairs.append(
            tuple(
                x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size)
                for x in (_full_precision(student), _full_precision(teacher.detach()))
            )
        )
    return pairs


def _attention(x: Tensor) -> Tensor:
    """Return the spatial attention of a (B, C, h, w) map as unit vectors of shape (B, h*w); zeros stay zeros."""
    return F.normalize(x.square().mean(1).flatten(1), dim=1)
