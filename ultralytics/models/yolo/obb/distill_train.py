# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Oriented box training in which a frozen trained teacher guides the student."""

from __future__ import annotations

from ultralytics.engine.distillation.trainer import DistillationTrainer
from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.models.yolo.obb.distill_task import OBBTask

__all__ = ("DistillationOBBTrainer",)


class DistillationOBBTrainer(DistillationTrainer, OBBTrainer):
    """An OBBTrainer whose student also learns from a frozen teacher, see `DistillationTrainer`.

    Examples:
        >>> from ultralytics.models.yolo.obb.distill_train import DistillationOBBTrainer
        >>> args = dict(model="yolo11n-obb.yaml", teacher="path/to/best.pt", data="path/to/dataset.yaml", epochs=50)
        >>> trainer = DistillationOBBTrainer(overrides=args)
        >>> trainer.train()
    """

    task = OBBTask()
