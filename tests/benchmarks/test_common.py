"""What the benchmarks share: the device's work is timed, what comes before is not, and ratios are those of medians."""

import json
import time

import pytest
import torch
from helpers import load_benchmark

common = load_benchmark("common")


@pytest.fixture
def calls(monkeypatch):
    """What is called, in turn; waiting for the device is only written down, so it takes no CUDA."""
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: calls.append(f"wait for {device}"))
    monkeypatch.setattr(time, "perf_counter", lambda: calls.append("clock") or len(calls))
    return calls


def test_the_device_is_waited_for_before_and_after_a_run(calls):
    assert common.timed(lambda: calls.append("run"), torch.device("cuda:1")) == 3
    assert calls == ["wait for cuda:1", "clock", "run", "wait for cuda:1", "clock"]


def test_a_cpu_is_not_waited_for(calls):
    common.timed(lambda: calls.append("run"), torch.device("cpu"))
    assert calls == ["clock", "run", "clock"]


def test_turns_are_taken_after_the_warmup_and_what_comes_before_is_not_timed():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    before = lambda: calls.append("before") or time.sleep(0.2)  # noqa: E731
    times = common.take_turns(runs, 2, torch.device("cpu"), warmup=1, before=before)
    assert calls == ["a", "b"] + ["before", "a", "before", "b"] * 2
    assert [len(values) for values in times.values()] == [2, 2]
    assert max(times["a"] + times["b"]) < 0.1


def test_a_ratio_is_that_of_medians_with_the_quartiles_of_each_repeat():
    found = common.ratio([2.0, 6.0, 4.0], [1.0, 1.0, 3.0], [1.0, 1.0, 1.0])
    assert found == {"median": 2, "quartiles": [1, 2]}  # of 1, 3 and 1
    assert common.show(found) == "2.000 (1.000 to 2.000)"
    assert common.medians({"a": [0.001, 0.003, 0.002]}) == {"a": 2}


def test_a_table_has_a_row_for_each_result():
    rows = [{"imgsz": 32, "batch": batch, "steps": {"x": {"median": 1, "quartiles": [1, 2]}}} for batch in (4, 8)]
    assert common.table(rows, "steps").splitlines() == [
        "| imgsz | batch | x |",
        "|---|---|---|",
        "| 32 | 4 | 1.000 (1.000 to 2.000) |",
        "| 32 | 8 | 1.000 (1.000 to 2.000) |",
    ]


def test_settings_are_told_from_other_arguments(capsys):
    settings, given = common.read_settings(["repeats=3", "epochs=2"], "usage", {"repeats": 40, "warmup": 5})
    assert settings == {"repeats": 3, "warmup": 5}
    assert given == {"epochs": 2}
    with pytest.raises(SystemExit) as left:
        common.read_settings(["--help"], "usage", {})
    assert not left.value.code
    assert capsys.readouterr().out == "usage\n"


def test_results_are_written(tmp_path):
    common.write_results(tmp_path / "x.json", {"a": [1.5]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.5]}


def test_the_gap_is_that_of_shared_seeds():
    measured = {"plain": {"0": 60.0, "1": 70.0, "2": 0.0}, "distilled": {"0": 70.0, "1": 80.0}, "other": {"3": 1.0}}
    assert common.gap_closed(measured, 85.0) == {"distilled": pytest.approx(50)}
