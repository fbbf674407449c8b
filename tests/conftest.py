"""Shared fixtures: small real datasets and networks trained on them, offline and away from the user's settings."""

import gc
import os
import tempfile

# Before ultralytics is imported: its settings, datasets and runs belong to this test run alone
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="distillation-tests-")
os.environ["YOLO_OFFLINE"] = "True"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores, each with a thread

import shutil
from io import BytesIO
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import TRAINING, train, write_digits
from matplotlib.figure import Figure
from PIL import Image
from scenes import SETTINGS, STILL
from ultralytics import settings
from ultralytics.engine.distillation import trainer as distillation_trainer
from ultralytics.models.distillation import TRAINERS
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.utils import YAML

from distill_train_example import SUFFIXES, write_scenes

matplotlib_savefig, ADAPTER_IMAGES = Figure.savefig, distillation_trainer.ADAPTER_IMAGES
settings.update(
    {f"{name}_dir": str(Path(os.environ["YOLO_CONFIG_DIR"]) / name) for name in ("datasets", "weights", "runs")}
)


def pytest_collection_finish():
    """Leave all that was imported out of garbage collections, of which upstream asks for several in every run."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    shutil.rmtree(os.environ["YOLO_CONFIG_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """200 training and 50 validation digits as an image folder."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder that all workers of pytest-xdist share, for what takes long to make; each has images of its own."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "trained"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def teacher(digits, place) -> Path:
    """The best.pt of a yolo11s-cls trained on the digits for a few epochs."""
    best = place / "classify" / "weights" / "best.pt"
    with FileLock(place / "classify.lock"):
        if not best.exists():
            own = {"model": "yolo11s-cls.yaml", "data": str(digits), "epochs": 4, "name": "classify"}
            train({**TRAINING, **own, "project": str(place)}, ClassificationTrainer)
    return best


@pytest.fixture
def overrides(digits, teacher, tmp_path) -> dict:
    """Arguments of a one-epoch distillation run in a folder of its own."""
    return {
        **TRAINING,
        "model": "yolo11n-cls.yaml",
        "teacher": str(teacher),
        "data": str(digits),
        "project": str(tmp_path / "runs"),
    }


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(distillation_trainer, "ADAPTER_IMAGES", 32)  # enough for digits, and a tenth of each run


@pytest.fixture
def as_elsewhere(monkeypatch):
    """Let a run here be that of a process of its own, where the tests' settings do not reach."""
    monkeypatch.setattr(distillation_trainer, "ADAPTER_IMAGES", ADAPTER_IMAGES)


@pytest.fixture
def undrawn(monkeypatch):
    """Leave out drawing, half of what a run with plots takes, where nobody looks at its pictures."""
    blank = Image.new("RGB", (8, 8))

    def savefig(self, file, **given):
        if given.get("format") == "svg":
            file.write(b"<svg></svg>")
        else:
            blank.save(file, "png")

    monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture
def drawn_by_us(undrawn, monkeypatch):
    """Draw the report, which is drawn into memory, and leave out what upstream draws into files."""
    blank, draw = Figure.savefig, matplotlib_savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, file, **given: (draw if isinstance(file, BytesIO) else blank)(self, file, **given),
    )


@pytest.fixture(scope="session")
def prepared(place, tmp_path_factory):
    """Return a function that gives the dataset of a task, and a teacher of a family trained on it, each made once."""
    scenes = tmp_path_factory.mktemp("scenes")

    def prepare(task, family="11"):
        data = write_scenes(scenes / task, task, train=24, val=8, side=64)
        best = place / f"{task}_{family}" / "weights" / "best.pt"
        with FileLock(place / f"{task}_{family}.lock"):
            if not best.exists():
                own = {"model": f"yolo{family}s{SUFFIXES[task]}.yaml", "data": str(data), "name": f"{task}_{family}"}
                train({**SETTINGS, **own, "project": str(place)}, TRAINERS[task].task.plain_trainer)
        return data, best

    return prepare


@pytest.fixture(scope="session")
def learned(place, prepared, tmp_path_factory):
    """Return a function that gives scenes of one class, validated on those trained on, and what has learned them."""
    own = tmp_path_factory.mktemp("scenes-one")

    def learn(task, family):
        data, folder = own / f"{task}.yaml", place / f"learned_{task}_{family}"
        if not data.exists():
            content = YAML.load(prepared(task)[0])
            scenes = shutil.copytree(content["path"], own / task, ignore=shutil.ignore_patterns("*.cache"))
            for file in scenes.glob("labels/*/*.txt"):
                file.write_text("\n".join(" ".join(["0", *x.split()[1:]]) for x in file.read_text().splitlines()))
            YAML.save(data, {**content, "path": str(scenes), "val": "images/train", "names": {0: "digit"}})
        with FileLock(place / f"{folder.name}.lock"):
            if not folder.exists():
                given = {**SETTINGS, **STILL, "epochs": 25, "warmup_epochs": 0, "lr0": 0.003, "val": False}
                given |= {
                    "save": False,
                    "model": f"yolo{family}n{SUFFIXES[task]}.yaml",
                    "data": str(data),
                    "name": folder.name,
                }
                train({**given, "project": str(place)}, TRAINERS[task].task.plain_trainer)
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
