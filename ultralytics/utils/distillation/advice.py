# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What to try next: rules that read a run's figures and name the setting to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor
from ultralytics.utils.distillation.dense import TERMS

__all__ = ("Figures", "Verdict", "advise", "conclude", "jackknife_error", "paired_error")

DOMINANT = 0.9  # share of the whole pull
UNIFORM, SURE = 0.95, 0.05  # normalized entropy of the softened teacher
RISING = 0.5  # points of the score, from one fifth of the epochs to the next
LIKELY, VERY_LIKELY = 1.96, 2.58  # standard errors of 95 and 99 %, the latter for each of many classes
ARGUMENTS = {  # what sets a loss's weight; of others, a share in `feature_method` or `response_method`
    "loss": "distill_beta",
    "feature_loss": "feature_weight",
    "attention_loss": "attention_weight",
    **{f"{name}_distill_loss": f"{name}_weight" for name in TERMS},
}


@dataclass
class Figures:
    """What was measured of a run, on the same validation images for all networks.

    Attributes:
        words (str): What a score is called, e.g. top-1.
        images (int): The number of images.
        score (Mapping[str, float]): That of `student`, and if known `teacher` and `baseline`, 0 to 1.
        classes (Mapping[str, Mapping[str, float]]): The same on each class, by its name.
        error (Callable): Gives the standard error of the difference between two networks' scores on the same images,
            for their names and that of a class, or None for all of them; 0 where it is not known.
        curve (Sequence[float]): The student's score per epoch, 0 to 1.
        pull (dict[str, float]): Share of each weighted loss in the pull on the student, empty if not measured.
        entropy (float | None): Normalized entropy of the teacher's answers at `temperature`, None without answers.
        temperature (float | None): The response loss's, None if that is off.
        balanced (bool): Whether the losses were balanced by their gradients.
        unlike (Sequence[str]): The training arguments in which the plain run differs, besides its teacher.
        epochs (int | None): Of a run that was stopped, how many it was to have.
    """

    words: str
    images: int
    score: Mapping[str, float]
    classes: Mapping[str, Mapping[str, float]]
    error: Callable[[str, str, str | None], float]
    curve: Sequence[float] = ()
    pull: dict[str, float] = field(default_factory=dict)
    entropy: float | None = None
    temperature: float | None = None
    balanced: bool = False
    unlike: Sequence[str] = ()
    epochs: int | None = None

    def lead(self, a: str, b: str, name: str | None = None) -> float:
        """Return by how many standard errors network `a` is above `b`, on a class or on all of them."""
        scores = self.score if name is None else self.classes[name]
        error = self.error(a, b, name)
        return (scores[a] - scores[b]) / error if error else 0.0


class Verdict(NamedTuple):
    """What a run has come to, in words and figures.

    Attributes:
        headline (str): In a few words.
        text (str): In sentences.
        gain (float | None): Points that the student is above a plain one, None without one.
        interval (tuple[float, float] | None): 95 % interval of the gain over images, if it is known.
        gap_closed (float | None): Share of the way from the plain student to the teacher, None where that is not ahead.
    """

    headline: str
    text: str
    gain: float | None = None
    interval: tuple[float, float] | None = None
    gap_closed: float | None = None


def paired_error(a: Tensor, b: Tensor) -> float:
    """Return the standard error of how much more often `a` is right than `b` on the same images, after McNemar 1947."""
    return max(1.0, (a ^ b).sum().item() ** 0.5) / len(a)


def jackknife_error(without: Sequence[float]) -> float:
    """Return the standard error of a figure, from what it is without each of some groups of images; 0 of less than two.

    The groups are equally large, and all images are in one of them.

    References:
        Efron and Tibshirani 1993, "An Introduction to the Bootstrap", equation 11.5, for groups.
    """
    values, count = np.array(without), len(without)
    return float(((count - 1) / count * np.square(values - values.mean()).sum()) ** 0.5) if count > 1 else 0.0


def conclude(figures: Figures) -> Verdict:
    """Return what a run has come to."""
    verdict = _conclude(figures)
    if figures.epochs is None:
        return verdict
    stopped = f"The run was stopped after epoch {len(figures.curve)} of {figures.epochs}; `resume` goes on with it."
    return verdict._replace(text=f"{stopped} {verdict.text}")


def _conclude(figures: Figures) -> Verdict:
    """Return what a run has come to, or would have if it were at its end."""
    f = figures
    student, teacher, plain = (f.score.get(who) for who in ("student", "teacher", "baseline"))
    if plain is None:
        beside = "" if teacher is None else f", its teacher {teacher:.1%}"
        text = (
            "Nothing says yet what the teacher changed, as there is no plain run to compare with. Train one with "
            "`use_distillation=False` and the same arguments, then write this report again with `yolo-distill report`."
        )
        return Verdict(f"The student reaches {student:.1%} {f.words}{beside}.", text)
    gain, error, lead = 100 * (student - plain), f.error("student", "baseline", None), f.lead("student", "baseline")
    interval = (gain - 196 * error, gain + 196 * error) if error else None
    text = f"The student reaches {student:.1%} {f.words}, a plain one {plain:.1%}: {gain:+.1f} points"
    text += ", 95 % interval {:+.1f} to {:+.1f}".format(*interval) if interval else ""
    text += f" over the {f.images:,} images, for one seed; others differ."
    if f.unlike:
        others = ", ".join(f"`{name}`" for name in f.unlike)
        text += f" The plain run had another {others}, so not all of it is the teacher's work."
    closed = (student - plain) / (teacher - plain) if teacher is not None and teacher > plain else None
    if closed is not None:
        text += f" That is {closed:.0%} of the way to its teacher's {teacher:.1%}."
    if lead > LIKELY:
        headline = f"The teacher helped: {gain:+.1f} points of {f.words}."
    elif lead < -LIKELY:
        headline = f"The teacher did harm: {gain:+.1f} points of {f.words}."
    else:
        headline = f"No difference that these images can show: {gain:+.1f} points of {f.words}."
    return Verdict(headline, text, gain, interval, closed)


def advise(figures: Figures) -> list[str]:
    """Return the findings of all rules, each with its figures and the setting to change."""
    return [finding for rule in RULES if (finding := rule(figures))]


def _teacher_is_no_better(f: Figures) -> str | None:
    """A teacher that is not better has nothing to teach."""
    for other in ("baseline", "student"):
        if {"teacher", other} <= f.score.keys() and f.score["teacher"] <= f.score[other] < 1:
            who = "a plain student" if other == "baseline" else "the student"
            return (
                f"The teacher reaches {f.score['teacher']:.1%} {f.words} on the validation images and {who} "
                f"{f.score[other]:.1%}: it has no more to teach. Give a better `teacher`, or lower `distill_alpha`."
            )
    return None


def _no_better_than_plain(f: Figures) -> str | None:
    """A gain that chance could give is none yet."""
    if "baseline" not in f.score:
        return None
    z = f.lead("student", "baseline")
    if z > LIKELY:
        return None
    said = "is worse than" if z < -LIKELY else "cannot be told from"
    maps = (ARGUMENTS[name] for name in ("feature_loss", "attention_loss") if name in f.pull)
    settings = " or ".join(f"`{name}`" for name in (*maps, "distill_alpha"))
    return (
        f"With {f.score['student']:.1%} {f.words} the distilled student {said} the plain one with "
        f"{f.score['baseline']:.1%}, on {f.images:,} images. Compare several seeds with `yolo-distill compare`, "
        f"then change {settings}, or train for more `epochs`."
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
    if "baseline" in f.score:
        better, worse, said = "baseline", "student", "The student is worse than a plain one"
    elif "teacher" in f.score:
        better, worse, said = "student", "teacher", "The teacher is worse than the student"
    else:
        return None
    harmed = [
        (scores[worse] - scores[better], f"{name} ({scores[worse]:.0%}, {scores[better]:.0%})")
        for name, scores in f.classes.items()
        if f.lead(better, worse, name) > VERY_LIKELY
    ]
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
    if f.epochs is not None or not part or np.isnan(f.curve).any():
        return None
    last, earlier = (100 * np.mean(x) for x in (f.curve[-part:], f.curve[-2 * part : -part]))
    if last - earlier < RISING or int(np.argmax(f.curve)) < len(f.curve) - part:
        return None
    return (
        f"The {f.words} rose by {last - earlier:.1f} points in the last fifth of the epochs. Train for more `epochs`."
    )


RULES: tuple[Callable[[Figures], str | None], ...] = (
    _teacher_is_no_better,
    _no_better_than_plain,
    _classes_are_harmed,
    _one_loss_dominates,
    _temperature_is_extreme,
    _still_rising,
)
