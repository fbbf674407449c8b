"""The benchmark of detectors and what is built on them: a real, tiny run on scenes, which goes on where it stopped."""

import json
from pathlib import Path

import pytest
import torch
from helpers import load_benchmark
from ultralytics.engine.distillation import compare
from ultralytics.models.distillation import TRAINERS
from ultralytics.utils import YAML

from distill_train_example import write_scenes

dense = load_benchmark("dense")


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        (["task=depth"], ValueError, "'task=depth' is an invalid value"),
        (["task=classify"], ValueError, "'task=classify' is an invalid value"),
        (["variants=plain,box_wieght=2"], SyntaxError, "box_wieght"),
        (["variants=plain,box_weight=-2"], ValueError, "box_weight=-2"),
    ],
)
def test_mistakes_end_before_the_first_run(line, error, words, tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "train_student", None)  # would be called
    with pytest.raises(error, match=words):
        dense.main([f"output={tmp_path / 'dense.json'}", *line])
    assert not list(tmp_path.iterdir())


def test_fast_training_is_that_of_gpus(settings_of):
    """Under autocast and with channels last, while the benchmark runs and not beyond."""
    formats = []
    for trains in (dense.as_on_gpus, dense.nullcontext):
        with trains():
            trainer = TRAINERS["detect"](overrides=settings_of("detect", amp=True))
            trainer._setup_train()
        weight = trainer.model.model[1].conv.weight
        formats.append((trainer.amp, weight.is_contiguous(memory_format=torch.channels_last)))
    assert formats == [(True, True), (False, False)]


@pytest.mark.slow
def test_runs_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dense, "runs_folder", lambda task: tmp_path / "runs" / task)
    scenes = write_scenes(tmp_path / "scenes", "obb", train=16, val=4, side=64)
    data = tmp_path / "data.yaml"
    YAML.save(data, {**YAML.load(scenes), "test": "images/val"})
    output = tmp_path / "dense.json"
    line = ["task=obb", f"data={data}", f"output={output}", "imgsz=64", "epochs=1", "batch=8", "device=cpu"]
    line += ["teacher_epochs=1", "start_epochs=1", "seeds=0", "repeats=1", "variants=plain,upstream,box_weight=0.5"]
    line += ["fast=True", "fraction=0.5", "teacher_model=yolo11n-obb.yaml"]
    dense.main(line)
    report = json.loads(output.read_text())
    assert report["test"].keys() == report["map"].keys() == {"plain", "upstream", "box_weight=0.5"}
    assert report["test"] == report["map"]  # of images that are the same here
    assert report["cost"]["ratios"]["distilled / plain"]["median"] > 0.5
    assert report["cost"]["median_ms"].keys() == {"teacher", "plain", "upstream", "distilled", "sequential"}
    assert "| upstream |" in capsys.readouterr().out
    folder = tmp_path / "runs" / "obb" / "dense-fast"
    names = ("plain_0", "upstream_0", "box_weight_0.5_0")
    arguments = {name: YAML.load(folder / "dense" / name / "args.yaml") for name in names}
    (start,) = folder.glob("start-*/weights/best.pt")
    assert {x["model"] for x in arguments.values()} == {str(start)}
    assert "teacher" not in arguments["upstream_0"]
    teacher_run = Path(arguments["upstream_0"]["distill_model"]).parents[1]
    assert YAML.load(teacher_run / "args.yaml")["fraction"] == 1.0  # it has learned from all images
    assert {x["fraction"] for x in arguments.values()} == {0.5}
    assert arguments["upstream_0"]["distill_model"] == arguments["box_weight_0.5_0"]["teacher"]
    assert arguments["plain_0"].get("distill_model") is None
    assert arguments["box_weight_0.5_0"]["box_weight"] == 0.5

    def never(*args, **kwargs):
        raise AssertionError("everything is trained already")

    monkeypatch.setattr(compare.BaseTrainer, "train", never)
    dense.main([*line, "repeats=0"])
    with pytest.raises(AssertionError, match="trained already"):
        dense.main([*line, "repeats=0", "lr0=0.1"])  # another setting is another benchmark
    YAML.save(data, {**YAML.load(data), "names": dict(enumerate("abcdefghij"))})
    with pytest.raises(ValueError, match="has other classes"):
        dense.main([*line, f"teacher={arguments['upstream_0']['distill_model']}"])
