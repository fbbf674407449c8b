# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The distillation arguments: every parameter, the values that it takes, and command lines that give them."""

from ultralytics.cfg.distillation.arguments import DistillationArgs
from ultralytics.cfg.distillation.command_line import parse_arguments
from ultralytics.cfg.distillation.values import as_list, read_strings

__all__ = ("DistillationArgs", "as_list", "parse_arguments", "read_strings")
