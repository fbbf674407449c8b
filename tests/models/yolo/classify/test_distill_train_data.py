"""Datasets with faults: each trains, or is refused in a sentence before the first epoch."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import DISTILLATION_LOSSES, rows, spoil_pixels, train
from PIL import Image
from ultralytics import YOLO
from ultralytics.models.distillation import TRAINERS
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.utils import LOGGER


def images(folder, split):
    return sorted((folder / split).rglob("*.png"))


def truncate(*splits, every=1):
    def spoil(folder):
        for split in splits:
            for file in images(folder, split)[::every]:
                file.write_bytes(file.read_bytes()[:40])

    return spoil


def empty_a_class(folder):
    for file in (folder / "train" / "3").iterdir():
        file.unlink()


def remove(*parts):
    return lambda folder: shutil.rmtree(folder.joinpath(*parts))


def add_a_class_to_val(folder):
    shutil.copytree(folder / "val" / "3", folder / "val" / "other")


def rewrite(change):
    def spoil(folder):
        for file in images(folder, "train") + images(folder, "val"):
            cv2.imwrite(str(file), change(cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)))

    return spoil


def leave(folder):
    pass


@pytest.fixture
def spoiled(digits, tmp_path, overrides):
    """Return a function that gives the arguments for a spoiled copy of the digits."""

    def copy(spoil, settings):
        folder = tmp_path / "spoiled"
        shutil.copytree(digits, folder, ignore=shutil.ignore_patterns("*.cache"))
        spoil(folder)
        return {**overrides, "data": str(folder), **settings}

    return copy


@pytest.mark.parametrize(
    ("spoil", "settings", "count"),
    [
        (truncate("train", "val", every=10), {}, 180),
        (empty_a_class, {}, 180),
        (remove("val", "3"), {}, 200),
        (add_a_class_to_val, {}, 200),
        (rewrite(lambda image: image), {}, 200),
        (rewrite(lambda image: np.dstack([image] * 4)), {}, 200),
        (leave, {"batch": 199, "imgsz": 64}, 200),
        (leave, {"batch": 1, "imgsz": 64, "fraction": 0.05}, 10),
        (leave, {"fraction": 0.1}, 20),
        (leave, {"single_cls": True, "response_distill": False}, 200),
    ],
    ids=[
        "one image in ten is truncated",
        "an empty class folder",
        "a class that val lacks",
        "a class that only val has",
        "one channel",
        "four channels",
        "one image in the last batch",
        "one image per batch",
        "a fraction",
        "one class",
    ],
)
def test_trains(spoil, settings, count, spoiled):
    trainer = train(spoiled(spoil, settings))
    assert len(trainer.train_loader.dataset) == count
    (row,) = rows(trainer)
    on = [name for name in DISTILLATION_LOSSES if name != "response_loss" or "response_distill" not in settings]
    assert all(float(row[f"train/{name}"]) > 0 for name in on)
    assert trainer.best.exists()


def test_an_image_with_damaged_pixels_is_named_and_the_run_goes_on_without_it(spoiled, monkeypatch):
    """Upstream's check reads headers only; the run stops with a sentence, and loses nothing."""
    settings = spoiled(leave, {"epochs": 2, "workers": 0})

    def damage(trainer):
        if trainer.epoch == 1:
            spoil_pixels(Path(trainer.train_loader.dataset.samples[7][0]))

    with pytest.raises(OSError, match=r"07\.png' cannot be read as an image"):
        train(settings, on_train_epoch_start=damage)
    (last,) = Path(settings["project"]).glob("*/weights/last.pt")
    Path(settings["data"], "train", "0", "00007.png").unlink()
    assert len(rows(train({"resume": str(last)}))) == 2


@pytest.mark.parametrize("splits", [["train"], ["train", "val"]])
def test_hidden_folders_are_no_classes(splits, spoiled, monkeypatch):
    def hide(folder):
        for split in splits:
            shutil.copytree(folder / split / "4", folder / split / ".ipynb_checkpoints")

    warnings = []
    monkeypatch.setattr(LOGGER, "warning", lambda message, *args: warnings.append(str(message)))
    trainer = train(spoiled(hide, {}))
    assert sum("hidden folders among its classes" in x for x in warnings) == 1
    assert trainer.data["nc"] == len(trainer.data["names"]) == 10
    assert YOLO(trainer.best).names == {i: str(i) for i in range(10)}
    for loader, count in ((trainer.train_loader, 200), (trainer.test_loader, 50)):
        samples = loader.dataset.samples
        assert len(samples) == count
        assert all(int(Path(file).parent.name) == index for file, index, *_ in samples)


@pytest.mark.parametrize("cache", ["disk", "ram"])
def test_an_image_that_cannot_be_decoded_is_named_once_whatever_is_kept(cache, spoiled, monkeypatch):
    warnings = []
    monkeypatch.setattr(LOGGER, "warning", lambda message, *args: warnings.append(str(message)))
    settings = spoiled(leave, {"cache": cache, "workers": 0})
    file = Path(settings["data"], "train", "3", "scan.tiff")
    Image.fromarray(np.zeros((40, 40), np.float32)).save(file)
    with pytest.raises(OSError, match=rf"'{file}' cannot be read as an image.*remove it"):
        train(settings)
    assert not [x for x in warnings if "scan" in x]
    assert not list(file.parent.glob("scan*.npy"))


@pytest.mark.parametrize("task", ["classify", "detect"])
def test_a_run_does_not_lie_among_its_images(task, overrides, settings_of):
    given = overrides if task == "classify" else settings_of(task)
    data = Path(given["data"])
    folder = data / "train" if task == "classify" else data.parent / "images" / "train"
    before = set(folder.parent.rglob("*"))
    for project in (folder, folder / "0" / "runs"):
        with pytest.raises(ValueError, match=rf"would lie among the images in '{folder}'.*'project'"):
            train({**given, "project": str(project)}, TRAINERS[task])
    assert {x for x in folder.parent.rglob("*") if x.suffix != ".cache"} <= before


def test_a_run_does_not_lie_among_classes_that_upstream_splits(overrides, tmp_path):
    """A dataset of class folders alone is split into folders beside it; beside these a run may lie."""
    data = shutil.copytree(Path(overrides["data"]) / "train", tmp_path / "data")
    given = {**overrides, "data": str(data)}
    for project in (data, data / "runs"):
        with pytest.raises(ValueError, match=f"would lie among the images in '{data}'"):
            DistillationClassificationTrainer(overrides={**given, "project": str(project)})
    assert not (data / "runs").exists()
    trainer = DistillationClassificationTrainer(overrides={**given, "project": str(tmp_path / "runs")})
    assert trainer.data["nc"] == 10
    inside = {**overrides, "project": str(Path(overrides["data"]) / "runs")}  # beside train and val
    assert DistillationClassificationTrainer(overrides=inside).save_dir.is_relative_to(overrides["data"])
    shutil.rmtree(inside["project"])


def test_a_run_does_not_lie_among_images_that_are_linked(overrides, tmp_path):
    data, elsewhere = Path(overrides["data"]), tmp_path / "elsewhere"
    for split in ("train", "val"):
        shutil.copytree(data / split, tmp_path / "data" / split)
    (tmp_path / "data" / "train" / "3").rename(elsewhere)
    (tmp_path / "data" / "train" / "3").symlink_to(elsewhere)
    given = {**overrides, "data": str(tmp_path / "data"), "project": str(elsewhere / "runs")}
    with pytest.raises(ValueError, match=f"would lie among the images in '{tmp_path / 'data' / 'train'}'"):
        DistillationClassificationTrainer(overrides=given)
    assert not (elsewhere / "runs").exists()


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (truncate("train"), {}, "No images found in 'train' split"),
        (truncate("val"), {}, "No images found in 'val' split"),
        (remove("val"), {}, "has no folder 'val' to validate on"),
        (remove("train"), {}, "No images found|knows 0 of the dataset's"),
        (leave, {"batch": 199}, "final batch=1 training at imgsz=32"),
        (leave, {"single_cls": True}, "knows 0 of the dataset's 1 classes"),
    ],
    ids=["no whole image", "no whole image in val", "no val", "no train", "one image in the last batch", "one class"],
)
def test_is_refused(spoil, settings, message, spoiled):
    epochs = []
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=message):
        train(spoiled(spoil, settings), on_train_epoch_start=epochs.append)
    assert not epochs
