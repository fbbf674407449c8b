"""What comes before a training: what it says, what it measures, and that nothing of it is left."""

import re
from pathlib import Path

import pytest
from ultralytics.engine.distillation import check as checking
from ultralytics.engine.distillation.check import check, silenced
from ultralytics.models.distillation import TRAINERS
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.utils import LOGGER
from ultralytics.utils.callbacks import default_callbacks


@pytest.fixture
def said(monkeypatch):
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(LOGGER, level, lambda message, *args: lines.append(re.sub(r"\x1b\[\d+m", "", str(message))))
    return lines


@pytest.mark.parametrize("task", ["classify", "detect"])
def test_says_what_would_be_and_leaves_nothing(task, overrides, settings_of, said, tmp_path, monkeypatch):
    """The networks, the levels, how good the teacher is, a step; and no logger learns of it."""
    monkeypatch.chdir(tmp_path)
    settings = overrides if task == "classify" else settings_of(task)
    heard = [lambda trainer: pytest.fail("a callback was called")]
    monkeypatch.setitem(default_callbacks, "on_train_start", heard)
    before = {x for x in Path(settings["data"]).parent.rglob("*") if x.suffix != ".cache"}
    measured = check(TRAINERS[task], {**settings, "epochs": 7, "temperature": 3})
    text = "\n".join(said)
    assert "temperature 3" in text
    assert "stride 32  student" in text.replace("  stride", "stride")
    assert re.search(r"names [\d.]+% of 50 validation images" if task == "classify" else "mAP50-95", text)
    batches = 200 // 32 + 1 if task == "classify" else 24 // 8
    assert (measured["batches"], measured["epochs"], measured["batch"]) == (batches, 7, settings["batch"])
    assert measured["training"] == pytest.approx(7 * batches * measured["step"] / 3600)
    assert 0.1 < measured["memory"] < 50
    assert f"A step of {settings['batch']} images takes {measured['step']:.3g} s" in said[-1]
    assert not list(tmp_path.iterdir())
    assert {x for x in Path(settings["data"]).parent.rglob("*") if x.suffix != ".cache"} == before


def test_takes_no_more_steps_than_it_needs(overrides, said, monkeypatch):
    monkeypatch.setattr(checking, "STEPS", 2)
    taken = []

    class Counting(DistillationClassificationTrainer):
        def optimizer_step(self):
            taken.append(1)
            super().optimizer_step()

    check(Counting, {**overrides, "nbs": 1})
    assert len(taken) == 2


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"temperature": 0}, ValueError, "'temperature=0'"),
        ({"teacher": "nowhere.pt"}, FileNotFoundError, r"nowhere\.pt"),
        ({"resume": "last.pt"}, ValueError, "'resume=' goes on with a run that was checked"),
    ],
)
def test_what_a_run_is_refused_with_is_refused_here(given, error, words, overrides):
    with pytest.raises(error, match=words):
        check(DistillationClassificationTrainer, {**overrides, **given})
    assert not Path(overrides["project"]).exists()


def test_no_cache_is_begun(overrides, said):
    check(DistillationClassificationTrainer, {**overrides, "teacher_cache": "disk", "cache": "disk"})
    assert not (Path(overrides["data"]) / "teacher_cache").exists()
    assert not list(Path(overrides["data"]).rglob("*.npy"))
    assert any("the teacher is asked in each of them" in x for x in said)


def test_a_folder_that_a_run_could_not_write_to_is_refused(overrides):
    with pytest.raises(OSError, match=r"The run's folder cannot be written to: .* with 'project'"):
        check(DistillationClassificationTrainer, {**overrides, "project": "/proc/1/runs"})


@pytest.mark.parametrize(("hours", "words"), [(0.001, "1 min"), (0.5, "30 min"), (1.26, "1.3 hours")])
def test_durations_in_words(hours, words):
    assert checking._duration(hours) == words


def test_a_silent_trainer_is_of_the_module_of_its_class(overrides):
    """By which the rules find out what another process can import."""
    assert silenced(DistillationClassificationTrainer).__module__ == DistillationClassificationTrainer.__module__
