# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Detection training in which a frozen trained teacher guides the student."""

from __future__ import annotations

from ultralytics.engine.distillation.trainer import DistillationTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.detect.distill_task import DetectionTask

__all__ = ("DistillationDetectionTrainer",)


class DistillationDetectionTrainer(DistillationTrainer, DetectionTrainer):
    """A DetectionTrainer whose student also learns from a frozen teacher, see `DistillationTrainer`.

    Examples:
        >>> from ultralytics.models.yolo.detect.distill_train import DistillationDetectionTrainer
        >>> args = dict(model="yolo11n.yaml", teacher="path/to/best.pt", data="path/to/dataset.yaml", epochs=50)
        >>> trainer = DistillationDetectionTrainer(overrides=args)
        >>> trainer.train()
    """

    task = DetectionTask()
