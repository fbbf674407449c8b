# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""A run that has ended, as a report sees it, and what a task makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.data import Dataset
from ultralytics.engine.distillation.plan import Plan
from ultralytics.utils.distillation import DistillationLoss

__all__ = ("FinishedRun", "ReportPart", "read_losses")


@dataclass(frozen=True)
class FinishedRun:
    """A run at the end of its training.

    Attributes:
        plan (Plan): What it was to do.
        folder (Path): Its folder.
        best (Path): Its best checkpoint.
        loss (DistillationLoss): Its losses from the teacher, as of the last epoch.
        dataset (Dataset): Its validation images.
        device (torch.device): Where the teacher is.
        rows (dict[str, list]): The columns of its results.csv.
        pull (dict[str, float]): Share of each weighted loss in the gradient where all of them meet, or empty.
        epochs (int | None): How many it was to have, if it was stopped before.
    """

    plan: Plan
    folder: Path
    best: Path
    loss: DistillationLoss
    dataset: Dataset
    device: torch.device
    rows: dict[str, list]
    pull: dict[str, float]
    epochs: int | None = None


class ReportPart(NamedTuple):
    """What a task says of a run.

    Attributes:
        summary (dict[str, Any]): Figures for `distillation.json` and the page, `networks` and `findings` among them.
        charts (dict[str, Figure]): By name, see `DistillationTask.charts`.
        template (Path): A page that extends `page.html`.
        shown (dict[str, Any]): What the page is given besides.
    """

    summary: dict[str, Any]
    charts: dict[str, Figure]
    template: Path
    shown: dict[str, Any]


def read_losses(run: FinishedRun) -> dict[str, np.ndarray]:
    """Return the losses of every epoch, before they were weighted."""
    return {k.removeprefix("train/"): np.array(v, dtype=float) for k, v in run.rows.items() if k.startswith("train/")}
