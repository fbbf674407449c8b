"""The training script, as a user calls it."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import timm
import yaml
from helpers import TRAINING
from safetensors.torch import save_file
from teachers import seen
from ultralytics.cfg.distillation import DistillationArgs
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.distillation.classifier import ClassificationTeacher
from ultralytics.utils import LOGGER

import train

ROOT = Path(__file__).resolve().parents[1]


def line(settings):
    return [f"{k}={v}" for k, v in settings.items()]


def test_help_names_every_parameter():
    done = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True, check=True)
    shown = {line.split(":")[0].strip() for line in done.stdout.splitlines()}
    assert shown >= {f"{f.name}={f.default}" for f in fields(DistillationArgs)}
    for word in ("use_distillation", "python train.py"):
        assert word in done.stdout


def test_trains_with_a_teacher(overrides):
    trainer = train.main(line({**overrides, "temperature": 2, "fraction": 0.2}))
    assert type(trainer) is DistillationClassificationTrainer
    assert trainer.args.temperature == 2
    assert trainer.best.exists()


def test_trains_without_a_teacher(overrides):
    trainer = train.main(["use_distillation=False", *line({**overrides, "fraction": 0.2})])
    assert type(trainer) is ClassificationTrainer
    assert trainer.loss_names == ("loss",)


def test_fits_a_teacher_a_head(overrides, tmp_path):
    """Whatever its maps, as no student learns here; and says what to give to a run that does."""
    network = seen(timm.create_model("resnet18", num_classes=0))
    save_file(network.state_dict(), tmp_path / "backbone.safetensors")
    given = {"teacher": f"timm:resnet18@{tmp_path / 'backbone.safetensors'}", "imgsz": 40, "data": overrides["data"]}
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LOGGER, "info", said.append)
        train.main(["probe", *line({**given, "project": overrides["project"], "device": "cpu"})])
    (file,) = Path(overrides["project"]).glob("probe/weights/probe-*.pt")
    assert said[-1] == f"To be given as 'teacher={file}'"
    assert any("of 50 validation images correctly" in text for text in said)
    assert ClassificationTeacher(str(file)).names == [str(c) for c in range(10)]
    assert not (file.parent / "last.pt").exists()


def test_resumes(overrides):
    class Stopped(Exception):
        pass

    def stop(trainer):
        raise Stopped

    trainer = DistillationClassificationTrainer(overrides={**overrides, "epochs": 2, "fraction": 0.2})
    trainer.add_callback("on_model_save", stop)
    with pytest.raises(Stopped):
        trainer.train()
    resumed = train.main([f"resume={trainer.last}"])
    assert resumed.start_epoch == 1
    assert resumed.save_dir == trainer.save_dir


@pytest.mark.parametrize("missing", ["data", "teacher"])
def test_without_settings_it_points_to_the_example(missing, digits, teacher, monkeypatch):
    monkeypatch.setitem(train.TRAINING, "data", "nowhere" if missing == "data" else str(digits))
    monkeypatch.setattr(train, "example_teacher", lambda: None if missing == "teacher" else str(teacher))
    with pytest.raises(FileNotFoundError, match=r"distill_train_example\.py"):
        train.main([])


def test_the_newest_finished_example_teaches(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SETTINGS", {"runs_dir": str(tmp_path)})
    assert train.example_teacher() is None
    files = []
    for i, name in enumerate(["distill_example", "distill_example-2", "distill_example-3"]):
        files.append(tmp_path / "classify" / name / "teacher" / "weights" / "best.pt")
        files[-1].parent.mkdir(parents=True)
        files[-1].touch()
        os.utime(files[-1], (i, i))
    for file in files[:2]:  # the third was interrupted
        (file.parents[2] / "comparison.png").touch()
    assert train.example_teacher() == str(files[1])


def test_configuration_file(overrides, tmp_path):
    """As for the yolo command: values of the file, unless the command line has its own."""
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({**overrides, "fraction": 0.2, "temperature": 2.0, "distill_alpha": 0.5}))
    trainer = train.main([f"cfg={file}", "distill_alpha=0.6"])
    assert (trainer.args.temperature, trainer.args.distill_alpha) == (2.0, 0.6)


def test_use_distillation_is_a_switch():
    with pytest.raises(TypeError, match="'use_distillation=no'"):
        train.main(["use_distillation=no"])
    with pytest.raises(ValueError, match="No teacher given"):
        train.main(["use_distillation", "data=nowhere"])


def test_uses_what_the_example_made(digits, teacher, monkeypatch, tmp_path):
    monkeypatch.setitem(train.TRAINING, "data", str(digits))
    monkeypatch.setattr(train, "example_teacher", lambda: str(teacher))
    trainer = train.main([*line({**TRAINING, "epochs": 1, "fraction": 0.2}), f"project={tmp_path}"])
    assert trainer.args.teacher == str(teacher)
