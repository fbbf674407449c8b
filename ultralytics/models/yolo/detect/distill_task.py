# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What is special about distilling a detector, and what tasks that are built on detection share with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from ultralytics.cfg.distillation import as_list
from ultralytics.data.distillation.views import RepeatableViews
from ultralytics.data.distillation.wrapped import spaced
from ultralytics.engine.distillation.criterion import LESSON, Lesson
from ultralytics.engine.distillation.plan import Plan, Score
from ultralytics.engine.distillation.report.run import FinishedRun, ReportPart
from ultralytics.engine.distillation.task import DistillationTask
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.models.yolo.detect.distill_report import CHARTS, report_detection
from ultralytics.models.yolo.detect.distill_validation import Validation, validate
from ultralytics.nn.distillation.class_names import read_names, some
from ultralytics.nn.distillation.dense import DenseHead, DenseTeacher, DenseTeachers, maps_of
from ultralytics.nn.distillation.overlap import Answer
from ultralytics.nn.distillation.sources import Expected
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.distillation.dense import DenseDistillationLoss
from ultralytics.utils.ops import xyxy2xywh

__all__ = ("DetectionTask", "DetectionTeacher")

CHECKED_IMAGES = 128
JOINING = ("mosaic", "mixup", "cutmix", "copy_paste", "multi_scale", "rect")  # what one view is not repeated with
AUGMENTING = (
    *("hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective", "flipud", "fliplr", "bgr"),
    *("augmentations", "imgsz", "fraction", "classes", "single_cls"),
)
LEAST_MAP = 0.01  # below it a teacher has found nothing
OBJECTS_AT_ONCE = 64  # each takes memory for every anchor


def _several_teachers(plan: Plan) -> Exception | None:
    if len(plan.args.teachers) < 2:
        return None
    return ValueError(
        f"'teacher={plan.args.teachers}' names several teachers, but only classifiers' answers can be averaged. Give "
        f"one."
    )


def _views_do_not_repeat(plan: Plan) -> Exception | None:
    given = [name for name in JOINING if getattr(plan.training, name)]
    if not (plan.args.teacher_cache and given):
        return None
    mend = " ".join(f"{name}={False if name == 'rect' else 0.0}" for name in given)
    return ValueError(
        f"'teacher_cache={plan.args.teacher_cache}' keeps answers to images that are seen again, in one size. Set "
        f"'{mend}', or leave it out."
    )


class DetectionTeacher(DenseTeacher):
    """A trained detector, frozen."""

    expected = Expected("detect", DetectionModel, "yolo11l.pt")


class DetectionTask(DistillationTask):
    """A detector learns class scores, boxes and their distributions of one teacher, anchor by anchor, and its maps."""

    name = "detect"
    plain_trainer = DetectionTrainer
    teacher_class = DetectionTeacher
    network_class = DetectionModel
    validator_class: ClassVar[type[DetectionValidator]] = DetectionValidator
    metrics: ClassVar[str] = "box"  # those of upstream's that the score is one of
    score = Score("map", "metrics/mAP50-95(B)", "mAP50-95", "validation mAP50-95 (%)")
    answers_of = "anchors"
    terms = ("box", "dfl")
    defaults: ClassVar[dict[str, Any]] = {
        "response_method": "bckd",
        "feature_distill": False,
        "attention_weight": 1.0,
        "box_distill": True,
        "dfl_distill": True,
    }
    charts = CHARTS
    views_repeat = True
    refusals = (_several_teachers, _views_do_not_repeat)

    def join(self, members: Sequence[DenseTeacher], plan: Plan) -> DenseTeachers:
        """Return the teacher, its classes to be matched by name."""
        return DenseTeachers(members)

    def align(self, plan: Plan, names: Sequence[str], student: nn.Module) -> tuple[Plan, list[str]]:
        """Match classes by name and heads by what they say; what cannot be compared is switched off or refused."""
        if not plan.args.uses_answer:
            return plan, []
        chosen = plan.training.classes  # whose labels alone are read, to be made one by `single_cls`
        chosen = None if chosen is None or plan.training.single_cls else as_list(chosen)
        notes = plan.teacher.align(names, chosen)
        try:
            own = DenseHead.of(student)
        except TypeError as e:
            raise ValueError(
                f"'model={plan.training.model}' cannot be taught anchor by anchor: {e}. Give a YOLO model, e.g. "
                f"'model={Path(self.teacher_class.expected.example.replace('11l', '11n')).stem}.yaml'."
            ) from e
        teacher = own
        if not plan.teacher.follows_student:
            teacher = plan.teacher.first.dense_head
            if plan.teacher.first.imgsz == plan.imgsz:
                plan.teacher.first.imgsz = None  # or images that are not square would be made so
        plan = replace(plan, heads=(own, teacher))
        every = [name for name in ("response", *self.terms) if getattr(plan.args, f"{name}_distill")]
        nothing = self._incomparable(plan)
        reasons = dict.fromkeys(every, nothing) if nothing else self._unlike(own, teacher)
        for reason in dict.fromkeys(reasons.values()):
            switches = [f"{name}_distill" for name in every if reasons.get(name) == reason]
            if not switches:
                continue
            asked = [switch for switch in switches if switch in plan.given]
            if asked:
                raise ValueError(
                    f"'{asked[0]}=True' compares student and 'teacher={plan.teacher.source}' anchor by anchor, but "
                    f"{reason}. Leave it out, or give another teacher."
                )
            if set(switches) == {f"{name}_distill" for name in every} and not plan.args.uses_features:
                raise ValueError(
                    f"Student and 'teacher={plan.teacher.source}' have nothing to compare: {reason}, and the losses on "
                    f"feature maps are off. Switch these on, or give another teacher."
                )
            notes.append(f"{reason[0].upper()}{reason[1:]}: {_listed(switches)} switched off.")
            plan = replace(plan, args=replace(plan.args, **dict.fromkeys(switches, False)))
        return plan, notes

    def _incomparable(self, plan: Plan) -> str | None:
        """Return why nothing that the two heads say of an anchor can be compared, if it cannot."""
        own, teacher = plan.heads
        if teacher is None:
            kind = type(plan.teacher.first.model.model[-1]).__name__
            return f"the teacher's head of type {kind} says nothing of anchors that could be compared"
        if not plan.teacher.classes:
            names = read_names(plan.data["names"])
            if plan.training.classes is not None:
                return f"the teacher knows none of the dataset's classes with 'classes={plan.training.classes}'"
            return f"the teacher knows none of the dataset's {len(names)} classes {some(names)}"
        if own.strides != teacher.strides:
            return f"the student's anchors have strides {list(own.strides)}, and the teacher's {list(teacher.strides)}"
        shared = set(own.branches) & set(teacher.branches)
        if not shared:
            return (
                f"the student's head has the branches {list(own.branches)}, and the teacher's {list(teacher.branches)}"
            )
        if shared == {"one2one"}:
            return (
                "the teacher's end-to-end head was fused, and the branch that is left teaches no more than the "
                "student's head"
            )
        side = None if plan.teacher.follows_student else plan.teacher.first.imgsz
        if side:
            return f"the teacher sees images of {side} pixels, and the student of {plan.imgsz}"
        return None

    def _unlike(self, own: DenseHead, teacher: DenseHead) -> dict[str, str]:
        """Return by loss why what the two heads say cannot be compared, where it cannot."""
        if own.bins == teacher.bins > 1:
            return {}
        sizes = f"'reg_max' is {own.bins} in the student's head and {teacher.bins} in the teacher's"
        return {"dfl": f"{sizes}, so there are no two distributions of one kind"}

    def wrap_dataset(self, dataset: Dataset, plan: Plan, folder: str, training: bool) -> Dataset:
        """Return a dataset, with repeating views if answers to them are kept."""
        return RepeatableViews(dataset, plan.args.teacher_views) if training and plan.args.teacher_cache else dataset

    def identify(self, plan: Plan, dataset: Dataset) -> tuple[Path, dict[str, Any]]:
        """Return the folder that a dataset's images have in common, its files as they are now, and the augmentation."""
        files = [(str(file), os.stat(file)) for file in dataset.im_files]
        images = [(name, x.st_size, x.st_mtime_ns, x.st_ctime_ns) for name, x in files]
        augmented = {name: str(getattr(plan.training, name, None)) for name in AUGMENTING}
        with suppress(PackageNotFoundError):  # which upstream uses where it is
            augmented["albumentations"] = version("albumentations")
        if augmented["augmentations"] != "None":  # may depend on what is in an image
            augmented["labels"] = [os.stat(file).st_mtime_ns for file in dataset.label_files if os.path.exists(file)]
        return Path(os.path.commonpath([name for name, _ in files])), {"images": images, "augmented": augmented}

    def build_loss(self, plan: Plan) -> DenseDistillationLoss:
        """Return the losses of a run."""
        return DenseDistillationLoss(terms=plan.args.terms, **self.loss_settings(plan))

    def prepare(self, plan: Plan, batch: dict[str, Any], loaded: dict[str, Any]) -> Lesson:
        """Find the objects of classes that the teacher does not know."""
        if plan.teacher.known_classes is None:
            return Lesson()
        unknown = torch.isin(loaded["cls"].flatten().long(), torch.tensor(plan.teacher.classes), invert=True)
        # Found on the host: asking a CUDA tensor which they are would synchronise
        return Lesson(unknown=unknown.nonzero()[:, 0].to(batch["img"].device, non_blocking=True))

    def shared(self, predictions: Any) -> list[Tensor]:
        """Return the maps that the head is given: no part of what it says do all losses come from."""
        return maps_of(predictions)

    def compare(
        self,
        plan: Plan,
        loss: DenseDistillationLoss,
        predictions: Any,
        features: list[Tensor],
        answer: Answer,
        batch: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Return the losses between what two heads say of the same anchors, branch by branch."""
        said, maps = answer
        if not plan.args.uses_answer:
            return loss.losses({}, {}, features, maps)
        own, teacher = plan.heads
        branches = [branch for branch in teacher.branches if branch in own.branches]
        student, unknown = own.read(predictions, branches), None
        if (classes := plan.teacher.known_classes) is not None:
            student = {k: {**x, "scores": x["scores"].index_select(1, classes)} for k, x in student.items()}
            unknown = _on_objects(own.points(predictions), batch[LESSON].unknown, batch)
        return loss.losses(student, {branch: said[branch] for branch in branches}, features, maps, unknown)

    def scale(self, batch: dict[str, Any]) -> int:
        """Return the batch's size, by which upstream multiplies its own loss."""
        return len(batch["img"])

    def blank_batch(self, images: Tensor, plan: Plan) -> dict[str, Any]:
        """Return a batch whose images show one object each."""
        count = len(images)
        known = plan.teacher.classes[0] if plan.teacher.classes else 0
        unknown = count if plan.teacher.known_classes is not None else 0  # they take memory where there may be some
        return {
            "img": images,
            "batch_idx": torch.arange(count, device=images.device, dtype=torch.float32),
            "cls": images.new_full((count, 1), known),
            "bboxes": images.new_tensor([[0.5, 0.5, 0.5, 0.5]]).repeat(count, 1),
            LESSON: Lesson(unknown=torch.arange(unknown, device=images.device)),
        }

    def judge(
        self, plan: Plan, dataset: Dataset, batch: int, student: nn.Module | None = None
    ) -> list[tuple[bool, str]]:
        """Measure the teacher on validation images by upstream's own metrics, over the classes that it knows."""
        teacher = plan.teacher
        if not teacher.members:
            return []
        if reason := self._unmeasurable(plan):
            return [(False, f"'teacher={teacher.source}' is not measured, as {reason}.")]
        networks = {"teacher": self.validation(plan, teacher.device, self.teacher_answer(plan))}
        if student is not None:
            networks["student"] = self.validation(plan, teacher.device, student, getattr(student, "end2end", False))
        indices = spaced(dataset, CHECKED_IMAGES)
        for _ in validate(networks, dataset, indices, batch):
            pass
        precision = [network.precision(teacher.classes).values() for network in networks.values()]
        if not precision[0]:
            return [(False, f"'teacher={teacher.source}' is not measured, as no validation image shows what it knows.")]
        reached, *own = (float(np.mean([mean for mean, _ in values])) for values in precision)
        said = (
            f"'teacher={teacher.source}' reaches {reached:.1%} {self.score.words} on {len(indices)} validation images"
        )
        if reached >= LEAST_MAP:
            return [(False, f"{said}."), *(warning for x in own for warning in self.surpassed(x, reached))]
        advice = "Check its classes and the size of its images, or give a better one."
        return [(True, f"{said}: it has nothing to teach. {advice}")]

    def report(self, run: FinishedRun) -> ReportPart:
        """Return precision by class, and images with what the networks find in them."""
        return report_detection(
            self, run, self.teacher_answer(run.plan), partial(self.validation, run.plan, run.device)
        )

    def validation(self, plan: Plan, device: torch.device, answer: Callable, end2end: bool = False) -> Validation:
        """Return upstream's validation of a network, see `Validation`."""
        return Validation(self.validator_class, self.metrics, plan, device, answer, end2end)

    def teacher_answer(self, plan: Plan) -> Callable[[Tensor], Any] | None:
        """Return what gives the teacher's answer as upstream's validators take it, None if it cannot be measured.

        Of an end-to-end head that is the branch with many anchors for an object, as it teaches the student's backbone.
        """
        teacher = plan.teacher
        if not teacher.members or self._unmeasurable(plan):
            return None
        return lambda images: self.predictions(
            next(iter(teacher(images)[0].values())), teacher.classes, plan.data["nc"]
        )

    def _unmeasurable(self, plan: Plan) -> str | None:
        """Return why a teacher cannot be measured on the dataset's labels, if it cannot."""
        if not plan.heads:
            return "its maps alone teach"
        if reason := self._incomparable(plan):
            return reason
        own, theirs = plan.heads
        return None if own.keypoints == theirs.keypoints else "its keypoints are not those of the dataset"

    def predictions(self, said: dict[str, Tensor], classes: Sequence[int], count: int) -> Any:
        """Return what a branch says as upstream's validators take it: (B, 4 + classes + others, A).

        Args:
            said (dict[str, Tensor]): See `utils.distillation.dense`.
            classes (Sequence[int]): The classes that its scores stand for.
            count (int): The number of classes of the dataset.
        """
        scores = said["scores"].float().sigmoid()
        every = scores.new_zeros(len(scores), count, scores.shape[2])
        every[:, list(classes)] = scores
        return torch.cat([xyxy2xywh(said["boxes"]).transpose(1, 2), every], 1)


def _listed(words: Sequence[str]) -> str:
    """Return arguments as a sentence names them, with its verb."""
    quoted = [f"'{word}'" for word in words]
    return f"{', '.join(quoted[:-1])} and {quoted[-1]} are" if len(quoted) > 1 else f"{quoted[0]} is"


def _on_objects(points: Tensor, chosen: Tensor, batch: dict[str, Any]) -> Tensor:
    """Return whether an anchor lies in the box of one of some objects, (B, A).

    Args:
        points (Tensor): The anchors in pixels, (A, 2).
        chosen (Tensor): Indices of the objects, (K,).
        batch (dict[str, Any]): With all objects' `batch_idx` and `bboxes`, shares of the image's size.
    """
    height, width = batch["img"].shape[2:]
    found = torch.zeros(len(batch["img"]), len(points), device=points.device)
    for piece in chosen.split(OBJECTS_AT_ONCE):
        boxes = batch["bboxes"].float().index_select(0, piece)
        x, y = points[:, 0] - boxes[:, :1] * width, points[:, 1] - boxes[:, 1:2] * height
        w, h = boxes[:, 2:3] * width / 2, boxes[:, 3:4] * height / 2
        angle = boxes[:, 4:5] if boxes.shape[1] == 5 else torch.zeros_like(boxes[:, :1])
        cos, sin = angle.cos(), angle.sin()
        inside = ((x * cos + y * sin).abs() < w) & ((y * cos - x * sin).abs() < h)
        found.index_add_(0, batch["batch_idx"].long().index_select(0, piece), inside.float())
    return found > 0
