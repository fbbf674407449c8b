# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What does a teacher cost? The distilled step against the plain step plus the bare fused teacher forward.

Usage:
    python benchmarks/speed.py
    python benchmarks/speed.py imgsz=224 batch=16 repeats=30 model=yolo11n-cls.yaml teacher_model=yolo11l-cls.yaml

Every step is one of the real trainer: forward, losses, backward, clipping, optimizer and EMA. The three are timed in
turn in one process, so that what else the machine does falls on all of them; medians and their ratio are reported.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.cfg.distillation import parse_arguments
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.teacher import Teacher

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distill_train_example import machine, write_image_folder

SETTINGS = {
    "imgsz": (32, 224),
    "batch": (64, 16),  # one for each image size
    "repeats": 40,
    "warmup": 5,
    "model": "yolo11n-cls.yaml",
    "teacher_model": "yolo11s-cls.yaml",
    "device": None,
    "amp": True,
}
CLASSES = 10


def main(arguments: list[str]) -> None:
    """Run the benchmark with `key=value` arguments."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    given = parse_arguments(arguments)
    output = Path(given.pop("output", Path(__file__).with_name("speed.json")))
    settings = {k: given.pop(k, v) for k, v in SETTINGS.items()}
    sizes = list(zip(np.atleast_1d(settings["imgsz"]).tolist(), np.atleast_1d(settings["batch"]).tolist(), strict=True))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for imgsz, batch in sizes:
            results.append(measure(settings, given, imgsz, batch, Path(folder) / str(imgsz)))
    lines = ["| image, px | batch | plain, ms | teacher, ms | distilled, ms | distilled / (plain + teacher) | IQR |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in results:
        times = " | ".join(f"{r['median_ms'][name]:.1f}" for name in ("plain", "teacher", "distilled"))
        low, high = r["ratio_quartiles"]
        lines.append(f"| {r['imgsz']} | {r['batch']} | {times} | {r['ratio']:.3f} | {low:.3f} to {high:.3f} |")
    print("\n".join(lines))
    report = {"machine": machine(), "setting": {**settings, **given}, "results": results}
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Saved to {output}")


def measure(settings: dict[str, Any], given: dict[str, Any], imgsz: int, batch: int, folder: Path) -> dict[str, Any]:
    """Time the three steps at one size, in turn, and return medians in ms and the ratio over the repeats."""
    images = np.random.default_rng(0).integers(0, 256, (4 * CLASSES, imgsz, imgsz, 3), dtype=np.uint8)
    labels = np.arange(len(images)) % CLASSES
    names = [str(c) for c in range(CLASSES)]
    data = write_image_folder(folder / "data", {"train": (images, labels), "val": (images, labels)}, names)
    overrides = {
        **{k: settings[k] for k in ("model", "device", "amp")},
        **{"data": str(data), "imgsz": imgsz, "batch": batch, "optimizer": "AdamW", "plots": False},
        **{"project": str(folder), "verbose": False, "epochs": 10},
    }
    teacher_file = make_teacher(settings["teacher_model"], names, folder / "teacher.pt")
    plain = ClassificationTrainer(overrides=overrides)
    distilled = DistillationClassificationTrainer(overrides={**overrides, "teacher": str(teacher_file), **given})
    for trainer in (plain, distilled):
        trainer._setup_train()
        trainer.epoch = 0
        trainer._model_train()
    bare = Teacher(teacher_file).to(plain.device)
    x = torch.rand(batch, 3, imgsz, imgsz)
    inputs = plain.preprocess_batch({"img": x, "cls": torch.arange(batch) % CLASSES})

    def forward() -> None:
        with torch.autocast(plain.device.type, enabled=plain.amp):
            bare(inputs["img"])

    steps = {"plain": lambda: step(plain, inputs), "teacher": forward, "distilled": lambda: step(distilled, inputs)}
    for _ in range(settings["warmup"]):
        for run in steps.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(settings["repeats"]):
        for name, run in steps.items():
            times[name].append(timed(run, plain.device))
    ratios = [d / (p + t) for p, t, d in zip(*times.values(), strict=True)]
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    return {
        "imgsz": imgsz,
        "batch": batch,
        "median_ms": medians,
        "ratio": medians["distilled"] / (medians["plain"] + medians["teacher"]),
        "ratio_quartiles": [float(q) for q in np.quantile(ratios, (0.25, 0.75))],
        "distilled_over_plain": medians["distilled"] / medians["plain"],
    }


def make_teacher(name: str, names: list[str], file: Path) -> Path:
    """Save a network that counts as trained: its BatchNorm layers have seen a batch. Weights do not change the time."""
    model = YOLO(name)
    model.model = type(model.model)(model.model.yaml, nc=len(names), verbose=False)
    model.model.names = dict(enumerate(names))
    model.model.train()(torch.rand(4, 3, 64, 64))
    model.save(file)
    return file


def step(trainer: ClassificationTrainer, batch: dict[str, torch.Tensor]) -> None:
    """Run one training step as upstream's loop does."""
    with torch.autocast(trainer.device.type, enabled=trainer.amp):
        loss, trainer.loss_items = trainer.model(trainer.preprocess_batch(dict(batch)))
    trainer.scaler.scale(loss.sum()).backward()
    trainer.optimizer_step()


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Return the seconds that a call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1:])
