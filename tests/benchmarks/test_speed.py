"""The step benchmark runs, and times what it says."""

import json
import sys

import pytest
import torch
from helpers import load_benchmark, write_digits
from ultralytics.nn.distillation.classifier import ClassificationTeacher

memory, speed = map(load_benchmark, ("memory", "speed"))


@pytest.mark.slow
def test_runs(tmp_path, capsys, monkeypatch):
    """All kinds of steps, compiled by nothing, and of epochs and processes, which take seconds to begin, some kinds."""
    monkeypatch.setattr("ultralytics.nn.distillation.teacher.attempt_compile", lambda network, *args, **given: network)
    monkeypatch.setattr(speed, "EPOCH_KINDS", ("plain", "cached response"))
    monkeypatch.setattr(sys.modules["benchmarks.memory"], "MEMORY_KINDS", kinds := memory.MEMORY_KINDS[:2])
    output, data = tmp_path / "speed.json", write_digits(tmp_path / "digits", train=4, val=2)
    settings = ["imgsz=32", "batch=8", "repeats=3", "warmup=1", "device=cpu", "epochs=1", "memory=1", "pairs=s>n"]
    settings.append("teacher_model=yolo11s-cls.yaml")
    speed.main([*settings, f"data={data}", f"output={output}"])
    report = json.loads(output.read_text())
    (result,), (pair,) = report["results"], report["pairs"]
    times = result["median_ms"]
    assert all(value > 0 for value in times.values())
    assert times.keys() >= {"teacher", *speed.KINDS} - {"overlapped"}
    ratio = result["steps"]["distilled / (plain + teacher)"]["median"]
    assert ratio == pytest.approx(times["distilled"] / (times["plain"] + times["teacher"]))
    assert "overlapped" not in times
    assert result["epochs"].keys() == {f"{kind} / plain" for kind in speed.EPOCH_KINDS if kind != "plain"}
    assert all(epoch["median"] > 0 for epoch in result["epochs"].values())
    assert result["memory"]["plain, MB"] > 10
    assert result["memory"].keys() == {"plain, MB", *(f"{kind} / plain" for kind in kinds[1:])}
    assert result["memory"]["distilled / plain"]["median"] > 1
    assert (pair["teacher"], pair["student"]) == ("yolo11s-cls.yaml", "yolo11n-cls.yaml")
    assert pair["parameters"] > 5e6
    assert pair["steps"].keys() == {"distilled / (plain + teacher)", "distilled / plain"}
    assert (tmp_path / "speed.png").stat().st_size > 1000
    assert "| 32 | 8 |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_warm_cache_is_one_that_a_process_before_has_filled(monkeypatch):
    module, trainers = sys.modules["benchmarks.memory"], []
    run_steps = module.run_steps
    monkeypatch.setattr(module, "run_steps", lambda trainer: trainers.append(trainer) or run_steps(trainer))
    assert module.peak_memory({**module.SETTINGS, "batch": 8, "device": "cpu", "kind": "warm response"}, {}) > 1
    cache = trainers[-1].distiller.cached.cache
    assert (cache.misses, cache.hits) == (0, 120)  # three times 40 images
    assert trainers[-1].teacher.first._model is None


def test_the_teacher_alone_is_measured_as_the_trainer_runs_it(tmp_path, monkeypatch):
    """In its memory format; and what was given on the command line is given to plain training too."""
    made, trainers = [], {}

    class Teacher(ClassificationTeacher):
        def __init__(self, *args, **given):
            super().__init__(*args, **given)
            made.append(self)

    prepare = speed.prepare
    monkeypatch.setattr(speed, "ClassificationTeacher", Teacher)
    monkeypatch.setattr(speed, "prepare", lambda x: trainers.setdefault(type(x).__name__, prepare(x)))
    line = ["imgsz=96", "batch=4", "repeats=1", "warmup=0", "device=cpu", "epochs=0", "memory=0", "nbs=4"]
    speed.main([*line, "teacher_model=yolo11s-cls.yaml", "kinds=distilled", f"output={tmp_path / 'speed.json'}"])
    weights = [
        x.model.model[1].conv.weight for x in (made[0], trainers["DistillationClassificationTrainer"].teacher.first)
    ]
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in weights] == [True, True]
    assert {x.args.nbs for x in trainers.values()} == {4}


def test_a_sweep_measures_the_kinds_that_it_names(tmp_path, capsys):
    output = tmp_path / "sweep.json"
    settings = ["imgsz=32,64", "batch=8,4", "repeats=2", "warmup=1", "device=cpu", "epochs=0", "memory=0", "threads=3"]
    before = torch.get_num_threads()
    try:
        speed.main([*settings, "kinds=distilled", f"output={output}"])
    finally:
        torch.set_num_threads(before)
    report = json.loads(output.read_text())
    results = report["results"]
    assert report["machine"]["threads"] == 3
    assert [(r["imgsz"], r["batch"]) for r in results] == [(32, 8), (64, 4)]
    assert all({"teacher", "plain", "distilled"} <= r["median_ms"].keys() for r in results)
    assert all({"cached", "timm"}.isdisjoint(r["median_ms"]) for r in results)
    assert all(r["epochs"] == r["memory"] == {} for r in results)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["imgsz=32", "batch=8", "kinds=distilled,fast"], "'kinds=distilled,fast' has unknown \\['fast'\\]"),
        (["imgsz=32", "batch=8", "kinds=overlapped"], "'kinds=overlapped' has unknown"),
        (["imgsz=32,64", "batch=8"], "need one value for each image size"),
    ],
)
def test_settings_that_make_no_sense_are_refused(line, message):
    with pytest.raises(ValueError, match=message):
        speed.main([*line, "device=cpu"])
