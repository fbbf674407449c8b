# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What does a teacher cost? Steps, whole epochs and memory of distilled training against plain training.

Usage:
    python benchmarks/speed.py
    python benchmarks/speed.py imgsz=224 batch=16 repeats=30 model=yolo11n-cls.yaml teacher_model=yolo11l-cls.yaml

Every step is one of the real trainer: forward, losses, backward, clipping, optimizer, EMA and a look at the loss. They
are timed in turn in one process, so that what else the machine does falls on all of them; medians and their ratios
are reported. Epochs are the trainer's own, with its data loader; memory is that of a process for each kind of training.
timm's and torchdistill's steps are of the same two networks, as they are loaded, with the same optimizer and EMA, where
these packages are installed.
`pairs`, e.g. `s>n,x>l`, are sizes of networks, teacher>student, that are measured too, and plotted beside the output.
A sweep is lists of `imgsz` and `batch`, e.g. `imgsz=32,64 batch=256,16 kinds=plain,distilled epochs=0 memory=0`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.engine.distillation.compare import machine
from ultralytics.engine.distillation.trainer import loop_precision
from ultralytics.nn.distillation.classifier import ClassificationTeacher
from ultralytics.utils.torch_utils import select_device

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, medians, ratio, read_settings, table, take_turns, write_results
from benchmarks.memory import measure_memory
from benchmarks.peers import PEERS
from benchmarks.steps import (
    CLASSES,
    KINDS,
    STEP_SETTINGS,
    make_data,
    make_overrides,
    make_teacher,
    make_trainer,
    prepare,
    step,
)

SETTINGS = {
    **STEP_SETTINGS,
    "images": (6000, 320),  # of the epochs, one for each image size
    "data": None,  # image folder of the epochs; None for random images
    "epochs": 2,  # of each kind, in turn; 0 for none
    "memory": 3,  # processes of each kind, in turn; 0 for none
    "kinds": None,  # of steps; None for all
    "threads": None,  # of steps on a CPU; None for upstream's
    "pairs": None,  # teacher>student,... by their size of yolo11, at the first image size
    "amp": True,
    "output": str(RESULTS / "speed.json"),
}
EPOCH_KINDS = ("plain", "distilled", "sequential", "response", "cached", "cached response")
RATIOS = (
    # With the sum of its parts
    *((kind, ("plain", "teacher")) for kind in ("distilled", "sequential", "compiled", "overlapped")),
    ("distilled", ("plain",)),
    ("sequential", ("plain",)),
    ("response", ("plain",)),
    ("sequential response", ("plain",)),
    ("cached", ("plain",)),
    ("cached response", ("plain",)),
    ("timm", ("response",)),
    ("torchdistill", ("response",)),
)


def main(arguments: list[str]) -> None:
    """Run the benchmark with `key=value` arguments."""
    settings, given = read_settings(arguments, __doc__, SETTINGS)
    output = Path(settings.pop("output"))
    per_size = [np.atleast_1d(settings[k]).tolist() for k in ("imgsz", "batch", "images")]
    if not settings["epochs"]:
        per_size[2] = [0] * len(per_size[0])
    if len(per_size[0]) > 1 and len({len(values) for values in per_size}) > 1:
        raise ValueError(
            "'imgsz', 'batch' and 'images' need one value for each image size, as many of one as of another."
        )
    sizes = list(zip(*per_size, strict=False))  # of one size, the first of each
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for imgsz, batch, images in sizes:
            place = Path(folder) / f"{imgsz}_{batch}"
            own = {**settings, "images": images}
            row = {"imgsz": imgsz, "batch": batch, **measure_steps(own, given, imgsz, batch, place, kinds_of(own))}
            row["epochs"] = measure_epochs(own, given, imgsz, batch, place / "epochs")
            row["memory"] = measure_memory(own, given, imgsz, batch)
            results.append(row)
        pairs = measure_pairs(settings, given, *sizes[0][:2], Path(folder) / "pairs")
    print("".join(f"\n{table(results, what)}\n" for what in ("steps", "epochs", "memory") if results[0][what]))
    settings["data"] = settings["data"] and Path(settings["data"]).name
    report = {"machine": machine(), "setting": {**settings, **given}, "results": results, "pairs": pairs}
    if pairs:
        print(f"\n{table(pairs, 'steps')}")
        plot(pairs, output.with_suffix(".png"))
    write_results(output, report)
    print(f"Saved to {output}")


def kinds_of(settings: dict[str, Any]) -> list[str]:
    """Return the kinds of steps to measure, plain ones first."""
    on_cuda = select_device(settings["device"], verbose=False).type == "cuda"
    valid = [kind for kind in KINDS if on_cuda or kind != "overlapped"]
    chosen = str(settings["kinds"]).split(",") if settings["kinds"] else valid
    if unknown := [kind for kind in chosen if kind not in valid]:
        raise ValueError(f"'kinds={settings['kinds']}' has unknown {unknown}. Valid kinds are {valid}.")
    return list(dict.fromkeys(["plain", *chosen]))


def measure_steps(
    settings: dict[str, Any],
    given: dict[str, Any],
    imgsz: int,
    batch: int,
    folder: Path,
    kinds: Iterable[str],
) -> dict[str, Any]:
    """Time steps of every kind in turn, and return their medians and the ratios of these."""
    data, names = make_data(folder / "data", max(2 * batch, 4 * CLASSES), imgsz)
    overrides = make_overrides(settings, data, imgsz, batch, folder)
    teacher_file = make_teacher(settings["teacher_model"], names, folder / "teacher.pt")
    trainers = {kind: prepare(make_trainer(overrides, KINDS[kind], teacher_file, given)) for kind in kinds}
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])  # only now, as each trainer sets upstream's
    plain = trainers["plain"]
    bare = ClassificationTeacher(teacher_file)
    bare.vet(imgsz, 3)  # by which it knows the size of its images, and so its memory format: as the trainer runs it
    bare.to(plain.device)
    x = torch.rand(batch, 3, imgsz, imgsz)
    inputs = {
        "img": x,
        "cls": torch.arange(batch) % CLASSES,
        "index": torch.arange(batch),
        "view": torch.zeros(batch).long(),
    }
    inputs = {k: v.to(plain.device) if k in {"img", "cls"} else v for k, v in inputs.items()}

    def forward() -> None:
        with loop_precision(plain):
            bare(inputs["img"])

    runs = {"teacher": forward}
    for kind, trainer in trainers.items():
        runs[kind] = partial(step, trainer, inputs, trainer.model)
    if "response" in trainers:  # whose work they do
        runs |= peer_steps(overrides, teacher_file, inputs)
    times = take_turns(runs, settings["repeats"], plain.device, settings["warmup"])
    ratios = {}
    for over, under in RATIOS:
        if {over, *under} <= runs.keys():
            name = f"{over} / ({' + '.join(under)})" if len(under) > 1 else f"{over} / {under[0]}"
            ratios[name] = ratio(times[over], *(times[k] for k in under))
    return {"median_ms": medians(times), "steps": ratios}


def peer_steps(
    overrides: dict[str, Any], teacher_file: Path, inputs: dict[str, torch.Tensor]
) -> dict[str, Callable[[], None]]:
    """Return a step with the loss of each other library that is installed."""
    runs = {}
    for name, make_loss in PEERS.items():
        trainer = prepare(make_trainer(overrides, None, teacher_file))
        try:
            teacher = YOLO(teacher_file).model.requires_grad_(False)  # as a user of theirs has it, not fused
            loss = make_loss(trainer.model, teacher.to(trainer.device))
        except ImportError as e:
            print(f"{name} is not measured: {e}")
            continue
        runs[name] = partial(step, trainer, inputs, loss)
    return runs


def measure_pairs(
    settings: dict[str, Any], given: dict[str, Any], imgsz: int, batch: int, folder: Path
) -> list[dict[str, Any]]:
    """Time the steps of networks of many sizes."""
    rows = []
    for pair in settings["pairs"].split(",") if settings["pairs"] else ():
        teacher, student = (f"yolo11{size}-cls.yaml" for size in pair.split(">"))
        names = {"teacher_model": teacher, "model": student}
        place = folder / pair.replace(">", "_")
        row = {"teacher": teacher, "student": student, "imgsz": imgsz, "batch": batch}
        row |= measure_steps({**settings, **names}, given, imgsz, batch, place, ("plain", "distilled"))
        row["parameters"] = sum(p.numel() for p in ClassificationTeacher(place / "teacher.pt").model.parameters())
        rows.append(row)
    return rows


def plot(pairs: list[dict[str, Any]], file: Path) -> None:
    """Draw the cost of a distilled step against the teacher's size, a line for each student."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for student in dict.fromkeys(row["student"] for row in pairs):
        rows = sorted((r for r in pairs if r["student"] == student), key=lambda r: r["parameters"])
        sizes = [r["parameters"] / 1e6 for r in rows]
        axes.plot(sizes, [r["steps"]["distilled / plain"]["median"] for r in rows], "o-", label=Path(student).stem)
    axes.set(xlabel="teacher's parameters, million", ylabel="distilled step / plain step", ylim=(0, None))
    axes.legend(title="student")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def measure_epochs(
    settings: dict[str, Any], given: dict[str, Any], imgsz: int, batch: int, folder: Path
) -> dict[str, Any]:
    """Return whole epochs of each kind relative to plain ones: loader, training, saving, validation."""
    if not settings["epochs"]:
        return {}
    if settings["data"]:
        data = Path(settings["data"])
        names = sorted(x.name for x in (data / "train").iterdir() if x.is_dir())
        folder.mkdir(parents=True)
    else:
        data, names = make_data(folder / "data", settings["images"], imgsz)
    teacher = make_teacher(settings["teacher_model"], names, folder / "teacher.pt")
    overrides = make_overrides(settings, data, imgsz, batch, folder)
    seconds: dict[str, list[float]] = {kind: [] for kind in EPOCH_KINDS}
    for _ in range(settings["epochs"]):  # in turn; of each run the second epoch, when a cache of one view is warm
        for kind in EPOCH_KINDS:
            trainer, ends = make_trainer({**overrides, "epochs": 2}, KINDS[kind], teacher, given), []
            trainer.add_callback("on_fit_epoch_end", lambda trainer, ends=ends: ends.append(time.perf_counter()))
            trainer.train()
            seconds[kind].append(ends[1] - ends[0])
    return {f"{kind} / plain": ratio(seconds[kind], seconds["plain"]) for kind in EPOCH_KINDS[1:]}


if __name__ == "__main__":
    main(sys.argv[1:])
