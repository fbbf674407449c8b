# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Distillation methods by name: how they are registered, and how they are chosen."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ("Choice", "Method", "choose", "feature_method", "methods", "response_method")

_METHODS: dict[str, dict[str, Method]] = {"response_method": {}, "feature_method": {}}


@dataclass(frozen=True)
class Method:
    """A loss function with what has to be known to call it.

    Attributes:
        name (str): Name to choose it by.
        function (Callable): The loss, see `response_method` and `feature_method`.
        weight (float): Weight beside a response loss of 1, its paper's where there is one.
        temperature (float | None): Its own softening temperature; None for that of the training.
        adapter (Callable | None): Makes a module from the student's and the teacher's channels.
        last (bool): Whether only the last feature level is compared.
        standardize (bool): Whether it sees the teacher's maps standardized, see `features.standardize`.
        of (str): What has the logits that it compares, "images" or "anchors".
        context (frozenset[str]): What the function wants to know besides the two answers.
        defaults (dict[str, Any]): Its hyper-parameters.
    """

    name: str
    function: Callable[..., Tensor]
    weight: float = 1.0
    temperature: float | None = None
    adapter: Callable[[int, int], nn.Module] | None = None
    last: bool = False
    standardize: bool = False
    of: str = "images"
    context: frozenset[str] = field(init=False)
    defaults: dict[str, Any] = field(init=False)

    def __post_init__(self):
        """Read the function's signature."""
        _, _, *others = inspect.signature(self.function).parameters.values()
        keyword_only = inspect.Parameter.KEYWORD_ONLY
        for p in others:
            if p.kind == keyword_only and (p.name == "weight" or not isinstance(p.default, (bool, int, float, str))):
                raise TypeError(
                    f"The hyper-parameter '{p.name}' of method '{self.name}' needs a default that is a number, a bool "
                    f"or a method's name, and another name than 'weight', which is the method's share."
                )
        object.__setattr__(self, "context", frozenset(p.name for p in others if p.kind != keyword_only))
        object.__setattr__(self, "defaults", {p.name: p.default for p in others if p.kind == keyword_only})


@dataclass(frozen=True)
class Choice:
    """A method with the weight and the hyper-parameters that were asked for."""

    method: Method
    share: float = 1.0  # of the weight
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def needs_labels(self) -> bool:
        """Whether the loss, or the one that it is made of, needs labels."""
        inner = [self.settings.get(k, v) for k, v in self.method.defaults.items() if isinstance(v, str)]
        if inner:
            return any(choice.needs_labels for choice in choose("response_method", inner[0]))
        return "labels" in self.method.context

    def temperature(self, training: float) -> float | None:
        """Return the temperature in force, given that of the training; None if the loss has none."""
        if "temperature" not in self.method.context:
            return None
        return self.settings.get("temperature", self.method.temperature or training)

    def __call__(self, student: Tensor, teacher: Tensor, **known: Any) -> Tensor:
        """Return the loss of a student's and a teacher's answer, given all that the caller knows."""
        if self.method.temperature is not None:
            known["temperature"] = self.method.temperature
        context = {k: v for k, v in known.items() if k in self.method.context}
        return self.method.function(student, teacher, **{**context, **self.settings})


def response_method(
    name: str, *, weight: float = 1.0, temperature: float | None = None, of: str = "images"
) -> Callable[[Callable], Callable]:
    """Register a loss on logits, to be chosen as `response_method=name`.

    The function takes the student's and the teacher's logits, both (B, C) and at least float32, B and C greater than 0,
    and returns a scalar. A method of anchors, for detectors and the like, takes (B, C, A) and returns (B, A).
    Parameters named `labels`, class indices of shape (B,) and int64, and `temperature`, a float, are given if it has
    them. Keyword-only parameters are hyper-parameters: a number, a bool or a method's name.

    Args:
        name (str): Name to choose it by; a method of this name is replaced.
        weight (float): Weight in the sum of the losses.
        temperature (float, optional): The method's own temperature, in place of the training's.
        of (str): What has the logits, "images" or "anchors".

    Returns:
        (Callable): A decorator that leaves the function as it is.

    Raises:
        TypeError: If a hyper-parameter has no such default, or is named `weight`.
    """
    return _register("response_method", name, weight=weight, temperature=temperature, of=of)


def feature_method(
    name: str,
    *,
    weight: float = 1.0,
    adapter: Callable[[int, int], nn.Module] | None = None,
    last: bool = False,
    standardize: bool = False,
) -> Callable[[Callable], Callable]:
    """Register a loss on feature maps, to be chosen as `feature_method=name`.

    The function takes a student's and a teacher's map of one level, (B, c, h, w) and (B, c', h, w), at least float32,
    and returns a scalar; the loss is its mean over levels. A parameter named `classify` gets the teacher's head, a
    function from its last map to logits; one named `fresh` whether the student's map was made for it alone, by an
    adapter, so that it may be overwritten. Keyword-only parameters are hyper-parameters: a number or a bool.

    Args:
        name (str): Name to choose it by; a method of this name is replaced.
        weight (float): Weight in the sum of the losses.
        adapter (Callable, optional): Makes a module, trained with the student, from the student's and the teacher's
            channels. It is applied to the student's map, or given to a function with a parameter named `adapter`. It
            has to be made of PyTorch's own modules, so that checkpoints open everywhere.
        last (bool): Compare the last level only.
        standardize (bool): Give it the teacher's maps with mean 0 and standard deviation 1 per channel, so that a
            weight means the same for every teacher.

    Returns:
        (Callable): A decorator that leaves the function as it is.

    Raises:
        TypeError: If a hyper-parameter has no such default, or is named `weight`.
    """
    return _register("feature_method", name, weight=weight, adapter=adapter, last=last, standardize=standardize)


def methods(argument: str, of: str = "images") -> dict[str, Method]:
    """Return the methods that can be chosen with an argument, by name.

    Args:
        argument (str): `response_method` or `feature_method`.
        of (str): What has the logits that response methods compare, "images" or "anchors".
    """
    every = _METHODS[argument].items()
    return {name: method for name, method in every if argument == "feature_method" or method.of == of}


def choose(argument: str, value: str | Mapping[str, Any]) -> list[Choice]:
    """Read the value of `response_method` or `feature_method`.

    Args:
        argument (str): Which of the two.
        value (str | Mapping): A name; or names with their shares of the weight, or with their hyper-parameters, among
            which `weight` is the share: `{"mse": 1.0, "rkd": {"weight": 0.5, "angle": 0}}`.

    Returns:
        (list[Choice]): The methods with a share above 0.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If a name or a hyper-parameter is not known, or a number is negative or not finite.
    """
    choices = []
    for name, settings in ({value: 1.0} if isinstance(value, str) else value).items():
        known = _METHODS[argument]
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise ValueError(
                f"'{argument}={name}' is not known{f', but {near[0]!r} is' if near else ''}. Valid methods are "
                f"{sorted(known)}, and those that you register."
            )
        method = known[name]
        settings = dict(settings) if isinstance(settings, Mapping) else {"weight": settings}
        temperature = {"temperature": 1.0} if "temperature" in method.context else {}
        valid = {"weight": 1.0, **temperature, **method.defaults}
        for key, given in settings.items():
            if key not in valid:
                raise ValueError(f"'{argument}={name}' has no hyper-parameter '{key}'. It has {sorted(valid)}.")
            _check(f"{argument}={name}: {key}", given, valid[key])
        share = settings.pop("weight", 1.0)
        if share:
            choices.append(Choice(method, share, settings))
    return choices


def _register(argument: str, name: str, **properties: Any) -> Callable[[Callable], Callable]:
    def decorator(function: Callable) -> Callable:
        _METHODS[argument][name] = Method(name, function, **properties)
        return function

    return decorator


def _check(what: str, given: Any, default: Any) -> None:
    """Refuse a hyper-parameter that is not of its default's type, or out of range."""
    if isinstance(default, str):  # another method
        if not isinstance(given, (str, Mapping)):
            raise TypeError(
                f"'{what}={given}' is of invalid type {type(given).__name__}. Give a name or a dict of names."
            )
        if not choose("response_method", given):
            raise ValueError(f"'{what}={given}' leaves no method with a share above 0. Give one, e.g. {default}.")
    elif isinstance(default, bool):
        if not isinstance(given, bool):
            raise TypeError(f"'{what}={given}' is of invalid type {type(given).__name__}. Give True or False.")
    elif isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"'{what}={given}' is of invalid type {type(given).__name__}. Give a number, e.g. {default}.")
    elif not 0 <= given < math.inf or (given == 0 and what.endswith("temperature")):
        raise ValueError(f"'{what}={given}' is an invalid value. Give a finite number, not negative, e.g. {default}.")
