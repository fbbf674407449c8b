# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Classifiers as teachers: one, or several that answer as one, matched to a dataset's classes by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from ultralytics.data.distillation.wrapped import spaced_batches
from ultralytics.nn.distillation.class_names import match_classes, some
from ultralytics.nn.distillation.overlap import Answer
from ultralytics.nn.distillation.probe import part_of
from ultralytics.nn.distillation.probeable import ProbeableTeacher
from ultralytics.nn.distillation.sources import CLASSIFIER
from ultralytics.nn.distillation.taps import FeatureLevel
from ultralytics.nn.distillation.teacher import OutputError
from ultralytics.nn.distillation.teachers import Teachers
from ultralytics.nn.tasks import ClassificationModel
from ultralytics.utils.distillation import average_logits

__all__ = ("ClassificationTeacher", "TeacherEnsemble")


MEANINGS = ("logits", "probabilities", "sigmoid")
WHOLES = {1: 0.1, 100: 0.02, 255: 0.02}  # what probabilities, percents and bytes sum to, and how far off, in few bits
EXACT = 1e-3  # how far off in floating point
COARSEST = 1 / 100  # step of values of few bits, as a share of the whole
MOST_STEPS = 1024  # in the greatest of them
TINY = torch.finfo(torch.float32).tiny
LEAST_IMAGES = 4  # whose logits do not all lie between 0 and 1 by chance


class ClassificationTeacher(ProbeableTeacher):
    """A trained classifier, frozen. Its answer to B images is (logits, features), the logits of shape (B, C)."""

    expected = CLASSIFIER
    recognised = "logits"  # what its answers were found to be
    rounded = False  # whether these are probabilities of few bits
    whole = 1  # what stands for a probability of 1, where each score is one for itself
    read_of: Sequence[str] = ()  # of several outputs, unless one is named, those that look alike: the first is read

    def fuse(self, network: nn.Module) -> nn.Module:
        """Return an Ultralytics network with its convolutions and BatchNorm layers fused."""
        return network.fuse(verbose=False) if isinstance(network, ClassificationModel) else network

    def read(self, output: Any) -> Tensor:
        """Return the logits, of shape (B, C), in what the network gives in eval mode.

        Raises:
            OutputError: If `output` names none of several.
        """
        if isinstance(self.model, ClassificationModel):
            return output[1]  # of (probabilities, logits)
        logits = self._part_of(output)
        if not isinstance(logits, Tensor):
            return logits  # to be refused, see `check_answer`
        if logits.ndim == 4 and logits.shape[2:] == (1, 1):  # of a head of convolutions
            logits = logits.flatten(1)
        single = logits.ndim == 2 and logits.shape[1] == 1
        logits = logits if logits.is_floating_point() else logits.float()
        if self.meaning == "probabilities" and not single:
            logits = logits.float().clamp_min(TINY).log()
        elif self.meaning in {"probabilities", "sigmoid"}:
            logits = (logits.float() / self.whole).clamp(TINY, 1 - torch.finfo(torch.float32).eps).logit()
        if single and self.names is not None and len(self.names) == 2:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)  # one score says which of two it is
        return logits

    @property
    def meaning(self) -> str:
        """What its answers are, one of `MEANINGS`: given, or found."""
        return self.output if self.output in MEANINGS else self.recognised

    def _part_of(self, output: Any) -> Any:
        """Return of an answer in several parts the one that is named, or has a score for each class, or comes first."""
        parts = dict(output) if isinstance(output, Mapping) else {}
        if isinstance(output, (tuple, list)):
            parts = {str(i): part for i, part in enumerate(output)}
        named = None if self.output in MEANINGS and self.output not in parts else self.output
        logits = getattr(output, "logits", parts.get("logits"))
        if named is None and isinstance(logits, Tensor):
            return logits
        if named is not None:
            if named not in parts:
                raise OutputError(
                    f"'teacher_output={named}' is none of {list(MEANINGS)}, and no output of 'teacher={self.source}', "
                    f"which has {list(parts) or 'one without a name'}."
                )
            return parts[named]
        rows = {name: part for name, part in parts.items() if isinstance(part, Tensor) and part.ndim == 2}
        fitting = {name for name, row in rows.items() if self.names is not None and row.shape[1] == len(self.names)}
        alike = [name for name in rows if name in fitting or not fitting]
        self.read_of = alike if len(parts) > 1 else ()
        return rows[alike[0]] if alike else part_of(output)

    def check_answer(self, answer: Any, count: int) -> None:
        """Refuse what is no finite row of logits per image, one per class name; recognise what these are.

        Raises:
            ValueError: If the answer has another shape or is not finite, or `output` says what is known.
        """
        fitted = self.output in MEANINGS and (self.waits_for_head or self.backbone)
        if self.output is not None and (fitted or isinstance(self.model, ClassificationModel)):
            known = "has a head that was fitted to give logits" if fitted else "is Ultralytics' own, which gives logits"
            raise ValueError(
                f"'teacher_output={self.output}' is for networks of others, and 'teacher={self.source}' {known}. Leave "
                f"it out, or give a list with None for this teacher."
            )
        if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != count or not answer.shape[1]:
            found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(
                f"'teacher={self.source}' answers {count} images with {found}, not with logits of shape ({count}, C)."
            )
        if not answer.isfinite().all():
            raise ValueError(
                f"'teacher={self.source}' gives NaN or infinite logits: its weights are damaged, or its training "
                f"failed. Give an earlier checkpoint."
            )
        if self.names is not None and answer.shape[1] != len(self.names):
            raise ValueError(
                f"'teacher={self.source}' gives {answer.shape[1]} logits per image, but has {len(self.names)} class "
                f"names. Name each of its classes with 'teacher_names'."
            )
        if self.output in MEANINGS or isinstance(self.model, ClassificationModel):
            return
        single = answer.shape[1] == 2 and not answer[:, 0].any()  # one score that says which of two it is, see `read`
        scores = (answer[:, 1:] if single else answer).double()
        if (scores < 0).any():
            return
        # Exported classifiers often end in a softmax; the logarithm gives logits back, up to a constant that no
        # softmax sees. In 8 bits each of its values may be half a step off, so that small ones are lost
        sums = scores.sum(1)
        whole = min(WHOLES, key=lambda x: (sums - x).abs().max()) if count >= LEAST_IMAGES else 1
        step = _step(scores / whole)
        slack = WHOLES[whole] if step else max(EXACT, 4 * _precision(scores))
        lost = scores.shape[1] * min(step, COARSEST) / 2
        less, more = 1 - sums.min().item() / whole, sums.max().item() / whole - 1
        if scores.shape[1] > 1 and less < slack + lost and more < slack:
            self.recognised, self.rounded = "probabilities", max(less, more) > EXACT
        elif count >= LEAST_IMAGES and (scores <= 1).all():
            self.recognised = "sigmoid"
        elif count >= LEAST_IMAGES and 16 < scores.max() < 256 and not scores.frac().any():  # as no logits are
            self.recognised, self.whole = "sigmoid", 255

    def head(self, level: FeatureLevel) -> Callable[[Tensor], Tensor] | None:
        """Return the head as a function from a level's map to logits, or None if that is not what it is given."""
        network = self.model
        if not isinstance(network, ClassificationModel) or level.name != f"model.{len(network.model) - 2}":
            return None
        return lambda x: network.get_submodule(f"model.{len(network.model) - 1}")(x)[1]


def _step(scores: Tensor) -> float:
    """Return the step of which all scores are multiples, as those of few bits are; 0 if there is none so coarse."""
    values, greatest = scores.unique(), scores.max().item()
    if len(values) > MOST_STEPS or greatest <= 0:
        return 0.0
    counts = torch.arange(1, MOST_STEPS + 1, dtype=scores.dtype)[:, None]  # of steps in the greatest
    steps = values * counts / greatest
    fits = ((steps - steps.round()).abs() < 0.02).all(1)
    return greatest / counts[fits][0].item() if fits.any() else 0.0


def _precision(scores: Tensor) -> float:
    """Return the precision in which scores were computed, as a share of each."""
    kinds = (torch.bfloat16, torch.float16)
    return next((torch.finfo(kind).eps for kind in kinds if (scores.to(kind) == scores).all()), 0.0)


class TeacherEnsemble(Teachers):
    """One or more classifiers that answer as one: probabilities averaged over members, features from the first.

    Attributes:
        weights (list[float]): Their shares of the average, which sum to 1.
    """

    def __init__(
        self, members: Sequence[ClassificationTeacher], weights: Sequence[float] | None = None, temperature: float = 1.0
    ):
        """Join teachers.

        Args:
            members (Sequence[ClassificationTeacher]): The teachers, at least one.
            weights (Sequence[float], optional): One per teacher, > 0; None for equal ones.
            temperature (float): Softening temperature of the response loss.
        """
        super().__init__(members)
        weights = weights or [1.0] * len(members)
        self.weights = [w / sum(weights) for w in weights]
        self.temperature = temperature
        self._columns: list[Tensor | None] = [None] * len(members)

    def align(self, names: Sequence[str]) -> list[str]:
        """Align the logits with a dataset's classes by name.

        Args:
            names (Sequence[str]): The dataset's class names by index.

        Returns:
            (list[str]): What is notable, in sentences for the log.

        Raises:
            ValueError: If a member's classes are not known, match ambiguously, or fewer than 2 are shared.
        """
        matches = []
        for member in self.members:
            if member.names is None:
                raise ValueError(
                    f"'teacher={member.source}' does not say which classes it knows. {self._head_first(names)}"
                    f"name them by index with 'teacher_names', a list, a dict or a YAML file, e.g. "
                    f"'teacher_names=ImageNet.yaml', or set 'response_distill=False' to learn from its feature maps "
                    f"alone."
                )
            matches.append(match_classes(member.names, names))
        classes = [i for i in range(len(names)) if all(i in match for match in matches)]
        if len(classes) < min(2, len(names)):
            raise ValueError(
                f"'teacher={self.source}' knows {len(classes)} of the dataset's {len(names)} classes {some(names)}, "
                f"and the response loss compares at least 2. It knows {some(self.first.names)}. "
                f"{self._head_first(names)}give a teacher of these classes, rename its own with 'teacher_names', or "
                f"set 'response_distill=False' to learn from its feature maps alone."
            )
        self.classes = classes
        notes = []
        for k, (member, match) in enumerate(zip(self.members, matches, strict=True)):
            if member.meaning != "logits":
                few = ", rounded, so that small ones are lost: give one of more bits if there is" * member.rounded
                notes.append(f"{member.source}: its answers are read as {member.meaning}{few}.")
            if alike := member.read_of:
                like = f", as {len(alike)} look alike" * (len(alike) > 1)
                notes.append(
                    f"{member.source}: of its outputs '{alike[0]}' is read{like}. 'teacher_output' names another."
                )
            columns = [match[i] for i in classes]
            if columns != list(range(len(member.names))):
                self._columns[k] = torch.tensor(columns)
                notes.append(
                    f"{member.source}: {len(columns)} of its {len(member.names)} classes are matched by name to the "
                    f"dataset's."
                )
        if len(classes) < len(names):
            self.known_classes = torch.tensor(classes)
            unknown = [name for i, name in enumerate(names) if i not in classes]
            notes.append(
                f"The response loss compares the {len(classes)} of {len(names)} classes that the teacher knows, on "
                f"their images only; unknown to it: {some(unknown)}."
            )
        return notes

    def _head_first(self, names: Sequence[str]) -> str:
        """Return the beginning of a sentence of mends, the first of which only networks with features allow."""
        if len(names) < 2 or not all(member.has_features for member in self.members):
            return "If there is nothing else, "
        return "Run the same command with 'teacher_probe=True', which fits it a head for these classes; or "

    def judge(
        self, dataset: Dataset, limit: int | None = None, batch: int = 64, *others: Callable[[Tensor], Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Answer images of a dataset, evenly spaced, as far as their classes are known.

        Args:
            dataset (Dataset): Gives dicts of `img`, a (channels, H, W) image in 0 to 1, and `cls`, its class index.
            limit (int, optional): Most images to look at; None for all.
            batch (int): Images at a time.
            *others (Callable): Give logits (B, len(classes)) of the same images.

        Returns:
            logits (list[Tensor]): Each member's, then each other's, (N, len(classes)) in float32 on the CPU.
            labels (Tensor): The images' classes as columns of the logits, (N,).
        """
        logits, labels = [[] for _ in (*self.members, *others)], []
        for _, images, classes in spaced_batches(dataset, self.classes, limit, batch):
            images = images.to(self.device)
            answers = [*self.answers(images)[0], *(other(images) for other in others)]
            for kept, answer in zip(logits, answers, strict=True):
                kept.append(answer.float().cpu())
            labels += [self.classes.index(c) for c in classes]
        empty = torch.zeros(0, len(self.classes))
        return [torch.cat([empty, *kept]) for kept in logits], torch.tensor(labels, dtype=torch.long)

    def to(self, device: torch.device) -> TeacherEnsemble:
        """Move the networks to a device."""
        super().to(device)
        self._columns = [None if c is None else c.to(device) for c in self._columns]
        return self

    def answers(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return each member's logits of shape (B, len(classes)), and the features of the first.

        Before `align` only the first is asked, as logits of unknown classes cannot be averaged.
        """
        answers = [member(images) for member in (self.members if self.classes else self.members[:1])]
        logits = [
            x if columns is None else x.index_select(1, columns)
            for (x, _), columns in zip(answers, self._columns, strict=False)
        ]
        return logits, answers[0][1]

    def __call__(self, images: Tensor, head: bool = True) -> Answer:
        """Answer a batch of images.

        Args:
            images (Tensor): Images of shape (B, channels, H, W), 0 to 1, RGB.
            head (bool): Compute logits; if not, only the first member is asked, see `Teacher`.

        Returns:
            logits (Tensor): Logits of shape (B, len(classes)), the teacher's own (B, C) before `align`, or (B, 0).
            features (list[Tensor]): One (B, c, h, w) map per level of the first member.
        """
        if not head:
            return self.first(images, head=False)
        answers, features = self.answers(images)
        return self.average(answers), features

    def average(self, answers: Sequence[Tensor]) -> Tensor:
        """Return what the members say as one, of their logits (B, C)."""
        return average_logits(answers, self.weights[: len(answers)], self.temperature)
