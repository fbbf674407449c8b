"""The report of a detector's run, or of one of what is built on them, on scenes of digits."""

import json
from pathlib import Path

import pytest
from helpers import train
from scenes import STILL
from ultralytics import YOLO
from ultralytics.models.distillation import TRAINERS
from ultralytics.models.yolo.detect import distill_validation
from ultralytics.utils import LOGGER, YAML


@pytest.mark.slow
@pytest.mark.parametrize(("task", "family"), [("pose", "26"), ("segment", "11"), ("obb", "11")])
def test_the_report_has_the_figures_of_upstreams_validation(
    task, family, learned, settings_of, tmp_path, monkeypatch, drawn_by_us
):
    """Of a student that goes on from what has learned, and of a teacher that has not."""
    monkeypatch.setattr(distill_validation, "SURE", 0.01)
    data, start = learned(task, family)
    given = {**STILL, "data": data, "model": str(start), "lr0": 1e-5, "teacher_names": ["digit"] + list("123456789")}
    given |= {"baseline": str(start.parents[1]), "plots": True}
    trainer = train({**settings_of(task, family), **given}, TRAINERS[task])
    found = json.loads((trainer.save_dir / "distillation.json").read_text())
    files = {"student": trainer.best, "baseline": start}
    for who, file in files.items():
        metrics = YOLO(file).val(data=data, imgsz=64, batch=8, plots=False, project=tmp_path)
        measured = getattr(metrics, trainer.task.metrics)
        assert measured.map > 0.01
        assert found["networks"][who]["map"] == pytest.approx(measured.map, rel=1e-3)
        assert found["networks"][who]["map50"] == pytest.approx(measured.map50, rel=1e-3)
        assert found["classes"][0][who] == pytest.approx(measured.map, rel=1e-3)
    assert found["networks"]["student"]["map"] == pytest.approx(trainer.metrics[trainer.task.score.column], rel=1e-3)
    assert found["networks"]["teacher"]["map"] < 0.01
    assert found["images"] == 24
    assert not found["known_to_teacher_only"]
    (row,) = found["classes"]
    assert row["objects"] == sum(
        len(file.read_text().splitlines()) for file in Path(YAML.load(data)["path"]).glob("labels/train/*.txt")
    )
    assert found["compared"] == "baseline"
    assert found["agreement"] > 0.1  # as one comes from the other
    assert found["pull"].keys() == {"loss", *trainer.distiller.weights}
    assert any("it has no more to teach" in finding for finding in found["findings"])
    assert (trainer.save_dir / "distillation_examples.png").stat().st_size > 20_000  # objects are drawn
    page = (trainer.save_dir / "distillation.html").read_text()
    assert (page.count("<svg"), page.count("data:image/jpeg;base64,")) == (3, 1)
    assert "digit" in page


@pytest.mark.parametrize(
    ("given", "networks", "classes"),
    [
        ({"teacher": "self"}, ["student"], "0123456789"),
        ({"teacher_names": [*"78cdefghij"], "rect": True, "distill_balance": "auto"}, ["student", "teacher"], "78"),
        ({"teacher_names": [*"abcdefghij"]}, ["student"], "0123456789"),
    ],
)
def test_networks_are_compared_on_classes_that_the_teacher_knows(
    given, networks, classes, settings_of, monkeypatch, drawn_by_us
):
    """Of whatever kind the run is."""
    warnings = []
    monkeypatch.setattr(LOGGER, "warning", lambda message, *args: warnings.append(str(message)))
    trainer = train({**settings_of("detect", fraction=0.34, plots=True), **given}, TRAINERS["detect"])
    assert not [w for w in warnings if "could not" in w]
    found = json.loads((trainer.save_dir / "distillation.json").read_text())
    assert list(found["networks"]) == networks
    assert found["known_to_teacher_only"] == (classes == "78")
    assert {row["name"] for row in found["classes"]} <= set(classes)
    assert len(found["classes"]) > (2 if len(classes) > 2 else 0)


@pytest.mark.parametrize("task", ["segment", "obb"])
def test_a_baseline_of_another_task_is_refused(task, prepared, settings_of):
    """Though its network is built on that of a detector."""
    _, other = prepared(task)
    with pytest.raises(ValueError, match=f"is of the task '{task}'"):
        TRAINERS["detect"](overrides=settings_of("detect", baseline=str(other.parents[1])))
