"""What may teach, what is refused and in which words, and what a teacher answers."""

import shutil
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO, settings
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.nn.teacher import Teacher

DIGITS = [str(i) for i in range(10)]


def test_answers_as_the_checkpoint_does(teacher):
    """Fusing changes nothing beyond rounding: the logits and maps are the unfused network's."""
    frozen = Teacher(teacher)
    levels = frozen.find_levels(32, 3)
    frozen.levels = [levels["model.6"], levels["model.4"]]
    x = torch.rand(3, 3, 32, 32)
    logits, (stride16, stride8) = frozen(x)
    model, _ = load_checkpoint(teacher)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x)[1], rtol=1e-3, atol=1e-4)
        for layer in model.model[:5]:
            x = layer(x)
        torch.testing.assert_close(stride8, x, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stride16, model.model[6](model.model[5](x)), rtol=1e-3, atol=1e-4)
    assert frozen.names == DIGITS
    assert not any(m._forward_hooks for m in frozen.model.modules())


def test_is_frozen_and_fused(teacher):
    frozen = Teacher(teacher)
    logits, features = frozen(torch.rand(2, 3, 32, 32))
    assert not logits.requires_grad
    assert features == []
    assert not any(p.requires_grad for p in frozen.model.parameters())
    assert not any(m.training for m in frozen.model.modules())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.model.modules())


@pytest.mark.parametrize("name", ["yolov8n-cls", "yolo11m-cls", "yolo12n-cls", "yolo26n-cls", "yolov8n-cls-resnet50"])
def test_every_family_loads(name, tmp_path):
    model = YOLO(f"{name}.yaml")
    model.model.train()
    model.model(torch.rand(2, 3, 64, 64))  # BatchNorm has seen data
    model.save(tmp_path / "best.pt")
    logits, _ = Teacher(tmp_path / "best.pt")(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 1000)


def refused(path, error, *words):
    with pytest.raises(error) as e:
        Teacher(path)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert "\n" not in str(e.value)


def test_refusals_of_a_path(tmp_path):
    refused(None, ValueError, "No teacher given", "teacher=")
    refused(tmp_path / "missing.pt", FileNotFoundError, "missing.pt", "does not exist")
    refused("yolo11l-cls.yaml", TypeError, "yolo11l-cls.yaml", "without trained weights", "Train it first")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 torn"])
def test_damaged_files_are_refused(content, tmp_path):
    (tmp_path / "best.pt").write_bytes(content)
    refused(tmp_path / "best.pt", TypeError, "best.pt", "damaged")


def test_a_cut_file_is_refused(teacher, tmp_path):
    (tmp_path / "best.pt").write_bytes(teacher.read_bytes()[:-10_000])
    refused(tmp_path / "best.pt", TypeError, "best.pt", "damaged")


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "best.pt")
    refused(tmp_path / "best.pt", TypeError, "best.pt", "no Ultralytics network", "timm:")


@pytest.mark.parametrize("name", ["yolo11n", "yolo11n-seg", "yolo11n-pose", "yolo11n-obb"])
def test_other_tasks_are_refused(name, tmp_path):
    YOLO(f"{name}.yaml").save(tmp_path / "best.pt")
    task = {"": "detect", "seg": "segment"}.get(name[8:], name[8:])
    refused(tmp_path / "best.pt", TypeError, f"is a {task} model", "must be a classification model")


def test_an_untrained_network_is_refused(tmp_path):
    YOLO("yolo11n-cls.yaml").save(tmp_path / "best.pt")
    refused(tmp_path / "best.pt", TypeError, "never been trained", "Train it first")


def test_found_in_the_weights_folder(teacher):
    """As upstream finds `model=`: a bare name may lie in the settings' weights folder."""
    folder = Path(settings["weights_dir"])
    folder.mkdir(exist_ok=True)
    shutil.copy(teacher, folder / "named.pt")
    assert Teacher("named.pt").source == str(folder / "named.pt")


@pytest.mark.parametrize("name", ["yolo11l-cls", "yolo11l-cls.pt"])
def test_official_names_are_downloaded_by_upstream(name, teacher, monkeypatch):
    asked = []

    def download(file):
        asked.append(file)
        return str(teacher)

    monkeypatch.setattr("ultralytics.nn.teacher_sources.attempt_download_asset", download)
    assert Teacher(name).source == str(teacher)
    assert asked == ["yolo11l-cls.pt"]


def test_a_failed_download_says_so(monkeypatch):
    def fail(file):
        raise ConnectionError("offline")

    monkeypatch.setattr("ultralytics.nn.teacher_sources.attempt_download_asset", fail)
    refused("yolo11l-cls.pt", FileNotFoundError, "teacher=yolo11l-cls.pt", "could not be downloaded", "give the file")


def test_home_is_expanded(teacher, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(teacher, tmp_path / "mine.pt")
    assert Teacher("~/mine.pt").source == str(tmp_path / "mine.pt")
