"""A stopped run: its checkpoints are whole, and resumed it is the run that never stopped."""

import os
import shutil
from functools import partialmethod
from pathlib import Path, PurePath

import pytest
import torch
from helpers import Stopped, plain, rows, same, stop_after, train, weights
from ultralytics.engine.distillation import run_files
from ultralytics.engine.distillation.resumable import ResumableTrainer
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.tasks import load_checkpoint, torch_safe_load
from ultralytics.utils import LOGGER


def figures(trainer):
    """Return results.csv but for the time, and val/loss: a mean over batches whose order upstream shuffles."""
    return [{k: v for k, v in row.items() if k not in {"time", "val/loss"}} for row in rows(trainer)]


@pytest.fixture(scope="module")
def whole_runs():
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"batch": 64}, {"batch": 16, "optimizer": "SGD"}], ids=["AdamW", "accumulated"])
@pytest.mark.parametrize("stopped_after", [0, 1, 2])
def test_a_resumed_run_is_the_run_that_never_stopped(stopped_after, settings, overrides, tmp_path, whole_runs):
    """Bit for bit on the CPU: weights, best epoch and the figures in results.csv."""
    settings = {**overrides, **settings, "epochs": 4, "dropout": 0.2, "fraction": 0.5}
    key = settings["optimizer"]
    if key not in whole_runs:
        whole = train({**settings, "project": str(tmp_path / "whole")})
        whole_runs[key] = weights(whole.last), weights(whole.best), figures(whole)
    with pytest.raises(Stopped):
        train(settings, on_fit_epoch_end=stop_after(stopped_after))
    (last,) = Path(overrides["project"]).glob("*/weights/last.pt")
    resumed = train({"resume": str(last)})
    last, best, table = whole_runs[key]
    assert figures(resumed) == table
    assert same(weights(resumed.last), last)
    assert same(weights(resumed.best), best)


def test_self_distillation_resumes_as_the_same_run(overrides, tmp_path):
    settings = {**overrides, "teacher": "self", "epochs": 3, "self_distill_start": 1}
    whole = train({**settings, "project": str(tmp_path / "whole")})
    with pytest.raises(Stopped):
        train(settings, on_fit_epoch_end=stop_after(1))
    (last,) = Path(overrides["project"]).glob("*/weights/last.pt")
    assert same(weights(train({"resume": str(last)}).last), weights(whole.last))


class ResumableClassifier(ResumableTrainer, ClassificationTrainer):
    """Upstream's trainer, resumable, without a teacher."""


@pytest.mark.parametrize("best", [0, 1])
def test_without_a_stop_it_trains_as_upstream_does(best, overrides, tmp_path, monkeypatch):
    """Whichever epoch was the best."""
    validate = BaseTrainer.validate

    def judge(trainer):
        metrics, _ = validate(trainer)
        fitness = 1.0 if trainer.epoch == best else 0.5
        trainer.best_fitness = max(trainer.best_fitness or 0, fitness)
        return metrics, fitness

    monkeypatch.setattr(BaseTrainer, "validate", judge)
    settings = {**plain(overrides), "epochs": 2, "batch": 16}
    ours = train({**settings, "project": str(tmp_path / "ours")}, ResumableClassifier)
    theirs = train({**settings, "project": str(tmp_path / "theirs")}, ClassificationTrainer)
    assert figures(ours) == figures(theirs)
    for name in ("last", "best"):
        a, b = (torch.load(getattr(t, name), weights_only=False) for t in (ours, theirs))
        assert a.keys() == b.keys()
        assert same(a["model"].state_dict(), b["model"].state_dict())
        assert a["train_results"]["epoch"] == b["train_results"]["epoch"] == [1, 2]
        assert a["train_metrics"].keys() == b["train_metrics"].keys()
    assert same(weights(ours.last), weights(ours.best)) == (best == 1)


@pytest.mark.parametrize("original", [True, False])
def test_a_run_goes_on_where_its_files_lie(original, overrides, tmp_path, monkeypatch):
    """Also one that began with relative paths, which are told as text, from another folder, beside the original."""
    data = Path(shutil.copytree(overrides["data"], tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    Path("names.yaml").write_text(f"names: {[str(i) for i in range(10)]}")
    given = {"data": Path("data"), "teacher_names": "names.yaml", "epochs": 2, "fraction": 0.3}
    with pytest.raises(Stopped):
        train({**overrides, **given}, on_fit_epoch_end=stop_after(0))
    (last,) = Path(overrides["project"]).glob("*/weights/last.pt")
    arguments = torch.load(last, weights_only=False)["train_args"]
    assert arguments["data"] == str(data)
    assert not [k for k, v in arguments.items() if isinstance(v, PurePath)]
    link = os.link if original else shutil.copy2  # a copy may share its files with the original until they are written
    copied = Path(shutil.copytree(last.parents[1], tmp_path / "copied", copy_function=link))
    alone = Path(shutil.copy(last, tmp_path / "last.pt"))
    before = {x: x.read_bytes() for x in last.parents[1].rglob("*") if x.is_file()}
    if not original:
        shutil.rmtree(last.parents[1])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"'resume={alone}' is a copy from the run in '{last.parents[1]}'"):
        train({"resume": str(alone)})
    Path("link.pt").symlink_to(copied / "weights" / "last.pt")
    resumed = train({"resume": "../copied/weights/last.pt" if original else "link.pt"})
    assert resumed.save_dir == copied
    assert len(rows(resumed)) == 2
    if original:
        assert {x: x.read_bytes() for x in last.parents[1].rglob("*") if x.is_file()} == before
        assert train({"resume": str(alone), "save_dir": str(tmp_path / "given")}).save_dir == tmp_path / "given"
        assert train({"resume": str(last)}).save_dir == last.parents[1]
    else:
        assert not last.parents[1].exists()


def test_what_is_no_checkpoint_resumes_nothing(overrides, tmp_path):
    """Where upstream would go on with the latest run."""
    with pytest.raises(Stopped):
        train({**overrides, "epochs": 2, "fraction": 0.2}, on_fit_epoch_end=stop_after(0))
    for given, what in ((tmp_path / "typo.pt", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(FileNotFoundError, match=rf"'resume={given}' {what}\. Give the 'last.pt' of a run"):
            train({"resume": str(given)})


def test_upstreams_checkpoints_resume_too(overrides):
    with pytest.raises(Stopped):
        train({**plain(overrides), "epochs": 2}, ClassificationTrainer, on_fit_epoch_end=stop_after(0))
    (last,) = Path(overrides["project"]).glob("*/weights/last.pt")
    resumed = train({"resume": str(last)}, ResumableClassifier)
    assert [row["epoch"] for row in rows(resumed)] == ["1", "2"]


def test_checkpoints_of_an_unfinished_run_open_anywhere(overrides):
    with pytest.raises(Stopped):
        train({**overrides, "epochs": 2}, on_fit_epoch_end=stop_after(0))
    (last,) = Path(overrides["project"]).glob("*/weights/last.pt")
    ckpt, _ = torch_safe_load(last, safe_only=True)  # nothing in it but upstream's classes, tensors and plain values
    assert "run_state" in ckpt
    assert ckpt["scaler"] == {}  # the run may go on in another precision
    assert load_checkpoint(last)[0](torch.rand(1, 3, 32, 32))[0].shape == (1, 10)


@pytest.mark.parametrize("fault", ["full disk", "killed"])
def test_a_fault_while_writing_leaves_the_checkpoint_before_it(fault, overrides, monkeypatch):
    """Whatever breaks a write, last.pt is the whole one before it, and no partial file stays after the end."""
    flush = os.fsync
    seen = {}

    def broken(descriptor):
        if seen.get("epoch") == 1:
            (last,) = Path(overrides["project"]).glob("*/weights/last.pt")
            seen["before"] = last.read_bytes()
            os.truncate(descriptor, 1000)
            raise OSError(28, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(run_files.os, "fsync", broken)
    if fault == "killed":  # nothing cleans up
        monkeypatch.setattr(run_files.shutil, "rmtree", lambda *args, **kwargs: None)
        monkeypatch.setattr(Path, "mkdir", partialmethod(Path.mkdir, exist_ok=True))
    with pytest.raises(OSError, match=r"No space left on device.*make room, then go on with 'resume=.*last.pt'"):
        train({**overrides, "epochs": 3}, on_train_epoch_start=lambda t: seen.update(epoch=t.epoch))
    (last,) = Path(overrides["project"]).glob("*/weights/last.pt")
    assert last.read_bytes() == seen["before"]
    assert (last.parent / ".partial").exists() == (fault == "killed")
    monkeypatch.undo()
    resumed = train({"resume": str(last)})
    assert resumed.start_epoch == 1
    assert sorted(file.name for file in last.parent.iterdir()) == ["best.pt", "last.pt"]


@pytest.mark.slow
def test_with_loader_workers_a_resumed_run_differs_less_than_one_of_another_seed(overrides, tmp_path):
    """Workers draw ahead, so the order of images and their augmentation begin anew; all else is as it was."""

    class WithWorkers(DistillationClassificationTrainer):
        def get_dataloader(self, *args, **kwargs):
            self.args.workers = 2  # upstream sets none on the CPU
            return super().get_dataloader(*args, **kwargs)

    def run(name, **settings):
        return train({**overrides, "epochs": 4, "project": str(tmp_path / name), **settings}, WithWorkers)

    def distance(a, b):
        a, b = (torch.cat([v.flatten() for k, v in x.items() if k.endswith("weight")]) for x in (a, b))
        return ((a - b).norm() / b.norm()).item()

    whole, other = weights(run("whole").last), weights(run("other", seed=1).last)
    with pytest.raises(Stopped):
        train({**overrides, "epochs": 4}, WithWorkers, on_fit_epoch_end=stop_after(2))
    (last,) = Path(overrides["project"]).glob("*/weights/last.pt")
    resumed = weights(train({"resume": str(last)}, WithWorkers).last)
    assert distance(resumed, whole) < distance(other, whole) / 10


@pytest.mark.parametrize("change", ["batch", "images"])
def test_an_epoch_of_another_length_trains_too(change, overrides, tmp_path):
    """The batches that wait for an optimizer step are counted from the last one, not from the run's start."""
    data = shutil.copytree(overrides["data"], tmp_path / "data", ignore=shutil.ignore_patterns("*.cache"))
    settings = {**overrides, "data": str(data), "epochs": 3, "batch": 8, "nbs": 8, "warmup_epochs": 0.0}
    with pytest.raises(Stopped):
        train(settings, on_fit_epoch_end=stop_after(1))
    (last,) = Path(overrides["project"]).glob("*/weights/last.pt")
    if change == "images":
        for name in "3456789":
            for file in sorted((data / "train" / name).iterdir())[5:]:
                file.unlink()
    given = {"resume": str(last), **({"batch": 32} if change == "batch" else {})}
    steps = []

    class Counting(DistillationClassificationTrainer):
        def optimizer_step(self):
            steps.append(self._iteration)
            super().optimizer_step()

    trainer = train(given, Counting)
    assert len(steps) >= len(trainer.train_loader) - 1 > 2


def test_skipped_batches_are_counted_on(overrides):
    """A run that is restarted again and again stops as any other."""

    def spoil(trainer):
        if trainer.epoch == 0:
            trainer.distillation_loss.temperature = 1e-45

    with pytest.raises(Stopped):
        train({**overrides, "epochs": 2}, on_train_batch_start=spoil, on_fit_epoch_end=stop_after(0))
    (last,) = Path(overrides["project"]).glob("*/weights/last.pt")
    resumed = train({"resume": str(last)})
    assert dict(resumed.skipped) == {"response_loss": 7}
    assert resumed._batches == 14


def test_what_a_kill_in_the_last_instant_left_is_swept_away(overrides):
    trainer = train({**overrides, "fraction": 0.2})
    (trainer.wdir / ".partial").mkdir()
    (trainer.wdir / ".partial" / "best.pt").touch()
    (trainer.wdir / ".lock").touch()
    with pytest.raises(ValueError, match="is of a finished run"):
        DistillationClassificationTrainer(overrides={"resume": str(trainer.last)})
    assert sorted(os.listdir(trainer.wdir)) == ["best.pt", "last.pt"]


def test_a_finished_run_that_cannot_be_drawn_is_finished(overrides, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    said = []
    monkeypatch.setattr(ClassificationTrainer, "plot_metrics", fail)
    monkeypatch.setattr(LOGGER, "warning", lambda message, *args: said.append(str(message)))
    trainer = train({**plain(overrides), "plots": True, "fraction": 0.2}, ResumableClassifier)
    assert any("saved, but could not draw its results" in line for line in said)
    assert trainer.best.exists()


def test_last_is_the_last_to_be_replaced(overrides, monkeypatch):
    """Killed between best.pt and last.pt, a run repeats the epoch; the other way round it would miss its best."""
    replaced, replace = [], os.replace

    def stop_between(source, target):
        if len(replaced) == 3:  # best.pt and last.pt of the first epoch, and one of the second
            raise OSError(5, "Input/output error")
        replace(source, target)
        replaced.append(Path(target).name)

    monkeypatch.setattr(run_files.os, "replace", stop_between)
    monkeypatch.setattr(DistillationClassificationTrainer, "validate", better_every_epoch)
    with pytest.raises(OSError, match="Input/output error"):
        train({**overrides, "epochs": 2, "fraction": 0.2})
    assert replaced == ["best.pt", "last.pt", "best.pt"]


def better_every_epoch(trainer):
    trainer.best_fitness = float(trainer.epoch)
    return {}, trainer.best_fitness
