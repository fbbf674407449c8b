# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Train an Ultralytics model of any task, with or without a teacher, or both ways to compare them.

The task is that of `model`: a classifier, a detector, or a network of masks, keypoints or oriented boxes.

A network that was trained on other classes becomes a teacher by `teacher_probe=True`, or by `probe` without training.

Usage:
    python train.py model=yolo11n-cls.yaml teacher=path/to/best.pt data=path/to/dataset epochs=50
    python train.py use_distillation=False model=yolo11n-cls.yaml data=path/to/dataset epochs=50
    python train.py resume=path/to/last.pt
    python train.py probe teacher=timm:NAME data=path/to/dataset
    python train.py model=yolo11n.yaml teacher=path/to/detector.pt data=path/to/dataset.yaml epochs=100
    python train.py compare seeds=3 model=yolo11n-cls.yaml teacher=path/to/best.pt data=path/to/dataset epochs=50
    python train.py    # the settings below: the digits and the teacher that distill_train_example.py has made

Arguments are key=value, as for the `yolo` command: every Ultralytics training argument, `use_distillation`, and the
arguments of distillation. `python train.py --help` lists these with their defaults.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from ultralytics.cfg.distillation import DistillationArgs, parse_arguments
from ultralytics.engine.distillation.compare import compare
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.distillation import find_trainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.utils import LOGGER, SETTINGS

MODEL = "yolo11n-cls.yaml"
TRAINING = {  # used unless `data` is given on the command line, with the example's newest teacher
    "data": str(Path(SETTINGS["datasets_dir"]) / "digits"),
    "epochs": 10,
    "imgsz": 32,
    "batch": 64,
    "fliplr": 0.0,
}


def example_teacher() -> str | None:
    """Return the newest teacher of a finished run of distill_train_example.py, or None."""
    plots = Path(SETTINGS["runs_dir"]).glob("classify/distill_example*/comparison.png")  # drawn at a run's end
    teachers = [plot.parent / "teacher" / "weights" / "best.pt" for plot in plots]
    newest = max((t for t in teachers if t.exists()), key=lambda t: t.stat().st_mtime, default=None)
    return newest and str(newest)


def check_cuda() -> bool:
    """Log what the training will run on, and return whether it is a CUDA device."""
    if torch.cuda.is_available():
        LOGGER.info(f"CUDA is available: {torch.cuda.device_count()} x {torch.cuda.get_device_name()}.")
        return True
    LOGGER.info("CUDA is not available: training runs on the CPU, which is slow for large images and datasets.")
    return False


def train_normal(settings: dict[str, Any]) -> BaseTrainer:
    """Train the student alone and return its trainer; distillation arguments have no effect."""
    _, training = DistillationArgs.split(settings)
    trainer = find_trainer(settings).task.plain_trainer(overrides=training)
    trainer.train()
    return trainer


def train_with_distillation(settings: dict[str, Any]) -> BaseTrainer:
    """Train the student with its teacher and return its trainer."""
    trainer = find_trainer(settings)(overrides=settings)
    trainer.train()
    return trainer


def main(arguments: list[str]) -> BaseTrainer | None:
    """Train, compare or fit a teacher's head, with the settings of this file and those of the command line."""
    use_distillation = True  # False trains the same student without a teacher

    if {"-h", "--help", "help"} & set(arguments):
        print(__doc__, "Arguments of distillation, with the defaults of classifiers:", sep="\n")
        for f in fields(DistillationArgs):
            print(f"    {f.name}={f.default}: {f.metadata['meaning']}")
        return None
    command = arguments[0] if arguments[:1] in (["compare"], ["probe"]) else None
    given = parse_arguments(arguments[command is not None :], {"use_distillation": use_distillation})
    use_distillation = given.pop("use_distillation", use_distillation)
    if given.get("resume"):
        settings = given  # the checkpoint holds the rest
    elif "data" in given:
        settings = {"model": MODEL, **given}
    elif find_trainer({"model": MODEL, **given}) is not DistillationClassificationTrainer:
        raise ValueError("No 'data=' given. Give a dataset of the model's task, e.g. 'data=path/to/dataset.yaml'.")
    else:
        settings = {"model": MODEL, "teacher": example_teacher(), **TRAINING, **given}
        if not Path(settings["data"]).is_dir() or settings["teacher"] is None:
            raise FileNotFoundError(
                "No 'data=' given, and the example's digits and teacher are not there. Give 'data=path/to/dataset' and "
                "'teacher=path/to/best.pt', or run 'python distill_train_example.py' once."
            )
    check_cuda()
    if command == "compare":
        compare(find_trainer(settings), settings)
        return None
    if command == "probe":
        unused = {"feature_distill": False, "attention_distill": False}  # no student learns here
        own = {"name": "probe", **settings, **unused, "teacher_probe": True}
        trainer = DistillationClassificationTrainer(overrides=own)
        LOGGER.info(f"To be given as 'teacher={trainer.probe()}'")
        return None
    return train_with_distillation(settings) if use_distillation else train_normal(settings)


if __name__ == "__main__":
    main(sys.argv[1:])
