"""The accuracy benchmark's statistics, against SciPy's paired test and by hand; and one real, tiny run."""

import json

import numpy as np
import pytest
from helpers import load_benchmark, write_idx
from scipy import stats

accuracy = load_benchmark("accuracy")


def test_summary_is_the_paired_test():
    plain, distilled = [80.0, 82.0, 81.0], [83.0, 86.0, 83.5]
    summary = accuracy.summarise(
        {
            "plain": dict(zip("012", plain, strict=True)),
            "distilled": dict(zip("012", distilled, strict=True)),
            "one": {"1": 82.5},
        }
    )
    assert summary["plain"]["mean"] == 81
    assert summary["plain"]["std"] == 1
    row = summary["distilled"]
    assert row["differences"] == [3.0, 4.0, 2.5]
    interval = stats.ttest_rel(distilled, plain).confidence_interval(0.95)
    assert row["interval"] == pytest.approx([interval.low, interval.high])
    half = 4.302653 * np.std([3.0, 4.0, 2.5], ddof=1) / np.sqrt(3)  # Student's t, 2 degrees of freedom
    assert row["interval"] == pytest.approx([19 / 6 - half, 19 / 6 + half])
    assert summary["one"]["difference"] == 0.5
    assert "interval" not in summary["one"]
    assert "| distilled | 84.17 | 1.61 | +3.17 |" in accuracy.table(summary)


def test_mistakes_end_before_the_first_run(tmp_path):
    with pytest.raises(SyntaxError, match="temperatur"):
        accuracy.main(["variants=plain,temperatur=2", f"output={tmp_path / 'accuracy.json'}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_runs_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    write_idx(tmp_path)
    output = tmp_path / "accuracy.json"
    line = [f"source={tmp_path}", "train=8", "val=3", "teacher_train=12", "teacher_epochs=1", "epochs=1", "batch=16"]
    line += ["device=cpu", f"output={output}", "teacher_model=yolo11n-cls.yaml"]
    accuracy.main([*line, "seeds=0", "variants=plain"])
    accuracy.main([*line, "seeds=0,1", "variants=plain,distilled"])
    report = json.loads(output.read_text())
    assert {k: sorted(v) for k, v in report["top1"].items()} == {"plain": ["0", "1"], "distilled": ["0", "1"]}
    assert report["summary"]["distilled"]["seeds"] == 2
    assert "| plain |" in capsys.readouterr().out

    def never(*args, **kwargs):
        raise AssertionError("everything is measured already")

    monkeypatch.setattr(accuracy, "train", never)
    accuracy.main([*line, "seeds=0,1", "variants=plain,distilled"])
