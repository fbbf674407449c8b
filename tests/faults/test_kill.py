"""SIGKILL at random instants: whatever a run was doing, it can be resumed, and ends as if nothing had happened."""

import os
import random
import sys
from pathlib import Path

import pytest
import torch
from helpers import same, train, weights
from ultralytics import YOLO
from ultralytics.models.distillation import TRAINERS

sys.path.insert(0, str(Path(__file__).parent))

from mortal import PHASES, Process

pytestmark = pytest.mark.slow
KILLS, EPOCHS = 5, 7  # of each run
LONGEST = {"training": 0.5, "validation": 0.02, "writing": 0.15, "finishing": 0.2}  # seconds, about


@pytest.mark.parametrize(("task", "seed"), [("classify", 0), ("classify", 1), ("pose", 2)])
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(
    task, seed, overrides, settings_of, tmp_path, monkeypatch, as_elsewhere
):
    """All epochs, bit for bit the same weights, and no file left; killed in each phase."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = overrides if task == "classify" else settings_of(task)
    settings |= {"epochs": EPOCHS, "fraction": 0.4, "save_period": 3, "name": "run", "exist_ok": True}
    draw = random.Random(seed)
    folder = Path(settings["project"]) / "run"
    last, best = folder / "weights" / "last.pt", folder / "weights" / "best.pt"
    phases = [*draw.sample(PHASES[:3], 3), *draw.choices(PHASES[:3], k=KILLS - 4), "finishing"]
    for phase in phases:
        arguments = {"resume": str(last)} if last.exists() else settings
        death = phase, draw.uniform(0, LONGEST[phase])
        assert Process(arguments, death, task=task).end() is None, "it was over before"
        if last.exists():
            assert "ema" in torch.load(last, weights_only=False)
    ended = Process({"resume": str(last)}, task=task).end()
    finished = isinstance(ended, ValueError) and "is of a finished run" in str(ended)  # killed after its last file
    assert finished or ended == str(folder.resolve())
    epochs = [line.split(",")[0].strip() for line in (folder / "results.csv").read_text().splitlines()[1:]]
    assert epochs == [str(i) for i in range(1, EPOCHS + 1)]
    kept = {"best.pt", "last.pt", *(f"epoch{i}.pt" for i in range(0, EPOCHS, 3))}
    assert set(os.listdir(folder / "weights")) == kept
    assert len(YOLO(best)(torch.rand(1, 3, 32, 32))[0].names) == 10
    whole = train({**settings, "project": str(tmp_path / "whole")}, TRAINERS[task])
    assert same(weights(last), weights(whole.last))
    assert same(weights(best), weights(whole.best))
