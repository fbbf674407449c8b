# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What makes a teacher's answer faster? Memory format, precision, compiler and pieces against the network as it is.

Usage:
    python benchmarks/teacher.py
    python benchmarks/teacher.py device=0 imgsz=224 batch=256 teacher_model=yolo11l-cls.yaml output=teacher_gpu.json

The forward pass with its three feature maps, fused and without gradients, each time after a student's forward and
backward pass, as in training, which leaves nothing of it in the processor's caches. Variants are timed in turn in one
process; reported are the medians and quartiles of their ratios to `eager`.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.engine.distillation.compare import machine
from ultralytics.nn.distillation.classifier import ClassificationTeacher
from ultralytics.nn.distillation.taps import match_levels
from ultralytics.utils.torch_utils import select_device

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, medians, ratio, read_settings, table, take_turns, write_results
from benchmarks.steps import CLASSES, STEP_SETTINGS, make_teacher

SETTINGS = {
    **STEP_SETTINGS,
    "variants": "eager,channels_last,bf16,compile,whole",
    "output": str(RESULTS / "teacher.json"),
}


def main(arguments: list[str]) -> None:
    """Run the benchmark with `key=value` arguments."""
    settings, given = read_settings(arguments, __doc__, SETTINGS)
    output = settings.pop("output")
    sizes = zip(*(np.atleast_1d(settings[k]).tolist() for k in ("imgsz", "batch")), strict=False)
    results = [{"imgsz": imgsz, "batch": batch, **measure(settings, imgsz, batch)} for imgsz, batch in sizes]
    print(f"\n{table(results, 'forward')}")
    write_results(output, {"machine": machine(), "setting": {**settings, **given}, "results": results})
    print(f"Saved to {output}")


def measure(settings: dict[str, Any], imgsz: int, batch: int) -> dict[str, Any]:
    """Time the variants in turn, and return the ratios of each to the first."""
    device = select_device(settings["device"], verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        names = [str(c) for c in range(CLASSES)]
        teacher = ClassificationTeacher(make_teacher(settings["teacher_model"], names, Path(folder) / "teacher.pt"))
    levels = teacher.find_levels(imgsz, 3)
    teacher.levels = [level for _, level in match_levels(levels, levels)]
    images = torch.rand(batch, 3, imgsz, imgsz, device=device)
    runs = {name: variant(name, teacher, device, images) for name in settings["variants"].split(",")}
    student = YOLO(settings["model"]).model.to(device).train()
    times = take_turns(
        runs, settings["repeats"], device, settings["warmup"], before=lambda: student(images).sum().backward()
    )
    first = next(iter(times.values()))
    forward = {name: ratio(values, first) for name, values in times.items()}
    return {"median_ms": medians(times), "forward": forward}


def variant(name: str, teacher: ClassificationTeacher, device: torch.device, images: torch.Tensor) -> Callable[[], Any]:
    """Return what answers the images in one of the ways."""
    teacher = copy.deepcopy(teacher).to(device)
    if name == "channels_last":
        teacher.model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    elif name == "compile":
        teacher.compile(True, images.shape)
    elif name == "whole":  # batches of any size at once
        teacher.pixels_at_once = math.inf
    elif name not in {"eager", "bf16"}:
        raise ValueError(f"'variants={name}' is an invalid value. Valid variants are {SETTINGS['variants']}.")

    def answer() -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16"):
            return teacher(images)

    return answer


if __name__ == "__main__":
    main(sys.argv[1:])
