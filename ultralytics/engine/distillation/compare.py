# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Train the same student with and without a teacher, seed by seed, and say what can be told from it."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from ultralytics import YOLO, __version__
from ultralytics.cfg import get_cfg, get_save_dir
from ultralytics.cfg.distillation import DistillationArgs
from ultralytics.engine.distillation.check import thrown_away
from ultralytics.engine.distillation.plan import Score
from ultralytics.engine.distillation.report.baseline import read_curve
from ultralytics.engine.distillation.report.charts import draw_seeds
from ultralytics.engine.distillation.report.page import COMPARISON, embed, render
from ultralytics.engine.distillation.run_files import UNREADABLE, whole_files
from ultralytics.engine.distillation.trainer import DistillationTrainer
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER, TQDM, IterableSimpleNamespace
from ultralytics.utils.distillation.advice import Verdict
from ultralytics.utils.files import increment_path
from ultralytics.utils.patches import torch_load
from ultralytics.utils.torch_utils import get_cpu_info

__all__ = (
    "compare",
    "compare_files",
    "evaluate",
    "machine",
    "run_name",
    "summarise",
    "table",
    "train_student",
    "train_students",
)

REPORT = "compare.json"


def compare(trainer_class: type[DistillationTrainer], settings: dict[str, Any]) -> Path:
    """Train plain and distilled students with the same seeds, and write a table, a plot and their paired interval.

    A comparison that was interrupted goes on where it stopped when it is started with the same settings.

    Args:
        trainer_class (type[DistillationTrainer]): The task's trainer.
        settings (dict[str, Any]): Training and distillation arguments, and `seeds`, a number of them or a list.

    Returns:
        (Path): The folder of the comparison: `compare.html`, `compare.json`, `compare.md`, `compare.png` and the runs.

    Raises:
        TypeError: If `seeds` is neither a number nor a list of them.
        ValueError: If there are fewer than two seeds, `seed` or `resume` is given, or an argument is out of range.
    """
    settings, task = dict(settings), trainer_class.task
    seeds = _seeds(settings.pop("seeds", 3))
    if given := settings.keys() & {"seed", "resume", "exist_ok", "save_dir"}:
        raise ValueError(f"A comparison has 'seeds=', e.g. 'seeds=3', and goes on by itself: leave out '{min(given)}'.")
    project, name = settings.pop("project", None), settings.pop("name", "compare")
    distillation, training = DistillationArgs.split(settings)
    args = DistillationArgs(**{**task.defaults, **distillation})
    with thrown_away(trainer_class, {**training, **distillation}) as trainer:  # mistakes end here
        teacher_hash = trainer.distillation.teacher_hash
    setting = {"training": training, "distillation": {**distillation, "teacher": str(args.teacher)}}
    if args.teacher != "self":
        setting["teacher_hash"] = teacher_hash
    setting = json.loads(json.dumps(setting, default=str))  # as it is read back
    first = get_save_dir(IterableSimpleNamespace(project=project, name=name, task=task.name, exist_ok=True))
    folder, report = _begun(first, setting) or (Path(increment_path(first, mkdir=True)), {"setting": setting})
    LOGGER.info(f"Comparing {len(seeds)} seeds in {folder}")
    variants = {"plain": None, "distilled": distillation}  # the plain first, as the others' reports compare with it
    training |= {"project": str(folder), "exist_ok": True}
    train_students(trainer_class, variants, training, seeds, report, folder / REPORT)
    words = task.score.words
    verdict = _verdict(report["summary"]["distilled"], words)
    text = f"{table(report['summary'], words)}\n\n{verdict.text}"
    with whole_files(folder) as scratch:
        (scratch / "compare.md").write_text(text + "\n", encoding="utf-8")
        png, picture = embed(draw_seeds(report["curves"], task.score.axis), "score")
        (scratch / "compare.png").write_bytes(png)
        (scratch / "compare.html").write_text(_page(report, verdict, task.score, folder, picture), encoding="utf-8")
    LOGGER.info(f"\n{text}\n\nSaved to {folder}")
    return folder


def _seeds(given: Any) -> list[int]:
    """Return the seeds that a number or a list of them stands for, at least two, as one has no interval."""
    seeds = list(range(given)) if type(given) is int else given
    if not isinstance(seeds, (list, tuple)) or any(type(x) is not int or x < 0 for x in seeds):
        raise TypeError(f"'seeds={given}' is invalid. It must be int or a list of int, each 0 or greater.")
    if len(set(seeds)) < 2:
        raise ValueError(f"'seeds={given}' is an invalid value. Give two seeds or more, as one is luck.")
    return list(dict.fromkeys(seeds))


def _begun(first: Path, setting: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder and the report of a comparison with the same settings, or None."""
    for file in sorted(first.parent.glob(f"{first.name}*/{REPORT}")):
        with suppress(json.JSONDecodeError, KeyError, TypeError):  # of something else
            report = json.loads(file.read_text(encoding="utf-8"))
            if report["setting"] == setting:
                return file.parent, report
    return None


def train_students(
    trainer_class: type[DistillationTrainer],
    variants: dict[str, dict[str, Any] | None],
    training: dict[str, Any],
    seeds: list[int],
    report: dict[str, Any],
    output: Path,
) -> None:
    """Train a student of each variant for each seed that the report does not have yet.

    Args:
        trainer_class (type[DistillationTrainer]): The task's trainer.
        variants (dict[str, dict[str, Any] | None]): Distillation arguments by name, None for plain training.
        training (dict[str, Any]): Training arguments of all students, with `project`, the folder of the runs.
        seeds (list[int]): The seeds.
        report (dict[str, Any]): Gets `machine`, and by variant and seed the task's score in percent, `curves` of it per
            epoch and `seconds`, unless the run was begun before, and the `summary` of these.
        output (Path): Where the report is saved, after every run.
    """
    report["machine"], key = machine(), trainer_class.task.score.key
    epochs = get_cfg(overrides=training).epochs
    bar = TQDM(total=epochs * len(seeds) * len(variants), desc="Comparison", unit="epoch")
    runs = [(str(seed), variant) for seed in seeds for variant in variants]
    for i, (seed, variant) in enumerate(runs, start=1):
        _save(report, output)
        if seed not in report.setdefault(key, {}).setdefault(variant, {}):
            overrides = {**training, "seed": int(seed), **(variants[variant] or {})}
            row = train_student(trainer_class, overrides, run_name(variant, seed), lambda trainer: bar.update(1))
            for what, value in ((key, 100 * row[key]), ("curves", row["curve"]), ("seconds", row["seconds"])):
                if what != "seconds" or not np.isnan(value):
                    report.setdefault(what, {}).setdefault(variant, {})[seed] = value
            report["summary"] = summarise(report[key])
            _save(report, output)
        bar.update(i * epochs - bar.n)  # epochs that were trained before, or stopped early
    bar.close()


def run_name(variant: str, seed: str) -> str:
    """Return the name of the folder in which a variant was trained with a seed."""
    return f"{re.sub('[^A-Za-z0-9.]+', '_', variant)}_{seed}"


def _save(report: dict[str, Any], output: Path) -> None:
    """Write the report, whole or not at all."""
    with whole_files(output.parent, scratch=f".{output.name}.partial") as scratch:
        (scratch / output.name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def train_student(
    trainer_class: type[DistillationTrainer],
    overrides: dict[str, Any],
    name: str,
    on_epoch: Callable[[BaseTrainer], None] | None = None,
) -> dict[str, Any]:
    """Train one network, with its teacher if there is one, and report on its best checkpoint.

    With `exist_ok` a run that is there already is gone on with, and one that is finished only evaluated.

    Args:
        trainer_class (type[DistillationTrainer]): The task's trainer.
        overrides (dict[str, Any]): Training arguments, and distillation arguments if there is a `teacher`.
        name (str): Name of the run.
        on_epoch (Callable, optional): Called with the trainer after every epoch of training.

    Returns:
        (dict[str, Any]): name, file, seconds (NaN if the run was begun before), parameters, the task's figures as
            fractions, and curve, its score per epoch.
    """
    LOGGER.info(f"\nTraining {name}: {overrides['model']}")
    task = trainer_class.task
    chosen = trainer_class if "teacher" in overrides else task.plain_trainer
    last = Path(overrides.get("project", "")) / name / "weights" / "last.pt"
    epoch = _last_epoch(last) if overrides.get("exist_ok") else None
    seconds, best = float("nan"), last.with_name("best.pt")
    if epoch != -1:  # of a finished run
        trainer = chosen(overrides={**overrides, "name": name, **({} if epoch is None else {"resume": str(last)})})
        if on_epoch is not None:
            trainer.add_callback("on_train_epoch_end", on_epoch)
        start = time.perf_counter()
        trainer.train()
        seconds, best = time.perf_counter() - start if epoch is None else seconds, trainer.best
    figures = evaluate(trainer_class, str(best), overrides)
    curve = read_curve(best.parents[1], task.score.column)
    return {"name": name, "file": str(best), "seconds": seconds, "curve": curve, **figures}


def _last_epoch(file: Path) -> int | None:
    """Return the epoch of a checkpoint, -1 if its run is finished, or None if there is none that can be read."""
    if not file.exists():
        return None
    try:
        return torch_load(file, map_location="cpu")["epoch"]
    except UNREADABLE as e:
        LOGGER.warning(f"{file} cannot be read, so its run starts anew: {e}")
        return None


def evaluate(
    trainer_class: type[DistillationTrainer], file: Path | str, training: dict[str, Any], split: str = "val"
) -> dict[str, Any]:
    """Return the parameters of a checkpoint, and its task's figures on a split of the dataset as fractions."""
    model = YOLO(file)
    given = {k: training[k] for k in training.keys() & {"data", "imgsz", "batch", "device", "project", "classes"}}
    if given.get("batch", 1) < 1:  # which training finds by what the memory holds, and validation cannot
        del given["batch"]
    with tempfile.TemporaryDirectory() as elsewhere:  # upstream makes a folder for each
        metrics = model.val(**{**given, "project": elsewhere}, split=split, plots=False, verbose=False)
    return {"parameters": sum(p.numel() for p in model.parameters()), **trainer_class.task.evaluate(metrics)}


def compare_files(
    trainer_class: type[DistillationTrainer], files: Sequence[str], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Validate trained and exported networks on the same images, and log what each of them reaches.

    Args:
        trainer_class (type[DistillationTrainer]): The task's trainer.
        files (Sequence[str]): Checkpoints, and what upstream exports.
        settings (dict[str, Any]): `data`, and upstream's arguments of validation.

    Returns:
        (list[dict[str, Any]]): file, megabytes, milliseconds (an image's inference, without loading) and the task's
            figures as fractions, by file.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If there is no `data`, an argument is of distillation, or files are of several tasks.
    """
    task, seeds = trainer_class.task, [name for name in ("seeds", "seed") if name in settings]
    distillation, training = DistillationArgs.split({k: v for k, v in settings.items() if k not in seeds})
    if wrong := next(iter((*seeds, *distillation)), None):
        raise ValueError(f"'{wrong}=' has no effect on files that are trained already. Leave it out.")
    if "data" not in training:
        raise ValueError("No 'data=' given. Give a dataset to validate the files on.")
    if missing := next((file for file in files if not Path(file).exists()), None):
        raise FileNotFoundError(f"'model={missing}' does not exist. Give files that were trained or exported.")
    for file in (file for file in files if Path(file).suffix == ".pt"):
        if (of := YOLO(file).task) != task.name:
            raise ValueError(f"'model={file}' is of the task '{of}', not of '{task.name}'. Compare files of one task.")
    rows = []
    with tempfile.TemporaryDirectory() as elsewhere:
        given = {"plots": False, "verbose": False, **training, "project": elsewhere}
        for file in files:
            metrics = YOLO(file, task=task.name).val(**{**given, "task": task.name})
            row = {"file": file, "megabytes": _megabytes(Path(file)), "milliseconds": metrics.speed["inference"]}
            rows.append({**row, **task.evaluate(metrics)})
    key, first = task.score.key, rows[0]
    lines = [f"| file | MB | ms per image | {task.score.words} | points to the first |", "|---|---|---|---|---|"]
    for row in rows:
        cells = f"{row['megabytes']:.1f} | {row['milliseconds']:.1f} | {100 * row[key]:.2f}"
        lines.append(f"| {row['file']} | {cells} | {100 * (row[key] - first[key]):+.2f} |")
    LOGGER.info("\n" + "\n".join(lines))
    return rows


def _megabytes(path: Path) -> float:
    """Return the size of a file, or of all files in a folder, as some exports are."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def machine() -> dict[str, Any]:
    """Return what a measurement was made on."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({get_cpu_info()})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ultralytics": __version__,
    }


def summarise(scores: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Return mean, standard deviation and the paired difference to plain with its 95 % interval, per variant.

    Args:
        scores (dict[str, dict[str, float]]): Figures by variant and seed; `plain` is what the others are compared with.

    Returns:
        (dict[str, dict[str, Any]]): seeds, mean, std, differences, difference and interval (Student's t) by variant.
    """
    summary = {}
    for variant, by_seed in scores.items():
        values = list(by_seed.values())
        if not values:
            continue
        row = {"seeds": len(values), "mean": np.mean(values), "std": np.std(values, ddof=1) if len(values) > 1 else 0.0}
        shared = sorted(by_seed.keys() & scores.get("plain", {}).keys())
        if variant != "plain" and shared:
            differences = [by_seed[s] - scores["plain"][s] for s in shared]
            row["differences"] = differences
            row["difference"] = np.mean(differences)
            if len(shared) > 1:
                row["interval"] = list(stats.ttest_1samp(differences, 0).confidence_interval(0.95))
        summary[variant] = row
    return summary


def table(summary: dict[str, dict[str, Any]], words: str) -> str:
    """Format the summary as a Markdown table, the score called as it is in words."""
    lines = [f"| student | {words} mean | std | minus plain | 95 % interval | by seed |", "|---|---|---|---|---|---|"]
    for variant, row in summary.items():
        difference = f"{row['difference']:+.2f}" if "difference" in row else ""
        interval = "{:+.2f} to {:+.2f}".format(*row["interval"]) if "interval" in row else ""
        by_seed = ", ".join(f"{d:+.2f}" for d in row.get("differences", []))
        lines.append(f"| {variant} | {row['mean']:.2f} | {row['std']:.2f} | {difference} | {interval} | {by_seed} |")
    return "\n".join(lines)


def _verdict(row: dict[str, Any], words: str) -> Verdict:
    """Return what the paired interval shows."""
    (low, high), gain = row["interval"], row["difference"]
    said = f"The teacher changed the student's {words} by {gain:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
    if low <= 0 <= high:
        shown = f"{row['seeds']} seeds do not show whether it helps. With more of them the comparison goes on, e.g. "
        shown += f"`seeds={row['seeds'] + 3}`."
        headline = f"Not settled by {row['seeds']} seeds: {gain:+.2f} points of {words}."
        return Verdict(headline, f"{said}: {shown}", gain, (low, high))
    effect = "helps" if low > 0 else "harms"
    shown = f"{row['seeds']} seeds show that it {effect}."
    return Verdict(f"The teacher {effect}: {gain:+.2f} points of {words}.", f"{said}: {shown}", gain, (low, high))


def _page(report: dict[str, Any], verdict: Verdict, score: Score, folder: Path, picture: str) -> str:
    """Return the comparison as a page."""
    by_seed = {variant: report[score.key][variant] for variant in ("plain", "distilled")}
    rows = []
    for seed, plain in by_seed["plain"].items():
        page = Path(run_name("distilled", seed)) / "distillation.html"
        row = {"seed": seed, "plain": plain, "distilled": by_seed["distilled"][seed]}
        rows.append({**row, "report": page.as_posix() if (folder / page).exists() else None})
    return render(
        COMPARISON,
        name=folder.name,
        verdict=verdict,
        words=score.words,
        summary={variant: report["summary"][variant] for variant in by_seed},
        seeds=rows,
        picture=picture,
        machine=report["machine"],
        settings={**report["setting"]["training"], **report["setting"]["distillation"]},
    )
