# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The distillation arguments: every parameter with its type, default, valid values and meaning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ultralytics.cfg import (
    DEFAULT_CFG_DICT,
    check_dict_alignment,
    merge_equals_args,
    parse_key_value_pair,
    smart_value,
)
from ultralytics.utils import YAML
from ultralytics.utils.checks import check_yaml

__all__ = ("DistillationArgs", "parse_arguments")


class _Kind(NamedTuple):
    """What values a parameter takes: its types and its range, each in words and as a test."""

    types: str
    is_type: Callable[[Any], bool]
    values: str
    in_range: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _layer_lists(value: Any) -> list:
    """Return `distill_layers` as a list of its lists of indices: none, one for both networks, or one for each."""
    if value is None:
        return []
    is_pair = isinstance(value, (list, tuple)) and value and all(isinstance(x, (list, tuple)) for x in value)
    return list(value) if is_pair else [value]


_PATH = _Kind("str or Path", lambda v: v is None or isinstance(v, str), "a file path", lambda v: v != "")
_BOOL = _Kind("bool", lambda v: isinstance(v, bool), "True or False", lambda v: True)
_FRACTION = _Kind("int or float", _is_number, "between 0.0 and 1.0", lambda v: 0 <= v <= 1)
_POSITIVE = _Kind("int or float", _is_number, "greater than 0", lambda v: 0 < v < math.inf)
_WEIGHT = _Kind("int or float", _is_number, "0 or greater", lambda v: 0 <= v < math.inf)
_LAYERS = _Kind(
    "None, a list of int, or a pair of lists of int",
    lambda v: all(isinstance(x, (list, tuple)) and all(type(i) is int for i in x) for x in _layer_lists(v)),
    "layer indices of 0 or greater, as many for the teacher as for the student",
    lambda v: (
        len(lists := _layer_lists(v)) <= 2
        and len({len(x) for x in lists}) <= 1
        and all(x and min(x) >= 0 for x in lists)
    ),
)


def _parameter(kind: _Kind, default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"kind": kind, "meaning": meaning})


@dataclass(frozen=True)
class DistillationArgs:
    """Distillation arguments, validated on construction.

    String values are read as on an Ultralytics command line: "0.7" is a number, "True" a bool, "4,6,9" a list.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range, or no loss is left to train with.
    """

    teacher: str | Path | None = _parameter(
        _PATH, None, "Trained classification checkpoint (`.pt`) that guides the student; required"
    )
    distill_alpha: float = _parameter(_FRACTION, 0.7, "Weight of the losses from the teacher; 0 trains without it")
    distill_beta: float = _parameter(_FRACTION, 0.3, "Weight of the cross-entropy with the labels")
    temperature: float = _parameter(_POSITIVE, 4.0, "Softening of both class distributions in the response loss")
    response_distill: bool = _parameter(_BOOL, True, "Match the teacher's class distribution (KL divergence)")
    feature_distill: bool = _parameter(_BOOL, True, "Match the teacher's feature maps through 1x1 adapters (MSE)")
    attention_distill: bool = _parameter(_BOOL, True, "Match where the teacher's feature maps are active")
    feature_weight: float = _parameter(_WEIGHT, 50.0, "Weight of the feature loss beside the response loss")
    attention_weight: float = _parameter(_WEIGHT, 10.0, "Weight of the attention loss beside the response loss")
    distill_layers: list | None = _parameter(
        _LAYERS, None, "Layer indices to match: None = by stride, one list for both networks, or [student, teacher]"
    )

    def __post_init__(self):
        """Read strings, then check each value and the values together."""
        if isinstance(self.teacher, Path):
            object.__setattr__(self, "teacher", str(self.teacher))
        for f in fields(self):
            kind, value = f.metadata["kind"], getattr(self, f.name)
            if isinstance(value, str) and kind is not _PATH:
                value = smart_value(value)
            elif isinstance(value, np.generic):
                value = value.item()  # args.yaml and checkpoints hold plain values
            object.__setattr__(self, f.name, value)  # the dataclass is frozen
            if not kind.is_type(value):
                raise TypeError(
                    f"'{f.name}={value!s:.100}' is of invalid type {type(value).__name__}. Valid '{f.name}' types are "
                    f"{kind.types} (i.e. '{f.name}={f.default}')."
                )
            if not kind.in_range(value):
                raise ValueError(f"'{f.name}={value}' is an invalid value. Valid '{f.name}' values are {kind.values}.")
        if self.distill_alpha == 0 and self.distill_beta == 0:
            raise ValueError(
                "'distill_alpha=0' and 'distill_beta=0' leave no loss to train with. Set at least one greater than 0."
            )
        if self.distill_alpha and not (self.response_distill or self.uses_features):
            raise ValueError(
                f"'distill_alpha={self.distill_alpha}' has no loss to weigh: response, feature and attention losses "
                f"are all off. Switch one on, or set 'distill_alpha=0'."
            )

    @property
    def uses_features(self) -> bool:
        """Whether a loss on feature maps is on."""
        return bool(
            (self.feature_distill and self.feature_weight) or (self.attention_distill and self.attention_weight)
        )

    @property
    def uses_adapters(self) -> bool:
        """Whether the feature loss is on, which trains 1x1 adapters."""
        return bool(self.distill_alpha and self.feature_distill and self.feature_weight)

    @property
    def layers(self) -> tuple[Sequence[int], Sequence[int]] | None:
        """The student's and the teacher's layer indices to pair, or None for matching by stride."""
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
