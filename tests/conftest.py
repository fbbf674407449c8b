"""Shared fixtures: small real datasets and networks trained on them, offline and away from the user's settings."""

import gc
import os
import tempfile

# Before ultralytics is imported: its settings, datasets and runs belong to this test run alone
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="distillation-tests-")
os.environ["YOLO_OFFLINE"] = "True"

import shutil
from pathlib import Path

import pytest
import torch
from helpers import TRAINING, write_digits
from ultralytics import settings
from ultralytics.models.yolo.classify import ClassificationTrainer

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
def teacher(digits, tmp_path_factory) -> Path:
    """The best.pt of a yolo11s-cls trained on the digits for a few epochs."""
    trainer = ClassificationTrainer(
        overrides={
            **TRAINING,
            "model": "yolo11s-cls.yaml",
            "data": str(digits),
            "epochs": 4,
            "project": str(tmp_path_factory.mktemp("teacher")),
        }
    )
    trainer.train()
    return trainer.best


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
def _seed():
    torch.manual_seed(0)
