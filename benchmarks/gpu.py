# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The first minutes on a GPU: one command that says what each kind of training costs there, and what is wrong.

Usage:
    python benchmarks/gpu.py
    python benchmarks/gpu.py device=0 minutes=10 parts=classify,answers output=path/to/gpu.json

It needs no network and no data: images are random, or scenes of scikit-learn's digits. For each kind of training, of a
classifier and of a detector: milliseconds of a step, of the host within it and of the device's kernels, how many these
are, peak memory, and what the host waits for, by file and line. Then whether a teacher that answers beside the student
says the same as alone; whether float16, bfloat16 and float32 learn alike; what `batch=-1` finds; and whether a run that
was stopped goes on. A part that fails is recorded with its error, and those after it run. It stops itself after
`minutes`, with what it has.

Arguments, as key=value: the settings here. It runs on a CPU too, where nothing is said of kernels and waits.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from ultralytics.engine.distillation.compare import machine
from ultralytics.engine.distillation.criterion import LESSON
from ultralytics.engine.distillation.trainer import loop_precision
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.distillation import TRAINERS
from ultralytics.utils.torch_utils import select_device

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, amp_unchecked, read_settings, timed, write_results
from benchmarks.steps import CLASSES, LOGITS, make_data, make_teacher, prepare, step
from distill_train_example import SUFFIXES, write_scenes

SETTINGS = {
    "device": None,
    "minutes": 10,
    "parts": None,  # of PARTS, with commas between; None for all
    "kinds": None,  # of KINDS, likewise
    "student": "yolo11n",
    "teacher": "yolo11s",
    "imgsz": (224, 640),  # of a classifier and of a detector
    "batch": (64, 16),
    "steps": 40,
    "output": str(RESULTS / "gpu.json"),
}
KINDS = {  # of training, by their arguments; plain ones have no teacher
    "plain": {"teacher": None},
    "response": LOGITS,
    "distilled": {},
    "balanced": {"distill_balance": "auto"},
    "compiled": {"teacher_compile": True},
    "graphs": {"teacher_compile": "reduce-overhead"},
    "beside": {"teacher_overlap": True},
    "compiled beside": {"teacher_compile": True, "teacher_overlap": True},
    "graphs beside": {"teacher_compile": "reduce-overhead", "teacher_overlap": True},
    "cached": {"teacher_cache": "ram", "teacher_views": 1, "mosaic": 0.0},
    "plain, SGD": {"teacher": None, "optimizer": "SGD"},
    "SGD": {"optimizer": "SGD"},
    "MuSGD": {"optimizer": "MuSGD"},
}
BESIDE = [kind for kind, given in KINDS.items() if given.get("teacher_overlap")]
COLUMNS = ("step ms", "host ms", "device ms", "kernels", "peak MB", "waits")
WARMUP, PROFILED = 5, 5  # steps


def main(arguments: list[str]) -> None:
    """Measure part after part, with `key=value` arguments, until all are done or the time is over."""
    settings, given = read_settings(arguments, __doc__, SETTINGS)
    if given:
        raise ValueError(f"{sorted(given)} are no settings of this benchmark. It has {sorted(SETTINGS)}.")
    parts, _ = chosen(settings, "parts", PARTS), chosen(settings, "kinds", KINDS)
    report: dict[str, Any] = {"machine": machine(), "setting": settings, "parts": {}}

    def stop() -> None:  # in a thread: what it ends may wait for the device for ever
        report["stopped"] = f"after {settings['minutes']} minutes, in {now[-1]}"
        finish(report, settings["output"])
        os._exit(1)

    now: list[str] = []
    timer = threading.Timer(60 * settings["minutes"], stop)
    timer.daemon = True
    timer.start()
    with tempfile.TemporaryDirectory() as folder, amp_unchecked():
        for part in parts:
            now.append(part)
            try:
                report["parts"][part] = PARTS[part](settings, Path(folder))
            except Exception as e:  # whatever it is, the parts after it are to be seen
                traceback.print_exc()
                report["parts"][part] = {"error": f"{type(e).__name__}: {e}"}
    timer.cancel()
    finish(report, settings["output"])


def chosen(settings: dict[str, Any], name: str, valid: dict[str, Any]) -> list[str]:
    """Return which parts or kinds were asked for.

    Raises:
        ValueError: If there is no such.
    """
    names = [x.strip() for x in str(settings[name]).split(",")] if settings[name] else list(valid)
    if unknown := [x for x in names if x not in valid]:
        raise ValueError(f"'{name}={settings[name]}' has unknown {unknown}. Valid are {list(valid)}.")
    return names


def finish(report: dict[str, Any], output: str) -> None:
    """Write what was measured, and show it."""
    write_results(output, report)
    for part, found in report["parts"].items():
        print(f"\n{part}")
        for name, row in found.items():
            if isinstance(row, dict) and "step ms" in row:
                row = " ".join(f"{column} {row[column]:,.1f}" for column in COLUMNS if column in row)
            print(f"  {name}: {row}")
    print(report.get("stopped", f"\nSaved to {output}"))


def precisions(settings: dict[str, Any]) -> tuple[Any, ...]:
    """Return the values of `amp` that a device has: float32's, that of most measurements, and others."""
    on_cuda = select_device(settings["device"], verbose=False).type == "cuda"
    return (False, "bf16", True) if on_cuda else (False, True)  # which is bfloat16 on a CPU


def begin(settings: dict[str, Any], task: str, folder: Path, given: dict[str, Any]) -> BaseTrainer:
    """Return a trainer of a task in front of its first epoch, on images and with a teacher made once."""
    place = int(task != "classify")
    imgsz, batch = (np.atleast_1d(settings[name])[[0, -1]].tolist()[place] for name in ("imgsz", "batch"))
    home = folder / task
    home.mkdir(exist_ok=True)
    if task == "classify":
        data, names = make_data(home / "images", max(2 * batch, 4 * CLASSES), imgsz)
    else:
        data = write_scenes(home / "scenes", task, train=2 * batch, val=batch, side=imgsz)
        names = [str(c) for c in range(CLASSES)]
    teacher = home / "teacher.pt"
    if not teacher.exists():
        make_teacher(f"{settings['teacher']}{SUFFIXES[task]}.yaml", names, teacher)
    overrides = {
        **{"model": f"{settings['student']}{SUFFIXES[task]}.yaml", "data": str(data), "imgsz": imgsz, "batch": batch},
        **{"device": settings["device"], "amp": precisions(settings)[1], "optimizer": "AdamW", "lr0": 0.001},
        **{"epochs": 10, "teacher_check": False},
        **{"plots": False, "verbose": False, "project": str(home), "workers": 0, "teacher": str(teacher)},
        **given,
    }
    trainer_class = TRAINERS[task]
    if overrides["teacher"] is None:
        overrides = {k: v for k, v in overrides.items() if not k.startswith("teacher")}
        trainer_class = trainer_class.task.plain_trainer
    return trainer_class(overrides=overrides)


def measure_kinds(settings: dict[str, Any], folder: Path, task: str) -> dict[str, Any]:
    """Measure the steps of each kind of training."""
    found = {}
    for kind in chosen(settings, "kinds", KINDS):
        try:
            found[kind] = measure_steps(prepare(begin(settings, task, folder, KINDS[kind])), settings["steps"])
        except Exception as e:  # of one kind
            traceback.print_exc()
            found[kind] = {"error": f"{type(e).__name__}: {e}"}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"{task}, {kind}: {found[kind]}", flush=True)
    return found


def measure_steps(trainer: BaseTrainer, steps: int) -> dict[str, Any]:
    """Measure steps of a trainer on one batch.

    Args:
        trainer (BaseTrainer): In front of its first step.
        steps (int): How many are timed.

    Returns:
        (dict[str, Any]): `COLUMNS`, as far as the device tells, and `waits for`, how often a step waits by file and
            line.
    """
    batch, device = next(iter(trainer.train_loader)), trainer.device

    def run() -> None:
        step(trainer, batch, trainer.model)

    for _ in range(WARMUP):
        run()
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    row: dict[str, Any] = {"step ms": 1000 * statistics.median(timed(run, device) for _ in range(steps))}
    host = []
    for _ in range(steps):  # not waited for, so that the device works while the next is given to it
        start = time.perf_counter()
        run()
        host.append(time.perf_counter() - start)
    row["host ms"] = 1000 * statistics.median(host)
    if not on_cuda:
        return row
    torch.cuda.synchronize(device)
    row["peak MB"] = torch.cuda.max_memory_allocated(device) / 1e6
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            run()
        torch.cuda.synchronize(device)
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    row["device ms"] = sum(event.self_device_time_total for event in kernels) / 1000 / PROFILED
    row["kernels"] = len(kernels) / PROFILED
    row["waits for"] = waits(run)
    row["waits"] = sum(row["waits for"].values())
    return row


def waits(run: Callable[[], None]) -> dict[str, int]:
    """Return how often the host waits for the device in a call, by file and line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(Counter(f"{Path(x.filename).name}:{x.lineno}" for x in caught if "synchron" in str(x.message)))


def compare_answers(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return how far answers beside the student are from those of the teacher alone, over steps that train."""
    found = {}
    for kind in ["distilled", *BESIDE]:
        trainer = prepare(begin(settings, "classify", folder, KINDS[kind]))
        largest, batches = 0.0, list(trainer.train_loader)
        for i in range(settings["steps"]):
            with loop_precision(trainer):
                batch = trainer.preprocess_batch(dict(batches[i % len(batches)]))
                loss, _ = trainer.model(batch | {LESSON: remembered(batch[LESSON], said := [])})
                alone = tree_leaves(trainer.teacher(batch["img"]))
            for a, b in zip(said, alone, strict=True):
                largest = max(largest, float((a.float() - b.float()).abs().max() / b.float().abs().max()))
            trainer.scaler.scale(loss.sum()).backward()
            trainer.optimizer_step()
        found[kind] = {"largest relative difference": largest}
    return found


def remembered(lesson: Any, said: list[torch.Tensor]) -> Any:
    """Return a lesson whose answer, when the criterion takes it, is copied into a list."""
    ask = lesson.answer

    def answer() -> Any:
        given = ask()
        said.extend(x.clone() for x in tree_leaves(given))
        return given

    lesson.answer = answer
    return lesson


def compare_precisions(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return by how much the losses of short trainings in half precision differ from those in float32."""
    curves = {}
    for amp in precisions(settings):
        trainer = begin(settings, "classify", folder, {"amp": amp, "epochs": 3, "seed": 1})
        trainer.train()
        rows = trainer.read_results_csv()
        curves[amp] = {k: np.array(v, float) for k, v in rows.items() if k.startswith("train/")}
    return {
        f"amp={amp}": {
            k: float(np.max(np.abs(v - curves[False][k]) / np.abs(curves[False][k]).clip(1e-9)))
            for k, v in curves[amp].items()
        }
        for amp in precisions(settings)[1:]
    }


def find_batch(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the batch that `batch=-1` finds, of plain and of distilled training."""
    found = {}
    for kind in ("plain", "distilled"):
        trainer = begin(settings, "classify", folder, {**KINDS[kind], "batch": -1})
        trainer._setup_train()
        found[kind] = trainer.batch_size
    return found


def resume(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Stop a run after an epoch, let it go on, and return what its epochs say."""

    class Stopped(Exception):
        pass

    def stop(trainer: BaseTrainer) -> None:
        raise Stopped

    trainer = begin(settings, "classify", folder, {"epochs": 3, "name": "stopped"})
    trainer.add_callback("on_model_save", stop)
    with suppress(Stopped):
        trainer.train()
    again = TRAINERS["classify"](overrides={"resume": str(trainer.last)})
    again.train()
    rows = again.read_results_csv()
    return {"began at epoch": again.start_epoch, "epochs": len(rows["epoch"]), "losses": rows["train/loss"]}


PARTS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "classify": lambda settings, folder: measure_kinds(settings, folder, "classify"),
    "answers": compare_answers,
    "detect": lambda settings, folder: measure_kinds(settings, folder, "detect"),
    "precisions": compare_precisions,
    "batch": find_batch,
    "resume": resume,
}


if __name__ == "__main__":
    main(sys.argv[1:])
