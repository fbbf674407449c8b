# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What is special about distilling a classifier."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from ultralytics.cfg.distillation import as_list
from ultralytics.data import ClassificationDataset
from ultralytics.data.augment import classify_transforms
from ultralytics.data.distillation.views import RepeatableViews
from ultralytics.data.distillation.wrapped import ReadableDataset
from ultralytics.engine.distillation.criterion import LESSON, Lesson
from ultralytics.engine.distillation.plan import Plan, log
from ultralytics.engine.distillation.report.run import FinishedRun, ReportPart
from ultralytics.engine.distillation.task import DistillationTask
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_report import CHARTS, TOP1, report_classification
from ultralytics.nn.distillation.class_names import match_classes, read_names, some
from ultralytics.nn.distillation.classifier import ClassificationTeacher, TeacherEnsemble
from ultralytics.nn.distillation.overlap import Answer
from ultralytics.nn.tasks import ClassificationModel
from ultralytics.utils import LOGGER, YAML
from ultralytics.utils.distillation import DistillationLoss
from ultralytics.utils.distillation.metrics import normalized_entropy
from ultralytics.utils.distillation.registry import choose
from ultralytics.utils.patches import imread

__all__ = ("ClassificationTask",)

CHECKED_IMAGES = 512
SEEN_IMAGES = 8
CLEARLY = 0.05  # of the images
LEAST_ENTROPY, MOST_ENTROPY = 0.001, 0.99  # of a softened answer, of that of one that is the same for all classes
TOO_SOFT = (
    "says next to nothing at 'temperature={:g}': its softened answers have {:.1%} of the greatest entropy. If they are "
    "probabilities or scores and no logits, tell it with 'teacher_output'; else lower 'temperature'."
)
TOO_HARD = (
    "says little more than labels do at 'temperature={:g}': its softened answers have {:.1%} of the greatest entropy. "
    "If they are scores of another scale, e.g. from 0 to 100, give the network without what scales them; else raise "
    "'temperature'."
)
CHECK_ADVICE = "Check its classes, 'teacher_imgsz', 'teacher_mean' and 'teacher_std', or give a better one."


def _mixes_too_often(plan: Plan) -> Exception | None:
    mixup, cutmix = plan.training.mixup, plan.training.cutmix
    if mixup + cutmix <= 1:
        return None
    return ValueError(
        f"'mixup={mixup}' and 'cutmix={cutmix}' are the probabilities of a batch to be mixed one way or the other, and "
        f"must not exceed 1 together."
    )


def _mixtures_do_not_repeat(plan: Plan) -> Exception | None:
    if not (plan.args.teacher_cache and (plan.training.mixup or plan.training.cutmix)):
        return None
    return ValueError(
        "'mixup' and 'cutmix' make images that no one has seen before, so 'teacher_cache' cannot know the teacher's "
        "answers. Leave out one or the other."
    )


def _images_in(folder: Path) -> Iterator[Path]:
    """Find what torchvision takes for images in a folder and in those inside, but hidden ones."""
    for place, _, files in os.walk(folder, followlinks=True):
        shown = (file for file in files if not file.startswith("."))
        yield from (Path(place, file) for file in shown if Path(file).suffix.lower() in IMG_EXTENSIONS)


def _class_folders(folder: Path) -> Iterator[Path]:
    """Find the folders in one that hold images, each of a class."""
    return (x for x in sorted(folder.iterdir()) if x.is_dir() and next(_images_in(x), None))


def _names_beside(folder: Path) -> dict[str, str]:
    """Return class names by their indices, which name the folders where upstream has made a set of NDJSON."""
    known = folder.parent / ".ndjson.yaml"
    return {str(i): str(name) for i, name in YAML.load(known)["names"].items()} if known.is_file() else {}


def _classes_of(folder: Path) -> dict[str, str]:
    """Return class names by those of their folders."""
    names = _names_beside(folder)
    return {x.name: names.get(x.name, x.name) for x in folder.iterdir() if x.is_dir() and x.name[0] != "."}


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of images that logits (N, C) name as their labels (N,) do."""
    return (logits.argmax(1) == labels).double().mean().item()


class ClassificationTask(DistillationTask):
    """A classifier learns logits and feature maps of one classifier, or of several averaged."""

    name = "classify"
    plain_trainer = ClassificationTrainer
    teacher_class = ClassificationTeacher
    network_class = ClassificationModel
    score = TOP1
    views_repeat = True
    ignored = frozenset({"mixup", "cutmix"})  # and done here, see `prepare`
    charts = CHARTS
    refusals = (_mixes_too_often, _mixtures_do_not_repeat)

    def join(self, members: Sequence[ClassificationTeacher], plan: Plan) -> TeacherEnsemble:
        """Join teachers to one."""
        return TeacherEnsemble(members, plan.args.teacher_weights, plan.args.temperature)

    def grow_heads(self, plan: Plan) -> None:
        """Give each teacher that is not fitted to the dataset's classes yet a head for them.

        Raises:
            ValueError: If fewer than two classes have images, or a teacher has no features.
        """
        names, folder = read_names(plan.data["names"]), Path(plan.data["train"])
        if len([*islice(_class_folders(folder), 2)]) < 2 or len(names) < 2:
            raise ValueError(
                f"'teacher_probe=True' fits a head on labels, but '{folder}' has images of fewer than two classes. Put "
                f"them into a folder for each class, or leave it out."
            )
        for member in plan.teacher.members:
            if member.backbone and (plan.resumed or member.names == names):
                member.model = member.fuse(member.model)
                if not plan.resumed:
                    log([f"'teacher={member.source}' has a head for these classes already, which is kept as it is."])
            else:
                member.grow_head(names, plan.imgsz, plan.data["channels"])

    def check_dataset(self, data: dict[str, Any], training: Namespace) -> None:
        """Refuse a dataset without class folders, or without images to validate on; leave hidden folders out.

        Raises:
            FileNotFoundError: If these are missing.
        """
        names = read_names(data["names"]) if data["names"] else []
        if hidden := [name for name in names if name.startswith(".")]:
            LOGGER.warning(
                f"'data={training.data}' has hidden folders among its classes, which are left out: {some(hidden)}."
            )
            data["names"] = dict(enumerate(name for name in names if name not in hidden))
            data["nc"] = len(data["names"])
        if not data["names"]:
            raise FileNotFoundError(
                f"'data={training.data}' has no class folders in 'train'. Put the images of each class in a folder of "
                f"its name; without labels, 'distill_beta=0', all of them in one, e.g. 'train/all'."
            )
        if data.get(training.split) is None:
            raise FileNotFoundError(
                f"'data={training.data}' has no folder '{training.split}' to validate on. Move some of its training "
                f"images there, in folders of the same names."
            )

    def some_images(self, plan: Plan) -> Tensor | None:
        """Return the first training images of some classes: these tell logits from probabilities and other scores."""
        folders = islice(_class_folders(Path(plan.data["train"])), SEEN_IMAGES)
        files = filter(None, chain.from_iterable(zip_longest(*map(_images_in, folders))))
        read = (imread(str(file)) for file in islice(files, 8 * SEEN_IMAGES))
        read = (image for image in read if image is not None)  # one may be damaged, and training will name it
        transform = classify_transforms(plan.imgsz)
        images = [transform(Image.fromarray(image[..., ::-1].copy())) for image in islice(read, SEEN_IMAGES)]
        return torch.stack(images) if len(images) > 1 else None

    def fit_data(self, plan: Plan) -> tuple[Plan, list[str]]:
        """Give the student the teacher's classes where the training folders are no classes that it knows.

        Raises:
            ValueError: If a loss needs labels, or validation has other classes than the teacher.
        """
        if plan.args.distill_beta or plan.args.teacher_probe or not plan.teacher.members:
            return plan, []
        teacher, data, split = plan.teacher.first, plan.data, Path(plan.data[plan.training.split])
        folders, measured = read_names(data["names"]), set(_classes_of(split).values())
        if teacher.names is None or (
            len(folders) > 1 and measured <= set(folders) and len(match_classes(teacher.names, folders)) > 1
        ):
            return plan, []
        method = plan.args.response_method
        if any(choice.needs_labels for choice in choose("response_method", method)):
            raise ValueError(
                f"'data={plan.training.data}' has no labels that 'teacher={teacher.source}' knows, and "
                f"'response_method={method}' needs them. Set e.g. 'response_method=kl'."
            )
        if unknown := sorted(measured - set(teacher.names)):
            folders = f"its folders like the teacher's classes, of which there are {len(teacher.names)}, e.g. "
            mend = "" if _names_beside(split) else f"{folders}'{teacher.names[0]}', or "
            raise ValueError(
                f"Without labels the student learns the teacher's classes, but '{split}' has folders that are none of "
                f"them: {unknown[:5]}. Name {mend}the teacher's classes like those, with 'teacher_names'."
            )
        count = len(teacher.names)
        plan = replace(plan, labelled=False, data={**data, "names": dict(enumerate(teacher.names)), "nc": count})
        return plan, [f"The training images count as unlabelled: the student learns the teacher's {count} classes."]

    def wrap_dataset(self, dataset: Dataset, plan: Plan, folder: str, training: bool) -> Dataset:
        """Return a dataset that names images that cannot be read, with the plan's classes and repeating views."""
        if isinstance(dataset, ClassificationDataset):  # a subclass may build another kind
            hidden = any(name.startswith(".") for name in dataset.base.classes)
            if hidden or not plan.labelled:
                places, names = {name: i for i, name in plan.data["names"].items()}, _classes_of(Path(folder))
                found = [(Path(file).relative_to(folder).parts[0], file, *rest) for file, _, *rest in dataset.samples]
                dataset.samples = [
                    [file, places.get(names[name], 0), *rest] for name, file, *rest in found if not name.startswith(".")
                ]
            dataset = ReadableDataset(dataset)
        return RepeatableViews(dataset, plan.args.teacher_views) if training and plan.args.teacher_cache else dataset

    def identify(self, plan: Plan, dataset: Dataset) -> tuple[Path, dict[str, Any]] | None:
        """Return the folder of a dataset, its files as they are now, and how they are augmented."""
        root = Path(as_list(plan.data["train"])[0])
        named = [file for file, *_ in dataset.samples]
        if not all(isinstance(file, (str, os.PathLike)) and os.path.isfile(file) for file in named):
            return None
        files = [(os.path.relpath(file, root), os.stat(file)) for file in named]
        images = [(name, x.st_size, x.st_mtime_ns, x.st_ctime_ns) for name, x in files]
        return root, {"images": images, "transforms": str(dataset.torch_transforms)}

    def prepare(self, plan: Plan, batch: dict[str, Any], loaded: dict[str, Any]) -> Lesson:
        """Mix the images of a batch, and find those that show a class that the teacher knows."""
        mixed = self._mix(plan, batch)
        lesson = Lesson({} if mixed is None else {"cls": mixed})
        if plan.teacher.known_classes is not None:
            known = torch.isin(loaded["cls"], torch.tensor(plan.teacher.classes))
            if mixed is not None:
                known &= known.roll(1)  # each is mixed with the one before it
            # Found on the host: asking a CUDA tensor which they are would synchronise
            lesson.known = known.nonzero()[:, 0].to(batch["img"].device, non_blocking=True)
        return lesson

    def _mix(self, plan: Plan, batch: dict[str, Any]) -> Tensor | None:
        """Mix the images of a batch in pairs, as often as `mixup` and `cutmix` say; upstream's classifiers ignore them.

        Teacher and student see the same mixed images, as in Beyer et al. 2022.

        Returns:
            (Tensor | None): The labels as shares of classes, (B, C), if they were mixed.
        """
        mixup, cutmix, classes = plan.training.mixup, plan.training.cutmix, plan.data["nc"]
        if not (mixup or cutmix) or classes < 2:
            return None
        drawn = torch.rand(1).item()
        if drawn >= mixup + cutmix:
            return None
        mix = v2.MixUp if drawn < mixup else v2.CutMix
        batch["img"], mixed = mix(num_classes=classes)(batch["img"], batch["cls"])
        batch["cls"] = mixed.argmax(1)  # for what knows one class only
        return mixed

    def blank_batch(self, images: Tensor, plan: Plan) -> dict[str, Any]:
        """Return a batch whose images are all of the first class, which the teacher knows."""
        every = torch.arange(len(images), device=images.device)
        return {"img": images, "cls": 0 * every, LESSON: Lesson(known=every)}

    def compare(
        self,
        plan: Plan,
        loss: DistillationLoss,
        predictions: Tensor,
        features: list[Tensor],
        answer: Answer,
        batch: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Return the losses between logits of shape (B, C), on the images and the classes that the teacher knows."""
        (logits, maps), labels, classes = answer, batch["cls"], plan.teacher.known_classes
        if classes is not None:
            known = batch[LESSON].known
            predictions, logits = predictions[known][:, classes], logits[known]
            labels = torch.searchsorted(classes, labels[known])
        return loss.losses(predictions, logits, features, maps, labels)

    def judge(
        self, plan: Plan, dataset: Dataset, batch: int, student: nn.Module | None = None
    ) -> list[tuple[bool, str]]:
        """Measure each teacher on validation images, as one that is not better than guessing has nothing to teach."""
        if plan.teacher.classes is None or not plan.teacher.members:
            return []
        others = [] if student is None else [lambda images: student(images)[1][:, plan.teacher.classes].detach()]
        logits, labels = plan.teacher.judge(dataset, CHECKED_IMAGES, batch, *others)
        logits, own = logits[: len(plan.teacher.members)], logits[len(plan.teacher.members) :]
        count = len(labels)
        if not count:
            return []
        most, found = labels.bincount().max().item(), []
        for member, answer in zip(plan.teacher.members, logits, strict=True):
            right = (answer.argmax(1) == labels).sum().item()
            said = f"'teacher={member.source}' names {right / count:.1%} of {count} validation images correctly"
            if len(answer) > 1 and torch.allclose(answer, answer[:1].expand_as(answer), rtol=1e-4, atol=1e-5):
                fault = ", as it answers every image alike"
            elif right <= most < count:
                fault = f", and always naming the most frequent class {most / count:.1%}"
            else:
                found.append((False, f"{said}."))
                if not plan.uses_temperature:
                    continue
                spread = normalized_entropy(answer, plan.args.temperature)
                for fits, words in ((spread > MOST_ENTROPY, TOO_SOFT), (spread < LEAST_ENTROPY, TOO_HARD)):
                    if fits:
                        words = words.format(plan.args.temperature, spread)
                        found.append((True, f"'teacher={member.source}' {words}"))
                continue
            found.append((True, f"{said}{fault}: it has nothing to teach. {CHECK_ADVICE}"))
        found += self._sizes(plan, dataset, batch, [_accuracy(x, labels) for x in logits])
        if not own or any(is_warning for is_warning, _ in found):
            return found
        reached = [_accuracy(x, labels) for x in (*own, plan.teacher.average(logits))]
        return found + self.surpassed(*reached)

    def _sizes(self, plan: Plan, dataset: Dataset, batch: int, reached: Sequence[float]) -> list[tuple[bool, str]]:
        """Warn of teachers that know more at the size that they were trained at than at the one that they are given."""
        others = {
            i: member
            for i, member in enumerate(plan.teacher.members)
            if member.imgsz is None and not member.backbone and member.trained_imgsz not in {None, plan.imgsz}
        }
        if not others:
            return []
        for member in others.values():
            member.imgsz = member.trained_imgsz
        try:
            logits, labels = plan.teacher.judge(dataset, CHECKED_IMAGES, batch)
        finally:
            for member in others.values():
                member.imgsz = None
        return [
            (
                True,
                f"'teacher={member.source}' names {reached[i]:.1%} correctly at the student's {plan.imgsz} pixels, and "
                f"{better:.1%} at {member.trained_imgsz}, which it was trained at. Set "
                f"'teacher_imgsz={member.trained_imgsz}'.",
            )
            for i, member in others.items()
            if (better := _accuracy(logits[i], labels)) > reached[i] + CLEARLY
        ]

    def report(self, run: FinishedRun) -> ReportPart:
        """Return accuracy by class, confusions, calibration, and images with attention."""
        return report_classification(self, run)

    def evaluate(self, metrics: Any) -> dict[str, float]:
        """Return top-1 and top-5 accuracy as fractions."""
        return {"top1": metrics.top1, "top5": metrics.top5}
