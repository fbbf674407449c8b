# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Every distillation argument with its type, default, valid values and meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ultralytics.cfg import DEFAULT_CFG_DICT, check_dict_alignment
from ultralytics.cfg.distillation import values
from ultralytics.cfg.distillation.values import Kind, as_list, layer_lists

__all__ = ("DENSE_LOSSES", "DistillationArgs")

DENSE_LOSSES = (
    "box",
    "dfl",
    "mask",
    "keypoint",
)  # what is compared of dense heads besides classes, where a task has it


def _parameter(kind: Kind, default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"kind": kind, "meaning": meaning})


@dataclass(frozen=True)
class DistillationArgs:
    """Distillation arguments, validated on construction.

    String values are read as on an Ultralytics command line: "0.7" is a number, "True" a bool, "4,6,9" a list; and
    "[a.pt, b.pt]" a list, with or without quotes around its strings.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range, or no loss is left to train with.
    """

    teacher: Any = _parameter(
        values.TEACHER, None, "Trained network that guides the student, or several classifiers; required"
    )
    teacher_names: Any = _parameter(values.NAMES, None, "The teacher's classes by index; None = as its file says")
    teacher_output: str | list | None = _parameter(
        values.OUTPUT,
        None,
        "What a foreign classifier's answer is, or which of several it is; None = recognised",
    )
    teacher_imgsz: int | list | None = _parameter(
        values.SIZES, None, "Side of the images that the teacher sees; None = the student's, or the one that it takes"
    )
    teacher_mean: float | list | None = _parameter(
        values.CHANNELS, None, "Mean subtracted from the teacher's images, 0 to 1; None = as its source says"
    )
    teacher_std: float | list | None = _parameter(
        values.CHANNELS, None, "Standard deviation that the teacher's images are divided by; None = as its source says"
    )
    teacher_weights: list | None = _parameter(values.SHARES, None, "Shares of several teachers; None = equal ones")
    teacher_trusted: bool = _parameter(values.BOOL, False, "Let the teacher's file run code of its own")
    teacher_probe: bool = _parameter(
        values.BOOL,
        False,
        "Fit the teacher a linear head for the dataset's classes, on its frozen features, before training",
    )
    teacher_check: bool = _parameter(values.BOOL, True, "Measure the teacher on some validation images first")
    teacher_hash: str | list | None = _parameter(
        values.HASH,
        None,
        "SHA-256 that the teacher's file must have; None = any. A run records it, and `resume` compares it",
    )
    teacher_cache: bool | str | None = _parameter(
        values.CACHE,
        None,
        "Ask the teacher once about each view of an image, and keep its answers in memory or on disk",
    )
    teacher_views: int = _parameter(
        values.COUNT, 8, "Views of each image, augmented in as many ways, with `teacher_cache`"
    )
    teacher_compile: bool | str = _parameter(
        values.COMPILE, False, "Compile the teacher for full batches; see upstream's `compile`"
    )
    teacher_overlap: bool | None = _parameter(
        values.OPTIONAL_BOOL,
        None,
        "Ask the teacher while the student computes, in memory beside it; None = on a CPU only",
    )
    self_distill_start: int = _parameter(
        values.EPOCH, 0, "Epoch, counted from 0, from which `teacher=self` teaches; before it training is plain"
    )
    distill_alpha: float = _parameter(
        values.FRACTION, 0.7, "Weight of the losses from the teacher; 0 trains without it"
    )
    distill_beta: float = _parameter(values.FRACTION, 0.3, "Weight of the student's own loss, with the labels")
    temperature: float = _parameter(
        values.POSITIVE, 4.0, "Softening of the distributions in the response loss, and of boxes' sides"
    )
    response_distill: bool = _parameter(
        values.BOOL, True, "Match the teacher's class distribution; see `response_method`"
    )
    feature_distill: bool = _parameter(values.BOOL, True, "Match the teacher's feature maps; see `feature_method`")
    attention_distill: bool = _parameter(values.BOOL, True, "Match where the teacher's feature maps are active")
    box_distill: bool = _parameter(values.BOOL, False, "Match the teacher's boxes, oriented ones too")
    dfl_distill: bool = _parameter(values.BOOL, False, "Match the distributions of where the teacher's boxes end")
    mask_distill: bool = _parameter(values.BOOL, False, "Match the masks of the teacher's objects")
    keypoint_distill: bool = _parameter(values.BOOL, False, "Match the keypoints of the teacher's objects")
    response_method: str | dict = _parameter(
        values.METHOD, "kl", "What compares the class distributions, or several by name with shares or hyper-parameters"
    )
    feature_method: str | dict = _parameter(
        values.METHOD, "mse", "What compares the feature maps, or several by name with shares or hyper-parameters"
    )
    feature_weight: float | None = _parameter(
        values.OPTIONAL_WEIGHT,
        None,
        "Weight of the feature loss; None = the method's own, 25 for `mse`",
    )
    attention_weight: float | None = _parameter(values.OPTIONAL_WEIGHT, None, "Weight of the attention loss; None = 10")
    box_weight: float | None = _parameter(values.OPTIONAL_WEIGHT, None, "Weight of the boxes; None = 1")
    dfl_weight: float | None = _parameter(values.OPTIONAL_WEIGHT, None, "Weight of their distributions; None = 1")
    mask_weight: float | None = _parameter(values.OPTIONAL_WEIGHT, None, "Weight of the masks; None = 1")
    keypoint_weight: float | None = _parameter(values.OPTIONAL_WEIGHT, None, "Weight of the keypoints; None = 1")
    distill_balance: str | None = _parameter(
        values.BALANCE, None, "`auto` scales the losses until their gradients pull equally; weights then default to 1"
    )
    distill_schedule: str = _parameter(values.SCHEDULE, "constant", "How `distill_alpha` falls over the epochs")
    distill_warmup: float = _parameter(values.WEIGHT, 0, "Epochs in which `distill_alpha` rises linearly")
    close_distill: int = _parameter(values.EPOCH, 0, "Last epochs without the teacher")
    temperature_end: float | None = _parameter(
        values.OPTIONAL_POSITIVE,
        None,
        "Temperature of the last epoch, reached as in `distill_schedule`; None = `temperature`",
    )
    distill_layers: list | None = _parameter(
        values.LAYERS, None, "Layers to match: None = by stride, one list for both networks, or [student, teacher]"
    )

    baseline: str | None = _parameter(
        values.RUN,
        None,
        "Folder of a plain run that the report compares with; None = one beside the run, if there is one",
    )

    def __post_init__(self):
        """Read strings, then check each value and the values together."""
        for f in fields(self):
            kind = f.metadata["kind"]
            value = kind.read(getattr(self, f.name))
            object.__setattr__(self, f.name, value)  # the dataclass is frozen
            if not kind.is_type(value):
                raise TypeError(
                    f"'{f.name}={value!s:.100}' is of invalid type {type(value).__name__}. Valid '{f.name}' types are "
                    f"{kind.types} (e.g. '{f.name}={f.default}')."
                )
            if not kind.in_range(value):
                raise ValueError(f"'{f.name}={value}' is an invalid value. Valid '{f.name}' values are {kind.values}.")
        self._check_teachers()
        if self.distill_alpha == 0 and self.distill_beta == 0:
            raise ValueError(
                "'distill_alpha=0' and 'distill_beta=0' leave no loss to train with. Set at least one greater than 0."
            )
        if self.distill_beta == 0 and self.close_distill:
            raise ValueError(
                f"'close_distill={self.close_distill}' and 'distill_beta=0' leave no loss to train with in the last "
                f"epochs. Set one of them otherwise."
            )
        if self.distill_alpha and not (self.uses_answer or self.uses_features):
            raise ValueError(
                f"'distill_alpha={self.distill_alpha}' has no loss to weigh: all that compare with the teacher are "
                f"off. Switch one on, e.g. 'response_distill', or set 'distill_alpha=0'."
            )

    def _check_teachers(self) -> None:
        """Check what is given per teacher."""
        count = len(self.teachers)
        if self.teacher_cache is True:
            object.__setattr__(self, "teacher_cache", "ram")
        if self.teacher == "self" and self.teacher_compile:
            raise ValueError("'teacher=self' is the student's average. Leave out 'teacher_compile'.")
        if self.teacher == "self" and self.teacher_cache:
            raise ValueError("'teacher=self' learns, so its answers change. Leave out 'teacher_cache'.")
        if self.teacher == "self" and self.teacher_probe:
            raise ValueError("'teacher=self' knows the student's classes. Leave out 'teacher_probe'.")
        if self.teacher_probe and self.teacher_names is not None:
            raise ValueError(
                "'teacher_probe=True' fits the teacher a head for the dataset's classes, so 'teacher_names' has no "
                "effect. Leave out one of them."
            )
        if "self" in self.teachers and count > 1:
            raise ValueError("'teacher=self' teaches alone. Give it by itself, or a list of other teachers.")
        if self.teacher_weights is not None and len(self.teacher_weights) != count:
            raise ValueError(f"'teacher_weights={self.teacher_weights}' needs one number for each of {count} teachers.")
        for name in ("teacher_imgsz", "teacher_names", "teacher_output"):
            given = getattr(self, name)
            if count > 1 and isinstance(given, (list, tuple)) and len(given) != count:
                raise ValueError(
                    f"'{name}={given!s:.100}' has {len(given)} entries, but there are {count} teachers. Give one "
                    f"value for all, or a list of one for each."
                )
        for name in ("teacher_imgsz", "teacher_output"):
            if count == 1 and len(as_list(given := getattr(self, name))) > 1:
                raise ValueError(f"'{name}={given}' has several entries for one teacher.")
        stds = as_list(self.teacher_std)
        if stds and min(stds) <= 0:
            raise ValueError(f"'teacher_std={self.teacher_std}' is an invalid value. It must be greater than 0.")

    @property
    def teachers(self) -> list:
        """The teachers as given, in a list."""
        return as_list(self.teacher)

    def per_teacher(self) -> list[dict[str, Any]]:
        """Return the arguments of `Teacher` for each teacher."""
        count = len(self.teachers)
        one_each = count > 1 and isinstance(self.teacher_names, (list, tuple))
        names = list(self.teacher_names) if one_each else [self.teacher_names] * count
        sizes, outputs = (
            given if len(given) == count else given * count
            for given in (as_list(x) or [None] for x in (self.teacher_imgsz, self.teacher_output))
        )
        return [
            {
                "source": source,
                "names": name,
                "imgsz": size,
                "output": output,
                "mean": as_list(self.teacher_mean) or None,
                "std": as_list(self.teacher_std) or None,
                "trusted": self.teacher_trusted,
                "grows_head": self.teacher_probe,
            }
            for source, name, size, output in zip(self.teachers, names, sizes, outputs, strict=True)
        ]

    @property
    def terms(self) -> dict[str, float | None]:
        """What is compared of dense heads besides classes, with weights; None for each one's own."""
        weights = {name: getattr(self, f"{name}_weight") for name in DENSE_LOSSES if getattr(self, f"{name}_distill")}
        return {name: weight for name, weight in weights.items() if weight != 0}

    @property
    def uses_answer(self) -> bool:
        """Whether a loss on what the teacher's head says is on."""
        return self.response_distill or bool(self.terms)

    @property
    def uses_features(self) -> bool:
        """Whether a loss on feature maps is on."""
        return self.uses_feature_method or (self.attention_distill and self.attention_weight != 0)

    @property
    def uses_feature_method(self) -> bool:
        """Whether the losses that `feature_method` names are on."""
        return self.feature_distill and self.feature_weight != 0

    @property
    def layers(self) -> tuple[Sequence[int | str], Sequence[int | str]] | None:
        """The student's and the teacher's layers to pair, or None for matching by stride."""
        lists = layer_lists(self.distill_layers)
        return (lists[0], lists[-1]) if lists else None

    @classmethod
    def split(cls, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split training arguments into the distillation arguments and upstream's.

        Args:
            overrides (Mapping[str, Any]): Training arguments of both kinds; not changed.

        Returns:
            given (dict[str, Any]): The distillation arguments that were given, `distill_model` read as `teacher`.
            rest (dict[str, Any]): The arguments for upstream.

        Raises:
            SyntaxError: If a key is neither ours nor upstream's, naming the nearest valid keys.
            ValueError: If `teacher` and its other name `distill_model` are both given and differ.
        """
        defaults = asdict(cls())
        given = {k: v for k, v in overrides.items() if k in defaults}
        rest = {k: v for k, v in overrides.items() if k not in defaults}
        check_dict_alignment({**DEFAULT_CFG_DICT, **defaults}, rest)
        if (synonym := rest.get("distill_model")) is not None:
            rest["distill_model"] = None  # upstream's own distillation, for other tasks, must not start
            if given.get("teacher") is None:
                given["teacher"] = synonym
            if str(given["teacher"]) != str(synonym):
                raise ValueError(
                    f"'distill_model={synonym}' is another name for 'teacher={given['teacher']}'. Give one of them."
                )
        return given, rest
