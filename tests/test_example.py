"""The example: from nothing to a table and a plot, and on a user's own teacher."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TRAINING, write_digits
from PIL import Image
from teachers import shell
from ultralytics.models.distillation import TRAINERS
from ultralytics.utils import LOGGER, YAML

import distill_train_example as example


@pytest.fixture
def said(monkeypatch):
    lines = []
    info = LOGGER.info
    monkeypatch.setattr(LOGGER, "info", lambda message, *args: (lines.append(str(message)), info(message, *args)))
    return lines


def table(lines):
    rows = {
        line.split()[0]: line.split()[1:] for line in lines if line.startswith(("teacher ", "plain ", "distilled "))
    }
    return {name: (int(row[0].replace(",", "")), float(row[1].rstrip("%"))) for name, row in rows.items()}


def test_own_teacher_and_data(digits, teacher, said, tmp_path):
    settings = {**TRAINING, "model": "yolo11n-cls.yaml", "teacher": str(teacher), "data": str(digits), "fraction": 0.3}
    folder = example.compare({**settings, "teacher_epochs": 1, "project": str(tmp_path), "name": "mine"})
    assert folder == tmp_path / "mine"
    shown = table(said)
    assert shown["teacher"][0] > shown["plain"][0] == shown["distilled"][0] > 1_000_000
    assert all(0 <= top1 <= 100 for _, top1 in shown.values())
    assert Image.open(folder / "comparison.png").size == (1050, 675)
    assert any(str(folder / "comparison.png") in line for line in said)
    assert any("points" in line for line in said)
    assert not (folder / "teacher").exists()  # a trained teacher is not trained again


@pytest.mark.slow
def test_digits_from_nothing(said):
    """The whole command with fewer epochs and images: data, teacher, students, table."""
    example.main(["epochs=1", "teacher_epochs=1", "device=cpu", "fraction=0.2"])
    images = list((example.datasets_folder() / "digits").rglob("*.png"))
    assert len(images) == 1797
    assert sum("train" in p.parts for p in images) == 1437
    stamps = {p: p.stat().st_mtime_ns for p in images}
    assert set(table(said)) == {"teacher", "plain", "distilled"}
    (report,) = [Path(line.split(" is in ")[1]) for line in said if line.startswith("What the teacher did is in ")]
    networks = json.loads(report.with_suffix(".json").read_text())["networks"]
    assert networks.keys() == {"student", "teacher", "baseline"}
    example.write_digits()
    assert {p: p.stat().st_mtime_ns for p in images} == stamps  # written once


@pytest.mark.slow
def test_scenes_from_nothing(said, monkeypatch):
    """The whole command for detectors with fewer epochs and scenes."""
    monkeypatch.setattr(example, "write_scenes", partial(example.write_scenes, train=24, val=8, side=64))
    line = ["task=detect", "epochs=1", "teacher_epochs=1", "imgsz=64", "device=cpu", "name=scenes"]
    example.main(line)
    shown = table(said)
    assert shown["teacher"][0] > shown["plain"][0] == shown["distilled"][0] > 1_000_000
    assert any("changed the student's mAP50-95 by" in line for line in said)
    (report,) = [Path(line.split(" is in ")[1]) for line in said if line.startswith("What the teacher did is in ")]
    assert report.parts[-4:-2] == ("detect", "scenes")
    networks = json.loads(report.with_suffix(".json").read_text())["networks"]
    assert networks.keys() == {"student", "teacher", "baseline"}
    teacher = report.parents[1] / "teacher" / "weights" / "best.pt"
    data = str(example.datasets_folder() / "scenes-detect" / "scenes.yaml")
    settings = {"teacher": str(teacher), "model": "yolo11n.yaml", "data": data, "imgsz": 64, "device": "cpu"}
    row = example.measure(TRAINERS["detect"], settings)
    assert (row["parameters"], round(100 * row["map"], 1)) == shown["teacher"]
    said.clear()
    example.main([*line, f"teacher={teacher}", "model=yolo11n.yaml", "name=again", "plots=False"])
    assert table(said)["teacher"] == shown["teacher"]


def test_a_teacher_of_other_keypoints_is_not_measured(prepared, tmp_path):
    data, teacher = prepared("pose")
    for shape, measured in (([2, 3], True), ([17, 3], False)):
        YAML.save(tmp_path / "points.yaml", {**YAML.load(data), "kpt_shape": shape})
        settings = {"teacher": str(teacher), "model": "yolo11n-pose.yaml", "data": str(tmp_path / "points.yaml")}
        row = example.measure(TRAINERS["pose"], {**settings, "imgsz": 64, "device": "cpu"})
        assert np.isfinite(row["pose_map"]) == measured
        assert row["parameters"] > 9_000_000


def test_digits_are_the_digits():
    from sklearn.datasets import load_digits

    images, labels, names = example.load_digit_images()
    digits = load_digits()
    assert images.shape == (1797, 32, 32)
    assert images.dtype == np.uint8
    np.testing.assert_allclose(images[:, 2::4, 2::4] * (16 / 255), digits.images, atol=0.04)
    assert (labels == digits.target).all()
    assert names == [str(c) for c in range(10)]


def test_image_folder_is_whole_or_absent(tmp_path):
    images, labels = np.zeros((3, 12, 12), np.uint8), [0, 1, 5]
    with pytest.raises(IndexError):
        example.write_image_folder(tmp_path / "data", {"train": (images, labels)}, ["a", "b"])
    assert not list(tmp_path.iterdir())
    example.write_image_folder(tmp_path / "data", {"train": (images[:2], labels[:2])}, ["a", "b"])
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))
    assert files == ["data/train/a/00000.png", "data/train/b/00001.png"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"temperature": -1}, "temperature=-1"), ({"names": [f"digit {c}" for c in range(10)]}, "knows 0 of the dataset")],
)
def test_mistakes_are_refused_before_any_training(wrong, words, teacher, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "train_student", None)  # would be called
    settings = {**TRAINING, "model": "yolo11n-cls.yaml", "teacher": str(teacher), "data": str(digits), **wrong}
    if names := settings.pop("names", None):
        settings["data"] = str(write_digits(tmp_path / "other", train=2, val=1, names=names))
    with pytest.raises(ValueError, match=words):
        example.compare({**settings, "teacher_epochs": 1, "project": str(tmp_path / "runs")})
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("task", "teacher", "error", "words"),
    [
        ("detect", "hostile", TypeError, "loading it would call code"),
        ("classify", "hostile", TypeError, "loading it would call code"),
        ("detect", "timm:resnet18", TypeError, "other libraries' networks and exported files"),
        ("detect", ["a.pt", "b.pt"], ValueError, "names several teachers"),
    ],
)
def test_a_teacher_is_opened_safely_before_it_is_measured(
    task, teacher, error, words, prepared, digits, tmp_path, monkeypatch
):
    """By our reader, as upstream's runs what is hidden in a file."""
    canary = tmp_path / "canary"
    if teacher == "hostile":
        teacher = str(tmp_path / "hostile.pt")
        torch.save({"model": shell(canary)}, teacher)
    monkeypatch.setattr(example, "train_student", None)  # would be called
    data = digits if task == "classify" else prepared(task)[0]
    line = [f"task={task}", f"teacher={teacher}", f"data={data}", "imgsz=64", f"project={tmp_path / 'runs'}"]
    with pytest.raises(error, match=words):
        example.main(line)
    assert not canary.exists()
    assert not (tmp_path / "runs").exists()


def test_help(capsys):
    example.main(["--help"])
    assert "python distill_train_example.py" in capsys.readouterr().out
