# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Does a teacher make a detector better, or masks, keypoints, oriented boxes? Paired runs, also of upstream's own loss.

Usage:
    python benchmarks/dense.py data=path/to/cells.yaml
    python benchmarks/dense.py data=path/to/cells.yaml fraction=0.25 epochs=100 output=benchmarks/results/dense_few.json
    python benchmarks/dense.py data=path/to/cells.yaml start_epochs=60 output=benchmarks/results/dense_started.json
    python benchmarks/dense.py task=pose seeds=0,1,2 output=benchmarks/results/dense_pose.json
    python benchmarks/dense.py data=... seeds=10,11 variants="plain,distilled,box_distill=False,distill_alpha=0.3"

Arguments, as key=value: the settings here, and any training or distillation argument for the students. Without `data`
the script composes scenes of scikit-learn's digits, with boxes, masks, turned boxes and points. `teacher` is a `.pt`;
by default `teacher_model` is trained once, for `teacher_epochs`, on all images also where the students have a
`fraction` of them. With `start_epochs` all students go on from one plain student, trained first for so many epochs. A
variant is `plain`, `upstream` (Ultralytics' `distill_model`), `distilled` (all defaults) or distillation arguments,
separated by spaces. Where the dataset has a `test` split, the best epochs are measured there too. `fast=True` trains
all of them on a CPU as upstream does on GPUs alone, under autocast, in bfloat16, and with channels last: twice as fast
where the CPU has instructions for it. Steps are timed `repeats` times in turn, 0 for not at all. Results are written
after every run, and an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from ultralytics.cfg.distillation import DistillationArgs
from ultralytics.data.utils import check_det_dataset
from ultralytics.engine.distillation.compare import evaluate, table, train_student, train_students
from ultralytics.engine.distillation.trainer import DistillationTrainer, loop_precision
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.distillation import TRAINERS
from ultralytics.nn.distillation.sources import open_source
from ultralytics.utils.files import increment_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    RESULTS,
    amp_unchecked,
    gap_closed,
    medians,
    ratio,
    read_settings,
    take_turns,
    write_results,
)
from benchmarks.paired_runs import begin_report, check_variants, measure_test, parse_variants
from benchmarks.steps import prepare, step
from distill_train_example import SUFFIXES, datasets_folder, runs_folder, write_scenes

SETTINGS = {
    "task": "detect",
    "data": None,
    "teacher": None,
    "teacher_model": None,  # yolo11s of the task
    "teacher_epochs": 150,
    "start_epochs": 0,
    "start_seed": 100,  # of the student that all others go on from
    "variants": "plain,upstream,distilled",
    "seeds": (0, 1, 2, 3, 4),
    "fast": False,
    "repeats": 20,
    "output": str(RESULTS / "dense.json"),
}
TRAINING = {
    "imgsz": 256,
    "epochs": 40,
    "batch": 16,
    "optimizer": "AdamW",
    "lr0": 0.002,
    "plots": False,
    "cache": "ram",
    "workers": 0,
}
SCENES = {"imgsz": 128, "fliplr": 0.0}  # a turned digit is one, a mirrored one is none


def main(arguments: list[str]) -> None:
    """Run the benchmark with `key=value` arguments."""
    settings, given = read_settings(arguments, __doc__, SETTINGS)
    with as_on_gpus() if settings["fast"] else nullcontext():
        run(settings, given)


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Train on a CPU as upstream does on GPUs: under autocast, there in bfloat16, and with channels last."""
    setup = BaseTrainer.setup_model

    def setup_model(trainer: BaseTrainer) -> Any:
        checkpoint = setup(trainer)
        trainer.model.to(memory_format=torch.channels_last)
        return checkpoint

    with patch.object(BaseTrainer, "setup_model", setup_model), amp_unchecked():
        yield


def run(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """Train, measure and report, with the benchmark's own settings and all other arguments."""
    valid = [task for task in TRAINERS if task != "classify"]
    if (task := settings["task"]) not in valid:
        raise ValueError(f"'task={task}' is an invalid value. Valid tasks are {valid}.")
    trainer_class, suffix = TRAINERS[task], SUFFIXES[task]
    scenes = {} if settings["data"] else SCENES
    distillation, training = DistillationArgs.split({"model": f"yolo11n{suffix}.yaml", **TRAINING, **scenes, **given})
    variants = parse_variants(settings["variants"], distillation, {"plain": None, "upstream": {}})
    check_variants({name: {**trainer_class.task.defaults, **(own or {})} for name, own in variants.items()})

    output, task_runs = Path(settings["output"]), runs_folder(task) / ("dense-fast" if settings["fast"] else "dense")
    data = check_det_dataset(settings["data"] or write_scenes(datasets_folder() / f"scenes-{task}", task))
    training |= {"data": str(data["yaml_file"]), "exist_ok": True, "project": str(task_runs)}
    teacher = settings["teacher"] or train_once(
        trainer_class,
        {
            **{k: v for k, v in training.items() if k != "fraction"},
            "model": settings["teacher_model"] or f"yolo11s{suffix}.yaml",
            "epochs": settings["teacher_epochs"],
        },
        "teacher",
    )
    opened = open_source(teacher, expected=trainer_class.task.teacher_class.expected)
    if opened.names != list(data["names"].values()):
        raise ValueError(f"'teacher={teacher}' has other classes than the dataset, so the two cannot be compared.")
    fixed = {"task": task, "data": Path(training["data"]).stem, **{k: settings[k] for k in ("start_epochs", "fast")}}
    # Of its weights: its file tells when and where it was trained, too
    fixed["teacher_hash"] = trainer_class.task.teacher_class(opened.network).content_hash
    setting = {**training, **distillation, **fixed, "model": Path(training["model"]).name}
    report = begin_report(output, {k: v for k, v in setting.items() if k not in ("project", "exist_ok")})
    key = trainer_class.task.score.key
    report.setdefault("teacher", 100 * evaluate(trainer_class, teacher, training)[key])
    if settings["start_epochs"]:
        seeded = {**training, "seed": settings["start_seed"], "epochs": settings["start_epochs"]}
        training["model"] = train_once(trainer_class, seeded, "start")
        report.setdefault("start", 100 * evaluate(trainer_class, training["model"], training)[key])
    project = task_runs / report.setdefault("runs", Path(increment_path(task_runs / output.stem)).name)
    training["project"] = str(project)

    roles = {name: "distill_model" if name == "upstream" else "teacher" for name in variants}
    variants = {name: own if own is None else {roles[name]: teacher, **own} for name, own in variants.items()}
    train_students(trainer_class, variants, training, np.atleast_1d(settings["seeds"]).tolist(), report, output)
    report["gap closed, %"] = gap_closed(report[key], report["teacher"])
    if data.get("test"):
        measure_test(report, trainer_class, training)
    if settings["repeats"]:
        report["cost"] = measure_cost(trainer_class, training, teacher, distillation, settings["repeats"])
    write_results(output, report)
    words = trainer_class.task.score.words
    print(f"Teacher: {report['teacher']:.2f} % {words}")
    print(table(report["summary"], words))
    if "test summary" in report:
        print(table(report["test summary"], f"test {words}"))
    print(f"Saved to {output}")


def train_once(trainer_class: type[DistillationTrainer], training: dict[str, Any], what: str) -> str:
    """Return the best checkpoint of a plain run, which is made or gone on with unless it is finished."""
    overrides = {**training, "patience": training["epochs"]}
    key = hashlib.sha256(json.dumps(overrides, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return train_student(trainer_class, overrides, f"{what}-{key}")["file"]


def measure_cost(
    trainer_class: type[DistillationTrainer],
    training: dict[str, Any],
    teacher: str,
    distillation: dict[str, Any],
    repeats: int,
) -> dict[str, Any]:
    """Time steps of plain, distilled and upstream's distilled training in turn, and the teacher's forward pass."""
    plain_trainer = trainer_class.task.plain_trainer
    own = {**training, "name": "cost", "teacher": teacher, "teacher_check": False, **distillation}
    trainers = {
        "plain": plain_trainer(overrides={**training, "name": "cost"}),
        "upstream": plain_trainer(overrides={**training, "name": "cost", "distill_model": teacher}),
        "distilled": trainer_class(overrides=own),
        "sequential": trainer_class(overrides={**own, "teacher_overlap": False}),
    }
    for trainer in trainers.values():
        prepare(trainer)
    plain, bare = trainers["plain"], trainers["sequential"].teacher
    batch = next(iter(plain.train_loader))
    images = plain.preprocess_batch(dict(batch))["img"]

    def forward() -> None:
        with loop_precision(plain):
            bare(images)

    runs = {"teacher": forward, **{kind: partial(step, x, batch, x.model) for kind, x in trainers.items()}}
    times = take_turns(runs, repeats, plain.device, warmup=2)
    ratios = {
        "distilled / (plain + teacher)": ratio(times["distilled"], times["plain"], times["teacher"]),
        "sequential / (plain + teacher)": ratio(times["sequential"], times["plain"], times["teacher"]),
        "distilled / plain": ratio(times["distilled"], times["plain"]),
        "upstream / plain": ratio(times["upstream"], times["plain"]),
        "distilled / upstream": ratio(times["distilled"], times["upstream"]),
    }
    return {"median_ms": medians(times), "ratios": ratios}


if __name__ == "__main__":
    main(sys.argv[1:])
