# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Segmentation training in which a frozen trained teacher guides the student."""

from __future__ import annotations

from ultralytics.engine.distillation.trainer import DistillationTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.models.yolo.segment.distill_task import SegmentationTask

__all__ = ("DistillationSegmentationTrainer",)


class DistillationSegmentationTrainer(DistillationTrainer, SegmentationTrainer):
    """A SegmentationTrainer whose student also learns from a frozen teacher, see `DistillationTrainer`.

    Examples:
        >>> from ultralytics.models.yolo.segment.distill_train import DistillationSegmentationTrainer
        >>> args = dict(model="yolo11n-seg.yaml", teacher="path/to/best.pt", data="path/to/dataset.yaml", epochs=50)
        >>> trainer = DistillationSegmentationTrainer(overrides=args)
        >>> trainer.train()
    """

    task = SegmentationTask()
