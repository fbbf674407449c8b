# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Classification training in which a frozen trained teacher guides the student."""

from __future__ import annotations

from ultralytics.engine.distillation.trainer import DistillationTrainer
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_task import ClassificationTask

__all__ = ("DistillationClassificationTrainer",)


class DistillationClassificationTrainer(DistillationTrainer, ClassificationTrainer):
    """A ClassificationTrainer whose student also learns from a frozen teacher, see `DistillationTrainer`.

    Examples:
        >>> from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
        >>> args = dict(model="yolo11n-cls.yaml", teacher="path/to/best.pt", data="path/to/dataset", epochs=50)
        >>> trainer = DistillationClassificationTrainer(overrides=args)
        >>> trainer.train()
    """

    task = ClassificationTask()
