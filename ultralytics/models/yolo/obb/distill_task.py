# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What is special about distilling a network of oriented boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from ultralytics.engine.distillation.plan import Plan
from ultralytics.models.yolo.detect.distill_task import DetectionTask
from ultralytics.models.yolo.obb import OBBTrainer, OBBValidator
from ultralytics.nn.distillation.dense import DenseTeacher
from ultralytics.nn.distillation.sources import Expected
from ultralytics.nn.tasks import OBBModel
from ultralytics.utils.ops import xywh2xyxy

__all__ = ("OBBTask", "OBBTeacher")


class OBBTeacher(DenseTeacher):
    """A trained network of oriented boxes, frozen."""

    expected = Expected("obb", OBBModel, "yolo11l-obb.pt")


class OBBTask(DetectionTask):
    """What a detector learns, its boxes oriented."""

    name = "obb"
    plain_trainer = OBBTrainer
    teacher_class = OBBTeacher
    network_class = OBBModel
    validator_class = OBBValidator

    def blank_batch(self, images: Tensor, plan: Plan) -> dict[str, Any]:
        """Return a batch whose images show one object each, turned by nothing."""
        batch = super().blank_batch(images, plan)
        return {**batch, "bboxes": torch.cat([batch["bboxes"], images.new_zeros(len(images), 1)], 1)}

    def predictions(self, said: dict[str, Tensor], classes: Sequence[int], count: int) -> Tensor:
        """Return what a branch says as upstream's validators take it, the angles last."""
        boxes, angle = said["boxes"].transpose(1, 2).split([4, 1], 1)
        # The base class is told corners
        corners = xywh2xyxy(boxes.transpose(1, 2))
        return torch.cat([super().predictions({**said, "boxes": corners}, classes, count), angle], 1)
