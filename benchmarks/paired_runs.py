# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Paired runs on real images: the data, a teacher, and students that share seeds and first weights."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split
from torchvision.datasets import FashionMNIST
from ultralytics.cfg.distillation import DistillationArgs, parse_arguments
from ultralytics.engine.distillation.compare import (
    evaluate,
    run_name,
    summarise,
    table,
    train_student,
    train_students,
)
from ultralytics.engine.distillation.trainer import DistillationTrainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.utils.files import increment_path
from ultralytics.utils.patches import torch_load

from distill_train_example import datasets_folder, load_digit_images, runs_folder, write_image_folder

RUN_SETTINGS = {
    "dataset": "fashion-mnist",  # or digits
    "source": None,  # folder of Fashion-MNIST's files
    "train": 600,  # training images per class
    "val": 200,  # validation images per class, of the test set
    "seeds": (0, 1, 2),
    "teacher": None,
    "teacher_model": "yolo11s-cls.yaml",
    "teacher_train": 2500,  # training images per class
    "teacher_epochs": 10,
    "runs": None,  # name of a folder for the students' runs, which an interrupted benchmark goes on with
}
PROJECT = runs_folder() / "accuracy"
TRAINING = {
    "model": "yolo11n-cls.yaml",
    "imgsz": 32,
    "epochs": 8,
    "batch": 64,
    "optimizer": "AdamW",
    "lr0": 0.002,
    "plots": False,
}


def compare(settings: dict[str, Any], given: dict[str, Any], variants: dict[str, dict[str, Any] | None]) -> dict:
    """Train a student of each variant for each seed, and write and return the report.

    Args:
        settings (dict[str, Any]): Those of this module, and `output`, the file of the report.
        given (dict[str, Any]): Training and distillation arguments of all students.
        variants (dict[str, dict[str, Any] | None]): Arguments of distilled training by name, None for plain training.

    Returns:
        (dict): What was written to `output`.
    """
    distillation, training = DistillationArgs.split({**TRAINING, **given})
    seeds = np.atleast_1d(settings["seeds"]).tolist()
    variants = {name: None if own is None else {**distillation, **own} for name, own in variants.items()}
    check_variants(variants)
    output = Path(settings["output"])

    teacher = settings["teacher"] or train_teacher(settings, training)
    data = write_dataset(settings, settings["train"])
    names = ("dataset", "train", "val", "teacher", "teacher_model", "teacher_train", "teacher_epochs")
    setting = {**asdict(DistillationArgs(**distillation)), **training, **{k: settings[k] for k in names}}
    # What a file of an earlier version may not have
    report = begin_report(output, setting, {**asdict(DistillationArgs()), "dataset": RUN_SETTINGS["dataset"]})
    report.setdefault(
        "teacher_top1",
        100 * evaluate(DistillationClassificationTrainer, str(teacher), {**training, "data": str(data)})["top1"],
    )
    project = PROJECT
    if settings["runs"]:
        project /= report.setdefault("runs", Path(increment_path(PROJECT / settings["runs"])).name)
        training["exist_ok"] = True
    variants = {name: None if own is None else {"teacher": str(teacher), **own} for name, own in variants.items()}
    train_students(
        DistillationClassificationTrainer,
        variants,
        {**training, "data": str(data), "project": str(project)},
        seeds,
        report,
        output,
    )
    print(f"Teacher: {report['teacher_top1']:.2f} % top-1")
    print(table(report["summary"], DistillationClassificationTrainer.task.score.words))
    print(f"Saved to {output}")
    return report


def parse_variants(names: str, distillation: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """Read which students are compared.

    Args:
        names (str): Separated by commas: distillation arguments, separated by spaces, or what has a name.
        distillation (dict[str, Any]): Distillation arguments of all of them.
        special (dict[str, Any]): What has a name.

    Returns:
        (dict[str, Any]): By name what is special, or the student's distillation arguments.
    """
    variants = {}
    for name in (name.strip() for name in names.split(",")):
        own = parse_arguments(name.split()) if "=" in name else {}
        variants[name] = special.get(name, {**distillation, **own})
    return variants


def check_variants(variants: dict[str, dict[str, Any] | None]) -> None:
    """Refuse distillation arguments that are wrong, before the first run."""
    for own in variants.values():
        DistillationArgs(**DistillationArgs.split(own or {})[0])


def begin_report(output: Path, setting: dict[str, Any], defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the report of an earlier run in the same setting, to go on with, or an empty one.

    Args:
        output (Path): The file of the report.
        setting (dict[str, Any]): What the students have in common.
        defaults (dict[str, Any], optional): Of settings that the file may not have.
    """
    setting = json.loads(json.dumps(setting))  # as it is read back
    if output.exists():
        earlier = json.loads(output.read_text())
        if {**(defaults or {}), **earlier["setting"]} == setting:
            return earlier
    return {"setting": setting}


def measure_test(
    report: dict[str, Any], trainer_class: type[DistillationTrainer], training: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Measure the best epochs of all students on images that chose none, once, and return by variant and seed."""
    key, measured = trainer_class.task.score.key, report.setdefault("test", {})
    for variant, by_seed in report[key].items():
        for seed in by_seed.keys() - measured.setdefault(variant, {}).keys():
            best = Path(training["project"]) / run_name(variant, seed) / "weights" / "best.pt"
            measured[variant][seed] = 100 * evaluate(trainer_class, best, training, "test")[key]
    report["test summary"] = summarise(measured)
    return measured


def train_teacher(settings: dict[str, Any], training: dict[str, Any]) -> Path:
    """Train the teacher if it is not there yet, and return its checkpoint."""
    name = f"teacher_{Path(settings['teacher_model']).stem}_{settings['teacher_train']}_{settings['teacher_epochs']}"
    if settings["dataset"] != RUN_SETTINGS["dataset"]:
        name += f"_{settings['dataset']}"
    best = PROJECT / name / "weights" / "best.pt"
    if not best.exists() or torch_load(best, map_location="cpu")["epoch"] != -1:  # -1 marks a finished training
        overrides = {k: v for k, v in training.items() if k in {*TRAINING, "fliplr", "device"}}
        overrides |= {
            "model": settings["teacher_model"],
            "data": str(write_dataset(settings, settings["teacher_train"])),
            "epochs": settings["teacher_epochs"],
            "project": str(PROJECT),
            "exist_ok": True,
        }
        train_student(DistillationClassificationTrainer, overrides, name)
    return best


def write_dataset(settings: dict[str, Any], train_count: int) -> Path:
    """Write the first images of each class as an image folder, once, and return it."""
    if settings["dataset"] == "digits":
        return digits(train_count)
    return fashion_mnist(settings["source"], train_count, settings["val"])


def digits(train_count: int) -> Path:
    """Write scikit-learn's digits, a fifth of each class for validation and `train_count` or all others to train."""
    images, labels, names = load_digit_images()
    train_x, val_x, train_y, val_y = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    chosen = np.concatenate([np.flatnonzero(train_y == c)[:train_count] for c in range(len(names))])
    splits = {"train": (train_x[chosen], train_y[chosen]), "val": (val_x, val_y)}
    return write_image_folder(datasets_folder() / f"digits-{train_count}", splits, names)


def fashion_mnist(source: str | None, train_count: int, val_count: int) -> Path:
    """Write the first images of each class as an image folder, once.

    Args:
        source (str | None): Folder with the four gzipped files, or None to let torchvision download them.
        train_count (int): Training images per class.
        val_count (int): Validation images per class, taken from the test set.

    Returns:
        (Path): The dataset folder.
    """
    raw = datasets_folder() / "FashionMNIST" / "raw"
    if source is not None and not raw.is_dir():
        raw.mkdir(parents=True)
        for file in Path(source).glob("*-ubyte.gz"):
            with gzip.open(file) as packed, (raw / file.stem).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
    splits = {}
    for split, is_train, count in (("train", True, train_count), ("val", False, val_count)):
        dataset = FashionMNIST(datasets_folder(), train=is_train, download=True)
        labels = dataset.targets.numpy()
        chosen = np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(len(dataset.classes))])
        splits[split] = dataset.data.numpy()[chosen], labels[chosen]
    names = [name.replace("/", "-") for name in dataset.classes]
    return write_image_folder(datasets_folder() / f"fashion-mnist-{train_count}-{val_count}", splits, names)
