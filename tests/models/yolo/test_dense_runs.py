"""What can happen to a run of a detector, or of what is built on one: bad batches, full memory, several processes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from gloo import launch, parameters, reports
from helpers import Waiting, compile_by_tracing, rows, same, train, weights
from PIL import Image
from scenes import TASKS
from torch.utils._pytree import tree_leaves
from ultralytics.engine.distillation.criterion import LESSON
from ultralytics.models.distillation import TRAINERS
from ultralytics.nn.distillation.taps import FeatureTaps
from ultralytics.utils import LOGGER, YAML

from train import main as train_script


def test_where_the_teacher_answers_changes_nothing(settings_of):
    settings = settings_of("segment", fraction=0.5)
    beside, before = (
        train({**settings, "teacher_overlap": overlap, "name": str(overlap)}, TRAINERS["segment"])
        for overlap in (True, False)
    )
    assert same(weights(beside.last), weights(before.last))


@pytest.mark.slow
def test_a_compiled_teacher_teaches_the_same(settings_of, monkeypatch):
    compile_by_tracing(monkeypatch)
    settings = settings_of("detect", "26", "26", fraction=0.5)
    compiled = []

    def on_end(trainer):
        compiled.append(hasattr(trainer.teacher.first._compiled, "_orig_mod"))

    given = {"teacher_compile": True}, {}
    fast, eager = (train({**settings, **own}, TRAINERS["detect"], on_train_batch_end=on_end) for own in given)
    assert {*compiled[: len(compiled) // 2]} == {True}
    for name in fast.distiller.weights:
        assert float(rows(fast)[0][f"train/{name}"]) == pytest.approx(float(rows(eager)[0][f"train/{name}"]), rel=1e-2)


@pytest.mark.parametrize(("task", "family"), [("detect", "26"), ("segment", "11"), ("pose", "11"), ("obb", "26")])
def test_the_host_does_not_wait_for_what_two_heads_say(task, family, settings_of, tmp_path):
    """Also where the teacher does not know some objects; upstream's own loss asks what is where."""
    settings = settings_of(task, family, family, feature_distill=True)
    names = {**YAML.load(settings["data"]), "names": dict(enumerate([*"0123", "cow", *"56789"]))}
    YAML.save(tmp_path / "renamed.yaml", names)
    trainer = TRAINERS[task](overrides={**settings, "data": str(tmp_path / "renamed.yaml")})
    trainer._setup_train()
    trainer.epoch = 0
    trainer._model_train()
    loaded = next(iter(trainer.train_loader))
    batch = trainer.preprocess_batch(loaded)
    features = FeatureTaps(trainer.model, trainer.plan.student_levels)
    predictions, plan = trainer.model(batch["img"]), trainer.plan
    maps = features.take()
    assert len(batch[LESSON].unknown) > 0
    with Waiting() as waiting:
        losses = trainer.task.compare(
            plan, trainer.distillation_loss, predictions, maps, trainer.teacher(batch["img"]), batch
        )
        torch.stack([*losses.values()]).sum().backward()
    assert losses.keys() == trainer.distiller.weights.keys()
    assert waiting.operators == []


@pytest.mark.slow
def test_a_comparison_is_made_on_the_tasks_own_figure(settings_of):
    settings = settings_of("pose", fraction=0.34, seeds=2)
    folder = train_script(["compare", *(f"{k}={v}" for k, v in settings.items())])
    assert folder == Path(settings["project"]) / "compare"
    report = json.loads((folder / "compare.json").read_text())
    assert {variant: list(by_seed) for variant, by_seed in report["pose_map"].items()} == {
        "plain": ["0", "1"],
        "distilled": ["0", "1"],
    }
    assert "pose mAP50-95" in (folder / "compare.md").read_text()
    assert (folder / "compare.png").stat().st_size > 10_000


@pytest.mark.parametrize("what", ["nan", "memory"])
def test_a_teacher_that_fails_once_spoils_nothing(what, settings_of, monkeypatch):
    """A batch that it says nothing finite of is passed over; where memory is full, upstream halves the batch."""
    warnings = []
    monkeypatch.setattr(LOGGER, "warning", lambda message, *args: warnings.append(str(message)))

    def on_start(trainer):
        teacher = trainer.teacher.first
        read = teacher.read

        def fail_once(output):
            teacher.read = read
            if what == "memory":
                raise RuntimeError("CUDA out of memory")
            return {k: {**x, "scores": x["scores"] * torch.nan} for k, x in read(output).items()}

        teacher.read = fail_once

    trainer = train(settings_of("detect"), TRAINERS["detect"], on_train_start=on_start)
    assert trainer.batch_size == (4 if what == "memory" else 8)
    assert all(x.isfinite().all() for x in weights(trainer.last).values())
    assert any(("teacher" if what == "nan" else "memory") in warning for warning in warnings)
    (row,) = rows(trainer)
    assert all(float(row[f"train/{name}"]) > 0 for name in trainer.distiller.weights)


@pytest.mark.slow
def test_two_processes_train_one_student(settings_of, tmp_path):
    settings = settings_of("obb", project=str(tmp_path), epochs=2, feature_distill=True)
    launch("GlooOBBTrainer", settings)
    first, second = reports(settings)
    assert same(parameters(first["weights"]), parameters(second["weights"]))
    for name in ("model.0.conv.weight", "distill_adapters.0.weight"):
        assert not torch.equal(first["weights"][name], first["begun"][name])
    assert first["teacher"] == second["teacher"]
    assert first["calls"]["teacher"] == second["calls"]["teacher"] == 6
    assert (first["batch"], first["world_size"]) == (4, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp", [True, False, "bf16"])
@pytest.mark.parametrize("task", TASKS)
def test_on_a_gpu(task, amp, settings_of):
    trainer = train({**settings_of(task), "device": 0, "amp": amp, "plots": True}, TRAINERS[task])
    assert (trainer.save_dir / "distillation.html").exists()
    assert all(x.isfinite() for x in trainer.loss_items.values())
    assert all(trainer.loss_items[name] > 0 for name in trainer.distiller.weights)


@pytest.mark.parametrize(("task", "family", "where"), [("pose", "26", "ram"), ("segment", "11", "disk")])
def test_kept_answers_are_those_of_the_teacher(task, family, where, settings_of):
    """Each view is asked about once; and what was kept is what the teacher says, in half precision."""
    given = {"mosaic": 0.0, "epochs": 2, "teacher_cache": where, "teacher_views": 1}
    said = []

    def on_start(trainer):
        cached, teacher = trainer.distiller.cached, trainer.teacher

        def ask(images, index, view):
            (read, maps), (expected, true) = cached(images, index, view), teacher(images)
            said.append((tree_leaves(read), tree_leaves(expected)))
            assert [x.keys() for x in read.values()] == [x.keys() for x in expected.values()]
            assert all(torch.allclose(a.float(), b, rtol=1e-2, atol=1e-2) for a, b in zip(maps, true, strict=True))
            return read, maps

        ask.cache, ask.lap, ask.report = cached.cache, cached.lap, ""
        trainer.distiller.cached = ask

    trainer = train({**settings_of(task, family, family), **given}, TRAINERS[task], on_train_start=on_start)
    kept = trainer.distiller.cached.cache
    assert (kept.misses, kept.hits) == (24, 24)
    for read, expected in said:
        assert all(torch.allclose(a.float(), b, rtol=2e-2, atol=0.05) for a, b in zip(read, expected, strict=True))
    if where == "disk":
        (file,) = trainer.plan.cache_folder.glob("*.bin")
        again = train({**settings_of(task, family, family), **given}, TRAINERS[task])
        assert again.distiller.cached.cache.misses == 0
        file.unlink()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "Set 'mosaic=0.0', or leave it out"),
        ({"mosaic": 0.0, "mixup": 0.1, "rect": True}, "Set 'mixup=0.0 rect=False'"),
        ({"mosaic": 0.0, "multi_scale": 0.5}, "Set 'multi_scale=0.0'"),
    ],
)
def test_answers_are_kept_where_views_repeat_alone(given, words, settings_of, tmp_path):
    with pytest.raises(ValueError, match=words):
        TRAINERS["detect"](overrides={**settings_of("detect"), "teacher_cache": "ram", **given})
    assert not (tmp_path / "runs").exists()


def test_images_of_unlike_shapes_train_in_rectangles(settings_of, tmp_path):
    """Those that adapters are fitted on too are put together by their shape."""
    settings = settings_of("detect", rect=True, feature_distill=True)
    content = YAML.load(settings["data"])
    data = shutil.copytree(content["path"], tmp_path / "scenes", ignore=shutil.ignore_patterns("*.cache"))
    for file in sorted(data.glob("images/train/*.png"))[::2]:
        image = Image.open(file)
        image.crop((0, 0, 64, 32)).save(file)
    YAML.save(tmp_path / "unlike.yaml", {**content, "path": str(data)})
    shapes = set()
    trainer = train(
        {**settings, "data": str(tmp_path / "unlike.yaml")},
        TRAINERS["detect"],
        on_train_start=lambda trainer: shapes.update(tuple(x.shape[1:]) for x in trainer._some_images()),
    )
    assert len(shapes) > 1
    assert all(x.isfinite() for x in trainer.loss_items.values())
