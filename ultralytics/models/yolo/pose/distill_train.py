# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Pose training in which a frozen trained teacher guides the student."""

from __future__ import annotations

from ultralytics.engine.distillation.trainer import DistillationTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.pose.distill_task import PoseTask

__all__ = ("DistillationPoseTrainer",)


class DistillationPoseTrainer(DistillationTrainer, PoseTrainer):
    """A PoseTrainer whose student also learns from a frozen teacher, see `DistillationTrainer`.

    Examples:
        >>> from ultralytics.models.yolo.pose.distill_train import DistillationPoseTrainer
        >>> args = dict(model="yolo11n-pose.yaml", teacher="path/to/best.pt", data="path/to/dataset.yaml", epochs=50)
        >>> trainer = DistillationPoseTrainer(overrides=args)
        >>> trainer.train()
    """

    task = PoseTask()
