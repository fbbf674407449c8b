# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The charts of a distilled run's report, from plain figures; wide enough for a page, large enough for a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from matplotlib.ticker import MaxNLocator
from ultralytics.utils.distillation.metrics import Calibration

__all__ = (
    "Example",
    "Scene",
    "Seen",
    "draw_calibration",
    "draw_classes",
    "draw_examples",
    "draw_losses",
    "draw_scenes",
    "draw_score",
    "draw_seeds",
)

COLORS = {"student": "tab:blue", "teacher": "0.5", "baseline": "tab:orange"}
MARKERS = {"student": "o", "teacher": "|", "baseline": "x"}
WIDTH = 5  # inches
NAMED = 20  # objects in an image, more of which would cover it with their names


class Example(NamedTuple):
    """An image, and what two networks see in it.

    Attributes:
        image (np.ndarray): RGB or gray, 0 to 1, (H, W, 3) or (H, W, 1).
        label (str): Its class.
        named (Mapping[str, str]): The class that each network names.
        attention (list[tuple[np.ndarray, np.ndarray]]): Attention of student and teacher at each level, (h, w).
    """

    image: np.ndarray
    label: str
    named: Mapping[str, str]
    attention: list[tuple[np.ndarray, np.ndarray]]


class Seen(NamedTuple):
    """An object in an image.

    Attributes:
        name (str): Its class.
        confidence (float | None): How sure a network is of it, None of a label.
        outline (np.ndarray): The corners of its box in pixels, (4, 2).
        mask (np.ndarray | None): Where it is, (h, w) booleans over the whole image.
        points (np.ndarray | None): Its keypoints, (K, 2) in pixels, or (K, 3) with how visible they are.
    """

    name: str
    confidence: float | None
    outline: np.ndarray
    mask: np.ndarray | None = None
    points: np.ndarray | None = None


class Scene(NamedTuple):
    """An image, and the objects that labels and networks see in it.

    Attributes:
        image (np.ndarray): RGB or gray, 0 to 1, (H, W, 3) or (H, W, 1).
        seen (Mapping[str, list[Seen]]): By who sees them.
    """

    image: np.ndarray
    seen: Mapping[str, list[Seen]]


def draw_score(curves: Mapping[str, Sequence[float]], teacher: float | None, axis: str) -> Figure:
    """Draw a score per epoch, 0 to 1, of student and baseline, and the teacher's as a line if it is known."""
    figure, [[axes]] = _figure(WIDTH, 3.5)
    for who, curve in curves.items():
        axes.plot(_epochs(curve), 100 * np.array(curve), "o-", markersize=3, color=COLORS[who], label=who)
    if teacher is not None:
        axes.axhline(100 * teacher, color=COLORS["teacher"], linestyle="--", label="teacher")
    axes.set(ylabel=axis)
    _count_epochs(axes, max(map(len, curves.values())))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    return figure


def draw_losses(losses: Mapping[str, np.ndarray]) -> Figure:
    """Draw the losses per epoch as they are before weighting."""
    figure, [[axes]] = _figure(WIDTH, 3.5)
    for name, values in losses.items():
        axes.plot(_epochs(values), np.where(values > 0, values, np.nan), "o-", markersize=3, label=name)
    axes.set(yscale="log", ylabel="loss, before its weight")
    _count_epochs(axes, max(map(len, losses.values())))
    axes.legend(fontsize="small")
    return figure


def draw_seeds(curves: Mapping[str, Mapping[str, Sequence[float]]], axis: str) -> Figure:
    """Draw a score per epoch, 0 to 1, by variant and seed: a thin line for each, and a thick one for their mean."""
    figure, [[axes]] = _figure(1.4 * WIDTH, 4.5)
    for variant, color in (("plain", COLORS["baseline"]), ("distilled", COLORS["student"])):
        runs = [100 * np.array(curve) for curve in curves[variant].values()]
        for run in runs:
            axes.plot(_epochs(run), run, color=color, linewidth=0.8, alpha=0.5)
        common = min(map(len, runs))
        mean = np.mean([run[:common] for run in runs], axis=0)
        label = f"{variant}, mean of {len(runs)} seeds"
        axes.plot(_epochs(mean), mean, "o-", markersize=3, color=color, label=label)
    axes.set(ylabel=axis)
    _count_epochs(axes, max(len(run) for by_seed in curves.values() for run in by_seed.values()))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    return figure


def draw_classes(rows: Sequence[Mapping[str, Any]], networks: Sequence[str], axis: str) -> Figure:
    """Draw each network's score, 0 to 1, on classes, a line for each, the student's worst at the bottom."""
    rows = sorted(rows, key=lambda row: row["student"])
    figure, [[axes]] = _figure(WIDTH, 1.2 + 0.25 * len(rows))
    for who in networks:
        x = [100 * row[who] for row in rows]
        axes.plot(x, range(len(rows)), MARKERS[who], color=COLORS[who], label=who, markersize=7, markeredgewidth=2)
    names = [_short(row["name"], 24) for row in rows]
    axes.set(xlabel=axis, yticks=range(len(rows)), yticklabels=names)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def draw_calibration(calibrations: Mapping[str, Calibration]) -> Figure:
    """Draw a reliability diagram: accuracy against confidence, the larger a dot the more images it stands for."""
    figure, [[axes]] = _figure(WIDTH, WIDTH)
    axes.plot([0, 1], [0, 1], color="0.8")
    for who, measured in calibrations.items():
        filled = measured.count > 0
        x, y, size = (v[filled] for v in (measured.confidence, measured.accuracy, measured.count))
        axes.plot(x, y, color=COLORS[who], alpha=0.5)
        label = f"{who}, error {100 * measured.error:.1f} %"
        axes.scatter(x, y, 5 + 150 * size / size.sum(), color=COLORS[who], label=label)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(loc="upper left")
    return figure


def draw_examples(examples: Sequence[Example], strides: Sequence[int]) -> Figure:
    """Draw images, a row for each, and over them where student and teacher look at every level."""
    columns = 1 + 2 * len(strides)
    figure, axes = _figure(1.5 * columns, 1.9 * len(examples), len(examples), columns)
    for row, example in zip(axes, examples, strict=True):
        height, width = example.image.shape[:2]
        row[0].imshow(example.image, cmap="gray")
        lines = [f"{who}: {_short(name, 16)}" for who, name in {"label": example.label, **example.named}.items()]
        row[0].set_title("\n".join(lines), fontsize=8)
        for i, (stride, pair) in enumerate(zip(strides, example.attention, strict=True)):
            for j, (who, attention) in enumerate(zip(("student", "teacher"), pair, strict=True)):
                cell = row[1 + 2 * i + j]
                cell.imshow(example.image.mean(2), cmap="gray", extent=(0, width, height, 0))
                cell.imshow(attention, cmap="inferno", alpha=0.6, extent=(0, width, height, 0), vmin=0)
                cell.set_title(f"{who}\nstride {stride}", fontsize=8)
        for cell in row:
            cell.set_axis_off()
    return figure


def draw_scenes(scenes: Sequence[Scene]) -> Figure:
    """Draw images, a row for each, with the objects that labels and each network see, a class in one color."""
    columns = len(scenes[0].seen)
    figure, axes = _figure(3 * columns, 3.2 * len(scenes), len(scenes), columns)
    names = sorted({x.name for scene in scenes for seen in scene.seen.values() for x in seen})
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    for row, scene in zip(axes, scenes, strict=True):
        height, width = scene.image.shape[:2]
        for cell, (who, seen) in zip(row, scene.seen.items(), strict=True):
            cell.imshow(scene.image, cmap="gray", vmin=0, vmax=1)
            cell.set_title(f"{who}: {len(seen)}", fontsize=9)
            for x in seen:
                _draw_object(cell, x, colors[x.name], (0, width, height, 0), named=len(seen) <= NAMED)
            cell.set(xlim=(0, width), ylim=(height, 0))
            cell.set_axis_off()
    return figure


def _draw_object(axes: Axes, seen: Seen, color: str, extent: tuple[int, int, int, int], named: bool) -> None:
    """Draw an object's box and, as far as there are, its mask, its visible keypoints and its name."""
    axes.add_patch(Polygon(seen.outline, fill=False, edgecolor=color, linewidth=1.2))
    if seen.mask is not None:
        axes.imshow(seen.mask[..., None] * np.array(to_rgba(color, 0.4)), extent=extent)
    if seen.points is not None:
        visible = seen.points[seen.points[:, 2] > 0.5] if seen.points.shape[1] == 3 else seen.points
        axes.plot(visible[:, 0], visible[:, 1], ".", color=color, markersize=4, markeredgecolor="white")
    if named:
        text = _short(seen.name, 16) + ("" if seen.confidence is None else f" {seen.confidence:.2f}")
        x, y = seen.outline.min(0)
        axes.text(x, y, text, color="white", fontsize=6, clip_on=True, bbox={"fc": color, "lw": 0, "pad": 0.5})


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """Return a figure of its own, which no other part of the program draws in, and its axes by row and column."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _count_epochs(axes: Axes, epochs: int) -> None:
    """Name the horizontal axis and give it whole numbers, for a single epoch too."""
    axes.set(xlabel="epoch", xlim=(0.5, epochs + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _epochs(values: Sequence[float]) -> range:
    return range(1, len(values) + 1)


def _short(name: str, most: int) -> str:
    """Return a name cut short, and no formula, which matplotlib reads between dollars."""
    return (name if len(name) <= most else f"{name[: most - 1]}…").replace("$", r"\$")
