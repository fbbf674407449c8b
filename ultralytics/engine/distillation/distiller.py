# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The teacher's side of a run: what asks it, reads and weighs what it says, and remembers how far the run has come."""

from __future__ import annotations

import copy
import ctypes
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset
from ultralytics.engine.distillation.answers import open_cache
from ultralytics.engine.distillation.criterion import LESSON, DistillationCriterion, Lesson
from ultralytics.engine.distillation.plan import Plan, log, tell
from ultralytics.engine.distillation.task import DistillationTask
from ultralytics.engine.distillation.training_step import TrainingStep
from ultralytics.engine.distillation.undistilled import Undistilled
from ultralytics.nn.distillation.cache import CachedTeacher
from ultralytics.nn.distillation.overlap import Answer, choose_overlap
from ultralytics.nn.distillation.sources.base import without_folders
from ultralytics.nn.distillation.taps import FeatureTaps
from ultralytics.nn.distillation.teacher import random_images
from ultralytics.utils import LOGGER, colorstr
from ultralytics.utils.distillation import (
    GradientBalance,
    scheduled_share,
    scheduled_temperature,
)
from ultralytics.utils.distillation.weighting import weigh
from ultralytics.utils.torch_utils import get_flops, get_num_params

__all__ = ("Distiller", "return_memory")


def return_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it for later, as glibc does."""
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class Distiller(Undistilled):
    """A teacher with what it is asked for: taps, losses, schedule, balance, cache, and where it answers.

    It never names the trainer that calls it. In a batch: `ask` before the student's forward pass, then the criterion
    that `attach` has given the student takes the answer, compares and weighs.

    Attributes:
        teacher (Teachers | SelfTeacher): The teacher.
        balance (GradientBalance | None): Measures factors of the losses, with `distill_balance`.
        cached (CachedTeacher | None): Keeps answers, with `teacher_cache`.
        overlap (Callable): Where the teacher answers, see `overlap`.
        taps (FeatureTaps | None): What reads the student's maps, while attached.
        share (float): Of `distill_alpha`, in the epoch.
    """

    def __init__(self, task: DistillationTask, plan: Plan, device: torch.device):
        """Build the losses, and find out where the teacher answers.

        Args:
            task (DistillationTask): What is special about the run's task.
            plan (Plan): The run's.
            device (torch.device): Where student and teacher are.
        """
        super().__init__(task, plan)
        args = plan.args
        self.teacher, self.device = plan.teacher, device
        self.overlap = choose_overlap(
            args.teacher_overlap,
            device,
            compiled=bool(plan.training.compile or args.teacher_compile),
            cached=bool(args.teacher_cache),
            on_host=plan.teacher.answers_on_host,
        )
        with torch.random.fork_rng(devices=[]):  # the student's random stream stays that of plain training
            self.loss = task.build_loss(plan)
        self.weights = self.loss.weights
        self.balance = GradientBalance() if args.distill_balance else None
        self.cached: CachedTeacher | None = None
        self.taps: FeatureTaps | None = None
        self.share = 1.0
        self.silent = False
        self._last_batch: dict[str, Any] | None = None  # about which the teacher was asked
        self._precision: AbstractContextManager = nullcontext()  # of the training
        self._let_go = False  # whether the teacher's network is gone, as all its answers are kept

    def adapt(self, student: nn.Module, stored: nn.Module | None) -> None:
        """Give the student the adapters as a child module.

        Raises:
            ValueError: If those that were stored are for other networks.
        """
        if not self.loss.adapters:
            return
        student.distill_adapters = self.loss.adapters
        if stored is None:
            return
        shapes, fitting = (
            [tuple(w.shape[:2]) for w in x.state_dict().values() if w.ndim == 4] for x in (stored, self.loss.adapters)
        )
        if shapes != fitting:
            raise ValueError(
                f"'teacher={self.teacher.source}' does not fit the adapters of this run: they have (teacher, student) "
                f"channels {shapes}, and it needs {fitting}. Give the same teacher, or start a new run."
            )
        student.distill_adapters.load_state_dict(stored.state_dict())

    def fit_adapters(self, student: nn.Module, average: nn.Module, batches: Iterable[Tensor]) -> None:
        """Let a new run's adapters begin with what the student's maps say of the teacher's, in both networks.

        Args:
            student (nn.Module): The student, not attached yet; it stays as it is but for the adapters.
            average (nn.Module): Its moving average.
            batches (Iterable[Tensor]): Training images (B, C, H, W) as the training loop holds them.
        """
        if not self.loss.adapters:
            return
        self._place(average)
        copied = copy.deepcopy(student).train()  # in which BatchNorm may count
        taps = FeatureTaps(copied, self.plan.student_levels)

        def maps(images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            copied(images)
            return taps.take(), self.teacher(images, head=False)[1]

        self.loss.fit_adapters(map(maps, batches))
        taps.remove()
        if dist.is_initialized():  # processes round in their own way
            for parameter in self.loss.adapters.parameters():
                dist.broadcast(parameter.data, 0)
        average.distill_adapters.load_state_dict(self.loss.adapters.state_dict())

    def release(self, *networks: nn.Module) -> None:
        """Take the adapters from networks."""
        for network in networks:
            if hasattr(network, "distill_adapters"):
                del network.distill_adapters

    def detach(self, student: nn.Module) -> None:
        """Make the student bare, but for its adapters."""
        super().detach(student)
        if self.taps is not None:
            self.taps.remove()
            self.taps = None

    def _place(self, average: nn.Module) -> None:
        """Bring the teacher to where it answers, with the levels that the losses compare."""
        self.teacher.follow(average)
        self.teacher.levels = self.plan.teacher_levels
        self.teacher.to(self.device)

    def _criterion(self, student: nn.Module, average: nn.Module) -> DistillationCriterion:
        """Read the student's feature maps, and return a criterion that asks the teacher."""
        self.taps = FeatureTaps(student, self.plan.student_levels)
        self._place(average)
        return self.criterion(self._own, self.taps)

    def criterion(self, own: Any, taps: FeatureTaps) -> DistillationCriterion:
        """Return a criterion around upstream's, for the student whose maps are read."""
        args = self.plan.args
        return DistillationCriterion(
            own=own,
            beta=args.distill_beta,
            alpha=args.distill_alpha * self.share,
            taps=taps,
            loss=self.loss,
            compare=partial(self.task.compare, self.plan),
            shared=self.task.shared,
            scale=self.task.scale,
            labelled=self.plan.labelled,
            balance=self.balance,
            static=bool(self.plan.training.compile) and dist.is_initialized(),
        )

    def begin_training(self, dataset: Dataset, batch: int, precision: AbstractContextManager, amp: bool) -> None:
        """Bring the teacher to the training's precision, and open the cache of answers."""
        images = random_images(2, self.plan.data["channels"], self.plan.imgsz, self.plan.imgsz)
        self._precision = precision
        with precision:
            self.teacher.cast(images.to(self.device))
        if self.plan.args.teacher_cache:
            self.cached = open_cache(self.task, self.plan, dataset, batch, self.device, precision, amp)

    def begin_epoch(self, student: nn.Module, epoch: int, epochs: int, batch: int) -> None:
        """Put the weight and the temperature of the epoch in force, and compile the teacher if that is still to do."""
        args = self.plan.args
        self._schedule(epoch, epochs)
        student.criterion.alpha = args.distill_alpha * self.share
        if self.cached is not None and not self._let_go and self.cached.cache.complete:
            self.teacher.release()
            return_memory()
            self._let_go = True
        elif args.teacher_compile:
            with self._precision:
                self.teacher.compile(
                    args.teacher_compile, (batch, self.plan.data["channels"], self.plan.imgsz, self.plan.imgsz)
                )

    def _schedule(self, epoch: int, epochs: int) -> None:
        """Set what depends on the epoch."""
        args = self.plan.args
        schedule = args.distill_schedule
        self.share = scheduled_share(epoch, epochs, schedule, args.distill_warmup, args.close_distill)
        self.silent = self.share == 0 or epoch < self.plan.start
        self.loss.temperature = scheduled_temperature(epoch, epochs, args.temperature, args.temperature_end, schedule)
        if self.cached is None:  # which keeps the average that it was told first
            self.teacher.temperature = self.loss.temperature

    def ask(self, lesson: Lesson, batch: dict[str, Any]) -> Lesson:
        """Let a batch carry the teacher's answer, unless the teacher is silent or training has not begun."""
        if self.taps is not None and not self.silent:
            lesson.answer, self._last_batch = self.answer_to(batch), batch
        return lesson

    def answer_to(self, batch: dict[str, Any]) -> Callable[[], Answer]:
        """Return what gives the teacher's answer to a batch, kept from before if it is."""
        images = batch["img"]
        if self.cached is not None:
            ask = partial(self.cached, images, batch["index"], batch["view"])
        else:
            ask = partial(self.teacher, images, head=self.plan.args.uses_answer)
        return self.overlap(ask, images)

    def cause(self, name: str) -> bool:
        """Tell whether it was the teacher's answer that made a loss NaN or infinite."""
        if self._last_batch is None or name not in self.weights:
            return False
        with self._precision:  # asked again, as its answer was not kept
            said = [x for x in tree_leaves(self.answer_to(self._last_batch)()) if isinstance(x, Tensor)]
        return not all(x.isfinite().all() for x in said)

    def clear(self) -> None:
        """Let go of a step that failed, its graph and its answer."""
        self._last_batch = None
        if self.taps is not None:
            self.taps.clear()

    def metrics(self) -> dict[str, float]:
        """Return the weight, the temperature and the factors that were in force in the epoch."""
        alpha = 0.0 if self.silent else self.plan.args.distill_alpha * self.share
        factors = self.balance.factors if self.balance else {}
        return {
            "distill/alpha": alpha,
            "distill/temperature": self.loss.temperature,
            **({f"distill/{k}_factor": float(factors.get(k, 0.0)) for k in self.weights} if self.balance else {}),
        }

    def judge(self, dataset: Dataset, batch: int, student: nn.Module | None) -> None:
        """Measure the teacher on validation images, and a student that has been trained before, and log it."""
        if self.plan.args.teacher_check:
            tell(self.task.judge(self.plan, dataset, batch, student))

    def step(self, student: nn.Module) -> nn.Module:
        """Return a training step as a network of images, to measure what it takes in memory."""
        self._place(copy.deepcopy(student).eval() if self.teacher.follows_student else student)
        return TrainingStep(student, self.loss, self)

    def end(self, average: nn.Module, epoch: int, epochs: int, state: Mapping[str, Any] | None) -> None:
        """Be as the run ended, also where only its end is left."""
        if self.cached is not None:
            log([self.cached.report])
        self._place(average)
        self.teacher.compile(False, ())  # what is asked from now on comes in another precision, or another number
        self._schedule(epoch, epochs)
        if state is not None:
            self.load_state_dict(state)

    def measure_pull(self, student: nn.Module, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
        """Return the share of each weighted loss in the gradient where all of them meet, over some batches.

        Args:
            student (nn.Module): The student, which stays as it is.
            batches (Iterable[dict[str, Any]]): Prepared batches, each with its Lesson.
        """
        own = self._own or student.init_criterion()  # upstream's, which has counted the epochs
        student, loss = copy.deepcopy((student, self.loss))
        taps = FeatureTaps(student.train(), self.plan.student_levels)
        norms: Counter[str] = Counter()
        for batch in batches:
            measured = GradientBalance()
            criterion = replace(self.criterion(own, taps), loss=loss, balance=measured)
            batch[LESSON].answer = self.answer_to(batch)
            criterion(student(batch["img"]), batch)
            norms.update({k: float(norm) for k, norm in measured.norms.items()})
        taps.remove()
        args, factors = self.plan.args, self.balance.factors if self.balance else None
        pull = weigh(norms, loss.weights, args.distill_alpha, args.distill_beta, factors)
        pull = {k: float(value) for k, value in pull.items()}
        total = sum(pull.values())
        return {k: value / total for k, value in pull.items()} if total else {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {"balance": self.balance.state_dict()} if self.balance else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        if self.balance is not None:
            self.balance.load_state_dict(state["balance"])

    def describe(self, student: nn.Module) -> None:
        """Log both networks, the matched levels and the weights in force."""
        args, training = self.plan.args, self.plan.training
        rows = [("", "model", "parameters", "GFLOPs")]
        networks = [
            ("teacher", member.title, member.model, member.imgsz or self.plan.imgsz) for member in self.teacher.members
        ]
        for who, name, model, imgsz in [*networks, ("student", training.model, student, self.plan.imgsz)]:
            rows.append((who, without_folders(name), f"{get_num_params(model):,}", f"{get_flops(model, imgsz):.3f}"))
        lines = [f"{who:>9}  {name:<28}{parameters:>12}{gflops:>10}" for who, name, parameters, gflops in rows]
        lines += [f"{f'stride {s.stride}':>9}  student {s!s:<20} teacher {t!s}" for s, t in self.plan.levels]
        balanced = ", balanced" if args.distill_balance else ""
        losses = []
        for name, weight in self.weights.items():
            what, temperature = name.removesuffix("_loss"), self.loss.temperature_of(name)
            what += f" (temperature {temperature:g})" if temperature else ""
            losses.append(what if weight == 1 else f"{weight:g} x {what}")
        lines.append(
            f"{'loss':>9}  {args.distill_beta:g} x label + {args.distill_alpha:g} x ({' + '.join(losses)}{balanced})"
        )
        LOGGER.info("\n".join([colorstr("distillation:"), *lines]))
