"""Upstream's loggers get every loss by itself, through upstream's own callbacks."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import DISTILLATION_LOSSES, rows, same, train, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from ultralytics.utils.callbacks import comet, mlflow, wb

ROOT = Path(__file__).resolve().parents[4]
ITEMS = [f"train/{name}" for name in ("loss", *DISTILLATION_LOSSES)]


@pytest.mark.slow
def test_tensorboard(overrides, tmp_path, as_elsewhere):
    """The event file holds what results.csv says; drawing the student's graph, hooks and all, changes nothing."""
    settings = {**overrides, "epochs": 2, "fraction": 0.3}
    script = "\n".join(
        [
            "import sys",
            "from ultralytics import settings",
            "settings.update(tensorboard=True)",
            f"sys.path.insert(0, {str(ROOT)!r})",
            "import train",
            "train.main(sys.argv[1:])",
        ]
    )
    # Upstream switches its loggers off where it finds pytest
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    environment["YOLO_CONFIG_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script, *(f"{k}={v}" for k, v in {**settings, "name": "logged"}.items())],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "graph visualization added" in done.stdout + done.stderr
    run = Path(settings["project"]) / "logged"
    events = EventAccumulator(str(run)).Reload()
    assert events.Tags()["graph"]
    trainer = train({**settings, "name": "unlogged"})
    for item in ITEMS:
        logged = [(event.step, event.value) for event in events.Scalars(item)]
        expected = [(int(row["epoch"]), pytest.approx(float(row[item]), rel=1e-4)) for row in rows(trainer)]
        assert logged == expected
    assert same(weights(run / "weights" / "best.pt"), weights(trainer.best))


def test_what_is_logged_keeps_to_the_limits_of_mlflow(overrides):
    """Names of 250 characters of a few kinds, values of 6000: upstream gives it arguments and figures as they are."""
    trainer = train({**overrides, "teacher_names": [*"0123456789"], "fraction": 0.3})
    assert {"teacher", "teacher_names", "temperature"} <= vars(trainer.args).keys()
    figures = {*trainer.label_loss_items(trainer.loss_items), *trainer.metrics, *rows(trainer)[0]}
    for name in {*vars(trainer.args), *mlflow.sanitize_dict(dict.fromkeys(figures, 1))}:
        assert re.fullmatch(r"[\w./ :-]{1,250}", name), name
    assert max(len(str(value)) for value in vars(trainer.args).values()) <= 6000


@pytest.mark.parametrize("logger", ["wandb", "mlflow", "comet"])
def test_others(logger, overrides, monkeypatch):
    """With a stand-in for the service's library, as upstream's callback calls it."""
    logged = {}
    record = SimpleNamespace(
        log=lambda values, **_: logged.update(values),
        log_metrics=lambda metrics, **_: logged.update(metrics),
    )
    if logger == "wandb":
        monkeypatch.setattr(wb, "wb", SimpleNamespace(run=record))
        callback = wb.on_train_epoch_end
    elif logger == "mlflow":
        monkeypatch.setattr(mlflow, "mlflow", record)

        def callback(trainer):
            trainer._mlflow_active = True
            mlflow.on_train_epoch_end(trainer)

    else:
        stand_in = SimpleNamespace(get_running_experiment=lambda: record)
        monkeypatch.setattr(comet, "comet_ml", stand_in, raising=False)
        callback = comet.on_train_epoch_end
    trainer = train({**overrides, "fraction": 0.3}, on_train_epoch_end=callback)
    (row,) = rows(trainer)
    found = {k: float(v) for k, v in logged.items() if k.startswith("train/")}
    assert found == {item: pytest.approx(float(row[item]), rel=1e-4) for item in ITEMS}
