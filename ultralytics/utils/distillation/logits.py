# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Logits of several teachers, and of many classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ("average_logits", "compress_logits", "full_precision", "restore_logits")


def full_precision(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
        F.log_softmax(full_precision(x) / temperature, dim=1) + math.log(weight)
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
    logits = full_precision(logits)
    values, indices = logits.topk(top, 1)
    others = (logits / temperature).scatter(1, indices, -torch.inf)
    rest = temperature * (others.logsumexp(1, keepdim=True) - math.log(logits.shape[1] - top))
    return values, indices, rest


def restore_logits(values: Tensor, indices: Tensor, rest: Tensor, classes: int) -> Tensor:
    """Return the logits of shape (B, classes) that `compress_logits` stands for."""
    return rest.expand(-1, classes).scatter(1, indices, values)
