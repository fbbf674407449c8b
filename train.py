# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Train an Ultralytics model of any task, with or without a teacher: `yolo-distill` with settings of your own.

The settings are those below. What the command line gives stands above them.

Usage:
    python train.py model=yolo11n-cls.yaml teacher=path/to/best.pt data=path/to/dataset epochs=50
    python train.py use_distillation=False model=yolo11n-cls.yaml data=path/to/dataset epochs=50
    python train.py resume=path/to/last.pt
    python train.py model=yolo11n.yaml teacher=path/to/detector.pt data=path/to/dataset.yaml epochs=100
    python train.py    # the digits and the teacher that distill_train_example.py has made

    python train.py check|compare|probe|report|methods ...    # as yolo-distill does

Arguments are key=value, as for the `yolo` command: every Ultralytics training argument, `use_distillation`, and the
arguments of distillation. `python train.py --help` lists these with their defaults.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ultralytics.models.distillation import find_trainer
from ultralytics.models.distillation.command import COMMANDS, help_text, read_command
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.utils import SETTINGS

MODEL = "yolo11n-cls.yaml"
TRAINING = {  # used unless `data` is given on the command line, with the example's newest teacher
    "data": str(Path(SETTINGS["datasets_dir"]) / "digits"),
    "epochs": 10,
    "imgsz": 32,
    "batch": 64,
    "fliplr": 0.0,
}


def example_teacher() -> str | None:
    """Return the newest teacher of a finished run of distill_train_example.py, or None."""
    plots = Path(SETTINGS["runs_dir"]).glob("classify/distill_example*/comparison.png")  # drawn at a run's end
    teachers = [plot.parent / "teacher" / "weights" / "best.pt" for plot in plots]
    newest = max((t for t in teachers if t.exists()), key=lambda t: t.stat().st_mtime, default=None)
    return newest and str(newest)


def settings_for(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a training: those given, and for the rest those of this file.

    Raises:
        FileNotFoundError: If there is no dataset, and none of the example's.
        ValueError: If there is none for a task that the example's is not of.
    """
    if given.get("resume"):
        return given  # the checkpoint holds the rest
    if "data" in given:
        return {"model": MODEL, **given}
    if find_trainer({"model": MODEL, **given}) is not DistillationClassificationTrainer:
        raise ValueError("No 'data=' given. Give a dataset of the model's task, e.g. 'data=path/to/dataset.yaml'.")
    settings = {"model": MODEL, "teacher": example_teacher(), **TRAINING, **given}
    if not Path(settings["data"]).is_dir() or settings["teacher"] is None:
        raise FileNotFoundError(
            "No 'data=' given, and the example's digits and teacher are not there. Give 'data=path/to/dataset' and "
            "'teacher=path/to/best.pt', or run 'python distill_train_example.py' once."
        )
    return settings


def main(arguments: list[str]) -> Any:
    """Do what the command line says, `train` if it names no command, and return what that gives."""
    use_distillation = True  # False trains the same student without a teacher

    if {"-h", "--help", "help"} & set(arguments):
        print(help_text(__doc__))
        return None
    named = arguments[:1] and arguments[0] in COMMANDS
    command, given = read_command(arguments if named else ["train", *arguments])
    if command == "train":
        given = {"use_distillation": use_distillation, **given}
    if command not in {"report", "methods"}:
        given = settings_for(given)
    return COMMANDS[command](given)


if __name__ == "__main__":
    main(sys.argv[1:])
