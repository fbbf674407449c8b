# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""How much the teacher says over a training, and how its losses are balanced."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ("GradientBalance", "scheduled_share", "scheduled_temperature")


def scheduled_share(epoch: int, epochs: int, schedule: str = "constant", warmup: float = 0, close: int = 0) -> float:
    """Return the share of `distill_alpha` in force in an epoch.

    Args:
        epoch (int): Epoch, counted from 0.
        epochs (int): Epochs of the training; upstream may shorten one of limited `time` to fewer than it has begun.
        schedule (str): "constant", or "linear" or "cosine" from 1 in the first epoch towards 0 after the last.
        warmup (float): Epochs in which the share rises, to `(epoch + 1) / (warmup + 1)` of what the schedule says.
        close (int): Last epochs, with a share of 0.

    Returns:
        (float): Share, 0 to 1.
    """
    epochs = max(epochs, epoch + 1)
    if epoch >= epochs - close:
        return 0.0
    return min((epoch + 1) / (warmup + 1), 1.0) * _decay(schedule, epoch / max(epochs - close, 1))


def scheduled_temperature(epoch: int, epochs: int, first: float, last: float | None, schedule: str) -> float:
    """Return the temperature of an epoch.

    Args:
        epoch (int): Epoch, counted from 0.
        epochs (int): Epochs of the training, as above.
        first (float): Temperature of the first epoch.
        last (float | None): Temperature of the last; None for the first's.
        schedule (str): "cosine" for half a cosine from one to the other, otherwise a line.

    Returns:
        (float): Temperature.
    """
    epochs = max(epochs, epoch + 1)
    if last is None or epochs < 2:
        return float(first)
    decay = _decay("cosine" if schedule == "cosine" else "linear", epoch / (epochs - 1))
    return last + (first - last) * decay


def _decay(schedule: str, progress: float) -> float:
    """Return what is left of 1 after a part of the way, 0 to 1."""
    if schedule == "constant":
        return 1.0
    return 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2


class GradientBalance:
    """Factors that make losses pull equally, from the norms of their gradients where they last meet in the student.

    The norms are measured every `every` steps and smoothed exponentially. The first loss is what the others are
    compared with. Similar in aim to GradNorm (Chen et al. 2018), with the factors computed instead of learned.

    Attributes:
        norms (dict[str, Tensor]): Smoothed gradient norms by loss.
    """

    def __init__(self, every: int = 20, momentum: float = 0.9):
        """Begin without a measurement.

        Args:
            every (int): Steps between measurements, 1 or greater.
            momentum (float): Weight of what was measured before, 0 to 1.
        """
        self.every, self.momentum = every, momentum
        self.norms: dict[str, Tensor] = {}
        self._steps = 0

    def __call__(self, losses: Mapping[str, Tensor], shared: Tensor) -> dict[str, Tensor]:
        """Return a factor per loss, 1 for the first.

        Args:
            losses (Mapping[str, Tensor]): Scalars by name, with their graph.
            shared (Tensor): What all of them were computed from.

        Returns:
            (dict[str, Tensor]): Factors, detached scalars of at most 1e6; 0 for a loss without a gradient, 1 for all
                others if it is the first that has none.
        """
        if self._steps % self.every == 0:
            for name, loss in losses.items():
                # Only ratios count, and 1024 times as large they do not vanish in float16
                (gradient,) = torch.autograd.grad(1024 * loss, shared, retain_graph=True, allow_unused=True)
                norm = loss.new_zeros(()) if gradient is None else gradient.float().norm()
                if dist.is_initialized():
                    dist.all_reduce(norm)  # the same factors in every process; only their ratio counts
                earlier = self.norms.get(name, torch.zeros_like(norm))
                smoothed = torch.where(earlier > 0, self.momentum * earlier + (1 - self.momentum) * norm, norm)
                self.norms[name] = torch.where(norm.isfinite(), smoothed, earlier)  # a skipped batch counts for nothing
        self._steps += 1
        factors = self.factors
        return {name: factors[name] for name in losses}

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factor of every loss, as of the last measurement."""
        first = next(iter(self.norms.values()), None)
        return {
            k: torch.where(norm > 0, torch.where(first > 0, first / norm, 1.0).clamp_max(1e6), 0.0)
            for k, norm in self.norms.items()
        }

    def state_dict(self) -> dict:
        """Return what a resumed training goes on from."""
        return {"norms": {k: v.item() for k, v in self.norms.items()}, "steps": self._steps}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`."""
        self.norms = {k: torch.tensor(v) for k, v in state["norms"].items()}
        self._steps = state["steps"]
