# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What a task says of itself; all else about a distilled run is the same for every task."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset
from ultralytics.engine.distillation.criterion import Lesson
from ultralytics.engine.distillation.plan import Plan, Score
from ultralytics.engine.distillation.report.run import FinishedRun, ReportPart
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.distillation.files import content_of
from ultralytics.nn.distillation.overlap import Answer
from ultralytics.nn.distillation.teacher import Teacher
from ultralytics.nn.distillation.teachers import SelfTeacher, Teachers
from ultralytics.nn.tasks import guess_model_task, load_checkpoint, yaml_model_load
from ultralytics.utils.checks import check_model_file_from_stem
from ultralytics.utils.distillation import DistillationLoss

__all__ = ("DistillationTask",)


def _unreadable(file: str, e: Exception) -> str:
    """Return in words why no student can be read from a file, in which upstream failed."""
    said, found = str(e), content_of(file)
    if "YOLOv5" in said:
        return "it is of YOLOv5, whose networks this release does not have"
    if found and found.words != "a checkpoint":
        return f"it holds {found.words}"
    if isinstance(e, (KeyError, AttributeError)) or "references types" in said:
        return "it holds weights alone, or another library's network, or one that 'YOLO.save' did not write"
    if isinstance(e, ImportError):
        return f"it needs code that is not here ({' '.join(said.split()):.100})"
    fault = "damaged, cut short or no checkpoint" if os.path.getsize(file) else "empty (0 bytes)"
    return f"no network can be read from it, as it is {fault} ({type(e).__name__})"


class DistillationTask:
    """What is special about a task. It holds no state: what a run knows is in its Plan.

    Attributes:
        name (str): Upstream's name of the task.
        plain_trainer (type[BaseTrainer]): Upstream's trainer.
        teacher_class (type[Teacher]): The task's teacher.
        network_class (type[nn.Module]): Upstream's class of the student.
        score (Score): How good a network is.
        defaults (Mapping[str, Any]): Distillation arguments whose defaults are others than `DistillationArgs` has.
        answers_of (str): What its heads name classes of, "images" or "anchors".
        terms (Collection[str]): What else its heads say that is compared, of `DENSE_LOSSES`.
        views_repeat (bool): Whether an image can be augmented in the same way again, so that answers can be kept.
        ignored (Collection[str]): Training arguments that upstream's trainer takes and ignores.
        charts (Sequence[str]): The names of the charts that its report adds; without any there is no report.
        refusals (Sequence[Callable[[Plan], Exception | None]]): What cannot be, besides what no task can; asked before
            a teacher is opened.
    """

    name: ClassVar[str]
    plain_trainer: ClassVar[type[BaseTrainer]]
    teacher_class: ClassVar[type[Teacher]]
    network_class: ClassVar[type[nn.Module]]
    score: ClassVar[Score]
    defaults: ClassVar[Mapping[str, Any]] = {}
    answers_of: ClassVar[str] = "images"
    terms: ClassVar[Collection[str]] = ()
    views_repeat: ClassVar[bool] = False
    ignored: ClassVar[Collection[str]] = ()
    charts: ClassVar[Sequence[str]] = ()
    refusals: ClassVar[Sequence[Callable[[Plan], Exception | None]]] = ()

    def open_teacher(self, plan: Plan) -> Teachers | SelfTeacher:
        """Open the teacher that the arguments name, or several that answer as one."""
        if plan.args.teacher == SelfTeacher.source:
            return SelfTeacher(self.teacher_class)
        return self.join([self.teacher_class(**given) for given in plan.args.per_teacher() or [{"source": None}]], plan)

    def join(self, members: Sequence[Teacher], plan: Plan) -> Teachers:
        """Return teachers as one that answers."""
        return Teachers(members)

    def grow_heads(self, plan: Plan) -> None:
        """Give the teachers heads for the dataset's classes, still without weights, as `teacher_probe` asks.

        Raises:
            ValueError: If the task has no classes of images, or a teacher no features.
        """
        raise ValueError(
            f"'teacher_probe=True' fits a head that names images, and the task '{self.name}' has none. Leave it out."
        )

    def describe_student(self, model: str) -> dict[str, Any]:
        """Return the description of a student's network, as upstream's YAML files hold it.

        Args:
            model (str): `model` as it was given, a description or a checkpoint.

        Raises:
            FileNotFoundError: If it does not exist.
            ValueError: If it is neither, or of another task.
        """
        example = f"'model={Path(self.teacher_class.expected.example).stem}.yaml'"
        file = check_model_file_from_stem(model)
        suffix = Path(file).suffix.lower()
        if suffix not in {".pt", ".yaml", ".yml"}:
            raise ValueError(
                f"'model={model}' is neither a '.pt' checkpoint nor the '.yaml' description of a network. Give one as "
                f"the student, e.g. {example}."
            )
        try:
            network = load_checkpoint(file)[0].yaml if suffix == ".pt" else yaml_model_load(file)
        except FileNotFoundError as e:
            what = "is a link that leads nowhere" if Path(file).is_symlink() else "does not exist"
            raise FileNotFoundError(f"'model={model}' {what}. Give a student, e.g. {example}.") from e
        except Exception as e:  # of a file that may hold anything
            what = _unreadable(file, e)
            raise ValueError(f"'model={model}' cannot be trained: {what}. Give a student, e.g. {example}.") from e
        unguessed = "detect" if "RTDETRDecoder" in str(network.get("head")) else None  # which upstream does not guess
        self.check_student(f"model={model}", guess_model_task(network) or unguessed)
        return network

    def check_student(self, given: str, task: str | None) -> None:
        """Refuse a student of another task.

        Args:
            given (str): What names the student, e.g. "model=yolo11n.yaml".
            task (str, optional): Its task; None if that is not known.

        Raises:
            ValueError: If it is of another.
        """
        if task not in {None, self.name}:
            raise ValueError(
                f"'{given}' is of the task '{task}', and this trainer is for '{self.name}'. Give a model of that task, "
                f"e.g. 'model={Path(self.teacher_class.expected.example).stem}.yaml', or let 'yolo-distill' take "
                f"the trainer of the model's."
            )

    def check_dataset(self, data: dict[str, Any], training: Namespace) -> None:
        """Refuse a dataset that cannot be trained on, in words that upstream lacks."""

    def some_images(self, plan: Plan) -> Tensor | None:
        """Return some of the dataset's images as the student sees them, (B, channels, imgsz, imgsz), 0 to 1.

        None where they say no more of what a teacher's answer is than random ones, or cannot be read.
        """
        return None

    def fit_data(self, plan: Plan) -> tuple[Plan, list[str]]:
        """Return the plan with the classes that the student learns, and what is notable of them, in sentences."""
        return plan, []

    def align(self, plan: Plan, names: Sequence[str], student: nn.Module) -> tuple[Plan, list[str]]:
        """Bring what the teacher says to the dataset's classes and to what the student says.

        Args:
            plan (Plan): The run's, all but its levels settled.
            names (Sequence[str]): The dataset's classes by index.
            student (nn.Module): A network of the student's architecture.

        Returns:
            plan (Plan): The plan, losses switched off that were not asked for and have nothing to compare.
            notes (list[str]): What is notable, in sentences.

        Raises:
            ValueError: If a loss that was asked for has nothing to compare.
        """
        uses = plan.args.uses_answer or plan.args.teacher_probe
        return plan, plan.teacher.align(names) if uses else []

    def wrap_dataset(self, dataset: Dataset, plan: Plan, folder: str, training: bool) -> Dataset:
        """Return a dataset as a run needs it.

        Args:
            dataset (Dataset): Upstream's, of a folder.
            plan (Plan): The run's.
            folder (str): The folder.
            training (bool): Whether it is trained on.
        """
        return dataset

    def identify(self, plan: Plan, dataset: Dataset) -> tuple[Path, dict[str, Any]] | None:
        """Return the folder of a dataset with views that repeat, and what tells its images and views from others.

        None of a dataset whose images are no files, of which nothing would tell that they have changed.
        """
        raise NotImplementedError

    def prepare(self, plan: Plan, batch: dict[str, Any], loaded: dict[str, Any]) -> Lesson:
        """Begin the lesson of a batch, before the teacher is asked; may change the batch's images and labels.

        Args:
            plan (Plan): The run's.
            batch (dict[str, Any]): As upstream has prepared it, on the device.
            loaded (dict[str, Any]): As the loader gave it, on the host.
        """
        return Lesson()

    def blank_batch(self, images: Tensor, plan: Plan) -> dict[str, Any]:
        """Return a batch of images with labels of any kind, to measure what a step takes in memory."""
        raise NotImplementedError

    def compare(
        self,
        plan: Plan,
        loss: DistillationLoss,
        predictions: Any,
        features: list[Tensor],
        answer: Answer,
        batch: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Return the losses between a student's predictions in training form and the teacher's answer, unweighted.

        Args:
            plan (Plan): The run's.
            loss (DistillationLoss): The losses.
            predictions (Any): What the student's head gives in training.
            features (list[Tensor]): Its maps, one (B, c, h, w) per level.
            answer (Answer): What the teacher's `read` gives, and its maps.
            batch (dict[str, Any]): With its Lesson.
        """
        raise NotImplementedError

    def build_loss(self, plan: Plan) -> DistillationLoss:
        """Return the losses of a run."""
        return DistillationLoss(**self.loss_settings(plan))

    def loss_settings(self, plan: Plan) -> dict[str, Any]:
        """Return the arguments of `DistillationLoss`."""
        same = ("temperature", "response_method", "feature_method", "feature_weight", "attention_weight")
        switches = ("response_distill", "feature_distill", "attention_distill")
        return {
            "student_channels": [level.channels for level in plan.student_levels],
            "teacher_channels": [level.channels for level in plan.teacher_levels],
            **{name: getattr(plan.args, name) for name in (*same, *switches)},
            "balanced": plan.args.distill_balance is not None,
            "classify": plan.teacher.head(plan.teacher_levels[-1]) if plan.levels else None,
        }

    def shared(self, predictions: Any) -> list[Tensor]:
        """Return the tensors of training predictions that all losses come from, the first of the network first."""
        return tree_leaves(predictions)

    def scale(self, batch: dict[str, Any]) -> int:
        """Return what the losses from the teacher are multiplied by, as upstream's own is: 1, or the batch's size."""
        return 1

    def judge(
        self, plan: Plan, dataset: Dataset, batch: int, student: nn.Module | None = None
    ) -> list[tuple[bool, str]]:
        """Measure the teacher on validation images, as one that has nothing to teach is to be known beforehand.

        Args:
            plan (Plan): The run's.
            dataset (Dataset): Validation images.
            batch (int): Images at a time.
            student (nn.Module, optional): In eval mode, if it has been trained before: it may have nothing to learn.

        Returns:
            (list[tuple[bool, str]]): Whether it is a warning, and a sentence.
        """
        return []

    def surpassed(self, student: float, teacher: float) -> list[tuple[bool, str]]:
        """Return a warning, as of `judge`, if a student is as good as its teacher before it has learned from it."""
        if student < teacher:
            return []
        said = (
            f"The student reaches {student:.1%} {self.score.words} on these images already, and its teacher "
            f"{teacher:.1%}: what it would learn may make it worse. Give a better teacher, or train without one."
        )
        return [(True, said)]

    def report(self, run: FinishedRun) -> ReportPart:
        """Return what the task adds to the report of a run; asked of a task that has charts."""
        raise NotImplementedError

    def evaluate(self, metrics: Any) -> dict[str, float]:
        """Return upstream's validation metrics as fractions by name, that of `score` among them."""
        return {self.score.key: metrics.results_dict[self.score.column]}
