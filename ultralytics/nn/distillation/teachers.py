# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What a run asks: teachers that answer as one, or the student's own average."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.distillation.overlap import Answer
from ultralytics.nn.distillation.sources import Source
from ultralytics.nn.distillation.taps import FeatureLevel
from ultralytics.nn.distillation.teacher import Teacher

__all__ = ("SelfTeacher", "Teachers")


class Teachers:
    """One or more teachers that a run asks as one. By itself it answers as the first; a task may join what they say.

    Attributes:
        members (list[Teacher]): The teachers.
        follows_student (bool): Whether the teacher is the student's average, which these are not.
        classes (list[int] | None): The dataset's classes that the answer stands for; None before `align`.
        known_classes (Tensor | None): The same as indices of shape (K,) and int64, if it does not know all classes.
        temperature (float): Softening temperature at which answers are joined.
        device (torch.device): Where the networks are.
    """

    follows_student = False

    def __init__(self, members: Sequence[Teacher]):
        """Join teachers, at least one."""
        self.members = list(members)
        self.classes: list[int] | None = None
        self.known_classes: Tensor | None = None
        self.temperature = 1.0
        self.device = torch.device("cpu")

    @property
    def first(self) -> Teacher:
        """The teacher that gives the features."""
        return self.members[0]

    @property
    def levels(self) -> Sequence[FeatureLevel]:
        """The feature maps to return, of the first."""
        return self.first.levels

    @levels.setter
    def levels(self, levels: Sequence[FeatureLevel]) -> None:
        self.first.levels = levels

    @property
    def source(self) -> str | list[str]:
        """The `teacher` argument as args.yaml records it."""
        sources = [member.source for member in self.members]
        return sources if len(sources) > 1 else sources[0]

    @property
    def content_hash(self) -> str | list[str]:
        """The `teacher_hash` argument as args.yaml records it."""
        hashes = [member.content_hash for member in self.members]
        return hashes if len(hashes) > 1 else hashes[0]

    def follow(self, network: nn.Module) -> None:
        """Stay as they are, whatever the student's average has become."""

    def align(self, names: Sequence[str]) -> list[str]:
        """Bring what they say to a dataset's classes, and return what is notable, in sentences for the log.

        Raises:
            ValueError: If the task compares feature maps alone.
        """
        raise ValueError(
            f"'teacher={self.source}' is compared by its feature maps alone in this task. Set 'response_distill=False'."
        )

    def vet(self, imgsz: int, channels: int, images: Tensor | None = None) -> None:
        """Check every member, see `Teacher.vet`."""
        for member in self.members:
            member.vet(imgsz, channels, images)

    def find_levels(self, imgsz: int, channels: int, student: dict[str, FeatureLevel]) -> dict[str, FeatureLevel]:
        """List the feature maps that can be read in the first, see `Teacher.find_levels`."""
        return self.first.find_levels(imgsz, channels)

    def head(self, level: FeatureLevel) -> Callable[[Tensor], Tensor] | None:
        """Return the head of the first, see `Teacher.head`."""
        return self.first.head(level)

    def to(self, device: torch.device) -> Teachers:
        """Move the networks to a device."""
        self.device = device
        for member in self.members:
            member.to(device)
        self.known_classes = None if self.known_classes is None else self.known_classes.to(device)
        return self

    def cast(self, images: Tensor) -> None:
        """Keep every member's weights in the type that autocast is in force with, see `Teacher.cast`."""
        for member in self.members:
            member.cast(images)

    def release(self) -> None:
        """Let the networks go until they are asked again, see `Teacher.release`."""
        for member in self.members:
            member.release()

    @property
    def answers_on_host(self) -> bool:
        """Whether a member takes images from the host and gives answers there, wherever it computes."""
        return any(getattr(member.model, "answers_on_host", False) for member in self.members)

    def compile(self, mode: bool | str, shape: Sequence[int]) -> None:
        """Compile every member but exported files, see `Teacher.compile`."""
        for member in self.members:
            if member.has_features:
                member.compile(mode, shape)

    def __call__(self, images: Tensor, head: bool = True) -> Answer:
        """Answer a batch of images, see `Teacher`."""
        return self.first(images, head)

    def ask(self, images: Tensor, head: bool = True) -> Answer:
        """Answer a batch of images as it can be kept, what the head says to be interpreted later."""
        return self(images, head)

    def interpret(self, kept: Any) -> Any:
        """Return what a kept output means."""
        return kept


class SelfTeacher:
    """The student's own average of weights, its EMA, as its teacher: there is nothing to open, to vet or to hash.

    Has the attributes and methods of `Teachers`.

    Attributes:
        source (str): "self", as args.yaml records it.
        members (Sequence[Teacher]): None, as there is no network of its own.
        content_hash (None): What it says changes with every step.
        follows_student (bool): Whether it is the student's average.
        answers_on_host (bool): No, as it computes where the student does.
        classes (list[int] | None): The dataset's classes that it knows, all of them; None before `align`.
        known_classes (None): Set where a teacher knows some of the classes only.
        levels (Sequence[FeatureLevel]): The feature maps to return.
        temperature (float): Without effect, as one teacher is not averaged.
    """

    source, members, content_hash, known_classes, follows_student = "self", (), None, None, True
    answers_on_host = False

    def __init__(self, teacher_class: type[Teacher]):
        """Begin without a network, see `follow`."""
        self.classes: list[int] | None = None
        self.levels: Sequence[FeatureLevel] = ()
        self.temperature = 1.0
        self._teacher_class = teacher_class
        self._teacher: Teacher | None = None

    def follow(self, network: nn.Module) -> None:
        """Answer as a network does from now on."""
        self._teacher = self._teacher_class(Source(self.source, network))

    def align(self, names: Sequence[str], chosen: Collection[int] | None = None) -> list[str]:
        """Know all classes of a dataset, of those that are not trained on as little as its student."""
        self.classes = list(range(len(names)))
        return []

    def vet(self, imgsz: int, channels: int, images: Tensor | None = None) -> None:
        """Believe the student."""

    def find_levels(self, imgsz: int, channels: int, student: dict[str, FeatureLevel]) -> dict[str, FeatureLevel]:
        """Return the student's own."""
        return student

    def head(self, level: FeatureLevel) -> None:
        """Return none, as it changes with every step."""

    def cast(self, images: Tensor) -> None:
        """Stay as it is, as its weights change with every step."""

    def compile(self, mode: bool | str, shape: Sequence[int]) -> None:
        """Stay as it is: the arguments refuse to compile it."""

    def to(self, device: torch.device) -> SelfTeacher:
        """Prepare to answer; the network is where the student is."""
        self._teacher.to(device)
        return self

    def __call__(self, images: Tensor, head: bool = True) -> Answer:
        """Answer a batch of images, see `Teacher`."""
        self._teacher.levels = self.levels
        return self._teacher(images, head)
