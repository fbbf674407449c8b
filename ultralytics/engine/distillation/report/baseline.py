# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Plain runs that a distilled one can be compared with."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from ultralytics.engine.distillation.run_files import UNREADABLE, absolute
from ultralytics.engine.distillation.task import DistillationTask
from ultralytics.utils import DEFAULT_CFG_DICT, YAML
from ultralytics.utils.patches import torch_load

__all__ = ("check_baseline", "find_baseline", "read_curve", "unlike_arguments")

FREE = {  # what two runs may differ in and still be compared, besides what their task's trainer ignores
    *("name", "project", "save_dir", "exist_ok", "resume"),
    *("plots", "verbose", "save", "save_period", "workers", "device", "profile"),
}


def check_baseline(folder: str | Path, names: Sequence[str], imgsz: int, task: DistillationTask) -> None:
    """Refuse what is not the folder of a finished plain run that a run can be compared with.

    Args:
        folder (str | Path): The plain run's folder.
        names (Sequence[str]): The class names that it must have.
        imgsz (int): The side of the images that it must have been trained at.
        task (DistillationTask): The runs' task.

    Raises:
        FileNotFoundError: If the folder is not one of a run.
        ValueError: If the run is not finished, had a teacher, or has other classes or images.
    """
    folder = Path(folder)
    best, arguments = folder / "weights" / "best.pt", folder / "args.yaml"
    if not (best.exists() and arguments.exists() and (folder / "results.csv").exists()):
        raise FileNotFoundError(
            f"'baseline={folder}' is not a run's folder: it lacks 'args.yaml', 'results.csv' or 'weights/best.pt'. "
            f"Give one that 'use_distillation=False' has trained, e.g. 'baseline=runs/{task.name}/train'."
        )
    arguments = YAML.load(arguments)
    try:
        ckpt = torch_load(best, map_location="cpu")
    except UNREADABLE as e:
        raise ValueError(f"'baseline={folder}' has a 'weights/best.pt' that cannot be read: {e}") from e
    model = ckpt.get("model") or ckpt.get("ema")
    faults = {
        f"is of no {task.teacher_class.expected.noun} network": not isinstance(model, task.network_class),
        f"is of the task '{arguments.get('task')}'": arguments.get("task") not in {None, task.name},
        "was trained with a teacher": "teacher" in arguments,
        "is not finished": ckpt.get("epoch") != -1,
        "has other classes": list(getattr(model, "names", {}).values()) != list(names),
        f"was trained at imgsz={arguments.get('imgsz')}, not {imgsz}": arguments.get("imgsz") != imgsz,
    }
    if fault := next((fault for fault, found in faults.items() if found), None):
        raise ValueError(
            f"'baseline={folder}' {fault}. Give a run that 'use_distillation=False' has trained on the same data."
        )


def read_curve(run: Path, column: str) -> list[float]:
    """Return a figure of each epoch of a run from its column of results.csv; NaN where it was not measured."""
    with (run / "results.csv").open(encoding="utf-8") as file:
        curve = [float(row[column]) for row in csv.DictReader(file, skipinitialspace=True)]
    if YAML.load(run / "args.yaml").get("val") is False:
        curve[:-1] = [math.nan] * (len(curve) - 1)
    return curve


def find_baseline(run: Path, names: Sequence[str], imgsz: int, task: DistillationTask) -> Path | None:
    """Return the newest plain run beside a run that was trained with the same arguments, seed included, or None."""
    own = _plain_arguments(YAML.load(run / "args.yaml"), task)
    for best in sorted(run.parent.glob("*/weights/best.pt"), key=lambda file: file.stat().st_mtime, reverse=True):
        folder = best.parents[1]
        with suppress(OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):  # unreadable ones
            if _plain_arguments(YAML.load(folder / "args.yaml"), task) == own:
                check_baseline(folder, names, imgsz, task)
                return folder
    return None


def unlike_arguments(arguments: Mapping[str, Any], baseline: Path, task: DistillationTask) -> list[str]:
    """Return the names of the arguments in which a plain run differs from another, besides its teacher.

    Args:
        arguments (Mapping[str, Any]): Those of the other run.
        baseline (Path): The plain run's folder.
        task (DistillationTask): The runs' task.
    """
    own, theirs = (_plain_arguments(x, task) for x in (arguments, YAML.load(baseline / "args.yaml")))
    return sorted(k for k in own.keys() | theirs.keys() if str(own.get(k)) != str(theirs.get(k)))


def _plain_arguments(arguments: Mapping[str, Any], task: DistillationTask) -> dict[str, Any]:
    """Return the arguments of a run that decide what plain training makes; upstream keeps `data` as it was given."""
    decisive = DEFAULT_CFG_DICT.keys() - FREE - set(task.ignored)
    return {k: absolute(v) if k == "data" else v for k, v in arguments.items() if k in decisive}
