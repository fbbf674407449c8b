# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What a classifier's answers are worth: calibration, agreement and divergence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ("Calibration", "agreement", "calibration", "divergence", "normalized_entropy")


class Calibration(NamedTuple):
    """How far confidence is from accuracy.

    Attributes:
        error (float): Expected calibration error, 0 to 1: the mean over images of |accuracy - confidence| of their bin.
        confidence (Tensor): Mean confidence of each bin, NaN where it is empty, (bins,).
        accuracy (Tensor): Share of right answers in each bin, NaN where it is empty, (bins,).
        count (Tensor): Images of each bin, (bins,).
    """

    error: float
    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def calibration(logits: Tensor, labels: Tensor, bins: int = 15) -> Calibration:
    """Compare confidence with accuracy in bins of equal width, as Guo et al. 2017, eq. 3 (arXiv:1706.04599).

    Args:
        logits (Tensor): Of shape (N, C), N at least 1.
        labels (Tensor): Class indices of shape (N,).
        bins (int): Bins of confidence between 0 and 1; each holds its upper end.

    Returns:
        (Calibration): The error, and what it is made of.
    """
    confidence, answer = logits.double().softmax(1).max(1)
    right = (answer == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(index, minlength=bins).double()
    mean_confidence = torch.bincount(index, confidence, bins) / count
    accuracy = torch.bincount(index, right, bins) / count
    error = ((accuracy - mean_confidence).abs().nan_to_num() * count).sum() / count.sum()
    return Calibration(error.item(), mean_confidence, accuracy, count.long())


def agreement(student: Tensor, teacher: Tensor) -> float:
    """Return the share of images that both (N, C) logits name alike."""
    return (student.argmax(1) == teacher.argmax(1)).double().mean().item()


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of each image in nats, (N,), from (N, C) logits at temperature 1."""
    s, t = student.double().log_softmax(1), teacher.double().log_softmax(1)
    return torch.nn.functional.kl_div(s, t, reduction="none", log_target=True).sum(1)


def normalized_entropy(logits: Tensor, temperature: float = 1.0) -> float:
    """Return the mean entropy of softmax(logits / temperature), 0 for one sure class to 1 for all alike."""
    if logits.shape[1] < 2:
        return 0.0
    log = (logits.double() / temperature).log_softmax(1)
    return (-(log.exp() * log).sum(1).mean() / torch.tensor(float(logits.shape[1])).log()).item()
