"""The registry of methods: what is registered is chosen as it was meant, called with what it wants, or refused."""

import math

import pytest
import torch
from torch import nn
from ultralytics.utils.distillation import feature_method, methods, registry, response_method
from ultralytics.utils.distillation.registry import choose

RESPONSE, FEATURE = "response_method", "feature_method"
S, T = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])


@pytest.fixture(autouse=True)
def _own_methods(monkeypatch):
    """A registry that holds these alone, so that no test depends on the methods that there are."""
    monkeypatch.setattr(registry, "_METHODS", {RESPONSE: {}, FEATURE: {}})

    @response_method("soft", weight=3.0)
    def soft(student, teacher, temperature):
        return temperature * (student - teacher).sum()

    @response_method("sharp", temperature=2.0)
    def sharp(student, teacher, labels, temperature, *, alpha=0.5, beta=8, squared=False):
        return torch.tensor([temperature, alpha, beta, float(squared), float(labels.sum())])

    @response_method("plain")
    def plain(student, teacher):
        return (student - teacher).sum()

    @response_method("around")
    def around(student, teacher, labels=None, *, method="soft"):
        return student.sum()

    @feature_method("maps", weight=50.0, adapter=nn.Linear, last=True)
    def maps(student, teacher, classify, *, angle=1.0):
        return classify(student) * angle


def chosen(argument, value):
    return [(choice.method.name, choice.share, choice.settings) for choice in choose(argument, value)]


def test_a_method_has_the_properties_that_it_was_registered_with():
    soft, sharp, maps = methods(RESPONSE)["soft"], methods(RESPONSE)["sharp"], methods(FEATURE)["maps"]
    assert (soft.name, soft.weight, soft.temperature, soft.adapter, soft.last) == ("soft", 3.0, None, None, False)
    assert (sharp.weight, sharp.temperature) == (1.0, 2.0)
    assert (maps.weight, maps.adapter, maps.last) == (50.0, nn.Linear, True)


def test_each_argument_has_methods_of_its_own():
    assert list(methods(RESPONSE)) == ["soft", "sharp", "plain", "around"]
    assert list(methods(FEATURE)) == ["maps"]
    with pytest.raises(ValueError, match="'feature_method=soft' is not known"):
        choose(FEATURE, "soft")


@pytest.mark.parametrize(("register", "argument"), [(response_method, RESPONSE), (feature_method, FEATURE)])
def test_registering_leaves_the_function_as_it_is_and_replaces_one_of_the_same_name(register, argument):
    def first(student, teacher):
        return 1

    def second(student, teacher):
        return 2

    for function in (first, second):
        assert register("mine")(function) is function
        assert choose(argument, "mine")[0](S, T) == function(S, T)


def test_the_methods_that_are_listed_are_a_copy():
    methods(RESPONSE).clear()
    assert "soft" in methods(RESPONSE)


def test_the_signature_says_what_a_method_wants_and_what_can_be_set():
    sharp = methods(RESPONSE)["sharp"]
    assert sharp.context == {"labels", "temperature"}
    assert sharp.defaults == {"alpha": 0.5, "beta": 8, "squared": False}
    assert (methods(RESPONSE)["plain"].context, methods(RESPONSE)["plain"].defaults) == (frozenset(), {})
    assert methods(FEATURE)["maps"].context == {"classify"}


@pytest.mark.parametrize("register", [response_method, feature_method])
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda student, teacher, *, size: 0, "'size' of method 'bad' needs a default that is a number"),
        (lambda student, teacher, *, size=None: 0, "'size' of method 'bad' needs a default that is a number"),
        (lambda student, teacher, *, sizes=(1, 2): 0, "'sizes' of method 'bad' needs a default"),
        (lambda student, teacher, *, weight=1.0: 0, "another name than 'weight'"),
    ],
)
def test_hyper_parameters_that_cannot_be_given_are_refused(function, words, register):
    with pytest.raises(TypeError, match=words):
        register("bad")(function)
    assert "bad" not in {*methods(RESPONSE), *methods(FEATURE)}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain", [("plain", 1.0, {})]),
        ({"plain": 2}, [("plain", 2, {})]),
        ({"sharp": 0.5, "plain": 1.0}, [("sharp", 0.5, {}), ("plain", 1.0, {})]),
        ({"plain": 0, "sharp": 1}, [("sharp", 1, {})]),  # a share of 0 is none
        ({"plain": {"weight": 0.0}}, []),
        ({}, []),
        ({"sharp": {"alpha": 0, "squared": True}}, [("sharp", 1.0, {"alpha": 0, "squared": True})]),
        ({"sharp": {"weight": 0.5, "beta": 2.5}}, [("sharp", 0.5, {"beta": 2.5})]),
        ({"soft": {"temperature": 3}}, [("soft", 1.0, {"temperature": 3})]),  # whoever asks for one may be given one
        ({"around": {"method": {"sharp": {"alpha": 1}}}}, [("around", 1.0, {"method": {"sharp": {"alpha": 1}}})]),
    ],
    ids=str,
)
def test_values_are_read(value, expected):
    assert chosen(RESPONSE, value) == expected


def test_what_was_given_is_left_alone():
    given = {"sharp": {"weight": 0.5, "alpha": 1}}
    first = chosen(RESPONSE, given)
    assert given == {"sharp": {"weight": 0.5, "alpha": 1}}
    assert chosen(RESPONSE, given) == first


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("sofd", r"'response_method=sofd' is not known, but 'soft' is\. Valid methods are \['around', 'plain', "),
        ({"plain": 1, "shrap": 1}, "'response_method=shrap' is not known, but 'sharp' is"),
        ("maps", r"'response_method=maps' is not known\. Valid methods are \['around', 'plain', 'sharp', 'soft'\]"),
        (
            {"sharp": {"alhpa": 1}},
            r"'response_method=sharp' has no hyper-parameter 'alhpa'\. It has \['alpha', 'beta', ",
        ),
        # It has no use of one
        ({"plain": {"temperature": 1}}, r"no hyper-parameter 'temperature'\. It has \['weight'\]"),
        ({"plain": {"weigth": 0}}, "no hyper-parameter 'weigth'"),
        ({"around": {"method": "no"}}, "'response_method=no' is not known"),
        ({"around": {"method": {}}}, r"'response_method=around: method=\{\}' leaves no method .*e\.g\. soft"),
        ({"around": {"method": {"plain": 0}}}, "leaves no method with a share above 0"),
    ],
)
def test_names_that_are_not_known_are_refused(value, words):
    with pytest.raises(ValueError, match=words):
        choose(RESPONSE, value)


@pytest.mark.parametrize("number", [-1, -1e-9, math.inf, math.nan])
@pytest.mark.parametrize("value", [lambda x: {"plain": x}, lambda x: {"sharp": {"alpha": x}}], ids=["share", "alpha"])
def test_numbers_out_of_range_are_refused(value, number):
    with pytest.raises(ValueError, match=f"={number}' is an invalid value. Give a finite number, not negative"):
        choose(RESPONSE, value(number))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"plain": True}, "'response_method=plain: weight=True' is of invalid type bool. Give a number, e.g. 1.0"),
        ({"plain": "1"}, "weight=1' is of invalid type str. Give a number"),
        ({"plain": None}, "weight=None' is of invalid type NoneType"),
        ({"sharp": {"beta": False}}, r"'response_method=sharp: beta=False' is of invalid type bool.*e\.g\. 8"),
        ({"sharp": {"alpha": "x"}}, "invalid type str"),
        ({"sharp": {"squared": 1}}, r"'response_method=sharp: squared=1' is of invalid type int\. Give True or False"),
        ({"around": {"method": 1}}, r"invalid type int\. Give a name or a dict of names"),
        ({"around": {"method": None}}, "Give a name or a dict of names"),
    ],
)
def test_values_of_another_type_are_refused(value, words):
    with pytest.raises(TypeError, match=words):
        choose(RESPONSE, value)


def test_only_a_temperature_must_not_be_zero():
    with pytest.raises(ValueError, match="'response_method=soft: temperature=0' is an invalid value"):
        choose(RESPONSE, {"soft": {"temperature": 0}})
    assert chosen(RESPONSE, {"sharp": {"alpha": 0, "beta": 0.0}}) == [("sharp", 1.0, {"alpha": 0, "beta": 0.0})]


@pytest.mark.parametrize(
    ("value", "training", "own"),
    [
        ("soft", 4.0, 4.0),
        ({"soft": {"temperature": 3}}, 4.0, 3),
        ("sharp", 4.0, 2.0),  # its paper's, whatever the training's
        ({"sharp": {"temperature": 3}}, 4.0, 3),
        ("plain", 4.0, None),
    ],
)
def test_the_temperature_is_what_was_given_or_the_methods_own_or_the_trainings(value, training, own):
    (choice,) = choose(RESPONSE, value)
    assert choice.temperature(training) == own
    answer = choice(S, T, labels=torch.tensor([1]), temperature=training)
    assert answer.flatten()[0].item() == {"soft": -5 * (own or 0), "sharp": own, "plain": -5}[choice.method.name]


def test_a_method_is_called_with_what_it_wants_and_what_was_set():
    (choice,) = choose(RESPONSE, {"sharp": {"beta": 3, "squared": True}})
    known = {"labels": torch.tensor([1, 2]), "temperature": 4.0, "classify": None}
    assert choice(S, T, **known).tolist() == [2.0, 0.5, 3.0, 1.0, 3.0]
    (choice,) = choose(FEATURE, {"maps": {"angle": 2}})
    assert choice(S, T, classify=lambda x: x + 1, labels=None).tolist() == [[4.0, 6.0]]


@pytest.mark.parametrize(
    ("value", "needs"),
    [
        ("plain", False),
        ("sharp", True),
        ("around", False),  # whose own `labels` are those of the method that it calls
        ({"around": {"method": "sharp"}}, True),
        ({"around": {"method": {"soft": 1, "sharp": 0.5}}}, True),
        ({"around": {"method": {"soft": 1, "sharp": 0}}}, False),
        ({"around": {"method": {"around": {"method": "sharp"}}}}, True),
    ],
    ids=str,
)
def test_labels_are_needed_by_who_looks_at_them(value, needs):
    assert choose(RESPONSE, value)[0].needs_labels == needs
    assert not choose(FEATURE, "maps")[0].needs_labels
