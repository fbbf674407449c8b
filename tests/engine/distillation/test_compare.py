"""Paired comparisons: their statistics against SciPy and by hand, real runs, and one that goes on where it stopped."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import TRAINING
from scipy import stats
from ultralytics.engine.distillation import compare as comparison
from ultralytics.engine.distillation.compare import compare, evaluate, summarise, table, train_student
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer


def test_summary_is_the_paired_test():
    plain, distilled = [80.0, 82.0, 81.0], [83.0, 86.0, 83.5]
    summary = summarise(
        {
            "plain": dict(zip("012", plain, strict=True)),
            "distilled": dict(zip("012", distilled, strict=True)),
            "one": {"1": 82.5},
        }
    )
    assert summary["plain"]["mean"] == 81
    assert summary["plain"]["std"] == 1
    row = summary["distilled"]
    assert row["differences"] == [3.0, 4.0, 2.5]
    interval = stats.ttest_rel(distilled, plain).confidence_interval(0.95)
    assert row["interval"] == pytest.approx([interval.low, interval.high])
    half = 4.302653 * np.std([3.0, 4.0, 2.5], ddof=1) / np.sqrt(3)  # Student's t, 2 degrees of freedom
    assert row["interval"] == pytest.approx([19 / 6 - half, 19 / 6 + half])
    assert summary["one"]["difference"] == 0.5
    assert "interval" not in summary["one"]
    assert "| distilled | 84.17 | 1.61 | +3.17 |" in table(summary, "top-1")


@pytest.fixture
def settings(overrides):
    return {**overrides, "fraction": 0.2, "seeds": 2}


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"seeds": 1}, ValueError, "Give two seeds or more"),
        ({"seeds": [3, 3]}, ValueError, "Give two seeds or more"),
        ({"seeds": "3"}, TypeError, "must be int or a list of int"),
        ({"seeds": True}, TypeError, "must be int or a list of int"),
        ({"seeds": [-1, 2]}, TypeError, "each 0 or greater"),
        ({"save_dir": "here"}, ValueError, "leave out 'save_dir'"),
        ({"teacher": None}, ValueError, "teacher"),
        ({"seed": 1}, ValueError, "leave out 'seed'"),
        ({"temperature": 0}, ValueError, "'temperature=0'"),
        ({"temperatur": 2}, SyntaxError, "temperatur"),
        ({"teacher": "nowhere.pt"}, FileNotFoundError, r"nowhere\.pt"),
    ],
)
def test_mistakes_end_before_any_file(given, error, words, settings):
    with pytest.raises(error, match=words):
        compare(DistillationClassificationTrainer, {**settings, **given})
    assert not Path(settings["project"]).exists()


@pytest.mark.slow
def test_compares_with_the_same_seeds_and_goes_on_where_it_stopped(settings, monkeypatch):
    """Stopped in the middle of a run, it goes on with that run, and what is finished is not trained again."""
    settings |= {"epochs": 2, "seeds": [3, 5]}
    begun = []
    real = comparison.train_student

    def stopped(trainer_class, overrides, name, on_epoch):
        begun.append(name)

        def stop(trainer):
            if name == "distilled_5" and trainer.epoch == 1:
                raise KeyboardInterrupt
            on_epoch(trainer)

        return real(trainer_class, overrides, name, stop)

    monkeypatch.setattr(comparison, "train_student", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(DistillationClassificationTrainer, settings)
    assert begun == ["plain_3", "distilled_3", "plain_5", "distilled_5"]
    monkeypatch.setattr(comparison, "train_student", lambda *args: begun.append(args[2]) or real(*args))
    folder = compare(DistillationClassificationTrainer, settings)
    assert begun[4:] == ["distilled_5"]
    assert folder == Path(settings["project"]) / "compare"
    report = json.loads((folder / "compare.json").read_text())
    for variant in ("plain", "distilled"):
        assert list(report["top1"][variant]) == ["3", "5"]
        assert all(len(curve) == 2 for curve in report["curves"][variant].values())
    assert list(report["seconds"]["distilled"]) == ["3"]
    assert report["seconds"]["plain"]["5"] > 0
    text = (folder / "compare.md").read_text()
    assert f"| plain | {np.mean(list(report['top1']['plain'].values())):.2f} |" in text
    assert "95 % interval" in text.splitlines()[-1]
    assert (folder / "compare.png").stat().st_size > 10_000
    assert sorted(x.name for x in folder.iterdir() if x.is_dir() and not x.name.startswith("val")) == [
        "distilled_3",
        "distilled_5",
        "plain_3",
        "plain_5",
    ]

    compare(DistillationClassificationTrainer, settings)
    assert len(begun) == 5
    monkeypatch.setattr(comparison, "train_students", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compare(DistillationClassificationTrainer, {**settings, "temperature": 2})
    assert (folder.parent / "compare-2").is_dir()


@pytest.mark.parametrize(
    ("differences", "words"),
    [([1.0, 2.0, 1.5], "show that it helps"), ([-1.0, -2.0, -1.5], "show that it harms"), ([1.0, -1.0], "do not show")],
)
def test_says_what_the_seeds_show(differences, words):
    plain = {str(i): 80.0 for i in range(len(differences))}
    distilled = {str(i): 80.0 + d for i, d in enumerate(differences)}
    row = summarise({"plain": plain, "distilled": distilled})["distilled"]
    verdict = comparison._verdict(row, "top-1")
    assert words in verdict.text
    assert (verdict.gain, list(verdict.interval)) == (row["difference"], row["interval"])


def test_a_damaged_run_starts_anew(settings, tmp_path, monkeypatch):
    """A kill can leave upstream's plain run with half a checkpoint."""
    last = tmp_path / "plain_0" / "weights" / "last.pt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"PK\x03\x04half")
    said = []
    monkeypatch.setattr(comparison.LOGGER, "warning", said.append)
    arguments = {k: settings[k] for k in (*TRAINING, "model", "data", "fraction")}
    overrides = {**arguments, "project": str(tmp_path), "exist_ok": True}
    row = train_student(DistillationClassificationTrainer, overrides, "plain_0")
    assert "starts anew" in said[0]
    assert len(row["curve"]) == 1
    assert row["seconds"] > 0
    again = train_student(DistillationClassificationTrainer, overrides, "plain_0")
    assert math.isnan(again["seconds"])
    assert again["top1"] == row["top1"]


@pytest.mark.parametrize(("batch", "measured"), [(8, 8), (-1, None), (0.7, None)])
def test_checkpoints_are_measured_on_the_classes_of_the_training(batch, measured, monkeypatch):
    """In batches of its size, unless that was left to the memory, which upstream asks in training alone."""
    asked = {}

    class Model:
        def __init__(self, file):
            pass

        def val(self, **given):
            asked.update(given)
            return SimpleNamespace(top1=0.5, top5=0.9)

        def parameters(self):
            return []

    monkeypatch.setattr(comparison, "YOLO", Model)
    training = {"data": "x", "imgsz": 32, "batch": batch, "classes": [0], "epochs": 3}
    assert evaluate(DistillationClassificationTrainer, "best.pt", training)["top1"] == 0.5
    assert (asked["classes"], asked["imgsz"], asked["split"]) == ([0], 32, "val")
    assert asked.get("batch") == measured
    assert "epochs" not in asked
