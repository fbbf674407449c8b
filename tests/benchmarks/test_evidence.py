"""The benchmark of evidence: its statistics by hand, the corruptions, and one real, tiny experiment."""

import json
import math

import pytest
import torch
from helpers import load_benchmark
from scipy import stats

evidence = load_benchmark("evidence")


@pytest.mark.parametrize(
    ("distilled", "plain", "percent"),
    [
        ([0.5, 0.7, 0.9], [0.4, 0.6, 0.7], 200 / 3),
        ([0.8, 0.9, 0.9], [0.4, 0.7, 0.6], 100 / 3),  # the best of the plain one, which was not its last
        ([0.1, 0.2, 0.3], [0.4, 0.6, 0.7], 400 / 3),  # never
    ],
)
def test_epochs_to(distilled, plain, percent):
    assert evidence.epochs_to(distilled, plain) == pytest.approx(percent)


def test_findings():
    measured = {
        "teacher": {"": {"clean": 90.0}},
        "plain": {"0": {"clean": 80.0}, "1": {"clean": 82.0}},
        "distilled": {"0": {"clean": 85.0}, "1": {"clean": 85.0}},
    }
    report = {
        "teacher_top1": 90.0,
        "top1": {"plain": {"0": 80.0, "1": 82.0}, "distilled": {"0": 85.0, "1": 85.0}},
        "curves": {"plain": {"0": [0.5, 0.8], "1": [0.6, 0.82]}, "distilled": {"0": [0.8, 0.85], "1": [0.7, 0.85]}},
        "measured": measured,
    }
    found = evidence.findings(report)
    assert found["gain"]["by seed"] == [5.0, 3.0]
    assert found["gain"]["mean"] == 4
    interval = stats.ttest_rel([85, 85], [80, 82]).confidence_interval(0.95)
    assert found["gain"]["interval"] == pytest.approx([interval.low, interval.high])
    assert found["gap closed, %"]["by seed"] == [50.0, 37.5]
    assert found["epochs to plain, %"]["by seed"] == [50.0, 100.0]
    assert found["clean, change"]["by seed"] == [5.0, 3.0]


def test_corruptions_keep_images_images():
    images = torch.rand(4, 3, 32, 32)
    for name, corrupt in evidence.CORRUPTIONS.items():
        corrupted = corrupt(images)
        assert corrupted.shape == images.shape
        assert 0 <= corrupted.min() <= corrupted.max() <= 1
        assert torch.equal(corrupted, corrupt(images))
        assert torch.equal(corrupted, images) == (name == "clean")
    torch.testing.assert_close(evidence.CORRUPTIONS["shift"](images)[..., 3:, 3:], images[..., :-3, :-3])


@pytest.mark.slow
def test_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        evidence.EXPERIMENTS,
        "tiny",
        {"dataset": "digits", "train": 8, "teacher_train": 12, "teacher_epochs": 1, "epochs": 1, "batch": 16},
    )
    line = ["experiments=tiny", f"output={tmp_path}", "device=cpu", "teacher_model=yolo11n-cls.yaml", "seeds=0,1"]
    evidence.main(line)
    report = json.loads((tmp_path / "tiny.json").read_text())
    assert report["findings"].keys() >= {"gain", "noise, change", "blur, change", "shift, change"}
    for variant in ("plain", "distilled"):
        for seed, figures in report["measured"][variant].items():
            assert figures["clean"] == pytest.approx(report["top1"][variant][seed], abs=1e-3)
            assert math.isfinite(figures["calibration error"])
    assert "| tiny |" in capsys.readouterr().out
