# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What does training take in memory? speed.py asks this, with a process of this script for each kind of training.

Usage:
    python benchmarks/memory.py kind=distilled imgsz=32 batch=64

It prints what a few steps take at their peak beyond what the libraries take, in MB.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from ultralytics.models.yolo.classify import ClassificationTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ratio, read_settings
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
    **{k: STEP_SETTINGS[k] for k in ("model", "teacher_model", "device")},
    "amp": True,
    "imgsz": 32,
    "batch": 64,
    "kind": "plain",
}
WARM = {**KINDS["cached response"], "teacher_cache": "disk"}  # that an earlier process has filled
MEMORY_KINDS = (
    *("plain", "distilled", "sequential", "response", "sequential response", "cached response", "warm response"),
)


def main(arguments: list[str]) -> None:
    """Print the peak of this process for one kind of training, with `key=value` arguments."""
    print(peak_memory(*read_settings(arguments, __doc__, SETTINGS)))


def measure_memory(settings: dict[str, Any], given: dict[str, Any], imgsz: int, batch: int) -> dict[str, Any]:
    """Return the peak memory of processes of each kind, MB, and relative to plain ones."""
    if not settings["memory"]:
        return {}
    own = {**{k: v for k, v in settings.items() if k in SETTINGS}, **given, "imgsz": imgsz, "batch": batch}
    peaks: dict[str, list[float]] = {kind: [] for kind in MEMORY_KINDS}
    for _ in range(settings["memory"]):
        for kind, values in peaks.items():
            command = [sys.executable, __file__, *(f"{k}={v}" for k, v in own.items()), f"kind={kind}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            values.append(float(done.stdout.split()[-1]))
    plain = peaks.pop("plain")
    return {
        "plain, MB": statistics.median(plain),
        **{f"{kind} / plain": ratio(values, plain) for kind, values in peaks.items()},
    }


def peak_memory(settings: dict[str, Any], given: dict[str, Any]) -> float:
    """Return what training takes at most in a few steps beyond what the libraries take, in MB."""
    imgsz, batch = settings["imgsz"], settings["batch"]
    with tempfile.TemporaryDirectory() as folder:
        data, names = make_data(Path(folder) / "data", max(2 * batch, 4 * CLASSES), imgsz)
        teacher = make_teacher(settings["teacher_model"], names, Path(folder) / "teacher.pt")
        overrides = make_overrides(settings, data, imgsz, batch, Path(folder))
        kind = WARM if settings["kind"] == "warm response" else KINDS[settings["kind"]]
        if kind is WARM:
            filling = get_context("spawn").Process(target=train, args=(overrides, kind, teacher, given))
            filling.start()
            filling.join()
        run_steps(prepare(make_trainer({**overrides, "batch": 2}, None, teacher)))  # loads the libraries
        gc.collect()
        before = memory_now(reset=True)
        trainer = train(overrides, kind, teacher, given)
        if trainer.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        return (memory_now(peak=True) - before) / 1e3


def train(
    overrides: dict[str, Any], kind: dict[str, Any] | None, teacher: Path, given: dict[str, Any]
) -> ClassificationTrainer:
    """Run a few steps of a kind of training, and return its trainer."""
    trainer = prepare(make_trainer(overrides, kind, teacher, given))
    run_steps(trainer)
    return trainer


def run_steps(trainer: ClassificationTrainer) -> None:
    """Run a few steps on the data."""
    for _ in range(3):
        for inputs in trainer.train_loader:
            step(trainer, inputs, trainer.model)


def memory_now(peak: bool = False, reset: bool = False) -> float:
    """Return the kilobytes of this process that are in memory, or their peak since the last reset, as Linux counts."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back first
        Path("/proc/self/clear_refs").write_text("5")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
    name = "VmHWM" if peak else "VmRSS"
    return float(next(line for line in Path("/proc/self/status").read_text().splitlines() if name in line).split()[1])


if __name__ == "__main__":
    main(sys.argv[1:])
