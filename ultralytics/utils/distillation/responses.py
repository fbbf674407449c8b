# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Losses between the logits of a student and a teacher.

Each is the mean over images. Logits come in full precision, with at least one image and two classes; whatever their
size, values and gradients are finite, as every probability is taken through its logarithm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from ultralytics.utils.distillation.logits import full_precision
from ultralytics.utils.distillation.registry import choose, response_method

__all__ = ("dist", "dkd", "lskd", "mse", "nkd", "response_loss")


@response_method("kl", weight=0.1)
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
    student = F.log_softmax(full_precision(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(full_precision(teacher_logits.detach()) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / max(len(student), 1) * temperature**2


@response_method("dkd")
def dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, *, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """Return the decoupled KL divergence: the label's class against all others, and the others among themselves.

    `temperature**2 * mean_b(alpha * KL(b_t || b_s) + beta * KL(q_t || q_s))` with `b` the softened probabilities of the
    label's class and of all others together, and `q` those of the others alone, normalised. In the KL divergence itself
    the second has the weight of the teacher's doubt, 1 - p_t(label), instead of `beta`. With two classes it is 0.

    Args:
        student (Tensor): Logits (B, C).
        teacher (Tensor): Logits (B, C).
        labels (Tensor): Class indices (B,), int64.
        temperature (float): Softening temperature; the paper's is 4.
        alpha (float): Weight of the label's class.
        beta (float): Weight of the others; the paper has 8 for most pairs on CIFAR-100, 0.5 on ImageNet.

    References:
        Zhao et al. 2022, "Decoupled Knowledge Distillation", eq. 7.
    """
    student_label, student_rest, student_others = _split_label(student / temperature, labels)
    teacher_label, teacher_rest, teacher_others = _split_label(teacher / temperature, labels)
    label = teacher_label.exp() * (teacher_label - student_label) + teacher_rest.exp() * (teacher_rest - student_rest)
    others = (teacher_others.exp() * (teacher_others - student_others)).sum(1)
    return (alpha * label + beta * others).mean() * temperature**2


@response_method("nkd", temperature=1.0)
def nkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, *, gamma: float = 1.5) -> Tensor:
    """Return the normalised cross-entropies with the teacher: of the label's class, and among the others.

    `mean_b(-p_t(label) log p_s(label) - gamma * temperature**2 * sum_i q_t(i) log q_s(i))`, with `p` probabilities at
    temperature 1 and `q` those of the other classes alone, softened and normalised. Cross-entropies, so not 0 where the
    two agree.

    Args:
        student (Tensor): Logits (B, C).
        teacher (Tensor): Logits (B, C).
        labels (Tensor): Class indices (B,), int64.
        temperature (float): Softening temperature of the other classes; the paper's is 1.
        gamma (float): Weight of the other classes.

    References:
        Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
        Normalized Loss and Customized Soft Labels", eq. 8.
    """
    student_label, *_ = _split_label(student, labels)
    teacher_label, *_ = _split_label(teacher, labels)
    *_, student_others = _split_label(student / temperature, labels)
    *_, teacher_others = _split_label(teacher / temperature, labels)
    label = -teacher_label.exp() * student_label
    others = -(teacher_others.exp() * student_others).sum(1)
    return (label + gamma * temperature**2 * others).mean()


@response_method("dist")
def dist(student: Tensor, teacher: Tensor, temperature: float, *, beta: float = 2.0, gamma: float = 2.0) -> Tensor:
    """Return how far the softened probabilities are from being correlated, along classes and along images.

    `temperature**2 * (beta * mean_b(1 - r(p_s[b], p_t[b])) + gamma * mean_c(1 - r(p_s[:, c], p_t[:, c])))`, with `r`
    Pearson's correlation; 0 where nothing varies. Blind to how confident a teacher is.

    Args:
        student (Tensor): Logits (B, C).
        teacher (Tensor): Logits (B, C).
        temperature (float): Softening temperature; the paper's is 1 on ImageNet and 4 on CIFAR-100.
        beta (float): Weight of the correlation along classes.
        gamma (float): Weight of the correlation along images.

    References:
        Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", eq. 8 to 10.
    """
    student, teacher = (F.softmax(x / temperature, dim=1) for x in (student, teacher))
    inter = 1 - correlation(student, teacher, 1).mean()
    intra = 1 - correlation(student, teacher, 0).mean()
    return (beta * inter + gamma * intra) * temperature**2


@response_method("mse")
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of the logits, over images and classes; no temperature.

    The paper sums over classes, C times this; the mean makes a weight mean the same for every number of classes.

    Args:
        student (Tensor): Logits (B, C).
        teacher (Tensor): Logits (B, C).

    References:
        Kim et al. 2021, "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation",
        eq. 6.
    """
    return F.mse_loss(student, teacher)


@response_method("lskd", weight=9.0, temperature=2.0)
def lskd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float,
    *,
    method: str | Mapping[str, Any] = "kl",
) -> Tensor:
    """Return another response loss of standardised logits, `(z - mean(z)) / std(z)` over the classes of each image.

    A student need not match how large a teacher's logits are, only how they are spread.

    Args:
        student (Tensor): Logits (B, C).
        teacher (Tensor): Logits (B, C).
        labels (Tensor | None): Class indices (B,), int64, for methods that need them.
        temperature (float): Softening temperature of that loss; the paper's is 2.
        method (str | Mapping): That loss, as in `response_method`.

    References:
        Sun et al. 2024, "Logit Standardization in Knowledge Distillation", algorithm 1; the weight of 9 is its code's.
    """
    student, teacher = (
        (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7)  # as in its code, unbiased
        for x in (student, teacher)
    )
    return sum(
        choice.share * choice(student, teacher, labels=labels, temperature=temperature)
        for choice in choose("response_method", method)
    )


def unit(x: Tensor, dim: int, least: Tensor) -> Tensor:
    """Return x with norm 1 along a dimension, less where its norm is below `least`, so that its gradient is bounded."""
    return x / torch.maximum(x.norm(dim=dim, keepdim=True), least + 1e-8)


def correlation(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Return Pearson's correlation along a dimension, 0 where one of the two does not vary.

    What varies by less than 1e-4 of its size counts as less: it is rounding, whose direction means nothing and whose
    gradient would have no bound.
    """
    x, y = (unit(z - z.mean(dim, keepdim=True), dim, 1e-4 * z.detach().norm(dim=dim, keepdim=True)) for z in (x, y))
    return (x * y).sum(dim)


def _split_label(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities: of the label (B,), of all others together (B,), and of each among them (B, C - 1)."""
    labels = labels[:, None]
    others = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    others = logits.gather(1, others + (others >= labels))
    total = logits.logsumexp(1)
    return logits.gather(1, labels)[:, 0] - total, others.logsumexp(1) - total, F.log_softmax(others, dim=1)
