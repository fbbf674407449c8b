"""Upstream's loggers, each with its real library, get every loss by itself through upstream's own callbacks."""

import csv
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec

import matplotlib
import pytest
from helpers import DISTILLATION_LOSSES, ROOT, TRAINING, rows, same, train, weights
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from ultralytics.utils import YAML
from ultralytics.utils.callbacks import mlflow

ITEMS = [f"train/{name}" for name in ("loss", *DISTILLATION_LOSSES)]
RUN = """
import sys
from ultralytics import settings
root, logger, *arguments = sys.argv[1:]
settings.update({k: k == logger for k in ("clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb")})
if logger == "clearml":  # 2.1.12 fails offline on the model that upstream gives it at the end, in plain training too
    from ultralytics.utils.callbacks import clearml
    del clearml.callbacks["on_train_end"]
sys.path.insert(0, root)
import train
train.main(arguments)
"""


def environment(folder):
    """Return the variables of a process that logs into a folder, knowing neither pytest nor accounts of the user's."""
    # Upstream switches its loggers off where it finds pytest
    return {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | {
        "HOME": str(folder),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # its list of fonts
        "YOLO_CONFIG_DIR": str(folder),
        "WANDB_MODE": "offline",
        "CLEARML_OFFLINE_MODE": "1",
        "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": str(folder / "comet"),
        "MLFLOW_TRACKING_URI": str(folder / "mlruns"),
        "MLFLOW_ALLOW_FILE_STORE": "true",  # its databases need more than mlflow-skinny
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def read_tensorboard(folder):
    events = EventAccumulator(str(folder / "runs" / "logged")).Reload()
    assert events.Tags()["graph"]
    return {(event.step, item): event.value for item in ITEMS for event in events.Scalars(item)}, None


def read_wandb(folder):
    (file,) = folder.glob("runs/logged/wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", file]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    logged = {(items["epoch"], item): items[item] for items in history for item in ITEMS if item in items}
    (run,) = (record["run"] for record in records if record["type"] == "run")
    return logged, run["config"]["update"]


def read_mlflow(folder):
    client = MlflowClient(str(folder / "mlruns"))
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    history = {item: client.get_metric_history(run.info.run_id, item) for item in ITEMS}
    return {(x.step + 1, item): x.value for item, values in history.items() for x in values}, run.data.params


def read_clearml(folder):
    (file,) = folder.glob(".clearml/cache/offline/*.zip")
    with zipfile.ZipFile(file) as content:
        task = json.loads(content.read("task.json"))
        reports = [x for line in content.read("metrics.jsonl").splitlines() for x in json.loads(line)]
    logged = {(x["iter"] + 1, x["variant"]): x["value"] for x in reports if x["variant"] in ITEMS}
    return logged, {k: x["value"] for k, x in task["hyperparams"]["General"].items()}


def read_comet(folder):
    (file,) = folder.glob("comet/*.zip")
    with zipfile.ZipFile(file) as content:
        messages = [json.loads(line) for line in content.read("messages.json").splitlines()]
    metrics = [x["payload"]["metric"] for x in messages if x["type"] == "metric_msg"]
    parameters = [x["payload"]["param"] for x in messages if x["type"] == "parameter_msg"]
    logged = {(x["epoch"], x["metricName"]): x["metricValue"] for x in metrics if x["metricName"] in ITEMS}
    return logged, {x["paramName"]: x["paramValue"] for x in parameters}


def read_dvc(folder):
    logged = {}
    for item in ITEMS:
        with (folder / "dvclive" / "plots" / "metrics" / f"{item}.tsv").open() as file:
            for row in csv.DictReader(file, delimiter="\t"):
                logged[int(row["step"]) + 1, item] = float(row[item.removeprefix("train/")])
    return logged, YAML.load(folder / "dvclive" / "params.yaml")


@pytest.fixture(scope="module")
def settings(digits, teacher):
    own = {"model": "yolo11n-cls.yaml", "data": str(digits), "teacher": str(teacher), "temperature": 3}
    return {**TRAINING, **own, "epochs": 2, "fraction": 0.3}


@pytest.fixture(scope="module")
def unlogged(settings, tmp_path_factory):
    return train({**settings, "project": str(tmp_path_factory.mktemp("unlogged"))})


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["tensorboard", "wandb", "mlflow", "clearml", "comet", "dvc"])
def test_losses_arrive(logger, settings, tmp_path, unlogged, monkeypatch):
    """As results.csv has them, with the parameters of the distillation; and logging changes nothing."""
    if logger == "dvc" and not find_spec("dvclive"):
        pytest.skip("DVCLive is not in the extra: where it is, each run by hand makes its Git repository one of DVC's")
    given = {**settings, "project": str(tmp_path / "runs"), "name": "logged"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(ROOT), logger, *(f"{k}={v}" for k, v in given.items())],
        env=environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "runs" / "logged" / "results.csv").open() as file:
        expected = {(int(row["epoch"]), item): float(row[item]) for row in csv.DictReader(file) for item in ITEMS}
    assert len(expected) == 8
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logged, parameters = globals()[f"read_{logger}"](tmp_path)
    assert logged == pytest.approx(expected, rel=1e-6)
    if logger != "tensorboard":  # which is given no parameters
        assert parameters["teacher"] == settings["teacher"]
        assert float(parameters["temperature"]) == 3
    if logger != "clearml":  # which sets seeds of its own
        assert same(weights(tmp_path / "runs" / "logged" / "weights" / "best.pt"), weights(unlogged.best))


def test_what_is_logged_keeps_to_the_limits_of_mlflow(overrides):
    """Names of 250 characters of a few kinds, values of 6000: upstream gives it arguments and figures as they are."""
    trainer = train({**overrides, "teacher_names": [*"0123456789"], "fraction": 0.3})
    assert {"teacher", "teacher_names", "temperature"} <= vars(trainer.args).keys()
    figures = {*trainer.label_loss_items(trainer.loss_items), *trainer.metrics, *rows(trainer)[0]}
    for name in {*vars(trainer.args), *mlflow.sanitize_dict(dict.fromkeys(figures, 1))}:
        assert re.fullmatch(r"[\w./ :-]{1,250}", name), name
    assert max(len(str(value)) for value in vars(trainer.args).values()) <= 6000
