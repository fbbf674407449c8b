# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The Plan of a run: arguments, dataset and teacher, settled before it does anything."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from ultralytics.cfg.distillation import DistillationArgs, as_list
from ultralytics.nn.distillation.taps import FeatureLevel
from ultralytics.nn.distillation.teachers import SelfTeacher, Teachers
from ultralytics.utils import LOGGER, RANK, colorstr
from ultralytics.utils.distillation.dense import TERMS
from ultralytics.utils.distillation.registry import Choice, choose

__all__ = ("DISTILLATION_KEYS", "Plan", "Score", "log", "tell")

DISTILLATION_KEYS = frozenset(f.name for f in fields(DistillationArgs))


class Score(NamedTuple):
    """The figure that says how good a network of a task is.

    Attributes:
        key (str): Its name in files, e.g. "top1".
        column (str): Its column in results.csv, a fraction.
        words (str): What it is called in a sentence, e.g. "top-1".
        axis (str): What it is called on an axis.
    """

    key: str
    column: str
    words: str
    axis: str


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        args (DistillationArgs): The distillation arguments in force.
        given (Collection[str]): Which of them were given.
        training (Namespace): Upstream's training arguments; upstream goes on to complete them.
        resumed (bool): Whether the run was begun before.
        defaults (Mapping[str, Any]): Distillation arguments whose defaults are others for the task.
        trainer_module (str): Name of the module of the trainer's class, which every process of a run imports.
        teacher (Teachers | SelfTeacher): The teacher.
        data (dict[str, Any]): Upstream's description of the dataset, with the classes that the student learns.
        imgsz (int): Side of the images in pixels, as upstream will round it.
        labelled (bool): Whether the labels mean anything.
        levels (tuple[tuple[FeatureLevel, FeatureLevel], ...]): The matched (student, teacher) feature maps.
        heads (tuple[Any, ...]): The (student, teacher) heads as the task describes them, if it does.
    """

    args: DistillationArgs
    given: Collection[str]
    training: Namespace
    resumed: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    trainer_module: str = ""
    teacher: Teachers | SelfTeacher | None = None
    data: dict[str, Any] = field(default_factory=dict)
    imgsz: int = 0
    labelled: bool = True
    levels: tuple[tuple[FeatureLevel, FeatureLevel], ...] = ()
    heads: tuple[Any, ...] = ()

    def changes(self, name: str) -> bool:
        """Tell whether a distillation argument was given another value than it has by default."""
        default = self.defaults.get(name, getattr(DistillationArgs, name))
        return name in self.given and getattr(self.args, name) != default

    @property
    def teaches(self) -> bool:
        """Whether the teacher has any weight."""
        return self.args.distill_alpha > 0

    @property
    def start(self) -> int:
        """The epoch, counted from 0, from which the teacher teaches."""
        return self.args.self_distill_start if self.args.teacher == SelfTeacher.source else 0

    @property
    def methods(self) -> dict[str, list[Choice]]:
        """The response and the feature methods that are on, by the argument that chose them."""
        on = {"response_method": self.args.response_distill, "feature_method": self.args.uses_feature_method}
        return {name: choose(name, getattr(self.args, name)) if is_on else [] for name, is_on in on.items()}

    @property
    def uses_temperature(self) -> bool:
        """Whether a loss on what the heads say softens by the training's `temperature`."""
        chosen = self.methods["response_method"]
        return any(c.temperature(0.0) == 0 for c in chosen) or any(TERMS[name].softens for name in self.args.terms)

    @property
    def cache_folder(self) -> Path:
        """Where the teacher's answers are kept on disk."""
        return Path(as_list(self.data["train"])[0]).parent / "teacher_cache"

    @property
    def student_levels(self) -> list[FeatureLevel]:
        """The student's feature maps that are compared."""
        return [student for student, _ in self.levels]

    @property
    def teacher_levels(self) -> list[FeatureLevel]:
        """The teacher's feature maps that are compared."""
        return [teacher for _, teacher in self.levels]


def tell(found: Collection[tuple[bool, str]]) -> None:
    """Log what was found, each time whether it is a warning, and a sentence."""
    for is_warning, sentence in found:
        LOGGER.warning(sentence) if is_warning else log([sentence])


def log(notes: Collection[str]) -> None:
    """Log sentences about the distillation, in the first of several processes."""
    if RANK in {-1, 0}:
        for note in notes:
            LOGGER.info(f"{colorstr('distillation:')} {note}")
