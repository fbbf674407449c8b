"""Detectors, and networks of masks, keypoints and oriented boxes: a whole run of each, on scenes of digits."""

import json
import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
from helpers import Stopped, predict_elsewhere, rows, same, stop_after, train, weights
from scenes import TASKS
from ultralytics import YOLO
from ultralytics.engine.distillation.criterion import LESSON
from ultralytics.models.distillation import TRAINERS, find_trainer
from ultralytics.models.yolo.detect import distill_validation
from ultralytics.models.yolo.detect.distill_task import OBJECTS_AT_ONCE, _on_objects
from ultralytics.nn.tasks import RTDETRDetectionModel, load_checkpoint
from ultralytics.utils import LOGGER, YAML

from train import main as train_script

ITEMS = {"detect": (), "segment": ("mask_distill_loss",), "pose": ("keypoint_distill_loss",), "obb": ()}
SHARED = ("response_loss", "attention_loss", "box_distill_loss", "dfl_distill_loss")  # feature_loss if asked for


def plain(settings):
    """The arguments that upstream's trainer takes."""
    return {k: v for k, v in settings.items() if k != "teacher" and "distill" not in k}


@pytest.mark.oldest
@pytest.mark.parametrize("task", TASKS)
def test_a_student_learns_all_that_the_heads_say(task, settings_of):
    """Every loss is in the total and in the tables, and each by itself moves the backbone."""
    seen = []

    def on_end(trainer):
        items = {k: v.item() for k, v in trainer.loss_items.items()}
        taught = sum(w * items[k] for k, w in trainer.distiller.weights.items())
        own = sum(v for k, v in items.items() if k not in trainer.distiller.weights)
        seen.append((trainer.loss.item(), pytest.approx(8 * (0.3 * own + 0.7 * taught), rel=1e-3)))

    def on_start(trainer):
        compare = trainer.model.criterion.compare

        def compared(*args):
            losses = compare(*args)
            first = trainer.model.model[0].conv.weight
            for name, loss in losses.items():
                (gradient,) = torch.autograd.grad(loss, first, retain_graph=True, allow_unused=True)
                moved[name] = gradient is not None and bool(gradient.count_nonzero())
            return losses

        trainer.model.criterion.compare = compared

    moved = {}
    settings = settings_of(task, feature_distill=True)
    trainer = train(settings, TRAINERS[task], on_train_batch_end=on_end, on_train_start=on_start)
    assert len(seen) == 3
    assert all(total == expected for total, expected in seen)
    assert set(trainer.distiller.weights) == {*SHARED, "feature_loss", *ITEMS[task]}
    assert [s.name for s in trainer.plan.student_levels] == [f"model.{i}" for i in trainer.model.model[-1].f]
    assert moved == dict.fromkeys(trainer.distiller.weights, True)
    (row,) = rows(trainer)
    assert all(float(row[f"train/{name}"]) > 0 for name in trainer.distiller.weights)
    assert trainer.task.score.column in row
    assert not any("distill" in key for key in row if key.startswith("val/"))
    student = load_checkpoint(trainer.best)[0]
    assert type(student) is trainer.task.network_class
    assert not any(name.startswith("distill") for name, _ in student.named_modules())


def test_of_an_end_to_end_head_every_loss_moves_the_backbone_too(settings_of):
    """Through the branch of many anchors; the other one gets its maps without their graph."""
    trainer = train(settings_of("detect", "26", "26", fraction=0.34, attention_distill=False), TRAINERS["detect"])
    student, images = trainer.model.train(), torch.rand(2, 3, 64, 64)
    batch = {**trainer.task.blank_batch(images, trainer.plan), LESSON: None}
    predictions, answer = student(images), trainer.teacher(images)
    losses = trainer.task.compare(trainer.plan, trainer.distillation_loss, predictions, [], answer, batch)
    assert set(losses) == {"response_loss", "box_distill_loss"}
    for loss in losses.values():
        (moved,) = torch.autograd.grad(loss, student.model[0].conv.weight, retain_graph=True)
        assert moved.any()
    own = [x for name, x in student.model[-1].named_parameters() if name.startswith("one2one") and x.requires_grad]
    assert any(
        x is not None and x.any() for x in torch.autograd.grad(losses["box_distill_loss"], own, allow_unused=True)
    )


@pytest.mark.slow
def test_checkpoints_open_where_this_project_is_not(settings_of, tmp_path):
    given = {"fraction": 0.34, "save_period": 1, "feature_distill": True}
    trainer = train(settings_of("segment", **given), TRAINERS["segment"])
    files = [trainer.wdir / name for name in ("best.pt", "epoch0.pt")]
    assert "distill_adapters" in load_checkpoint(files[1])[0]._modules
    image = next(Path(YAML.load(trainer.args.data)["path"]).glob("images/val/*"))
    assert [found for found, _ in predict_elsewhere(files, image, 64, tmp_path)] == ["segment"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("task", "target"), [("obb", "onnx"), ("segment", "torchscript")])
def test_what_was_distilled_is_exported_as_ever(task, target, settings_of):
    trainer = train(settings_of(task, fraction=0.34, feature_distill=True), TRAINERS[task])
    exported = YOLO(trainer.best).export(format=target, imgsz=64, device="cpu")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = load_checkpoint(trainer.best)[0](images)[0]
    if target == "onnx":
        session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
        answer = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    else:
        answer = torch.jit.load(exported)(images)[0]
    torch.testing.assert_close(answer, expected[0] if isinstance(expected, tuple) else expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["11", "26"])
@pytest.mark.parametrize(
    ("task", "more"),
    [
        pytest.param("detect", {"epochs": 3}, marks=pytest.mark.oldest),
        *((task, {"fraction": 0.34}) for task in TASKS[1:]),
    ],
)
def test_without_weight_the_run_is_bit_identical_to_plain(task, more, family, settings_of):
    """Also where an end-to-end head's criterion counts epochs."""
    settings = settings_of(task, family, **more)
    ours = train({**settings, "distill_alpha": 0, "distill_beta": 1}, TRAINERS[task])
    theirs = train({**plain(settings), "name": "plain"}, TRAINERS[task].task.plain_trainer)
    assert same(weights(ours.last), weights(theirs.last))
    assert [{**row, "time": 0} for row in rows(ours)] == [{**row, "time": 0} for row in rows(theirs)]
    sizes = [t.best.stat().st_size for t in (ours, theirs)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


@pytest.mark.parametrize(("task", "family"), [("pose", "26"), ("segment", "11")])
def test_a_stopped_run_ends_as_if_it_had_never_stopped(task, family, settings_of):
    """Images of a mosaic are drawn from those that were loaded last, which a resumed run has to know."""
    settings = settings_of(task, family, batch=4, nbs=4, epochs=3, close_mosaic=1, mixup=0.3, fraction=0.5)
    whole = train(settings, TRAINERS[task])
    with pytest.raises(Stopped):
        train({**settings, "name": "stopped"}, TRAINERS[task], on_fit_epoch_end=stop_after(0))
    last = whole.save_dir.parent / "stopped" / "weights" / "last.pt"
    resumed = train({"resume": str(last)}, find_trainer({"resume": str(last)}))
    assert same(weights(whole.last), weights(resumed.last))


@pytest.mark.parametrize(
    ("task", "family", "teacher", "sides"),
    [
        ("detect", "v8", "12", True),
        ("detect", "26", "11", False),
        ("detect", "11", "26", False),
        ("detect", "26", "26", False),
        ("segment", "26", "v8", False),
        ("pose", "11", "26", False),
        ("obb", "12", "v8", True),
    ],
)
def test_between_families_what_cannot_be_compared_is_switched_off(task, family, teacher, sides, settings_of):
    """The sides' distributions, where one of the heads has none; all else teaches."""
    trainer = train(settings_of(task, family, teacher), TRAINERS[task])
    assert trainer.args.dfl_distill == sides
    expected = {*SHARED, *ITEMS[task]} - ({"dfl_distill_loss"} if not sides else set())
    assert set(trainer.distiller.weights) == expected
    assert all(x.isfinite() for x in trainer.loss_items.values())
    assert all(trainer.loss_items[name] > 0 for name in expected)


def test_a_branch_that_moves_no_backbone_does_not_teach_alone(settings_of, tmp_path):
    """The one that is left of an end-to-end teacher, once it was fused for inference."""
    settings = settings_of("detect", "26", "26", fraction=0.34)
    ckpt = torch.load(settings["teacher"], weights_only=False)
    ckpt["model"].float().end2end = True
    ckpt["model"].fuse(verbose=False)
    torch.save(ckpt, tmp_path / "fused.pt")
    settings["teacher"] = str(tmp_path / "fused.pt")
    trainer = train(settings, TRAINERS["detect"])
    assert trainer.plan.heads[1].branches == ("one2one",)
    assert set(trainer.distiller.weights) == {"attention_loss"}
    with pytest.raises(ValueError, match=r"'response_distill=True' .* the teacher's end-to-end head was fused"):
        TRAINERS["detect"](overrides={**settings, "response_distill": True})


@pytest.mark.parametrize(
    ("task", "given", "words"),
    [
        (
            "detect",
            {"model": "yolo26n.yaml", "dfl_distill": True},
            "'reg_max' is 1 in the student's head and 16",
        ),
        ("detect", {"mask_distill": True}, "'mask_distill=True' compares what the heads of the task 'detect' do not"),
        (
            "segment",
            {"keypoint_distill": True},
            "'keypoint_distill=True' compares what the heads of the task",
        ),
        (
            "detect",
            {"response_method": "kl"},
            "compares classes of images, and the task 'detect' has",
        ),
        (
            "detect",
            {"feature_distill": True, "feature_method": "srrl"},
            "'feature_method=srrl' needs the head of an Ultralytics classifier",
        ),
        ("detect", {"data": None}, "No dataset given. Set 'data' to one of the task 'detect', e.g. 'data=coco8.yaml'"),
        ("detect", {"model": "rtdetr-l.yaml"}, "a head of type RTDETRDecoder says nothing of anchors"),
        (
            "detect",
            {"model": "yolov8n-p2.yaml", "box_distill": True},
            r"anchors have strides \[4, 8, 16, 32\], and the",
        ),
        ("detect", {"model": "yolo11n-seg.yaml"}, "'model=yolo11n-seg.yaml' is of the task 'segment'"),
        (
            "pose",
            {"model": "yolo11n.yaml"},
            "'model=yolo11n.yaml' is of the task 'detect'.*e.g. 'model=yolo11l-pose.yaml'",
        ),
        ("detect", {"teacher_imgsz": 96, "box_distill": True}, "sees images of 96 pixels, and the student of 64"),
        ("detect", {"teacher_probe": True}, "fits a head that names images, and the task 'detect' has none"),
        ("detect", {"teacher_cache": "ram"}, "keeps answers to images that are seen again"),
        (
            "detect",
            {
                "response_distill": False,
                "attention_distill": False,
                "box_distill": False,
                "dfl_distill": False,
            },
            "has no loss to weigh",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_file(task, given, words, settings_of):
    settings = settings_of(task, **given)
    with pytest.raises(ValueError, match=words):
        TRAINERS[task](overrides=settings)
    assert not Path(settings["project"]).exists()


def test_of_unlike_strides_the_maps_alone_teach(settings_of):
    trainer = train(settings_of("detect", model="yolov8n-p2.yaml", fraction=0.34), TRAINERS["detect"])
    assert set(trainer.distiller.weights) == {"attention_loss"}
    assert [student.stride for student, _ in trainer.plan.levels] == [8, 16, 32]


def test_a_model_of_another_task_finds_no_trainer(settings_of):
    """By whichever entrance it comes."""
    settings = settings_of("detect")
    del settings["model"]
    with pytest.raises(ValueError, match=r"'model=yolo11n-seg.yaml' is of the task 'segment', and this trainer is for"):
        YOLO("yolo11n-seg.yaml").train(trainer=TRAINERS["detect"], **settings)
    assert not Path(settings["project"]).exists()
    with pytest.raises(Stopped):
        train(settings_of("segment", fraction=0.34, epochs=2), TRAINERS["segment"], on_fit_epoch_end=stop_after(0))
    (last,) = Path(settings_of("segment")["project"]).glob("*/weights/last.pt")
    with pytest.raises(ValueError, match=r"'resume=.*last.pt' is of the task 'segment'"):
        TRAINERS["detect"](overrides={"resume": str(last)})


def test_keypoints_of_unlike_shape_are_not_compared(settings_of, tmp_path, monkeypatch, undrawn):
    """Neither are they measured on the dataset's labels; a dataset may have two values a point, or more points."""
    monkeypatch.setattr(distill_validation, "SURE", 0.0)
    settings = settings_of("pose", fraction=0.34, plots=True)
    names = YAML.load(settings["data"])
    labels = Path(names["path"])
    other = tmp_path / "points"
    shutil.copytree(labels, other)
    for file in other.glob("labels/*/*.txt"):
        lines = [line.split() for line in file.read_text().splitlines()]
        file.write_text("\n".join(" ".join([*x[:7], *x[8:10]]) for x in lines))
    YAML.save(other / "points.yaml", {**names, "path": str(other), "kpt_shape": [2, 2]})
    settings["data"] = str(other / "points.yaml")
    trainer = train(settings, TRAINERS["pose"])
    assert set(trainer.distiller.weights) == {*SHARED}
    assert all(x.isfinite() for x in trainer.loss_items.values())
    assert list(json.loads((trainer.save_dir / "distillation.json").read_text())["networks"]) == ["student"]
    with pytest.raises(
        ValueError, match=r"'keypoint_distill=True' .* keypoints of shape \(2, 2\), and the teacher of \(2, 3\)"
    ):
        TRAINERS["pose"](overrides={**settings, "keypoint_distill": True})


def test_images_without_objects_are_learned_from(settings_of, tmp_path, undrawn):
    """Neither is there anything to measure of the teacher, or to report, if there are none for validation either."""
    settings = settings_of("segment", fraction=0.34, plots=True)
    names = YAML.load(settings["data"])
    shutil.copytree(names["path"], tmp_path / "empty")
    for file in (tmp_path / "empty").glob("labels/*/*.txt"):
        file.write_text("")
    for file in (tmp_path / "empty").glob("labels/*.cache"):
        file.unlink()
    YAML.save(tmp_path / "empty.yaml", {**names, "path": str(tmp_path / "empty")})
    trainer = train({**settings, "data": str(tmp_path / "empty.yaml")}, TRAINERS["segment"])
    assert all(x.isfinite() for x in trainer.loss_items.values())
    assert trainer.loss_items["response_loss"] > 0


@pytest.mark.parametrize("maps", [False, True])
def test_balanced_losses_all_count(maps, settings_of):
    """Boxes, classes and masks have no tensor in common but what the head is given."""
    given = {"feature_distill": maps, "attention_distill": maps, "distill_balance": "auto"}
    trainer = train({**settings_of("segment"), **given}, TRAINERS["segment"])
    factors = {k: float(v) for k, v in rows(trainer)[0].items() if k.endswith("_factor")}
    assert len(factors) == len(trainer.distiller.weights)
    assert all(value > 0 for value in factors.values())


def test_the_check_leaves_the_training_as_it_is(settings_of, monkeypatch):
    """And warns of a teacher that has found nothing yet."""
    said = []
    monkeypatch.setattr(LOGGER, "warning", said.append)
    settings = settings_of("detect", fraction=0.5)
    checked, unchecked = (
        train({**settings, "teacher_check": check, "name": str(check)}, TRAINERS["detect"]) for check in (True, False)
    )
    assert same(weights(checked.last), weights(unchecked.last))
    assert sum("it has nothing to teach" in str(text) for text in said) == 1


@pytest.mark.slow
def test_the_check_is_upstreams_validation(learned, settings_of, tmp_path):
    """Of a network that has learned a little, on the images that it has learned, beside a class unknown to it."""
    data, teacher = learned("obb", "11")
    measured = YOLO(teacher).val(data=data, imgsz=64, batch=8, plots=False, project=tmp_path).box.map
    assert measured > 0.03
    content = YAML.load(data)
    scenes = tmp_path / "scenes"
    shutil.copytree(content["path"], scenes, ignore=shutil.ignore_patterns("*.cache"))
    for file in scenes.glob("labels/*/*.txt"):
        file.write_text("\n".join(" ".join(["1", *x.split()[1:]]) for x in file.read_text().splitlines()))
    YAML.save(tmp_path / "two.yaml", {**content, "path": str(scenes), "names": {0: "cow", 1: "digit"}})
    given = {"data": str(tmp_path / "two.yaml"), "teacher": str(teacher)}
    trainer = TRAINERS["obb"](overrides={**settings_of("obb"), **given})
    trainer._setup_train()
    ((is_warning, sentence),) = trainer.task.judge(trainer.plan, trainer.test_loader.dataset, 8)
    assert not is_warning
    assert f"reaches {measured:.1%} mAP50-95 on 24 validation images" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_student_as_good_as_its_teacher_is_warned_of(pretrained, learned, settings_of, monkeypatch):
    said = []
    monkeypatch.setattr(LOGGER, "warning", lambda text: said.append(str(text)))
    data, teacher = learned("obb", "11")
    given = {"data": data, "teacher": str(teacher), "model": str(teacher), "pretrained": pretrained}
    TRAINERS["obb"](overrides={**settings_of("obb"), **given})._setup_train()
    warned = [line for line in said if "what it would learn may make it worse" in line]
    assert len(warned) == pretrained


def test_teachers_that_are_none_are_refused(settings_of, prepared, teacher):
    _, masks = prepared("segment")
    settings = settings_of("detect")
    with pytest.raises(TypeError, match="is a segment model, but the teacher must be a detection model"):
        TRAINERS["detect"](overrides={**settings, "teacher": str(masks)})
    with pytest.raises(TypeError, match="is a classify model, but the teacher must be a detection model"):
        TRAINERS["detect"](overrides={**settings, "teacher": str(teacher)})
    for other in ("timm:resnet18", "torchvision:resnet18@w.pth", "model.onnx", "model.torchscript"):
        with pytest.raises(TypeError, match=r"exported files teach classifiers alone.*Give a YOLO checkpoint"):
            TRAINERS["detect"](overrides={**settings, "teacher": other})
    with pytest.raises(
        TypeError, match=r"'teacher=model.engine' is for TensorRT.* Give the '.pt' that it was made of.$"
    ):
        TRAINERS["detect"](overrides={**settings, "teacher": "model.engine"})
    with pytest.raises(ValueError, match="names several teachers"):
        TRAINERS["detect"](overrides={**settings, "teacher": [settings["teacher"]] * 2})
    with pytest.raises(ValueError, match="'teacher_output=sigmoid' is for classifiers of others"):
        TRAINERS["detect"](overrides={**settings, "teacher_output": "sigmoid"})
    with pytest.raises(TypeError, match=r"cannot teach a detection model.* Give a YOLO checkpoint"):
        TRAINERS["detect"](overrides={**settings, "teacher": torch.nn.Conv2d(3, 8, 3)})
    with pytest.raises(TypeError, match="is a segment model, but the teacher must be a detection model"):
        TRAINERS["detect"](overrides={**settings, "teacher": YOLO(masks)})


def with_names(data, names, folder):
    """The same scenes with other class names."""
    file = folder / "renamed.yaml"
    YAML.save(file, {**YAML.load(data), "names": dict(enumerate(names))})
    return str(file)


@pytest.mark.parametrize("more", [{}, {"feature_distill": True}])
def test_where_the_teacher_knows_no_class_its_maps_teach(more, settings_of, tmp_path):
    settings = settings_of("detect", **more)
    settings["data"] = with_names(settings["data"], [f"thing {i}" for i in range(10)], tmp_path)
    trainer = train(settings, TRAINERS["detect"])
    assert set(trainer.distiller.weights) == {"attention_loss", *(["feature_loss"] if more else [])}
    with pytest.raises(ValueError, match=r"'box_distill=True' .* knows none of the dataset's 10 classes"):
        TRAINERS["detect"](overrides={**settings, "box_distill": True})


def test_the_teacher_is_not_listened_to_where_objects_are_that_it_does_not_know(settings_of, tmp_path):
    """Neither the scores of anchors inside such an object nor of classes unknown to it get a gradient from it."""
    settings = settings_of("detect", attention_distill=False)
    settings["data"] = with_names(settings["data"], [*"0123", "cow", *"56789"], tmp_path)
    trainer = train({**settings, "distill_beta": 0}, TRAINERS["detect"])
    student, plan = trainer.model.train(), trainer.plan
    images = torch.rand(2, 3, 64, 64)
    objects = {
        "cls": torch.tensor([[4.0], [3.0]]),
        "bboxes": torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.6, 0.6]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }
    predictions = student(images)
    predictions["scores"].retain_grad()
    answer = trainer.teacher(images)
    batch = {"img": images, **objects}
    batch[LESSON] = trainer.task.prepare(plan, batch, dict(batch))
    assert batch[LESSON].unknown.tolist() == [0]
    sum(trainer.task.compare(plan, trainer.distillation_loss, predictions, [], answer, batch).values()).backward()
    felt = predictions["scores"].grad.abs() > 0
    points = plan.heads[0].points(predictions)
    inside = ((points > 0) & (points < 32)).all(1)
    assert inside.any()
    assert not felt[0, :, inside].any()
    assert felt[0][:, ~inside].any()
    assert felt[1].any()
    assert not felt[:, 4].any()


def test_a_head_without_anchors_teaches_by_its_maps(settings_of, tmp_path, undrawn):
    """What was asked for of their heads is refused, what was a default is off."""
    settings = settings_of("detect", fraction=0.34, plots=True, feature_distill=True)
    file = tmp_path / "other.pt"
    network = RTDETRDetectionModel("rtdetr-resnet50.yaml", nc=10, verbose=False)
    network.names, network.task = {i: str(i) for i in range(10)}, "detect"
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as if it were trained
            module.running_mean += 0.01
            module.num_batches_tracked += 1
    torch.save({"model": network, "train_args": {"task": "detect"}}, file)
    settings["teacher"] = str(file)
    trainer = train(settings, TRAINERS["detect"])
    assert set(trainer.distiller.weights) == {"feature_loss", "attention_loss"}
    assert [pair[1].stride for pair in trainer.plan.levels] == [8, 16, 32]
    assert all(float(rows(trainer)[0][f"train/{name}"]) > 0 for name in trainer.distiller.weights)
    assert list(json.loads((trainer.save_dir / "distillation.json").read_text())["networks"]) == ["student"]
    with pytest.raises(ValueError, match=r"'box_distill=True' .* head of type \w+ says nothing of anchors"):
        TRAINERS["detect"](overrides={**settings, "box_distill": True})


@pytest.mark.parametrize("angle", [None, 0.0, torch.pi / 4])
def test_anchors_in_oriented_boxes(angle):
    box = [0.5, 0.5, 0.5, 0.25] + ([] if angle is None else [angle])
    batch = {
        "img": torch.zeros(1, 3, 64, 64),
        **{"cls": torch.tensor([[1.0]]), "bboxes": torch.tensor([box]), "batch_idx": torch.tensor([0.0])},
    }
    points = torch.tensor([[46.0, 32.0], [32.0, 38.0], [40.0, 40.0], [40.0, 24.0]])
    found = _on_objects(points, torch.tensor([0]), batch)[0].tolist()
    assert found == ([True, True, False, False] if not angle else [False, True, True, False])
    assert not _on_objects(points, torch.tensor([], dtype=torch.int64), batch).any()


def test_anchors_on_many_objects_are_found_piece_by_piece():
    """As many objects as a crowd has would take memory for all anchors each."""
    draw = torch.Generator().manual_seed(0)
    count, points = 3 * OBJECTS_AT_ONCE + 1, torch.rand(50, 2, generator=draw) * 64
    batch = {
        "img": torch.zeros(4, 3, 64, 64),
        "bboxes": torch.rand(count, 4, generator=draw) * 0.3,
        "batch_idx": torch.randint(4, (count,), generator=draw).float(),
    }
    expected = torch.zeros(4, 50, dtype=torch.bool)
    for i, (x, y, w, h) in enumerate(64 * batch["bboxes"]):
        inside = ((points - torch.stack([x, y])).abs() < torch.stack([w, h]) / 2).all(1)
        expected[int(batch["batch_idx"][i])] |= inside
    assert expected.any()
    assert not expected.all()
    assert torch.equal(_on_objects(points, torch.arange(count), batch), expected)


@pytest.mark.parametrize(("task", "family"), [("segment", "26"), ("pose", "11")])
def test_the_student_teaches_itself(task, family, settings_of):
    settings = settings_of(task, family, distill_alpha=0.3, distill_beta=1)
    trainer = train({**settings, "teacher": "self"}, TRAINERS[task])
    own = {"dfl_distill_loss"} if family == "26" else set()
    assert set(trainer.distiller.weights) == {*SHARED, *ITEMS[task]} - own
    assert all(x.isfinite() for x in trainer.loss_items.values())


@pytest.mark.parametrize("family", ["11", "26"])
@pytest.mark.parametrize("task", TASKS)
def test_automatic_batch_sizes_count_the_teacher(task, family, settings_of, monkeypatch):
    totals = []

    def check_train_batch_size(model, imgsz, **kwargs):
        assert int(model.stride.max()) == 32  # upstream asks for these where it stands in for many boxes
        assert len(model.names) == 10
        totals.append(model.train()(torch.rand(2, 3, imgsz, imgsz)).sum())
        raise Stopped

    monkeypatch.setattr("ultralytics.engine.trainer.check_train_batch_size", check_train_batch_size)
    with pytest.raises(Stopped):
        train({**settings_of(task, family), "batch": -1}, TRAINERS[task])
    assert totals[0].isfinite()
    assert totals[0].requires_grad


def test_every_entrance_leads_to_the_trainer_of_the_models_task(settings_of):
    settings = settings_of("pose")
    trainer = train_script([f"{k}={v}" for k, v in settings.items()])
    assert type(trainer) is TRAINERS["pose"]
    model = YOLO(settings.pop("model"))
    model.train(trainer=TRAINERS["pose"], **{**settings, "distill_model": settings.pop("teacher")})
    assert type(model.trainer) is TRAINERS["pose"]
    assert model.trainer.args.teacher == trainer.args.teacher
    plain_run = train_script(["use_distillation=False", *(f"{k}={v}" for k, v in plain(settings_of("obb")).items())])
    assert type(plain_run) is TRAINERS["obb"].task.plain_trainer
