"""The benchmark on photographs: a real, tiny run of a fitted teacher, which goes on where it stopped."""

import json
import shutil

import pytest
from helpers import load_benchmark
from ultralytics.engine.distillation import compare

photos = load_benchmark("photos")


def test_mistakes_end_before_the_first_run(tmp_path):
    with pytest.raises(ValueError, match="data="):
        photos.main([f"output={tmp_path / 'photos.json'}"])
    with pytest.raises(SyntaxError, match="temperatur"):
        photos.main([f"data={tmp_path}", "variants=plain,temperatur=2", f"output={tmp_path / 'photos.json'}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("count", "each"), [(2, 10), (4, 5)])
def test_parts_share_no_training_image(digits, tmp_path, monkeypatch, count, each):
    monkeypatch.setattr(photos, "PROJECT", tmp_path)
    parts = [photos.take_part(digits, f"{which}/{count}") for which in range(1, count + 1)]
    assert photos.take_part(digits, f"1/{count}") == parts[0]  # once made they stay
    images = [{x.relative_to(part) for x in part.glob("*/*/*")} for part in parts]
    all_images = {x.relative_to(digits) for x in digits.glob("*/*/*")}
    assert set.union(*images) == all_images
    assert images[0] & images[1] == {x for x in all_images if x.parts[0] == "val"}
    assert all(len(list(part.glob("train/3/*"))) == each for part in parts)


@pytest.mark.parametrize("part", [0.5, "0/2", "3/2", "half"])
def test_a_part_that_is_none_is_refused(tmp_path, part):
    with pytest.raises(ValueError, match="1/2"):
        photos.take_part(tmp_path, part)


@pytest.mark.slow
def test_runs_and_goes_on_where_it_stopped(digits, teacher, tmp_path, monkeypatch, capsys):
    data = tmp_path / "digits"
    shutil.copytree(digits, data)
    shutil.copytree(data / "val", data / "test")
    monkeypatch.setattr(photos, "PROJECT", tmp_path / "runs")
    output = tmp_path / "photos.json"
    line = [f"data={data}", f"teacher={teacher}", f"output={output}", "imgsz=32"]
    line += ["epochs=1", "device=cpu"]
    photos.main([*line, "seeds=0", "variants=plain"])
    photos.main([*line, "seeds=0,1", "variants=plain,feature_weight=25 attention_weight=0"])
    report = json.loads(output.read_text())
    by_variant = {k: sorted(v) for k, v in report["test"].items()}
    assert by_variant == {"plain": ["0", "1"], "feature_weight=25 attention_weight=0": ["0", "1"]}
    assert report["test"] == report["top1"]  # of images that are the same here
    assert report["teacher"]["test"] == report["teacher"]["val"] > 10
    assert len(list(tmp_path.glob("runs/photos/*/weights/probe-*.pt"))) == 1
    assert "| plain |" in capsys.readouterr().out

    def never(*args, **kwargs):
        raise AssertionError("everything is measured already")

    monkeypatch.setattr(compare, "train_student", never)
    photos.main([*line, "seeds=0,1", "variants=plain"])
