"""Shared fixtures of detectors and what is built on them: scenes of digits, and networks trained on them."""

import os
import shutil

import pytest
from filelock import FileLock
from helpers import train
from scenes import SETTINGS, STILL
from ultralytics.models.distillation import TRAINERS
from ultralytics.utils import YAML

from distill_train_example import SUFFIXES, write_scenes


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder that all workers of pytest-xdist share, so that what takes long is made once."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "dense"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def prepared(place):
    """Return a function that gives the dataset of a task, and a teacher of a family trained on it, each made once."""

    def prepare(task, family="11"):
        best = place / f"{task}_{family}" / "weights" / "best.pt"
        with FileLock(place / f"{task}.lock"):
            data = write_scenes(place / task, task, train=24, val=8, side=64)
            if not best.exists():
                own = {"model": f"yolo{family}s{SUFFIXES[task]}.yaml", "data": str(data), "name": f"{task}_{family}"}
                train({**SETTINGS, **own, "project": str(place)}, TRAINERS[task].task.plain_trainer)
        return data, best

    return prepare


@pytest.fixture(scope="session")
def learned(place, prepared):
    """Return a function that gives scenes of one class, validated on those trained on, and what has learned them."""

    def learn(task, family):
        data, folder = place / f"{task}-one.yaml", place / f"learned_{task}_{family}"
        content = YAML.load(prepared(task)[0])
        with FileLock(place / f"{task}-one.lock"):
            if not data.exists():
                ignore = shutil.ignore_patterns("*.cache")
                scenes = shutil.copytree(content["path"], place / f"{task}-one", ignore=ignore)
                for file in scenes.glob("labels/*/*.txt"):
                    file.write_text("\n".join(" ".join(["0", *x.split()[1:]]) for x in file.read_text().splitlines()))
                YAML.save(data, {**content, "path": str(scenes), "val": "images/train", "names": {0: "digit"}})
            if not folder.exists():
                own = {**SETTINGS, **STILL, "epochs": 25, "warmup_epochs": 0, "lr0": 0.003, "val": False}
                own |= {"model": f"yolo{family}n{SUFFIXES[task]}.yaml", "data": str(data), "name": folder.name}
                train({**own, "project": str(place)}, TRAINERS[task].task.plain_trainer)
        return str(data), folder / "weights" / "best.pt"

    return learn


@pytest.fixture
def settings_of(prepared, tmp_path):
    """Return a function that gives the arguments of a run of a task."""

    def settings(task, family="11", teacher="11", **more):
        data, best = prepared(task, teacher)
        own = {"model": f"yolo{family}n{SUFFIXES[task]}.yaml", "data": str(data), "teacher": str(best)}
        return {**SETTINGS, **own, "project": str(tmp_path / "runs"), **more}

    return settings
