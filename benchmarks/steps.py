# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""One step of the real trainer, and the data and networks that it needs; shared by what measures cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.cfg.distillation import DistillationArgs
from ultralytics.engine.distillation.trainer import loop_precision
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer

from distill_train_example import write_image_folder

CLASSES = 10
STEP_SETTINGS = {
    "imgsz": (32, 224),
    "batch": (64, 16),  # one for each image size
    "repeats": 40,
    "warmup": 5,
    "model": "yolo11n-cls.yaml",
    "teacher_model": "yolo11s-cls.yaml",
    "device": None,
}
LOGITS = {"feature_distill": False, "attention_distill": False}
KINDS = {  # of training, by their distillation arguments
    "plain": None,
    "distilled": {},
    "sequential": {"teacher_overlap": False},
    "compiled": {"teacher_compile": True},
    "overlapped": {"teacher_compile": "reduce-overhead", "teacher_overlap": True},  # on CUDA only
    "response": LOGITS,
    "sequential response": {**LOGITS, "teacher_overlap": False},
    "cached": {"teacher_cache": "ram", "teacher_views": 1},
    "cached response": {**LOGITS, "teacher_cache": "ram", "teacher_views": 1},
}


def make_data(folder: Path, count: int, imgsz: int) -> tuple[Path, list[str]]:
    """Write random images of every class, and return their folder and the class names."""
    images = np.random.default_rng(0).integers(0, 256, (count, imgsz, imgsz, 3), dtype=np.uint8)
    labels = np.arange(count) % CLASSES
    names = [str(c) for c in range(CLASSES)]
    val = slice(4 * CLASSES)
    return write_image_folder(folder, {"train": (images, labels), "val": (images[val], labels[val])}, names), names


def make_teacher(name: str, names: list[str], file: Path) -> Path:
    """Save a network that counts as trained: its BatchNorm layers have seen a batch. Weights do not change the time."""
    model = YOLO(name)
    model.model = type(model.model)(model.model.yaml, nc=len(names), verbose=False)
    model.model.names = dict(enumerate(names))
    model.model.train()(torch.rand(4, 3, 64, 64))
    model.save(file)
    return file


def make_overrides(settings: dict[str, Any], data: Path, imgsz: int, batch: int, project: Path) -> dict[str, Any]:
    """Return the arguments of a plain run."""
    return {
        **{k: settings[k] for k in ("model", "device", "amp")},
        **{"data": str(data), "imgsz": imgsz, "batch": batch, "optimizer": "AdamW", "plots": False},
        **{"project": str(project), "verbose": False, "epochs": 10},
    }


def make_trainer(
    overrides: dict[str, Any], distillation: dict[str, Any] | None, teacher: Path, given: dict[str, Any] | None = None
) -> ClassificationTrainer:
    """Return a trainer.

    Args:
        overrides (dict[str, Any]): The arguments of a plain run.
        distillation (dict[str, Any] | None): Distillation arguments of this kind of training, None for a plain one.
        teacher (Path): The teacher's checkpoint.
        given (dict[str, Any] | None): Arguments from the command line, which come first.

    Returns:
        (ClassificationTrainer): The trainer, not yet set up.
    """
    if distillation is None:
        return ClassificationTrainer(overrides={**overrides, **DistillationArgs.split(given or {})[1]})
    return DistillationClassificationTrainer(
        overrides={**overrides, "teacher": str(teacher), "teacher_check": False, **distillation, **(given or {})}
    )


def prepare(trainer: ClassificationTrainer) -> ClassificationTrainer:
    """Bring a trainer to its first step."""
    trainer._setup_train()
    trainer.epoch = 0
    trainer._model_train()
    return trainer


def step(trainer: ClassificationTrainer, batch: dict[str, torch.Tensor], model: Callable) -> None:
    """Run one training step as upstream's loop does."""
    trainer.run_callbacks("on_train_batch_start")
    with loop_precision(trainer):
        loss, trainer.loss_items = model(trainer.preprocess_batch(dict(batch)))
        trainer.loss, trainer.tloss = loss.sum(), trainer.loss_items
    trainer.scaler.scale(trainer.loss).backward()
    trainer.optimizer_step()
    trainer.run_callbacks("on_train_batch_end")
