"""The trainer on real images: what distillation changes, and what it must leave as plain training has it."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from helpers import DISTILLATION_LOSSES, TRAINING, plain, predict_elsewhere, rows, same, train, weights, write_digits
from ultralytics import YOLO
from ultralytics.engine.distillation import trainer as distillation_trainer
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.tasks import ClassificationModel, load_checkpoint
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def finished(digits, teacher, tmp_path_factory):
    """A finished two-epoch run with every loss, its mid-run checkpoint kept, and what was seen on the way."""
    seen, said = {}, []
    overrides = {
        **TRAINING,
        "model": "yolo11n-cls.yaml",
        "teacher": str(teacher),
        "data": str(digits),
        "project": str(tmp_path_factory.mktemp("finished")),
        "epochs": 2,
        "save_period": 1,
        "plots": True,
    }

    def on_start(trainer):
        student = unwrap_model(trainer.model)
        seen["teacher"] = {k: v.clone() for k, v in trainer.teacher.first.model.state_dict().items()}
        seen["adapters"] = {k: v.clone() for k, v in student.distill_adapters.state_dict().items()}
        seen["optimized"] = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        seen["adapter_ids"] = {id(p) for p in student.distill_adapters.parameters()}
        seen["teacher_ids"] = {id(p) for p in trainer.teacher.first.model.parameters()}
        seen["student_type"] = type(student)
        seen["state_keys"] = set(student.state_dict())

    def on_epoch_end(trainer):
        seen["adapters_after"] = {
            k: v.clone() for k, v in unwrap_model(trainer.model).distill_adapters.state_dict().items()
        }

    def on_train_end(trainer):
        seen["teacher_after"] = trainer.teacher.first.model.state_dict()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LOGGER, "info", said.append)
        trainer = train(overrides, on_train_start=on_start, on_train_epoch_end=on_epoch_end, on_train_end=on_train_end)
    seen["said"] = [line for message in said if "distillation:" in str(message) for line in message.splitlines()]
    return trainer, seen, overrides


def test_the_start_shows_networks_levels_and_weights(finished):
    _, seen, _ = finished
    lines = [line.split() for line in seen["said"]]
    assert lines[2][:3] == ["teacher", "best.pt", "5,446,938"]  # fused
    assert lines[3][:3] == ["student", "yolo11n-cls.yaml", "1,543,914"]
    assert all(0 < float(line[3]) < 1 for line in lines[2:4])
    assert lines[4] == ["stride", "8", "student", "4", "128x4x4", "teacher", "4", "256x4x4"]
    assert lines[6] == ["stride", "32", "student", "9", "256x1x1", "teacher", "9", "512x1x1"]
    weights = "0.3 x label + 0.7 x (0.1 x response (temperature 4) + 25 x feature + 10 x attention)"
    assert seen["said"][7].strip() == f"loss  {weights}"


def test_student_stays_plain_and_teacher_outside(finished):
    _, seen, _ = finished
    assert seen["student_type"] is ClassificationModel
    assert {k.split(".")[0] for k in seen["state_keys"]} == {"model", "distill_adapters"}
    assert seen["adapter_ids"] <= seen["optimized"]
    assert not seen["teacher_ids"] & seen["optimized"]


def test_teacher_is_untouched_and_adapters_learn(finished):
    _, seen, _ = finished
    assert same(seen["teacher"], seen["teacher_after"])
    assert not any(torch.equal(v, seen["adapters"][k]) for k, v in seen["adapters_after"].items())


def test_losses_reach_the_results(finished):
    trainer, _, _ = finished
    table = rows(trainer)
    assert len(table) == 2
    losses = [c for c in table[0] if c.endswith("loss")]
    assert losses == ["train/loss", *(f"train/{name}" for name in DISTILLATION_LOSSES), "val/loss"]
    assert all(float(row[c]) > 0 for row in table for c in losses)
    assert (trainer.save_dir / "results.png").stat().st_size > 0


def test_progress_columns_line_up(finished):
    header = finished[0].progress_string().strip("\n")
    assert header.split() == ["Epoch", "GPU_mem", "loss", "response", "feature", "attention", "Instances", "Size"]
    assert len(header) == 11 * 8


def test_arguments_are_recorded(finished):
    trainer, _, overrides = finished
    saved = yaml.safe_load((trainer.save_dir / "args.yaml").read_text())
    assert saved["teacher"] == overrides["teacher"]
    assert saved.keys() >= {f.name for f in fields(trainer.distillation)}
    assert (saved["distill_alpha"], saved["temperature"], saved["feature_distill"]) == (0.7, 4.0, True)
    assert saved["distill_model"] is None
    assert torch.load(trainer.wdir / "epoch0.pt", weights_only=False)["train_args"]["teacher"] == overrides["teacher"]


def test_final_checkpoints_are_what_plain_training_writes(finished, tmp_path):
    trainer, _, overrides = finished
    twin = train({**plain(overrides), "project": str(tmp_path)}, ClassificationTrainer)
    for name in ("best", "last"):
        ours = torch.load(getattr(trainer, name), weights_only=False)
        theirs = torch.load(getattr(twin, name), weights_only=False)
        assert ours.keys() == theirs.keys()
        assert ours["train_args"].keys() == theirs["train_args"].keys()
        assert ours["model"].__dict__.keys() == theirs["model"].__dict__.keys()
        assert ours["model"]._modules.keys() == theirs["model"]._modules.keys()
        assert {k: v.shape for k, v in ours["model"].state_dict().items()} == {
            k: v.shape for k, v in theirs["model"].state_dict().items()
        }
        assert ours["model"].names == theirs["model"].names
        assert ours["model"].yaml == theirs["model"].yaml
        assert not any(m._forward_hooks for m in ours["model"].modules())
    # Neither a lock nor a partial file
    assert sorted(file.name for file in trainer.wdir.iterdir()) == ["best.pt", "epoch0.pt", "epoch1.pt", "last.pt"]


def test_checkpoints_open_where_this_project_is_not(finished, digits, tmp_path):
    """Mid-run and final checkpoints predict in a process that cannot import a module of ours."""
    trainer, _, _ = finished
    image = next((digits / "val" / "3").iterdir())
    files = [trainer.wdir / name for name in ("best.pt", "last.pt", "epoch0.pt")]
    assert "distill_adapters" in load_checkpoint(files[2])[0]._modules  # the mid-run one still has them
    results = predict_elsewhere(files, image, 32, tmp_path)
    assert [task for task, *_ in results] == ["classify"] * 3
    assert all(float(total) == pytest.approx(1, abs=1e-3) for *_, total in results)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torchscript", "onnx"])
def test_export_gives_the_same_answers(finished, target, tmp_path):
    trainer, _, _ = finished
    file = tmp_path / "student.pt"
    file.write_bytes(trainer.best.read_bytes())
    exported = YOLO(file).export(format=target, imgsz=32, device="cpu")
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected, _ = load_checkpoint(file)[0](x)
    if target == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
        answer = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        answer = torch.jit.load(exported)(x)
    torch.testing.assert_close(answer, expected, rtol=1e-3, atol=1e-4)


def test_nothing_is_left_on_the_student(finished):
    student = unwrap_model(finished[0].model)
    assert student.criterion is None
    assert not hasattr(student, "distill_adapters")
    assert not any(m._forward_hooks for m in student.modules())


TERMS = {
    "response": {"feature_distill": False, "attention_distill": False},
    "feature": {"response_distill": False, "attention_distill": False},
    "attention": {"response_distill": False, "feature_distill": False},
}


@pytest.mark.oldest
@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone_moves_the_backbone(term, overrides):
    """With no label loss and no weight decay, nothing but the term's gradient can move a weight."""
    before, names = {}, []

    def on_start(trainer):
        names.extend(n for n, _ in trainer.model.named_parameters())
        before.update({n: p.detach().clone() for n, p in trainer.model.named_parameters()})

    moved = {}

    def on_epoch_end(trainer):
        moved.update({n: not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters()})

    alone = {**overrides, **TERMS[term], "distill_alpha": 1.0, "distill_beta": 0.0, "weight_decay": 0.0}
    trainer = train(alone, on_train_start=on_start, on_train_epoch_end=on_epoch_end)
    assert [name for name in trainer.loss_names if name != "loss"] == [f"{term}_loss"]
    backbone = {n: v for n, v in moved.items() if n.startswith(tuple(f"model.{i}." for i in range(5)))}
    assert sum(v for n, v in backbone.items() if "conv.weight" in n) == sum("conv.weight" in n for n in backbone)
    assert moved["model.10.linear.weight"] == (term == "response")  # maps lie below the head
    adapters = [v for n, v in moved.items() if n.startswith("distill_adapters")]
    assert adapters == [True] * (6 if term == "feature" else 0)


def record_first_batch(trainer_class):
    class Recorder(trainer_class):
        first = None

        def preprocess_batch(self, batch):
            if self.first is None:
                self.first = batch["img"].clone()
                self.initial = {
                    k: v.clone() for k, v in self.model.state_dict().items() if not k.startswith("distill_adapters")
                }
            return super().preprocess_batch(batch)

    return Recorder


def test_random_stream_is_that_of_plain_training(overrides, tmp_path):
    ours = train(overrides, record_first_batch(DistillationClassificationTrainer))
    theirs = train({**plain(overrides), "project": str(tmp_path / "plain")}, record_first_batch(ClassificationTrainer))
    assert same(ours.initial, theirs.initial)
    assert torch.equal(ours.first, theirs.first)
    assert not same(weights(ours.last), weights(theirs.last))


@pytest.mark.oldest
def test_without_weight_the_run_is_bit_identical_to_plain(overrides, tmp_path, caplog):
    off = {**overrides, "epochs": 2, "distill_alpha": 0, "distill_beta": 1}
    ours = train(off)
    theirs = train({**plain(overrides), "epochs": 2, "project": str(tmp_path / "plain")}, ClassificationTrainer)
    assert same(weights(ours.last), weights(theirs.last))
    assert same(weights(ours.best), weights(theirs.best))
    timeless = [{k: v for k, v in row.items() if k != "time"} for row in rows(ours)]
    assert timeless == [{k: v for k, v in row.items() if k != "time"} for row in rows(theirs)]


@pytest.mark.parametrize(
    ("settings", "losses"),
    [
        ({"feature_weight": 0}, ["response_loss", "attention_loss"]),
        ({"feature_distill": False, "attention_weight": 0.0}, ["response_loss"]),
    ],
)
def test_terms_without_weight_build_nothing(settings, losses, overrides):
    def on_start(trainer):
        assert not hasattr(trainer.model, "distill_adapters")

    trainer = train({**overrides, **settings, "fraction": 0.2}, on_train_start=on_start)
    assert list(trainer.loss_names) == ["loss", *losses]


def test_student_from_a_checkpoint_by_the_model_api(overrides, finished, teacher):
    """`YOLO(student.pt).train(trainer=..., teacher=...)` starts from the student's weights and returns metrics."""
    first = {}
    settings = {k: v for k, v in overrides.items() if k != "model"}
    model = YOLO(finished[0].best)
    model.add_callback("on_train_start", lambda t: first.update(w=t.model.model[-1].linear.weight.detach().clone()))
    metrics = model.train(trainer=DistillationClassificationTrainer, **{**settings, "distill_layers": [4, 9]})
    assert torch.equal(first["w"], weights(finished[0].best)["model.10.linear.weight"])
    assert 0 <= metrics.top1 <= 1
    assert [s.name for s, _ in model.trainer.levels] == ["model.4", "model.9"]
    assert model.predict(torch.rand(1, 3, 32, 32), verbose=False)[0].probs.data.shape == (10,)


def test_overrides_and_configuration_files(overrides, tmp_path):
    """Arguments may come from a file, the caller's dict is not changed, and `distill_model` names the teacher too."""
    file = tmp_path / "settings.yaml"
    given = {k: v for k, v in overrides.items() if k != "teacher"}
    file.write_text(yaml.safe_dump({"cos_lr": True, "temperature": 2.0, "distill_model": overrides["teacher"]}))
    copy = dict(given)
    from ultralytics.cfg import get_cfg

    defaults = {**vars(get_cfg()), **yaml.safe_load(file.read_text())}
    trainer = DistillationClassificationTrainer(cfg=defaults, overrides=given)
    assert given == copy
    assert (trainer.args.temperature, trainer.args.cos_lr) == (2.0, True)
    assert trainer.args.teacher == overrides["teacher"]
    assert trainer.args.distill_model is None


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"teacher": None}, ValueError, "No teacher given"),
        ({"teacher": "missing.pt"}, FileNotFoundError, "missing.pt"),
        ({"teacher": "yolo11s-cls.yaml"}, TypeError, "without trained weights"),
        ({"model": "yolo11q-cls.yaml"}, FileNotFoundError, "yolo11q-cls.yaml"),
        ({"temprature": 3}, SyntaxError, "temperature"),
        ({"temperature": -1}, ValueError, "temperature=-1"),
        ({"distill_alpha": 0, "distill_beta": 0}, ValueError, "no loss"),
        ({"epochs": "many"}, TypeError, "epochs"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(wrong, error, words, overrides):
    with pytest.raises(error) as e:
        DistillationClassificationTrainer(overrides={**overrides, **wrong})
    assert words in str(e.value)
    assert not Path(overrides["project"]).exists()


def test_foreign_classes_are_refused_before_anything_is_written(overrides, tmp_path):
    data = write_digits(tmp_path / "other", train=2, val=1, names=[f"digit {c}" for c in range(10)])
    with pytest.raises(ValueError, match=r"knows 0 of the dataset's 10 classes \('digit 0'.*It knows \('0'"):
        DistillationClassificationTrainer(overrides={**overrides, "data": str(data)})
    assert not Path(overrides["project"]).exists()


def by_trainer(overrides):
    DistillationClassificationTrainer(overrides=overrides)


def by_model(overrides):
    settings = {k: v for k, v in overrides.items() if k != "model"}
    YOLO(overrides["model"]).train(trainer=DistillationClassificationTrainer, **settings)


@pytest.mark.parametrize("start", [by_trainer, by_model])
def test_layers_that_do_not_exist_are_refused_before_anything_is_written(start, overrides):
    with pytest.raises(ValueError, match="layer 10, but the student has feature maps at layers"):
        start({**overrides, "distill_layers": [4, 10]})
    assert not Path(overrides["project"]).exists()


def test_alpha_zero_warns(overrides, monkeypatch):
    warnings = []
    monkeypatch.setattr(LOGGER, "warning", warnings.append)
    DistillationClassificationTrainer(overrides={**overrides, "distill_alpha": 0})
    assert any("the teacher has no effect" in w for w in warnings)


@pytest.mark.parametrize("which", ["best", "last"])
def test_resume_of_a_finished_model_says_what_is_wrong(which, overrides):
    trainer = train({**overrides, "fraction": 0.2})
    before = set(Path(overrides["project"]).iterdir())
    with pytest.raises(
        ValueError, match=rf"'model=.*{which}\.pt' holds no unfinished run to resume.*needs a 'teacher'"
    ):
        YOLO(getattr(trainer, which)).train(trainer=DistillationClassificationTrainer, resume=True)
    assert set(Path(overrides["project"]).iterdir()) == before


def test_resume_of_a_finished_run_is_refused(finished):
    with pytest.raises(ValueError, match="finished run"):
        DistillationClassificationTrainer(overrides={"resume": str(finished[0].last)})


@pytest.mark.parametrize("start", ["new", "trained"])
def test_adapters_begin_with_what_the_student_says_already(start, overrides, teacher, monkeypatch):
    """The first feature loss is lower than with random ones, most of all of a student that is the teacher itself."""
    if start == "trained":
        overrides["model"] = str(teacher)
    first, same_in_both = {}, []
    for images in (distillation_trainer.ADAPTER_IMAGES, 1):  # one is too few
        monkeypatch.setattr(distillation_trainer, "ADAPTER_IMAGES", images)

        def on_start(trainer):
            networks = trainer.model, trainer.ema.ema
            same_in_both.append(same(*(x.distill_adapters.state_dict() for x in networks)))

        def on_batch(trainer, images=images):
            first.setdefault(images, trainer.loss_items["feature_loss"].item())

        settings = {**overrides, "fraction": 0.5, "name": str(images)}
        train(settings, on_train_start=on_start, on_train_batch_end=on_batch)
    fitted, random = first.values()
    assert fitted < random * (0.9 if start == "new" else 0.5)
    assert all(same_in_both)
