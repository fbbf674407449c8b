"""The benchmark of the teacher's forward pass runs, and its ratios are those of its times."""

import json

import pytest
from helpers import load_benchmark

benchmark = load_benchmark("teacher")


def test_runs(tmp_path, capsys):
    output = tmp_path / "teacher.json"
    line = ["imgsz=32", "batch=4", "repeats=3", "warmup=1", "device=cpu", "teacher_model=yolo11n-cls.yaml"]
    benchmark.main([*line, "variants=eager,channels_last,bf16,whole", f"output={output}"])
    (result,) = json.loads(output.read_text())["results"]
    times = result["median_ms"]
    assert list(times) == ["eager", "channels_last", "bf16", "whole"]
    assert result["forward"]["eager"] == {"median": 1, "quartiles": [1, 1]}
    assert result["forward"]["bf16"]["median"] == pytest.approx(times["bf16"] / times["eager"])
    assert "| 32 | 4 |" in capsys.readouterr().out


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="variants=fp4"):
        benchmark.main(["imgsz=32", "batch=4", "device=cpu", "variants=eager,fp4"])
