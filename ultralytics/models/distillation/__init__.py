# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The trainers of all tasks that can be distilled, and which of them a model needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultralytics import YOLO
from ultralytics.engine.distillation.resumable import check_resumed
from ultralytics.engine.distillation.trainer import DistillationTrainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.models.yolo.detect.distill_train import DistillationDetectionTrainer
from ultralytics.models.yolo.obb.distill_train import DistillationOBBTrainer
from ultralytics.models.yolo.pose.distill_train import DistillationPoseTrainer
from ultralytics.models.yolo.segment.distill_train import DistillationSegmentationTrainer
from ultralytics.utils.files import get_latest_run
from ultralytics.utils.patches import torch_load

__all__ = ("TRAINERS", "find_trainer")

TRAINERS: dict[str, type[DistillationTrainer]] = {
    trainer.task.name: trainer
    for trainer in (
        DistillationClassificationTrainer,
        DistillationDetectionTrainer,
        DistillationSegmentationTrainer,
        DistillationPoseTrainer,
        DistillationOBBTrainer,
    )
}


def find_trainer(settings: Mapping[str, Any]) -> type[DistillationTrainer]:
    """Return the trainer for the task of training arguments: of the run to resume, as given, or of the model.

    Args:
        settings (Mapping[str, Any]): Training arguments with `resume`, `task` or `model`.

    Raises:
        FileNotFoundError: If the file to resume or the model does not exist.
        ValueError: If the task is none that can be distilled.
    """
    if last := settings.get("resume"):
        check_resumed(last)
        last = get_latest_run() if last is True else last  # as upstream finds it
        task = torch_load(last, map_location="cpu")["train_args"].get("task")
    else:
        task = settings.get("task") or _task_of(settings["model"])
    if task not in TRAINERS:
        raise ValueError(f"The task '{task}' cannot be distilled. Give a model of one of {list(TRAINERS)}.")
    return TRAINERS[task]


def _task_of(model: Any) -> str:
    """Return the task of a model."""
    try:
        return YOLO(model).task
    except (FileNotFoundError, IsADirectoryError) as e:
        what = "is a folder" if Path(str(model)).is_dir() else "does not exist"
        raise FileNotFoundError(f"'model={model}' {what}. Give a student, e.g. 'model=yolo11n-cls.yaml'.") from e
