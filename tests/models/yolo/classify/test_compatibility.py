"""The manual's table of upstream's training features, row by row: each works as in plain training, or is refused."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    DISTILLATION_LOSSES,
    MANUALS,
    compatibility_table,
    compile_by_tracing,
    rows,
    same,
    train,
    weights,
)
from ultralytics import YOLO
from ultralytics.cfg.distillation import parse_arguments
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.utils import torch_utils
from ultralytics.utils.benchmarks import ProfileModels
from ultralytics.utils.torch_utils import model_info_for_loggers, unwrap_model


@dataclass
class Run:
    """A run that ended, and what it was at its start."""

    trainer: Any
    begun: dict[str, torch.Tensor]
    overrides: dict[str, Any]

    @property
    def files(self):
        return {file.name for file in self.trainer.wdir.iterdir()}

    @property
    def ended(self):
        return unwrap_model(self.trainer.model).state_dict()


def begun_of(run, file):
    """Compare the weights at the start with those of a file, the head aside."""
    backbone = {k: v for k, v in weights(file).items() if not k.startswith("model.10.")}
    return same({k: run.begun[k].float() for k in backbone}, {k: v.float() for k, v in backbone.items()})


def profiled(run):
    """Ask as upstream's loggers do, in the middle of a run, and return what its last.pt was exported to."""
    exported, shown = set(), {}

    def time_export(self, file):
        exported.add(Path(file).name)
        return 5.0, 1.0

    with pytest.MonkeyPatch.context() as patch:  # which takes a minute
        patch.setattr(ProfileModels, "profile_onnx_model", time_export)
        train(run.overrides, on_fit_epoch_end=lambda trainer: shown.update(model_info_for_loggers(trainer)))
    return exported if shown.get("model/speed_ONNX(ms)") == 5 else None


def saved_without_save(run):
    """Return what is written into a longer run's folder, in which each epoch that is saved has a file of its own."""
    trainer = train({**run.overrides, "epochs": 3, "save_period": 1})
    return {file.name for file in trainer.wdir.iterdir()}


WORKS = {
    "freeze=3": lambda run: [same_weight(run, f"model.{i}.conv.weight") for i in (0, 1, 3)] == [True, True, False],
    "dropout=0.2": lambda run: run.trainer.model.model[-1].drop.p == 0.2,
    "pretrained=path/to/weights.pt": lambda run: begun_of(run, run.overrides["pretrained"]),
    "optimizer=SGD": lambda run: type(run.trainer.optimizer).__name__ == "SGD",
    "optimizer=MuSGD": lambda run: type(run.trainer.optimizer).__name__ == "MuSGD",
    "optimizer=auto": lambda run: run.trainer.optimizer.param_groups[0]["initial_lr"] == 0.000714,  # 0.01 / (4 + 10)
    "cos_lr=True": lambda run: run.trainer.lf(0.25) == pytest.approx(1 - 0.99 * (1 - math.cos(math.pi / 4)) / 2),
    "nbs=8": lambda run: run.trainer.accumulate == 1,
    "batch=-1": lambda run: run.trainer.batch_size == 16,  # what upstream takes on a CPU
    "cache=ram": lambda run: run.trainer.train_loader.dataset.cache_ram,
    "fraction=0.5": lambda run: len(run.trainer.train_loader.dataset) == 100,
    "imgsz=40": lambda run: run.trainer.args.imgsz == 64,
    "seed=3": lambda run: not same(weights(run.trainer.last), weights(train(without(run, "seed")).last)),
    "epochs=9 time=0.0002": lambda run: len(rows(run.trainer)) < 9,
    "epochs=9 patience=1": lambda run: len(rows(run.trainer)) < 9,
    "epochs=2 save_period=1": lambda run: run.files == {"best.pt", "last.pt", "epoch0.pt", "epoch1.pt"},
    "save=False": lambda run: saved_without_save(run) == {"best.pt", "last.pt", "epoch2.pt"},  # as upstream, the last
    "epochs=2 val=False": lambda run: float(rows(run.trainer)[0]["metrics/accuracy_top1"]) == 0,
    "plots=True": lambda run: (run.trainer.save_dir / "results.png").exists(),
    "profile=True": lambda run: profiled(run) == {"last.onnx"},
    "cls_pw=0.5": lambda run: same(weights(run.trainer.last), weights(train(without(run, "cls_pw")).last)),
    "mixup=0.5 cutmix=0.5": lambda run: (
        not same(weights(run.trainer.last), weights(train(without(run, "mixup", "cutmix")).last))
    ),
    "quantize=8 feature_distill=False": lambda run: torch_utils.is_qat(run.trainer.model),
    "compile=True": lambda run: hasattr(run.trainer.model, "_orig_mod"),
}
REFUSED = {
    "quantize=8": "'quantize=8' would quantize the adapters",
    "freeze=11": "'freeze=11' froze the entire student",
}
ELSEWHERE = {"data=[a, b]": "below", "device=0,1": "test_distill_train_ddp.py", "resume=True": "test_resumable.py"}
SLOW = {"compile=True", "quantize=8 feature_distill=False", "optimizer=MuSGD", "epochs=9 patience=1"}


def same_weight(run, name):
    return torch.equal(run.begun[name], run.ended[name])


def without(run, *names):
    return {k: v for k, v in run.overrides.items() if k not in names}


@pytest.mark.parametrize("row", [pytest.param(r, marks=pytest.mark.slow) if r in SLOW else r for r in WORKS])
def test_works(row, overrides, tmp_path, monkeypatch):
    if "quantize" in row:
        pytest.importorskip("modelopt")
    if "compile" in row:  # what its C++ compiler makes of a network is tests/nn/distillation/test_teacher.py's
        compile_by_tracing(monkeypatch)
    settings = {"fraction": 0.2, **overrides, **parse_arguments(row.split())}
    if "pretrained" in row:  # of the student's own architecture
        settings["pretrained"] = str(train({**overrides, "fraction": 0.2, "project": str(tmp_path)}).best)
    begun = {}
    trainer = train(settings, on_train_start=lambda t: begun.update(copied(t)))
    assert WORKS[row](Run(trainer, begun, settings))
    on = [name for name in DISTILLATION_LOSSES if settings.get(name.replace("_loss", "_distill"), True)]
    assert all(float(row[f"train/{name}"]) > 0 for row in rows(trainer) for name in on)
    assert all(math.isfinite(float(v)) for row in rows(trainer) for v in row.values())
    assert YOLO(trainer.best)(torch.rand(1, 3, 32, 32))[0].probs.data.shape == (10,)
    assert not any("distill_adapters" in key for key in weights(trainer.best))


def copied(trainer):
    return {k: v.clone() for k, v in unwrap_model(trainer.model).state_dict().items()}


@pytest.mark.parametrize("row", REFUSED)
def test_is_refused(row, overrides):
    with pytest.raises((ValueError, RuntimeError), match=re.escape(REFUSED[row])):
        train({**overrides, **parse_arguments(row.split())})


def test_a_list_of_datasets(overrides, digits):
    """Upstream's MultiTrainer, from its own interface."""
    arguments = {**overrides, "fraction": 0.2, "data": [str(digits), str(digits)]}
    del arguments["model"]
    results = YOLO("yolo11n-cls.yaml").train(trainer=DistillationClassificationTrainer, **arguments)
    assert list(results) == ["digits", "digits-2"]
    assert all(0 <= metrics["metrics/accuracy_top1"] <= 1 for metrics in results.values())
    tables = list(Path(overrides["project"]).glob("*/digits*/results.csv"))
    assert len(tables) == 2
    assert all("train/feature_loss" in table.read_text() for table in tables)


def test_tuning_is_refused_by_upstream(overrides):
    """Its tuner starts upstream's own trainer."""
    arguments = {k: v for k, v in overrides.items() if k != "model"}
    with pytest.raises(SyntaxError, match="'teacher' is not a valid YOLO argument"):
        YOLO("yolo11n-cls.yaml").tune(trainer=DistillationClassificationTrainer, iterations=1, **arguments)
    assert not Path(overrides["project"]).exists()


@pytest.mark.parametrize("manual", MANUALS)
def test_the_manual_lists_these(manual):
    """Each row of its table is one of the above, and says as much."""
    assert compatibility_table(manual, "compatibility") == {
        **dict.fromkeys(WORKS | ELSEWHERE, "works"),
        **dict.fromkeys([*REFUSED, "model.tune()"], "refused"),
    }
