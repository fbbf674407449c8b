# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Does a teacher make the student better? Paired runs on Fashion-MNIST, plain and distilled, seed by seed.

Usage:
    python benchmarks/accuracy.py source=path/to/idx/files
    python benchmarks/accuracy.py train=100 epochs=20 seeds=0,1,2,3,4 variants="plain,distilled,temperature=2"

Arguments, as key=value: the settings below, and any training or distillation argument for the students. `source` is a
folder with Fashion-MNIST's four `*-ubyte.gz` files; without it torchvision downloads them. `teacher` is a `.pt`; by
default one is trained, once. A variant is `plain`, `distilled` (all defaults) or such arguments, separated by spaces.
Results are written after every run, and an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from torchvision.datasets import FashionMNIST

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ultralytics.cfg.distillation import DistillationArgs, parse_arguments
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.utils.patches import torch_load

from distill_train_example import datasets_folder, evaluate, machine, runs_folder, train, write_image_folder

SETTINGS = {
    "source": None,  # folder of Fashion-MNIST's files
    "train": 600,  # training images per class
    "val": 200,  # validation images per class, of the test set
    "seeds": (0, 1, 2),
    "variants": "plain,distilled,response_distill=False,feature_distill=False,attention_distill=False",
    "teacher": None,
    "teacher_model": "yolo11s-cls.yaml",
    "teacher_train": 2500,  # training images per class
    "teacher_epochs": 10,
    "output": str(Path(__file__).with_name("accuracy.json")),
}
TRAINING = {
    "model": "yolo11n-cls.yaml",
    "imgsz": 32,
    "epochs": 8,
    "batch": 64,
    "optimizer": "AdamW",
    "lr0": 0.002,
    "plots": False,
}


def main(arguments: list[str]) -> None:
    """Run the benchmark with `key=value` arguments."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    given = parse_arguments(arguments)
    settings = {k: given.pop(k, v) for k, v in SETTINGS.items()}
    names = [name.strip() for name in settings["variants"].split(",")]
    variants = {name: parse_arguments(name.split()) if "=" in name else {} for name in names}
    compare(settings, given, {**variants, **({"plain": None} if "plain" in variants else {})})


def compare(settings: dict[str, Any], given: dict[str, Any], variants: dict[str, dict[str, Any] | None]) -> dict:
    """Train a student of each variant for each seed, and write and return the report.

    Args:
        settings (dict[str, Any]): The benchmark's own settings.
        given (dict[str, Any]): Training and distillation arguments of all students.
        variants (dict[str, dict[str, Any] | None]): Arguments of distilled training by name, None for plain training.

    Returns:
        (dict): What was written to `output`.
    """
    distillation, training = DistillationArgs.split({**TRAINING, **given})
    seeds = np.atleast_1d(settings["seeds"]).tolist()
    variants = {name: None if own is None else {**distillation, **own} for name, own in variants.items()}
    for own in variants.values():
        DistillationArgs(**DistillationArgs.split(own or {})[0])  # mistakes end here, before the first run
    output = Path(settings["output"])

    folder = runs_folder() / "accuracy"
    teacher = settings["teacher"] or train_teacher(settings, training, folder)
    data = fashion_mnist(settings["source"], settings["train"], settings["val"])
    setting = {
        **asdict(DistillationArgs(**distillation)),
        **training,
        **{k: settings[k] for k in ("train", "val", "teacher", "teacher_model", "teacher_train", "teacher_epochs")},
    }
    setting = json.loads(json.dumps(setting))  # as it is read back
    report = {"setting": setting, "top1": {}, "seconds": {}}
    if output.exists():
        earlier = json.loads(output.read_text())
        if {**asdict(DistillationArgs()), **earlier["setting"]} == setting:  # arguments that are newer than the file
            report = earlier
    report["machine"] = machine()
    report.setdefault("teacher_top1", 100 * evaluate(str(teacher), {**training, "data": str(data)})["top1"])
    for seed in seeds:
        for variant, own in variants.items():
            top1 = report["top1"].setdefault(variant, {})
            if str(seed) in top1:
                continue
            overrides = {**training, "data": str(data), "seed": seed, "project": str(folder)}
            trainer_class = ClassificationTrainer
            if own is not None:
                trainer_class = DistillationClassificationTrainer
                overrides |= {"teacher": str(teacher), **own}
            row = train(trainer_class, overrides, f"{re.sub('[^A-Za-z0-9.]+', '_', variant)}_{seed}")
            top1[str(seed)] = 100 * row["top1"]
            report["seconds"].setdefault(variant, {})[str(seed)] = row["seconds"]
            report["summary"] = summarise(report["top1"])
            output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Teacher: {report['teacher_top1']:.2f} % top-1")
    print(table(report["summary"]))
    print(f"Saved to {output}")
    return report


def train_teacher(settings: dict[str, Any], training: dict[str, Any], folder: Path) -> Path:
    """Train the teacher if it is not there yet, and return its checkpoint."""
    name = f"teacher_{Path(settings['teacher_model']).stem}_{settings['teacher_train']}_{settings['teacher_epochs']}"
    best = folder / name / "weights" / "best.pt"
    if not best.exists() or torch_load(best, map_location="cpu")["epoch"] != -1:  # -1 marks a finished training
        overrides = {k: training[k] for k in ("imgsz", "batch", "optimizer", "lr0", "plots")}
        overrides |= {
            "model": settings["teacher_model"],
            "data": str(fashion_mnist(settings["source"], settings["teacher_train"], settings["val"])),
            "epochs": settings["teacher_epochs"],
            "project": str(folder),
            "exist_ok": True,
        }
        train(ClassificationTrainer, overrides, name)
    return best


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


def summarise(top1: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Return mean, standard deviation and the paired difference to plain with its 95 % interval, per variant."""
    summary = {}
    for variant, by_seed in top1.items():
        values = list(by_seed.values())
        row = {"seeds": len(values), "mean": np.mean(values), "std": np.std(values, ddof=1) if len(values) > 1 else 0.0}
        shared = sorted(by_seed.keys() & top1.get("plain", {}).keys())
        if variant != "plain" and shared:
            differences = [by_seed[s] - top1["plain"][s] for s in shared]
            row["differences"] = differences
            row["difference"] = np.mean(differences)
            if len(shared) > 1:
                row["interval"] = list(stats.ttest_1samp(differences, 0).confidence_interval(0.95))
        summary[variant] = row
    return summary


def table(summary: dict[str, dict[str, Any]]) -> str:
    """Format the summary as a Markdown table."""
    lines = ["| student | top-1 mean | std | minus plain | 95 % interval | by seed |", "|---|---|---|---|---|---|"]
    for variant, row in summary.items():
        difference = f"{row['difference']:+.2f}" if "difference" in row else ""
        interval = "{:+.2f} to {:+.2f}".format(*row["interval"]) if "interval" in row else ""
        by_seed = ", ".join(f"{d:+.2f}" for d in row.get("differences", []))
        lines.append(f"| {variant} | {row['mean']:.2f} | {row['std']:.2f} | {difference} | {interval} | {by_seed} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
