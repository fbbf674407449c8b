"""Runs that end early, fail on the way, or use upstream's other arguments: distillation goes on as training does."""

import copy
import hashlib
import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers import DISTILLATION_LOSSES, Stopped, Waiting, plain, rows, same, stop_after, train, weights
from ultralytics import YOLO
from ultralytics.engine.distillation.criterion import LESSON
from ultralytics.engine.distillation.distiller import Distiller
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.distillation.overlap import SideStream, SideThread, at_once
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER, YAML
from ultralytics.utils.callbacks import get_default_callbacks


@pytest.mark.oldest
@pytest.mark.parametrize("by", ["path", "api"])
def test_resume_continues_the_distillation(by, overrides):
    """Arguments, teacher, adapters, EMA and optimizer come back from last.pt, and the run ends as a whole one does."""
    started = {**overrides, "epochs": 3, "temperature": 2.5, "distill_alpha": 0.6}
    with pytest.raises(Stopped):
        train(started, on_model_save=stop_after(1))
    (last,) = Path(overrides["project"]).glob("*/weights/last.pt")
    saved = torch.load(last, weights_only=False)
    seen = {}

    def on_start(trainer):
        seen.update(
            adapters={k: v.clone() for k, v in trainer.model.distill_adapters.state_dict().items()},
            ema={k: v.clone() for k, v in trainer.ema.ema.state_dict().items()},
            epoch=trainer.start_epoch,
            steps=[float(s["step"]) for s in trainer.optimizer.state_dict()["state"].values()],
        )

    if by == "path":
        trainer = train({"resume": str(last)}, on_train_start=on_start)
    else:
        model = YOLO(last)
        model.add_callback("on_train_start", on_start)
        model.train(resume=True, trainer=DistillationClassificationTrainer)
        trainer = model.trainer
    assert (trainer.args.temperature, trainer.args.distill_alpha) == (2.5, 0.6)
    assert trainer.args.teacher == overrides["teacher"]
    assert seen["epoch"] == 2
    adapters = {k: v for k, v in saved["run_state"]["model"].items() if k.startswith("distill_adapters")}
    assert same({f"distill_adapters.{k}": v for k, v in seen["adapters"].items()}, adapters)
    assert same(seen["ema"], saved["run_state"]["ema"])
    assert seen["steps"] == [float(s["step"]) for s in saved["optimizer"]["state"].values()]
    assert [row["epoch"] for row in rows(trainer)] == ["1", "2", "3"]
    assert "distill_adapters" not in load_checkpoint(trainer.best)[0]._modules


def test_resume_of_a_plain_run_is_refused(overrides):
    trainer = ClassificationTrainer(overrides={**plain(overrides), "epochs": 2})
    trainer.add_callback("on_model_save", stop_after(0))
    with pytest.raises(Stopped):
        trainer.train()
    with pytest.raises(ValueError, match="no distillation to resume"):
        DistillationClassificationTrainer(overrides={"resume": str(trainer.last), "teacher": overrides["teacher"]})


def test_resume_takes_a_moved_teacher_and_nothing_else(overrides, tmp_path):
    trainer = DistillationClassificationTrainer(overrides={**overrides, "epochs": 2, "fraction": 0.2})
    trainer.add_callback("on_model_save", stop_after(0))
    with pytest.raises(Stopped):
        trainer.train()
    moved = tmp_path / "moved.pt"
    moved.write_bytes(Path(overrides["teacher"]).read_bytes())
    again = DistillationClassificationTrainer(
        overrides={"resume": str(trainer.last), "teacher": str(moved), "temperature": 9.0}
    )
    assert (again.args.teacher, again.args.temperature) == (str(moved), 4.0)


def test_resume_with_a_teacher_of_other_widths_is_refused(overrides, tmp_path):
    trainer = DistillationClassificationTrainer(overrides={**overrides, "epochs": 2, "fraction": 0.2})
    trainer.add_callback("on_model_save", stop_after(0))
    with pytest.raises(Stopped):
        trainer.train()
    narrow = train({**plain(overrides), "fraction": 0.2, "project": str(tmp_path / "narrow")}, ClassificationTrainer)
    another = {"teacher": str(narrow.best), "teacher_hash": hashlib.sha256(narrow.best.read_bytes()).hexdigest()}
    with pytest.raises(ValueError, match=r"does not fit the adapters.*\(256, 128\).*\(128, 128\)"):
        train({"resume": str(trainer.last), **another})


def test_resume_notices_a_teacher_whose_content_changed(overrides, tmp_path):
    """Another file in its place is refused, by its content alone, until the user accepts that content."""
    file = tmp_path / "teacher.pt"
    shutil.copy(overrides["teacher"], file)
    trainer = DistillationClassificationTrainer(
        overrides={**overrides, "teacher": str(file), "epochs": 2, "fraction": 0.2}
    )
    trainer.add_callback("on_model_save", stop_after(0))
    with pytest.raises(Stopped):
        trainer.train()
    began = hashlib.sha256(file.read_bytes()).hexdigest()
    assert YAML.load(trainer.save_dir / "args.yaml")["teacher_hash"] == began
    ckpt = torch.load(file, weights_only=False)
    with torch.no_grad():
        ckpt["model"].model[-1].linear.bias += 0.01
    torch.save(ckpt, file)
    changed = hashlib.sha256(file.read_bytes()).hexdigest()
    before = trainer.last.read_bytes()
    with pytest.raises(
        ValueError, match=f"not what the run began with.*{changed}, not {began}.*teacher_hash={changed}"
    ):
        train({"resume": str(trainer.last)})
    assert trainer.last.read_bytes() == before
    resumed = train({"resume": str(trainer.last), "teacher_hash": changed})
    assert (resumed.start_epoch, resumed.args.teacher_hash) == (1, changed)


def test_a_run_can_ask_for_a_teacher_by_its_content(overrides):
    content = hashlib.sha256(Path(overrides["teacher"]).read_bytes()).hexdigest()
    for given in (content, content.upper()):
        trainer = DistillationClassificationTrainer(overrides={**overrides, "teacher_hash": given})
        assert trainer.args.teacher_hash == content
    with pytest.raises(ValueError, match="not what was asked for"):
        DistillationClassificationTrainer(overrides={**overrides, "teacher_hash": "0" * 64})


def test_the_content_of_a_network_in_python_is_its_weights(overrides):
    network = YOLO(overrides["teacher"])
    first, same_again = (
        DistillationClassificationTrainer(overrides={**overrides, "teacher": network}).args.teacher_hash
        for _ in range(2)
    )
    with torch.no_grad():
        network.model.model[-1].linear.bias += 0.01
    other = DistillationClassificationTrainer(overrides={**overrides, "teacher": network}).args.teacher_hash
    assert first == same_again != other


def test_early_stopping_goes_on_where_it_was(overrides, monkeypatch):
    """A run whose fitness peaks at its second epoch stops at the same epoch, stopped in between or not."""
    fitness = [0.1, 0.5, 0.4, 0.3, 0.2, 0.1]

    class Peaked(DistillationClassificationTrainer):
        def validate(self):
            metrics, _ = super().validate()
            self.best_fitness = max(fitness[: self.epoch + 1])
            return metrics, fitness[self.epoch]

    settings = {**overrides, "fraction": 0.2, "epochs": 6, "patience": 2}
    assert len(rows(train(settings, Peaked))) == 4
    with pytest.raises(Stopped):
        train({**settings, "name": "stopped"}, Peaked, on_model_save=stop_after(2))
    resumed = train({"resume": str(Path(overrides["project"]) / "stopped" / "weights" / "last.pt")}, Peaked)
    assert (resumed.start_epoch, len(rows(resumed))) == (3, 4)


def test_recovery_from_nan_keeps_distilling(overrides):
    """Upstream reloads last.pt after a non-finite loss; the run goes on, distilling and saving."""
    epochs = []

    class Poisoned(DistillationClassificationTrainer):
        def validate(self):
            result = super().validate()
            epochs.append(self.epoch)
            if epochs == [0, 1]:
                self.loss = self.loss * float("nan")
            return result

    trainer = train({**overrides, "epochs": 3}, Poisoned)
    assert epochs == [0, 1, 1, 2]
    assert [row["epoch"] for row in rows(trainer)] == ["1", "2", "3"]
    assert all(float(row["train/feature_loss"]) > 0 for row in rows(trainer))


@pytest.mark.parametrize("where", ["student", "teacher", "loss"])
def test_out_of_memory_halves_the_batch(where, overrides):
    """Whatever runs out of memory, upstream rebuilds its loaders, and distillation goes on with the smaller batch."""
    kept = []

    class Watched(DistillationClassificationTrainer):
        def _build_train_pipeline(self):
            if self.distiller.taps is not None:
                kept.append((list(self.distiller.taps._outputs), self.distiller._last_batch))
            super()._build_train_pipeline()

    def on_start(trainer):
        owner, name = {
            "student": (trainer.model.model[-1], "forward"),
            "teacher": (trainer.teacher.first.model, "forward"),
            "loss": (trainer.distiller.loss, "_adapt"),
        }[where]
        working = getattr(owner, name)

        def fail_once(*args):
            setattr(owner, name, working)
            raise RuntimeError("CUDA out of memory")

        setattr(owner, name, fail_once)

    trainer = train(overrides, Watched, on_train_start=on_start)
    assert kept == [([], None)]  # the failed step's graph was let go before the retry
    assert trainer.batch_size == overrides["batch"] // 2
    assert all(float(rows(trainer)[0][f"train/{name}"]) > 0 for name in DISTILLATION_LOSSES)


@pytest.mark.parametrize("balance", [None, "auto"])
@pytest.mark.parametrize("source", ["file", "self"])
def test_automatic_batch_sizes_count_the_teacher(source, balance, overrides, monkeypatch):
    """What upstream profiles for `batch=-1` asks the teacher where a run does, and computes every loss.

    The run is left as it was.
    """
    profiled = {}

    def check_train_batch_size(model, imgsz, **kwargs):
        before = copy.deepcopy(model.student.state_dict())
        copied = copy.deepcopy(model).train()
        asked, losses, compute = [], {}, copied.loss.losses
        copied.loss.losses = lambda *args: losses.update(compute(*args)) or losses
        teacher = trainer.teacher._teacher if source == "self" else trainer.teacher.first
        hook = teacher.model.register_forward_hook(
            lambda module, args, output: asked.append((len(args[0]), threading.current_thread().name.split("_")[0]))
        )
        total = copied(torch.rand(4, copied.yaml.get("channels", 3), imgsz, imgsz, requires_grad=True))
        total.sum().backward()
        hook.remove()
        profiled.update(
            asked=asked,
            losses=tuple(losses),
            without_gradient=[n for n, p in copied.named_parameters() if p.grad is None or not p.grad.any()],
            untouched=same(before, model.student.state_dict()) and all(p.grad is None for p in model.parameters()),
            measured=balance and dict(trainer.distiller.balance.norms),
        )
        return 16

    monkeypatch.setattr("ultralytics.engine.trainer.check_train_batch_size", check_train_batch_size)
    settings = {**overrides, "batch": -1, "fraction": 0.2}
    trainer = DistillationClassificationTrainer(
        overrides={
            **settings,
            "teacher": overrides["teacher"] if source == "file" else "self",
            "teacher_overlap": True,
            "distill_balance": balance,
        }
    )
    trainer.train()
    assert profiled.pop("losses") == DISTILLATION_LOSSES
    assert not profiled.pop("measured")
    assert profiled == {"asked": [(4, "teacher")], "without_gradient": [], "untouched": True}
    assert trainer.batch_size == 16
    assert trainer.model.criterion is None
    assert not any(m._forward_hooks for m in trainer.model.modules())


def test_a_wholly_frozen_student_is_refused(overrides):
    """As upstream refuses it; the adapters alone would train in vain."""
    with pytest.raises(RuntimeError, match="froze the entire"):
        train({**overrides, "freeze": 11})


def test_quantization_aware_training_excludes_the_feature_loss(overrides):
    with pytest.raises(ValueError, match="feature_distill=False"):
        DistillationClassificationTrainer(overrides={**overrides, "quantize": 8})
    assert not Path(overrides["project"]).exists()
    DistillationClassificationTrainer(overrides={**overrides, "quantize": 8, "feature_distill": False})


def test_a_folder_used_again(overrides):
    """`exist_ok=True` over a finished run, saving or not, leaves plain checkpoints."""
    again = {**overrides, "fraction": 0.2, "name": "same", "exist_ok": True}
    train(again)
    assert "distill_adapters" not in load_checkpoint(train({**again, "save": False}).best)[0]._modules


def test_callbacks_see_the_data_as_given(overrides, digits, monkeypatch):
    """Upstream may resolve `data` (a platform address, say); loggers get what the user wrote."""
    monkeypatch.setattr(
        "ultralytics.engine.trainer.convert_ndjson_to_yolo_if_needed", lambda data, *args, **kwargs: str(digits)
    )
    seen = []
    callbacks = get_default_callbacks()
    callbacks["on_pretrain_routine_start"].append(lambda trainer: seen.append(trainer.args.data))
    trainer = DistillationClassificationTrainer(overrides={**overrides, "data": "ul://data"}, _callbacks=callbacks)
    assert seen == ["ul://data"]
    assert trainer.args.data == str(digits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp", ["bf16", True, False])
def test_cuda_trains(amp, overrides):
    trainer = train({**overrides, "amp": amp, "device": "0"})
    assert all(float(rows(trainer)[0][f"train/{name}"]) > 0 for name in DISTILLATION_LOSSES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "student", ["yolov8n-cls.yaml", "yolo12n-cls.yaml", "yolo26n-cls.yaml", "yolov8-cls-resnet50.yaml"]
)
def test_other_students_train(student, overrides):
    trainer = train({**overrides, "model": student, "fraction": 0.3})
    assert [s.stride for s, _ in trainer.levels] == [8, 16, 32]
    assert all(float(rows(trainer)[0][f"train/{name}"]) > 0 for name in DISTILLATION_LOSSES)


def begin(overrides):
    """Return a trainer before its first step, and the batch."""
    trainer = DistillationClassificationTrainer(overrides=overrides)
    trainer._setup_train()
    trainer.epoch = 0
    trainer._model_train()
    return trainer, next(iter(trainer.train_loader))


def step(trainer, batch):
    batch[LESSON].answer = trainer.distiller.answer_to(batch)
    trainer.model(batch)[0].sum().backward()


METHODS = [
    {},
    {"teacher_names": [*"01234567", "x", "y"]},
    {"distill_balance": "auto", "mixup": 1.0},
    {
        "response_method": {"dkd": 1, "dist": 1, "nkd": 1, "lskd": 1, "mse": 1},
        "feature_method": {"rkd": 1, "sp": 1, "cc": 1, "vid": 1, "pkd": 1, "cwd": 1, "srrl": 1},
    },
]


@pytest.mark.parametrize("given", METHODS)
def test_the_host_does_not_wait_in_a_step(given, overrides):
    trainer, batch = begin({**overrides, "teacher_overlap": False, **given})  # another thread is not looked into
    batch = trainer.preprocess_batch(batch)  # torchvision draws the mixture on the CPU
    with Waiting() as waiting:
        step(trainer, batch)
    assert waiting.operators == []
    with Waiting() as waiting:
        bool(torch.ones(1))
        torch.ones(2)[torch.ones(2) > 0]
    assert waiting.operators == ["_local_scalar_dense", "index"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("given", [*METHODS, {"teacher_overlap": True}])
def test_the_host_does_not_wait_for_a_gpu(given, overrides):
    trainer, batch = begin({**overrides, "device": 0, **given})
    batch = trainer.preprocess_batch(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(trainer, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("given", [{}, {"teacher_compile": "reduce-overhead"}], ids=str)
def test_a_teacher_beside_the_student_says_the_same(given, overrides):
    beside, before = (
        train({**overrides, "device": 0, "amp": False, **x}) for x in ({**given, "teacher_overlap": True}, {})
    )
    for name in ("train/loss", *(f"train/{loss}" for loss in DISTILLATION_LOSSES)):
        assert float(rows(beside)[0][name]) == pytest.approx(float(rows(before)[0][name]), rel=1e-2)


@pytest.mark.parametrize(
    "given",
    [{}, {"distill_balance": "auto", "mixup": 1.0}, {"teacher_cache": "ram"}, {"teacher": "self"}],
    ids=str,
)
def test_a_thread_beside_the_student_says_the_same_bit_for_bit(given, overrides):
    """Which it could not if it read weights or images while they change."""
    beside, at_once = (train({**overrides, **given, "teacher_overlap": x}) for x in (True, False))
    assert isinstance(beside.distiller.overlap, SideThread)
    assert same(weights(beside.last), weights(at_once.last))
    assert [{**row, "time": 0} for row in rows(beside)] == [{**row, "time": 0} for row in rows(at_once)]


@pytest.mark.parametrize(
    ("given", "device", "cores", "expected", "warning"),
    [
        ({}, "cpu", 2, SideThread, None),
        ({}, "cpu", 1, None, None),
        ({"teacher_overlap": True}, "cpu", 1, SideThread, None),
        ({"teacher_overlap": False}, "cpu", 2, None, None),
        ({"teacher_cache": "ram"}, "cpu", 2, SideThread, None),
        ({"teacher_compile": True}, "cpu", 2, None, None),
        ({"compile": True, "teacher_overlap": True}, "cpu", 2, None, "where a network is compiled on a CPU"),
        ({}, "cuda", 2, None, None),
        ({"teacher_overlap": True}, "cuda", 2, SideStream, None),
        ({"teacher_overlap": True, "teacher_compile": True}, "cuda", 2, SideStream, None),
        ({"teacher_overlap": True, "teacher_cache": "ram"}, "cuda", 2, None, "with 'teacher_cache' on CUDA"),
        ({"teacher_overlap": True, "on_host": True}, "cuda", 2, None, "with an ONNX teacher on CUDA"),
        ({"on_host": True}, "cpu", 2, SideThread, None),
        ({}, "mps", 2, None, None),
        ({"teacher_overlap": True}, "mps", 2, None, "on 'mps'"),
    ],
)
def test_where_a_teacher_answers(given, device, cores, expected, warning, overrides, monkeypatch):
    said, given = [], dict(given)
    on_host = given.pop("on_host", False)
    trainer = DistillationClassificationTrainer(overrides={**overrides, **given})
    trainer.teacher.first.model.answers_on_host = on_host
    monkeypatch.setattr("ultralytics.nn.distillation.overlap.usable_cores", lambda: cores)
    monkeypatch.setattr("torch.cuda.Stream", lambda device: None)
    monkeypatch.setattr(LOGGER, "warning", said.append)
    overlap = Distiller(trainer.task, trainer.plan, torch.device(device)).overlap
    assert isinstance(overlap, expected) if expected else overlap is at_once
    assert said == ([f"'teacher_overlap=True' has no effect {warning}."] if warning else [])


def test_a_teacher_is_asked_before_the_student_and_waited_for_after_it(overrides):
    order = []
    trainer, batch = begin(overrides)
    trainer.distiller.overlap = lambda ask, images: order.append("ask") or (lambda: order.append("wait") or ask())
    trainer.model.model[0].register_forward_hook(lambda *args: order.append("student"))
    compute = trainer.distillation_loss.losses
    trainer.distillation_loss.losses = lambda *args: order.append("losses") or compute(*args)
    trainer.model(trainer.preprocess_batch(batch))[0].sum().backward()
    assert order == ["ask", "student", "wait", "losses"]


def test_a_teacher_is_compiled_for_full_batches(overrides, monkeypatch, undrawn):
    """Asked for by the argument, and without an effect on what is learned; not for the report, of as many images."""
    shapes = []

    def attempt_compile(module, device, mode):
        module.register_forward_hook(lambda module, args, output: shapes.append((mode, tuple(args[0].shape))))
        return module

    monkeypatch.setattr("ultralytics.nn.distillation.teacher.attempt_compile", attempt_compile)
    compiled = train({**overrides, "teacher_compile": "reduce-overhead", "plots": True, "batch": 32})
    assert shapes == [("reduce-overhead", (32, 3, 32, 32))] * 6  # the last batch of 200 images has 8
    shapes.clear()
    assert same(weights(compiled.last), weights(train(overrides).last))
    assert shapes == []


def test_a_run_whose_teacher_is_channels_last(overrides, monkeypatch):
    """As from 96 px on: the losses are those of the other format, and so are the weights up to rounding."""
    settings = {**overrides, "imgsz": 96, "fraction": 0.2}
    fast = train(settings)
    monkeypatch.setattr("ultralytics.nn.distillation.teacher.CHANNELS_LAST", 1000)
    slow = train(settings)
    formats = [
        t.teacher.first.model.model[1].conv.weight.is_contiguous(memory_format=torch.channels_last)
        for t in (fast, slow)
    ]
    assert formats == [True, False]
    for name in ("train/loss", *(f"train/{loss}" for loss in DISTILLATION_LOSSES)):
        assert float(rows(fast)[0][name]) == pytest.approx(float(rows(slow)[0][name]), rel=1e-3)


@pytest.mark.slow
def test_a_run_with_a_compiled_teacher_is_that_without(overrides):
    compiled = []

    def on_end(trainer):
        compiled.append(hasattr(trainer.teacher.first._compiled, "_orig_mod"))

    given = {"teacher_compile": True}, {}
    fast, eager = (train({**overrides, **own}, on_train_batch_end=on_end) for own in given)
    assert {*compiled[: len(compiled) // 2]} == {True}
    for name in ("train/loss", *(f"train/{loss}" for loss in DISTILLATION_LOSSES)):
        assert float(rows(fast)[0][name]) == pytest.approx(float(rows(eager)[0][name]), rel=1e-2)


def test_features_alone_need_no_logits(overrides):
    asked = []

    def on_start(trainer):
        ask = trainer.teacher.first.model.model[-1].forward
        trainer.teacher.first.model.model[-1].forward = lambda x: asked.append(len(x)) or ask(x)

    trainer = train({**overrides, "response_distill": False}, on_train_start=on_start)
    assert asked == []
    assert float(rows(trainer)[0]["train/feature_loss"]) > 0
    train(overrides, on_train_start=on_start)
    assert len(asked) == 7
