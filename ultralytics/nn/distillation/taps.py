# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Feature levels: find the maps that two networks share, and read them with forward hooks."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Classify, Detect, RTDETRDecoder

__all__ = ("FeatureLevel", "FeatureTaps", "find_levels", "match_levels")

MIN_STRIDE = 8  # below it, maps hold edges and colours, and cost most
HEADS = {"head", "heads", "aux_head", "classifier", "fc"}  # as TorchVision and timm name them
MAX_PREFIX = 16  # class and register tokens before those of the image; more than any known transformer has


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

    def as_map(self, output: Tensor) -> Tensor:
        """Return the module's output as a (B, c, h, w) map.

        Args:
            output (Tensor): A (B, c, h, w) map, a (B, h, w, c) map as of Swin, or (B, n, c) tokens as of a ViT, of
                which those before the last h*w, the class token among them, are dropped.
        """
        if output.ndim == 3:
            return output[:, -self.height * self.width :].transpose(1, 2).unflatten(2, (self.height, self.width))
        return output if output.shape[1] == self.channels else output.permute(0, 3, 1, 2)


class FeatureTaps:
    """Forward hooks that keep the outputs of chosen modules until they are taken."""

    class Complete(Exception):
        """Ends a forward pass whose other modules are not needed."""

    def __init__(self, model: nn.Module, levels: Sequence[FeatureLevel], stop: bool = False):
        """Hook the modules of a model.

        Args:
            model (nn.Module): Network to read.
            levels (Sequence[FeatureLevel]): Feature levels, in the order wanted from `take`.
            stop (bool): Raise `Complete` in a forward pass once it has computed all levels.
        """
        self.levels = tuple(levels)
        self.stop = stop
        self._outputs: dict[str, Tensor] = {}
        self._handles = [
            model.get_submodule(name).register_forward_hook(self._keep(name)) for name in {x.name for x in levels}
        ]

    def _keep(self, name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            self._outputs[name] = output
            if self.stop and len(self._outputs) == len(self._handles):
                raise self.Complete

        return hook

    def take(self) -> list[Tensor]:
        """Return the (B, c, h, w) maps of the last forward pass in the order of `levels`, and forget them."""
        maps = [level.as_map(self._outputs[level.name]) for level in self.levels]
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
    """List a network's feature maps below its head, in the order in which they are computed.

    One forward pass of two blank images in eval mode; weights, buffers, modes and random state stay as they were.

    Args:
        model (nn.Module): A convolutional network or a transformer.
        imgsz (int): Side of the square input in pixels.
        channels (int): Input channels.

    Returns:
        (dict[str, FeatureLevel]): Levels by dotted module name. A module comes after the modules that it contains.
    """
    levels: dict[str, FeatureLevel] = {}
    runs: Counter[str] = Counter()
    sides: set[int] = set()  # of the maps so far, the grids that tokens may lie on

    def hook_for(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            shape = _map_shape(output, sides)
            if shape:
                runs[name] += 1
                c, h, w = shape
                sides.add(h)
                levels[name] = FeatureLevel(name, round(imgsz / h), c, h, w)

        return hook

    modes = [(m, m.training) for m in model.modules()]
    heads = {
        n
        for n, m in model.named_modules()
        if n.rpartition(".")[2] in HEADS or isinstance(m, (Classify, Detect, RTDETRDecoder))
    }
    handles = [
        m.register_forward_hook(hook_for(name))
        for name, m in model.named_modules()
        if name
        and heads.isdisjoint(_containers(name) + [name])
        and next(m.parameters(), None) is not None  # poolings, activations and reshapings learn no map
    ]
    weight = next(model.parameters(), torch.zeros(0))  # there may be none
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(2, channels, imgsz, imgsz, device=weight.device, dtype=weight.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    # A module that runs more than once, as a shared activation does, has no output of its own
    return {name: level for name, level in levels.items() if runs[name] == 1}


def is_channels_last(shape: Sequence[int]) -> bool:
    """Tell whether maps of square images are of shape (B, h, w, c) instead of (B, c, h, w)."""
    _, rows, columns, last = shape
    return rows == columns != last


def _map_shape(output: Any, sides: set[int]) -> tuple[int, int, int] | None:
    """Return (c, h, w) if the answer to two square images is a square map or the tokens of one, else None."""
    if not isinstance(output, Tensor) or output.ndim not in {3, 4} or len(output) != 2:
        return None
    if output.ndim == 4:
        _, c, h, w = output.shape
        if is_channels_last(output.shape):
            c, h, w = w, c, h
        return (c, h, w) if h == w else None
    _, tokens, c = output.shape
    fitting = [side for side in sides if 0 <= tokens - side**2 <= MAX_PREFIX]
    side = max(fitting, default=math.isqrt(tokens))
    return (c, side, side) if fitting or side**2 == tokens else None


def match_levels(
    student: dict[str, FeatureLevel],
    teacher: dict[str, FeatureLevel],
    layers: tuple[Sequence[int | str], Sequence[int | str]] | None = None,
) -> list[tuple[FeatureLevel, FeatureLevel]]:
    """Pair the feature levels of two networks.

    By itself: the last of the outermost maps at each stride from 8 on, paired by stride. For YOLO classifiers those are
    the last layers before each down-sampling and before the head.

    Args:
        student (dict[str, FeatureLevel]): The student's maps, from `find_levels`.
        teacher (dict[str, FeatureLevel]): The teacher's maps, from `find_levels`.
        layers (tuple[Sequence[int | str], Sequence[int | str]], optional): The student's and the teacher's layers to
            pair instead, as indices into an Ultralytics model or dotted module names.

    Returns:
        (list[tuple[FeatureLevel, FeatureLevel]]): (student, teacher) levels in the student's order, the finest first.

    Raises:
        ValueError: If a named layer has no feature map, or the networks share no stride.
    """
    if layers is not None:
        order = {name: i for i, name in enumerate(student)}
        pairs = [(_layer(student, i, "student"), _layer(teacher, j, "teacher")) for i, j in zip(*layers, strict=True)]
        return sorted(pairs, key=lambda pair: order[pair[0].name])
    by_stride = [_by_stride(levels) for levels in (student, teacher)]
    shared = sorted(by_stride[0].keys() & by_stride[1].keys())
    if not shared:
        raise ValueError(
            f"Student and teacher share no feature stride: the student has {sorted(by_stride[0])}, the teacher "
            f"{sorted(by_stride[1])}. Pair layers with 'distill_layers', or set 'feature_distill=False' and "
            f"'attention_distill=False'."
        )
    return [(by_stride[0][stride], by_stride[1][stride]) for stride in shared]


def _by_stride(levels: dict[str, FeatureLevel]) -> dict[int, FeatureLevel]:
    """Return the last of the outermost maps at each stride, as an inner one may belong to the next stage already."""

    def depth(level: FeatureLevel) -> int:  # in how many other maps it lies
        return len(levels.keys() & set(_containers(level.name)))

    chosen: dict[int, FeatureLevel] = {}
    for level in levels.values():
        if level.stride >= MIN_STRIDE and depth(level) <= depth(chosen.get(level.stride, level)):
            chosen[level.stride] = level
    return chosen


def _containers(name: str) -> list[str]:
    """Return the modules that a module lies in, from its dotted name."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _layer(levels: dict[str, FeatureLevel], layer: int | str, who: str) -> FeatureLevel:
    """Return the level of a numbered or named layer."""
    name = f"model.{layer}" if isinstance(layer, int) else layer
    if name in levels:
        return levels[name]
    numbered = [int(n.split(".")[1]) for n in levels if n.startswith("model.") and n.count(".") == 1]
    if isinstance(layer, int) and numbered:
        raise ValueError(f"'distill_layers' names layer {layer}, but the {who} has feature maps at layers {numbered}.")
    near = difflib.get_close_matches(name, levels, 3) or [x.name for x in _by_stride(levels).values()]
    raise ValueError(f"'distill_layers' names layer '{layer}', but the {who}'s feature maps are named like {near}.")
