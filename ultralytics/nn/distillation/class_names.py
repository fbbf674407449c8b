# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Class names: reading them, and matching a teacher's to a dataset's."""

from __future__ import annotations

import reprlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ultralytics.utils import ROOT, YAML
from ultralytics.utils.checks import check_yaml

__all__ = ("imagenet_names", "match_classes", "read_names", "some")


def read_names(names: Any) -> list[str]:
    """Return class names by index.

    Args:
        names (Any): A list, a dict by index, or the path of a YAML file that holds either as `names`, as those of
            datasets do.

    Raises:
        FileNotFoundError: If the YAML file does not exist.
        TypeError: If it is none of these.
        ValueError: If indices are missing.
    """
    if isinstance(names, (str, Path)):
        if not str(names).lower().endswith((".yaml", ".yml")):
            raise TypeError(f"Class names must be a list, a dict or a YAML file of them, but are '{names!s:.100}'.")
        content = YAML.load(check_yaml(str(names)))
        names = content.get("names", content)
    if isinstance(names, Mapping):
        by_index = {int(index): name for index, name in names.items()} if all(map(_is_index, names)) else {}
        if sorted(by_index) != list(range(len(names))):
            raise ValueError(
                f"Class names need the indices 0 to {len(names) - 1}, but have {reprlib.repr(list(names))}."
            )
        names = [by_index[i] for i in range(len(names))]
    if not isinstance(names, Sequence) or not names or not all(isinstance(n, (str, int)) for n in names):
        raise TypeError(f"Class names must be a list, a dict or a YAML file of them, but are {reprlib.repr(names)}.")
    return [str(name) for name in names]


def imagenet_names() -> list[str]:
    """Return upstream's names of ImageNet's 1000 classes in their usual order."""
    return list(_imagenet()["names"].values())


def match_classes(teacher: Sequence[str], dataset: Sequence[str]) -> dict[int, int]:
    """Match a dataset's classes to a teacher's by name.

    Case, spaces and underscores do not matter, unless both know exactly the same names. A dataset whose folders are
    ImageNet's identifiers, e.g. `n01440764`, finds them in a teacher of ImageNet's 1000 classes.

    Args:
        teacher (Sequence[str]): The teacher's class names by index.
        dataset (Sequence[str]): The dataset's class names by index.

    Returns:
        (dict[int, int]): The teacher's index by the dataset's, for the shared classes, in the dataset's order.

    Raises:
        ValueError: If a name of one matches several of the other.
    """
    identifiers = list(_imagenet()["map"]) if any(map(_is_identifier, dataset)) else []
    if identifiers and _is_imagenet(teacher):
        teacher = identifiers
    if len(set(teacher)) == len(teacher) and set(teacher) == set(dataset):
        return {i: teacher.index(name) for i, name in enumerate(dataset)}
    theirs, ours = _by_key(teacher), _by_key(dataset)
    shared = [key for key in ours if key in theirs]
    ambiguous = [
        f"'{dataset[i]}' and '{teacher[j]}'"
        for key in shared
        for i in ours[key]
        for j in theirs[key]
        if len(ours[key]) > 1 or len(theirs[key]) > 1
    ]
    if ambiguous:
        raise ValueError(
            f"Classes of the dataset and the teacher match in several ways, as case, spaces and underscores do not "
            f"count: {', '.join(ambiguous)}. Name the teacher's classes with 'teacher_names'."
        )
    return {ours[key][0]: theirs[key][0] for key in shared}


def _key(name: str) -> str:
    """Return what counts of a name."""
    return "".join(name.split()).replace("_", "").casefold()


def _by_key(names: Sequence[str]) -> dict[str, list[int]]:
    """Return the indices of names by what counts of them."""
    indices = defaultdict(list)
    for i, name in enumerate(names):
        indices[_key(name)].append(i)
    return indices


def _is_index(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.isdecimal())


def _is_identifier(name: str) -> bool:
    """Tell an ImageNet identifier: n and eight digits."""
    return len(name) == 9 and name[0] == "n" and name[1:].isdecimal()


def _is_imagenet(names: Sequence[str]) -> bool:
    """Tell ImageNet's classes in their usual order, in most of upstream's two spellings."""
    content = _imagenet()
    spellings = (content["names"].values(), content["map"].values())
    known = zip(names, *spellings, strict=False)
    return len(names) == 1000 and sum(_key(n) in (_key(a), _key(b)) for n, a, b in known) > 500


@cache
def _imagenet() -> dict[str, Any]:
    """Return upstream's description of ImageNet: `names` by index, and `map` from identifiers in the same order."""
    return YAML.load(ROOT / "cfg/datasets/ImageNet.yaml")


def some(names: Sequence[str]) -> str:
    """Return the first few names, for a sentence."""
    return "(" + ", ".join(f"'{name}'" for name in names[:5]) + ", ..." * (len(names) > 5) + ")"
