"""Several processes, on the CPU with gloo: one run, whose weights are the same in each."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gloo import GlooTrainer, GradientTrainer, launch, note_epoch, parameters, reports
from helpers import DISTILLATION_LOSSES, same, write_digits
from ultralytics import YOLO
from ultralytics.utils import YAML

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(overrides, monkeypatch):
    Path(overrides["project"]).mkdir()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return {**overrides, "epochs": 2, "fraction": 0.5}


def check(first, second, settings):
    assert same(parameters(first["weights"]), parameters(second["weights"]))
    for name in ("model.0.conv.weight", "distill_adapters.0.weight", "distill_adapters.2.bias"):
        assert not torch.equal(first["weights"][name], first["begun"][name])
    assert first["teacher"] == second["teacher"]  # each process has loaded it
    assert first["calls"]["teacher"] == second["calls"]["teacher"] > 0
    assert second["calls"]["save_model"] == second["calls"]["save_metrics"] == 0
    assert first["save_dir"] == second["save_dir"]
    assert (first["batch"], first["world_size"]) == (settings["batch"] // 2, 2)
    folder = Path(first["save_dir"])
    assert sorted(x.name for x in (folder / "weights").iterdir()) == ["best.pt", "last.pt"]
    head, *lines = (folder / "results.csv").read_text().splitlines()
    assert all(f"train/{name}" in head for name in DISTILLATION_LOSSES)
    assert [line.split(",")[0] for line in lines] == ["1", "2"]
    assert YOLO(folder / "weights" / "best.pt").names[9] == "9"


def test_upstreams_launch_and_what_is_left_of_it_after_a_stop(settings, monkeypatch):
    """As with device=0,1: upstream starts the processes and hands over arguments, trainer and callbacks."""
    (Path(settings["project"]) / "train").mkdir()  # the run gets a folder of its own
    started = GlooTrainer(overrides=settings)
    started.add_callback("on_train_epoch_end", note_epoch)
    monkeypatch.setenv("STOP_AFTER", "0")
    with pytest.raises(subprocess.CalledProcessError):
        started.train()
    monkeypatch.delenv("STOP_AFTER")
    (last,) = Path(settings["project"]).glob("*/weights/last.pt")
    resumed = GlooTrainer(overrides={"resume": str(last)})
    resumed.add_callback("on_train_epoch_end", note_epoch)
    resumed.train()
    first, second = reports(settings)
    assert first["start_epoch"] == second["start_epoch"] == 1
    check(first, second, settings)
    assert Path(first["save_dir"]).name == "train-2"
    noted = (Path(settings["project"]) / "callback.txt").read_text().split("\n")
    assert sorted(filter(None, noted)) == ["0 0", "0 1", "1 0", "1 1"]


def test_a_compiled_student_trains_on_while_the_teacher_is_silent(settings):
    """DDP then expects a gradient of the same weights in every step, the adapters' too."""
    settings |= {"compile": True, "close_distill": 1}
    launch("GlooCompiledTrainer", settings)
    check(*reports(settings), settings)


def test_processes_share_a_cache(settings, digits, tmp_path):
    """Each asks about its share of the images, once, also on two hosts; the next run about none, and is the same.

    Hosts are started as the manual says it: torchrun on each, one folder for both.
    """
    (Path(settings["project"]) / "train").mkdir()
    shutil.copytree(digits, tmp_path / "digits", ignore=shutil.ignore_patterns("teacher_cache"))
    settings = {**settings, "data": str(tmp_path / "digits"), "teacher_cache": "disk", "teacher_views": 1}
    runs = []
    for nodes, processes in ((2, 1), (1, 2)):
        launch("GlooTrainer", settings, nodes, processes)
        runs.append(reports(settings))
        check(*runs[-1], settings)
    (cold, other), warm = runs
    assert cold["misses"] + other["misses"] == 100
    assert [r["misses"] for r in warm] == [0, 0]
    assert [r["hits"] for r in warm] == [100, 100]
    assert same(parameters(cold["weights"]), parameters(warm[0]["weights"]))
    assert len(list((tmp_path / "digits" / "teacher_cache").iterdir())) == 1


def test_the_averaged_gradient_is_that_of_the_joined_batch(settings):
    """With the teacher's maps as they are: each process would standardise them over its own share of the batch."""
    settings |= {"feature_method": "fitnets"}
    launch("GradientTrainer", settings)
    GradientTrainer(overrides=settings).train()
    first, second, joined = (
        torch.load(Path(settings["project"]) / f"gradient{rank}.pt", weights_only=False) for rank in (0, 1, -1)
    )
    assert same(first, second)
    assert any(name.startswith("distill_adapters") for name in joined)
    assert sum(g.norm() > 0 for g in joined.values()) > 60
    total = torch.stack([g.norm() for g in joined.values()]).norm()
    for name, gradient in joined.items():
        assert (first[name] - gradient).norm() <= 1e-6 * total, name


def test_several_processes_need_a_device_each(settings):
    """Refused in a sentence: upstream would read the device's index out of 'cpu'."""
    script = Path(settings["project"]) / "run.py"
    script.write_text(
        "import json, sys\n"
        "from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer\n"
        "DistillationClassificationTrainer(overrides=json.loads(sys.argv[1])).train()\n"
    )
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    run = subprocess.run(
        [sys.executable, script, json.dumps(settings)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 1
    assert "2 processes cannot train on 'device=cpu'" in run.stderr.splitlines()[-1]


def test_the_first_process_fits_a_head_and_tells_the_other(settings, tmp_path):
    data = write_digits(tmp_path / "others", names=[f"digit {c}" for c in range(10)])
    launch("GlooTrainer", {**settings, "data": str(data), "teacher_probe": True, "epochs": 1})
    first, second = reports(settings)
    assert same(parameters(first["weights"]), parameters(second["weights"]))
    (file,) = Path(settings["project"]).glob("*/weights/probe-*.pt")
    assert first["teacher"] == second["teacher"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert YAML.load(file.parents[1] / "args.yaml")["teacher"] == str(file)
