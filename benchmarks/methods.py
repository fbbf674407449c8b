# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Which method teaches best, and at what cost? Every registered method, alone and in combinations.

Usage:
    python benchmarks/methods.py source=path/to/idx/files
    python benchmarks/methods.py source=path/to/idx/files chosen=plain,dkd,mse+rkd seeds=0 repeats=0

Accuracy is measured as by accuracy.py, whose arguments this takes too, but for `variants`; only the losses of the row
are on. The cost is that of a training step relative to one with `kl` alone, the median of `repeats` steps that are
taken in turn.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ultralytics.utils.distillation import methods

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, ratio, read_settings, take_turns, write_results
from benchmarks.paired_runs import RUN_SETTINGS, TRAINING, compare
from benchmarks.steps import make_data, make_overrides, make_teacher, make_trainer, prepare, step

SETTINGS = {
    **RUN_SETTINGS,
    "output": str(RESULTS / "methods.json"),
    "repeats": 20,  # timed steps of each row; 0 for none
    "chosen": None,  # rows, separated by commas; every method by default
}


def main(arguments: list[str]) -> None:
    """Run the benchmark with `key=value` arguments."""
    settings, given = read_settings(arguments, __doc__, SETTINGS)
    repeats, chosen = settings.pop("repeats"), settings.pop("chosen")
    every = ["plain", *methods("response_method"), *feature_names(), "kl+mse+attention"]
    names = chosen.split(",") if chosen else every
    report = compare(settings, given, {name: arguments_of(name) for name in names})
    if repeats:
        report["step / kl step"] = {**report.get("step / kl step", {}), **costs(names, repeats)}
        write_results(settings["output"], report)
        print("\n".join(f"{name}: {cost:.3f}" for name, cost in report["step / kl step"].items()))


def feature_names() -> list[str]:
    """Return the feature methods, the one that shares its name with a response method told apart."""
    return [f"feature-{name}" if name in methods("response_method") else name for name in methods("feature_method")]


def arguments_of(name: str) -> dict[str, Any] | None:
    """Return the distillation arguments of methods joined by +, None for plain training."""
    if name == "plain":
        return None
    responses, features = {}, {}
    for part in name.split("+"):
        if part in methods("response_method") and not (part == "mse" and "+" in name):
            responses[part] = 1.0
        else:
            features[part.removeprefix("feature-")] = 1.0
    return {
        "response_distill": bool(responses),
        "feature_distill": bool(features),
        "attention_distill": False,
        **({"response_method": responses} if responses else {}),
        **({"feature_method": features} if features else {}),
    }


def costs(names: list[str], repeats: int, imgsz: int = 32, batch: int = 64) -> dict[str, float]:
    """Return the time of a step with each method, relative to one with `kl`."""
    with tempfile.TemporaryDirectory() as folder:
        data, classes = make_data(Path(folder) / "data", 2 * batch, imgsz)
        settings = {"model": TRAINING["model"], "device": None, "amp": True}
        overrides = make_overrides(settings, data, imgsz, batch, Path(folder))
        teacher = make_teacher(SETTINGS["teacher_model"], classes, Path(folder) / "teacher.pt")
        inputs = {"img": torch.rand(batch, 3, imgsz, imgsz), "cls": torch.arange(batch) % len(classes)}
        runs = {}
        for name in dict.fromkeys(["kl", *names]):
            if (own := arguments_of(name)) is not None:
                trainer = prepare(make_trainer(overrides, own, teacher))
                runs[name] = partial(step, trainer, inputs, trainer.model)
        times = take_turns(runs, repeats, trainer.device, warmup=3)
    return {name: ratio(values, times["kl"])["median"] for name, values in times.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
