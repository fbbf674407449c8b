"""The step benchmark runs, and times what it says."""

import json

import pytest
from helpers import load_benchmark

speed = load_benchmark("speed")


@pytest.mark.slow
def test_runs(tmp_path, capsys):
    output = tmp_path / "speed.json"
    speed.main(["imgsz=32", "batch=8", "repeats=3", "warmup=1", "device=cpu", f"output={output}"])
    (result,) = json.loads(output.read_text())["results"]
    times = result["median_ms"]
    assert all(value > 0 for value in times.values())
    assert result["ratio"] == pytest.approx(times["distilled"] / (times["plain"] + times["teacher"]))
    assert "| 32 | 8 |" in capsys.readouterr().out
