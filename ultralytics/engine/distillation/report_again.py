# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Write the report of a run that has ended, or was stopped, once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.engine.distillation.check import thrown_away
from ultralytics.engine.distillation.plan import log
from ultralytics.engine.distillation.planner import moved
from ultralytics.engine.distillation.report.page import read_pull, write_report
from ultralytics.engine.distillation.report.run import FinishedRun
from ultralytics.engine.distillation.run_files import UNREADABLE
from ultralytics.engine.distillation.trainer import DistillationTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import YAML
from ultralytics.utils.patches import torch_load

__all__ = ("report_again",)

GIVEN = {  # what decides nothing of the run, or is where something lies now
    *("baseline", "teacher", "teacher_hash", "teacher_trusted", "data", "device", "batch", "workers", "verbose"),
}


def report_again(trainer_class: type[DistillationTrainer], folder: Path, settings: dict[str, Any]) -> Path:
    """Write the report of a distilled run from what lies in its folder; nothing else there is changed.

    Args:
        trainer_class (type[DistillationTrainer]): The trainer of the run's task.
        folder (Path): The run's folder.
        settings (dict[str, Any]): Arguments in place of the run's, of `GIVEN`, e.g. `baseline`, a plain run that was
            trained later; `teacher` or `data` where these have moved.

    Returns:
        (Path): The page.

    Raises:
        FileNotFoundError: If a file of the run is missing.
        ValueError: If the run had no teacher, or none with a weight, a file of it cannot be read, or another argument
            is given.
        Exception: What a run with these arguments would be refused with.
    """
    if other := settings.keys() - GIVEN:
        raise ValueError(f"'{min(other)}=' is the run's own, and a report takes {sorted(GIVEN)} alone. Leave it out.")
    for name in ("args.yaml", "results.csv", "weights/best.pt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"'run={folder}' has no '{name}'. Give that of a run which has ended an epoch.")
    recorded = YAML.load(folder / "args.yaml")
    teacher = recorded.get("teacher")
    if teacher is None:
        raise ValueError(
            f"'run={folder}' was trained without a teacher. Give the distilled run, and this one as 'baseline='."
        )
    recorded["teacher"] = moved(teacher, folder / "weights")
    best, last = folder / "weights" / "best.pt", folder / "weights" / "last.pt"
    try:
        student = load_checkpoint(best)[0]
        finished = torch_load(last if last.is_file() else best, map_location="cpu")["epoch"] == -1
    except (*UNREADABLE, TypeError, KeyError) as e:
        raise ValueError(
            f"'run={folder}' has weights that cannot be read ({type(e).__name__}). Give another run."
        ) from e
    baseline = recorded.get("baseline")
    own = {"resume": None, "teacher_cache": None, "val": True}
    own["baseline"] = baseline if Path(str(baseline)).is_dir() else None
    with thrown_away(trainer_class, {**recorded, **own, **settings}) as trainer:
        trainer.setup_model()
        if not (trainer.distiller.weights and trainer.task.charts):
            raise ValueError(f"'run={folder}' has nothing to report, as no loss of its teacher had a weight.")
        trainer.csv = folder / "results.csv"
        rows = trainer.read_results_csv()
        if not rows.get("epoch"):
            raise ValueError(f"'run={folder}' has no epoch in its 'results.csv'. Give a run that has ended one.")
        trainer.distiller.end(student, len(rows["epoch"]) - 1, trainer.epochs, None)
        images = trainer.data[trainer.args.split]
        dataset = trainer.get_dataloader(images, max(trainer.batch_size, 1), rank=-1, mode="val").dataset
        loss, device, pull = trainer.distiller.loss, trainer.device, read_pull(folder)
        epochs = None if finished else trainer.epochs
        run = FinishedRun(trainer.plan, folder, best, loss, dataset, device, rows, pull, epochs)
        page = write_report(trainer.task, run)
    log([f"What the teacher did is in {page}"])
    return page
