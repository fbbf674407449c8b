"""Each rule speaks where it should, names the setting to change, and is silent otherwise."""

import math

import pytest
import torch
from ultralytics.utils.distillation.advice import Figures, advise, conclude, jackknife_error, paired_error

LABELS = torch.arange(1000) % 4


def right(share, start=0):
    """Return a network that is right on a share of the images, from one of them on."""
    return (torch.arange(1000) - start) % 1000 < share * 1000


GOOD = {"student": right(0.9), "teacher": right(0.95), "baseline": right(0.8)}


def figures(right=GOOD, **given):
    """Return figures that nothing is to be said about, with changes."""
    chosen = {name: c == LABELS for c, name in enumerate("abcd")}

    def error(a, b, name):
        places = slice(None) if name is None else chosen[name]
        return paired_error(right[a][places], right[b][places])

    score = {who: x.double().mean().item() for who, x in right.items()}
    classes = {name: {who: x[y].double().mean().item() for who, x in right.items()} for name, y in chosen.items()}
    return Figures("top-1", 1000, score, classes, error, **given)


def without(name):
    return {k: v for k, v in GOOD.items() if k != name}


def test_says_nothing_of_a_good_run():
    curve = [0.1, 0.5, 0.8, 0.9, 0.9]
    assert advise(figures(curve=curve, pull={"loss": 0.4, "feature_loss": 0.6}, entropy=0.5, temperature=4.0)) == []
    assert advise(figures({"student": right(0.9)})) == []


WORST = {"student": right(0.9), "teacher": right(0.95) & (LABELS != 2), "baseline": right(0.8)}
CASES = {
    "teacher below the student": (
        {"right": {**without("baseline"), "teacher": right(0.85)}},
        ["85.0% top-1", "90.0%", "`teacher`"],
    ),
    "teacher below a plain student": (
        {"right": {"student": right(0.7), "teacher": right(0.75), "baseline": right(0.65) | right(0.12, 800)}},
        ["75.0%", "77.0%", "a plain student"],
    ),
    "student no better than plain": (
        {"right": {**without("student"), "student": right(0.801)}},
        ["cannot be told", "80.1%", "80.0%", "1,000 images", "`epochs`"],
    ),
    "what can be changed then": (
        {"right": {**without("student"), "student": right(0.801)}, "pull": {"loss": 0.4, "attention_loss": 0.6}},
        ["then change `attention_weight` or `distill_alpha`, or"],
    ),
    "what can be changed always": (
        {"right": {**without("student"), "student": right(0.801)}},
        ["then change `distill_alpha`, or"],
    ),
    "student worse than plain": ({"right": {**without("student"), "student": right(0.7)}}, ["is worse than", "70.0%"]),
    "a class worse than plain": (
        {"right": {**without("student"), "student": (right(0.98)) & ((LABELS != 2) | right(0.5))}},
        ["worse than a plain one at c (50%, 80%)", "`distill_alpha`"],
    ),
    "a class that the teacher does not know": (
        {"right": {k: v for k, v in WORST.items() if k != "baseline"}},
        ["The teacher is worse than the student at c (0%, 90%)"],
    ),
    "one loss": ({"pull": {"loss": 0.05, "feature_loss": 0.95}}, ["`feature_loss` makes 95%", "`feature_weight`"]),
    "the labels": ({"pull": {"loss": 0.92, "response_loss": 0.08}}, ["`loss` makes 92%", "`distill_beta`"]),
    "a method": ({"pull": {"loss": 0.05, "feature_rkd_loss": 0.95}}, ["its share in `feature_method`"]),
    "a response": ({"pull": {"loss": 0.05, "response_loss": 0.95}}, ["its share in `response_method`"]),
    "too hot": ({"entropy": 0.97, "temperature": 9.0}, ["At temperature 9", "97%", "Lower `temperature`"]),
    "too cold": ({"entropy": 0.01, "temperature": 1.0}, ["At temperature 1", "1%", "Raise `temperature`"]),
    "boxes": ({"pull": {"loss": 0.05, "box_distill_loss": 0.95}}, ["Lower `box_weight`"]),
    "rising": ({"curve": [0.1, 0.2, 0.3, 0.4, 0.5]}, ["The top-1 rose by 10.0 points", "`epochs`"]),
}


@pytest.mark.parametrize("case", CASES)
def test_speaks(case):
    given, words = CASES[case]
    said = advise(figures(**given))
    assert any(all(word in finding for word in words) for finding in said), said


@pytest.mark.parametrize(
    "given",
    [
        {"pull": {"loss": 0.11, "feature_loss": 0.89}},
        {"pull": {"loss": 1.0}},  # there is nothing else to lower it for
        {"entropy": 0.94, "temperature": 4.0},
        {"entropy": 0.06, "temperature": 4.0},
        {"entropy": 0.99},  # no response loss, no temperature
        {"curve": [0.1, 0.2, 0.3, 0.4]},  # too few to tell
        {"curve": [math.nan, math.nan, math.nan, math.nan, 0.5]},  # not validated
        {"right": dict.fromkeys(("student", "teacher"), right(1.0))},  # nothing is left to teach
        {"curve": [0.1, 0.2, 0.3, 0.5, 0.4]},
        {"curve": [0.1, 0.2, 0.3, 0.4, 0.404]},
    ],
)
def test_is_silent(given):
    assert advise(figures(**given)) == []


@pytest.mark.parametrize("balanced", [True, False])
def test_what_is_set_already_is_not_advised(balanced):
    (said,) = advise(figures(pull={"loss": 0.05, "feature_loss": 0.95}, balanced=balanced))
    assert ("`distill_balance=auto`" in said) == (not balanced)


def test_paired_lead_is_mcnemars():
    a, b = torch.zeros(1000).bool(), torch.zeros(1000).bool()
    a[:30], b[20:40] = True, True  # 20 right by a alone, 10 by b alone
    f = figures({"student": a, "baseline": b})
    assert f.lead("student", "baseline") == pytest.approx(10 / math.sqrt(30))
    assert f.lead("baseline", "student") == -f.lead("student", "baseline")
    assert f.lead("student", "student") == 0
    assert f.lead("student", "baseline", "c") == pytest.approx((5 - 3) / math.sqrt(8))  # of every fourth image
    assert paired_error(a, a) == 1 / 1000


def test_jackknife_of_a_mean_is_its_standard_error():
    """For a mean of groups it is the closed form, the deviation of the groups by the root of their number."""
    values = torch.tensor([0.3, -0.1, 0.2, 0.5, 0.1]).double()
    without = [(values.sum() - x).item() / 4 for x in values]
    assert jackknife_error(without) == pytest.approx((values.std() / 5**0.5).item())
    assert jackknife_error([0.1, 0.1]) == jackknife_error([0.1]) == jackknife_error([]) == 0


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (0.9, "The teacher helped: +10.0"),
        (0.801, "No difference that these images can show: +0.1"),
        (0.7, "did harm: -10"),
    ],
)
def test_concludes_from_a_plain_run_with_an_interval(student, words):
    verdict = conclude(figures({**GOOD, "student": right(student)}))
    assert words in verdict.headline
    gain, apart = 100 * (student - 0.8), 1000 * abs(student - 0.8)  # so many images tell them apart
    half = 1.96 * 100 * max(1, apart**0.5) / 1000
    assert verdict.gain == pytest.approx(gain)
    assert verdict.interval == pytest.approx((gain - half, gain + half))
    assert verdict.gap_closed == pytest.approx((student - 0.8) / 0.15)
    assert f"{verdict.gap_closed:.0%} of the way to its teacher's 95.0%" in verdict.text
    assert f"95 % interval {gain - half:+.1f} to {gain + half:+.1f} over the 1,000 images" in verdict.text


def test_concludes_nothing_of_the_teacher_without_a_plain_run():
    verdict = conclude(figures(without("baseline")))
    assert verdict.headline == "The student reaches 90.0% top-1, its teacher 95.0%."
    assert "`use_distillation=False`" in verdict.text
    assert (verdict.gain, verdict.interval, verdict.gap_closed) == (None, None, None)
    assert conclude(figures({"student": right(0.9)})).headline == "The student reaches 90.0% top-1."


def test_no_gap_is_closed_where_there_is_none():
    verdict = conclude(figures({**GOOD, "teacher": right(0.8)}))
    assert verdict.gap_closed is None
    assert "of the way" not in verdict.text


def test_an_interval_that_is_not_known_is_not_said():
    f = figures()
    f.error = lambda a, b, name: 0.0
    verdict = conclude(f)
    assert verdict.interval is None
    assert "interval" not in verdict.text
