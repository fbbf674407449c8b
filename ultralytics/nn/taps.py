# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Feature levels: find the maps that two networks share, and read them with forward hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ("FeatureLevel", "FeatureTaps", "find_levels", "match_levels")

MIN_STRIDE = 8  # below it, maps hold edges and colours, and cost most


class FeatureLevel(NamedTuple):
    """One feature map of a network: where it comes from and what shape it has for one image."""

    name: str  # dotted module name
    stride: int  # input pixels per position
    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        """Return the level as `name CxHxW`."""
        return f"{self.name.removeprefix('model.')} {self.channels}x{self.height}x{self.width}"


class FeatureTaps:
    """Forward hooks that keep the outputs of chosen modules until they are taken."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        """Hook the named modules of a model.

        Args:
            model (nn.Module): Network to read.
            names (Sequence[str]): Dotted module names, in the order wanted from `take`.
        """
        self.names = tuple(names)
        self._outputs: dict[str, Tensor] = {}
        self._handles = [model.get_submodule(name).register_forward_hook(self._keep(name)) for name in set(names)]

    def _keep(self, name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            self._outputs[name] = output

        return hook

    def take(self) -> list[Tensor]:
        """Return the maps of the last forward pass in the order of `names`, and forget them."""
        maps = [self._outputs[name] for name in self.names]
        self.clear()
        return maps

    def clear(self) -> None:
        """Forget the maps of a forward pass that came to nothing, and with them its graph."""
        self._outputs.clear()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self.clear()


def find_levels(model: nn.Module, imgsz: int, channels: int = 3) -> dict[str, FeatureLevel]:
    """List a classifier's feature maps below its head, in the order in which they are computed.

    One forward pass of a blank image in eval mode; weights, buffers, modes and random state stay as they were.

    Args:
        model (nn.Module): An Ultralytics classification model, whose `model` attribute is a sequence of layers.
        imgsz (int): Side of the square input in pixels.
        channels (int): Input channels.

    Returns:
        (dict[str, FeatureLevel]): Levels by dotted module name. A module comes after the modules that it contains.
    """
    levels: dict[str, FeatureLevel] = {}
    runs: Counter[str] = Counter()
    head = f"model.{len(model.model) - 1}"

    def hook_for(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                runs[name] += 1
                _, c, h, w = output.shape
                levels[name] = FeatureLevel(name, round(imgsz / h), c, h, w)

        return hook

    modes = [(m, m.training) for m in model.modules()]
    handles = [
        m.register_forward_hook(hook_for(name))
        for name, m in model.named_modules()
        if name and name != head and not name.startswith(f"{head}.")
    ]
    weight = next(model.parameters())
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, channels, imgsz, imgsz, device=weight.device, dtype=weight.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    # A module that runs more than once, as a shared activation does, has no output of its own
    return {name: level for name, level in levels.items() if runs[name] == 1}


def match_levels(
    student: dict[str, FeatureLevel],
    teacher: dict[str, FeatureLevel],
    layers: tuple[Sequence[int], Sequence[int]] | None = None,
) -> list[tuple[FeatureLevel, FeatureLevel]]:
    """Pair the feature levels of two networks.

    By itself: the last of the outermost modules at each stride from 8 on, paired by stride. For YOLO classifiers those
    are the last layers before each down-sampling and before the head.

    Args:
        student (dict[str, FeatureLevel]): The student's maps, from `find_levels`.
        teacher (dict[str, FeatureLevel]): The teacher's maps, from `find_levels`.
        layers (tuple[Sequence[int], Sequence[int]], optional): The student's and the teacher's layer indices to pair
            instead.

    Returns:
        (list[tuple[FeatureLevel, FeatureLevel]]): (student, teacher) levels, finest first.

    Raises:
        ValueError: If a named layer has no feature map, or the networks share no stride.
    """
    if layers is not None:
        return [(_layer(student, i, "student"), _layer(teacher, j, "teacher")) for i, j in zip(*layers, strict=True)]
    by_stride = [_by_stride(levels.values()) for levels in (student, teacher)]
    shared = sorted(by_stride[0].keys() & by_stride[1].keys())
    if not shared:
        raise ValueError(
            f"Student and teacher share no feature stride: the student has {sorted(by_stride[0])}, the teacher "
            f"{sorted(by_stride[1])}. Pair layers with 'distill_layers', or set 'feature_distill=False' and "
            f"'attention_distill=False'."
        )
    return [(by_stride[0][stride], by_stride[1][stride]) for stride in shared]


def _by_stride(levels: Iterable[FeatureLevel]) -> dict[int, FeatureLevel]:
    """Return the last of the outermost levels at each stride, as an inner one may belong to the next stage already."""
    chosen: dict[int, FeatureLevel] = {}
    for level in levels:
        depth = level.name.count(".")
        if level.stride >= MIN_STRIDE and depth <= chosen.get(level.stride, level).name.count("."):
            chosen[level.stride] = level
    return chosen


def _layer(levels: dict[str, FeatureLevel], index: int, who: str) -> FeatureLevel:
    """Return the level of a numbered layer."""
    if (name := f"model.{index}") not in levels:
        valid = [int(n.split(".")[1]) for n in levels if n.count(".") == 1]
        raise ValueError(f"'distill_layers' names layer {index}, but the {who} has feature maps at layers {valid}.")
    return levels[name]
