# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The distillation arguments: every parameter with its type, default, valid values and meaning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from ultralytics.cfg import (
    DEFAULT_CFG_DICT,
    check_dict_alignment,
    merge_equals_args,
    parse_key_value_pair,
    smart_value,
)
from ultralytics.utils import YAML
from ultralytics.utils.checks import check_yaml

__all__ = ("DistillationArgs", "as_list", "parse_arguments")


class _Kind(NamedTuple):
    """What values a parameter takes: its types and its range, each in words and as a test."""

    types: str
    is_type: Callable[[Any], bool]
    values: str
    in_range: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _layer_lists(value: Any) -> list:
    """Return `distill_layers` as a list of its lists of layers: none, one for both networks, or one for each."""
    if value is None:
        return []
    is_pair = isinstance(value, (list, tuple)) and value and all(isinstance(x, (list, tuple)) for x in value)
    return list(value) if is_pair else [value]


def as_list(value: Any) -> list:
    """Return a value that stands for one, or for one per teacher, as a list; None as an empty one."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _is_network(value: Any) -> bool:
    return hasattr(value, "state_dict") and not isinstance(value, type)  # an nn.Module, told without torch


def _is_names(value: Any) -> bool:
    return isinstance(value, (str, dict)) or (
        isinstance(value, (list, tuple))
        and all(x is None or isinstance(x, (str, int, list, tuple, dict)) for x in value)
    )


_TEACHER = _Kind(
    "str, Path, nn.Module or a list of these",
    lambda v: all(isinstance(x, str) or _is_network(x) for x in as_list(v)),
    "a file, `torchvision:NAME`, `timm:NAME`, `self`, an `nn.Module`, or a list of these",
    lambda v: v != [] and all(x != "" for x in as_list(v)),
)
_NAMES = _Kind(
    "None, list, dict or str",
    lambda v: v is None or _is_names(v),
    "class names as a list, a dict by index or a YAML file",
    lambda v: v is None or len(v) > 0,
)
_SIZES = _Kind(
    "None, int or a list of int",
    lambda v: all(type(x) is int or x is None for x in as_list(v)),
    "pixels, greater than 0",
    lambda v: all(x is None or x > 0 for x in as_list(v)) and v != [],
)
_CHANNELS = _Kind(
    "None, int, float or a list of these",
    lambda v: all(map(_is_number, as_list(v))),
    "one number, or one per channel",
    lambda v: all(map(math.isfinite, as_list(v))) and v != [],
)
_SHARES = _Kind(
    "None or a list of int or float",
    lambda v: v is None or (isinstance(v, (list, tuple)) and all(map(_is_number, v))),
    "one number greater than 0 per teacher",
    lambda v: v is None or (len(v) > 0 and all(0 < x < math.inf for x in v)),
)
_CACHE = _Kind(
    "None, bool or str",
    lambda v: v is None or isinstance(v, (bool, str)),
    "`ram` or True, `disk`, None or False",
    lambda v: v in {None, True, False, "ram", "disk"},
)
_COUNT = _Kind("int", lambda v: type(v) is int, "1 or greater", lambda v: v >= 1)
_HASH = _Kind(
    "None, str or a list of str",
    lambda v: all(isinstance(x, str) for x in as_list(v)),
    "64 hexadecimal digits, or a list of such for several teachers",
    lambda v: v != [] and all(len(x) == 64 and not set(x.lower()) - set("0123456789abcdef") for x in as_list(v)),
)
_RUN = _Kind(
    "None, str or Path",
    lambda v: v is None or isinstance(v, (str, Path)),
    "a run's folder",
    lambda v: v is None or str(v) != "",
)
_EPOCH = _Kind("int", lambda v: type(v) is int, "0 or greater", lambda v: v >= 0)
_BOOL = _Kind("bool", lambda v: isinstance(v, bool), "True or False", lambda v: True)
_OPTIONAL_BOOL = _Kind(
    "None or bool", lambda v: v is None or isinstance(v, bool), "True, False or None", lambda v: True
)
_FRACTION = _Kind("int or float", _is_number, "between 0.0 and 1.0", lambda v: 0 <= v <= 1)
_POSITIVE = _Kind("int or float", _is_number, "greater than 0", lambda v: 0 < v < math.inf)
_WEIGHT = _Kind("int or float", _is_number, "0 or greater", lambda v: 0 <= v < math.inf)
_OPTIONAL_WEIGHT = _Kind(
    "None, int or float", lambda v: v is None or _is_number(v), "0 or greater", lambda v: v is None or 0 <= v < math.inf
)
_OPTIONAL_POSITIVE = _Kind(
    "None, int or float",
    lambda v: v is None or _is_number(v),
    "greater than 0",
    lambda v: v is None or 0 < v < math.inf,
)
_COMPILE = _Kind(
    "bool or str",
    lambda v: isinstance(v, (bool, str)),
    "True, False or a mode of `torch.compile`",
    lambda v: v in {True, False, "default", "reduce-overhead", "max-autotune-no-cudagraphs"},
)
_METHOD = _Kind(
    "str or dict",
    lambda v: isinstance(v, (str, dict)) and all(isinstance(k, str) for k in v),
    "a method's name, or a dict of names with shares or hyper-parameters",
    lambda v: len(v) > 0,
)
_BALANCE = _Kind(
    "None or str", lambda v: v is None or isinstance(v, str), "`auto` or None", lambda v: v in {None, "auto"}
)
_SCHEDULE = _Kind(
    "str",
    lambda v: isinstance(v, str),
    "`constant`, `linear` or `cosine`",
    lambda v: v in {"constant", "linear", "cosine"},
)
_LAYERS = _Kind(
    "None, a list of int or str, or a pair of such lists",
    lambda v: all(isinstance(x, (list, tuple)) and all(type(i) in (int, str) for i in x) for x in _layer_lists(v)),
    "layer indices of 0 or greater or module names, as many for the teacher as for the student",
    lambda v: (
        len(lists := _layer_lists(v)) <= 2
        and len({len(x) for x in lists}) <= 1
        and all(x and all(i if isinstance(i, str) else i >= 0 for i in x) for x in lists)
    ),
)


def _parameter(kind: _Kind, default: Any, meaning: str) -> Any:
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

    teacher: Any = _parameter(_TEACHER, None, "Trained classifier that guides the student, or several; required")
    teacher_names: Any = _parameter(_NAMES, None, "The teacher's classes by index; None = as its file says")
    teacher_imgsz: int | list | None = _parameter(
        _SIZES, None, "Side of the images that the teacher sees; None = the student's, or the one that it takes"
    )
    teacher_mean: float | list | None = _parameter(
        _CHANNELS, None, "Mean subtracted from the teacher's images, 0 to 1; None = as its source says"
    )
    teacher_std: float | list | None = _parameter(
        _CHANNELS, None, "Standard deviation that the teacher's images are divided by; None = as its source says"
    )
    teacher_weights: list | None = _parameter(_SHARES, None, "Shares of several teachers; None = equal ones")
    teacher_trusted: bool = _parameter(_BOOL, False, "Let the teacher's file run code of its own")
    teacher_check: bool = _parameter(_BOOL, True, "Measure the teacher on up to 512 validation images first")
    teacher_hash: str | list | None = _parameter(
        _HASH, None, "SHA-256 that the teacher's file must have; None = any. A run records it, and `resume` compares it"
    )
    teacher_cache: bool | str | None = _parameter(
        _CACHE, None, "Ask the teacher once about each view of an image, and keep its answers in memory or on disk"
    )
    teacher_views: int = _parameter(_COUNT, 8, "Views of each image, augmented in as many ways, with `teacher_cache`")
    teacher_compile: bool | str = _parameter(
        _COMPILE, False, "Compile the teacher for full batches; see upstream's `compile`"
    )
    teacher_overlap: bool | None = _parameter(
        _OPTIONAL_BOOL, None, "Ask the teacher while the student computes, in memory beside it; None = on a CPU only"
    )
    self_distill_start: int = _parameter(
        _EPOCH, 0, "Epoch, counted from 0, from which `teacher=self` teaches; before it training is plain"
    )
    distill_alpha: float = _parameter(_FRACTION, 0.7, "Weight of the losses from the teacher; 0 trains without it")
    distill_beta: float = _parameter(_FRACTION, 0.3, "Weight of the cross-entropy with the labels")
    temperature: float = _parameter(_POSITIVE, 4.0, "Softening of both class distributions in the response loss")
    response_distill: bool = _parameter(_BOOL, True, "Match the teacher's class distribution; see `response_method`")
    feature_distill: bool = _parameter(_BOOL, True, "Match the teacher's feature maps; see `feature_method`")
    attention_distill: bool = _parameter(_BOOL, True, "Match where the teacher's feature maps are active")
    response_method: str | dict = _parameter(
        _METHOD, "kl", "What compares the class distributions, or several by name with shares or hyper-parameters"
    )
    feature_method: str | dict = _parameter(
        _METHOD, "mse", "What compares the feature maps, or several by name with shares or hyper-parameters"
    )
    feature_weight: float | None = _parameter(
        _OPTIONAL_WEIGHT,
        None,
        "Weight of the feature loss beside the response loss; None = the method's own, 50 for `mse`",
    )
    attention_weight: float | None = _parameter(
        _OPTIONAL_WEIGHT, None, "Weight of the attention loss beside the response loss; None = 10"
    )
    distill_balance: str | None = _parameter(
        _BALANCE, None, "`auto` scales the losses until their gradients pull equally; weights then default to 1"
    )
    distill_schedule: str = _parameter(_SCHEDULE, "constant", "How `distill_alpha` falls over the epochs")
    distill_warmup: float = _parameter(_WEIGHT, 0, "Epochs in which `distill_alpha` rises linearly")
    close_distill: int = _parameter(_EPOCH, 0, "Last epochs without the teacher")
    temperature_end: float | None = _parameter(
        _OPTIONAL_POSITIVE,
        None,
        "Temperature of the last epoch, reached as in `distill_schedule`; None = `temperature`",
    )
    distill_layers: list | None = _parameter(
        _LAYERS, None, "Layers to match: None = by stride, one list for both networks, or [student, teacher]"
    )

    baseline: str | None = _parameter(
        _RUN, None, "Folder of a plain run that the report compares with; None = one beside the run, if there is one"
    )

    def __post_init__(self):
        """Read strings, then check each value and the values together."""
        for f in fields(self):
            kind, value = f.metadata["kind"], getattr(self, f.name)
            if kind in {_TEACHER, _NAMES, _HASH, _RUN}:
                value = _read_strings(value)
            elif isinstance(value, str) and value.startswith(("[", "{")):
                value = _plain(_read_list(value, yaml.SafeLoader))
            else:
                value = _plain(value)
            object.__setattr__(self, f.name, value)  # the dataclass is frozen
            if not kind.is_type(value):
                raise TypeError(
                    f"'{f.name}={value!s:.100}' is of invalid type {type(value).__name__}. Valid '{f.name}' types are "
                    f"{kind.types} (i.e. '{f.name}={f.default}')."
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
        if self.distill_alpha and not (self.response_distill or self.uses_features):
            raise ValueError(
                f"'distill_alpha={self.distill_alpha}' has no loss to weigh: response, feature and attention losses "
                f"are all off. Switch one on, or set 'distill_alpha=0'."
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
        if "self" in self.teachers and count > 1:
            raise ValueError("'teacher=self' teaches alone. Give it by itself, or a list of other teachers.")
        if self.teacher_weights is not None and len(self.teacher_weights) != count:
            raise ValueError(f"'teacher_weights={self.teacher_weights}' needs one number for each of {count} teachers.")
        for name, values in (("teacher_imgsz", self.teacher_imgsz), ("teacher_names", self.teacher_names)):
            if count > 1 and isinstance(values, (list, tuple)) and len(values) != count:
                raise ValueError(
                    f"'{name}={values!s:.100}' has {len(values)} entries, but there are {count} teachers. Give one "
                    f"value for all, or a list of one for each."
                )
        if count == 1 and isinstance(self.teacher_imgsz, (list, tuple)) and len(self.teacher_imgsz) > 1:
            raise ValueError(f"'teacher_imgsz={self.teacher_imgsz}' has several entries for one teacher.")
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
        sizes = as_list(self.teacher_imgsz) or [None]
        sizes = sizes if len(sizes) == count else sizes * count
        return [
            {
                "source": source,
                "names": name,
                "imgsz": size,
                "mean": as_list(self.teacher_mean) or None,
                "std": as_list(self.teacher_std) or None,
                "trusted": self.teacher_trusted,
            }
            for source, name, size in zip(self.teachers, names, sizes, strict=True)
        ]

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
        lists = _layer_lists(self.distill_layers)
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


def _read_list(text: str, loader: type) -> Any:
    """Read a list as it is written on a command line, "[a, b]"; text that is none is returned as it is."""
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError:
        return text


def _plain(value: Any) -> Any:
    """Return a value as args.yaml and checkpoints hold it, numbers read as upstream reads them, in dicts too."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return smart_value(value) if isinstance(value, str) else value


def _read_strings(value: Any) -> Any:
    """Read an argument of strings: paths become strings, and "[a.pt, b.pt]" a list."""
    if isinstance(value, str) and value.startswith("["):
        value = _read_list(value, yaml.BaseLoader)
    if isinstance(value, (list, tuple)):
        return [_read_strings(x) for x in value]
    return str(value) if isinstance(value, Path) else value


def parse_arguments(arguments: Sequence[str], own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read command-line arguments in upstream's syntax: `key=value`, or the bare name of a switch for True.

    Arguments from a file given as `cfg=path.yaml` stand behind those of the command line.

    Args:
        arguments (Sequence[str]): The arguments, without the program's name.
        own (Mapping[str, Any], optional): Defaults of the program's own arguments.

    Returns:
        (dict[str, Any]): Values by key, numbers, bools, None and lists converted.

    Raises:
        SyntaxError: If an argument is neither.
        TypeError: If a switch of the program's own is not given True or False.
    """
    defaults = {**DEFAULT_CFG_DICT, **asdict(DistillationArgs()), **(own or {})}
    switches = {k for k, v in defaults.items() if isinstance(v, bool)}
    parsed = {}
    for argument in merge_equals_args(list(arguments)):
        if "=" in argument:
            key, value = parse_key_value_pair(argument)
        elif argument in switches:
            key, value = argument, True
        else:
            raise SyntaxError(f"'{argument}' is not a valid argument. Arguments are 'key=value', i.e. 'epochs=50'.")
        if key in (own or {}) and key in switches and not isinstance(value, bool):
            raise TypeError(f"'{key}={value}' is of invalid type {type(value).__name__}. Give True or False.")
        parsed[key] = value
    if file := parsed.pop("cfg", None):
        parsed = {**{k: v for k, v in YAML.load(check_yaml(file)).items() if k != "cfg"}, **parsed}
    return parsed
