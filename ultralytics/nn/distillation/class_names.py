# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Class names: reading them, and matching a teacher's to a dataset's."""

from __future__ import annotations

import reprlib
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from ultralytics.utils import ROOT, YAML
from ultralytics.utils.checks import check_yaml

__all__ = ("imagenet_names", "match_classes", "read_names", "some")


def read_names(names: Any) -> list[str]:
    """Return class names by index.

    Args:
        names (Any): A list, a dict by index, either as text, e.g. `{0: cat, 1: dog}`, or the path of a YAML file that
            holds either as `names`, as those of datasets do. Text is taken as it is written, also where YAML would read
            a number, e.g. 01, or a truth value, e.g. no.

    Raises:
        FileNotFoundError: If the YAML file does not exist.
        TypeError: If it is none of these.
        ValueError: If indices are missing.
    """
    if isinstance(names, (str, Path)):
        text = str(names)
        if text.lower().endswith((".yaml", ".yml")):
            text = Path(check_yaml(text)).read_text(encoding="utf-8", errors="ignore")
        elif not text.startswith(("[", "{")):
            raise TypeError(f"Class names must be a list, a dict or a YAML file of them, but are '{text:.100}'.")
        try:
            content = yaml.load(text, yaml.BaseLoader)  # in which every value is text
        except yaml.YAMLError as e:
            raise TypeError(f"'{names!s:.100}' is no YAML of class names ({' '.join(str(e).split()):.100}).") from e
        names = content.get("names", content) if isinstance(content, dict) else content
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

    Case, spaces, underscores and Unicode's normal forms do not matter, unless both know exactly the same names. If what
    has no partner so are the same numbers, leading zeros do not matter; else it is matched as YAML reads it, which
    upstream does to a dataset's names: 01 and 1, no and False. A dataset whose folders are ImageNet's identifiers, e.g.
    `n01440764`, finds them in a teacher of ImageNet's 1000 classes.

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
    matched: dict[int, int] = {}
    for key in (_key, _number_key, _yaml_key):
        theirs = _by_key(key, teacher, matched.values())
        ours = _by_key(key, dataset, matched)
        if key is _number_key and ours.keys() != theirs.keys():
            continue
        shared = [k for k in ours if k in theirs]
        ambiguous = [
            f"'{dataset[i]}' and '{teacher[j]}'"
            for k in shared
            for i in ours[k]
            for j in theirs[k]
            if len(ours[k]) > 1 or len(theirs[k]) > 1
        ]
        if ambiguous:
            raise ValueError(
                f"Classes of the dataset and the teacher match in several ways, as case, spaces and underscores do not "
                f"count: {', '.join(ambiguous)}. Name the teacher's classes with 'teacher_names'."
            )
        matched |= {ours[k][0]: theirs[k][0] for k in shared}
    return dict(sorted(matched.items()))


def _key(name: str) -> str:
    """Return what counts of a name."""
    return "".join(unicodedata.normalize("NFKC", name).split()).replace("_", "").casefold()


def _number_key(name: str) -> str:
    """Return what counts of a name that is a number."""
    return str(int(name)) if name.isdecimal() else _key(name)


def _yaml_key(name: str) -> str:
    """Return what counts of a name that YAML has read where it is not quoted, unless it says another number so."""
    if ":" in name or (name.isdecimal() and name[0] == "0" and len(name.lstrip("0")) > 1):  # base 60, base 8
        return _key(name)
    try:
        value = yaml.safe_load(name)
    except (yaml.YAMLError, ValueError):  # e.g. a colon, or a date that is none
        value = name
    return _key(str(value) if isinstance(value, (int, float)) else name)


def _by_key(key: Callable[[str], str], names: Sequence[str], left_out: Collection[int]) -> dict[str, list[int]]:
    """Return the indices of names by what counts of them, without some."""
    indices = defaultdict(list)
    for i, name in enumerate(names):
        if i not in left_out:
            indices[key(name)].append(i)
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
