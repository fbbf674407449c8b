"""The report of a run that lies there: as the run itself wrote it, and with a plain run that was trained later."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from helpers import Stopped, plain, stop_after, train
from ultralytics.engine.distillation.report_again import report_again
from ultralytics.models.distillation import TRAINERS
from ultralytics.models.distillation.command import run
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer as Trainer


def figures(folder):
    """Return the figures of a report, without what is measured anew each time."""
    found = json.loads((folder / "distillation.json").read_text())
    for row in found["networks"].values():
        del row["milliseconds"]
    return found


def content(folder):
    """Return what is in a folder but for its report."""
    files = [x for x in folder.rglob("*") if x.is_file() and not x.name.startswith("distillation")]
    return {x.relative_to(folder): hashlib.sha256(x.read_bytes()).hexdigest() for x in files}


@pytest.mark.parametrize(
    ("task", "family", "given"),
    [
        ("classify", "11", {"temperature": 6, "temperature_end": 2, "distill_balance": "auto"}),
        ("classify", "11", {"teacher": "self", "teacher_cache": None}),
        ("detect", "11", {"rect": True}),
        ("pose", "26", {}),
    ],
)
def test_is_that_of_the_run(task, family, given, overrides, settings_of, undrawn):
    """Wherever it lies by now; the pull, which needs the losses' own layers, is what was measured then."""
    settings = overrides if task == "classify" else settings_of(task, family)
    trainer = train({**settings, "plots": True, "fraction": 0.34, "epochs": 2, **given}, TRAINERS[task])
    moved = shutil.move(trainer.save_dir, Path(settings["project"]).parent / "moved")
    expected, before = figures(moved), content(moved)
    (moved / "distillation.html").unlink()
    assert run(["report", f"run={moved}"]) == moved / "distillation.html"
    assert figures(moved) == expected
    assert (moved / "distillation.html").exists()
    assert content(moved) == before


def test_compares_with_a_plain_run_that_came_later(overrides, undrawn):
    settings = {**overrides, "fraction": 0.34}
    folder = train(settings).save_dir  # without plots, and so without a report
    later = train({**plain(overrides), "fraction": 0.34, "seed": 5, "name": "later"}, ClassificationTrainer).save_dir
    assert not (folder / "distillation.json").exists()
    report_again(Trainer, folder, {})
    assert list(figures(folder)["networks"]) == ["student", "teacher"]
    assert figures(folder)["verdict"]["gain"] is None
    report_again(Trainer, folder, {"baseline": str(later)})
    found = figures(folder)
    assert list(found["networks"]) == ["student", "teacher", "baseline"]
    gain = 100 * (found["networks"]["student"]["top1"] - found["networks"]["baseline"]["top1"])
    assert found["verdict"]["gain"] == pytest.approx(gain)
    assert found["pull"] == {}


def test_a_stopped_run_has_one_as_far_as_it_came(overrides, undrawn):
    with pytest.raises(Stopped):
        train({**overrides, "fraction": 0.34, "epochs": 3}, on_fit_epoch_end=stop_after(1))
    (folder,) = Path(overrides["project"]).iterdir()
    before = content(folder)
    report_again(Trainer, folder, {})
    assert list(figures(folder)["networks"]) == ["student", "teacher"]
    assert content(folder) == before


def test_says_of_a_stopped_run_that_it_is_one(overrides, undrawn):
    with pytest.raises(Stopped):
        train({**overrides, "fraction": 0.34, "epochs": 7}, on_fit_epoch_end=stop_after(5))
    (folder,) = Path(overrides["project"]).iterdir()
    report_again(Trainer, folder, {})
    found = figures(folder)
    assert "The run was stopped after epoch 6 of 7; `resume` goes on with it." in found["verdict"]["text"]
    assert not any("rose by" in x for x in found["findings"])


def test_the_baseline_that_the_run_was_given_stays(overrides, tmp_path, undrawn):
    given = {**plain(overrides), "fraction": 0.2, "batch": 16, "project": str(tmp_path / "elsewhere")}
    baseline = train(given, ClassificationTrainer).save_dir
    folder = train({**overrides, "fraction": 0.2, "baseline": str(baseline)}).save_dir
    report_again(Trainer, folder, {})
    assert "baseline" in figures(folder)["networks"]
    assert "The plain run had another `batch`, so not all of it" in figures(folder)["verdict"]["text"]
    shutil.rmtree(baseline)
    report_again(Trainer, folder, {})
    assert "baseline" not in figures(folder)["networks"]


@pytest.mark.parametrize("name", ["epochs", "imgsz", "temperature", "model", "seeds"])
def test_the_runs_own_arguments_are_not_given_again(name, tmp_path):
    with pytest.raises(ValueError, match=f"'{name}=' is the run's own, and a report takes"):
        report_again(Trainer, tmp_path, {name: 1})


def test_damaged_files_are_named(overrides, undrawn):
    folder = train({**overrides, "fraction": 0.2, "plots": True}).save_dir
    (folder / "distillation.json").write_text("{")
    report_again(Trainer, folder, {})  # which is written again
    assert figures(folder)["pull"] == {}
    header = (folder / "results.csv").read_text().splitlines()[0]
    for content in (header + "\n", ""):
        (folder / "results.csv").write_text(content)
        with pytest.raises(ValueError, match=r"has no epoch in its 'results\.csv'"):
            report_again(Trainer, folder, {})
    best = folder / "weights" / "best.pt"
    best.write_bytes(best.read_bytes()[:1000])
    with pytest.raises(ValueError, match="has weights that cannot be read"):
        report_again(Trainer, folder, {})


def test_a_teacher_that_has_moved_is_given_again(overrides, teacher, tmp_path, undrawn):
    mine = shutil.copy(teacher, tmp_path / "mine.pt")
    folder = train({**overrides, "teacher": str(mine), "fraction": 0.2}).save_dir
    moved = shutil.move(mine, tmp_path / "moved.pt")
    with pytest.raises(FileNotFoundError, match=r"mine\.pt"):
        report_again(Trainer, folder, {})
    assert not (folder / "distillation.json").exists()
    report_again(Trainer, folder, {"teacher": str(moved)})
    assert "teacher" in figures(folder)["networks"]


def test_what_is_no_distilled_run_is_refused(overrides, tmp_path):
    folder = train({**plain(overrides), "fraction": 0.2}, ClassificationTrainer).save_dir
    with pytest.raises(ValueError, match=r"was trained without a teacher\. Give the distilled run, and this one as"):
        report_again(Trainer, folder, {})
    for name in ("weights/best.pt", "results.csv"):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"has no '{name}'"):
            report_again(Trainer, folder, {})
        (folder / name).touch()


def test_a_run_whose_teacher_had_no_weight_is_refused(overrides):
    folder = train({**overrides, "distill_alpha": 0, "fraction": 0.2}).save_dir
    with pytest.raises(ValueError, match="has nothing to report"):
        report_again(Trainer, folder, {})
