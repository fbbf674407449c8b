# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What `yolo-distill` does: train, compare, fit heads, check and report from a command line, as `yolo` does.

Usage:
    yolo-distill train model=yolo11n-cls.yaml teacher=path/to/best.pt data=path/to/dataset epochs=50
    yolo-distill train use_distillation=False model=yolo11n-cls.yaml data=path/to/dataset epochs=50
    yolo-distill train resume=path/to/last.pt
    yolo-distill check model=yolo11n.yaml teacher=path/to/detector.pt data=path/to/scenes.yaml
    yolo-distill compare seeds=3 model=yolo11n-cls.yaml teacher=path/to/best.pt data=path/to/dataset epochs=50
    yolo-distill compare model=[path/to/best.pt, path/to/best.onnx] data=path/to/dataset
    yolo-distill probe teacher=timm:NAME data=path/to/dataset
    yolo-distill report run=path/to/run baseline=path/to/plain_run
    yolo-distill methods
    yolo-distill help

Commands:
    train    train a student with its teacher, or without one, `use_distillation=False`
    check    all that comes before the first epoch and a few steps, in a folder that is thrown away
    compare  the same student with and without its teacher, seed by seed; or trained and exported files as they are
    probe    fit a network that knows other classes a head for the dataset's
    report   write the report of a run again, also against a plain run that was trained later
    methods  what compares classes and feature maps, by name

The task is that of `model`. Arguments are key=value, as for `yolo`: every training argument of Ultralytics, and those
of distillation. An error is one sentence; `verbose=True` shows where it comes from.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from ultralytics.cfg import CLI_HELP_MSG
from ultralytics.cfg.distillation import DistillationArgs, parse_arguments, read_strings
from ultralytics.engine.distillation.check import check
from ultralytics.engine.distillation.compare import compare, compare_files
from ultralytics.engine.distillation.report_again import report_again
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.distillation import TRAINERS, find_trainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.utils import LOGGER, YAML
from ultralytics.utils.distillation import methods
from ultralytics.utils.patches import torch_load

__all__ = ("COMMANDS", "check_cuda", "help_text", "main", "read_command", "run")


def read_command(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the command of a command line, and its settings.

    Args:
        arguments (Sequence[str]): A command and `key=value`, without the program's name.

    Raises:
        SyntaxError: If the command is none, or an argument is no `key=value`.
        TypeError: If a switch is not given True or False.
    """
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        return "help", {}
    command, *rest = arguments
    if command not in COMMANDS:
        raise SyntaxError(f"'{command}' is no command. Give one of {list(COMMANDS)}, e.g. 'yolo-distill train'.")
    return command, parse_arguments(rest, {"use_distillation": True, "run": ""})


def run(arguments: Sequence[str]) -> Any:
    """Do what a command line says, and return what its command gives."""
    command, settings = read_command(arguments)
    return COMMANDS[command](settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, as a program: an error is a sentence.

    Args:
        arguments (Sequence[str], optional): In place of the command line's.

    Returns:
        (int): The exit status: 0, 1 after an error, 2 where the command line is none, 130 when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    LOGGER.addFilter(_is_no_manual)
    try:
        run(arguments)
    except KeyboardInterrupt:
        LOGGER.error("Interrupted. A training goes on with 'yolo-distill train resume=path/to/last.pt'.")
        return 130
    except BrokenPipeError:  # what reads the output has seen enough of it, e.g. `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as e:  # whatever it is, the user is told of it in words
        if "verbose=True" in arguments or "verbose" in arguments:
            traceback.print_exc()
        told = isinstance(e, (TypeError, ValueError, SyntaxError, OSError, ImportError, RuntimeError)) and str(e)
        said = " ".join(str(e).split())
        LOGGER.error(said if told else f"{type(e).__name__}: {e}. 'verbose=True' shows where it comes from.")
        return 2 if isinstance(e, SyntaxError) else 1
    finally:
        LOGGER.removeFilter(_is_no_manual)
    return 0


def _is_no_manual(record: logging.LogRecord) -> bool:
    """Tell what is logged from the manual of `yolo`, which upstream logs before it refuses an argument."""
    return record.msg is not CLI_HELP_MSG


def check_cuda() -> bool:
    """Log what the training will run on, and return whether it is a CUDA device."""
    if torch.cuda.is_available():
        LOGGER.info(f"CUDA is available: {torch.cuda.device_count()} x {torch.cuda.get_device_name()}.")
        return True
    LOGGER.info("CUDA is not available: training runs on the CPU, which is slow for large images and datasets.")
    return False


def _train(settings: dict[str, Any]) -> BaseTrainer:
    """Train the student with its teacher, or without, and return its trainer."""
    distils = settings.pop("use_distillation", True)
    trainer_class = find_trainer(_complete(settings))
    last = settings.get("resume")
    if not distils and isinstance(last, str) and "teacher" in torch_load(last, map_location="cpu")["train_args"]:
        raise ValueError(f"'resume={last}' is of a run with a teacher. Leave 'use_distillation=False' out.")
    check_cuda()
    if distils:
        trainer = trainer_class(overrides=settings)
    else:
        _, training = DistillationArgs.split(settings)  # those of distillation have no effect
        trainer = trainer_class.task.plain_trainer(overrides=training)
    trainer.train()
    return trainer


def _check(settings: dict[str, Any]) -> dict[str, float]:
    """Do what comes before a training, and return what a step of it takes."""
    settings = _without_switch(settings)
    return check(find_trainer(_complete(settings)), settings)


def _compare(settings: dict[str, Any]) -> Any:
    """Compare students with and without a teacher, or files that are there already."""
    settings = _without_switch(settings)
    files = read_strings(settings.get("model"))
    if not isinstance(files, list):
        return compare(find_trainer(_complete(settings)), settings)
    trained = next((file for file in files if Path(file).suffix == ".pt"), None)
    if trained is None and "task" not in settings:
        raise ValueError(f"'model={files}' are exported files alone. Give 'task=' too, one of {list(TRAINERS)}.")
    del settings["model"]
    return compare_files(find_trainer({"model": trained, **settings}), files, settings)


def _probe(settings: dict[str, Any]) -> str | list[str]:
    """Fit the teacher a head for the dataset's classes, and return its file."""
    unused = {"feature_distill": False, "attention_distill": False}  # no student learns here
    given = {"model": "yolo11n-cls.yaml", **_without_switch(settings)}
    own = {"name": "probe", **_complete(given), **unused, "teacher_probe": True}
    teacher = DistillationClassificationTrainer(overrides=own).probe()
    LOGGER.info(f"To be given as 'teacher={teacher}'")
    return teacher


def _report(settings: dict[str, Any]) -> Path:
    """Write the report of a run again, and return its page."""
    settings = _without_switch(settings)
    folder = settings.pop("run", None)
    if folder is None:
        raise ValueError("No 'run=' given. Give the folder of a distilled run, e.g. 'run=runs/classify/train'.")
    folder = Path(str(folder))
    if not (folder / "args.yaml").is_file():
        raise FileNotFoundError(f"'run={folder}' is not a run's folder, as it has no 'args.yaml'. Give one.")
    return report_again(find_trainer(YAML.load(folder / "args.yaml")), folder, settings)


def _methods(settings: dict[str, Any]) -> None:
    """Print every method with its weight, its hyper-parameters and what it compares."""
    for argument in ("response_method", "feature_method"):
        print(f"\n{argument}=")
        for method in methods(argument).values():
            own = ", ".join(f"{k}={v}" for k, v in {"weight": method.weight, **method.defaults}.items())
            what = (method.function.__doc__ or "").strip().partition("\n")[0]
            print(f"    {method.name:<10} {what}\n{'':<15}{own}; of {method.of if 'resp' in argument else 'maps'}")


def help_text(about: str | None = __doc__) -> str:
    """Return what a program says of itself, and every argument of distillation with its default."""
    rows = (f"    {f.name}={f.default}: {f.metadata['meaning']}" for f in fields(DistillationArgs))
    return "\n".join((str(about), "Arguments of distillation, with the defaults of classifiers:", *rows))


def _without_switch(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings for a command that has a teacher in any case.

    Raises:
        ValueError: If it is to have none.
    """
    if settings.get("use_distillation") is False:
        raise ValueError("'use_distillation=False' is for 'train' alone. Leave it out.")
    return {k: v for k, v in settings.items() if k != "use_distillation"}


def _complete(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings if a training can begin with them.

    Raises:
        ValueError: If there is no student or no dataset.
    """
    for name, example in (("model", "yolo11n-cls.yaml"), ("data", "path/to/dataset")):
        if not settings.get("resume") and settings.get(name) is None:
            raise ValueError(f"No '{name}=' given. Give one, e.g. '{name}={example}'.")
    return settings


COMMANDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "train": _train,
    "check": _check,
    "compare": _compare,
    "probe": _probe,
    "report": _report,
    "methods": _methods,
    "help": lambda settings: print(help_text()),
}
