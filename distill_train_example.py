# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Train a teacher, a plain student and a distilled student, and compare them.

Usage:
    python distill_train_example.py    # scikit-learn's digits, offline, a few minutes on two CPU cores
    python distill_train_example.py task=detect    # or segment, pose, obb: scenes of these digits
    python distill_train_example.py teacher=best.pt model=yolo11n-cls.yaml data=path/to/dataset epochs=50 imgsz=224
    python distill_train_example.py teacher=timm:NAME teacher_probe=True data=path/to/dataset epochs=50 imgsz=224

Any training or distillation argument can be given as key=value. The task is `task`, or that of `model`. `teacher` is
any trained network of that task, or a `.yaml` to train first, for `teacher_epochs` epochs. Students share seed, epochs
and data.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from ultralytics.cfg.distillation import DistillationArgs, parse_arguments
from ultralytics.data import ClassificationDataset
from ultralytics.engine.distillation.compare import evaluate, train_student
from ultralytics.engine.distillation.plan import Score
from ultralytics.engine.distillation.run_files import whole_files
from ultralytics.engine.distillation.trainer import DistillationTrainer
from ultralytics.models.distillation import find_trainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.distillation.class_names import read_names
from ultralytics.utils import LOGGER, SETTINGS, YAML
from ultralytics.utils.distillation import average_logits
from ultralytics.utils.files import increment_path

EPOCHS = {"teacher_epochs": 20, "epochs": 10}
DIGITS = {"imgsz": 32, "batch": 64, "optimizer": "AdamW", "lr0": 0.002, "fliplr": 0.0}
SCENES = {**DIGITS, "imgsz": 128, "batch": 16, "teacher_epochs": 40, "epochs": 20}
SUFFIXES = {"classify": "-cls", "detect": "", "segment": "-seg", "pose": "-pose", "obb": "-obb"}  # of a model's name


def main(arguments: list[str]) -> None:
    """Run the comparison with `key=value` arguments."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    given = parse_arguments(arguments)
    task = find_trainer({"task": "classify", **given} if "model" not in given else given).task.name
    models = {"model": f"yolo11n{SUFFIXES[task]}.yaml", "teacher": f"yolo11s{SUFFIXES[task]}.yaml"}
    own = {}
    if "data" not in given:
        digits = task == "classify"
        data = write_digits() if digits else write_scenes(datasets_folder() / f"scenes-{task}", task)
        own = {**(DIGITS if digits else SCENES), "data": str(data)}
    compare({**models, **EPOCHS, **own, **given})


def compare(settings: dict[str, Any]) -> Path:
    """Train the three networks, print their table and draw their score per epoch.

    Args:
        settings (dict[str, Any]): Training and distillation arguments, and `teacher_epochs`.

    Returns:
        (Path): The folder that holds the three runs and the plot.
    """
    trainer_class = find_trainer(settings)
    score = trainer_class.task.score
    teacher, teacher_epochs = settings.pop("teacher"), settings.pop("teacher_epochs")
    distillation, training = DistillationArgs.split(settings)
    is_trained = not str(teacher).endswith((".yaml", ".yml"))
    # Refuses mistakes before hours of training
    args = DistillationArgs(**{**trainer_class.task.defaults, **distillation, "teacher": teacher})
    probes = is_trained and args.teacher_probe
    rows = []
    if is_trained and teacher != "self" and not probes:
        rows.append(measure(trainer_class, {**training, **distillation, "teacher": teacher}))
    folder = (
        runs_folder(trainer_class.task.name) / training.pop("project", "") / training.pop("name", "distill_example")
    )
    folder = Path(increment_path(folder, exist_ok=training.pop("exist_ok", False)))
    training["project"] = str(folder)

    if probes:
        teacher = trainer_class(overrides={**training, **distillation, "teacher": teacher, "name": "teacher"}).probe()
        del distillation["teacher_probe"]
        rows.append(measure(trainer_class, {**training, **distillation, "teacher": teacher}))
    if not is_trained:
        rows.append(train_student(trainer_class, {**training, "model": teacher, "epochs": teacher_epochs}, "teacher"))
        teacher = rows[0]["file"]
    rows.append(train_student(trainer_class, training, "plain"))
    rows.append(train_student(trainer_class, {**training, **distillation, "teacher": teacher}, "distilled"))

    LOGGER.info(f"\n{'':<12}{'parameters':>12}{score.words:>16}{'seconds':>9}")
    for row in rows:
        LOGGER.info(f"{row['name']:<12}{row['parameters']:>12,}{row[score.key]:>16.1%}{row['seconds']:>9.0f}")
    gain = 100 * (rows[-1][score.key] - rows[-2][score.key])
    LOGGER.info(f"The teacher changed the student's {score.words} by {gain:+.1f} points on {training['data']}.")
    plot(rows, score, folder / "comparison.png")
    LOGGER.info(f"Plot saved to {folder / 'comparison.png'}")
    if (report := Path(rows[-1]["file"]).parents[1] / "distillation.html").exists():
        LOGGER.info(f"What the teacher did is in {report}")
    return folder


def measure(trainer_class: type[DistillationTrainer], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a trained teacher, or several, on the validation images whose classes they know.

    A detector's score is not a number where its classes, or its keypoints, are not those of the dataset.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        # Opens the teacher safely, and refuses what is wrong with it, data or student
        trainer = trainer_class(overrides={**overrides, "project": elsewhere})
        plan, key = trainer.plan, trainer_class.task.score.key
        parameters = sum(p.numel() for member in plan.teacher.members for p in member.model.parameters())
        row = {"name": "teacher", "seconds": float("nan"), "parameters": parameters, key: float("nan")}
        if trainer_class is DistillationClassificationTrainer:
            if plan.args.response_distill:
                dataset = ClassificationDataset(plan.data["val"] or plan.data["test"], trainer.args, prefix="val")
                logits, labels = plan.teacher.judge(dataset)
                best = average_logits(logits, plan.teacher.weights, 1).argmax(1)
                row[key] = (best == labels).float().mean().item()
            return row
        teacher = plan.teacher.first
        alike = teacher.names == read_names(plan.data["names"])  # upstream compares by index
        if alike and teacher.model.yaml.get("kpt_shape") in (None, plan.data.get("kpt_shape")):
            row |= evaluate(trainer_class, overrides["teacher"], vars(trainer.args))
        return row


def runs_folder(task: str = "classify") -> Path:
    """Return the folder of a task's runs in the user's Ultralytics settings."""
    return Path(SETTINGS["runs_dir"]).resolve() / task


def datasets_folder() -> Path:
    """Return the folder of datasets in the user's Ultralytics settings."""
    return Path(SETTINGS["datasets_dir"]).resolve()


def plot(rows: list[dict[str, Any]], score: Score, file: Path) -> None:
    """Draw the students' score per epoch against the teacher's line."""
    import matplotlib.pyplot as plt

    *teachers, plain, distilled = rows
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for teacher in teachers:
        height = teacher[score.key]
        axes.axhline(100 * height, color="0.4", linestyle="--", label=f"teacher {height:.1%}")
    for row, color in ((plain, "tab:orange"), (distilled, "tab:blue")):
        epochs, label = range(1, len(row["curve"]) + 1), f"{row['name']} {row[score.key]:.1%}"
        axes.plot(epochs, [100 * x for x in row["curve"]], "o-", color=color, label=label)
    axes.set(xlabel="epoch", ylabel=score.axis, title="One student, with and without a teacher")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def load_digit_images() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return scikit-learn's digits as uint8 images of shape (1797, 32, 32), their labels, and the class names."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    enlarged = images.repeat(4, axis=1).repeat(4, axis=2)  # Ultralytics takes images under 10 pixels for corrupt
    return enlarged, digits.target, [str(name) for name in digits.target_names]


def write_digits() -> Path:
    """Write the digits as an image folder, a fifth of each class for validation, once, and return the folder."""
    from sklearn.model_selection import train_test_split

    images, labels, names = load_digit_images()
    train_x, val_x, train_y, val_y = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return write_image_folder(datasets_folder() / "digits", {"train": (train_x, train_y), "val": (val_x, val_y)}, names)


def write_scenes(folder: Path, task: str, train: int = 400, val: int = 100, side: int = 128, seed: int = 0) -> Path:
    """Write scenes of turned digits with labels of a task, whole or not at all; an existing folder is kept.

    Args:
        folder (Path): Where to write.
        task (str): "detect" for boxes, "segment" for outlines, "obb" for oriented boxes, or "pose" for boxes and two
            points each, a digit's top and foot.
        train (int): Scenes to train on.
        val (int): Scenes to validate on.
        side (int): Side of a scene in pixels.
        seed (int): Seed of what they show.

    Returns:
        (Path): The YAML file of the dataset.
    """
    file = folder / "scenes.yaml"
    if folder.is_dir():
        return file
    digits, labels, names = load_digit_images()
    draw = np.random.default_rng(seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_files(folder.parent, scratch=f".{folder.name}.{os.getpid()}") as scratch:
        for split, count in (("train", train), ("val", val)):
            for kind in ("images", "labels"):
                (scratch / folder.name / kind / split).mkdir(parents=True)
            for i in range(count):
                scene, lines = draw.integers(0, 60, (side, side), dtype=np.uint8), []
                for n in draw.choice(len(digits), draw.integers(2, 5), replace=False):
                    shapes = _place(scene, digits[n], draw, np.pi if task == "obb" else 0.3)
                    lines.append(f"{labels[n]} {' '.join(f'{x:.5f}' for x in shapes[task])}")
                Image.fromarray(scene).convert("RGB").save(scratch / folder.name / "images" / split / f"{i:05}.png")
                (scratch / folder.name / "labels" / split / f"{i:05}.txt").write_text("\n".join(lines) + "\n")
        splits = {"path": str(folder), "train": "images/train", "val": "images/val", "names": dict(enumerate(names))}
        points = {"kpt_shape": [2, 3], "flip_idx": [0, 1]} if task == "pose" else {}
        YAML.save(scratch / folder.name / file.name, {**splits, **points})
    return file


def _place(scene: np.ndarray, digit: np.ndarray, draw: np.random.Generator, most: float) -> dict[str, list[float]]:
    """Draw a digit somewhere on a scene, turned by at most an angle, and return its labels by task."""
    side = len(scene)
    size, angle = draw.uniform(0.25, 0.4) * side, draw.uniform(-most, most)
    center = draw.uniform(size * 0.7, side - size * 0.7, 2)
    turn = size / len(digit) * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shift = center - turn @ np.full(2, len(digit) / 2)
    drawn = cv2.warpAffine(digit, np.column_stack([turn, shift]), (side, side))
    np.maximum(scene, drawn, out=scene)
    ink = (drawn > 90).astype(np.uint8)
    outlines, _ = cv2.findContours(ink, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    outline = max(outlines, key=cv2.contourArea)[:, 0] / side
    rows, columns = np.nonzero(digit > 90)
    x, y, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    corners = (np.array([[x, y], [right, y], [right, bottom], [x, bottom]]) @ turn.T + shift) / side
    ends = (np.array([[(x + right) / 2, y], [(x + right) / 2, bottom]]) @ turn.T + shift) / side
    inked = np.argwhere(ink)[:, ::-1]
    low, high = inked.min(0) / side, (inked.max(0) + 1) / side
    box = [*(low + high) / 2, *(high - low)]
    return {
        "detect": box,
        "segment": outline.ravel().tolist(),
        "obb": corners.clip(0, 1).ravel().tolist(),
        "pose": [*box, *ends[0], 2, *ends[1], 2],
    }


def write_image_folder(folder: Path, splits: dict[str, tuple[np.ndarray, Iterable[int]]], names: list[str]) -> Path:
    """Write images as PNG files in `folder/split/class`, whole or not at all; an existing folder is kept.

    Args:
        folder (Path): Where to write.
        splits (dict[str, tuple[np.ndarray, Iterable[int]]]): uint8 images of shape (N, H, W) or (N, H, W, 3) and N
            class indices, by split.
        names (list[str]): Class names.

    Returns:
        (Path): The folder.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_files(folder.parent, scratch=f".{folder.name}.{os.getpid()}") as scratch:  # several may write it at once
        for split, (images, labels) in splits.items():
            for name in names:
                (scratch / folder.name / split / name).mkdir(parents=True)
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                Image.fromarray(image).save(scratch / folder.name / split / names[label] / f"{i:05}.png")
    return folder


if __name__ == "__main__":
    main(sys.argv[1:])
