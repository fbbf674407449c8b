# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Command lines in upstream's syntax, with the distillation arguments among upstream's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from ultralytics.cfg import DEFAULT_CFG_DICT, merge_equals_args, parse_key_value_pair
from ultralytics.cfg.distillation.arguments import DistillationArgs
from ultralytics.cfg.distillation.values import as_written, read_strings
from ultralytics.utils import YAML
from ultralytics.utils.checks import check_yaml

__all__ = ("parse_arguments",)

AS_WRITTEN = {f.name for f in fields(DistillationArgs) if f.metadata["kind"].read is read_strings}


def parse_arguments(arguments: Sequence[str], own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read command-line arguments in upstream's syntax: `key=value`, or the bare name of a switch for True.

    Arguments from a file given as `cfg=path.yaml` stand behind those of the command line.

    Args:
        arguments (Sequence[str]): The arguments, without the program's name.
        own (Mapping[str, Any], optional): Defaults of the program's own arguments; one of text is read as written.

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
            try:
                key, value = parse_key_value_pair(argument)
            except AssertionError as e:  # of upstream, where nothing stands behind the sign
                raise SyntaxError(f"'{argument}' has no value. Give one, or leave it out.") from e
            if key in AS_WRITTEN or isinstance((own or {}).get(key), str):
                value = as_written(argument.split("=", 1)[1].strip(), value)
        elif argument in switches:
            key, value = argument, True
        else:
            raise SyntaxError(f"'{argument}' is not a valid argument. Arguments are 'key=value', e.g. 'epochs=50'.")
        if key in (own or {}) and key in switches and not isinstance(value, bool):
            raise TypeError(f"'{key}={value}' is of invalid type {type(value).__name__}. Give True or False.")
        parsed[key] = value
    if file := parsed.pop("cfg", None):
        parsed = {**{k: v for k, v in YAML.load(check_yaml(file)).items() if k != "cfg"}, **parsed}
    return parsed
