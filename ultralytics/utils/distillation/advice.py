# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What to try next: rules that read a run's figures and name the setting to change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

__all__ = ("Figures", "advise", "paired_z")

DOMINANT = 0.9  # share of the whole pull
UNIFORM, SURE = 0.95, 0.05  # normalized entropy of the softened teacher
RISING = 0.5  # points of top-1, from one fifth of the epochs to the next
LIKELY, VERY_LIKELY = 1.96, 2.58  # standard errors of 95 and 99 %, the latter for each of many classes
ARGUMENTS = {  # what sets a loss's weight; of others, a share in `feature_method` or `response_method`
    "loss": "distill_beta",
    "feature_loss": "feature_weight",
    "attention_loss": "attention_weight",
}


@dataclass
class Figures:
    """What was measured of a run, on the same N validation images for all networks.

    Attributes:
        labels (Tensor): Class indices, (N,).
        names (Sequence[str]): Class names by index.
        right (dict[str, Tensor]): Whether `student`, and if known `teacher` and `baseline`, named each image rightly,
            (N,) booleans.
        curve (Sequence[float]): Top-1 accuracy per epoch, 0 to 1.
        pull (dict[str, float]): Share of each weighted loss in the pull on the student, empty if not measured.
        entropy (float | None): Normalized entropy of the teacher's answers at `temperature`, None without answers.
        temperature (float | None): The response loss's, None if that is off.
        balanced (bool): Whether the losses were balanced by their gradients.
    """

    labels: Tensor
    names: Sequence[str]
    right: dict[str, Tensor]
    curve: Sequence[float] = ()
    pull: dict[str, float] = field(default_factory=dict)
    entropy: float | None = None
    temperature: float | None = None
    balanced: bool = False

    def top1(self, who: str) -> float:
        """Return a network's accuracy, 0 to 1."""
        return self.right[who].double().mean().item()


def paired_z(a: Tensor, b: Tensor) -> float:
    """Return by how many standard errors `a` is right more often than `b` on the same images, after McNemar 1947."""
    only_a, only_b = (a & ~b).sum().item(), (b & ~a).sum().item()
    return (only_a - only_b) / max(1.0, (only_a + only_b) ** 0.5)


def advise(figures: Figures) -> list[str]:
    """Return the findings of all rules, each with its figures and the setting to change."""
    return [finding for rule in RULES if (finding := rule(figures))]


def _teacher_is_no_better(f: Figures) -> str | None:
    """A teacher that is not better has nothing to teach."""
    for other in ("baseline", "student"):
        if {"teacher", other} <= f.right.keys() and f.top1("teacher") <= f.top1(other) < 1:
            who = "a plain student" if other == "baseline" else "the student"
            return (
                f"The teacher names {f.top1('teacher'):.1%} of the validation images correctly and {who} "
                f"{f.top1(other):.1%}: it has no more to teach. Give a better `teacher`, or lower `distill_alpha`."
            )
    return None


def _no_better_than_plain(f: Figures) -> str | None:
    """A gain that chance could give is none yet."""
    if "baseline" not in f.right:
        return None
    z = paired_z(f.right["student"], f.right["baseline"])
    if z > LIKELY:
        return None
    said = "is worse than" if z < -LIKELY else "cannot be told from"
    return (
        f"With {f.top1('student'):.1%} the distilled student {said} the plain one with {f.top1('baseline'):.1%}, on "
        f"{len(f.labels):,} images. Compare several seeds with `python train.py compare`, then change one of "
        f"`feature_weight`, `distill_alpha` and `response_method`, or train for more `epochs`."
    )


def _one_loss_dominates(f: Figures) -> str | None:
    """What pulls much more than all else makes the rest pointless."""
    name = max(f.pull, key=f.pull.get, default=None)
    if len(f.pull) < 2 or f.pull[name] < DOMINANT:
        return None
    method = "response_method" if name.startswith("response") else "feature_method"
    setting = f"`{ARGUMENTS[name]}`" if name in ARGUMENTS else f"its share in `{method}`"
    return f"`{name}` makes {f.pull[name]:.0%} of the gradient where all losses meet. Lower {setting}" + (
        "." if f.balanced else ", or set `distill_balance=auto`."
    )


def _temperature_is_extreme(f: Figures) -> str | None:
    """Answers that are all alike, or all sure, say nothing about how classes resemble each other."""
    if f.entropy is None or f.temperature is None or SURE <= f.entropy <= UNIFORM:
        return None
    how, mend = ("all alike", "Lower") if f.entropy > UNIFORM else ("sure of one class", "Raise")
    return (
        f"At temperature {f.temperature:g} the teacher's answers are nearly {how}: their entropy is {f.entropy:.0%} of "
        f"the most there can be. {mend} `temperature`."
    )


def _classes_are_harmed(f: Figures) -> str | None:
    """A teacher can be good on the whole, and bad at a class."""
    if "baseline" in f.right:
        better, worse, said = "baseline", "student", "The student is worse than a plain one"
    elif "teacher" in f.right:
        better, worse, said = "student", "teacher", "The teacher is worse than the student"
    else:
        return None
    harmed = []
    for c in f.labels.unique().tolist():
        chosen = f.labels == c
        if paired_z(f.right[better][chosen], f.right[worse][chosen]) > VERY_LIKELY:
            a, b = (f.right[who][chosen].double().mean().item() for who in (worse, better))
            harmed.append((a - b, f"{f.names[c]} ({a:.0%}, {b:.0%})"))
    if not harmed:
        return None
    shown = [text for _, text in sorted(harmed)[:5]]
    more = f" and {len(harmed) - 5} more" if len(harmed) > 5 else ""
    return (
        f"{said} at {', '.join(shown)}{more}. Train the `teacher` on more images of such classes, or lower "
        f"`distill_alpha`."
    )


def _still_rising(f: Figures) -> str | None:
    """What has not levelled off was stopped too early."""
    part = len(f.curve) // 5
    if not part or np.isnan(f.curve).any():
        return None
    last, earlier = (100 * np.mean(x) for x in (f.curve[-part:], f.curve[-2 * part : -part]))
    if last - earlier < RISING or int(np.argmax(f.curve)) < len(f.curve) - part:
        return None
    return f"Accuracy rose by {last - earlier:.1f} points in the last fifth of the epochs. Train for more `epochs`."


RULES: tuple[Callable[[Figures], str | None], ...] = (
    _teacher_is_no_better,
    _no_better_than_plain,
    _classes_are_harmed,
    _one_loss_dominates,
    _temperature_is_extreme,
    _still_rising,
)
