"""The accuracy benchmark: a real, tiny run, and one that goes on where it stopped."""

import json

import pytest
from helpers import load_benchmark, write_idx
from ultralytics.engine.distillation import compare

accuracy = load_benchmark("accuracy")


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

    monkeypatch.setattr(compare, "train_student", never)
    accuracy.main([*line, "seeds=0,1", "variants=plain,distilled"])
