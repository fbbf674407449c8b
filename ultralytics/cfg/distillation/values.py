# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What values the distillation arguments take: types and ranges, in words and as tests, and how strings are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from ultralytics.cfg import smart_value

__all__ = ("Kind", "as_list", "as_written", "layer_lists", "read_strings")


def as_list(value: Any) -> list:
    """Return a value that stands for one, or for one per teacher, as a list; None as an empty one."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def read_list(text: str, loader: type) -> Any:
    """Read a list as it is written on a command line, "[a, b]"; text that is none is returned as it is."""
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError:
        return text


def read_value(value: Any) -> Any:
    """Read an argument of numbers and choices: a list or a dict as it is written on a command line, and its values."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        value = read_list(value, yaml.SafeLoader)
    return plain_value(value)


def plain_value(value: Any) -> Any:
    """Return a value as args.yaml and checkpoints hold it, numbers read as upstream reads them, in dicts too."""
    if isinstance(value, Mapping):
        return {k: plain_value(v) for k, v in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return smart_value(value) if isinstance(value, str) else value


def read_strings(value: Any) -> Any:
    """Read an argument of strings: paths and NumPy's strings become plain ones, and "[a.pt, b.pt]" a list."""
    if isinstance(value, str) and value.startswith("["):
        value = read_list(value, yaml.BaseLoader)
    if isinstance(value, (list, tuple, np.ndarray)):
        return [read_strings(x) for x in value]
    if isinstance(value, Mapping):
        return {plain_value(k): read_strings(v) for k, v in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, (str, Path)) else value


def read_output(value: Any) -> Any:
    """Read the names of outputs, which those that have none are told by their numbers for."""
    value = read_value(value)
    named = [str(x) if type(x) is int else x for x in as_list(value)]
    return named if isinstance(value, (list, tuple)) else next(iter(named), value)


def as_written(text: str, value: Any) -> Any:
    """Return a value of strings as it was written, e.g. [01, 1e3], where upstream has evaluated it."""
    if not isinstance(value, (list, dict, int, float)):
        return value
    written = read_list(text, yaml.BaseLoader)
    kind = type(value) if isinstance(value, (list, dict)) else str
    return written if isinstance(written, kind) else value


class Kind(NamedTuple):
    """What values a parameter takes: its types and its range, each in words and as a test, and how strings are read."""

    types: str
    is_type: Callable[[Any], bool]
    values: str
    in_range: Callable[[Any], bool]
    read: Callable[[Any], Any] = read_value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def layer_lists(value: Any) -> list:
    """Return `distill_layers` as a list of its lists of layers: none, one for both networks, or one for each."""
    if value is None:
        return []
    is_pair = isinstance(value, (list, tuple)) and value and all(isinstance(x, (list, tuple)) for x in value)
    return list(value) if is_pair else [value]


def _is_network(value: Any) -> bool:
    return hasattr(value, "state_dict") and not isinstance(value, type)  # an nn.Module, told without torch


def _is_names(value: Any) -> bool:
    return isinstance(value, (str, dict)) or (
        isinstance(value, (list, tuple))
        and all(x is None or isinstance(x, (str, int, list, tuple, dict)) for x in value)
    )


def _choice(types: str, values: str, *choices: Any) -> Kind:
    return Kind(types, lambda v: isinstance(v, tuple(map(type, choices))), values, lambda v: v in choices)


def _optional(kind: Kind) -> Kind:
    types = f"None, {kind.types}"
    return Kind(types, lambda v: v is None or kind.is_type(v), kind.values, lambda v: v is None or kind.in_range(v))


TEACHER = Kind(
    "str, Path, nn.Module or a list of these",
    lambda v: all(isinstance(x, str) or _is_network(x) for x in as_list(v)),
    "a file, `torchvision:NAME`, `timm:NAME`, `self`, an `nn.Module`, or a list of these",
    lambda v: v != [] and all(x != "" for x in as_list(v)),
    read_strings,
)
NAMES = Kind(
    "None, list, dict or str of names that are str or int",
    lambda v: v is None or _is_names(v),
    "class names as a list, a dict by index or a YAML file",
    lambda v: v is None or len(v) > 0,
    read_strings,
)
OUTPUT = Kind(
    "None, str or a list of str",
    lambda v: all(x is None or isinstance(x, str) for x in as_list(v)),
    "`logits`, `probabilities`, `sigmoid`, or an output's name",
    lambda v: v != [] and all(x != "" for x in as_list(v)),
    read_output,
)
SIZES = Kind(
    "None, int or a list of int",
    lambda v: all(type(x) is int or x is None for x in as_list(v)),
    "pixels, greater than 0",
    lambda v: all(x is None or x > 0 for x in as_list(v)) and v != [],
)
CHANNELS = Kind(
    "None, int, float or a list of these",
    lambda v: all(map(_is_number, as_list(v))),
    "one number, or one per channel",
    lambda v: all(map(math.isfinite, as_list(v))) and v != [],
)
SHARES = Kind(
    "None or a list of int or float",
    lambda v: v is None or (isinstance(v, (list, tuple)) and all(map(_is_number, v))),
    "one number greater than 0 per teacher",
    lambda v: v is None or (len(v) > 0 and all(0 < x < math.inf for x in v)),
)
CACHE = _choice("None, bool or str", "`ram` or True, `disk`, None or False", None, True, False, "ram", "disk")
COUNT = Kind("int", lambda v: type(v) is int, "1 or greater", lambda v: v >= 1)
HASH = Kind(
    "None, str or a list of str",
    lambda v: all(isinstance(x, str) for x in as_list(v)),
    "64 hexadecimal digits, or a list of such for several teachers",
    lambda v: v != [] and all(len(x) == 64 and not set(x.lower()) - set("0123456789abcdef") for x in as_list(v)),
    read_strings,
)
RUN = Kind(
    "None, str or Path",
    lambda v: v is None or isinstance(v, (str, Path)),
    "a run's folder",
    lambda v: v is None or str(v) != "",
    read_strings,
)
EPOCH = Kind("int", lambda v: type(v) is int, "0 or greater", lambda v: v >= 0)
BOOL = _choice("bool", "True or False", True, False)
OPTIONAL_BOOL = _choice("None or bool", "True, False or None", None, True, False)
FRACTION = Kind("int or float", _is_number, "between 0.0 and 1.0", lambda v: 0 <= v <= 1)
POSITIVE = Kind("int or float", _is_number, "greater than 0", lambda v: 0 < v < math.inf)
WEIGHT = Kind("int or float", _is_number, "0 or greater", lambda v: 0 <= v < math.inf)
OPTIONAL_WEIGHT, OPTIONAL_POSITIVE = _optional(WEIGHT), _optional(POSITIVE)
COMPILE = _choice(
    "bool or str",
    "True, False or a mode of `torch.compile`",
    *(True, False, "default", "reduce-overhead", "max-autotune-no-cudagraphs"),
)
METHOD = Kind(
    "str or dict",
    lambda v: isinstance(v, (str, dict)) and all(isinstance(k, str) for k in v),
    "a method's name, or a dict of names with shares or hyper-parameters",
    lambda v: len(v) > 0,
)
BALANCE = _choice("None or str", "`auto` or None", None, "auto")
SCHEDULE = _choice("str", "`constant`, `linear` or `cosine`", "constant", "linear", "cosine")
LAYERS = Kind(
    "None, a list of int or str, or a pair of such lists",
    lambda v: all(isinstance(x, (list, tuple)) and all(type(i) in (int, str) for i in x) for x in layer_lists(v)),
    "layer indices of 0 or greater or module names, as many for the teacher as for the student",
    lambda v: (
        len(lists := layer_lists(v)) <= 2
        and len({len(x) for x in lists}) <= 1
        and all(x and all(i if isinstance(i, str) else i >= 0 for i in x) for x in lists)
    ),
)
