"""The benchmark of methods: which arguments a row stands for; how steps are timed; and one real, tiny run."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import load_benchmark, write_idx
from ultralytics.utils.distillation import methods

benchmark = load_benchmark("methods")


@pytest.mark.parametrize(
    ("name", "responses", "features"),
    [
        ("kl", {"kl": 1.0}, {}),
        ("nkd", {"nkd": 1.0}, {}),
        ("mse", {"mse": 1.0}, {}),
        ("feature-mse", {}, {"mse": 1.0}),
        ("attention", {}, {"attention": 1.0}),
        ("dist+mse+rkd", {"dist": 1.0}, {"mse": 1.0, "rkd": 1.0}),
    ],
)
def test_only_the_losses_of_a_row_are_on(name, responses, features):
    own = benchmark.arguments_of(name)
    assert own.get("response_method", {}) == responses
    assert own.get("feature_method", {}) == features
    assert (own["response_distill"], own["feature_distill"]) == (bool(responses), bool(features))
    assert not own["attention_distill"]


def test_plain_training_has_no_losses():
    assert benchmark.arguments_of("plain") is None


def test_every_method_has_a_row():
    rows = [*methods("response_method"), *benchmark.feature_names()]
    assert len(rows) == len(set(rows)) == len(methods("response_method")) + len(methods("feature_method"))
    chosen = [own.get("response_method") or own["feature_method"] for own in map(benchmark.arguments_of, rows)]
    assert sorted(name for own in chosen for name in own) == sorted(
        [*methods("response_method"), *methods("feature_method")]
    )


def test_steps_are_timed_with_the_work_of_their_device(monkeypatch):
    """A trainer stands in that says it is on CUDA, so that waiting for the device can be seen on any machine."""
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: calls.append(f"wait for {device}"))
    trainer = SimpleNamespace(device=torch.device("cuda:0"), model=None)
    monkeypatch.setattr(benchmark, "make_trainer", lambda *args: trainer)
    monkeypatch.setattr(benchmark, "prepare", lambda trainer: trainer)
    monkeypatch.setattr(benchmark, "step", lambda *args: calls.append("step"))
    costs = benchmark.costs(["plain", "dkd"], repeats=2)
    assert costs.keys() == {"kl", "dkd"}
    assert calls == ["step"] * 6 + ["wait for cuda:0", "step", "wait for cuda:0"] * 4  # 3 rounds warm up


@pytest.mark.slow
def test_runs(tmp_path, capsys):
    write_idx(tmp_path)
    output = tmp_path / "methods.json"
    settings = [f"source={tmp_path}", "train=8", "val=3", "teacher_train=12", "teacher_epochs=1", "epochs=1"]
    settings += ["batch=16", "device=cpu", f"output={output}", "teacher_model=yolo11n-cls.yaml", "seeds=0", "repeats=2"]
    benchmark.main([*settings, "chosen=plain,dist+rkd"])
    report = json.loads(output.read_text())
    assert set(report["top1"]) == {"plain", "dist+rkd"}
    assert report["summary"]["dist+rkd"]["seeds"] == 1
    costs = report["step / kl step"]
    assert costs["kl"] == 1
    assert costs["dist+rkd"] > 0
    assert "| dist+rkd |" in capsys.readouterr().out
