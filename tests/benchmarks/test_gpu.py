"""The first minutes on a GPU, on the CPU: each part runs, and what fails or takes too long spoils nothing else."""

import json
import time
import warnings

import pytest
import torch
from helpers import load_benchmark

gpu = load_benchmark("gpu")
SMALL = ["device=cpu", "imgsz=32,64", "batch=8,4", "steps=2", "teacher=yolo11n"]


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr("ultralytics.nn.distillation.teacher.attempt_compile", lambda network, *args, **given: network)


@pytest.mark.slow
def test_every_part_runs(uncompiled, tmp_path, capsys):
    output = tmp_path / "gpu.json"
    gpu.main([*SMALL, "kinds=plain,distilled,compiled,cached,MuSGD", f"output={output}"])
    report = json.loads(output.read_text())
    assert report["parts"].keys() == gpu.PARTS.keys()
    assert "stopped" not in report
    assert "error" not in output.read_text()
    for task in ("classify", "detect"):
        found = report["parts"][task]
        assert found.keys() == {"plain", "distilled", "compiled", "cached", "MuSGD"}
        assert all(row["step ms"] > 0 and row["host ms"] > 0 for row in found.values())
    answers = report["parts"]["answers"]
    assert answers.keys() == {"distilled", "beside", "compiled beside", "graphs beside"}
    assert all(row["largest relative difference"] < 1e-5 for row in answers.values())
    assert 0 < report["parts"]["precisions"]["amp=True"]["train/loss"] < 0.2
    assert report["parts"]["batch"] == {"plain": 16, "distilled": 16}  # upstream measures none on a CPU
    assert report["parts"]["resume"]["began at epoch"] == 1
    assert report["parts"]["resume"]["epochs"] == 3
    shown = capsys.readouterr().out
    assert "distilled: step ms" in shown
    assert f"Saved to {output}" in shown


def test_what_fails_is_recorded_and_the_rest_runs(tmp_path, monkeypatch):
    """A kind of training, or a whole part."""

    def resume(settings, folder):
        raise RuntimeError("no way on")

    monkeypatch.setitem(gpu.KINDS, "distilled", {"teacher_views": 0})
    monkeypatch.setitem(gpu.PARTS, "resume", resume)
    output = tmp_path / "gpu.json"
    gpu.main([*SMALL, "kinds=distilled,plain", "parts=resume,classify", f"output={output}"])
    parts = json.loads(output.read_text())["parts"]
    assert parts["resume"] == {"error": "RuntimeError: no way on"}
    assert "teacher_views=0" in parts["classify"]["distilled"]["error"]
    assert parts["classify"]["plain"]["step ms"] > 0


def test_it_stops_itself_with_what_it_has(tmp_path, monkeypatch):
    def wait(settings, folder):
        while not ended:
            time.sleep(0.01)
        return {}

    ended = []
    monkeypatch.setattr(gpu.os, "_exit", ended.append)
    monkeypatch.setitem(gpu.PARTS, "batch", lambda settings, folder: {"plain": 1})
    monkeypatch.setitem(gpu.PARTS, "resume", wait)
    output = tmp_path / "gpu.json"
    gpu.main([*SMALL, "parts=batch,resume", "minutes=0.02", f"output={output}"])
    assert ended == [1]
    report = json.loads(output.read_text())
    assert report["parts"]["batch"] == {"plain": 1}
    assert report["stopped"] == "after 0.02 minutes, in resume"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("parts=classify,walk", "unknown \\['walk'\\]"),
        ("kinds=plain,loud", "unknown \\['loud'\\]"),
        ("epochs=3", "are no settings"),
    ],
)
def test_settings_that_make_no_sense_are_refused(line, words, tmp_path):
    output = tmp_path / "gpu.json"
    with pytest.raises(ValueError, match=words):
        gpu.main([*SMALL, line, f"output={output}"])
    assert not output.exists()


def test_what_the_host_waits_for_is_told_by_file_and_line(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    line = run.__code__.co_firstlineno + 2
    assert gpu.waits(run) == {f"test_gpu.py:{line}": 2}
    assert modes == ["warn", "default"]
