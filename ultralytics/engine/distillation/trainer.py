# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Training, of any task, in which a frozen trained teacher guides the student."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from ultralytics.cfg import cfg2dict
from ultralytics.cfg.distillation import DistillationArgs
from ultralytics.data.distillation.views import RepeatableViews, random_stream
from ultralytics.data.distillation.wrapped import alike, naming_unreadable, spaced
from ultralytics.engine.distillation.criterion import LESSON
from ultralytics.engine.distillation.distiller import Distiller, return_memory
from ultralytics.engine.distillation.guarded import GuardedTrainer
from ultralytics.engine.distillation.plan import DISTILLATION_KEYS, Plan, log, tell
from ultralytics.engine.distillation.planner import make_plan, resumed_arguments
from ultralytics.engine.distillation.probe import VIEWS, probe_teachers
from ultralytics.engine.distillation.report.page import remove_report, write_report
from ultralytics.engine.distillation.run_files import absolute, locked, sweep, whole_files
from ultralytics.engine.distillation.task import DistillationTask, FinishedRun
from ultralytics.engine.distillation.undistilled import Undistilled
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.distillation.taps import FeatureLevel
from ultralytics.utils import DEFAULT_CFG, RANK, YAML, IterableSimpleNamespace
from ultralytics.utils.distillation import DistillationLoss
from ultralytics.utils.torch_utils import autocast, unwrap_model

__all__ = ("DistillationTrainer", "loop_precision")

ADAPTER_IMAGES = 512  # of the training split, to fit the adapters on


class DistillationTrainer(GuardedTrainer):
    """A trainer whose student also learns from a frozen teacher; stands before upstream's trainer of a task.

    Takes every training argument of upstream's and those of `DistillationArgs`. The student stays an ordinary network
    of upstream's throughout; distillation enters as its criterion and, while training, as a child module
    `distill_adapters` of plain 1x1 convolutions. The final `best.pt` and `last.pt` are what plain training would write.

    Attributes:
        task (DistillationTask): What is special about the task.
        plan (Plan): What the run will do.
        distiller (Undistilled): The teacher's side of the run, a Distiller unless `distill_alpha` is 0.
    """

    task: ClassVar[DistillationTask]

    def __init__(self, cfg=DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict | None = None):
        """Initialize the trainer; everything that can be wrong with the teacher is refused here, before any file.

        Args:
            cfg (str | Path | dict | SimpleNamespace): Training configuration, may hold distillation arguments.
            overrides (dict[str, Any], optional): Arguments that override it; not changed.
            _callbacks (dict, optional): Callback functions by event.

        Raises:
            SyntaxError: If a key is neither a training nor a distillation argument.
            TypeError: If an argument has the wrong type, or a teacher is no trained network or not safe to load.
            ValueError: If an argument is out of range, or a teacher does not fit the dataset.
            FileNotFoundError: If a teacher's file does not exist.
            ImportError: If a teacher needs a library that is not installed.
            OSError: If `teacher_cache=disk` has nowhere to write.
        """
        from_cfg, cfg = DistillationArgs.split(cfg2dict(cfg))
        given, overrides = DistillationArgs.split(overrides or {})
        self._nothing_to_resume = overrides.get("resume") is False  # as YOLO.train has it of a finished run
        self._given = {**from_cfg, **given}  # until the plan is made
        self.plan: Plan | None = None
        self.distiller: Undistilled | None = None  # both are there once upstream has read its arguments
        self._resolved_data: Any = None  # where upstream has found the dataset
        self._trained_before = False  # known once the student is built
        super().__init__(cfg, overrides, _callbacks)
        if RANK != -1:
            self.world_size = int(os.environ["WORLD_SIZE"])  # upstream counts this host's devices, torchrun all hosts'

    @property
    def distillation(self) -> DistillationArgs:
        """The distillation arguments in force."""
        return self.plan.args

    @property
    def teacher(self) -> Any:
        """The frozen teacher, or several that answer as one."""
        return self.plan.teacher

    @property
    def levels(self) -> tuple[tuple[FeatureLevel, FeatureLevel], ...]:
        """The matched (student, teacher) feature maps."""
        return self.plan.levels

    @property
    def distillation_loss(self) -> DistillationLoss | None:
        """The losses from the teacher; None before the student is there, and where `distill_alpha` is 0."""
        return self.distiller.loss

    def _check_arguments(self) -> None:
        """Make the plan, completed from the checkpoint if the run is resumed.

        Nothing was written yet, so that args.yaml, loggers, checkpoints and multi-GPU workers see the distillation
        arguments like any other.
        """
        super()._check_arguments()
        if self.resume:
            self.task.check_student(f"resume={self.args.resume}", self.args.task)
        arguments, self._given = self._given, {}
        given = frozenset(arguments)
        if self._nothing_to_resume and arguments.get("teacher") is None:
            raise ValueError(
                f"'model={self.args.model}' holds no unfinished run to resume: give the 'last.pt' of one. A new run "
                f"from its weights needs a 'teacher', and no 'resume'."
            )
        if self.resume:
            try:
                arguments = resumed_arguments(arguments, self.args)
            except ValueError:
                sweep(Path(self.args.resume).parent)
                raise
        module, resumed = type(self).__module__, bool(self.resume)
        self.plan = make_plan(
            self.task, arguments, given, self.args, resumed, module, self._read_dataset, self._build_student
        )
        self.distiller = Undistilled(self.task, self.plan)  # until the student is there
        recorded = {key: getattr(self.plan.args, key) for key in DISTILLATION_KEYS}
        recorded |= {key: absolute(recorded[key]) for key in ("teacher_names", "baseline")}
        vars(self.args).update(recorded, teacher=self.plan.teacher.source)

    def _read_dataset(self) -> dict[str, Any]:
        """Read the dataset before upstream does, with the arguments as given: callbacks are to see these."""
        given, self.args = self.args, copy.copy(self.args)
        try:
            data = super().get_dataset()
            self._resolved_data = self.args.data
            self.task.check_dataset(data, self.args)
            return data
        finally:
            self.args = given

    def get_dataset(self) -> dict[str, Any]:
        """Return the dataset of the plan, where upstream reads it."""
        self.args.data = self._resolved_data
        return self.plan.data

    def _build_student(self, data: dict[str, Any]) -> nn.Module:
        """Return a network of the student's architecture, for the dataset's classes."""
        network = self.task.describe_student(str(self.args.model))
        self.data = data  # where upstream's `get_model` looks for classes and channels
        return self.get_model(cfg=network, verbose=False)

    def get_validator(self):
        """Return upstream's validator, given only the arguments that it knows."""
        args = self.args
        self.args = _without_ours(args)
        try:
            return super().get_validator()
        finally:
            self.args = args

    def setup_model(self):
        """Build the student, and give it what it trains for the teacher's losses alone.

        Returns:
            (dict | None): The checkpoint, if the run is resumed or the student starts from one.
        """
        ckpt = super().setup_model()
        if self.plan.teaches:
            self.distiller = Distiller(self.task, self.plan, self.device)
        if RANK in {-1, 0}:
            self.distiller.describe(self.model)
        self.distiller.adapt(self.model, getattr(ckpt["ema"], "distill_adapters", None) if self.resume else None)
        return ckpt

    def _setup_ddp(self) -> None:
        """Join the other processes."""
        if self.device.type in {"cpu", "mps"}:
            raise ValueError(
                f"{self.world_size} processes cannot train on 'device={self.args.device}'. Give a GPU to each, e.g. "
                f"'device=0,1', or start one process."
            )
        super()._setup_ddp()

    def fit_heads(self) -> None:
        """Give each teacher that waits for one a head for the dataset's classes, and record what it then is.

        Raises:
            ValueError: If the run is resumed and its head is not there.
        """
        if not any(member.waits_for_head for member in self.plan.teacher.members):
            return
        folder = self.data["train"]
        dataset = self.task.wrap_dataset(super().build_dataset(folder), self.plan, folder, training=False)
        with random_stream(0):  # the students' is the same whether a head is fitted or found
            log(probe_teachers(self.task, self.plan, RepeatableViews(dataset, VIEWS), self.wdir, self.device))
        found = {"teacher": self.plan.teacher.source, "teacher_hash": self.plan.teacher.content_hash}
        self.plan = replace(self.plan, args=replace(self.plan.args, **found))
        vars(self.args).update(found)
        if RANK in {-1, 0}:
            with whole_files(self.save_dir) as scratch:
                YAML.save(scratch / "args.yaml", vars(self.args))

    def probe(self) -> str | list[str]:
        """Fit the teacher its head, measure it on validation images, and return its file, without any training."""
        with locked(self.save_dir):
            self.fit_heads()
        folder = self.data[self.args.split]
        dataset = self.task.wrap_dataset(super().build_dataset(folder, "val"), self.plan, folder, training=False)
        self.plan.teacher.to(self.device)
        tell(self.task.judge(self.plan, dataset, 64))
        return self.plan.teacher.source

    def _setup_train(self):
        """Prepare training, then attach distillation: after the EMA was copied from the student, never before."""
        if self.plan.teaches:
            self.fit_heads()
        super()._setup_train()
        if RANK in {-1, 0} and not self.resume:
            remove_report(self.task, self.save_dir)  # of an earlier run in this folder
        student = unwrap_model(self.model)
        if not any(p.requires_grad for p in student.model.parameters()):
            raise RuntimeError(f"'freeze={self.args.freeze}' froze the entire student. Reduce 'freeze'.")
        loader = self.train_loader
        if not self.resume:
            with random_stream(0), loop_precision(self):  # the training's own stream stays as it is
                self.distiller.fit_adapters(student, self.ema.ema, self._some_images())
        self.distiller.attach(student, self.ema.ema)
        self.distiller.begin_training(loader.dataset, loader.batch_size, loop_precision(self), bool(self.amp))
        if self.distiller.cached is not None:
            for event in ("on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"):
                self.add_callback(event, lambda trainer, event=event: trainer.distiller.cached.lap(event))
        if RANK in {-1, 0}:  # without a loader, as its workers would draw from the random stream of plain training
            with random_stream(0):  # which reading an image draws from
                trained = self.ema.ema if self._trained_before and not self.resume else None
                self.distiller.judge(self.test_loader.dataset, min(self.batch_size, 64), trained)
        return_memory()  # of opening, fitting and judging, or training would need its own beside it

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        """Build the student, and know whether it begins with weights of an earlier training."""
        self._trained_before = weights is not None
        return super().get_model(cfg, weights, verbose)

    def _some_images(self) -> Iterator[Tensor]:
        """Yield batches of evenly spaced training images."""
        loader = self.train_loader
        for _, samples in alike(loader.dataset, spaced(loader.dataset, ADAPTER_IMAGES), loader.batch_size):
            if len(samples) > 1:  # one is too few for BatchNorm
                yield super().preprocess_batch(loader.collate_fn(samples))["img"]

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """Restore the training state; upstream copies the student into a new EMA here, so it must be bare."""
        student = unwrap_model(self.model)
        self.distiller.detach(student)
        super()._load_checkpoint_state(ckpt)
        self.distiller.attach(student, self.ema.ema)

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ask the teacher, before the student's forward pass: what gives its answer travels with the batch."""
        loaded = dict(batch)
        batch = super().preprocess_batch(batch)
        lesson = self.task.prepare(self.plan, batch, loaded)
        batch[LESSON] = self.distiller.ask(lesson, batch)
        return batch

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train"):
        """Load what `build_dataset` gives, which a subclass overrides to augment in its own way, as a run needs it."""
        build = self.build_dataset

        def build_dataset(*given: Any) -> Any:
            with naming_unreadable(dataset_path):
                return self.task.wrap_dataset(build(*given), self.plan, dataset_path, training=mode == "train")

        self.build_dataset = build_dataset
        try:
            return super().get_dataloader(dataset_path, batch_size, rank, mode)
        finally:
            del self.build_dataset

    def _model_train(self) -> None:
        """Begin an epoch, with its weight, its temperature and its views."""
        super()._model_train()
        loader = self.train_loader
        self.distiller.begin_epoch(unwrap_model(self.model), self.epoch, self.epochs, loader.batch_size)
        if isinstance(loader.dataset, RepeatableViews):
            loader.dataset.epoch.fill_(self.epoch)
            if loader.num_workers and loader.dataset.views > 1:  # they have drawn ahead, in the last epoch's views
                if RANK != -1:
                    loader.sampler.set_epoch(self.epoch)
                loader.reset()

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Write a row of results.csv, with the weight, the temperature and the balance that were in force."""
        super().save_metrics({**metrics, **self.distiller.metrics()})

    def _state(self) -> dict[str, Any]:
        """Return what upstream's checkpoint leaves out, the balance of the losses among it."""
        return {**super()._state(), **self.distiller.state_dict()}

    def _restore(self, state: dict[str, Any]) -> None:
        """Go on from where the run was stopped."""
        self.distiller.load_state_dict(state)
        super()._restore(state)

    def _cause(self, name: str) -> str:
        """Return "teacher" for a loss that its answer made NaN or infinite."""
        return "teacher" if self.distiller.cause(name) else super()._cause(name)

    def _describe(self, cause: str) -> str:
        """Return a sentence that says what was not finite, and what can be done."""
        if cause == "teacher":
            return (
                f"the answer of 'teacher={self.plan.teacher.source}' is NaN or infinite. Train with 'amp=bf16' or "
                f"'amp=False' if that helps it, or give another checkpoint."
            )
        if cause.startswith(("feature_", "attention_")):
            argument = (
                cause.replace("_loss", "_weight") if cause in {"feature_loss", "attention_loss"} else "feature_method"
            )
            return super()._describe(cause).removesuffix(".") + f", or lower '{argument}'."
        return super()._describe(cause)

    def label_loss_items(self, loss_items: dict[str, Any] | None = None, prefix: str = "train"):
        """Label the loss items; validation has the student's own only, as the teacher is not asked there."""
        items = super().label_loss_items(loss_items, prefix)
        if prefix == "train":
            return items
        shown = [k for k in items if k.removeprefix(f"{prefix}/") not in self.distiller.weights]
        return shown if loss_items is None else {k: items[k] for k in shown}

    def progress_string(self) -> str:
        """Return the header of the progress bar, the names short enough for upstream's columns."""
        names = self.loss_names
        self.loss_names = tuple(name.removesuffix("_loss").replace("_distill", "_kd")[:10] for name in names)
        try:
            return super().progress_string()
        finally:
            self.loss_names = names

    def _clear_memory(self, threshold: float | None = None) -> None:
        """Let go of the maps of a failed step too, when upstream frees memory to try a smaller batch."""
        self.distiller.clear()
        super()._clear_memory(threshold)

    def auto_batch(self, *args, **kwargs) -> int:
        """Return the batch size that fits the memory, the teacher and the losses counted."""
        student = self.model
        self.model = self.distiller.step(student)
        try:
            return super().auto_batch(*args, **kwargs)
        finally:
            self.model = student

    def _strip(self, ckpt: dict[str, Any]) -> None:
        """Take out of a checkpoint what is ours: what the student trained for the losses alone, and arguments."""
        student = ckpt["ema"]
        self.distiller.release(student)
        if isinstance(getattr(student, "args", None), IterableSimpleNamespace):  # as upstream's detectors keep them
            student.args = _without_ours(student.args)

    def final_eval(self):
        """Leave a plain student and plain checkpoints behind, evaluate the best one, and report on the teacher."""
        student, average = unwrap_model(self.model), self.ema.ema
        self.distiller.detach(student)
        self.distiller.end(average, self.epoch, self.epochs, self._resumed)
        reported = (
            self.distiller.weights and self.task.charts and self.args.plots and RANK in {-1, 0} and self.best.exists()
        )
        pull = {}
        if reported and RANK == -1:
            with self._surviving("measure the losses' gradients"), loop_precision(self):
                batches = (self.preprocess_batch(batch) for batch in islice(self.train_loader, 4))
                pull = self.distiller.measure_pull(student, batches)
        self.distiller.release(student, average)
        super().final_eval()
        if reported:
            with self._surviving("write its report"):
                dataset, loss, rows = self.test_loader.dataset, self.distiller.loss, self.read_results_csv()
                run = FinishedRun(self.plan, self.save_dir, self.best, loss, dataset, self.device, rows, pull)
                log([f"What the teacher did is in {write_report(self.task, run)}"])


def loop_precision(trainer: BaseTrainer) -> AbstractContextManager:
    """Return the autocast of upstream's training loop."""
    return autocast(torch.bfloat16 if trainer.args.amp == "bf16" else trainer.amp, device=trainer.device.type)


def _without_ours(args: IterableSimpleNamespace) -> IterableSimpleNamespace:
    """Return training arguments without those of distillation."""
    return IterableSimpleNamespace(**{k: v for k, v in vars(args).items() if k not in DISTILLATION_KEYS})
