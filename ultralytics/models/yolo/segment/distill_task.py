# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What is special about distilling a network of instance masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from ultralytics.engine.distillation.plan import Plan, Score
from ultralytics.models.yolo.detect.distill_task import DetectionTask
from ultralytics.models.yolo.segment import SegmentationTrainer, SegmentationValidator
from ultralytics.nn.distillation.dense import DenseTeacher
from ultralytics.nn.distillation.sources import Expected
from ultralytics.nn.tasks import SegmentationModel

__all__ = ("SegmentationTask", "SegmentationTeacher")


class SegmentationTeacher(DenseTeacher):
    """A trained network of instance masks, frozen."""

    expected = Expected("segment", SegmentationModel, "yolo11l-seg.pt")


class SegmentationTask(DetectionTask):
    """What a detector learns, and the masks of the teacher's objects."""

    name = "segment"
    plain_trainer = SegmentationTrainer
    teacher_class = SegmentationTeacher
    network_class = SegmentationModel
    validator_class = SegmentationValidator
    metrics = "seg"
    score = Score("mask_map", "metrics/mAP50-95(M)", "mask mAP50-95", "validation mask mAP50-95 (%)")
    terms = (*DetectionTask.terms, "mask")
    defaults: ClassVar[dict[str, Any]] = {**DetectionTask.defaults, "mask_distill": True}

    def blank_batch(self, images: Tensor, plan: Plan) -> dict[str, Any]:
        """Return a batch whose images show one object each, with its mask."""
        masks = images.new_ones(len(images), *(side // 4 for side in images.shape[2:]))
        return {**super().blank_batch(images, plan), "masks": masks, "sem_masks": masks * 0}

    def predictions(self, said: dict[str, Tensor], classes: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
        """Return what a branch says as upstream's validators take it, with the prototypes."""
        return torch.cat([super().predictions(said, classes, count), said["coefficients"]], 1), said["prototypes"]
