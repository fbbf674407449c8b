# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What is special about distilling a network of keypoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from ultralytics.engine.distillation.plan import Plan, Score
from ultralytics.models.yolo.detect.distill_task import DetectionTask
from ultralytics.models.yolo.pose import PoseTrainer, PoseValidator
from ultralytics.nn.distillation.dense import DenseHead, DenseTeacher
from ultralytics.nn.distillation.sources import Expected
from ultralytics.nn.tasks import PoseModel

__all__ = ("PoseTask", "PoseTeacher")


class PoseTeacher(DenseTeacher):
    """A trained network of keypoints, frozen."""

    expected = Expected("pose", PoseModel, "yolo11l-pose.pt")


class PoseTask(DetectionTask):
    """What a detector learns, and the keypoints of the teacher's objects."""

    name = "pose"
    plain_trainer = PoseTrainer
    teacher_class = PoseTeacher
    network_class = PoseModel
    validator_class = PoseValidator
    metrics = "pose"
    score = Score("pose_map", "metrics/mAP50-95(P)", "pose mAP50-95", "validation pose mAP50-95 (%)")
    terms = (*DetectionTask.terms, "keypoint")
    defaults: ClassVar[dict[str, Any]] = {**DetectionTask.defaults, "keypoint_distill": True}

    def _unlike(self, own: DenseHead, teacher: DenseHead) -> dict[str, str]:
        """Return by loss why what the two heads say cannot be compared, where it cannot."""
        found = super()._unlike(own, teacher)
        if own.keypoints != teacher.keypoints:
            found["keypoint"] = (
                f"the student has keypoints of shape {own.keypoints}, and the teacher of {teacher.keypoints}"
            )
        return found

    def blank_batch(self, images: Tensor, plan: Plan) -> dict[str, Any]:
        """Return a batch whose images show one object each, with its keypoints."""
        keypoints = images.new_full((len(images), *plan.data["kpt_shape"]), 0.5)
        return {**super().blank_batch(images, plan), "keypoints": keypoints}

    def predictions(self, said: dict[str, Tensor], classes: Sequence[int], count: int) -> Tensor:
        """Return what a branch says as upstream's validators take it, with the keypoints."""
        keypoints = said["keypoints"].clone()
        keypoints[..., 2:] = keypoints[..., 2:].sigmoid()
        return torch.cat([super().predictions(said, classes, count), keypoints.flatten(2).transpose(1, 2)], 1)
