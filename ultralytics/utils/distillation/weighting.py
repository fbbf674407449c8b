# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""How the losses of a distillation are weighed against each other, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ("OWN", "weigh")

OWN = "loss"  # stands for the student's own loss among those from the teacher


def weigh(
    losses: Mapping[str, Any],
    weights: Mapping[str, float],
    alpha: Any = 1.0,
    beta: float = 1.0,
    factors: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return each loss times its weight in the total, `beta * own + sum_k alpha * weight_k * factor_k * loss_k`.

    Args:
        losses (Mapping[str, Any]): Losses by name, or what is proportional to them, e.g. the norms of their gradients:
            numbers, scalars or arrays. Those that are not in `weights` are the student's own.
        weights (Mapping[str, float]): The weight of each loss from the teacher.
        alpha (Any): `distill_alpha` in force, a number or an array like the losses.
        beta (float): `distill_beta`.
        factors (Mapping[str, Any], optional): What `distill_balance` measured by loss; 1 where it has none.

    Returns:
        (dict[str, Any]): The weighted losses by name, in their order.
    """
    factors = factors or {}
    return {
        k: (alpha * weights[k] * factors.get(k, 1.0) if k in weights else beta) * loss for k, loss in losses.items()
    }
